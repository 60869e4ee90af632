//! The sizes and options of a model, checked as a whole.

use serde::{Deserialize, Serialize};

use super::{CodebookStart, Dropout, LearningConfig, Revival};
use crate::Error;
use crate::attention::VqAttention;
use crate::codebook::Estimator;
use crate::error::checked_len;

/// A Transformer-VQ language model: a stack of units with linear-time attention, gated if nothing else is said.
///
/// ```
/// use transformer_vq::model::ModelConfig;
///
/// let config = ModelConfig { d_model: 64, n_layers: 2, ..ModelConfig::default() };
/// config.validate()?;
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens that the model knows; 256 for bytes.
    pub vocab_size: usize,
    /// D, width of the model; even.
    pub d_model: usize,
    /// Units. The paper counts two of them as one layer.
    pub n_layers: usize,
    /// H, query heads per unit.
    pub n_heads: usize,
    /// Hk, heads of keys and values, each with a codebook, for H / Hk query heads (grouped queries; 1: multi-query). It divides
    /// `n_heads`. None: as many as query heads.
    #[serde(default)]
    pub n_key_heads: Option<usize>,
    /// K, width of a key per head.
    pub d_k: usize,
    /// V, width of a value per head.
    pub d_v: usize,
    /// S, codewords per key head.
    pub n_codes: usize,
    /// Whether attention's output is gated. Without a gate, values have no activation either.
    #[serde(default = "on")]
    pub gate: bool,
    /// A second branch in every unit, token by token.
    #[serde(default)]
    pub feed_forward: Option<FeedForward>,
    /// What the attention of the units is: of the first, the second and so on, and over again. Empty: [`UnitKind::Vq`].
    #[serde(default)]
    pub units: Vec<UnitKind>,
    /// What is dropped in training.
    #[serde(default)]
    pub dropout: Dropout,
    /// Block length, window, and how far values and gradients reach.
    pub attention: VqAttention,
    /// Whether the table of embeddings, transposed, is the output matrix too.
    pub tied_embedding: bool,
    /// Whether sinusoids of the absolute position are added to the embeddings, times a learned scalar that starts at 0.
    pub absolute_positions: bool,
    /// Whether an RMS norm precedes the output matrix.
    pub final_norm: bool,
    /// Factor on the logits.
    pub logit_scale: f64,
    /// Longest wavelength of all sinusoids, in units of 2 pi tokens.
    pub position_lambda: f64,
    /// Weight of the commitment loss in the total.
    pub commit_weight: f64,
    /// How much of its past a codebook that learns by moving averages keeps at each update.
    pub codebook_decay: f64,
    /// How codebooks learn.
    #[serde(default)]
    pub learning: LearningConfig,
    /// Whether training keeps of each unit only what goes into it, and computes the rest again in backward: the same
    /// gradients in less memory, for a third more time.
    #[serde(default)]
    pub recompute: bool,
    /// How gradients pass from quantized keys to keys: directional by default, as the best that was measured; a file that does
    /// not say means straight-through, as the published model.
    #[serde(default)]
    pub estimator: Estimator,
    /// What codewords begin as.
    #[serde(default)]
    pub start: CodebookStart,
    /// New starts for codes that hardly any key takes, if codebooks learn by moving averages.
    #[serde(default)]
    pub revival: Option<Revival>,
}

/// What older configurations mean, which do not say.
fn on() -> bool {
    true
}

/// A feed-forward branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedForward {
    /// Its activation.
    pub kind: FeedForwardKind,
    /// Its width on the way; SwiGLU has two matrices of this width at its input.
    pub width: usize,
}

/// The activation of a feed-forward branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardKind {
    /// `(x Win) * SiLU(x Wg)`.
    #[serde(rename = "swiglu")]
    SwiGlu,
    /// `gelu(x Win)`, see [`gelu`](crate::ops::gelu).
    Gelu,
}

/// What the attention of a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnitKind {
    /// Over quantized keys, all of them: the window exactly, older ones through the compressive cache. Linear time, constant
    /// state.
    #[default]
    Vq,
    /// Over quantized keys of the window alone.
    Window,
    /// Over all keys as they are, without a codebook ([`quadratic`](crate::attention::quadratic)), with relative biases in the
    /// window. Quadratic time, and a state that grows with the sequence.
    Quadratic,
}

impl UnitKind {
    /// Whether its keys are quantized.
    pub fn has_codebook(self) -> bool {
        self != UnitKind::Quadratic
    }
}

impl Default for ModelConfig {
    /// A small model for bytes: four units, 1.1 million parameters.
    fn default() -> Self {
        ModelConfig {
            vocab_size: 256,
            d_model: 192,
            n_layers: 4,
            n_heads: 1,
            n_key_heads: None,
            d_k: 64,
            d_v: 384,
            n_codes: 128,
            gate: true,
            feed_forward: None,
            units: vec![],
            dropout: Dropout::default(),
            attention: VqAttention { block_len: 64, window: 64, ..VqAttention::default() },
            tied_embedding: false,
            absolute_positions: false,
            final_norm: true,
            logit_scale: 1.0,
            position_lambda: 1e5,
            commit_weight: 1e-4,
            codebook_decay: 0.99,
            learning: LearningConfig::default(),
            recompute: false,
            estimator: Estimator::Directional,
            start: CodebookStart::Random,
            revival: None,
        }
    }
}

impl ModelConfig {
    /// Checks that such a model can exist.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, [`Error::TooLarge`] naming the array that would not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
            ("d_k", self.d_k),
            ("d_v", self.d_v),
            ("n_codes", self.n_codes),
        ];
        let optional = [
            ("n_key_heads", self.n_key_heads),
            ("feed_forward.width", self.feed_forward.map(|feed_forward| feed_forward.width)),
        ];
        let optional = optional.into_iter().filter_map(|(what, size)| Some((what, size?)));
        for (what, size) in positive.into_iter().chain(optional) {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::invalid(what, "between 1 and 2^32 - 1", size));
            }
        }
        if self.d_model % 2 == 1 {
            return Err(Error::invalid("d_model", "even (half sines, half cosines)", self.d_model));
        }
        if !self.n_heads.is_multiple_of(self.key_heads()) {
            let expected = format!("a divisor of n_heads = {}", self.n_heads);
            return Err(Error::invalid("n_key_heads", expected, self.key_heads()));
        }
        if self.units.len() > self.n_layers {
            let expected = format!("at most n_layers = {} kinds", self.n_layers);
            return Err(Error::invalid("units", expected, self.units.len()));
        }
        self.attention.validate()?;
        if !self.logit_scale.is_finite() {
            return Err(Error::invalid("logit_scale", "finite", self.logit_scale));
        }
        if !(self.position_lambda.is_finite() && self.position_lambda >= 1.0) {
            return Err(Error::invalid("position_lambda", "finite and at least 1", self.position_lambda));
        }
        if !(self.commit_weight.is_finite() && self.commit_weight >= 0.0) {
            return Err(Error::invalid("commit_weight", "finite and not negative", self.commit_weight));
        }
        if !(0.0..=1.0).contains(&self.codebook_decay) {
            return Err(Error::invalid("codebook_decay", "between 0 and 1", self.codebook_decay));
        }
        self.estimator.validate()?;
        self.validate_learning()?;
        self.dropout.validate()?;
        if let LearningConfig::Linear { d_basis, .. } = self.learning {
            if d_basis == 0 || d_basis > u32::MAX as usize {
                return Err(Error::invalid("d_basis", "between 1 and 2^32 - 1", d_basis));
            }
            checked_len("bases", &[self.n_layers, self.n_heads, self.n_codes, d_basis])?;
            checked_len("codebook weights", &[self.n_layers, self.n_heads, self.d_k, d_basis])?;
        }
        let widest = self.d_k.max(self.d_v);
        let width = self.feed_forward.map_or(0, |feed_forward| feed_forward.width);
        checked_len("feed_forward", &[self.n_layers, self.d_model, width])?;
        checked_len("embedding", &[self.vocab_size, self.d_model])?;
        checked_len("projections", &[self.n_layers, self.d_model, self.n_heads, widest])?;
        checked_len("codebooks", &[self.n_layers, self.n_heads, self.n_codes, widest])?;
        checked_len("windows", &[self.n_layers, self.n_heads, self.attention.window + 1, widest])?;
        Ok(())
    }

    /// What the attention of a unit is.
    pub fn unit(&self, unit: usize) -> UnitKind {
        unit.checked_rem(self.units.len()).map_or(UnitKind::Vq, |i| self.units[i])
    }

    /// The units that have a codebook.
    pub fn codebook_units(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.n_layers).filter(|&unit| self.unit(unit).has_codebook())
    }

    /// Hk: heads of keys and values.
    pub fn key_heads(&self) -> usize {
        self.n_key_heads.unwrap_or(self.n_heads)
    }

    /// K^(-1/4): the factor on queries, keys and relative biases.
    pub(crate) fn key_scale(&self) -> f64 {
        (self.d_k as f64).powf(-0.25)
    }
}
