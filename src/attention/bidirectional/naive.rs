//! The definition: every query meets every key that exists, in plain loops.
//!
//! ```text
//! (1)  s_ij = q_i . c_{z_j}
//! (2)  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//! (3)  o_i  = sum_j p_ij v_j
//! ```
//!
//! This is the oracle of the fast form: it shares no code with it and is never made faster. Cost: T T' (K + V).

use ndarray::{Array1, Array2, ArrayView2};

use super::{Gradients, Inputs, Output};
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// (1) and (2): the keys that query i sees, its weights, and lse.
fn softmax<T: Scalar>(inputs: &Inputs<'_, T>, i: usize) -> (Vec<usize>, Vec<T>, T) {
    let keys: Vec<usize> = inputs.visible_keys().collect();
    let score = |&j: &usize| inputs.q.row(i).dot(&inputs.codewords.row(inputs.codes[j] as usize));
    let scores: Vec<T> = keys.iter().map(score).collect();
    let max = scores.iter().fold(T::neg_infinity(), |max, &s| max.max(s));
    let weights: Vec<T> = scores.iter().map(|&s| (s - max).exp()).collect();
    let sum: T = weights.iter().copied().sum();
    let lse = if keys.is_empty() { T::neg_infinity() } else { max + sum.ln() };
    (keys, weights.iter().map(|&w| w / sum).collect(), lse)
}

/// Outputs of one head.
///
/// # Errors
/// As [`bidirectional::forward`](super::forward).
pub fn forward<T: Scalar>(inputs: &Inputs<'_, T>) -> Result<Output<T>, Error> {
    inputs.check()?;
    let t = inputs.q.nrows();
    let mut output = Output { out: Array2::zeros((t, inputs.v.ncols())), lse: Array1::zeros(t) };
    for i in 0..t {
        let (keys, weights, lse) = softmax(inputs, i);
        output.lse[i] = lse;
        for (&j, &p) in keys.iter().zip(&weights) {
            output.out.row_mut(i).scaled_add(p, &inputs.v.row(j)); // (3)
        }
    }
    Ok(output)
}

/// Gradients of `sum(d_out * out)`.
///
/// ```text
/// (3)  dp_ij = dO_i . v_j            dv_j += p_ij dO_i
/// (2)  ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
/// (1)  dq_i += ds_ij c_{z_j}         dc_{z_j} += ds_ij q_i
/// ```
///
/// # Shapes
/// `d_out` [T, V].
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Scalar>(inputs: &Inputs<'_, T>, d_out: ArrayView2<'_, T>) -> Result<Gradients<T>, Error> {
    inputs.check()?;
    let t = inputs.q.nrows();
    check_shape("d_out", &[t, inputs.v.ncols()], d_out.shape())?;
    check_finite("d_out", d_out)?;
    let (mut d_q, mut d_v) = (Array2::zeros(inputs.q.raw_dim()), Array2::zeros(inputs.v.raw_dim()));
    let mut d_codewords = Array2::zeros(inputs.codewords.raw_dim());
    for i in 0..t {
        let (keys, weights, _) = softmax(inputs, i);
        let d_weights: Vec<T> = keys.iter().map(|&j| d_out.row(i).dot(&inputs.v.row(j))).collect();
        let delta: T = weights.iter().zip(&d_weights).map(|(&p, &d_p)| p * d_p).sum();
        for ((&j, &p), &d_p) in keys.iter().zip(&weights).zip(&d_weights) {
            d_v.row_mut(j).scaled_add(p, &d_out.row(i)); // (3)
            let d_s = p * (d_p - delta); // (2)
            let code = inputs.codes[j] as usize;
            d_q.row_mut(i).scaled_add(d_s, &inputs.codewords.row(code)); // (1)
            d_codewords.row_mut(code).scaled_add(d_s, &inputs.q.row(i));
        }
    }
    Ok(Gradients { q: d_q, v: d_v, codewords: d_codewords })
}
