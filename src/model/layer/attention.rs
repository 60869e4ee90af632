//! The first branch of a unit: attention between its projections, and the gate.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q = K^(-1/4) RMSNorm(x~ Wq),  k = K^(-1/4) RMSNorm(x~ Wk)   per head
//!      v = SiLU(x~ Wv)                                             without a gate: v = x~ Wv
//! (3)  r_d = K^(-1/4) sinusoid(d) Wr,  u and w times K^(-1/4)
//! (4)  o = attention(q, k, v; u, w, r)
//! (5)  branch = (o * SiLU(x~ Wg)) Wo                               without a gate: branch = o Wo
//! ```

use ndarray::{Array2, Array4, ArrayView2, ArrayView4, s};

use super::Layer;
use super::core;
use super::report::{LayerReport, PieceReport};
use crate::attention::{BatchBiases, BatchGradients, BatchInputs};
use crate::codebook::codebook_loss;
use crate::model::parameters::{LayerParameters, NormParameters};
use crate::model::{CodewordGradient, UnitState};
use crate::ops::matmul::add_product;
use crate::ops::{linear, rms_norm, silu};
use crate::{Error, Scalar};

/// What backward needs of forward. Normalised and activated arrays are computed again from these.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    pub x: Array2<T>,
    norm: rms_norm::Saved<T>,
    projected: Projected<T>,
    out: Array2<T>,
    core: core::Saved<T>,
}

/// x~ times Wq, Wk, Wv, Wg.
#[derive(Debug, Clone)]
struct Projected<T> {
    q: Array2<T>,
    k: Array2<T>,
    v: Array2<T>,
    gate: Option<Array2<T>>,
}

/// (2) after the projections, with what its backward needs.
struct Activated<T> {
    q: Array2<T>,
    q_norm: rms_norm::Saved<T>,
    k: Array2<T>,
    k_norm: rms_norm::Saved<T>,
    /// None where values stay as they are projected.
    v: Option<Array2<T>>,
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
        let (x_norm, norm) = self.normalize(&x)?; // (1)
        let projected = self.project(&x_norm)?;
        let activated = self.activate(&projected)?; // (2)
        let batch = states.dim().0;
        let inputs = self.attention_inputs(&projected, &activated, batch, mask);
        let (out, mut report, core) = self.attend_heads(&inputs, states); // (4)
        if self.config.revival.is_some() && self.learning.is_some() {
            report.keys = Some(per_head(&activated.k, batch, self.key_heads()).to_owned());
        }
        let out = rows(out);
        let branch = self.gate(&out, &projected)?; // (5)
        Ok((branch, report, Saved { x, norm, projected, out, core }))
    }

    /// As [`attend`](Self::attend), to infer only.
    pub(super) fn attend_to_infer(
        &self,
        x: &Array2<T>,
        states: &mut UnitState<T>,
    ) -> Result<(Array2<T>, PieceReport), Error> {
        let projected = self.project(&self.normalize(x)?.0)?;
        let activated = self.activate(&projected)?;
        let inputs = self.attention_inputs(&projected, &activated, states.dim().0, None);
        let (out, report) = self.attend_heads_to_infer(&inputs, states);
        Ok((self.gate(&rows(out), &projected)?, report))
    }

    /// The keys [B, Hk, T, K] of `x` [B T, D].
    pub fn keys(&self, x: &Array2<T>, batch: usize) -> Result<Array4<T>, Error> {
        let projected = self.project(&self.normalize(x)?.0)?;
        Ok(per_head(&self.activate(&projected)?.k, batch, self.key_heads()).to_owned())
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
        let Saved { x, norm, projected, out, core } = saved;
        let (p, scale) = (self.parameters, self.scale());
        // (5)
        let (d_out, d_gate) = match &projected.gate {
            Some(gate) => {
                let gated = silu::gate(out.view(), gate.view())?;
                let d_w = d.w_out.view_mut();
                let d_gated = linear::backward(gated.view(), p.w_out.view(), d_branch.view(), d_w, None)?;
                let (d_out, d_gate) = silu::gate_backward(out.view(), gate.view(), d_gated.view())?;
                (d_out, Some(d_gate))
            }
            None => {
                let d_w = d.w_out.view_mut();
                (linear::backward(out.view(), p.w_out.view(), d_branch.view(), d_w, None)?, None)
            }
        };
        // (4)
        let activated = self.activate(&projected)?;
        let inputs = self.attention_inputs(&projected, &activated, batch, mask);
        let [out, d_out] = [&out, &d_out].map(|rows| per_head(rows, batch, self.config.n_heads));
        let (d_attention, stats) = self.attend_heads_backward(&inputs, core, out, d_out);
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
        // (2)
        let BatchGradients { q, k, v, .. } = d_attention;
        let [d_q, d_k, mut d_v] = [q, k, v].map(rows);
        let (n_heads, key_heads) = (self.config.n_heads, self.key_heads());
        let d_q = rms_norm::backward(projected.q.view(), &activated.q_norm, n_heads, scale, d_q.view())?;
        let d_k = rms_norm::backward(projected.k.view(), &activated.k_norm, key_heads, scale, d_k.view())?;
        if activated.v.is_some() {
            d_v = silu::backward(projected.v.view(), d_v.view())?;
        }
        let x_norm = self.normalize(&x)?.0;
        let mut d_x_norm = linear::backward(x_norm.view(), p.w_q.view(), d_q.view(), d.w_q.view_mut(), None)?;
        let mut add = |w: &Array2<T>, d_w: &mut Array2<T>, d_projected: &Array2<T>| {
            let (w, d_w, d_x_norm) = (w.view(), d_w.view_mut(), d_x_norm.view_mut());
            linear::add_backward(x_norm.view(), w, d_projected.view(), d_w, None, d_x_norm)
        };
        add(&p.w_k, &mut d.w_k, &d_k)?;
        add(&p.w_v, &mut d.w_v, &d_v)?;
        if let (Some(w), Some(d_w), Some(d_gate)) = (&p.w_gate, &mut d.w_gate, &d_gate) {
            add(w, d_w, d_gate)?;
        }
        // (1)
        let NormParameters { gain, bias } = &mut d.norm;
        let (gains, gain, bias) = (p.norm.gain.view(), gain.view_mut(), bias.view_mut());
        rms_norm::backward_affine(x.view(), &norm, gains, d_x_norm.view(), gain, bias)
    }

    fn scale(&self) -> T {
        T::from_f64(self.config.key_scale())
    }

    /// Hk.
    fn key_heads(&self) -> usize {
        self.config.key_heads()
    }

    /// (1)
    fn normalize(&self, x: &Array2<T>) -> Result<(Array2<T>, rms_norm::Saved<T>), Error> {
        let NormParameters { gain, bias } = &self.parameters.norm;
        rms_norm::forward_affine(x.view(), gain.view(), bias.view())
    }

    fn project(&self, x_norm: &Array2<T>) -> Result<Projected<T>, Error> {
        let p = self.parameters;
        if let Some(packed) = self.prepared.packed_for(x_norm) {
            let all = packed.input.product(x_norm.view());
            let mut from = 0;
            let mut columns = |w: &Array2<T>| {
                from += w.ncols();
                all.slice(s![.., from - w.ncols()..from]).to_owned()
            };
            let (q, k, v) = (columns(&p.w_q), columns(&p.w_k), columns(&p.w_v));
            return Ok(Projected { q, k, v, gate: p.w_gate.as_ref().map(columns) });
        }
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
        let (k, k_norm) = rms_norm::forward(projected.k.view(), self.key_heads(), scale)?;
        let v = projected.gate.as_ref().map(|_| silu::forward(projected.v.view())).transpose()?;
        Ok(Activated { q, q_norm, k, k_norm, v })
    }

    fn attention_inputs<'s>(
        &'s self,
        projected: &'s Projected<T>,
        activated: &'s Activated<T>,
        batch: usize,
        mask: Option<ArrayView2<'s, bool>>,
    ) -> BatchInputs<'s, T> {
        let q = per_head(&activated.q, batch, self.config.n_heads);
        let k = per_head(&activated.k, batch, self.key_heads());
        let v = per_head(activated.v.as_ref().unwrap_or(&projected.v), batch, self.key_heads());
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

    /// (5)
    fn gate(&self, out: &Array2<T>, projected: &Projected<T>) -> Result<Array2<T>, Error> {
        let gated = projected.gate.as_ref().map(|gate| silu::gate(out.view(), gate.view())).transpose()?;
        let gated = gated.as_ref().unwrap_or(out);
        match self.prepared.packed_for(gated) {
            Some(packed) => Ok(packed.output.product(gated.view())),
            None => linear::forward(gated.view(), self.parameters.w_out.view(), None),
        }
    }
}

/// [B T, H width] seen as [B, H, T, width].
pub(in crate::model) fn per_head<T>(rows: &Array2<T>, batch: usize, n_heads: usize) -> ArrayView4<'_, T> {
    let shape = (batch, rows.nrows() / batch.max(1), n_heads, rows.ncols() / n_heads);
    let rows = rows.view().into_shape_with_order(shape).expect("made by a product: contiguous");
    rows.permuted_axes([0, 2, 1, 3])
}

/// [B, H, T, width] laid out token by token, as [B T, H width].
pub(in crate::model) fn rows<T>(array: Array4<T>) -> Array2<T> {
    let array = array.permuted_axes([0, 2, 1, 3]); // [B, T, H, width]
    let (b, t, h, width) = array.dim();
    array.into_shape_with_order((b * t, h * width)).expect("attention lays its results out token by token")
}
