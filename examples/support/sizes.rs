//! The sizes of a language model and of its training, as options of a command line.

#[path = "options.rs"]
mod options;

use std::num::NonZeroUsize;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use transformer_vq::Error;
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{Estimator, Rotation, Smoothing};
use transformer_vq::model::{
    CodebookStart, CodewordGradient, LearningConfig, ModelConfig, Revival, Transformer,
};
use transformer_vq::train::{
    Adafactor, AdamW, BatchConfig, Budget, Decay, Lion, Optimizer, ParameterGroup, Progress, RecentLoss,
    Schedule, Trainer,
};

pub use options::positive;

/// Steps of Lloyd from k-means++.
pub const LLOYD_STEPS: usize = 10;
/// Steps of training between two looks for idle codes.
pub const REVIVE_EVERY: u64 = 10;

/// Sizes of the model and of its training.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Width of the model
    #[arg(long, default_value_t = 192)]
    pub d_model: usize,
    /// Gated units (the paper counts two as a layer)
    #[arg(long, default_value_t = 4)]
    pub n_layers: usize,
    /// Heads per unit
    #[arg(long, default_value_t = 1)]
    pub n_heads: usize,
    /// Width of a key
    #[arg(long, default_value_t = 64)]
    pub d_k: usize,
    /// Width of a value
    #[arg(long, default_value_t = 384)]
    pub d_v: usize,
    /// Codewords per head
    #[arg(long, default_value_t = 64)]
    pub n_codes: usize,
    /// Block length, tokens
    #[arg(long, default_value_t = 64)]
    pub block_len: usize,
    /// Window, tokens
    #[arg(long, default_value_t = 64)]
    pub window: usize,
    /// Sequences side by side, of each micro-batch
    #[arg(long, default_value_t = 4)]
    pub batch_size: usize,
    /// Tokens of a training sequence; a multiple of --update-len
    #[arg(long, default_value_t = 1024)]
    pub sequence_len: usize,
    /// Tokens of each sequence that one step takes; state is carried between steps
    #[arg(long, default_value_t = 256)]
    pub update_len: usize,
    /// Micro-batches whose gradients make one step: as a batch that many times as large, in the memory of one
    #[arg(long, value_name = "N", default_value_t = one())]
    #[serde(default = "one")]
    pub accumulate: NonZeroUsize,
    /// Keep of each unit only its input, and compute the rest again in backward: less memory, a third more time
    #[arg(long)]
    #[serde(default)]
    pub recompute: bool,
    /// What moves the parameters
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub optimizer: OptimizerKind,
    /// How the learning rate falls after the warm-up
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub schedule: ScheduleKind,
    /// Largest learning rate [default: 3e-3 for adamw, 6e-4 for lion, 1e-2 of a parameter's size for adafactor]
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// Parameters that stay as they begin, such as embedding or 'layers.0.*'; may be given several times
    #[arg(long, value_name = "PATTERN")]
    #[serde(default)]
    pub freeze: Vec<String>,
    /// Largest norm of the gradient
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Part of each matrix that a step takes away
    #[arg(long, default_value_t = 1e-4)]
    pub weight_decay: f64,
    /// Weight of the commitment loss
    #[arg(long, default_value_t = 1e-4)]
    pub commit_weight: f64,
    /// How much of its past a codebook keeps at each step
    #[arg(long, default_value_t = 0.99)]
    pub codebook_decay: f64,
    /// How codebooks learn
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub learning: Learning,
    /// How gradients pass from quantized keys to keys
    #[arg(long, value_enum, default_value_t)]
    #[serde(default = "straight_through")]
    pub estimator: KeyGradient,
    /// Weight of the codebook loss, for --learning gradient and linear
    #[arg(long, default_value_t = 1e-3)]
    #[serde(default = "codebook_weight")]
    pub codebook_weight: f64,
    /// Let attention's own gradient move the codewords too, for --learning gradient and linear
    #[arg(long)]
    #[serde(default)]
    pub from_attention: bool,
    /// What codewords begin as
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub start: Start,
    /// Every ten steps, codes used less than this times the average get a new start; 0: none, and else --learning ema or laplace
    #[arg(long, default_value_t = 0.0)]
    #[serde(default)]
    pub revive: f64,
    /// Part of the run in which the learning rate rises
    #[arg(long, default_value_t = 0.03)]
    pub warmup: f64,
}

fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

/// What runs from before the option have.
fn straight_through() -> KeyGradient {
    KeyGradient::StraightThrough
}

/// What runs from before the option learn with; they do not read it.
fn codebook_weight() -> f64 {
    1e-3
}

#[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Learning {
    /// Moving averages of keys, counts clamped
    #[default]
    Ema,
    /// Moving averages of keys, counts smoothed
    Laplace,
    /// Codewords are parameters
    Gradient,
    /// Codewords are a frozen basis times a matrix (SimVQ)
    Linear,
    /// Codewords stay as they began
    Frozen,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    #[default]
    #[value(name = "adamw")]
    AdamW,
    Lion,
    Adafactor,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    #[default]
    Cosine,
    Linear,
    InverseSquareRoot,
    Constant,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Random numbers
    #[default]
    Random,
    /// Centres of the first keys
    KMeans,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyGradient {
    StraightThrough,
    Rotation,
    #[default]
    Directional,
    None,
}

impl Sizes {
    /// What codewords learn from, where they learn by gradient.
    pub fn gradient(&self) -> CodewordGradient {
        CodewordGradient { codebook_weight: self.codebook_weight, from_attention: self.from_attention }
    }

    fn learning(&self) -> LearningConfig {
        let gradient = self.gradient();
        match self.learning {
            Learning::Ema => LearningConfig::default(),
            Learning::Laplace => LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } },
            Learning::Gradient => LearningConfig::Gradient(gradient),
            Learning::Linear => {
                LearningConfig::Linear { d_basis: self.d_k, learned_basis: false, bias: false, gradient }
            }
            Learning::Frozen => LearningConfig::Frozen,
        }
    }

    fn estimator(&self) -> Estimator {
        match self.estimator {
            KeyGradient::StraightThrough => Estimator::StraightThrough,
            KeyGradient::Rotation => Estimator::Rotation(Rotation::default()),
            KeyGradient::Directional => Estimator::Directional,
            KeyGradient::None => Estimator::None,
        }
    }

    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            d_model: self.d_model,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            d_k: self.d_k,
            d_v: self.d_v,
            n_codes: self.n_codes,
            attention: VqAttention {
                block_len: self.block_len,
                window: self.window,
                ..VqAttention::default()
            },
            commit_weight: self.commit_weight,
            codebook_decay: self.codebook_decay,
            learning: self.learning(),
            estimator: self.estimator(),
            start: match self.start {
                Start::Random => CodebookStart::Random,
                Start::KMeans => CodebookStart::KMeans { steps: LLOYD_STEPS },
            },
            revival: (self.revive != 0.0).then_some(Revival { ratio: self.revive, every: REVIVE_EVERY }),
            recompute: self.recompute,
            ..ModelConfig::default()
        }
    }

    /// A run at its beginning.
    pub fn progress(&self, budget: Budget, seed: u64) -> Result<Progress, Error> {
        let Sizes { sequence_len, update_len, .. } = *self;
        // A batch of the trainer is that of all micro-batches.
        let batch_size = self.batch_size.saturating_mul(self.accumulate.get());
        let decay = match self.schedule {
            ScheduleKind::Cosine => Decay::Cosine,
            ScheduleKind::Linear => Decay::Linear,
            ScheduleKind::InverseSquareRoot => Decay::InverseSquareRoot,
            ScheduleKind::Constant => Decay::Constant,
        };
        let progress = Progress {
            batches: BatchConfig { batch_size, sequence_len, update_len, seed },
            position: 0,
            seconds: 0.0,
            schedule: Schedule { warmup: self.warmup, alpha: 0.1, decay },
            budget,
            recent: RecentLoss::default(),
        };
        progress.validate()?;
        Ok(progress)
    }

    fn optimizer(&self) -> Optimizer {
        let (rate, clip, weight_decay) = (self.learning_rate, Some(self.clip), self.weight_decay);
        match self.optimizer {
            OptimizerKind::AdamW => {
                let learning_rate = rate.unwrap_or(3e-3);
                AdamW { learning_rate, clip, weight_decay, ..AdamW::default() }.into()
            }
            OptimizerKind::Lion => {
                let learning_rate = rate.unwrap_or(6e-4);
                Lion { learning_rate, clip, weight_decay, ..Lion::default() }.into()
            }
            OptimizerKind::Adafactor => {
                let adafactor = Adafactor { clip, weight_decay, ..Adafactor::default() };
                let learning_rate = rate.unwrap_or(adafactor.learning_rate);
                Adafactor { learning_rate, ..adafactor }.into()
            }
        }
    }

    /// The training of a model at its beginning.
    pub fn trainer(&self, model: Transformer) -> Result<Trainer, Error> {
        let freeze = |pattern: &String| ParameterGroup { frozen: true, ..ParameterGroup::new(pattern) };
        let groups = self.freeze.iter().map(freeze).collect();
        Trainer::new(model, self.optimizer())?.with_groups(groups)?.with_micro_batches(self.accumulate.get())
    }
}
