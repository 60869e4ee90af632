//! Formula (4) of `attention`, whatever the kind of the unit: queries, keys and values in, outputs out.

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::Layer;
use super::report::{LayerReport, PieceReport, mean_mass};
use crate::Scalar;
use crate::attention::quadratic::{self, KeyValues};
use crate::attention::{BatchBiasGradients, BatchGradients, BatchInputs, BatchOutput, BatchSaved, Biases};
use crate::codebook::CodeStats;
use crate::model::UnitState;
use crate::model::buffers::Buffers;
use crate::ops::aligned;

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub(super) enum Saved<T> {
    Quantized {
        attention: Box<BatchSaved<T>>,
        /// If the codebook learns by gradient.
        stats: Option<CodeStats<T>>,
    },
    Quadratic {
        /// All keys and values, those of the piece included [B, Hk].
        all: Array2<KeyValues<T>>,
        /// [B, H, T].
        lse: Array3<T>,
    },
}

impl<T: Scalar> Layer<'_, T> {
    /// Outputs [B, H, T, V]; `states` move on. The report is without keys.
    pub(super) fn attend_heads(
        &self,
        inputs: &BatchInputs<'_, T>,
        states: &mut UnitState<T>,
    ) -> (Array4<T>, LayerReport<T>, Saved<T>) {
        match states {
            UnitState::Quantized(states) => {
                let (b, h, t, _) = inputs.q.dim();
                let out = self.buffers.take_heads((b, h, t), self.config.d_v);
                let mut output = BatchOutput { out, ..BatchOutput::default() };
                let table = self.prepared.table();
                let (attention, _) = self.attention.forward_unchecked(inputs, table, states, &mut output);
                let BatchOutput { out, stats, commit_loss, cached_mass, .. } = output;
                let kept = self.config.learning.gradient().map(|_| stats.clone());
                let cached_mass = mean_mass(&cached_mass);
                let report = LayerReport { stats, commit_loss, cached_mass, keys: None };
                (out, report, Saved::Quantized { attention: Box::new(attention), stats: kept })
            }
            UnitState::Quadratic(states) => {
                let (out, lse) = attend_exactly(inputs, states, self.buffers);
                let stats = CodeStats::default();
                let report = LayerReport { stats, commit_loss: 0.0, cached_mass: 0.0, keys: None };
                (out, report, Saved::Quadratic { all: states.clone(), lse })
            }
        }
    }

    /// As [`attend_heads`](Self::attend_heads), to infer only.
    pub(super) fn attend_heads_to_infer(
        &self,
        inputs: &BatchInputs<'_, T>,
        states: &mut UnitState<T>,
    ) -> (Array4<T>, PieceReport) {
        match states {
            UnitState::Quantized(states) => {
                let columns = self.prepared.packed.as_deref().and_then(|packed| packed.columns.as_deref());
                let table = self.prepared.table();
                let output = self.attention.push_unchecked(inputs, table, columns, states);
                let BatchOutput { out, commit_loss, cached_mass, .. } = output;
                (out, PieceReport { commit_loss, cached_mass: mean_mass(&cached_mass) })
            }
            UnitState::Quadratic(states) => {
                let (out, _) = attend_exactly(inputs, states, self.buffers);
                (out, PieceReport { commit_loss: 0.0, cached_mass: 0.0 })
            }
        }
    }

    /// All gradients of attention and of the commitment loss, and the statistics that forward kept; `out` and `d_out`
    /// [B, H, T, V].
    pub(super) fn attend_heads_backward(
        &self,
        inputs: &BatchInputs<'_, T>,
        saved: Saved<T>,
        [out, d_out]: [ArrayView4<'_, T>; 2],
    ) -> (BatchGradients<T>, Option<CodeStats<T>>) {
        match saved {
            Saved::Quantized { attention, stats } => {
                let (weight, estimator) = (self.config.commit_weight, self.config.estimator);
                let (b, n_key_heads, t, d_v) = inputs.v.dim();
                let v = self.buffers.take_heads((b, n_key_heads, t), d_v);
                let mut d = BatchGradients { v, ..BatchGradients::default() };
                self.attention.backward_unchecked(inputs, *attention, d_out, estimator, weight, &mut d);
                (d, stats)
            }
            Saved::Quadratic { all, lse } => {
                (backward_exactly(inputs, &all, (out, &lse), d_out, self.buffers), None)
            }
        }
    }
}

/// The biases of query head h, of a group that reads one key head.
fn biases_of<'a, T: Scalar>(inputs: &'a BatchInputs<'_, T>, h: usize, group: usize) -> Option<Biases<'a, T>> {
    inputs.biases.as_ref().map(|biases| Biases {
        content: biases.content.row(h),
        position: biases.position.row(h),
        relative: biases.relative.index_axis(Axis(0), h / group),
    })
}

/// [B, H, T, width] of zeros, laid out token by token.
fn by_token<T: Scalar>((b, h, t): (usize, usize, usize), width: usize) -> Array4<T> {
    aligned::array((b, t, h, width)).permuted_axes([0, 2, 1, 3])
}

/// Exact attention of all heads: outputs [B, H, T, V] and lse [B, H, T].
fn attend_exactly<T: Scalar>(
    inputs: &BatchInputs<'_, T>,
    states: &mut Array2<KeyValues<T>>,
    buffers: &Buffers<T>,
) -> (Array4<T>, Array3<T>) {
    for ((b, h), state) in states.indexed_iter_mut() {
        state.append(inputs.k.slice(s![b, h, .., ..]), inputs.v.slice(s![b, h, .., ..]));
    }
    let ((b, h, t, _), group, states) = (inputs.q.dim(), inputs.group(), &*states);
    let attend = |n: usize| {
        let (b, h) = (n / h, n % h);
        let q = inputs.q.slice(s![b, h, .., ..]);
        quadratic::attend_unchecked(q, biases_of(inputs, h, group), &states[[b, h / group]])
    };
    let of_heads: Vec<_> = (0..b * h).into_par_iter().map(attend).collect();
    let mut out = buffers.take_heads((b, h, t), inputs.v.len_of(Axis(3)));
    let mut lse = Array3::zeros((b, h, t));
    for (n, (out_of_head, lse_of_head)) in of_heads.into_iter().enumerate() {
        out.slice_mut(s![n / h, n % h, .., ..]).assign(&out_of_head);
        lse.slice_mut(s![n / h, n % h, ..]).assign(&lse_of_head);
    }
    (out, lse)
}

/// Gradients of [`attend_exactly`]; sums over query heads and sequences are taken in their order.
fn backward_exactly<T: Scalar>(
    inputs: &BatchInputs<'_, T>,
    all: &Array2<KeyValues<T>>,
    (out, lse): (ArrayView4<'_, T>, &Array3<T>),
    d_out: ArrayView4<'_, T>,
    buffers: &Buffers<T>,
) -> BatchGradients<T> {
    let ((b, h, t, k), (_, n_key_heads, _, d_v), group) = (inputs.q.dim(), inputs.v.dim(), inputs.group());
    let backward = |n: usize| {
        let (b, h) = (n / h, n % h);
        let rows = s![b, h, .., ..];
        quadratic::attend_backward_unchecked(
            inputs.q.slice(rows),
            biases_of(inputs, h, group),
            &all[[b, h / group]],
            out.slice(rows),
            lse.slice(s![b, h, ..]),
            d_out.slice(rows),
        )
    };
    let of_heads: Vec<_> = (0..b * h).into_par_iter().map(backward).collect();
    let mut d = BatchGradients {
        q: by_token((b, h, t), k),
        k: by_token((b, n_key_heads, t), k),
        v: buffers.take_heads((b, n_key_heads, t), d_v),
        codewords: Array3::default((0, 0, 0)),
        biases: inputs.biases.as_ref().map(|biases| BatchBiasGradients {
            content: Array2::zeros(biases.content.raw_dim()),
            position: Array2::zeros(biases.position.raw_dim()),
            relative: Array3::zeros(biases.relative.raw_dim()),
        }),
    };
    d.v.fill(T::zero());
    for (n, of_head) in of_heads.into_iter().enumerate() {
        let (b, h, key_head) = (n / h, n % h, n % h / group);
        d.q.slice_mut(s![b, h, .., ..]).assign(&of_head.q);
        let (mut d_k, mut d_v) =
            (d.k.slice_mut(s![b, key_head, .., ..]), d.v.slice_mut(s![b, key_head, .., ..]));
        d_k += &of_head.k;
        d_v += &of_head.v;
        if let (Some(sums), Some(d)) = (&mut d.biases, of_head.biases) {
            let (mut content, mut position) = (sums.content.row_mut(h), sums.position.row_mut(h));
            content += &d.content;
            position += &d.position;
            let mut relative = sums.relative.index_axis_mut(Axis(0), key_head);
            relative += &d.relative;
        }
    }
    d
}
