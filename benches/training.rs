//! Throughput of training: tokens per second of one `Trainer::step`, at two lengths with the same number of tokens.
//!
//! Runs for about half a minute.
//!
//! Checked once, before anything is timed: loss, commitment loss and the norm of all gradients of a step in f32 are those
//! of the same step in f64. (That the gradients of the f64 model are right is what `examples/gradcheck` shows.)
//!
//! Bias: the default model (four units of width 192, 1.7 million parameters) on two updates of 2048 tokens, again and again,
//! so the data are warm and the model soon knows them; the work does not depend on that. Runs on every core that rayon
//! finds: compare figures of one machine only. Reading text, logging and checkpoints are not in the figures.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{AdamW, Batch, BatchConfig, Batches, Corpus, Trainer};

const TOKENS: usize = 2048;

/// Two updates of one sequence each row; the second carries the state of the first.
fn batches(update_len: usize) -> Result<[Batch; 2], Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let bytes = (0..20_000).map(|_| rng.random_range(b'a'..=b'z')).collect();
    let config =
        BatchConfig { batch_size: TOKENS / update_len, sequence_len: 2 * update_len, update_len, seed: 1 };
    let mut batches = Batches::new(Corpus::from_bytes(bytes)?, 0..20_000, config)?;
    Ok([batches.next_batch()?, batches.next_batch()?])
}

fn check(model: &Transformer<f32>, batches: &[Batch; 2]) -> Result<(), Error> {
    let mut single = Trainer::new(model.clone(), AdamW::default())?;
    let mut double = Trainer::new(model.cast::<f64>(), AdamW::default())?;
    let (got, expected) = (single.step(&batches[0], 0.0)?, double.step(&batches[0], 0.0)?);
    for (got, expected) in [
        (got.loss, expected.loss),
        (got.commit_loss, expected.commit_loss),
        (got.gradient_norm, expected.gradient_norm),
    ] {
        assert!((got / expected - 1.0).abs() < 1e-3, "f32 gives {got}, f64 gives {expected}");
    }
    Ok(())
}

fn training(c: &mut Criterion) {
    let model = Transformer::<f32>::new(ModelConfig::default(), 1).unwrap();
    check(&model, &batches(256).unwrap()).unwrap();
    let mut group = c.benchmark_group("Trainer::step");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_secs(1));
    group.measurement_time(Duration::from_secs(6)).throughput(Throughput::Elements(TOKENS as u64));
    for update_len in [256, 2048] {
        let batches = batches(update_len).unwrap();
        let mut trainer = Trainer::new(model.clone(), AdamW::default()).unwrap();
        let mut turn = batches.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(format!("{update_len} tokens per row")), |b| {
            b.iter(|| trainer.step(turn.next().expect("a cycle"), 1.0).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, training);
criterion_main!(benches);
