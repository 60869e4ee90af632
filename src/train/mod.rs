//! Training: data, schedule, optimizer, and the step that joins them.
//!
//! ```text
//! ByteText -> Batches -> Trainer::gradients -> (merge) -> Trainer::apply -> checkpoint
//!                        micro-batches         machines   hook, clip, optimizer by groups, codebooks
//!                                                         ^ Schedule's factor
//! ```
//!
//! Read in this order: [`Trainer`], [`Gradients`], [`Optimizer`], [`ParameterGroup`], [`Schedule`], [`Batches`].

pub mod checkpoint;
mod data;
mod gradients;
mod optimizer;
mod schedule;
mod trainer;

pub use checkpoint::{Budget, Progress, RecentLoss};
pub use data::{Batch, BatchConfig, Batches, ByteText, Pieces};
pub use gradients::Gradients;
pub use optimizer::{Adafactor, AdamW, Lion, Optimizer, ParameterGroup};
pub use schedule::{Decay, Schedule};
pub use trainer::{StepReport, Trainer};
