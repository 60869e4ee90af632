//! GELU in its form with tanh, written with the logistic function.
//!
//! ```text
//! (1) gelu(x) = x s(z),   z = 2 sqrt(2 / pi) (x + 0.044715 x^3),   s(z) = 1 / (1 + exp(-z)) = (1 + tanh(z / 2)) / 2
//! (2) gelu'(x) = s(z) + x s(z) (1 - s(z)) z',   z' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
//! ```
//! The form with erf, x Phi(x), is another function: the two differ by at most 4.8e-4, near |x| = 2.3 and 0.7. This one costs one
//! exponential and is as precise as that.
//!
//! Values and derivatives are finite for every finite x. Beyond |x| = 16, where the derivative is 0 or 1 to 130 digits, (2) is
//! taken at 16.
//!
//! Cost: one exponential and one division per element.
//! Source: Hendrycks and Gimpel, arXiv 1606.08415.

use ndarray::{Array2, ArrayView2};

use super::rows;
use super::silu::sigmoid;
use super::simd::{fused, on_best_simd};
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// y = gelu(x), formula (1). Absolute error at most 4 epsilon |x|.
///
/// # Shapes
/// `x` [N, width]; the result has the same.
///
/// # Errors
/// `TooLarge` for a broadcast view that no array could hold.
pub fn forward<T: Scalar>(x: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
    let mut y = rows::zeros("y", x.dim())?;
    forward_into(x, &mut y);
    Ok(y)
}

/// As [`forward`], on shapes that fit, into an array in standard layout.
pub(crate) fn forward_into<T: Scalar>(x: ArrayView2<'_, T>, y: &mut Array2<T>) {
    rows::map(x.dim(), [x], [y], |_, [x], [y]| on_best_simd!(simd => forward_row(fused(simd), x, y)));
}

#[inline(always)]
fn forward_row<T: Scalar>(fused: bool, x: &[T], y: &mut [T]) {
    for (&x, y) in x.iter().zip(y) {
        *y = x * sigmoid(fused, argument(x)).0; // (1)
    }
}

/// d_x = d_y gelu'(x), formula (2).
///
/// # Shapes
/// `x`, `d_y` [N, width]; the result has the same.
///
/// # Errors
/// `Shape` if `d_y` is not shaped as `x`.
pub fn backward<T: Scalar>(x: ArrayView2<'_, T>, d_y: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
    check_shape("d_y", x.shape(), d_y.shape())?;
    check_memory::<T>("d_x", x.shape())?;
    let mut d_x = d_y.as_standard_layout().into_owned();
    backward_in_place(x, &mut d_x);
    Ok(d_x)
}

/// As [`backward`], on shapes that fit: `d` comes as d_y, in standard layout, and leaves as d_x.
pub(crate) fn backward_in_place<T: Scalar>(x: ArrayView2<'_, T>, d: &mut Array2<T>) {
    rows::map(x.dim(), [x], [d], |_, [x], [d]| on_best_simd!(simd => backward_row(fused(simd), x, d)));
}

#[inline(always)]
fn backward_row<T: Scalar>(fused: bool, x: &[T], d: &mut [T]) {
    let end = T::from_f64(16.0);
    for (&x, d) in x.iter().zip(d) {
        let x = if x > end { end } else { x };
        let x = if x < -end { -end } else { x };
        let (s, rest) = sigmoid(fused, argument(x));
        let slope = T::from_f64(SCALE) + T::from_f64(3.0 * SCALE * CUBIC) * x * x;
        *d *= s + x * s * rest * slope; // (2)
    }
}

/// 2 sqrt(2 / pi).
const SCALE: f64 = 2.0 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044_715;

/// z of (1).
#[inline(always)]
fn argument<T: Scalar>(x: T) -> T {
    x * (T::from_f64(SCALE) + T::from_f64(SCALE * CUBIC) * x * x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{finite_difference, relative_rms};

    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| 6.0 * ((i * 31 + j * 17 + seed * 7 + 1) as f64).sin())
    }

    /// As it is usually written.
    fn naive(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
    }

    #[test]
    fn forward_and_backward_equal_the_definition() {
        for dim in [(0, 0), (0, 3), (3, 0), (1, 1), (2, 15), (5, 16), (3, 33), (300, 130)] {
            let (x, d_y) = (numbers(dim, 1), numbers(dim, 2));
            assert!(relative_rms(&forward(x.view()).unwrap(), &x.mapv(naive)) < 1e-15);
            let got = backward(x.view(), d_y.view()).unwrap();
            let f = |x: ArrayView2<'_, f64>| (&x.mapv(naive) * &d_y).sum();
            if dim.0 * dim.1 < 100 {
                assert!(relative_rms(&got, &finite_difference(f, &x, 1e-3)) < 1e-10);
            }
        }
    }

    #[test]
    fn forward_keeps_its_stated_bound() {
        for i in 0..=100_000 {
            let x = -30.0 + 60.0 * f64::from(i) / 1e5;
            let error = (forward(ndarray::arr2(&[[x]]).view()).unwrap()[[0, 0]] - naive(x)).abs();
            // tanh itself is right to an epsilon.
            assert!(error <= 5.0 * f64::EPSILON * x.abs(), "{x}: {error:e}");
            let single = x as f32;
            let y = forward(ndarray::arr2(&[[single]]).view()).unwrap()[[0, 0]];
            let error = (f64::from(y) - naive(single.into())).abs();
            assert!(error <= 4.0 * f64::from(f32::EPSILON) * x.abs(), "{x}: {error:e}");
        }
    }

    #[test]
    fn the_form_with_erf_is_near() {
        // x Phi(x), Phi as the integral of its density by Simpson's rule.
        let density = |x: f64| (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
        let (mut phi, mut worst) = (0.5, 0.0_f64);
        for i in 0..6000 {
            let (a, b) = (f64::from(i) / 1e3, f64::from(i + 1) / 1e3);
            phi += (density(a) + 4.0 * density((a + b) / 2.0) + density(b)) / 6e3;
            // At -b both are b less.
            worst = worst.max((b * phi - naive(b)).abs());
        }
        assert!((4.0e-4..4.8e-4).contains(&worst), "{worst:e}");
    }

    #[test]
    fn extreme_numbers() {
        let x = ndarray::arr2(&[[-f32::MAX, -1e3, -0.0, 0.0, 1e3, f32::MAX, f32::NAN]]);
        let y = forward(x.view()).unwrap();
        let d_x = backward(x.view(), Array2::ones(x.dim()).view()).unwrap();
        assert_eq!(y.slice(ndarray::s![0, ..6]), ndarray::arr1(&[0.0, 0.0, 0.0, 0.0, 1e3, f32::MAX]));
        assert_eq!(d_x.slice(ndarray::s![0, ..6]), ndarray::arr1(&[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]));
        assert!(y[[0, 6]].is_nan() && d_x[[0, 6]].is_nan());
        let x = ndarray::arr2(&[[-f64::MAX, -1e200, 1e200, f64::MAX]]);
        assert_eq!(forward(x.view()).unwrap(), ndarray::arr2(&[[0.0, 0.0, 1e200, f64::MAX]]));
        let d_x = backward(x.view(), Array2::ones(x.dim()).view()).unwrap();
        assert!((&d_x - &ndarray::arr2(&[[0.0, 0.0, 1.0, 1.0]])).iter().all(|x| x.abs() < 1e-100));
    }

    #[test]
    fn shapes_are_checked() {
        let (x, other) = (Array2::<f32>::zeros((2, 3)), Array2::<f32>::zeros((3, 2)));
        let wrong = Error::Shape { what: "d_y", expected: vec![2, 3], got: vec![3, 2] };
        assert_eq!(backward(x.view(), other.view()), Err(wrong));
    }
}
