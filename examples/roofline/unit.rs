//! A whole gated unit: norm, projections, attention, gate.
//!
//! Measured as a model of one unit with a vocabulary of two: embedding and logits are next to nothing beside it.

use std::hint::black_box;

use transformer_vq::Transformer;
use transformer_vq::check::relative_rms;
use transformer_vq::model::Parameters;
use transformer_vq::ndarray::{Array2, Array3, s};

use crate::machine::Measured;
use crate::report::Report;
use crate::shapes::{Normal, Shape};
use crate::{Result, Run, agree};

/// Tokens, where no length is asked for.
pub const T: usize = 8192;
/// Tokens whose results are compared with those in f64.
const CHECKED: usize = 300;

struct Unit {
    model: Transformer<f32>,
    tokens: Array2<u32>,
    d_logits: Array3<f32>,
}

impl Unit {
    fn new(shape: &Shape, t: usize) -> Result<Self> {
        let model = Transformer::new(shape.model(1, 2), 1)?;
        // Bits without a period that blocks could meet.
        let tokens = Array2::from_shape_fn((1, t), |(_, i)| (i as u32).wrapping_mul(0x9e37_79b9) >> 31);
        Ok(Unit { model, tokens, d_logits: Normal::new(2).array((1, t, 2), 1.0) })
    }

    fn forward(&self) -> Result {
        let mut state = self.model.new_state(1)?;
        black_box(self.model.forward(self.tokens.view(), None, &mut state)?);
        Ok(())
    }

    fn forward_backward(&self, gradients: &mut Parameters<f32>) -> Result {
        let mut state = self.model.new_state(1)?;
        let (_, _, saved) = self.model.forward(self.tokens.view(), None, &mut state)?;
        Ok(self.model.backward(saved, self.d_logits.clone(), gradients)?)
    }

    /// Compares gradients with those in f64. (That these are right is what `examples/gradcheck` shows.)
    fn check(&self) -> Result {
        let tokens = self.tokens.slice(s![.., ..CHECKED.min(self.tokens.ncols())]);
        let d_logits = self.d_logits.slice(s![.., ..tokens.ncols(), ..]);
        let (_, _, saved) = self.model.forward(tokens, None, &mut self.model.new_state(1)?)?;
        let mut got = self.model.zero_gradients();
        self.model.backward(saved, d_logits.to_owned(), &mut got)?;
        let twin = self.model.cast::<f64>();
        let (_, _, saved) = twin.forward(tokens, None, &mut twin.new_state(1)?)?;
        let mut expected = twin.zero_gradients();
        twin.backward(saved, d_logits.mapv(f64::from), &mut expected)?;
        let (got, expected) = (&got.layers[0], &expected.layers[0]);
        for (got, expected) in
            [(&got.w_q, &expected.w_q), (&got.w_v, &expected.w_v), (&got.w_out, &expected.w_out)]
        {
            agree("a unit in f32 and in f64", relative_rms(got, expected), 1e-3)?;
        }
        Ok(())
    }
}

/// Forward, and forward and backward.
pub fn measure(run: &Run<'_>, shape: &Shape, t: usize) -> Result<[Measured; 2]> {
    let unit = Unit::new(shape, t)?;
    unit.check()?;
    let mut gradients = unit.model.zero_gradients();
    let operations = operations(shape, t);
    let forward = run.machine.pairs(run.pairs, operations, &mut || unit.forward().expect("checked before"));
    let both = run.machine.pairs(run.pairs, 3.0 * operations, &mut || {
        unit.forward_backward(&mut gradients).expect("checked before");
    });
    Ok([forward, both])
}

/// Useful operations, forward.
fn operations(shape: &Shape, t: usize) -> f64 {
    2.0 * t as f64 * shape.unit_weights() as f64 + shape.operations(t, true)
}

/// One row per gated shape.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    let t = run.length.unwrap_or(T);
    report.table(&[
        "gated unit",
        "D",
        "T",
        "forward tokens/s",
        "GFLOP/s",
        "ratio",
        "fwd+bwd tokens/s",
        "GFLOP/s",
        "ratio",
    ])?;
    for shape in run.shapes.iter().filter(|shape| run.one_shape || shape.gated) {
        let operations = operations(shape, t);
        let mut cells = vec![shape.name.to_string(), shape.d_model.to_string(), t.to_string()];
        for (measured, passes) in measure(run, shape, t)?.into_iter().zip([1.0, 3.0]) {
            cells.extend([
                format!("{:.0}", t as f64 / measured.seconds()),
                format!("{:.0}", passes * operations / measured.seconds() / 1e9),
                format!("{:.2}", measured.ratio()),
            ]);
        }
        report.row(&cells)?;
    }
    report.end()
}
