//! What a unit reports besides its output.

use ndarray::{Array3, Array4};

use crate::Scalar;
use crate::codebook::CodeStats;

/// What a unit reports of a piece of training.
#[derive(Debug, Clone)]
pub struct LayerReport<T> {
    /// What the unit's codebook learns from; empty where it has none.
    pub stats: CodeStats<T>,
    /// Squared distance of keys to their codewords, summed over key heads and dimensions, mean over positions that count.
    pub commit_loss: f64,
    /// The share of attention that fell on cached codes, mean over queries and heads.
    pub cached_mass: f64,
    /// The keys [B, Hk, T, K] in training, if the configuration revives codes.
    pub keys: Option<Array4<T>>,
}

/// What a unit reports of a piece that it infers from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PieceReport {
    /// As in [`LayerReport`].
    pub commit_loss: f64,
    /// As in [`LayerReport`].
    pub cached_mass: f64,
}

/// The mean over queries and heads [B, H, T].
pub(super) fn mean_mass<T: Scalar>(cached_mass: &Array3<T>) -> f64 {
    cached_mass.iter().map(|mass| mass.as_f64()).sum::<f64>() / cached_mass.len().max(1) as f64
}
