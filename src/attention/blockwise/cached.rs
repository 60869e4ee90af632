//! The sweep backward in time of (4) alone, for values so wide that it runs apart from the others.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::Piece;
use super::backward::lanes;
use crate::Scalar;
use crate::attention::kernels::add_to;
use crate::attention::tile::{Scores, view};
use crate::ops::matmul::{add_product, prefetch, prefetch_row};
use crate::ops::simd::{LANES, on_best_simd};

/// (4): what later queries send to values that they read through the cache. `counts` are those of before the piece.
///
/// Codes are shared among `groups` tasks: each has their rows of G and the keys that bear them, so no sum is cut.
pub(super) fn cached_values<T: Scalar>(
    piece: &Piece<'_, T>,
    lse: ArrayView1<'_, T>,
    mut counts: Array1<u64>,
    d_out: ArrayView2<'_, T>,
    mut d_v: ArrayViewMut2<'_, T>,
    groups: usize,
) {
    // Counts as the last block sees them.
    let last = piece.block(piece.n_blocks() - 1);
    for code in piece.codes_of(0..piece.entered_before(&last)) {
        counts[code as usize] += 1;
    }
    let per_group = counts.len().div_ceil(groups.max(1));
    let mut keys: Vec<Vec<_>> = (0..counts.len().div_ceil(per_group)).map(|_| vec![]).collect();
    let rows = d_v.rows_mut().into_iter().zip(&piece.codes).enumerate();
    for (j, (d_v, &code)) in rows.take(last.first_key) {
        keys[code as usize / per_group].push((j, d_v));
    }
    let counts = counts.axis_chunks_iter_mut(Axis(0), per_group).into_par_iter();
    counts.zip(keys).enumerate().for_each(|(group, (counts, keys))| {
        let first = group * per_group;
        cached_values_of(piece, first..first + counts.len(), counts, lse, d_out, keys);
    });
}

/// How many keys before its turn a row is asked for.
const AHEAD: usize = 8;

/// (4) for the keys of some codes: their positions and the gradients of their values.
fn cached_values_of<T: Scalar>(
    piece: &Piece<'_, T>,
    codes: Range<usize>,
    mut counts: ArrayViewMut1<'_, u64>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
    mut keys: Vec<(usize, ArrayViewMut1<'_, T>)>,
) {
    let first = codes.start;
    let mut scores = Scores::of_codes(piece, codes);
    let mut g = Array2::<T>::zeros((counts.len(), d_out.ncols()));
    // Before the first block that begins beyond the window, only carried keys are cached: constants.
    let blocks = (0..piece.n_blocks()).rev().map(|n| piece.block(n));
    for block in blocks.take_while(|block| block.first_key > 0) {
        // A code without keys is kept out; its exponential could overflow.
        let gate = |&n: &u64| if n > 0 { T::zero() } else { T::neg_infinity() };
        let gates: Vec<T> = counts.iter().map(gate).collect();
        for tile in block.tiles().rev() {
            let earlier = tile.queries().start.saturating_sub(LANES)..tile.queries().start;
            prefetch(d_out.slice(s![earlier, ..]));
            scores.fill_content(piece, &tile);
            scores.exponentiate_cached(&gates, &lanes(lse, &tile));
            let p = view(&scores.content).slice_move(s![.., ..tile.len]);
            add_product(p, d_out.slice(s![tile.queries(), ..]), g.view_mut());
        }
        let entered = block.first_key.saturating_sub(piece.attention.block_len);
        while let Some((j, mut d_v)) = keys.pop_if(|(j, _)| *j >= entered) {
            if let Some((_, next)) = keys.len().checked_sub(AHEAD).map(|n| &keys[n]) {
                prefetch_row(next.view());
            }
            let code = piece.codes[j] as usize - first;
            match (d_v.as_slice_mut(), g.row(code).to_slice()) {
                (Some(d_v), Some(g)) => on_best_simd!(add_to(g, d_v)),
                _ => d_v += &g.row(code),
            }
            counts[code] -= 1;
        }
    }
}
