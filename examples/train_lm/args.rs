//! The options of a run, written into its folder so that it can be resumed.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{Estimator, Rotation, Smoothing};
use transformer_vq::model::{CodewordGradient, LearningConfig, ModelConfig};
use transformer_vq::train::AdamW;

/// Trains a byte-level Transformer-VQ on text, then writes a sample of what it has learned.
///
/// Without arguments: a small model on this crate's own sources and documentation, about two minutes on two cores.
/// Ctrl-C stops a run with a checkpoint; --resume continues it.
#[derive(Debug, Clone, Parser)]
#[command(name = "train_lm")]
pub struct Args {
    /// Text to learn; its last tenth is held out [default: this crate's sources and documentation]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,

    /// Train for this many steps; the result then depends on the seed alone
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,

    /// Train for this long by the wall clock; the schedule follows elapsed time [default: 2]
    #[arg(long, value_name = "X", value_parser = positive)]
    pub minutes: Option<f64>,

    /// Folder for checkpoints, the log and the picture [default: runs/train_lm]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Continue the run in this folder, with the options it was begun with
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "steps", "minutes", "out", "seed", "Sizes"])]
    pub resume: Option<PathBuf>,

    /// Stop as Ctrl-C does, after this many steps in all
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,

    /// Seed of weights, batches and the sample [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Threads; results are the same bits with any number [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    #[command(flatten)]
    pub sizes: Sizes,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(x) if x > 0.0 && f64::is_finite(x) => Ok(x),
        _ => Err("expected a positive number".into()),
    }
}

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
    /// Sequences side by side
    #[arg(long, default_value_t = 4)]
    pub batch_size: usize,
    /// Tokens of a training sequence; a multiple of --update-len
    #[arg(long, default_value_t = 1024)]
    pub sequence_len: usize,
    /// Tokens of each sequence that one step takes; state is carried between steps
    #[arg(long, default_value_t = 256)]
    pub update_len: usize,
    /// Largest learning rate
    #[arg(long, default_value_t = 3e-3)]
    pub learning_rate: f64,
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
    #[serde(default)]
    pub estimator: KeyGradient,
    /// Weight of the codebook loss, for --learning gradient and linear
    #[arg(long, default_value_t = 1e-3)]
    #[serde(default = "codebook_weight")]
    pub codebook_weight: f64,
    /// Let attention's own gradient move the codewords too, for --learning gradient and linear
    #[arg(long)]
    #[serde(default)]
    pub from_attention: bool,
    /// Part of the run in which the learning rate rises
    #[arg(long, default_value_t = 0.03)]
    pub warmup: f64,
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
pub enum KeyGradient {
    #[default]
    StraightThrough,
    Rotation,
    Directional,
    None,
}

impl Sizes {
    fn learning(&self) -> LearningConfig {
        let gradient =
            CodewordGradient { codebook_weight: self.codebook_weight, from_attention: self.from_attention };
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
            ..ModelConfig::default()
        }
    }

    pub fn optimizer(&self) -> AdamW {
        AdamW {
            learning_rate: self.learning_rate,
            clip: Some(self.clip),
            weight_decay: self.weight_decay,
            ..AdamW::default()
        }
    }
}
