//! What a sweep backward in time meets: the cache, token by token as it was, and the gradients of keys and values.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, s};

use super::{Piece, Segment};
use crate::Scalar;
use crate::attention::CompressiveCache;
use crate::attention::block::Block;
use crate::attention::kernels::add_to;
use crate::ops::matmul::{prefetch_row, triangle_product};
use crate::ops::simd::on_best_simd;
use crate::ops::triangle::Triangle;

/// The cache of a segment's blocks, the last first: all its keys enter, and what each replaced is kept until it leaves again.
///
/// Memory: a mean value `[V]` per key of the segment.
pub(super) struct Replay<T> {
    /// As the current block sees it.
    pub cache: CompressiveCache<T>,
    /// ln N_s `[S]`.
    pub log_counts: Vec<T>,
    /// 1 / N_s `[S]`, 0 without keys.
    pub shares: Vec<T>,
    /// The means that keys replaced, in the order in which they entered.
    replaced: Vec<T>,
    /// Keys of the carried window and the piece that are in the cache.
    entered: usize,
}

impl<T: Scalar> Replay<T> {
    /// At the last block of a segment.
    pub fn new(piece: &Piece<'_, T>, segment: Segment<T>) -> Self {
        let Segment { blocks, mut cache, mut entered } = segment;
        let all = piece.entered_before(&piece.block(blocks.end - 1));
        let mut replaced = Vec::with_capacity((all - entered) * piece.inputs.v.ncols());
        piece.enter_until(all, &mut entered, &mut cache, Some(&mut replaced));
        let mut replay = Replay { log_counts: cache.log_counts(), shares: vec![], cache, replaced, entered };
        replay.shares = replay.cache.count().iter().map(|&n| share(n)).collect();
        replay
    }

    /// Undoes (4): takes out the keys that `block` does not see in the cache, the last first. `f` is told the position and the
    /// code of each that is the piece's own.
    pub fn leave(&mut self, piece: &Piece<'_, T>, block: &Block, mut f: impl FnMut(usize, u32)) {
        let (held, width) = (piece.window.codes.len(), piece.inputs.v.ncols());
        let before = piece.entered_before(block).min(self.entered);
        for n in (before..self.entered).rev() {
            let code = if n < held { piece.window.codes[n] } else { piece.codes[n - held] };
            if n >= held {
                f(n - held, code);
            }
            let rest = self.replaced.len() - width;
            self.cache.take_out(code, &self.replaced[rest..]);
            self.replaced.truncate(rest);
        }
        let left = before..self.entered;
        self.cache.update_log_counts(piece.codes_of(left.clone()), &mut self.log_counts);
        for code in piece.codes_of(left) {
            self.shares[code as usize] = share(self.cache.count()[code as usize]);
        }
        self.entered = before;
    }
}

fn share<T: Scalar>(count: u64) -> T {
    if count == 0 { T::zero() } else { T::one() / T::from_f64(count as f64) }
}

/// How many keys before its turn a row is asked for.
const AHEAD: usize = 16;

/// Gradients of keys or of their values, one row per position.
///
/// A sweep in falling order meets a row with the last tile that sees the key, a sweep in rising order with the key's own.
pub(super) struct KeyRows<'a, T> {
    /// Of the last keys before the segment.
    pub before: Array2<T>,
    /// Of the segment's own; what they hold at first does not matter.
    own: ArrayViewMut2<'a, T>,
    /// Position of the first of these.
    first: usize,
    /// In falling order: rows from this position on have been met. None in rising order.
    met: Option<usize>,
}

impl<'a, T: Scalar> KeyRows<'a, T> {
    /// Of the keys from `first` on and of `reach` keys before it, for a sweep in falling or rising order.
    pub fn new(own: ArrayViewMut2<'a, T>, first: usize, reach: usize, falling: bool) -> Self {
        let met = falling.then_some(first + own.nrows());
        KeyRows { before: Array2::zeros((reach, own.ncols())), own, first, met }
    }

    /// The rows of these positions, which lie on one side of the segment's start.
    fn rows(&mut self, keys: Range<usize>) -> ArrayViewMut2<'_, T> {
        if keys.start >= self.first {
            return self.own.slice_mut(s![keys.start - self.first..keys.end - self.first, ..]);
        }
        let row = |key: usize| self.before.nrows() + key - self.first;
        let rows = row(keys.start)..row(keys.end);
        self.before.slice_mut(s![rows, ..])
    }

    /// Adds A B to the rows of `keys`, the last of which are those of the rows of B and seen by none of B's before them.
    ///
    /// # Shapes
    /// `a` [keys, m], `b` [m, width].
    pub fn add_product(&mut self, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, keys: Range<usize>) {
        let own = keys.end - b.nrows();
        let within = |position: usize| position.clamp(keys.start, keys.end);
        let mut cuts = [keys.start, own, within(self.first), within(self.met.unwrap_or(own)), keys.end];
        cuts.sort_unstable();
        for part in cuts.windows(2).filter(|part| part[0] < part[1]) {
            let a = a.slice(s![part[0] - keys.start..part[1] - keys.start, ..]);
            let triangle = if part[0] == own { Triangle::Upper } else { Triangle::Full };
            // Rows before the segment begin as zeros.
            let add = part[0] < self.first || self.met.map_or(part[0] < own, |met| part[0] >= met);
            triangle_product((a, triangle), b, self.rows(part[0]..part[1]), add);
        }
        self.met = self.met.map(|met| met.min(keys.start.max(self.first)));
    }

    /// In falling order: adds a row to that of `key`, which has been met or is the last that has not.
    pub fn add(&mut self, key: usize, row: ArrayView1<'_, T>) {
        let met = self.met.expect("falling order");
        let add = key >= met || key < self.first;
        debug_assert!(add || key + 1 == met);
        if let Some(next) = key.checked_sub(self.first + AHEAD) {
            prefetch_row(self.own.row(next));
        }
        // As `rows`, which for single ones takes 1 % of a backward pass of narrow heads.
        let mut sum = if key >= self.first {
            self.own.row_mut(key - self.first)
        } else {
            let row = self.before.nrows() + key - self.first;
            self.before.row_mut(row)
        };
        match (sum.as_slice_mut(), row.to_slice()) {
            (Some(sum), Some(row)) if add => on_best_simd!(add_to(row, sum)),
            _ if add => sum += &row,
            _ => sum.assign(&row),
        }
        self.met = Some(met.min(key.max(self.first)));
    }
}
