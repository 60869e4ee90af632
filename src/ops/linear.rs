//! A linear map of every row.
//!
//! ```text
//! (1) y = x w + bias
//! (2) d_x = d_y w^T     d_w = x^T d_y     d_bias = sum over rows of d_y
//! ```
//! `w` may be any view: tied weights pass the transposed embedding table, and its transposed gradient as `d_w`.
//!
//! Cost: 2 N in out operations forward, twice that backward; `x` is all that backward needs.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use super::{parallel, rows};
use crate::error::check_shape;
use crate::{Error, Scalar};

/// y = x w + bias, formula (1).
///
/// # Shapes
/// `x` [N, in], `w` [in, out], `bias` of length out; the result [N, out].
///
/// # Errors
/// `Shape` if `w` or `bias` does not fit; `TooLarge` if the result cannot exist.
pub fn forward<T: Scalar>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    bias: Option<ArrayView1<'_, T>>,
) -> Result<Array2<T>, Error> {
    check_shape("w", &[x.ncols(), w.ncols()], w.shape())?;
    let mut y = rows::zeros("y", (x.nrows(), w.ncols()))?;
    let Some(bias) = bias else {
        forward_into(x, w, &mut y);
        return Ok(y);
    };
    check_shape("bias", &[w.ncols()], bias.shape())?;
    rows::map(y.dim(), [], [&mut y], |_, [], [y]| bias.iter().zip(y).for_each(|(&bias, y)| *y = bias));
    parallel::add_product(x, w, y.view_mut()); // (1)
    Ok(y)
}

/// As [`forward`] without a bias, on shapes that fit, into an array whose numbers do not matter.
pub(crate) fn forward_into<T: Scalar>(x: ArrayView2<'_, T>, w: ArrayView2<'_, T>, y: &mut Array2<T>) {
    parallel::product_into(x, w, y.view_mut()); // (1)
}

/// d_x of [`forward`]; `d_w` and `d_bias` are added to. Formula (2).
///
/// # Shapes
/// `x` and the result [N, in], `w` and `d_w` [in, out], `d_y` [N, out], `d_bias` of length out.
///
/// # Errors
/// `Shape` if an array does not fit `x` and `w`; then nothing is added.
pub fn backward<T: Scalar>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    d_y: ArrayView2<'_, T>,
    d_w: ArrayViewMut2<'_, T>,
    d_bias: Option<ArrayViewMut1<'_, T>>,
) -> Result<Array2<T>, Error> {
    let mut d_x = rows::zeros("d_x", x.dim())?;
    backward_into(x, w, d_y, d_w, d_bias, &mut d_x)?;
    Ok(d_x)
}

/// As [`backward`], into an array `d_x` whose numbers do not matter.
pub(crate) fn backward_into<T: Scalar>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    d_y: ArrayView2<'_, T>,
    d_w: ArrayViewMut2<'_, T>,
    d_bias: Option<ArrayViewMut1<'_, T>>,
    d_x: &mut Array2<T>,
) -> Result<(), Error> {
    check_shape("d_x", x.shape(), d_x.shape())?;
    backward_weights(x, w, d_y, d_w, d_bias)?;
    parallel::product_into(d_y, w.t(), d_x.view_mut());
    Ok(())
}

/// As [`backward`], with `d_x` added to as well: for an `x` that feeds several maps.
///
/// # Shapes
/// `x` and `d_x` [N, in], `w` and `d_w` [in, out], `d_y` [N, out], `d_bias` of length out.
///
/// # Errors
/// `Shape` if an array does not fit `x` and `w`; then nothing is added.
pub fn add_backward<T: Scalar>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    d_y: ArrayView2<'_, T>,
    d_w: ArrayViewMut2<'_, T>,
    d_bias: Option<ArrayViewMut1<'_, T>>,
    d_x: ArrayViewMut2<'_, T>,
) -> Result<(), Error> {
    check_shape("d_x", x.shape(), d_x.shape())?;
    backward_weights(x, w, d_y, d_w, d_bias)?;
    parallel::add_product(d_y, w.t(), d_x);
    Ok(())
}

/// (2) but for d_x.
fn backward_weights<T: Scalar>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    d_y: ArrayView2<'_, T>,
    d_w: ArrayViewMut2<'_, T>,
    d_bias: Option<ArrayViewMut1<'_, T>>,
) -> Result<(), Error> {
    check_shape("w", &[x.ncols(), w.ncols()], w.shape())?;
    check_shape("d_y", &[x.nrows(), w.ncols()], d_y.shape())?;
    check_shape("d_w", w.shape(), d_w.shape())?;
    if let Some(d_bias) = d_bias {
        check_shape("d_bias", &[w.ncols()], d_bias.shape())?;
        rows::add_up([d_y], [d_bias], |[d_y], [d_bias]| {
            d_bias.iter_mut().zip(d_y).for_each(|(d_bias, &d_y)| *d_bias += d_y);
        });
    }
    parallel::add_product(x.t(), d_y, d_w);
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Axis, s};

    use super::*;

    /// Small integers: every sum is exact, in any order.
    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| ((i * 31 + j * 17 + seed * 7) % 23) as f64 - 11.0)
    }

    fn naive_product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            a.row(i).iter().zip(b.column(j)).map(|(a, b)| a * b).sum()
        })
    }

    #[test]
    fn each_form_equals_its_definition() {
        for (n, inputs, outputs) in
            [(0, 3, 2), (1, 1, 1), (2, 0, 3), (2, 3, 0), (5, 7, 3), (40, 20, 33), (300, 9, 150)]
        {
            let (x, table, d_y) =
                (numbers((n, inputs), 1), numbers((outputs, inputs), 2), numbers((n, outputs), 3));
            let bias = numbers((outputs, 2), 4);
            let bias = bias.column(1);
            let w = table.t().as_standard_layout().into_owned();
            let y = naive_product(x.view(), w.view());
            let (mut d_w, mut d_table) = (numbers(w.dim(), 5), numbers(table.dim(), 5));
            let d_w_expected = &d_w + &naive_product(x.t(), d_y.view());
            let d_table_expected = &d_table + &naive_product(d_y.t(), x.view());
            let d_x = naive_product(d_y.view(), w.t());
            for (w, mut d_w) in [(w.view(), d_w.view_mut()), (table.t(), d_table.view_mut().reversed_axes())]
            {
                let mut d_bias = Array1::from_elem(outputs, 0.5);
                assert_eq!(forward(x.view(), w, None).unwrap(), y);
                assert_eq!(forward(x.view(), w, Some(bias)).unwrap(), &y + &bias);
                let before = d_w.to_owned();
                let got = backward(x.view(), w, d_y.view(), d_w.view_mut(), None).unwrap();
                assert_eq!(got, d_x);
                let mut got = numbers(x.dim(), 6);
                let expected = &got + &d_x;
                d_w.assign(&before);
                add_backward(x.view(), w, d_y.view(), d_w, Some(d_bias.view_mut()), got.view_mut()).unwrap();
                assert_eq!(got, expected);
                assert_eq!(d_bias, d_y.sum_axis(Axis(0)) + 0.5);
            }
            assert_eq!(d_w, d_w_expected);
            assert_eq!(d_table, d_table_expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_adds_nothing() {
        let shape = |what, expected: &[usize], got: &[usize]| Error::Shape {
            what,
            expected: expected.to_vec(),
            got: got.to_vec(),
        };
        let (x, w, d_y) = (Array2::<f32>::ones((4, 3)), Array2::ones((3, 2)), Array2::ones((4, 2)));
        let (x, w, d_y) = (x.view(), w.view(), d_y.view());
        let bias = Array1::ones(3);
        assert_eq!(forward(x, w.slice(s![..2, ..]), None), Err(shape("w", &[3, 2], &[2, 2])));
        assert_eq!(forward(x, w, Some(bias.view())), Err(shape("bias", &[2], &[3])));
        let long = Array1::<f32>::ones(1);
        let (tall, wide) = (long.broadcast((1 << 40, 1)).unwrap(), long.broadcast((1, 1 << 40)).unwrap());
        let too_large = Error::TooLarge { what: "y", shape: vec![1 << 40, 1 << 40] };
        assert_eq!(forward(tall, wide, None), Err(too_large));

        let mut d_w = Array2::zeros((3, 2));
        let (mut d_bias, mut d_x) = (Array1::zeros(3), Array2::zeros((4, 3)));
        let mut try_with = |w, d_y, d_w_rows: usize, d_bias_len: usize, d_x_rows: usize| {
            let d_bias = Some(d_bias.slice_mut(s![..d_bias_len]));
            let d_w = d_w.slice_mut(s![..d_w_rows, ..]);
            add_backward(x, w, d_y, d_w, d_bias, d_x.slice_mut(s![..d_x_rows, ..])).unwrap_err()
        };
        assert_eq!(try_with(w.slice(s![..2, ..]), d_y, 3, 2, 4), shape("w", &[3, 2], &[2, 2]));
        assert_eq!(try_with(w, d_y.slice(s![..3, ..]), 3, 2, 4), shape("d_y", &[4, 2], &[3, 2]));
        assert_eq!(try_with(w, d_y, 2, 2, 4), shape("d_w", &[3, 2], &[2, 2]));
        assert_eq!(try_with(w, d_y, 3, 3, 4), shape("d_bias", &[2], &[3]));
        assert_eq!(try_with(w, d_y, 3, 2, 3), shape("d_x", &[4, 3], &[3, 3]));
        assert_eq!((d_w.sum(), d_bias.sum(), d_x.sum()), (0.0, 0.0, 0.0));
        let mut d_w = Array2::zeros((2, 2));
        assert_eq!(backward(x, w, d_y, d_w.view_mut(), None), Err(shape("d_w", &[3, 2], &[2, 2])));
    }
}
