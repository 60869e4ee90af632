//! One tile of a product: some rows by two vectors, which stay in registers while p runs.
//!
//! ```text
//! C[i][j] <- beta C[i][j] + sum_p A[i][p] B[p][j]     beta 0 or 1
//!
//! for p:  load 2 vectors of row B[p];  for each of R rows i: broadcast A[i][p], multiply and add twice
//! ```
//!
//! R is 8 with 32 vector registers (AVX-512, NEON), 6 with 16.

use std::ops::Range;

use fearless_simd::{Level, Simd, SimdBase, SimdFloat};

use crate::Scalar;
use crate::ops::triangle::Triangle;

/// Vectors of a tile's row.
pub(super) const VECTORS: usize = 2;

/// Rows of B that meet C together: with the widest registers a panel of them is 32 KB, a first-level cache.
pub(super) const DEPTH: usize = 256;

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
    if columns == VECTORS * T::Vector::<S>::LEN {
        while row < rows.m {
            row += unsafe { tile_at(simd, panel, rows, row, add) };
        }
    } else {
        while row < rows.m {
            row += unsafe { part_at(simd, panel, rows, row, 0..columns, add) };
        }
    }
}

/// The tile of a panel, all of whose columns exist, whose first row is `row`, below m; how many rows it has.
///
/// # Safety
/// As [`all_rows`].
#[inline(always)]
pub(super) unsafe fn tile_at<S: Simd, T: Scalar>(
    simd: S,
    panel: Operands<T>,
    rows: Rows,
    row: usize,
    add: bool,
) -> usize {
    let many_registers = matches!(simd.level(), Level::Avx512(_)) || cfg!(target_arch = "aarch64");
    let most = if many_registers { 8 } else { 6 };
    let left = most.min(rows.m - row);
    let all = 0..VECTORS * T::Vector::<S>::LEN;
    // SAFETY: row + the rows of the chosen tile <= m.
    unsafe {
        let (at, depth) = rows.operands(panel, row..row + left);
        match left {
            8 => tile::<S, T, 8, VECTORS>(simd, at, depth, all, add),
            // A transposed: addresses known beforehand, six additions less among 20 instructions.
            6.. if at.a_row == 1 => {
                tile::<S, T, 6, VECTORS>(simd, Operands { a_row: 1, ..at }, depth, all, add)
            }
            6.. => tile::<S, T, 6, VECTORS>(simd, at, depth, all, add),
            4.. => tile::<S, T, 4, VECTORS>(simd, at, depth, all, add),
            2.. => tile::<S, T, 2, VECTORS>(simd, at, depth, all, add),
            _ => tile::<S, T, 1, VECTORS>(simd, at, depth, all, add),
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
            (8.., 1) => tile::<S, T, 8, 1>(simd, at, depth, columns, add),
            (4.., 1) => tile::<S, T, 4, 1>(simd, at, depth, columns, add),
            (_, 1) => tile::<S, T, 1, 1>(simd, at, depth, columns, add),
            (4.., _) => tile::<S, T, 4, VECTORS>(simd, at, depth, columns, add),
            _ => tile::<S, T, 1, VECTORS>(simd, at, depth, columns, add),
        }
    }
}

/// One tile of R rows and V vectors, of which `columns` are stored; returns R.
///
/// # Safety
/// As [`all_rows`], for m = R and V vectors.
#[inline(always)]
unsafe fn tile<S: Simd, T: Scalar, const R: usize, const V: usize>(
    simd: S,
    at: Operands<T>,
    k: usize,
    columns: Range<usize>,
    add: bool,
) -> usize {
    let lanes = T::Vector::<S>::LEN;
    let all = columns == (0..V * lanes);
    let mut sums = [[T::Vector::<S>::splat(simd, T::zero()); V]; R];
    // SAFETY: p < k, i < R and j < V name elements that the caller vouches for.
    unsafe {
        let load = |p: *const T| T::Vector::<S>::from_slice(simd, std::slice::from_raw_parts(p, lanes));
        let (mut a, mut b) = (at.a, at.b);
        for _ in 0..k {
            let row: [_; V] = std::array::from_fn(|j| load(b.add(j * lanes)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = T::Vector::<S>::splat(simd, *a.offset(i as isize * at.a_row));
                for (sum, &b) in sums.iter_mut().zip(&row) {
                    *sum = factor.mul_add(b, *sum);
                }
            }
            // Wrapping: after the last p they point beyond the operands, and are not read.
            a = a.wrapping_offset(at.a_column);
            b = b.wrapping_offset(at.b_row);
        }
        if !all {
            // A copy: the sums themselves stay in registers.
            store_columns(&{ sums }, at, columns, add);
            return R;
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let c = at.c.offset(i as isize * at.c_row).add(j * lanes);
                let sum = if add { load(c) + sum } else { sum };
                sum.store_slice(std::slice::from_raw_parts_mut(c, lanes));
            }
        }
    }
    R
}

/// Stores some columns of a tile.
///
/// # Safety
/// C must be valid for them in R rows.
#[cold]
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
