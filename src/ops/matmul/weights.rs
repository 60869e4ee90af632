//! A weight kept in panels for products with few rows, such as the tokens of a few streams.
//!
//! ```text
//! (1) C[i][j] <- sum_p A[i][p] W[p][j]
//! panel 0: row 0 [columns 0..w], row 1 [columns 0..w], ...    panel 1: row 0 [columns w..2w], ...
//! ```
//!
//! Sums stay in registers while p runs: those of one panel with as many rows of A as there are registers for, with fewer rows
//! those of several panels side by side. Each panel is one stream of memory, and a processor fetches ahead for several of them; a
//! weight as it lies would be as many streams as it has rows. More rows take turns:
//!
//! ```text
//! for each panel:  for 8 KB of it:  for the rows of a tile:  a tile, which asks for its share of the next 8 KB
//! ```
//!
//! so that memory is at work while later rows meet what the first ones brought up.
//!
//! An element of C is one sum in the order of p: it has the same bits with any number of rows and of threads.

use fearless_simd::{Level, Simd, SimdBase, SimdFloat, dispatch};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

use super::prefetch::ask_second_level;
use super::tile::Operands;
use super::vector::load_some;
use crate::Scalar;
use crate::ops::aligned::{Aligned, LINE};
use crate::ops::simd::{level, many_registers};

/// Vectors of a panel's row.
const VECTORS: usize = 2;

/// Bytes of panels that one task reads at least: below, handing it to another thread costs more than it saves.
const BYTES_PER_TASK: usize = 1 << 16;

/// Bytes of a panel that meet all rows while they are in a first-level cache, and how far ahead a panel is asked for.
const NEAR: usize = 1 << 13;

/// A matrix [k, n] in panels.
#[derive(Debug)]
pub(crate) struct PackedWeights<T> {
    elements: Aligned<T>,
    k: usize,
    n: usize,
    /// w, as many as two registers hold.
    width: usize,
    /// Elements from one panel to the next: a line more than a panel, or rows of all panels would fall on one set of a cache.
    panel: usize,
    level: Level,
}

impl<T: Scalar> PackedWeights<T> {
    /// Weights with the same number of rows, their columns side by side.
    ///
    /// # Shapes
    /// `weights` [k, any number].
    pub fn new(weights: &[ArrayView2<'_, T>]) -> Self {
        Self::at(level(), weights)
    }

    fn at(level: Level, weights: &[ArrayView2<'_, T>]) -> Self {
        let width = VECTORS * dispatch!(level, simd => lanes::<_, T>(simd));
        let k = weights.first().map_or(0, |w| w.nrows());
        let n: usize = weights.iter().map(|w| w.ncols()).sum();
        let panel = k * width + LINE / size_of::<T>();
        let mut elements = Aligned::zeros(n.div_ceil(width) * panel);
        let mut from = 0;
        for w in weights {
            assert_eq!(w.nrows(), k, "rows of weights side by side");
            for (p, row) in w.rows().into_iter().enumerate() {
                for (column, &x) in (from..).zip(row) {
                    elements[column / width * panel + p * width + column % width] = x;
                }
            }
            from += w.ncols();
        }
        PackedWeights { elements, k, n, width, panel, level }
    }

    /// (1), its columns shared among the threads of the current rayon pool.
    ///
    /// # Shapes
    /// `a` [m, k] of any strides, the result [m, n].
    pub fn product(&self, a: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(a.ncols(), self.k, "shapes of a product");
        let mut c = Array2::zeros((a.nrows(), self.n));
        if self.k == 0 || c.is_empty() {
            return c;
        }
        let parts =
            (self.elements.len() * size_of::<T>() / BYTES_PER_TASK).clamp(1, rayon::current_num_threads());
        let panels = self.n.div_ceil(self.width).div_ceil(parts);
        c.axis_chunks_iter_mut(Axis(1), panels * self.width).into_par_iter().enumerate().for_each(|(n, mut c)| {
            let operands = Operands {
                a: a.as_ptr(),
                a_row: a.strides()[0],
                a_column: a.strides()[1],
                b: self.elements[n * panels * self.panel..].as_ptr(),
                b_row: self.width as isize,
                c: c.as_mut_ptr(),
                c_row: c.strides()[0],
            };
            let (m, columns) = c.dim();
            // SAFETY: a is valid for m x k elements, c for m x columns with contiguous rows, and the panels of these columns
            // follow each other from b on; c is borrowed mutably.
            dispatch!(self.level, simd => unsafe { all_panels(simd, operands, (m, self.k), self.panel, columns) });
        });
        c
    }
}

#[inline(always)]
fn lanes<S: Simd, T: Scalar>(_: S) -> usize {
    T::Vector::<S>::LEN
}

/// (1) for so many columns.
///
/// # Safety
/// A must be valid for m x k elements, C for m x columns with contiguous rows, apart from A and B; B for as many panels of k
/// rows, `panel` elements apart, as these columns need.
#[inline(always)]
unsafe fn all_panels<S: Simd, T: Scalar>(
    simd: S,
    operands: Operands<T>,
    (m, k): (usize, usize),
    panel: usize,
    columns: usize,
) {
    let width = VECTORS * T::Vector::<S>::LEN;
    let (rows, together) = rows_of_tile(simd, m);
    let mut column = 0;
    while column < columns {
        let stored = columns - column;
        // SAFETY: the panels of the chosen tile are among those of `columns`.
        let panels = unsafe {
            let b = operands.b.add(column / width * panel);
            let at = Operands { b, c: operands.c.add(column), ..operands };
            if rows < m {
                rounds(simd, at, (m, k), stored);
                1
            } else {
                let part =
                    Part { k, stored, add: false, ahead: b.wrapping_add(NEAR / size_of::<T>()), step: width };
                let (_, panels) = match (rows, together.min(stored.div_ceil(width))) {
                    // Many rows leave no registers for a second panel: hints make up for what it would ask for.
                    (8, _) => tile::<S, T, 8, 1, 2>(simd, at, part, panel),
                    (4, 2) => tile::<S, T, 4, 2, 0>(simd, at, part, panel),
                    (4, _) => tile::<S, T, 4, 1, 0>(simd, at, part, panel),
                    (2, 4) => tile::<S, T, 2, 4, 0>(simd, at, part, panel),
                    (2, 2..) => tile::<S, T, 2, 2, 0>(simd, at, part, panel),
                    (2, _) => tile::<S, T, 2, 1, 0>(simd, at, part, panel),
                    (_, 8) => tile::<S, T, 1, 8, 0>(simd, at, part, panel),
                    (_, 4..) => tile::<S, T, 1, 4, 0>(simd, at, part, panel),
                    (_, 2..) => tile::<S, T, 1, 2, 0>(simd, at, part, panel),
                    _ => tile::<S, T, 1, 1, 0>(simd, at, part, panel),
                };
                panels
            }
        };
        column += panels * width;
    }
}

/// As many of `left` rows as a tile takes, and how many panels its sums leave room for.
#[inline(always)]
fn rows_of_tile<S: Simd>(simd: S, left: usize) -> (usize, usize) {
    match (left, many_registers(simd)) {
        (8.., true) => (8, 1),
        (4.., true) => (4, 2),
        (2.., true) => (2, 4),
        (_, true) => (1, 8),
        (4.., false) => (4, 1),
        (2.., false) => (2, 2),
        (_, false) => (1, 4),
    }
}

/// More rows than a tile takes, in the columns of one panel. All rows meet some rows of the panel before the next ones
/// are needed, which are asked for meanwhile.
///
/// # Safety
/// As [`all_panels`], for one panel.
#[inline(always)]
unsafe fn rounds<S: Simd, T: Scalar>(simd: S, operands: Operands<T>, (m, k): (usize, usize), stored: usize) {
    let row = VECTORS * T::Vector::<S>::LEN;
    let depth = NEAR / (row * size_of::<T>());
    let n_rounds = m.div_ceil(rows_of_tile(simd, m).0);
    for p in (0..k).step_by(depth) {
        let (mut i, mut ahead) = (0, operands.b.wrapping_add((p + depth) * row));
        while i < m {
            let part = Part { k: depth.min(k - p), stored, add: p > 0, ahead, step: row / n_rounds };
            // SAFETY: p + the rows of this part <= k, i + the rows of the chosen tile <= m.
            i += unsafe {
                let at = Operands {
                    a: operands.a.offset(i as isize * operands.a_row + p as isize * operands.a_column),
                    b: operands.b.add(p * row),
                    c: operands.c.offset(i as isize * operands.c_row),
                    ..operands
                };
                let (rows, _) = match rows_of_tile(simd, m - i).0 {
                    8 => tile::<S, T, 8, 1, 1>(simd, at, part, 0),
                    4 => tile::<S, T, 4, 1, 1>(simd, at, part, 0),
                    2 => tile::<S, T, 2, 1, 1>(simd, at, part, 0),
                    _ => tile::<S, T, 1, 1, 1>(simd, at, part, 0),
                };
                rows
            };
            ahead = ahead.wrapping_add(part.k * part.step);
        }
    }
}

/// What of a panel a tile meets.
#[derive(Clone, Copy)]
struct Part<T> {
    /// Rows of it.
    k: usize,
    /// How many columns of C are written at most.
    stored: usize,
    /// Whether sums go on from what C holds.
    add: bool,
    /// Where what comes next begins, and elements of it for each row.
    ahead: *const T,
    step: usize,
}

/// R rows of C in the columns of G panels; returns R and G. Asks for AHEAD lines of what comes next at each row of B.
///
/// # Safety
/// As [`all_panels`], for m = R and G panels.
#[inline(always)]
unsafe fn tile<S: Simd, T: Scalar, const R: usize, const G: usize, const AHEAD: usize>(
    simd: S,
    at: Operands<T>,
    part: Part<T>,
    panel: usize,
) -> (usize, usize) {
    let lanes = T::Vector::<S>::LEN;
    let mut sums = [[[T::Vector::<S>::splat(simd, T::zero()); VECTORS]; R]; G];
    // Where element j of a row of C is, and how many of the elements of its vector there are.
    let place = |g: usize, i: usize, j: usize| {
        let column = (g * VECTORS + j) * lanes;
        // Wrapping: where none is stored, it may lie beyond C.
        let c = at.c.wrapping_offset(i as isize * at.c_row).wrapping_add(column);
        (c, part.stored.saturating_sub(column).min(lanes))
    };
    // SAFETY: p < k, i < R and g < G name elements that the caller vouches for.
    unsafe {
        let load = |p: *const T| T::Vector::<S>::from_slice(simd, std::slice::from_raw_parts(p, lanes));
        if part.add {
            for (g, sums) in sums.iter_mut().enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        let (c, left) = place(g, i, j);
                        *sum = if left == lanes {
                            load(c)
                        } else {
                            load_some::<S, T>(simd, std::slice::from_raw_parts(c, left))
                        };
                    }
                }
            }
        }
        let (mut a, mut b, mut ahead) = (at.a, at.b, part.ahead);
        for _ in 0..part.k {
            let factors: [_; R] =
                std::array::from_fn(|i| T::Vector::<S>::splat(simd, *a.offset(i as isize * at.a_row)));
            for line in 0..AHEAD {
                ask_second_level(ahead.cast::<u8>().wrapping_add(line * LINE));
            }
            ahead = ahead.wrapping_add(part.step);
            for (g, sums) in sums.iter_mut().enumerate() {
                let row: [_; VECTORS] = std::array::from_fn(|j| load(b.add(g * panel + j * lanes)));
                for (sums, &factor) in sums.iter_mut().zip(&factors) {
                    for (sum, &b) in sums.iter_mut().zip(&row) {
                        *sum = factor.mul_add(b, *sum);
                    }
                }
            }
            // Wrapping: after the last p they point beyond the operands, and are not read.
            a = a.wrapping_offset(at.a_column);
            b = b.wrapping_offset(at.b_row);
        }
        for (g, sums) in sums.iter().enumerate() {
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let (c, left) = place(g, i, j);
                    if left == lanes {
                        sum.store_slice(std::slice::from_raw_parts_mut(c, lanes));
                    } else {
                        store_some::<S, T>(*sum, c, left);
                    }
                }
            }
        }
    }
    (R, G)
}

/// Stores the first `some` elements of a vector.
///
/// # Safety
/// `to` must be valid for so many elements.
#[inline(never)]
unsafe fn store_some<S: Simd, T: Scalar>(vector: T::Vector<S>, to: *mut T, some: usize) {
    // SAFETY: the caller vouches for them.
    unsafe { std::slice::from_raw_parts_mut(to, some) }.copy_from_slice(&vector.as_slice()[..some]);
}

#[cfg(test)]
pub(super) mod tests {
    use ndarray::s;

    use super::*;
    use crate::ops::simd::levels;

    pub fn numbers<T: Scalar>(rows: usize, cols: usize, seed: usize) -> Array2<T> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            T::from_f64(((i * 31 + j * 17 + seed) % 23) as f64 - 11.0)
        })
    }

    /// Integers: every sum is exact, so equality is exact.
    fn products_equal_the_definition<T: Scalar>(level: Level) {
        for (k, widths) in
            [(0, [1, 2]), (1, [1, 0]), (7, [30, 5]), (300, [64, 500]), (33, [250, 7]), (5, [0, 0])]
        {
            let (w, w_t) = (numbers::<T>(k, widths[0], 1), numbers::<T>(widths[1], k, 2));
            let packed = PackedWeights::at(level, &[w.view(), w_t.t()]);
            for m in [0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31] {
                let a_t = numbers::<T>(k, 2 * m, 3);
                let a = a_t.slice(s![.., ..;2]).reversed_axes();
                let c = packed.product(a);
                assert_eq!(c.slice(s![.., ..widths[0]]), a.dot(&w), "{m} rows, {k} x {widths:?} {level:?}");
                assert_eq!(
                    c.slice(s![.., widths[0]..]),
                    a.dot(&w_t.t()),
                    "{m} rows, {k} x {widths:?} {level:?}"
                );
            }
        }
    }

    #[test]
    fn products_of_every_size_and_level_equal_the_definition() {
        for level in levels() {
            products_equal_the_definition::<f32>(level);
            products_equal_the_definition::<f64>(level);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_among_any_others_and_on_any_number_of_threads() {
        let a = Array2::from_shape_fn((13, 700), |(i, p)| ((i * 700 + p) as f32).sin());
        let w = Array2::from_shape_fn((700, 333), |(p, j)| ((p * 333 + j) as f32).cos());
        for level in levels() {
            let packed = PackedWeights::at(level, &[w.view()]);
            let on = |threads: usize, rows| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| packed.product(a.slice(s![rows, ..])))
            };
            let whole = on(1, 0..13);
            for (threads, rows) in [(1, 5..6), (2, 0..13), (3, 2..4), (16, 9..13), (2, 3..10)] {
                assert_eq!(on(threads, rows.clone()), whole.slice(s![rows, ..]));
            }
        }
    }
}
