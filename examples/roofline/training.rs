//! A whole training step: forward, backward, codebooks, optimizer.

use std::hint::black_box;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Transformer;
use transformer_vq::train::{AdamW, Batch, BatchConfig, Batches, Corpus, Trainer};

use crate::machine::Measured;
use crate::report::Report;
use crate::shapes::{SHAPES, Shape};
use crate::{Result, Run, agree};

const UNITS: usize = 4;
const BATCH: usize = 4;
const T: usize = 2048;
/// Of a step.
pub const TOKENS: usize = BATCH * T;
const BYTES: usize = 100_000;
/// Tokens of the step that is compared with one in f64.
const CHECKED: usize = 256;

/// The model that is trained.
pub fn model(shape: &Shape) -> Result<Transformer<f32>> {
    Ok(Transformer::new(shape.model(UNITS, 256), 1)?)
}

/// Two updates of each sequence: the second carries the state of the first.
fn batches(batch_size: usize, update_len: usize) -> Result<[Batch; 2]> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let bytes = (0..BYTES).map(|_| rng.random_range(b'a'..=b'z')).collect();
    let config = BatchConfig { batch_size, sequence_len: 2 * update_len, update_len, seed: 1 };
    let mut batches = Batches::new(Corpus::from_bytes(bytes)?, 0..BYTES, config)?;
    Ok([batches.next_batch()?, batches.next_batch()?])
}

/// Compares losses and the norm of all gradients with those in f64.
fn check(model: &Transformer<f32>) -> Result {
    let [batch, _] = batches(1, CHECKED)?;
    let got = Trainer::new(model.clone(), AdamW::default())?.step(&batch, 0.0)?;
    let expected = Trainer::new(model.cast::<f64>(), AdamW::default())?.step(&batch, 0.0)?;
    for (got, expected) in [
        (got.loss, expected.loss),
        (got.commit_loss, expected.commit_loss),
        (got.gradient_norm, expected.gradient_norm),
    ] {
        agree("a step in f32 and in f64", (got / expected - 1.0).abs(), 1e-3)?;
    }
    Ok(())
}

/// A step of units of this shape.
pub fn measure(run: &Run<'_>, shape: &Shape) -> Result<Measured> {
    let model = model(shape)?;
    check(&model)?;
    let mut trainer = Trainer::new(model, AdamW::default())?;
    let batches = batches(BATCH, T)?;
    let mut turn = batches.iter().cycle();
    Ok(run.machine.pairs(run.pairs, operations(shape), &mut || {
        let batch = turn.next().expect("a cycle");
        black_box(trainer.step(batch, 1.0).expect("checked before"));
    }))
}

/// Useful operations of a step.
fn operations(shape: &Shape) -> f64 {
    let weights = UNITS * shape.unit_weights() + shape.d_model * 256;
    let attention = UNITS as f64 * shape.operations(TOKENS, true);
    6.0 * TOKENS as f64 * weights as f64 + 3.0 * attention
}

/// One row: the small shape, or the one that was asked for.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    let shape = if run.one_shape { run.shapes[0] } else { &SHAPES[1] };
    let measured = measure(run, shape)?;
    report.table(&["training step", "D", "B x T", "tokens/s", "GFLOP/s", "ratio"])?;
    report.row(&[
        format!("{} x {UNITS} units", shape.name),
        shape.d_model.to_string(),
        format!("{BATCH} x {T}"),
        format!("{:.0}", TOKENS as f64 / measured.seconds()),
        format!("{:.0}", operations(shape) / measured.seconds() / 1e9),
        format!("{:.2}", measured.ratio()),
    ])?;
    report.end()
}
