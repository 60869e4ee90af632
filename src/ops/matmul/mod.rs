//! C <- beta C + alpha A B, for matrices of any strides.
//!
//! The only folder with `unsafe`: here it hands pointers and strides to the library that multiplies, in [`in_place`] and [`tile`]
//! it reads operands without checking every index. One product runs on one thread; callers run several at once, cut in ways that
//! depend on shapes alone, so that results keep their bits at any number of threads.
//!
//! Cost: 2 m n k operations.

#![allow(unsafe_code)]

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::Scalar;
use crate::compiled::compiled_here;
use crate::ops::simd::level;
use crate::ops::triangle::Triangle;

mod in_place;
mod packed;
mod prefetch;
mod tile;
mod vector;
mod weights;

pub(crate) use packed::PackedRows;
pub(crate) use prefetch::{
    Later, ask, ask_for_pages, ask_second_level, prefetch, prefetch_ahead, prefetch_first, prefetch_row,
};
pub(crate) use vector::vector_product;
pub(crate) use weights::PackedWeights;

/// Elements of A up to which it stays in the second-level cache as it lies.
const UNPACKED: usize = 1 << 18;

/// C <- A B.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], `c` [m, n].
pub(crate) fn product<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, c: ArrayViewMut2<'_, T>) {
    gemm((a, Triangle::Full), b, c, false);
}

/// C <- C + A B.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], `c` [m, n].
pub(crate) fn add_product<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, c: ArrayViewMut2<'_, T>) {
    gemm((a, Triangle::Full), b, c, true);
}

/// C <- A B or C + A B, where A is 0 outside of a triangle.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], `c` [m, n].
pub(crate) fn triangle_product<T: Scalar>(
    a: (ArrayView2<'_, T>, Triangle),
    b: ArrayView2<'_, T>,
    c: ArrayViewMut2<'_, T>,
    add: bool,
) {
    gemm(a, b, c, add);
}

fn gemm<T: Scalar>(
    (a, triangle): (ArrayView2<'_, T>, Triangle),
    b: ArrayView2<'_, T>,
    c: ArrayViewMut2<'_, T>,
    add: bool,
) {
    compiled_here!(
        T,
        gemm_here::<T>,
        fn((ArrayView2<'_, T>, Triangle), ArrayView2<'_, T>, ArrayViewMut2<'_, T>, bool)
    )((a, triangle), b, c, add)
}

fn gemm_here<T: Scalar>(
    (a, triangle): (ArrayView2<'_, T>, Triangle),
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    add: bool,
) {
    let (m, k) = a.dim();
    let n = b.ncols();
    assert_eq!((b.nrows(), c.dim()), (k, (m, n)), "shapes of a product");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !add {
            c.fill(T::zero());
        }
        return;
    }
    if m * k <= UNPACKED && in_place::product(level(), (a, triangle), b, c.view_mut(), add) {
        return;
    }
    let (a_strides, b_strides) = (a.strides(), b.strides());
    let c_strides = [c.strides()[0], c.strides()[1]];
    // SAFETY: the three views are valid for the rows and columns named by m, n, k (asserted above), `c` is borrowed
    // mutably and therefore overlaps neither `a` nor `b`, and strides are counted in elements on both sides.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_strides[1],
            c_strides[0],
            add,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn numbers(rows: usize, cols: usize, seed: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |(i, j)| ((i * 31 + j * 17 + seed) % 23) as f64 - 11.0)
    }

    /// The definition: C <- C + A B, one sum at a time.
    fn naive(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, c: &mut Array2<f64>) {
        for ((i, j), c) in c.indexed_iter_mut() {
            *c += (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum::<f64>();
        }
    }

    #[test]
    fn products_of_any_layout_equal_the_definition() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (1, 64, 33), (64, 1, 33), (130, 70, 40), (5, 3, 0)] {
            // Integers: every sum is exact, so equality is exact. Views: transposed, strided, reversed.
            let a_t = numbers(k, m, 1);
            let b_wide = numbers(k, 2 * n, 2);
            for b in [b_wide.slice(s![.., ..;2]), b_wide.slice(s![.., ..n])] {
                let a = a_t.t();
                let a_back = a.slice(s![..;-1, ..]);
                for a in [a, a_back] {
                    let mut expected = Array2::zeros((m, n));
                    naive(a, b, &mut expected);
                    let mut c = Array2::from_elem((m, n), f64::NAN);
                    product(a, b, c.view_mut());
                    assert_eq!(c, expected);
                    naive(a, b, &mut expected);
                    add_product(a, b, c.view_mut());
                    assert_eq!(c, expected);
                    let mut c = Array2::from_elem((n, m), f64::NAN);
                    product(a, b, c.view_mut().reversed_axes());
                    add_product(a, b, c.view_mut().reversed_axes());
                    assert_eq!(c.t(), expected);
                }
            }
        }
    }
}
