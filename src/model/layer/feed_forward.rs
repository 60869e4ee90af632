//! The second branch of a unit, if it has one: every token by itself, wider on the way.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  SwiGLU: h = (x~ Win) * SiLU(x~ Wg)          GELU: h = gelu(x~ Win)
//! (3)  branch = h Wout
//! ```
//!
//! No bias stands beside the matrices: the norm has one. Source: SwiGLU (Shazeer, arXiv 2002.05202).

use ndarray::{Array2, s};

use super::prepared::Prepared;
use crate::model::parameters::{FeedForwardParameters, NormParameters};
use crate::ops::{gelu, linear, rms_norm, silu};
use crate::{Error, Scalar};

/// What backward needs of forward; (2) is computed again.
#[derive(Debug, Clone)]
pub(in crate::model) struct Saved<T> {
    pub x: Array2<T>,
    norm: rms_norm::Saved<T>,
    projected: Projected<T>,
}

/// x~ Win and x~ Wg.
#[derive(Debug, Clone)]
struct Projected<T> {
    h: Array2<T>,
    gate: Option<Array2<T>>,
}

impl<T: Scalar> Projected<T> {
    /// (2)
    fn activate(&self) -> Result<Array2<T>, Error> {
        match &self.gate {
            Some(gate) => silu::gate(self.h.view(), gate.view()),
            None => gelu::forward(self.h.view()),
        }
    }
}

/// The branch of `x` [B T, D], without the residual; with packed weights, if there are and if they suit so many tokens.
pub(in crate::model) fn forward<T: Scalar>(
    p: &FeedForwardParameters<T>,
    x: Array2<T>,
    prepared: Option<&Prepared<T>>,
) -> Result<(Array2<T>, Saved<T>), Error> {
    let (x_norm, norm) = normalize(p, &x)?; // (1)
    let packed = prepared
        .and_then(|prepared| prepared.packed_for(&x_norm))
        .and_then(|packed| packed.feed_forward.as_ref());
    let projected = match packed {
        Some((input, _)) => {
            let all = input.product(x_norm.view());
            let width = p.w_in.ncols();
            let gate = p.w_gate.as_ref().map(|_| all.slice(s![.., width..]).to_owned());
            Projected { h: all.slice(s![.., ..width]).to_owned(), gate }
        }
        None => {
            let gate = p.w_gate.as_ref().map(|w| linear::forward(x_norm.view(), w.view(), None));
            Projected { h: linear::forward(x_norm.view(), p.w_in.view(), None)?, gate: gate.transpose()? }
        }
    };
    let h = projected.activate()?;
    let branch = match packed {
        Some((_, output)) => output.product(h.view()),
        None => linear::forward(h.view(), p.w_out.view(), None)?, // (3)
    };
    Ok((branch, Saved { x, norm, projected }))
}

/// Gradient of `x`; gradients of the parameters are added to `d`.
pub(in crate::model) fn backward<T: Scalar>(
    p: &FeedForwardParameters<T>,
    saved: Saved<T>,
    d_branch: &Array2<T>,
    d: &mut FeedForwardParameters<T>,
) -> Result<Array2<T>, Error> {
    let Saved { x, norm, projected } = saved;
    // (3)
    let h = projected.activate()?;
    let d_h = linear::backward(h.view(), p.w_out.view(), d_branch.view(), d.w_out.view_mut(), None)?;
    drop(h);
    // (2)
    let (d_in, d_gate) = match &projected.gate {
        Some(gate) => {
            let (d_in, d_gate) = silu::gate_backward(projected.h.view(), gate.view(), d_h.view())?;
            (d_in, Some(d_gate))
        }
        None => (gelu::backward(projected.h.view(), d_h.view())?, None),
    };
    let x_norm = normalize(p, &x)?.0;
    let mut d_x_norm = linear::backward(x_norm.view(), p.w_in.view(), d_in.view(), d.w_in.view_mut(), None)?;
    if let (Some(w), Some(d_w), Some(d_gate)) = (&p.w_gate, &mut d.w_gate, d_gate) {
        let (d_w, d_x_norm) = (d_w.view_mut(), d_x_norm.view_mut());
        linear::add_backward(x_norm.view(), w.view(), d_gate.view(), d_w, None, d_x_norm)?;
    }
    // (1)
    let NormParameters { gain, bias } = &mut d.norm;
    let (gains, gain, bias) = (p.norm.gain.view(), gain.view_mut(), bias.view_mut());
    rms_norm::backward_affine(x.view(), &norm, gains, d_x_norm.view(), gain, bias)
}

fn normalize<T: Scalar>(
    p: &FeedForwardParameters<T>,
    x: &Array2<T>,
) -> Result<(Array2<T>, rms_norm::Saved<T>), Error> {
    rms_norm::forward_affine(x.view(), p.norm.gain.view(), p.norm.bias.view())
}
