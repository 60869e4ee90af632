//! The model and its training: layouts, published numbers, checkpoints, resuming, optimizers, micro-batches.

mod accumulation;
mod checkpoints;
mod codebooks;
mod generation;
mod golden;
mod layouts;
mod recompute;
mod resume;
#[path = "../support/training.rs"]
mod runs;
mod training;
mod transformer;
