//! Throughput of finding codes: keys per second, at several widths and sizes of the codebook.
//!
//! Runs for about half a minute.
//!
//! Checked once, before anything is timed: at every size the codes are those of `assign_naive`, bit for bit.
//!
//! Bias: 8192 keys at a time, on one thread, f32. Keys and codewords are normal noise, the same spread for both: near ties,
//! which are settled in plain loops, are as rare as in a codebook whose codewords differ (one key in a thousand). The
//! check that inputs are finite and the preparation of the codebook are in the figures.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::{assign, assign_naive};
use transformer_vq::ndarray::Array2;

const KEYS: usize = 8192;

fn normal(rng: &mut ChaCha8Rng, shape: (usize, usize)) -> Array2<f32> {
    Array2::from_shape_simple_fn(shape, || {
        let (a, b): (f32, f32) = (rng.random(), rng.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    })
}

fn assignment(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let mut group = c.benchmark_group("assign");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for (n_codes, d_k) in [(128, 64), (256, 64), (512, 64), (512, 128), (2048, 128)] {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (keys, codewords) = (normal(&mut rng, (KEYS, d_k)), normal(&mut rng, (n_codes, d_k)));
        let codes = assign(keys.view(), codewords.view()).unwrap();
        assert_eq!(codes, assign_naive(keys.view(), codewords.view()).unwrap());
        group.throughput(Throughput::Elements(KEYS as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("S={n_codes} K={d_k}")), |b| {
            b.iter(|| assign(keys.view(), codewords.view()).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, assignment);
criterion_main!(benches);
