//! What is learned from: texts, and batches drawn from them.

mod batches;
mod corpus;

pub use batches::{Batch, BatchConfig, Batches};
pub use corpus::{ByteText, Pieces};
