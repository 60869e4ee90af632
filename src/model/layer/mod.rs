//! One unit: one or two pre-norm residual branches.
//!
//! ```text
//! (1)  y = x + drop(attention branch of x)              see `attention`, and `core` for the kinds of attention
//! (2)  y = y + drop(feed-forward branch of y)           see `feed_forward`; if the configuration has it
//! ```
//!
//! Rows are tokens, sequence after sequence: [B T, width]. Source: the gated unit of Transformer-VQ (Lingle, arXiv
//! 2309.16354), after GAU (Hua et al., arXiv 2202.10447).

use ndarray::{Array2, ArrayView2};

use super::buffers::Buffers;
use super::dropout::{Branch, Masks};
use super::parameters::LayerParameters;
use super::{ModelConfig, UnitState};
use crate::attention::VqAttention;
use crate::codebook::Learning;
use crate::ops::rows;
use crate::{Error, Scalar};

mod attention;
mod core;
pub(super) mod feed_forward;
mod prepared;
pub(super) mod projections;
mod report;

pub(super) use prepared::{FEW_TOKENS, Prepared};
pub use report::{LayerReport, PieceReport};

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub(super) struct Saved<T> {
    attention: attention::Saved<T>,
    feed_forward: Option<feed_forward::Saved<T>>,
}

/// A unit: its configuration, what it learned, and what follows from that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a, T> {
    /// Which of the model's units.
    pub unit: usize,
    pub config: &'a ModelConfig,
    /// As this unit computes it, if over quantized keys.
    pub attention: VqAttention,
    pub parameters: &'a LayerParameters<T>,
    /// Of its codebook, if it has one.
    pub learning: Option<&'a Learning<T>>,
    pub prepared: &'a Prepared<T>,
    pub buffers: &'a Buffers<T>,
}

impl<T: Scalar> Layer<'_, T> {
    /// The unit's output and what its attention reports. `x` [B T, D]; `states` [B, Hk] move on; `mask` [B, T].
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(
        &self,
        x: Array2<T>,
        states: &mut UnitState<T>,
        mask: Option<ArrayView2<'_, bool>>,
        masks: &Masks,
    ) -> Result<(Array2<T>, LayerReport<T>, Saved<T>), Error> {
        let (mut branch, report, attention) = self.attend(x, states, mask)?;
        masks.branch(Branch::Attention, self.unit, &mut branch)?;
        rows::add(attention.x.view(), &mut branch); // (1)
        let Some(parameters) = &self.parameters.feed_forward else {
            return Ok((branch, report, Saved { attention, feed_forward: None }));
        };
        let (mut branch, feed_forward) =
            feed_forward::forward(parameters, branch, Some(self.prepared), self.buffers)?;
        masks.branch(Branch::FeedForward, self.unit, &mut branch)?;
        rows::add(feed_forward.x.view(), &mut branch); // (2)
        Ok((branch, report, Saved { attention, feed_forward: Some(feed_forward) }))
    }

    /// As [`forward`](Self::forward), to infer only: pieces of any size, nothing is dropped, and nothing is saved.
    pub fn push(&self, x: Array2<T>, states: &mut UnitState<T>) -> Result<(Array2<T>, PieceReport), Error> {
        let (mut branch, report) = self.attend_to_infer(&x, states)?;
        rows::add(x.view(), &mut branch); // (1)
        self.buffers.give(x);
        let Some(parameters) = &self.parameters.feed_forward else {
            return Ok((branch, report));
        };
        let (mut branch, saved) =
            feed_forward::forward(parameters, branch, Some(self.prepared), self.buffers)?;
        rows::add(saved.x.view(), &mut branch); // (2)
        saved.give(self.buffers);
        Ok((branch, report))
    }

    /// Gradient of the unit's input; gradients of the parameters are added to `d`. `distances` as in [`Prepared::new`].
    #[allow(clippy::too_many_arguments)] // what forward took, and what it gave
    pub fn backward(
        &self,
        saved: Saved<T>,
        mut d_y: Array2<T>,
        mask: Option<ArrayView2<'_, bool>>,
        masks: &Masks,
        batch: usize,
        distances: ArrayView2<'_, T>,
        d: &mut LayerParameters<T>,
    ) -> Result<Array2<T>, Error> {
        let Saved { attention, feed_forward } = saved;
        let parameters = self.parameters.feed_forward.as_ref().zip(d.feed_forward.as_mut());
        if let (Some((p, d)), Some(saved)) = (parameters, feed_forward) {
            let dropped = self.gradient_of(Branch::FeedForward, &d_y, masks)?;
            let d_branch = dropped.as_ref().unwrap_or(&d_y);
            let d_x = feed_forward::backward(p, saved, d_branch, d, self.buffers)?;
            rows::add(d_x.view(), &mut d_y); // (2)
            self.buffers.give_all(dropped.into_iter().chain([d_x]));
        }
        let dropped = self.gradient_of(Branch::Attention, &d_y, masks)?;
        let d_branch = dropped.as_ref().unwrap_or(&d_y);
        let d_x = self.attend_backward(attention, d_branch, mask, batch, distances, d)?; // (1)
        rows::add(d_x.view(), &mut d_y);
        self.buffers.give_all(dropped.into_iter().chain([d_x]));
        Ok(d_y)
    }

    /// The gradient of a branch, of which something was dropped; none where that is `d_y` as it is.
    fn gradient_of(
        &self,
        branch: Branch,
        d_y: &Array2<T>,
        masks: &Masks,
    ) -> Result<Option<Array2<T>>, Error> {
        if !masks.drops() {
            return Ok(None);
        }
        let mut d_branch = self.buffers.copy(d_y);
        masks.branch(branch, self.unit, &mut d_branch)?;
        Ok(Some(d_branch))
    }
}

impl<T> Saved<T> {
    /// Gives back what no backward is to need.
    pub fn give(self, buffers: &Buffers<T>) {
        self.attention.give(buffers);
        self.feed_forward.into_iter().for_each(|saved| saved.give(buffers));
    }
}
