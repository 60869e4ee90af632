//! Throughput of attention over a whole sequence: vector-quantized against quadratic, forward and with backward.
//!
//! Runs for about two minutes.
//!
//! Checked once, before anything is timed: over the same quantized keys both forms give the same outputs and the same
//! gradients of queries and values, which is how vector-quantized attention is defined. (That each equals `attention::naive`
//! is tested in `tests/`.)
//!
//! Bias: one head on one thread, f32, without relative biases; keys are normal noise, which uses all codes alike. Time to
//! find the codes is in the linear figures, and so is what `Codebook::update` needs; projections around attention are in
//! neither. Arrays are made once and are warm. Sequences of 16384 are timed ten times only.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::{BatchGradients, BatchInputs, BatchOutput, VqAttention, quadratic};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema, Estimator, lookup};
use transformer_vq::ndarray::{Array, Array2, Array4, Dimension, ShapeBuilder, s};

const WIDTH: usize = 64;
const N_CODES: usize = 256;
const LENGTHS: [usize; 6] = [1024, 2048, 4096, 8192, 16384, 32768];
/// The longest length at which quadratic attention is timed too.
const QUADRATIC_TO: usize = 16384;

/// Results of linear attention, in memory that stays, as a training loop keeps it.
#[derive(Default)]
struct Buffers {
    output: BatchOutput<f32>,
    gradients: BatchGradients<f32>,
}

struct Problem {
    attention: VqAttention,
    codebook: Codebook<f32>,
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    d_out: Array4<f32>,
}

impl Problem {
    fn new(t: usize) -> Result<Self, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
        // Queries and keys as a unit of the model has them: of RMS 1, times K^(-1/4).
        let scale = (WIDTH as f32).powf(-0.25);
        let codewords = normal(&mut rng, (1, N_CODES, WIDTH)) * scale;
        let mut array = || normal(&mut rng, (1, 1, t, WIDTH));
        Ok(Problem {
            attention: VqAttention { block_len: 128, window: 128, ..VqAttention::default() },
            codebook: Codebook::ema(Ema::from_codewords(codewords, 0.99)?),
            q: array() * scale,
            k: array() * scale,
            v: array(),
            d_out: array(),
        })
    }

    fn linear(&self, k: &Array4<f32>, buffers: &mut Buffers) -> Result<(), Error> {
        let inputs = self.inputs(k);
        let mut states = self.attention.new_states(1, &self.codebook, WIDTH)?;
        let saved = self.attention.forward_into(&inputs, &self.codebook, &mut states, &mut buffers.output)?;
        let (estimator, gradients) = (Estimator::StraightThrough, &mut buffers.gradients);
        self.attention.backward_into(&inputs, saved, self.d_out.view(), estimator, 1e-4, gradients)
    }

    fn linear_forward(&self, buffers: &mut Buffers) -> Result<(), Error> {
        let mut states = self.attention.new_states(1, &self.codebook, WIDTH)?;
        let inputs = self.inputs(&self.k);
        self.attention.forward_into(&inputs, &self.codebook, &mut states, &mut buffers.output)?;
        Ok(())
    }

    fn inputs<'a>(&'a self, k: &'a Array4<f32>) -> BatchInputs<'a, f32> {
        BatchInputs::new(self.q.view(), k.view(), self.v.view())
    }

    /// o, dq, dk, dv [T, 64].
    fn quadratic(&self, k: &Array4<f32>) -> Result<[Array2<f32>; 4], Error> {
        let [q, k, v, d_out] = [&self.q, k, &self.v, &self.d_out].map(|x| x.slice(s![0, 0, .., ..]));
        let (out, lse) = quadratic::forward(q, k, v)?;
        let d = quadratic::backward(q, k, v, out.view(), lse.view(), d_out)?;
        Ok([out, d.q, d.k, d.v])
    }

    fn quadratic_forward(&self) -> Result<Array2<f32>, Error> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.slice(s![0, 0, .., ..]));
        Ok(quadratic::forward(q, k, v)?.0)
    }

    fn check(&self) -> Result<(), Error> {
        let codes = self.codebook.assign(self.k.view())?;
        let k_hat = lookup(codes.view(), self.codebook.codewords().view())?;
        let mut buffers = Buffers::default();
        self.linear(&self.k, &mut buffers)?;
        let Buffers { output, gradients } = buffers;
        let [out, d_q, _, d_v] = self.quadratic(&k_hat)?;
        for (got, expected) in [(output.out, out), (gradients.q, d_q), (gradients.v, d_v)] {
            let error = relative_rms(&got.slice(s![0, 0, .., ..]).to_owned(), &expected);
            assert!(error < 1e-5, "not the same function: {error:e}");
        }
        Ok(())
    }
}

fn normal<D: Dimension, Sh: ShapeBuilder<Dim = D>>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<f32, D> {
    Array::from_shape_simple_fn(shape, || {
        let (a, b): (f32, f32) = (rng.random(), rng.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    })
}

fn attention(c: &mut Criterion) {
    Problem::new(1100).and_then(|problem| problem.check()).unwrap();
    let problems = LENGTHS.map(|t| (t, Problem::new(t).unwrap()));
    let mut group = c.benchmark_group("forward");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    for (t, problem) in &problems {
        group.throughput(Throughput::Elements(*t as u64));
        let mut buffers = Buffers::default();
        group.bench_function(BenchmarkId::new("vq", t), |b| {
            b.iter(|| problem.linear_forward(&mut buffers).unwrap());
        });
        if *t <= QUADRATIC_TO {
            group.bench_function(BenchmarkId::new("quadratic", t), |b| {
                b.iter(|| problem.quadratic_forward().unwrap());
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("forward and backward");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(5));
    for (t, problem) in &problems {
        group.throughput(Throughput::Elements(*t as u64));
        let mut buffers = Buffers::default();
        group.bench_function(BenchmarkId::new("vq", t), |b| {
            b.iter(|| problem.linear(&problem.k, &mut buffers).unwrap());
        });
        if *t <= QUADRATIC_TO {
            group.bench_function(BenchmarkId::new("quadratic", t), |b| {
                b.iter(|| problem.quadratic(&problem.k).unwrap());
            });
        }
    }
    group.finish();
}

fn on_one_thread(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    attention(c);
}

criterion_group!(benches, on_one_thread);
criterion_main!(benches);
