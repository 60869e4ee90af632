//! A model made ready to infer.

use std::sync::Arc;

use ndarray::{Array3, ArrayView2};

use super::layer::{self, FEW_TOKENS, PieceReport};
use super::{ModelState, Transformer};
use crate::ops::matmul::PackedWeights;
use crate::{Error, Scalar};

/// A model with everything computed that depends on its parameters alone: relative biases and codewords of every unit, and
/// all weights once more in the order in which decoding reads them.
///
/// For decoding, where that would cost more than the token itself.
///
/// ```
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::array;
///
/// let model = Transformer::new(ModelConfig { n_layers: 1, ..ModelConfig::default() }, 1)?;
/// let prepared = model.prepare()?;
/// let mut state = model.new_state(1)?;
/// for token in [116, 104, 101] {
///     let (logits, _) = prepared.push(array![[token]].view(), &mut state)?;
///     assert_eq!(logits.dim(), (1, 1, 256));
/// }
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Prepared<'m, T = f32> {
    model: &'m Transformer<T>,
    layers: Vec<layer::Prepared<T>>,
    /// W of the logits.
    output: Option<Arc<PackedWeights<T>>>,
}

impl<'m, T: Scalar> Prepared<'m, T> {
    /// Ready for one piece: without copies of the weights.
    pub(super) fn for_one_piece(model: &'m Transformer<T>) -> Result<Self, Error> {
        let distances = model.distances()?;
        let prepare = |unit| model.prepare_layer(unit, distances.view());
        let layers = (0..model.config().n_layers).map(prepare).collect::<Result<_, _>>()?;
        Ok(Prepared { model, layers, output: None })
    }

    pub(super) fn new(model: &'m Transformer<T>) -> Result<Self, Error> {
        let Prepared { layers, .. } = Self::for_one_piece(model)?;
        let layers = layers.into_iter().zip(&model.parameters().layers).map(|(layer, own)| layer.pack(own));
        let output = Some(Arc::new(PackedWeights::new(&[model.output()])));
        Ok(Prepared { model, layers: layers.collect(), output })
    }

    /// The model.
    pub fn model(&self) -> &'m Transformer<T> {
        self.model
    }

    /// Logits of a piece of any size `[B, T, vocab]`, and what every unit reports; `state` moves on.
    ///
    /// # Shapes
    /// `tokens` [B, T].
    ///
    /// # Errors
    /// Shapes that do not fit, tokens outside the vocabulary. The state is then as it was.
    pub fn push(
        &self,
        tokens: ArrayView2<'_, u32>,
        state: &mut ModelState<T>,
    ) -> Result<(Array3<T>, Vec<PieceReport>), Error> {
        self.model.check(tokens, state)?;
        let mut x = self.model.embed(tokens, state.position())?;
        let mut reports = vec![];
        for (unit, (prepared, states)) in self.layers.iter().zip(&mut state.layers).enumerate() {
            let (y, report) = self.model.layer(unit, prepared).push(x, states)?;
            x = y;
            reports.push(report);
        }
        let (normed, _) = self.model.normalize(&x)?;
        let logits = match &self.output {
            Some(output) if normed.nrows() <= FEW_TOKENS => {
                let logits = output.product(normed.view()) + &self.model.parameters().output_bias;
                self.model.scale_logits(logits, tokens.dim())
            }
            _ => self.model.logits(&normed, tokens.dim())?,
        };
        Ok((logits, reports))
    }
}
