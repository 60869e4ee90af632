//! Level 3: bidirectional attention, of one head and over batch x heads. Its surrogate: codes are frozen; where keys share the
//! gradient of their codeword, a codeword moves with the mean of its keys; the commitment loss reads the unmoved codewords.

use ndarray::{Array, Array1, Array2, Array3, Array4, ArrayView2, Dimension, ShapeBuilder, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::bidirectional::{self, Inputs, naive};
use transformer_vq::attention::{BidirectionalAttention, BidirectionalInputs};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{Codebook, Ema, Estimator, lookup};

use super::Check;
use super::worst::worst;

const N_CODES: usize = 5;
const D_K: usize = 3;
const D_V: usize = 2;
const STEP: f64 = 1e-3;

const B: usize = 2;
/// Key heads, each read by two query heads.
const H: usize = 2;
const QUERIES: usize = 4;
const KEYS: usize = 9;
const COMMIT_WEIGHT: f64 = 0.7;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-8 };
    vec![
        check("bidirectional: q, v, c", || one_head(false)),
        check("bidirectional, masked: q, v, c", || one_head(true)),
        check("bidirectional heads: q, k, v, c", || heads(false, false)),
        check("bidirectional heads, masked", || heads(false, true)),
        check("bidirectional heads, keys share", || heads(true, false)),
        check("bidirectional heads, keys share, masked", || heads(true, true)),
    ]
}

/// Uniform in [-1, 1].
fn random<D: Dimension, Sh: ShapeBuilder<Dim = D>>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<f64, D> {
    Array::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

fn inputs<'a>(
    q: ArrayView2<'a, f64>,
    (codes, mask): (&'a Array1<u32>, Option<&'a Array1<bool>>),
    v: ArrayView2<'a, f64>,
    codewords: ArrayView2<'a, f64>,
) -> Inputs<'a, f64> {
    Inputs { q, codes: codes.view(), v, codewords, key_mask: mask.map(|mask| mask.view()) }
}

fn one_head(masked: bool) -> f64 {
    // Fewer and more queries than keys, more than a strip of 64.
    let errors = [(7, 12), (12, 7), (1, 3), (70, 5)].map(|(t, keys)| {
        let mut rng = ChaCha8Rng::seed_from_u64((t * 100 + keys) as u64);
        let (q, codewords) = (random(&mut rng, (t, D_K)), random(&mut rng, (N_CODES, D_K)));
        let (v, d_out) = (random(&mut rng, (keys, D_V)), random(&mut rng, (t, D_V)));
        let codes = Array1::from_shape_simple_fn(keys, || rng.random_range(0..N_CODES as u32));
        let mask = masked.then(|| Array1::from_shape_fn(keys, |j| j % 3 != 1));
        let keys = (&codes, mask.as_ref());
        let loss = |q: ArrayView2<f64>, v: ArrayView2<f64>, codewords: ArrayView2<f64>| {
            (naive::forward(&inputs(q, keys, v, codewords)).unwrap().out * &d_out).sum()
        };
        let expected = [
            finite_difference(|q| loss(q, v.view(), codewords.view()), &q, STEP),
            finite_difference(|v| loss(q.view(), v, codewords.view()), &v, STEP),
            finite_difference(|c| loss(q.view(), v.view(), c), &codewords, STEP),
        ];
        let inputs = inputs(q.view(), keys, v.view(), codewords.view());
        let (_, saved) = bidirectional::forward(&inputs).unwrap();
        let d = bidirectional::backward(&inputs, saved, d_out.view()).unwrap();
        let got = [d.q, d.v, d.codewords];
        worst(got.iter().zip(&expected).map(|(got, expected)| relative_rms(got, expected)))
    });
    worst(errors)
}

/// What is moved.
#[derive(Clone)]
struct Arrays {
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
    codewords: Array3<f64>,
}

/// Everything that stays as it is while arrays are moved.
struct Surrogate<'a> {
    base: &'a Arrays,
    codes: Array3<u32>,
    quantized: Array4<f64>,
    mask: Option<Array2<bool>>,
    key_gradient: bool,
    d_out: Array4<f64>,
}

impl Surrogate<'_> {
    fn exists(&self, b: usize, j: usize) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask[[b, j]])
    }

    /// The codewords as the queries of sequence b read them.
    fn codewords(&self, x: &Arrays, b: usize, h: usize) -> Array2<f64> {
        let mut codewords = x.codewords.slice(s![h, .., ..]).to_owned();
        for s in (0..N_CODES as u32).filter(|_| self.key_gradient) {
            let keys: Vec<usize> =
                (0..KEYS).filter(|&j| self.exists(b, j) && self.codes[[b, h, j]] == s).collect();
            for &j in &keys {
                let moved = &x.k.slice(s![b, h, j, ..]) - &self.base.k.slice(s![b, h, j, ..]);
                codewords.row_mut(s as usize).scaled_add(1.0 / keys.len() as f64, &moved);
            }
        }
        codewords
    }

    fn total(&self, x: &Arrays) -> f64 {
        let (mut total, mut squares, mut counted) = (0.0, 0.0, 0.0);
        for (b, head) in ndarray::indices((B, 2 * H)) {
            let codewords = self.codewords(x, b, head / 2);
            let inputs = Inputs {
                q: x.q.slice(s![b, head, .., ..]),
                codes: self.codes.slice(s![b, head / 2, ..]),
                v: x.v.slice(s![b, head / 2, .., ..]),
                codewords: codewords.view(),
                key_mask: self.mask.as_ref().map(|mask| mask.row(b)),
            };
            total += (naive::forward(&inputs).unwrap().out * self.d_out.slice(s![b, head, .., ..])).sum();
        }
        for (b, h, j) in ndarray::indices((B, H, KEYS)).into_iter().filter(|&(b, _, j)| self.exists(b, j)) {
            let row = s![b, h, j, ..];
            squares += (&x.k.slice(row) - &self.quantized.slice(row)).mapv(|e| e * e).sum();
            counted += 1.0 / H as f64;
        }
        total + COMMIT_WEIGHT * squares / counted
    }

    /// The error of one gradient, that of the array which `array` picks.
    fn one<D: Dimension>(&self, got: &Array<f64, D>, array: fn(&mut Arrays) -> &mut Array<f64, D>) -> f64 {
        let mut moved = self.base.clone();
        let at = array(&mut moved).clone();
        let f = |x: ndarray::ArrayView<'_, f64, D>| {
            array(&mut moved).assign(&x);
            self.total(&moved)
        };
        relative_rms(got, &finite_difference(f, &at, STEP))
    }
}

fn heads(key_gradient: bool, masked: bool) -> f64 {
    let rng = &mut ChaCha8Rng::seed_from_u64(12);
    let base = Arrays {
        q: random(rng, (B, 2 * H, QUERIES, D_K)),
        k: random(rng, (B, H, KEYS, D_K)),
        v: random(rng, (B, H, KEYS, D_V)),
        codewords: random(rng, (H, N_CODES, D_K)),
    };
    let codebook = Codebook::ema(Ema::from_codewords(base.codewords.clone(), 0.9).unwrap());
    let codes = codebook.assign(base.k.view()).unwrap();
    let surrogate = Surrogate {
        base: &base,
        quantized: lookup(codes.view(), base.codewords.view()).unwrap(),
        codes,
        mask: masked.then(|| Array2::from_shape_fn((B, KEYS), |(b, j)| (b + 2 * j) % 5 > 1)),
        key_gradient,
        d_out: random(rng, (B, 2 * H, QUERIES, D_V)),
    };
    let attention = BidirectionalAttention { key_gradient };
    let inputs = BidirectionalInputs {
        q: base.q.view(),
        k: base.k.view(),
        v: base.v.view(),
        key_mask: surrogate.mask.as_ref().map(|mask| mask.view()),
    };
    let (output, saved) = attention.forward(&inputs, &codebook).unwrap();
    let through = Estimator::StraightThrough;
    let got = attention.backward(&inputs, saved, surrogate.d_out.view(), through, COMMIT_WEIGHT).unwrap();
    let total = (&output.out * &surrogate.d_out).sum() + COMMIT_WEIGHT * output.commit_loss;
    let errors = [
        (total / surrogate.total(&base) - 1.0).abs(),
        surrogate.one(&got.q, |x| &mut x.q),
        surrogate.one(&got.k, |x| &mut x.k),
        surrogate.one(&got.v, |x| &mut x.v),
        surrogate.one(&got.codewords, |x| &mut x.codewords),
    ];
    worst(errors)
}
