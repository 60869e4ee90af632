//! One gated unit: a pre-norm residual branch around linear-time attention.
//!
//! ```text
//! (1)  x~ = RMSNorm(x) * gain + bias
//! (2)  q = K^(-1/4) RMSNorm(x~ Wq),  k = K^(-1/4) RMSNorm(x~ Wk)   per head
//!      v = SiLU(x~ Wv)
//! (3)  r_d = K^(-1/4) sinusoid(d) Wr,  u and w times K^(-1/4)
//! (4)  o = attention(q, k, v; u, w, r)
//! (5)  y = x + (o * SiLU(x~ Wg)) Wo
//! ```
//!
//! Rows are tokens, sequence after sequence: [B T, width]. Source: the gated unit of Transformer-VQ (Lingle, arXiv
//! 2309.16354), after GAU (Hua et al., arXiv 2202.10447).

use std::sync::Arc;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, s};

use super::parameters::{LayerParameters, NormParameters};
use super::{CodewordGradient, ModelConfig};
use crate::attention::{
    AttentionState, BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved, HeadColumns,
};
use crate::codebook::packed::Table;
use crate::codebook::{CodeStats, Learning, codebook_loss};
use crate::ops::matmul::{PackedWeights, add_product};
use crate::ops::{linear, rms_norm, silu};
use crate::{Error, Scalar};

/// What backward needs of forward. Normalised and activated arrays are computed again from these.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    x: Array2<T>,
    norm: rms_norm::Saved<T>,
    /// x~ times Wq, Wk, Wv, Wg.
    projected: Projected<T>,
    out: Array2<T>,
    attention: BatchSaved<T>,
    /// If the codebook learns by gradient.
    stats: Option<CodeStats<T>>,
}

#[derive(Debug, Clone)]
struct Projected<T> {
    q: Array2<T>,
    k: Array2<T>,
    v: Array2<T>,
    gate: Array2<T>,
}

/// (2) after the projections, with what its backward needs.
struct Activated<T> {
    q: Array2<T>,
    q_norm: rms_norm::Saved<T>,
    k: Array2<T>,
    k_norm: rms_norm::Saved<T>,
    v: Array2<T>,
}

/// What a unit derives from its parameters and codebook alone: made once, for any number of pieces.
#[derive(Debug, Clone)]
pub(super) struct Prepared<T> {
    /// (3)
    content: Array2<T>, // [H, K]
    position: Array2<T>, // [H, K]
    relative: Array3<T>, // [H, M+1, K]
    table: Table<T>,
    /// To infer with.
    packed: Option<Arc<Packed<T>>>,
}

/// The weights of a unit in the order in which products with few tokens read them.
#[derive(Debug)]
struct Packed<T> {
    columns: Arc<[HeadColumns<T>]>,
    /// Wq, Wk, Wv, Wg side by side.
    input: PackedWeights<T>,
    output: PackedWeights<T>,
}

/// Up to so many tokens, products with packed weights are faster.
pub(super) const FEW_TOKENS: usize = 16;

impl<T: Scalar> Prepared<T> {
    /// `distances` are the sinusoids of 0, 1, ..., M [M+1, D].
    pub fn new(
        config: &ModelConfig,
        parameters: &LayerParameters<T>,
        learning: &Learning<T>,
        distances: ArrayView2<'_, T>,
    ) -> Result<Self, Error> {
        let scale = T::from_f64(config.key_scale());
        let relative = linear::forward(distances, parameters.w_relative.view(), None)? * scale;
        let shape = (distances.nrows(), config.n_heads, config.d_k);
        let relative = relative.into_shape_with_order(shape).expect("H K columns");
        Ok(Prepared {
            content: &parameters.content_bias * scale,
            position: &parameters.position_bias * scale,
            relative: relative.permuted_axes([1, 0, 2]),
            table: Table::new(learning.codewords(&parameters.codebook)),
            packed: None,
        })
    }

    /// The same with a copy of the weights to infer with.
    pub fn pack(self, parameters: &LayerParameters<T>) -> Self {
        let LayerParameters { w_q, w_k, w_v, w_gate, w_out, .. } = parameters;
        let packed = Packed {
            columns: HeadColumns::all(&self.table, Some(self.relative.view())),
            input: PackedWeights::new(&[w_q, w_k, w_v, w_gate].map(|w| w.view())),
            output: PackedWeights::new(&[w_out.view()]),
        };
        Prepared { packed: Some(Arc::new(packed)), ..self }
    }
}

/// What a unit reports besides its output.
#[derive(Debug, Clone)]
pub struct LayerReport<T> {
    /// What the unit's codebook learns from.
    pub stats: CodeStats<T>,
    /// Squared distance of keys to their codewords, summed over heads and dimensions, mean over positions that count.
    pub commit_loss: f64,
    /// The share of attention that fell on cached codes, mean over queries and heads.
    pub cached_mass: f64,
    /// The keys [B, H, T, K] in training, if the configuration revives codes.
    pub keys: Option<Array4<T>>,
}

/// What a unit reports of a piece that it infers from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PieceReport {
    /// As in [`LayerReport`].
    pub commit_loss: f64,
    /// As in [`LayerReport`].
    pub cached_mass: f64,
}

fn split<T: Scalar>(output: BatchOutput<T>) -> (Array2<T>, LayerReport<T>) {
    let BatchOutput { out, stats, commit_loss, cached_mass, .. } = output;
    let queries = cached_mass.len().max(1) as f64;
    let cached_mass = cached_mass.iter().map(|mass| mass.as_f64()).sum::<f64>() / queries;
    (rows(out), LayerReport { stats, commit_loss, cached_mass, keys: None })
}

/// A unit: its configuration, what it learned, and what follows from that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a, T> {
    pub config: &'a ModelConfig,
    pub parameters: &'a LayerParameters<T>,
    pub learning: &'a Learning<T>,
    pub prepared: &'a Prepared<T>,
}

impl<T: Scalar> Layer<'_, T> {
    /// The unit's output and what its attention reports. `x` [B T, D]; `states` [B, H] move on; `mask` [B, T].
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(
        &self,
        x: Array2<T>,
        states: &mut Array2<AttentionState<T>>,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<(Array2<T>, LayerReport<T>, Saved<T>), Error> {
        let (x_norm, norm) = self.normalize(&x)?;
        let projected = self.project(&x_norm)?;
        let activated = self.activate(&projected)?;
        let inputs = self.attention_inputs(&activated, states.nrows(), mask);
        let mut output = BatchOutput::default();
        let (attention, _) =
            self.config.attention.forward_unchecked(&inputs, &self.prepared.table, states, &mut output);
        let (out, mut report) = split(output);
        report.keys = self.config.revival.map(|_| self.per_head(&activated.k, states.nrows()).to_owned());
        let y = self.gate(&x, &out, &projected)?;
        let stats = self.config.learning.gradient().map(|_| report.stats.clone());
        Ok((y, report, Saved { x, norm, projected, out, attention, stats }))
    }

    /// As [`forward`](Self::forward), to infer only: pieces of any size, and nothing is saved.
    pub fn push(
        &self,
        x: Array2<T>,
        states: &mut Array2<AttentionState<T>>,
    ) -> Result<(Array2<T>, PieceReport), Error> {
        let (x_norm, _) = self.normalize(&x)?;
        let projected = self.project(&x_norm)?;
        let activated = self.activate(&projected)?;
        let inputs = self.attention_inputs(&activated, states.nrows(), None);
        let Prepared { table, packed, .. } = self.prepared;
        let columns = packed.as_deref().map(|packed| &*packed.columns);
        let output = self.config.attention.push_unchecked(&inputs, table, columns, states);
        let (out, LayerReport { commit_loss, cached_mass, .. }) = split(output);
        Ok((self.gate(&x, &out, &projected)?, PieceReport { commit_loss, cached_mass }))
    }

    /// The keys [B, H, T, K] of `x` [B T, D].
    pub fn keys(&self, x: &Array2<T>, batch: usize) -> Result<Array4<T>, Error> {
        let projected = self.project(&self.normalize(x)?.0)?;
        Ok(self.per_head(&self.activate(&projected)?.k, batch).to_owned())
    }

    /// Gradient of the unit's input; gradients of the parameters are added to `d`. `distances` as in [`Prepared::new`].
    pub fn backward(
        &self,
        saved: Saved<T>,
        d_y: Array2<T>,
        mask: Option<ArrayView2<'_, bool>>,
        batch: usize,
        distances: ArrayView2<'_, T>,
        d: &mut LayerParameters<T>,
    ) -> Result<Array2<T>, Error> {
        let Saved { x, norm, projected, out, attention, stats } = saved;
        let (p, n_heads, scale) = (self.parameters, self.config.n_heads, self.scale());
        // (5)
        let gated = silu::gate(out.view(), projected.gate.view())?;
        let d_gated = linear::backward(gated.view(), p.w_out.view(), d_y.view(), d.w_out.view_mut(), None)?;
        let (d_out, d_gate) = silu::gate_backward(out.view(), projected.gate.view(), d_gated.view())?;
        // (4)
        let activated = self.activate(&projected)?;
        let inputs = self.attention_inputs(&activated, batch, mask);
        let d_out = self.per_head(&d_out, batch);
        let (weight, estimator) = (self.config.commit_weight, self.config.estimator);
        let mut d_attention = BatchGradients::default();
        let attention_config = &self.config.attention;
        attention_config.backward_unchecked(&inputs, attention, d_out, estimator, weight, &mut d_attention);
        if let (Some(gradient), Some(stats)) = (self.config.learning.gradient(), stats) {
            let CodewordGradient { codebook_weight, from_attention } = gradient;
            let codewords = self.prepared.table.codewords.view();
            let mut d_codewords = codebook_loss::gradient(&stats, codewords, codebook_weight);
            if from_attention {
                d_codewords += &d_attention.codewords;
            }
            self.learning.backward(&p.codebook, d_codewords.view(), &mut d.codebook);
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
        let (d_q, d_k) = (rows(d_attention.q), rows(d_attention.k));
        let d_q = rms_norm::backward(projected.q.view(), &activated.q_norm, n_heads, scale, d_q.view())?;
        let d_k = rms_norm::backward(projected.k.view(), &activated.k_norm, n_heads, scale, d_k.view())?;
        let d_v = silu::backward(projected.v.view(), rows(d_attention.v).view())?;
        let x_norm = self.normalize(&x)?.0;
        let mut d_x_norm = linear::backward(x_norm.view(), p.w_q.view(), d_q.view(), d.w_q.view_mut(), None)?;
        for (w, d_w, d_projected) in
            [(&p.w_k, &mut d.w_k, &d_k), (&p.w_v, &mut d.w_v, &d_v), (&p.w_gate, &mut d.w_gate, &d_gate)]
        {
            let (w, d_w, d_x_norm) = (w.view(), d_w.view_mut(), d_x_norm.view_mut());
            linear::add_backward(x_norm.view(), w, d_projected.view(), d_w, None, d_x_norm)?;
        }
        // (1)
        let NormParameters { gain, bias } = &mut d.norm;
        let gains = p.norm.gain.view();
        let mut d_x = rms_norm::backward_affine(
            x.view(),
            &norm,
            gains,
            d_x_norm.view(),
            gain.view_mut(),
            bias.view_mut(),
        )?;
        d_x += &d_y;
        Ok(d_x)
    }

    /// Packed weights, if there are and if they suit so many tokens.
    fn packed_for(&self, rows: &Array2<T>) -> Option<&Packed<T>> {
        self.prepared.packed.as_deref().filter(|_| rows.nrows() <= FEW_TOKENS)
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
        if let Some(packed) = self.packed_for(x_norm) {
            let all = packed.input.product(x_norm.view());
            let [k, v] = [self.config.d_k, self.config.d_v].map(|width| self.config.n_heads * width);
            let columns = |from: usize, width: usize| all.slice(s![.., from..from + width]).to_owned();
            let (q, gate) = (columns(0, k), columns(2 * k + v, v));
            return Ok(Projected { q, k: columns(k, k), v: columns(2 * k, v), gate });
        }
        let project = |w: &Array2<T>| linear::forward(x_norm.view(), w.view(), None);
        let p = self.parameters;
        Ok(Projected {
            q: project(&p.w_q)?,
            k: project(&p.w_k)?,
            v: project(&p.w_v)?,
            gate: project(&p.w_gate)?,
        })
    }

    /// (2)
    fn activate(&self, projected: &Projected<T>) -> Result<Activated<T>, Error> {
        let (n_heads, scale) = (self.config.n_heads, self.scale());
        let (q, q_norm) = rms_norm::forward(projected.q.view(), n_heads, scale)?;
        let (k, k_norm) = rms_norm::forward(projected.k.view(), n_heads, scale)?;
        Ok(Activated { q, q_norm, k, k_norm, v: silu::forward(projected.v.view())? })
    }

    fn attention_inputs<'s>(
        &'s self,
        activated: &'s Activated<T>,
        batch: usize,
        mask: Option<ArrayView2<'s, bool>>,
    ) -> BatchInputs<'s, T> {
        let [q, k, v] = [&activated.q, &activated.k, &activated.v].map(|rows| self.per_head(rows, batch));
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

    /// [B T, H width] seen as [B, H, T, width].
    fn per_head<'s>(&self, rows: &'s Array2<T>, batch: usize) -> ArrayView4<'s, T> {
        let n_heads = self.config.n_heads;
        let shape = (batch, rows.nrows() / batch.max(1), n_heads, rows.ncols() / n_heads);
        let rows = rows.view().into_shape_with_order(shape).expect("made by a product: contiguous");
        rows.permuted_axes([0, 2, 1, 3])
    }

    /// (5)
    fn gate(&self, x: &Array2<T>, out: &Array2<T>, projected: &Projected<T>) -> Result<Array2<T>, Error> {
        let gated = silu::gate(out.view(), projected.gate.view())?;
        if let Some(packed) = self.packed_for(&gated) {
            return Ok(packed.output.product(gated.view()) + x);
        }
        Ok(linear::forward(gated.view(), self.parameters.w_out.view(), None)? + x)
    }
}

/// [B, H, T, width] laid out token by token, as [B T, H width].
fn rows<T>(array: Array4<T>) -> Array2<T> {
    let array = array.permuted_axes([0, 2, 1, 3]); // [B, T, H, width]
    let (b, t, h, width) = array.dim();
    array.into_shape_with_order((b * t, h * width)).expect("attention lays its results out token by token")
}
