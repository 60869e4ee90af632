//! The loops over a tile's scores: rows are codes or keys, the elements of a row are the tile's queries.
//!
//! Rows have a fixed length and the sums of a pass stay in registers, so each loop becomes vector instructions without
//! remainders.

use fearless_simd::{Simd, SimdBase};
use ndarray::ArrayView2;

use crate::Scalar;
use crate::ops::exp::{TOGETHER, exp};
use crate::ops::matmul::prefetch_ahead;
use crate::ops::simd::{LANES, Row};

/// `sum[i] <- rows[i] + term`, for one or two terms `[K]`: each row is read once.
#[inline(always)]
pub(super) fn add_terms<T: Scalar, const N: usize>(
    rows: ArrayView2<'_, T>,
    terms: [&[T]; N],
    mut sums: [&mut [T]; N],
) {
    let width = rows.ncols();
    for (i, row) in rows.rows().into_iter().enumerate() {
        prefetch_ahead(rows, i);
        for (term, sum) in terms.iter().zip(&mut sums) {
            let sum = &mut sum[i * width..][..width];
            match row.to_slice() {
                Some(row) => {
                    for ((sum, &x), &term) in sum.iter_mut().zip(row).zip(*term) {
                        *sum = x + term;
                    }
                }
                None => {
                    for ((sum, &x), &term) in sum.iter_mut().zip(row).zip(*term) {
                        *sum = x + term;
                    }
                }
            }
        }
    }
}

/// `row <- factor row`; adds 0 to `nothing`, but NaN where a number is not finite.
#[inline(always)]
pub(super) fn scale<T: Scalar>(row: &mut [T], factor: T, nothing: &mut Row<T>) {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (x, nothing) in chunk.iter_mut().zip(&mut *nothing) {
            *x *= factor;
            *nothing += *x * T::zero();
        }
    }
    for (x, nothing) in rest.iter_mut().zip(nothing) {
        *x *= factor;
        *nothing += *x * T::zero();
    }
}

/// `sum <- sum + a`.
#[inline(always)]
pub(super) fn add_to<T: Scalar>(a: &[T], sum: &mut [T]) {
    for (sum, &a) in sum.iter_mut().zip(a) {
        *sum += a;
    }
}

/// Adds each key's row to its code's.
#[inline(always)]
pub(super) fn scatter<T: Scalar>(keys: &[Row<T>], codes: &[u32], content: &mut [Row<T>]) {
    for (row, &code) in keys.iter().zip(codes) {
        for (sum, &d) in content[code as usize].iter_mut().zip(row) {
            *sum += d;
        }
    }
}

/// Scores become `exp(score - max)`, cached codes counting as `score + ln N`: the maxima, the sums over cached codes, and the
/// sums over all.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Scalar>(
    simd: S,
    content: &mut [Row<T>],
    log_counts: &[T],
    recent: &mut [Row<T>],
) -> [Row<T>; 3] {
    let mut max = [T::neg_infinity(); LANES];
    raise(simd, content, log_counts, &mut max);
    raise(simd, recent, &[], &mut max);
    let cached = exponentiate(simd, content, log_counts, &max);
    let mut sum = exponentiate(simd, recent, &[], &max);
    for (sum, &cached) in sum.iter_mut().zip(&cached) {
        *sum += cached;
    }
    [max, cached, sum]
}

/// `max <- max(max, rows + terms)`, one term per row or none. Maxima stay in registers, which a compiler does not see by itself.
#[inline(always)]
pub(super) fn raise<S: Simd, T: Scalar>(simd: S, rows: &[Row<T>], terms: &[T], max: &mut Row<T>) {
    /// Vectors of maxima: with the term and a score they fit 16 registers, and a row's are one pass with AVX-512.
    const MAXIMA: usize = 4;
    let lanes = T::Vector::<S>::LEN;
    let load = |row: &Row<T>, lane: usize| T::Vector::<S>::from_slice(simd, &row[lane..lane + lanes]);
    for first in (0..LANES).step_by(MAXIMA * lanes) {
        let mut highest: [_; MAXIMA] = std::array::from_fn(|j| load(max, first + j * lanes));
        for (r, row) in rows.iter().enumerate() {
            let term = T::Vector::<S>::splat(simd, terms.get(r).copied().unwrap_or(T::zero()));
            for (j, highest) in highest.iter_mut().enumerate() {
                *highest = highest.max(load(row, first + j * lanes) + term);
            }
        }
        for (j, highest) in highest.iter().enumerate() {
            highest.store_slice(&mut max[first + j * lanes..][..lanes]);
        }
    }
}

/// Scores become `exp(score + term - shift)`, one term per row or none; returns the sums over rows.
#[inline(always)]
pub(super) fn exponentiate<S: Simd, T: Scalar>(
    simd: S,
    rows: &mut [Row<T>],
    terms: &[T],
    shift: &Row<T>,
) -> Row<T> {
    if terms.is_empty() {
        exponentiate_rows::<S, T, false>(simd, rows, terms, shift)
    } else {
        exponentiate_rows::<S, T, true>(simd, rows, terms, shift)
    }
}

/// [`exponentiate`], row by row, as many vectors of it at a time as [`TOGETHER`] says.
#[inline(always)]
fn exponentiate_rows<S: Simd, T: Scalar, const TERMS: bool>(
    simd: S,
    rows: &mut [Row<T>],
    terms: &[T],
    shift: &Row<T>,
) -> Row<T> {
    let lanes = T::Vector::<S>::LEN;
    let load = |row: &Row<T>, lane: usize| T::Vector::<S>::from_slice(simd, &row[lane..lane + lanes]);
    let mut sums = [T::zero(); LANES];
    for (r, row) in rows.iter_mut().enumerate() {
        let term = T::Vector::<S>::splat(simd, if TERMS { terms[r] } else { T::zero() });
        for first in (0..LANES).step_by(TOGETHER * lanes) {
            let mut scores: [_; TOGETHER] = std::array::from_fn(|j| load(row, first + j * lanes));
            for (j, score) in scores.iter_mut().enumerate() {
                if TERMS {
                    *score += term;
                }
                *score -= load(shift, first + j * lanes);
            }
            for (j, p) in exp::<S, T, TOGETHER>(simd, scores).into_iter().enumerate() {
                let lane = first + j * lanes;
                (load(&sums, lane) + p).store_slice(&mut sums[lane..lane + lanes]);
                p.store_slice(&mut row[lane..lane + lanes]);
            }
        }
    }
    sums
}

/// `d <- p (d - delta)`, delta the sum of p d over the rows of both; then the rows of cached codes become `p / N`, if there are
/// `shares` 1 / N.
#[inline(always)]
pub(super) fn score_gradients<T: Scalar>(
    (p_content, d_content): (&mut [Row<T>], &mut [Row<T>]),
    (p_recent, d_recent): (&[Row<T>], &mut [Row<T>]),
    shares: &[T],
) {
    let mut delta = [T::zero(); LANES];
    for (p, d) in [(&*p_content, &*d_content), (p_recent, &*d_recent)] {
        for (p, d) in p.iter().zip(d) {
            for ((delta, &p), &d) in delta.iter_mut().zip(p).zip(d) {
                *delta += p * d;
            }
        }
    }
    for (p, d) in p_recent.iter().zip(d_recent) {
        for ((d, &p), &delta) in d.iter_mut().zip(p).zip(&delta) {
            *d = p * (*d - delta);
        }
    }
    for (r, (p, d)) in p_content.iter_mut().zip(d_content).enumerate() {
        let share = shares.get(r).copied().unwrap_or(T::one());
        for ((d, p), &delta) in d.iter_mut().zip(p).zip(&delta) {
            *d = *p * (*d - delta);
            *p *= share;
        }
    }
}
