//! Linear time: blocks of queries against the compressive cache and a window of keys.
//!
//! Forward, for each block of L queries:
//!
//! ```text
//! (1)  scores of all codes and of the recent keys            see `tile`
//! (2)  lse_i = log( sum_{s: N_s>0} exp(a_is + ln N_s) + sum_{j recent} exp(s_ij) )
//! (3)  o_i   = sum_s P_is mu_s + sum_j p_ij v_j              P_is = exp(a_is + ln N_s - lse_i), p_ij = exp(s_ij - lse_i)
//! (4)  keys more than M before the next block enter the cache
//! ```
//!
//! Backward computes scores anew and undoes these, without a cache per block:
//!
//! ```text
//! (3)  dP_is = dO_i . mu_s     dp_ij = dO_i . v_j     dv_j += sum_i p_ij dO_i
//! (2)  dA_is = P_is (dP_is - delta_i)     ds_ij = p_ij (dp_ij - delta_i)     delta_i = sum of P dP and p dp
//! (1)  dq, du, dw, dr, dk^, dc
//! (4)  G_s += sum_i exp(a_is - lse_i) dO_i where N_s > 0, then dv_j += G_{z_j} for the keys that entered here
//! ```
//!
//! G grows backward in time. Where values are narrow, everything happens in one such sweep, before which all keys enter the
//! cache and what each replaces is kept until it leaves again (see `replay`). Where they are wide, the means, G and the window's
//! rows would not stay in a processor's caches together: (3) to (1) run forward in time, (4) in a sweep of its own.
//!
//! A block's queries are taken 64 at a time (see `tile`), so scores of the whole block never exist together.
//!
//! Where documents start inside of a piece, all this happens to each by itself. As long as the cache is empty, and no key enters it
//! before the last block, its products are left out.
//!
//! Kept for backward: lse `[T]` and the state the piece began with. Cost: `2 T (S K + (M+1) K + V (S + M + L/2))` operations
//! forward (without the (M+1) K where there are no biases).
//! Source: Transformer-VQ (Lingle, arXiv 2309.16354); the sweeps of backward are this crate's.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, s};

use super::block::{Block, Tile};
use super::{AttentionState, CompressiveCache, Gradients, Inputs, Output, VqAttention, WindowKeys};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::ops::matmul::PackedRows;
use crate::{Error, Scalar};

mod backward;
mod cached;
mod forward;
mod replay;

pub(super) use backward::{HeadGradients, RowGradients, add_gradients, run_backward};
pub(super) use forward::{RowOutputs, normalize, run};

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
    compiled_here!(
        T,
        forward_here::<T>,
        fn(&VqAttention, &Inputs<'_, T>, &mut AttentionState<T>) -> Result<(Output<T>, Saved<T>), Error>
    )(attention, inputs, state)
}

fn forward_here<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
) -> Result<(Output<T>, Saved<T>), Error> {
    inputs.check(attention, state)?;
    let start = state.clone();
    let mut output = Output::zeros(inputs);
    run(attention, inputs, state, output.rows(), rayon::current_num_threads());
    let saved = Saved { lse: output.lse.clone(), start };
    Ok((output, saved))
}

/// Gradients of one piece. The state it began with is a constant.
///
/// # Shapes
/// `d_out` [T, V].
///
/// # Errors
/// As [`fn@forward`], and if `saved` comes from a piece of another length.
pub fn backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    compiled_here!(
        T,
        backward_here::<T>,
        fn(&VqAttention, &Inputs<'_, T>, Saved<T>, ArrayView2<'_, T>) -> Result<Gradients<T>, Error>
    )(attention, inputs, saved, d_out)
}

fn backward_here<T: Scalar>(
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
    let (codewords, biases, _) =
        run_backward(attention, inputs, saved, d_out, rows, 1, rayon::current_num_threads());
    Ok(Gradients { q: d_q, k_hat: d_k_hat, v: d_v, codewords, biases })
}

/// Bytes of a value up to which backward is one sweep. Measured: 256 (eight heads of 64) and 512 gain 8 % and 6 %, 2048 and more
/// lose as much.
const NARROW: usize = 512;

/// One piece and what all its blocks read.
#[derive(Debug)]
pub(super) struct Piece<'a, T> {
    pub attention: &'a VqAttention,
    pub inputs: Inputs<'a, T>,
    /// The keys before the piece.
    pub window: WindowKeys<T>,
    pub codes: Vec<u32>,
    /// u `[K]`, zeros without biases.
    pub content_bias: Vec<T>,
    /// w `[K]`, zeros without biases.
    pub position_bias: Vec<T>,
    /// As [`falling`] has it.
    pub relative_t: Option<&'a PackedRows<T>>,
    /// Whether any query reads a key through the cache.
    reads_cache: bool,
}

/// r transposed, distances falling: r_M, ..., r_0 [K, M+1]. None without biases.
fn falling<T: Scalar>(inputs: &Inputs<'_, T>) -> Option<PackedRows<T>> {
    inputs.biases.as_ref().map(|biases| PackedRows::from_rows(biases.relative.slice(s![..;-1, ..]).t()))
}

impl<'a, T: Scalar> Piece<'a, T> {
    /// A piece of one document after `state`; `relative_t` is [`falling`].
    fn new(
        attention: &'a VqAttention,
        inputs: Inputs<'a, T>,
        relative_t: Option<&'a PackedRows<T>>,
        state: &AttentionState<T>,
    ) -> Self {
        let zeros = || vec![T::zero(); inputs.q.ncols()];
        let mut piece = Piece {
            attention,
            window: state.window_keys(),
            codes: inputs.codes.to_vec(),
            content_bias: inputs.biases.as_ref().map_or_else(zeros, |biases| biases.content.to_vec()),
            position_bias: inputs.biases.as_ref().map_or_else(zeros, |biases| biases.position.to_vec()),
            relative_t,
            reads_cache: false,
            inputs,
        };
        let last = piece.n_blocks().checked_sub(1).map(|n| piece.block(n));
        let enters = last.is_some_and(|block| piece.entered_before(&block) > 0);
        piece.reads_cache = attention.cache && (enters || state.cache.count().iter().any(|&n| n > 0));
        piece
    }

    /// Whether values receive gradient from queries that read them through the cache.
    fn sends_through_cache(&self) -> bool {
        self.reads_cache && self.attention.gradient_through_cache
    }

    /// Whether backward is one sweep: a mean value per key is then kept, and read once.
    fn narrow(&self) -> bool {
        size_of::<T>() * self.inputs.v.ncols() <= NARROW
    }

    /// Whether G is summed in the same sweep as everything else.
    fn sums_g(&self) -> bool {
        self.sends_through_cache() && self.narrow()
    }

    fn n_blocks(&self) -> usize {
        self.codes.len().div_ceil(self.attention.block_len)
    }

    fn block(&self, n: usize) -> Block {
        Block::new(self.attention, self.codes.len(), self.window.codes.len(), n)
    }

    /// The piece in at most `n` segments of whole blocks, each with the cache that its first block sees, given that of before the
    /// piece.
    ///
    /// Tokens enter the cache one by one here as in any other run: where segments are cut changes no bit of it.
    fn segments(&self, n: usize, cache: CompressiveCache<T>) -> Vec<Segment<T>> {
        let blocks = self.n_blocks();
        let per_segment = blocks.div_ceil(n.max(1)).max(1);
        let (mut cache, mut entered) = (Some(cache), 0);
        (0..blocks)
            .step_by(per_segment)
            .map(|first| {
                self.enter(&self.block(first), &mut entered, cache.as_mut().expect("until the last"));
                let blocks = first..blocks.min(first + per_segment);
                let is_last = blocks.end == self.n_blocks();
                let cache = if is_last { cache.take() } else { cache.clone() };
                Segment { blocks, cache: cache.expect("until the last"), entered }
            })
            .collect()
    }

    /// (4), before `block`: keys more than M before it pass into the cache. Of the carried window's and then the piece's keys,
    /// `entered` have done so.
    fn enter(&self, block: &Block, entered: &mut usize, cache: &mut CompressiveCache<T>) {
        self.enter_until(self.entered_before(block), entered, cache, None);
    }

    /// How many keys have entered when `block` begins.
    fn entered_before(&self, block: &Block) -> usize {
        self.window.codes.len() - block.carried + block.first_key
    }

    /// (4), at the end of the piece.
    fn enter_last(&self, entered: &mut usize, cache: &mut CompressiveCache<T>) {
        let total = self.window.codes.len() + self.codes.len();
        self.enter_until(total.saturating_sub(self.attention.window), entered, cache, None);
    }

    fn enter_until(
        &self,
        end: usize,
        entered: &mut usize,
        cache: &mut CompressiveCache<T>,
        mut replaced: Option<&mut Vec<T>>,
    ) {
        let held = self.window.codes.len();
        let carried = *entered..end.min(held);
        if !carried.is_empty() {
            let codes = self.window.codes.slice(s![carried.clone()]);
            let (codes, values) = (codes.to_vec(), self.window.v.slice(s![carried, ..]));
            cache.push_rows(&codes, values, replaced.as_deref_mut());
        }
        let own = (*entered).max(held) - held..end.max(held) - held;
        if !own.is_empty() {
            let values = self.inputs.v.slice(s![own.clone(), ..]);
            cache.push_rows(&self.codes[own], values, replaced);
        }
        *entered = end.max(*entered);
    }

    /// The codes of keys, counted as in [`enter`](Self::enter).
    fn codes_of(&self, keys: Range<usize>) -> impl Iterator<Item = u32> {
        self.window.codes.iter().chain(&self.codes).copied().skip(keys.start).take(keys.len())
    }

    /// The values of the tile's carried rows.
    fn carried_values(&self, tile: &Tile) -> ArrayView2<'_, T> {
        self.window.v.slice(s![self.carried(tile), ..])
    }

    /// The keys of the tile's carried rows.
    pub(super) fn carried_keys(&self, tile: &Tile) -> ArrayView2<'_, T> {
        self.window.k_hat.slice(s![self.carried(tile), ..])
    }

    /// Where the tile's carried rows are in the window.
    fn carried(&self, tile: &Tile) -> Range<usize> {
        let (old, _) = tile.parts();
        let hidden = self.window.codes.len() - tile.block.carried;
        hidden + old.start..hidden + old.end
    }
}

/// Neighbouring blocks that run one after the other.
#[derive(Debug)]
struct Segment<T> {
    blocks: Range<usize>,
    /// As the first block sees it.
    cache: CompressiveCache<T>,
    /// Keys that it holds of the carried window and the piece.
    entered: usize,
}

impl<T: Scalar> Segment<T> {
    /// Positions of its queries in the piece.
    fn queries(&self, piece: &Piece<'_, T>) -> Range<usize> {
        let start = |n: usize| (n * piece.attention.block_len).min(piece.codes.len());
        start(self.blocks.start)..start(self.blocks.end)
    }
}

#[cfg(test)]
mod tests;
