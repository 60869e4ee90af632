//! The kinds: one change each from the model that the options describe.
//!
//! Codewords that are parameters learn with `--codebook-weight`. By default it is ten times the weight of the commitment: keys
//! yield less to codewords than these to keys.

use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};
use transformer_vq::model::{CodebookStart, CodewordGradient, LearningConfig, ModelConfig, Revival};

use crate::sizes::{LLOYD_STEPS, REVIVE_EVERY};

/// A name, what it changes, and the change, given what the options would have codewords learn from.
pub struct Kind {
    pub name: &'static str,
    pub what: &'static str,
    pub change: fn(&mut ModelConfig, CodewordGradient),
}

fn with_attention(gradient: CodewordGradient) -> CodewordGradient {
    CodewordGradient { from_attention: true, ..gradient }
}

fn linear(config: &mut ModelConfig, learned_basis: bool, gradient: CodewordGradient) {
    let d_basis = config.d_k;
    config.learning = LearningConfig::Linear { d_basis, learned_basis, bias: false, gradient };
}

fn rotate(config: &mut ModelConfig, variant: RotationVariant, scale: RotationScale) {
    config.estimator = Estimator::Rotation(Rotation { variant, scale });
}

fn revive(config: &mut ModelConfig, ratio: f64) {
    config.revival = Some(Revival { ratio, every: REVIVE_EVERY });
}

#[rustfmt::skip]
pub const KINDS: &[Kind] = &[
    Kind { name: "default", what: "as the options say", change: |_, _| {} },
    Kind { name: "laplace", what: "counts smoothed, not clamped",
           change: |c, _| c.learning = LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } } },
    Kind { name: "k-means", what: "started at centres of the first keys",
           change: |c, _| c.start = CodebookStart::KMeans { steps: LLOYD_STEPS } },
    Kind { name: "revived", what: "codes used below 0.1 of the average get a new start",
           change: |c, _| revive(c, 0.1) },
    Kind { name: "revived-more", what: "the same, below 0.3",
           change: |c, _| revive(c, 0.3) },
    Kind { name: "gradient", what: "codewords are parameters",
           change: |c, g| c.learning = LearningConfig::Gradient(g) },
    Kind { name: "gradient-attention", what: "the same, with attention's own gradient",
           change: |c, g| c.learning = LearningConfig::Gradient(with_attention(g)) },
    Kind { name: "sim-vq", what: "a frozen basis times a matrix",
           change: |c, g| linear(c, false, g) },
    Kind { name: "sim-vq-attention", what: "the same, with attention's own gradient",
           change: |c, g| linear(c, false, with_attention(g)) },
    Kind { name: "sim-vq-learned", what: "a learned basis times a matrix",
           change: |c, g| linear(c, true, g) },
    Kind { name: "frozen", what: "codewords stay random",
           change: |c, _| c.learning = LearningConfig::Frozen },
    Kind { name: "rotation", what: "rotation trick, as in the paper",
           change: |c, _| rotate(c, RotationVariant::Paper, RotationScale::Ratio) },
    Kind { name: "rotation-capped", what: "the same, scale at most 1",
           change: |c, _| rotate(c, RotationVariant::Paper, RotationScale::AtMost(1.0)) },
    Kind { name: "rotation-unscaled", what: "the same, scale 1",
           change: |c, _| rotate(c, RotationVariant::Paper, RotationScale::One) },
    Kind { name: "rotation-normalized", what: "rotation trick, normalized variant",
           change: |c, _| rotate(c, RotationVariant::Normalized, RotationScale::Ratio) },
    Kind { name: "straight-through", what: "keys get the gradient of their codewords as it is",
           change: |c, _| c.estimator = Estimator::StraightThrough },
    Kind { name: "directional", what: "keys get what is not along the line to the codeword",
           change: |c, _| c.estimator = Estimator::Directional },
    Kind { name: "directional-gradient", what: "the same, and codewords, as parameters, get the rest",
           change: |c, g| {
               c.learning = LearningConfig::Gradient(with_attention(g));
               c.estimator = Estimator::Directional;
           } },
    Kind { name: "no-estimator", what: "keys get nothing from attention",
           change: |c, _| c.estimator = Estimator::None },
];
