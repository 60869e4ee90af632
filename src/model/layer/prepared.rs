//! What a unit derives from its parameters and codebook alone: made once, for any number of pieces.

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView2};

use crate::attention::HeadColumns;
use crate::codebook::Learning;
use crate::codebook::packed::Table;
use crate::model::ModelConfig;
use crate::model::parameters::{FeedForwardParameters, LayerParameters};
use crate::ops::linear;
use crate::ops::matmul::PackedWeights;
use crate::{Error, Scalar};

/// Biases and codewords of a unit, and its weights once more if it is to decode.
#[derive(Debug, Clone)]
pub(in crate::model) struct Prepared<T> {
    /// u K^(-1/4) [H, K].
    pub(super) content: Array2<T>,
    /// w K^(-1/4) [H, K].
    pub(super) position: Array2<T>,
    /// (3) [Hk, M+1, K].
    pub(super) relative: Array3<T>,
    /// None in a unit without a codebook.
    table: Option<Table<T>>,
    /// To infer with.
    pub(super) packed: Option<Arc<Packed<T>>>,
}

/// The weights of a unit in the order in which products with few tokens read them.
#[derive(Debug)]
pub(super) struct Packed<T> {
    /// None in a unit without a codebook.
    pub columns: Option<Arc<[HeadColumns<T>]>>,
    /// Wq, Wk, Wv and Wg, if there is one, side by side.
    pub input: PackedWeights<T>,
    pub output: PackedWeights<T>,
    /// Of the feed-forward branch: its one or two input matrices side by side, and its output matrix.
    pub feed_forward: Option<(PackedWeights<T>, PackedWeights<T>)>,
}

/// Up to so many tokens, products with packed weights are faster.
pub(in crate::model) const FEW_TOKENS: usize = 16;

impl<T: Scalar> Prepared<T> {
    /// `distances` are the sinusoids of 0, 1, ..., M [M+1, D]; `learning` is that of the unit's codebook, if it has one.
    pub fn new(
        config: &ModelConfig,
        parameters: &LayerParameters<T>,
        learning: Option<&Learning<T>>,
        distances: ArrayView2<'_, T>,
    ) -> Result<Self, Error> {
        let scale = T::from_f64(config.key_scale());
        let relative = linear::forward(distances, parameters.w_relative.view(), None)? * scale;
        let shape = (distances.nrows(), config.key_heads(), config.d_k);
        let relative = relative.into_shape_with_order(shape).expect("Hk K columns");
        Ok(Prepared {
            content: &parameters.content_bias * scale,
            position: &parameters.position_bias * scale,
            relative: relative.permuted_axes([1, 0, 2]),
            table: learning.map(|learning| Table::new(learning.codewords(&parameters.codebook))),
            packed: None,
        })
    }

    /// The same with a copy of the weights to infer with.
    pub fn pack(self, parameters: &LayerParameters<T>) -> Self {
        let LayerParameters { w_q, w_k, w_v, w_gate, w_out, feed_forward, .. } = parameters;
        let input: Vec<_> = [w_q, w_k, w_v].into_iter().chain(w_gate).map(|w| w.view()).collect();
        let feed_forward =
            feed_forward.as_ref().map(|FeedForwardParameters { w_in, w_gate, w_out, .. }| {
                let input: Vec<_> = [w_in].into_iter().chain(w_gate).map(|w| w.view()).collect();
                (PackedWeights::new(&input), PackedWeights::new(&[w_out.view()]))
            });
        let packed = Packed {
            columns: self.table.as_ref().map(|table| HeadColumns::all(table, Some(self.relative.view()))),
            input: PackedWeights::new(&input),
            output: PackedWeights::new(&[w_out.view()]),
            feed_forward,
        };
        Prepared { packed: Some(Arc::new(packed)), ..self }
    }

    /// The codewords of a unit that has some.
    pub(super) fn table(&self) -> &Table<T> {
        self.table.as_ref().expect("only attention over quantized keys asks for codewords")
    }

    /// Packed weights, if there are and if they suit so many tokens.
    pub(super) fn packed_for(&self, rows: &Array2<T>) -> Option<&Packed<T>> {
        self.packed.as_deref().filter(|_| rows.nrows() <= FEW_TOKENS)
    }
}
