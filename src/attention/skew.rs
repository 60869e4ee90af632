//! Relative biases between two layouts: by query and distance, as a product gives them, and by key and query, as scores lie.
//!
//! ```text
//! by distance:  bias[i][M - d] = (q_i + w) . r_d              distances falling, so that later keys come later
//! by key:       recent[r][i]  += bias[i][M - (i - lead_r)]    row r is the key at lane lead_r
//! ```
//!
//! For one query, keys in order are neighbours in `bias`: a square of queries by keys is a transposed square of it, and each
//! of its rows begins one element before the last. A row of `bias` has a margin of zeros on both sides, for squares that
//! reach beyond distances 0 to M.

use fearless_simd::{Simd, SimdBase, dispatch};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::block::Tile;
use crate::Scalar;
use crate::ops::simd::{LANES, Row, level};
use crate::ops::transpose::{MOST_LANES, transpose_square};

/// How far a square can reach beyond the distances of its queries.
const MARGIN: usize = 2 * MOST_LANES;

/// A bias by distance of `rows` queries.
pub(super) fn zeros<T: Scalar>(rows: usize, window: usize) -> Array2<T> {
    Array2::zeros((rows, MARGIN + window + 1 + MARGIN))
}

/// Distances M down to 0 of the first `len` queries [len, M+1].
pub(super) fn inside<T>(bias: &Array2<T>, len: usize) -> ArrayView2<'_, T> {
    let end = bias.ncols() - MARGIN;
    bias.slice(s![..len, MARGIN..end])
}

/// As [`inside`], to write to.
pub(super) fn inside_mut<T>(bias: &mut Array2<T>, len: usize) -> ArrayViewMut2<'_, T> {
    let end = bias.ncols() - MARGIN;
    bias.slice_mut(s![..len, MARGIN..end])
}

/// Where query `lane` and row `r` meet in a row of the bias; none if no pair of a square that begins there has a bias.
fn column(tile: &Tile, r: usize, lane: usize, lanes: usize) -> Option<usize> {
    let (window, reach) = (tile.block.window as isize, lanes as isize - 1);
    let first = window + tile.lead(r) - lane as isize;
    (first + reach >= 0 && first - reach <= window).then(|| (first + MARGIN as isize) as usize)
}

/// Where the scores of a row's key without its bias come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a, T> {
    /// The row itself.
    Row,
    /// The scores of codes, of which each row has one.
    Codes(&'a [Row<T>], &'a [u32]),
}

/// Adds to the scores of the rows of `recent`, the first of which is row `first` of the tile, the biases of its queries. Where a
/// query does not see the key, any number.
pub(super) fn add<T: Scalar>(
    tile: &Tile,
    bias: &Array2<T>,
    source: Source<'_, T>,
    (first, recent): (usize, &mut [Row<T>]),
) {
    let stride = bias.ncols();
    let bias = bias.as_slice().expect("buffers are contiguous");
    dispatch!(level(), simd => add_squares(simd, tile, (bias, stride), source, (first, recent)));
}

#[inline(always)]
fn add_squares<S: Simd, T: Scalar>(
    simd: S,
    tile: &Tile,
    (bias, stride): (&[T], usize),
    source: Source<'_, T>,
    (first, recent): (usize, &mut [Row<T>]),
) {
    let lanes = T::Vector::<S>::LEN;
    let mut square = [T::Vector::<S>::splat(simd, T::zero()); MOST_LANES];
    for (n, rows) in recent.chunks_mut(lanes).enumerate() {
        for lane in (0..LANES).step_by(lanes) {
            let score = |i: usize, row: &Row<T>| {
                let row = match source {
                    Source::Row => row,
                    Source::Codes(scores, codes) => &scores[codes[n * lanes + i] as usize],
                };
                T::Vector::<S>::from_slice(simd, &row[lane..lane + lanes])
            };
            let Some(first) = column(tile, first + n * lanes, lane, lanes) else {
                for (i, row) in rows.iter_mut().enumerate() {
                    score(i, row).store_slice(&mut row[lane..lane + lanes]);
                }
                continue;
            };
            for (i, v) in square[..lanes].iter_mut().enumerate() {
                // One query later, the same key is one distance farther.
                *v = T::Vector::<S>::from_slice(simd, &bias[(lane + i) * stride + first - i..][..lanes]);
            }
            transpose_square::<S, T>(&mut square);
            for (i, (row, &v)) in rows.iter_mut().zip(&square).enumerate() {
                (score(i, row) + v).store_slice(&mut row[lane..lane + lanes]);
            }
        }
    }
}

/// [`add`] backward: each row's elements to where their biases came from, 0 where no key is at a distance.
pub(super) fn collect<T: Scalar>(tile: &Tile, d_recent: &[Row<T>], d_bias: &mut Array2<T>) {
    if tile.lead(tile.rows.start) + tile.block.window as isize > 0 {
        d_bias.fill(T::zero());
    }
    let stride = d_bias.ncols();
    let d_bias = d_bias.as_slice_mut().expect("buffers are contiguous");
    dispatch!(level(), simd => collect_squares(simd, tile, d_recent, (d_bias, stride)));
}

#[inline(always)]
fn collect_squares<S: Simd, T: Scalar>(
    simd: S,
    tile: &Tile,
    d_recent: &[Row<T>],
    (d_bias, stride): (&mut [T], usize),
) {
    let lanes = T::Vector::<S>::LEN;
    let zero = T::Vector::<S>::splat(simd, T::zero());
    let mut square = [zero; MOST_LANES];
    for (n, rows) in d_recent.chunks(lanes).enumerate() {
        for lane in (0..LANES).step_by(lanes) {
            let Some(first) = column(tile, tile.rows.start + n * lanes, lane, lanes) else { continue };
            square[rows.len()..].fill(zero);
            for (v, row) in square.iter_mut().zip(rows) {
                *v = T::Vector::<S>::from_slice(simd, &row[lane..lane + lanes]);
            }
            transpose_square::<S, T>(&mut square);
            for (i, v) in square[..lanes].iter().enumerate() {
                v.store_slice(&mut d_bias[(lane + i) * stride + first - i..][..lanes]);
            }
        }
    }
}
