//! What the keys of one update say about the codes: how many took each, and the sum of those that did.
//!
//! ```text
//! (1) counts_s = sum_j m_j [z_j = s],   sums_s = sum_j m_j [z_j = s] k_j           m_j: 1 where the mask is true
//! (2) usage = |{s: counts_s > 0}| / S
//! (3) entropy = - sum_s p_s ln p_s,   perplexity = exp(entropy),   p_s = counts_s / sum counts,   0 ln 0 = 0
//! ```
//!
//! Statistics add up: those of micro-batches, of threads or of machines are merged, then used in one update. Sums are
//! taken in the order sequence by sequence, position by position.
//!
//! Cost: N K per head.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayView4, Axis, Zip};

use super::{check_codes, check_mask};
use crate::error::{check_finite, check_shape, checked_len};
use crate::{Error, Scalar};

/// Sums of keys and counts per head and code, of the positions that count.
#[derive(Debug, Clone, PartialEq)]
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
        check_finite("keys", keys)?;
        let mut stats = Self::zeros(n_heads, n_codes, d_k)?;
        for (sequence, (keys, codes)) in keys.outer_iter().zip(codes.outer_iter()).enumerate() {
            let mask = mask.as_ref().map(|mask| mask.row(sequence));
            for (head, (keys, codes)) in keys.outer_iter().zip(codes.outer_iter()).enumerate() {
                stats.accumulate(head, keys, codes, mask);
            }
        }
        Ok(stats)
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

    /// (1), added to the statistics of one head.
    ///
    /// # Shapes
    /// `keys` [N, K], `codes` `[N]`, `mask` `[N]`.
    pub(crate) fn accumulate(
        &mut self,
        head: usize,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        mask: Option<ArrayView1<'_, bool>>,
    ) {
        let mut sums = self.sums.index_axis_mut(Axis(0), head);
        let mut counts = self.counts.row_mut(head);
        debug_assert_eq!(keys.dim(), (codes.len(), sums.ncols()));
        for (j, (key, &code)) in keys.outer_iter().zip(codes).enumerate() {
            if mask.is_none_or(|mask| mask[j]) {
                counts[code as usize] += 1;
                let mut sum = sums.row_mut(code as usize);
                sum += &key;
            }
        }
    }
}
