//! Keys become codes: a small table of codewords per head stands in for all keys.
//!
//! A key is replaced by the nearest of S codewords. Attention then needs one score per query and code, however many keys
//! there are; this is what makes it linear.
//!
//! ```text
//!   keys k ──────► assign ──────► codes z ──────► lookup ──────► quantized keys k^ ──► attention
//!  [B,H,T,K]         ▲           [B,H,T]            ▲             [B,H,T,K]                │
//!      │             │              │               │                                      │ gradient of k^
//!      │             └──────── codewords C ─────────┘                                      ▼
//!      │                         [H,S,K]                                               Estimator
//!      │                            ▲ derived                                              │
//!      ├──── CodeStats ──► update ──┘ from state                                           ▼
//!      │   sums, counts                                                               gradient of k
//!      └──── commitment (k, c_z) ─────────────────────────────────────────────────────────►┘
//! ```
//!
//! What stands beside this line, each usable with any way of learning:
//! - [`start`]: first codewords, random, sampled or by k-means++; [`revive`]: a new start for codes that no key takes;
//! - [`cosine`]: angles instead of distances; [`orthogonal`]: a loss that spreads directions;
//! - [`Residual`]: codebooks in turn, on their own or as the quantizer of an auto-encoder; [`groups`]: one codebook per part of
//!   a vector;
//! - measures: [`CodeStats::usage`], [`CodeStats::entropy`], [`CodeStats::perplexity`], [`commitment::mean_error`],
//!   [`commitment::relative_error`], [`nearest_pair`].
//!
//! The order in one step of training:
//! 1. `C = codebook.codewords()`, once;
//! 2. [`Codebook::assign`] and [`lookup`] with this C, attention forward;
//! 3. the [`commitment`] loss with this C;
//! 4. backward with this C: it must not change between forward and backward;
//! 5. [`CodeStats`] of the keys, those of micro-batches and machines merged;
//! 6. one [`Codebook::update`], and every few steps a [`Codebook::revive`]. Evaluation leaves out 5 and 6: nothing else changes
//!    a codebook.
//!
//! C is derived from the state of whatever the codebook learns by (today [`Ema`]) and never stored beside it, so the two
//! cannot disagree. Codes that tie take the lowest number; they do not depend on how a sequence is cut or on threads.
//!
//! ```
//! use transformer_vq::codebook::{CodeStats, Codebook, Ema, commitment, lookup};
//! use transformer_vq::ndarray::array;
//!
//! let codewords = array![[[0.0, 0.0], [4.0, 0.0]]]; // [H, S, K]
//! let keys = array![[[[1.0, 1.0], [3.0, -1.0], [5.0, 1.0]]]]; // [B, H, T, K]
//! let mut codebook = Codebook::ema(Ema::from_codewords(codewords, 0.5)?);
//!
//! let codes = codebook.assign(keys.view())?;
//! assert_eq!(codes, array![[[0, 1, 1]]]);
//! let codewords = codebook.codewords();
//! let quantized = lookup(codes.view(), codewords.view())?;
//! assert_eq!(quantized, array![[[[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]]]]);
//! assert_eq!(commitment::loss(keys.view(), codes.view(), codewords.view(), None)?, 2.0);
//!
//! let stats = CodeStats::collect(keys.view(), codes.view(), codebook.n_codes(), None)?;
//! codebook.update(&stats)?; // code 1: (4 + 3 + 5) / (1 + 2) = 4, half of each count, half of each sum
//! assert_eq!(codebook.codewords(), array![[[0.5, 0.5], [4.0, 0.0]]]);
//! # Ok::<(), transformer_vq::Error>(())
//! ```

#[allow(missing_docs)]
pub mod assign;
pub mod commitment;
pub mod cosine;
mod ema;
pub(crate) mod estimator;
pub mod groups;
mod kmeans;
pub mod orthogonal;
pub(crate) mod packed;
mod pairs;
mod random;
pub mod residual;
pub mod revive;
pub mod start;
mod stats;

pub use assign::{assign, assign_naive};
pub use ema::Ema;
pub use estimator::{Estimator, lookup};
pub use pairs::nearest_pair;
pub use residual::Residual;
pub use revive::Replacement;
pub use stats::CodeStats;

use ndarray::{Array3, ArrayView2, ArrayView3, ArrayView4};

use crate::error::check_shape;
use crate::{Error, Scalar};

/// One table of codewords per head, and the way it learns.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook<T> {
    learning: Learning<T>,
}

/// How a codebook learns, with the state from which its codewords are derived.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Learning<T> {
    /// Codewords are moving averages of their keys.
    Ema(Ema<T>),
}

impl<T: Scalar> Codebook<T> {
    /// A codebook whose codewords are moving averages of their keys.
    pub fn ema(ema: Ema<T>) -> Self {
        Self { learning: Learning::Ema(ema) }
    }

    /// How it learns, and the state of that.
    pub fn learning(&self) -> &Learning<T> {
        &self.learning
    }

    /// H.
    pub fn n_heads(&self) -> usize {
        self.dim().0
    }

    /// S, of each head.
    pub fn n_codes(&self) -> usize {
        self.dim().1
    }

    /// K.
    pub fn d_k(&self) -> usize {
        self.dim().2
    }

    fn dim(&self) -> (usize, usize, usize) {
        match &self.learning {
            Learning::Ema(ema) => ema.sums().dim(),
        }
    }

    /// The codewords [H, S, K], derived from the state.
    pub fn codewords(&self) -> Array3<T> {
        match &self.learning {
            Learning::Ema(ema) => ema.codewords(),
        }
    }

    /// The code of the nearest codeword for each key, as [`assign_naive`] defines it.
    ///
    /// Runs on the threads of the current rayon pool.
    ///
    /// # Shapes
    /// `keys` [B, H, T, K] of any strides: an array [B, T, H, K] is passed as `view().permuted_axes([0, 2, 1, 3])`. The codes
    /// [B, H, T].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::TooLarge`].
    pub fn assign(&self, keys: ArrayView4<'_, T>) -> Result<Array3<u32>, Error> {
        assign::assign_heads(keys, self.codewords().view())
    }

    /// Learns from the statistics of one step: all of its micro-batches, merged.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are of another size, [`Error::NotFinite`] if they, or the codewords they would lead to, are.
    /// Then nothing has changed.
    pub fn update(&mut self, stats: &CodeStats<T>) -> Result<(), Error> {
        match &mut self.learning {
            Learning::Ema(ema) => ema.update(stats),
        }
    }

    /// The same codebook in another precision.
    pub fn cast<U: Scalar>(&self) -> Codebook<U> {
        match &self.learning {
            Learning::Ema(ema) => Codebook::ema(ema.cast()),
        }
    }
}

/// Checks that every code [B, H, T] is below the number of codes.
fn check_codes(codes: ArrayView3<'_, u32>, n_codes: usize) -> Result<(), Error> {
    let beyond = |&(_, &code): &(_, &u32)| code as usize >= n_codes;
    match codes.indexed_iter().find(beyond) {
        None => Ok(()),
        Some(((sequence, head, position), &code)) => Err(Error::OutOfRange {
            what: "codes",
            index: vec![sequence, head, position],
            got: code.into(),
            limit: n_codes,
        }),
    }
}

/// Checks that a mask, where there is one, has the shape [B, T].
fn check_mask(mask: Option<ArrayView2<'_, bool>>, n_sequences: usize, len: usize) -> Result<(), Error> {
    mask.map_or(Ok(()), |mask| check_shape("mask", &[n_sequences, len], mask.shape()))
}
