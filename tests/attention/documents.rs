//! Several documents in one sequence, and sequences of different lengths in one batch: everything is what each gives alone, to
//! the bit, in every form.

use std::ops::Range;

use crate::support::worst::worst;
use crate::support::{Problem, cases, random};
use ndarray::{Array1, Array2, Array3, Array4, ArrayViewMut2, Axis, s};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{
    AttentionState, BatchBiasGradients, BatchBiases, BatchGradients, BatchInputs, BatchOutput, Biases,
    Gradients, Inputs, Output, VqAttention, blockwise, quadratic, stream,
};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema, Estimator, Rotation, commitment};

type Computed = (Output<f64>, AttentionState<f64>);

fn by_blocks(attention: &VqAttention, problem: &Problem<f64>, state: &AttentionState<f64>) -> Computed {
    let mut state = state.clone();
    (blockwise::forward(attention, &problem.inputs(), &mut state).unwrap().0, state)
}

fn by_stream(attention: &VqAttention, problem: &Problem<f64>, state: &AttentionState<f64>) -> Computed {
    let mut state = state.clone();
    (stream::push(attention, &problem.inputs(), &mut state).unwrap(), state)
}

fn gradients(attention: &VqAttention, problem: &Problem<f64>, state: &AttentionState<f64>) -> Gradients<f64> {
    let (_, saved) = blockwise::forward(attention, &problem.inputs(), &mut state.clone()).unwrap();
    blockwise::backward(attention, &problem.inputs(), saved, problem.d_out.view()).unwrap()
}

/// The documents of a piece, and whether each begins in it.
fn documents(starts: &Array1<bool>) -> Vec<(Range<usize>, bool)> {
    let mut cuts: Vec<usize> = (0..starts.len()).filter(|&t| t == 0 || starts[t]).collect();
    cuts.push(starts.len());
    cuts.windows(2).map(|ends| (ends[0]..ends[1], starts[ends[0]])).collect()
}

/// One document by itself.
fn alone(problem: &Problem<f64>, tokens: Range<usize>) -> Problem<f64> {
    Problem {
        q: problem.q.slice(s![tokens.clone(), ..]).to_owned(),
        codes: problem.codes.slice(s![tokens.clone()]).to_owned(),
        v: problem.v.slice(s![tokens.clone(), ..]).to_owned(),
        d_out: problem.d_out.slice(s![tokens, ..]).to_owned(),
        starts: None,
        ..problem.clone()
    }
}

proptest! {
    #![proptest_config(crate::support::config(100))]

    #[test]
    fn each_document_is_as_if_it_had_been_fed_alone(case in cases(), every in 1..60u64) {
        let attention = &case.attention;
        let problem = Problem::<f64>::new(&case).with_documents(every, case.seed);
        let fresh = AttentionState::new(case.n_codes, case.d_k, case.d_v, attention.window).unwrap();
        let starts = problem.starts.as_ref().unwrap();
        for form in [by_blocks, by_stream] {
            let (output, state) = form(attention, &problem, &problem.state);
            let mut last = problem.state.clone();
            for (tokens, begins) in documents(starts).into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
                let before = if begins { &fresh } else { &problem.state };
                let (one, after) = form(attention, &alone(&problem, tokens.clone()), before);
                prop_assert_eq!(&output.out.slice(s![tokens.clone(), ..]), &one.out);
                prop_assert_eq!(&output.lse.slice(s![tokens.clone()]), &one.lse);
                prop_assert_eq!(&output.cached_mass.slice(s![tokens]), &one.cached_mass);
                last = after;
            }
            prop_assert_eq!(state, last);
        }
        let d = gradients(attention, &problem, &problem.state);
        let mut d_codewords = Array2::<f64>::zeros(d.codewords.raw_dim());
        let [mut d_content, mut d_position] = [(); 2].map(|()| Array1::<f64>::zeros(case.d_k));
        let mut d_relative = Array2::<f64>::zeros((attention.window + 1, case.d_k));
        for (tokens, begins) in documents(starts) {
            let before = if begins { &fresh } else { &problem.state };
            let one = gradients(attention, &alone(&problem, tokens.clone()), before);
            prop_assert_eq!(&d.q.slice(s![tokens.clone(), ..]), &one.q);
            prop_assert_eq!(&d.k_hat.slice(s![tokens.clone(), ..]), &one.k_hat);
            prop_assert_eq!(&d.v.slice(s![tokens, ..]), &one.v);
            d_codewords += &one.codewords;
            if let Some(one) = one.biases {
                d_content += &one.content;
                d_position += &one.position;
                d_relative += &one.relative;
            }
        }
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-13 * (1.0 + b.abs());
        prop_assert!(d.codewords.iter().zip(&d_codewords).all(|(&a, &b)| close(a, b)));
        if let Some(d) = d.biases {
            prop_assert!(d.content.iter().zip(&d_content).all(|(&a, &b)| close(a, b)));
            prop_assert!(d.position.iter().zip(&d_position).all(|(&a, &b)| close(a, b)));
            prop_assert!(d.relative.iter().zip(&d_relative).all(|(&a, &b)| close(a, b)));
        }
    }

    #[test]
    fn documents_go_on_from_piece_to_piece(case in cases(), every in 1..60u64, len in 1..40usize) {
        let attention = &case.attention;
        prop_assume!(!case.moved);
        let problem = Problem::<f64>::new(&case).with_documents(every, case.seed);
        let (whole, whole_state) = by_blocks(attention, &problem, &problem.state);
        let mut state = problem.state.clone();
        for from in (0..case.t).step_by(len) {
            let tokens = from..case.t.min(from + len);
            let output = stream::push(attention, &problem.piece(tokens.clone()), &mut state).unwrap();
            for (got, expected) in output.out.iter().zip(whole.out.slice(s![tokens.clone(), ..])) {
                prop_assert!((got - expected).abs() < 1e-13);
            }
            for (got, expected) in output.lse.iter().zip(whole.lse.slice(s![tokens])) {
                prop_assert!((got - expected).abs() < 1e-13);
            }
        }
        prop_assert_eq!(state, whole_state, "to the bit");
    }

    #[test]
    fn without_a_start_nothing_changes(case in cases()) {
        let mut problem = Problem::<f64>::new(&case);
        let expected = by_blocks(&case.attention, &problem, &problem.state);
        let expected_d = gradients(&case.attention, &problem, &problem.state);
        problem.starts = Some(Array1::from_elem(case.t, false));
        let got = by_blocks(&case.attention, &problem, &problem.state);
        prop_assert_eq!((got.0.out, got.0.lse, got.1), (expected.0.out, expected.0.lse, expected.1));
        let got = gradients(&case.attention, &problem, &problem.state);
        prop_assert_eq!((got.q, got.v, got.codewords), (expected_d.q, expected_d.v, expected_d.codewords));
    }

    #[test]
    fn a_state_that_was_reset_is_a_new_one(case in cases()) {
        let mut problem = Problem::<f64>::new(&case);
        let fresh = AttentionState::new(case.n_codes, case.d_k, case.d_v, case.attention.window).unwrap();
        stream::push(&case.attention, &problem.inputs(), &mut problem.state.clone()).unwrap();
        problem.state.reset();
        prop_assert_eq!(problem.state, fresh);
    }
}

#[test]
fn quadratic_attention_meets_each_document_alone() {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    for (t, every) in [(0, 3), (1, 1), (70, 7), (300, 90), (300, 1000)] {
        let [q, k]: [Array2<f64>; 2] = [(); 2].map(|()| random(rng, (t, 5)));
        let [v, d_out] = [(); 2].map(|()| random(rng, (t, 3)));
        let starts = Array1::from_shape_fn(t, |t| t % every == every / 2);
        let (out, lse) = quadratic::forward_documents(q.view(), k.view(), v.view(), starts.view()).unwrap();
        let given = (out.view(), lse.view());
        let inputs = (q.view(), k.view(), v.view());
        let d = quadratic::backward_documents(inputs, starts.view(), given, d_out.view()).unwrap();
        for (tokens, _) in documents(&starts) {
            let rows = s![tokens.clone(), ..];
            let (q, k, v) = (q.slice(rows), k.slice(rows), v.slice(rows));
            let (one, numbers) = quadratic::forward(q, k, v).unwrap();
            assert_eq!((out.slice(rows), lse.slice(s![tokens])), (one.view(), numbers.view()));
            let one = quadratic::backward(q, k, v, one.view(), numbers.view(), d_out.slice(rows)).unwrap();
            let got = (d.q.slice(rows), d.k.slice(rows), d.v.slice(rows));
            assert_eq!(got, (one.q.view(), one.k.view(), one.v.view()));
        }
    }
}

const B: usize = 4;
const H: usize = 2;
const S: usize = 7;
const K: usize = 5;
const V: usize = 4;
const COMMIT_WEIGHT: f64 = 0.3;

struct Batch {
    attention: VqAttention,
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
    content: Array2<f64>,
    position: Array2<f64>,
    relative: Array3<f64>,
    mask: Array2<bool>,
    starts: Option<Array2<bool>>,
    lengths: Option<Array1<usize>>,
    codebook: Codebook<f64>,
    states: Array2<AttentionState<f64>>,
    d_out: Array4<f64>,
}

impl Batch {
    /// T tokens, with so many query heads for each key head.
    fn new(attention: VqAttention, (t, group): (usize, usize), documents: bool, padded: bool) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let codebook = Codebook::ema(Ema::from_codewords(random(rng, (H, S, K)), 0.9).unwrap());
        let states = attention.new_states(B, &codebook, V).unwrap();
        let starts = documents.then(|| Array2::from_shape_simple_fn((B, t), || rng.random_range(0..8) == 0));
        let mut batch = Batch {
            q: random(rng, (B, group * H, t, K)),
            k: random(rng, (B, H, t, K)),
            v: random(rng, (B, H, t, V)),
            content: random(rng, (group * H, K)),
            position: random(rng, (group * H, K)),
            relative: random(rng, (H, attention.window + 1, K)),
            mask: Array2::from_shape_fn((B, t), |(b, t)| (b + 2 * t) % 5 > 1),
            starts,
            lengths: padded.then(|| Array1::from_vec(vec![t, 0, t * 17 / 30, 1])),
            codebook,
            states: states.clone(),
            d_out: random(rng, (B, group * H, t, V)),
            attention,
        };
        // All of it has been seen before: states are filled.
        batch.states = batch.push(&batch.inputs(), states).1;
        batch.q = random(rng, (B, group * H, t, K));
        batch.k = random(rng, (B, H, t, K));
        batch.v = random(rng, (B, H, t, V));
        batch
    }

    fn inputs(&self) -> BatchInputs<'_, f64> {
        BatchInputs {
            biases: Some(BatchBiases {
                content: self.content.view(),
                position: self.position.view(),
                relative: self.relative.view(),
            }),
            mask: Some(self.mask.view()),
            starts: self.starts.as_ref().map(|starts| starts.view()),
            lengths: self.lengths.as_ref().map(|lengths| lengths.view()),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    /// T.
    fn t(&self) -> usize {
        self.q.len_of(Axis(2))
    }

    fn len(&self, b: usize) -> usize {
        self.lengths.as_ref().map_or(self.t(), |lengths| lengths[b])
    }

    /// What query head h of sequence b takes, as far as it exists.
    fn head<'s>(
        &'s self,
        (b, h): (usize, usize),
        codes: &'s Array3<u32>,
        codewords: &'s Array3<f64>,
    ) -> Inputs<'s, f64> {
        let (key_head, len) = (h / (self.q.dim().1 / H), self.len(b));
        Inputs {
            q: self.q.slice(s![b, h, ..len, ..]),
            codes: codes.slice(s![b, key_head, ..len]),
            v: self.v.slice(s![b, key_head, ..len, ..]),
            codewords: codewords.index_axis(Axis(0), key_head),
            biases: Some(Biases {
                content: self.content.row(h),
                position: self.position.row(h),
                relative: self.relative.index_axis(Axis(0), key_head),
            }),
            starts: self.starts.as_ref().map(|starts| starts.slice(s![b, ..len])),
        }
    }

    /// Sequence b as far as it exists, in a batch of its own.
    fn sequence(&self, b: usize) -> BatchInputs<'_, f64> {
        self.tokens(b..b + 1, 0..self.len(b))
    }

    /// Some tokens of some sequences.
    fn tokens(&self, b: Range<usize>, t: Range<usize>) -> BatchInputs<'_, f64> {
        let BatchInputs { q, k, v, biases, mask, starts, .. } = self.inputs();
        let [q, k, v] = [q, k, v].map(|x| x.slice_move(s![b.clone(), .., t.clone(), ..]));
        let [mask, starts] = [mask, starts].map(|x| x.map(|x| x.slice_move(s![b.clone(), t.clone()])));
        BatchInputs { biases, mask, starts, ..BatchInputs::new(q, k, v) }
    }

    fn run(
        &self,
        inputs: &BatchInputs<'_, f64>,
        mut states: Array2<AttentionState<f64>>,
        d_out: ndarray::ArrayView4<'_, f64>,
        commit_weight: f64,
    ) -> (BatchOutput<f64>, Array2<AttentionState<f64>>, BatchGradients<f64>) {
        let (output, saved) = self.attention.forward(inputs, &self.codebook, &mut states).unwrap();
        let through = Estimator::StraightThrough;
        let d = self.attention.backward(inputs, saved, d_out, through, commit_weight).unwrap();
        (output, states, d)
    }

    fn push(
        &self,
        inputs: &BatchInputs<'_, f64>,
        mut states: Array2<AttentionState<f64>>,
    ) -> (BatchOutput<f64>, Array2<AttentionState<f64>>) {
        (self.attention.push(inputs, &self.codebook, &mut states).unwrap(), states)
    }
}

fn batches() -> Vec<Batch> {
    let base = VqAttention { block_len: 6, window: 4, ..VqAttention::default() };
    let kinds = [
        base,
        VqAttention { gradient_through_cache: false, ..base },
        VqAttention { cache: false, ..base },
        VqAttention { block_len: 40, window: 0, ..base },
    ];
    let options = [(1, false, false), (1, true, false), (1, false, true), (1, true, true), (2, true, true)];
    let of_kind = |kind| options.map(|(group, a, b)| Batch::new(kind, (30, group), a, b));
    kinds.into_iter().flat_map(of_kind).collect()
}

/// More tokens than keys are treated at once (64), and than a task takes (1024).
fn long_batches() -> impl Iterator<Item = Batch> {
    let attention = VqAttention { block_len: 100, window: 70, ..VqAttention::default() };
    let options = [(70, 1, false), (70, 2, true), (1100, 2, false), (1100, 2, true)];
    options.into_iter().map(move |(t, group, documents)| Batch::new(attention, (t, group), documents, true))
}

fn zeros_of(d: &BatchGradients<f64>) -> BatchGradients<f64> {
    let biases = d.biases.as_ref().unwrap();
    BatchGradients {
        q: Array4::zeros(d.q.raw_dim()),
        k: Array4::zeros(d.k.raw_dim()),
        v: Array4::zeros(d.v.raw_dim()),
        codewords: Array3::zeros(d.codewords.raw_dim()),
        biases: Some(BatchBiasGradients {
            content: Array2::zeros(biases.content.raw_dim()),
            position: Array2::zeros(biases.position.raw_dim()),
            relative: Array3::zeros(biases.relative.raw_dim()),
        }),
    }
}

/// Relative RMS of the gradients of everything that all sequences share.
fn error_of_shared(got: &BatchGradients<f64>, expected: &BatchGradients<f64>) -> f64 {
    let (u, v) = (got.biases.as_ref().unwrap(), expected.biases.as_ref().unwrap());
    worst([
        relative_rms(&got.codewords, &expected.codewords),
        relative_rms(&u.content, &v.content),
        relative_rms(&u.position, &v.position),
        relative_rms(&u.relative, &v.relative),
    ])
}

/// The functions of one head and of the codebook, called one by one on the tokens that exist, under every estimator.
#[test]
fn heads_are_the_functions_of_one_head_called_one_by_one() {
    let rotation = Estimator::Rotation(Rotation::default());
    let estimators = [Estimator::StraightThrough, rotation, Estimator::Directional, Estimator::None];
    for batch in batches().into_iter().chain(long_batches()) {
        let (inputs, d_out, group) = (batch.inputs(), batch.d_out.view(), batch.q.dim().1 / H);
        let mut states = batch.states.clone();
        let (output, saved) = batch.attention.forward(&inputs, &batch.codebook, &mut states).unwrap();
        let backward = |estimator| {
            batch.attention.backward(&inputs, saved.clone(), d_out, estimator, COMMIT_WEIGHT).unwrap()
        };
        let (codes, codewords) = (batch.codebook.assign(batch.k.view()).unwrap(), batch.codebook.codewords());
        // Of quantized keys in place of keys, and of codewords as the cache reads them.
        let mut sums = zeros_of(&backward(Estimator::StraightThrough));
        for (b, h) in ndarray::indices((B, group * H)) {
            let (key_head, rows) = (h / group, s![b, h, ..batch.len(b), ..]);
            let of_keys = s![b, key_head, ..batch.len(b), ..];
            let (one, mut state) =
                (batch.head((b, h), &codes, &codewords), batch.states[[b, key_head]].clone());
            let (of_head, saved) = blockwise::forward(&batch.attention, &one, &mut state).unwrap();
            let own = s![b, h, ..batch.len(b)];
            assert_eq!(
                (output.out.slice(rows), output.lse.slice(own)),
                (of_head.out.view(), of_head.lse.view())
            );
            assert_eq!(output.cached_mass.slice(own), of_head.cached_mass);
            assert_eq!(states[[b, key_head]], state);
            let d = blockwise::backward(&batch.attention, &one, saved, batch.d_out.slice(rows)).unwrap();
            let (of_biases, d_biases) = (sums.biases.as_mut().unwrap(), d.biases.unwrap());
            let add = |mut sum: ArrayViewMut2<'_, f64>, d: &Array2<f64>| sum += d;
            add(sums.q.slice_mut(rows), &d.q);
            add(sums.k.slice_mut(of_keys), &d.k_hat);
            add(sums.v.slice_mut(of_keys), &d.v);
            add(sums.codewords.index_axis_mut(Axis(0), key_head), &d.codewords);
            add(of_biases.content.slice_mut(s![h..=h, ..]), &d_biases.content.insert_axis(Axis(0)));
            add(of_biases.position.slice_mut(s![h..=h, ..]), &d_biases.position.insert_axis(Axis(0)));
            add(of_biases.relative.index_axis_mut(Axis(0), key_head), &d_biases.relative);
        }
        let counts = Array2::from_shape_fn(batch.mask.dim(), |(b, t)| batch.mask[[b, t]] && t < batch.len(b));
        let (keys, codes, codewords) = (batch.k.view(), codes.view(), codewords.view());
        let of_loss =
            commitment::backward(keys, codes, codewords, Some(counts.view()), COMMIT_WEIGHT).unwrap();
        for estimator in estimators {
            let mut expected = sums.clone();
            expected.codewords +=
                &estimator.codeword_gradient(keys, codes, codewords, sums.k.view()).unwrap();
            expected.k = estimator.key_gradient(keys, codes, codewords, sums.k.clone()).unwrap() + &of_loss;
            let got = backward(estimator);
            let of_rows = [
                relative_rms(&got.q, &expected.q),
                relative_rms(&got.k, &expected.k),
                relative_rms(&got.v, &expected.v),
            ];
            let error = worst(of_rows.into_iter().chain([error_of_shared(&got, &expected)]));
            assert!(error <= 1e-13, "{estimator:?}, T = {}: {error:e}", batch.t());
        }
    }
}

#[test]
fn each_sequence_of_a_batch_is_as_if_it_had_been_fed_alone() {
    for batch in batches() {
        let (output, states, d) =
            batch.run(&batch.inputs(), batch.states.clone(), batch.d_out.view(), COMMIT_WEIGHT);
        let (pushed, pushed_states) = batch.push(&batch.inputs(), batch.states.clone());
        assert_eq!((&pushed.codes, &pushed.stats, &pushed_states), (&output.codes, &output.stats, &states));
        assert_eq!(pushed.commit_loss, output.commit_loss);
        let counted = |b: usize| (0..batch.len(b)).filter(|&t| batch.mask[[b, t]]).count() as f64;
        let all: f64 = (0..B).map(counted).sum();
        let (mut loss, mut stats) = (0.0, None);
        let mut sums = zeros_of(&d);
        for b in 0..B {
            let len = batch.len(b);
            let before = batch.states.slice(s![b..b + 1, ..]).to_owned();
            let d_out = batch.d_out.slice(s![b..b + 1, .., ..len, ..]);
            let weight = COMMIT_WEIGHT * counted(b) / all;
            let (one, after, one_d) = batch.run(&batch.sequence(b), before.clone(), d_out, weight);
            let (own, rows) = (s![b..b + 1, .., ..len], s![b..b + 1, .., ..len, ..]);
            assert_eq!((output.out.slice(rows), output.lse.slice(own)), (one.out.view(), one.lse.view()));
            assert_eq!(output.cached_mass.slice(own), one.cached_mass);
            assert_eq!(output.codes.slice(own), one.codes);
            assert_eq!(states.slice(s![b..b + 1, ..]), after);
            assert_eq!((d.q.slice(rows), d.v.slice(rows)), (one_d.q.view(), one_d.v.view()));
            assert!(relative_rms(&d.k.slice(rows).to_owned(), &one_d.k) < 1e-14);
            sums.codewords += &one_d.codewords;
            let (of_biases, one_d) = (sums.biases.as_mut().unwrap(), one_d.biases.unwrap());
            of_biases.content += &one_d.content;
            of_biases.position += &one_d.position;
            of_biases.relative += &one_d.relative;
            loss += one.commit_loss * counted(b) / all;
            match &mut stats {
                None => stats = Some(one.stats),
                Some(stats) => stats.merge(&one.stats).unwrap(),
            }
            let (one, after) = batch.push(&batch.sequence(b), before);
            assert_eq!((pushed.out.slice(rows), pushed.lse.slice(own)), (one.out.view(), one.lse.view()));
            assert_eq!(pushed_states.slice(s![b..b + 1, ..]), after);
            // What does not exist.
            let rest = s![b, .., len.., ..];
            for array in [&output.out, &pushed.out, &d.q, &d.k, &d.v] {
                assert!(array.slice(rest).iter().all(|&x| x == 0.0));
            }
            assert!(output.lse.slice(s![b, .., len..]).iter().all(|&lse| lse == f64::NEG_INFINITY));
            assert!(output.cached_mass.slice(s![b, .., len..]).iter().all(|&mass| mass == 0.0));
        }
        assert!((output.commit_loss - loss).abs() < 1e-14);
        assert_eq!(output.stats.counts(), stats.as_ref().unwrap().counts());
        assert!(relative_rms(&output.stats.sums().to_owned(), &stats.unwrap().sums().to_owned()) < 1e-14);
        assert!(error_of_shared(&d, &sums) < 1e-13);
    }
}

#[test]
fn token_by_token_documents_and_lengths_give_the_same() {
    for batch in batches() {
        let (expected, expected_states) = batch.push(&batch.inputs(), batch.states.clone());
        let mut states = batch.states.clone();
        for t in 0..batch.t() {
            let lengths = Array1::from_shape_fn(B, |b| usize::from(t < batch.len(b)));
            let inputs = batch.tokens(0..B, t..t + 1);
            let inputs = BatchInputs { lengths: Some(lengths.view()), ..inputs };
            let (output, after) = batch.push(&inputs, states);
            states = after;
            let difference = &output.out.index_axis(Axis(2), 0) - &expected.out.index_axis(Axis(2), t);
            assert!(difference.iter().all(|d| d.abs() < 1e-13));
        }
        assert_eq!(states, expected_states);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let bits = |batch: &Batch| {
                let (output, states, d) =
                    batch.run(&batch.inputs(), batch.states.clone(), batch.d_out.view(), COMMIT_WEIGHT);
                let biases = d.biases.map(|d| (d.content, d.position, d.relative));
                (output.out, output.stats, states, d.q, d.k, d.v, d.codewords, biases)
            };
            Vec::from_iter(batches().iter().map(bits))
        })
    };
    let expected = on(1);
    assert!(on(2) == expected && on(8) == expected);
}
