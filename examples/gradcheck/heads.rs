//! Level 3: attention over batch x heads, from queries and keys to output and commitment loss. Its surrogate: codes are
//! frozen, recent keys read `c_z + (k - k0)` with k0 the unmoved keys, the commitment loss reads the unmoved codewords.

use std::ops::Range;

use ndarray::{Array, Array2, Array3, Array4, Dimension, ShapeBuilder, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{
    AttentionState, BatchBiases, BatchInputs, Biases, Inputs, VqAttention, naive,
};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{Codebook, Ema, Estimator, lookup};

use super::Check;
use super::worst::worst;

const B: usize = 2;
const H: usize = 2;
const N_CODES: usize = 4;
const D_K: usize = 3;
const D_V: usize = 2;
const COMMIT_WEIGHT: f64 = 0.7;

/// The last block is ragged, the window shorter than a block.
const T: usize = 10;
const ATTENTION: VqAttention =
    VqAttention { block_len: 4, window: 3, cache: true, gradient_through_cache: true };

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-8 };
    vec![
        check("heads: q, k, v, c, u, w, r", || error(ATTENTION, false)),
        check("heads, masked", || error(ATTENTION, true)),
        check("heads, blocks constant, masked", || {
            error(VqAttention { gradient_through_cache: false, ..ATTENTION }, true)
        }),
        check("heads, window only", || error(VqAttention { cache: false, ..ATTENTION }, false)),
    ]
}

/// What is moved.
#[derive(Clone)]
struct Arrays {
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
    /// As the cache and the keys of the window read them.
    codewords: Array3<f64>,
    content: Array2<f64>,
    position: Array2<f64>,
    relative: Array3<f64>,
}

impl Arrays {
    fn random(rng: &mut ChaCha8Rng, attention: &VqAttention) -> Self {
        Arrays {
            q: random(rng, (B, H, T, D_K)),
            k: random(rng, (B, H, T, D_K)),
            v: random(rng, (B, H, T, D_V)),
            codewords: random(rng, (H, N_CODES, D_K)),
            content: random(rng, (H, D_K)),
            position: random(rng, (H, D_K)),
            relative: random(rng, (H, attention.window + 1, D_K)),
        }
    }

    fn batch<'a>(&'a self, mask: Option<&'a Array2<bool>>) -> BatchInputs<'a, f64> {
        BatchInputs {
            biases: Some(BatchBiases {
                content: self.content.view(),
                position: self.position.view(),
                relative: self.relative.view(),
            }),
            mask: mask.map(|mask| mask.view()),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }
}

/// Everything that stays as it is while arrays are moved.
struct Surrogate<'a> {
    attention: VqAttention,
    base: &'a Arrays,
    codes: Array3<u32>,
    quantized: Array4<f64>,
    mask: Option<&'a Array2<bool>>,
    d_out: Array4<f64>,
    /// By sequence and head: stretches over which gradients flow, each with the state before it.
    stretches: Vec<Vec<(Range<usize>, AttentionState<f64>)>>,
}

impl Surrogate<'_> {
    /// The whole piece, or single blocks where a block is a constant to later ones.
    fn cut(&mut self, states: &Array2<AttentionState<f64>>) {
        let len = if self.attention.gradient_through_cache { T } else { self.attention.block_len };
        for (index, state) in states.indexed_iter() {
            let mut state = state.clone();
            let stretches = (0..T).step_by(len).map(|start| {
                let tokens = start..T.min(start + len);
                let before = state.clone();
                state = self.attend(self.base, index, tokens.clone(), &before).1;
                (tokens, before)
            });
            let stretches = stretches.collect();
            self.stretches.push(stretches);
        }
    }

    /// The weighted output of one stretch of one head, and the state after it.
    fn attend(
        &self,
        x: &Arrays,
        (b, h): (usize, usize),
        tokens: Range<usize>,
        state: &AttentionState<f64>,
    ) -> (f64, AttentionState<f64>) {
        let rows = s![b, h, tokens.clone(), ..];
        let quantized = lookup(self.codes.view(), x.codewords.view()).unwrap();
        let k_hat = &quantized.slice(rows) + &x.k.slice(rows) - self.base.k.slice(rows);
        let inputs = Inputs {
            q: x.q.slice(rows),
            codes: self.codes.slice(s![b, h, tokens.clone()]),
            v: x.v.slice(rows),
            codewords: x.codewords.slice(s![h, .., ..]),
            biases: Some(Biases {
                content: x.content.row(h),
                position: x.position.row(h),
                relative: x.relative.slice(s![h, .., ..]),
            }),
            starts: None,
        };
        let (output, state) = naive::forward(&self.attention, &inputs, k_hat.view(), state).unwrap();
        ((&output.out * &self.d_out.slice(rows)).sum(), state)
    }

    fn total(&self, x: &Arrays) -> f64 {
        let (mut total, mut squares, mut counted) = (0.0, 0.0, 0.0);
        for ((b, h), stretches) in ndarray::indices((B, H)).into_iter().zip(&self.stretches) {
            for (tokens, state) in stretches {
                total += self.attend(x, (b, h), tokens.clone(), state).0;
            }
            for t in (0..T).filter(|&t| self.mask.is_none_or(|mask| mask[[b, t]])) {
                let row = s![b, h, t, ..];
                squares += (&x.k.slice(row) - &self.quantized.slice(row)).mapv(|e| e * e).sum();
                counted += 1.0 / H as f64;
            }
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
        relative_rms(got, &finite_difference(f, &at, 1e-3))
    }
}

/// The largest error over all gradients.
fn error(attention: VqAttention, masked: bool) -> f64 {
    let rng = &mut ChaCha8Rng::seed_from_u64(12);
    let (before, base) = (Arrays::random(rng, &attention), Arrays::random(rng, &attention));
    let mask = masked.then(|| Array2::from_shape_fn((B, T), |(b, t)| (b + 2 * t) % 5 > 1));
    let codebook = Codebook::ema(Ema::from_codewords(base.codewords.clone(), 0.9).unwrap());
    let mut states = attention.new_states(B, &codebook, D_V).unwrap();
    attention.push(&before.batch(None), &codebook, &mut states).unwrap();

    let codes = codebook.assign(base.k.view()).unwrap();
    let mut surrogate = Surrogate {
        attention,
        base: &base,
        quantized: lookup(codes.view(), base.codewords.view()).unwrap(),
        codes,
        mask: mask.as_ref(),
        d_out: random(rng, (B, H, T, D_V)),
        stretches: vec![],
    };
    surrogate.cut(&states);

    let inputs = base.batch(mask.as_ref());
    let (output, saved) = attention.forward(&inputs, &codebook, &mut states).unwrap();
    let d_out = surrogate.d_out.view();
    let got = attention.backward(&inputs, saved, d_out, Estimator::StraightThrough, COMMIT_WEIGHT).unwrap();
    let biases = got.biases.unwrap();
    let total = (&output.out * &surrogate.d_out).sum() + COMMIT_WEIGHT * output.commit_loss;
    let errors = [
        (total / surrogate.total(&base) - 1.0).abs(),
        surrogate.one(&got.q, |x| &mut x.q),
        surrogate.one(&got.k, |x| &mut x.k),
        surrogate.one(&got.v, |x| &mut x.v),
        surrogate.one(&biases.content, |x| &mut x.content),
        surrogate.one(&biases.position, |x| &mut x.position),
        surrogate.one(&biases.relative, |x| &mut x.relative),
        surrogate.one(&got.codewords, |x| &mut x.codewords),
    ];
    worst(errors)
}

/// Uniform in [-1, 1].
fn random<D: Dimension, Sh: ShapeBuilder<Dim = D>>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<f64, D> {
    Array::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}
