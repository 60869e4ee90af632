//! The codebooks of a model: what the optimizer does not move of them.
//!
//! A codebook's state is in two places, and in each once: what the optimizer moves is in the unit's parameters, the rest in a
//! [`Learning`]. Together they give the codewords.
//!
//! How codewords begin: moving averages as published, N(0, 1 / (H S)). Otherwise every number of a codeword is from
//! N(0, K^(-1/2)), which is the size of a key's numbers (normalised keys times K^(-1/4)): by itself, or as a basis from
//! N(0, 1/f) times a matrix from N(0, K^(-1/2)), without a bias.

use ndarray::Array3;
use rand_chacha::ChaCha8Rng;

use super::parameters::{fill_normal, standard_normal};
use super::{LearningConfig, ModelConfig, Parameters};
use crate::codebook::{Basis, Ema, Learning};
use crate::error::check_shape;
use crate::{Error, Scalar};

/// What no optimizer moves of one codebook, at its beginning.
pub(super) fn begin(config: &ModelConfig, rng: &mut ChaCha8Rng) -> Result<Learning<f32>, Error> {
    let ModelConfig { n_heads, n_codes, d_k, codebook_decay, .. } = *config;
    let mut normal = |width: usize, deviation: f64| {
        let mut numbers = Array3::zeros((n_heads, n_codes, width));
        fill_normal(&mut numbers, deviation, rng);
        numbers
    };
    Ok(match config.learning {
        LearningConfig::Ema { smoothing } => {
            let ema = Ema::random(n_heads, n_codes, d_k, codebook_decay, || standard_normal(rng))?;
            Learning::Ema(ema.with_smoothing(smoothing)?)
        }
        LearningConfig::Gradient(_) => Learning::Gradient,
        LearningConfig::Linear { learned_basis: true, .. } => Learning::Linear(Basis::Learned),
        LearningConfig::Linear { d_basis, .. } => {
            Learning::Linear(Basis::Frozen(normal(d_basis, (d_basis as f64).sqrt().recip())))
        }
        LearningConfig::Frozen => Learning::Frozen(normal(d_k, config.key_scale())),
    })
}

/// Checks that these codebooks, one per unit, are those of the configuration.
pub(super) fn check<T: Scalar>(
    config: &ModelConfig,
    parameters: &Parameters<T>,
    learning: &[Learning<T>],
) -> Result<(), Error> {
    check_shape("codebooks", &[config.n_layers], &[learning.len()])?;
    for (layer, learning) in parameters.layers.iter().zip(learning) {
        let fits = match (&config.learning, learning) {
            (LearningConfig::Ema { smoothing }, Learning::Ema(ema)) => ema.smoothing() == *smoothing,
            (LearningConfig::Gradient(_), Learning::Gradient) => true,
            (LearningConfig::Linear { learned_basis, .. }, Learning::Linear(basis)) => {
                *learned_basis == (*basis == Basis::Learned)
            }
            (LearningConfig::Frozen, Learning::Frozen(_)) => true,
            _ => false,
        };
        if !fits {
            let expected = format!("learning by {:?}", config.learning);
            return Err(Error::invalid("codebooks", expected, kind(learning)));
        }
        let (n_heads, n_codes, d_k) = learning.check(&layer.codebook)?;
        check_shape("codebooks", &[config.n_heads, config.n_codes, config.d_k], &[n_heads, n_codes, d_k])?;
    }
    Ok(())
}

fn kind<T: Scalar>(learning: &Learning<T>) -> String {
    match learning {
        Learning::Ema(ema) => format!("moving averages with {:?}", ema.smoothing()),
        Learning::Gradient => "by gradient".into(),
        Learning::Linear(Basis::Learned) => "a learned basis".into(),
        Learning::Linear(Basis::Frozen(_)) => "a frozen basis".into(),
        Learning::Frozen(_) => "frozen codewords".into(),
    }
}
