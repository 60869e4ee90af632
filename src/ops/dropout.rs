//! Dropout: some numbers become 0 and the others grow, so that their mean stays.
//!
//! ```text
//! (1)  y_n = x_n / (1 - rate)  where  word_n >= rate 2^32,  else 0
//! ```
//!
//! `word_n` is the n-th word of 32 bits of a [`Stream`] of ChaCha with 8 rounds. A mask is therefore a function of its stream
//! alone: not of threads, which each go to the words that they need, and nothing of it has to be kept. (1) is linear, so its
//! backward is the same call on the gradient.
//!
//! Cost: one word of ChaCha and one multiplication per number.
//! Source: Srivastava et al., "Dropout" (JMLR 2014).

use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::rows::ELEMENTS_PER_TASK;
use crate::error::check_memory;
use crate::{Error, Scalar};

/// Four numbers that name a mask: they are the key of ChaCha, so two streams that differ in one have nothing in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// Of the whole run.
    pub seed: u64,
    /// What is dropped.
    pub purpose: u64,
    /// In which unit.
    pub unit: u64,
    /// In which step.
    pub step: u64,
}

impl Stream {
    /// The words from the n-th on.
    fn words(self, n: u128) -> impl Iterator<Item = u32> {
        let mut key = [0; 32];
        let numbers = [self.seed, self.purpose, self.unit, self.step];
        for (bytes, number) in key.chunks_exact_mut(8).zip(numbers) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_word_pos(n);
        std::iter::repeat_with(move || rng.next_u32())
    }
}

/// Checks that a rate of dropout is one.
///
/// # Errors
/// `Invalid` for a rate that is not from 0 to below 1.
pub fn check_rate(what: &'static str, rate: f64) -> Result<(), Error> {
    if (0.0..1.0).contains(&rate) {
        Ok(())
    } else {
        Err(Error::invalid(what, "0 or more, and below 1", rate))
    }
}

/// (1) on every number of `x`, in its order.
///
/// # Errors
/// As [`check_rate`].
pub fn apply<T: Scalar>(x: &mut Array2<T>, rate: f64, stream: Stream) -> Result<(), Error> {
    apply_from_row(0, x, rate, stream)
}

/// [`apply`] on rows of a larger array: `x` is what begins with its row `first`, and gets the part of its mask.
///
/// # Errors
/// As [`check_rate`].
pub fn apply_from_row<T: Scalar>(
    first: u64,
    x: &mut Array2<T>,
    rate: f64,
    stream: Stream,
) -> Result<(), Error> {
    check_rate("rate", rate)?;
    if rate == 0.0 {
        return Ok(());
    }
    if !x.is_standard_layout() {
        *x = x.as_standard_layout().into_owned();
    }
    let first = u128::from(first) * x.ncols() as u128;
    let x = x.as_slice_mut().expect("standard layout");
    x.par_chunks_mut(ELEMENTS_PER_TASK).enumerate().for_each(|(i, x)| {
        for (x, factor) in
            x.iter_mut().zip(factors_from::<T>(first + (i * ELEMENTS_PER_TASK) as u128, rate, stream))
        {
            *x = if factor == T::zero() { T::zero() } else { *x * factor };
        }
    });
    Ok(())
}

/// n factors of (1), 0 or 1 / (1 - rate), from the one that is called `first` on.
///
/// # Errors
/// As [`check_rate`], and [`Error::TooLarge`].
pub fn factors<T: Scalar>(first: u64, n: usize, rate: f64, stream: Stream) -> Result<Vec<T>, Error> {
    check_rate("rate", rate)?;
    check_memory::<T>("factors", &[n])?;
    Ok(factors_from(first.into(), rate, stream).take(n).collect())
}

fn factors_from<T: Scalar>(n: u128, rate: f64, stream: Stream) -> impl Iterator<Item = T> {
    let threshold = (rate * (1u64 << 32) as f64).ceil() as u64;
    let kept = T::from_f64((1.0 - rate).recip());
    stream.words(n).map(move |word| if u64::from(word) >= threshold { kept } else { T::zero() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Stream = Stream { seed: 7, purpose: 1, unit: 2, step: u64::MAX };

    /// The n-th words one after the other, from the key written out.
    fn naive(rate: f64, n: usize) -> Vec<f64> {
        let mut key = [0; 32];
        (key[0], key[8], key[16]) = (7, 1, 2);
        key[24..].fill(255);
        let mut rng = ChaCha8Rng::from_seed(key);
        let mut draw = || f64::from(rng.next_u32()) / (1u64 << 32) as f64;
        (0..n).map(|_| if draw() >= rate { 1.0 / (1.0 - rate) } else { 0.0 }).collect()
    }

    #[test]
    fn a_mask_is_a_function_of_its_stream() {
        for (rows, width) in [(0, 5), (3, 0), (1, 1), (7, 5), (300, 333)] {
            for rate in [0.0, 0.25, 0.9] {
                let expected = Array2::from_shape_vec((rows, width), naive(rate, rows * width)).unwrap();
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut x = Array2::<f64>::ones((rows, width));
                    pool.install(|| apply(&mut x, rate, STREAM)).unwrap();
                    assert_eq!(x, expected);
                }
                let all = factors::<f64>(0, rows * width, rate, STREAM).unwrap();
                let first = rows / 3;
                let mut part = Array2::<f64>::ones((rows - first, width));
                apply_from_row(first as u64, &mut part, rate, STREAM).unwrap();
                assert_eq!(part, expected.slice(ndarray::s![first.., ..]));
                let rest =
                    factors::<f64>(first as u64, all.len().saturating_sub(first), rate, STREAM).unwrap();
                assert_eq!(rest, all[first.min(all.len())..]);
                assert_eq!(all, expected.into_raw_vec_and_offset().0);
            }
        }
    }

    #[test]
    fn as_many_are_dropped_as_the_rate_says_and_the_mean_stays() {
        for rate in [0.1, 0.5, 0.75] {
            let n = 1 << 18;
            let mut x = Array2::<f64>::ones((n / 64, 64));
            apply(&mut x, rate, STREAM).unwrap();
            let zeros = x.iter().filter(|&&x| x == 0.0).count() as f64 / n as f64;
            // Four standard deviations.
            assert!((zeros - rate).abs() < 4.0 * (rate * (1.0 - rate) / n as f64).sqrt());
            assert!((x.mean().unwrap() - 1.0).abs() < 0.02);
        }
    }

    #[test]
    fn streams_that_differ_have_other_masks_and_layouts_do_not_matter() {
        let of = |stream| factors::<f32>(0, 64, 0.5, stream).unwrap();
        let others = [
            Stream { seed: 8, ..STREAM },
            Stream { purpose: 0, ..STREAM },
            Stream { unit: 3, ..STREAM },
            Stream { step: 0, ..STREAM },
        ];
        assert!(others.into_iter().all(|other| of(other) != of(STREAM)));
        let mut x = Array2::from_shape_fn((9, 4), |(i, j)| (i * 4 + j) as f64);
        let mut turned = x.t().as_standard_layout().into_owned().reversed_axes();
        apply(&mut x, 0.3, STREAM).unwrap();
        apply(&mut turned, 0.3, STREAM).unwrap();
        assert_eq!(x, turned);
    }

    #[test]
    fn what_is_dropped_is_0_even_if_it_was_not_finite() {
        let mut x = Array2::from_elem((8, 8), f32::INFINITY);
        apply(&mut x, 0.5, STREAM).unwrap();
        assert!(x.iter().all(|&x| x == 0.0 || x == f32::INFINITY) && x.iter().any(|&x| x == 0.0));
    }

    #[test]
    fn rates_are_checked() {
        for rate in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            let refused = Err(Error::invalid("rate", "0 or more, and below 1", rate));
            assert_eq!(apply(&mut Array2::<f32>::zeros((1, 1)), rate, STREAM), refused);
            assert!(factors::<f32>(0, 1, rate, STREAM).is_err());
        }
    }
}
