//! Cross-entropy of next-token predictions, in nats, and the logarithms of their probabilities.
//!
//! ```text
//! (1) log p_ij = x_ij - max_i - ln Z_i,   Z_i = sum_j exp(x_ij - max_i)
//! (2) loss = -(1/n) sum over the n rows that count of log p_{i, target i}
//! (3) d_x_ij = (p_ij - [j = target i]) / n   in rows that count, else 0
//! ```
//! A mask is true where a row counts. Where no row counts the loss is 0 and so is the gradient.
//!
//! Rounding: Z in blocks of 256, the blocks, the logarithm and the rows in f64. A loss is off by at most 3e-6 nats in `f32`,
//! 1e-14 (1 + loss) in `f64`. A logit of minus infinity is a probability of 0.
//!
//! Cost: one exponential per logit; the gradient takes no second one.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use super::rows;
use super::simd::on_best_simd;
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// Exponentials that are added in the type itself before their sum is added in f64.
const BLOCK: usize = 256;

/// The mean cross-entropy in nats, formula (2), and its gradient with respect to the logits, formula (3).
///
/// # Shapes
/// `logits` and the gradient [N, vocab]; `targets`, `mask` of length N.
///
/// # Errors
/// `Shape` if `targets` or `mask` does not fit; `TooLarge` if `logits` is a view larger than any array; `OutOfRange` if the
/// target of a row that counts is not below vocab.
pub fn forward_backward<T: Scalar>(
    logits: ArrayView2<'_, T>,
    targets: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
) -> Result<(f64, Array2<T>), Error> {
    let targets = targets_that_count::<T>(logits.dim(), targets, mask)?;
    let n = targets.iter().flatten().count() as f64;
    let mut d_logits = rows::zeros("d_logits", logits.dim())?;
    let losses = rows::map(logits.dim(), [logits], [&mut d_logits], |i, [x], [d_x]| {
        let Some(target) = targets[i] else { return 0.0 };
        on_best_simd!(forward_backward_row(x, target, n, d_x))
    });
    Ok((mean(&losses, n), d_logits))
}

#[inline(always)]
fn forward_backward_row<T: Scalar>(x: &[T], target: usize, n: f64, d_x: &mut [T]) -> f64 {
    let max = rows::max(x);
    let z = exponentials(x, max, d_x);
    let factor = T::from_f64(1.0 / (z * n));
    for d_x in d_x.iter_mut() {
        *d_x *= factor; // (3)
    }
    d_x[target] -= T::from_f64(1.0 / n);
    -log_probability(x[target], max, z) // (2)
}

/// The mean cross-entropy in nats, formula (2): the same bits as [`forward_backward`], without the gradient.
///
/// # Shapes
/// `logits` [N, vocab]; `targets`, `mask` of length N.
///
/// # Errors
/// As [`forward_backward`].
pub fn loss<T: Scalar>(
    logits: ArrayView2<'_, T>,
    targets: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
) -> Result<f64, Error> {
    let targets = targets_that_count::<T>(logits.dim(), targets, mask)?;
    let losses = rows::map(logits.dim(), [logits], [], |i, [x], []| match targets[i] {
        None => 0.0,
        Some(target) => -on_best_simd!(log_probability_in_row(x, target)),
    });
    Ok(mean(&losses, targets.iter().flatten().count() as f64))
}

/// log p of each row's target, in nats, formula (1).
///
/// # Shapes
/// `logits` [N, vocab]; `targets` and the result of length N.
///
/// # Errors
/// `Shape` if `targets` does not fit; `TooLarge` if `logits` is a view larger than any array; `OutOfRange` if a target is
/// not below vocab.
pub fn log_probabilities<T: Scalar>(
    logits: ArrayView2<'_, T>,
    targets: ArrayView1<'_, u32>,
) -> Result<Array1<T>, Error> {
    let targets = Vec::from_iter(targets_that_count::<T>(logits.dim(), targets, None)?.into_iter().flatten());
    let log_p = rows::map(logits.dim(), [logits], [], |i, [x], []| {
        T::from_f64(on_best_simd!(log_probability_in_row(x, targets[i])))
    });
    Ok(log_p.into())
}

#[inline(always)]
fn log_probability_in_row<T: Scalar>(x: &[T], target: usize) -> f64 {
    let max = rows::max(x);
    log_probability(x[target], max, normaliser(x, max))
}

/// log p of every token in every row, in nats, formula (1).
///
/// # Shapes
/// `logits` and the result [N, vocab].
///
/// # Errors
/// `TooLarge` for a broadcast view that no array could hold.
pub fn log_softmax<T: Scalar>(logits: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
    let mut log_p = rows::zeros("log_p", logits.dim())?;
    rows::map(logits.dim(), [logits], [&mut log_p], |_, [x], [y]| on_best_simd!(log_softmax_row(x, y)));
    Ok(log_p)
}

#[inline(always)]
fn log_softmax_row<T: Scalar>(x: &[T], y: &mut [T]) {
    let max = rows::max(x);
    let ln_z = T::from_f64(exponentials(x, max, y).ln());
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x - max - ln_z; // (1)
    }
}

/// Formula (1) for one element.
#[inline(always)]
fn log_probability<T: Scalar>(x: T, max: T, z: f64) -> f64 {
    x.as_f64() - max.as_f64() - z.ln()
}

/// e_j <- exp(x_j - max); returns Z, in blocks, so that a large vocabulary does not add up rounding errors.
#[inline(always)]
fn exponentials<T: Scalar>(x: &[T], max: T, e: &mut [T]) -> f64 {
    let mut z = 0.0;
    for (x, e) in x.chunks(BLOCK).zip(e.chunks_mut(BLOCK)) {
        for (e, &x) in e.iter_mut().zip(x) {
            *e = (x - max).exp_fast(false);
        }
        z += rows::sum(e).as_f64();
    }
    z
}

/// Z of [`exponentials`], the same bits.
#[inline(always)]
fn normaliser<T: Scalar>(x: &[T], max: T) -> f64 {
    let mut e = [T::zero(); BLOCK];
    let mut z = 0.0;
    for x in x.chunks(BLOCK) {
        z += exponentials(x, max, &mut e[..x.len()]);
    }
    z
}

fn mean(losses: &[f64], n: f64) -> f64 {
    if n == 0.0 { 0.0 } else { losses.iter().sum::<f64>() / n }
}

/// The target of each row that counts; the targets of the others are not looked at.
fn targets_that_count<T>(
    (n, vocab): (usize, usize),
    targets: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
) -> Result<Vec<Option<usize>>, Error> {
    check_memory::<T>("logits", &[n, vocab])?; // a view can be larger than any array
    check_shape("targets", &[n], targets.shape())?;
    if let Some(mask) = mask {
        check_shape("mask", &[n], mask.shape())?;
    }
    let target_of = |(i, &target): (usize, &u32)| {
        if mask.is_some_and(|mask| !mask[i]) {
            return Ok(None);
        }
        if target as usize >= vocab {
            return Err(Error::OutOfRange {
                what: "targets",
                index: vec![i],
                got: target.into(),
                limit: vocab,
            });
        }
        Ok(Some(target as usize))
    };
    targets.iter().enumerate().map(target_of).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, array, s};

    use super::*;
    use crate::check::relative_rms;

    const DIMS: [(usize, usize); 7] = [(0, 0), (0, 3), (1, 1), (3, 2), (7, 33), (20, 300), (300, 17)];

    fn numbers(dim: (usize, usize)) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| 5.0 * ((i * 31 + j * 17 + 1) as f64).sin())
    }

    fn targets_and_mask((n, vocab): (usize, usize)) -> (Array1<u32>, Array1<bool>) {
        let targets = Array1::from_shape_fn(n, |i| (i * i % 11 % vocab) as u32);
        (targets, Array1::from_shape_fn(n, |i| i % 3 != 1))
    }

    fn naive_log_softmax(x: &Array2<f64>) -> Array2<f64> {
        let ln_z = x.mapv(f64::exp).sum_axis(Axis(1)).mapv(f64::ln);
        x - &ln_z.insert_axis(Axis(1))
    }

    #[test]
    fn each_form_equals_its_definition() {
        for dim in DIMS {
            let x = numbers(dim);
            let (targets, mask) = targets_and_mask(dim);
            let log_p = naive_log_softmax(&x);
            assert!(relative_rms(&log_softmax(x.view()).unwrap(), &log_p) < 1e-15);
            let of_targets = Array1::from_shape_fn(dim.0, |i| log_p[[i, targets[i] as usize]]);
            assert!(relative_rms(&log_probabilities(x.view(), targets.view()).unwrap(), &of_targets) < 1e-15);
            for (mask, view) in [(Array1::from_elem(dim.0, true), None), (mask.clone(), Some(mask.view()))] {
                let counts = mask.iter().filter(|&&counts| counts).count().max(1) as f64;
                let mut expected_loss = 0.0;
                let mut expected = Array2::zeros(dim);
                for i in (0..dim.0).filter(|&i| mask[i]) {
                    expected_loss -= of_targets[i] / counts;
                    expected.row_mut(i).assign(&(log_p.row(i).mapv(f64::exp) / counts));
                    expected[[i, targets[i] as usize]] -= 1.0 / counts;
                }
                let (loss_value, d_x) = forward_backward(x.view(), targets.view(), view).unwrap();
                let error = (loss_value - expected_loss).abs();
                assert!(error < 1e-14 * (1.0 + expected_loss), "{dim:?} {loss_value} {expected_loss}");
                assert!((&d_x - &expected).iter().all(|error| error.abs() < 1e-15 / counts * 4.0));
                let without_gradient = loss(x.view(), targets.view(), view).unwrap();
                assert_eq!(loss_value.to_bits(), without_gradient.to_bits());
            }
        }
    }

    #[test]
    fn strides_do_not_matter() {
        let wide = numbers((40, 60));
        let x = wide.slice(s![..20, ..;2]).reversed_axes();
        let targets = Array1::from_shape_fn(60, |i| (i % 20) as u32);
        let owned = forward_backward(x.to_owned().view(), targets.slice(s![..;2]), None);
        assert_eq!(forward_backward(x, targets.slice(s![..;2]), None), owned);
    }

    #[test]
    fn losses_keep_their_stated_bound() {
        for vocab in [2, 50, 257, 50_000] {
            let x = numbers((3, vocab)).mapv(|x| x as f32);
            let exact = x.mapv(f64::from);
            for target in [0, vocab as u32 - 1] {
                let targets = Array1::from_elem(3, target);
                let expected = naive_log_softmax(&exact).column(target as usize).mean().unwrap();
                let in_f32 = loss(x.view(), targets.view(), None).unwrap();
                assert!((in_f32 + expected).abs() < 3e-6, "{vocab} tokens");
                let in_f64 = loss(exact.view(), targets.view(), None).unwrap();
                assert!((in_f64 + expected).abs() < 1e-14 * (1.0 - expected), "{vocab} tokens");
            }
        }
    }

    #[test]
    fn rows_that_do_not_count_are_not_looked_at() {
        let x = array![[1.0, f64::NAN], [1.0, 2.0]];
        let targets = array![7, 1];
        let mask = array![false, true];
        let (loss_value, d_x) = forward_backward(x.view(), targets.view(), Some(mask.view())).unwrap();
        assert!((loss_value - (1.0 + f64::exp(-1.0)).ln()).abs() < 1e-15);
        assert_eq!(d_x.row(0), array![0.0, 0.0]);
        assert!(d_x[[1, 0]] > 0.2 && (d_x.sum_axis(Axis(1))[1]).abs() < 1e-15);
        let none = array![false, false];
        for x in [x.view(), x.slice(s![.., ..0])] {
            let nothing = (0.0, Array2::zeros(x.dim()));
            assert_eq!(forward_backward(x, targets.view(), Some(none.view())), Ok(nothing));
            assert_eq!(loss(x, targets.view(), Some(none.view())), Ok(0.0));
        }
    }

    #[test]
    fn extreme_logits() {
        let targets = array![0];
        let with = |x: Array2<f32>| forward_backward(x.view(), targets.view(), None).unwrap();
        assert_eq!(with(array![[1e38, -1e38]]), (0.0, array![[0.0, 0.0]]));
        assert_eq!(with(array![[-1e30, 1e30]]), (2.0 * f64::from(1e30f32), array![[-1.0, 1.0]]));
        assert_eq!(with(array![[5.0, f32::NEG_INFINITY]]), (0.0, array![[0.0, 0.0]]));
        assert_eq!(with(array![[f32::NEG_INFINITY, 5.0]]), (f64::INFINITY, array![[-1.0, 1.0]]));
        for bad in [f32::NAN, f32::INFINITY] {
            let (loss, d_x) = with(array![[0.0, bad]]);
            assert!(loss.is_nan() && d_x.iter().all(|d_x| d_x.is_nan()), "bad numbers are not swallowed");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = Array2::<f32>::zeros((3, 2));
        let (two, four) = (array![0, 0], array![true, true, true, true]);
        let shape = |what, got| Error::Shape { what, expected: vec![3], got: vec![got] };
        let good = array![0, 1, 0];
        assert_eq!(loss(x.view(), two.view(), None), Err(shape("targets", 2)));
        assert_eq!(forward_backward(x.view(), two.view(), None), Err(shape("targets", 2)));
        assert_eq!(log_probabilities(x.view(), two.view()), Err(shape("targets", 2)));
        assert_eq!(loss(x.view(), good.view(), Some(four.view())), Err(shape("mask", 4)));
        assert_eq!(forward_backward(x.view(), good.view(), Some(four.view())), Err(shape("mask", 4)));
        let one = Array2::<f32>::zeros((1, 1));
        let huge = one.broadcast((1, 1 << 62)).unwrap();
        let error = Error::TooLarge { what: "logits", shape: vec![1, 1 << 62] };
        assert_eq!(loss(huge, array![0].view(), None), Err(error));
        let targets = array![0, 2, 9];
        let error = Error::OutOfRange { what: "targets", index: vec![1], got: 2, limit: 2 };
        assert_eq!(loss(x.view(), targets.view(), None), Err(error.clone()));
        assert_eq!(log_probabilities(x.view(), targets.view()), Err(error.clone()));
        assert_eq!(forward_backward(x.view(), targets.view(), None), Err(error));
    }
}
