//! The formulas of the surrogate, each as it stands in the docs.

use ndarray::{Array1, Array2, Array3};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use transformer_vq::codebook::{Rotation, RotationScale, RotationVariant};
use transformer_vq::model::{DropoutSeed, FeedForwardParameters, ModelConfig, NormParameters};

/// J of the rotation trick, with matrices.
pub fn jacobian(rotation: Rotation, key: &Array1<f64>, codeword: &Array1<f64>) -> Array2<f64> {
    let outer =
        |a: &Array1<f64>, b: &Array1<f64>| Array2::from_shape_fn((a.len(), b.len()), |(i, j)| a[i] * b[j]);
    let (u, c) = (key / length(key), codeword / length(codeword));
    let t = &u + &c;
    let (t, identity) = (&t / length(&t), Array2::<f64>::eye(key.len()));
    let r = &identity - &(outer(&t, &t) * 2.0) + &(outer(&c, &u) * 2.0);
    let ratio = length(codeword) / length(key);
    let lambda = match rotation.scale {
        RotationScale::Ratio => ratio,
        RotationScale::AtMost(most) => ratio.min(most),
        RotationScale::One => 1.0,
    };
    match rotation.variant {
        RotationVariant::Paper => r * lambda,
        RotationVariant::Normalized => r.dot(&(identity - outer(&u, &u))) * lambda,
    }
}

pub fn length(x: &Array1<f64>) -> f64 {
    x.dot(x).sqrt()
}

/// Rows over their root mean square.
pub fn rms(x: &Array2<f64>) -> Array2<f64> {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        row /= (mean + 1e-6).sqrt();
    }
    y
}

pub fn normalize(x: &Array2<f64>, norm: &NormParameters<f64>) -> Array2<f64> {
    rms(x) * &norm.gain + &norm.bias
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// As it is usually written.
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

/// The branch without the residual.
pub fn feed_forward(x: &Array2<f64>, p: &FeedForwardParameters<f64>) -> Array2<f64> {
    let normed = normalize(x, &p.norm);
    let h = normed.dot(&p.w_in);
    let h = match &p.w_gate {
        Some(w_gate) => h * normed.dot(w_gate).mapv(silu),
        None => h.mapv(gelu),
    };
    h.dot(&p.w_out)
}

/// The factors of dropout, unit by unit, as its docs say; all 1 where nothing is dropped.
pub struct Drops {
    /// [B, T, D].
    pub embedding: Array3<f64>,
    /// [M+1, D].
    pub sinusoids: Vec<Array2<f64>>,
    /// Of both branches [B, T, D].
    pub branches: Vec<[Array3<f64>; 2]>,
}

pub fn drops(config: &ModelConfig, seed: DropoutSeed, b: usize, t: usize) -> Drops {
    let (d, rates) = (config.d_model, config.dropout);
    let DropoutSeed { seed, step, sequence, .. } = seed;
    let factors = |purpose: u64, unit: usize, step: u64, n: usize, rate: f64| -> Vec<f64> {
        let mut key = [0; 32];
        for (i, number) in [seed, purpose, unit as u64, step].into_iter().enumerate() {
            key[8 * i..8 * i + 8].copy_from_slice(&number.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(key);
        let mut draw = || f64::from(rng.next_u32()) / (1u64 << 32) as f64;
        (0..n).map(|_| if draw() >= rate { 1.0 / (1.0 - rate) } else { 0.0 }).collect()
    };
    let cube = |purpose, unit, rate| {
        Array3::from_shape_vec((b, t, d), factors(purpose, unit, step, b * t * d, rate)).unwrap()
    };
    let sinusoids = |unit| {
        let m = config.attention.window + 1;
        Array2::from_shape_vec((m, d), factors(3, unit, sequence, m * d, rates.sinusoid)).unwrap()
    };
    let branches = |unit| {
        let whole = Array3::from_shape_vec((b, 1, 1), factors(4, unit, sequence, b, rates.layer)).unwrap();
        [1, 2].map(|purpose| cube(purpose, unit, rates.residual) * &whole)
    };
    Drops {
        embedding: cube(0, 0, rates.embedding),
        sinusoids: (0..config.n_layers).map(sinusoids).collect(),
        branches: (0..config.n_layers).map(branches).collect(),
    }
}
