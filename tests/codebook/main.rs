//! Codebooks: codes, learning, gradients through the quantizer, starting and reviving, metrics.

mod assign;
mod codewords;
mod corners;
mod estimators;
mod laws;
mod learning;
mod moving_averages;
mod refusals;
mod residual;
mod revive;
mod rotation_corners;
mod start;
mod statistics;
#[allow(dead_code)] // each test takes its part
#[path = "../support/mod.rs"]
mod support;
mod updates;
