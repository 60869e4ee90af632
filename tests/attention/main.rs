//! Attention: every form against the definition, laws, documents, bidirectional, batch x heads.

mod bidirectional;
mod bidirectional_heads;
mod documents;
mod forms;
mod groups;
mod heads;
mod laws;
mod prepared;
mod quadratic;
#[allow(dead_code)] // each test takes its part
#[path = "../support/mod.rs"]
mod support;
