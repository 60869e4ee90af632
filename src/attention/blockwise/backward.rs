//! The two sweeps of backward: formulas (3) to (1) forward in time, then (4) backward in time.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{Piece, Running, Saved, Segment};
use crate::Scalar;
use crate::attention::block::Tile;
use crate::attention::kernels::add_to;
use crate::attention::tile::{ScoreGradients, Scores, view, view_mut};
use crate::attention::{BiasGradients, Inputs, VqAttention};
use crate::ops::matmul::{Triangle, add_product, prefetch, product, triangle_product};
use crate::ops::rows::all_finite;
use crate::ops::simd::{LANES, Row, Rows, on_best_simd};
use crate::ops::transpose::transpose;

/// Where the gradients of rows go; what the buffers hold does not matter.
#[derive(Debug)]
pub(in crate::attention) struct RowGradients<'a, T> {
    pub q: ArrayViewMut2<'a, T>,
    pub k_hat: ArrayViewMut2<'a, T>,
    pub v: ArrayViewMut2<'a, T>,
}

impl<'a, T> RowGradients<'a, T> {
    fn split_at(self, n: usize) -> (Self, Self) {
        let (q, q_rest) = self.q.split_at(Axis(0), n);
        let (k_hat, k_hat_rest) = self.k_hat.split_at(Axis(0), n);
        let (v, v_rest) = self.v.split_at(Axis(0), n);
        (RowGradients { q, k_hat, v }, RowGradients { q: q_rest, k_hat: k_hat_rest, v: v_rest })
    }
}

/// Into how many parts backward of one piece falls.
#[derive(Debug, Clone, Copy)]
pub(in crate::attention) struct Tasks {
    /// They set the order of sums, so their number must not depend on threads.
    pub segments: usize,
    /// Sets the order of nothing.
    pub threads: usize,
}

/// [`backward`](super::backward) on checked shapes; returns the gradients of the codewords and of the biases, and whether q,
/// v and `d_out` are finite.
pub(in crate::attention) fn run_backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    mut rows: RowGradients<'_, T>,
    Tasks { segments, threads }: Tasks,
) -> (Array2<T>, Option<BiasGradients<T>>, bool) {
    let piece = Piece::new(attention, inputs.reborrow(), saved.start.window_keys());
    let mut cache = saved.start.cache;
    let counts = cache.count().to_owned();
    let segments = piece.segments(segments, &mut cache);
    let starts: Vec<usize> = segments.iter().map(|segment| segment.queries(&piece).start).collect();
    let mut tasks = vec![];
    let mut rest = RowGradients { q: rows.q.view_mut(), k_hat: rows.k_hat.view_mut(), v: rows.v.view_mut() };
    for segment in segments {
        let (rows, later) = rest.split_at(segment.queries(&piece).len());
        tasks.push((segment, rows));
        rest = later;
    }
    let lse = saved.lse.view();
    let run = |(segment, rows)| run_segment(&piece, segment, lse, d_out, rows);
    let done: Vec<SegmentGradients<T>> = tasks.into_par_iter().map(run).collect();
    let mut sums = SegmentGradients::zeros(&piece, 0);
    for (segment, start) in done.into_iter().zip(starts) {
        let before = start - segment.k_hat_before.nrows()..start;
        let mut k_hat = rows.k_hat.slice_mut(s![before.clone(), ..]);
        k_hat += &segment.k_hat_before;
        let mut v = rows.v.slice_mut(s![before, ..]);
        v += &segment.v_before;
        sums.codewords += &segment.codewords;
        if let (Some(sums), Some(d)) = (&mut sums.biases, &segment.biases) {
            sums.content += &d.content;
            sums.position += &d.position;
            sums.relative += &d.relative;
        }
        sums.finite &= segment.finite;
    }
    if attention.cache && attention.gradient_through_cache && piece.n_blocks() > 0 {
        cached_values(&piece, lse, counts, d_out, rows.v, threads);
    }
    (sums.codewords, sums.biases, sums.finite)
}

/// What a segment adds to gradients that are not those of its own rows.
struct SegmentGradients<T> {
    /// Of the keys in the window of its first blocks.
    k_hat_before: Array2<T>,
    /// Of their values.
    v_before: Array2<T>,
    codewords: Array2<T>,
    biases: Option<BiasGradients<T>>,
    finite: bool,
}

impl<T: Scalar> SegmentGradients<T> {
    /// For a segment that has `before` keys of the piece in the window of its first block.
    fn zeros(piece: &Piece<'_, T>, before: usize) -> Self {
        let inputs = &piece.inputs;
        let k = inputs.q.ncols();
        SegmentGradients {
            k_hat_before: Array2::zeros((before, k)),
            v_before: Array2::zeros((before, inputs.v.ncols())),
            codewords: Array2::zeros(inputs.codewords.raw_dim()),
            biases: inputs.biases.as_ref().map(|biases| BiasGradients {
                content: Array1::zeros(k),
                position: Array1::zeros(k),
                relative: Array2::zeros(biases.relative.raw_dim()),
            }),
            finite: true,
        }
    }
}

/// The sweep forward over the blocks of one segment.
fn run_segment<T: Scalar>(
    piece: &Piece<'_, T>,
    segment: Segment<T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
    mut rows: RowGradients<'_, T>,
) -> SegmentGradients<T> {
    let (attention, inputs) = (piece.attention, &piece.inputs);
    let first = segment.queries(piece).start;
    let Segment { blocks, cache, entered } = segment;
    let mut past = Running::new(piece, cache, entered);
    let reaches = if attention.gradient_through_cache { attention.window.min(first) } else { 0 };
    let mut sums = SegmentGradients::zeros(piece, reaches);
    let mut scores = Scores::new(piece);
    let mut d_scores = ScoreGradients::new(&scores);
    let mut d_out_t = Rows::zeros(d_out.ncols());
    let mut d_q_position = Array2::zeros((LANES, inputs.q.ncols()));
    for block in blocks.map(|n| piece.block(n)) {
        past.enter(piece, &block);
        // The first key that receives gradient.
        let reached = if attention.gradient_through_cache { block.first_key } else { block.start };
        for tile in block.tiles() {
            piece.prefetch(&tile);
            let next = tile.queries().end..d_out.nrows().min(tile.queries().end + LANES);
            prefetch(d_out.slice(s![next, ..]));
            let d_out = d_out.slice(s![tile.queries(), ..]);
            transpose(d_out, &mut d_out_t);
            scores.fill_content(piece, &tile);
            scores.fill_recent(piece, &tile);
            let shift = lanes(lse, &tile);
            scores.exponentiate_cached(&past.log_counts, &shift);
            scores.exponentiate_recent(&tile, &shift);

            // (3)
            let (old, keys) = tile.parts();
            if attention.cache {
                product(past.cache.mean(), view(&d_out_t), view_mut(&mut d_scores.content));
            }
            let (d_old, d_new) = d_scores.recent_mut(&tile).split_at_mut(old.len());
            product(piece.carried_values(&tile), view(&d_out_t), view_mut(d_old));
            values_product(inputs.v.slice(s![keys.clone(), ..]), &d_out_t, d_new, tile.len);
            let seen = reached.clamp(keys.start, keys.end)..keys.end;
            let p = view(&scores.recent(&tile)[old.len() + seen.start - keys.start..]);
            let p = p.slice_move(s![.., ..tile.len]);
            add_to_keys(p, d_out, seen.clone(), first, &mut sums.v_before, &mut rows.v);

            d_scores.softmax_backward(&scores, &tile, past.log_counts.len()); // (2)

            // (1)
            let q_content = scores.q_content(&tile);
            let d_recent = view(&d_scores.recent(&tile)[old.len() + seen.start - keys.start..]);
            let d_recent = d_recent.slice_move(s![.., ..tile.len]);
            add_to_keys(d_recent, q_content, seen, first, &mut sums.k_hat_before, &mut rows.k_hat);
            if attention.cache {
                let d_content = view(&d_scores.content).slice_move(s![.., ..tile.len]);
                add_product(d_content, q_content, sums.codewords.view_mut());
            } else {
                d_scores.content.fill([T::zero(); LANES]);
            }
            d_scores.scatter(piece, &tile);
            let mut d_q = rows.q.slice_mut(s![tile.queries().start - first..tile.queries().end - first, ..]);
            let d_content = view(&d_scores.content).slice_move(s![.., ..tile.len]);
            product(d_content.t(), inputs.codewords, d_q.view_mut());
            let d_old = view(&d_scores.recent(&tile)[..old.len()]).slice_move(s![.., ..tile.len]);
            add_product(d_old.t(), piece.carried_keys(&tile), d_q.view_mut());
            sums.finite &= scores.finite(&tile) && all_finite(d_q.view());
            if let (Some(biases), Some(d_biases)) = (&inputs.biases, &mut sums.biases) {
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
    sums
}

/// Adds A B to the rows of keys `keys`: those from `first` on to `own`, those before it to the last rows of `before`. The last
/// keys are the queries' own, whose rows begin here: they are written.
fn add_to_keys<T: Scalar>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    keys: Range<usize>,
    first: usize,
    before: &mut Array2<T>,
    own: &mut ArrayViewMut2<'_, T>,
) {
    // Keys before the segment, keys before the queries, and the queries' own.
    let (cut, diagonal) = (first.clamp(keys.start, keys.end), keys.end - b.nrows());
    let part = |from: usize, to: usize| a.slice_move(s![from - keys.start..to - keys.start, ..]);
    if keys.start < cut {
        let row = |key: usize| before.nrows() + key - first;
        let rows = row(keys.start)..row(cut);
        add_product(part(keys.start, cut), b, before.slice_mut(s![rows, ..]));
    }
    if cut < diagonal {
        add_product(part(cut, diagonal), b, own.slice_mut(s![cut - first..diagonal - first, ..]));
    }
    let a = (part(diagonal, keys.end), Triangle::Upper);
    // The first tile that sees a key is its own.
    triangle_product(a, b, own.slice_mut(s![diagonal - first..keys.end - first, ..]), false);
}

/// d_p <- v d_o^T, of the keys' values and the queries' gradients. The last keys are the queries' own, which earlier queries do
/// not see: what is left of some of these pairs is whatever was there.
fn values_product<T: Scalar>(v: ArrayView2<'_, T>, d_out_t: &[Row<T>], d_p: &mut [Row<T>], queries: usize) {
    const HALF: usize = LANES / 2;
    let late = if queries == LANES { v.nrows() - HALF } else { v.nrows() };
    let (v, v_late) = v.split_at(Axis(0), late);
    let (d_p, d_p_late) = d_p.split_at_mut(late);
    product(v, view(d_out_t), view_mut(d_p));
    product(v_late, view(d_out_t).slice_move(s![.., HALF..]), view_mut(d_p_late).slice_move(s![.., HALF..]));
}

/// The tile's part of one number per query.
fn lanes<T: Scalar>(all: ArrayView1<'_, T>, tile: &Tile) -> Row<T> {
    let mut row = [T::zero(); LANES];
    for (lane, &x) in row.iter_mut().zip(all.slice(s![tile.queries()])) {
        *lane = x;
    }
    row
}

/// (4): what later queries send to values that they read through the cache. `counts` are those of before the piece.
///
/// Codes are shared among `groups` tasks: each has their rows of G and the keys that bear them, so no sum is cut.
fn cached_values<T: Scalar>(
    piece: &Piece<'_, T>,
    lse: ArrayView1<'_, T>,
    mut counts: Array1<u64>,
    d_out: ArrayView2<'_, T>,
    mut d_v: ArrayViewMut2<'_, T>,
    groups: usize,
) {
    // Counts as the last block sees them.
    let last = piece.block(piece.n_blocks() - 1);
    let entered = piece.window.codes.len() - last.carried + last.first_key;
    for &code in piece.window.codes.iter().chain(&piece.codes).take(entered) {
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
            prefetch(piece.inputs.q.slice(s![earlier.clone(), ..]));
            prefetch(d_out.slice(s![earlier, ..]));
            scores.fill_content(piece, &tile);
            scores.exponentiate_cached(&gates, &lanes(lse, &tile));
            let p = view(&scores.content).slice_move(s![.., ..tile.len]);
            add_product(p, d_out.slice(s![tile.queries(), ..]), g.view_mut());
        }
        let entered = block.first_key.saturating_sub(piece.attention.block_len);
        while let Some((j, mut d_v)) = keys.pop_if(|(j, _)| *j >= entered) {
            if let Some((_, next)) = keys.len().checked_sub(AHEAD).map(|n| &keys[n]) {
                prefetch(next.view().insert_axis(Axis(0)));
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
