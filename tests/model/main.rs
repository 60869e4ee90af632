//! The model and its training: layouts, published numbers, checkpoints, resuming, optimizers, micro-batches, the encoder.

mod accumulation;
mod checkpoints;
mod codebooks;
mod encoder;
mod generation;
mod golden;
mod layouts;
mod recompute;
mod resume;
#[path = "../support/training.rs"]
mod runs;
mod training;
mod transformer;
#[path = "../../examples/support/worst.rs"]
mod worst;
