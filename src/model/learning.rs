//! How a configuration says that codebooks learn.

use serde::{Deserialize, Serialize};

use super::ModelConfig;
use crate::Error;
use crate::codebook::Smoothing;

/// What the codewords of a model begin as: see [`start`](crate::codebook::start).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CodebookStart {
    /// Random numbers: for moving averages as published, otherwise about as large as keys.
    #[default]
    Random,
    /// As `Random`; the first step of training then replaces them by the centres of its batch's keys, found by k-means++. Not
    /// for codewords that are a basis times a matrix.
    KMeans {
        /// Steps of Lloyd, at most.
        steps: usize,
    },
}

/// When training gives codes a new start: see [`revive`](crate::codebook::revive).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revival {
    /// A code is idle if it is used less than this times as often as the average code of its head; from 0 to below 1.
    pub ratio: f64,
    /// Steps of training from one look to the next.
    pub every: u64,
}

/// How the codebooks of a model learn: see [`Learning`](crate::codebook::Learning).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LearningConfig {
    /// Moving averages of keys, by `codebook_decay`.
    Ema {
        /// How counts become divisors.
        smoothing: Smoothing,
    },
    /// Codewords are parameters.
    Gradient(CodewordGradient),
    /// Codewords are a basis times a matrix (SimVQ).
    Linear {
        /// f, width of the basis.
        d_basis: usize,
        /// Whether the basis learns as well.
        learned_basis: bool,
        /// Whether a bias is added.
        bias: bool,
        /// What moves the codewords.
        gradient: CodewordGradient,
    },
    /// Codewords stay as they began.
    Frozen,
}

/// What moves codewords that learn by gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodewordGradient {
    /// Weight of the codebook loss in the total.
    pub codebook_weight: f64,
    /// Whether attention's own gradient moves the codewords too: as what queries are compared with, not only as what stands
    /// near the keys.
    pub from_attention: bool,
}

impl Default for LearningConfig {
    /// The paper's, which older checkpoints were written with.
    fn default() -> Self {
        LearningConfig::Ema { smoothing: Smoothing::CountClamp }
    }
}

impl LearningConfig {
    /// What moves the codewords, if they learn by gradient.
    pub(super) fn gradient(&self) -> Option<CodewordGradient> {
        match self {
            LearningConfig::Gradient(gradient) | LearningConfig::Linear { gradient, .. } => Some(*gradient),
            LearningConfig::Ema { .. } | LearningConfig::Frozen => None,
        }
    }
}

impl ModelConfig {
    /// Checks what says how codebooks learn, but for sizes.
    pub(super) fn validate_learning(&self) -> Result<(), Error> {
        if let LearningConfig::Ema { smoothing } = self.learning {
            smoothing.validate()?;
        }
        if let Some(Revival { ratio, every }) = self.revival {
            if !matches!(self.learning, LearningConfig::Ema { .. }) {
                let got = format!("learning by {:?}", self.learning);
                return Err(Error::invalid(
                    "revival",
                    "none, unless codebooks learn by moving averages",
                    got,
                ));
            }
            if !(0.0..1.0).contains(&ratio) {
                return Err(Error::invalid("revival.ratio", "0 or more, and below 1", ratio));
            }
            if every == 0 {
                return Err(Error::invalid("revival.every", "at least 1", every));
            }
        }
        if let (CodebookStart::KMeans { .. }, LearningConfig::Linear { .. }) = (self.start, &self.learning) {
            let expected = "random, for codewords that are a basis times a matrix";
            return Err(Error::invalid("start", expected, "k-means"));
        }
        if let Some(CodewordGradient { codebook_weight, .. }) = self.learning.gradient()
            && !(codebook_weight.is_finite() && codebook_weight >= 0.0)
        {
            return Err(Error::invalid("codebook_weight", "finite and not negative", codebook_weight));
        }
        Ok(())
    }
}
