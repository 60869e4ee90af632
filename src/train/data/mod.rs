//! What is learned from: tokens of texts, books and pictures, and batches drawn from them.
//!
//! ```text
//! file, folder, PNG images -> documents: bytes, read by ranges -> Corpus: tokens -> Batches, Pieces
//!                                                                 ^ bytes, or those of a tokenizer
//! ```
//!
//! Nothing is held in memory but what was given in memory: a file is opened for each range that is read. (A mapped file would
//! be read without a copy, but Rust cannot promise that nobody changes it meanwhile, so mapping is `unsafe`; a range of a
//! batch is a few kilobytes.) What has to be made, tokens of a tokenizer and pixels of images, is kept in a temporary file.

mod batches;
mod corpus;
mod documents;
mod images;
mod size;
mod spool;
#[cfg(test)]
mod tests;
#[cfg(feature = "tokenizers")]
mod tokenizer;

pub use batches::{Batch, BatchConfig, Batches};
pub use corpus::{Corpus, Pieces};
pub use images::ImageShape;
pub use size::TextSize;
#[cfg(feature = "tokenizers")]
pub use tokenizer::Tokenizer;
