//! Formulas (3) to (1) of the module above, segment by segment, and (4) where values are narrow.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::cached::cached_values;
use super::forward::Running;
use super::replay::{KeyRows, Replay};
use super::{Piece, Saved, Segment, falling};
use crate::Scalar;
use crate::attention::block::Tile;
use crate::attention::documents;
use crate::attention::kernels::add_to;
use crate::attention::tile::{ScoreGradients, Scores, view, view_mut};
use crate::attention::{BiasGradients, CompressiveCache, Inputs, VqAttention};
use crate::ops::aligned;
use crate::ops::finite::all_finite;
use crate::ops::matmul::{PackedRows, add_product, prefetch, product};
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
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let (q, q_rest) = self.q.split_at(Axis(0), n);
        let (k_hat, k_hat_rest) = self.k_hat.split_at(Axis(0), n);
        let (v, v_rest) = self.v.split_at(Axis(0), n);
        (RowGradients { q, k_hat, v }, RowGradients { q: q_rest, k_hat: k_hat_rest, v: v_rest })
    }
}

/// The gradients of the codewords (without rows where none is read through the cache) and of the biases, and whether q, v and
/// `d_out` are finite.
pub(in crate::attention) type HeadGradients<T> = (Array2<T>, Option<BiasGradients<T>>, bool);

/// Adds the gradients of other tokens.
pub(in crate::attention) fn add_gradients<T: Scalar>(sums: &mut HeadGradients<T>, more: HeadGradients<T>) {
    if sums.0.is_empty() {
        sums.0 = more.0;
    } else if !more.0.is_empty() {
        sums.0 += &more.0;
    }
    if let (Some(sums), Some(d)) = (&mut sums.1, &more.1) {
        sums.add(d);
    }
    sums.2 &= more.2;
}

/// Tokens of a segment at least.
const SEGMENT: usize = 512;

/// [`backward`](fn@super::backward) on checked shapes, each document in at most so many segments, which set the order of sums
/// (threads do not).
pub(in crate::attention) fn run_backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    rows: RowGradients<'_, T>,
    segments: usize,
    threads: usize,
) -> HeadGradients<T> {
    let relative_t = falling(inputs);
    let run =
        |inputs: &Inputs<'_, T>, saved: Saved<T>, d_out: ArrayView2<'_, T>, rows: RowGradients<'_, T>| {
            let segments = segments.min(inputs.q.nrows() / SEGMENT);
            run_in_parts(attention, inputs, relative_t.as_ref(), saved, d_out, rows, (segments, threads))
        };
    let (mut codewords, biases, finite) = match documents::documents(inputs.starts) {
        Some(documents) => documents::backward(&documents, inputs, saved, d_out, rows, run),
        None => run(inputs, saved, d_out, rows),
    };
    if codewords.is_empty() {
        codewords = Array2::zeros(inputs.codewords.raw_dim());
    }
    (codewords, biases, finite)
}

/// [`run_backward`] on one document, in segments of any length.
pub(super) fn run_in_parts<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    relative_t: Option<&PackedRows<T>>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    mut rows: RowGradients<'_, T>,
    (segments, threads): (usize, usize),
) -> HeadGradients<T> {
    let piece = Piece::new(attention, inputs.reborrow(), relative_t, &saved.start);
    let counts = saved.start.cache.count().to_owned();
    let segments = piece.segments(segments, saved.start.cache);
    let starts: Vec<_> =
        segments.iter().map(|segment| (segment.queries(&piece).start, segment.entered)).collect();
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
    let mut sums = SegmentGradients::zeros(&piece);
    for (segment, &(start, _)) in done.iter().zip(&starts) {
        let before = start - segment.k_hat_before.nrows()..start;
        let mut k_hat = rows.k_hat.slice_mut(s![before.clone(), ..]);
        k_hat += &segment.k_hat_before;
        let mut v = rows.v.slice_mut(s![before, ..]);
        v += &segment.v_before;
        sums.codewords += &segment.codewords;
        if let (Some(sums), Some(d)) = (&mut sums.biases, &segment.biases) {
            sums.add(d);
        }
        sums.finite &= segment.finite;
    }
    if piece.sends_through_cache() && !piece.narrow() && piece.n_blocks() > 0 {
        cached_values(&piece, lse, counts, d_out, rows.v.view_mut(), threads); // (4)
    }
    // (4): keys that had entered before a segment were seen by all its queries.
    let mut later = sums.cached_values;
    let held = piece.window.codes.len();
    let through_cache = done.iter().enumerate().skip(1).filter(|_| piece.sums_g());
    for (n, segment) in through_cache.rev() {
        later += &segment.cached_values;
        let keys = starts[n - 1].1.max(held) - held..starts[n].1.max(held) - held;
        add_by_code(&later, &piece.codes[keys.clone()], rows.v.slice_mut(s![keys, ..]));
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
    /// G of (4) at its first block; no rows where it is not wanted.
    cached_values: Array2<T>,
    finite: bool,
}

impl<T: Scalar> SegmentGradients<T> {
    fn zeros(piece: &Piece<'_, T>) -> Self {
        let inputs = &piece.inputs;
        let ((n_codes, k), v) = (inputs.codewords.dim(), inputs.v.ncols());
        SegmentGradients {
            k_hat_before: Array2::zeros((0, k)),
            v_before: Array2::zeros((0, v)),
            codewords: aligned::array((if piece.reads_cache { n_codes } else { 0 }, k)),
            biases: inputs.biases.as_ref().map(|biases| BiasGradients {
                content: Array1::zeros(k),
                position: Array1::zeros(k),
                relative: aligned::array(biases.relative.raw_dim()),
            }),
            cached_values: aligned::array((if piece.sums_g() { n_codes } else { 0 }, v)),
            finite: true,
        }
    }
}

/// The cache as a sweep meets it.
enum Past<T> {
    Forward(Running<T>),
    Backward(Replay<T>),
}

impl<T: Scalar> Past<T> {
    /// The cache, ln N_s of the codes that are read through it, and 1 / N_s if they are wanted.
    fn parts(&self) -> (&CompressiveCache<T>, &[T], &[T]) {
        match self {
            Past::Forward(past) => (&past.cache, &past.log_counts, &[]),
            Past::Backward(past) => (&past.cache, &past.log_counts, &past.shares),
        }
    }
}

/// The sweep over the blocks of one segment.
fn run_segment<T: Scalar>(
    piece: &Piece<'_, T>,
    segment: Segment<T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
    rows: RowGradients<'_, T>,
) -> SegmentGradients<T> {
    let (attention, inputs) = (piece.attention, &piece.inputs);
    let first = segment.queries(piece).start;
    let blocks = segment.blocks.clone();
    let backward = piece.sums_g();
    let mut past = if backward {
        Past::Backward(Replay::new(piece, segment))
    } else {
        Past::Forward(Running::new(piece, segment.cache, segment.entered))
    };
    let reach = if attention.gradient_through_cache { attention.window.min(first) } else { 0 };
    let mut sums = SegmentGradients::zeros(piece);
    let mut d_q = rows.q;
    let (d_k_hat, d_v) = (rows.k_hat, rows.v);
    let key_rows = |rows| KeyRows::new(rows, first, reach, backward);
    let (mut d_k_hat, mut d_v) = (key_rows(d_k_hat), key_rows(d_v));
    let mut scores = Scores::new(piece);
    let mut d_scores = ScoreGradients::new(&scores);
    let mut d_out_t = Rows::zeros(d_out.ncols());
    let mut d_q_position = aligned::array((LANES, inputs.q.ncols()));
    for n in 0..blocks.len() {
        let n = if backward { blocks.end - 1 - n } else { blocks.start + n };
        let block = piece.block(n);
        if let Past::Forward(past) = &mut past {
            past.enter(piece, &block);
        }
        let (cache, log_counts, shares) = past.parts();
        let mut tiles: Vec<_> = block.tiles().collect();
        if backward {
            tiles.reverse();
        }
        // The first key that receives gradient.
        let reached = if attention.gradient_through_cache { block.first_key } else { block.start };
        for tile in tiles {
            prefetch_next(piece, &tile, d_out, backward);
            let d_out = d_out.slice(s![tile.queries(), ..]);
            transpose(d_out, &mut d_out_t);
            scores.fill_content(piece, &tile);
            scores.fill_recent(piece, &tile);
            let shift = lanes(lse, &tile);
            scores.exponentiate_cached(log_counts, &shift);
            scores.exponentiate_recent(&tile, &shift);

            // (3)
            let (old, keys) = tile.parts();
            if piece.reads_cache {
                product(cache.mean(), view(&d_out_t), view_mut(&mut d_scores.content));
            }
            let (d_old, d_new) = d_scores.recent_mut(&tile).split_at_mut(old.len());
            product(piece.carried_values(&tile), view(&d_out_t), view_mut(d_old));
            values_product(inputs.v.slice(s![keys.clone(), ..]), &d_out_t, d_new, tile.len);
            let seen = reached.clamp(keys.start, keys.end)..keys.end;
            let p = view(&scores.recent(&tile)[old.len() + seen.start - keys.start..]);
            d_v.add_product(p.slice_move(s![.., ..tile.len]), d_out, seen.clone());

            d_scores.softmax_backward(&mut scores, &tile, log_counts.len(), shares); // (2)

            // (4)
            if backward {
                let p = view(&scores.content).slice_move(s![.., ..tile.len]);
                add_product(p, d_out, sums.cached_values.view_mut());
            }

            // (1)
            let q_content = scores.q_content(&tile);
            let d_recent = view(&d_scores.recent(&tile)[old.len() + seen.start - keys.start..]);
            d_k_hat.add_product(d_recent.slice_move(s![.., ..tile.len]), q_content, seen);
            if piece.reads_cache {
                let d_content = view(&d_scores.content).slice_move(s![.., ..tile.len]);
                add_product(d_content, q_content, sums.codewords.view_mut());
            } else {
                d_scores.content.fill([T::zero(); LANES]);
            }
            d_scores.scatter(piece, &tile);
            let mut d_q = d_q.slice_mut(s![tile.queries().start - first..tile.queries().end - first, ..]);
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
        if let Past::Backward(past) = &mut past
            && n > blocks.start
        {
            let g = sums.cached_values.view();
            past.leave(piece, &piece.block(n - 1), |key, code| d_v.add(key, g.row(code as usize)));
        }
    }
    SegmentGradients { k_hat_before: d_k_hat.before, v_before: d_v.before, ..sums }
}

/// Asks for the output gradients and the values that the tile before or after this one is the first to read.
fn prefetch_next<T: Scalar>(piece: &Piece<'_, T>, tile: &Tile, d_out: ArrayView2<'_, T>, backward: bool) {
    let (queries, keys) = if backward {
        let before = |position: usize| position.saturating_sub(LANES)..position;
        (before(tile.queries().start), before(tile.parts().1.start))
    } else {
        let end = tile.queries().end;
        let after = end..d_out.nrows().min(end + LANES);
        (after.clone(), after)
    };
    prefetch(d_out.slice(s![queries, ..]));
    prefetch(piece.inputs.v.slice(s![keys, ..]));
}

/// d_p <- v d_o^T, of the keys' values and the queries' gradients. The last keys are the queries' own, which earlier queries do
/// not see: of these pairs a square is 0 instead.
fn values_product<T: Scalar>(v: ArrayView2<'_, T>, d_out_t: &[Row<T>], d_p: &mut [Row<T>], queries: usize) {
    const HALF: usize = LANES / 2;
    let late = if queries == LANES { v.nrows() - HALF } else { v.nrows() };
    let (v, v_late) = v.split_at(Axis(0), late);
    let (d_p, d_p_late) = d_p.split_at_mut(late);
    product(v, view(d_out_t), view_mut(d_p));
    d_p_late.iter_mut().for_each(|row| row[..HALF].fill(T::zero()));
    product(v_late, view(d_out_t).slice_move(s![.., HALF..]), view_mut(d_p_late).slice_move(s![.., HALF..]));
}

/// The tile's part of one number per query.
pub(super) fn lanes<T: Scalar>(all: ArrayView1<'_, T>, tile: &Tile) -> Row<T> {
    let mut row = [T::zero(); LANES];
    for (lane, &x) in row.iter_mut().zip(all.slice(s![tile.queries()])) {
        *lane = x;
    }
    row
}

/// Adds to each row the row of its code.
fn add_by_code<T: Scalar>(of_codes: &Array2<T>, codes: &[u32], mut rows: ArrayViewMut2<'_, T>) {
    const ROWS: usize = 128;
    rows.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().zip(codes.par_chunks(ROWS)).for_each(
        |(mut rows, codes)| {
            for (mut row, &code) in rows.rows_mut().into_iter().zip(codes) {
                match (row.as_slice_mut(), of_codes.row(code as usize).to_slice()) {
                    (Some(row), Some(g)) => on_best_simd!(add_to(g, row)),
                    _ => row += &of_codes.row(code as usize),
                }
            }
        },
    );
}
