//! Linear time: blocks of queries against the compressive cache and a window of keys.
//!
//! Forward, for each block of L queries:
//!
//! ```text
//! (1)  scores of all codes and of the recent keys            see `block`
//! (2)  lse_i = log( sum_{s: N_s>0} exp(a_is + ln N_s) + sum_{j recent} exp(s_ij) )
//! (3)  o_i   = sum_s P_is mu_s + sum_j p_ij v_j              P_is = exp(a_is + ln N_s - lse_i), p_ij = exp(s_ij - lse_i)
//! (4)  keys more than M before the next block enter the cache
//! ```
//!
//! Backward recomputes the scores and undoes 4 and 3, 2, 1 in two sweeps, so that no cache is kept per block:
//!
//! ```text
//! forward in time, with the cache as forward had it:
//! (3)  dP_is = dO_i . mu_s     dp_ij = dO_i . v_j     dv_j += sum_i p_ij dO_i
//! (2)  dA_is = P_is (dP_is - delta_i)     ds_ij = p_ij (dp_ij - delta_i)     delta_i = sum of P dP and p dp
//! (1)  dq, du, dw, dr, dk^, dc
//! backward in time, with one running statistic G [S, V]:
//! (4)  G_s += sum_i exp(a_is - lse_i) dO_i  where N_s > 0, then dv_j += G_{z_j} for the keys that entered here
//! ```
//!
//! Kept for backward: lse `[T]` and the state the piece began with. Cost: `2 T (S K + (M+1) K + V (S + M + L/2))` operations
//! forward (without the (M+1) K where there are no biases).
//! Source: Transformer-VQ (Lingle, arXiv 2309.16354); the sweeps of backward are this crate's.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::block::{Block, ScoreGradients, Scores};
use super::{
    AttentionState, BiasGradients, CompressiveCache, Gradients, Inputs, Output, VqAttention, WindowKeys,
};
use crate::error::{check_finite, check_shape};
use crate::ops::matmul::{add_product, product};
use crate::{Error, Scalar};

/// What backward needs of forward: O(T) and one state.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    pub(super) lse: Array1<T>,
    pub(super) start: AttentionState<T>,
}

/// Outputs of one piece; `state` is taken from before the piece to after it.
///
/// # Errors
/// Shapes that do not fit, numbers that are not finite, codes that are not below S, an impossible [`VqAttention`]. The
/// state is then as it was.
pub fn forward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
) -> Result<(Output<T>, Saved<T>), Error> {
    inputs.check(attention, state)?;
    let start = state.clone();
    let mut out = Array2::zeros(inputs.v.raw_dim());
    let rows = run(attention, inputs, state, out.view_mut());
    let saved = Saved { lse: rows.lse.clone(), start };
    Ok((Output { out, lse: rows.lse, cached_mass: rows.cached_mass }, saved))
}

/// One number per query.
#[derive(Debug)]
pub(super) struct RowStatistics<T> {
    pub lse: Array1<T>,
    pub cached_mass: Array1<T>,
}

/// [`forward`] on checked input, into a buffer of the caller's whose content does not matter.
pub(super) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    mut out: ArrayViewMut2<'_, T>,
) -> RowStatistics<T> {
    let t = inputs.q.nrows();
    let codes = inputs.codes.to_vec();
    let window = state.window_keys();
    let held = window.codes.len();
    let mut scores = Scores::new(attention, inputs, held);
    let mut rows = RowStatistics { lse: Array1::zeros(t), cached_mass: Array1::zeros(t) };
    let mut past = Past { window: &window, codes: &codes, v: inputs.v, entered: 0 };
    for block in Block::all(attention, t, held) {
        past.enter(&block, &mut state.cache);
        let log_counts = if attention.cache { state.cache.log_counts() } else { vec![] };
        scores.fill(inputs, &window, &codes, &block); // (1)
        let mut max = vec![T::neg_infinity(); block.len];
        let mut sum = vec![T::zero(); block.len];
        let mut cached = vec![T::zero(); block.len];
        scores.max(&block, &log_counts, &mut max);
        scores.exponentiate(&block, &log_counts, &max, &mut cached, &mut sum);
        for (i, row) in block.queries().enumerate() {
            rows.lse[row] = max[i] + sum[i].ln(); // (2)
            rows.cached_mass[row] = cached[i] / sum[i];
        }
        let mut out = out.slice_mut(s![block.queries(), ..]);
        if attention.cache {
            product(scores.content(&block).t(), state.cache.mean(), out.view_mut()); // (3)
        } else {
            out.fill(T::zero());
        }
        for (queries, recent) in block.tiles() {
            let mut out = out.slice_mut(s![queries.clone(), ..]);
            for (keys, v) in values(&block, &window, inputs.v, recent) {
                let p = scores.recent().slice_move(s![keys, queries.clone()]);
                add_product(p.t(), v, out.view_mut());
            }
        }
        for (mut row, &sum) in out.rows_mut().into_iter().zip(&sum) {
            row *= T::one() / sum;
        }
    }
    past.finish(attention, &mut state.cache);
    state.advance(inputs.codes, inputs.codewords, inputs.v);
    rows
}

/// The keys that pass from the window into the cache as blocks advance.
struct Past<'a, T> {
    window: &'a WindowKeys<T>,
    codes: &'a [u32],
    v: ArrayView2<'a, T>,
    /// Keys that have entered, of the carried window's and then the piece's.
    entered: usize,
}

impl<T: Scalar> Past<'_, T> {
    /// (4), before `block`.
    fn enter(&mut self, block: &Block, cache: &mut CompressiveCache<T>) {
        self.enter_until(self.window.codes.len() - block.carried + block.first_key, cache);
    }

    /// (4), at the end of the piece.
    fn finish(&mut self, attention: &VqAttention, cache: &mut CompressiveCache<T>) {
        let total = self.window.codes.len() + self.codes.len();
        self.enter_until(total.saturating_sub(attention.window), cache);
    }

    fn enter_until(&mut self, end: usize, cache: &mut CompressiveCache<T>) {
        let held = self.window.codes.len();
        for n in self.entered..end {
            if n < held {
                cache.push(self.window.codes[n], self.window.v.row(n));
            } else {
                cache.push(self.codes[n - held], self.v.row(n - held));
            }
        }
        self.entered = self.entered.max(end);
    }
}

/// The values of a range of recent rows, in two parts: of the carried window and of the piece. Each comes with its rows.
fn values<'a, T: Scalar>(
    block: &Block,
    window: &'a WindowKeys<T>,
    v: ArrayView2<'a, T>,
    rows: std::ops::Range<usize>,
) -> [(std::ops::Range<usize>, ArrayView2<'a, T>); 2] {
    let cut = block.carried;
    let (old, new) = (rows.start.min(cut)..rows.end.min(cut), rows.start.max(cut)..rows.end.max(cut));
    let hidden = window.codes.len() - block.carried;
    let old_v = window.v.slice(s![hidden + old.start..hidden + old.end, ..]);
    let in_piece = |row: usize| block.first_key + row - cut;
    let new_v = v.slice_move(s![in_piece(new.start)..in_piece(new.end), ..]);
    [(old, old_v), (new, new_v)]
}

/// Gradients of one piece. The state it began with is a constant.
///
/// # Shapes
/// `d_out` [T, V].
///
/// # Errors
/// As [`forward`], and if `saved` comes from a piece of another length.
pub fn backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    inputs.check(attention, &saved.start)?;
    check_shape("saved.lse", &[inputs.q.nrows()], saved.lse.shape())?;
    check_shape("d_out", inputs.v.shape(), d_out.shape())?;
    check_finite("d_out", d_out)?;
    let (mut d_q, mut d_k_hat) = (Array2::zeros(inputs.q.raw_dim()), Array2::zeros(inputs.q.raw_dim()));
    let mut d_v = Array2::zeros(inputs.v.raw_dim());
    let rows = RowGradients { q: d_q.view_mut(), k_hat: d_k_hat.view_mut(), v: d_v.view_mut() };
    let (codewords, biases) = run_backward(attention, inputs, saved, d_out, rows);
    Ok(Gradients { q: d_q, k_hat: d_k_hat, v: d_v, codewords, biases })
}

/// Where the gradients of rows go; all must hold zeros.
#[derive(Debug)]
pub(super) struct RowGradients<'a, T> {
    pub q: ArrayViewMut2<'a, T>,
    pub k_hat: ArrayViewMut2<'a, T>,
    pub v: ArrayViewMut2<'a, T>,
}

/// [`backward`] on checked input; returns the gradients of the codewords and of the biases.
pub(super) fn run_backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    rows: RowGradients<'_, T>,
) -> (Array2<T>, Option<BiasGradients<T>>) {
    let (t, k) = inputs.q.dim();
    let RowGradients { q: mut d_q_all, k_hat: mut d_k_hat, v: mut d_v } = rows;
    let codes = inputs.codes.to_vec();
    let window = saved.start.window_keys();
    let mut cache = saved.start.cache;
    let mut scores = Scores::new(attention, inputs, window.codes.len());
    let mut d_scores = ScoreGradients::new(&scores);
    let mut d_codewords = Array2::zeros(inputs.codewords.raw_dim());
    let mut d_biases = inputs.biases.as_ref().map(|biases| BiasGradients {
        content: Array1::zeros(k),
        position: Array1::zeros(k),
        relative: Array2::zeros(biases.relative.raw_dim()),
    });
    let mut past = Past { window: &window, codes: &codes, v: inputs.v, entered: 0 };
    for block in Block::all(attention, t, window.codes.len()) {
        past.enter(&block, &mut cache);
        let d_out = d_out.slice(s![block.queries(), ..]);
        let log_counts = if attention.cache { cache.log_counts() } else { vec![] };
        scores.fill(inputs, &window, &codes, &block);
        let shift = saved.lse.slice(s![block.queries()]).to_vec();
        let mut sums = [vec![T::zero(); block.len], vec![T::zero(); block.len]];
        let [cached, sum] = &mut sums;
        scores.exponentiate(&block, &log_counts, &shift, cached, sum);

        // (3)
        if attention.cache {
            product(cache.mean(), d_out.t(), d_scores.content.slice_mut(s![.., ..block.len]));
        }
        // The first key that receives gradient, and its row.
        let reached = if attention.gradient_through_cache { block.first_key } else { block.start };
        let first_row = block.carried + reached - block.first_key;
        for (queries, recent) in block.tiles() {
            let d_out = d_out.slice(s![queries.clone(), ..]);
            for (keys, v) in values(&block, &window, inputs.v, recent.clone()) {
                product(v, d_out.t(), d_scores.recent.slice_mut(s![keys, queries.clone()]));
            }
            let first = recent.start.max(first_row);
            if first < recent.end {
                let p = scores.recent().slice_move(s![first..recent.end, queries]);
                let keys =
                    block.first_key + first - block.carried..block.first_key + recent.end - block.carried;
                add_product(p, d_out, d_v.slice_mut(s![keys, ..]));
            }
        }

        scores.softmax_backward(&block, &mut d_scores); // (2)

        // (1)
        let q_content = scores.q_content(&block);
        let d_recent = d_scores.recent.slice(s![..block.rows(), ..block.len]);
        let mut d_q = Array2::zeros((block.len, k));
        let kept = window.codes.len() - block.carried..;
        add_product(
            d_recent.slice(s![..block.carried, ..]).t(),
            window.k_hat.slice(s![kept, ..]),
            d_q.view_mut(),
        );
        add_product(
            d_recent.slice(s![first_row.., ..]),
            q_content,
            d_k_hat.slice_mut(s![reached..block.keys().end, ..]),
        );
        if attention.cache {
            let d_content = d_scores.content.slice(s![.., ..block.len]);
            add_product(d_content, q_content, d_codewords.view_mut());
        } else {
            d_scores.content.fill(T::zero());
        }
        d_scores.scatter(&block, &codes);
        add_product(d_scores.content.slice(s![.., ..block.len]).t(), inputs.codewords, d_q.view_mut());
        let mut d_q_rows = d_q_all.slice_mut(s![block.queries(), ..]);
        d_q_rows.assign(&d_q);
        if let (Some(biases), Some(d_biases)) = (&inputs.biases, &mut d_biases) {
            d_biases.content += &d_q.sum_axis(Axis(0));
            let d_bias = d_scores.bias(&block);
            product(d_bias, biases.relative, d_q.view_mut());
            d_biases.position += &d_q.sum_axis(Axis(0));
            add_product(d_bias.t(), scores.q_position(&block), d_biases.relative.view_mut());
            d_q_rows += &d_q;
        }
    }
    if attention.cache && attention.gradient_through_cache {
        let held = window.codes.len();
        cached_values(attention, inputs, &codes, &saved.lse, held, cache, d_out, &mut scores, d_v);
    }
    (d_codewords, d_biases)
}

/// (4): what later queries send to values that they read through the cache. `cache` is as the last block saw it.
#[allow(clippy::too_many_arguments)] // the second half of one function
fn cached_values<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    codes: &[u32],
    lse: &Array1<T>,
    held: usize,
    cache: CompressiveCache<T>,
    d_out: ArrayView2<'_, T>,
    scores: &mut Scores<T>,
    mut d_v: ArrayViewMut2<'_, T>,
) {
    let mut counts = cache.count().to_owned();
    let mut g = Array2::<T>::zeros(cache.mean().raw_dim());
    // Before the first block that begins beyond the window, only carried keys are cached: constants.
    for block in Block::all(attention, inputs.q.nrows(), held).rev().take_while(|block| block.first_key > 0) {
        scores.fill_content(inputs, &block);
        let shift = lse.slice(s![block.queries()]).to_vec();
        // A code without keys is kept out; its exponential could overflow.
        let gate = |&n: &u64| if n > 0 { T::zero() } else { T::neg_infinity() };
        let gates: Vec<T> = counts.iter().map(gate).collect();
        scores.exponentiate_cached(&block, &gates, &shift, &mut vec![T::zero(); block.len]);
        let d_out = d_out.slice(s![block.queries(), ..]);
        add_product(scores.content(&block), d_out, g.view_mut());
        let entered = block.first_key.saturating_sub(attention.block_len)..block.first_key;
        for (mut d_v, &code) in
            d_v.slice_mut(s![entered.clone(), ..]).rows_mut().into_iter().zip(&codes[entered])
        {
            d_v += &g.row(code as usize);
            counts[code as usize] -= 1;
        }
    }
}
