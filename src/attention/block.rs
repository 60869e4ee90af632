//! One block of queries: which keys it attends one by one, and the scores of all it sees.
//!
//! Scores lie transposed, keys (or codes) in rows and the block's queries side by side in a row. So the score row of a
//! key is a copy of the row of its code, a maximum or a sum over keys is an addition of rows, and the gradient of a code
//! is the sum of its keys' rows: all plain loops over contiguous queries.
//!
//! ```text
//! (1)  content[s][i] = (q_i + u) . c_s
//! (2)  recent[j][i]  = content[z_j][i] + (q_i + w) . r_{i-j}
//! (3)  p = exp(score + ln N - shift_i)
//! ```

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use super::kernels::{
    cached_exponentials, column_max, gather, recent_exponentials, scatter, score_gradients,
};
use super::{Inputs, VqAttention, WindowKeys};
use crate::Scalar;
use crate::ops::matmul::product;
use crate::ops::simd::on_best_simd;

/// Queries whose products with values are cut together: the keys after the last of them are left out.
const TILE: usize = 64;

/// Where a block lies and which keys are recent for it.
///
/// Recent keys are numbered by rows: first those of the carried window, then those of the piece, in order of position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    /// First query, a position in the piece.
    pub start: usize,
    /// Queries.
    pub len: usize,
    /// Rows that belong to the carried window: its last keys.
    pub carried: usize,
    /// First key of the piece that is recent.
    pub first_key: usize,
    /// M.
    pub window: usize,
    /// Whether keys beyond the window are seen.
    pub cache: bool,
}

impl Block {
    /// All blocks of a piece of `t` tokens that begins with `held` keys in the carried window.
    pub fn all(
        attention: &VqAttention,
        t: usize,
        held: usize,
    ) -> impl DoubleEndedIterator<Item = Block> + use<> {
        let VqAttention { block_len, window, cache, .. } = *attention;
        (0..t.div_ceil(block_len)).map(move |n| {
            let start = n * block_len;
            Block {
                start,
                len: block_len.min(t - start),
                carried: window.saturating_sub(start).min(held),
                first_key: start.saturating_sub(window),
                window,
                cache,
            }
        })
    }

    /// Positions of this block's queries in the piece.
    pub fn queries(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Positions in the piece of the recent keys, which end with the block's own.
    pub fn keys(&self) -> Range<usize> {
        self.first_key..self.start + self.len
    }

    /// Number of recent keys.
    pub fn rows(&self) -> usize {
        self.carried + self.keys().len()
    }

    /// Queries before the one at which row `r` is the key itself; negative for keys before the block.
    pub fn lead(&self, r: usize) -> isize {
        (self.first_key + r) as isize - (self.carried + self.start) as isize
    }

    /// The queries of the block that see row `r`.
    pub fn lanes(&self, r: usize) -> Range<usize> {
        let from = self.lead(r).max(0) as usize;
        if self.cache { from..self.len } else { from..self.biased(r).end.max(from) }
    }

    /// The queries of the block at a distance 0..=M from row `r`.
    pub fn biased(&self, r: usize) -> Range<usize> {
        let lead = self.lead(r);
        let to = (lead + self.window as isize + 1).clamp(0, self.len as isize);
        (lead.max(0) as usize).min(to as usize)..to as usize
    }

    /// Groups of up to 64 queries, each with the rows that any of them sees.
    pub fn tiles(self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        (0..self.len).step_by(TILE).map(move |from| {
            let to = (from + TILE).min(self.len);
            let last = self.carried + self.start + to - self.first_key;
            // Row 0 leads by lead(0) <= 0; without a cache, rows more than M before the tile are out of sight.
            let unseen = (from as isize - self.lead(0) - self.window as isize).max(0) as usize;
            let first = if self.cache { 0 } else { unseen.min(last) };
            (from..to, first..last)
        })
    }
}

/// Buffers for the scores of one block, made once per piece.
#[derive(Debug)]
pub(super) struct Scores<T> {
    /// (1), then p of cached codes [S, L].
    content: Array2<T>,
    /// (2), then p of recent keys [M + L, L].
    recent: Array2<T>,
    /// (q + w) R^T [L, M+1].
    bias: Array2<T>,
    /// q + u [L, K].
    q_content: Array2<T>,
    /// q + w [L, K].
    q_position: Array2<T>,
}

impl<T: Scalar> Scores<T> {
    pub fn new(attention: &VqAttention, inputs: &Inputs<'_, T>, held: usize) -> Self {
        let (t, k) = inputs.q.dim();
        let lanes = attention.block_len.min(t);
        let rows = lanes + attention.window.min(held + t);
        let biased = if inputs.biases.is_some() { lanes } else { 0 };
        Scores {
            content: Array2::zeros((inputs.codewords.nrows(), lanes)),
            recent: Array2::zeros((rows, lanes)),
            bias: Array2::zeros((biased, attention.window + 1)),
            q_content: Array2::zeros((lanes, k)),
            q_position: Array2::zeros((biased, k)),
        }
    }

    /// Computes (1).
    pub fn fill_content(&mut self, inputs: &Inputs<'_, T>, block: &Block) {
        let mut q_content = self.q_content.slice_mut(s![..block.len, ..]);
        q_content.assign(&inputs.q.slice(s![block.queries(), ..]));
        if let Some(biases) = &inputs.biases {
            q_content += &biases.content;
        }
        product(inputs.codewords, q_content.t(), self.content.slice_mut(s![.., ..block.len]));
    }

    /// Computes (1) and (2).
    pub fn fill(&mut self, inputs: &Inputs<'_, T>, window: &WindowKeys<T>, codes: &[u32], block: &Block) {
        self.fill_content(inputs, block);
        let len = block.len;
        if let Some(biases) = &inputs.biases {
            let mut q_position = self.q_position.slice_mut(s![..len, ..]);
            q_position.assign(&inputs.q.slice(s![block.queries(), ..]));
            q_position += &biases.position;
            product(q_position.view(), biases.relative.t(), self.bias.slice_mut(s![..len, ..]));
        }
        let q_content = self.q_content.slice(s![..len, ..]);
        let held = window.codes.len();
        let k_hat = window.k_hat.slice(s![held - block.carried.., ..]);
        product(k_hat, q_content.t(), self.recent.slice_mut(s![..block.carried, ..len]));
        let stride = self.stride();
        let (content, recent, bias) = (slice(&self.content), slice_mut(&mut self.recent), slice(&self.bias));
        on_best_simd!(gather(block, &codes[block.keys()], stride, content, recent, bias));
    }

    /// The largest score that each query sees, codes counting as `score + ln N`.
    pub fn max(&self, block: &Block, log_counts: &[T], max: &mut [T]) {
        let (content, recent) = (slice(&self.content), slice(&self.recent));
        on_best_simd!(column_max(block, self.stride(), content, log_counts, recent, max));
    }

    /// Turns scores into p (3); adds the p of cached codes to `cached` and puts the sum of that and all others in `sum`.
    pub fn exponentiate(
        &mut self,
        block: &Block,
        log_counts: &[T],
        shift: &[T],
        cached: &mut [T],
        sum: &mut [T],
    ) {
        self.exponentiate_cached(block, log_counts, shift, cached);
        sum.copy_from_slice(cached);
        let stride = self.stride();
        on_best_simd!(recent_exponentials(block, stride, slice_mut(&mut self.recent), shift, sum));
    }

    /// The part of [`exponentiate`](Self::exponentiate) that concerns cached codes.
    pub fn exponentiate_cached(&mut self, block: &Block, log_counts: &[T], shift: &[T], cached: &mut [T]) {
        let stride = self.stride();
        on_best_simd!(cached_exponentials(
            block,
            stride,
            slice_mut(&mut self.content),
            log_counts,
            shift,
            cached
        ));
    }

    /// Turns d_p (of the same layout as p) into d_score: `d_s = p (d_p - sum p d_p)`, over cached codes and recent keys.
    pub fn softmax_backward(&self, block: &Block, d: &mut ScoreGradients<T>) {
        let stride = self.stride();
        let p = (slice(&self.content), slice(&self.recent));
        let d_p = (slice_mut(&mut d.content), slice_mut(&mut d.recent));
        let delta = &mut d.delta[..block.len];
        delta.fill(T::zero());
        on_best_simd!(score_gradients(block, stride, p, d_p, delta));
    }

    fn stride(&self) -> usize {
        self.content.ncols()
    }

    /// Scores or p of cached codes [S, len].
    pub fn content(&self, block: &Block) -> ArrayView2<'_, T> {
        self.content.slice(s![.., ..block.len])
    }

    /// Scores or p of recent keys [rows, L].
    pub fn recent(&self) -> ArrayView2<'_, T> {
        self.recent.view()
    }

    /// q + u [len, K].
    pub fn q_content(&self, block: &Block) -> ArrayView2<'_, T> {
        self.q_content.slice(s![..block.len, ..])
    }

    /// q + w [len, K]; empty without biases.
    pub fn q_position(&self, block: &Block) -> ArrayView2<'_, T> {
        self.q_position.slice(s![..block.len.min(self.q_position.nrows()), ..])
    }
}

/// Gradients of the scores of one block, in the layout of [`Scores`].
#[derive(Debug)]
pub(super) struct ScoreGradients<T> {
    /// [S, L].
    pub content: Array2<T>,
    /// [M + L, L].
    pub recent: Array2<T>,
    /// [L, M+1].
    bias: Array2<T>,
    delta: Vec<T>,
}

impl<T: Scalar> ScoreGradients<T> {
    pub fn new(scores: &Scores<T>) -> Self {
        ScoreGradients {
            content: Array2::zeros(scores.content.raw_dim()),
            recent: Array2::zeros(scores.recent.raw_dim()),
            bias: Array2::zeros(scores.bias.raw_dim()),
            delta: vec![T::zero(); scores.stride()],
        }
    }

    /// Adds the rows of the piece's keys to the rows of their codes: the look-up of (2), backward.
    pub fn scatter(&mut self, block: &Block, codes: &[u32]) {
        let stride = self.content.ncols();
        let (content, recent) = (slice_mut(&mut self.content), slice(&self.recent));
        on_best_simd!(scatter(block, &codes[block.keys()], stride, content, recent));
    }

    /// Gradient of `(q + w) R^T`: the skew of (2), backward [len, M+1].
    pub fn bias(&mut self, block: &Block) -> ArrayView2<'_, T> {
        let stride = self.content.ncols();
        self.bias.fill(T::zero());
        let distances = self.bias.ncols();
        let bias = slice_mut(&mut self.bias);
        for r in 0..block.rows() {
            let row = &slice(&self.recent)[r * stride..][..block.len];
            for i in block.biased(r) {
                bias[i * distances + (i as isize - block.lead(r)) as usize] = row[i];
            }
        }
        self.bias.slice(s![..block.len, ..])
    }
}

fn slice<T>(array: &Array2<T>) -> &[T] {
    array.as_slice().expect("buffers are contiguous")
}

fn slice_mut<T>(array: &mut Array2<T>) -> &mut [T] {
    array.as_slice_mut().expect("buffers are contiguous")
}
