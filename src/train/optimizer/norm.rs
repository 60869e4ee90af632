//! The norm of all gradients together.

use ndarray::ArrayViewD;
use rayon::prelude::*;

use super::CHUNK;
use crate::Scalar;
use crate::ops::simd::on_best_simd;

/// The sum of the squares of one parameter's gradient. The square root of the sum over all parameters is the norm that
/// clipping wants.
///
/// Summed in `f64` and in an order that the number of elements alone decides.
pub(in crate::train) fn sum_of_squares<T: Scalar>(gradient: ArrayViewD<'_, T>) -> f64 {
    let gradient = gradient.as_standard_layout();
    let gradient = gradient.as_slice().expect("standard layout");
    let parts: Vec<f64> =
        gradient.par_chunks(CHUNK).map(|chunk| on_best_simd!(sum_of_squares_of_slice(chunk))).collect();
    parts.iter().sum()
}

#[inline(always)]
fn sum_of_squares_of_slice<T: Scalar>(x: &[T]) -> f64 {
    // Independent sums, so that the additions need not wait for each other and fill a register.
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (sum, &x) in sums.iter_mut().zip(block) {
            *sum += x.as_f64() * x.as_f64();
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += x.as_f64() * x.as_f64();
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, Axis};

    use super::*;

    #[test]
    fn squares_are_summed_in_any_layout_and_length() {
        for n in [0, 1, 15, 16, 17, 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 5] {
            // Integers: every sum is exact.
            let x = ArrayD::from_shape_fn(vec![n, 2], |i| (i[0] % 13) as f32 - (i[1] * 5) as f32);
            let expected: f64 = x.iter().map(|&x| f64::from(x * x)).sum();
            assert_eq!(sum_of_squares(x.view()), expected);
            assert_eq!(sum_of_squares(x.t()), expected);
            let back = x.slice_axis(Axis(0), ndarray::Slice::new(0, None, -1));
            assert_eq!(sum_of_squares(back), expected);
        }
    }
}
