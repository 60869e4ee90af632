//! Root-mean-square normalisation: of whole rows with a learned gain and bias, or of each head in a row.
//!
//! A row of x is cut into equal groups of n elements; each is treated by itself.
//! ```text
//! (1) r = 1 / sqrt(mean(x^2) + 1e-6)
//! (2) y = scale x r                      or, with one group,  y = gain x r + bias
//! (3) d_x = scale r (d_y - x r mean(d_y x r))                 with gain: the same of gain d_y, scale 1
//! (4) d_gain = sum over rows of d_y x r,  d_bias = sum over rows of d_y
//! ```
//! Relative error of r x at most (n / 32 + 9) u, u half an epsilon of the type. A group whose squares overflow the type
//! (elements around 1e19 in `f32`) is taken to 0.
//!
//! Cost: one pass forward, one backward, one more for (4); N x groups numbers are saved.
//! Source: Zhang and Sennrich, arXiv 1910.07467.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1};

use super::rows;
use super::simd::on_best_simd;
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// Added to the mean square, so that a row of zeros has a norm.
pub const EPSILON: f64 = 1e-6;

/// What a forward call keeps for its backward call.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    inverse_rms: Array2<T>, // [N, groups]
}

/// y = scale x r for each group of a row, formulas (1) and (2) of the [module](self).
///
/// # Shapes
/// `x` and the result [N, groups * n].
///
/// # Errors
/// `Invalid` if the rows are empty or `groups` does not divide their width.
pub fn forward<T: Scalar>(
    x: ArrayView2<'_, T>,
    groups: usize,
    scale: T,
) -> Result<(Array2<T>, Saved<T>), Error> {
    check_groups(x.ncols(), groups)?;
    let (mut y, mut inverse_rms) = (rows::zeros("y", x.dim())?, rows::zeros("saved", (x.nrows(), groups))?);
    rows::map(x.dim(), [x], [&mut y, &mut inverse_rms], |_, [x], [y, r]| {
        on_best_simd!(forward_row(x, scale, y, r))
    });
    Ok((y, Saved { inverse_rms }))
}

#[inline(always)]
fn forward_row<T: Scalar>(x: &[T], scale: T, y: &mut [T], r: &mut [T]) {
    let n = x.len() / r.len();
    for ((x, y), r) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)).zip(r) {
        *r = inverse_rms(x); // (1)
        let factor = scale * *r;
        for (y, &x) in y.iter_mut().zip(x) {
            *y = factor * x; // (2)
        }
    }
}

/// d_x of [`forward`], formula (3) of the [module](self).
///
/// # Shapes
/// `x`, `d_y` and the result [N, groups * n]; `groups` and `scale` as in the forward call.
///
/// # Errors
/// `Invalid` as [`forward`]; `Shape` if `saved` or `d_y` is not of this `x`.
pub fn backward<T: Scalar>(
    x: ArrayView2<'_, T>,
    saved: &Saved<T>,
    groups: usize,
    scale: T,
    d_y: ArrayView2<'_, T>,
) -> Result<Array2<T>, Error> {
    check_groups(x.ncols(), groups)?;
    check_shape("saved", &[x.nrows(), groups], saved.inverse_rms.shape())?;
    check_shape("d_y", x.shape(), d_y.shape())?;
    let mut d_x = rows::zeros("d_x", x.dim())?;
    rows::map(x.dim(), [x, saved.inverse_rms.view(), d_y], [&mut d_x], |_, [x, r, d_y], [d_x]| {
        on_best_simd!(backward_row(x, r, scale, d_y, d_x))
    });
    Ok(d_x)
}

#[inline(always)]
fn backward_row<T: Scalar>(x: &[T], r: &[T], scale: T, d_y: &[T], d_x: &mut [T]) {
    let n = x.len() / r.len();
    for (((x, &r), d_y), d_x) in
        x.chunks_exact(n).zip(r).zip(d_y.chunks_exact(n)).zip(d_x.chunks_exact_mut(n))
    {
        let mean = rows::dot(d_y, x) * r / T::from_f64(n as f64);
        for ((d_x, &d_y), &x) in d_x.iter_mut().zip(d_y).zip(x) {
            *d_x = scale * r * (d_y - x * r * mean); // (3)
        }
    }
}

/// y = gain x r + bias, formulas (1) and (2) of the [module](self) with one group.
///
/// # Shapes
/// `x` and the result [N, width]; `gain`, `bias` of length width.
///
/// # Errors
/// `Invalid` if the rows are empty; `Shape` if `gain` or `bias` does not have their width.
pub fn forward_affine<T: Scalar>(
    x: ArrayView2<'_, T>,
    gain: ArrayView1<'_, T>,
    bias: ArrayView1<'_, T>,
) -> Result<(Array2<T>, Saved<T>), Error> {
    let mut y = rows::zeros("y", x.dim())?;
    let saved = forward_affine_into(x, gain, bias, &mut y)?;
    Ok((y, saved))
}

/// As [`forward_affine`], into an array in standard layout.
pub(crate) fn forward_affine_into<T: Scalar>(
    x: ArrayView2<'_, T>,
    gain: ArrayView1<'_, T>,
    bias: ArrayView1<'_, T>,
    y: &mut Array2<T>,
) -> Result<Saved<T>, Error> {
    check_groups(x.ncols(), 1)?;
    check_shape("gain", &[x.ncols()], gain.shape())?;
    check_shape("bias", &[x.ncols()], bias.shape())?;
    check_shape("y", x.shape(), y.shape())?;
    let (gain, bias) = (gain.to_vec(), bias.to_vec());
    let mut inverse_rms = rows::zeros("saved", (x.nrows(), 1))?;
    rows::map(x.dim(), [x], [y, &mut inverse_rms], |_, [x], [y, r]| {
        on_best_simd!(forward_affine_row(x, &gain, &bias, y, r))
    });
    Ok(Saved { inverse_rms })
}

#[inline(always)]
fn forward_affine_row<T: Scalar>(x: &[T], gain: &[T], bias: &[T], y: &mut [T], r: &mut [T]) {
    r[0] = inverse_rms(x); // (1)
    let r = r[0];
    for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
        *y = gain * (x * r) + bias; // (2)
    }
}

/// d_x of [`forward_affine`], formula (3) of the [module](self); `d_gain` and `d_bias` are added to, formula (4).
///
/// # Shapes
/// `x`, `d_y` and the result [N, width]; `gain`, `d_gain`, `d_bias` of length width.
///
/// # Errors
/// `Invalid` if the rows are empty; `Shape` if `saved` is not of this `x` or an array does not fit it. Then nothing is added.
pub fn backward_affine<T: Scalar>(
    x: ArrayView2<'_, T>,
    saved: &Saved<T>,
    gain: ArrayView1<'_, T>,
    d_y: ArrayView2<'_, T>,
    d_gain: ArrayViewMut1<'_, T>,
    d_bias: ArrayViewMut1<'_, T>,
) -> Result<Array2<T>, Error> {
    check_groups(x.ncols(), 1)?;
    check_shape("d_y", x.shape(), d_y.shape())?;
    check_memory::<T>("d_x", x.shape())?;
    let mut d_x = d_y.as_standard_layout().into_owned();
    backward_affine_in_place(x, saved, gain, &mut d_x, d_gain, d_bias)?;
    Ok(d_x)
}

/// As [`backward_affine`]: `d` comes as d_y, in standard layout, and leaves as d_x.
pub(crate) fn backward_affine_in_place<T: Scalar>(
    x: ArrayView2<'_, T>,
    saved: &Saved<T>,
    gain: ArrayView1<'_, T>,
    d: &mut Array2<T>,
    d_gain: ArrayViewMut1<'_, T>,
    d_bias: ArrayViewMut1<'_, T>,
) -> Result<(), Error> {
    check_groups(x.ncols(), 1)?;
    check_shape("saved", &[x.nrows(), 1], saved.inverse_rms.shape())?;
    check_shape("gain", &[x.ncols()], gain.shape())?;
    check_shape("d_y", x.shape(), d.shape())?;
    check_shape("d_gain", &[x.ncols()], d_gain.shape())?;
    check_shape("d_bias", &[x.ncols()], d_bias.shape())?;
    let (gain, r) = (gain.to_vec(), saved.inverse_rms.view());
    rows::add_up([x, r, d.view()], [d_gain, d_bias], |[x, r, d_y], [d_gain, d_bias]| {
        on_best_simd!(add_gain_and_bias(x, r[0], d_y, d_gain, d_bias))
    });
    rows::map(x.dim(), [x, r], [d], |_, [x, r], [d]| on_best_simd!(backward_affine_row(x, r[0], &gain, d)));
    Ok(())
}

#[inline(always)]
fn add_gain_and_bias<T: Scalar>(x: &[T], r: T, d_y: &[T], d_gain: &mut [T], d_bias: &mut [T]) {
    for (((&x, &d_y), d_gain), d_bias) in x.iter().zip(d_y).zip(d_gain).zip(d_bias) {
        *d_gain += d_y * (x * r); // (4)
        *d_bias += d_y;
    }
}

#[inline(always)]
fn backward_affine_row<T: Scalar>(x: &[T], r: T, gain: &[T], d: &mut [T]) {
    for (d, &gain) in d.iter_mut().zip(gain) {
        *d *= gain;
    }
    let mean = rows::dot(d, x) * r / T::from_f64(x.len() as f64);
    for (d, &x) in d.iter_mut().zip(x) {
        *d = r * (*d - x * r * mean); // (3)
    }
}

#[inline(always)]
fn inverse_rms<T: Scalar>(x: &[T]) -> T {
    T::one() / (rows::dot(x, x) / T::from_f64(x.len() as f64) + T::from_f64(EPSILON)).sqrt()
}

fn check_groups(width: usize, groups: usize) -> Result<(), Error> {
    if width == 0 {
        return Err(Error::invalid("width of x", "at least 1", 0));
    }
    if groups == 0 || !width.is_multiple_of(groups) {
        return Err(Error::invalid("groups", format!("a divisor of the width {width}"), groups));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Axis, s};

    use super::*;
    use crate::check::relative_rms;

    const CASES: [(usize, usize, usize); 8] =
        [(0, 4, 2), (1, 1, 1), (3, 6, 1), (3, 6, 6), (2, 34, 2), (5, 48, 3), (300, 40, 4), (70, 700, 1)];

    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| ((i * 31 + j * 17 + seed * 7 + 1) as f64).sin())
    }

    /// x r, one group at a time.
    fn naive(x: &Array2<f64>, groups: usize) -> Array2<f64> {
        let n = x.ncols() / groups;
        Array2::from_shape_fn(x.dim(), |(i, j)| {
            let group = x.slice(s![i, j / n * n..(j / n + 1) * n]);
            x[[i, j]] / (group.mapv(|x| x * x).mean().unwrap() + 1e-6).sqrt()
        })
    }

    #[test]
    fn outputs_equal_the_definition() {
        for (rows, width, groups) in CASES {
            let x = numbers((rows, width), 1);
            let (y, _) = forward(x.view(), groups, 0.7).unwrap();
            assert!(relative_rms(&y, &(0.7 * naive(&x, groups))) < 1e-15);
            let (gain, bias) = (numbers((1, width), 2).row(0).to_owned(), numbers((width, 3), 3));
            let (y, _) = forward_affine(x.view(), gain.view(), bias.column(1)).unwrap();
            let expected = naive(&x, 1) * &gain + bias.column(1);
            assert!(relative_rms(&y, &expected) < 1e-15);
        }
    }

    #[test]
    fn forward_keeps_its_stated_bound() {
        for (rows, width, groups) in CASES {
            let x = numbers((rows, width), 4).mapv(|x| x as f32);
            let (y, _) = forward(x.view(), groups, 1.0).unwrap();
            let expected = naive(&x.mapv(f64::from), groups);
            let bound = ((width / groups) as f64 / 32.0 + 9.0) * f64::from(f32::EPSILON) / 2.0;
            for (&y, expected) in y.iter().zip(expected) {
                assert!((f64::from(y) - expected).abs() <= bound * expected.abs());
            }
        }
    }

    #[test]
    fn gradients_of_gain_and_bias_are_sums_and_are_added() {
        for (rows, width, _) in CASES {
            let (x, d_y) = (numbers((rows, width), 5), numbers((rows, width), 6));
            let gain = Array1::ones(width);
            let (_, saved) = forward_affine(x.view(), gain.view(), gain.view()).unwrap();
            let mut d_gain = Array1::from_elem(width, 0.5);
            let mut d_bias_twice = Array2::from_elem((width, 2), 0.25);
            let d_bias = d_bias_twice.column_mut(1);
            backward_affine(x.view(), &saved, gain.view(), d_y.view(), d_gain.view_mut(), d_bias).unwrap();
            assert!(relative_rms(&d_gain, &((&d_y * &naive(&x, 1)).sum_axis(Axis(0)) + 0.5)) < 1e-14);
            assert!(relative_rms(&d_bias_twice.column(1), &(d_y.sum_axis(Axis(0)) + 0.25)) < 1e-14);
            assert!(d_bias_twice.column(0).iter().all(|&d_bias| d_bias == 0.25));
        }
    }

    #[test]
    fn small_and_large_rows_have_finite_gradients() {
        for size in [0.0f32, 1e-30, 1e-3, 1e15, 1e18] {
            let x = numbers((2, 32), 7).mapv(|x| x as f32 * size);
            let d_y = numbers((2, 32), 8);
            let (y, saved) = forward(x.view(), 2, 1.0).unwrap();
            let d_x = backward(x.view(), &saved, 2, 1.0, d_y.mapv(|x| x as f32).view()).unwrap();
            let x = x.mapv(f64::from);
            let (exact_y, saved) = forward(x.view(), 2, 1.0).unwrap();
            let exact = backward(x.view(), &saved, 2, 1.0, d_y.view()).unwrap();
            assert!(relative_rms(&y, &exact_y) < 1e-6 && relative_rms(&d_x, &exact) < 1e-6, "{size:e}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_adds_nothing() {
        let (x, w) = (Array2::<f32>::ones((4, 6)), Array1::<f32>::ones(6));
        let (x, w) = (x.view(), w.view());
        let (_, saved) = forward_affine(x, w, w).unwrap();
        let (_, three) = forward(x, 3, 1.0).unwrap();
        let divisor = |groups| Error::invalid("groups", "a divisor of the width 6", groups);
        let shape = |what, expected: &[usize], got: &[usize]| Error::Shape {
            what,
            expected: expected.to_vec(),
            got: got.to_vec(),
        };
        for groups in [0, 4, 7, 12] {
            assert_eq!(forward(x, groups, 1.0).unwrap_err(), divisor(groups));
            assert_eq!(backward(x, &saved, groups, 1.0, x), Err(divisor(groups)));
        }
        let empty = Error::invalid("width of x", "at least 1", 0);
        let (none, short, few) = (x.slice(s![.., ..0]), w.slice(s![..5]), x.slice(s![..3, ..]));
        assert_eq!(forward(none, 1, 1.0).unwrap_err(), empty);
        assert_eq!(forward_affine(none, w.slice(s![..0]), w.slice(s![..0])).unwrap_err(), empty);
        assert_eq!(forward_affine(x, short, w).unwrap_err(), shape("gain", &[6], &[5]));
        assert_eq!(forward_affine(x, w, short).unwrap_err(), shape("bias", &[6], &[5]));
        assert_eq!(backward(x, &saved, 3, 1.0, x), Err(shape("saved", &[4, 3], &[4, 1])));
        assert_eq!(backward(few, &three, 3, 1.0, few), Err(shape("saved", &[3, 3], &[4, 3])));
        assert_eq!(backward(x, &three, 3, 1.0, few), Err(shape("d_y", &[4, 6], &[3, 6])));

        let mut sums = Array2::<f32>::zeros((2, 7));
        let mut affine = |x, saved, gain, d_y, n_gain: usize, n_bias: usize| {
            let (mut d_gain, mut d_bias) = sums.view_mut().split_at(Axis(0), 1);
            let (d_gain, d_bias) = (d_gain.slice_mut(s![0, ..n_gain]), d_bias.slice_mut(s![0, ..n_bias]));
            backward_affine(x, saved, gain, d_y, d_gain, d_bias).unwrap_err()
        };
        assert_eq!(affine(none, &saved, w, x, 6, 6), empty);
        assert_eq!(affine(x, &three, w, x, 6, 6), shape("saved", &[4, 1], &[4, 3]));
        assert_eq!(affine(x, &saved, short, x, 6, 6), shape("gain", &[6], &[5]));
        assert_eq!(affine(x, &saved, w, few, 6, 6), shape("d_y", &[4, 6], &[3, 6]));
        assert_eq!(affine(x, &saved, w, x, 7, 6), shape("d_gain", &[6], &[7]));
        assert_eq!(affine(x, &saved, w, x, 6, 5), shape("d_bias", &[6], &[5]));
        assert_eq!(sums, Array2::<f32>::zeros((2, 7)));
    }
}
