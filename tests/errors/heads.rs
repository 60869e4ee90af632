//! Batch x heads.

use ndarray::{Array1, Array2, Array3, Array4};
use transformer_vq::Error;
use transformer_vq::attention::{
    AttentionState, BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved, VqAttention,
};
use transformer_vq::codebook::{Codebook, Ema, Estimator};

use super::{BAD, refused};

const B: usize = 2;
const H: usize = 3;
const T: usize = 6;
const S: usize = 5;
const K: usize = 4;
const V: usize = 2;
const ATTENTION: VqAttention =
    VqAttention { block_len: 4, window: 3, cache: true, gradient_through_cache: true };

struct Batch {
    attention: VqAttention,
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    content: Array2<f32>,
    position: Array2<f32>,
    relative: Array3<f32>,
    mask: Array2<bool>,
    starts: Array2<bool>,
    lengths: Array1<usize>,
    codebook: Codebook<f32>,
    states: Array2<AttentionState<f32>>,
}

fn codebook(dim: (usize, usize, usize)) -> Codebook<f32> {
    Codebook::ema(Ema::from_codewords(Array3::from_shape_fn(dim, |(_, s, _)| s as f32), 0.9).unwrap())
}

fn states(b: usize, codebook: &Codebook<f32>, d_v: usize, window: usize) -> Array2<AttentionState<f32>> {
    VqAttention { window, ..ATTENTION }.new_states(b, codebook, d_v).unwrap()
}

impl Batch {
    fn new() -> Self {
        let codebook = codebook((H, S, K));
        Batch {
            attention: ATTENTION,
            q: Array4::zeros((B, H, T, K)),
            k: Array4::zeros((B, H, T, K)),
            v: Array4::zeros((B, H, T, V)),
            content: Array2::zeros((H, K)),
            position: Array2::zeros((H, K)),
            relative: Array3::zeros((H, 4, K)),
            mask: Array2::from_elem((B, T), true),
            starts: Array2::from_shape_fn((B, T), |(_, t)| t == 3),
            lengths: Array1::from_vec(vec![T, T - 1]),
            states: states(B, &codebook, V, 3),
            codebook,
        }
    }

    fn inputs(&self) -> BatchInputs<'_, f32> {
        BatchInputs {
            biases: Some(BatchBiases {
                content: self.content.view(),
                position: self.position.view(),
                relative: self.relative.view(),
            }),
            mask: Some(self.mask.view()),
            starts: Some(self.starts.view()),
            lengths: Some(self.lengths.view()),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    fn push_prepared(
        &self,
        biased: bool,
        states: &mut Array2<AttentionState<f32>>,
    ) -> Result<BatchOutput<f32>, Error> {
        let biases = self.inputs().biases.filter(|_| biased);
        let heads = self.attention.prepare(&self.codebook, biases)?;
        heads.push(self.q.view(), self.k.view(), self.v.view(), states)
    }

    fn saved(&self) -> BatchSaved<f32> {
        self.attention.forward(&self.inputs(), &self.codebook, &mut self.states.clone()).unwrap().1
    }

    fn backward(&self, saved: BatchSaved<f32>) -> Result<BatchGradients<f32>, Error> {
        let d_out = Array4::zeros(self.v.raw_dim());
        self.attention.backward(&self.inputs(), saved, d_out.view(), Estimator::StraightThrough, 0.1)
    }
}

type Spoil = fn(&mut Batch, f32);

/// What forward, push and backward refuse alike.
const BAD_INPUTS: [(&str, &str, Spoil); 24] = [
    ("Invalid", "block_len", |b, _| b.attention.block_len = 0),
    ("Invalid", "block_len + window", |b, _| b.attention.block_len = usize::MAX),
    ("Invalid", "block_len + window", |b, _| b.attention.window = usize::MAX),
    ("Shape", "k", |b, _| b.k = Array4::zeros((B, H, T, K + 1))),
    ("Shape", "k", |b, _| b.k = Array4::zeros((B, H, T - 1, K))),
    ("Shape", "v", |b, _| b.v = Array4::zeros((B, H - 1, T, V))),
    ("Shape", "v", |b, _| b.v = Array4::zeros((B, H, T + 1, V))),
    ("Shape", "mask", |b, _| b.mask = Array2::from_elem((T, B), true)),
    ("Shape", "starts", |b, _| b.starts = Array2::from_elem((B, T + 1), true)),
    ("Shape", "lengths", |b, _| b.lengths = Array1::zeros(1)),
    ("Invalid", "lengths", |b, _| b.lengths[1] = T + 1),
    ("Shape", "biases.content", |b, _| b.content = Array2::zeros((H, K + 1))),
    ("Shape", "biases.position", |b, _| b.position = Array2::zeros((1, K))),
    ("Shape", "biases.relative", |b, _| b.relative = Array3::zeros((H, 3, K))),
    ("Shape", "biases.relative", |b, _| b.relative = Array3::zeros((0, 0, 0))),
    ("NotFinite", "q", |b, bad| b.q[[0, 2, 5, 3]] = bad),
    ("NotFinite", "k", |b, bad| b.k[[0, 0, 0, 0]] = bad),
    ("NotFinite", "v", |b, bad| b.v[[1, 0, 3, 1]] = bad),
    ("NotFinite", "q", |b, bad| b.q[[1, 2, T - 1, 3]] = bad), // does not exist
    ("NotFinite", "k", |b, bad| b.k[[1, 2, T - 1, 3]] = bad),
    ("NotFinite", "v", |b, bad| b.v[[1, 0, T - 1, 1]] = bad),
    ("NotFinite", "biases.content", |b, bad| b.content[[2, 0]] = bad),
    ("NotFinite", "biases.position", |b, bad| b.position[[0, 3]] = bad),
    ("NotFinite", "biases.relative", |b, bad| b.relative[[1, 3, 2]] = bad),
];

/// What forward and push refuse: here a codebook and states come in.
const BAD_SURROUNDINGS: [(&str, &str, Spoil); 8] = [
    ("Shape", "k", |b, _| b.codebook = codebook((H, S, K + 1))),
    ("Shape", "k", |b, _| b.codebook = codebook((1, S, K))),
    ("Shape", "state.mean", |b, _| b.codebook = codebook((H, S + 1, K))),
    ("Shape", "state.mean", |b, _| b.states = states(B, &b.codebook, V + 1, 3)),
    ("Shape", "state.k_hat", |b, _| b.states = states(B, &b.codebook, V, 2)),
    ("Shape", "state.k_hat", |b, _| b.states = states(B, &codebook((H, S, K + 1)), V, 3)),
    ("Shape", "states", |b, _| b.states = states(B + 1, &b.codebook, V, 3)),
    ("Shape", "states", |b, _| b.states = states(0, &b.codebook, V, 3)),
];

#[test]
fn bad_inputs_are_told_apart_and_states_kept() {
    for bad in BAD {
        for (i, &(variant, what, spoil)) in BAD_INPUTS.iter().chain(&BAD_SURROUNDINGS).enumerate() {
            let mut batch = Batch::new();
            let saved = batch.saved();
            spoil(&mut batch, bad as f32);
            let mut states = batch.states.clone();
            refused(batch.attention.forward(&batch.inputs(), &batch.codebook, &mut states), variant, what);
            refused(batch.attention.push(&batch.inputs(), &batch.codebook, &mut states), variant, what);
            // It has no mask, no documents, and biases are to fit the codebook before queries come.
            if !["mask", "starts", "lengths"].contains(&what) {
                refused(batch.push_prepared(i < BAD_INPUTS.len(), &mut states), variant, what);
            }
            assert_eq!(states, batch.states);
            if i < BAD_INPUTS.len() {
                refused(batch.backward(saved), variant, what);
            }
        }
    }
}

#[test]
fn backward_checks_what_it_is_given() {
    let batch = Batch::new();
    let backward = |saved, d_out: &Array4<f32>, weight| {
        ATTENTION.backward(&batch.inputs(), saved, d_out.view(), Estimator::StraightThrough, weight)
    };
    let good = batch.v.clone();
    assert!(backward(batch.saved(), &good, 0.1).is_ok());
    refused(backward(batch.saved(), &Array4::zeros((B, H, T, V + 1)), 0.1), "Shape", "d_out");
    for bad in BAD {
        refused(
            backward(batch.saved(), &Array4::from_elem(good.dim(), bad as f32), 0.1),
            "NotFinite",
            "d_out",
        );
        refused(backward(batch.saved(), &good, bad), "Invalid", "commit_weight");
    }
    let saved_by = |spoil: Spoil| {
        let mut other = Batch::new();
        spoil(&mut other, 0.0);
        other.saved()
    };
    let longer = saved_by(|b, _| {
        [b.q, b.k] = [(); 2].map(|()| Array4::zeros((B, H, T + 1, K)));
        (b.v, b.mask) = (Array4::zeros((B, H, T + 1, V)), Array2::from_elem((B, T + 1), true));
        b.starts = Array2::from_elem((B, T + 1), false);
    });
    refused(backward(longer, &good, 0.1), "Shape", "saved.codes");
    let other_window = saved_by(|b, _| {
        b.attention.window = 2;
        (b.relative, b.states) = (Array3::zeros((H, 3, K)), states(B, &b.codebook, V, 2));
    });
    refused(backward(other_window, &good, 0.1), "Shape", "state.k_hat");
    let wider_values = saved_by(|b, _| {
        (b.v, b.states) = (Array4::zeros((B, H, T, V + 1)), states(B, &b.codebook, V + 1, 3));
    });
    refused(backward(wider_values, &good, 0.1), "Shape", "state.mean");
    let wider_keys = saved_by(|b, _| {
        b.codebook = codebook((H, S, 1));
        [b.q, b.k] = [(); 2].map(|()| Array4::zeros((B, H, T, 1)));
        [b.content, b.position] = [(); 2].map(|()| Array2::zeros((H, 1)));
        (b.relative, b.states) = (Array3::zeros((H, 4, 1)), states(B, &b.codebook, V, 3));
    });
    refused(backward(wider_keys, &good, 0.1), "Shape", "saved.codewords");
}

#[test]
fn backward_under_other_lengths_is_refused() {
    let mut batch = Batch::new();
    let saved = batch.saved();
    batch.lengths[0] = 2;
    refused(batch.backward(saved), "Shape", "saved.lse");
}

#[test]
fn queries_without_heads_are_refused() {
    for t in [1, T] {
        let mut batch = Batch::new();
        batch.q = Array4::zeros((B, 0, t, K));
        [batch.k, batch.v] = [K, V].map(|width| Array4::zeros((B, H, t, width)));
        (batch.content, batch.position) = (Array2::zeros((0, K)), Array2::zeros((0, K)));
        let inputs = BatchInputs { mask: None, starts: None, lengths: None, ..batch.inputs() };
        let mut states = batch.states.clone();
        refused(ATTENTION.forward(&inputs, &batch.codebook, &mut states), "Shape", "k");
        refused(ATTENTION.push(&inputs, &batch.codebook, &mut states), "Shape", "k");
        refused(batch.push_prepared(false, &mut states), "Shape", "k");
        assert_eq!(states, batch.states);
    }
}

/// Scores beyond the largest number make lse NaN; backward takes what forward has given.
#[test]
fn scores_that_overflow_come_back_as_no_numbers() {
    let mut batch = Batch::new();
    batch.q.fill(f32::MAX);
    batch.k.fill(3.0);
    let (output, saved) =
        batch.attention.forward(&batch.inputs(), &batch.codebook, &mut batch.states.clone()).unwrap();
    assert!(output.lse.iter().any(|lse| lse.is_nan()));
    let gradients = batch.backward(saved).unwrap();
    assert_eq!(gradients.q.dim(), batch.q.dim());
}

#[test]
fn states_that_cannot_exist_are_refused() {
    let book = codebook((1, 1, 1));
    let new = |attention: VqAttention, batch, d_v| attention.new_states(batch, &book, d_v);
    refused(new(VqAttention { block_len: 0, ..ATTENTION }, 1, 1), "Invalid", "block_len");
    refused(new(VqAttention { window: usize::MAX, ..ATTENTION }, 1, 1), "Invalid", "block_len + window");
    let no_window = VqAttention { window: 0, ..ATTENTION };
    // Each state is small, their number is not; with and without values.
    for d_v in [0, 1] {
        for batch in [usize::MAX, 1 << 58] {
            refused(new(no_window, batch, d_v), "TooLarge", "states");
        }
    }
    refused(new(ATTENTION, 1, usize::MAX), "TooLarge", "states");
    refused(new(ATTENTION, 1 << 32, 1 << 32), "TooLarge", "states");
    assert_eq!(new(ATTENTION, 0, 0).unwrap().dim(), (0, 1));
}

#[test]
fn nothing_at_all_is_computed() {
    for (b, t, d_v) in [(0, T, V), (B, 0, V), (B, T, 0), (0, 0, 0), (B, 1, 0), (0, 1, V)] {
        let mut batch = Batch::new();
        [batch.q, batch.k] = [(); 2].map(|()| Array4::zeros((b, H, t, K)));
        (batch.v, batch.mask) = (Array4::zeros((b, H, t, d_v)), Array2::from_elem((b, t), true));
        (batch.starts, batch.lengths) = (batch.mask.clone(), Array1::from_elem(b, t));
        batch.states = states(b, &batch.codebook, d_v, 3);
        let push = ATTENTION.push(&batch.inputs(), &batch.codebook, &mut batch.states.clone()).unwrap();
        assert_eq!((push.out.dim(), push.commit_loss), ((b, H, t, d_v), 0.0));
        let push = batch.push_prepared(true, &mut batch.states.clone()).unwrap();
        assert_eq!((push.out.dim(), push.commit_loss), ((b, H, t, d_v), 0.0));
        let gradients = batch.backward(batch.saved()).unwrap();
        assert_eq!((gradients.q.dim(), gradients.v.dim()), ((b, H, t, K), (b, H, t, d_v)));
    }
}
