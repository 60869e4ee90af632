//! One unit of an encoder: one or two pre-norm residual branches.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q = K^(-1/4) RMSNorm(x~ Wq),  k = K^(-1/4) RMSNorm(x~ Wk)   per head
//!      v = SiLU(x~ Wv)                                             without a gate: v = x~ Wv
//! (3)  o = attention(q, k, v)                                      every query sees every key that exists
//! (4)  y = x + (o * SiLU(x~ Wg)) Wo                                without a gate: y = x + o Wo
//! (5)  y = y + feed-forward branch of y                            if the configuration has it
//! ```
//!
//! The formulas of the language model's unit, with another (3): no relative biases, since distances have no part in a cache
//! without time. Rows are tokens, sequence after sequence: [B T, width].

use ndarray::{Array2, Array4, ArrayView2};

use super::{EncoderConfig, EncoderUnitParameters, EncoderUnitReport};
use crate::attention::{BidirectionalInputs, BidirectionalSaved};
use crate::codebook::Codebook;
use crate::model::NormParameters;
use crate::model::layer::{feed_forward, per_head, rows};
use crate::ops::{linear, rms_norm, silu};
use crate::{Error, Scalar};

/// What backward needs of forward; (1) and (2) after the projections are computed again.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    x: Array2<T>,
    norm: rms_norm::Saved<T>,
    projected: Projected<T>,
    out: Array2<T>,
    attention: BidirectionalSaved<T>,
    feed_forward: Option<feed_forward::Saved<T>>,
}

/// x~ times Wq, Wk, Wv, Wg.
#[derive(Debug, Clone)]
struct Projected<T> {
    q: Array2<T>,
    k: Array2<T>,
    v: Array2<T>,
    gate: Option<Array2<T>>,
}

/// (2), with what its backward needs.
struct Activated<T> {
    q: Array2<T>,
    q_norm: rms_norm::Saved<T>,
    k: Array2<T>,
    k_norm: rms_norm::Saved<T>,
    /// None where values stay as they are projected.
    v: Option<Array2<T>>,
}

/// A unit and the sequences before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit<'a, T> {
    pub config: &'a EncoderConfig,
    pub parameters: &'a EncoderUnitParameters<T>,
    pub codebook: &'a Codebook<T>,
    /// B.
    pub batch: usize,
    /// Positions that exist [B, T].
    pub exists: ArrayView2<'a, bool>,
}

impl<T: Scalar> Unit<'_, T> {
    /// The unit's output for `x` [B T, D], what its codebook learns from, and what backward needs.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(&self, x: Array2<T>) -> Result<(Array2<T>, EncoderUnitReport<T>, Saved<T>), Error> {
        let (x_norm, norm) = self.normalize(&x)?; // (1)
        let projected = self.project(&x_norm)?;
        let activated = self.activate(&projected)?; // (2)
        let inputs = self.inputs(&projected, &activated);
        let (output, attention) = self.config.attention.forward(&inputs, self.codebook)?; // (3)
        let report = EncoderUnitReport { stats: output.stats, commit_loss: output.commit_loss };
        let out = rows(output.out);
        let gated = gate(&out, &projected)?;
        let branch =
            linear::forward(gated.as_ref().unwrap_or(&out).view(), self.parameters.w_out.view(), None)?;
        let mut y = branch + &x; // (4)
        let mut saved = Saved { x, norm, projected, out, attention, feed_forward: None };
        if let Some(parameters) = &self.parameters.feed_forward {
            let (branch, of_branch) = feed_forward::forward(parameters, y, None)?;
            y = branch + &of_branch.x; // (5)
            saved.feed_forward = Some(of_branch);
        }
        Ok((y, report, saved))
    }

    /// The keys [B, Hk, T, K] of `x` [B T, D].
    pub fn keys(&self, x: &Array2<T>) -> Result<Array4<T>, Error> {
        let k = linear::forward(self.normalize(x)?.0.view(), self.parameters.w_k.view(), None)?;
        let k = rms_norm::forward(k.view(), self.config.key_heads(), self.scale())?.0;
        Ok(per_head(&k, self.batch, self.config.key_heads()).to_owned())
    }

    /// Gradient of the unit's input; gradients of the parameters are added to `d`.
    pub fn backward(
        &self,
        saved: Saved<T>,
        mut d_y: Array2<T>,
        d: &mut EncoderUnitParameters<T>,
    ) -> Result<Array2<T>, Error> {
        let Saved { x, norm, projected, out, attention, feed_forward } = saved;
        let (p, config) = (self.parameters, self.config);
        // (5)
        let parameters = p.feed_forward.as_ref().zip(d.feed_forward.as_mut());
        if let (Some((p, d)), Some(saved)) = (parameters, feed_forward) {
            let d_x = feed_forward::backward(p, saved, &d_y, d)?;
            d_y += &d_x;
        }
        // (4)
        let gated = gate(&out, &projected)?;
        let (input, d_w) = (gated.as_ref().unwrap_or(&out).view(), d.w_out.view_mut());
        let d_gated = linear::backward(input, p.w_out.view(), d_y.view(), d_w, None)?;
        let (d_out, d_gate) = match &projected.gate {
            Some(gate) => {
                let (d_out, d_gate) = silu::gate_backward(out.view(), gate.view(), d_gated.view())?;
                (d_out, Some(d_gate))
            }
            None => (d_gated, None),
        };
        // (3)
        let activated = self.activate(&projected)?;
        let inputs = self.inputs(&projected, &activated);
        let d_out = per_head(&d_out, self.batch, config.n_heads);
        let (estimator, weight) = (config.estimator, config.commit_weight);
        let d_attention = config.attention.backward(&inputs, attention, d_out, estimator, weight)?;
        // (2)
        let [d_q, d_k, mut d_v] = [d_attention.q, d_attention.k, d_attention.v].map(rows);
        let (n_heads, key_heads, scale) = (config.n_heads, config.key_heads(), self.scale());
        let d_q = rms_norm::backward(projected.q.view(), &activated.q_norm, n_heads, scale, d_q.view())?;
        let d_k = rms_norm::backward(projected.k.view(), &activated.k_norm, key_heads, scale, d_k.view())?;
        if activated.v.is_some() {
            d_v = silu::backward(projected.v.view(), d_v.view())?;
        }
        let x_norm = self.normalize(&x)?.0;
        let mut d_x_norm = Array2::zeros(x_norm.raw_dim());
        let mut add = |w: &Array2<T>, d_w: &mut Array2<T>, d_projected: &Array2<T>| {
            let (w, d_w, d_x_norm) = (w.view(), d_w.view_mut(), d_x_norm.view_mut());
            linear::add_backward(x_norm.view(), w, d_projected.view(), d_w, None, d_x_norm)
        };
        add(&p.w_q, &mut d.w_q, &d_q)?;
        add(&p.w_k, &mut d.w_k, &d_k)?;
        add(&p.w_v, &mut d.w_v, &d_v)?;
        if let (Some(w), Some(d_w), Some(d_gate)) = (&p.w_gate, &mut d.w_gate, &d_gate) {
            add(w, d_w, d_gate)?;
        }
        // (1)
        let NormParameters { gain, bias } = &mut d.norm;
        let (gains, gain, bias) = (p.norm.gain.view(), gain.view_mut(), bias.view_mut());
        Ok(rms_norm::backward_affine(x.view(), &norm, gains, d_x_norm.view(), gain, bias)? + &d_y)
    }

    fn scale(&self) -> T {
        T::from_f64(self.config.key_scale())
    }

    /// (1)
    fn normalize(&self, x: &Array2<T>) -> Result<(Array2<T>, rms_norm::Saved<T>), Error> {
        let NormParameters { gain, bias } = &self.parameters.norm;
        rms_norm::forward_affine(x.view(), gain.view(), bias.view())
    }

    fn project(&self, x_norm: &Array2<T>) -> Result<Projected<T>, Error> {
        let p = self.parameters;
        let project = |w: &Array2<T>| linear::forward(x_norm.view(), w.view(), None);
        Ok(Projected {
            q: project(&p.w_q)?,
            k: project(&p.w_k)?,
            v: project(&p.w_v)?,
            gate: p.w_gate.as_ref().map(project).transpose()?,
        })
    }

    /// (2)
    fn activate(&self, projected: &Projected<T>) -> Result<Activated<T>, Error> {
        let scale = self.scale();
        let (q, q_norm) = rms_norm::forward(projected.q.view(), self.config.n_heads, scale)?;
        let (k, k_norm) = rms_norm::forward(projected.k.view(), self.config.key_heads(), scale)?;
        let v = projected.gate.as_ref().map(|_| silu::forward(projected.v.view())).transpose()?;
        Ok(Activated { q, q_norm, k, k_norm, v })
    }

    fn inputs<'s>(
        &'s self,
        projected: &'s Projected<T>,
        activated: &'s Activated<T>,
    ) -> BidirectionalInputs<'s, T> {
        let key_heads = self.config.key_heads();
        BidirectionalInputs {
            q: per_head(&activated.q, self.batch, self.config.n_heads),
            k: per_head(&activated.k, self.batch, key_heads),
            v: per_head(activated.v.as_ref().unwrap_or(&projected.v), self.batch, key_heads),
            key_mask: Some(self.exists),
        }
    }
}

/// o * SiLU(x~ Wg) of (4), where there is a gate.
fn gate<T: Scalar>(out: &Array2<T>, projected: &Projected<T>) -> Result<Option<Array2<T>>, Error> {
    projected.gate.as_ref().map(|gate| silu::gate(out.view(), gate.view())).transpose()
}
