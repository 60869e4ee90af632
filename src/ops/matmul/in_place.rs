//! The product of operands that lie as a register tile reads them, or nearly so.
//!
//! ```text
//! C[i][j] <- beta C[i][j] + sum_p A[i][p] B[p][j]     beta 0 or 1
//! ```
//!
//! Rows of B and C must be contiguous, A may have any strides. C is cut into panels of two or four vectors, panels into tiles (see
//! [`tile`]):
//!
//! ```text
//! for as many panels of B as stay in the nearest cache:
//!     for 128 or 256 p:  for the rows of a tile:  for each of these panels:  a tile
//! ```
//!
//! so that A comes from farther away once, or as seldom as may be. A library copies both operands into the order of a tile first.
//! Attention's operands lie in it from the start (a row of scores, a row of codewords, a row of values), and its products are so
//! small that the copies cost a tenth of the time. Only rows of B that lie far apart are copied.
//!
//! An element of C is the sum, in order, of sums over so many p each, wherever the cuts into tiles fall: a row or a column has the
//! same bits in a product of any size that is done here.
//!
//! [`tile`]: super::tile

use std::mem::MaybeUninit;

use fearless_simd::{Level, Simd, SimdBase, dispatch};
use ndarray::{ArrayView2, ArrayViewMut2};

use super::tile::{Ahead, NEAR, Operands, Rows, depth, part_at, tile_at, vectors};
use crate::Scalar;
use crate::ops::triangle::Triangle;

/// Room for rows of B that are copied.
#[repr(align(64))]
struct Copies([MaybeUninit<u8>; NEAR]);

/// C <- A B, or C + A B; false, and nothing done, where rows of B or C are not contiguous or too short for a vector.
///
/// # Shapes
/// `a` [m, k], `b` [k, n], `c` [m, n], none of them empty.
pub(super) fn product<T: Scalar>(
    level: Level,
    (a, triangle): (ArrayView2<'_, T>, Triangle),
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    add: bool,
) -> bool {
    let (m, k) = a.dim();
    let n = b.ncols();
    assert_eq!((b.nrows(), c.dim()), (k, (m, n)), "shapes of a product");
    if b.strides()[1] != 1 || c.strides()[1] != 1 {
        return false;
    }
    let operands = Operands {
        a: a.as_ptr(),
        a_row: a.strides()[0],
        a_column: a.strides()[1],
        b: b.as_ptr(),
        b_row: b.strides()[0],
        c: c.as_mut_ptr(),
        c_row: c.strides()[0],
    };
    // SAFETY: the views are valid for the rows and columns named by (m, n, k), which were compared above, rows of b and c
    // are contiguous, and c is borrowed mutably and therefore overlaps neither a nor b.
    dispatch!(level, simd => unsafe { tiles(simd, operands, (m, n, k), triangle, add) })
}

/// All tiles of C; false where not even one vector fits in a row.
///
/// # Safety
/// The operands must be valid for m x k, k x n and m x n elements, with contiguous rows of B and C, C apart from A and B.
#[inline(always)]
unsafe fn tiles<S: Simd, T: Scalar>(
    simd: S,
    operands: Operands<T>,
    (m, n, k): (usize, usize, usize),
    triangle: Triangle,
    add: bool,
) -> bool {
    let lanes = T::Vector::<S>::LEN;
    if n < lanes {
        return false;
    }
    // Rows far apart fall on the same few sets of a cache; a copy of them is worth it if several tiles read it.
    let copies = operands.b_row.unsigned_abs() * size_of::<T>() >= 512 && m > 16;
    let mut room = Copies([MaybeUninit::uninit(); NEAR]);
    let room = room.0.as_mut_ptr().cast::<T>();
    let (most, depth) = (vectors(simd), depth::<S, T>(simd));
    assert!(most * lanes * depth * size_of::<T>() <= NEAR, "room for one panel");
    let mut column = 0;
    while column < n {
        // The last vector of a row reaches back over columns that are done, and stores only what is left.
        let (vectors, done) = match n - column {
            left if left >= most * lanes => (most, 0),
            left if left >= 2 * lanes => (2, 0),
            left => (1, lanes.saturating_sub(left)),
        };
        let width = vectors * lanes;
        // Tiles below each other share the cache lines of a transposed A: panel by panel, it is read once.
        let panels = if operands.a_column == 1 && vectors == most {
            (NEAR / (width * size_of::<T>() * k.min(depth))).clamp(1, (n - column) / width)
        } else {
            1
        };
        let start = (column - done) as isize;
        for p in (0..k).step_by(depth) {
            let rows = Rows { m, p, depth: depth.min(k - p), triangle };
            // SAFETY: p + depth <= k, and start + the columns of these panels <= n; `room` holds them: they fill NEAR at most, or
            // are one.
            unsafe {
                let mut first = Operands {
                    a: operands.a.offset(p as isize * operands.a_column),
                    b: operands.b.offset(p as isize * operands.b_row + start),
                    c: operands.c.offset(start),
                    ..operands
                };
                // From one panel of B to the next.
                let mut next = width;
                if copies {
                    next *= rows.depth;
                    for panel in 0..panels {
                        let (b, to) = (first.b.add(panel * width), room.add(panel * next));
                        match vectors {
                            4 => copy::<S, T, 4>(simd, b, first.b_row, to, rows.depth),
                            2 => copy::<S, T, 2>(simd, b, first.b_row, to, rows.depth),
                            _ => copy::<S, T, 1>(simd, b, first.b_row, to, rows.depth),
                        }
                    }
                    first = Operands { b: room, b_row: width as isize, ..first };
                }
                let (mut row, add) = (0, add || p > 0);
                if vectors == 1 {
                    while row < m {
                        row += part_at(simd, first, rows, row, done..lanes, add);
                    }
                }
                while row < m {
                    let mut taken = 0;
                    let a_ahead = Ahead::rows_of_a(first, rows, row);
                    for panel in 0..panels {
                        let ahead = if panel == 0 { a_ahead } else { None };
                        let at =
                            Operands { b: first.b.add(panel * next), c: first.c.add(panel * width), ..first };
                        taken = tile_at(simd, at, rows, row, (vectors, ahead), add);
                    }
                    row += taken;
                }
            }
        }
        column += panels * width - done;
    }
    true
}

/// Copies the first V vectors of each of `depth` rows of B to `to`, one row after the other.
///
/// # Safety
/// `b` must be valid for that many vectors in each of these rows, which lie `b_row` apart, `to` for all of them.
#[inline(always)]
unsafe fn copy<S: Simd, T: Scalar, const V: usize>(
    simd: S,
    b: *const T,
    b_row: isize,
    to: *mut T,
    depth: usize,
) {
    let lanes = T::Vector::<S>::LEN;
    let (mut from, mut to) = (b, to.cast::<T::Vector<S>>());
    for _ in 0..depth {
        for j in 0..V {
            // SAFETY: the caller vouches for vector j of each row, and for room for V vectors of each.
            unsafe {
                let b = std::slice::from_raw_parts(from.add(j * lanes), lanes);
                to.add(j).write_unaligned(T::Vector::<S>::from_slice(simd, b));
            }
        }
        // Wrapping: beyond the last row nothing is read or written.
        from = from.wrapping_offset(b_row);
        to = to.wrapping_add(V);
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;
    use crate::ops::simd::levels;

    fn numbers<T: Scalar>(rows: usize, cols: usize, seed: usize) -> Array2<T> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            T::from_f64(((i * 31 + j * 17 + seed) % 23) as f64 - 11.0)
        })
    }

    /// Integers: every sum is exact, so equality is exact. C lies inside a larger array of NaN.
    fn tiles_equal_the_definition<T: Scalar>(level: Level) {
        let lanes = dispatch!(level, simd => lanes::<_, T>(simd));
        for (m, k) in [(1, 1), (2, 7), (3, 300), (7, 5), (8, 256), (15, 257), (17, 3), (40, 600)] {
            for n in [lanes, lanes + 1, 2 * lanes, 2 * lanes + 3, 3 * lanes - 1, 5 * lanes, 8 * lanes] {
                // Rows of B beside each other, and so far apart that they are packed; falling too.
                for wide in [n, n + 200] {
                    let (a, b) = (numbers::<T>(m, 2 * k, 1), numbers::<T>(k, wide, 2));
                    let b = b.slice(s![.., wide - n..]);
                    let a_t = a.slice(s![.., ..k]).t().as_standard_layout().into_owned();
                    let falling = [a.slice(s![.., ..k;-1]), a.slice(s![.., ..;2]), a_t.t()];
                    for (a, b) in falling.into_iter().flat_map(|a| [(a, b), (a, b.slice_move(s![..;-1, ..]))])
                    {
                        let expected = a.dot(&b);
                        let mut around = Array2::from_elem((m + 2, n + 2), T::nan());
                        for times in 1..=2 {
                            let c = around.slice_mut(s![1..=m, 1..=n]);
                            assert!(product(level, (a, Triangle::Full), b, c, times > 1), "{m} {n} {k}");
                            let c = around.slice(s![1..=m, 1..=n]);
                            assert_eq!(c, &expected * T::from_f64(times.into()), "{m} {n} {k} {level:?}");
                        }
                        let inside = around.iter().filter(|c| !c.is_nan()).count();
                        assert_eq!(inside, m * n, "outside of C: {m} {n} {k} {level:?}");
                    }
                }
            }
        }
    }

    fn lanes<S: Simd, T: Scalar>(_: S) -> usize {
        T::Vector::<S>::LEN
    }

    #[test]
    fn tiles_of_every_size_layout_and_level_equal_the_definition() {
        for level in levels() {
            tiles_equal_the_definition::<f32>(level);
            tiles_equal_the_definition::<f64>(level);
        }
    }

    #[test]
    fn triangles_are_products_with_zeros() {
        for level in levels() {
            for (m, k) in [(1, 1), (5, 5), (64, 64), (64, 40), (30, 64), (300, 520), (19, 300)] {
                for triangle in [Triangle::Lower(0), Triangle::Lower(7), Triangle::Lower(-5), Triangle::Upper]
                {
                    let mut a = numbers::<f32>(m, k, 1);
                    a.indexed_iter_mut().for_each(|((i, p), a)| match triangle {
                        Triangle::Lower(after) if p as isize > i as isize + after => *a = 0.0,
                        Triangle::Upper if p < i => *a = 0.0,
                        _ => {}
                    });
                    let b = numbers::<f32>(k, 70, 2);
                    let mut c = Array2::from_elem((m, 70), f32::NAN);
                    assert!(product(level, (a.view(), triangle), b.view(), c.view_mut(), false));
                    assert_eq!(c, a.dot(&b), "{m} {k} {triangle:?} {level:?}");
                    assert!(product(level, (a.view(), triangle), b.view(), c.view_mut(), true));
                    assert_eq!(c, 2.0 * a.dot(&b), "{m} {k} {triangle:?} {level:?}");
                    // It skips: what it says is 0 is not looked at, far from the diagonal.
                    if let (Triangle::Lower(0), 64, 64) = (triangle, m, k) {
                        a[[0, 63]] = f32::NAN;
                        assert!(product(level, (a.view(), triangle), b.view(), c.view_mut(), false));
                        assert!(c.iter().all(|c| !c.is_nan()));
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_a_product_of_any_size() {
        let a = Array2::from_shape_fn((40, 700), |(i, p)| ((i * 700 + p) as f32).sin());
        let b = Array2::from_shape_fn((700, 300), |(p, j)| ((p * 300 + j) as f32).cos());
        for level in levels() {
            let mut whole = Array2::zeros((40, 300));
            assert!(product(level, (a.view(), Triangle::Full), b.view(), whole.view_mut(), false));
            for (rows, columns) in [(0..1, 0..300), (3..20, 0..64), (7..11, 5..21), (0..40, 30..263)] {
                let mut part = Array2::zeros((rows.len(), columns.len()));
                let (a, b) = (a.slice(s![rows.clone(), ..]), b.slice(s![.., columns.clone()]));
                assert!(product(level, (a, Triangle::Full), b, part.view_mut(), false));
                assert_eq!(part, whole.slice(s![rows, columns]));
            }
        }
    }

    #[test]
    fn what_no_tile_can_do_is_left_alone() {
        let (a, b) = (numbers::<f32>(3, 4, 1), numbers::<f32>(4, 40, 2));
        let mut c = Array2::from_elem((3, 1), f32::NAN);
        assert!(!product(levels()[0], (a.view(), Triangle::Full), b.slice(s![.., ..1]), c.view_mut(), false));
        let mut c_t = Array2::from_elem((40, 3), f32::NAN);
        assert!(!product(
            levels()[0],
            (a.view(), Triangle::Full),
            b.view(),
            c_t.view_mut().reversed_axes(),
            false
        ));
        let b_t = b.t().as_standard_layout().into_owned();
        let mut c_all = Array2::from_elem((3, 40), f32::NAN);
        assert!(!product(levels()[0], (a.view(), Triangle::Full), b_t.t(), c_all.view_mut(), false));
        assert!(c.iter().chain(&c_t).chain(&c_all).all(|c| c.is_nan()));
    }
}
