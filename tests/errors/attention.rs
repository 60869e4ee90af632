//! One head: naive, blockwise and stream.

use ndarray::{Array1, Array2, Axis, concatenate, s};
use transformer_vq::attention::{AttentionState, VqAttention, blockwise, naive, stream};

use super::support::{Case, Problem};
use super::{BAD, refused};

const ATTENTION: VqAttention =
    VqAttention { block_len: 4, window: 3, cache: true, gradient_through_cache: true };
const CASE: Case = Case {
    t: 6,
    before: 9,
    n_codes: 5,
    d_k: 3,
    d_v: 2,
    biases: true,
    moved: false,
    attention: ATTENTION,
    seed: 1,
};

/// How a good problem is spoilt.
type Spoil = fn(&mut VqAttention, &mut Problem<f64>, f64);

/// What is refused by every form, in which way, and by which name.
const BAD_INPUTS: [(&str, &str, Spoil); 27] = [
    ("Invalid", "block_len", |a, _, _| a.block_len = 0),
    ("Invalid", "block_len + window", |a, _, _| a.block_len = usize::MAX),
    ("Invalid", "block_len + window", |a, _, _| a.window = usize::MAX),
    ("Invalid", "block_len + window", |a, _, _| (a.block_len, a.window) = (1 << 30, (1 << 30) + 1)),
    ("Shape", "codes", |_, p, _| p.codes = Array1::zeros(7)),
    ("Shape", "v", |_, p, _| p.v = Array2::zeros((5, 2))),
    ("Shape", "codewords", |_, p, _| p.codewords = Array2::zeros((5, 4))),
    ("Shape", "codewords", |_, p, _| p.q = Array2::zeros((6, 0))),
    ("Shape", "starts", |_, p, _| p.starts = Some(Array1::from_elem(5, true))),
    ("Shape", "starts", |_, p, _| p.starts = Some(Array1::from_elem(0, true))),
    ("Shape", "biases.content", |_, p, _| p.biases.as_mut().unwrap().0 = Array1::zeros(4)),
    ("Shape", "biases.position", |_, p, _| p.biases.as_mut().unwrap().1 = Array1::zeros(0)),
    ("Shape", "biases.relative", |_, p, _| p.biases.as_mut().unwrap().2 = Array2::zeros((3, 3))),
    ("Shape", "biases.relative", |_, p, _| p.biases.as_mut().unwrap().2 = Array2::zeros((4, 2))),
    ("Shape", "state.mean", |_, p, _| p.codewords = Array2::zeros((6, 3))),
    ("Shape", "state.mean", |_, p, _| p.v = Array2::zeros((6, 1))),
    ("Shape", "state.k_hat", |_, p, _| p.state = AttentionState::new(5, 3, 2, 4).unwrap()),
    ("Shape", "state.k_hat", |_, p, _| p.state = AttentionState::new(5, 4, 2, 3).unwrap()),
    ("Empty", "codewords", |_, p, _| p.codewords = Array2::zeros((0, 3))),
    ("Empty", "codewords", |_, p, _| (p.q, p.codewords) = (Array2::zeros((6, 0)), Array2::zeros((5, 0)))),
    ("NotFinite", "q", |_, p, bad| p.q[[5, 2]] = bad),
    ("NotFinite", "v", |_, p, bad| p.v[[0, 1]] = bad),
    ("NotFinite", "codewords", |_, p, bad| p.codewords[[4, 0]] = bad),
    ("NotFinite", "biases.content", |_, p, bad| p.biases.as_mut().unwrap().0[2] = bad),
    ("NotFinite", "biases.position", |_, p, bad| p.biases.as_mut().unwrap().1[0] = bad),
    ("NotFinite", "biases.relative", |_, p, bad| p.biases.as_mut().unwrap().2[[3, 2]] = bad),
    ("OutOfRange", "codes", |_, p, _| p.codes[5] = 5),
];

#[test]
fn every_form_tells_bad_inputs_apart_and_keeps_its_state() {
    for (variant, what, spoil) in BAD_INPUTS {
        for bad in BAD {
            let (mut attention, mut problem) = (ATTENTION, Problem::<f64>::new(&CASE));
            let saved =
                blockwise::forward(&attention, &problem.inputs(), &mut problem.state.clone()).unwrap().1;
            spoil(&mut attention, &mut problem, bad);
            let (inputs, k_hat) = (problem.inputs(), problem.q.view());
            let d_out = problem.v.view();
            refused(naive::forward(&attention, &inputs, k_hat, &problem.state), variant, what);
            refused(naive::backward(&attention, &inputs, k_hat, &problem.state, d_out), variant, what);
            let mut state = problem.state.clone();
            refused(blockwise::forward(&attention, &inputs, &mut state), variant, what);
            refused(stream::push(&attention, &inputs, &mut state), variant, what);
            assert_eq!(state, problem.state);
            if what != "state.k_hat" {
                refused(blockwise::backward(&attention, &inputs, saved, d_out), variant, what);
            }
        }
    }
}

#[test]
fn what_only_backward_and_the_definition_take_is_checked() {
    let problem = Problem::<f64>::new(&CASE);
    let (inputs, k_hat, state) = (problem.inputs(), problem.k_hat(), &problem.state);
    let saved = || blockwise::forward(&ATTENTION, &inputs, &mut state.clone()).unwrap().1;
    for wrong in [(6, 1), (5, 2), (0, 0)] {
        let wrong = Array2::zeros(wrong);
        refused(naive::backward(&ATTENTION, &inputs, k_hat.view(), state, wrong.view()), "Shape", "d_out");
        refused(blockwise::backward(&ATTENTION, &inputs, saved(), wrong.view()), "Shape", "d_out");
        refused(naive::forward(&ATTENTION, &inputs, wrong.view(), state), "Shape", "k_hat");
    }
    for bad in BAD {
        let mut d_out = problem.d_out.clone();
        d_out[[5, 1]] = bad;
        refused(
            naive::backward(&ATTENTION, &inputs, k_hat.view(), state, d_out.view()),
            "NotFinite",
            "d_out",
        );
        refused(blockwise::backward(&ATTENTION, &inputs, saved(), d_out.view()), "NotFinite", "d_out");
        let mut k_hat = k_hat.clone();
        k_hat[[0, 0]] = bad;
        refused(naive::forward(&ATTENTION, &inputs, k_hat.view(), state), "NotFinite", "k_hat");
    }
    // Saved by another piece, by another window, by other sizes.
    let piece = problem.piece(0..5);
    let d_out = problem.d_out.slice(s![..5, ..]);
    refused(blockwise::backward(&ATTENTION, &piece, saved(), d_out), "Shape", "saved.lse");
    for attention in [VqAttention { window: 2, ..ATTENTION }, VqAttention { window: 4, ..ATTENTION }] {
        let mut other = problem.clone();
        other.biases = None;
        let result = blockwise::backward(&attention, &other.inputs(), saved(), problem.d_out.view());
        refused(result, "Shape", "state.k_hat");
    }
    let other = Problem::<f64>::new(&Case { n_codes: 6, ..CASE });
    let result = blockwise::backward(&ATTENTION, &other.inputs(), saved(), other.d_out.view());
    refused(result, "Shape", "state.mean");
}

/// Sizes of zero that mean something, and block lengths far beyond the piece.
#[test]
fn corner_sizes_are_computed() {
    let most = (1 << 31) - 3;
    for (t, d_v) in [(0, 2), (0, 0), (6, 0), (1, 1), (6, 2)] {
        for (block_len, window) in [(4, 3), (most, 3), (1, 0), (7, 40)] {
            for (before, cache) in [(9, true), (9, false), (0, true), (0, false)] {
                let attention = VqAttention { block_len, window, cache, ..ATTENTION };
                let problem = Problem::<f32>::new(&Case { t, d_v, before, attention, ..CASE });
                let (inputs, k_hat) = (problem.inputs(), problem.k_hat());
                let mut state = problem.state.clone();
                let (expected, after) =
                    naive::forward(&attention, &inputs, k_hat.view(), &problem.state).unwrap();
                let (output, saved) = blockwise::forward(&attention, &inputs, &mut state).unwrap();
                assert_eq!((output.out.dim(), output.lse.len()), ((t, d_v), t));
                assert_eq!(expected.out.dim(), (t, d_v));
                assert_eq!((state.position(), after.position()), ((before + t) as u64, (before + t) as u64));
                let d = blockwise::backward(&attention, &inputs, saved, problem.d_out.view()).unwrap();
                assert_eq!((d.q.dim(), d.v.dim()), ((t, 3), (t, d_v)));
                naive::backward(&attention, &inputs, k_hat.view(), &problem.state, problem.d_out.view())
                    .unwrap();
                let mut state = problem.state.clone();
                let pushed: Vec<_> = (0..t)
                    .map(|i| stream::push(&attention, &problem.piece(i..i + 1), &mut state).unwrap().out)
                    .collect();
                if let [first, ..] = &pushed[..] {
                    assert_eq!(first.dim(), (1, d_v));
                    let all = Vec::from_iter(pushed.iter().map(|out| out.view()));
                    assert_eq!(concatenate(Axis(0), &all).unwrap().dim(), (t, d_v));
                }
            }
        }
    }
}

#[test]
fn extreme_finite_numbers_do_not_panic() {
    let problem = Problem::<f32>::new(&CASE);
    for size in [f32::MAX, 1e20, 1e-45] {
        let mut problem = problem.clone();
        problem.q.mapv_inplace(|x| x.signum() * size);
        problem.v.mapv_inplace(|x| x.signum() * size);
        let mut state = problem.state.clone();
        let (_, saved) = blockwise::forward(&ATTENTION, &problem.inputs(), &mut state).unwrap();
        blockwise::backward(&ATTENTION, &problem.inputs(), saved, problem.d_out.view()).unwrap();
        stream::push(&ATTENTION, &problem.piece(0..1), &mut problem.state.clone()).unwrap();
    }
}
