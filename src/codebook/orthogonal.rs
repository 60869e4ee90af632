//! A loss that keeps the directions of codewords apart.
//!
//! ```text
//! (1) y_s = c_s / |c_s|,   loss = sum_h sum_{i /= j} (y_i . y_j)^2 / S^2
//! (2) d_y_i = (4 / S^2) sum_{j /= i} (y_i . y_j) y_j,   d_c_i from d_y_i as in cosine
//! ```
//!
//! It is 0 where codewords are orthogonal, which at most K of them can be; with more codes it still spreads their directions.
//! Lengths do not matter. It is of use to codewords that learn by gradient; moving averages would overwrite what it does.
//!
//! Cost: H S^2 K for the loss, twice that with the gradient. The same value as `|Y Y^T - I|^2 / S^2` (Shin et al., 2021), for
//! codewords that are not zero.

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::cosine;
use crate::ops::finite::check_finite;
use crate::ops::matmul::product;
use crate::{Error, Scalar};

/// Codewords of one task: a block of this many rows of the products of all pairs.
const BLOCK: usize = 64;

/// (1).
///
/// # Shapes
/// `codewords` [H, S, K].
///
/// # Errors
/// [`Error::NotFinite`].
pub fn loss<T: Scalar>(codewords: ArrayView3<'_, T>) -> Result<f64, Error> {
    check_finite("codewords", codewords)?;
    let units = cosine::normalize(codewords)?;
    let of_head = |units: ArrayView2<'_, T>| -> f64 {
        let n_blocks = units.nrows().div_ceil(BLOCK);
        let sums: Vec<f64> =
            (0..n_blocks).into_par_iter().map(|i| sum_of_squares(&products(units, i))).collect();
        sums.iter().sum::<f64>() / pairs(units)
    };
    Ok(units.outer_iter().map(of_head).sum())
}

/// (1), and the gradient (2) of `weight` times it.
///
/// # Shapes
/// `codewords` [H, S, K], their gradient [H, S, K].
///
/// # Errors
/// [`Error::NotFinite`], and [`Error::Invalid`] for a weight that is not finite.
pub fn loss_and_gradient<T: Scalar>(
    codewords: ArrayView3<'_, T>,
    weight: f64,
) -> Result<(f64, Array3<T>), Error> {
    if !weight.is_finite() {
        return Err(Error::invalid("weight", "finite", weight));
    }
    check_finite("codewords", codewords)?;
    let units = cosine::normalize(codewords)?;
    let mut d_units = Array3::zeros(units.dim());
    let of_head = |(units, mut d_units): (ArrayView2<'_, T>, ArrayViewMut2<'_, T>)| {
        let scale = T::from_f64(4.0 * weight / pairs(units));
        let blocks = d_units.axis_chunks_iter_mut(Axis(0), BLOCK).into_par_iter().enumerate();
        let sums: Vec<f64> = blocks
            .map(|(i, mut d_block)| {
                let products = products(units, i);
                product(products.view(), units, d_block.view_mut()); // [b, K]
                d_block *= scale;
                sum_of_squares(&products)
            })
            .collect();
        sums.iter().sum::<f64>() / pairs(units)
    };
    let loss = units.outer_iter().zip(d_units.outer_iter_mut()).map(of_head).sum();
    Ok((loss, cosine::backward(codewords, d_units.view())?))
}

/// S^2, by which (1) divides; 1 without codewords, whose loss is 0.
fn pairs<T>(units: ArrayView2<'_, T>) -> f64 {
    (units.nrows().max(1) as f64).powi(2)
}

/// `y_i . y_j` of the i of one block and all j [b, S]; 0 where i = j.
fn products<T: Scalar>(units: ArrayView2<'_, T>, block: usize) -> Array2<T> {
    let first = block * BLOCK;
    let rows = units.slice(s![first..units.nrows().min(first + BLOCK), ..]);
    let mut products = Array2::zeros((rows.nrows(), units.nrows()));
    product(rows, units.t(), products.view_mut());
    products.slice_mut(s![.., first..]).diag_mut().fill(T::zero());
    products
}

fn sum_of_squares<T: Scalar>(x: &Array2<T>) -> f64 {
    x.iter().map(|x| x.as_f64() * x.as_f64()).sum()
}
