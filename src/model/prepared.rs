//! A model made ready to infer.

use std::sync::Arc;

use ndarray::{Array3, ArrayView2};

use super::layer::{self, FEW_TOKENS, PieceReport};
use super::{ModelState, Transformer};
use crate::compiled::compiled_here;
use crate::ops::matmul::PackedWeights;
use crate::ops::threads::in_pool;
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
        let layers =
            compiled_here!(T, layers::<T>, fn(&Transformer<T>) -> Result<Vec<layer::Prepared<T>>, Error>)(
                model,
            )?;
        Ok(Prepared { model, layers, output: None })
    }

    pub(super) fn new(model: &'m Transformer<T>) -> Result<Self, Error> {
        let (layers, output) = compiled_here!(
            T,
            packed::<T>,
            fn(&Transformer<T>) -> Result<(Vec<layer::Prepared<T>>, PackedWeights<T>), Error>
        )(model)?;
        Ok(Prepared { model, layers, output: Some(Arc::new(output)) })
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
        let mut pass = || {
            compiled_here!(
                T,
                |model, tokens, state| model.push_here(tokens, state),
                fn(
                    &Prepared<'_, T>,
                    ArrayView2<'_, u32>,
                    &mut ModelState<T>,
                ) -> Result<(Array3<T>, Vec<PieceReport>), Error>
            )(self, tokens, state)
        };
        if tokens.len() <= FEW_TOKENS { in_pool(pass) } else { pass() }
    }

    fn push_here(
        &self,
        tokens: ArrayView2<'_, u32>,
        state: &mut ModelState<T>,
    ) -> Result<(Array3<T>, Vec<PieceReport>), Error> {
        self.model.check(tokens, state)?;
        self.model.buffers.begin_pass();
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
        self.model.buffers.give_all([x, normed]);
        Ok((logits, reports))
    }
}

/// What follows from the parameters of every unit.
fn layers<T: Scalar>(model: &Transformer<T>) -> Result<Vec<layer::Prepared<T>>, Error> {
    let distances = model.distances()?;
    (0..model.config().n_layers).map(|unit| model.prepare_layer(unit, distances.view())).collect()
}

/// The same with the weights in the order of decoding, and those of the logits.
fn packed<T: Scalar>(model: &Transformer<T>) -> Result<(Vec<layer::Prepared<T>>, PackedWeights<T>), Error> {
    let layers = layers(model)?.into_iter().zip(&model.parameters().layers);
    Ok((layers.map(|(layer, own)| layer.pack(own)).collect(), PackedWeights::new(&[model.output()])))
}
