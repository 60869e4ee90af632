//! Codewords that follow the keys: the exponential moving average of the paper.
//!
//! ```text
//! (1) C = sums / divisors                                          sums [S, K], counts [S], of each head
//!     divisors = max(counts, 0.01)                                 count clamp
//!     divisors = (counts + e) / (n + S e) n,   n = sum counts      Laplace
//! (2) sums   <- g sums   + (1 - g) sum_{j: z_j = s} k_j            g the decay
//! (3) counts <- g counts + (1 - g) n_s
//! ```
//!
//! A code that no key takes keeps its codeword, as (2) and (3) scale both alike, until its count falls below 0.01: after
//! `ln(0.01 / count) / ln(g)` updates in a row. From then on its codeword shrinks towards zero by g per update. Under
//! Laplace smoothing that happens around a count of e, gradually; the divisors of a head add up to what its counts do.
//!
//! Cost: H S K per update. Source: Transformer-VQ (Lingle, 2023, arXiv 2309.16354) for the clamp; VQ-VAE (van den Oord et
//! al., 2017) in its usual implementation for Laplace smoothing, with e = 1e-5.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};

use super::CodeStats;
use super::assign::check_codewords;
use super::revive::Replacement;
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// Counts below this one do not divide.
const LEAST_COUNT: f64 = 0.01;

/// What keeps the division of sums by counts from going wrong where a code is not used.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(
    feature = "model",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, rename_all = "snake_case")
)]
pub enum Smoothing {
    /// Sums are divided by `max(counts, 0.01)`.
    #[default]
    CountClamp,
    /// Sums are divided by `(counts + e) / (n + S e) n`, n the sum of a head's counts: counts, moved towards their mean.
    Laplace {
        /// e, what is added to each count.
        epsilon: f64,
    },
}

impl Smoothing {
    /// Checks the numbers in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an epsilon that is not finite and above 0.
    pub fn validate(self) -> Result<(), Error> {
        match self {
            Smoothing::Laplace { epsilon } if !(epsilon.is_finite() && epsilon > 0.0) => {
                Err(Error::invalid("epsilon", "finite and above 0", epsilon))
            }
            _ => Ok(()),
        }
    }
}

/// The moving sums of keys and counts per code: the state from which the codewords are derived.
///
/// ```text
/// codewords = sums / divisors                                   divisors from the counts: see Smoothing
/// sums   <- g sums   + (1 - g) (sum of the keys of each code)   at each update, g the decay
/// counts <- g counts + (1 - g) (number of keys of each code)
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Ema<T> {
    sums: Array3<T>,   // [H, S, K]
    counts: Array2<T>, // [H, S]
    decay: f64,
    smoothing: Smoothing,
}

impl<T: Scalar> Ema<T> {
    /// A state to go on from: one of a checkpoint, say. With the count clamp: see
    /// [`with_smoothing`](Self::with_smoothing).
    ///
    /// # Shapes
    /// `sums` [H, S, K], `counts` [H, S].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Empty`] (H, S or K = 0), [`Error::NotFinite`] (the codewords count as well), and
    /// [`Error::Invalid`] for a decay outside 0 ..= 1 or a count below 0.
    pub fn new(sums: Array3<T>, counts: Array2<T>, decay: f64) -> Result<Self, Error> {
        let (n_heads, n_codes, _) = sums.dim();
        check_shape("counts", &[n_heads, n_codes], counts.shape())?;
        check_finite("sums", sums.view())?;
        check_finite("counts", counts.view())?;
        if let Some(count) = counts.iter().find(|&&count| count < T::zero()) {
            return Err(Error::invalid("counts", "0 or more", count));
        }
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::invalid("decay", "from 0 to 1", decay));
        }
        Self { sums, counts, decay, smoothing: Smoothing::CountClamp }.checked()
    }

    /// The same sums and counts, divided in another way.
    ///
    /// # Errors
    /// As [`Smoothing::validate`], and [`Error::NotFinite`] for codewords: those of a head without any count, under Laplace.
    pub fn with_smoothing(self, smoothing: Smoothing) -> Result<Self, Error> {
        smoothing.validate()?;
        Self { smoothing, ..self }.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        check_codewords(self.codewords().view())?;
        Ok(self)
    }

    /// Starts at the given codewords, each with a count of 1.
    ///
    /// (With a count of 0 the first update would throw every unused codeword far away.)
    ///
    /// # Shapes
    /// `codewords` [H, S, K].
    ///
    /// # Errors
    /// As [`Ema::new`].
    pub fn from_codewords(codewords: Array3<T>, decay: f64) -> Result<Self, Error> {
        let (n_heads, n_codes, _) = codewords.dim();
        check_memory::<T>("counts", &[n_heads, n_codes])?;
        Self::new(codewords, Array2::ones((n_heads, n_codes)), decay)
    }

    /// The moving sums of keys [H, S, K].
    pub fn sums(&self) -> ArrayView3<'_, T> {
        self.sums.view()
    }

    /// The moving counts [H, S].
    pub fn counts(&self) -> ArrayView2<'_, T> {
        self.counts.view()
    }

    /// The part g of the old state that an update keeps.
    pub fn decay(&self) -> f64 {
        self.decay
    }

    /// How counts become divisors.
    pub fn smoothing(&self) -> Smoothing {
        self.smoothing
    }

    /// The same state in another precision. Rounds to nearest: beyond the largest `f32` to infinity.
    pub fn cast<U: Scalar>(&self) -> Ema<U> {
        let cast = |x: T| U::from_f64(x.as_f64());
        let (sums, counts) = (self.sums.mapv(cast), self.counts.mapv(cast));
        Ema { sums, counts, decay: self.decay, smoothing: self.smoothing }
    }

    /// (1).
    pub(super) fn codewords(&self) -> Array3<T> {
        &self.sums / &self.divisors().insert_axis(Axis(2))
    }

    /// What the sums are divided by [H, S].
    fn divisors(&self) -> Array2<T> {
        let mut divisors = self.counts.clone();
        match self.smoothing {
            Smoothing::CountClamp => {
                let least = T::from_f64(LEAST_COUNT);
                divisors.mapv_inplace(|count| count.max(least));
            }
            Smoothing::Laplace { epsilon } => {
                for mut counts in divisors.outer_iter_mut() {
                    let total: f64 = counts.iter().map(|count| count.as_f64()).sum();
                    let factor = total / (total + counts.len() as f64 * epsilon);
                    counts.mapv_inplace(|count| T::from_f64((count.as_f64() + epsilon) * factor));
                }
            }
        }
        divisors
    }

    /// (2) and (3); the state is left as it was if an error is returned.
    pub(super) fn update(&mut self, stats: &CodeStats<T>) -> Result<(), Error> {
        compiled_here!(T, Ema::<T>::update_here, fn(&mut Ema<T>, &CodeStats<T>) -> Result<(), Error>)(
            self, stats,
        )
    }

    fn update_here(&mut self, stats: &CodeStats<T>) -> Result<(), Error> {
        check_shape("stats", self.sums.shape(), stats.sums().shape())?;
        check_finite("stats.sums", stats.sums())?;
        let (keep, take) = (T::from_f64(self.decay), T::from_f64(1.0 - self.decay));
        let mut sums = self.sums.clone();
        sums.zip_mut_with(&stats.sums(), |sum, &new| *sum = keep * *sum + take * new);
        let mut counts = self.counts.clone();
        counts
            .zip_mut_with(&stats.counts(), |count, &n| *count = keep * *count + take * T::from_f64(n as f64));
        check_finite("sums", sums.view())?;
        *self = Self { sums, counts, ..*self }.checked()?;
        Ok(())
    }

    /// Restarts codes at other codewords, each with the mean of its head's counts; the state is left as it was if an error is
    /// returned.
    ///
    /// Under Laplace smoothing the sum n of a head's counts, which grows by this, divides all its codewords: those of other codes
    /// shrink by a part of S e / n, nothing for e as small as usual.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Shape`], [`Error::NotFinite`] for a head, a code or a codeword.
    pub fn replace(&mut self, replacements: &[Replacement<T>]) -> Result<(), Error> {
        let n_codes = self.sums.dim().1;
        let mut restarted = self.clone();
        for (i, Replacement { head, code, codeword }) in replacements.iter().enumerate() {
            check_replacement(i, (*head, *code), codeword.view(), self.sums.dim())?;
            restarted.counts[[*head, *code]] = self.counts.row(*head).sum() / T::from_f64(n_codes as f64);
        }
        // As (1) will divide.
        let divisors = restarted.divisors();
        for Replacement { head, code, codeword } in replacements {
            let sum = codeword * divisors[[*head, *code]];
            restarted.sums.slice_mut(s![*head, *code, ..]).assign(&sum);
        }
        *self = restarted.checked()?;
        Ok(())
    }
}

impl Ema<f32> {
    /// The published start: sums from N(0, 1 / (H S)), every count 1.
    ///
    /// `normal` is asked for one number of the standard normal distribution after the other, in the order of the sums.
    /// In another precision: [`Ema::cast`].
    ///
    /// # Errors
    /// As [`Ema::new`], and [`Error::TooLarge`].
    pub fn random(
        n_heads: usize,
        n_codes: usize,
        d_k: usize,
        decay: f64,
        mut normal: impl FnMut() -> f64,
    ) -> Result<Self, Error> {
        check_memory::<f32>("codewords", &[n_heads, n_codes, d_k])?;
        let deviation = 1.0 / (n_heads as f64 * n_codes as f64).sqrt();
        let codewords =
            Array3::from_shape_simple_fn((n_heads, n_codes, d_k), || (deviation * normal()) as f32);
        Self::from_codewords(codewords, decay)
    }
}

/// Checks one of the replacements for sums [H, S, K].
fn check_replacement<T: Scalar>(
    i: usize,
    (head, code): (usize, usize),
    codeword: ArrayView1<'_, T>,
    (n_heads, n_codes, d_k): (usize, usize, usize),
) -> Result<(), Error> {
    for (what, got, limit) in [("head", head, n_heads), ("code", code, n_codes)] {
        if got >= limit {
            return Err(Error::OutOfRange { what, index: vec![i], got: got as u64, limit });
        }
    }
    check_shape("codeword", &[d_k], codeword.shape())?;
    check_finite("codeword", codeword)
}
