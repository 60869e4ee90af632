//! (train)

mod adamw;
mod batches;
mod schedule;
mod text;

pub use adamw::AdamW;
pub use batches::{Batch, BatchConfig, Batches};
pub use schedule::Schedule;
pub use text::{ByteText, Pieces};
