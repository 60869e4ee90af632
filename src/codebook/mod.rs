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
//! 4. backward with this C: it must not change between forward and backward; [`Estimator::key_gradient`];
//! 5. [`CodeStats`] of the keys, those of micro-batches and machines merged;
//! 6. one [`Codebook::update`], for moving averages; for codewords that learn by gradient, [`codebook_loss::backward`]
//!    through [`Codebook::backward`], and a step of your optimizer to [`Codebook::set_parameters`]; every few steps a
//!    [`Codebook::revive`].
//!
//! Evaluation leaves out 5 and 6: nothing else changes a codebook.
//!
//! C is derived from the state of whatever the codebook learns by ([`Learning`]) and never stored beside it, so the two
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

pub mod assign;
pub mod codebook_loss;
pub mod commitment;
pub mod cosine;
mod directional;
mod ema;
pub(crate) mod estimator;
pub mod groups;
mod kmeans;
mod learning;
mod linear;
pub mod orthogonal;
pub(crate) mod packed;
mod pairs;
mod random;
pub mod residual;
pub mod revive;
mod rotation;
mod rotation_rows;
pub mod start;
mod stats;

pub use assign::{assign, assign_naive};
pub use ema::{Ema, Smoothing};
pub use estimator::{Estimator, lookup};
pub use learning::{Basis, CodebookParameters, Learning};
pub use pairs::nearest_pair;
pub use residual::Residual;
pub use revive::Replacement;
pub use rotation::{Rotation, RotationScale, RotationVariant};
pub use stats::CodeStats;

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, ArrayView4};

use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// One table of codewords per head, and the way it learns.
///
/// ```
/// use transformer_vq::codebook::{CodeStats, Codebook, codebook_loss};
/// use transformer_vq::ndarray::{Array3, array};
///
/// // SimVQ: two codewords, a frozen basis that is the identity, and a matrix that learns.
/// let basis = array![[[1.0, 0.0], [0.0, 1.0]]]; // [H, S, f]
/// let weight = array![[[0.0, 4.0], [0.0, 4.0]]]; // [H, K, f]: a codeword per column
/// let mut codebook = Codebook::linear(basis, weight, None, false)?;
/// let keys = array![[[[1.0, 1.0], [1.0, -1.0]]]];
///
/// let (codes, codewords) = (codebook.assign(keys.view())?, codebook.codewords());
/// let stats = CodeStats::collect(keys.view(), codes.view(), codebook.n_codes(), None)?;
/// let d_codewords = codebook_loss::backward(&stats, codewords.view(), 1.0)?;
/// let mut gradients = codebook.parameters().zeros_like();
/// codebook.backward(d_codewords.view(), &mut gradients)?;
///
/// let mut parameters = codebook.parameters().clone();
/// for ((_, mut p), (_, d)) in parameters.views_mut().into_iter().zip(gradients.views()) {
///     p.scaled_add(-0.5, &d); // or what your optimizer does
/// }
/// codebook.set_parameters(parameters)?;
/// assert_eq!(codebook.codewords(), array![[[1.0, 0.0], [4.0, 4.0]]]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook<T> {
    learning: Learning<T>,
    parameters: CodebookParameters<T>,
}

impl<T: Scalar> Codebook<T> {
    /// A codebook from its parts.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parameters that this kind of learning does not have or lacks, [`Error::Shape`],
    /// [`Error::Empty`] (H, S, K or f = 0), [`Error::NotFinite`] (the codewords count as well).
    pub fn new(learning: Learning<T>, parameters: CodebookParameters<T>) -> Result<Self, Error> {
        learning.check(&parameters)?;
        Ok(Self { learning, parameters })
    }

    /// What [`Learning::check`] has accepted.
    #[cfg(feature = "model")]
    pub(crate) fn from_parts(learning: Learning<T>, parameters: CodebookParameters<T>) -> Self {
        Self { learning, parameters }
    }

    /// A codebook whose codewords are moving averages of their keys.
    pub fn ema(ema: Ema<T>) -> Self {
        Self { learning: Learning::Ema(ema), parameters: CodebookParameters::default() }
    }

    /// A codebook whose codewords [H, S, K] are a parameter.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn gradient(codewords: Array3<T>) -> Result<Self, Error> {
        Self::new(
            Learning::Gradient,
            CodebookParameters { codewords: Some(codewords), ..CodebookParameters::default() },
        )
    }

    /// A codebook whose codewords are `basis weight^T + bias` (SimVQ); `learned` says whether the basis is a parameter as the
    /// weight and the bias are.
    ///
    /// # Shapes
    /// `basis` [H, S, f], `weight` [H, K, f], `bias` [H, K].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn linear(
        basis: Array3<T>,
        weight: Array3<T>,
        bias: Option<Array2<T>>,
        learned: bool,
    ) -> Result<Self, Error> {
        let parameters = CodebookParameters { weight: Some(weight), bias, ..CodebookParameters::default() };
        if learned {
            let parameters = CodebookParameters { basis: Some(basis), ..parameters };
            return Self::new(Learning::Linear(Basis::Learned), parameters);
        }
        Self::new(Learning::Linear(Basis::Frozen(basis)), parameters)
    }

    /// A codebook whose codewords [H, S, K] stay as they are.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn frozen(codewords: Array3<T>) -> Result<Self, Error> {
        Self::new(Learning::Frozen(codewords), CodebookParameters::default())
    }

    /// How it learns, and the state of that.
    pub fn learning(&self) -> &Learning<T> {
        &self.learning
    }

    /// What an optimizer moves.
    pub fn parameters(&self) -> &CodebookParameters<T> {
        &self.parameters
    }

    /// Takes the parameters as an optimizer has moved them.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Shape`] if H, S or K would change. Then nothing has changed.
    pub fn set_parameters(&mut self, parameters: CodebookParameters<T>) -> Result<(), Error> {
        self.parameters.check_like("parameters", &parameters)?;
        self.learning.check(&parameters)?;
        self.parameters = parameters;
        Ok(())
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

    /// H, S and K.
    pub(crate) fn dim(&self) -> (usize, usize, usize) {
        self.learning.dim(&self.parameters)
    }

    /// The codewords [H, S, K], derived from the state.
    pub fn codewords(&self) -> Array3<T> {
        compiled_here!(T, Codebook::<T>::codewords_here, fn(&Codebook<T>) -> Array3<T>)(self)
    }

    fn codewords_here(&self) -> Array3<T> {
        self.learning.codewords(&self.parameters)
    }

    /// Adds to `gradients`, made by [`CodebookParameters::zeros_like`], what the parameters get of a gradient of the codewords.
    ///
    /// That gradient may be of [`codebook_loss::backward`], of [`Estimator::codeword_gradient`], of attention
    /// ([`BatchGradients::codewords`](crate::attention::BatchGradients::codewords)), or a sum of them. Moving averages and
    /// frozen codewords have no parameters: nothing is added.
    ///
    /// # Shapes
    /// `d_codewords` [H, S, K].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Invalid`] for gradients of another kind of learning. Then nothing has
    /// been added.
    pub fn backward(
        &self,
        d_codewords: ArrayView3<'_, T>,
        gradients: &mut CodebookParameters<T>,
    ) -> Result<(), Error> {
        compiled_here!(
            T,
            Codebook::<T>::backward_here,
            fn(&Codebook<T>, ArrayView3<'_, T>, &mut CodebookParameters<T>) -> Result<(), Error>
        )(self, d_codewords, gradients)
    }

    fn backward_here(
        &self,
        d_codewords: ArrayView3<'_, T>,
        gradients: &mut CodebookParameters<T>,
    ) -> Result<(), Error> {
        let (n_heads, n_codes, d_k) = self.dim();
        check_shape("d_codewords", &[n_heads, n_codes, d_k], d_codewords.shape())?;
        check_finite("d_codewords", d_codewords)?;
        self.parameters.check_like("gradients", gradients)?;
        self.learning.backward(&self.parameters, d_codewords, gradients);
        Ok(())
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

    /// Learns from the statistics of one step, all of its micro-batches merged, if it learns by moving averages. Otherwise
    /// statistics change nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are of another size, [`Error::NotFinite`] if they, or the codewords they would lead to, are.
    /// Then nothing has changed.
    pub fn update(&mut self, stats: &CodeStats<T>) -> Result<(), Error> {
        let (n_heads, n_codes, d_k) = self.dim();
        check_shape("stats", &[n_heads, n_codes, d_k], stats.sums().shape())?;
        self.learning.update(stats)
    }

    /// The same codebook in another precision.
    pub fn cast<U: Scalar>(&self) -> Codebook<U> {
        Codebook { learning: self.learning.cast(), parameters: self.parameters.cast() }
    }
}

/// Checks that every code [B, H, T] is below the number of codes.
fn check_codes(codes: ArrayView3<'_, u32>, n_codes: usize) -> Result<(), Error> {
    // One pass without branches decides; only a failure looks for the place.
    let largest = match codes.as_slice_memory_order() {
        Some(codes) => on_best_simd!(largest(codes)),
        None => codes.fold(0, |largest, &code| largest.max(code)),
    };
    if (largest as usize) < n_codes || codes.is_empty() {
        return Ok(());
    }
    let mut all = codes.indexed_iter();
    let found = all.find(|&(_, &code)| code as usize >= n_codes);
    let ((sequence, head, position), &code) = found.expect("one is beyond");
    Err(Error::OutOfRange {
        what: "codes",
        index: vec![sequence, head, position],
        got: code.into(),
        limit: n_codes,
    })
}

#[inline(always)]
fn largest(codes: &[u32]) -> u32 {
    let mut largest = 0;
    for &code in codes {
        largest = code.max(largest);
    }
    largest
}

/// Checks that a mask, where there is one, has the shape [B, T].
fn check_mask(mask: Option<ArrayView2<'_, bool>>, n_sequences: usize, len: usize) -> Result<(), Error> {
    mask.map_or(Ok(()), |mask| check_shape("mask", &[n_sequences, len], mask.shape()))
}
