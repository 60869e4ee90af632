//! Attention of the shapes that models use.

use std::hint::black_box;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{
    BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved, VqAttention,
};
use transformer_vq::codebook::{Codebook, Ema, Estimator};
use transformer_vq::ndarray::{Array, Array3, Array4, Axis, Dimension, ShapeBuilder};

use crate::machine::Machine;

/// Heads and sizes.
#[derive(Debug)]
pub struct Shape {
    pub name: &'static str,
    heads: usize,
    d_k: usize,
    d_v: usize,
    n_codes: usize,
    /// L = M.
    block_len: usize,
}

pub const SHAPES: [Shape; 4] = [
    Shape { name: "paper", heads: 1, d_k: 128, d_v: 1536, n_codes: 512, block_len: 512 },
    Shape { name: "small", heads: 1, d_k: 64, d_v: 512, n_codes: 256, block_len: 128 },
    Shape { name: "multi-head", heads: 8, d_k: 64, d_v: 64, n_codes: 256, block_len: 128 },
    Shape { name: "wide", heads: 1, d_k: 128, d_v: 128, n_codes: 512, block_len: 256 },
];

impl Shape {
    /// Useful operations forward on `t` tokens.
    fn operations(&self, t: usize, biases: bool) -> f64 {
        let [k, v, s, l] = [self.d_k, self.d_v, self.n_codes, self.block_len].map(|n| n as f64);
        let scores = 4.0 * s * k + if biases { 2.0 * (l + 1.0) * k } else { 0.0 };
        let values = 2.0 * v * (s + l / 2.0 + if biases { l } else { 0.0 });
        self.heads as f64 * t as f64 * (scores + values)
    }
}

struct Problem {
    attention: VqAttention,
    codebook: Codebook<f32>,
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    d_out: Array4<f32>,
    biases: Option<[Array3<f32>; 3]>,
}

impl Problem {
    fn new(shape: &Shape, t: usize, biases: bool) -> Result<Self, transformer_vq::Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
        let &Shape { heads, d_k, d_v, n_codes, block_len, .. } = shape;
        // Queries and keys as a unit of the model has them: of RMS 1, times K^(-1/4).
        let scale = (d_k as f32).powf(-0.25);
        let codewords = normal(&mut rng, (heads, n_codes, d_k), scale);
        let mut array =
            |width, scale| normal(&mut rng, (1, t, heads, width), scale).permuted_axes([0, 2, 1, 3]);
        let (q, k, v, d_out) = (array(d_k, scale), array(d_k, scale), array(d_v, 1.0), array(d_v, 1.0));
        let rows = [1, 1, block_len + 1];
        let biases = biases.then(|| rows.map(|n| normal(&mut rng, (heads, n, d_k), 0.1)));
        Ok(Problem {
            attention: VqAttention { block_len, window: block_len, ..VqAttention::default() },
            codebook: Codebook::ema(Ema::from_codewords(codewords, 0.99)?),
            q,
            k,
            v,
            d_out,
            biases,
        })
    }

    fn inputs(&self) -> BatchInputs<'_, f32> {
        BatchInputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            biases: self.biases.as_ref().map(|[content, position, relative]| BatchBiases {
                content: content.index_axis(Axis(1), 0),
                position: position.index_axis(Axis(1), 0),
                relative: relative.view(),
            }),
            mask: None,
        }
    }

    fn forward(&self, buffers: &mut Buffers) -> Result<BatchSaved<f32>, transformer_vq::Error> {
        let mut states = self.attention.new_states(1, &self.codebook, self.v.shape()[3])?;
        self.attention.forward_into(&self.inputs(), &self.codebook, &mut states, &mut buffers.output)
    }

    fn forward_backward(&self, buffers: &mut Buffers) -> Result<(), transformer_vq::Error> {
        let saved = self.forward(buffers)?;
        let (inputs, d_out) = (self.inputs(), self.d_out.view());
        let (through, gradients) = (Estimator::StraightThrough, &mut buffers.gradients);
        self.attention.backward_into(&inputs, saved, d_out, through, 1e-4, gradients)
    }
}

/// Results, in memory that stays.
#[derive(Default)]
struct Buffers {
    output: BatchOutput<f32>,
    gradients: BatchGradients<f32>,
}

fn normal<D: Dimension, Sh: ShapeBuilder<Dim = D>>(
    rng: &mut ChaCha8Rng,
    shape: Sh,
    scale: f32,
) -> Array<f32, D> {
    Array::from_shape_simple_fn(shape, || {
        let (a, b): (f32, f32) = (rng.random(), rng.random());
        scale * (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    })
}

/// Prints one line per shape and length.
pub fn table(
    machine: &Machine,
    shapes: &[&Shape],
    lengths: &[usize],
    pairs: usize,
    biases: bool,
) -> Result<(), transformer_vq::Error> {
    println!(
        "{:12} {:>7} | {:>12} {:>8} {:>6} | {:>12} {:>8} {:>6}",
        "attention", "T", "forward t/s", "GFLOP/s", "ratio", "fwd+bwd t/s", "GFLOP/s", "ratio"
    );
    for shape in shapes {
        for &t in lengths {
            let problem = Problem::new(shape, t, biases)?;
            let mut buffers = Buffers::default();
            let operations = shape.operations(t, biases);
            let forward = machine.pairs(pairs, operations, || {
                black_box(problem.forward(&mut buffers).unwrap());
            });
            let both =
                machine.pairs(pairs, 3.0 * operations, || problem.forward_backward(&mut buffers).unwrap());
            let speed = |seconds: f64| t as f64 / seconds;
            println!(
                "{:12} {t:7} | {:12.0} {:8.1} {:6.2} | {:12.0} {:8.1} {:6.2}",
                shape.name,
                speed(forward.seconds),
                operations / forward.seconds / 1e9,
                forward.ratio,
                speed(both.seconds),
                3.0 * operations / both.seconds / 1e9,
                both.ratio,
            );
        }
    }
    Ok(())
}
