//! The losses of a language model and their gradients.
//!
//! ```text
//! (1)  loss  = mean over positions that count of -log softmax(logits)[target]
//! (2)  total = loss + (commit_weight + codebook_weight) * sum over units of their commitment loss
//! ```
//!
//! The codebook loss, of codewords that learn by gradient, is the same number as the commitment loss, and has another gradient:
//! one moves codewords to keys, the other keys to codewords, each by its own weight. `codebook_weight` is 0 for other codebooks.

use ndarray::ArrayView2;

use super::transformer::{check_tokens, flat};
use super::{DropoutSeed, LayerReport, ModelState, Parameters, Transformer};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::cross_entropy;
use crate::{Error, Scalar};

/// The losses of a batch, their gradients, and what every unit reports.
#[derive(Debug, Clone)]
pub struct LossAndGradients<T> {
    /// The mean of `-log softmax(logits)[target]` over the positions that count, nats per token.
    pub loss: f64,
    /// Commitment loss, summed over units, without its weight.
    pub commit_loss: f64,
    /// `loss + (commit_weight + codebook_weight) commit_loss`, the latter weight for codebooks that learn by gradient.
    pub total: f64,
    /// Of `total`.
    pub gradients: Parameters<T>,
    /// One per unit.
    pub layers: Vec<LayerReport<T>>,
}

impl<T: Scalar> Transformer<T> {
    /// Losses of a batch and all gradients; `state` moves from before the piece to after it.
    ///
    /// Codebooks do not move: see [`update_codebooks`](Self::update_codebooks).
    ///
    /// # Shapes
    /// `tokens`, `targets` and `mask` [B, T]; a position counts where the mask is true, without one all do.
    ///
    /// # Errors
    /// Shapes that do not fit, tokens or targets outside the vocabulary, no token at all. The state is then as it was.
    pub fn loss_and_gradients(
        &self,
        tokens: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
    ) -> Result<LossAndGradients<T>, Error> {
        self.loss_and_gradients_dropping(tokens, targets, mask, state, None)
    }

    /// [`loss_and_gradients`](Self::loss_and_gradients) with dropout as the configuration says, if there is a seed.
    ///
    /// # Errors
    /// As there.
    pub fn loss_and_gradients_dropping(
        &self,
        tokens: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
        dropout: Option<DropoutSeed>,
    ) -> Result<LossAndGradients<T>, Error> {
        compiled_here!(
            T,
            Transformer::<T>::loss_and_gradients_dropping_here,
            fn(
                &Transformer<T>,
                ArrayView2<'_, u32>,
                ArrayView2<'_, u32>,
                Option<ArrayView2<'_, bool>>,
                &mut ModelState<T>,
                Option<DropoutSeed>,
            ) -> Result<LossAndGradients<T>, Error>
        )(self, tokens, targets, mask, state, dropout)
    }

    fn loss_and_gradients_dropping_here(
        &self,
        tokens: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
        dropout: Option<DropoutSeed>,
    ) -> Result<LossAndGradients<T>, Error> {
        if tokens.is_empty() {
            return Err(Error::Empty { what: "tokens" });
        }
        check_shape("targets", tokens.shape(), targets.shape())?;
        check_tokens("targets", targets, mask.as_ref(), self.config().vocab_size)?;
        let (logits, layers, saved) = self.forward_dropping(tokens, mask, state, dropout)?;
        let (b, t, vocab) = logits.dim();
        let logits = logits.into_shape_with_order((b * t, vocab)).expect("contiguous");
        let counted = mask.map(|mask| flat(&mask.to_owned()));
        let counted = counted.as_ref().map(|mask| mask.view());
        let (loss, d_logits) =
            cross_entropy::forward_backward(logits.view(), flat(&targets.to_owned()).view(), counted)?; // (1)
        drop(logits);
        let mut gradients = self.zero_gradients();
        let d_logits = d_logits.into_shape_with_order((b, t, vocab)).expect("contiguous");
        self.backward(saved, d_logits, &mut gradients)?;
        let commit_loss = layers.iter().map(|layer| layer.commit_loss).sum();
        let codebook_weight = self.config().learning.gradient().map_or(0.0, |by| by.codebook_weight);
        let total = loss + (self.config().commit_weight + codebook_weight) * commit_loss; // (2)
        Ok(LossAndGradients { loss, commit_loss, total, gradients, layers })
    }
}
