//! Codes and values in, outputs out: exact softmax attention over quantized keys, in linear time.
//!
//! Every key `k_j` has been replaced by its codeword `c_{z_j}` (see [`codebook`](crate::codebook)), so the content
//! score of a query with any key is one of only S numbers:
//!
//! ```text
//! a_is = (q_i + u) . c_s                                    content score of code s
//! d_ij = (q_i + w) . r_{i-j}  for 0 <= i-j <= M, else 0     relative bias, local only
//! s_ij = a_{i, z_j} + d_ij
//! o_i  = sum_{j<=i} softmax_j(s_ij) v_j
//! ```
//!
//! That is the definition, quadratic as it stands ([`naive`]). The other forms compute the same numbers faster. They cut
//! positions into blocks of L. To the queries of the block that begins at `start`, keys are of two kinds:
//!
//! ```text
//! token      0 ............... start-M | start-M ..... start | start ...... i
//! read through the codebook            | exact window        | this block
//! score      a_is + ln N_s,  s < S     | a_{i, z_j} + d_ij   | the same,  j <= i
//! value      mean of v with code s     | v_j                 | v_j
//! ```
//!
//! The distant past is one count `N_s` and one mean value per code ([`CompressiveCache`]): it does not grow.
//!
//! | form | cost for T tokens | for |
//! |---|---|---|
//! | [`naive`] | T^2 (K + V) | the definition: tests, reading |
//! | [`blockwise`] | T (S + M + L) (K + V) | training, encoding, prompts |
//! | [`stream`] | (S + M) (K + V) per token | decoding |
//! | [`quadratic`] | T^2 (K + V) | exact attention without a codebook: what speed-ups are measured against |
//! | [`bidirectional`] | T S (K + V) | encoders, and queries and keys of two sequences: no order of time |
//!
//! A sequence may hold several documents ([`Inputs::starts`]): each form attends to each of them as if it had been fed alone.
//!
//! These work on one head of one sequence. [`VqAttention::forward`] quantizes keys and runs many of them, over
//! batch x heads, in parallel. Source: Transformer-VQ (Lingle, arXiv 2309.16354).

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, s};

use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

pub mod bidirectional;
mod block;
pub mod blockwise;
mod cache;
mod documents;
mod heads;
mod kernels;
pub mod naive;
pub mod quadratic;
mod skew;
mod state;
pub mod stream;
mod tile;

pub use bidirectional::{
    BidirectionalAttention, BidirectionalGradients, BidirectionalInputs, BidirectionalOutput,
    BidirectionalSaved,
};
pub use cache::CompressiveCache;
#[cfg(feature = "model")]
pub(crate) use heads::HeadColumns;
pub use heads::{
    BatchBiasGradients, BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved, PreparedHeads,
};
pub use state::{AttentionState, WindowKeys};

/// What kind of attention: block length, window, and how far values and gradients reach.
///
/// ```
/// use transformer_vq::attention::VqAttention;
///
/// let attention = VqAttention { block_len: 128, window: 128, ..VqAttention::default() };
/// attention.validate()?;
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "model", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct VqAttention {
    /// L, tokens: how many queries share one cache. At least 1. Outputs do not depend on it, speed does; so does the
    /// reach of the gradient to keys.
    pub block_len: usize,
    /// M, tokens: keys up to this distance carry a relative bias and are attended one by one.
    pub window: usize,
    /// Whether keys beyond the window are seen at all (through the compressive cache). Off: a query sees the M keys
    /// before it and itself.
    pub cache: bool,
    /// Whether keys and values of earlier blocks receive gradient from later ones. Off: what one block hands to the
    /// next is a constant.
    pub gradient_through_cache: bool,
}

impl Default for VqAttention {
    fn default() -> Self {
        VqAttention { block_len: 128, window: 128, cache: true, gradient_through_cache: true }
    }
}

/// One head of one sequence, or of one piece of it.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Queries [T, K], already scaled.
    pub q: ArrayView2<'a, T>,
    /// The code of every key `[T]`, each below S.
    pub codes: ArrayView1<'a, u32>,
    /// Values [T, V].
    pub v: ArrayView2<'a, T>,
    /// Today's codewords [S, K].
    pub codewords: ArrayView2<'a, T>,
    /// Relative biases, if any.
    pub biases: Option<Biases<'a, T>>,
    /// Where documents start `[T]`: true at the first token of each. Neither that token nor a later one sees anything before
    /// it. Without it, all tokens belong to the document of the carried state.
    pub starts: Option<ArrayView1<'a, bool>>,
}

/// Relative biases of one head (Transformer-XL).
#[derive(Debug, Clone, Copy)]
pub struct Biases<'a, T> {
    /// u `[K]`, added to the query for content scores.
    pub content: ArrayView1<'a, T>,
    /// w `[K]`, added to the query for position scores.
    pub position: ArrayView1<'a, T>,
    /// r [M+1, K], row d belongs to the distance d = i - j.
    pub relative: ArrayView2<'a, T>,
}

/// What attention returns for one head of one piece.
#[derive(Debug, Clone)]
pub struct Output<T> {
    /// o [T, V].
    pub out: Array2<T>,
    /// Logarithm of the sum of `exp(score)` over everything that the query sees `[T]`, nats.
    pub lse: Array1<T>,
    /// The share of each query's attention that fell on cached codes `[T]`, between 0 and 1. It depends on where blocks
    /// begin: the cache of a block ends M tokens before it.
    pub cached_mass: Array1<T>,
}

impl<T: Scalar> Output<T> {
    fn zeros(inputs: &Inputs<'_, T>) -> Self {
        let (out, t) = (Array2::zeros(inputs.v.raw_dim()), inputs.q.nrows());
        Output { out, lse: Array1::zeros(t), cached_mass: Array1::zeros(t) }
    }

    /// Where the forms write.
    fn rows(&mut self) -> blockwise::RowOutputs<'_, T> {
        let contiguous = "freshly made";
        blockwise::RowOutputs {
            out: self.out.view_mut(),
            lse: self.lse.as_slice_mut().expect(contiguous),
            cached_mass: self.cached_mass.as_slice_mut().expect(contiguous),
        }
    }
}

/// Gradients of one head of one piece.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// [T, K].
    pub q: Array2<T>,
    /// Of the quantized keys, as far as they were attended one by one [T, K].
    pub k_hat: Array2<T>,
    /// [T, V].
    pub v: Array2<T>,
    /// Of the codewords through which cached keys were read [S, K].
    pub codewords: Array2<T>,
    /// Of the relative biases, if there are any.
    pub biases: Option<BiasGradients<T>>,
}

/// Gradients of [`Biases`].
#[derive(Debug, Clone)]
pub struct BiasGradients<T> {
    /// Of u `[K]`.
    pub content: Array1<T>,
    /// Of w `[K]`.
    pub position: Array1<T>,
    /// Of r [M+1, K].
    pub relative: Array2<T>,
}

impl<T: Scalar> BiasGradients<T> {
    /// Adds those of other queries.
    fn add(&mut self, other: &Self) {
        self.content += &other.content;
        self.position += &other.position;
        self.relative += &other.relative;
    }
}

impl VqAttention {
    /// Checks that this can be computed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the block length is zero or block and window together exceed 2^31 tokens.
    pub fn validate(&self) -> Result<(), Error> {
        if self.block_len == 0 {
            return Err(Error::invalid("block_len", "at least 1", self.block_len));
        }
        if self.block_len.checked_add(self.window).is_none_or(|n| n > 1 << 31) {
            let got = format!("{} + {}", self.block_len, self.window);
            return Err(Error::invalid("block_len + window", "at most 2^31", got));
        }
        Ok(())
    }
}

impl<T: Scalar> Inputs<'_, T> {
    /// Checks shapes, codes and finiteness, and that `state` belongs to these sizes.
    pub(crate) fn check(&self, attention: &VqAttention, state: &AttentionState<T>) -> Result<(), Error> {
        attention.validate()?;
        let (t, k) = self.q.dim();
        let s = self.codewords.nrows();
        check_shape("codes", &[t], self.codes.shape())?;
        check_shape("v", &[t, self.v.ncols()], self.v.shape())?;
        check_shape("codewords", &[s, k], self.codewords.shape())?;
        if self.codewords.is_empty() {
            return Err(Error::Empty { what: "codewords" });
        }
        check_finite("q", self.q)?;
        check_finite("v", self.v)?;
        check_finite("codewords", self.codewords)?;
        if let Some(starts) = &self.starts {
            check_shape("starts", &[t], starts.shape())?;
        }
        if let Some(biases) = &self.biases {
            check_shape("biases.content", &[k], biases.content.shape())?;
            check_shape("biases.position", &[k], biases.position.shape())?;
            check_shape("biases.relative", &[attention.window + 1, k], biases.relative.shape())?;
            check_finite("biases.content", biases.content)?;
            check_finite("biases.position", biases.position)?;
            check_finite("biases.relative", biases.relative)?;
        }
        if let Some((i, &code)) = self.codes.indexed_iter().find(|&(_, &code)| code as usize >= s) {
            return Err(Error::OutOfRange { what: "codes", index: vec![i], got: code.into(), limit: s });
        }
        state.check(s, k, self.v.ncols(), attention.window)
    }

    /// The same inputs, borrowed for as long as `self` is.
    fn reborrow(&self) -> Inputs<'_, T> {
        Inputs {
            starts: self.starts.as_ref().map(|starts| starts.view()),
            ..self.document(0..self.codes.len())
        }
    }

    /// Those of some tokens that belong to one document.
    fn document(&self, tokens: Range<usize>) -> Inputs<'_, T> {
        Inputs {
            q: self.q.slice(s![tokens.clone(), ..]),
            codes: self.codes.slice(s![tokens.clone()]),
            v: self.v.slice(s![tokens, ..]),
            starts: None,
            codewords: self.codewords.view(),
            biases: self.biases.as_ref().map(|biases| Biases {
                content: biases.content.view(),
                position: biases.position.view(),
                relative: biases.relative.view(),
            }),
        }
    }
}
