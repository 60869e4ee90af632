//! The sizes that are measured, and what is useful of the work on them.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::VqAttention;
use transformer_vq::model::ModelConfig;
use transformer_vq::ndarray::{Array, ArrayViewMut, Dimension, ShapeBuilder};

/// Heads and sizes.
#[derive(Debug)]
pub struct Shape {
    pub name: &'static str,
    pub heads: usize,
    pub d_k: usize,
    pub d_v: usize,
    pub n_codes: usize,
    /// L = M.
    pub block_len: usize,
    /// D, of models with such units.
    pub d_model: usize,
    /// Whether it is one of the gated units that are measured whole.
    pub gated: bool,
    /// Whether it is measured against quadratic attention if nobody asks: that takes long.
    pub compared: bool,
}

pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "paper",
        heads: 1,
        d_k: 128,
        d_v: 1536,
        n_codes: 512,
        block_len: 512,
        d_model: 768,
        gated: true,
        compared: true,
    },
    Shape {
        name: "small",
        heads: 1,
        d_k: 64,
        d_v: 512,
        n_codes: 256,
        block_len: 128,
        d_model: 256,
        gated: true,
        compared: false,
    },
    Shape {
        name: "multi-head",
        heads: 8,
        d_k: 64,
        d_v: 64,
        n_codes: 256,
        block_len: 128,
        d_model: 512,
        gated: false,
        compared: true,
    },
    Shape {
        name: "wide",
        heads: 1,
        d_k: 128,
        d_v: 128,
        n_codes: 512,
        block_len: 256,
        d_model: 256,
        gated: false,
        compared: false,
    },
];

impl Shape {
    pub fn attention(&self) -> VqAttention {
        VqAttention { block_len: self.block_len, window: self.block_len, ..VqAttention::default() }
    }

    /// Useful operations of attention, forward on `t` tokens.
    pub fn operations(&self, t: usize, biases: bool) -> f64 {
        let [k, v, s, l] = [self.d_k, self.d_v, self.n_codes, self.block_len].map(|n| n as f64);
        let scores = 4.0 * s * k + if biases { 2.0 * (l + 1.0) * k } else { 0.0 };
        let values = 2.0 * v * (s + l / 2.0 + if biases { l } else { 0.0 });
        self.heads as f64 * t as f64 * (scores + values)
    }

    /// The same of exact attention without a codebook.
    pub fn quadratic_operations(&self, t: usize) -> f64 {
        let [t, k, v] = [t, self.d_k, self.d_v].map(|n| n as f64);
        self.heads as f64 * t * t / 2.0 * (2.0 * k + 2.0 * v)
    }

    /// Weights of a unit that every token is multiplied with: queries, keys; values, gate, output.
    pub fn unit_weights(&self) -> usize {
        self.d_model * self.heads * (2 * self.d_k + 3 * self.d_v)
    }

    /// A model of such units.
    pub fn model(&self, n_layers: usize, vocab_size: usize) -> ModelConfig {
        ModelConfig {
            vocab_size,
            d_model: self.d_model,
            n_layers,
            n_heads: self.heads,
            d_k: self.d_k,
            d_v: self.d_v,
            n_codes: self.n_codes,
            attention: self.attention(),
            ..ModelConfig::default()
        }
    }
}

/// Normal numbers times a factor; large arrays repeat themselves after a million numbers, which no row's length divides.
pub struct Normal {
    rng: ChaCha8Rng,
}

impl Normal {
    pub fn new(seed: u64) -> Self {
        Normal { rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    pub fn array<D: Dimension, Sh: ShapeBuilder<Dim = D>>(&mut self, shape: Sh, scale: f32) -> Array<f32, D> {
        let mut array = Array::zeros(shape);
        self.fill(array.view_mut(), scale);
        array
    }

    pub fn fill<D: Dimension>(&mut self, mut array: ArrayViewMut<'_, f32, D>, scale: f32) {
        let numbers: Vec<f32> = (0..array.len().min(1_000_003)).map(|_| scale * self.number()).collect();
        array.iter_mut().zip(numbers.iter().cycle()).for_each(|(x, &number)| *x = number);
    }

    fn number(&mut self) -> f32 {
        let (a, b): (f32, f32) = (self.rng.random(), self.rng.random());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    }
}
