//! Softmax attention in linear time, through a learned codebook.
//!
//! (The essay is written last; see the modules.)
//!
//! # Notation
//! One letter, one meaning, everywhere in this crate:
//!
//! | letter | meaning |
//! |---|---|
//! | `B` | sequences in a batch |
//! | `T` | tokens of a sequence, or of one piece of it |
//! | `L` | block length |
//! | `M` | window length |
//! | `S` | codes in a codebook |
//! | `H` | heads |
//! | `K`, `V` | width of a key and of a value, per head |
//! | `D` | width of the model |

#![deny(unsafe_code)]
#![warn(missing_docs, missing_debug_implementations)]

pub mod attention;
pub mod check;
pub mod codebook;
mod error;
pub mod ops;
mod scalar;

#[cfg(feature = "model")]
pub mod generate;
#[cfg(feature = "model")]
pub mod model;
#[cfg(feature = "model")]
pub mod train;

pub use error::Error;
pub use ndarray;
pub use scalar::Scalar;
