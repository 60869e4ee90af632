//! What a model carries from one piece of its sequences to the next.

use ndarray::Array2;

use super::ModelConfig;
use crate::attention::AttentionState;
use crate::error::check_shape;
use crate::{Error, Scalar};

/// The attention states of all units and key heads for a batch of sequences: constant in length.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelState<T> {
    /// One [B, Hk] per unit.
    pub(crate) layers: Vec<Array2<AttentionState<T>>>,
}

impl<T: Scalar> ModelState<T> {
    /// A state from its parts: one [B, Hk] per unit.
    ///
    /// # Errors
    /// [`Error::Empty`] without units or states, [`Error::Invalid`] if they are not at one position.
    pub fn from_parts(layers: Vec<Array2<AttentionState<T>>>) -> Result<Self, Error> {
        let first = layers.first().and_then(|states| states.first());
        let position = first.ok_or(Error::Empty { what: "states" })?.position();
        let all = || layers.iter().flat_map(|states| states.iter());
        match all().find(|state| state.position() != position) {
            Some(other) => Err(Error::invalid("position of a state", position.to_string(), other.position())),
            None => Ok(ModelState { layers }),
        }
    }

    /// One [B, Hk] per unit.
    pub fn layers(&self) -> &[Array2<AttentionState<T>>] {
        &self.layers
    }

    /// Tokens seen so far, per sequence.
    pub fn position(&self) -> u64 {
        self.layers[0][[0, 0]].position()
    }

    /// B.
    pub fn batch(&self) -> usize {
        self.layers[0].nrows()
    }

    /// Bytes of memory, the same at any position.
    pub fn size_in_bytes(&self) -> usize {
        let states = self.layers.iter().flat_map(|states| states.iter());
        states.map(AttentionState::size_in_bytes).sum()
    }

    /// Checks that this state was made for such a model and batch.
    pub(super) fn check(&self, config: &ModelConfig, batch: usize) -> Result<(), Error> {
        check_shape("state", &[config.n_layers], &[self.layers.len()])?;
        for states in &self.layers {
            check_shape("state", &[batch, config.key_heads()], states.shape())?;
            for state in states {
                state.check(config.n_codes, config.d_k, config.d_v, config.attention.window)?;
            }
        }
        Ok(())
    }
}
