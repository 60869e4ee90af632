//! What undoes formulas (3) to (1) of the module above.

use ndarray::{Array2, Array3, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::{BatchBiasGradients, BatchGradients, BatchInputs, BatchSaved, fit, parts};
use crate::Scalar;
use crate::attention::VqAttention;
use crate::attention::blockwise::{self, RowGradients};
use crate::codebook::assign::KEYS_PER_TASK;
use crate::codebook::{Estimator, commitment};
use crate::ops::matmul::prefetch;
use crate::ops::rows::all_finite;
use crate::ops::simd::LANES;

/// Parts into which backward of a batch falls at least, where it is long enough: threads share them.
const TASKS: usize = 8;

/// Backward on checked shapes; whether q, k, v and `d_out` are finite.
pub(super) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &BatchInputs<'_, T>,
    saved: BatchSaved<T>,
    d_out: ArrayView4<'_, T>,
    (estimator, commit_weight): (Estimator, f64),
    gradients: &mut BatchGradients<T>,
) -> bool {
    let (b, h, t, k) = inputs.q.dim();
    let BatchSaved { heads, codes, codewords } = saved;
    fit(&mut gradients.q, (b, h, t), k);
    fit(&mut gradients.k, (b, h, t), k);
    fit(&mut gradients.v, (b, h, t), inputs.v.len_of(Axis(3)));
    gradients.codewords = Array3::zeros(codewords.raw_dim());
    gradients.biases = inputs.biases.as_ref().map(|biases| BatchBiasGradients {
        content: Array2::zeros(biases.content.raw_dim()),
        position: Array2::zeros(biases.position.raw_dim()),
        relative: Array3::zeros(biases.relative.raw_dim()),
    });
    let commit_scale = T::from_f64(2.0 * commit_weight / inputs.counted().max(1) as f64);
    let segments = TASKS.div_ceil((b * h).max(1));
    let threads = rayon::current_num_threads().div_ceil((b * h).max(1));
    let buffers =
        parts(&mut gradients.q).into_iter().zip(parts(&mut gradients.k)).zip(parts(&mut gradients.v));
    let of_heads: Vec<_> = heads
        .into_iter()
        .zip(buffers)
        .collect::<Vec<_>>()
        .into_par_iter()
        .enumerate()
        .map(|(n, (saved, ((d_q, d_k), d_v)))| {
            let len = inputs.len_of(n / h);
            let head = inputs.head(n / h, n % h, &codes, &codewords);
            let d_out = d_out.slice(s![n / h, n % h, ..len, ..]);
            let (rows, padding) = RowGradients { q: d_q, k_hat: d_k, v: d_v }.split_at(len);
            padding.clear();
            let RowGradients { q: d_q, k_hat: mut d_k, v: d_v } = rows;
            let rows = RowGradients { q: d_q, k_hat: d_k.view_mut(), v: d_v };
            let (mut d_c, biases, finite) =
                blockwise::run_backward(attention, &head, saved, d_out, rows, segments, threads); // (2)
            let keys = inputs.k.slice(s![n / h, n % h, ..len, ..]);
            estimator.add_codeword_gradient(keys, head.codes, head.codewords, d_k.view(), d_c.view_mut());
            let finite_keys = d_k
                .axis_chunks_iter_mut(Axis(0), KEYS_PER_TASK)
                .into_par_iter()
                .enumerate()
                .map(|(i, mut d_k)| {
                    let mut finite = true;
                    for from in (0..d_k.nrows()).step_by(LANES) {
                        let end = d_k.nrows().min(from + LANES);
                        let range = i * KEYS_PER_TASK + from..i * KEYS_PER_TASK + end;
                        let next = range.end..len.min(range.end + LANES);
                        prefetch(keys.slice(s![next, ..]));
                        prefetch(d_k.slice(s![end..d_k.nrows().min(end + LANES), ..]));
                        let mask = inputs.mask.as_ref();
                        let mask = mask.map(|mask| mask.slice_move(s![n / h, range.clone()]));
                        let (keys, codes) = (keys.slice(s![range.clone(), ..]), head.codes.slice(s![range]));
                        let mut d_k = d_k.slice_mut(s![from..end, ..]);
                        finite &= all_finite(keys);
                        estimator.key_backward(keys, codes, head.codewords, d_k.view_mut()); // (1)
                        commitment::add_gradient(keys, codes, head.codewords, mask, commit_scale, d_k); // (3)
                    }
                    finite
                })
                .reduce(|| true, |a, b| a & b);
            (d_c, biases, finite & finite_keys)
        })
        .collect();
    let padded = [&inputs.q, &inputs.k, &inputs.v, &d_out];
    let mut finite = padded.into_iter().all(|x| inputs.padding_finite(x));
    for (n, (d_codewords, d_biases, finite_head)) in of_heads.into_iter().enumerate() {
        finite &= finite_head;
        let mut sum = gradients.codewords.index_axis_mut(Axis(0), n % h);
        sum += &d_codewords;
        if let (Some(sums), Some(d)) = (&mut gradients.biases, d_biases) {
            let (mut content, mut position) = (sums.content.row_mut(n % h), sums.position.row_mut(n % h));
            content += &d.content;
            position += &d.position;
            let mut relative = sums.relative.index_axis_mut(Axis(0), n % h);
            relative += &d.relative;
        }
    }
    finite
}
