//! The sweep forward: formulas (1) to (4) of the module above.

use ndarray::{Array1, ArrayViewMut2, s};

use super::{Past, Piece};
use crate::Scalar;
use crate::attention::kernels::scale;
use crate::attention::tile::{Scores, view};
use crate::attention::{AttentionState, Inputs, VqAttention};
use crate::ops::matmul::{add_product, product};
use crate::ops::simd::on_best_simd;

/// One number per query.
#[derive(Debug)]
pub(in crate::attention) struct RowStatistics<T> {
    pub lse: Array1<T>,
    pub cached_mass: Array1<T>,
}

/// [`forward`](super::forward) on checked input, into a buffer of the caller's whose content does not matter.
pub(in crate::attention) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    mut out: ArrayViewMut2<'_, T>,
) -> RowStatistics<T> {
    let t = inputs.q.nrows();
    let piece = Piece::new(attention, inputs.reborrow(), state.window_keys());
    let mut scores = Scores::new(&piece);
    let mut rows = RowStatistics { lse: Array1::zeros(t), cached_mass: Array1::zeros(t) };
    let mut past = Past { piece: &piece, entered: 0 };
    for block in piece.blocks() {
        past.enter(&block, &mut state.cache); // (4)
        let log_counts = piece.log_counts(&state.cache);
        for tile in block.tiles() {
            scores.fill_content(&piece, &tile); // (1)
            scores.fill_recent(&piece, &tile);
            let [max, cached, sum] = scores.softmax(&tile, &log_counts);
            for (i, row) in tile.queries().enumerate() {
                rows.lse[row] = max[i] + sum[i].ln(); // (2)
                rows.cached_mass[row] = cached[i] / sum[i];
            }
            let mut out = out.slice_mut(s![tile.queries(), ..]);
            let (old, keys) = tile.parts();
            let (p_old, p_new) = scores.recent(&tile).split_at(old.len());
            product(view(p_new).slice(s![.., ..tile.len]).t(), inputs.v.slice(s![keys, ..]), out.view_mut()); // (3)
            add_product(
                view(p_old).slice(s![.., ..tile.len]).t(),
                piece.carried_values(&tile),
                out.view_mut(),
            );
            if attention.cache {
                let p = view(&scores.content).slice_move(s![.., ..tile.len]);
                add_product(p.t(), state.cache.mean(), out.view_mut());
            }
            for (mut row, &sum) in out.rows_mut().into_iter().zip(&sum) {
                match row.as_slice_mut() {
                    Some(row) => on_best_simd!(scale(row, T::one() / sum)),
                    None => row *= T::one() / sum,
                }
            }
        }
    }
    past.finish(&mut state.cache);
    state.advance(inputs.codes, inputs.codewords, inputs.v);
    rows
}
