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
use ndarray::{ArrayView1, ArrayViewMut1, Zip, s};

use super::blockwise::{self, RowOutputs};
use super::{AttentionState, Inputs, Output, VqAttention, documents};
use crate::compiled::compiled_here;
use crate::ops::exp::exp_of_differences;
use crate::ops::matmul::{prefetch_first, vector_product};
use crate::ops::rows;
use crate::ops::simd::on_best_simd;
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
///         starts: None,
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
    compiled_here!(
        T,
        push_here::<T>,
        fn(&VqAttention, &Inputs<'_, T>, &mut AttentionState<T>) -> Result<Output<T>, Error>
    )(attention, inputs, state)
}

fn push_here<T: Scalar>(
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
    if let Some(documents) = documents::documents(inputs.starts) {
        return documents::forward(&documents, inputs, state, rows, |inputs, state, rows| {
            run(attention, inputs, state, rows, segments)
        });
    }
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

/// What is known of a token before its state is read.
pub(super) struct Scored<'a, T> {
    /// q + u `[K]`.
    pub q: ArrayView1<'a, T>,
    /// Scores of all codes `[S]`.
    pub content: &'a [T],
    /// Biases of the distances 0, 1, ..., at least as many as the window holds and one.
    pub biases: Option<&'a [T]>,
    /// Of its key.
    pub code: u32,
    /// Whether the keys of the window are codewords of today: then their scores are those of their codes.
    pub looks_up: bool,
    /// `[V]`.
    pub v: ArrayView1<'a, T>,
}

/// Attention of token `i`, which is the next of the sequence; returns its lse and cached mass.
fn token<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    i: usize,
    state: &AttentionState<T>,
    out: ArrayViewMut1<'_, T>,
) -> (T, T) {
    let held = state.slots().2;
    let q = inputs.q.row(i);
    let q_content = inputs.biases.as_ref().map_or_else(|| q.to_owned(), |biases| &q + &biases.content);
    let mut content = vec![T::zero(); inputs.codewords.nrows()];
    vector_product(&[(q_content.view(), inputs.codewords.t())], &mut content); // (1)
    let biases = inputs.biases.as_ref().map(|biases| {
        let q_position = &q + &biases.position;
        let mut of_distances = vec![T::zero(); held + 1];
        let relative = biases.relative.slice(s![..=held, ..]);
        vector_product(&[(q_position.view(), relative.t())], &mut of_distances);
        of_distances
    });
    let scored = Scored {
        q: q_content.view(),
        content: &content,
        biases: biases.as_deref(),
        code: inputs.codes[i],
        looks_up: false,
        v: inputs.v.row(i),
    };
    attend(attention, &scored, state, out)
}

/// The rest of (1), (2) and (3) for the next token of a sequence; returns its lse and cached mass.
pub(super) fn attend<T: Scalar>(
    attention: &VqAttention,
    token: &Scored<'_, T>,
    state: &AttentionState<T>,
    out: ArrayViewMut1<'_, T>,
) -> (T, T) {
    let (k_hat, v, held) = state.slots();
    // Scores of codes, of window slots, of the token itself.
    let n_codes = token.content.len();
    let mut scores = vec![T::zero(); n_codes + held + 1];
    let (cached, recent) = scores.split_at_mut(n_codes);
    cached.copy_from_slice(token.content);
    // (1)
    if token.looks_up {
        for (score, &code) in recent.iter_mut().zip(state.codes()) {
            *score = token.content[code as usize];
        }
    } else {
        vector_product(&[(token.q, k_hat.t())], &mut recent[..held]);
    }
    recent[held] = cached[token.code as usize];
    if let Some(biases) = token.biases {
        add_biases(biases, state.newest(), recent);
    }
    if !attention.cache {
        cached.fill(T::neg_infinity());
    }
    // What is read next waits for memory while exponentials are taken.
    prefetch_first(v);
    prefetch_first(state.cache.mean());
    let count = state.cache.count();
    let count = count.as_slice().expect("standard layout");
    let (max, cached_sum, sum) = on_best_simd!(simd => softmax(simd, cached, count, recent)); // (2)

    let mut sums = vec![T::zero(); v.ncols()];
    let of_window = (ArrayView1::from(&recent[..held]), v);
    let of_cache = (ArrayView1::from(&*cached), state.cache.mean());
    let terms = [of_window, of_cache];
    vector_product(if attention.cache { &terms } else { &terms[..1] }, &mut sums); // (3)
    let own = recent[held];
    Zip::from(out).and(&sums).and(token.v).for_each(|out, &sum_of_values, &v| {
        *out = (sum_of_values + own * v) / sum;
    });
    (max + sum.ln(), cached_sum / sum)
}

/// Adds to the scores of window slots, of which `newest` was filled last, and of the token behind them the bias of their
/// distance.
fn add_biases<T: Scalar>(bias: &[T], newest: usize, recent: &mut [T]) {
    let (slots, own) = recent.split_at_mut(recent.len() - 1);
    own[0] += bias[0];
    let (newer, older) = slots.split_at_mut((newest + 1).min(slots.len()));
    for (score, &bias) in newer.iter_mut().rev().chain(older.iter_mut().rev()).zip(&bias[1..]) {
        *score += bias;
    }
}

/// Weights in place of a row of scores, without a common factor: its logarithm, the cached sum, the whole sum.
///
/// `exp(score + ln N)` is taken as `N exp(score)`, which spares S logarithms. The maximum is one of scores without `ln N`, of
/// codes with N > 0: weights may reach N, and far below the largest number.
#[inline(always)]
fn softmax<S: Simd, T: Scalar>(simd: S, cached: &mut [T], count: &[u64], recent: &mut [T]) -> (T, T, T) {
    for (score, &n) in cached.iter_mut().zip(count) {
        *score = if n == 0 { T::neg_infinity() } else { *score };
    }
    let (of_cached, of_recent) = (rows::max(cached), rows::max(recent));
    let max = if of_cached > of_recent { of_cached } else { of_recent };
    exp_of_differences(simd, cached, max);
    exp_of_differences(simd, recent, max);
    for (score, &n) in cached.iter_mut().zip(count) {
        *score *= T::from_f64(n as f64);
    }
    let cached_sum = rows::sum(cached);
    (max, cached_sum, cached_sum + rows::sum(recent))
}
