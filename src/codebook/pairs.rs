//! How near to each other codewords are.
//!
//! ```text
//! (1) nearest pair_h = min_{i < j} |c_i - c_j|
//! ```
//!
//! Against the root of the mean error it tells whether codes are spent on the same keys; 0 where two codewords are equal.
//!
//! Cost: H S^2 K / 2, in `f64` from differences, all j beside each other.

use ndarray::{Array1, ArrayView2, ArrayView3};
use rayon::prelude::*;

use super::assign::check_codewords;
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// The distance of the two codewords nearest to each other, `min_{i < j} |c_i - c_j|`, per head `[H]`; infinite for a single
/// code.
///
/// # Shapes
/// `codewords` [H, S, K].
///
/// # Errors
/// [`Error::Empty`], [`Error::NotFinite`].
pub fn nearest_pair<T: Scalar>(codewords: ArrayView3<'_, T>) -> Result<Array1<f64>, Error> {
    check_codewords(codewords)?;
    Ok(codewords.outer_iter().map(of_head).collect())
}

fn of_head<T: Scalar>(codewords: ArrayView2<'_, T>) -> f64 {
    let n_codes = codewords.nrows();
    // Dimensions in rows, so that all j of one dimension are neighbours.
    let columns: Vec<Vec<f64>> =
        codewords.columns().into_iter().map(|column| column.iter().map(|c| c.as_f64()).collect()).collect();
    let least = (0..n_codes)
        .into_par_iter()
        .map_init(
            || vec![0.0; n_codes],
            |squares, i| {
                let squares = &mut squares[i + 1..];
                squares.fill(0.0);
                for column in &columns {
                    on_best_simd!(add_squares(column[i], &column[i + 1..], squares));
                }
                squares.iter().copied().fold(f64::INFINITY, f64::min)
            },
        )
        .reduce(|| f64::INFINITY, f64::min);
    least.sqrt()
}

/// `squares_j += (x - column_j)^2`.
#[inline(always)]
fn add_squares(x: f64, column: &[f64], squares: &mut [f64]) {
    for (square, &y) in squares.iter_mut().zip(column) {
        *square += (x - y) * (x - y);
    }
}
