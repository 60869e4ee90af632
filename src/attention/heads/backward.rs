//! What undoes formulas (3) to (1) of the module above.

use ndarray::{Array2, Array3, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::{BatchBiasGradients, BatchGradients, BatchInputs, BatchSaved, fit, parts};
use crate::Scalar;
use crate::attention::VqAttention;
use crate::attention::blockwise::{self, RowGradients, Saved};
use crate::codebook::assign::KEYS_PER_TASK;
use crate::codebook::{Estimator, commitment};
use crate::ops::finite::all_finite;
use crate::ops::matmul::prefetch;
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
    let ((b, h, t, k), n_key_heads, group) = (inputs.q.dim(), inputs.n_key_heads(), inputs.group());
    let d_v = inputs.v.len_of(Axis(3));
    let BatchSaved { lse, starts, codes, codewords } = saved;
    fit(&mut gradients.q, (b, h, t), k);
    fit(&mut gradients.k, (b, n_key_heads, t), k);
    fit(&mut gradients.v, (b, n_key_heads, t), d_v);
    gradients.codewords = Array3::zeros(codewords.raw_dim());
    gradients.biases = inputs.biases.as_ref().map(|biases| BatchBiasGradients {
        content: Array2::zeros(biases.content.raw_dim()),
        position: Array2::zeros(biases.position.raw_dim()),
        relative: Array3::zeros(biases.relative.raw_dim()),
    });
    let commit_scale = T::from_f64(2.0 * commit_weight / inputs.counted().max(1) as f64);
    let segments = TASKS.div_ceil((b * n_key_heads).max(1));
    let threads = rayon::current_num_threads().div_ceil((b * n_key_heads).max(1));
    let mut of_queries = parts(&mut gradients.q).into_iter();
    let buffers = parts(&mut gradients.k).into_iter().zip(parts(&mut gradients.v));
    let buffers = buffers.map(|buffers| (of_queries.by_ref().take(group).collect::<Vec<_>>(), buffers));
    let of_heads: Vec<_> = starts
        .into_iter()
        .zip(buffers)
        .collect::<Vec<_>>()
        .into_par_iter()
        .enumerate()
        .map(|(n, (start, (d_q, (d_k, d_v))))| {
            let (b, key_head) = (n / n_key_heads, n % n_key_heads);
            let len = inputs.len_of(b);
            let keys = inputs.k.slice(s![b, key_head, ..len, ..]);
            let codes_of_keys = codes.slice(s![b, key_head, ..len]);
            let (mut d_k, mut padding_of_keys) = d_k.split_at(Axis(0), len);
            let (mut d_v, mut padding_of_values) = d_v.split_at(Axis(0), len);
            padding_of_keys.fill(T::zero());
            padding_of_values.fill(T::zero());
            let codewords_of_head = codewords.index_axis(Axis(0), key_head);
            let mut d_c = Array2::zeros(codewords_of_head.raw_dim());
            let (mut d_biases, mut finite) = (vec![], true);
            // In the order of query heads; the first of them finds the buffers as they are.
            let members = d_q.into_iter().zip(std::iter::repeat_n(start, group)).enumerate();
            for (member, (d_q, start)) in members {
                let h = key_head * group + member;
                let head = inputs.head(b, h, &codes, &codewords);
                let saved = Saved { lse: lse.slice(s![b, h, ..len]).to_owned(), start };
                let d_out = d_out.slice(s![b, h, ..len, ..]);
                let (d_q, mut padding) = d_q.split_at(Axis(0), len);
                padding.fill(T::zero());
                let mut others = (member > 0).then(|| (d_k.to_owned(), d_v.to_owned()));
                let (k_hat, v) = match &mut others {
                    None => (d_k.view_mut(), d_v.view_mut()),
                    Some((d_k, d_v)) => (d_k.view_mut(), d_v.view_mut()),
                };
                let rows = RowGradients { q: d_q, k_hat, v };
                let (own_d_c, own_d_biases, own_finite) =
                    blockwise::run_backward(attention, &head, saved, d_out, rows, segments, threads); // (2)
                if let Some((own_d_k, own_d_v)) = others {
                    d_k += &own_d_k;
                    d_v += &own_d_v;
                }
                d_c += &own_d_c;
                d_biases.push(own_d_biases);
                finite &= own_finite;
            }
            estimator.add_codeword_gradient(
                keys,
                codes_of_keys,
                codewords_of_head,
                d_k.view(),
                d_c.view_mut(),
            );
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
                        let mask = mask.map(|mask| mask.slice_move(s![b, range.clone()]));
                        let (keys, codes) =
                            (keys.slice(s![range.clone(), ..]), codes_of_keys.slice(s![range]));
                        let mut d_k = d_k.slice_mut(s![from..end, ..]);
                        finite &= all_finite(keys);
                        estimator.key_backward(keys, codes, codewords_of_head, d_k.view_mut()); // (1)
                        let codewords = codewords_of_head;
                        commitment::add_gradient(keys, codes, codewords, mask, commit_scale, d_k); // (3)
                    }
                    finite
                })
                .reduce(|| true, |a, b| a & b);
            (d_c, d_biases, finite & finite_keys)
        })
        .collect();
    let padded = [&inputs.q, &inputs.k, &inputs.v, &d_out];
    let mut finite = padded.into_iter().all(|x| inputs.padding_finite(x));
    for (n, (d_codewords, d_biases, finite_head)) in of_heads.into_iter().enumerate() {
        finite &= finite_head;
        let key_head = n % n_key_heads;
        let mut sum = gradients.codewords.index_axis_mut(Axis(0), key_head);
        sum += &d_codewords;
        let Some(sums) = &mut gradients.biases else { continue };
        for (member, d) in d_biases.into_iter().flatten().enumerate() {
            let h = key_head * group + member;
            let (mut content, mut position) = (sums.content.row_mut(h), sums.position.row_mut(h));
            content += &d.content;
            position += &d.position;
            let mut relative = sums.relative.index_axis_mut(Axis(0), key_head);
            relative += &d.relative;
        }
    }
    finite
}
