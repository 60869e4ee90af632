//! What undoes formulas (3) to (1) of the module above.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView4, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{BidirectionalAttention, BidirectionalGradients, BidirectionalInputs, BidirectionalSaved};
use crate::Scalar;
use crate::attention::bidirectional::{sweep, sweep::Sums};
use crate::attention::heads::{fit, parts};
use crate::codebook::assign::KEYS_PER_TASK;
use crate::codebook::{Estimator, commitment};
use crate::ops::finite::all_finite;

/// Backward on checked shapes; whether q, k and `d_out` are finite.
pub(super) fn run<T: Scalar>(
    attention: &BidirectionalAttention,
    inputs: &BidirectionalInputs<'_, T>,
    saved: BidirectionalSaved<T>,
    d_out: ArrayView4<'_, T>,
    (estimator, commit_weight): (Estimator, f64),
    gradients: &mut BidirectionalGradients<T>,
) -> bool {
    let (b, heads, t, d_k) = inputs.q.dim();
    let (_, h, keys, d_v) = inputs.v.dim();
    let BidirectionalSaved { visible, lse, codes, codewords } = saved;
    fit(&mut gradients.q, (b, heads, t), d_k);
    fit(&mut gradients.k, (b, h, keys), d_k);
    fit(&mut gradients.v, (b, h, keys), d_v);
    gradients.codewords = Array3::zeros(codewords.raw_dim());
    let (group, segments) = (heads / h, sweep::segments(b * heads, t));
    // (2)
    let of_queries: Vec<Sums<T>> = parts(&mut gradients.q)
        .into_par_iter()
        .enumerate()
        .map(|(n, d_q)| {
            let (b, head) = (n / heads, n % heads);
            let (q, d_out) = (inputs.q.slice(s![b, head, .., ..]), d_out.slice(s![b, head, .., ..]));
            let lse = lse.slice(s![b, head, ..]);
            let lse = lse.to_slice().expect("standard layout");
            sweep::backward(&visible[n / group], q, lse, d_out, d_q, segments)
        })
        .collect();
    let commit_scale = T::from_f64(2.0 * commit_weight / inputs.counted().max(1) as f64);
    let buffers = parts(&mut gradients.k).into_iter().zip(parts(&mut gradients.v)).collect::<Vec<_>>();
    let of_keys: Vec<(Array2<T>, bool)> = buffers
        .into_par_iter()
        .enumerate()
        .map(|(n, (mut d_k, d_v))| {
            let (b, h) = (n / h, n % h);
            let keys = Keys {
                keys: inputs.k.slice(s![b, h, .., ..]),
                codes: codes.slice(s![b, h, ..]),
                codewords: codewords.index_axis(Axis(0), h),
                mask: inputs.key_mask.as_ref().map(|mask| mask.row(b)),
            };
            let mut sums = Sums::zeros(&visible[n]);
            of_queries[n * group..][..group].iter().for_each(|of_head| sums.add(of_head));
            visible[n].rows_of_keys(keys.codes, keys.mask, sums.values.view(), d_v);
            let mut d_codewords = Array2::zeros(keys.codewords.raw_dim());
            if attention.key_gradient {
                // What codewords get of it is what keys pass on.
                visible[n].share(&mut sums.codewords);
                visible[n].rows_of_keys(keys.codes, keys.mask, sums.codewords.view(), d_k.view_mut());
                let Keys { keys, codes, codewords, .. } = keys;
                estimator.add_codeword_gradient(keys, codes, codewords, d_k.view(), d_codewords.view_mut());
            } else {
                d_k.fill(T::zero());
                visible[n].add_to_codes(sums.codewords.view(), d_codewords.view_mut());
            }
            let through = attention.key_gradient.then_some(estimator);
            (d_codewords, sums.finite & keys.backward(through, commit_scale, d_k))
        })
        .collect();
    let mut finite = true;
    for (n, (d_codewords, finite_head)) in of_keys.into_iter().enumerate() {
        finite &= finite_head;
        let mut sum = gradients.codewords.index_axis_mut(Axis(0), n % h);
        sum += &d_codewords;
    }
    finite
}

/// Keys of one sequence and head.
struct Keys<'a, T> {
    keys: ArrayView2<'a, T>,
    codes: ArrayView1<'a, u32>,
    codewords: ArrayView2<'a, T>,
    mask: Option<ArrayView1<'a, bool>>,
}

impl<T: Scalar> Keys<'_, T> {
    /// From the gradient of the quantized keys to that of the keys, with that of the commitment loss (3); whether keys are finite.
    fn backward(&self, estimator: Option<Estimator>, commit_scale: T, mut d: ArrayViewMut2<'_, T>) -> bool {
        d.axis_chunks_iter_mut(Axis(0), KEYS_PER_TASK)
            .into_par_iter()
            .enumerate()
            .map(|(i, mut d)| {
                let range = i * KEYS_PER_TASK..i * KEYS_PER_TASK + d.nrows();
                let keys = self.keys.slice(s![range.clone(), ..]);
                let codes = self.codes.slice(s![range.clone()]);
                let mask = self.mask.as_ref().map(|mask| mask.slice_move(s![range]));
                if let Some(estimator) = estimator {
                    estimator.key_backward(keys, codes, self.codewords, d.view_mut()); // (1)
                }
                commitment::add_gradient(keys, codes, self.codewords, mask, commit_scale, d); // (3)
                all_finite(keys)
            })
            .reduce(|| true, |a, b| a & b)
    }
}
