//! How large a model of a configuration is, without making it.

use super::{FeedForwardKind, LearningConfig, ModelConfig};

/// The product of sizes. Those of an invalid configuration may have none: it is then as large as can be.
fn size(sizes: &[usize]) -> u128 {
    sizes.iter().fold(1, |product: u128, &n| product.saturating_mul(n as u128))
}

fn sum(parts: impl IntoIterator<Item = u128>) -> u128 {
    parts.into_iter().fold(0, u128::saturating_add)
}

impl ModelConfig {
    /// Numbers that the optimizer moves in such a model: without codebooks that learn otherwise.
    pub fn n_parameters(&self) -> u128 {
        let (d, vocab) = (self.d_model, self.vocab_size);
        sum([
            size(&[vocab, d]),
            u128::from(self.absolute_positions),
            self.n_unit_parameters().saturating_mul(self.n_layers as u128),
            if self.final_norm { size(&[2, d]) } else { 0 },
            if self.tied_embedding { 0 } else { size(&[d, vocab]) },
            size(&[vocab]),
        ])
    }

    /// Those of one unit.
    fn n_unit_parameters(&self) -> u128 {
        let (d, h, key_heads, k, v) = (self.d_model, self.n_heads, self.key_heads(), self.d_k, self.d_v);
        let feed_forward = self.feed_forward.map_or(0, |feed_forward| {
            let matrices = if feed_forward.kind == FeedForwardKind::SwiGlu { 3 } else { 2 };
            sum([size(&[2, d]), size(&[matrices, d, feed_forward.width])])
        });
        let codebook = match self.learning {
            LearningConfig::Ema { .. } | LearningConfig::Frozen => 0,
            LearningConfig::Gradient(_) => size(&[key_heads, self.n_codes, k]),
            LearningConfig::Linear { d_basis, learned_basis, bias, .. } => sum([
                size(&[key_heads, k, d_basis]),
                if learned_basis { size(&[key_heads, self.n_codes, d_basis]) } else { 0 },
                if bias { size(&[key_heads, k]) } else { 0 },
            ]),
        };
        sum([
            size(&[2, d]),
            size(&[d, h, k]),
            size(&[2, d, key_heads, k]),
            size(&[d, key_heads, v]),
            size(&[if self.gate { 2 } else { 1 }, d, h, v]),
            size(&[2, h, k]),
            feed_forward,
            codebook,
        ])
    }
}
