//! Whether numbers are finite.

use std::iter;

use ndarray::{ArrayView, Dimension};

use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// Checks that every element is finite and names the first that is not.
pub(crate) fn check_finite<T: Scalar, D: Dimension>(
    what: &'static str,
    array: ArrayView<'_, T, D>,
) -> Result<(), Error> {
    // One pass without branches decides; only a failure looks for the place.
    if all_finite(array.view()) {
        return Ok(());
    }
    let array = array.into_dyn();
    let found = array.indexed_iter().find(|(_, x)| !x.is_finite());
    let (index, value) = found.expect("one is not finite");
    Err(Error::NotFinite { what, index: index.as_array_view().to_vec(), value: value.to_string() })
}

/// Whether every number is finite.
pub(crate) fn all_finite<T: Scalar, D: Dimension>(x: ArrayView<'_, T, D>) -> bool {
    if let Some(all) = x.as_slice_memory_order() {
        return on_best_simd!(is_zero_of_nothing(iter::once(all)));
    }
    let rows = x.rows();
    if rows.into_iter().next().is_some_and(|row| row.to_slice().is_some()) {
        let rows = x.rows().into_iter().map(|row| row.to_slice().expect("as the first"));
        return on_best_simd!(is_zero_of_nothing(rows));
    }
    x.iter().all(|x| x.is_finite())
}

/// Whether the sum of 0 x is 0: it is NaN where some x is not finite.
#[inline(always)]
fn is_zero_of_nothing<'a, T: Scalar>(rows: impl Iterator<Item = &'a [T]>) -> bool {
    let mut sums = [T::zero(); 32];
    for row in rows {
        let (chunks, rest) = row.as_chunks::<32>();
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += x * T::zero();
            }
        }
        for &x in rest {
            sums[0] += x * T::zero();
        }
    }
    sums.iter().fold(T::zero(), |total, &sum| total + sum).is_zero()
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, ArrayView1, s};

    use super::*;

    #[test]
    fn no_number_escapes_in_any_order_in_memory() {
        // Rows of a whole chunk and a rest.
        let mut x = Array3::from_shape_fn((2, 3, 37), |(i, j, k)| (i + j + k) as f64 - 1e300);
        for at in [[0, 0, 0], [0, 1, 31], [1, 2, 32], [1, 2, 36]] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                x[at] = bad;
                for view in [
                    x.view(),
                    x.view().reversed_axes(),
                    x.slice(s![.., ..;-1, ..]),
                    x.slice(s![.., .., ..;-1]),
                ] {
                    assert!(!all_finite(view), "{bad} at {at:?}, {:?}", view.strides());
                }
                let error = check_finite("x", x.view()).unwrap_err();
                assert_eq!(error, Error::NotFinite { what: "x", index: at.to_vec(), value: bad.to_string() });
                // What lies between the rows is not part of them.
                let [_, j, k] = at;
                assert!(all_finite(x.slice(s![.., ..j, ..])) && all_finite(x.slice(s![.., .., ..k])));
                x[at] = 0.0;
                assert!(all_finite(x.view()) && all_finite(x.view().reversed_axes()));
            }
        }
        assert!(all_finite(ArrayView1::<f32>::from(&[])) && all_finite(x.slice(s![.., ..0, ..])));
        assert!(!all_finite(ArrayView1::from(&[f32::NAN]).broadcast((3, 2, 1)).unwrap()));
    }
}
