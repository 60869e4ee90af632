//! The loops over scores: rows are codes or keys, a row's elements are the queries of a block.
//!
//! Each runs over contiguous queries and vectorises; (2) and (3) are those of `block`. Buffers have rows of `stride`
//! elements, of which a block uses the first `len`.

use super::block::Block;
use crate::Scalar;

/// (2). Rows of carried keys hold their content scores already.
#[inline(always)]
pub(super) fn gather<T: Scalar>(
    block: &Block,
    codes: &[u32],
    stride: usize,
    content: &[T],
    recent: &mut [T],
    bias: &[T],
) {
    let distances = block.window + 1;
    for r in 0..block.rows() {
        let row = &mut recent[r * stride..][..block.len];
        if r >= block.carried {
            let code = codes[r - block.carried] as usize;
            row.copy_from_slice(&content[code * stride..][..block.len]);
        }
        let biased = block.biased(r);
        if bias.is_empty() || biased.is_empty() {
            continue;
        }
        // The bias of query i lies at i * (M+1) + (i - lead): a diagonal.
        let first = (biased.start * (distances + 1)) as isize - block.lead(r);
        let diagonal = bias[first as usize..].iter().step_by(distances + 1);
        for (score, &bias) in row[biased].iter_mut().zip(diagonal) {
            *score += bias;
        }
    }
}

#[inline(always)]
pub(super) fn column_max<T: Scalar>(
    block: &Block,
    stride: usize,
    content: &[T],
    log_counts: &[T],
    recent: &[T],
    max: &mut [T],
) {
    for (s, &log_count) in log_counts.iter().enumerate() {
        for (max, &score) in max.iter_mut().zip(&content[s * stride..][..block.len]) {
            let score = score + log_count;
            *max = if score > *max { score } else { *max };
        }
    }
    for r in 0..block.rows() {
        let lanes = block.lanes(r);
        let row = &recent[r * stride..][lanes.clone()];
        for (max, &score) in max[lanes].iter_mut().zip(row) {
            *max = if score > *max { score } else { *max };
        }
    }
}

/// (3), cached codes.
#[inline(always)]
pub(super) fn cached_exponentials<T: Scalar>(
    block: &Block,
    stride: usize,
    content: &mut [T],
    log_counts: &[T],
    shift: &[T],
    sum: &mut [T],
) {
    for (s, &log_count) in log_counts.iter().enumerate() {
        let row = &mut content[s * stride..][..block.len];
        if log_count == T::neg_infinity() {
            row.fill(T::zero());
            continue;
        }
        for ((score, &shift), sum) in row.iter_mut().zip(shift).zip(&mut *sum) {
            *score = (*score + log_count - shift).exp_fast();
            *sum += *score;
        }
    }
}

/// (3), recent keys. Where a query does not see a key, p = 0.
#[inline(always)]
pub(super) fn recent_exponentials<T: Scalar>(
    block: &Block,
    stride: usize,
    recent: &mut [T],
    shift: &[T],
    sum: &mut [T],
) {
    for r in 0..block.rows() {
        let lanes = block.lanes(r);
        let row = &mut recent[r * stride..][..block.len];
        row[..lanes.start].fill(T::zero());
        row[lanes.end..].fill(T::zero());
        let terms = row[lanes.clone()].iter_mut().zip(&shift[lanes.clone()]).zip(&mut sum[lanes]);
        for ((score, &shift), sum) in terms {
            *score = (*score - shift).exp_fast();
            *sum += *score;
        }
    }
}

#[inline(always)]
pub(super) fn score_gradients<T: Scalar>(
    block: &Block,
    stride: usize,
    p: (&[T], &[T]),
    d: (&mut [T], &mut [T]),
    delta: &mut [T],
) {
    let (p_content, p_recent) = p;
    let (d_content, d_recent) = d;
    let cached = if block.cache { p_content.len() / stride } else { 0 };
    for s in 0..cached {
        let (p, d) = (&p_content[s * stride..][..block.len], &d_content[s * stride..][..block.len]);
        for ((delta, &p), &d) in delta.iter_mut().zip(p).zip(d) {
            *delta += p * d;
        }
    }
    for r in 0..block.rows() {
        let lanes = block.lanes(r);
        let (p, d) = (&p_recent[r * stride..][lanes.clone()], &d_recent[r * stride..][lanes.clone()]);
        for ((delta, &p), &d) in delta[lanes].iter_mut().zip(p).zip(d) {
            *delta += p * d;
        }
    }
    for s in 0..cached {
        let p = &p_content[s * stride..][..block.len];
        let d = &mut d_content[s * stride..][..block.len];
        for ((d, &p), &delta) in d.iter_mut().zip(p).zip(&*delta) {
            *d = p * (*d - delta);
        }
    }
    for r in 0..block.rows() {
        let lanes = block.lanes(r);
        let p = &p_recent[r * stride..][lanes.clone()];
        let row = &mut d_recent[r * stride..][..block.len];
        row[..lanes.start].fill(T::zero());
        row[lanes.end..].fill(T::zero());
        for ((d, &p), &delta) in row[lanes.clone()].iter_mut().zip(p).zip(&delta[lanes]) {
            *d = p * (*d - delta);
        }
    }
}

#[inline(always)]
pub(super) fn scatter<T: Scalar>(
    block: &Block,
    codes: &[u32],
    stride: usize,
    content: &mut [T],
    recent: &[T],
) {
    for (r, &code) in (block.carried..).zip(codes) {
        let row = &recent[r * stride..][..block.len];
        for (sum, &d) in content[code as usize * stride..][..block.len].iter_mut().zip(row) {
            *sum += d;
        }
    }
}
