//! The sizes and options of an encoder, checked as a whole.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::attention::BidirectionalAttention;
use crate::codebook::Estimator;
use crate::error::checked_len;
use crate::model::sizes::{size, sum};
use crate::model::{FeedForward, ModelConfig};

/// An encoder: a stack of units with bidirectional attention in linear time, and what it says of a sequence.
///
/// ```
/// use transformer_vq::model::{EncoderConfig, EncoderHead};
///
/// let head = EncoderHead::Classes { n_classes: 3 };
/// let config = EncoderConfig { d_model: 64, n_layers: 2, head, ..EncoderConfig::default() };
/// config.validate()?;
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// Tokens that the encoder knows, a token that stands for a hidden one included: 257 for bytes.
    pub vocab_size: usize,
    /// D, width of the model; even.
    pub d_model: usize,
    /// Units.
    pub n_layers: usize,
    /// H, query heads per unit.
    pub n_heads: usize,
    /// Hk, heads of keys and values, each with a codebook, for H / Hk query heads. None: as many as query heads.
    #[serde(default)]
    pub n_key_heads: Option<usize>,
    /// K, width of a key per head.
    pub d_k: usize,
    /// V, width of a value per head.
    pub d_v: usize,
    /// S, codewords per key head.
    pub n_codes: usize,
    /// Whether attention's output is gated. Without a gate, values have no activation either.
    pub gate: bool,
    /// A second branch in every unit, token by token.
    #[serde(default)]
    pub feed_forward: Option<FeedForward>,
    /// Whether keys share the gradient of their codeword.
    pub attention: BidirectionalAttention,
    /// What the encoder says.
    pub head: EncoderHead,
    /// Longest wavelength of the sinusoids, in units of 2 pi tokens.
    pub position_lambda: f64,
    /// Weight of the commitment loss in the total.
    pub commit_weight: f64,
    /// How much of its past a codebook keeps at each update: codebooks learn by moving averages.
    pub codebook_decay: f64,
    /// How a codeword's gradient passes to its keys, if they share it.
    pub estimator: Estimator,
}

/// What an encoder says of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum EncoderHead {
    /// At each position, which token should stand there: logits [B, T, vocab].
    MaskedToken,
    /// Which class the sequence belongs to, from the mean of its positions: logits [B, 1, `n_classes`].
    Classes {
        /// How many there are.
        n_classes: usize,
    },
}

impl Default for EncoderConfig {
    /// A small encoder of bytes in which some are hidden behind token 256: four units, 0.6 million parameters.
    fn default() -> Self {
        EncoderConfig {
            vocab_size: 257,
            d_model: 128,
            n_layers: 4,
            n_heads: 4,
            n_key_heads: None,
            d_k: 32,
            d_v: 64,
            n_codes: 64,
            gate: true,
            feed_forward: None,
            attention: BidirectionalAttention { key_gradient: true },
            head: EncoderHead::MaskedToken,
            position_lambda: 1e4,
            commit_weight: 1e-4,
            codebook_decay: 0.99,
            estimator: Estimator::StraightThrough,
        }
    }
}

impl EncoderConfig {
    /// Checks that such an encoder can exist.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, [`Error::TooLarge`] naming the array that would not fit.
    pub fn validate(&self) -> Result<(), Error> {
        self.like().validate()?;
        if let EncoderHead::Classes { n_classes } = self.head
            && (n_classes == 0 || n_classes > u32::MAX as usize)
        {
            return Err(Error::invalid("n_classes", "between 1 and 2^32 - 1", n_classes));
        }
        checked_len("output", &[self.d_model, self.n_outputs()])?;
        Ok(())
    }

    /// The language model with the same fields: what makes one impossible makes the other so.
    fn like(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: self.vocab_size,
            d_model: self.d_model,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            n_key_heads: self.n_key_heads,
            d_k: self.d_k,
            d_v: self.d_v,
            n_codes: self.n_codes,
            gate: self.gate,
            feed_forward: self.feed_forward,
            position_lambda: self.position_lambda,
            commit_weight: self.commit_weight,
            codebook_decay: self.codebook_decay,
            estimator: self.estimator,
            ..ModelConfig::default()
        }
    }

    /// Hk: heads of keys and values.
    pub fn key_heads(&self) -> usize {
        self.n_key_heads.unwrap_or(self.n_heads)
    }

    /// Logits of a position or of a sequence: tokens or classes.
    pub fn n_outputs(&self) -> usize {
        match self.head {
            EncoderHead::MaskedToken => self.vocab_size,
            EncoderHead::Classes { n_classes } => n_classes,
        }
    }

    /// Numbers that the optimizer moves in such an encoder.
    pub fn n_parameters(&self) -> u128 {
        let (d, n_outputs) = (self.d_model, self.n_outputs());
        let norms = if self.feed_forward.is_some() { 2 } else { 1 };
        let unit = sum([self.like().n_unit_matrices(), size(&[norms, 2, d])]);
        sum([
            size(&[self.vocab_size, d]),
            1,
            unit.saturating_mul(self.n_layers as u128),
            size(&[2, d]),
            size(&[d, n_outputs]),
            size(&[n_outputs]),
        ])
    }

    /// K^(-1/4): the factor on queries and keys.
    pub(super) fn key_scale(&self) -> f64 {
        self.like().key_scale()
    }
}
