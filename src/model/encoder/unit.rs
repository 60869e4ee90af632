//! One unit of an encoder: one or two pre-norm residual branches.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q, k, v from x~                                             see `layer::projections`
//! (3)  o = attention(q, k, v)                                      every query sees every key that exists
//! (4)  y = x + (o * SiLU(x~ Wg)) Wo                                without a gate: y = x + o Wo
//! (5)  y = y + feed-forward branch of y                            if the configuration has it
//! ```
//!
//! The formulas of the language model's unit, with another (3): no relative biases, since distances have no part in a cache
//! without time. Rows are tokens, sequence after sequence: [B T, width].

use ndarray::{Array2, Array4, ArrayView2};

use super::{EncoderConfig, EncoderUnitParameters, EncoderUnitReport};
use crate::attention::{
    BidirectionalGradients, BidirectionalInputs, BidirectionalOutput, BidirectionalSaved,
};
use crate::codebook::Codebook;
use crate::model::buffers::Buffers;
use crate::model::layer::feed_forward;
use crate::model::layer::projections::{
    Activated, Projected, ProjectionGradients, Projections, per_head, rows,
};
use crate::ops::rows::add;
use crate::{Error, Scalar};

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    x: Array2<T>,
    projected: Projected<T>,
    out: Array2<T>,
    attention: BidirectionalSaved<T>,
    feed_forward: Option<feed_forward::Saved<T>>,
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
    pub buffers: &'a Buffers<T>,
}

impl<T: Scalar> Unit<'_, T> {
    /// The unit's output for `x` [B T, D], what its codebook learns from, and what backward needs.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(&self, x: Array2<T>) -> Result<(Array2<T>, EncoderUnitReport<T>, Saved<T>), Error> {
        let projections = self.projections();
        let projected = projections.project(&x)?; // (1)
        let activated = projections.activate(&projected)?; // (2)
        let inputs = self.inputs(&projected, &activated);
        let (b, h, t, _) = inputs.q.dim();
        let out = self.buffers.take_heads((b, h, t), self.config.d_v);
        let mut output = BidirectionalOutput { out, ..BidirectionalOutput::default() };
        let attention = self.config.attention.forward_into(&inputs, self.codebook, &mut output)?; // (3)
        let report = EncoderUnitReport { stats: output.stats, commit_loss: output.commit_loss };
        let out = rows(output.out);
        let mut y = projections.branch(&out, &projected, activated);
        add(x.view(), &mut y); // (4)
        let mut saved = Saved { x, projected, out, attention, feed_forward: None };
        if let Some(parameters) = &self.parameters.feed_forward {
            let of_branch;
            (y, of_branch) = feed_forward::forward(parameters, y, None, self.buffers)?;
            add(of_branch.x.view(), &mut y); // (5)
            saved.feed_forward = Some(of_branch);
        }
        Ok((y, report, saved))
    }

    /// The keys [B, Hk, T, K] of `x` [B T, D].
    pub fn keys(&self, x: &Array2<T>) -> Result<Array4<T>, Error> {
        self.projections().keys(x, self.batch)
    }

    /// Gradient of the unit's input; gradients of the parameters are added to `d`.
    pub fn backward(
        &self,
        saved: Saved<T>,
        mut d_y: Array2<T>,
        d: &mut EncoderUnitParameters<T>,
    ) -> Result<Array2<T>, Error> {
        let Saved { x, projected, out, attention, feed_forward } = saved;
        let (p, config, projections) = (self.parameters, self.config, self.projections());
        // (5)
        let parameters = p.feed_forward.as_ref().zip(d.feed_forward.as_mut());
        if let (Some((p, d)), Some(saved)) = (parameters, feed_forward) {
            let d_x = feed_forward::backward(p, saved, &d_y, d, self.buffers)?;
            add(d_x.view(), &mut d_y);
            self.buffers.give(d_x);
        }
        // (4)
        let (d_out, d_gate) = projections.branch_backward(&out, &projected, &d_y, &mut gradients(d))?;
        // (3)
        let activated = projections.activate(&projected)?;
        let inputs = self.inputs(&projected, &activated);
        let (estimator, weight) = (config.estimator, config.commit_weight);
        let (b, key_heads, t, d_v) = inputs.v.dim();
        let v = self.buffers.take_heads((b, key_heads, t), d_v);
        let mut d_attention = BidirectionalGradients { v, ..BidirectionalGradients::default() };
        let of_heads = per_head(&d_out, self.batch, config.n_heads);
        config.attention.backward_into(&inputs, attention, of_heads, estimator, weight, &mut d_attention)?;
        self.buffers.give_all([out, d_out]);
        // (2), (1)
        let BidirectionalGradients { q, k, v, .. } = d_attention;
        let d_heads = [q, k, v];
        let d_x = projections.backward(&x, (&projected, &activated), d_heads, d_gate, &mut gradients(d))?;
        add(d_x.view(), &mut d_y);
        activated.give(self.buffers);
        projected.give(self.buffers);
        self.buffers.give_all([x, d_x]);
        Ok(d_y)
    }

    fn projections(&self) -> Projections<'_, T> {
        let p = self.parameters;
        Projections {
            norm: &p.norm,
            w_q: &p.w_q,
            w_k: &p.w_k,
            w_v: &p.w_v,
            w_gate: p.w_gate.as_ref(),
            w_out: &p.w_out,
            n_heads: self.config.n_heads,
            key_heads: self.config.key_heads(),
            scale: T::from_f64(self.config.key_scale()),
            prepared: None,
            buffers: self.buffers,
        }
    }

    fn inputs<'s>(
        &'s self,
        projected: &'s Projected<T>,
        activated: &'s Activated<T>,
    ) -> BidirectionalInputs<'s, T> {
        let [q, k, v] = self.projections().heads(projected, activated, self.batch);
        BidirectionalInputs { q, k, v, key_mask: Some(self.exists) }
    }
}

impl<T: Scalar> Saved<T> {
    /// Gives back what no backward is to need.
    pub fn give(self, buffers: &Buffers<T>) {
        self.projected.give(buffers);
        buffers.give_all([self.x, self.out]);
        self.feed_forward.into_iter().for_each(|saved| saved.give(buffers));
    }
}

fn gradients<T>(d: &mut EncoderUnitParameters<T>) -> ProjectionGradients<'_, T> {
    ProjectionGradients {
        norm: &mut d.norm,
        w_q: &mut d.w_q,
        w_k: &mut d.w_k,
        w_v: &mut d.w_v,
        w_gate: d.w_gate.as_mut(),
        w_out: &mut d.w_out,
    }
}
