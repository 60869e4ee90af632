//! Vectors of length 1: with keys and codewords on the sphere, the nearest codeword is that at the smallest angle.
//!
//! ```text
//! (1) y = x / max(|x|, 1e-6)
//! (2) |y - c|^2 = 2 - 2 y . c for |y| = |c| = 1, so that argmin |y - c|^2 = argmax y . c
//! (3) d_x = (d_y - y (y . d_y)) / |x|;   where |x| < 1e-6:   d_x = d_y / 1e-6
//! ```
//!
//! Cosine distance is this on both sides of everything else, whatever the codebook learns by: keys go through [`normalize`]
//! before they are assigned and counted, codewords after they are derived; the gradient of the quantizer goes back to keys, or
//! to codewords that learn by it, through [`backward`]. A zero vector stays zero and is as far from every codeword as from any
//! other.
//!
//! Cost: N K. Sums are taken in `f64`.
//!
//! ```
//! use transformer_vq::codebook::{assign, cosine};
//! use transformer_vq::ndarray::array;
//!
//! let (keys, codewords) = (array![[0.0, 10.0], [3.0, 1.0]], array![[0.1, 0.1], [0.0, 0.1], [5.0, 0.0]]);
//! let codes = assign(cosine::normalize(keys.view())?.view(), cosine::normalize(codewords.view())?.view())?;
//! assert_eq!(codes, array![1, 2]);
//! # Ok::<(), transformer_vq::Error>(())
//! ```

use ndarray::{Array, ArrayView, ArrayView1, Dimension, Zip};

use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// Shorter vectors are divided by this.
const LEAST_LENGTH: f64 = 1e-6;

/// (1): each vector along the last axis, at length 1.
///
/// # Shapes
/// `x` of any shape, such as keys [B, H, T, K] or codewords [H, S, K]; the result has the same.
///
/// # Errors
/// [`Error::NotFinite`].
pub fn normalize<T: Scalar, D: Dimension>(x: ArrayView<'_, T, D>) -> Result<Array<T, D>, Error> {
    check_finite("x", x.view())?;
    let mut y = x.to_owned();
    for mut row in y.rows_mut() {
        let (scale, length) = length(row.view());
        row.mapv_inplace(|x| T::from_f64(x.as_f64() * scale / length.max(LEAST_LENGTH)));
    }
    Ok(y)
}

/// (3): the gradient of what was normalized.
///
/// # Shapes
/// `x` and `d_y` of one shape; the gradient of `x` has the same.
///
/// # Errors
/// [`Error::Shape`]; [`Error::NotFinite`].
pub fn backward<T: Scalar, D: Dimension>(
    x: ArrayView<'_, T, D>,
    d_y: ArrayView<'_, T, D>,
) -> Result<Array<T, D>, Error> {
    check_shape("d_y", x.shape(), d_y.shape())?;
    check_finite("x", x.view())?;
    check_finite("d_y", d_y.view())?;
    let mut d_x = d_y.to_owned();
    for (mut d, x) in d_x.rows_mut().into_iter().zip(x.rows()) {
        let (scale, length) = length(x);
        if length < LEAST_LENGTH {
            d.mapv_inplace(|d| T::from_f64(d.as_f64() / LEAST_LENGTH));
            continue;
        }
        let along: f64 = x.iter().zip(&d).map(|(&x, &d)| x.as_f64() * scale / length * d.as_f64()).sum();
        Zip::from(&mut d).and(x).for_each(|d, &x| {
            let y = x.as_f64() * scale / length;
            *d = T::from_f64((d.as_f64() - y * along) / length * scale);
        });
    }
    Ok(d_x)
}

/// A scale, and the length of the row times it: 1, or less where the square of the length would overflow.
fn length<T: Scalar>(row: ArrayView1<'_, T>) -> (f64, f64) {
    let scaled = |scale: f64| row.iter().map(|x| (x.as_f64() * scale).powi(2)).sum::<f64>().sqrt();
    match scaled(1.0) {
        length if length.is_finite() => (1.0, length),
        _ => {
            let scale = 2f64.powi(-600);
            (scale, scaled(scale))
        }
    }
}
