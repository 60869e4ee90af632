//! The language model: embedding, a stack of gated units, logits; forward and backward. Losses are in `loss`.
//!
//! ```text
//! (1)  x = E[tokens] (+ position_scale * sinusoid(position))
//! (2)  x = unit(x), n_layers times                        see `layer`
//! (3)  logits = logit_scale * (RMSNorm(x) W + b)          the norm is optional; W is E^T if tied
//! ```
//!
//! Source: Transformer-VQ (Lingle, arXiv 2309.16354).

use ndarray::{Array2, Array3, ArrayView1, ArrayView2};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::layer::{self, Layer, LayerReport};
use super::parameters::{NormParameters, ParameterMut, Parameters};
use super::{ModelConfig, ModelState, Prepared, codebooks};
use crate::codebook::{CodeStats, Codebook, Learning};
use crate::error::{check_finite, check_shape};
use crate::ops::{embedding, linear, positions, rms_norm};
use crate::{Error, Scalar};

/// A language model with linear-time attention.
///
/// ```
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::array;
///
/// let config = ModelConfig { vocab_size: 8, d_model: 16, n_layers: 2, ..ModelConfig::default() };
/// let model = Transformer::new(config, 1)?;
/// let mut state = model.new_state(1)?;
/// let logits = model.push(array![[1, 2, 3]].view(), &mut state)?; // [B, T, vocab]
/// assert_eq!(logits.dim(), (1, 3, 8));
/// assert_eq!(state.position(), 3);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Transformer<T = f32> {
    config: ModelConfig,
    /// What the optimizer moves.
    pub(super) parameters: Parameters<T>,
    /// The rest of the codebooks, one per unit.
    pub(super) learning: Vec<Learning<T>>,
}

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    config: ModelConfig,
    tokens: Array2<u32>,
    mask: Option<Array2<bool>>,
    start: u64,
    layers: Vec<layer::Saved<T>>,
    x: Array2<T>,
    final_norm: Option<rms_norm::Saved<T>>,
}

impl Transformer<f32> {
    /// A model with random weights: the same for the same seed.
    ///
    /// # Errors
    /// As [`ModelConfig::validate`].
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self, Error> {
        config.validate()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let parameters = Parameters::random(&config, &mut rng);
        let learning =
            (0..config.n_layers).map(|_| codebooks::begin(&config, &mut rng)).collect::<Result<_, _>>()?;
        Ok(Transformer { config, parameters, learning })
    }
}

impl<T: Scalar> Transformer<T> {
    /// A model from its parts: `learning`, one per unit, is what the optimizer does not move of the codebooks.
    ///
    /// # Errors
    /// [`Error::Shape`] for an array that does not belong to the configuration, [`Error::NotFinite`], [`Error::Invalid`] for
    /// codebooks that learn otherwise than it says, and what [`ModelConfig::validate`] says.
    pub fn from_parts(
        config: ModelConfig,
        parameters: Parameters<T>,
        learning: Vec<Learning<T>>,
    ) -> Result<Self, Error> {
        config.validate()?;
        Parameters::zeros(&config).check_like("parameters", &parameters)?;
        parameters.views().iter().try_for_each(|p| check_finite("parameters", p.value.view()))?;
        codebooks::check(&config, &parameters, &learning)?;
        Ok(Transformer { config, parameters, learning })
    }

    /// The same model in another precision: in `f64`, to check gradients.
    pub fn cast<U: Scalar>(&self) -> Transformer<U> {
        Transformer {
            config: self.config.clone(),
            parameters: self.parameters.cast(&self.config),
            learning: self.learning.iter().map(Learning::cast).collect(),
        }
    }

    /// Sizes and options.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the optimizer moves.
    pub fn parameters(&self) -> &Parameters<T> {
        &self.parameters
    }

    /// What the optimizer moves, to be moved, in the order of [`Parameters::views`].
    pub fn parameters_mut(&mut self) -> Vec<ParameterMut<'_, T>> {
        self.parameters.views_mut()
    }

    /// Arrays like the parameters, all zero: for gradients to be added to.
    pub fn zero_gradients(&self) -> Parameters<T> {
        Parameters::zeros(&self.config)
    }

    /// How every unit's codebook learns, and what the optimizer does not move of it.
    pub fn learning(&self) -> &[Learning<T>] {
        &self.learning
    }

    /// Copies of the codebooks as they are now, one per unit.
    pub fn codebooks(&self) -> Vec<Codebook<T>> {
        let parts = self.learning.iter().zip(&self.parameters.layers);
        parts
            .map(|(learning, layer)| Codebook::from_parts(learning.clone(), layer.codebook.clone()))
            .collect()
    }

    /// The same weights, with keys beyond the window seen or not: what the compressive cache is worth.
    pub fn with_cache(mut self, cache: bool) -> Self {
        self.config.attention.cache = cache;
        self
    }

    /// The state before the first token of `batch` sequences.
    ///
    /// # Errors
    /// [`Error::Empty`] for no sequence, [`Error::TooLarge`].
    pub fn new_state(&self, batch: usize) -> Result<ModelState<T>, Error> {
        if batch == 0 {
            return Err(Error::Empty { what: "batch" });
        }
        let new = |codebook| self.config.attention.new_states(batch, codebook, self.config.d_v);
        Ok(ModelState { layers: self.codebooks().iter().map(new).collect::<Result<_, _>>()? })
    }

    /// Logits of a piece [B, T, vocab] and what backward needs; `state` moves from before the piece to after it.
    ///
    /// # Shapes
    /// `tokens` [B, T]; `mask` [B, T], true where a position counts in losses and statistics.
    ///
    /// # Errors
    /// Shapes that do not fit, tokens outside the vocabulary. The state is then as it was.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(
        &self,
        tokens: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
    ) -> Result<(Array3<T>, Vec<LayerReport<T>>, Saved<T>), Error> {
        self.check(tokens, state)?;
        if let Some(mask) = &mask {
            check_shape("mask", tokens.shape(), mask.shape())?;
        }
        let start = state.position();
        let mut x = self.embed(tokens, start)?; // (1)
        let (mut reports, mut layers) = (vec![], vec![]);
        let prepared = self.prepare_layers(self.distances()?.view())?;
        for (layer, states) in self.layers(&prepared).zip(&mut state.layers) {
            let (y, report, saved) = layer.forward(x, states, mask)?; // (2)
            x = y;
            reports.push(report);
            layers.push(saved);
        }
        let (normed, final_norm) = self.normalize(&x)?;
        let logits = self.logits(&normed, tokens.dim())?; // (3)
        let saved = Saved {
            config: self.config.clone(),
            tokens: tokens.to_owned(),
            mask: mask.map(|mask| mask.to_owned()),
            start,
            layers,
            x,
            final_norm,
        };
        Ok((logits, reports, saved))
    }

    /// Gradients of `sum(d_logits * logits)` plus the weighted commitment and codebook losses, added to `gradients`.
    ///
    /// # Shapes
    /// `d_logits` [B, T, vocab].
    ///
    /// # Errors
    /// [`Error::Shape`], and [`Error::Invalid`] if `saved` comes from a model of another configuration. Then nothing has
    /// been added.
    pub fn backward(
        &self,
        saved: Saved<T>,
        d_logits: Array3<T>,
        gradients: &mut Parameters<T>,
    ) -> Result<(), Error> {
        let Saved { config, tokens, mask, start, layers, x, final_norm } = saved;
        if config != self.config {
            return Err(Error::invalid("saved", "from this model's forward", format!("{config:?}")));
        }
        self.parameters.check_like("gradients", gradients)?;
        let (b, t) = tokens.dim();
        check_shape("d_logits", &[b, t, self.config.vocab_size], d_logits.shape())?;
        // (3)
        let d_logits = d_logits.as_standard_layout().into_owned() * T::from_f64(self.config.logit_scale);
        let d_logits = d_logits.into_shape_with_order((b * t, self.config.vocab_size)).expect("contiguous");
        let normed = self.normalize(&x)?.0;
        let (d_w, d_b) = (&mut gradients.embedding, gradients.output_bias.view_mut());
        let d_w = match &mut gradients.output {
            Some(d_output) => d_output.view_mut(),
            None => d_w.view_mut().reversed_axes(),
        };
        let mut d_x = linear::backward(normed.view(), self.output(), d_logits.view(), d_w, Some(d_b))?;
        let norms = self.parameters.final_norm.as_ref().zip(gradients.final_norm.as_mut());
        if let (Some((norm, d)), Some(saved)) = (norms, &final_norm) {
            let (d_gain, d_bias) = (d.gain.view_mut(), d.bias.view_mut());
            d_x = rms_norm::backward_affine(x.view(), saved, norm.gain.view(), d_x.view(), d_gain, d_bias)?;
        }
        drop((x, normed, d_logits));
        // (2)
        let distances = self.distances()?;
        let prepared = self.prepare_layers(distances.view())?;
        let units = self.layers(&prepared).zip(&mut gradients.layers).zip(layers).rev();
        for ((layer, d_parameters), saved) in units {
            let mask = mask.as_ref().map(|mask| mask.view());
            d_x = layer.backward(saved, d_x, mask, b, distances.view(), d_parameters)?;
        }
        // (1)
        if let Some(d_scale) = &mut gradients.position_scale {
            let sinusoids = self.sinusoids(start, t)?;
            let sum = |rows: ArrayView2<'_, T>| (&rows * &sinusoids).sum();
            d_scale[0] += d_x.axis_chunks_iter(ndarray::Axis(0), t.max(1)).map(sum).sum::<T>();
        }
        embedding::backward(flat(&tokens).view(), d_x.view(), gradients.embedding.view_mut())
    }

    /// The model made ready to infer, with a copy of its weights: see [`Prepared`].
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn prepare(&self) -> Result<Prepared<'_, T>, Error> {
        Prepared::new(self)
    }

    /// Logits of a piece of any size `[B, T, vocab]`, to infer only; `state` moves on.
    ///
    /// For many pieces, above all for tokens one by one, [`prepare`](Self::prepare) once.
    ///
    /// # Shapes
    /// `tokens` [B, T].
    ///
    /// # Errors
    /// Shapes that do not fit, tokens outside the vocabulary. The state is then as it was.
    pub fn push(&self, tokens: ArrayView2<'_, u32>, state: &mut ModelState<T>) -> Result<Array3<T>, Error> {
        Ok(Prepared::for_one_piece(self)?.push(tokens, state)?.0)
    }

    /// Lets every codebook that learns by moving averages learn from the statistics of one step: its micro-batches merged, one
    /// per unit.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`]. Then no codebook has moved.
    pub fn update_codebooks(&mut self, stats: &[CodeStats<T>]) -> Result<(), Error> {
        let (n_heads, &ModelConfig { n_codes, d_k, .. }) = (self.config.key_heads(), &self.config);
        check_shape("stats", &[self.learning.len()], &[stats.len()])?;
        // All or none.
        let mut updated = self.learning.clone();
        for (learning, stats) in updated.iter_mut().zip(stats) {
            check_shape("stats", &[n_heads, n_codes, d_k], stats.sums().shape())?;
            learning.update(stats)?;
        }
        self.learning = updated;
        Ok(())
    }

    /// Sinusoids of the distances 0, 1, ..., M [M+1, D].
    pub(super) fn distances(&self) -> Result<Array2<T>, Error> {
        self.sinusoids(0, self.config.attention.window + 1)
    }

    pub(super) fn prepare_layers(
        &self,
        distances: ArrayView2<'_, T>,
    ) -> Result<Vec<layer::Prepared<T>>, Error> {
        let parts = self.parameters.layers.iter().zip(&self.learning);
        let prepare = |(parameters, learning)| {
            layer::Prepared::new(&self.config, parameters, learning, distances.view())
        };
        parts.map(prepare).collect()
    }

    pub(super) fn layers<'s>(
        &'s self,
        prepared: &'s [layer::Prepared<T>],
    ) -> impl DoubleEndedIterator<Item = Layer<'s, T>> + ExactSizeIterator {
        let parts = self.parameters.layers.iter().zip(&self.learning).zip(prepared);
        let config = &self.config;
        parts.map(move |((parameters, learning), prepared)| Layer { config, parameters, learning, prepared })
    }

    /// What `f` makes of one unit as it is now.
    pub(super) fn with_layer<R>(
        &self,
        unit: usize,
        f: impl FnOnce(Layer<'_, T>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let (config, parameters, learning) =
            (&self.config, &self.parameters.layers[unit], &self.learning[unit]);
        let prepared = layer::Prepared::new(config, parameters, learning, self.distances()?.view())?;
        f(Layer { config, parameters, learning, prepared: &prepared })
    }

    pub(super) fn check(&self, tokens: ArrayView2<'_, u32>, state: &ModelState<T>) -> Result<(), Error> {
        check_tokens("tokens", tokens, None, self.config.vocab_size)?;
        state.check(&self.config, tokens.nrows())
    }

    fn sinusoids(&self, start: u64, count: usize) -> Result<Array2<T>, Error> {
        positions::sinusoids(start, count, self.config.d_model, self.config.position_lambda)
    }

    /// (1)
    pub(super) fn embed(&self, tokens: ArrayView2<'_, u32>, start: u64) -> Result<Array2<T>, Error> {
        let tokens = tokens.to_owned();
        let mut x = embedding::forward(self.parameters.embedding.view(), flat(&tokens).view())?;
        if let Some(scale) = &self.parameters.position_scale {
            let sinusoids = self.sinusoids(start, tokens.ncols())? * scale[0];
            for mut rows in x.axis_chunks_iter_mut(ndarray::Axis(0), tokens.ncols().max(1)) {
                rows += &sinusoids;
            }
        }
        Ok(x)
    }

    /// The norm of (3).
    pub(super) fn normalize(&self, x: &Array2<T>) -> Result<(Array2<T>, Option<rms_norm::Saved<T>>), Error> {
        let Some(NormParameters { gain, bias }) = &self.parameters.final_norm else {
            return Ok((x.clone(), None));
        };
        let (y, saved) = rms_norm::forward_affine(x.view(), gain.view(), bias.view())?;
        Ok((y, Some(saved)))
    }

    /// W of (3) [D, vocab].
    pub(super) fn output(&self) -> ArrayView2<'_, T> {
        match &self.parameters.output {
            Some(output) => output.view(),
            None => self.parameters.embedding.t(),
        }
    }

    /// (3), after the norm.
    pub(super) fn logits(&self, x: &Array2<T>, dim: (usize, usize)) -> Result<Array3<T>, Error> {
        let bias: ArrayView1<'_, T> = self.parameters.output_bias.view();
        Ok(self.scale_logits(linear::forward(x.view(), self.output(), Some(bias))?, dim))
    }

    /// What is left of (3) after the product and the bias.
    pub(super) fn scale_logits(&self, mut logits: Array2<T>, (b, t): (usize, usize)) -> Array3<T> {
        if self.config.logit_scale != 1.0 {
            logits *= T::from_f64(self.config.logit_scale);
        }
        logits.into_shape_with_order((b, t, self.config.vocab_size)).expect("contiguous")
    }
}

/// [B, T] in one row, sequence after sequence.
pub(super) fn flat<E: Clone>(array: &Array2<E>) -> ndarray::Array1<E> {
    array.iter().cloned().collect()
}

/// Checks that the tokens which count are below the size of the vocabulary.
pub(super) fn check_tokens(
    what: &'static str,
    tokens: ArrayView2<'_, u32>,
    mask: Option<&ArrayView2<'_, bool>>,
    vocab_size: usize,
) -> Result<(), Error> {
    if let Some(mask) = mask {
        check_shape("mask", tokens.shape(), mask.shape())?;
    }
    let counts = |index: (usize, usize)| mask.is_none_or(|mask| mask[index]);
    let mut outside = tokens.indexed_iter().filter(|&(_, &token)| token as usize >= vocab_size);
    match outside.find(|&(index, _)| counts(index)) {
        Some(((b, t), &token)) => {
            Err(Error::OutOfRange { what, index: vec![b, t], got: token.into(), limit: vocab_size })
        }
        None => Ok(()),
    }
}
