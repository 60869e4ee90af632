//! The learned arrays of a model. Parameters, gradients and optimizer moments are one struct type.

use ndarray::{Array, Array1, Array2, Array3, ArrayView, ArrayViewD, ArrayViewMut, ArrayViewMutD, Dimension};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{FeedForward, FeedForwardKind, LearningConfig, ModelConfig};
use crate::codebook::CodebookParameters;
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// Everything that the optimizer moves. Codebooks that learn by moving averages are not among it.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters<T> {
    /// [vocab, D].
    pub embedding: Array2<T>,
    /// Factor on the absolute sinusoids `[1]`, if the model has them.
    pub position_scale: Option<Array1<T>>,
    /// One per unit.
    pub layers: Vec<LayerParameters<T>>,
    /// If the model has it.
    pub final_norm: Option<NormParameters<T>>,
    /// Output matrix [D, vocab]; none if it is the embedding, transposed.
    pub output: Option<Array2<T>>,
    /// `[vocab]`.
    pub output_bias: Array1<T>,
}

/// The learned arrays of one unit. Heads lie side by side: head h is columns hK..hK+K (hV..hV+V).
#[derive(Debug, Clone, PartialEq)]
pub struct LayerParameters<T> {
    /// Before the projections.
    pub norm: NormParameters<T>,
    /// Queries [D, H K].
    pub w_q: Array2<T>,
    /// Keys [D, Hk K].
    pub w_k: Array2<T>,
    /// Values [D, Hk V].
    pub w_v: Array2<T>,
    /// Gate [D, H V], if the model has it.
    pub w_gate: Option<Array2<T>>,
    /// Relative sinusoids [D, Hk K].
    pub w_relative: Array2<T>,
    /// Back to the residual stream [H V, D].
    pub w_out: Array2<T>,
    /// u [H, K], before its factor K^(-1/4).
    pub content_bias: Array2<T>,
    /// w [H, K], before its factor K^(-1/4).
    pub position_bias: Array2<T>,
    /// Of the codebook, if it learns by gradient.
    pub codebook: CodebookParameters<T>,
    /// Of the second branch, if the model has it.
    pub feed_forward: Option<FeedForwardParameters<T>>,
}

/// The learned arrays of a feed-forward branch of width F.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedForwardParameters<T> {
    /// Before the projections.
    pub norm: NormParameters<T>,
    /// [D, F].
    pub w_in: Array2<T>,
    /// Of SwiGLU [D, F].
    pub w_gate: Option<Array2<T>>,
    /// Back to the residual stream [F, D].
    pub w_out: Array2<T>,
}

/// Gain and bias of an RMS norm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormParameters<T> {
    /// `[D]`.
    pub gain: Array1<T>,
    /// `[D]`.
    pub bias: Array1<T>,
}

/// One learned array, with its name.
#[derive(Debug, Clone)]
pub struct Parameter<'a, T> {
    /// For example `layers.0.w_q`.
    pub name: String,
    /// Whether weight decay applies: to embedding and projection matrices only.
    pub decay: bool,
    /// The array.
    pub value: ArrayViewD<'a, T>,
}

/// One learned array, to be changed.
#[derive(Debug)]
pub struct ParameterMut<'a, T> {
    /// As [`Parameter::name`].
    pub name: String,
    /// As [`Parameter::decay`].
    pub decay: bool,
    /// The array.
    pub value: ArrayViewMutD<'a, T>,
}

impl Parameters<f32> {
    /// Weights N(0, 1/fan_in), embeddings N(0, 1), biases 0, gains 1.
    pub(super) fn random(config: &ModelConfig, rng: &mut ChaCha8Rng) -> Result<Self, Error> {
        let mut parameters = Self::try_zeros(config)?;
        let ModelConfig { d_model, n_heads, d_v, .. } = *config;
        fill_normal(&mut parameters.embedding, 1.0, rng);
        for layer in &mut parameters.layers {
            layer.norm.gain.fill(1.0);
            let LayerParameters { w_q, w_k, w_v, w_gate, w_relative, w_out, .. } = layer;
            let inputs = [w_q, w_k, w_v].into_iter().chain(w_gate).chain([w_relative]);
            inputs.for_each(|matrix| fill_for(matrix, d_model, rng));
            fill_for(w_out, n_heads * d_v, rng);
            // Codewords start about as long as keys are; see `codebooks`.
            let CodebookParameters { codewords, basis, weight, .. } = &mut layer.codebook;
            if let Some(basis) = basis {
                let deviation = (basis.dim().2 as f64).sqrt().recip();
                fill_normal(basis, deviation, rng);
            }
            for scaled in [codewords, weight].into_iter().flatten() {
                fill_normal(scaled, config.key_scale(), rng);
            }
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = &mut layer.feed_forward {
                norm.gain.fill(1.0);
                let width = w_in.ncols();
                [w_in].into_iter().chain(w_gate).for_each(|matrix| fill_for(matrix, d_model, rng));
                fill_for(w_out, width, rng);
            }
        }
        if let Some(norm) = &mut parameters.final_norm {
            norm.gain.fill(1.0);
        }
        if let Some(output) = &mut parameters.output {
            fill_for(output, d_model, rng);
        }
        Ok(parameters)
    }
}

/// Numbers from N(0, 1 / fan_in).
pub(super) fn fill_for(matrix: &mut Array2<f32>, fan_in: usize, rng: &mut ChaCha8Rng) {
    fill_normal(matrix, (fan_in as f64).sqrt().recip(), rng);
}

/// Numbers from N(0, deviation^2).
pub(super) fn fill_normal<D: Dimension>(array: &mut Array<f32, D>, deviation: f64, rng: &mut ChaCha8Rng) {
    array.mapv_inplace(|_| (deviation * standard_normal(rng)) as f32);
}

/// A number from N(0, 1) (Box and Muller).
pub(super) fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

impl<T: Scalar> Parameters<T> {
    /// [`zeros`](Self::zeros), if there is memory for them.
    pub(super) fn try_zeros(config: &ModelConfig) -> Result<Self, Error> {
        check_numbers::<T>(config.n_parameters())?;
        Ok(Self::zeros(config))
    }

    /// The arrays of a valid configuration, all zero: gradients before backward, moments before the first step.
    pub(crate) fn zeros(config: &ModelConfig) -> Self {
        compiled_here!(T, Parameters::<T>::zeros_here, fn(&ModelConfig) -> Parameters<T>)(config)
    }

    fn zeros_here(config: &ModelConfig) -> Self {
        let ModelConfig { vocab_size, d_model, n_layers, n_heads, d_k, d_v, .. } = *config;
        let norm = || NormParameters { gain: Array1::zeros(d_model), bias: Array1::zeros(d_model) };
        let key_heads = config.key_heads();
        let feed_forward = |FeedForward { kind, width }| FeedForwardParameters {
            norm: norm(),
            w_in: Array2::zeros((d_model, width)),
            w_gate: (kind == FeedForwardKind::SwiGlu).then(|| Array2::zeros((d_model, width))),
            w_out: Array2::zeros((width, d_model)),
        };
        let layer = |unit: usize| LayerParameters {
            norm: norm(),
            w_q: Array2::zeros((d_model, n_heads * d_k)),
            w_k: Array2::zeros((d_model, key_heads * d_k)),
            w_v: Array2::zeros((d_model, key_heads * d_v)),
            w_gate: config.gate.then(|| Array2::zeros((d_model, n_heads * d_v))),
            w_relative: Array2::zeros((d_model, key_heads * d_k)),
            w_out: Array2::zeros((n_heads * d_v, d_model)),
            content_bias: Array2::zeros((n_heads, d_k)),
            position_bias: Array2::zeros((n_heads, d_k)),
            codebook: if config.unit(unit).has_codebook() {
                zero_codebook(config)
            } else {
                CodebookParameters::default()
            },
            feed_forward: config.feed_forward.map(feed_forward),
        };
        Parameters {
            embedding: Array2::zeros((vocab_size, d_model)),
            position_scale: config.absolute_positions.then(|| Array1::zeros(1)),
            layers: (0..n_layers).map(layer).collect(),
            final_norm: config.final_norm.then(norm),
            output: (!config.tied_embedding).then(|| Array2::zeros((d_model, vocab_size))),
            output_bias: Array1::zeros(vocab_size),
        }
    }

    /// Every array, in a fixed order.
    pub fn views(&self) -> Vec<Parameter<'_, T>> {
        let mut all = vec![];
        let mut add = |name: String, decay, value| all.push(Parameter { name, decay, value });
        add("embedding".into(), true, dynamic(&self.embedding));
        if let Some(scale) = &self.position_scale {
            add("position_scale".into(), false, dynamic(scale));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |name: &str, decay, value| add(format!("layers.{i}.{name}"), decay, value);
            add("norm.gain", false, dynamic(&layer.norm.gain));
            add("norm.bias", false, dynamic(&layer.norm.bias));
            add("w_q", true, dynamic(&layer.w_q));
            add("w_k", true, dynamic(&layer.w_k));
            add("w_v", true, dynamic(&layer.w_v));
            if let Some(w_gate) = &layer.w_gate {
                add("w_gate", true, dynamic(w_gate));
            }
            add("w_relative", true, dynamic(&layer.w_relative));
            add("w_out", true, dynamic(&layer.w_out));
            add("content_bias", false, dynamic(&layer.content_bias));
            add("position_bias", false, dynamic(&layer.position_bias));
            for (name, value) in layer.codebook.views() {
                add(&format!("codebook.{name}"), false, value);
            }
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = &layer.feed_forward {
                add("feed_forward.norm.gain", false, dynamic(&norm.gain));
                add("feed_forward.norm.bias", false, dynamic(&norm.bias));
                add("feed_forward.w_in", true, dynamic(w_in));
                if let Some(w_gate) = w_gate {
                    add("feed_forward.w_gate", true, dynamic(w_gate));
                }
                add("feed_forward.w_out", true, dynamic(w_out));
            }
        }
        if let Some(norm) = &self.final_norm {
            add("final_norm.gain".into(), false, dynamic(&norm.gain));
            add("final_norm.bias".into(), false, dynamic(&norm.bias));
        }
        if let Some(output) = &self.output {
            add("output".into(), true, dynamic(output));
        }
        add("output_bias".into(), false, dynamic(&self.output_bias));
        all
    }

    /// Every array, to be changed; in the order of [`views`](Self::views).
    pub fn views_mut(&mut self) -> Vec<ParameterMut<'_, T>> {
        let described: Vec<_> = self.views().into_iter().map(|p| (p.name, p.decay)).collect();
        let mut values = vec![dynamic_mut(&mut self.embedding)];
        values.extend(self.position_scale.as_mut().map(dynamic_mut));
        for layer in &mut self.layers {
            values.extend([
                dynamic_mut(&mut layer.norm.gain),
                dynamic_mut(&mut layer.norm.bias),
                dynamic_mut(&mut layer.w_q),
                dynamic_mut(&mut layer.w_k),
                dynamic_mut(&mut layer.w_v),
            ]);
            values.extend(layer.w_gate.as_mut().map(dynamic_mut));
            values.extend([
                dynamic_mut(&mut layer.w_relative),
                dynamic_mut(&mut layer.w_out),
                dynamic_mut(&mut layer.content_bias),
                dynamic_mut(&mut layer.position_bias),
            ]);
            values.extend(layer.codebook.views_mut().into_iter().map(|(_, value)| value));
            if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = &mut layer.feed_forward {
                values.extend([dynamic_mut(&mut norm.gain), dynamic_mut(&mut norm.bias), dynamic_mut(w_in)]);
                values.extend(w_gate.as_mut().map(dynamic_mut));
                values.push(dynamic_mut(w_out));
            }
        }
        if let Some(norm) = &mut self.final_norm {
            values.extend([dynamic_mut(&mut norm.gain), dynamic_mut(&mut norm.bias)]);
        }
        values.extend(self.output.as_mut().map(dynamic_mut));
        values.push(dynamic_mut(&mut self.output_bias));
        let name = |((name, decay), value)| ParameterMut { name, decay, value };
        described.into_iter().zip(values).map(name).collect()
    }

    /// Checks that `other` has arrays of the same names and shapes.
    pub(crate) fn check_like(&self, what: &'static str, other: &Self) -> Result<(), Error> {
        let (mine, theirs) = (self.views(), other.views());
        check_shape(what, &[mine.len()], &[theirs.len()])?;
        mine.iter().zip(&theirs).try_for_each(|(mine, theirs)| {
            if mine.name != theirs.name {
                return Err(Error::invalid(what, format!("`{}`", mine.name), format!("`{}`", theirs.name)));
            }
            check_shape(what, mine.value.shape(), theirs.value.shape())
        })
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
    pub(super) fn cast<U: Scalar>(&self, config: &ModelConfig) -> Parameters<U> {
        let mut cast = Parameters::zeros(config);
        for (mut to, from) in cast.views_mut().into_iter().zip(self.views()) {
            to.value.zip_mut_with(&from.value, |to, from| *to = U::from_f64(from.as_f64()));
        }
        cast
    }
}

/// Checks that there is memory for so many numbers.
pub(super) fn check_numbers<T>(n_parameters: u128) -> Result<(), Error> {
    check_memory::<T>("parameters", &[usize::try_from(n_parameters).unwrap_or(usize::MAX)])
}

/// What the optimizer moves of a codebook, all zero.
fn zero_codebook<T: Scalar>(config: &ModelConfig) -> CodebookParameters<T> {
    let (n_heads, &ModelConfig { n_codes, d_k, .. }) = (config.key_heads(), config);
    match config.learning {
        LearningConfig::Ema { .. } | LearningConfig::Frozen => CodebookParameters::default(),
        LearningConfig::Gradient(_) => CodebookParameters {
            codewords: Some(Array3::zeros((n_heads, n_codes, d_k))),
            ..CodebookParameters::default()
        },
        LearningConfig::Linear { d_basis, learned_basis, bias, .. } => CodebookParameters {
            codewords: None,
            basis: learned_basis.then(|| Array3::zeros((n_heads, n_codes, d_basis))),
            weight: Some(Array3::zeros((n_heads, d_k, d_basis))),
            bias: bias.then(|| Array2::zeros((n_heads, d_k))),
        },
    }
}

pub(super) fn dynamic<T, D: Dimension>(array: &ndarray::Array<T, D>) -> ArrayViewD<'_, T> {
    let view: ArrayView<'_, T, D> = array.view();
    view.into_dyn()
}

pub(super) fn dynamic_mut<T, D: Dimension>(array: &mut ndarray::Array<T, D>) -> ArrayViewMutD<'_, T> {
    let view: ArrayViewMut<'_, T, D> = array.view_mut();
    view.into_dyn()
}
