//! What the keys of one update say about the codes: how many took each, and the sum of those that did.
//!
//! ```text
//! (1) counts_s = sum_j m_j [z_j = s],   sums_s = sum_j m_j [z_j = s] k_j           m_j: 1 where the mask is true
//! (2) usage = |{s: counts_s > 0}| / S
//! (3) entropy = - sum_s p_s ln p_s,   perplexity = exp(entropy),   p_s = counts_s / sum counts,   0 ln 0 = 0
//! ```
//!
//! Statistics add up: those of micro-batches, of threads or of machines are merged, then used in one update. Sums are
//! taken in the order sequence by sequence, position by position. Many keys, compared with the codes, are cut into stretches
//! whose sums are taken on their own and then added in order; the cuts depend on the numbers of keys and codes alone, so the
//! number of threads changes no bit.
//!
//! Cost: N K per head, one pass over the keys. The sums of one task stay in the second-level cache.

use std::iter;
use std::ops::Range;

use fearless_simd::{Simd, SimdBase};
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, Zip,
    s,
};
use rayon::prelude::*;

use super::{check_codes, check_mask};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::aligned::LINE;
use crate::ops::finite::{all_finite, check_finite};
use crate::ops::matmul::{ask, ask_for_pages, ask_second_level};
use crate::ops::simd::on_narrow_simd;
use crate::{Error, Scalar};

/// Keys of a stretch, at least: so many per code that adding up the sums of stretches costs little, and no few.
const KEYS_PER_CODE: usize = 32;
const KEYS_PER_STRETCH: usize = 4096;

/// Columns of the sums that one task takes at least. Measured: two threads that shared rows of 64 numbers took longer than one
/// alone.
const COLUMNS_PER_TASK: usize = 64;

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
        check_size::<T>(n_heads, n_codes, d_k)?;
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
        compiled_here!(
            T,
            CodeStats::<T>::collect_here,
            fn(
                ArrayView4<'_, T>,
                ArrayView3<'_, u32>,
                usize,
                Option<ArrayView2<'_, bool>>,
            ) -> Result<CodeStats<T>, Error>
        )(keys, codes, n_codes, mask)
    }

    fn collect_here(
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        n_codes: usize,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<Self, Error> {
        let (n_sequences, n_heads, len, d_k) = keys.dim();
        check_shape("codes", &[n_sequences, n_heads, len], codes.shape())?;
        check_mask(mask, n_sequences, len)?;
        check_codes(codes, n_codes)?;
        check_size::<T>(n_heads, n_codes, d_k)?;
        let stats = Self::collect_checked(keys, codes, n_codes, mask);
        // A key that is not finite makes a sum that is not; those that do not count are in no sum.
        if mask.is_some() || !stats.sums.outer_iter().all(|sums| all_finite(sums)) {
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
        let (n_sequences, n_heads, len, d_k) = keys.dim();
        let mut stats = Self::zeros(n_heads, n_codes, d_k).expect("as large as the codebook");
        let stretches = stretches(n_sequences * len, n_codes);
        // Columns are independent of each other: cut by them, anywhere, every sum keeps the order of the keys. But a key is
        // read best as a whole, so that they are cut only for threads that had nothing to do.
        let tasks = (stretches.len() * n_heads).max(1);
        let width = d_k.div_ceil(rayon::current_num_threads().div_ceil(tasks)).max(COLUMNS_PER_TASK);
        // The sums of the first stretch need no place of their own.
        let mut others = Array4::zeros((stretches.len() - 1, n_heads, n_codes, d_k)); // [stretches, H, S, K]
        let tables: Vec<_> = iter::once(stats.sums.view_mut()).chain(others.outer_iter_mut()).collect();
        let mut counts = Array3::zeros((stretches.len(), n_heads, n_codes)); // [stretches, H, S]
        let of_stretches = (tables, counts.axis_iter_mut(Axis(0)), &stretches).into_par_iter();
        of_stretches.for_each(|(mut sums, mut counts, stretch)| {
            let of_heads = (sums.axis_iter_mut(Axis(0)), counts.axis_iter_mut(Axis(0))).into_par_iter();
            of_heads.enumerate().for_each(|(head, (mut sums, counts))| {
                let counts = counts.into_slice().expect("standard layout");
                for (sequence, positions) in parts(stretch, len) {
                    let mask = mask.as_ref().map(|mask| mask.slice(s![sequence, positions.clone()]));
                    count(codes.slice(s![sequence, head, positions]), mask, counts);
                }
                let panels = sums.axis_chunks_iter_mut(Axis(1), width).into_par_iter().enumerate();
                panels.for_each(|(panel, mut sums)| {
                    let columns = panel * width..d_k.min((panel + 1) * width);
                    for (sequence, positions) in parts(stretch, len) {
                        let keys = keys.slice(s![sequence, head, positions.clone(), columns.clone()]);
                        let codes = codes.slice(s![sequence, head, positions.clone()]);
                        let mask = mask.as_ref().map(|mask| mask.slice(s![sequence, positions]));
                        add_rows_by_code(keys, codes, mask, sums.view_mut());
                    }
                });
            });
        });
        for other in others.outer_iter() {
            stats.sums += &other;
        }
        stats.counts = counts.sum_axis(Axis(0));
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

    /// The fraction of codes that were used, per head `[H]`.
    pub fn usage(&self) -> Array1<f64> {
        self.counts.map_axis(Axis(1), |counts| {
            let used = counts.iter().filter(|&&n| n > 0).count();
            used as f64 / counts.len().max(1) as f64
        })
    }

    /// How unlike each other the codes of keys are, in nats, per head `[H]`: `- sum_s p_s ln p_s`, p_s the part of the keys that
    /// code s has; from 0 to ln S, and 0 if nothing was counted.
    pub fn entropy(&self) -> Array1<f64> {
        self.counts.map_axis(Axis(1), |counts| {
            let total: f64 = counts.iter().map(|&n| n as f64).sum();
            let used = counts.iter().filter(|&&n| n > 0);
            // Not -p ln p, which is -0 for a single code.
            used.map(|&n| n as f64 / total).map(|p| p * (1.0 / p).ln()).sum()
        })
    }

    /// How many codes, used equally often, would be as varied, per head `[H]`: `exp(entropy)`; from 1 to S, and 0 if nothing
    /// was counted.
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

/// Checks that there is memory for sums and counts.
fn check_size<T>(n_heads: usize, n_codes: usize, d_k: usize) -> Result<(), Error> {
    check_memory::<T>("stats", &[n_heads, n_codes, d_k])?;
    check_memory::<u64>("stats", &[n_heads, n_codes])
}

/// Cuts so many keys, all sequences of a batch in turn, into stretches of about the same length.
fn stretches(n_keys: usize, n_codes: usize) -> Vec<Range<usize>> {
    let n = (n_keys / KEYS_PER_STRETCH.max(n_codes.saturating_mul(KEYS_PER_CODE))).max(1);
    let len = n_keys.div_ceil(n);
    (0..n).map(|i| n_keys.min(i * len)..n_keys.min((i + 1) * len)).collect()
}

/// A stretch of sequences of this length, sequence by sequence.
fn parts(stretch: &Range<usize>, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let Range { start, end } = *stretch;
    let sequences = if start < end { start / len..end.div_ceil(len) } else { 0..0 };
    sequences.map(move |i| (i, start.max(i * len) - i * len..end.min((i + 1) * len) - i * len))
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
    // Loops of known length are shorter.
    match rows.ncols() {
        64 => on_narrow_simd!(simd => add_rows(simd, 64, rows, codes, mask, sums)),
        128 => on_narrow_simd!(simd => add_rows(simd, 128, rows, codes, mask, sums)),
        width => on_narrow_simd!(simd => add_rows(simd, width, rows, codes, mask, sums)),
    }
}

/// How many rows before its turn a row is asked for, and the sum that one is added to, which lies anywhere in the table.
const ROWS_AHEAD: usize = 24;
const SUMS_AHEAD: usize = 4;

#[inline(always)]
fn add_rows<S: Simd, T: Scalar>(
    simd: S,
    width: usize,
    rows: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    mask: Option<ArrayView1<'_, bool>>,
    mut sums: ArrayViewMut2<'_, T>,
) {
    let stride = rows.strides()[0].wrapping_mul(size_of::<T>() as isize);
    let ahead = stride.wrapping_mul(ROWS_AHEAD as isize);
    for (j, (row, &code)) in rows.outer_iter().zip(codes).enumerate() {
        let later = row.as_ptr().cast::<u8>().wrapping_offset(ahead);
        ask_for_pages(j, codes.len(), later, stride);
        if mask.is_some_and(|mask| !mask[j]) {
            continue;
        }
        let later_sum =
            codes.get(j + SUMS_AHEAD).map_or(later, |&code| sums.row(code as usize).as_ptr().cast());
        let mut sum = sums.row_mut(code as usize);
        match (sum.as_slice_mut(), row.to_slice()) {
            (Some(sum), Some(row)) => add_row(simd, &mut sum[..width], &row[..width], later, later_sum),
            _ => sum += &row,
        }
    }
}

/// Adds a row to a sum, and asks meanwhile for those that begin at the two addresses, line by line.
#[inline(always)]
fn add_row<S: Simd, T: Scalar>(simd: S, sum: &mut [T], row: &[T], later: *const u8, later_sum: *const u8) {
    let lanes = T::Vector::<S>::LEN;
    let whole = row.len() / lanes * lanes;
    for at in (0..whole).step_by(lanes) {
        let byte = at * size_of::<T>();
        if byte.is_multiple_of(LINE) {
            ask_second_level(later.wrapping_add(byte));
            ask(later_sum.wrapping_add(byte));
        }
        let of = at..at + lanes;
        let x = T::Vector::<S>::from_slice(simd, &row[of.clone()]);
        (T::Vector::<S>::from_slice(simd, &sum[of.clone()]) + x).store_slice(&mut sum[of]);
    }
    for (sum, &x) in sum[whole..].iter_mut().zip(&row[whole..]) {
        *sum += x;
    }
}

/// The counts of (1), added.
fn count(codes: ArrayView1<'_, u32>, mask: Option<ArrayView1<'_, bool>>, counts: &mut [u64]) {
    if let (Some(codes), None) = (codes.to_slice(), mask) {
        return codes.iter().for_each(|&code| counts[code as usize] += 1);
    }
    for (j, &code) in codes.iter().enumerate() {
        if mask.is_none_or(|mask| mask[j]) {
            counts[code as usize] += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_and_their_parts_hold_every_key_once_and_in_order() {
        for (n_sequences, len, n_codes) in
            [(0, 5, 3), (3, 0, 3), (1, 1, 1), (3, 4097, 2), (40_000, 1, 7), (1, 70_001, 512), (5, 9000, 100)]
        {
            let stretches = stretches(n_sequences * len, n_codes);
            let all = stretches.iter().flat_map(|stretch| parts(stretch, len));
            let keys = all.flat_map(|(sequence, positions)| positions.map(move |t| (sequence, t)));
            assert!(keys.eq((0..n_sequences).flat_map(|b| (0..len).map(move |t| (b, t)))));
            let least = KEYS_PER_STRETCH.max(KEYS_PER_CODE * n_codes);
            // Rounding up leaves the last one some keys fewer.
            assert!(stretches.len() == 1 || stretches[0].len() >= least, "{stretches:?}");
            assert!(stretches[0].len() < 2 * least, "{stretches:?}");
        }
    }
}
