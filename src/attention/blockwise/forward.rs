//! The sweep forward: formulas (1) to (4) of the module above.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{Piece, Segment, falling};
use crate::Scalar;
use crate::attention::block::Block;
use crate::attention::documents;
use crate::attention::kernels::scale;
use crate::attention::tile::{Scores, view};
use crate::attention::{AttentionState, CompressiveCache, Inputs, VqAttention};
use crate::ops::matmul::{PackedRows, add_product};
use crate::ops::simd::{LANES, Row, on_best_simd};
use crate::ops::triangle::Triangle;

/// Where outputs go: an output and two numbers per query. What the buffers hold does not matter.
#[derive(Debug)]
pub(in crate::attention) struct RowOutputs<'a, T> {
    pub out: ArrayViewMut2<'a, T>,
    pub lse: &'a mut [T],
    pub cached_mass: &'a mut [T],
}

impl<'a, T> RowOutputs<'a, T> {
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let (out, out_rest) = self.out.split_at(Axis(0), n);
        let (lse, lse_rest) = self.lse.split_at_mut(n);
        let (cached_mass, mass_rest) = self.cached_mass.split_at_mut(n);
        let rest = RowOutputs { out: out_rest, lse: lse_rest, cached_mass: mass_rest };
        (RowOutputs { out, lse, cached_mass }, rest)
    }

    /// What belongs to positions that do not exist: a query that sees nothing.
    pub fn clear(mut self)
    where
        T: Scalar,
    {
        self.out.fill(T::zero());
        self.lse.fill(T::neg_infinity());
        self.cached_mass.fill(T::zero());
    }
}

/// Tokens of a segment at least: enough to repay its buffers and its copy of the cache.
const SEGMENT: usize = 1024;

/// [`forward`](fn@super::forward) on checked shapes, each document in at most `segments` parts at once, which change no bit of the
/// result; returns whether q and v are finite.
pub(in crate::attention) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    rows: RowOutputs<'_, T>,
    segments: usize,
) -> bool {
    let relative_t = falling(inputs);
    let run = |inputs: &Inputs<'_, T>, state: &mut AttentionState<T>, rows: RowOutputs<'_, T>| {
        let segments = segments.min(inputs.q.nrows() / SEGMENT);
        run_in_parts(attention, inputs, relative_t.as_ref(), state, rows, segments)
    };
    match documents::documents(inputs.starts) {
        Some(documents) => documents::forward(&documents, inputs, state, rows, run),
        None => run(inputs, state, rows),
    }
}

/// [`run`] on one document, in parts of any length.
pub(super) fn run_in_parts<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    relative_t: Option<&PackedRows<T>>,
    state: &mut AttentionState<T>,
    rows: RowOutputs<'_, T>,
    segments: usize,
) -> bool {
    let piece = Piece::new(attention, inputs.reborrow(), relative_t, state);
    if piece.codes.is_empty() {
        return true;
    }
    let cache = std::mem::replace(&mut state.cache, CompressiveCache::new(0, 0));
    let segments = piece.segments(segments, cache);
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
    let Segment { blocks, cache, entered } = segment;
    let mut past = Running::new(piece, cache, entered);
    let mut scores = Scores::new(piece);
    let mut values = Values::new(piece, &piece.block(blocks.start), &past.cache);
    let mut finite = true;
    for block in blocks.map(|n| piece.block(n)) {
        let entered = past.enter(piece, &block); // (4)
        values.update_means(piece, entered, &past.cache);
        for tile in block.tiles() {
            let queries = tile.queries().start - first..tile.queries().end - first;
            values.take(piece, tile.queries().end);
            scores.fill_content(piece, &tile); // (1)
            scores.fill_recent(piece, &tile);
            let [max, cached, sum] = scores.softmax(&tile, &past.log_counts);
            for (i, row) in queries.clone().enumerate() {
                rows.lse[row] = max[i] + sum[i].ln(); // (2)
                rows.cached_mass[row] = cached[i] / sum[i];
                finite &= rows.lse[row].is_finite();
            }
            let mut out = rows.out.slice_mut(s![queries, ..]);
            let (old, keys) = tile.parts();
            let (p_old, p_new) = scores.recent(&tile).split_at(old.len());
            values.product(view(p_new).slice(s![.., ..tile.len]), keys, out.view_mut()); // (3)
            let p_old = view(p_old).slice_move(s![.., ..tile.len]);
            add_product(p_old.t(), piece.carried_values(&tile), out.view_mut());
            if piece.reads_cache {
                let p = view(&scores.content).slice_move(s![.., ..tile.len]);
                match &values.mean {
                    Some(mean) => mean.product((p.t(), Triangle::Full), 0, out.view_mut(), true),
                    None => add_product(p.t(), past.cache.mean(), out.view_mut()),
                }
            }
            finite &= normalize(out, &sum);
        }
    }
    (finite, past.cache, past.entered)
}

/// The cache as a sweep forward in time meets it.
pub(super) struct Running<T> {
    pub cache: CompressiveCache<T>,
    /// Keys that it holds of the carried window and the piece.
    pub entered: usize,
    /// ln N_s of the codes that a query reads through it; empty where it is not read.
    pub log_counts: Vec<T>,
}

impl<T: Scalar> Running<T> {
    pub fn new(piece: &Piece<'_, T>, cache: CompressiveCache<T>, entered: usize) -> Self {
        let log_counts = if piece.reads_cache { cache.log_counts() } else { vec![] };
        Running { cache, entered, log_counts }
    }

    /// (4), before `block`; which keys have entered, counted as in [`Piece::enter`].
    pub fn enter(&mut self, piece: &Piece<'_, T>, block: &Block) -> Range<usize> {
        let before = self.entered;
        piece.enter(block, &mut self.entered, &mut self.cache);
        let keys = before..self.entered;
        if piece.reads_cache {
            self.cache.update_log_counts(piece.codes_of(keys.clone()), &mut self.log_counts);
        }
        keys
    }
}

/// Divides each row by its sum; whether all of it is finite. A query or a value that is not makes a row that is not: every
/// query sees its own key.
pub(in crate::attention) fn normalize<T: Scalar>(mut out: ArrayViewMut2<'_, T>, sums: &Row<T>) -> bool {
    let mut nothing = [T::zero(); LANES];
    for (mut row, &sum) in out.rows_mut().into_iter().zip(sums) {
        match row.as_slice_mut() {
            Some(row) => on_best_simd!(scale(row, T::one() / sum, &mut nothing)),
            None => row.iter_mut().for_each(|x| {
                *x *= T::one() / sum;
                nothing[0] += *x * T::zero();
            }),
        }
    }
    nothing.iter().all(|x| x.is_zero())
}

/// Bytes of a row beyond which products do better with a packed copy.
const LONG: usize = 256;

/// Values in the order in which products read them.
struct Values<T> {
    /// Those of the piece's recent keys, the key at position j in row j mod (M + L).
    recent: PackedRows<T>,
    /// First position that is not in it yet.
    next: usize,
    /// Of the cache, where its rows are so long that a copy pays.
    mean: Option<PackedRows<T>>,
}

impl<T: Scalar> Values<T> {
    /// As they are before `block`, the first of a segment, which sees this cache.
    fn new(piece: &Piece<'_, T>, block: &Block, cache: &CompressiveCache<T>) -> Self {
        let (t, d_v) = piece.inputs.v.dim();
        let VqAttention { block_len, window, .. } = *piece.attention;
        let long = d_v * size_of::<T>() > LONG;
        let mean = (piece.reads_cache && long).then(|| PackedRows::from_rows(cache.mean()));
        let recent = PackedRows::zeros(t.min(block_len) + t.min(window), d_v);
        Values { recent, next: block.first_key, mean }
    }

    /// Takes in the means of the codes whose keys, counted as in [`Piece::enter`], have just entered the cache.
    fn update_means(&mut self, piece: &Piece<'_, T>, entered: Range<usize>, cache: &CompressiveCache<T>) {
        if let Some(mean) = &mut self.mean {
            for code in piece.codes_of(entered) {
                mean.set(code as usize, cache.mean().row(code as usize));
            }
        }
    }

    /// Takes in the values of keys before position `end`.
    fn take(&mut self, piece: &Piece<'_, T>, end: usize) {
        while self.next < end {
            let row = self.next % self.recent.rows();
            let n = (end - self.next).min(self.recent.rows() - row);
            self.recent.set_rows(row, piece.inputs.v.slice(s![self.next..self.next + n, ..]));
            self.next += n;
        }
    }

    /// out <- p v of the keys at these positions, the last of which are those of the queries.
    ///
    /// # Shapes
    /// `p` [keys, queries], `out` [queries, V].
    fn product(&self, p: ArrayView2<'_, T>, keys: Range<usize>, mut out: ArrayViewMut2<'_, T>) {
        let rows = self.recent.rows();
        let own = keys.end - p.ncols();
        // The second part begins where the ring has ended.
        let turn = ((keys.start / rows + 1) * rows).min(keys.end);
        for part in [keys.start..turn, turn..keys.end].into_iter().filter(|part| !part.is_empty()) {
            let p = p.slice(s![part.start - keys.start..part.end - keys.start, ..]).reversed_axes();
            let seen = Triangle::Lower(own as isize - part.start as isize);
            self.recent.product((p, seen), part.start % rows, out.view_mut(), part.start > keys.start);
        }
    }
}
