//! The sweep forward: formulas (1) to (4) of the module above.

use ndarray::{ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{Piece, Segment};
use crate::Scalar;
use crate::attention::kernels::scale;
use crate::attention::tile::{Scores, view};
use crate::attention::{AttentionState, CompressiveCache, Inputs, VqAttention};
use crate::ops::matmul::{add_product, product};
use crate::ops::rows::all_finite;
use crate::ops::simd::on_best_simd;

/// Where outputs go: an output and two numbers per query. What the buffers hold does not matter.
#[derive(Debug)]
pub(in crate::attention) struct RowOutputs<'a, T> {
    pub out: ArrayViewMut2<'a, T>,
    pub lse: &'a mut [T],
    pub cached_mass: &'a mut [T],
}

impl<'a, T> RowOutputs<'a, T> {
    fn split_at(self, n: usize) -> (Self, Self) {
        let (out, out_rest) = self.out.split_at(Axis(0), n);
        let (lse, lse_rest) = self.lse.split_at_mut(n);
        let (cached_mass, mass_rest) = self.cached_mass.split_at_mut(n);
        let rest = RowOutputs { out: out_rest, lse: lse_rest, cached_mass: mass_rest };
        (RowOutputs { out, lse, cached_mass }, rest)
    }
}

/// Tokens of a segment at least: enough to repay its buffers and its copy of the cache.
const SEGMENT: usize = 1024;

/// [`forward`](super::forward) on checked shapes, in at most `segments` parts at once, which change no bit of the result;
/// returns whether q and v are finite.
pub(in crate::attention) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    rows: RowOutputs<'_, T>,
    segments: usize,
) -> bool {
    let piece = Piece::new(attention, inputs.reborrow(), state.window_keys());
    let segments = piece.segments(segments.min(piece.codes.len() / SEGMENT), &mut state.cache);
    let mut tasks = vec![];
    let mut rest = rows;
    for segment in segments {
        let (rows, later) = rest.split_at(segment.queries(&piece).len());
        tasks.push((segment, rows));
        rest = later;
    }
    let run = |(segment, rows)| run_segment(&piece, segment, rows);
    let done: Vec<_> = tasks.into_par_iter().map(run).collect();
    let finite = done.iter().all(|(finite, ..)| *finite);
    if let Some((_, mut cache, mut entered)) = done.into_iter().next_back() {
        piece.enter_last(&mut entered, &mut cache);
        state.cache = cache;
    }
    state.advance(inputs.codes, inputs.codewords, inputs.v);
    finite
}

/// The blocks of one segment in order: whether its inputs are finite, and the cache that its last block saw.
fn run_segment<T: Scalar>(
    piece: &Piece<'_, T>,
    segment: Segment<T>,
    mut rows: RowOutputs<'_, T>,
) -> (bool, CompressiveCache<T>, usize) {
    let first = segment.queries(piece).start;
    let Segment { blocks, mut cache, mut entered } = segment;
    let mut scores = Scores::new(piece);
    let mut finite = true;
    for block in blocks.map(|n| piece.block(n)) {
        piece.enter(&block, &mut entered, &mut cache); // (4)
        finite &= all_finite(piece.inputs.q.slice(s![block.queries(), ..]));
        finite &= all_finite(piece.inputs.v.slice(s![block.queries(), ..]));
        let log_counts = piece.log_counts(&cache);
        for tile in block.tiles() {
            scores.fill_content(piece, &tile); // (1)
            scores.fill_recent(piece, &tile);
            let [max, cached, sum] = scores.softmax(&tile, &log_counts);
            let queries = tile.queries().start - first..tile.queries().end - first;
            for (i, row) in queries.clone().enumerate() {
                rows.lse[row] = max[i] + sum[i].ln(); // (2)
                rows.cached_mass[row] = cached[i] / sum[i];
            }
            let mut out = rows.out.slice_mut(s![queries, ..]);
            let (old, keys) = tile.parts();
            let (p_old, p_new) = scores.recent(&tile).split_at(old.len());
            let v = piece.inputs.v.slice(s![keys, ..]);
            product(view(p_new).slice(s![.., ..tile.len]).t(), v, out.view_mut()); // (3)
            let p_old = view(p_old).slice_move(s![.., ..tile.len]);
            add_product(p_old.t(), piece.carried_values(&tile), out.view_mut());
            if piece.attention.cache {
                let p = view(&scores.content).slice_move(s![.., ..tile.len]);
                add_product(p.t(), cache.mean(), out.view_mut());
            }
            for (mut row, &sum) in out.rows_mut().into_iter().zip(&sum) {
                match row.as_slice_mut() {
                    Some(row) => on_best_simd!(scale(row, T::one() / sum)),
                    None => row *= T::one() / sum,
                }
            }
        }
    }
    (finite, cache, entered)
}
