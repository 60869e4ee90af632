//! An encoder: all positions of a sequence at once, each of which sees every other, in linear time.
//!
//! ```text
//! (1)  x = E[tokens] + position_scale * sinusoid(position)
//! (2)  x = unit(x), n_layers times                          see `unit`
//! (3)  y = RMSNorm(x) * gain + bias
//! (4)  masked token:  logits = y W + b                      [B, T, vocab]
//!      classes:       logits = (mean_t y_t) W + b           [B, 1, n_classes], the mean over positions that exist
//! ```
//!
//! Sequences of a batch may have different lengths: what stands where no position exists is padding. It is not read, no query
//! sees it, it is in no loss, no mean and no statistics, and it has no gradient.
//!
//! Read in this order: [`EncoderConfig`], `unit`, `passes`, [`EncoderBatch`].

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView2};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::ParameterMut;
use super::buffers::Buffers;
use super::parameters::{check_numbers, standard_normal};
use super::transformer::check_tokens;
use crate::codebook::{CodeStats, Codebook, Ema, start};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::{Error, Scalar};

mod checkpoint;
mod config;
mod loss;
mod parameters;
mod passes;
mod unit;

pub use config::{EncoderConfig, EncoderHead};
pub use loss::{EncoderBatch, EncoderLoss};
pub use parameters::{EncoderParameters, EncoderUnitParameters};
use passes::Forward;
use unit::Unit;

/// An encoder with bidirectional attention in linear time.
///
/// ```
/// use transformer_vq::model::{Encoder, EncoderConfig, EncoderHead};
/// use transformer_vq::ndarray::array;
///
/// let head = EncoderHead::Classes { n_classes: 3 };
/// let config = EncoderConfig { vocab_size: 8, d_model: 16, n_layers: 2, head, ..EncoderConfig::default() };
/// let encoder = Encoder::new(config, 1)?;
/// let (tokens, exists) = (array![[1, 2, 3], [4, 5, 0]], array![[true, true, true], [true, true, false]]);
/// let logits = encoder.forward(tokens.view(), Some(exists.view()))?; // [B, 1, n_classes]
/// assert_eq!(logits.dim(), (2, 1, 3));
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Encoder<T = f32> {
    config: EncoderConfig,
    parameters: EncoderParameters<T>,
    /// One per unit, all moving averages.
    codebooks: Vec<Codebook<T>>,
    /// Copies of the encoder share them.
    buffers: Arc<Buffers<T>>,
}

/// Tokens and where they exist, to logits or the stream.
type Pass<T> = fn(&Encoder<T>, ArrayView2<'_, u32>, Option<ArrayView2<'_, bool>>) -> Result<Array3<T>, Error>;
/// [`Encoder::start_codebooks`].
type Start<T> =
    fn(&mut Encoder<T>, ArrayView2<'_, u32>, Option<ArrayView2<'_, bool>>, usize, u64) -> Result<(), Error>;

/// What a unit reports of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderUnitReport<T> {
    /// What the unit's codebook learns from: keys of positions that exist.
    pub stats: CodeStats<T>,
    /// Squared distance of keys to their codewords, summed over key heads and dimensions, mean over positions that exist.
    pub commit_loss: f64,
}

impl Encoder<f32> {
    /// An encoder with random weights: the same for the same seed.
    ///
    /// # Errors
    /// As [`EncoderConfig::validate`], and [`Error::TooLarge`] for more numbers than there is memory for.
    pub fn new(config: EncoderConfig, seed: u64) -> Result<Self, Error> {
        config.validate()?;
        check_numbers::<f32>(config.n_parameters())?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let parameters = EncoderParameters::random(&config, &mut rng);
        let (key_heads, &EncoderConfig { n_codes, d_k, codebook_decay, .. }) = (config.key_heads(), &config);
        let begin = |_| {
            let ema = Ema::random(key_heads, n_codes, d_k, codebook_decay, || standard_normal(&mut rng));
            ema.map(Codebook::ema)
        };
        let codebooks = (0..config.n_layers).map(begin).collect::<Result<_, _>>()?;
        Ok(Encoder { config, parameters, codebooks, buffers: Arc::default() })
    }
}

impl<T: Scalar> Encoder<T> {
    /// The same encoder in another precision: in `f64`, to check gradients.
    pub fn cast<U: Scalar>(&self) -> Encoder<U> {
        Encoder {
            config: self.config.clone(),
            parameters: self.parameters.cast(&self.config),
            codebooks: self.codebooks.iter().map(Codebook::cast).collect(),
            buffers: Arc::default(),
        }
    }

    /// Sizes and options.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// What the optimizer moves.
    pub fn parameters(&self) -> &EncoderParameters<T> {
        &self.parameters
    }

    /// What the optimizer moves, to be moved, in the order of [`EncoderParameters::views`].
    pub fn parameters_mut(&mut self) -> Vec<ParameterMut<'_, T>> {
        self.parameters.views_mut()
    }

    /// The codebooks, one per unit.
    pub fn codebooks(&self) -> &[Codebook<T>] {
        &self.codebooks
    }

    /// The logits: one row per position, or one per sequence where the configuration has classes.
    ///
    /// # Shapes
    /// `tokens` [B, T]; `exists` [B, T], true where a token stands, without it everywhere. The result [B, T, vocab] or
    /// [B, 1, `n_classes`]; at padding, numbers without meaning.
    ///
    /// # Errors
    /// [`Error::Empty`] without a token, [`Error::Shape`], [`Error::Invalid`] for a sequence that is padding alone,
    /// [`Error::OutOfRange`] for a token outside the vocabulary where one exists, [`Error::NotFinite`] for keys of weights that
    /// are not finite or too large.
    pub fn forward(
        &self,
        tokens: ArrayView2<'_, u32>,
        exists: Option<ArrayView2<'_, bool>>,
    ) -> Result<Array3<T>, Error> {
        compiled_here!(
            T,
            |encoder, tokens, exists| {
                let Forward { logits, saved, .. } = encoder.run(tokens, &encoder.check(tokens, exists)?)?;
                saved.give(&encoder.buffers);
                Ok(logits)
            },
            Pass<T>
        )(self, tokens, exists)
    }

    /// What the encoder makes of every position, after the last norm: what logits are computed from.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward); the result [B, T, D].
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn encode(
        &self,
        tokens: ArrayView2<'_, u32>,
        exists: Option<ArrayView2<'_, bool>>,
    ) -> Result<Array3<T>, Error> {
        compiled_here!(
            T,
            |encoder, tokens, exists| {
                let Forward { stream, saved, .. } = encoder.run(tokens, &encoder.check(tokens, exists)?)?;
                saved.give(&encoder.buffers);
                Ok(stream)
            },
            Pass<T>
        )(self, tokens, exists)
    }

    /// Lets every codebook learn from the statistics of one step, one per unit: its micro-batches merged.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`]. Then no codebook has moved.
    pub fn update_codebooks(&mut self, stats: &[CodeStats<T>]) -> Result<(), Error> {
        check_shape("stats", &[self.codebooks.len()], &[stats.len()])?;
        // All or none.
        let mut updated = self.codebooks.clone();
        updated.iter_mut().zip(stats).try_for_each(|(codebook, stats)| codebook.update(stats))?;
        self.codebooks = updated;
        Ok(())
    }

    /// Starts every codebook at the centres of the keys of a batch: k-means++ and at most `steps` steps of Lloyd, unit by
    /// unit, each with the codebooks before it started.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::NotFinite`] for keys. The codebooks are then as they were.
    pub fn start_codebooks(
        &mut self,
        tokens: ArrayView2<'_, u32>,
        exists: Option<ArrayView2<'_, bool>>,
        steps: usize,
        seed: u64,
    ) -> Result<(), Error> {
        compiled_here!(T, Encoder::<T>::start_codebooks_here, Start<T>)(self, tokens, exists, steps, seed)
    }

    fn start_codebooks_here(
        &mut self,
        tokens: ArrayView2<'_, u32>,
        exists: Option<ArrayView2<'_, bool>>,
        steps: usize,
        seed: u64,
    ) -> Result<(), Error> {
        let exists = self.check(tokens, exists)?;
        let mut started = self.clone();
        let mut x = self.embed(tokens, &exists)?.0;
        for i in 0..self.config.n_layers {
            let keys = started.unit(i, &exists).keys(&x)?;
            let (n_codes, seed) = (self.config.n_codes, seed.wrapping_add(i as u64));
            let codewords = start::k_means(keys.view(), n_codes, Some(exists.view()), steps, seed)?;
            started.codebooks[i] = Codebook::ema(Ema::from_codewords(codewords, self.config.codebook_decay)?);
            x = started.unit(i, &exists).forward(x)?.0;
        }
        *self = started;
        Ok(())
    }

    fn unit<'a>(&'a self, i: usize, exists: &'a Array2<bool>) -> Unit<'a, T> {
        Unit {
            config: &self.config,
            parameters: &self.parameters.layers[i],
            codebook: &self.codebooks[i],
            batch: exists.nrows(),
            exists: exists.view(),
            buffers: &self.buffers,
        }
    }

    /// Where positions exist, if these are sequences that can be read.
    fn check(
        &self,
        tokens: ArrayView2<'_, u32>,
        exists: Option<ArrayView2<'_, bool>>,
    ) -> Result<Array2<bool>, Error> {
        if tokens.is_empty() {
            return Err(Error::Empty { what: "tokens" });
        }
        if let Some(exists) = &exists {
            check_shape("exists", tokens.shape(), exists.shape())?;
        }
        check_tokens("tokens", tokens, exists.as_ref(), self.config.vocab_size)?;
        let exists = exists.map_or_else(|| Array2::from_elem(tokens.dim(), true), |exists| exists.to_owned());
        match exists.outer_iter().position(|sequence| !sequence.iter().any(|&exists| exists)) {
            Some(b) => {
                let got = format!("nowhere in sequence {b}");
                Err(Error::invalid("exists", "true somewhere in every sequence", got))
            }
            None => Ok(exists),
        }
    }
}
