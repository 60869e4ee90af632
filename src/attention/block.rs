//! One block of queries and the keys it attends one by one; tiles of 64 queries of it.
//!
//! Recent keys are numbered by rows: first those of the carried window, then those of the piece, in order of position. A
//! tile works on its queries side by side, as lanes, so a row of scores is one key's score with each of them.

use std::ops::Range;

use super::VqAttention;
use crate::ops::simd::LANES;

/// Where a block lies and which keys are recent for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    /// First query, a position in the piece.
    pub start: usize,
    /// Queries.
    pub len: usize,
    /// Rows that belong to the carried window: its last keys.
    pub carried: usize,
    /// First key of the piece that is recent.
    pub first_key: usize,
    /// M.
    pub window: usize,
    /// Whether keys beyond the window are seen.
    pub cache: bool,
}

impl Block {
    /// Block `n` of a piece of `t` tokens that begins with `held` keys in the carried window.
    pub fn new(attention: &VqAttention, t: usize, held: usize, n: usize) -> Block {
        let VqAttention { block_len, window, cache, .. } = *attention;
        let start = n * block_len;
        Block {
            start,
            len: block_len.min(t - start),
            carried: window.saturating_sub(start).min(held),
            first_key: start.saturating_sub(window),
            window,
            cache,
        }
    }

    /// Queries before the one at which row `r` is the key itself; negative for keys before the block.
    fn lead(&self, r: usize) -> isize {
        (self.first_key + r) as isize - (self.carried + self.start) as isize
    }

    /// The block's queries in order, up to 64 at a time.
    pub fn tiles(self) -> impl DoubleEndedIterator<Item = Tile> {
        (0..self.len.div_ceil(LANES)).map(move |n| {
            let from = n * LANES;
            let len = LANES.min(self.len - from);
            let last = self.carried + self.start + from + len - self.first_key;
            // Row 0 leads by lead(0) <= 0; without a cache, rows more than M before the tile are out of sight.
            let unseen = (from as isize - self.lead(0) - self.window as isize).max(0) as usize;
            let first = if self.cache { 0 } else { unseen.min(last) };
            Tile { block: self, from, len, rows: first..last }
        })
    }
}

/// Up to 64 queries of a block, and the rows that any of them sees.
#[derive(Debug, Clone)]
pub(super) struct Tile {
    pub block: Block,
    /// First query, counted in the block.
    from: usize,
    /// Queries.
    pub len: usize,
    pub rows: Range<usize>,
}

impl Tile {
    /// Positions of the queries in the piece.
    pub fn queries(&self) -> Range<usize> {
        let first = self.block.start + self.from;
        first..first + self.len
    }

    /// The lane at which row `r` is the query's own key; negative for keys before the tile.
    pub fn lead(&self, r: usize) -> isize {
        self.block.lead(r) - self.from as isize
    }

    /// The lanes that see row `r`.
    pub fn seen(&self, r: usize) -> Range<usize> {
        let lead = self.lead(r);
        let from = (lead.max(0) as usize).min(LANES);
        let beyond = (lead + self.block.window as isize + 1).clamp(from as isize, LANES as isize);
        if self.block.cache { from..LANES } else { from..beyond as usize }
    }

    /// The tile's rows that belong to the carried window, and the positions of the keys in its other rows.
    pub fn parts(&self) -> (Range<usize>, Range<usize>) {
        let carried = self.block.carried;
        let (old, new) = (self.rows.start.min(carried)..carried, self.rows.start.max(carried)..self.rows.end);
        let position = |row: usize| self.block.first_key + row - carried;
        (old, position(new.start)..position(new.end))
    }
}
