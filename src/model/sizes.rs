//! How large a model of a configuration is, without making it.

use super::{FeedForwardKind, LearningConfig, ModelConfig, UnitKind};

/// The product of sizes. Those of an invalid configuration may have none: it is then as large as can be.
pub(super) fn size(sizes: &[usize]) -> u128 {
    sizes.iter().fold(1, |product: u128, &n| product.saturating_mul(n as u128))
}

pub(super) fn sum(parts: impl IntoIterator<Item = u128>) -> u128 {
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
            self.n_codebook_parameters().saturating_mul(self.n_codebooks()),
            if self.final_norm { size(&[2, d]) } else { 0 },
            if self.tied_embedding { 0 } else { size(&[d, vocab]) },
            size(&[vocab]),
        ])
    }

    /// Bytes that a state of `batch` sequences holds after `position` tokens, its numbers in so many bytes each (4 in `f32`):
    /// [`ModelState::size_in_bytes`](super::ModelState::size_in_bytes), but for room that units of exact attention have made
    /// for tokens to come.
    pub fn state_bytes(&self, batch: usize, position: u64, bytes_per_number: usize) -> u128 {
        let of_unit = |kind| match kind {
            UnitKind::Quadratic => {
                let numbers = u128::from(position).saturating_mul(self.key_and_value());
                sum([numbers.saturating_mul(bytes_per_number as u128), size(&[3, size_of::<usize>()])])
            }
            UnitKind::Vq | UnitKind::Window => {
                let (s, m) = (self.n_codes, self.attention.window);
                let numbers = sum([size(&[2, s, self.d_v]), size(&[m, self.d_k]), size(&[m, self.d_v])]);
                // Counts, codes, the position.
                sum([numbers.saturating_mul(bytes_per_number as u128), size(&[8, s]), size(&[4, m]), 8])
            }
        };
        self.sum_of_units(of_unit).saturating_mul(size(&[batch, self.key_heads()]))
    }

    /// Multiplications and additions in the products of one token that is decoded after `position` others: two per weight of
    /// every matrix, and attention's. Norms, activations and exponentials are not among them; what
    /// [`Prepared`](super::Prepared) computes once is not either.
    ///
    /// Per unit, with m = min(M, position) and for every query head: over quantized keys `(S + m) K` for scores, `(M+1) K` for
    /// biases, `(S + m + 1) V` for values (without a cache: no S V), and per key head `S K` to find its code; for exact attention
    /// `(position + 1) (K + V)` and the biases.
    pub fn operations_per_token(&self, position: u64) -> u128 {
        let (h, key_heads, k, v) = (self.n_heads, self.key_heads(), self.d_k, self.d_v);
        let (s, window) = (self.n_codes as u128, self.attention.window as u128);
        let held = window.min(position.into());
        let biases = (window + 1).saturating_mul(k as u128);
        let of_unit = |kind| {
            if kind == UnitKind::Quadratic {
                let pairs = (u128::from(position) + 1).saturating_mul(self.key_and_value());
                return pairs.saturating_add(biases).saturating_mul(h as u128);
            }
            let cached = if self.attention.cache && kind == UnitKind::Vq { s } else { 0 };
            let scores = (s + held).saturating_mul(k as u128);
            let per_query = sum([scores, biases, (cached + held + 1).saturating_mul(v as u128)]);
            per_query.saturating_mul(h as u128).saturating_add(size(&[key_heads, self.n_codes, k]))
        };
        let matrices = self.n_unit_matrices().saturating_mul(self.n_layers as u128);
        let logits = size(&[self.d_model, self.vocab_size]);
        sum([self.sum_of_units(of_unit), matrices, logits]).saturating_mul(2)
    }

    /// K + V.
    fn key_and_value(&self) -> u128 {
        self.d_k as u128 + self.d_v as u128
    }

    /// The sum of `of_unit` over all units, each of the kinds taken once: there may be any number of units.
    fn sum_of_units(&self, of_unit: impl Fn(UnitKind) -> u128) -> u128 {
        let period = self.units.len().clamp(1, self.n_layers.max(1));
        sum((0..period.min(self.n_layers)).map(|first| {
            let n_units = (self.n_layers - first).div_ceil(period);
            of_unit(self.unit(first)).saturating_mul(n_units as u128)
        }))
    }

    /// Units that have a codebook.
    fn n_codebooks(&self) -> u128 {
        self.sum_of_units(|kind| kind.has_codebook().into())
    }

    /// Weights of one unit's matrices that each token is multiplied with.
    pub(super) fn n_unit_matrices(&self) -> u128 {
        let (d, h, key_heads, k, v) = (self.d_model, self.n_heads, self.key_heads(), self.d_k, self.d_v);
        let feed_forward = self.feed_forward.map_or(0, |feed_forward| {
            let matrices = if feed_forward.kind == FeedForwardKind::SwiGlu { 3 } else { 2 };
            size(&[matrices, d, feed_forward.width])
        });
        sum([
            size(&[d, h, k]),
            size(&[d, key_heads, k]),
            size(&[d, key_heads, v]),
            size(&[if self.gate { 2 } else { 1 }, d, h, v]),
            feed_forward,
        ])
    }

    /// Those of one unit, but for its codebook.
    fn n_unit_parameters(&self) -> u128 {
        let (d, h, key_heads, k) = (self.d_model, self.n_heads, self.key_heads(), self.d_k);
        let norms = if self.feed_forward.is_some() { 2 } else { 1 };
        sum([
            self.n_unit_matrices(),
            size(&[norms, 2, d]),
            // Of relative positions: no token is multiplied with it.
            size(&[d, key_heads, k]),
            size(&[2, h, k]),
        ])
    }

    /// Those of one codebook.
    fn n_codebook_parameters(&self) -> u128 {
        let (key_heads, k) = (self.key_heads(), self.d_k);
        match self.learning {
            LearningConfig::Ema { .. } | LearningConfig::Frozen => 0,
            LearningConfig::Gradient(_) => size(&[key_heads, self.n_codes, k]),
            LearningConfig::Linear { d_basis, learned_basis, bias, .. } => sum([
                size(&[key_heads, k, d_basis]),
                if learned_basis { size(&[key_heads, self.n_codes, d_basis]) } else { 0 },
                if bias { size(&[key_heads, k]) } else { 0 },
            ]),
        }
    }
}
