//! What is dropped in training, and which masks: none of them is kept, all are drawn again in backward.
//!
//! | | purpose | drawn for | mask |
//! |---|---|---|---|
//! | embeddings, after positions | 0 | an update | [B T, D] |
//! | attention branches | 1 | an update and a unit | [B T, D] |
//! | feed-forward branches | 2 | an update and a unit | [B T, D] |
//! | sinusoids of distances | 3 | a sequence and a unit | [M+1, D], for all sequences and heads |
//! | whole units: their branches | 4 | a sequence and a unit | `[B]` |
//!
//! The last two hold for a whole sequence, however many updates it is cut into. Evaluation drops nothing.
//!
//! See [`crate::ops::dropout`] for what a mask is.

use std::borrow::Cow;

use ndarray::{Array2, Axis};
use serde::{Deserialize, Serialize};

use crate::ops::dropout::{self, Stream};
use crate::{Error, Scalar};

/// Rates of dropout, each from 0 to below 1; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dropout {
    /// Of the numbers of embeddings, with positions if they are added.
    pub embedding: f64,
    /// Of the numbers of each branch before it joins the residual stream.
    pub residual: f64,
    /// Of the numbers of the sinusoids of distances.
    pub sinusoid: f64,
    /// Of whole units: a sequence then passes by their branches.
    pub layer: f64,
}

/// Which masks training draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutSeed {
    /// Of the run.
    pub seed: u64,
    /// The update, for masks that change with each.
    pub step: u64,
    /// The update at which the batch's sequences began, for masks that hold as long as they last.
    pub sequence: u64,
    /// The sequence of the whole batch that is the first one here: 0, but where a batch is taken in parts, on one machine or
    /// on several. Each part then gets its rows of the masks.
    #[serde(default)]
    pub first: u64,
}

impl Dropout {
    /// Checks the rates.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let Dropout { embedding, residual, sinusoid, layer } = *self;
        dropout::check_rate("dropout.embedding", embedding)?;
        dropout::check_rate("dropout.residual", residual)?;
        dropout::check_rate("dropout.sinusoid", sinusoid)?;
        dropout::check_rate("dropout.layer", layer)
    }
}

/// A branch of a unit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Branch {
    Attention = 1,
    FeedForward = 2,
}

const EMBEDDING: u64 = 0;
const SINUSOIDS: u64 = 3;
const LAYER: u64 = 4;

/// The masks of one batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Masks {
    /// None in evaluation.
    drawn: Option<(Dropout, DropoutSeed)>,
    /// B.
    batch: usize,
}

impl Masks {
    pub fn new(rates: Dropout, seed: Option<DropoutSeed>, batch: usize) -> Self {
        let drawn = seed.filter(|_| rates != Dropout::default()).map(|seed| (rates, seed));
        Masks { drawn, batch }
    }

    /// Whether anything is dropped.
    pub fn drops(&self) -> bool {
        self.drawn.is_some()
    }

    /// Drops of embeddings [B T, D], or of their gradient.
    pub fn embedding<T: Scalar>(&self, x: &mut Array2<T>) -> Result<(), Error> {
        let Some((rates, DropoutSeed { seed, step, .. })) = self.drawn else { return Ok(()) };
        let stream = Stream { seed, purpose: EMBEDDING, unit: 0, step };
        dropout::apply_from_row(self.first_row(x), x, rates.embedding, stream)
    }

    /// Drops of a branch [B T, D], or of its gradient.
    pub fn branch<T: Scalar>(&self, branch: Branch, unit: usize, x: &mut Array2<T>) -> Result<(), Error> {
        let Some((rates, DropoutSeed { seed, step, sequence, first })) = self.drawn else { return Ok(()) };
        let unit = unit as u64;
        let stream = Stream { seed, purpose: branch as u64, unit, step };
        dropout::apply_from_row(self.first_row(x), x, rates.residual, stream)?;
        if rates.layer > 0.0 {
            let stream = Stream { seed, purpose: LAYER, unit, step: sequence };
            let factors = dropout::factors::<T>(first, self.batch, rates.layer, stream)?;
            let len = x.nrows() / self.batch.max(1);
            for (mut rows, factor) in x.axis_chunks_iter_mut(Axis(0), len.max(1)).zip(factors) {
                rows *= factor;
            }
        }
        Ok(())
    }

    /// The row of the whole batch that is the first of `x` [B T, D].
    fn first_row<T>(&self, x: &Array2<T>) -> u64 {
        let first = self.drawn.map_or(0, |(_, seed)| seed.first);
        first.saturating_mul((x.nrows() / self.batch.max(1)) as u64)
    }

    /// The sinusoids of distances as a unit sees them.
    pub fn sinusoids<'a, T: Scalar>(
        &self,
        unit: usize,
        distances: &'a Array2<T>,
    ) -> Result<Cow<'a, Array2<T>>, Error> {
        match self.drawn {
            Some((Dropout { sinusoid, .. }, DropoutSeed { seed, sequence, .. })) if sinusoid > 0.0 => {
                let mut dropped = distances.clone();
                let stream = Stream { seed, purpose: SINUSOIDS, unit: unit as u64, step: sequence };
                dropout::apply(&mut dropped, sinusoid, stream)?;
                Ok(Cow::Owned(dropped))
            }
            _ => Ok(Cow::Borrowed(distances)),
        }
    }
}
