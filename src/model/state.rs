//! What a model carries from one piece of its sequences to the next.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use super::{ModelConfig, UnitKind};
use crate::attention::AttentionState;
use crate::attention::quadratic::KeyValues;
use crate::error::{check_memory, check_shape};
use crate::{Error, Scalar};

/// The attention states of one unit, by sequence and key head.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum UnitState<T> {
    /// Of attention over quantized keys [B, Hk]: constant in length.
    Quantized(Array2<AttentionState<T>>),
    /// Of exact quadratic attention [B, Hk]: all keys and values.
    Quadratic(Array2<KeyValues<T>>),
}

impl<T> From<Array2<AttentionState<T>>> for UnitState<T> {
    fn from(states: Array2<AttentionState<T>>) -> Self {
        UnitState::Quantized(states)
    }
}

impl<T> From<Array2<KeyValues<T>>> for UnitState<T> {
    fn from(states: Array2<KeyValues<T>>) -> Self {
        UnitState::Quadratic(states)
    }
}

impl<T: Scalar> UnitState<T> {
    /// The states [B, Hk] of attention over quantized keys, if it is that.
    pub fn quantized(&self) -> Option<ArrayView2<'_, AttentionState<T>>> {
        match self {
            UnitState::Quantized(states) => Some(states.view()),
            UnitState::Quadratic(_) => None,
        }
    }

    /// The states [B, Hk] of exact attention, if it is that.
    pub fn quadratic(&self) -> Option<ArrayView2<'_, KeyValues<T>>> {
        match self {
            UnitState::Quadratic(states) => Some(states.view()),
            UnitState::Quantized(_) => None,
        }
    }

    /// [B, Hk].
    pub fn dim(&self) -> (usize, usize) {
        match self {
            UnitState::Quantized(states) => states.dim(),
            UnitState::Quadratic(states) => states.dim(),
        }
    }

    /// The states of one sequence, as those of a batch of one.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn of_sequence(&self, sequence: usize) -> Result<Self, Error> {
        let batch = self.dim().0;
        if sequence >= batch {
            let got = sequence as u64;
            return Err(Error::OutOfRange { what: "sequence", index: vec![], got, limit: batch });
        }
        Ok(self.rows(sequence..sequence + 1))
    }

    /// The states of these sequences.
    pub(crate) fn rows(&self, sequences: Range<usize>) -> Self {
        let rows = s![sequences, ..];
        match self {
            UnitState::Quantized(states) => UnitState::Quantized(states.slice(rows).to_owned()),
            UnitState::Quadratic(states) => UnitState::Quadratic(states.slice(rows).to_owned()),
        }
    }

    /// The states of all sequences of batches that one unit has made, at least one.
    pub(crate) fn join<'s>(parts: impl Iterator<Item = &'s Self>) -> Self {
        let one_kind = "states of one unit, with one number of heads";
        let (mut quantized, mut quadratic) = (vec![], vec![]);
        for part in parts {
            match part {
                UnitState::Quantized(states) => quantized.push(states.view()),
                UnitState::Quadratic(states) => quadratic.push(states.view()),
            }
        }
        if quadratic.is_empty() {
            concatenate(Axis(0), &quantized).map(UnitState::Quantized).expect(one_kind)
        } else {
            concatenate(Axis(0), &quadratic).map(UnitState::Quadratic).expect(one_kind)
        }
    }

    fn positions(&self) -> Vec<u64> {
        match self {
            UnitState::Quantized(states) => states.iter().map(AttentionState::position).collect(),
            UnitState::Quadratic(states) => states.iter().map(KeyValues::position).collect(),
        }
    }

    fn size_in_bytes(&self) -> usize {
        match self {
            UnitState::Quantized(states) => states.iter().map(AttentionState::size_in_bytes).sum(),
            UnitState::Quadratic(states) => states.iter().map(KeyValues::size_in_bytes).sum(),
        }
    }
}

/// The attention states of all units and key heads for a batch of sequences: constant in length, but for units of exact
/// quadratic attention.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelState<T> {
    /// One per unit.
    pub(crate) layers: Vec<UnitState<T>>,
}

impl<T: Scalar> ModelState<T> {
    /// A state from its parts, one per unit.
    ///
    /// # Errors
    /// [`Error::Empty`] without units or states, [`Error::Invalid`] if they are not at one position.
    pub fn from_parts(layers: Vec<UnitState<T>>) -> Result<Self, Error> {
        let all = || layers.iter().flat_map(|states| states.positions());
        if layers.iter().any(|states| states.positions().is_empty()) || layers.is_empty() {
            return Err(Error::Empty { what: "states" });
        }
        let position = all().next().expect("not empty");
        match all().find(|&other| other != position) {
            Some(other) => Err(Error::invalid("position of a state", position.to_string(), other)),
            None => Ok(ModelState { layers }),
        }
    }

    /// One per unit.
    pub fn layers(&self) -> &[UnitState<T>] {
        &self.layers
    }

    /// Tokens seen so far, per sequence.
    pub fn position(&self) -> u64 {
        match &self.layers[0] {
            UnitState::Quantized(states) => states[[0, 0]].position(),
            UnitState::Quadratic(states) => states[[0, 0]].position(),
        }
    }

    /// B.
    pub fn batch(&self) -> usize {
        self.layers[0].dim().0
    }

    /// Bytes of memory: the same at any position, unless a unit's attention is quadratic.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().map(UnitState::size_in_bytes).sum()
    }

    /// The state of `n` sequences that are all what the first one here is.
    pub(crate) fn repeat_first(&self, n: usize) -> Result<Self, Error> {
        let first: Vec<_> = self.layers.iter().map(|states| states.rows(0..1)).collect();
        check_memory::<u8>("states", &[n, first.iter().map(UnitState::size_in_bytes).sum()])?;
        let repeat = |states| UnitState::join(std::iter::repeat_n(states, n));
        Ok(ModelState { layers: first.iter().map(repeat).collect() })
    }

    /// Checks that this state was made for such a model and batch.
    pub(super) fn check(&self, config: &ModelConfig, batch: usize) -> Result<(), Error> {
        check_shape("state", &[config.n_layers], &[self.layers.len()])?;
        for (unit, states) in self.layers.iter().enumerate() {
            let (b, n_key_heads) = states.dim();
            check_shape("state", &[batch, config.key_heads()], &[b, n_key_heads])?;
            let ModelConfig { n_codes, d_k, d_v, .. } = *config;
            match (states, config.unit(unit)) {
                (UnitState::Quantized(states), UnitKind::Vq | UnitKind::Window) => {
                    let window = config.attention.window;
                    states.iter().try_for_each(|state| state.check(n_codes, d_k, d_v, window))?;
                }
                (UnitState::Quadratic(states), UnitKind::Quadratic) => {
                    for state in states {
                        check_shape("state.k", &[state.keys().nrows(), d_k], state.keys().shape())?;
                        check_shape("state.v", &[state.values().nrows(), d_v], state.values().shape())?;
                    }
                }
                (_, kind) => {
                    let expected = format!("of {kind:?} attention in unit {unit}");
                    return Err(Error::invalid("state", expected, "that of another kind"));
                }
            }
        }
        Ok(())
    }
}
