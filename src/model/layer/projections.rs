//! What attention lies between, in a unit of the language model and of the encoder alike: projections of the normed stream
//! before it, a gate and a projection back behind it.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q = K^(-1/4) RMSNorm(x~ Wq),  k = K^(-1/4) RMSNorm(x~ Wk)   per head
//!      v = SiLU(x~ Wv)                                             without a gate: v = x~ Wv
//! (3)  branch = (o * SiLU(x~ Wg)) Wo                               without a gate: branch = o Wo
//! ```
//!
//! Rows are tokens, sequence after sequence: [B T, width]. Heads lie side by side.

use ndarray::{Array2, Array4, ArrayView4, s};

use super::Prepared;
use crate::model::NormParameters;
use crate::model::buffers::Buffers;
use crate::ops::{linear, rms_norm, silu};
use crate::{Error, Scalar};

/// The arrays of a unit, and its heads.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Projections<'a, T> {
    pub norm: &'a NormParameters<T>,
    pub w_q: &'a Array2<T>,
    pub w_k: &'a Array2<T>,
    pub w_v: &'a Array2<T>,
    pub w_gate: Option<&'a Array2<T>>,
    pub w_out: &'a Array2<T>,
    /// H.
    pub n_heads: usize,
    /// Hk.
    pub key_heads: usize,
    /// K^(-1/4).
    pub scale: T,
    /// The weights once more, to infer with.
    pub prepared: Option<&'a Prepared<T>>,
    pub buffers: &'a Buffers<T>,
}

/// Where the gradients of [`Projections`] are added.
#[derive(Debug)]
pub(in crate::model) struct ProjectionGradients<'a, T> {
    pub norm: &'a mut NormParameters<T>,
    pub w_q: &'a mut Array2<T>,
    pub w_k: &'a mut Array2<T>,
    pub w_v: &'a mut Array2<T>,
    pub w_gate: Option<&'a mut Array2<T>>,
    pub w_out: &'a mut Array2<T>,
}

/// x~ times Wq, Wk, Wv, Wg, and what backward needs of (1). Normalised and activated arrays are computed again from it.
#[derive(Debug, Clone)]
pub(in crate::model) struct Projected<T> {
    norm: rms_norm::Saved<T>,
    q: Array2<T>,
    k: Array2<T>,
    v: Array2<T>,
    gate: Option<Array2<T>>,
}

/// (2) after the projections, with what its backward needs.
pub(in crate::model) struct Activated<T> {
    q: Array2<T>,
    q_norm: rms_norm::Saved<T>,
    k: Array2<T>,
    k_norm: rms_norm::Saved<T>,
    /// None where values stay as they are projected.
    v: Option<Array2<T>>,
}

impl<T: Scalar> Projections<'_, T> {
    /// (1) and the products of (2) and (3) with x~, of `x` [B T, D].
    pub fn project(&self, x: &Array2<T>) -> Result<Projected<T>, Error> {
        let (x_norm, norm) = self.normalize(x)?;
        if let Some(packed) = self.prepared.and_then(|prepared| prepared.packed_for(&x_norm)) {
            let all = packed.input.product(x_norm.view());
            let mut from = 0;
            let mut columns = |w: &Array2<T>| {
                from += w.ncols();
                all.slice(s![.., from - w.ncols()..from]).to_owned()
            };
            let (q, k, v) = (columns(self.w_q), columns(self.w_k), columns(self.w_v));
            return Ok(Projected { norm, q, k, v, gate: self.w_gate.map(columns) });
        }
        let project = |w: &Array2<T>| self.buffers.product(&x_norm, w);
        let (q, k, v) = (project(self.w_q), project(self.w_k), project(self.w_v));
        let gate = self.w_gate.map(project);
        self.buffers.give(x_norm);
        Ok(Projected { norm, q, k, v, gate })
    }

    /// (2)
    pub fn activate(&self, projected: &Projected<T>) -> Result<Activated<T>, Error> {
        let (q, q_norm) = rms_norm::forward(projected.q.view(), self.n_heads, self.scale)?;
        let (k, k_norm) = rms_norm::forward(projected.k.view(), self.key_heads, self.scale)?;
        let v = projected.gate.as_ref().map(|_| {
            let mut v = self.buffers.take(projected.v.dim());
            silu::forward_into(projected.v.view(), &mut v);
            v
        });
        Ok(Activated { q, q_norm, k, k_norm, v })
    }

    /// Queries [B, H, T, K], keys [B, Hk, T, K] and values [B, Hk, T, V] for attention.
    pub fn heads<'s>(
        &self,
        projected: &'s Projected<T>,
        activated: &'s Activated<T>,
        batch: usize,
    ) -> [ArrayView4<'s, T>; 3] {
        let v = activated.v.as_ref().unwrap_or(&projected.v);
        let q = per_head(&activated.q, batch, self.n_heads);
        [q, per_head(&activated.k, batch, self.key_heads), per_head(v, batch, self.key_heads)]
    }

    /// The keys [B, Hk, T, K] of `x` [B T, D] alone.
    pub fn keys(&self, x: &Array2<T>, batch: usize) -> Result<Array4<T>, Error> {
        let x_norm = self.normalize(x)?.0;
        let k = linear::forward(x_norm.view(), self.w_k.view(), None)?;
        self.buffers.give(x_norm);
        let k = rms_norm::forward(k.view(), self.key_heads, self.scale)?.0;
        Ok(per_head(&k, batch, self.key_heads).to_owned())
    }

    /// (3), of `out` [B T, H V]. What was `activated` is needed no more: its values make room.
    pub fn branch(&self, out: &Array2<T>, projected: &Projected<T>, activated: Activated<T>) -> Array2<T> {
        let gated = match (&projected.gate, activated.v) {
            (Some(gate), Some(mut v)) if v.dim() == out.dim() => {
                silu::gate_into(out.view(), gate.view(), &mut v);
                Some(v)
            }
            (Some(gate), v) => {
                let mut gated = self.buffers.take(out.dim());
                silu::gate_into(out.view(), gate.view(), &mut gated);
                self.buffers.give_all(v);
                Some(gated)
            }
            (None, _) => None,
        };
        let rows = gated.as_ref().unwrap_or(out);
        let branch = match self.prepared.and_then(|prepared| prepared.packed_for(rows)) {
            Some(packed) => packed.output.product(rows.view()),
            None => self.buffers.product(rows, self.w_out),
        };
        self.buffers.give_all(gated);
        branch
    }

    /// Gradients of `out` and of x~ Wg by (3).
    pub fn branch_backward(
        &self,
        out: &Array2<T>,
        projected: &Projected<T>,
        d_branch: &Array2<T>,
        d: &mut ProjectionGradients<'_, T>,
    ) -> Result<(Array2<T>, Option<Array2<T>>), Error> {
        let (w, d_w) = (self.w_out.view(), d.w_out.view_mut());
        let mut d = self.buffers.take(out.dim());
        let Some(gate) = &projected.gate else {
            linear::backward_into(out.view(), w, d_branch.view(), d_w, None, &mut d)?;
            return Ok((d, None));
        };
        let mut gated = self.buffers.take(out.dim());
        silu::gate_into(out.view(), gate.view(), &mut gated);
        linear::backward_into(gated.view(), w, d_branch.view(), d_w, None, &mut d)?;
        silu::gate_backward_in_place(out.view(), gate.view(), &mut d, &mut gated);
        let (d_out, d_gate) = (gated, d);
        Ok((d_out, Some(d_gate)))
    }

    /// Gradient of `x` by (1) and (2), from those of queries, keys and values as attention has them, and of x~ Wg.
    pub fn backward(
        &self,
        x: &Array2<T>,
        (projected, activated): (&Projected<T>, &Activated<T>),
        d_heads: [Array4<T>; 3],
        d_gate: Option<Array2<T>>,
        d: &mut ProjectionGradients<'_, T>,
    ) -> Result<Array2<T>, Error> {
        // (2)
        let [d_q, d_k, mut d_v] = d_heads.map(rows);
        let (q, k) = (projected.q.view(), projected.k.view());
        let d_q = rms_norm::backward(q, &activated.q_norm, self.n_heads, self.scale, d_q.view())?;
        let d_k = rms_norm::backward(k, &activated.k_norm, self.key_heads, self.scale, d_k.view())?;
        if activated.v.is_some() {
            silu::backward_in_place(projected.v.view(), &mut d_v);
        }
        let x_norm = self.normalize(x)?.0;
        let (w_q, d_w_q) = (self.w_q.view(), d.w_q.view_mut());
        let mut d_x_norm = self.buffers.take(x_norm.dim());
        linear::backward_into(x_norm.view(), w_q, d_q.view(), d_w_q, None, &mut d_x_norm)?;
        let mut add = |w: &Array2<T>, d_w: &mut Array2<T>, d_projected: &Array2<T>| {
            let (w, d_w, d_x_norm) = (w.view(), d_w.view_mut(), d_x_norm.view_mut());
            linear::add_backward(x_norm.view(), w, d_projected.view(), d_w, None, d_x_norm)
        };
        add(self.w_k, d.w_k, &d_k)?;
        add(self.w_v, d.w_v, &d_v)?;
        if let (Some(w), Some(d_w), Some(d_gate)) = (self.w_gate, &mut d.w_gate, &d_gate) {
            add(w, d_w, d_gate)?;
        }
        self.buffers.give_all(d_gate.into_iter().chain([d_v, x_norm]));
        // (1)
        let (gain, d_gain, d_bias) = (self.norm.gain.view(), d.norm.gain.view_mut(), d.norm.bias.view_mut());
        let (mut d, saved) = (d_x_norm, &projected.norm);
        rms_norm::backward_affine_in_place(x.view(), saved, gain, &mut d, d_gain, d_bias)?;
        Ok(d)
    }

    /// (1)
    fn normalize(&self, x: &Array2<T>) -> Result<(Array2<T>, rms_norm::Saved<T>), Error> {
        self.buffers.normalize(x, self.norm)
    }
}

impl<T> Projected<T> {
    pub fn give(self, buffers: &Buffers<T>) {
        buffers.give_all([self.q, self.k, self.v].into_iter().chain(self.gate));
    }
}

impl<T> Activated<T> {
    pub fn give(self, buffers: &Buffers<T>) {
        buffers.give_all(self.v);
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
