//! The loops over a tile's scores: rows are codes or keys, the elements of a row are the tile's queries.
//!
//! Rows have a fixed length and the sums of a pass stay in registers, so each loop becomes vector instructions without
//! remainders.

use super::block::LANES;
use super::tile::Row;
use crate::Scalar;

/// `sum <- a + b`.
#[inline(always)]
pub(super) fn add<T: Scalar>(a: &[T], b: &[T], sum: &mut [T]) {
    for ((sum, &a), &b) in sum.iter_mut().zip(a).zip(b) {
        *sum = a + b;
    }
}

/// `row <- factor row`.
#[inline(always)]
pub(super) fn scale<T: Scalar>(row: &mut [T], factor: T) {
    for x in row {
        *x *= factor;
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
pub(super) fn softmax<T: Scalar>(
    content: &mut [Row<T>],
    log_counts: &[T],
    recent: &mut [Row<T>],
) -> [Row<T>; 3] {
    let mut max = [T::neg_infinity(); LANES];
    for (row, &log_count) in content.iter_mut().zip(log_counts) {
        for (max, score) in max.iter_mut().zip(row) {
            *score += log_count;
            *max = if *score > *max { *score } else { *max };
        }
    }
    for row in recent.iter() {
        for (max, &score) in max.iter_mut().zip(row) {
            *max = if score > *max { score } else { *max };
        }
    }
    let cached = exponentiate(content, &[], &max);
    let mut sum = exponentiate(recent, &[], &max);
    for (sum, &cached) in sum.iter_mut().zip(&cached) {
        *sum += cached;
    }
    [max, cached, sum]
}

/// Scores become `exp(score + term - shift)`, one term per row or none; returns the sums over rows.
#[inline(always)]
pub(super) fn exponentiate<T: Scalar>(rows: &mut [Row<T>], terms: &[T], shift: &Row<T>) -> Row<T> {
    let mut sum = [T::zero(); LANES];
    for (r, row) in rows.iter_mut().enumerate() {
        let term = terms.get(r).copied().unwrap_or(T::zero());
        for ((score, &shift), sum) in row.iter_mut().zip(shift).zip(&mut sum) {
            *score = (*score + term - shift).exp_fast();
            *sum += *score;
        }
    }
    sum
}

/// `d <- p (d - delta)`, delta the sum of p d over the rows of both.
#[inline(always)]
pub(super) fn score_gradients<T: Scalar>(
    content: (&[Row<T>], &mut [Row<T>]),
    recent: (&[Row<T>], &mut [Row<T>]),
) {
    let mut delta = [T::zero(); LANES];
    for (p, d) in [(content.0, &*content.1), (recent.0, &*recent.1)] {
        for (p, d) in p.iter().zip(d) {
            for ((delta, &p), &d) in delta.iter_mut().zip(p).zip(d) {
                *delta += p * d;
            }
        }
    }
    for (p, d) in [content, recent] {
        for (p, d) in p.iter().zip(d) {
            for ((d, &p), &delta) in d.iter_mut().zip(p).zip(&delta) {
                *d = p * (*d - delta);
            }
        }
    }
}
