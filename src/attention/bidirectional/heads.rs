//! Bidirectional attention over batch x heads: quantize the keys and attend, in one call, with one call back.
//!
//! For every sequence b and head h, in parallel on the threads of the current rayon pool:
//!
//! ```text
//! (1)  z = assign(k)                                 one codebook per key head
//! (2)  o = attention(q, z, v)                        see the module above
//! (3)  commit_loss = sum over heads and dimensions, mean over keys that exist, of |k - c_z|^2
//! (4)  statistics of each code's keys                for the codebook to learn from
//! ```
//!
//! Arrays are laid out as those of [`VqAttention`](crate::VqAttention).

use ndarray::{Array3, Array4, ArrayView2, ArrayView4, Axis, s};

use super::Visible;
use crate::codebook::packed::Table;
use crate::codebook::{CodeStats, Codebook, Estimator};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

mod backward;
mod forward;

/// Attention without an order of time, over batch x heads.
///
/// ```
/// use transformer_vq::attention::{BidirectionalAttention, BidirectionalInputs};
/// use transformer_vq::codebook::{Codebook, Ema, Estimator};
/// use transformer_vq::ndarray::{Array3, Array4};
///
/// // Cross-attention: 5 queries of one sequence, 7 keys of another.
/// let wave = |t: usize, n: usize| Array4::from_shape_fn((1, 2, t, 4), |(_, h, t, k)| ((t * n + h + k) as f32).sin());
/// let (q, k, v) = (wave(5, 3), wave(7, 5), wave(7, 2));
/// let codewords = Array3::from_shape_fn((2, 8, 4), |(h, s, k)| ((s * 5 + h + k) as f32).sin());
/// let codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99)?);
/// let inputs = BidirectionalInputs { q: q.view(), k: k.view(), v: v.view(), key_mask: None };
///
/// let attention = BidirectionalAttention::default();
/// let (output, saved) = attention.forward(&inputs, &codebook)?;
/// assert_eq!(output.out.dim(), (1, 2, 5, 4));
/// let d_out = output.out.mapv(|o| 2.0 * o);
/// let gradients = attention.backward(&inputs, saved, d_out.view(), Estimator::StraightThrough, 1e-4)?;
/// assert_eq!(gradients.k.dim(), (1, 2, 7, 4));
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "model", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct BidirectionalAttention {
    /// Whether keys share the gradient of their codeword ([`key_gradient`](super::key_gradient)), which then passes through the
    /// estimator. Off: keys hear of the commitment loss alone.
    pub key_gradient: bool,
}

/// What bidirectional attention over batch and heads takes: T queries, T' keys.
#[derive(Debug, Clone)]
pub struct BidirectionalInputs<'a, T> {
    /// Queries [B, G H, T, K], already scaled: G query heads in a row share a key head.
    pub q: ArrayView4<'a, T>,
    /// Keys, to be quantized [B, H, T', K].
    pub k: ArrayView4<'a, T>,
    /// Values [B, H, T', V].
    pub v: ArrayView4<'a, T>,
    /// Keys that exist [B, T']: true where they do. Without it, all do. One that does not is seen by no query, is in no loss and
    /// no statistics, and its gradients are 0.
    pub key_mask: Option<ArrayView2<'a, bool>>,
}

/// What bidirectional attention over batch and heads returns.
#[derive(Debug, Clone, Default)]
pub struct BidirectionalOutput<T> {
    /// [B, G H, T, V].
    pub out: Array4<T>,
    /// [B, H, T'].
    pub codes: Array3<u32>,
    /// Logarithm of each query's sum of `exp(score)` [B, G H, T], nats; -infinity where it sees no key.
    pub lse: Array3<T>,
    /// What [`Codebook::update`] learns from.
    pub stats: CodeStats<T>,
    /// `|k - c_z|^2`, summed over key heads and dimensions, averaged over the keys that exist; without a weight.
    pub commit_loss: f64,
}

/// What backward needs of forward: lse, codes, and a count and a mean value per code that occurs.
#[derive(Debug, Clone)]
pub struct BidirectionalSaved<T> {
    /// One per sequence and key head.
    visible: Vec<Visible<T>>,
    lse: Array3<T>,
    codes: Array3<u32>,
    /// The codebook may learn between forward and backward.
    codewords: Array3<T>,
}

/// Gradients of [`BidirectionalInputs`].
#[derive(Debug, Clone, Default)]
pub struct BidirectionalGradients<T> {
    /// [B, G H, T, K].
    pub q: Array4<T>,
    /// Of the keys, from the commitment loss and, with `key_gradient`, through the estimator [B, H, T', K].
    pub k: Array4<T>,
    /// [B, H, T', V].
    pub v: Array4<T>,
    /// Of the codewords [H, S, K]. A codebook that learns by moving averages does not use it.
    pub codewords: Array3<T>,
}

impl BidirectionalAttention {
    /// Quantizes the keys and attends.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite (those of keys that do not exist included).
    pub fn forward<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        codebook: &Codebook<T>,
    ) -> Result<(BidirectionalOutput<T>, BidirectionalSaved<T>), Error> {
        let mut output = BidirectionalOutput::default();
        let saved = self.forward_into(inputs, codebook, &mut output)?;
        Ok((output, saved))
    }

    /// [`forward`](Self::forward) into arrays that the caller keeps: what they hold does not matter, and those of another
    /// shape are replaced.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); what `output` then holds is unspecified.
    pub fn forward_into<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        codebook: &Codebook<T>,
        output: &mut BidirectionalOutput<T>,
    ) -> Result<BidirectionalSaved<T>, Error> {
        compiled_here!(
            T,
            BidirectionalAttention::forward_into_here::<T>,
            fn(
                &BidirectionalAttention,
                &BidirectionalInputs<'_, T>,
                &Codebook<T>,
                &mut BidirectionalOutput<T>,
            ) -> Result<BidirectionalSaved<T>, Error>
        )(self, inputs, codebook, output)
    }

    fn forward_into_here<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        codebook: &Codebook<T>,
        output: &mut BidirectionalOutput<T>,
    ) -> Result<BidirectionalSaved<T>, Error> {
        let (h, _, d_k) = codebook.dim();
        inputs.check(h)?;
        let (b, heads, t, width) = inputs.q.dim();
        check_shape("q", &[b, heads, t, d_k], &[b, heads, t, width])?;
        let table = Table::new(codebook.codewords());
        let (saved, finite) = forward::run(inputs, &table, output);
        if !finite {
            inputs.check_finite()?;
        }
        Ok(saved)
    }

    /// Every gradient of `sum(d_out * out) + commit_weight * commit_loss`.
    ///
    /// `inputs` are those of [`forward`](Self::forward), `d_out` [B, G H, T, V].
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if `saved` comes from other sizes.
    pub fn backward<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        saved: BidirectionalSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
    ) -> Result<BidirectionalGradients<T>, Error> {
        let mut gradients = BidirectionalGradients::default();
        self.backward_into(inputs, saved, d_out, estimator, commit_weight, &mut gradients)?;
        Ok(gradients)
    }

    /// [`backward`](Self::backward) into arrays that the caller keeps, as [`forward_into`](Self::forward_into) does.
    ///
    /// # Errors
    /// As [`backward`](Self::backward); what `gradients` then holds is unspecified.
    pub fn backward_into<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        saved: BidirectionalSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
        gradients: &mut BidirectionalGradients<T>,
    ) -> Result<(), Error> {
        compiled_here!(
            T,
            BidirectionalAttention::backward_into_here::<T>,
            fn(
                &BidirectionalAttention,
                &BidirectionalInputs<'_, T>,
                BidirectionalSaved<T>,
                ArrayView4<'_, T>,
                Estimator,
                f64,
                &mut BidirectionalGradients<T>,
            ) -> Result<(), Error>
        )(self, inputs, saved, d_out, estimator, commit_weight, gradients)
    }

    fn backward_into_here<T: Scalar>(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        saved: BidirectionalSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
        gradients: &mut BidirectionalGradients<T>,
    ) -> Result<(), Error> {
        inputs.check(saved.codewords.len_of(Axis(0)))?;
        let (b, heads, t, d_k) = inputs.q.dim();
        let (_, h, keys, d_v) = inputs.v.dim();
        let n_codes = saved.codewords.len_of(Axis(1));
        check_shape("saved.codewords", &[h, n_codes, d_k], saved.codewords.shape())?;
        check_shape("saved.codes", &[b, h, keys], saved.codes.shape())?;
        check_shape("saved.lse", &[b, heads, t], saved.lse.shape())?;
        for (n, visible) in saved.visible.iter().enumerate() {
            visible.check((n_codes, d_k), d_v)?;
            let mask = inputs.key_mask.as_ref().map(|mask| mask.row(n / h));
            if !visible.counts(saved.codes.slice(s![n / h, n % h, ..]), mask) {
                return Err(Error::invalid("key_mask", "that of forward", "another"));
            }
        }
        check_shape("d_out", &[b, heads, t, d_v], d_out.shape())?;
        if !commit_weight.is_finite() {
            return Err(Error::invalid("commit_weight", "finite", commit_weight));
        }
        estimator.validate()?;
        let losses = (estimator, commit_weight);
        if !backward::run(self, inputs, saved, d_out, losses, gradients) {
            inputs.check_finite()?;
            check_finite("d_out", d_out)?;
        }
        Ok(())
    }
}

impl<T: Scalar> BidirectionalInputs<'_, T> {
    /// Whether sizes fit each other and so many key heads.
    fn check(&self, key_heads: usize) -> Result<(), Error> {
        let (b, heads, _, d_k) = self.q.dim();
        let (_, _, keys, d_v) = self.v.dim();
        check_shape("k", &[b, key_heads, self.k.len_of(Axis(2)), d_k], self.k.shape())?;
        check_shape("v", &[b, key_heads, self.k.len_of(Axis(2)), d_v], self.v.shape())?;
        if heads == 0 || !heads.is_multiple_of(key_heads) {
            let expected = format!("a multiple of the {key_heads} key heads");
            return Err(Error::invalid("heads of q", expected, heads));
        }
        self.key_mask.map_or(Ok(()), |mask| check_shape("key_mask", &[b, keys], mask.shape()))
    }

    /// Checks q, k and v: a pass over all of them, made only where a cheaper look says that there is something to find.
    fn check_finite(&self) -> Result<(), Error> {
        check_finite("q", self.q.view())?;
        check_finite("k", self.k.view())?;
        check_finite("v", self.v.view())
    }

    /// Keys that exist: the denominator of (3).
    fn counted(&self) -> usize {
        let (b, _, keys, _) = self.k.dim();
        self.key_mask.as_ref().map_or(b * keys, |mask| mask.iter().filter(|&&m| m).count())
    }
}
