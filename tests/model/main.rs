//! The model and its training: layouts, published numbers, checkpoints, resuming, optimizers, micro-batches.

mod accumulation;
mod checkpoints;
mod codebooks;
mod golden;
mod layouts;
mod resume;
#[allow(dead_code)] // each test takes its part
#[path = "../support/training.rs"]
mod runs;
mod training;
mod transformer;
