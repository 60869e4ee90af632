//! One tile of a product: some rows by some vectors, which stay in registers while p runs.
//!
//! ```text
//! C[i][j] <- beta C[i][j] + sum_p A[i][p] B[p][j]     beta 0 or 1
//!
//! for p:  load V vectors of row B[p];  for each of R rows i: broadcast A[i][p], multiply and add V times
//! ```
//!
//! R x V is 6 x 4 with AVX-512, 8 x 2 with NEON, 6 x 2 with 16 registers: R + V loads for R V multiplications, of which a
//! processor with AVX-512 begins two while it loads little more than one vector.
//!
//! What comes next is on its way meanwhile: C before the sums begin, the next rows of A or B (see [`Ahead`]) while they are made.

use std::hint::{assert_unchecked, black_box};
use std::ops::Range;

use fearless_simd::{Simd, SimdBase, SimdFloat};

use super::prefetch::{ask, ask_second_level};
use crate::Scalar;
use crate::ops::simd::{many_registers, wide_registers};
use crate::ops::triangle::Triangle;

/// Bytes of a panel of B that meet C together, at most: they stay in a first-level cache.
pub(super) const NEAR: usize = 1 << 15;

/// Vectors of a panel of B: those of the largest tile's row.
#[inline(always)]
pub(super) fn vectors<S: Simd>(simd: S) -> usize {
    if wide_registers(simd) { 4 } else { 2 }
}

/// Elements in a row of a panel.
#[inline(always)]
pub(super) fn width<S: Simd, T: Scalar>(simd: S) -> usize {
    vectors(simd) * T::Vector::<S>::LEN
}

/// Rows of B that meet C together.
#[inline(always)]
pub(super) fn depth<S: Simd, T: Scalar>(simd: S) -> usize {
    (NEAR / (width::<S, T>(simd) * size_of::<T>())).min(256)
}

/// Pointers and strides, in elements, of operands whose extents have been checked.
pub(super) struct Operands<T> {
    pub a: *const T,
    pub a_row: isize,
    pub a_column: isize,
    pub b: *const T,
    pub b_row: isize,
    pub c: *mut T,
    pub c_row: isize,
}

/// What the tiles of four vectors ask for while they run: from this address on, which need not be valid, so many bytes per p.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead {
    first: *const u8,
    step: usize,
}

impl Ahead {
    /// Rows of those tiles.
    const ROWS: usize = 6;

    /// The rows of B after the first `depth` of a panel, which all tiles of its m rows ask for together.
    #[inline(always)]
    fn rows_of_panel<T>(panel: Operands<T>, rows: Rows) -> Self {
        let row = panel.b_row.unsigned_abs() * size_of::<T>();
        let first = panel.b.cast::<u8>().wrapping_add(rows.depth * row);
        Ahead { first, step: row / rows.m.div_ceil(Self::ROWS) }
    }

    /// The rows of A after those of the tile that begins at `row`, where there are no gaps between them.
    #[inline(always)]
    pub fn rows_of_a<T>(panel: Operands<T>, rows: Rows, row: usize) -> Option<Self> {
        let gapless = panel.a_column == 1 && panel.a_row == rows.depth as isize;
        let first = panel.a.wrapping_offset((row + Self::ROWS) as isize * panel.a_row);
        gapless.then(|| Ahead { first: first.cast(), step: Self::ROWS * size_of::<T>() })
    }

    /// For the next tile, after one of such a depth.
    #[inline(always)]
    fn after(self, depth: usize) -> Self {
        Ahead { first: self.first.wrapping_add(depth * self.step), ..self }
    }
}

// By hand: derived, they would ask the same of T.
impl<T> Clone for Operands<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Operands<T> {}

/// The rows of A that meet a panel of B.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub m: usize,
    /// The first of A's columns.
    pub p: usize,
    /// How many of them.
    pub depth: usize,
    pub triangle: Triangle,
}

impl Rows {
    /// Where a panel's operands begin for a tile of these rows, and how deep they are.
    ///
    /// # Safety
    /// A and C of `panel` must be valid for these rows.
    #[inline(always)]
    unsafe fn operands<T>(&self, panel: Operands<T>, rows: Range<usize>) -> (Operands<T>, usize) {
        let row = rows.start as isize;
        let needed = self.triangle.needed((rows.start, rows.end), self.p, self.depth);
        let first = needed.start as isize;
        // SAFETY: the caller vouches for the rows.
        let (a, c) = unsafe { (panel.a.offset(row * panel.a_row), panel.c.offset(row * panel.c_row)) };
        // Wrapping: where no column is needed, they may point beyond the operands, and are not read.
        let a = a.wrapping_offset(first * panel.a_column);
        let b = panel.b.wrapping_offset(first * panel.b_row);
        (Operands { a, b, c, ..panel }, needed.len())
    }
}

/// The tiles of one panel, of whose columns the first `columns` exist, of all m rows of A and C.
///
/// # Safety
/// A and C must be valid for m rows, A and B for a depth of `depth`; A, B and C begin at the panel. Rows of B and C have no gaps,
/// those of B as many vectors as hold the columns, and C lies apart from A and B.
#[inline(always)]
pub(super) unsafe fn all_rows<S: Simd, T: Scalar>(
    simd: S,
    panel: Operands<T>,
    rows: Rows,
    columns: usize,
    add: bool,
) {
    let mut row = 0;
    // SAFETY: as the caller says, and row < m.
    if columns == width::<S, T>(simd) {
        let mut ahead = Ahead::rows_of_panel(panel, rows);
        while row < rows.m {
            row += unsafe { tile_at(simd, panel, rows, row, (vectors(simd), Some(ahead)), add) };
            ahead = ahead.after(rows.depth);
        }
    } else {
        while row < rows.m {
            row += unsafe { part_at(simd, panel, rows, row, 0..columns, add) };
        }
    }
}

/// The tile of a panel of so many vectors, 2 or [`vectors`], all of whose columns exist, whose first row is `row`, below m; how
/// many rows it has. What to ask for meanwhile is heard by the largest tiles of four vectors.
///
/// # Safety
/// As [`all_rows`].
#[inline(always)]
pub(super) unsafe fn tile_at<S: Simd, T: Scalar>(
    simd: S,
    panel: Operands<T>,
    rows: Rows,
    row: usize,
    (vectors, ahead): (usize, Option<Ahead>),
    add: bool,
) -> usize {
    let most = if vectors == 2 && many_registers(simd) { 8 } else { 6 };
    let left = match rows.m - row {
        // 4 and 4 rather than 6 and 2: a tile of 2 waits for its own sums.
        8 if most == 6 => 4,
        left => most.min(left),
    };
    // SAFETY: row + the rows of the chosen tile <= m.
    unsafe {
        let (at, depth) = rows.operands(panel, row..row + left);
        match (left, vectors) {
            (6.., 4) => match (at.a_row == 1, ahead) {
                (true, Some(ahead)) => tile::<S, T, 6, 4>(simd, at, depth, (true, Some(ahead)), add),
                (true, None) => tile::<S, T, 6, 4>(simd, at, depth, (true, None), add),
                (false, Some(ahead)) => tile::<S, T, 6, 4>(simd, at, depth, (false, Some(ahead)), add),
                (false, None) => tile::<S, T, 6, 4>(simd, at, depth, (false, None), add),
            },
            (4.., 4) => tile::<S, T, 4, 4>(simd, at, depth, (false, None), add),
            (2.., 4) => tile::<S, T, 2, 4>(simd, at, depth, (false, None), add),
            (_, 4) => tile::<S, T, 1, 4>(simd, at, depth, (false, None), add),
            (8, _) => tile::<S, T, 8, 2>(simd, at, depth, (false, None), add),
            (6.., _) if at.a_row == 1 => tile::<S, T, 6, 2>(simd, at, depth, (true, None), add),
            (6.., _) => tile::<S, T, 6, 2>(simd, at, depth, (false, None), add),
            (4.., _) => tile::<S, T, 4, 2>(simd, at, depth, (false, None), add),
            (2.., _) => tile::<S, T, 2, 2>(simd, at, depth, (false, None), add),
            _ => tile::<S, T, 1, 2>(simd, at, depth, (false, None), add),
        }
    }
}

/// [`tile_at`] of the last panel: those of its `columns` are stored that C has not yet.
///
/// # Safety
/// As [`all_rows`].
#[inline(always)]
pub(super) unsafe fn part_at<S: Simd, T: Scalar>(
    simd: S,
    panel: Operands<T>,
    rows: Rows,
    row: usize,
    columns: Range<usize>,
    add: bool,
) -> usize {
    let left = rows.m - row;
    // SAFETY: row + the rows of the chosen tile <= m.
    unsafe {
        let (at, depth) = rows.operands(panel, row..row + left.min(8));
        match (left, columns.end.div_ceil(T::Vector::<S>::LEN)) {
            (8.., 1) => part::<S, T, 8, 1>(simd, at, depth, columns, add),
            (4.., 1) => part::<S, T, 4, 1>(simd, at, depth, columns, add),
            (_, 1) => part::<S, T, 1, 1>(simd, at, depth, columns, add),
            (4.., 2) => part::<S, T, 4, 2>(simd, at, depth, columns, add),
            (_, 2) => part::<S, T, 1, 2>(simd, at, depth, columns, add),
            (4.., _) => part::<S, T, 4, 4>(simd, at, depth, columns, add),
            _ => part::<S, T, 1, 4>(simd, at, depth, columns, add),
        }
    }
}

/// One tile of R rows and V vectors; returns R.
///
/// # Safety
/// As [`all_rows`], for m = R and V vectors.
#[inline(always)]
unsafe fn tile<S: Simd, T: Scalar, const R: usize, const V: usize>(
    simd: S,
    at: Operands<T>,
    k: usize,
    how: (bool, Option<Ahead>),
    add: bool,
) -> usize {
    // C comes while the sums are made.
    for i in 0..R {
        let row = at.c.wrapping_offset(i as isize * at.c_row);
        (0..V).for_each(|j| ask(row.wrapping_add(j * T::Vector::<S>::LEN).cast()));
    }
    // SAFETY: the caller vouches for both.
    unsafe { store(simd, &sums::<S, T, R, V>(simd, at, k, how), at, add) };
    R
}

/// [`tile`], of which `columns` are stored.
///
/// # Safety
/// As [`all_rows`], for m = R and V vectors of B.
#[inline(always)]
unsafe fn part<S: Simd, T: Scalar, const R: usize, const V: usize>(
    simd: S,
    at: Operands<T>,
    k: usize,
    columns: Range<usize>,
    add: bool,
) -> usize {
    // SAFETY: the caller vouches for both.
    unsafe {
        let sums = sums::<S, T, R, V>(simd, at, k, (false, None));
        if columns == (0..V * T::Vector::<S>::LEN) {
            store(simd, &sums, at, add);
        } else {
            // A copy: the sums themselves stay in registers.
            store_columns(&{ sums }, at, columns, add);
        }
    }
    R
}

/// The sums of a tile. Where rows of A are neighbours (`transposed`), addresses are known beforehand. Callers write out both that
/// and whether there is something to ask for: each combination is a loop of its own.
///
/// # Safety
/// As [`tile`], of A and B.
#[inline(always)]
unsafe fn sums<S: Simd, T: Scalar, const R: usize, const V: usize>(
    simd: S,
    at: Operands<T>,
    k: usize,
    (transposed, ahead): (bool, Option<Ahead>),
) -> [[T::Vector<S>; V]; R] {
    let lanes = T::Vector::<S>::LEN;
    let mut sums = [[T::Vector::<S>::splat(simd, T::zero()); V]; R];
    // Where rows of A begin. A compiler that knew how they are related would find each by an addition to the one before, and the
    // additions of all p would be one chain, longer than the multiplications take.
    let rows: [_; R] = std::array::from_fn(|i| at.a.wrapping_offset(i as isize * at.a_row));
    let rows = if transposed { rows } else { black_box(rows) };
    let (mut a, mut b, mut column, mut ahead) = (at.a, at.b, 0, ahead);
    for _ in 0..k {
        if let Some(ahead) = &mut ahead {
            ask_second_level(ahead.first);
            *ahead = ahead.after(1);
        }
        // SAFETY: p < k, i < R and j < V name elements that the caller vouches for.
        unsafe {
            let row: [_; V] = std::array::from_fn(|j| load::<S, T>(simd, b.add(j * lanes)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = if transposed { *a.add(i) } else { *rows[i].wrapping_offset(column) };
                let factor = T::Vector::<S>::splat(simd, factor);
                for (sum, &b) in sums.iter_mut().zip(&row) {
                    *sum = factor.mul_add(b, *sum);
                }
            }
        }
        // Wrapping: after the last p they point beyond the operands, and are not read.
        a = a.wrapping_offset(at.a_column);
        b = b.wrapping_offset(at.b_row);
        column += at.a_column;
    }
    sums
}

/// A vector from `p` on.
///
/// # Safety
/// `p` must be valid for its elements.
#[inline(always)]
unsafe fn load<S: Simd, T: Scalar>(simd: S, p: *const T) -> T::Vector<S> {
    let lanes = T::Vector::<S>::LEN;
    // SAFETY: the caller vouches for it. Without the assertion each load is preceded by a look for a null pointer.
    unsafe {
        assert_unchecked(!p.is_null());
        T::Vector::<S>::from_slice(simd, std::slice::from_raw_parts(p, lanes))
    }
}

/// Stores a tile.
///
/// # Safety
/// C must be valid for V vectors in R rows.
#[inline(always)]
unsafe fn store<S: Simd, T: Scalar, const R: usize, const V: usize>(
    simd: S,
    sums: &[[T::Vector<S>; V]; R],
    at: Operands<T>,
    add: bool,
) {
    let lanes = T::Vector::<S>::LEN;
    for (i, sums) in sums.iter().enumerate() {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: i < R and j < V name elements that the caller vouches for.
            unsafe {
                let c = at.c.offset(i as isize * at.c_row).add(j * lanes);
                let sum = if add { load::<S, T>(simd, c) + sum } else { sum };
                sum.store_slice(std::slice::from_raw_parts_mut(c, lanes));
            }
        }
    }
}

/// Stores some columns of a tile.
///
/// # Safety
/// C must be valid for them in R rows.
#[inline(never)]
unsafe fn store_columns<S: Simd, T: Scalar, const R: usize, const V: usize>(
    sums: &[[T::Vector<S>; V]; R],
    at: Operands<T>,
    columns: Range<usize>,
    add: bool,
) {
    let lanes = T::Vector::<S>::LEN;
    for (i, sums) in sums.iter().enumerate() {
        for column in columns.clone() {
            let sum = sums[column / lanes].as_slice()[column % lanes];
            // SAFETY: i < R, and the caller vouches for each of these columns.
            unsafe {
                let c = at.c.offset(i as isize * at.c_row).add(column);
                *c = if add { *c + sum } else { sum };
            }
        }
    }
}
