//! Random attention problems, shared by the tests of all forms.

use std::ops::Range;

use ndarray::{Array, Array1, Array2, Dimension, ShapeBuilder, s};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, stream};

#[path = "../../examples/support/worst.rs"]
pub mod worst;

/// Standard normal numbers.
pub fn normal<T: Scalar, Sh: ShapeBuilder>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<T, Sh::Dim>
where
    Sh::Dim: Dimension,
{
    Array::from_shape_simple_fn(shape, || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        T::from_f64((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos())
    })
}

/// Uniform in [-1, 1].
pub fn random<T: Scalar, Sh: ShapeBuilder>(rng: &mut ChaCha8Rng, shape: Sh) -> Array<T, Sh::Dim>
where
    Sh::Dim: Dimension,
{
    Array::from_shape_simple_fn(shape, || T::from_f64(rng.random_range(-1.0..1.0)))
}

/// Sizes and options of one problem.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Tokens of the piece.
    pub t: usize,
    /// Tokens before it, which its state carries.
    pub before: usize,
    pub n_codes: usize,
    pub d_k: usize,
    pub d_v: usize,
    pub biases: bool,
    /// The codebook has moved between the tokens before and the piece.
    pub moved: bool,
    pub attention: VqAttention,
    pub seed: u64,
}

/// All kinds of problems, small ones.
pub fn cases() -> impl Strategy<Value = Case> {
    // Some pieces and blocks are longer than the 64 queries that a block treats at once.
    let tokens = prop_oneof![4 => 0..90usize, 1 => 90..200usize];
    let block_len = prop_oneof![3 => 1..40usize, 1 => 40..200usize];
    // Some widths are narrower than a register, some need several of the widest and end inside one.
    let d_k = prop_oneof![2 => 3..8usize, 1 => 8..40usize];
    let d_v = prop_oneof![2 => 1..6usize, 1 => 6..90usize];
    // Some windows reach over several times 64 queries.
    let window = prop_oneof![3 => 0..30usize, 1 => 30..150usize];
    let sizes = (tokens, 0..60usize, 2..9usize, d_k, d_v);
    let attention = (block_len, window, any::<bool>(), any::<bool>());
    (sizes, attention, any::<[bool; 2]>(), any::<u64>()).prop_map(
        |(sizes, attention, [biases, moved], seed)| {
            let (t, before, n_codes, d_k, d_v) = sizes;
            let (block_len, window, cache, gradient_through_cache) = attention;
            let attention = VqAttention { block_len, window, cache, gradient_through_cache };
            Case { t, before, n_codes, d_k, d_v, biases, moved, attention, seed }
        },
    )
}

/// The same cases in every run.
pub fn config(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(1);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

/// Owned inputs of one head.
#[derive(Debug, Clone)]
pub struct Problem<T> {
    pub q: Array2<T>,
    pub codes: Array1<u32>,
    pub v: Array2<T>,
    pub codewords: Array2<T>,
    pub biases: Option<(Array1<T>, Array1<T>, Array2<T>)>,
    /// Where documents start.
    pub starts: Option<Array1<bool>>,
    pub d_out: Array2<T>,
    /// Carried from an earlier piece.
    pub state: AttentionState<T>,
}

impl<T: Scalar> Problem<T> {
    pub fn new(case: &Case) -> Self {
        let Case { t, before, n_codes, d_k, d_v, attention, seed, .. } = *case;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let codes = |rng: &mut ChaCha8Rng, t: usize| {
            Array1::from_shape_simple_fn(t, || rng.random_range(0..n_codes as u32))
        };
        let vector = |rng: &mut ChaCha8Rng| normal(rng, d_k) * T::from_f64(0.5);
        let biases = case.biases.then(|| {
            let relative = normal(&mut rng, (attention.window + 1, d_k)) * T::from_f64(0.5);
            (vector(&mut rng), vector(&mut rng), relative)
        });
        let mut problem = Problem {
            q: normal(&mut rng, (before, d_k)),
            codes: codes(&mut rng, before),
            v: normal(&mut rng, (before, d_v)),
            codewords: normal(&mut rng, (n_codes, d_k)),
            biases,
            starts: None,
            d_out: Array2::zeros((0, 0)),
            state: AttentionState::new(n_codes, d_k, d_v, attention.window).unwrap(),
        };
        let mut state = problem.state.clone();
        stream::push(&attention, &problem.inputs(), &mut state).unwrap();
        problem.q = normal(&mut rng, (t, d_k));
        problem.codes = codes(&mut rng, t);
        problem.v = normal(&mut rng, (t, d_v));
        if case.moved {
            problem.codewords = normal(&mut rng, (n_codes, d_k));
        }
        problem.d_out = normal(&mut rng, (t, d_v));
        problem.state = state;
        problem
    }

    /// The same piece with documents that start in it, about one in `tokens`.
    #[allow(dead_code)] // each test takes its part
    pub fn with_documents(mut self, tokens: u64, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let starts = Array1::from_shape_simple_fn(self.q.nrows(), || rng.random_range(0..tokens) == 0);
        self.starts = Some(starts);
        self
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            q: self.q.view(),
            codes: self.codes.view(),
            v: self.v.view(),
            codewords: self.codewords.view(),
            biases: self.biases.as_ref().map(|(content, position, relative)| Biases {
                content: content.view(),
                position: position.view(),
                relative: relative.view(),
            }),
            starts: self.starts.as_ref().map(|starts| starts.view()),
        }
    }

    /// Inputs of some of the tokens.
    pub fn piece(&self, tokens: Range<usize>) -> Inputs<'_, T> {
        let inputs = self.inputs();
        Inputs {
            q: inputs.q.slice_move(s![tokens.clone(), ..]),
            codes: inputs.codes.slice_move(s![tokens.clone()]),
            v: inputs.v.slice_move(s![tokens.clone(), ..]),
            starts: inputs.starts.map(|starts| starts.slice_move(s![tokens])),
            ..inputs
        }
    }

    /// The quantized keys.
    #[allow(dead_code)] // likewise
    pub fn k_hat(&self) -> Array2<T> {
        Array2::from_shape_fn(self.q.raw_dim(), |(j, k)| self.codewords[[self.codes[j] as usize, k]])
    }
}
