//! The two sweeps of backward: formulas (3) to (1) forward in time, then (4) backward in time.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::{Past, Piece, Saved};
use crate::Scalar;
use crate::attention::block::{LANES, Tile};
use crate::attention::tile::{Row, ScoreGradients, Scores, view, view_mut, zeros};
use crate::attention::{BiasGradients, CompressiveCache, Inputs, VqAttention};
use crate::ops::matmul::{add_product, product};
use crate::ops::transpose::transpose;

/// Where the gradients of rows go; what the buffers hold does not matter.
#[derive(Debug)]
pub(in crate::attention) struct RowGradients<'a, T> {
    pub q: ArrayViewMut2<'a, T>,
    pub k_hat: ArrayViewMut2<'a, T>,
    pub v: ArrayViewMut2<'a, T>,
}

/// [`backward`](super::backward) on checked input; returns the gradients of the codewords and of the biases.
pub(in crate::attention) fn run_backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    rows: RowGradients<'_, T>,
) -> (Array2<T>, Option<BiasGradients<T>>) {
    let k = inputs.q.ncols();
    let RowGradients { q: mut d_q_all, k_hat: mut d_k_hat, v: mut d_v } = rows;
    let piece = Piece::new(attention, inputs.reborrow(), saved.start.window_keys());
    let mut cache = saved.start.cache;
    let mut scores = Scores::new(&piece);
    let mut d_scores = ScoreGradients::new(&scores);
    let mut d_out_t = zeros(d_out.ncols());
    let mut d_q_position = Array2::zeros((LANES, k));
    let mut d_codewords = Array2::zeros(inputs.codewords.raw_dim());
    let mut d_biases = inputs.biases.as_ref().map(|biases| BiasGradients {
        content: Array1::zeros(k),
        position: Array1::zeros(k),
        relative: Array2::zeros(biases.relative.raw_dim()),
    });
    let mut past = Past { piece: &piece, entered: 0 };
    for block in piece.blocks() {
        past.enter(&block, &mut cache);
        d_k_hat.slice_mut(s![block.queries(), ..]).fill(T::zero());
        d_v.slice_mut(s![block.queries(), ..]).fill(T::zero());
        let log_counts = piece.log_counts(&cache);
        // The first key that receives gradient.
        let reached = if attention.gradient_through_cache { block.first_key } else { block.start };
        for tile in block.tiles() {
            let d_out = d_out.slice(s![tile.queries(), ..]);
            transpose(d_out, &mut d_out_t);
            scores.fill_content(&piece, &tile);
            scores.fill_recent(&piece, &tile);
            let shift = lanes(&saved.lse, &tile);
            scores.exponentiate_cached(&log_counts, &shift);
            scores.exponentiate_recent(&tile, &shift);

            // (3)
            let (old, keys) = tile.parts();
            if attention.cache {
                product(cache.mean(), view(&d_out_t), view_mut(&mut d_scores.content));
            }
            let (d_old, d_new) = d_scores.recent_mut(&tile).split_at_mut(old.len());
            product(piece.carried_values(&tile), view(&d_out_t), view_mut(d_old));
            product(inputs.v.slice(s![keys.clone(), ..]), view(&d_out_t), view_mut(d_new));
            let seen = reached.clamp(keys.start, keys.end)..keys.end;
            let first = old.len() + seen.start - keys.start;
            let p = view(&scores.recent(&tile)[first..]).slice_move(s![.., ..tile.len]);
            add_product(p, d_out, d_v.slice_mut(s![seen.clone(), ..]));

            d_scores.softmax_backward(&scores, &tile, log_counts.len()); // (2)

            // (1)
            let q_content = scores.q_content(&tile);
            let d_recent = view(d_scores.recent(&tile)).slice_move(s![.., ..tile.len]);
            add_product(d_recent.slice(s![first.., ..]), q_content, d_k_hat.slice_mut(s![seen, ..]));
            if attention.cache {
                let d_content = view(&d_scores.content).slice_move(s![.., ..tile.len]);
                add_product(d_content, q_content, d_codewords.view_mut());
            } else {
                d_scores.content.fill([T::zero(); LANES]);
            }
            d_scores.scatter(&piece, &tile);
            let mut d_q = d_q_all.slice_mut(s![tile.queries(), ..]);
            let d_content = view(&d_scores.content).slice_move(s![.., ..tile.len]);
            product(d_content.t(), inputs.codewords, d_q.view_mut());
            let d_old = view(&d_scores.recent(&tile)[..old.len()]).slice_move(s![.., ..tile.len]);
            let hidden = piece.window.codes.len() - block.carried;
            let k_hat = piece.window.k_hat.slice(s![hidden + old.start..hidden + old.end, ..]);
            add_product(d_old.t(), k_hat, d_q.view_mut());
            if let (Some(biases), Some(d_biases)) = (&inputs.biases, &mut d_biases) {
                d_biases.content += &d_q.sum_axis(Axis(0));
                let d_bias = d_scores.bias(&tile);
                let mut d_q_position = d_q_position.slice_mut(s![..tile.len, ..]);
                product(d_bias, biases.relative.slice(s![..;-1, ..]), d_q_position.view_mut());
                d_biases.position += &d_q_position.sum_axis(Axis(0));
                let falling = d_biases.relative.slice_mut(s![..;-1, ..]);
                add_product(d_bias.t(), scores.q_position(&tile), falling);
                d_q += &d_q_position;
            }
        }
    }
    if attention.cache && attention.gradient_through_cache {
        cached_values(&piece, &saved.lse, cache, d_out, &mut scores, d_v);
    }
    (d_codewords, d_biases)
}

/// The tile's part of one number per query.
fn lanes<T: Scalar>(all: &Array1<T>, tile: &Tile) -> Row<T> {
    let mut row = [T::zero(); LANES];
    for (lane, &x) in row.iter_mut().zip(all.slice(s![tile.queries()])) {
        *lane = x;
    }
    row
}

/// (4): what later queries send to values that they read through the cache. `cache` is as the last block saw it.
fn cached_values<T: Scalar>(
    piece: &Piece<'_, T>,
    lse: &Array1<T>,
    cache: CompressiveCache<T>,
    d_out: ArrayView2<'_, T>,
    scores: &mut Scores<T>,
    mut d_v: ArrayViewMut2<'_, T>,
) {
    let mut counts = cache.count().to_owned();
    let mut g = Array2::<T>::zeros(cache.mean().raw_dim());
    // Before the first block that begins beyond the window, only carried keys are cached: constants.
    for block in piece.blocks().rev().take_while(|block| block.first_key > 0) {
        // A code without keys is kept out; its exponential could overflow.
        let gate = |&n: &u64| if n > 0 { T::zero() } else { T::neg_infinity() };
        let gates: Vec<T> = counts.iter().map(gate).collect();
        for tile in block.tiles() {
            scores.fill_content(piece, &tile);
            scores.exponentiate_cached(&gates, &lanes(lse, &tile));
            let p = view(&scores.content).slice_move(s![.., ..tile.len]);
            add_product(p, d_out.slice(s![tile.queries(), ..]), g.view_mut());
        }
        let entered = block.first_key.saturating_sub(piece.attention.block_len)..block.first_key;
        for (mut d_v, &code) in
            d_v.slice_mut(s![entered.clone(), ..]).rows_mut().into_iter().zip(&piece.codes[entered])
        {
            d_v += &g.row(code as usize);
            counts[code as usize] -= 1;
        }
    }
}
