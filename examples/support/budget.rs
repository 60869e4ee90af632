//! Training a language model on a text for a number of steps or of seconds, the same way for all that are compared.

use std::error::Error;
use std::time::Instant;

use indicatif::ProgressBar;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{AdamW, BatchConfig, Budget, Corpus, Progress, Schedule, Trainer};

use crate::text::{batches, bits, split};

/// A model and what training it took.
pub struct Trained {
    pub model: Transformer,
    /// Tokens learned from.
    pub tokens: f64,
    /// Of training alone.
    pub seconds: f64,
}

/// The place of a run at its beginning.
pub fn progress(batches: BatchConfig, budget: Budget) -> Result<Progress, Box<dyn Error>> {
    let progress = Progress {
        batches,
        position: 0,
        seconds: 0.0,
        schedule: Schedule::new(0.05, 0.1)?,
        budget,
        recent: Default::default(),
    };
    progress.validate()?;
    Ok(progress)
}

/// Parts of a run that a bar counts.
pub const PARTS: u64 = 1000;

/// Trains from the seed of `progress`; `bar` goes on by [`PARTS`]. `watch` sees model, progress and steps after each step, and
/// the clock stands still meanwhile.
pub fn train(
    config: ModelConfig,
    text: &Corpus,
    mut progress: Progress,
    bar: &ProgressBar,
    mut watch: impl FnMut(&Transformer, &Progress, u64) -> Result<(), Box<dyn Error>>,
) -> Result<Trained, Box<dyn Error>> {
    let BatchConfig { batch_size, update_len, seed, .. } = progress.batches;
    let mut batches = batches(text, split(text, &progress)?.0, &progress)?;
    let optimizer = AdamW { learning_rate: 3e-3, clip: Some(1.0), weight_decay: 1e-4, ..AdamW::default() };
    let mut trainer = Trainer::new(Transformer::new(config, seed)?, optimizer)?;
    let done = bar.position();
    while progress.fraction(trainer.steps()) < 1.0 {
        let begun = Instant::now();
        let report = trainer.step(&batches.next_batch()?, progress.factor(trainer.steps()))?;
        progress.seconds += begun.elapsed().as_secs_f64();
        progress.recent.add(report.loss);
        bar.set_position(done + (progress.fraction(report.step) * PARTS as f64) as u64);
        bar.set_message(format!("{:.3} bits per byte", bits(progress.recent.mean())));
        if progress.recent.steps == 20 {
            progress.recent = Default::default();
        }
        watch(trainer.model(), &progress, report.step)?;
    }
    let tokens = (trainer.steps() as usize * batch_size * update_len) as f64;
    Ok(Trained { model: trainer.into_model(), tokens, seconds: progress.seconds })
}
