//! Latency of decoding: one token after 1024 tokens and after 65536. The two should be the same.
//!
//! Runs for about ten seconds.
//!
//! Checked once, before anything is timed: the outputs of 200 tokens pushed one by one equal those of one call on all of
//! them. (That this call equals `attention::naive` is tested in `tests/`.)
//!
//! Bias: eight heads of one layer, on one thread, f32, without relative biases and without the projections around
//! attention. Each token starts from a fresh copy of the state, made outside the time, so the state is warm in the cache: a
//! model of many layers would find it cold. Finding the code is in the time, the preparation of the codebook is not: it is made
//! once. This is a latency; nothing here says how fast a prompt is read.

use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::{AttentionState, BatchInputs, VqAttention};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema};
use transformer_vq::ndarray::{Array2, Array3, Array4, Axis, concatenate, s};

const HEADS: usize = 8;
const WIDTH: usize = 64;
const N_CODES: usize = 256;

struct Tokens {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
}

impl Tokens {
    fn new(rng: &mut ChaCha8Rng, t: usize) -> Self {
        let mut array = || Array4::from_shape_simple_fn((1, HEADS, t, WIDTH), || rng.random_range(-0.6..0.6));
        Tokens { q: array(), k: array(), v: array() }
    }

    fn inputs(&self, from: usize, to: usize) -> BatchInputs<'_, f32> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.slice(s![.., .., from..to, ..]));
        BatchInputs::new(q, k, v)
    }
}

fn check(attention: &VqAttention, codebook: &Codebook<f32>, tokens: &Tokens) -> Result<(), Error> {
    let t = tokens.q.len_of(Axis(2));
    let mut states = attention.new_states(1, codebook, WIDTH)?;
    let all = attention.push(&tokens.inputs(0, t), codebook, &mut states)?.out;
    let mut states = attention.new_states(1, codebook, WIDTH)?;
    let heads = attention.prepare(codebook, None)?;
    let single = (0..t).map(|i| {
        let BatchInputs { q, k, v, .. } = tokens.inputs(i, i + 1);
        Ok(heads.push(q, k, v, &mut states)?.out)
    });
    let single = single.collect::<Result<Vec<_>, Error>>()?;
    let single =
        concatenate(Axis(2), &single.iter().map(|out| out.view()).collect::<Vec<_>>()).expect("equal shapes");
    let error = relative_rms(&single, &all);
    assert!(error < 1e-5, "decoding differs from one call: {error:e}");
    Ok(())
}

fn decoding(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let codewords = Array3::from_shape_simple_fn((HEADS, N_CODES, WIDTH), || rng.random_range(-0.6f32..0.6));
    let codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99).unwrap());
    let attention = VqAttention { block_len: 128, window: 128, ..VqAttention::default() };
    check(&attention, &codebook, &Tokens::new(&mut rng, 200)).unwrap();

    let mut group = c.benchmark_group("one token, latency");
    group.sample_size(50).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Elements(1));
    let token = Tokens::new(&mut rng, 1);
    // Both before either is timed, so that both find the allocator in the same condition.
    let states = [1024, 65536].map(|after| {
        let mut states: Array2<AttentionState<f32>> = attention.new_states(1, &codebook, WIDTH).unwrap();
        attention.push(&Tokens::new(&mut rng, after).inputs(0, after), &codebook, &mut states).unwrap();
        (after, states)
    });
    let heads = attention.prepare(&codebook, None).unwrap();
    for (after, states) in &states {
        group.bench_function(BenchmarkId::new("after", after), |b| {
            b.iter_batched_ref(
                || states.clone(),
                |states| heads.push(token.q.view(), token.k.view(), token.v.view(), states).unwrap(),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, decoding);
criterion_main!(benches);
