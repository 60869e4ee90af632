//! `B[j][i] <- A[i][j]`, a square of registers at a time.
//!
//! A square of n vectors of n numbers is transposed by log2(n) rounds, each of which interleaves vector i with vector
//! i + n/2: a round moves one bit of the row's index into the column's.

use fearless_simd::{Simd, SimdBase, dispatch};
use ndarray::ArrayView2;

use super::simd::level;
use crate::Scalar;

/// The most numbers that a register holds.
pub(crate) const MOST_LANES: usize = 16;

/// Writes `a` [m, n] to the first m elements of n rows of `b`; the rest of these rows becomes 0.
///
/// # Shapes
/// `a` [m, n] of any strides, m <= W; `b` at least n rows.
pub(crate) fn transpose<T: Scalar, const W: usize>(a: ArrayView2<'_, T>, b: &mut [[T; W]]) {
    let (m, n) = a.dim();
    let b = &mut b[..n];
    if m == W && a.strides()[1] == 1 && dispatch!(level(), simd => squares(simd, a, b)) {
        return;
    }
    for (j, b) in b.iter_mut().enumerate() {
        b[m..].fill(T::zero());
        for (b, &a) in b.iter_mut().zip(a.column(j)) {
            *b = a;
        }
    }
}

/// [`transpose`] for W contiguous rows; false, and nothing done, where they are no squares.
#[inline(always)]
fn squares<S: Simd, T: Scalar, const W: usize>(simd: S, a: ArrayView2<'_, T>, b: &mut [[T; W]]) -> bool {
    let lanes = T::Vector::<S>::LEN;
    if !W.is_multiple_of(lanes) {
        return false;
    }
    let zero = T::Vector::<S>::splat(simd, T::zero());
    let mut square = [zero; MOST_LANES];
    for i in (0..W).step_by(lanes) {
        let rows: [&[T]; MOST_LANES] = std::array::from_fn(|r| {
            if r < lanes { a.row(i + r).to_slice().expect("contiguous rows") } else { &[] }
        });
        let (whole, rest) = b.split_at_mut(b.len() / lanes * lanes);
        for (block, b) in whole.chunks_exact_mut(lanes).enumerate() {
            for (v, row) in square[..lanes].iter_mut().zip(&rows) {
                *v = T::Vector::<S>::from_slice(simd, &row[block * lanes..][..lanes]);
            }
            transpose_square::<S, T>(&mut square);
            for (b, v) in b.iter_mut().zip(&square) {
                v.store_slice(&mut b[i..i + lanes]);
            }
        }
        let done = whole.len();
        for (j, b) in rest.iter_mut().enumerate() {
            for (b, row) in b[i..i + lanes].iter_mut().zip(&rows) {
                *b = row[done + j];
            }
        }
    }
    true
}

/// Transposes the square in the first LEN vectors.
#[inline(always)]
pub(crate) fn transpose_square<S: Simd, T: Scalar>(square: &mut [T::Vector<S>; MOST_LANES]) {
    let half = T::Vector::<S>::LEN / 2;
    for _ in 0..T::Vector::<S>::LEN.ilog2() {
        let before = *square;
        for i in 0..half {
            (square[2 * i], square[2 * i + 1]) = before[i].interleave(before[i + half]);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn every_size<T: Scalar, const W: usize>() {
        for (m, n) in [(W, 16), (W, 37), (W, 1), (W, 0), (5, 20), (0, 3), (1, 1)] {
            let wide = Array2::from_shape_fn((m, 2 * n), |(i, j)| T::from_f64((100 * i + j) as f64));
            let columns = Array2::from_shape_fn((n, m), |(j, i)| T::from_f64((100 * i + j) as f64));
            for a in [wide.slice(s![.., ..n]), wide.slice(s![.., ..;2]), columns.t()] {
                let mut b = vec![[T::nan(); W]; n + 1];
                transpose(a, &mut b);
                for (j, b) in b[..n].iter().enumerate() {
                    assert!(b[..m].iter().zip(a.column(j)).all(|(b, a)| b == a), "{m} x {n}");
                    assert!(b[m..].iter().all(|b| b.is_zero()));
                }
                assert!(b[n].iter().all(|b| b.is_nan()));
            }
        }
    }

    #[test]
    fn transposes_every_size_and_layout() {
        every_size::<f32, 32>();
        every_size::<f64, 32>();
        every_size::<f32, 8>();
        every_size::<f64, 8>();
    }
}
