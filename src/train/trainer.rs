//! One step of training: losses, gradients, optimizer, codebooks. Loops, schedules and files belong to the caller.
//!
//! ```text
//! (1)  loss and gradients of a batch, from the state that the last batch left (a constant)
//! (2)  codebooks <- moving averages of the batch's keys; idle codes <- some of these keys, where the configuration says so
//! (3)  parameters <- AdamW(gradients)
//! ```

use std::path::{Path, PathBuf};

use super::Batch;
use super::adamw::{AdamW, sum_of_squares};
use super::checkpoint::{self, Progress};
use crate::model::{CodebookStart, DropoutSeed, ModelState, Parameters, Revival, Transformer};
use crate::{Error, Scalar};

/// A model in training: its optimizer's moments and the state carried from batch to batch.
///
/// ```
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::train::{AdamW, BatchConfig, Batches, ByteText, Trainer};
///
/// let text = ByteText::from_bytes(b"the quick brown fox ".repeat(20))?;
/// let config = BatchConfig { batch_size: 2, sequence_len: 64, update_len: 32, seed: 1 };
/// let mut batches = Batches::new(text, 0..400, config)?;
/// let config = ModelConfig { d_model: 16, n_layers: 1, d_k: 8, d_v: 16, n_codes: 8, ..ModelConfig::default() };
/// let mut trainer = Trainer::new(Transformer::new(config, 1)?, AdamW::default())?;
/// let before = trainer.step(&batches.next_batch(), 1.0)?;
/// for _ in 0..20 {
///     trainer.step(&batches.next_batch(), 1.0)?;
/// }
/// assert!(trainer.step(&batches.next_batch(), 1.0)?.loss < before.loss);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Trainer<T = f32> {
    pub(super) model: Transformer<T>,
    pub(super) optimizer: AdamW,
    pub(super) moments: Moments<T>,
    pub(super) steps: u64,
    /// Of dropout.
    pub(super) dropout_seed: u64,
    /// The step with which the sequences of the state began.
    pub(super) sequence: u64,
    /// None before the first batch.
    pub(super) state: Option<ModelState<T>>,
    pub(super) last_checkpoint: Option<PathBuf>,
}

/// Means of gradients and of their squares.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moments<T> {
    pub m: Parameters<T>,
    pub v: Parameters<T>,
}

/// What one step saw.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: u64,
    /// Cross-entropy before the step, nats per token.
    pub loss: f64,
    /// Commitment loss, summed over units, without its weight.
    pub commit_loss: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Perplexity of the codes of this batch, mean over heads, one per unit; 0 where a unit has no codebook.
    pub perplexity: Vec<f64>,
    /// Fraction of codes that this batch used, mean over heads, one per unit; 0 where a unit has no codebook.
    pub usage: Vec<f64>,
}

impl<T: Scalar> Trainer<T> {
    /// Begins the training of a model.
    ///
    /// # Errors
    /// As [`AdamW::validate`].
    pub fn new(model: Transformer<T>, optimizer: AdamW) -> Result<Self, Error> {
        optimizer.validate()?;
        let zeros = || model.zero_gradients();
        let moments = Moments { m: zeros(), v: zeros() };
        Ok(Trainer {
            model,
            optimizer,
            moments,
            steps: 0,
            dropout_seed: 0,
            sequence: 0,
            state: None,
            last_checkpoint: None,
        })
    }

    /// The same run with other masks of dropout; without this call, those of seed 0.
    #[must_use]
    pub fn with_dropout_seed(self, seed: u64) -> Self {
        Trainer { dropout_seed: seed, ..self }
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer<T> {
        &self.model
    }

    /// The model, when training is over.
    pub fn into_model(self) -> Transformer<T> {
        self.model
    }

    /// The optimizer's constants.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Learns from one batch; `factor` scales the learning rate (see [`Schedule`](super::Schedule)).
    ///
    /// A batch that is the first of its sequences starts from an empty state, any other from where the last one ended.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss or the gradient is not finite: then nothing has changed. Batches that do not fit,
    /// tokens outside the vocabulary, a factor that is not finite.
    pub fn step(&mut self, batch: &Batch, factor: f64) -> Result<StepReport, Error> {
        if !factor.is_finite() {
            return Err(Error::invalid("factor", "finite", factor));
        }
        let mut started = None; // becomes the model if the step is taken
        if let (CodebookStart::KMeans { steps }, 0) = (self.model.config().start, self.steps) {
            started.insert(self.model.clone()).start_codebooks(batch.tokens.view(), steps, 0)?;
        }
        let model = started.as_ref().unwrap_or(&self.model);
        let (mut state, sequence) = match &self.state {
            Some(state) if !batch.first => (state.clone(), self.sequence),
            _ => (model.new_state(batch.tokens.nrows())?, self.steps),
        };
        let dropout = DropoutSeed { seed: self.dropout_seed, step: self.steps, sequence };
        // (1)
        let (tokens, targets) = (batch.tokens.view(), batch.targets.view());
        let result = model.loss_and_gradients_dropping(tokens, targets, None, &mut state, Some(dropout))?;
        let gradients = result.gradients.views();
        let gradient_norm = gradients.iter().map(|g| sum_of_squares(g.value.view())).sum::<f64>().sqrt();
        if !(result.total.is_finite() && gradient_norm.is_finite()) {
            let loss = format!("{} with a gradient of norm {gradient_norm}", result.total);
            return Err(Error::Diverged { step: self.steps, loss, checkpoint: self.last_checkpoint.clone() });
        }
        if let Some(started) = started {
            self.model = started;
        }
        // (2) before (3): it can refuse, and then nothing may have changed.
        let (stats, keys): (Vec<_>, Vec<_>) =
            result.layers.into_iter().map(|layer| (layer.stats, layer.keys)).unzip();
        self.model.update_codebooks(&stats)?;
        if let Some(Revival { ratio, every }) = self.model.config().revival
            && (self.steps + 1).is_multiple_of(every)
        {
            let keys: Vec<_> = keys.into_iter().flatten().collect();
            self.model.revive_codebooks(&keys, ratio, self.steps.wrapping_mul(keys.len() as u64))?;
        }
        // (3)
        let scale = self.optimizer.gradient_scale(gradient_norm);
        let step = self.optimizer.step(self.steps + 1, factor, scale);
        let moments = self.moments.m.views_mut().into_iter().zip(self.moments.v.views_mut());
        for ((p, g), (m, v)) in self.model.parameters_mut().into_iter().zip(&gradients).zip(moments) {
            step.update(p.decay, p.value, g.value.view(), m.value, v.value);
        }
        self.state = Some(state);
        self.sequence = sequence;
        self.steps += 1;
        let mean = |per_head: ndarray::Array1<f64>| per_head.mean().unwrap_or_default();
        Ok(StepReport {
            step: self.steps,
            loss: result.loss,
            commit_loss: result.commit_loss,
            gradient_norm,
            perplexity: stats.iter().map(|stats| mean(stats.perplexity())).collect(),
            usage: stats.iter().map(|stats| mean(stats.usage())).collect(),
        })
    }

    /// Writes everything that continuing needs into a folder; see [`checkpoint`].
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] for what [`load`](Self::load) would refuse: numbers that are not finite, a
    /// progress that is not valid. An earlier checkpoint in that folder is then still whole.
    pub fn save(&mut self, folder: impl AsRef<Path>, progress: &Progress) -> Result<(), Error> {
        checkpoint::save(self, folder.as_ref(), progress)?;
        self.last_checkpoint = Some(folder.as_ref().to_path_buf());
        Ok(())
    }

    /// A trainer that continues where a checkpoint was written.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`], saying what is wrong with the checkpoint.
    pub fn load(folder: impl AsRef<Path>) -> Result<(Self, Progress), Error> {
        let (mut trainer, progress) = checkpoint::load(folder.as_ref())?;
        trainer.last_checkpoint = Some(folder.as_ref().to_path_buf());
        Ok((trainer, progress))
    }
}
