//! Training: data, schedule, optimizer, and the step that joins them.
//!
//! ```text
//! ByteText -> Batches -> Trainer::step (loss, gradients, AdamW, codebooks) -> checkpoint
//!                            ^ Schedule's factor
//! ```

mod adamw;
mod batches;
pub mod checkpoint;
mod key_values;
mod schedule;
mod text;
mod trainer;

pub use adamw::AdamW;
pub use batches::{Batch, BatchConfig, Batches};
pub use checkpoint::{Budget, Progress, RecentLoss};
pub use schedule::Schedule;
pub use text::{ByteText, Pieces};
pub use trainer::{StepReport, Trainer};
