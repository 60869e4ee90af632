//! The learned arrays of an encoder. Parameters and gradients are one struct type.

use ndarray::{Array1, Array2};
use rand_chacha::ChaCha8Rng;

use super::EncoderConfig;
use crate::Scalar;
use crate::compiled::compiled_here;
use crate::model::parameters::{dynamic, dynamic_mut, fill_for, fill_normal};
use crate::model::{
    FeedForward, FeedForwardKind, FeedForwardParameters, NormParameters, Parameter, ParameterMut,
};

/// Everything that the optimizer moves. Codebooks are not among it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderParameters<T> {
    /// [vocab, D].
    pub embedding: Array2<T>,
    /// Factor on the sinusoids `[1]`.
    pub position_scale: Array1<T>,
    /// One per unit.
    pub layers: Vec<EncoderUnitParameters<T>>,
    /// Before the head.
    pub final_norm: NormParameters<T>,
    /// Output matrix [D, C] of C tokens or classes.
    pub output: Array2<T>,
    /// `[C]`.
    pub output_bias: Array1<T>,
}

/// The learned arrays of one unit. Heads lie side by side: head h is columns hK..hK+K (hV..hV+V).
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderUnitParameters<T> {
    /// Before the projections.
    pub norm: NormParameters<T>,
    /// Queries [D, H K].
    pub w_q: Array2<T>,
    /// Keys [D, Hk K].
    pub w_k: Array2<T>,
    /// Values [D, Hk V].
    pub w_v: Array2<T>,
    /// Gate [D, H V], if the encoder has it.
    pub w_gate: Option<Array2<T>>,
    /// Back to the residual stream [H V, D].
    pub w_out: Array2<T>,
    /// Of the second branch, if the encoder has it.
    pub feed_forward: Option<FeedForwardParameters<T>>,
}

impl EncoderParameters<f32> {
    /// Weights N(0, 1/fan_in), embeddings N(0, 1), biases 0, gains and the factor on sinusoids 1.
    pub(super) fn random(config: &EncoderConfig, rng: &mut ChaCha8Rng) -> Self {
        let mut parameters = Self::zeros(config);
        let EncoderConfig { d_model, n_heads, d_v, .. } = *config;
        fill_normal(&mut parameters.embedding, 1.0, rng);
        // There is no other word of order: unlike the language model's, the factor does not start at 0.
        parameters.position_scale.fill(1.0);
        for unit in &mut parameters.layers {
            let EncoderUnitParameters { norm, w_q, w_k, w_v, w_gate, w_out, feed_forward } = unit;
            norm.gain.fill(1.0);
            [w_q, w_k, w_v].into_iter().chain(w_gate).for_each(|matrix| fill_for(matrix, d_model, rng));
            fill_for(w_out, n_heads * d_v, rng);
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = feed_forward {
                norm.gain.fill(1.0);
                let width = w_in.ncols();
                [w_in].into_iter().chain(w_gate).for_each(|matrix| fill_for(matrix, d_model, rng));
                fill_for(w_out, width, rng);
            }
        }
        parameters.final_norm.gain.fill(1.0);
        fill_for(&mut parameters.output, d_model, rng);
        parameters
    }
}

impl<T: Scalar> EncoderParameters<T> {
    /// The arrays of a valid configuration, all zero.
    pub(crate) fn zeros(config: &EncoderConfig) -> Self {
        compiled_here!(T, EncoderParameters::<T>::zeros_here, fn(&EncoderConfig) -> EncoderParameters<T>)(
            config,
        )
    }

    fn zeros_here(config: &EncoderConfig) -> Self {
        let EncoderConfig { vocab_size, d_model, n_layers, n_heads, d_k, d_v, .. } = *config;
        let (key_heads, n_outputs) = (config.key_heads(), config.n_outputs());
        let norm = || NormParameters { gain: Array1::zeros(d_model), bias: Array1::zeros(d_model) };
        let feed_forward = |FeedForward { kind, width }| FeedForwardParameters {
            norm: norm(),
            w_in: Array2::zeros((d_model, width)),
            w_gate: (kind == FeedForwardKind::SwiGlu).then(|| Array2::zeros((d_model, width))),
            w_out: Array2::zeros((width, d_model)),
        };
        let unit = |_| EncoderUnitParameters {
            norm: norm(),
            w_q: Array2::zeros((d_model, n_heads * d_k)),
            w_k: Array2::zeros((d_model, key_heads * d_k)),
            w_v: Array2::zeros((d_model, key_heads * d_v)),
            w_gate: config.gate.then(|| Array2::zeros((d_model, n_heads * d_v))),
            w_out: Array2::zeros((n_heads * d_v, d_model)),
            feed_forward: config.feed_forward.map(feed_forward),
        };
        EncoderParameters {
            embedding: Array2::zeros((vocab_size, d_model)),
            position_scale: Array1::zeros(1),
            layers: (0..n_layers).map(unit).collect(),
            final_norm: norm(),
            output: Array2::zeros((d_model, n_outputs)),
            output_bias: Array1::zeros(n_outputs),
        }
    }

    /// Every array with its name and whether weight decay applies, in a fixed order.
    pub fn views(&self) -> Vec<Parameter<'_, T>> {
        let mut all = vec![];
        let mut add = |name: String, decay, value| all.push(Parameter { name, decay, value });
        add("embedding".into(), true, dynamic(&self.embedding));
        add("position_scale".into(), false, dynamic(&self.position_scale));
        for (i, unit) in self.layers.iter().enumerate() {
            let mut add = |name: &str, decay, value| add(format!("layers.{i}.{name}"), decay, value);
            add("norm.gain", false, dynamic(&unit.norm.gain));
            add("norm.bias", false, dynamic(&unit.norm.bias));
            add("w_q", true, dynamic(&unit.w_q));
            add("w_k", true, dynamic(&unit.w_k));
            add("w_v", true, dynamic(&unit.w_v));
            if let Some(w_gate) = &unit.w_gate {
                add("w_gate", true, dynamic(w_gate));
            }
            add("w_out", true, dynamic(&unit.w_out));
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = &unit.feed_forward {
                add("feed_forward.norm.gain", false, dynamic(&norm.gain));
                add("feed_forward.norm.bias", false, dynamic(&norm.bias));
                add("feed_forward.w_in", true, dynamic(w_in));
                if let Some(w_gate) = w_gate {
                    add("feed_forward.w_gate", true, dynamic(w_gate));
                }
                add("feed_forward.w_out", true, dynamic(w_out));
            }
        }
        add("final_norm.gain".into(), false, dynamic(&self.final_norm.gain));
        add("final_norm.bias".into(), false, dynamic(&self.final_norm.bias));
        add("output".into(), true, dynamic(&self.output));
        add("output_bias".into(), false, dynamic(&self.output_bias));
        all
    }

    /// Every array, to be changed; in the order of [`views`](Self::views).
    pub fn views_mut(&mut self) -> Vec<ParameterMut<'_, T>> {
        let described: Vec<_> = self.views().into_iter().map(|p| (p.name, p.decay)).collect();
        let mut values = vec![dynamic_mut(&mut self.embedding), dynamic_mut(&mut self.position_scale)];
        for unit in &mut self.layers {
            let EncoderUnitParameters { norm, w_q, w_k, w_v, w_gate, w_out, feed_forward } = unit;
            values.extend([dynamic_mut(&mut norm.gain), dynamic_mut(&mut norm.bias)]);
            values.extend([w_q, w_k, w_v].into_iter().chain(w_gate).chain([w_out]).map(dynamic_mut));
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = feed_forward {
                values.extend([dynamic_mut(&mut norm.gain), dynamic_mut(&mut norm.bias)]);
                values.extend([w_in].into_iter().chain(w_gate).chain([w_out]).map(dynamic_mut));
            }
        }
        let NormParameters { gain, bias } = &mut self.final_norm;
        values.extend([dynamic_mut(gain), dynamic_mut(bias), dynamic_mut(&mut self.output)]);
        values.push(dynamic_mut(&mut self.output_bias));
        let name = |((name, decay), value)| ParameterMut { name, decay, value };
        described.into_iter().zip(values).map(name).collect()
    }

    /// Numbers in all arrays.
    pub fn len(&self) -> usize {
        self.views().iter().map(|p| p.value.len()).sum()
    }

    /// Whether there are none; never, for a valid configuration.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same numbers in another precision.
    pub(super) fn cast<U: Scalar>(&self, config: &EncoderConfig) -> EncoderParameters<U> {
        let mut cast = EncoderParameters::zeros(config);
        for (mut to, from) in cast.views_mut().into_iter().zip(self.views()) {
            to.value.zip_mut_with(&from.value, |to, from| *to = U::from_f64(from.as_f64()));
        }
        cast
    }
}
