//! Matrices of which a part is 0, because a query does not see later keys.

use std::ops::Range;

/// Where A has elements other than 0. Rows of tiles skip what is left or right of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Triangle {
    /// Anywhere.
    Full,
    /// `A[i][p] = 0` for p > i + this.
    Lower(isize),
    /// `A[i][p] = 0` for p < i.
    Upper,
}

impl Triangle {
    /// Of `depth` elements from `p` on, those that rows `row` to `end` need.
    #[inline(always)]
    pub(crate) fn needed(self, (row, end): (usize, usize), p: usize, depth: usize) -> Range<usize> {
        match self {
            Triangle::Full => 0..depth,
            Triangle::Lower(after) => 0..end.saturating_add_signed(after).saturating_sub(p).min(depth),
            Triangle::Upper => row.saturating_sub(p).min(depth)..depth,
        }
    }
}
