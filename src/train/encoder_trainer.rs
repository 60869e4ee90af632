//! One step of training of an encoder. Loops, schedules and files belong to the caller.
//!
//! ```text
//! (1)  losses, gradients and statistics of a batch
//! (2)  codebooks <- moving averages of the batch's keys
//! (3)  parameters <- optimizer(gradients, clipped together)
//! ```
//!
//! Whatever is refused is refused before (2): then nothing has changed.

use ndarray::{Array1, ArrayD};

use super::optimizer::{Pace, sum_of_squares};
use super::{Optimizer, StepReport};
use crate::compiled::compiled_here;
use crate::model::{Encoder, EncoderBatch, EncoderLoss};
use crate::{Error, Scalar};

/// An encoder in training, with its optimizer's moments.
///
/// ```
/// use transformer_vq::model::{Encoder, EncoderBatch, EncoderConfig, EncoderHead};
/// use transformer_vq::ndarray::array;
/// use transformer_vq::train::{AdamW, EncoderTrainer};
///
/// let head = EncoderHead::Classes { n_classes: 2 };
/// let config = EncoderConfig { vocab_size: 4, d_model: 16, n_layers: 1, head, ..EncoderConfig::default() };
/// let mut trainer = EncoderTrainer::new(Encoder::new(config, 1)?, AdamW::default())?;
/// let (tokens, targets) = (array![[1, 2, 1], [3, 3, 0]], array![[0], [1]]);
/// let batch = EncoderBatch { tokens: tokens.view(), exists: None, targets: targets.view(), counted: None };
/// let before = trainer.step(&batch, 1.0)?;
/// for _ in 0..20 {
///     trainer.step(&batch, 1.0)?;
/// }
/// assert!(trainer.step(&batch, 1.0)?.loss < before.loss);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct EncoderTrainer<T = f32> {
    encoder: Encoder<T>,
    optimizer: Optimizer,
    /// Of every parameter, in the order of its views.
    moments: Vec<Vec<ArrayD<T>>>,
    steps: u64,
}

impl<T: Scalar> EncoderTrainer<T> {
    /// Begins the training of an encoder.
    ///
    /// # Errors
    /// As [`Optimizer::validate`].
    pub fn new(encoder: Encoder<T>, optimizer: impl Into<Optimizer>) -> Result<Self, Error> {
        let optimizer = optimizer.into();
        optimizer.validate()?;
        let zeros = |shape: &[usize]| {
            optimizer.moments(shape).into_iter().map(|moment| ArrayD::zeros(moment.shape)).collect()
        };
        let moments = encoder.parameters().views().iter().map(|p| zeros(p.value.shape())).collect();
        Ok(EncoderTrainer { encoder, optimizer, moments, steps: 0 })
    }

    /// The encoder as it is now.
    pub fn encoder(&self) -> &Encoder<T> {
        &self.encoder
    }

    /// The encoder, when training is over.
    pub fn into_encoder(self) -> Encoder<T> {
        self.encoder
    }

    /// The optimizer with its constants.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Learns from one batch; `factor` scales the learning rate (see [`Schedule`](super::Schedule)).
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss, the gradient or what attention reads is not finite; a batch that does not fit (see
    /// [`Encoder::loss_and_gradients`]); a factor that is not finite. Nothing has changed then.
    pub fn step(&mut self, batch: &EncoderBatch<'_>, factor: f64) -> Result<StepReport, Error> {
        compiled_here!(
            T,
            EncoderTrainer::<T>::step_here,
            fn(&mut EncoderTrainer<T>, &EncoderBatch<'_>, f64) -> Result<StepReport, Error>
        )(self, batch, factor)
    }

    fn step_here(&mut self, batch: &EncoderBatch<'_>, factor: f64) -> Result<StepReport, Error> {
        if !factor.is_finite() {
            return Err(Error::invalid("factor", "finite", factor));
        }
        let diverged = |loss: String| Error::Diverged { step: self.steps, loss, checkpoint: None };
        // (1)
        let result = self.encoder.loss_and_gradients(batch).map_err(|e| match e {
            Error::NotFinite { .. } => diverged(format!("unknown: {e}")),
            e => e,
        });
        let EncoderLoss { loss, commit_loss, total, gradients, units } = result?;
        let views = gradients.views();
        let gradient_norm = views.iter().map(|p| sum_of_squares(p.value.view())).sum::<f64>().sqrt();
        if !(total.is_finite() && gradient_norm.is_finite()) {
            return Err(diverged(format!("{total} with a gradient of norm {gradient_norm}")));
        }
        // (2) before (3): it can refuse.
        let stats: Vec<_> = units.into_iter().map(|unit| unit.stats).collect();
        self.encoder.update_codebooks(&stats)?;
        // (3)
        let (optimizer, gradient_scale) = (self.optimizer, self.optimizer.gradient_scale(gradient_norm));
        let parts = self.encoder.parameters_mut().into_iter().zip(views).zip(&mut self.moments);
        for ((p, g), moments) in parts {
            let decay = if p.decay { optimizer.weight_decay() } else { 0.0 };
            optimizer.update(
                self.steps + 1,
                &Pace { factor, gradient_scale, decay },
                p.value,
                g.value,
                moments,
            );
        }
        self.steps += 1;
        let mean = |per_head: Array1<f64>| per_head.mean().unwrap_or_default();
        Ok(StepReport {
            step: self.steps,
            loss,
            commit_loss,
            gradient_norm,
            perplexity: stats.iter().map(|stats| mean(stats.perplexity())).collect(),
            usage: stats.iter().map(|stats| mean(stats.usage())).collect(),
        })
    }
}
