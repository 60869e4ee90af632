//! Level 1: the operations on rows. Every gradient that `transformer_vq::ops` offers, at sizes from one element to several
//! ragged ones; the whole module takes a fraction of a second.
//!
//! Most checks weight the outputs with random numbers, f = sum of d_y * forward(x), so that backward(d_y) is the gradient of f.

use ndarray::{Array, Array1, Array2, ArrayRef, ArrayView, ArrayView1, ArrayView2, Dimension, ShapeBuilder};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::ops::{cross_entropy, embedding, linear, rms_norm, silu};

use super::Check;
use super::worst::worst;

type View1<'a> = ArrayView1<'a, f64>;
type View2<'a> = ArrayView2<'a, f64>;

const STEP: f64 = 1e-3;
const TOLERANCE: f64 = 1e-8;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: TOLERANCE };
    vec![
        check("rms_norm: x, by heads", rms_norm_of_heads),
        check("rms_norm: x, gain, bias", rms_norm_affine),
        check("silu: x", silu_alone),
        check("silu gate: o, g", silu_gate),
        check("linear: x, w, bias", linear_with_bias),
        check("linear, tied weights: x, table", linear_tied),
        check("cross_entropy: logits", cross_entropy_unmasked),
        check("cross_entropy, masked: logits", cross_entropy_masked),
        check("embedding: table", embedding_table),
    ]
}

/// Uniform in [-1, 1].
fn random<D: Dimension, Sh: ShapeBuilder<Dim = D>>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<f64, D> {
    Array::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

/// The error of a gradient `got` of `f` at `x`.
fn error<D: Dimension>(
    got: &ArrayRef<f64, D>,
    x: &ArrayRef<f64, D>,
    f: impl FnMut(ArrayView<'_, f64, D>) -> f64,
) -> f64 {
    relative_rms(got, &finite_difference(f, x, STEP))
}

fn weighted(d_y: &Array2<f64>, y: &Array2<f64>) -> f64 {
    (d_y * y).sum()
}

/// Rows for `rms_norm` that a step of 1e-3 suits: its derivatives grow like 1 / norm^k towards 0, where only the epsilon
/// under the root bounds them. So elements stay away from 0, and a second size lies where that epsilon matters (with groups
/// of one element, everywhere else the gradient is of order 1e-6 and drowns in rounding). x = size * u; u is moved.
fn away_from_zero(rng: &mut ChaCha8Rng, dim: (usize, usize)) -> Array2<f64> {
    random(rng, dim).mapv(|u| u + 0.5 * u.signum())
}

fn rms_norm_of_heads() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let cases = [
        (1, 1, 1, 1e-3),
        (3, 6, 6, 1e-3),
        (1, 7, 1, 1.0),
        (1, 7, 1, 1e-3),
        (4, 12, 3, 1.0),
        (2, 40, 2, 1e-3),
        (300, 2, 1, 1.0),
    ];
    worst(cases.map(|(rows, width, groups, size)| {
        let u = away_from_zero(&mut rng, (rows, width));
        let x = size * &u;
        let d_y = random(&mut rng, (rows, width));
        let forward = |x: View2<'_>| rms_norm::forward(x, groups, 0.7).unwrap();
        let (_, saved) = forward(x.view());
        let d_x = rms_norm::backward(x.view(), &saved, groups, 0.7, d_y.view()).unwrap();
        error(&(size * d_x), &u, |u| weighted(&d_y, &forward((size * &u).view()).0))
    }))
}

fn rms_norm_affine() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let cases = [(1, 1, 1e-3), (1, 7, 1.0), (4, 12, 1.0), (2, 40, 1e-3), (300, 2, 1.0)];
    worst(cases.map(|(rows, width, size)| {
        let u = away_from_zero(&mut rng, (rows, width));
        let x = size * &u;
        let (gain, bias) = (random(&mut rng, width), random(&mut rng, width));
        let d_y = random(&mut rng, (rows, width));
        let (_, saved) = rms_norm::forward_affine(x.view(), gain.view(), bias.view()).unwrap();
        let (mut d_gain, mut d_bias) = (Array1::zeros(width), Array1::zeros(width));
        let sums = (d_gain.view_mut(), d_bias.view_mut());
        let d_x =
            rms_norm::backward_affine(x.view(), &saved, gain.view(), d_y.view(), sums.0, sums.1).unwrap();
        let f = |x: View2<'_>, gain: View1<'_>, bias: View1<'_>| {
            weighted(&d_y, &rms_norm::forward_affine(x, gain, bias).unwrap().0)
        };
        worst([
            error(&(size * d_x), &u, |u| f((size * &u).view(), gain.view(), bias.view())),
            error(&d_gain, &gain, |gain| f(x.view(), gain, bias.view())),
            error(&d_bias, &bias, |bias| f(x.view(), gain.view(), bias)),
        ])
    }))
}

fn silu_alone() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    worst([(1, 1), (3, 7), (2, 40)].map(|dim| {
        let (x, d_y) = (4.0 * random(&mut rng, dim), random(&mut rng, dim));
        let d_x = silu::backward(x.view(), d_y.view()).unwrap();
        error(&d_x, &x, |x| weighted(&d_y, &silu::forward(x).unwrap()))
    }))
}

fn silu_gate() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    worst([(1, 1), (3, 7), (2, 40)].map(|dim| {
        let (o, g, d_y) = (random(&mut rng, dim), 4.0 * random(&mut rng, dim), random(&mut rng, dim));
        let (d_o, d_g) = silu::gate_backward(o.view(), g.view(), d_y.view()).unwrap();
        let f = |o: View2<'_>, g: View2<'_>| weighted(&d_y, &silu::gate(o, g).unwrap());
        worst([error(&d_o, &o, |o| f(o, g.view())), error(&d_g, &g, |g| f(o.view(), g))])
    }))
}

fn linear_with_bias() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    worst([(1, 1, 1), (1, 5, 3), (4, 3, 7), (40, 2, 3)].map(|(rows, inputs, outputs)| {
        let x = random(&mut rng, (rows, inputs));
        let (w, bias) = (random(&mut rng, (inputs, outputs)), random(&mut rng, outputs));
        let d_y = random(&mut rng, (rows, outputs));
        let (mut d_w, mut d_bias) = (Array2::zeros(w.dim()), Array1::zeros(outputs));
        let sums = (d_w.view_mut(), Some(d_bias.view_mut()));
        let d_x = linear::backward(x.view(), w.view(), d_y.view(), sums.0, sums.1).unwrap();
        let f = |x: View2<'_>, w: View2<'_>, bias: View1<'_>| {
            weighted(&d_y, &linear::forward(x, w, Some(bias)).unwrap())
        };
        worst([
            error(&d_x, &x, |x| f(x, w.view(), bias.view())),
            error(&d_w, &w, |w| f(x.view(), w, bias.view())),
            error(&d_bias, &bias, |bias| f(x.view(), w.view(), bias)),
        ])
    }))
}

fn linear_tied() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (x, table, d_y) = (random(&mut rng, (5, 4)), random(&mut rng, (9, 4)), random(&mut rng, (5, 9)));
    let mut d_table = Array2::zeros(table.dim());
    let d_w = d_table.view_mut().reversed_axes();
    let d_x = linear::backward(x.view(), table.t(), d_y.view(), d_w, None).unwrap();
    let f = |x: View2<'_>, table: View2<'_>| {
        weighted(&d_y, &linear::forward(x, table.reversed_axes(), None).unwrap())
    };
    worst([error(&d_x, &x, |x| f(x, table.view())), error(&d_table, &table, |table| f(x.view(), table))])
}

fn cross_entropy_unmasked() -> f64 {
    cross_entropy_where(7, |_| true)
}

fn cross_entropy_masked() -> f64 {
    cross_entropy_where(8, |row| row % 3 != 1)
}

fn cross_entropy_where(seed: u64, counts: fn(usize) -> bool) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    worst([(1, 2), (4, 7), (2, 300), (30, 3)].map(|(rows, vocab)| {
        let logits = 3.0 * random(&mut rng, (rows, vocab));
        let targets = Array1::from_shape_simple_fn(rows, || rng.random_range(0..vocab as u32));
        let mask = Array1::from_shape_fn(rows, counts);
        let (_, d_logits) =
            cross_entropy::forward_backward(logits.view(), targets.view(), Some(mask.view())).unwrap();
        error(&d_logits, &logits, |logits| {
            cross_entropy::loss(logits, targets.view(), Some(mask.view())).unwrap()
        })
    }))
}

fn embedding_table() -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    worst([(1, 1, 1), (5, 3, 8), (9, 70, 40)].map(|(vocab, width, rows)| {
        let table = random(&mut rng, (vocab, width));
        let tokens = Array1::from_shape_simple_fn(rows, || rng.random_range(0..vocab as u32));
        let d_y = random(&mut rng, (rows, width));
        let mut d_table = Array2::zeros(table.dim());
        embedding::backward(tokens.view(), d_y.view(), d_table.view_mut()).unwrap();
        error(&d_table, &table, |table| weighted(&d_y, &embedding::forward(table, tokens.view()).unwrap()))
    }))
}
