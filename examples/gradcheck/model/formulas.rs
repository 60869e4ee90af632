//! The formulas of the surrogate, each as it stands in the docs.

use ndarray::{Array1, Array2};
use transformer_vq::codebook::{Rotation, RotationScale, RotationVariant};
use transformer_vq::model::{FeedForwardParameters, NormParameters};

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
