//! Backward: blocks of keys against tiles of queries. Here it is 64 keys that lie side by side, with queries in rows, so that
//! the gradients of keys and values are sums over many rows at a time and stay in a cache until they are complete.

use std::ops::Range;

use fearless_simd::{Simd, SimdBase};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::forward::{self, band};
use crate::Scalar;
use crate::attention::tile::{view, view_mut};
use crate::ops::aligned;
use crate::ops::exp::{TOGETHER, exp};
use crate::ops::matmul::{PackedRows, add_product, product};
use crate::ops::simd::{LANES, Row, Rows, on_best_simd};
use crate::ops::transpose::transpose;
use crate::ops::triangle::Triangle;

/// Keys that share packed rows of `d_out`, and queries that they meet at a time. Measured (f32, T = 2048): 128, 256 and 512
/// queries differ by less than 1 % with K = V = 64; with V = 1536, where a tile fills a cache, 128 are 1 to 2 % ahead.
const BLOCK: usize = 256;
const TILE: usize = 128;

/// Keys of a segment on average, at least, and segments at most: each has its own sums of d_q.
const SEGMENT: usize = 1024;
const SEGMENTS: usize = 8;

/// What backward reads.
pub(super) struct Given<'a, T> {
    pub forward: forward::Given<'a, T>,
    pub d_out: ArrayView2<'a, T>,
    pub lse: &'a [T],
    /// `dO_i . o_i`.
    pub delta: &'a [T],
}

/// The sums of d_q of each segment, which a caller may keep for the next call: what they hold does not matter.
#[derive(Debug, Clone)]
pub(super) struct Sums<T>(Vec<Array2<T>>);

impl<T> Default for Sums<T> {
    fn default() -> Self {
        Sums(vec![])
    }
}

impl<T: Scalar> Sums<T> {
    /// Zeros, one array for each of these shapes.
    fn zeros(&mut self, shapes: impl ExactSizeIterator<Item = (usize, usize)>) -> &mut [Array2<T>] {
        self.0.resize_with(shapes.len(), || Array2::zeros((0, 0)));
        for (sum, shape) in self.0.iter_mut().zip(shapes) {
            if sum.dim() == shape {
                sum.fill(T::zero());
            } else {
                *sum = aligned::array(shape);
            }
        }
        &mut self.0
    }
}

/// Gradients of checked inputs, of all keys and values, those before the first query too; what the buffers hold does not matter.
/// Returns those of the biases [T, M+1].
pub(super) fn run<T: Scalar>(
    given: &Given<'_, T>,
    mut d_q: ArrayViewMut2<'_, T>,
    mut d_k: ArrayViewMut2<'_, T>,
    mut d_v: ArrayViewMut2<'_, T>,
    sums: &mut Sums<T>,
) -> Option<Array2<T>> {
    let (t, width) = given.forward.q.dim();
    let past = given.forward.past();
    let segments = segments(past + t);
    let first_query = |keys: &Range<usize>| keys.start.saturating_sub(past);
    let sums = sums.zeros(segments.iter().map(|keys| (t - first_query(keys), width)));
    let mut tasks = vec![];
    let (mut k_rest, mut v_rest) = (d_k.view_mut(), d_v.view_mut());
    for (keys, sum) in segments.into_iter().zip(&mut *sums) {
        let (k, later_k) = k_rest.split_at(Axis(0), keys.len());
        let (v, later_v) = v_rest.split_at(Axis(0), keys.len());
        tasks.push((keys, sum, k, v));
        (k_rest, v_rest) = (later_k, later_v);
    }
    let run = |(keys, d_q, d_k, d_v): (Range<usize>, &mut Array2<T>, _, _)| {
        let first = first_query(&keys);
        // Those that see the segment's last key at a distance with a bias, and all before them.
        let mut d_biases = given.forward.biases.map(|biases| {
            let end = t.min((keys.end + biases.ncols() - 1).saturating_sub(past));
            Array2::zeros((end.saturating_sub(first), biases.ncols()))
        });
        run_segment(given, keys, d_q.view_mut(), d_biases.as_mut(), d_k, d_v);
        (first, d_biases)
    };
    let done: Vec<_> = tasks.into_par_iter().with_max_len(1).map(run).collect();
    d_q.fill(T::zero());
    let mut d_biases = given.forward.biases.map(|biases| Array2::zeros(biases.raw_dim()));
    for ((first, of_biases), sum) in done.into_iter().zip(sums) {
        let mut d_q = d_q.slice_mut(s![first.., ..]);
        d_q += &*sum;
        if let (Some(d_biases), Some(sum)) = (&mut d_biases, of_biases) {
            let mut d_biases = d_biases.slice_mut(s![first..first + sum.nrows(), ..]);
            d_biases += &sum;
        }
    }
    d_biases
}

/// All keys, in segments that meet about as many queries each.
fn segments(t: usize) -> Vec<Range<usize>> {
    let n = (t / SEGMENT).clamp(1, SEGMENTS);
    // Keys from x on meet (t - x)^2 / 2 queries.
    let end = |m: usize| (t as f64 * (1.0 - (1.0 - m as f64 / n as f64).sqrt())) as usize / LANES * LANES;
    (1..=n).map(|m| end(m - 1)..if m < n { end(m) } else { t }).collect()
}

/// The keys of one segment against all queries from its first key on; `d_q` belongs to these, `d_biases` to the first of them.
fn run_segment<T: Scalar>(
    given: &Given<'_, T>,
    segment: Range<usize>,
    mut d_q: ArrayViewMut2<'_, T>,
    mut d_biases: Option<&mut Array2<T>>,
    mut d_k: ArrayViewMut2<'_, T>,
    mut d_v: ArrayViewMut2<'_, T>,
) {
    let &Given { forward: forward::Given { q, k, v, biases }, d_out, lse, delta } = given;
    let ((t, d_key), d_value, past) = (q.dim(), v.ncols(), given.forward.past());
    let first = segment.start.saturating_sub(past);
    let mut k_t = Rows::zeros(d_key * BLOCK / LANES);
    let mut v_t = Rows::zeros(d_value * BLOCK / LANES);
    let rows = TILE.min(t);
    let (mut p, mut d_p) = (Rows::zeros(rows), Rows::zeros(rows));
    let mut packed = PackedRows::zeros(rows, d_value);
    for start in segment.clone().step_by(BLOCK) {
        let end = segment.end.min(start + BLOCK);
        let keys = |n: usize| start + n * LANES..end.min(start + (n + 1) * LANES);
        let n_tiles = (end - start).div_ceil(LANES);
        for n in 0..n_tiles {
            transpose(k.slice(s![keys(n), ..]), &mut k_t[n * d_key..]);
            transpose(v.slice(s![keys(n), ..]), &mut v_t[n * d_value..]);
        }
        for first_query in (start.saturating_sub(past)..t).step_by(TILE) {
            let last_query = t.min(first_query + TILE);
            packed.set_rows(0, d_out.slice(s![first_query..last_query, ..]));
            for n in 0..n_tiles {
                let keys = keys(n);
                let first_of_keys = keys.start.saturating_sub(past);
                let queries = first_query.max(first_of_keys)..last_query;
                if queries.is_empty() {
                    continue;
                }
                let (p, d_p) = (&mut p[..queries.len()], &mut d_p[..queries.len()]);
                let q = q.slice(s![queries.clone(), ..]);
                let k = k.slice(s![keys.clone(), ..]);
                product(q, view(&k_t[n * d_key..][..d_key]), view_mut(p)); // scores
                let v_t = view(&v_t[n * d_value..][..d_value]);
                product(d_out.slice(s![queries.clone(), ..]), v_t, view_mut(d_p)); // (3)
                if let Some(biases) = &biases {
                    for (p, query) in p.iter_mut().zip(queries.clone()) {
                        let at = past + query;
                        for key in band(biases, &keys, at) {
                            p[key - keys.start] += biases[[query, at - key]];
                        }
                    }
                }
                for (p, at) in p.iter_mut().zip(past + queries.start..keys.end) {
                    p[at + 1 - keys.start..].fill(T::neg_infinity());
                }
                let of_queries = (&lse[queries.clone()], &delta[queries.clone()]);
                on_best_simd!(simd => score_gradients(simd, p, d_p, of_queries)); // (2)
                if let (Some(biases), Some(d_biases)) = (&biases, &mut d_biases) {
                    for (d, query) in d_p.iter().zip(queries.clone()) {
                        let at = past + query;
                        for key in band(biases, &keys, at) {
                            d_biases[[query - first, at - key]] = d[key - keys.start];
                        }
                    }
                }
                let add = queries.start > first_of_keys;
                let own = keys.start - segment.start..keys.end - segment.start;
                let (p, d) = (view(p), view(d_p));
                let (p, d) = (p.slice(s![.., ..keys.len()]), d.slice(s![.., ..keys.len()]));
                let from = queries.start - first_query;
                packed.product((p.t(), Triangle::Full), from, d_v.slice_mut(s![own.clone(), ..]), add); // (3)
                let rows = queries.start - first..queries.end - first;
                add_product(d, k, d_q.slice_mut(s![rows, ..])); // (1)
                let d_k = d_k.slice_mut(s![own, ..]);
                if add { add_product(d.t(), q, d_k) } else { product(d.t(), q, d_k) }
            }
        }
    }
}

/// (2): scores become p, and d_p becomes d_s.
#[inline(always)]
fn score_gradients<S: Simd, T: Scalar>(
    simd: S,
    scores: &mut [Row<T>],
    d: &mut [Row<T>],
    (lse, delta): (&[T], &[T]),
) {
    let lanes = T::Vector::<S>::LEN;
    for ((row, d_row), (&lse, &delta)) in scores.iter_mut().zip(d).zip(lse.iter().zip(delta)) {
        let [lse, delta] = [lse, delta].map(|x| T::Vector::<S>::splat(simd, x));
        let groups = row.chunks_exact_mut(TOGETHER * lanes).zip(d_row.chunks_exact_mut(TOGETHER * lanes));
        for (scores, d) in groups {
            let load = |row: &[T], j: usize| T::Vector::<S>::from_slice(simd, &row[j * lanes..][..lanes]);
            let p = exp::<S, T, TOGETHER>(simd, std::array::from_fn(|j| load(scores, j) - lse));
            for (j, &p) in p.iter().enumerate() {
                let d_score = p * (load(d, j) - delta);
                p.store_slice(&mut scores[j * lanes..][..lanes]);
                d_score.store_slice(&mut d[j * lanes..][..lanes]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_hold_each_key_once_and_share_the_work() {
        for t in (0..300).chain([1023, 1024, 2047, 2048, 5000, 8192, 131_072]) {
            let segments = segments(t);
            assert_eq!(segments.len(), (t / SEGMENT).clamp(1, SEGMENTS));
            let keys: Vec<usize> = segments.iter().cloned().flatten().collect();
            assert_eq!(keys, Vec::from_iter(0..t));
            let pairs = |keys: &Range<usize>| keys.clone().map(|key| t - key).sum::<usize>();
            let (all, most) = (t * (t + 1) / 2, segments.iter().map(pairs).max().unwrap());
            assert!(most * segments.len() <= all + all / 5, "T = {t}: {segments:?}");
        }
    }
}
