//! The kinds: one change each from the model that the options describe.

use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};
use transformer_vq::model::{CodebookStart, CodewordGradient, LearningConfig, ModelConfig, Revival};

use crate::sizes::{LLOYD_STEPS, REVIVE_EVERY};

/// Weight of the codebook loss: ten times that of the commitment, by which keys yield less to codewords than these to keys.
const CODEBOOK_WEIGHT: f64 = 1e-3;

/// A name, what it changes, and the change.
pub struct Kind {
    pub name: &'static str,
    pub what: &'static str,
    pub change: fn(&mut ModelConfig),
}

const fn gradient(from_attention: bool) -> CodewordGradient {
    CodewordGradient { codebook_weight: CODEBOOK_WEIGHT, from_attention }
}

fn linear(config: &ModelConfig, learned_basis: bool, from_attention: bool) -> LearningConfig {
    let gradient = gradient(from_attention);
    LearningConfig::Linear { d_basis: config.d_k, learned_basis, bias: false, gradient }
}

fn rotate(config: &mut ModelConfig, variant: RotationVariant, scale: RotationScale) {
    config.estimator = Estimator::Rotation(Rotation { variant, scale });
}

fn revive(config: &mut ModelConfig, ratio: f64) {
    config.revival = Some(Revival { ratio, every: REVIVE_EVERY });
}

#[rustfmt::skip]
pub const KINDS: &[Kind] = &[
    Kind { name: "default", what: "as the options say", change: |_| {} },
    Kind { name: "laplace", what: "counts smoothed, not clamped",
           change: |c| c.learning = LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } } },
    Kind { name: "k-means", what: "started at centres of the first keys",
           change: |c| c.start = CodebookStart::KMeans { steps: LLOYD_STEPS } },
    Kind { name: "revived", what: "codes used below 0.1 of the average get a new start",
           change: |c| revive(c, 0.1) },
    Kind { name: "revived-more", what: "the same, below 0.3",
           change: |c| revive(c, 0.3) },
    Kind { name: "gradient", what: "codewords are parameters",
           change: |c| c.learning = LearningConfig::Gradient(gradient(false)) },
    Kind { name: "gradient-attention", what: "the same, with attention's own gradient",
           change: |c| c.learning = LearningConfig::Gradient(gradient(true)) },
    Kind { name: "sim-vq", what: "a frozen basis times a matrix",
           change: |c| c.learning = linear(c, false, false) },
    Kind { name: "sim-vq-attention", what: "the same, with attention's own gradient",
           change: |c| c.learning = linear(c, false, true) },
    Kind { name: "sim-vq-learned", what: "a learned basis times a matrix",
           change: |c| c.learning = linear(c, true, false) },
    Kind { name: "frozen", what: "codewords stay random",
           change: |c| c.learning = LearningConfig::Frozen },
    Kind { name: "rotation", what: "rotation trick, as in the paper",
           change: |c| rotate(c, RotationVariant::Paper, RotationScale::Ratio) },
    Kind { name: "rotation-capped", what: "the same, scale at most 1",
           change: |c| rotate(c, RotationVariant::Paper, RotationScale::AtMost(1.0)) },
    Kind { name: "rotation-unscaled", what: "the same, scale 1",
           change: |c| rotate(c, RotationVariant::Paper, RotationScale::One) },
    Kind { name: "rotation-normalized", what: "rotation trick, normalized variant",
           change: |c| rotate(c, RotationVariant::Normalized, RotationScale::Ratio) },
    Kind { name: "straight-through", what: "keys get the gradient of their codewords as it is",
           change: |c| c.estimator = Estimator::StraightThrough },
    Kind { name: "directional", what: "keys get what is not along the line to the codeword",
           change: |c| c.estimator = Estimator::Directional },
    Kind { name: "directional-gradient", what: "the same, and codewords, as parameters, get the rest",
           change: |c| {
               c.learning = LearningConfig::Gradient(gradient(true));
               c.estimator = Estimator::Directional;
           } },
    Kind { name: "no-estimator", what: "keys get nothing from attention",
           change: |c| c.estimator = Estimator::None },
];
