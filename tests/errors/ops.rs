//! Operations on rows. (None of them looks for NaN: see `ops`.)

use ndarray::{Array1, Array2};
use transformer_vq::ops::dropout::{self, Stream};
use transformer_vq::ops::{cross_entropy, embedding, linear, positions, rms_norm, silu};

use super::refused;

fn zeros(rows: usize, width: usize) -> Array2<f32> {
    Array2::zeros((rows, width))
}

fn row(width: usize) -> Array1<f32> {
    Array1::zeros(width)
}

#[test]
fn linear_maps_check_shapes() {
    let x = zeros(5, 3);
    refused(linear::forward(x.view(), zeros(4, 2).view(), None), "Shape", "w");
    refused(linear::forward(x.view(), zeros(3, 2).view(), Some(row(3).view())), "Shape", "bias");
    let backward = |w: (usize, usize), d_y: (usize, usize), d_w: (usize, usize), d_bias| {
        let (mut d_w, mut d_bias) = (Array2::zeros(d_w), row(d_bias));
        let (w, d_y) = (Array2::zeros(w), Array2::zeros(d_y));
        linear::backward(x.view(), w.view(), d_y.view(), d_w.view_mut(), Some(d_bias.view_mut()))
    };
    refused(backward((2, 2), (5, 2), (3, 2), 2), "Shape", "w");
    refused(backward((3, 2), (4, 2), (3, 2), 2), "Shape", "d_y");
    refused(backward((3, 2), (5, 2), (2, 3), 2), "Shape", "d_w");
    refused(backward((3, 2), (5, 2), (3, 2), 1), "Shape", "d_bias");
    for (n, inputs, outputs) in [(0, 3, 2), (5, 0, 2), (5, 3, 0), (0, 0, 0)] {
        let y = linear::forward(
            zeros(n, inputs).view(),
            zeros(inputs, outputs).view(),
            Some(row(outputs).view()),
        );
        assert_eq!(y.unwrap(), zeros(n, outputs));
    }
}

#[test]
fn norms_check_groups_and_shapes() {
    let x = zeros(4, 6);
    for groups in [0, 4, 5, 7, usize::MAX] {
        refused(rms_norm::forward(x.view(), groups, 1.0), "Invalid", "groups");
    }
    let (_, saved) = rms_norm::forward(x.view(), 2, 1.0).unwrap();
    refused(rms_norm::backward(x.view(), &saved, 0, 1.0, x.view()), "Invalid", "groups");
    refused(rms_norm::backward(x.view(), &saved, 3, 1.0, x.view()), "Shape", "saved");
    refused(rms_norm::backward(zeros(5, 6).view(), &saved, 2, 1.0, x.view()), "Shape", "saved");
    refused(rms_norm::backward(x.view(), &saved, 2, 1.0, zeros(4, 5).view()), "Shape", "d_y");
    refused(rms_norm::forward_affine(x.view(), row(5).view(), row(6).view()), "Shape", "gain");
    refused(rms_norm::forward_affine(x.view(), row(6).view(), row(7).view()), "Shape", "bias");
    assert_eq!(rms_norm::forward(zeros(0, 6).view(), 2, 1.0).unwrap().0, zeros(0, 6));
    assert!(rms_norm::forward(zeros(4, 0).view(), 1, 1.0).is_err());
}

#[test]
fn gates_check_shapes() {
    let (x, other) = (zeros(4, 6), zeros(4, 5));
    refused(silu::backward(x.view(), other.view()), "Shape", "d_y");
    refused(silu::gate(x.view(), other.view()), "Shape", "g");
    refused(silu::gate_backward(x.view(), other.view(), x.view()), "Shape", "g");
    refused(silu::gate_backward(x.view(), x.view(), other.view()), "Shape", "d_y");
    assert_eq!(silu::forward(zeros(0, 5).view()).unwrap(), zeros(0, 5));
}

#[test]
fn cross_entropy_checks_targets_and_mask() {
    let logits = zeros(3, 4);
    let good = Array1::<u32>::zeros(3);
    for (targets, mask, variant, what) in [
        (Array1::zeros(2), Array1::from_elem(3, true), "Shape", "targets"),
        (Array1::from_elem(3, 4), Array1::from_elem(3, true), "OutOfRange", "targets"),
        (good.clone(), Array1::from_elem(4, true), "Shape", "mask"),
    ] {
        refused(cross_entropy::loss(logits.view(), targets.view(), Some(mask.view())), variant, what);
        refused(
            cross_entropy::forward_backward(logits.view(), targets.view(), Some(mask.view())),
            variant,
            what,
        );
    }
    refused(cross_entropy::log_probabilities(logits.view(), Array1::zeros(4).view()), "Shape", "targets");
    refused(cross_entropy::log_probabilities(zeros(3, 0).view(), good.view()), "OutOfRange", "targets");
    assert_eq!(cross_entropy::log_softmax(zeros(3, 0).view()).unwrap(), zeros(3, 0));
    assert_eq!(cross_entropy::loss(zeros(0, 0).view(), Array1::zeros(0).view(), None), Ok(0.0));
}

#[test]
fn embeddings_check_tokens() {
    let (table, tokens) = (zeros(4, 3), Array1::from_vec(vec![0, 4]));
    refused(embedding::forward(table.view(), tokens.view()), "OutOfRange", "tokens");
    refused(
        embedding::backward(tokens.view(), zeros(2, 3).view(), zeros(4, 3).view_mut()),
        "OutOfRange",
        "tokens",
    );
    let tokens = Array1::zeros(2);
    refused(embedding::backward(tokens.view(), zeros(3, 3).view(), zeros(4, 3).view_mut()), "Shape", "d_y");
    refused(embedding::forward(zeros(0, 3).view(), tokens.view()), "OutOfRange", "tokens");
    assert_eq!(embedding::forward(zeros(4, 0).view(), tokens.view()).unwrap(), zeros(2, 0));
    // A row is broadcast: so many rows cannot be copied out.
    let (wide, zero) = (ndarray::arr0(0f32), ndarray::arr0(0u32));
    let wide = wide.broadcast((1, 1 << 40)).unwrap();
    refused(embedding::forward(wide, zero.broadcast(1 << 20).unwrap()), "TooLarge", "y");
}

#[test]
fn sinusoids_check_their_numbers() {
    let sinusoids = positions::sinusoids::<f32>;
    for width in [0, 1, 7] {
        refused(sinusoids(0, 1, width, 1e5), "Invalid", "width");
    }
    for lambda in [0.0, 0.5, f64::NAN, f64::INFINITY] {
        refused(sinusoids(0, 1, 2, lambda), "Invalid", "lambda");
    }
    refused(sinusoids(u64::MAX, 2, 2, 1e5), "Invalid", "start");
    refused(sinusoids(0, usize::MAX, 2, 1e5), "TooLarge", "sinusoids");
    refused(sinusoids(0, 2, usize::MAX - 1, 1e5), "TooLarge", "sinusoids");
    // An array that could be addressed, and one without rows.
    refused(sinusoids(0, 1 << 50, 2, 1e5), "TooLarge", "sinusoids");
    refused(sinusoids(0, 0, 1 << 58, 1e5), "TooLarge", "sinusoids");
}

#[test]
fn dropout_checks_its_numbers() {
    let stream = Stream { seed: 1, purpose: 2, unit: 3, step: 4 };
    for rate in [-0.1, 1.0, f64::NAN] {
        refused(dropout::factors::<f32>(0, 1, rate, stream), "Invalid", "rate");
    }
    for n in [usize::MAX, 1 << 50] {
        refused(dropout::factors::<f32>(0, n, 0.5, stream), "TooLarge", "factors");
    }
}
