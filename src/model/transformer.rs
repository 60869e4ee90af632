//! The language model: embedding, a stack of units, logits. Forward and backward are in `passes`, losses in `loss`.
//!
//! ```text
//! (1)  x = E[tokens] (+ position_scale * sinusoid(position))
//! (2)  x = unit(x), n_layers times                        see `layer`
//! (3)  logits = logit_scale * (RMSNorm(x) W + b)          the norm is optional; W is E^T if tied
//! ```
//!
//! Source: Transformer-VQ (Lingle, arXiv 2309.16354).

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView2};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::buffers::Buffers;
use super::layer::{self, Layer};
use super::parameters::{ParameterMut, Parameters};
use super::{ModelConfig, ModelState, Prepared, UnitKind, UnitState, codebooks};
use crate::attention::VqAttention;
use crate::attention::quadratic::KeyValues;
use crate::codebook::{CodeStats, Codebook, Learning};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// A language model with linear-time attention.
///
/// It keeps the large arrays of a pass for the next one, and frees what eight passes have not used.
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
    pub(super) config: ModelConfig,
    /// What the optimizer moves.
    pub(super) parameters: Parameters<T>,
    /// The rest of the codebooks, one per unit that has one.
    pub(super) learning: Vec<Learning<T>>,
    /// Copies of the model share them.
    pub(super) buffers: Arc<Buffers<T>>,
}

impl Transformer<f32> {
    /// A model with random weights: the same for the same seed.
    ///
    /// # Errors
    /// As [`ModelConfig::validate`], and [`Error::TooLarge`] for more numbers than there is memory for.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self, Error> {
        config.validate()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let parameters = Parameters::random(&config, &mut rng)?;
        let learning =
            config.codebook_units().map(|_| codebooks::begin(&config, &mut rng)).collect::<Result<_, _>>()?;
        Ok(Transformer { config, parameters, learning, buffers: Arc::default() })
    }
}

impl<T: Scalar> Transformer<T> {
    /// A model from its parts: `learning`, one per unit that has a codebook, is what the optimizer does not move of it.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Invalid`] for arrays that the configuration does not have, [`Error::NotFinite`],
    /// [`Error::Invalid`] for codebooks that learn otherwise than it says, and what [`Transformer::new`] says.
    pub fn from_parts(
        config: ModelConfig,
        parameters: Parameters<T>,
        learning: Vec<Learning<T>>,
    ) -> Result<Self, Error> {
        compiled_here!(
            T,
            Transformer::<T>::from_parts_here,
            fn(ModelConfig, Parameters<T>, Vec<Learning<T>>) -> Result<Transformer<T>, Error>
        )(config, parameters, learning)
    }

    fn from_parts_here(
        config: ModelConfig,
        parameters: Parameters<T>,
        learning: Vec<Learning<T>>,
    ) -> Result<Self, Error> {
        config.validate()?;
        Parameters::try_zeros(&config)?.check_like("parameters", &parameters)?;
        parameters.views().iter().try_for_each(|p| check_finite("parameters", p.value.view()))?;
        codebooks::check(&config, &parameters, &learning)?;
        Ok(Transformer { config, parameters, learning, buffers: Arc::default() })
    }

    /// The same model in another precision: in `f64`, to check gradients.
    pub fn cast<U: Scalar>(&self) -> Transformer<U> {
        Transformer {
            config: self.config.clone(),
            parameters: self.parameters.cast(&self.config),
            learning: self.learning.iter().map(Learning::cast).collect(),
            buffers: Arc::default(),
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

    /// How every codebook learns, and what the optimizer does not move of it: one per unit that has one.
    pub fn learning(&self) -> &[Learning<T>] {
        &self.learning
    }

    /// Copies of the codebooks as they are now, one per unit that has one.
    pub fn codebooks(&self) -> Vec<Codebook<T>> {
        let parts = self.learning.iter().zip(self.config.codebook_units());
        let codebook = |(learning, unit): (&Learning<T>, usize)| {
            Codebook::from_parts(learning.clone(), self.parameters.layers[unit].codebook.clone())
        };
        parts.map(codebook).collect()
    }

    /// The same weights, with keys beyond the window seen or not: what the compressive cache is worth.
    pub fn with_cache(mut self, cache: bool) -> Self {
        self.config.attention.cache = cache;
        self
    }

    /// The same model, with [`ModelConfig::recompute`] on or off.
    pub fn with_recompute(mut self, recompute: bool) -> Self {
        self.config.recompute = recompute;
        self
    }

    /// The state before the first token of `batch` sequences.
    ///
    /// # Errors
    /// [`Error::Empty`] for no sequence, [`Error::TooLarge`].
    pub fn new_state(&self, batch: usize) -> Result<ModelState<T>, Error> {
        compiled_here!(
            T,
            Transformer::<T>::new_state_here,
            fn(&Transformer<T>, usize) -> Result<ModelState<T>, Error>
        )(self, batch)
    }

    fn new_state_here(&self, batch: usize) -> Result<ModelState<T>, Error> {
        if batch == 0 {
            return Err(Error::Empty { what: "batch" });
        }
        let mut codebooks = self.codebooks().into_iter();
        let new = |unit| {
            if self.config.unit(unit).has_codebook() {
                let codebook = codebooks.next().expect("one for each such unit");
                return Ok(self.config.attention.new_states(batch, &codebook, self.config.d_v)?.into());
            }
            let (n_heads, &ModelConfig { d_k, d_v, .. }) = (self.config.key_heads(), &self.config);
            check_memory::<KeyValues<T>>("states", &[batch, n_heads])?;
            Ok(UnitState::Quadratic(Array2::from_elem((batch, n_heads), KeyValues::new(d_k, d_v)?)))
        };
        Ok(ModelState { layers: (0..self.config.n_layers).map(new).collect::<Result<_, Error>>()? })
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
    /// per unit. Those of units without a codebook are not looked at.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`]. Then no codebook has moved.
    pub fn update_codebooks(&mut self, stats: &[CodeStats<T>]) -> Result<(), Error> {
        compiled_here!(
            T,
            Transformer::<T>::update_codebooks_here,
            fn(&mut Transformer<T>, &[CodeStats<T>]) -> Result<(), Error>
        )(self, stats)
    }

    fn update_codebooks_here(&mut self, stats: &[CodeStats<T>]) -> Result<(), Error> {
        let (n_heads, &ModelConfig { n_layers, n_codes, d_k, .. }) = (self.config.key_heads(), &self.config);
        check_shape("stats", &[n_layers], &[stats.len()])?;
        // All or none.
        let mut updated = self.learning.clone();
        for (learning, unit) in updated.iter_mut().zip(self.config.codebook_units()) {
            check_shape("stats", &[n_heads, n_codes, d_k], stats[unit].sums().shape())?;
            learning.update(&stats[unit])?;
        }
        self.learning = updated;
        Ok(())
    }

    /// Sinusoids of the distances 0, 1, ..., M [M+1, D].
    pub(super) fn distances(&self) -> Result<Array2<T>, Error> {
        self.sinusoids(0, self.config.attention.window + 1)
    }

    /// What follows from one unit's parameters; `distances` [M+1, D].
    pub(super) fn prepare_layer(
        &self,
        unit: usize,
        distances: ArrayView2<'_, T>,
    ) -> Result<layer::Prepared<T>, Error> {
        let (parameters, learning) = (&self.parameters.layers[unit], self.learning_of(unit));
        layer::Prepared::new(&self.config, parameters, learning, distances)
    }

    pub(super) fn layer<'s>(&'s self, unit: usize, prepared: &'s layer::Prepared<T>) -> Layer<'s, T> {
        let cache = self.config.attention.cache && self.config.unit(unit) != UnitKind::Window;
        Layer {
            unit,
            config: &self.config,
            attention: VqAttention { cache, ..self.config.attention },
            parameters: &self.parameters.layers[unit],
            learning: self.learning_of(unit),
            prepared,
            buffers: &self.buffers,
        }
    }

    /// What the optimizer does not move of a unit's codebook, if it has one.
    fn learning_of(&self, unit: usize) -> Option<&Learning<T>> {
        self.config
            .codebook_units()
            .zip(&self.learning)
            .find(|&(at, _)| at == unit)
            .map(|(_, learning)| learning)
    }

    pub(super) fn check(&self, tokens: ArrayView2<'_, u32>, state: &ModelState<T>) -> Result<(), Error> {
        check_tokens("tokens", tokens, None, self.config.vocab_size)?;
        state.check(&self.config, tokens.nrows())
    }
}

/// [B, T] in one row, sequence after sequence.
pub(super) fn flat<E: Clone>(array: &Array2<E>) -> ndarray::Array1<E> {
    array.iter().cloned().collect()
}

/// Checks that the tokens which count are below the size of the vocabulary.
pub(crate) fn check_tokens(
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
