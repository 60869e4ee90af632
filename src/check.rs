//! Checks a hand-written gradient against finite differences.
//!
//! ```text
//! (1) df/dx_i ~ ( f(x - 2h e_i) - 8 f(x - h e_i) + 8 f(x + h e_i) - f(x + 2h e_i) ) / 12h
//! (2) relative RMS = sqrt( sum (got - expected)^2 / sum expected^2 )
//! ```
//! The stencil (1) is of fourth order: its error is about `h^4 |f'''''| / 30` from cutting the series and `1.5 u |f| / h`
//! from rounding (u = 1.1e-16). A function whose values and derivatives are of order 1 is served best by `h` near 1e-3,
//! and its gradient is then known to about 1e-12. A gradient that is right agrees to 1e-8 with room to spare; one with a
//! term wrong by a thousandth does not.
//!
//! Cost: 4 calls of `f` per element of `x`.
//!
//! ```
//! use ndarray::{Array2, ArrayView2, array};
//! use transformer_vq::check::{finite_difference, relative_rms};
//!
//! let x = array![[0.5, -1.0], [2.0, 0.25]];
//! let sum_of_cubes = |x: ArrayView2<f64>| x.iter().map(|x| x * x * x).sum();
//! let by_hand: Array2<f64> = x.mapv(|x| 3.0 * x * x);
//! let expected = finite_difference(sum_of_cubes, &x, 1e-3);
//! assert!(relative_rms(&by_hand, &expected) < 1e-10);
//! assert!(relative_rms(&(by_hand * 1.001), &expected) > 1e-8);
//! ```

use ndarray::{Array, ArrayRef, ArrayView, Dimension};

use crate::Scalar;

/// The gradient of `f` at `x` by central differences of fourth order, formula (1) of the [module](self).
///
/// Makes no check of its own: a `step` of zero, or an `f` that is NaN near `x`, gives NaN, which [`relative_rms`] reports as
/// a failure.
///
/// # Shapes
/// `x` of any shape; the result has the same.
pub fn finite_difference<D: Dimension>(
    mut f: impl FnMut(ArrayView<'_, f64, D>) -> f64,
    x: &ArrayRef<f64, D>,
    step: f64,
) -> Array<f64, D> {
    let mut moved = x.as_standard_layout().into_owned();
    let mut gradient = Array::zeros(x.raw_dim());
    for ((i, slope), &here) in gradient.iter_mut().enumerate().zip(x) {
        let mut f_at = |x_i: f64| {
            moved.as_slice_mut().expect("standard layout")[i] = x_i;
            f(moved.view())
        };
        let near = f_at(here + step) - f_at(here - step);
        let far = f_at(here + 2.0 * step) - f_at(here - 2.0 * step);
        *slope = (8.0 * near - far) / (12.0 * step); // (1)
        moved.as_slice_mut().expect("standard layout")[i] = here;
    }
    gradient
}

/// How far `got` is from `expected`, formula (2) of the [module](self): 0 is equal, 2 is the opposite sign.
///
/// Where `expected` is zero everywhere (or empty), the result is 0 if `got` is too and infinity if it is not. Arrays of
/// different shapes, and a NaN or an infinity in either, give infinity: never NaN, so that `error <= tolerance` can be
/// trusted. Neither large nor small numbers overflow, since both arrays are first divided by the largest expected one.
///
/// # Shapes
/// `got` and `expected`: the same.
pub fn relative_rms<T: Scalar, U: Scalar, D: Dimension>(
    got: &ArrayRef<T, D>,
    expected: &ArrayRef<U, D>,
) -> f64 {
    let pairs = || got.iter().zip(expected).map(|(&got, &expected)| (got.as_f64(), expected.as_f64()));
    if got.shape() != expected.shape() || pairs().any(|(a, b)| !a.is_finite() || !b.is_finite()) {
        return f64::INFINITY;
    }
    let largest = pairs().fold(0.0, |largest: f64, (_, expected)| largest.max(expected.abs()));
    if largest == 0.0 {
        return if pairs().all(|(got, _)| got == 0.0) { 0.0 } else { f64::INFINITY };
    }
    let (difference, size) = pairs().fold((0.0, 0.0), |(difference, size), (got, expected)| {
        let (got, expected) = (got / largest, expected / largest);
        (difference + (got - expected) * (got - expected), size + expected * expected)
    });
    f64::sqrt(difference / size)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array0, Array1, Array2, Array3, ArrayView3, arr0, array};

    use super::*;

    #[test]
    fn relative_rms_is_its_formula() {
        assert_eq!(relative_rms(&array![3.0, 4.0], &array![3.0, 4.0]), 0.0);
        assert_eq!(relative_rms(&array![3.0, 9.0], &array![3.0, 4.0]), 1.0);
        assert_eq!(relative_rms(&array![[0.0, 0.0]], &array![[3.0, 4.0]]), 1.0);
        assert_eq!(relative_rms(&arr0(1.5f32), &arr0(1.0f64)), 0.5);
    }

    #[test]
    fn relative_rms_sees_each_kind_of_wrong() {
        let expected = Array1::from_shape_fn(1000, |i| (i as f64 * 0.7).sin());
        assert_eq!(relative_rms(&-&expected, &expected), 2.0);
        for place in [0, 1, 500, 999] {
            let mut got = expected.clone();
            got[place] += 1e-6;
            let error = relative_rms(&got, &expected);
            assert!((1e-8..1e-7).contains(&error), "{error:e}");
            got[place] -= 2e-6;
            assert!((1e-8..1e-7).contains(&relative_rms(&got, &expected)), "below as well as above");
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                got[place] = bad;
                assert_eq!(relative_rms(&got, &expected), f64::INFINITY);
                assert_eq!(relative_rms(&expected, &got), f64::INFINITY);
                assert_eq!(relative_rms(&got, &got), f64::INFINITY);
            }
        }
    }

    #[test]
    fn relative_rms_where_nothing_is_expected() {
        let zero = Array1::<f64>::zeros(3);
        assert_eq!(relative_rms(&zero, &zero), 0.0);
        assert_eq!(relative_rms(&array![0.0, 1e-300, 0.0], &zero), f64::INFINITY);
        let empty = Array2::<f64>::zeros((0, 3));
        assert_eq!(relative_rms(&empty, &empty), 0.0);
        assert_eq!(relative_rms(&empty, &Array2::<f64>::zeros((3, 0))), f64::INFINITY);
        assert_eq!(relative_rms(&array![1.0, 2.0], &array![1.0]), f64::INFINITY);
    }

    #[test]
    fn relative_rms_of_very_large_and_very_small_numbers() {
        for size in [1e-300, 1e300] {
            let expected = array![3.0 * size, 4.0 * size];
            assert_eq!(relative_rms(&expected, &expected), 0.0);
            assert!((relative_rms(&array![3.0 * size, 9.0 * size], &expected) - 1.0).abs() < 1e-15);
        }
        assert_eq!(relative_rms(&array![1e300], &array![1e-300]), f64::INFINITY);
    }

    #[test]
    fn finite_differences_are_exact_up_to_the_fourth_power() {
        // A large step would show a stencil of second order: its error on x^3 is h^2.
        let x = Array3::from_shape_fn((2, 1, 3), |(i, _, j)| 1.0 + i as f64 - 0.5 * j as f64);
        for power in 0..=4 {
            let f = |x: ArrayView3<'_, f64>| {
                x.indexed_iter().map(|((i, _, _), x)| x.powi(power) * (i + 1) as f64).sum()
            };
            let expected = Array3::from_shape_fn(x.dim(), |(i, j, k)| {
                f64::from(power) * x[[i, j, k]].powi((power - 1).max(0)) * (i + 1) as f64
            });
            let error = &finite_difference(f, &x, 0.5) - &expected;
            assert!(error.iter().all(|error| error.abs() < 1e-13), "power {power}");
        }
    }

    #[test]
    fn finite_differences_of_a_smooth_function_reach_1e_12() {
        let x = Array1::linspace(-1.0, 1.0, 7);
        let got = finite_difference(|x| x.iter().map(|x| x.sin().exp()).sum(), &x, 1e-3);
        let expected = x.mapv(|x| x.cos() * x.sin().exp());
        assert!(relative_rms(&got, &expected) < 1e-11);
    }

    #[test]
    fn finite_differences_leave_the_other_elements_where_they_are() {
        let x = array![[1.0, 2.0], [3.0, 4.0]];
        let mut calls = 0;
        finite_difference(
            |moved| {
                calls += 1;
                assert_eq!(moved.iter().zip(&x).filter(|(a, b)| a != b).count(), 1);
                0.0
            },
            &x,
            0.25,
        );
        assert_eq!(calls, 16);
        assert_eq!(finite_difference(|x| x.sum(), &Array0::zeros(()), 0.5), arr0(1.0));
        assert_eq!(finite_difference(|x| x.sum(), &Array1::zeros(0), 0.5), Array1::<f64>::zeros(0));
        assert_eq!(
            relative_rms(&array![1.0], &finite_difference(|x| x.sum(), &array![1.0], 0.0)),
            f64::INFINITY
        );
    }
}
