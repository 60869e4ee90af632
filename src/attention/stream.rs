//! Decoding: one token or a piece of any size at a time, with a state that does not grow.
//!
//! A token is a block of its own (L = 1), so all M keys of the window are recent:
//!
//! ```text
//! (1)  scores of all codes, of the window's keys, and of the token's own key
//! (2)  lse, p                        as in `blockwise`
//! (3)  o = sum_s P_s mu_s + sum_j p_j v_j
//! (4)  the token enters the window, and the one that it pushes out enters the cache
//! ```
//!
//! Cost of a token: `2 (S + 2 M) K + 2 (S + M) V` operations, at any position. Pieces of several tokens go through
//! [`blockwise`].

use fearless_simd::Simd;
use ndarray::{Array2, ArrayViewMut1, Axis, s};

use super::blockwise::{self, RowOutputs};
use super::{AttentionState, Inputs, Output, VqAttention};
use crate::ops::matmul::{add_product, product};
use crate::ops::simd::{fused, on_best_simd};
use crate::{Error, Scalar};

/// From this many tokens on, a block that shares one pass over the cache beats single steps.
const BLOCKWISE_FROM: usize = 4;

/// Takes in the next tokens of a sequence and returns their outputs; `state` moves on.
///
/// However a sequence is cut into calls, outputs are the same up to rounding, and the cache in `state` is the same bits.
/// [`Output::cached_mass`] is that of the form that ran.
///
/// ```
/// use transformer_vq::attention::{AttentionState, Inputs, VqAttention, stream};
/// use transformer_vq::ndarray::array;
///
/// let attention = VqAttention { window: 2, ..VqAttention::default() };
/// let codewords = array![[1.0, 0.0], [0.0, 1.0]];
/// let mut state = AttentionState::new(2, 2, 1, 2)?;
/// let bytes = state.size_in_bytes();
/// for t in 0..100 {
///     let (q, codes, v) = (array![[0.0, 0.0]], array![t % 2], array![[f64::from(t)]]);
///     let token = Inputs {
///         q: q.view(), codes: codes.view(), v: v.view(), codewords: codewords.view(), biases: None,
///     };
///     let output = stream::push(&attention, &token, &mut state)?;
///     // A query of zeros attends to everything equally: the mean of 0, 1, ..., t.
///     assert!((output.out[[0, 0]] - f64::from(t) / 2.0).abs() < 1e-12);
/// }
/// assert_eq!(state.position(), 100);
/// assert_eq!(state.size_in_bytes(), bytes);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
///
/// # Errors
/// As [`blockwise::forward`]; the state is then as it was.
pub fn push<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
) -> Result<Output<T>, Error> {
    inputs.check(attention, state)?;
    let mut output = Output::zeros(inputs);
    run(attention, inputs, state, output.rows(), 1);
    Ok(output)
}

/// [`push`] on checked input, into buffers of the caller's; of many tokens, as `blockwise` does it.
pub(super) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    mut rows: RowOutputs<'_, T>,
    segments: usize,
) -> bool {
    let t = inputs.q.nrows();
    if t >= BLOCKWISE_FROM {
        return blockwise::run(attention, inputs, state, rows, segments);
    }
    for i in 0..t {
        let (lse, cached) = token(attention, inputs, i, state, rows.out.row_mut(i));
        rows.lse[i] = lse;
        rows.cached_mass[i] = cached;
        let code = inputs.codes[i];
        state.push(code, inputs.codewords.row(code as usize), inputs.v.row(i)); // (4)
    }
    true
}

/// Attention of token `i`, which is the next of the sequence; returns its lse and cached mass.
fn token<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    i: usize,
    state: &AttentionState<T>,
    out: ArrayViewMut1<'_, T>,
) -> (T, T) {
    let (k_hat, v, held) = state.slots();
    let n_codes = inputs.codewords.nrows();
    // One row of scores: codes, window slots, the token itself.
    let mut scores = Array2::zeros((1, n_codes + held + 1));
    let q = inputs.q.slice(s![i..=i, ..]);
    let mut q_content = q.to_owned();
    if let Some(biases) = &inputs.biases {
        q_content += &biases.content;
    }
    product(q_content.view(), inputs.codewords.t(), scores.slice_mut(s![.., ..n_codes])); // (1)
    product(q_content.view(), k_hat.t(), scores.slice_mut(s![.., n_codes..n_codes + held]));
    let mut scores = scores.remove_axis(Axis(0));
    scores[n_codes + held] = scores[inputs.codes[i] as usize];
    if let Some(biases) = &inputs.biases {
        let q_position = &q + &biases.position;
        let mut bias = Array2::zeros((1, held + 1));
        product(q_position.view(), biases.relative.slice(s![..=held, ..]).t(), bias.view_mut());
        scores[n_codes + held] += bias[[0, 0]];
        for distance in 1..=held {
            let slot = ((state.position() - distance as u64) % held.max(1) as u64) as usize;
            scores[n_codes + slot] += bias[[0, distance]];
        }
    }

    let log_counts = if attention.cache { state.cache.log_counts() } else { vec![] };
    let buffer = scores.as_slice_mut().expect("freshly made");
    let (cached, recent) = buffer.split_at_mut(n_codes);
    let (max, cached_sum, sum) = on_best_simd!(simd => softmax(simd, cached, &log_counts, recent)); // (2)

    let p = scores.insert_axis(Axis(0));
    let mut out = out.insert_axis(Axis(0));
    out.assign(&inputs.v.slice(s![i..=i, ..]));
    out *= p[[0, n_codes + held]]; // (3)
    add_product(p.slice(s![.., n_codes..n_codes + held]), v, out.view_mut());
    if attention.cache {
        add_product(p.slice(s![.., ..n_codes]), state.cache.mean(), out.view_mut());
    }
    out *= T::one() / sum;
    (max + sum.ln(), cached_sum / sum)
}

/// Exponentials of a row of scores in place, without a common factor: its logarithm, the cached sum, the whole sum.
#[inline(always)]
fn softmax<S: Simd, T: Scalar>(simd: S, cached: &mut [T], log_counts: &[T], recent: &mut [T]) -> (T, T, T) {
    let larger = |max: T, score: T| if score > max { score } else { max };
    let mut max = recent.iter().fold(T::neg_infinity(), |max, &score| larger(max, score));
    for (score, &log_count) in cached.iter_mut().zip(log_counts) {
        *score += log_count;
        max = larger(max, *score);
    }
    let mut cached_sum = T::zero();
    if log_counts.is_empty() {
        cached.fill(T::zero());
    }
    for score in cached.iter_mut().take(log_counts.len()) {
        *score = (*score - max).exp_fast(fused(simd));
        cached_sum += *score;
    }
    let mut sum = cached_sum;
    for score in recent {
        *score = (*score - max).exp_fast(fused(simd));
        sum += *score;
    }
    (max, cached_sum, sum)
}
