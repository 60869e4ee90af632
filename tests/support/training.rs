//! A small run, shared by the tests of training, of checkpoints and of resuming.

#![allow(dead_code)] // no test uses all of it

use std::path::Path;

use transformer_vq::Scalar;
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::Estimator;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{
    AdamW, BatchConfig, Batches, Budget, Corpus, Optimizer, Progress, RecentLoss, Schedule, StepReport,
    Trainer,
};

/// Steps of the run.
pub const STEPS: u64 = 13;

/// Three units of two heads; three updates make a sequence, and one is longer than the window.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 12,
        d_model: 6,
        n_layers: 3,
        n_heads: 2,
        d_k: 4,
        d_v: 5,
        n_codes: 5,
        attention: VqAttention { block_len: 3, window: 4, ..VqAttention::default() },
        absolute_positions: true,
        codebook_decay: 0.9,
        estimator: Estimator::StraightThrough,
        ..ModelConfig::default()
    }
}

/// Numbers without a short decimal form, and a seed that a double cannot hold.
pub fn progress() -> Progress {
    Progress {
        batches: BatchConfig { batch_size: 2, sequence_len: 21, update_len: 7, seed: u64::MAX - 2 },
        position: 0,
        seconds: 0.1 + 0.2,
        schedule: Schedule::new(1.0 / 7.0, 0.1).unwrap(),
        budget: Budget::Steps(STEPS),
        recent: RecentLoss::default(),
    }
}

pub fn trainer<T: Scalar>(config: ModelConfig) -> Trainer<T> {
    trainer_with(config, AdamW { learning_rate: 0.05 / 3.0, clip: Some(1.0), ..AdamW::default() })
}

pub fn trainer_with<T: Scalar>(config: ModelConfig, optimizer: impl Into<Optimizer>) -> Trainer<T> {
    Trainer::new(Transformer::new(config, 5).unwrap().cast(), optimizer).unwrap()
}

pub fn batches(progress: &Progress) -> Batches {
    let text = Corpus::from_bytes((0..900u32).map(|i| (i * i % 97 % 12) as u8).collect()).unwrap();
    let mut batches = Batches::new(text, 0..900, progress.batches).unwrap();
    batches.seek(progress.position);
    batches
}

/// Trains until `end` steps have been taken.
pub fn train<T: Scalar>(trainer: &mut Trainer<T>, progress: &mut Progress, end: u64) -> Vec<StepReport> {
    let mut batches = batches(progress);
    let reports = (trainer.steps()..end).map(|step| {
        let report = trainer.step(&batches.next_batch().unwrap(), progress.factor(step)).unwrap();
        progress.position = batches.position();
        progress.recent.add(report.loss);
        report
    });
    reports.collect()
}

/// Everything that a trainer and its loop consist of, bit for bit: the two files of a checkpoint.
pub fn bits<T: Scalar>(trainer: &Trainer<T>, progress: &Progress) -> [Vec<u8>; 2] {
    let folder = tempfile::tempdir().unwrap();
    trainer.clone().save(folder.path(), progress).unwrap();
    files(folder.path())
}

/// `checkpoint.json` and the first tensor file.
pub fn files(folder: &Path) -> [Vec<u8>; 2] {
    ["checkpoint.json", "tensors-a.safetensors"].map(|name| std::fs::read(folder.join(name)).unwrap())
}
