//! How much text some tokens are, and losses in units that do not depend on the tokenizer.

use std::f64::consts::LN_2;

/// Tokens, and the text that they stand for.
///
/// ```text
/// (1)  bits per byte   = nats per token * tokens / bytes / ln 2
/// (2)  word perplexity = exp(nats per token * tokens / words)
/// ```
///
/// Ends of documents are tokens without bytes: they cost nats, and nothing is divided by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextSize {
    /// Ends of documents included.
    pub tokens: u64,
    /// Of the text itself.
    pub bytes: u64,
    /// Words separated by ASCII white space; each counts where it begins.
    pub words: u64,
}

impl TextSize {
    /// (1); NaN without any byte.
    pub fn bits_per_byte(&self, nats_per_token: f64) -> f64 {
        nats_per_token * self.tokens as f64 / self.bytes as f64 / LN_2
    }

    /// (2); NaN without any word.
    pub fn word_perplexity(&self, nats_per_token: f64) -> f64 {
        (nats_per_token * self.tokens as f64 / self.words as f64).exp()
    }
}
