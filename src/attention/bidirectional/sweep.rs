//! Formulas (1) to (3) of the module above and what undoes them, 64 queries at a time.
//!
//! Scores lie with codes in rows and queries side by side, as in `tile`. Forward shares the queries of a head among threads;
//! backward does so in segments, each of which sums up gradients of its own, cut by sizes alone.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::Visible;
use crate::Scalar;
use crate::attention::blockwise::normalize;
use crate::attention::kernels::{exponentiate, score_gradients, softmax};
use crate::attention::tile::{view, view_mut};
use crate::ops::finite::all_finite;
use crate::ops::matmul::{PackedRows, add_product, product};
use crate::ops::simd::{LANES, Row, Rows, on_best_simd};
use crate::ops::transpose::{MOST_LANES, transpose};
use crate::ops::triangle::Triangle;

/// Queries of one task of forward: enough to repay its buffers.
const QUERIES_PER_TASK: usize = 4 * LANES;

/// Segments of all heads of a backward at least, where there are queries enough, and queries of a segment at least.
const SEGMENTS: usize = 8;
const SEGMENT: usize = 512;

/// Into how many segments the `t` queries of each of so many heads are cut.
pub(super) fn segments(heads: usize, t: usize) -> usize {
    SEGMENTS.div_ceil(heads.max(1)).min(t / SEGMENT).max(1)
}

/// Outputs and lse; what the buffers hold does not matter. Returns whether queries and values are finite.
///
/// # Shapes
/// `q` [T, K], `out` [T, V], `lse` `[T]`.
pub(super) fn forward<T: Scalar>(
    visible: &Visible<T>,
    q: ArrayView2<'_, T>,
    mut out: ArrayViewMut2<'_, T>,
    lse: &mut [T],
) -> bool {
    if visible.is_empty() {
        out.fill(T::zero());
        lse.fill(T::neg_infinity());
        return all_finite(q);
    }
    let mean = visible.packed_mean();
    let queries = q.axis_chunks_iter(Axis(0), QUERIES_PER_TASK).into_par_iter();
    let rows = out.axis_chunks_iter_mut(Axis(0), QUERIES_PER_TASK).into_par_iter();
    queries
        .zip(rows)
        .zip(lse.par_chunks_mut(QUERIES_PER_TASK))
        .map(|((q, out), lse)| forward_task(visible, &mean, q, out, lse))
        .reduce(|| true, |a, b| a & b)
}

fn forward_task<T: Scalar>(
    visible: &Visible<T>,
    mean: &PackedRows<T>,
    q: ArrayView2<'_, T>,
    mut out: ArrayViewMut2<'_, T>,
    lse: &mut [T],
) -> bool {
    let mut q_t = Rows::zeros(q.ncols());
    let mut scores = Rows::zeros(visible.log_counts.len());
    let mut finite = true;
    let tiles = q.axis_chunks_iter(Axis(0), LANES).zip(out.axis_chunks_iter_mut(Axis(0), LANES));
    for ((q, mut out), lse) in tiles.zip(lse.chunks_mut(LANES)) {
        transpose(q, &mut q_t);
        fill(visible.codewords.view(), &q_t, &mut scores, q.nrows()); // (1)
        let [max, _, sum] = on_best_simd!(simd => softmax(simd, &mut scores, &visible.log_counts, &mut [])); // (2)
        for ((lse, max), sum) in lse.iter_mut().zip(max).zip(sum) {
            *lse = max + sum.ln();
            finite &= lse.is_finite();
        }
        let p = view(&scores).slice_move(s![.., ..q.nrows()]);
        mean.product((p.t(), Triangle::Full), 0, out.view_mut(), false); // (3)
        finite &= normalize(out, &sum);
    }
    finite
}

/// Rows of C <- A B, as far as lanes hold one of `len` queries.
fn fill<T: Scalar>(a: ArrayView2<'_, T>, b: &[Row<T>], c: &mut [Row<T>], len: usize) {
    let lanes = len.next_multiple_of(MOST_LANES);
    product(a, view(b).slice_move(s![.., ..lanes]), view_mut(c).slice_move(s![.., ..lanes]));
}

/// What the queries of a head add to the gradients of codes that occur.
pub(super) struct Sums<T> {
    /// dc [U, K].
    pub codewords: Array2<T>,
    /// G [U, V].
    pub values: Array2<T>,
    /// Whether queries and `d_out` are finite.
    pub finite: bool,
}

impl<T: Scalar> Sums<T> {
    /// Those of no queries.
    pub fn zeros(visible: &Visible<T>) -> Self {
        let (codewords, values) = (visible.codewords.raw_dim(), visible.mean().raw_dim());
        Sums { codewords: Array2::zeros(codewords), values: Array2::zeros(values), finite: true }
    }

    /// Adds those of other queries.
    pub fn add(&mut self, other: &Self) {
        self.codewords += &other.codewords;
        self.values += &other.values;
        self.finite &= other.finite;
    }
}

/// Gradients of the queries of a head, written to `d_q`, and of codes, in so many segments, which set the order of sums.
///
/// # Shapes
/// `q` and `d_q` [T, K], `lse` `[T]`, `d_out` [T, V].
pub(super) fn backward<T: Scalar>(
    visible: &Visible<T>,
    q: ArrayView2<'_, T>,
    lse: &[T],
    d_out: ArrayView2<'_, T>,
    mut d_q: ArrayViewMut2<'_, T>,
    segments: usize,
) -> Sums<T> {
    let mut sums = Sums::zeros(visible);
    if visible.is_empty() {
        d_q.fill(T::zero());
        sums.finite = all_finite(q) & all_finite(d_out);
        return sums;
    }
    // Whole tiles, at least one query.
    let len = q.nrows().div_ceil(segments).next_multiple_of(LANES).max(1);
    let shares = visible.shares();
    let queries = q.axis_chunks_iter(Axis(0), len).into_par_iter().zip(lse.par_chunks(len));
    let gradients = d_out.axis_chunks_iter(Axis(0), len).into_par_iter();
    let done: Vec<Sums<T>> = queries
        .zip(gradients.zip(d_q.axis_chunks_iter_mut(Axis(0), len)))
        .map(|((q, lse), (d_out, d_q))| backward_segment(visible, &shares, (q, lse), d_out, d_q))
        .collect();
    done.iter().for_each(|segment| sums.add(segment));
    sums
}

fn backward_segment<T: Scalar>(
    visible: &Visible<T>,
    shares: &[T],
    (q, lse): (ArrayView2<'_, T>, &[T]),
    d_out: ArrayView2<'_, T>,
    mut d_q: ArrayViewMut2<'_, T>,
) -> Sums<T> {
    let n_codes = visible.log_counts.len();
    let (mut q_t, mut d_out_t) = (Rows::zeros(q.ncols()), Rows::zeros(d_out.ncols()));
    let (mut p, mut d) = (Rows::zeros(n_codes), Rows::zeros(n_codes));
    let mut sums = Sums::zeros(visible);
    let tiles = q.axis_chunks_iter(Axis(0), LANES).zip(d_out.axis_chunks_iter(Axis(0), LANES));
    let rows = d_q.axis_chunks_iter_mut(Axis(0), LANES).zip(lse.chunks(LANES));
    for ((q, d_out), (mut d_q, lse)) in tiles.zip(rows) {
        let len = q.nrows();
        let mut shift = [T::zero(); LANES];
        shift[..len].copy_from_slice(lse);
        transpose(q, &mut q_t);
        transpose(d_out, &mut d_out_t);
        fill(visible.codewords.view(), &q_t, &mut p, len);
        on_best_simd!(simd => exponentiate(simd, &mut p, &visible.log_counts, &shift));
        fill(visible.mean(), &d_out_t, &mut d, len); // (3)
        on_best_simd!(score_gradients((&mut p, &mut d), (&[], &mut []), shares)); // (2)
        let [p, d] = [&p, &d].map(|rows| view(rows).slice_move(s![.., ..len]));
        add_product(p, d_out, sums.values.view_mut()); // (3)
        product(d.t(), visible.codewords.view(), d_q.view_mut()); // (1)
        add_product(d, q, sums.codewords.view_mut());
        sums.finite &= all_finite(q) & all_finite(d_q.view());
    }
    sums
}
