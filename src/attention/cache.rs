//! The distant past of one head: a count and a mean value per code.
//!
//! ```text
//! (1)  N_s  <- N_s + 1
//! (2)  mu_s <- mu_s + (v - mu_s) / N_s
//! ```
//!
//! A mean that is updated a million times in `f32` loses what each update adds: after N updates the steps are smaller than
//! the rounding of `mu`, and the error can reach N u max|v| / 2 (u the unit roundoff, 6e-8). So each mean is kept as the
//! unevaluated sum of two numbers, `mean + residual`, joined without error. An error made at update n shrinks by n/N until
//! update N, which leaves
//!
//! ```text
//! |mean - mu| <= (8 u + N u^2) max|v|
//! ```
//!
//! Counts are integers. Tokens enter one at a time, those of each code in the order of positions, so the cache is the same bits
//! wherever a sequence was cut into blocks and pieces.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::ops::matmul::{prefetch_ahead, prefetch_row};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// Numbers that enter at once from which on they enter code by code, and threads share the codes.
const MANY: usize = 1 << 17;

/// Codes of one task.
const CODES: usize = 8;

/// Bytes of values that are asked for before they are read.
const AHEAD: usize = 1 << 13;

/// One count and one mean value per code: all that attention needs to know of keys beyond the window.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressiveCache<T> {
    mean: Array2<T>,
    residual: Array2<T>,
    count: Array1<u64>,
}

impl<T: Scalar> CompressiveCache<T> {
    /// An empty cache for S codes and values of width V.
    pub(crate) fn new(n_codes: usize, d_v: usize) -> Self {
        CompressiveCache {
            mean: Array2::zeros((n_codes, d_v)),
            residual: Array2::zeros((n_codes, d_v)),
            count: Array1::zeros(n_codes),
        }
    }

    /// A cache from its parts, as read back from [`mean`](Self::mean), [`residual`](Self::residual) and
    /// [`count`](Self::count).
    ///
    /// # Shapes
    /// `mean` and `residual` [S, V], `count` `[S]`. Where nothing was counted, the mean does not matter.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`].
    pub fn from_parts(mean: Array2<T>, residual: Array2<T>, count: Array1<u64>) -> Result<Self, Error> {
        check_shape("residual", mean.shape(), residual.shape())?;
        check_shape("count", &[mean.nrows()], count.shape())?;
        check_finite("mean", mean.view())?;
        check_finite("residual", residual.view())?;
        let count = count.as_standard_layout().into_owned();
        let own = |a: Array2<T>| {
            let mut a = a.as_standard_layout().into_owned();
            a.rows_mut()
                .into_iter()
                .zip(&count)
                .filter(|&(_, &n)| n == 0)
                .for_each(|(mut a, _)| a.fill(T::zero()));
            a
        };
        Ok(CompressiveCache { mean: own(mean), residual: own(residual), count })
    }

    /// Mean value of each code [S, V]; 0 where nothing was counted.
    pub fn mean(&self) -> ArrayView2<'_, T> {
        self.mean.view()
    }

    /// What rounding took from [`mean`](Self::mean) [S, V]: their exact sum is the mean to twice the precision.
    pub fn residual(&self) -> ArrayView2<'_, T> {
        self.residual.view()
    }

    /// How many tokens of each code are in the cache `[S]`.
    pub fn count(&self) -> ArrayView1<'_, u64> {
        self.count.view()
    }

    /// Takes out everything. Codes without a token have nothing to clear.
    pub(super) fn reset(&mut self) {
        for (s, n) in self.count.iter_mut().enumerate().filter(|(_, n)| **n > 0) {
            *n = 0;
            self.mean.row_mut(s).fill(T::zero());
            self.residual.row_mut(s).fill(T::zero());
        }
    }

    /// Adds one token (formulas 1 and 2).
    pub(crate) fn push(&mut self, code: u32, value: ArrayView1<'_, T>) {
        let share = self.count_one(code);
        let state = (self.mean.view_mut(), self.residual.view_mut());
        on_best_simd!(move_means(state, (&[code], &[share]), value.insert_axis(Axis(0)), None));
    }

    /// (1); returns 1 / N.
    fn count_one(&mut self, code: u32) -> T {
        let count = &mut self.count[code as usize];
        *count += 1;
        T::one() / T::from_f64(*count as f64)
    }

    /// Adds tokens in their order, values [T, V]; the mean that each replaces is appended to `replaced`.
    pub(crate) fn push_rows(
        &mut self,
        codes: &[u32],
        values: ArrayView2<'_, T>,
        replaced: Option<&mut Vec<T>>,
    ) {
        debug_assert_eq!(values.dim(), (codes.len(), self.mean.ncols()));
        let shares: Vec<T> = codes.iter().map(|&code| self.count_one(code)).collect();
        if replaced.is_some() || values.len() < MANY {
            let state = (self.mean.view_mut(), self.residual.view_mut());
            on_best_simd!(move_means(state, (codes, &shares), values, replaced));
            return;
        }
        let (tokens, ends) = by_code(codes, self.count.len());
        let means = self.mean.axis_chunks_iter_mut(Axis(0), CODES).into_par_iter();
        let states = means.zip(self.residual.axis_chunks_iter_mut(Axis(0), CODES)).enumerate();
        states.for_each(|(task, state)| {
            let codes = task * CODES..task * CODES + state.0.nrows();
            let first = if task == 0 { 0 } else { ends[codes.start - 1] };
            let ends = ends[codes].iter().map(|&end| end - first);
            on_best_simd!(move_means_by_code(state, (&tokens[first..], ends), &shares, values));
        });
    }

    /// Takes out the last token of this code, given the mean that it replaced. The residual is not brought back: a cache from
    /// which tokens are taken can be read, but nothing can enter it any more.
    pub(crate) fn take_out(&mut self, code: u32, replaced: &[T]) {
        let s = code as usize;
        self.count[s] -= 1;
        self.mean.row_mut(s).as_slice_mut().expect("standard layout").copy_from_slice(replaced);
    }

    /// Adds the tokens of another cache: the cache of the union of two stretches of a sequence.
    ///
    /// The count-weighted mean is associative up to rounding, which is what allows a long sequence to be cut into
    /// segments.
    ///
    /// # Errors
    /// [`Error::Shape`] if the two differ in S or V, [`Error::Invalid`] if a count would exceed 64 bits.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check_shape("other", self.mean.shape(), other.mean.shape())?;
        if self.count.iter().zip(&other.count).any(|(n, &more)| n.checked_add(more).is_none()) {
            return Err(Error::invalid("other", "few enough tokens to be counted", &other.count));
        }
        for s in 0..self.count.len() {
            if other.count[s] == 0 {
                continue;
            }
            self.count[s] += other.count[s];
            let share = T::from_f64(other.count[s] as f64 / self.count[s] as f64);
            let theirs = other.mean.row(s).into_iter().zip(other.residual.row(s));
            let mine = self.mean.row_mut(s).into_iter().zip(self.residual.row_mut(s));
            for ((mean, residual), (&m, &r)) in mine.zip(theirs) {
                let step = ((m - *mean) + (r - *residual)) * share;
                (*mean, *residual) = two_sum(*mean, *residual + step);
            }
        }
        Ok(())
    }

    /// ln N_s for every code `[S]`; -infinity where nothing was counted, so that the code takes no part.
    pub(crate) fn log_counts(&self) -> Vec<T> {
        self.count.iter().map(|&n| T::from_f64((n as f64).ln())).collect()
    }

    /// Brings [`log_counts`](Self::log_counts) up to date after tokens of these codes were added or taken out.
    pub(crate) fn update_log_counts(&self, codes: impl Iterator<Item = u32>, log_counts: &mut [T]) {
        for code in codes {
            log_counts[code as usize] = T::from_f64((self.count[code as usize] as f64).ln());
        }
    }

    /// Bytes of memory.
    pub(crate) fn size_in_bytes(&self) -> usize {
        2 * size_of_val(self.mean.as_slice().unwrap_or_default()) + 8 * self.count.len()
    }
}

/// (2) for each token in turn: its code and 1 / N, and its value.
#[inline(always)]
fn move_means<T: Scalar>(
    (mut means, mut residuals): (ArrayViewMut2<'_, T>, ArrayViewMut2<'_, T>),
    (codes, shares): (&[u32], &[T]),
    values: ArrayView2<'_, T>,
    mut replaced: Option<&mut Vec<T>>,
) {
    for (i, ((&code, &share), value)) in codes.iter().zip(shares).zip(values.rows()).enumerate() {
        prefetch_ahead(values, i);
        let s = code as usize;
        let (mean, residual) = (means.row_mut(s), residuals.row_mut(s));
        if let (Some(replaced), Some(mean)) = (&mut replaced, mean.as_slice()) {
            replaced.extend_from_slice(mean);
        }
        move_row((mean, residual), value, share);
    }
}

/// The tokens of each code in their order, code after code, and where those of a code end.
fn by_code(codes: &[u32], n_codes: usize) -> (Vec<usize>, Vec<usize>) {
    let mut ends = vec![0; n_codes];
    codes.iter().for_each(|&code| ends[code as usize] += 1);
    let mut before = 0;
    for end in &mut ends {
        // Where the code's tokens begin, until they are put there.
        (*end, before) = (before, before + *end);
    }
    let mut tokens = vec![0; codes.len()];
    for (token, &code) in codes.iter().enumerate() {
        tokens[ends[code as usize]] = token;
        ends[code as usize] += 1;
    }
    (tokens, ends)
}

/// (2) for some codes, as [`by_code`] has their tokens: each mean stays in the nearest cache until it is done. The tokens of
/// others that follow are not looked at.
#[inline(always)]
fn move_means_by_code<T: Scalar>(
    (mut means, mut residuals): (ArrayViewMut2<'_, T>, ArrayViewMut2<'_, T>),
    (tokens, ends): (&[usize], impl Iterator<Item = usize>),
    shares: &[T],
    values: ArrayView2<'_, T>,
) {
    let ahead = (AHEAD / size_of::<T>()).div_ceil(values.ncols().max(1));
    let mut done = 0;
    for ((mut mean, mut residual), end) in means.rows_mut().into_iter().zip(residuals.rows_mut()).zip(ends) {
        for at in done..end {
            if let Some(&later) = tokens.get(at + ahead) {
                prefetch_row(values.row(later));
            }
            let token = tokens[at];
            move_row((mean.view_mut(), residual.view_mut()), values.row(token), shares[token]);
        }
        done = end;
    }
}

/// (2) for one token.
#[inline(always)]
fn move_row<T: Scalar>(
    (mut mean, mut residual): (ArrayViewMut1<'_, T>, ArrayViewMut1<'_, T>),
    value: ArrayView1<'_, T>,
    share: T,
) {
    let rows = (mean.as_slice_mut(), residual.as_slice_mut(), value.as_slice());
    if let (Some(mean), Some(residual), Some(value)) = rows {
        move_mean(mean, residual, value, share);
    } else {
        for ((mean, residual), &v) in mean.iter_mut().zip(&mut residual).zip(value) {
            move_element(mean, residual, v, share);
        }
    }
}

#[inline(always)]
fn move_mean<T: Scalar>(mean: &mut [T], residual: &mut [T], value: &[T], share: T) {
    for ((mean, residual), &v) in mean.iter_mut().zip(residual).zip(value) {
        move_element(mean, residual, v, share);
    }
}

/// (2)
#[inline(always)]
fn move_element<T: Scalar>(mean: &mut T, residual: &mut T, v: T, share: T) {
    let step = ((v - *mean) - *residual) * share;
    (*mean, *residual) = two_sum(*mean, *residual + step);
}

/// The rounded sum of two numbers and what rounding took from it, exactly (Knuth).
#[inline(always)]
fn two_sum<T: Scalar>(a: T, b: T) -> (T, T) {
    let sum = a + b;
    let b_in_sum = sum - a;
    let a_in_sum = sum - b_in_sum;
    (sum, (a - a_in_sum) + (b - b_in_sum))
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    /// Values that a plain running mean gets wrong: a long constant stretch, then a shift too small to move it.
    fn value(i: u64) -> f32 {
        let wave = ((i * 7919) % 1009) as f32 / 1009.0;
        if i < 1_000_000 { 1.0 + wave } else { 0.5 * wave }
    }

    #[test]
    fn million_updates_stay_within_the_stated_bound() {
        const N: u64 = 4_000_000;
        let mut cache = CompressiveCache::<f32>::new(1, 1);
        let (mut sum, mut plain) = (0.0f64, 0.0f32);
        for i in 0..N {
            let v = value(i);
            cache.push(0, array![v].view());
            sum += f64::from(v);
            plain += (v - plain) / (i + 1) as f32;
        }
        let u = f64::from(f32::EPSILON) / 2.0;
        let exact = sum / N as f64;
        let bound = (8.0 * u + N as f64 * u * u) * 2.0;
        let error = (f64::from(cache.mean()[[0, 0]]) - exact).abs();
        assert!(error <= bound, "{error:e} against {bound:e}");
        // The test can tell: a mean without the residual is outside.
        let error = (f64::from(plain) - exact).abs();
        assert!(error > bound, "plain: {error:e} against {bound:e}");
    }

    #[test]
    fn many_at_once_leave_the_bits_of_one_by_one_on_any_number_of_threads() {
        const V: usize = 200;
        let n = MANY / V + 1;
        let codes: Vec<u32> = (0..n as u32).map(|j| j * j % 19).collect();
        let values = Array2::from_shape_fn((n, V), |(j, v)| ((j * V + v) as f32).sin());
        let mut one_by_one = CompressiveCache::new(21, V);
        codes.iter().zip(values.rows()).for_each(|(&code, v)| one_by_one.push(code, v));
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut cache = CompressiveCache::new(21, V);
            pool.install(|| cache.push_rows(&codes, values.view(), None));
            assert_eq!(cache, one_by_one);
        }
    }

    #[test]
    fn what_is_taken_out_leaves_the_cache_of_before() {
        let values = Array2::from_shape_fn((40, 3), |(j, v)| ((j * 3 + v) as f32).sin());
        let codes: Vec<u32> = (0..40).map(|j| j * j % 5).collect();
        let mut befores = vec![CompressiveCache::new(5, 3)];
        let mut replaced = vec![];
        for (j, &code) in codes.iter().enumerate() {
            let mut cache = befores[j].clone();
            let value = values.row(j).insert_axis(Axis(0));
            cache.push_rows(&[code], value, Some(&mut replaced));
            befores.push(cache);
        }
        let mut cache = befores.pop().unwrap();
        for (&code, before) in codes.iter().zip(&befores).rev() {
            let rest = replaced.len() - 3;
            cache.take_out(code, &replaced[rest..]);
            replaced.truncate(rest);
            assert_eq!((&cache.mean, &cache.count), (&before.mean, &before.count));
        }
    }

    #[test]
    fn merge_is_the_cache_of_the_union() {
        let token = |i: u32| (i % 3, array![f64::from(i).sin(), f64::from(i * i % 17)]);
        let fill = |range: std::ops::Range<u32>| {
            let mut cache = CompressiveCache::<f64>::new(4, 2);
            range.map(token).for_each(|(code, v)| cache.push(code, v.view()));
            cache
        };
        let whole = fill(0..100);
        for cut in [0, 1, 50, 99, 100] {
            let mut left = fill(0..cut);
            left.merge(&fill(cut..100)).unwrap();
            assert_eq!(left.count(), whole.count());
            let difference = (&left.mean - &whole.mean).mapv(f64::abs).fold(0.0, |a: f64, &b| a.max(b));
            assert!(difference < 1e-14, "cut at {cut}: {difference:e}");
        }
        assert_eq!(whole.count().sum(), 100);
        assert_eq!(whole.count()[3], 0);
        assert!(fill(0..1).merge(&CompressiveCache::new(3, 2)).is_err());
    }
}
