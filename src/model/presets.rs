//! Named configurations: the three models of the paper, and two small ones.
//!
//! The paper's models as its own code builds them (github.com/transformer-vq/transformer_vq, `scripts/lm_*.sh` of the first
//! release), with its recipes, which belong to training:
//!
//! | | [`enwik8`](ModelConfig::enwik8) | [`pg19`](ModelConfig::pg19) | [`imagenet64`](ModelConfig::imagenet64) |
//! |---|---|---|---|
//! | units (the paper's layers have two) | 48 | 48 | 48 |
//! | D, K, V | 768, 128, 1536 | 2048, 128, 4096 | 2048, 128, 4096 |
//! | L, M, S | 512, 512, 512 | 512, 512, 512 | 512, 512, 512 |
//! | vocabulary | 259: 3 special, then bytes | 32,000 SentencePiece BPE | 259: 3 special, then bytes |
//! | output | own matrix, no norm, times 1 | tied, after a norm, times 0.005 | tied, after a norm, times 0.005 |
//! | absolute positions | no | no | yes |
//! | dropout: sinusoid, residual, layer | 0.2, 0.5, 0.3 | 0.1, 0.1, 0.1 | 0.1, 0, 0 |
//! | tokens of a sequence, of an update | 8192, 2048 | 8192, 2048 | 12288, 1536 |
//! | sequences of a batch | 128 | 128 | 128 |
//! | optimizer, peak learning rate | AdamW, 4e-4 | Adafactor, 0.01 | Adafactor, 0.01 |
//! | decay per step, clipping | 2e-4, 0.1 | none | none |
//! | warm-up, steps (cosine to 0.1) | 10,000, 125,000 | 10,000, 500,000 | 10,000, 500,000 |
//! | nucleus in sampling | 0.9 | 0.8 | 0.999 |
//!
//! All have one gated head, commitment weight 1e-4, moving averages with decay 0.99 and wavelengths up to 1e5. The first release
//! leaves L, M, S and the length of a sequence to its command line, and says that M = L in its experiments: the numbers above are
//! those in the configuration files of its later branch. Whether gradients went through the cache is not in either; here
//! they do.
//!
//! The small models learn something in minutes on two cores; their sizes are this crate's choice.

use super::{Dropout, ModelConfig};
use crate::attention::VqAttention;
use crate::codebook::Estimator;

impl ModelConfig {
    /// The paper's model of enwik8: 185 million parameters (the paper says 190).
    pub fn enwik8() -> Self {
        ModelConfig {
            vocab_size: BYTES_AFTER_SPECIAL,
            d_model: 768,
            d_v: 1536,
            final_norm: false,
            dropout: Dropout { embedding: 0.0, residual: 0.5, sinusoid: 0.2, layer: 0.3 },
            ..published()
        }
    }

    /// The paper's model of PG-19: 1.3 billion parameters.
    pub fn pg19() -> Self {
        ModelConfig {
            vocab_size: 32_000,
            d_model: 2048,
            d_v: 4096,
            tied_embedding: true,
            logit_scale: 0.005,
            dropout: Dropout { embedding: 0.0, residual: 0.1, sinusoid: 0.1, layer: 0.1 },
            ..published()
        }
    }

    /// The paper's model of ImageNet64: 1.2 billion parameters.
    pub fn imagenet64() -> Self {
        ModelConfig {
            vocab_size: BYTES_AFTER_SPECIAL,
            absolute_positions: true,
            dropout: Dropout { embedding: 0.0, residual: 0.0, sinusoid: 0.1, layer: 0.0 },
            ..ModelConfig::pg19()
        }
    }

    /// For a first try on bytes: half a million parameters, some thousand tokens per second and core.
    pub fn tiny() -> Self {
        ModelConfig { d_model: 128, d_v: 256, ..ModelConfig::default() }
    }

    /// For an evening on bytes: 4 million parameters, with a longer window and more codes.
    pub fn laptop() -> Self {
        ModelConfig {
            d_model: 320,
            n_layers: 6,
            d_v: 640,
            n_codes: 256,
            attention: VqAttention { block_len: 128, window: 128, ..VqAttention::default() },
            ..ModelConfig::default()
        }
    }
}

/// Padding, end and unknown come before the bytes.
const BYTES_AFTER_SPECIAL: usize = 259;

/// What the paper's models share.
fn published() -> ModelConfig {
    ModelConfig {
        n_layers: 48,
        n_heads: 1,
        d_k: 128,
        n_codes: 512,
        attention: VqAttention { block_len: 512, window: 512, ..VqAttention::default() },
        commit_weight: 1e-4,
        codebook_decay: 0.99,
        position_lambda: 1e5,
        estimator: Estimator::StraightThrough,
        ..ModelConfig::default()
    }
}
