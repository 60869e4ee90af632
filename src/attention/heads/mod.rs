//! Attention over batch x heads: quantize the keys and attend, in one call, with one call back.
//!
//! For every sequence b and head h, in parallel on the threads of the current rayon pool:
//!
//! ```text
//! (1)  z = assign(k),  k^ = c_z                      one codebook per key head
//! (2)  o = attention(q, k^, z, v)                    see the module above
//! (3)  commit_loss = sum over heads and dimensions, mean over positions, of |k - c_z|^2
//! (4)  statistics of each code's keys                for the codebook to learn from
//! ```
//!
//! Sequences of different lengths share a batch as padded ones, several documents a sequence: each is attended to as if it had
//! been fed alone.
//!
//! Keys, values and everything that follows from keys may have fewer heads, Hk, which divides H: query head h then reads key head
//! `h / (H / Hk)` (grouped queries; multi-query where Hk = 1). Codes, losses, statistics and states are made once per key head,
//! and the gradients of a key head are the sums over its query heads, in their order.
//!
//! Arrays are [B, H, T, width] views of any strides: an array [B, T, H, width] comes as `array.view().permuted_axes([0, 2, 1, 3])`,
//! and outputs and gradients, laid out that way in memory, go back by the same call. Arrays from
//! [`ops::aligned`](crate::ops::aligned) are read faster: 5 % of the time of narrow heads.

use ndarray::{Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis};

use super::state::state_len;
use super::{AttentionState, VqAttention, blockwise, stream};
use crate::codebook::packed::Table;
use crate::codebook::{CodeStats, Codebook, Estimator};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::aligned;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

mod backward;
mod checks;
mod forward;
mod positions;
mod prepared;

pub(super) use forward::quantize;
#[cfg(feature = "model")]
pub(crate) use prepared::HeadColumns;
pub use prepared::PreparedHeads;

/// What attention over batch and heads takes.
#[derive(Debug, Clone)]
pub struct BatchInputs<'a, T> {
    /// Queries [B, H, T, K], already scaled.
    pub q: ArrayView4<'a, T>,
    /// Keys, to be quantized [B, Hk, T, K].
    pub k: ArrayView4<'a, T>,
    /// Values [B, Hk, T, V].
    pub v: ArrayView4<'a, T>,
    /// Relative biases, if any.
    pub biases: Option<BatchBiases<'a, T>>,
    /// Positions that count in the loss and in the statistics [B, T]: true where they do. Without it, all do. A position
    /// that does not count is still seen as a key.
    pub mask: Option<ArrayView2<'a, bool>>,
    /// Where documents start [B, T]: true at the first token of each. Neither that token nor a later one sees anything before
    /// it, and a state is that of its sequence's last document. Without it, all tokens belong to the document of the state.
    pub starts: Option<ArrayView2<'a, bool>>,
    /// How many tokens of each sequence exist `[B]`; without it, all T. Those at its end that do not are padding: nothing sees
    /// them, they move no state, count nowhere, and their outputs and gradients are 0 (lse -infinity).
    pub lengths: Option<ArrayView1<'a, usize>>,
}

impl<'a, T> BatchInputs<'a, T> {
    /// Queries, keys and values of whole sequences, each of one document, without biases; every position counts.
    pub fn new(q: ArrayView4<'a, T>, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        BatchInputs { q, k, v, biases: None, mask: None, starts: None, lengths: None }
    }
}

/// Relative biases of all heads.
#[derive(Debug, Clone)]
pub struct BatchBiases<'a, T> {
    /// u [H, K], added to queries for content scores.
    pub content: ArrayView2<'a, T>,
    /// w [H, K], added to queries for position scores.
    pub position: ArrayView2<'a, T>,
    /// r [Hk, M+1, K], row d belongs to the distance d = i - j.
    pub relative: ArrayView3<'a, T>,
}

/// What attention over batch and heads returns.
#[derive(Debug, Clone, Default)]
pub struct BatchOutput<T> {
    /// [B, H, T, V].
    pub out: Array4<T>,
    /// [B, Hk, T].
    pub codes: Array3<u32>,
    /// Logarithm of each query's sum of `exp(score)` [B, H, T], nats.
    pub lse: Array3<T>,
    /// The share of each query's attention that fell on cached codes [B, H, T].
    pub cached_mass: Array3<T>,
    /// What [`Codebook::update`] learns from.
    pub stats: CodeStats<T>,
    /// `|k - c_z|^2`, summed over key heads and dimensions, averaged over the positions that count; without a weight.
    pub commit_loss: f64,
}

/// What backward needs of forward: O(T) numbers per head, and the states the piece began with.
#[derive(Debug, Clone)]
pub struct BatchSaved<T> {
    /// [B, H, T].
    lse: Array3<T>,
    /// One per sequence and key head.
    starts: Vec<AttentionState<T>>,
    codes: Array3<u32>,
    /// The codebook may learn between forward and backward.
    codewords: Array3<T>,
}

/// Gradients of [`BatchInputs`].
#[derive(Debug, Clone, Default)]
pub struct BatchGradients<T> {
    /// [B, H, T, K].
    pub q: Array4<T>,
    /// Of the keys, through the estimator and from the commitment loss [B, Hk, T, K].
    pub k: Array4<T>,
    /// [B, Hk, T, V].
    pub v: Array4<T>,
    /// Of the codewords [Hk, S, K]: as the cache reads them, and as quantized keys through the estimator. A codebook that
    /// learns by moving averages does not use it.
    pub codewords: Array3<T>,
    /// Of the relative biases, if there are any.
    pub biases: Option<BatchBiasGradients<T>>,
}

/// Gradients of [`BatchBiases`].
#[derive(Debug, Clone)]
pub struct BatchBiasGradients<T> {
    /// Of u [H, K].
    pub content: Array2<T>,
    /// Of w [H, K].
    pub position: Array2<T>,
    /// Of r [Hk, M+1, K].
    pub relative: Array3<T>,
}

impl VqAttention {
    /// States before the first token for a batch [B, Hk].
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::TooLarge`] if this attention cannot be computed.
    pub fn new_states<T: Scalar>(
        &self,
        batch: usize,
        codebook: &Codebook<T>,
        d_v: usize,
    ) -> Result<Array2<AttentionState<T>>, Error> {
        self.validate()?;
        let state_len = state_len(codebook.n_codes(), codebook.d_k(), d_v, self.window);
        let own = size_of::<AttentionState<T>>();
        check_memory::<T>("states", &[batch, codebook.n_heads(), state_len.saturating_add(own)])?;
        let state = AttentionState::new(codebook.n_codes(), codebook.d_k(), d_v, self.window)?;
        Ok(Array2::from_elem((batch, codebook.n_heads()), state))
    }

    /// Quantizes the keys and attends; `states` [B, Hk] move from before the piece to after it.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, an impossible [`VqAttention`]. The states are then as they were.
    pub fn forward<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        codebook: &Codebook<T>,
        states: &mut Array2<AttentionState<T>>,
    ) -> Result<(BatchOutput<T>, BatchSaved<T>), Error> {
        let mut output = BatchOutput::default();
        let saved = self.forward_into(inputs, codebook, states, &mut output)?;
        Ok((output, saved))
    }

    /// [`forward`](Self::forward) into arrays that the caller keeps: what they hold does not matter, and those of another
    /// shape are replaced. Large arrays that come fresh from the system cost a tenth of the time.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); what `output` then holds is unspecified.
    pub fn forward_into<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        codebook: &Codebook<T>,
        states: &mut Array2<AttentionState<T>>,
        output: &mut BatchOutput<T>,
    ) -> Result<BatchSaved<T>, Error> {
        inputs.check_shapes(self, codebook.dim(), states)?;
        let table = Table::new(codebook.codewords());
        let (saved, finite) = self.forward_unchecked(inputs, &table, states, output);
        if !finite && let Err(error) = inputs.check_finite() {
            saved.restore(states);
            return Err(error);
        }
        Ok(saved)
    }

    /// [`forward_into`](Self::forward_into) on what is known to fit, and whether q, k and v are finite.
    pub(crate) fn forward_unchecked<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        table: &Table<T>,
        states: &mut Array2<AttentionState<T>>,
        output: &mut BatchOutput<T>,
    ) -> (BatchSaved<T>, bool) {
        compiled_here!(
            T,
            VqAttention::forward_unchecked_here::<T>,
            fn(
                &VqAttention,
                &BatchInputs<'_, T>,
                &Table<T>,
                &mut Array2<AttentionState<T>>,
                &mut BatchOutput<T>,
            ) -> (BatchSaved<T>, bool)
        )(self, inputs, table, states, output)
    }

    fn forward_unchecked_here<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        table: &Table<T>,
        states: &mut Array2<AttentionState<T>>,
        output: &mut BatchOutput<T>,
    ) -> (BatchSaved<T>, bool) {
        let counting = inputs.counting();
        let inputs = &inputs.with_mask(counting.as_ref());
        let starts: Vec<_> = states.iter().cloned().collect();
        let finite = forward::run(self, inputs, table, states, blockwise::run, output);
        output.stats = forward::statistics(inputs, output.codes.view(), table.n_codes());
        let (lse, codes) = (output.lse.clone(), output.codes.clone());
        (BatchSaved { lse, starts, codes, codewords: table.codewords.clone() }, finite)
    }

    /// As [`forward`](Self::forward), to infer only: pieces of any size, one token included, and nothing is saved.
    ///
    /// Every call makes the codebook ready, which costs more than a token does: for many calls, [`prepare`](Self::prepare).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn push<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        codebook: &Codebook<T>,
        states: &mut Array2<AttentionState<T>>,
    ) -> Result<BatchOutput<T>, Error> {
        compiled_here!(
            T,
            VqAttention::push_here::<T>,
            fn(
                &VqAttention,
                &BatchInputs<'_, T>,
                &Codebook<T>,
                &mut Array2<AttentionState<T>>,
            ) -> Result<BatchOutput<T>, Error>
        )(self, inputs, codebook, states)
    }

    fn push_here<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        codebook: &Codebook<T>,
        states: &mut Array2<AttentionState<T>>,
    ) -> Result<BatchOutput<T>, Error> {
        inputs.check_shapes(self, codebook.dim(), states)?;
        inputs.check_finite()?;
        let counting = inputs.counting();
        let inputs = &inputs.with_mask(counting.as_ref());
        let mut output = BatchOutput::default();
        let table = Table::new(codebook.codewords());
        forward::run(self, inputs, &table, states, stream::run, &mut output);
        output.stats = forward::statistics(inputs, output.codes.view(), table.n_codes());
        Ok(output)
    }

    /// Every gradient of `sum(d_out * out) + commit_weight * commit_loss`. The states before the piece are constants.
    ///
    /// `inputs` are those of [`forward`](Self::forward), `d_out` [B, H, T, V].
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if `saved` comes from other sizes.
    pub fn backward<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        saved: BatchSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
    ) -> Result<BatchGradients<T>, Error> {
        let mut gradients = BatchGradients::default();
        self.backward_into(inputs, saved, d_out, estimator, commit_weight, &mut gradients)?;
        Ok(gradients)
    }

    /// [`backward`](Self::backward) into arrays that the caller keeps, as [`forward_into`](Self::forward_into) does.
    ///
    /// # Errors
    /// As [`backward`](Self::backward); what `gradients` then holds is unspecified.
    pub fn backward_into<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        saved: BatchSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
        gradients: &mut BatchGradients<T>,
    ) -> Result<(), Error> {
        let BatchSaved { lse, starts, codes, codewords } = &saved;
        inputs.check_arrays(self)?;
        let ((b, h, t, k), n_key_heads) = (inputs.q.dim(), inputs.n_key_heads());
        check_shape("saved.codes", &[b, n_key_heads, t], codes.shape())?;
        inputs.check_saved(lse)?;
        check_shape("saved.codewords", &[n_key_heads, codewords.len_of(Axis(1)), k], codewords.shape())?;
        let d_v = inputs.v.len_of(Axis(3));
        for start in starts {
            start.check(codewords.len_of(Axis(1)), k, d_v, self.window)?;
        }
        check_shape("d_out", &[b, h, t, d_v], d_out.shape())?;
        if !commit_weight.is_finite() {
            return Err(Error::invalid("commit_weight", "finite", commit_weight));
        }
        estimator.validate()?;
        if !self.backward_unchecked(inputs, saved, d_out.view(), estimator, commit_weight, gradients) {
            inputs.check_finite()?;
            check_finite("d_out", d_out)?;
        }
        Ok(())
    }

    /// [`backward_into`](Self::backward_into) on what is known to fit; returns whether q, k, v and `d_out` are finite.
    pub(crate) fn backward_unchecked<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        saved: BatchSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
        gradients: &mut BatchGradients<T>,
    ) -> bool {
        compiled_here!(
            T,
            VqAttention::backward_unchecked_here::<T>,
            fn(
                &VqAttention,
                &BatchInputs<'_, T>,
                BatchSaved<T>,
                ArrayView4<'_, T>,
                Estimator,
                f64,
                &mut BatchGradients<T>,
            ) -> bool
        )(self, inputs, saved, d_out, estimator, commit_weight, gradients)
    }

    fn backward_unchecked_here<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        saved: BatchSaved<T>,
        d_out: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
        gradients: &mut BatchGradients<T>,
    ) -> bool {
        let counting = inputs.counting();
        let inputs = &inputs.with_mask(counting.as_ref());
        backward::run(self, inputs, saved, d_out, (estimator, commit_weight), gradients)
    }
}

impl<T: Scalar> BatchSaved<T> {
    /// Puts the states back to before the piece.
    fn restore(self, states: &mut Array2<AttentionState<T>>) {
        for (state, start) in states.iter_mut().zip(self.starts) {
            *state = start;
        }
    }
}

/// Makes `array` one of shape [B, H, T, width] in the memory order of [B, T, H, width]; kept if it is one.
pub(super) fn fit<T: Scalar>(array: &mut Array4<T>, (b, h, t): (usize, usize, usize), width: usize) {
    let in_order = array.view().permuted_axes([0, 2, 1, 3]).is_standard_layout();
    if array.dim() != (b, h, t, width) || !in_order {
        *array = aligned::array((b, t, h, width)).permuted_axes([0, 2, 1, 3]);
    }
}

/// The [T, width] parts of an array [B, H, T, width], sequence by sequence, head by head.
pub(super) fn parts<T>(array: &mut Array4<T>) -> Vec<ArrayViewMut2<'_, T>> {
    let mut parts = vec![];
    for mut sequence in array.outer_iter_mut() {
        // Views are split one by one: an iterator over a borrowed view could not outlive it.
        for _ in 0..sequence.len_of(Axis(0)) {
            let (head, rest) = sequence.split_at(Axis(0), 1);
            parts.push(head.index_axis_move(Axis(0), 0));
            sequence = rest;
        }
    }
    parts
}
