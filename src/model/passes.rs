//! Forward and backward of the language model: the formulas of `transformer`.

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView1, ArrayView2};

use super::buffers::Buffers;
use super::dropout::{DropoutSeed, Masks};
use super::layer::{self, LayerReport};
use super::parameters::Parameters;
use super::transformer::flat;
use super::{ModelConfig, ModelState, Transformer, UnitState};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::{embedding, linear, positions, rms_norm};
use crate::{Error, Scalar};

/// What backward needs of forward. Dropped, it leaves its memory to the model's next pass.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    /// None once backward has it.
    pass: Option<SavedPass<T>>,
    buffers: Arc<Buffers<T>>,
}

#[derive(Debug, Clone)]
struct SavedPass<T> {
    config: ModelConfig,
    tokens: Array2<u32>,
    mask: Option<Array2<bool>>,
    start: u64,
    dropout: Option<DropoutSeed>,
    layers: Vec<SavedUnit<T>>,
    x: Array2<T>,
    final_norm: Option<rms_norm::Saved<T>>,
}

/// What backward needs of one unit.
#[derive(Debug, Clone)]
enum SavedUnit<T> {
    Kept(Box<layer::Saved<T>>),
    /// To compute it again from: [`ModelConfig::recompute`].
    Input {
        x: Array2<T>,
        states: UnitState<T>,
    },
}

impl<T> Drop for Saved<T> {
    fn drop(&mut self) {
        let Some(SavedPass { layers, x, .. }) = self.pass.take() else { return };
        for unit in layers {
            match unit {
                SavedUnit::Kept(saved) => saved.give(&self.buffers),
                SavedUnit::Input { x, .. } => self.buffers.give(x),
            }
        }
        self.buffers.give(x);
    }
}

impl<T: Scalar> Transformer<T> {
    /// Logits of a piece [B, T, vocab] and what backward needs; `state` moves from before the piece to after it.
    ///
    /// # Shapes
    /// `tokens` [B, T]; `mask` [B, T], true where a position counts in losses and statistics.
    ///
    /// # Errors
    /// Shapes that do not fit, tokens outside the vocabulary. The state is then as it was.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(
        &self,
        tokens: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
    ) -> Result<(Array3<T>, Vec<LayerReport<T>>, Saved<T>), Error> {
        self.forward_dropping(tokens, mask, state, None)
    }

    /// [`forward`](Self::forward) with the masks of dropout that belong to a seed, if there is one.
    #[allow(clippy::type_complexity)] // three results of one pass
    pub(super) fn forward_dropping(
        &self,
        tokens: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
        dropout: Option<DropoutSeed>,
    ) -> Result<(Array3<T>, Vec<LayerReport<T>>, Saved<T>), Error> {
        compiled_here!(
            T,
            Transformer::<T>::forward_dropping_here,
            fn(
                &Transformer<T>,
                ArrayView2<'_, u32>,
                Option<ArrayView2<'_, bool>>,
                &mut ModelState<T>,
                Option<DropoutSeed>,
            ) -> Result<(Array3<T>, Vec<LayerReport<T>>, Saved<T>), Error>
        )(self, tokens, mask, state, dropout)
    }

    #[allow(clippy::type_complexity)] // three results of one pass
    fn forward_dropping_here(
        &self,
        tokens: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
        dropout: Option<DropoutSeed>,
    ) -> Result<(Array3<T>, Vec<LayerReport<T>>, Saved<T>), Error> {
        self.check(tokens, state)?;
        if let Some(mask) = &mask {
            check_shape("mask", tokens.shape(), mask.shape())?;
        }
        self.buffers.begin_pass();
        let start = state.position();
        let masks = Masks::new(self.config.dropout, dropout, tokens.nrows());
        let mut x = self.embed(tokens, start)?; // (1)
        masks.embedding(&mut x)?;
        let (mut reports, mut layers) = (vec![], vec![]);
        let distances = self.distances()?;
        for (unit, states) in state.layers.iter_mut().enumerate() {
            let prepared = self.prepare_layer(unit, masks.sinusoids(unit, &distances)?.view())?;
            let input = self.config.recompute.then(|| (self.buffers.copy(&x), states.clone()));
            let (y, report, saved) = self.layer(unit, &prepared).forward(x, states, mask, &masks)?; // (2)
            x = y;
            reports.push(report);
            layers.push(match input {
                Some((x, states)) => {
                    saved.give(&self.buffers);
                    SavedUnit::Input { x, states }
                }
                None => SavedUnit::Kept(Box::new(saved)),
            });
        }
        let (normed, final_norm) = self.normalize(&x)?;
        let logits = self.logits(&normed, tokens.dim())?; // (3)
        self.buffers.give(normed);
        let pass = SavedPass {
            config: self.config.clone(),
            tokens: tokens.to_owned(),
            mask: mask.map(|mask| mask.to_owned()),
            start,
            dropout,
            layers,
            x,
            final_norm,
        };
        Ok((logits, reports, Saved { pass: Some(pass), buffers: self.buffers.clone() }))
    }

    /// Gradients of `sum(d_logits * logits)` plus the weighted commitment and codebook losses, added to `gradients`.
    ///
    /// With [`ModelConfig::recompute`], codebooks must be those of forward: it runs again, unit by unit.
    ///
    /// # Shapes
    /// `d_logits` [B, T, vocab].
    ///
    /// # Errors
    /// [`Error::Shape`], and [`Error::Invalid`] if `saved` comes from a model of another configuration. Then nothing has
    /// been added.
    pub fn backward(
        &self,
        saved: Saved<T>,
        d_logits: Array3<T>,
        gradients: &mut Parameters<T>,
    ) -> Result<(), Error> {
        compiled_here!(
            T,
            Transformer::<T>::backward_here,
            fn(&Transformer<T>, Saved<T>, Array3<T>, &mut Parameters<T>) -> Result<(), Error>
        )(self, saved, d_logits, gradients)
    }

    fn backward_here(
        &self,
        mut saved: Saved<T>,
        d_logits: Array3<T>,
        gradients: &mut Parameters<T>,
    ) -> Result<(), Error> {
        let pass = saved.pass.take().expect("nobody else takes it");
        let SavedPass { config, tokens, mask, start, dropout, layers, x, final_norm } = pass;
        if config != self.config {
            return Err(Error::invalid("saved", "from this model's forward", format!("{config:?}")));
        }
        self.parameters.check_like("gradients", gradients)?;
        let (b, t) = tokens.dim();
        check_shape("d_logits", &[b, t, self.config.vocab_size], d_logits.shape())?;
        self.buffers.begin_pass();
        // (3)
        let in_order = d_logits.is_standard_layout();
        let d_logits = if in_order { d_logits } else { d_logits.as_standard_layout().into_owned() };
        let d_logits = d_logits * T::from_f64(self.config.logit_scale);
        let d_logits = d_logits.into_shape_with_order((b * t, self.config.vocab_size)).expect("contiguous");
        let normed = self.normalize(&x)?.0;
        let (d_w, d_b) = (&mut gradients.embedding, gradients.output_bias.view_mut());
        let d_w = match &mut gradients.output {
            Some(d_output) => d_output.view_mut(),
            None => d_w.view_mut().reversed_axes(),
        };
        let mut d_x = self.buffers.take(normed.dim());
        linear::backward_into(normed.view(), self.output(), d_logits.view(), d_w, Some(d_b), &mut d_x)?;
        let norms = self.parameters.final_norm.as_ref().zip(gradients.final_norm.as_mut());
        if let (Some((norm, d)), Some(saved)) = (norms, &final_norm) {
            let (d_gain, d_bias) = (d.gain.view_mut(), d.bias.view_mut());
            let gain = norm.gain.view();
            rms_norm::backward_affine_in_place(x.view(), saved, gain, &mut d_x, d_gain, d_bias)?;
        }
        self.buffers.give_all([x, normed]);
        drop(d_logits);
        // (2)
        let distances = self.distances()?;
        let masks = Masks::new(self.config.dropout, dropout, b);
        for (unit, (d_parameters, saved)) in gradients.layers.iter_mut().zip(layers).enumerate().rev() {
            let distances = masks.sinusoids(unit, &distances)?;
            let prepared = self.prepare_layer(unit, distances.view())?;
            let mask = mask.as_ref().map(|mask| mask.view());
            let layer = self.layer(unit, &prepared);
            let saved = match saved {
                SavedUnit::Kept(saved) => *saved,
                SavedUnit::Input { x, mut states } => {
                    let (y, _, saved) = layer.forward(x, &mut states, mask, &masks)?;
                    self.buffers.give(y);
                    saved
                }
            };
            d_x = layer.backward(saved, d_x, mask, &masks, b, distances.view(), d_parameters)?;
        }
        // (1)
        masks.embedding(&mut d_x)?;
        if let Some(d_scale) = &mut gradients.position_scale {
            let sinusoids = self.sinusoids(start, t)?;
            let sum = |rows: ArrayView2<'_, T>| (&rows * &sinusoids).sum();
            d_scale[0] += d_x.axis_chunks_iter(ndarray::Axis(0), t.max(1)).map(sum).sum::<T>();
        }
        embedding::backward(flat(&tokens).view(), d_x.view(), gradients.embedding.view_mut())?;
        self.buffers.give(d_x);
        Ok(())
    }

    pub(super) fn sinusoids(&self, start: u64, count: usize) -> Result<Array2<T>, Error> {
        positions::sinusoids(start, count, self.config.d_model, self.config.position_lambda)
    }

    /// (1)
    pub(super) fn embed(&self, tokens: ArrayView2<'_, u32>, start: u64) -> Result<Array2<T>, Error> {
        let (table, tokens) = (self.parameters.embedding.view(), tokens.to_owned());
        let mut x = self.buffers.take((tokens.len(), table.ncols()));
        embedding::forward_into(table, flat(&tokens).view(), &mut x)?;
        if let Some(scale) = &self.parameters.position_scale {
            let sinusoids = self.sinusoids(start, tokens.ncols())? * scale[0];
            for mut rows in x.axis_chunks_iter_mut(ndarray::Axis(0), tokens.ncols().max(1)) {
                rows += &sinusoids;
            }
        }
        Ok(x)
    }

    /// The norm of (3).
    pub(super) fn normalize(&self, x: &Array2<T>) -> Result<(Array2<T>, Option<rms_norm::Saved<T>>), Error> {
        let Some(norm) = &self.parameters.final_norm else {
            return Ok((self.buffers.copy(x), None));
        };
        let (y, saved) = self.buffers.normalize(x, norm)?;
        Ok((y, Some(saved)))
    }

    /// W of (3) [D, vocab].
    pub(super) fn output(&self) -> ArrayView2<'_, T> {
        match &self.parameters.output {
            Some(output) => output.view(),
            None => self.parameters.embedding.t(),
        }
    }

    /// (3), after the norm.
    pub(super) fn logits(&self, x: &Array2<T>, dim: (usize, usize)) -> Result<Array3<T>, Error> {
        let bias: ArrayView1<'_, T> = self.parameters.output_bias.view();
        Ok(self.scale_logits(linear::forward(x.view(), self.output(), Some(bias))?, dim))
    }

    /// What is left of (3) after the product and the bias.
    pub(super) fn scale_logits(&self, mut logits: Array2<T>, (b, t): (usize, usize)) -> Array3<T> {
        if self.config.logit_scale != 1.0 {
            logits *= T::from_f64(self.config.logit_scale);
        }
        logits.into_shape_with_order((b, t, self.config.vocab_size)).expect("contiguous")
    }
}
