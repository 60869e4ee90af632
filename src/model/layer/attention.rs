//! The first branch of a unit: attention between its projections, and the gate.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q, k, v from x~                                             see `projections`
//! (3)  r_d = K^(-1/4) sinusoid(d) Wr,  u and w times K^(-1/4)
//! (4)  o = attention(q, k, v; u, w, r)
//! (5)  branch = (o * SiLU(x~ Wg)) Wo                               without a gate: branch = o Wo
//! ```

use ndarray::{Array2, Array4, ArrayView2, s};

use super::Layer;
use super::core;
use super::projections::{Activated, Projected, ProjectionGradients, Projections, per_head, rows};
use super::report::{LayerReport, PieceReport};
use crate::attention::{BatchBiases, BatchGradients, BatchInputs};
use crate::codebook::codebook_loss;
use crate::model::buffers::Buffers;
use crate::model::parameters::LayerParameters;
use crate::model::{CodewordGradient, UnitState};
use crate::ops::matmul::add_product;
use crate::{Error, Scalar};

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    pub x: Array2<T>,
    projected: Projected<T>,
    out: Array2<T>,
    core: core::Saved<T>,
}

impl<T: Scalar> Layer<'_, T> {
    /// The branch of `x` [B T, D], without the residual, and what attention reports.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub(super) fn attend(
        &self,
        x: Array2<T>,
        states: &mut UnitState<T>,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<(Array2<T>, LayerReport<T>, Saved<T>), Error> {
        let projections = self.projections();
        let projected = projections.project(&x)?; // (1)
        let activated = projections.activate(&projected)?; // (2)
        let batch = states.dim().0;
        let inputs = self.attention_inputs(&projected, &activated, batch, mask);
        let (out, mut report, core) = self.attend_heads(&inputs, states); // (4)
        if self.config.revival.is_some() && self.learning.is_some() {
            report.keys = Some(inputs.k.to_owned());
        }
        let out = rows(out);
        let branch = projections.branch(&out, &projected, activated); // (5)
        Ok((branch, report, Saved { x, projected, out, core }))
    }

    /// As [`attend`](Self::attend), to infer only.
    pub(super) fn attend_to_infer(
        &self,
        x: &Array2<T>,
        states: &mut UnitState<T>,
    ) -> Result<(Array2<T>, PieceReport), Error> {
        let projections = self.projections();
        let projected = projections.project(x)?;
        let activated = projections.activate(&projected)?;
        let inputs = self.attention_inputs(&projected, &activated, states.dim().0, None);
        let (out, report) = self.attend_heads_to_infer(&inputs, states);
        let out = rows(out);
        let branch = projections.branch(&out, &projected, activated);
        projected.give(self.buffers);
        Ok((branch, report))
    }

    /// The keys [B, Hk, T, K] of `x` [B T, D].
    pub fn keys(&self, x: &Array2<T>, batch: usize) -> Result<Array4<T>, Error> {
        self.projections().keys(x, batch)
    }

    /// Gradient of `x` by way of the branch; gradients of the parameters are added to `d`. `distances` as in
    /// [`Prepared::new`](super::Prepared::new).
    pub(super) fn attend_backward(
        &self,
        saved: Saved<T>,
        d_branch: &Array2<T>,
        mask: Option<ArrayView2<'_, bool>>,
        batch: usize,
        distances: ArrayView2<'_, T>,
        d: &mut LayerParameters<T>,
    ) -> Result<Array2<T>, Error> {
        let Saved { x, projected, out, core } = saved;
        let (p, scale, projections) = (self.parameters, self.scale(), self.projections());
        // (5)
        let (d_out, d_gate) = projections.branch_backward(&out, &projected, d_branch, &mut gradients(d))?;
        // (4)
        let activated = projections.activate(&projected)?;
        let inputs = self.attention_inputs(&projected, &activated, batch, mask);
        let of_heads = [&out, &d_out].map(|rows| per_head(rows, batch, self.config.n_heads));
        let (d_attention, stats) = self.attend_heads_backward(&inputs, core, of_heads);
        self.buffers.give_all([out, d_out]);
        let learning = self.config.learning.gradient().zip(self.learning);
        if let (Some((gradient, learning)), Some(stats)) = (learning, stats) {
            let CodewordGradient { codebook_weight, from_attention } = gradient;
            let codewords = self.prepared.table().codewords.view();
            let mut d_codewords = codebook_loss::gradient(&stats, codewords, codebook_weight);
            if from_attention {
                d_codewords += &d_attention.codewords;
            }
            learning.backward(&p.codebook, d_codewords.view(), &mut d.codebook);
        }
        // (3)
        let d_biases = d_attention.biases.as_ref().expect("the unit has biases");
        d.content_bias.scaled_add(scale, &d_biases.content);
        d.position_bias.scaled_add(scale, &d_biases.position);
        for (h, d_relative) in d_biases.relative.outer_iter().enumerate() {
            let columns = s![.., h * self.config.d_k..(h + 1) * self.config.d_k];
            let d_w = d.w_relative.slice_mut(columns);
            add_product(distances.t(), (&d_relative * scale).view(), d_w);
        }
        // (2), (1)
        let BatchGradients { q, k, v, .. } = d_attention;
        let (d_heads, forward) = ([q, k, v], (&projected, &activated));
        let d_x = projections.backward(&x, forward, d_heads, d_gate, &mut gradients(d))?;
        activated.give(self.buffers);
        projected.give(self.buffers);
        self.buffers.give(x);
        Ok(d_x)
    }

    fn scale(&self) -> T {
        T::from_f64(self.config.key_scale())
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
            scale: self.scale(),
            prepared: Some(self.prepared),
            buffers: self.buffers,
        }
    }

    fn attention_inputs<'s>(
        &'s self,
        projected: &'s Projected<T>,
        activated: &'s Activated<T>,
        batch: usize,
        mask: Option<ArrayView2<'s, bool>>,
    ) -> BatchInputs<'s, T> {
        let [q, k, v] = self.projections().heads(projected, activated, batch);
        BatchInputs {
            biases: Some(BatchBiases {
                content: self.prepared.content.view(),
                position: self.prepared.position.view(),
                relative: self.prepared.relative.view(),
            }),
            mask,
            ..BatchInputs::new(q, k, v)
        }
    }
}

impl<T> Saved<T> {
    /// Gives back what no backward is to need.
    pub fn give(self, buffers: &Buffers<T>) {
        self.projected.give(buffers);
        buffers.give_all([self.x, self.out]);
    }
}

fn gradients<T>(d: &mut LayerParameters<T>) -> ProjectionGradients<'_, T> {
    ProjectionGradients {
        norm: &mut d.norm,
        w_q: &mut d.w_q,
        w_k: &mut d.w_k,
        w_v: &mut d.w_v,
        w_gate: d.w_gate.as_mut(),
        w_out: &mut d.w_out,
    }
}
