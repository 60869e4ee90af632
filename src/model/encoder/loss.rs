//! The losses of an encoder and their gradients.
//!
//! ```text
//! (1)  loss  = mean over logits that count of -log softmax(logits)[target]
//! (2)  total = loss + commit_weight * sum over units of their commitment loss
//! ```

use ndarray::{Array1, Array2, ArrayView2, Zip};

use super::{Encoder, EncoderHead, EncoderParameters, EncoderUnitReport};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::model::transformer::{check_tokens, flat};
use crate::ops::cross_entropy;
use crate::{Error, Scalar};

/// Sequences, and what should be said of them.
///
/// Logits are [B, L, C], so targets are [B, L]: with the head for masked tokens, one per position (L = T); with that for
/// classes, one per sequence (L = 1).
#[derive(Debug, Clone, Copy)]
pub struct EncoderBatch<'a> {
    /// [B, T].
    pub tokens: ArrayView2<'a, u32>,
    /// Where a token stands [B, T]; without it everywhere. The rest is padding.
    pub exists: Option<ArrayView2<'a, bool>>,
    /// Tokens or classes [B, L].
    pub targets: ArrayView2<'a, u32>,
    /// The targets that count [B, L]: those of masked tokens, say. Without it, all but those of padding. The others are not
    /// looked at.
    pub counted: Option<ArrayView2<'a, bool>>,
}

/// The losses of a batch, their gradients, and what every unit reports.
#[derive(Debug, Clone)]
pub struct EncoderLoss<T> {
    /// The mean of `-log softmax(logits)[target]`, nats per target that counts; 0 without any.
    pub loss: f64,
    /// Commitment loss, summed over units, without its weight.
    pub commit_loss: f64,
    /// `loss + commit_weight commit_loss`.
    pub total: f64,
    /// Of `total`.
    pub gradients: EncoderParameters<T>,
    /// One per unit.
    pub units: Vec<EncoderUnitReport<T>>,
}

impl<T: Scalar> Encoder<T> {
    /// Losses of a batch and all gradients.
    ///
    /// Codebooks do not move: see [`update_codebooks`](Self::update_codebooks).
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Shape`] and [`Error::OutOfRange`] for targets, [`Error::Invalid`] if padding is
    /// to count, [`Error::NotFinite`] for queries, keys or values.
    pub fn loss_and_gradients(&self, batch: &EncoderBatch<'_>) -> Result<EncoderLoss<T>, Error> {
        compiled_here!(
            T,
            Encoder::<T>::loss_and_gradients_here,
            fn(&Encoder<T>, &EncoderBatch<'_>) -> Result<EncoderLoss<T>, Error>
        )(self, batch)
    }

    fn loss_and_gradients_here(&self, batch: &EncoderBatch<'_>) -> Result<EncoderLoss<T>, Error> {
        let &EncoderBatch { tokens, exists, targets, counted } = batch;
        let exists = self.check(tokens, exists)?;
        let may_count = match self.config.head {
            EncoderHead::MaskedToken => exists.clone(),
            EncoderHead::Classes { .. } => Array2::from_elem((exists.nrows(), 1), true),
        };
        check_shape("targets", may_count.shape(), targets.shape())?;
        if let Some(counted) = &counted {
            check_shape("counted", may_count.shape(), counted.shape())?;
            if Zip::from(counted).and(&may_count).any(|&counted, &may| counted && !may) {
                return Err(Error::invalid("counted", "false where no token exists", true));
            }
        }
        let counted = counted.unwrap_or(may_count.view());
        check_tokens("targets", targets, Some(&counted), self.config.n_outputs())?;
        let counted: Array1<bool> = counted.iter().copied().collect();

        let forward = self.run(tokens, &exists)?;
        let (b, l, n_outputs) = forward.logits.dim();
        let logits = forward.logits.into_shape_with_order((b * l, n_outputs)).expect("contiguous");
        let targets = flat(&targets.to_owned());
        let (loss, d_logits) =
            cross_entropy::forward_backward(logits.view(), targets.view(), Some(counted.view()))?; // (1)
        drop((logits, forward.stream));
        let mut gradients = EncoderParameters::zeros(&self.config);
        self.backward(forward.saved, &exists, &d_logits, &mut gradients)?;
        let commit_loss = forward.units.iter().map(|unit| unit.commit_loss).sum();
        let total = loss + self.config.commit_weight * commit_loss; // (2)
        Ok(EncoderLoss { loss, commit_loss, total, gradients, units: forward.units })
    }
}
