//! Codewords that move together: a basis behind one linear map (SimVQ).
//!
//! ```text
//! (1)  C = F W^T (+ b)                F [S, f] the basis, W [K, f], b [K], of each head
//! (2)  d_W += d_C^T F
//! (3)  d_b += sum_s d_C_s
//! (4)  d_F += d_C W                   if the basis is learned
//! ```
//!
//! One selected code moves W, and W moves every codeword: codes that no key takes do not stay behind. With the basis frozen a
//! step along (2) moves codeword s by `F_s . F_z` times what it moves codeword z.
//!
//! Cost: 2 S K f for (1), and for each of (2) and (4). Source: Zhu et al., "Addressing Representation Collapse in Vector
//! Quantized Models with One Linear Layer" (arXiv 2411.02038).

use ndarray::{Array3, ArrayView3, Axis, Zip};

use super::CodebookParameters;
use crate::Scalar;
use crate::ops::matmul::{add_product, product};

/// (1): `basis` [H, S, f]; weight and bias are in the parameters.
pub(super) fn codewords<T: Scalar>(
    basis: ArrayView3<'_, T>,
    parameters: &CodebookParameters<T>,
) -> Array3<T> {
    let weight = parameters.weight.as_ref().expect("a linear codebook has one");
    let mut codewords = Array3::zeros((basis.len_of(Axis(0)), basis.len_of(Axis(1)), weight.len_of(Axis(1))));
    Zip::from(codewords.outer_iter_mut())
        .and(basis.outer_iter())
        .and(weight.outer_iter())
        .for_each(|c, f, w| product(f, w.t(), c));
    if let Some(bias) = &parameters.bias {
        codewords += &bias.view().insert_axis(Axis(1));
    }
    codewords
}

/// (2), (3) and (4): adds to `d` what `parameters` get of the gradient `d_codewords` [H, S, K].
pub(super) fn backward<T: Scalar>(
    basis: ArrayView3<'_, T>,
    parameters: &CodebookParameters<T>,
    d_codewords: ArrayView3<'_, T>,
    d: &mut CodebookParameters<T>,
) {
    let weight = parameters.weight.as_ref().expect("a linear codebook has one");
    let d_weight = d.weight.as_mut().expect("like the parameters");
    Zip::from(d_weight.outer_iter_mut())
        .and(d_codewords.outer_iter())
        .and(basis.outer_iter())
        .for_each(|d_w, d_c, f| add_product(d_c.t(), f, d_w)); // (2)
    if let Some(d_bias) = &mut d.bias {
        *d_bias += &d_codewords.sum_axis(Axis(1)); // (3)
    }
    if let Some(d_basis) = &mut d.basis {
        Zip::from(d_basis.outer_iter_mut())
            .and(d_codewords.outer_iter())
            .and(weight.outer_iter())
            .for_each(|d_f, d_c, w| add_product(d_c, w, d_f)); // (4)
    }
}
