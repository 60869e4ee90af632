//! Products of whole arrays, shared among the threads of the current rayon pool.
//!
//! ```text
//! (1) C <- beta C + A B     beta 0 or 1
//!
//! for as many rows of B as stay in a cache:  pack them, panel by panel; then
//!     for some rows of A and C:  for each panel:  tiles
//! ```
//!
//! Both inner loops are shared. A library called for some rows would pack B for each call; here it is packed once. A transposed A
//! (of a weight's gradient) is copied a few columns at a time: its lines lie so far apart that they would fall on few sets of a
//! cache.
//!
//! An element of C is the sum, in order, of sums over so many p each, wherever the cuts fall: those of B and of A's columns fall
//! where such a sum ends.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::aligned::LINE;
use super::matmul::{self, PackedRows};
use crate::Scalar;
use crate::ops::triangle::Triangle;

/// Rows of C below which no part of B is packed.
const FEW_ROWS: usize = 64;

/// Columns of C below which nothing is packed: panels would be mostly empty.
const FEW_COLUMNS: usize = 16;

/// Rows of C that one task computes: large enough to keep the product efficient, small enough to share.
const ROWS_PER_TASK: usize = 128;

/// Bytes of a weight that meets tokens, a B that meets more rows of A than it has, up to which it is packed whole.
const WHOLE: usize = 1 << 23;

/// Bytes of any other B that are packed at once.
const PART: usize = 1 << 21;

/// Columns of a transposed A that are copied at once, a multiple of the p that a tile sums up.
const COPIED: usize = 256;

/// C <- A B.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], the result [m, n].
pub(crate) fn product<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    product_into(a, b, c.view_mut());
    c
}

/// As [`product`], into an array that is there already.
pub(crate) fn product_into<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, c: ArrayViewMut2<'_, T>) {
    run(a, b, c, false);
}

/// C <- C + A B.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], `c` [m, n].
pub(crate) fn add_product<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, c: ArrayViewMut2<'_, T>) {
    run(a, b, c, true);
}

fn run<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, mut c: ArrayViewMut2<'_, T>, add: bool) {
    if c.strides()[1] != 1 && c.strides()[0] == 1 {
        // C^T <- beta C^T + B^T A^T: tiles store rows.
        return run(b.reversed_axes(), a.reversed_axes(), c.reversed_axes(), add);
    }
    let ((m, k), n) = (a.dim(), b.ncols());
    if m < FEW_ROWS || n < FEW_COLUMNS || k == 0 {
        share_rows(a, c, |a, c| if add { matmul::add_product(a, b, c) } else { matmul::product(a, b, c) });
        return;
    }
    let row = n * size_of::<T>();
    let whole = k <= m && k * row <= WHOLE;
    let depth = if whole { k } else { (PART / row / COPIED).max(1) * COPIED };
    let mut packed = PackedRows::zeros(depth.min(k), n);
    let parts = a.axis_chunks_iter(Axis(1), depth).zip(b.axis_chunks_iter(Axis(0), depth));
    for (part, (a, b)) in parts.enumerate() {
        packed.set_first_rows(b);
        share_rows(a, c.view_mut(), |a, c| product_of_rows(a, &packed, c, add || part > 0));
    }
}

/// `f` of the same rows of A and C, some per task.
fn share_rows<T: Scalar>(
    a: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    f: impl Fn(ArrayView2<'_, T>, ArrayViewMut2<'_, T>) + Sync,
) {
    // A product with few, long rows (a weight's gradient) is cut into finer pieces than one with many short ones.
    let rows = ROWS_PER_TASK.min(a.nrows().div_ceil(2)).max(16);
    let tasks = a.axis_chunks_iter(Axis(0), rows).into_par_iter();
    tasks.zip(c.axis_chunks_iter_mut(Axis(0), rows)).for_each(|(a, c)| f(a, c));
}

/// (1) for some rows of A and C, B being the first rows of `packed`.
fn product_of_rows<T: Scalar>(
    a: ArrayView2<'_, T>,
    packed: &PackedRows<T>,
    mut c: ArrayViewMut2<'_, T>,
    add: bool,
) {
    if a.strides()[1] == 1 {
        packed.product((a, Triangle::Full), 0, c, add);
        return;
    }
    let m = a.nrows();
    // A line more, or columns would lie a power of two apart.
    let mut room = Array2::zeros((COPIED.min(a.ncols()), m + LINE / size_of::<T>()));
    for (n, columns) in a.axis_chunks_iter(Axis(1), COPIED).enumerate() {
        let mut copy = room.slice_mut(s![..columns.ncols(), ..m]);
        copy.assign(&columns.t());
        packed.product((copy.t(), Triangle::Full), n * COPIED, c.view_mut(), add || n > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<T: Scalar>((rows, columns): (usize, usize), seed: usize) -> Array2<T> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            T::from_f64(((i * 31 + j * 17 + seed) % 23) as f64 - 11.0)
        })
    }

    /// Integers: every sum is exact, so equality is exact. Operands as they are and transposed, C inside of a larger array.
    fn products_equal_the_definition<T: Scalar>((m, k, n): (usize, usize, usize)) {
        let (a, b) = (numbers::<T>((m, k), 1), numbers::<T>((k, n), 2));
        let [a_t, b_t] = [&a, &b].map(|x| x.t().as_standard_layout().into_owned());
        // Every second element, from the last to the first.
        let [a_far, b_far] = [&a, &b].map(|x| {
            let mut far = Array2::from_elem((x.nrows(), 2 * x.ncols()), T::nan());
            far.slice_mut(s![..;-1, ..;2]).assign(x);
            far
        });
        let far = s![..;-1, ..;2];
        let expected = a.dot(&b);
        for (a, b) in [
            (a.view(), b.view()),
            (a_t.t(), b.view()),
            (a.view(), b_t.t()),
            (a_t.t(), b_t.t()),
            (a_far.slice(far), b.view()),
            (a.view(), b_far.slice(far)),
        ] {
            for c_transposed in [false, true] {
                let (rows, columns) = if c_transposed { (n, m) } else { (m, n) };
                let mut around = Array2::from_elem((rows + 2, columns + 2), T::nan());
                for times in 1..=2 {
                    let c = around.slice_mut(s![1..=rows, 1..=columns]);
                    let c = if c_transposed { c.reversed_axes() } else { c };
                    if times == 1 {
                        product_into(a, b, c)
                    } else {
                        add_product(a, b, c)
                    }
                    let c = around.slice(s![1..=rows, 1..=columns]);
                    let c = if c_transposed { c.reversed_axes() } else { c };
                    assert_eq!(c, &expected * T::from_f64(times.into()), "{m} x {k} x {n}");
                }
                assert_eq!(around.iter().filter(|c| !c.is_nan()).count(), m * n, "outside of C");
            }
        }
    }

    #[test]
    fn products_of_every_size_and_layout_equal_the_definition() {
        // Few rows; few columns; packed whole, with an odd end; in parts, the last of them short; nothing to sum.
        for sizes in [(63, 40, 70), (70, 40, 15), (200, 90, 130), (64, 16, 16), (70, 1100, 600), (100, 0, 30)]
        {
            products_equal_the_definition::<f32>(sizes);
            products_equal_the_definition::<f64>(sizes);
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let a = Array2::from_shape_fn((300, 700), |(i, p)| ((i * 700 + p) as f32).sin());
        let b = Array2::from_shape_fn((700, 500), |(p, j)| ((p * 500 + j) as f32).cos());
        let products = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (product(a.view(), b.view()), product(b.t(), a.t())))
        };
        assert_eq!(products(1), products(3));
    }
}
