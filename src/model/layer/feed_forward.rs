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
use crate::model::buffers::Buffers;
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
    fn activate(&self, buffers: &Buffers<T>) -> Array2<T> {
        let mut y = buffers.take(self.h.dim());
        match &self.gate {
            Some(gate) => silu::gate_into(self.h.view(), gate.view(), &mut y),
            None => gelu::forward_into(self.h.view(), &mut y),
        }
        y
    }
}

impl<T> Projected<T> {
    fn give(self, buffers: &Buffers<T>) {
        buffers.give_all([self.h].into_iter().chain(self.gate));
    }
}

impl<T> Saved<T> {
    /// Gives back what no backward is to need.
    pub fn give(self, buffers: &Buffers<T>) {
        self.projected.give(buffers);
        buffers.give(self.x);
    }
}

/// The branch of `x` [B T, D], without the residual; with packed weights, if there are and if they suit so many tokens.
pub(in crate::model) fn forward<T: Scalar>(
    p: &FeedForwardParameters<T>,
    x: Array2<T>,
    prepared: Option<&Prepared<T>>,
    buffers: &Buffers<T>,
) -> Result<(Array2<T>, Saved<T>), Error> {
    let (x_norm, norm) = buffers.normalize(&x, &p.norm)?; // (1)
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
            let gate = p.w_gate.as_ref().map(|w| buffers.product(&x_norm, w));
            Projected { h: buffers.product(&x_norm, &p.w_in), gate }
        }
    };
    buffers.give(x_norm);
    let h = projected.activate(buffers);
    let branch = match packed {
        Some((_, output)) => output.product(h.view()),
        None => buffers.product(&h, &p.w_out), // (3)
    };
    buffers.give(h);
    Ok((branch, Saved { x, norm, projected }))
}

/// Gradient of `x`; gradients of the parameters are added to `d`.
pub(in crate::model) fn backward<T: Scalar>(
    p: &FeedForwardParameters<T>,
    saved: Saved<T>,
    d_branch: &Array2<T>,
    d: &mut FeedForwardParameters<T>,
    buffers: &Buffers<T>,
) -> Result<Array2<T>, Error> {
    let Saved { x, norm, projected } = saved;
    // (3)
    let mut h = projected.activate(buffers);
    let mut d_h = buffers.take(h.dim());
    linear::backward_into(h.view(), p.w_out.view(), d_branch.view(), d.w_out.view_mut(), None, &mut d_h)?;
    // (2): h makes room for its gradient's other half.
    let (d_in, rest) = match &projected.gate {
        Some(gate) => {
            silu::gate_backward_in_place(projected.h.view(), gate.view(), &mut d_h, &mut h);
            (h, d_h)
        }
        None => {
            gelu::backward_in_place(projected.h.view(), &mut d_h);
            (d_h, h)
        }
    };
    let x_norm = buffers.normalize(&x, &p.norm)?.0;
    let mut d_x_norm = buffers.take(x_norm.dim());
    linear::backward_into(x_norm.view(), p.w_in.view(), d_in.view(), d.w_in.view_mut(), None, &mut d_x_norm)?;
    if let (Some(w), Some(d_w)) = (&p.w_gate, &mut d.w_gate) {
        let (d_gate, d_w, d_x_norm) = (rest.view(), d_w.view_mut(), d_x_norm.view_mut());
        linear::add_backward(x_norm.view(), w.view(), d_gate, d_w, None, d_x_norm)?;
    }
    buffers.give_all([d_in, rest, x_norm]);
    projected.give(buffers);
    // (1)
    let NormParameters { gain, bias } = &mut d.norm;
    let (gains, gain, bias) = (p.norm.gain.view(), gain.view_mut(), bias.view_mut());
    rms_norm::backward_affine_in_place(x.view(), &norm, gains, &mut d_x_norm, gain, bias)?;
    buffers.give(x);
    Ok(d_x_norm)
}
