//! Forward and backward of the encoder: the formulas of the module above.
//!
//! Backward of the mean in (4), with n_b positions that exist in sequence b: `d y_bt = d mean_b / n_b` where t exists, else 0.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, Axis};

use super::{Encoder, EncoderHead, EncoderParameters, EncoderUnitReport, unit};
use crate::model::NormParameters;
use crate::model::buffers::Buffers;
use crate::ops::{embedding, linear, positions, rms_norm};
use crate::{Error, Scalar};

/// What backward needs of forward.
pub(super) struct Saved<T> {
    tokens: Array1<u32>,
    units: Vec<unit::Saved<T>>,
    x: Array2<T>,
    final_norm: rms_norm::Saved<T>,
}

impl<T: Scalar> Saved<T> {
    /// Gives back what no backward is to need.
    pub fn give(self, buffers: &Buffers<T>) {
        self.units.into_iter().for_each(|unit| unit.give(buffers));
        buffers.give(self.x);
    }
}

/// What forward gives.
pub(super) struct Forward<T> {
    /// [B, T, vocab] or [B, 1, `n_classes`].
    pub logits: Array3<T>,
    /// y of (3) [B, T, D].
    pub stream: Array3<T>,
    pub units: Vec<EncoderUnitReport<T>>,
    pub saved: Saved<T>,
}

impl<T: Scalar> Encoder<T> {
    /// Forward of tokens that have been checked.
    pub(super) fn run(
        &self,
        tokens: ArrayView2<'_, u32>,
        exists: &Array2<bool>,
    ) -> Result<Forward<T>, Error> {
        self.buffers.begin_pass();
        let (b, t) = tokens.dim();
        let (mut x, tokens) = self.embed(tokens, exists)?; // (1)
        let (mut reports, mut units) = (vec![], vec![]);
        for i in 0..self.config.n_layers {
            let (y, report, saved) = self.unit(i, exists).forward(x)?; // (2)
            x = y;
            reports.push(report);
            units.push(saved);
        }
        let NormParameters { gain, bias } = &self.parameters.final_norm;
        let (stream, final_norm) = rms_norm::forward_affine(x.view(), gain.view(), bias.view())?; // (3)
        let (output, bias) = (self.parameters.output.view(), self.parameters.output_bias.view());
        let logits = linear::forward(self.features(&stream, exists).view(), output, Some(bias))?; // (4)
        let n_outputs = logits.ncols();
        let per_sequence = logits.nrows() / b;
        let cube = |rows: Array2<T>, shape| rows.into_shape_with_order(shape).expect("contiguous");
        Ok(Forward {
            logits: cube(logits, (b, per_sequence, n_outputs)),
            stream: cube(stream, (b, t, self.config.d_model)),
            units: reports,
            saved: Saved { tokens, units, x, final_norm },
        })
    }

    /// Gradients of `sum(d_logits * logits)` plus the weighted commitment loss, added to `d`; `d_logits` [B T, vocab] or
    /// [B, `n_classes`].
    pub(super) fn backward(
        &self,
        saved: Saved<T>,
        exists: &Array2<bool>,
        d_logits: &Array2<T>,
        d: &mut EncoderParameters<T>,
    ) -> Result<(), Error> {
        self.buffers.begin_pass();
        let Saved { tokens, units, x, final_norm } = saved;
        let p = &self.parameters;
        let NormParameters { gain, bias } = &p.final_norm;
        // (4)
        let stream = rms_norm::forward_affine(x.view(), gain.view(), bias.view())?.0;
        let (d_w, d_b) = (d.output.view_mut(), d.output_bias.view_mut());
        let features = self.features(&stream, exists);
        let d_features = linear::backward(features.view(), p.output.view(), d_logits.view(), d_w, Some(d_b))?;
        let d_stream = match self.config.head {
            EncoderHead::MaskedToken => d_features,
            EncoderHead::Classes { .. } => {
                let mut d_stream = Array2::zeros(x.raw_dim());
                let rows = d_stream.axis_chunks_iter_mut(Axis(0), exists.ncols());
                for ((mut rows, d_mean), exists) in rows.zip(d_features.outer_iter()).zip(exists.outer_iter())
                {
                    let d_row = &d_mean * weight_of_mean::<T>(exists);
                    existing(exists).for_each(|t| rows.row_mut(t).assign(&d_row));
                }
                d_stream
            }
        };
        // (3)
        let (d_gain, d_bias) = (d.final_norm.gain.view_mut(), d.final_norm.bias.view_mut());
        let d_stream = d_stream.view();
        let mut d_x = self.buffers.take(x.dim());
        d_x.assign(&d_stream);
        rms_norm::backward_affine_in_place(x.view(), &final_norm, gain.view(), &mut d_x, d_gain, d_bias)?;
        self.buffers.give(x);
        // (2)
        for (i, (saved, d)) in units.into_iter().zip(&mut d.layers).enumerate().rev() {
            d_x = self.unit(i, exists).backward(saved, d_x, d)?;
        }
        // (1)
        let sinusoids = self.sinusoids(exists.ncols())?;
        let sum = |rows: ArrayView2<'_, T>| (&rows * &sinusoids).sum();
        d.position_scale[0] += d_x.axis_chunks_iter(Axis(0), exists.ncols()).map(sum).sum::<T>();
        embedding::backward(tokens.view(), d_x.view(), d.embedding.view_mut())?;
        self.buffers.give(d_x);
        Ok(())
    }

    /// (1) and the tokens that it read, sequence after sequence: where none exists, token 0, whatever stands there.
    pub(super) fn embed(
        &self,
        tokens: ArrayView2<'_, u32>,
        exists: &Array2<bool>,
    ) -> Result<(Array2<T>, Array1<u32>), Error> {
        let pairs = tokens.iter().zip(exists);
        let read: Array1<u32> = pairs.map(|(&token, &exists)| if exists { token } else { 0 }).collect();
        let table = self.parameters.embedding.view();
        let mut x = self.buffers.take((read.len(), table.ncols()));
        embedding::forward_into(table, read.view(), &mut x)?;
        let sinusoids = self.sinusoids(tokens.ncols())? * self.parameters.position_scale[0];
        x.axis_chunks_iter_mut(Axis(0), tokens.ncols()).for_each(|mut rows| rows += &sinusoids);
        Ok((x, read))
    }

    fn sinusoids(&self, count: usize) -> Result<Array2<T>, Error> {
        positions::sinusoids(0, count, self.config.d_model, self.config.position_lambda)
    }

    /// What the output matrix of (4) is applied to: every row of y [B T, D], or means [B, D].
    fn features(&self, stream: &Array2<T>, exists: &Array2<bool>) -> Array2<T> {
        if self.config.head == EncoderHead::MaskedToken {
            return stream.clone();
        }
        let mut means = Array2::zeros((exists.nrows(), stream.ncols()));
        let rows = stream.axis_chunks_iter(Axis(0), exists.ncols());
        for ((mut mean, rows), exists) in means.outer_iter_mut().zip(rows).zip(exists.outer_iter()) {
            existing(exists).for_each(|t| mean += &rows.row(t));
            mean *= weight_of_mean::<T>(exists);
        }
        means
    }
}

/// The positions that exist.
fn existing(exists: ArrayView1<'_, bool>) -> impl Iterator<Item = usize> {
    (0..exists.len()).filter(move |&t| exists[t])
}

/// 1 / n of a mean over n positions that exist.
fn weight_of_mean<T: Scalar>(exists: ArrayView1<'_, bool>) -> T {
    T::from_f64(1.0 / existing(exists).count() as f64)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use crate::model::{Encoder, EncoderBatch, EncoderConfig, FeedForward, FeedForwardKind};

    /// As in `buffers`: what a pass takes it gives back, and nothing else.
    #[test]
    fn passes_alike_take_the_same_arrays() {
        let feed_forward = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 128 });
        let small = EncoderConfig {
            vocab_size: 4,
            d_model: 64,
            d_k: 8,
            d_v: 64,
            n_codes: 8,
            n_layers: 2,
            ..EncoderConfig::default()
        };
        for config in [
            EncoderConfig { feed_forward, ..small.clone() },
            EncoderConfig { gate: false, n_heads: 2, ..small },
        ] {
            let encoder = Encoder::new(config, 1).unwrap();
            let tokens = Array2::from_shape_fn((2, 4096), |(b, t)| (b as u32 + t as u32 / 3) % 4);
            let batch =
                EncoderBatch { tokens: tokens.view(), exists: None, targets: tokens.view(), counted: None };
            let mut kept = vec![];
            for _ in 0..6 {
                encoder.loss_and_gradients(&batch).unwrap();
                kept.push(encoder.buffers.places());
            }
            assert!(kept[0].len() > 4);
            assert_eq!(kept[1], kept[5]);
            encoder.encode(tokens.view(), None).unwrap();
            encoder.forward(tokens.view(), None).unwrap();
            assert_eq!(kept[5], encoder.buffers.places());
        }
    }
}
