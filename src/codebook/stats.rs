//! What the keys of one update say about the codes: how many took each, and the sum of those that did.
//!
//! ```text
//! (1) counts_s = sum_j m_j [z_j = s],   sums_s = sum_j m_j [z_j = s] k_j           m_j: 1 where the mask is true
//! (2) usage = |{s: counts_s > 0}| / S
//! (3) entropy = - sum_s p_s ln p_s,   perplexity = exp(entropy),   p_s = counts_s / sum counts,   0 ln 0 = 0
//! ```
//!
//! Statistics add up: those of micro-batches, of threads or of machines are merged, then used in one update. Sums are
//! taken in the order sequence by sequence, position by position, whatever the number of threads.
//!
//! Cost: N K per head, one pass over the keys. The sums of one task's columns stay in the second-level cache.

use ndarray::{
    Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, Zip, s,
};
use rayon::prelude::*;

use super::{check_codes, check_mask};
use crate::error::{check_finite, check_shape, checked_len};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// Columns of the sums that one task takes at least: a few cache lines of each key.
const COLUMNS_PER_TASK: usize = 32;

/// Sums of keys and counts per head and code, of the positions that count.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CodeStats<T> {
    sums: Array3<T>,     // [H, S, K]
    counts: Array2<u64>, // [H, S]
}

impl<T: Scalar> CodeStats<T> {
    /// Statistics of no keys.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn zeros(n_heads: usize, n_codes: usize, d_k: usize) -> Result<Self, Error> {
        checked_len("stats", &[n_heads, n_codes, d_k])?;
        checked_len("stats", &[n_heads, n_codes])?;
        Ok(Self { sums: Array3::zeros((n_heads, n_codes, d_k)), counts: Array2::zeros((n_heads, n_codes)) })
    }

    /// Statistics of a batch; `mask` says which positions count, without one all do.
    ///
    /// # Shapes
    /// `keys` [B, H, T, K], `codes` [B, H, T], `mask` [B, T].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::OutOfRange`] for a code that is not below `n_codes`, [`Error::NotFinite`],
    /// [`Error::TooLarge`].
    pub fn collect(
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        n_codes: usize,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<Self, Error> {
        let (n_sequences, n_heads, len, d_k) = keys.dim();
        check_shape("codes", &[n_sequences, n_heads, len], codes.shape())?;
        check_mask(mask, n_sequences, len)?;
        check_codes(codes, n_codes)?;
        checked_len("stats", &[n_heads, n_codes, d_k])?;
        let stats = Self::collect_checked(keys, codes, n_codes, mask);
        // A key that is not finite makes a sum that is not; those that do not count are in no sum.
        if mask.is_some() || !stats.sums.fold(true, |finite, sum| finite & sum.is_finite()) {
            check_finite("keys", keys)?;
        }
        Ok(stats)
    }

    /// [`collect`](Self::collect) on what is known to fit.
    pub(crate) fn collect_checked(
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        n_codes: usize,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Self {
        let (n_sequences, n_heads, _, d_k) = keys.dim();
        let mut stats = Self::zeros(n_heads, n_codes, d_k).expect("as large as the codebook");
        let mask_of = |sequence| mask.as_ref().map(|mask| mask.row(sequence));
        // Columns are independent of each other: cut by them, anywhere, every sum keeps the order of the keys. So the number of
        // threads may say where, which spares a single one reading keys by halves.
        let width = d_k.div_ceil(rayon::current_num_threads()).max(COLUMNS_PER_TASK);
        stats.sums.axis_chunks_iter_mut(Axis(2), width).into_par_iter().enumerate().for_each(
            |(task, mut sums)| {
                let columns = task * width..d_k.min((task + 1) * width);
                sums.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(head, mut sums)| {
                    for sequence in 0..n_sequences {
                        let keys = keys.slice(s![sequence, head, .., columns.clone()]);
                        let codes = codes.slice(s![sequence, head, ..]);
                        add_rows_by_code(keys, codes, mask_of(sequence), sums.view_mut());
                    }
                });
            },
        );
        for ((sequence, head), codes) in
            ndarray::indices((n_sequences, n_heads)).into_iter().zip(codes.rows())
        {
            count(
                codes,
                mask_of(sequence),
                stats.counts.row_mut(head).as_slice_mut().expect("standard layout"),
            );
        }
        stats
    }

    /// Adds the statistics of other keys.
    ///
    /// # Errors
    /// [`Error::Shape`] if heads, codes or widths differ.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check_shape("other", self.sums.shape(), other.sums.shape())?;
        self.sums += &other.sums;
        self.counts.zip_mut_with(&other.counts, |count, &n| *count = count.saturating_add(n));
        Ok(())
    }

    /// Sums of the keys of each code [H, S, K].
    pub fn sums(&self) -> ArrayView3<'_, T> {
        self.sums.view()
    }

    /// Keys of each code [H, S].
    pub fn counts(&self) -> ArrayView2<'_, u64> {
        self.counts.view()
    }

    /// (2): the fraction of codes that were used, per head `[H]`.
    pub fn usage(&self) -> Array1<f64> {
        self.counts.map_axis(Axis(1), |counts| {
            let used = counts.iter().filter(|&&n| n > 0).count();
            used as f64 / counts.len().max(1) as f64
        })
    }

    /// (3): how unlike each other the codes of keys are, in nats, per head `[H]`; from 0 to ln S, and 0 if nothing was counted.
    pub fn entropy(&self) -> Array1<f64> {
        self.counts.map_axis(Axis(1), |counts| {
            let total: f64 = counts.iter().map(|&n| n as f64).sum();
            let used = counts.iter().filter(|&&n| n > 0);
            // Not -p ln p, which is -0 for a single code.
            used.map(|&n| n as f64 / total).map(|p| p * (1.0 / p).ln()).sum()
        })
    }

    /// (3): how many codes, used equally often, would be as varied, per head `[H]`; from 1 to S, and 0 if nothing was
    /// counted.
    pub fn perplexity(&self) -> Array1<f64> {
        let mut perplexity = self.entropy().exp();
        Zip::from(&mut perplexity).and(self.counts.rows()).for_each(|perplexity, counts| {
            if counts.iter().all(|&n| n == 0) {
                *perplexity = 0.0;
            }
        });
        perplexity
    }
}

/// The sums of (1): adds each row to the row of `sums` that its code names, in the order of the rows.
///
/// # Shapes
/// `rows` [N, K], `codes` and `mask` `[N]`, `sums` [S, K], of any strides.
pub(super) fn add_rows_by_code<T: Scalar>(
    rows: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
    sums: ArrayViewMut2<'_, T>,
) {
    debug_assert_eq!(rows.dim(), (codes.len(), sums.ncols()));
    on_best_simd!(add_rows(rows, codes, mask, sums));
}

#[inline(always)]
fn add_rows<T: Scalar>(
    rows: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
    mut sums: ArrayViewMut2<'_, T>,
) {
    for (j, (row, &code)) in rows.outer_iter().zip(codes).enumerate() {
        if mask.is_some_and(|mask| !mask[j]) {
            continue;
        }
        let mut sum = sums.row_mut(code as usize);
        match (sum.as_slice_mut(), row.to_slice()) {
            (Some(sum), Some(row)) => sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x),
            _ => sum += &row,
        }
    }
}

/// The counts of (1), added.
fn count(codes: ArrayView1<'_, u32>, mask: Option<ArrayView1<'_, bool>>, counts: &mut [u64]) {
    for (j, &code) in codes.iter().enumerate() {
        if mask.is_none_or(|mask| mask[j]) {
            counts[code as usize] += 1;
        }
    }
}
