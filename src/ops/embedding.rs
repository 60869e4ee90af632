//! Rows of a table, looked up by token.
//!
//! ```text
//! (1) y_i = table_{token i}
//! (2) d_table_s = sum over i with token i = s of d_y_i,   in the order of i
//! ```
//! Cost: N D numbers moved, either way; backward does not touch the rows of tokens that do not occur.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::rows;
use crate::error::check_shape;
use crate::{Error, Scalar};

/// y_i = table_{token i}, formula (1).
///
/// # Shapes
/// `table` [vocab, D], `tokens` of length N; the result [N, D].
///
/// # Errors
/// `OutOfRange` if a token is not below vocab; `TooLarge` if the result cannot exist.
pub fn forward<T: Scalar>(table: ArrayView2<'_, T>, tokens: ArrayView1<'_, u32>) -> Result<Array2<T>, Error> {
    check_tokens(tokens, table.nrows())?;
    let mut y = rows::zeros("y", (tokens.len(), table.ncols()))?;
    forward_into(table, tokens, &mut y)?;
    Ok(y)
}

/// As [`forward`], into an array in standard layout.
pub(crate) fn forward_into<T: Scalar>(
    table: ArrayView2<'_, T>,
    tokens: ArrayView1<'_, u32>,
    y: &mut Array2<T>,
) -> Result<(), Error> {
    check_tokens(tokens, table.nrows())?;
    check_shape("y", &[tokens.len(), table.ncols()], y.shape())?;
    rows::map(y.dim(), [], [y], |i, [], [y]| {
        ArrayViewMut1::from(y).assign(&table.row(tokens[i] as usize)); // (1)
    });
    Ok(())
}

/// Adds d_y to the rows of `d_table` that [`forward`] looked up, formula (2).
///
/// # Shapes
/// `tokens` of length N, `d_y` [N, D], `d_table` [vocab, D].
///
/// # Errors
/// `Shape` if `d_y` does not fit, `OutOfRange` if a token is not below vocab; then nothing is added.
pub fn backward<T: Scalar>(
    tokens: ArrayView1<'_, u32>,
    d_y: ArrayView2<'_, T>,
    mut d_table: ArrayViewMut2<'_, T>,
) -> Result<(), Error> {
    check_tokens(tokens, d_table.nrows())?;
    check_shape("d_y", &[tokens.len(), d_table.ncols()], d_y.shape())?;
    // Tasks own columns, not rows: each walks all tokens in order, whatever they are.
    let columns = (rows::ELEMENTS_PER_TASK / tokens.len().max(1)).max(64);
    (d_table.axis_chunks_iter_mut(Axis(1), columns), d_y.axis_chunks_iter(Axis(1), columns))
        .into_par_iter()
        .for_each(|(mut d_table, d_y)| {
            for (&token, d_y) in tokens.iter().zip(d_y.outer_iter()) {
                let mut row = d_table.row_mut(token as usize);
                row += &d_y; // (2)
            }
        });
    Ok(())
}

fn check_tokens(tokens: ArrayView1<'_, u32>, vocab: usize) -> Result<(), Error> {
    match tokens.iter().position(|&token| token as usize >= vocab) {
        None => Ok(()),
        Some(i) => {
            Err(Error::OutOfRange { what: "tokens", index: vec![i], got: tokens[i].into(), limit: vocab })
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, s};

    use super::*;

    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f32> {
        Array2::from_shape_fn(dim, |(i, j)| ((i * 31 + j * 17 + seed * 7 + 1) as f32).sin())
    }

    #[test]
    fn both_ways_equal_the_definition_bit_for_bit() {
        for (vocab, n, width) in [(1, 0, 3), (1, 1, 1), (3, 5, 0), (7, 40, 6), (5, 700, 200)] {
            let twice = Array1::from_shape_fn(2 * n, |i| (i * i % 11 % vocab) as u32);
            let tokens = twice.slice(s![..;2]);
            for transposed in [false, true] {
                let mut table = numbers((vocab, width), 1);
                if transposed {
                    table = table.reversed_axes().as_standard_layout().into_owned().reversed_axes();
                }
                let y = forward(table.view(), tokens).unwrap();
                assert_eq!(y, Array2::from_shape_fn((n, width), |(i, j)| table[[tokens[i] as usize, j]]));
                let d_y = numbers((n, width), 2);
                let mut expected = table.clone();
                for (i, &token) in tokens.iter().enumerate() {
                    for j in 0..width {
                        expected[[token as usize, j]] += d_y[[i, j]];
                    }
                }
                backward(tokens, d_y.view(), table.view_mut()).unwrap();
                assert_eq!(table, expected);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_adds_nothing() {
        let mut table = Array2::<f32>::zeros((3, 2));
        let ones = Array2::ones((4, 2));
        for (tokens, i) in [([3, 0, 0, 9], 0), ([0, 2, 1, u32::MAX], 3)] {
            let tokens = Array1::from_iter(tokens);
            let error = Error::OutOfRange { what: "tokens", index: vec![i], got: tokens[i].into(), limit: 3 };
            assert_eq!(forward(table.view(), tokens.view()), Err(error.clone()));
            assert_eq!(backward(tokens.view(), ones.view(), table.view_mut()), Err(error));
        }
        let tokens = Array1::from_iter([0, 1, 2]);
        let error = Error::Shape { what: "d_y", expected: vec![3, 2], got: vec![4, 2] };
        assert_eq!(backward(tokens.view(), ones.view(), table.view_mut()), Err(error));
        assert_eq!(table.sum(), 0.0);
        let empty = table.slice(s![..0, ..]);
        let error = Error::OutOfRange { what: "tokens", index: vec![0], got: 0, limit: 0 };
        assert_eq!(forward(empty, tokens.view()), Err(error));
        let wide = Array1::<f32>::zeros(1);
        let wide = wide.broadcast((1, 1 << 62)).unwrap();
        let error = Error::TooLarge { what: "y", shape: vec![1, 1 << 62] };
        assert_eq!(forward(wide, Array1::zeros(1).view()), Err(error));
    }
}
