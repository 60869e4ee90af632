//! Writing with a model, token by token, with a state that does not grow, unless the model has units of exact attention.

use ndarray::{Array1, ArrayView1, Axis, arr2, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{BatchGenerator, Sampler};
use crate::model::{ModelState, Prepared, Transformer};
use crate::{Error, Scalar};

/// Tokens of a prompt that are read at once.
pub(super) const PROMPT_PIECE: usize = 1024;

/// One stream of tokens: what was read and written so far is in its state, whose size is constant.
///
/// ```
/// use transformer_vq::generate::{Generator, Sampler};
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::array;
///
/// let model = Transformer::new(ModelConfig { n_layers: 1, ..ModelConfig::default() }, 1)?;
/// let sampler = Sampler { temperature: 0.8, top_k: Some(50), top_p: None };
/// let mut generator = Generator::new(&model, sampler, 7)?;
/// generator.read(array![72, 105].view())?; // "Hi"
/// let bytes = generator.state().size_in_bytes();
/// for _ in 0..200 {
///     generator.next_token()?;
/// }
/// assert_eq!(generator.state().position(), 202);
/// assert_eq!(generator.state().size_in_bytes(), bytes);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Generator<'m, T = f32> {
    model: Prepared<'m, T>,
    sampler: Sampler,
    rng: ChaCha8Rng,
    state: ModelState<T>,
    /// Of the next token; none before anything was read.
    logits: Option<Array1<T>>,
}

impl<'m, T: Scalar> Generator<'m, T> {
    /// Begins a stream; the same seed writes the same tokens.
    ///
    /// # Errors
    /// As [`Sampler::validate`], and [`Error::TooLarge`].
    pub fn new(model: &'m Transformer<T>, sampler: Sampler, seed: u64) -> Result<Self, Error> {
        sampler.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Ok(Generator { model: model.prepare()?, sampler, rng, state: model.new_state(1)?, logits: None })
    }

    /// Reads tokens: a prompt, or an interruption.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a token outside the vocabulary; the stream is then as it was.
    pub fn read(&mut self, tokens: ArrayView1<'_, u32>) -> Result<(), Error> {
        let limit = self.model.model().config().vocab_size;
        if let Some((i, &token)) = tokens.indexed_iter().find(|&(_, &token)| token as usize >= limit) {
            return Err(Error::OutOfRange { what: "tokens", index: vec![i], got: token.into(), limit });
        }
        for piece in tokens.axis_chunks_iter(Axis(0), PROMPT_PIECE) {
            let (logits, _) = self.model.push(piece.insert_axis(Axis(0)), &mut self.state)?;
            self.logits = Some(logits.slice(s![0, -1, ..]).to_owned());
        }
        Ok(())
    }

    /// Draws the next token and reads it.
    ///
    /// # Errors
    /// [`Error::Empty`] if nothing has been read yet, [`Error::NotFinite`] if the model's logits are not.
    pub fn next_token(&mut self) -> Result<u32, Error> {
        let logits = self.logits.as_ref().ok_or(Error::Empty { what: "prompt" })?;
        let token = self.sampler.sample(logits.view(), &mut self.rng)?;
        let (logits, _) = self.model.push(arr2(&[[token]]).view(), &mut self.state)?;
        self.logits = Some(logits.slice(s![0, 0, ..]).to_owned());
        Ok(token)
    }

    /// As many streams as seeds that go on from here side by side, each with draws of its own; this one stays as it is.
    ///
    /// # Errors
    /// [`Error::Empty`] without seeds, or if nothing has been read yet, [`Error::TooLarge`].
    pub fn branch(&self, seeds: &[u64]) -> Result<BatchGenerator<'m, T>, Error> {
        let logits = self.logits.as_ref().ok_or(Error::Empty { what: "prompt" })?;
        if seeds.is_empty() {
            return Err(Error::Empty { what: "seeds" });
        }
        let logits = logits.broadcast((seeds.len(), logits.len())).expect("one row for each").to_owned();
        let state = self.state.repeat_first(seeds.len())?;
        Ok(BatchGenerator::from_parts(self.model.clone(), self.sampler, seeds, state, Some(logits)))
    }

    /// What the stream has seen, in constant size.
    pub fn state(&self) -> &ModelState<T> {
        &self.state
    }
}
