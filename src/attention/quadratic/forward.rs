//! Forward: blocks of queries against tiles of keys. Scores lie with keys in rows and 64 queries side by side.

use std::collections::VecDeque;
use std::ops::Range;

use fearless_simd::Simd;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::Scalar;
use crate::attention::kernels::{exponentiate, raise};
use crate::attention::tile::{view, view_mut};
use crate::ops::matmul::{PackedRows, product};
use crate::ops::simd::{LANES, Row, Rows, fused, on_best_simd};
use crate::ops::transpose::transpose;
use crate::ops::triangle::Triangle;

/// Queries that share packed values, and keys that they meet at a time. Measured (f32, K = V = 64, T = 4096): 256 and 512
/// queries with 256, 512 and 1024 keys differ by less than 2 %.
const BLOCK: usize = 256;
const TILE: usize = 512;

/// What forward reads: queries [T, K] that belong to the last T of the keys [N, K] and values [N, V], and biases [T, M+1] of the
/// distances 0, 1, ..., M of each query, if any.
#[derive(Clone, Copy)]
pub(super) struct Given<'a, T> {
    pub q: ArrayView2<'a, T>,
    pub k: ArrayView2<'a, T>,
    pub v: ArrayView2<'a, T>,
    pub biases: Option<ArrayView2<'a, T>>,
}

impl<T: Scalar> Given<'_, T> {
    /// Keys before the first query's own.
    pub fn past(&self) -> usize {
        self.k.nrows() - self.q.nrows()
    }
}

/// The part of `keys` that carries a bias for the query at position `at`.
pub(super) fn band<T>(biases: &ArrayView2<'_, T>, keys: &Range<usize>, at: usize) -> Range<usize> {
    keys.start.max((at + 1).saturating_sub(biases.ncols()))..keys.end.min(at + 1)
}

/// Outputs and lse of checked inputs; what the buffers hold does not matter.
pub(super) fn run<T: Scalar>(given: Given<'_, T>, mut out: ArrayViewMut2<'_, T>, lse: &mut [T]) {
    let starts = (0..given.q.nrows()).step_by(BLOCK);
    let rows = out.axis_chunks_iter_mut(Axis(0), BLOCK).zip(lse.chunks_mut(BLOCK));
    let mut blocks: VecDeque<_> = starts.zip(rows).collect();
    // The first with the last: every two cost the same.
    let mut tasks = vec![];
    while let Some(first) = blocks.pop_front() {
        tasks.push((first, blocks.pop_back()));
    }
    tasks.into_par_iter().for_each_init(
        || Buffers::new(given),
        |buffers, (first, last)| {
            for (start, (out, lse)) in std::iter::once(first).chain(last) {
                run_block(given, start, out, lse, buffers);
            }
        },
    );
}

/// What one task works in.
struct Buffers<T> {
    /// The transpose of 64 queries, `[K]` per tile of the block.
    q_t: Rows<T>,
    /// (1), then `exp(s - m)`, one row per key.
    scores: Rows<T>,
    /// Values of the tile's keys.
    values: PackedRows<T>,
}

impl<T: Scalar> Buffers<T> {
    fn new(given: Given<'_, T>) -> Self {
        let keys = TILE.min(given.k.nrows());
        Buffers {
            q_t: Rows::zeros(given.q.ncols() * BLOCK / LANES),
            scores: Rows::zeros(keys),
            values: PackedRows::zeros(keys, given.v.ncols()),
        }
    }
}

/// One block of queries, from `start` on, against all keys up to its end.
fn run_block<T: Scalar>(
    given: Given<'_, T>,
    start: usize,
    mut out: ArrayViewMut2<'_, T>,
    lse: &mut [T],
    Buffers { q_t, scores, values }: &mut Buffers<T>,
) {
    let (Given { q, k, v, biases }, past) = (given, given.past());
    let (d_k, end) = (q.ncols(), start + lse.len());
    let queries: Vec<Range<usize>> = (start..end).step_by(LANES).map(|q| q..end.min(q + LANES)).collect();
    for (n, queries) in queries.iter().enumerate() {
        transpose(q.slice(s![queries.clone(), ..]), &mut q_t[n * d_k..]);
    }
    let mut running = [Running { max: [T::neg_infinity(); LANES], sum: [T::zero(); LANES] }; BLOCK / LANES];
    for first_key in (0..past + end).step_by(TILE) {
        values.set_rows(0, v.slice(s![first_key..(past + end).min(first_key + TILE), ..]));
        for (n, queries) in queries.iter().enumerate() {
            let keys = first_key..(past + queries.end).min(first_key + TILE);
            if keys.is_empty() {
                continue;
            }
            let scores = &mut scores[..keys.len()];
            let q_t = view(&q_t[n * d_k..][..d_k]);
            product(k.slice(s![keys.clone(), ..]), q_t, view_mut(scores)); // (1)
            if let Some(biases) = &biases {
                for (lane, query) in queries.clone().enumerate() {
                    let at = past + query;
                    for key in band(biases, &keys, at) {
                        scores[key - keys.start][lane] += biases[[query, at - key]];
                    }
                }
            }
            for key in keys.start.max(past + queries.start)..keys.end {
                scores[key - keys.start][..key - past - queries.start].fill(T::neg_infinity());
            }
            let factor = on_best_simd!(simd => meet(simd, scores, &mut running[n])); // (4)
            let mut out = out.slice_mut(s![queries.start - start..queries.end - start, ..]);
            if first_key > 0 {
                rescale(&mut out, &factor);
            }
            let p = view(scores).slice_move(s![.., ..queries.len()]);
            values.product((p.t(), Triangle::Full), 0, out, first_key > 0);
        }
    }
    for (i, (lse, mut out)) in lse.iter_mut().zip(out.rows_mut()).enumerate() {
        let Running { max, sum } = &running[i / LANES];
        let (max, sum) = (max[i % LANES], sum[i % LANES]);
        *lse = max + sum.ln(); // (2)
        out *= T::one() / sum; // (3)
    }
}

/// What a tile's queries have seen so far.
#[derive(Clone, Copy)]
struct Running<T> {
    max: Row<T>,
    sum: Row<T>,
}

/// (4): scores become `exp(s - m')`; returns `exp(m - m')`.
#[inline(always)]
fn meet<S: Simd, T: Scalar>(simd: S, scores: &mut [Row<T>], running: &mut Running<T>) -> Row<T> {
    let mut factor = running.max;
    raise(simd, scores, &[], &mut running.max);
    for (factor, &max) in factor.iter_mut().zip(&running.max) {
        *factor = (*factor - max).exp_fast(fused(simd));
    }
    let sum = exponentiate(simd, scores, &[], &running.max);
    for ((total, sum), factor) in running.sum.iter_mut().zip(sum).zip(factor) {
        *total = *total * factor + sum;
    }
    factor
}

/// (4): `o <- o exp(m - m')`. Maxima seldom move once many keys have been met.
fn rescale<T: Scalar>(out: &mut ArrayViewMut2<'_, T>, factor: &Row<T>) {
    for (mut row, &factor) in out.rows_mut().into_iter().zip(factor) {
        if factor != T::one() {
            row *= factor;
        }
    }
}
