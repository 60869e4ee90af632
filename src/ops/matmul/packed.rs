//! Rows kept in panels, in the order in which register tiles read them, for products that use them many times.
//!
//! ```text
//! panel 0: row 0 [columns 0..w], row 1 [columns 0..w], ...    panel 1: row 0 [columns w..2w], ...
//! ```
//!
//! A wide matrix as it lies puts each row of a panel on another page of memory; here they are neighbours. Rows are
//! written one at a time, so that a matrix of which little changes is packed once.

use fearless_simd::{Level, Simd, SimdBase, dispatch};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::prefetch::prefetch_ahead;
use super::tile::{Operands, Rows, all_rows, depth, width};
use crate::Scalar;
use crate::ops::aligned::{Aligned, LINE};
use crate::ops::simd::level;
use crate::ops::transpose::transpose;
use crate::ops::triangle::Triangle;

/// A matrix [rows, columns] in panels.
#[derive(Debug)]
pub(crate) struct PackedRows<T> {
    elements: Aligned<T>,
    rows: usize,
    columns: usize,
    /// w, as many as the registers of a tile's row hold.
    width: usize,
    /// Elements from one panel to the next: a line more than a panel, or a row of all panels would fall on one set of a cache.
    panel: usize,
    level: Level,
}

impl<T: Scalar> PackedRows<T> {
    /// Rows of zeros.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        let level = level();
        let width = dispatch!(level, simd => width::<_, T>(simd));
        let panel = rows * width + LINE / size_of::<T>();
        let elements = Aligned::zeros(columns.div_ceil(width) * panel);
        PackedRows { elements, rows, columns, width, panel, level }
    }

    /// A copy of these rows, of any strides.
    pub fn from_rows(rows: ArrayView2<'_, T>) -> Self {
        let mut packed = Self::zeros(rows.nrows(), rows.ncols());
        packed.set_rows(0, rows);
        packed
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `row` <- `x`.
    ///
    /// # Shapes
    /// `x` `[columns]`, of any stride.
    pub fn set(&mut self, row: usize, x: ArrayView1<'_, T>) {
        self.set_rows(row, x.insert_axis(Axis(0)));
    }

    /// Rows `row` and after <- `x`.
    ///
    /// # Shapes
    /// `x` [n, columns], of any strides.
    pub fn set_rows(&mut self, row: usize, x: ArrayView2<'_, T>) {
        debug_assert!(row + x.nrows() <= self.rows && x.ncols() == self.columns);
        if x.is_empty() {
            return;
        }
        let elements = &mut self.elements[row * self.width..];
        dispatch!(self.level, simd => set_rows(simd, x, elements, self.panel));
    }

    /// The first rows <- `x`, panels shared among the threads of the current rayon pool.
    ///
    /// # Shapes
    /// `x` [n, columns], of any strides.
    pub fn set_first_rows(&mut self, x: ArrayView2<'_, T>) {
        debug_assert!(x.nrows() <= self.rows && x.ncols() == self.columns);
        let (level, width) = (self.level, self.width);
        let columns = x.axis_chunks_iter(Axis(1), width).into_par_iter();
        self.elements.par_chunks_mut(self.panel).zip(columns).for_each(|(panel, x)| {
            let transposed = x.strides()[1] != 1;
            match width {
                64 if transposed => transpose::<T, 64>(x.t(), panel.as_chunks_mut().0),
                32 if transposed => transpose::<T, 32>(x.t(), panel.as_chunks_mut().0),
                16 if transposed => transpose::<T, 16>(x.t(), panel.as_chunks_mut().0),
                8 if transposed => transpose::<T, 8>(x.t(), panel.as_chunks_mut().0),
                _ => dispatch!(level, simd => set_rows(simd, x, panel, panel.len())),
            }
        });
    }

    /// C <- A B, or C + A B, B being the k rows from `from` on.
    ///
    /// # Shapes
    /// `a` [m, k] of any strides, `c` [m, columns].
    pub fn product(
        &self,
        (a, triangle): (ArrayView2<'_, T>, Triangle),
        from: usize,
        mut c: ArrayViewMut2<'_, T>,
        add: bool,
    ) {
        let (m, k) = a.dim();
        assert!(from + k <= self.rows && c.dim() == (m, self.columns), "shapes of a product");
        if k == 0 || c.is_empty() {
            if !add {
                c.fill(T::zero());
            }
            return;
        }
        if c.strides()[1] != 1 && self.columns > 1 {
            // No tile can store there.
            let mut rows = c.as_standard_layout().into_owned();
            self.product((a, triangle), from, rows.view_mut(), add);
            c.assign(&rows);
            return;
        }
        let operands = Operands {
            a: a.as_ptr(),
            a_row: a.strides()[0],
            a_column: a.strides()[1],
            b: self.elements[from * self.width..].as_ptr(),
            b_row: self.width as isize,
            c: c.as_mut_ptr(),
            c_row: c.strides()[0],
        };
        let sizes = (self.panel, self.columns);
        // SAFETY: `a` is valid for m x k elements and `c` for m x columns with contiguous rows, c is borrowed mutably, and
        // each panel holds from + k rows of `width` elements, all of which was asserted above.
        dispatch!(self.level, simd => unsafe { panels(simd, operands, (m, k, triangle), sizes, add) });
    }
}

/// Writes rows to panels that lie `panel` elements apart.
#[inline(always)]
fn set_rows<S: Simd, T: Scalar>(simd: S, rows: ArrayView2<'_, T>, elements: &mut [T], panel: usize) {
    let (lanes, width) = (T::Vector::<S>::LEN, width::<S, T>(simd));
    for (i, row) in rows.rows().into_iter().enumerate() {
        prefetch_ahead(rows, i);
        let elements = &mut elements[i * width..];
        let Some(row) = row.to_slice() else {
            for (column, &x) in row.iter().enumerate() {
                elements[column / width * panel + column % width] = x;
            }
            continue;
        };
        for (n, x) in row.chunks(width).enumerate() {
            let to = &mut elements[n * panel..][..x.len()];
            let (x, x_rest) = x.split_at(x.len() / lanes * lanes);
            let (to, to_rest) = to.split_at_mut(x.len());
            // Not copy_from_slice: a call costs more than so short a copy.
            for (x, to) in x.chunks_exact(lanes).zip(to.chunks_exact_mut(lanes)) {
                T::Vector::<S>::from_slice(simd, x).store_slice(to);
            }
            for (&x, to) in x_rest.iter().zip(to_rest) {
                *to = x;
            }
        }
    }
}

/// All panels, `panel` elements apart, of so many columns.
///
/// # Safety
/// As [`all_rows`], for each panel.
#[inline(always)]
unsafe fn panels<S: Simd, T: Scalar>(
    simd: S,
    operands: Operands<T>,
    (m, k, triangle): (usize, usize, Triangle),
    (panel, columns): (usize, usize),
    add: bool,
) {
    let (width, depth) = (width::<S, T>(simd), depth::<S, T>(simd));
    for (n, column) in (0..columns).step_by(width).enumerate() {
        let stored = width.min(columns - column);
        for p in (0..k).step_by(depth) {
            // SAFETY: panel n begins n * panel elements after the first, its rows p.. after p rows; c has `stored` columns there.
            unsafe {
                let at = Operands {
                    a: operands.a.offset(p as isize * operands.a_column),
                    b: operands.b.add(n * panel + p * width),
                    c: operands.c.add(column),
                    ..operands
                };
                let rows = Rows { m, p, depth: depth.min(k - p), triangle };
                all_rows(simd, at, rows, stored, add || p > 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn numbers<T: Scalar>(rows: usize, cols: usize, seed: usize) -> Array2<T> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            T::from_f64(((i * 31 + j * 17 + seed) % 23) as f64 - 11.0)
        })
    }

    /// Integers: every sum is exact, so equality is exact.
    fn products_equal_the_definition<T: Scalar>() {
        for (m, k, from, rows, columns) in [
            (1, 1, 0, 1, 1),
            (9, 5, 2, 7, 33),
            (64, 300, 3, 303, 70),
            (3, 0, 2, 4, 5),
            (13, 4, 0, 4, 3),
            (23, 260, 1, 261, 29),
        ] {
            let b = numbers::<T>(rows, columns, 1);
            let mut packed = PackedRows::zeros(rows, columns);
            for (row, x) in b.rows().into_iter().enumerate() {
                packed.set(row, x);
            }
            assert_eq!(packed.rows(), rows);
            let a_t = numbers::<T>(k, m, 2);
            let expected = a_t.t().dot(&b.slice(s![from..from + k, ..]));
            let mut c = Array2::from_elem((m, columns), T::nan());
            packed.product((a_t.t(), Triangle::Full), from, c.view_mut(), false);
            assert_eq!(c, expected);
            packed.product((a_t.t(), Triangle::Full), from, c.view_mut(), true);
            assert_eq!(c, &expected + &expected);
            let mut c = Array2::from_elem((columns, m), T::nan());
            packed.product((a_t.t(), Triangle::Full), from, c.view_mut().reversed_axes(), false);
            assert_eq!(c.t(), expected);
        }
    }

    #[test]
    fn packed_products_equal_the_definition() {
        products_equal_the_definition::<f32>();
        products_equal_the_definition::<f64>();
    }
}
