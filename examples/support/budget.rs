//! Training a language model on a text for a number of steps, the same way for all that are compared.

use std::error::Error;
use std::time::Instant;

use indicatif::ProgressBar;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{AdamW, BatchConfig, Budget, Corpus, Progress, Schedule, Trainer};

use crate::text::{batches, bits, split};

/// A model and what training it took.
pub struct Trained {
    pub model: Transformer,
    /// Bytes learned from per second.
    pub bytes_per_second: f64,
}

/// The place of a run at its beginning.
pub fn progress(batches: BatchConfig, steps: u64) -> Result<Progress, Box<dyn Error>> {
    let progress = Progress {
        batches,
        position: 0,
        seconds: 0.0,
        schedule: Schedule::new(0.05, 0.1)?,
        budget: Budget::Steps(steps),
        recent: Default::default(),
    };
    progress.validate()?;
    Ok(progress)
}

/// Trains from the seed of `progress`.
pub fn train(
    config: ModelConfig,
    text: &Corpus,
    mut progress: Progress,
    bar: &ProgressBar,
) -> Result<Trained, Box<dyn Error>> {
    let BatchConfig { batch_size, update_len, seed, .. } = progress.batches;
    let mut batches = batches(text, split(text, &progress)?.0, &progress)?;
    let optimizer = AdamW { learning_rate: 3e-3, clip: Some(1.0), weight_decay: 1e-4, ..AdamW::default() };
    let mut trainer = Trainer::new(Transformer::new(config, seed)?, optimizer)?;
    let begun = Instant::now();
    while progress.fraction(trainer.steps()) < 1.0 {
        let report = trainer.step(&batches.next_batch()?, progress.factor(trainer.steps()))?;
        progress.recent.add(report.loss);
        bar.inc(1);
        bar.set_message(format!("{:.3} bits per byte", bits(progress.recent.mean())));
        if progress.recent.steps == 20 {
            progress.recent = Default::default();
        }
    }
    let bytes = (trainer.steps() as usize * batch_size * update_len) as f64;
    Ok(Trained { bytes_per_second: bytes / begun.elapsed().as_secs_f64(), model: trainer.into_model() })
}
