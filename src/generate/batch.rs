//! Writing several sequences at once: the weights, which decoding waits for, are read once for all of them.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::Sampler;
use super::generator::PROMPT_PIECE;
use crate::error::check_shape;
use crate::model::{ModelState, Prepared, Transformer};
use crate::{Error, Scalar};

/// Streams of tokens side by side, each with its own draws: the one with seed s writes what a
/// [`Generator`](super::Generator) with seed s would, to rounding.
///
/// ```
/// use transformer_vq::generate::{BatchGenerator, Generator, Sampler};
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::array;
///
/// let model = Transformer::new(ModelConfig { n_layers: 1, ..ModelConfig::default() }, 1)?;
/// let mut pair = BatchGenerator::new(&model, Sampler::default(), &[1, 2])?;
/// pair.read(array![[72, 105], [79, 104]].view())?; // "Hi", "Oh"
/// assert_eq!(pair.next_tokens()?.len(), 2);
///
/// // Or several continuations of one prompt, which is read once.
/// let mut generator = Generator::new(&model, Sampler::default(), 1)?;
/// generator.read(array![72, 105].view())?;
/// assert_eq!(generator.branch(&[1, 2, 3])?.next_tokens()?.len(), 3);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BatchGenerator<'m, T = f32> {
    model: Prepared<'m, T>,
    sampler: Sampler,
    /// One per stream.
    rngs: Vec<ChaCha8Rng>,
    state: ModelState<T>,
    /// Of the next tokens [B, vocab]; none before anything was read.
    logits: Option<Array2<T>>,
}

impl<'m, T: Scalar> BatchGenerator<'m, T> {
    /// Begins as many streams as there are seeds.
    ///
    /// # Errors
    /// [`Error::Empty`] without seeds, [`Error::TooLarge`], and as [`Sampler::validate`].
    pub fn new(model: &'m Transformer<T>, sampler: Sampler, seeds: &[u64]) -> Result<Self, Error> {
        sampler.validate()?;
        if seeds.is_empty() {
            return Err(Error::Empty { what: "seeds" });
        }
        let state = model.new_state(seeds.len())?;
        Ok(Self::from_parts(model.prepare()?, sampler, seeds, state, None))
    }

    pub(super) fn from_parts(
        model: Prepared<'m, T>,
        sampler: Sampler,
        seeds: &[u64],
        state: ModelState<T>,
        logits: Option<Array2<T>>,
    ) -> Self {
        let rngs = seeds.iter().map(|&seed| ChaCha8Rng::seed_from_u64(seed)).collect();
        BatchGenerator { model, sampler, rngs, state, logits }
    }

    /// Reads tokens, as many in each stream: prompts, or interruptions.
    ///
    /// # Shapes
    /// `tokens` [B, T].
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of streams, [`Error::OutOfRange`] for a token outside the vocabulary; the
    /// streams are then as they were.
    pub fn read(&mut self, tokens: ArrayView2<'_, u32>) -> Result<(), Error> {
        check_shape("tokens", &[self.rngs.len(), tokens.ncols()], tokens.shape())?;
        let limit = self.model.model().config().vocab_size;
        if let Some(((b, t), &token)) = tokens.indexed_iter().find(|&(_, &token)| token as usize >= limit) {
            return Err(Error::OutOfRange { what: "tokens", index: vec![b, t], got: token.into(), limit });
        }
        for piece in tokens.axis_chunks_iter(Axis(1), PROMPT_PIECE) {
            let (logits, _) = self.model.push(piece, &mut self.state)?;
            self.logits = Some(logits.slice(s![.., -1, ..]).to_owned());
        }
        Ok(())
    }

    /// Draws the next token of each stream, and reads it `[B]`.
    ///
    /// # Errors
    /// [`Error::Empty`] if nothing has been read yet, [`Error::NotFinite`] if the model's logits are not.
    pub fn next_tokens(&mut self) -> Result<Array1<u32>, Error> {
        let logits = self.logits.as_ref().ok_or(Error::Empty { what: "prompt" })?;
        // What cannot be drawn from must not move the draws of other streams.
        let mut rngs = self.rngs.clone();
        let draw = |(logits, rng)| self.sampler.sample(logits, rng);
        let tokens = logits.outer_iter().zip(&mut rngs).map(draw).collect::<Result<Array1<u32>, _>>()?;
        self.rngs = rngs;
        let (logits, _) = self.model.push(tokens.view().insert_axis(Axis(1)), &mut self.state)?;
        self.logits = Some(logits.index_axis_move(Axis(1), 0));
        Ok(tokens)
    }

    /// What the streams have seen, in constant size.
    pub fn state(&self) -> &ModelState<T> {
        &self.state
    }
}
