//! SiLU, and the gate made of it.
//!
//! ```text
//! (1) silu(x) = x s(x),                            s(x) = 1 / (1 + exp(-x))
//! (2) gate: y = o silu(g)
//! (3) silu'(x) = s(x) (1 + x (1 - s(x)))
//! ```
//! Values and derivatives are finite for every finite x. Where exp(-|x|) leaves the range of the type (|x| above 87 in `f32`,
//! 708 in `f64`) it is taken as 0.
//!
//! Cost: one exponential and one division per element.
//! Source: Elfwing, Uchibe and Doya, arXiv 1702.03118.

use ndarray::{Array2, ArrayView2};

use super::rows;
use super::simd::{fused, on_best_simd};
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// y = silu(x), formula (1). Relative error at most 7e-7 (`f32`) or 2e-15 (`f64`) for x above -87 (-708).
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
        *y = silu(fused, x); // (1)
    }
}

/// d_x = d_y silu'(x), formula (3).
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
    for (&x, d) in x.iter().zip(d) {
        *d *= derivative(fused, x); // (3)
    }
}

/// y = o silu(g), formula (2).
///
/// # Shapes
/// `o`, `g` [N, width]; the result has the same.
///
/// # Errors
/// `Shape` if `g` is not shaped as `o`.
pub fn gate<T: Scalar>(o: ArrayView2<'_, T>, g: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
    check_shape("g", o.shape(), g.shape())?;
    let mut y = rows::zeros("y", o.dim())?;
    gate_into(o, g, &mut y);
    Ok(y)
}

/// As [`gate`], on shapes that fit, into an array in standard layout.
pub(crate) fn gate_into<T: Scalar>(o: ArrayView2<'_, T>, g: ArrayView2<'_, T>, y: &mut Array2<T>) {
    rows::map(o.dim(), [o, g], [y], |_, [o, g], [y]| on_best_simd!(simd => gate_row(fused(simd), o, g, y)));
}

#[inline(always)]
fn gate_row<T: Scalar>(fused: bool, o: &[T], g: &[T], y: &mut [T]) {
    for ((&o, &g), y) in o.iter().zip(g).zip(y) {
        *y = o * silu(fused, g); // (2)
    }
}

/// (d_o, d_g) = (d_y silu(g), d_y o silu'(g)).
///
/// # Shapes
/// `o`, `g`, `d_y` [N, width]; both results have the same.
///
/// # Errors
/// `Shape` if `g` or `d_y` is not shaped as `o`.
pub fn gate_backward<T: Scalar>(
    o: ArrayView2<'_, T>,
    g: ArrayView2<'_, T>,
    d_y: ArrayView2<'_, T>,
) -> Result<(Array2<T>, Array2<T>), Error> {
    check_shape("g", o.shape(), g.shape())?;
    check_shape("d_y", o.shape(), d_y.shape())?;
    let mut d_o = rows::zeros("d_o", o.dim())?;
    let mut d_g = d_y.as_standard_layout().into_owned();
    gate_backward_in_place(o, g, &mut d_g, &mut d_o);
    Ok((d_o, d_g))
}

/// As [`gate_backward`], on shapes that fit, arrays in standard layout: `d` comes as d_y and leaves as d_g.
pub(crate) fn gate_backward_in_place<T: Scalar>(
    o: ArrayView2<'_, T>,
    g: ArrayView2<'_, T>,
    d: &mut Array2<T>,
    d_o: &mut Array2<T>,
) {
    rows::map(
        o.dim(),
        [o, g],
        [d, d_o],
        |_, [o, g], [d, d_o]| on_best_simd!(simd => gate_backward_row(fused(simd), o, g, d, d_o)),
    );
}

#[inline(always)]
fn gate_backward_row<T: Scalar>(fused: bool, o: &[T], g: &[T], d: &mut [T], d_o: &mut [T]) {
    for (((&o, &g), d), d_o) in o.iter().zip(g).zip(d).zip(d_o) {
        let d_y = *d;
        *d_o = d_y * silu(fused, g); // (2)
        *d = d_y * o * derivative(fused, g); // (3)
    }
}

#[inline(always)]
fn silu<T: Scalar>(fused: bool, x: T) -> T {
    x * sigmoid(fused, x).0
}

#[inline(always)]
fn derivative<T: Scalar>(fused: bool, x: T) -> T {
    let (s, rest) = sigmoid(fused, x);
    s * (T::one() + x * rest)
}

/// s(x) and 1 - s(x), each to full relative precision: the exponent is never positive, and nothing is subtracted.
#[inline(always)]
pub(super) fn sigmoid<T: Scalar>(fused: bool, x: T) -> (T, T) {
    let e = (-x.abs()).exp_fast(fused);
    let large = T::one() / (T::one() + e);
    let small = e * large;
    if x < T::zero() { (small, large) } else { (large, small) }
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::check::relative_rms;

    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| 6.0 * ((i * 31 + j * 17 + seed * 7 + 1) as f64).sin())
    }

    fn naive_silu(x: f64) -> f64 {
        x / (1.0 + (-x).exp())
    }

    fn naive_derivative(x: f64) -> f64 {
        let s = 1.0 / (1.0 + (-x).exp());
        s + x * s * (1.0 - s)
    }

    #[test]
    fn each_form_equals_its_definition() {
        for dim in [(0, 0), (0, 3), (3, 0), (1, 1), (2, 15), (5, 16), (3, 33), (300, 130)] {
            let [o, g, d_y] = [1, 2, 3].map(|seed| numbers(dim, seed));
            let silu_g = g.mapv(naive_silu);
            let slope = g.mapv(naive_derivative);
            assert!(relative_rms(&forward(g.view()).unwrap(), &silu_g) < 1e-15);
            assert!(relative_rms(&backward(g.view(), d_y.view()).unwrap(), &(&d_y * &slope)) < 1e-15);
            assert!(relative_rms(&gate(o.view(), g.view()).unwrap(), &(&o * &silu_g)) < 1e-15);
            let (d_o, d_g) = gate_backward(o.view(), g.view(), d_y.view()).unwrap();
            assert!(relative_rms(&d_o, &(&d_y * &silu_g)) < 1e-15);
            assert!(relative_rms(&d_g, &(&d_y * &o * &slope)) < 1e-15);
        }
    }

    #[test]
    fn strides_do_not_matter() {
        let wide = numbers((40, 80), 4);
        let o = wide.slice(s![..;2, ..20]);
        let g = wide.slice(s![..20, 30..50]).reversed_axes();
        let d_y = wide.slice(s![10..30, 60..80;-1]);
        let owned = gate_backward(o.to_owned().view(), g.to_owned().view(), d_y.to_owned().view());
        assert_eq!(gate_backward(o, g, d_y), owned);
    }

    #[test]
    fn forward_keeps_its_stated_bound() {
        let points = || (0..=100_000).map(|i| f64::from(i) / 1e5);
        let worst = points().fold(0.0, |worst: f64, t| {
            let x = (-87.0 + 187.0 * t) as f32;
            let y = forward(ndarray::arr2(&[[x]]).view()).unwrap()[[0, 0]];
            let expected = naive_silu(x.into());
            worst.max(if x == 0.0 { f64::from(y).abs() } else { (f64::from(y) / expected - 1.0).abs() })
        });
        assert!(worst < 7e-7, "f32: {worst:e}");
        let worst = points().fold(0.0, |worst: f64, t| {
            let x = -708.0 + 1400.0 * t;
            let y = forward(ndarray::arr2(&[[x]]).view()).unwrap()[[0, 0]];
            worst.max(if x == 0.0 { y.abs() } else { (y / naive_silu(x) - 1.0).abs() })
        });
        assert!(worst < 2e-15, "f64: {worst:e}");
    }

    #[test]
    fn extreme_numbers() {
        let x = ndarray::arr2(&[[-f32::MAX, -1e3, -0.0, 0.0, 1e3, f32::MAX, f32::NAN]]);
        let one = Array2::ones(x.dim());
        let y = forward(x.view()).unwrap();
        let d_x = backward(x.view(), one.view()).unwrap();
        assert_eq!(y.slice(s![0, ..6]), ndarray::arr1(&[0.0, 0.0, 0.0, 0.0, 1e3, f32::MAX]));
        assert_eq!(d_x.slice(s![0, ..6]), ndarray::arr1(&[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]));
        assert!(y[[0, 6]].is_nan() && d_x[[0, 6]].is_nan());
    }

    #[test]
    fn shapes_are_checked() {
        let (x, other) = (Array2::<f32>::zeros((2, 3)), Array2::<f32>::zeros((3, 2)));
        let wrong = |what| Error::Shape { what, expected: vec![2, 3], got: vec![3, 2] };
        assert_eq!(backward(x.view(), other.view()), Err(wrong("d_y")));
        assert_eq!(gate(x.view(), other.view()), Err(wrong("g")));
        assert_eq!(gate_backward(x.view(), other.view(), x.view()), Err(wrong("g")));
        assert_eq!(gate_backward(x.view(), x.view(), other.view()), Err(wrong("d_y")));
    }
}
