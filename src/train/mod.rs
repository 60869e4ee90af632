//! Training: data, schedule, optimizer, and the step that joins them.
//!
//! ```text
//! Corpus -> Batches -> Trainer::gradients -> (merge) -> Trainer::apply -> checkpoint
//!                      micro-batches         machines   hook, clip, optimizer by groups, codebooks
//!                                                       ^ Schedule's factor
//! ```
//!
//! Read in this order: [`Trainer`], [`Gradients`], [`Optimizer`], [`ParameterGroup`], [`Schedule`], [`Corpus`], [`Batches`]. An
//! encoder has a trainer of its own, [`EncoderTrainer`].

pub mod checkpoint;
mod data;
mod encoder_trainer;
mod gradients;
mod optimizer;
mod report;
mod schedule;
mod trainer;

pub use checkpoint::{Budget, Progress, RecentLoss};
#[cfg(feature = "tokenizers")]
pub use data::Tokenizer;
pub use data::{Batch, BatchConfig, Batches, Corpus, ImageShape, Pieces, TextSize};
pub use encoder_trainer::EncoderTrainer;
pub use gradients::Gradients;
pub use optimizer::{Adafactor, AdamW, Lion, Optimizer, ParameterGroup};
pub use report::StepReport;
pub use schedule::{Decay, Schedule};
pub use trainer::Trainer;
