//! One step of training: losses, gradients, optimizer, codebooks. Loops, schedules and files belong to the caller.
//!
//! ```text
//! (1)  gradients and statistics of each micro-batch, from the state that the last batch left (a constant), merged
//! (2)  codebooks <- moving averages of the batch's keys; idle codes <- some of these keys, where the configuration says so
//! (3)  gradients <- hook(gradients), then clipped together
//! (4)  parameters <- optimizer(gradients), group by group
//! ```
//!
//! [`Trainer::gradients`] is (1), [`Trainer::apply`] the rest: between the two, machines can merge theirs.

use std::path::{Path, PathBuf};

use ndarray::{Array1, ArrayD, ArrayViewMutD};

use super::checkpoint::{self, Progress};
use super::gradients::accumulate;
use super::optimizer::{Pace, assign, sum_of_squares};
use super::{Batch, Gradients, Optimizer, ParameterGroup, StepReport};
use crate::compiled::compiled_here;
use crate::model::{CodebookStart, DropoutSeed, ModelState, Revival, Transformer};
use crate::{Error, Scalar};

/// A model in training: its optimizer's moments and the state carried from batch to batch.
///
/// ```
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::train::{AdamW, BatchConfig, Batches, Corpus, Trainer};
///
/// let corpus = Corpus::from_bytes(b"the quick brown fox ".repeat(20))?;
/// let config = BatchConfig { batch_size: 2, sequence_len: 64, update_len: 32, seed: 1 };
/// let mut batches = Batches::new(corpus, 0..400, config)?;
/// let config = ModelConfig { d_model: 16, n_layers: 1, d_k: 8, d_v: 16, n_codes: 8, ..ModelConfig::default() };
/// let mut trainer = Trainer::new(Transformer::new(config, 1)?, AdamW::default())?;
/// let before = trainer.step(&batches.next_batch()?, 1.0)?;
/// for _ in 0..20 {
///     trainer.step(&batches.next_batch()?, 1.0)?;
/// }
/// assert!(trainer.step(&batches.next_batch()?, 1.0)?.loss < before.loss);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Trainer<T = f32> {
    pub(super) model: Transformer<T>,
    pub(super) optimizer: Optimizer,
    /// Of every parameter, in the order of its views.
    pub(super) moments: Vec<Vec<ArrayD<T>>>,
    pub(super) groups: Vec<ParameterGroup>,
    /// The group of every parameter, if it has one.
    group_of: Vec<Option<usize>>,
    pub(super) micro_batches: usize,
    /// Sequences of the whole batch that other machines have before those of this one.
    first_sequence: u64,
    pub(super) steps: u64,
    /// Of dropout.
    pub(super) dropout_seed: u64,
    /// The step with which the sequences of the state began.
    pub(super) sequence: u64,
    /// None before the first batch.
    pub(super) state: Option<ModelState<T>>,
    pub(super) last_checkpoint: Option<PathBuf>,
    /// What [`apply`](Trainer::apply) makes true of the last [`gradients`](Trainer::gradients).
    pending: Option<Pending<T>>,
}

/// Where a batch has led, before its step is taken.
#[derive(Debug, Clone)]
struct Pending<T> {
    state: ModelState<T>,
    /// As [`Trainer::sequence`].
    sequence: u64,
    /// The model with codebooks that start at keys of this batch, if they do.
    started: Option<Transformer<T>>,
}

/// What sees the name and the gradient of every parameter before the step.
type Hook<'h, T> = &'h mut dyn FnMut(&str, ArrayViewMutD<'_, T>);

impl<T: Scalar> Trainer<T> {
    /// Begins the training of a model.
    ///
    /// # Errors
    /// As [`Optimizer::validate`].
    pub fn new(model: Transformer<T>, optimizer: impl Into<Optimizer>) -> Result<Self, Error> {
        let optimizer = optimizer.into();
        optimizer.validate()?;
        let parameters = model.parameters().views();
        let zeros = |shape: &[usize]| {
            optimizer.moments(shape).into_iter().map(|moment| ArrayD::zeros(moment.shape)).collect()
        };
        let moments = parameters.iter().map(|p| zeros(p.value.shape())).collect();
        drop(parameters);
        Ok(Self::begin(model, optimizer, moments))
    }

    /// A trainer at its first step, with moments that are the optimizer's.
    pub(super) fn begin(model: Transformer<T>, optimizer: Optimizer, moments: Vec<Vec<ArrayD<T>>>) -> Self {
        Trainer {
            group_of: vec![None; moments.len()],
            model,
            optimizer,
            moments,
            groups: vec![],
            micro_batches: 1,
            first_sequence: 0,
            steps: 0,
            dropout_seed: 0,
            sequence: 0,
            state: None,
            last_checkpoint: None,
            pending: None,
        }
    }

    /// The same run with other masks of dropout; without this call, those of seed 0.
    #[must_use]
    pub fn with_dropout_seed(self, seed: u64) -> Self {
        Trainer { dropout_seed: seed, ..self }
    }

    /// Of a batch that several machines share: how many of its sequences are on the machines before this one. Each then has
    /// its own rows of the masks of dropout. No checkpoint keeps it.
    #[must_use]
    pub fn with_first_sequence(self, first: u64) -> Self {
        Trainer { first_sequence: first, ..self }
    }

    /// Trains some parameters otherwise than the rest, or not at all; the first group that a parameter matches is its own.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a pattern that matches no parameter, and as [`ParameterGroup::validate`].
    pub fn with_groups(mut self, groups: Vec<ParameterGroup>) -> Result<Self, Error> {
        let parameters = self.model.parameters().views();
        self.group_of = assign(&groups, parameters.iter().map(|p| p.name.as_str()))?;
        drop(parameters);
        self.groups = groups;
        Ok(self)
    }

    /// Takes the gradients of a batch in this many parts, each some of its sequences: memory for one part at a time, and
    /// the step of the whole batch, to rounding, dropout included.
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0.
    pub fn with_micro_batches(mut self, micro_batches: usize) -> Result<Self, Error> {
        if micro_batches == 0 {
            return Err(Error::invalid("micro_batches", "at least 1", 0));
        }
        self.micro_batches = micro_batches;
        Ok(self)
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer<T> {
        &self.model
    }

    /// The model, when training is over.
    pub fn into_model(self) -> Transformer<T> {
        self.model
    }

    /// The optimizer with its constants.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// What is trained otherwise than the rest.
    pub fn groups(&self) -> &[ParameterGroup] {
        &self.groups
    }

    /// Parts that the gradients of a batch are taken in.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
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
    /// tokens outside the vocabulary, a factor that is not finite, fewer sequences than micro-batches.
    pub fn step(&mut self, batch: &Batch, factor: f64) -> Result<StepReport, Error> {
        self.step_with(batch, factor, |_, _| ())
    }

    /// As [`step`](Self::step); `hook` sees the name and the gradient of every parameter that is trained, in the order of
    /// [`Parameters::views`](crate::model::Parameters::views), and may change it before gradients are clipped together.
    ///
    /// # Errors
    /// As [`step`](Self::step): what the hook leaves must be finite.
    pub fn step_with(
        &mut self,
        batch: &Batch,
        factor: f64,
        hook: impl FnMut(&str, ArrayViewMutD<'_, T>),
    ) -> Result<StepReport, Error> {
        check_factor(factor)?;
        let gradients = self.gradients(batch)?;
        self.apply_with(gradients, factor, hook)
    }

    /// The gradients of one batch, its micro-batches merged. Nothing is learned yet: to be merged with those of other
    /// machines, if there are any, and given to [`apply`](Self::apply), which also moves the state that is carried on.
    ///
    /// Machines that hold the same model and apply the same merged gradients stay the same; for dropout each needs to know
    /// [which sequences it has](Self::with_first_sequence). Codebooks that begin at keys
    /// ([`CodebookStart::KMeans`]) would begin at those of each machine: such a model is
    /// [started](Transformer::start_codebooks) before it is handed out, with a configuration that says `Random`.
    ///
    /// # Errors
    /// Batches that do not fit, tokens outside the vocabulary, fewer sequences than micro-batches. Nothing has changed then.
    pub fn gradients(&mut self, batch: &Batch) -> Result<Gradients<T>, Error> {
        compiled_here!(
            T,
            Trainer::<T>::gradients_here,
            fn(&mut Trainer<T>, &Batch) -> Result<Gradients<T>, Error>
        )(self, batch)
    }

    fn gradients_here(&mut self, batch: &Batch) -> Result<Gradients<T>, Error> {
        self.pending = None;
        let n_sequences = batch.tokens.nrows();
        let mut started = None;
        if let (CodebookStart::KMeans { steps }, 0) = (self.model.config().start, self.steps) {
            started.insert(self.model.clone()).start_codebooks(batch.tokens.view(), steps, 0)?;
        }
        let model = started.as_ref().unwrap_or(&self.model);
        let (mut state, sequence) = match &self.state {
            Some(state) if !batch.first => (state.clone(), self.sequence),
            _ => (model.new_state(n_sequences)?, self.steps),
        };
        let dropout =
            DropoutSeed { seed: self.dropout_seed, step: self.steps, sequence, first: self.first_sequence };
        if n_sequences < self.micro_batches {
            let expected = format!("at least the {} micro-batches", self.micro_batches);
            return Err(Error::invalid("sequences of a batch", expected, n_sequences));
        }
        let gradients = if self.micro_batches == 1 {
            let (tokens, targets) = (batch.tokens.view(), batch.targets.view());
            Gradients::collect_dropping(model, tokens, targets, None, &mut state, Some(dropout))?
        } else {
            let (gradients, moved) = accumulate(model, batch, &state, self.micro_batches, dropout)?;
            state = moved;
            gradients
        };
        self.pending = Some(Pending { state, sequence, started });
        Ok(gradients)
    }

    /// Takes the step that gradients say: those of the last call of [`gradients`](Self::gradients), merged with others or not.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the loss or the gradient is not finite, [`Error::Shape`] for gradients of another model, a factor
    /// that is not finite. Nothing has changed then.
    pub fn apply(&mut self, gradients: Gradients<T>, factor: f64) -> Result<StepReport, Error> {
        self.apply_with(gradients, factor, |_, _| ())
    }

    /// As [`apply`](Self::apply), with a hook as in [`step_with`](Self::step_with).
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn apply_with(
        &mut self,
        gradients: Gradients<T>,
        factor: f64,
        mut hook: impl FnMut(&str, ArrayViewMutD<'_, T>),
    ) -> Result<StepReport, Error> {
        compiled_here!(
            T,
            |trainer, gradients, factor, hook| trainer.apply_here(gradients, factor, hook),
            fn(&mut Trainer<T>, Gradients<T>, f64, Hook<'_, T>) -> Result<StepReport, Error>
        )(self, gradients, factor, &mut hook)
    }

    fn apply_here(
        &mut self,
        mut gradients: Gradients<T>,
        factor: f64,
        hook: Hook<'_, T>,
    ) -> Result<StepReport, Error> {
        check_factor(factor)?;
        self.model.parameters().check_like("gradients", &gradients.parameters)?;
        // (3), the norm of what is trained
        let trained: Vec<bool> =
            self.group_of.iter().map(|g| g.is_none_or(|g| !self.groups[g].frozen)).collect();
        let mut squares = 0.0;
        for (gradient, &trained) in gradients.parameters.views_mut().into_iter().zip(&trained) {
            if trained {
                let mut value = gradient.value;
                hook(&gradient.name, value.view_mut());
                squares += sum_of_squares(value.view());
            }
        }
        let gradient_norm = squares.sqrt();
        let total = gradients.total;
        if !(total.is_finite() && gradient_norm.is_finite()) {
            let loss = format!("{total} with a gradient of norm {gradient_norm}");
            return Err(Error::Diverged { step: self.steps, loss, checkpoint: self.last_checkpoint.clone() });
        }
        // (2) before (4): it can refuse, and then nothing may have changed.
        let started = self.pending.as_ref().and_then(|pending| pending.started.clone());
        self.learn_codebooks(&gradients, started)?;
        // (4)
        self.move_parameters(&gradients, factor, self.optimizer.gradient_scale(gradient_norm));
        if let Some(Pending { state, sequence, .. }) = self.pending.take() {
            (self.state, self.sequence) = (Some(state), sequence);
        }
        self.steps += 1;
        let mean = |per_head: Array1<f64>| per_head.mean().unwrap_or_default();
        let Gradients { loss, commit_loss, stats, .. } = gradients;
        Ok(StepReport {
            step: self.steps,
            loss,
            commit_loss,
            gradient_norm,
            perplexity: stats.iter().map(|stats| mean(stats.perplexity())).collect(),
            usage: stats.iter().map(|stats| mean(stats.usage())).collect(),
        })
    }

    /// (2), all or none: of the model that has `started`, if it does now.
    fn learn_codebooks(
        &mut self,
        gradients: &Gradients<T>,
        started: Option<Transformer<T>>,
    ) -> Result<(), Error> {
        let revival = self.model.config().revival.filter(|r| (self.steps + 1).is_multiple_of(r.every));
        // To be changed in two steps, of which the second can be refused.
        let mut changed = started.or_else(|| revival.map(|_| self.model.clone()));
        let model = changed.as_mut().unwrap_or(&mut self.model);
        model.update_codebooks(&gradients.stats)?;
        if let Some(Revival { ratio, .. }) = revival {
            let Gradients { keys, counts, .. } = gradients;
            let counts = counts.as_ref().map(|counts| counts.view());
            model.revive_codebooks(keys, counts, ratio, self.steps.wrapping_mul(keys.len() as u64))?;
        }
        if let Some(changed) = changed {
            self.model = changed;
        }
        Ok(())
    }

    /// (4)
    fn move_parameters(&mut self, gradients: &Gradients<T>, factor: f64, gradient_scale: f64) {
        let optimizer = self.optimizer;
        let parts = self.model.parameters_mut().into_iter().zip(gradients.parameters.views());
        for (((p, g), moments), group) in parts.zip(&mut self.moments).zip(&self.group_of) {
            let group = group.map(|group| &self.groups[group]);
            if group.is_some_and(|group| group.frozen) {
                continue;
            }
            let decay = group.and_then(|group| group.weight_decay);
            let pace = Pace {
                factor: factor * group.map_or(1.0, |group| group.learning_rate),
                gradient_scale,
                decay: decay.unwrap_or(if p.decay { optimizer.weight_decay() } else { 0.0 }),
            };
            optimizer.update(self.steps + 1, &pace, p.value, g.value, moments);
        }
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

fn check_factor(factor: f64) -> Result<(), Error> {
    if factor.is_finite() { Ok(()) } else { Err(Error::invalid("factor", "finite", factor)) }
}
