//! Level 3: attention. The finite differences are those of the surrogate in the naive form: codes are frozen, recent keys
//! read their own quantized key, cached keys read today's codeword.

use std::ops::Range;

use ndarray::{Array, Array1, Array2, ArrayView2, Dimension, ShapeBuilder, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, blockwise, naive, quadratic};
use transformer_vq::check::{finite_difference, relative_rms};

use super::Check;
use super::worst::worst;

const STEP: f64 = 1e-3;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-8 };
    vec![
        check("attention: q, k^, v, c, u, w, r", || piece_error(true, true, true)),
        check("attention without biases: q, k^, v, c", || piece_error(true, true, false)),
        check("attention, blocks constant to later ones", || piece_error(true, false, true)),
        check("attention, window only", || piece_error(false, true, true)),
        check("attention, window only, blocks constant", || piece_error(false, false, true)),
        check("attention, several documents", documents_error),
        check("attention, quadratic: q, k, v", || quadratic_error(false)),
        check("attention, quadratic, several documents", || quadratic_error(true)),
    ]
}

/// The largest error where documents start in the piece: the first goes on from before, or begins with the piece.
fn documents_error() -> f64 {
    let sizes = [(13, 7, 4, 3, 5), (13, 7, 2, 0, 0), (11, 9, 3, 5, 1), (9, 0, 16, 2, 8)];
    let errors = sizes.map(|(t, before, block_len, window, first)| {
        let attention = VqAttention { block_len, window, ..VqAttention::default() };
        let starts = Array1::from_shape_fn(t, |i| i == first || i % 6 == 5);
        Case { starts: Some(starts), ..Case::new(attention, t, before, true) }.error()
    });
    worst(errors)
}

fn piece_error(cache: bool, gradient_through_cache: bool, biases: bool) -> f64 {
    // (tokens, tokens before, block length, window): ragged ends, windows shorter and longer than blocks, none at all.
    let sizes = [(13, 0, 4, 3), (11, 9, 3, 5), (9, 4, 4, 0), (7, 20, 1, 2), (10, 6, 16, 4)];
    let errors = sizes.map(|(t, before, block_len, window)| {
        let attention = VqAttention { block_len, window, cache, gradient_through_cache };
        Case::new(attention, t, before, biases).error()
    });
    worst(errors)
}

/// The largest error of attention over keys that are not quantized, at lengths of one and of two of its strips of 64 keys.
fn quadratic_error(documents: bool) -> f64 {
    let errors = [2, 7, 70].map(|t| {
        let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
        let [q, k] = [0; 2].map(|_| random(&mut rng, (t, 3)));
        let [v, d_out] = [0; 2].map(|_| random(&mut rng, (t, 2)));
        let starts = Array1::from_shape_fn(t, |i| documents && i % 30 == 3);
        let forward = |q: ArrayView2<f64>, k: ArrayView2<f64>, v: ArrayView2<f64>| {
            quadratic::forward_documents(q, k, v, starts.view()).unwrap()
        };
        let (out, lse) = forward(q.view(), k.view(), v.view());
        let of_forward = (out.view(), lse.view());
        let got = quadratic::backward_documents(
            (q.view(), k.view(), v.view()),
            starts.view(),
            of_forward,
            d_out.view(),
        )
        .unwrap();
        let loss =
            |q: ArrayView2<f64>, k: ArrayView2<f64>, v: ArrayView2<f64>| (forward(q, k, v).0 * &d_out).sum();
        let expected = [
            finite_difference(|q| loss(q, k.view(), v.view()), &q, STEP),
            finite_difference(|k| loss(q.view(), k, v.view()), &k, STEP),
            finite_difference(|v| loss(q.view(), k.view(), v), &v, STEP),
        ];
        let got = [got.q, got.k, got.v];
        worst(got.iter().zip(&expected).map(|(got, expected)| relative_rms(got, expected)))
    });
    worst(errors)
}

/// One head with everything that can be moved.
#[derive(Clone)]
struct Case {
    attention: VqAttention,
    q: Array2<f64>,
    codes: Array1<u32>,
    k_hat: Array2<f64>,
    v: Array2<f64>,
    codewords: Array2<f64>,
    biases: Option<(Array1<f64>, Array1<f64>, Array2<f64>)>,
    /// Where documents start.
    starts: Option<Array1<bool>>,
    d_out: Array2<f64>,
    state: AttentionState<f64>,
}

impl Case {
    fn new(attention: VqAttention, t: usize, before: usize, biased: bool) -> Self {
        const N_CODES: usize = 4;
        const D_K: usize = 3;
        const D_V: usize = 2;
        let mut rng = ChaCha8Rng::seed_from_u64((t * 100 + before) as u64);
        let rng = &mut rng;
        let codes =
            |rng: &mut ChaCha8Rng, n| Array1::from_shape_simple_fn(n, || rng.random_range(0..N_CODES as u32));
        let codewords = random(rng, (N_CODES, D_K));
        let mut state = AttentionState::new(N_CODES, D_K, D_V, attention.window).unwrap();
        let case = |rng: &mut ChaCha8Rng, t: usize, state| {
            let codes = codes(rng, t);
            Case {
                attention,
                q: random(rng, (t, D_K)),
                k_hat: Array2::from_shape_fn((t, D_K), |(j, k)| codewords[[codes[j] as usize, k]]),
                codes,
                v: random(rng, (t, D_V)),
                codewords: codewords.clone(),
                biases: biased.then(|| {
                    let relative = random(rng, (attention.window + 1, D_K));
                    (random(rng, D_K), random(rng, D_K), relative)
                }),
                starts: None,
                d_out: random(rng, (t, D_V)),
                state,
            }
        };
        let earlier = case(rng, before, state.clone());
        blockwise::forward(&attention, &earlier.inputs(0..before), &mut state).unwrap();
        case(rng, t, state)
    }

    fn inputs(&self, tokens: Range<usize>) -> Inputs<'_, f64> {
        Inputs {
            q: self.q.slice(s![tokens.clone(), ..]),
            codes: self.codes.slice(s![tokens.clone()]),
            v: self.v.slice(s![tokens.clone(), ..]),
            codewords: self.codewords.view(),
            biases: self.biases.as_ref().map(|(content, position, relative)| Biases {
                content: content.view(),
                position: position.view(),
                relative: relative.view(),
            }),
            starts: self.starts.as_ref().map(|starts| starts.slice(s![tokens])),
        }
    }

    /// The stretches over which gradients flow, each with the state before it: the whole piece, or single blocks where a
    /// block is a constant to later ones.
    fn stretches(&self) -> Vec<(Range<usize>, AttentionState<f64>)> {
        let t = self.q.nrows();
        let len = if self.attention.gradient_through_cache { t } else { self.attention.block_len };
        let mut state = self.state.clone();
        let starts = (0..t).step_by(len);
        let stretch = starts.map(|start| {
            let tokens = start..t.min(start + len);
            let before = state.clone();
            state = self.naive(tokens.clone(), &before).1;
            (tokens, before)
        });
        stretch.collect()
    }

    fn naive(&self, tokens: Range<usize>, state: &AttentionState<f64>) -> (f64, AttentionState<f64>) {
        let k_hat = self.k_hat.slice(s![tokens.clone(), ..]);
        let inputs = self.inputs(tokens.clone());
        let (output, state) = naive::forward(&self.attention, &inputs, k_hat, state).unwrap();
        ((&output.out * &self.d_out.slice(s![tokens, ..])).sum(), state)
    }

    /// The largest error over all gradients.
    fn error(&self) -> f64 {
        let mut state = self.state.clone();
        let t = self.q.nrows();
        let (_, saved) = blockwise::forward(&self.attention, &self.inputs(0..t), &mut state).unwrap();
        let got = blockwise::backward(&self.attention, &self.inputs(0..t), saved, self.d_out.view()).unwrap();
        let stretches = self.stretches();
        let loss = |case: &Case| -> f64 {
            stretches.iter().map(|(tokens, state)| case.naive(tokens.clone(), state).0).sum()
        };
        let mut errors = vec![
            self.one(&loss, &self.q, &got.q, |case, x| case.q = x),
            self.one(&loss, &self.k_hat, &got.k_hat, |case, x| case.k_hat = x),
            self.one(&loss, &self.v, &got.v, |case, x| case.v = x),
        ];
        if self.attention.cache {
            errors.push(self.one(&loss, &self.codewords, &got.codewords, |case, x| case.codewords = x));
        } else {
            // Nothing is read through the codebook.
            errors.push(if got.codewords.iter().all(|&d| d == 0.0) { 0.0 } else { f64::INFINITY });
        }
        if let (Some((u, w, r)), Some(got)) = (&self.biases, &got.biases) {
            errors.push(self.one(&loss, u, &got.content, |case, x| case.biases.as_mut().unwrap().0 = x));
            errors.push(self.one(&loss, w, &got.position, |case, x| case.biases.as_mut().unwrap().1 = x));
            errors.push(self.one(&loss, r, &got.relative, |case, x| case.biases.as_mut().unwrap().2 = x));
        }
        worst(errors)
    }

    /// The error of one gradient, that of the array which `put` replaces.
    fn one<D: Dimension>(
        &self,
        loss: &dyn Fn(&Case) -> f64,
        x: &Array<f64, D>,
        got: &Array<f64, D>,
        put: fn(&mut Case, Array<f64, D>),
    ) -> f64 {
        let mut moved = self.clone();
        let expected = finite_difference(
            |x| {
                put(&mut moved, x.to_owned());
                loss(&moved)
            },
            x,
            STEP,
        );
        relative_rms(got, &expected)
    }
}

/// Uniform in [-1, 1].
fn random<D: Dimension, Sh: ShapeBuilder<Dim = D>>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<f64, D> {
    Array::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}
