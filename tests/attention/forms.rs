//! Every form of attention computes the same function as the definition: outputs, states and every gradient.

use std::collections::BTreeMap;

use crate::support::{Case, Problem, cases};
use ndarray::{Array, Array1, ArrayView, ArrayViewD, Axis, Dimension, concatenate};
use proptest::prelude::*;
use transformer_vq::attention::{
    AttentionState, CompressiveCache, Gradients, Output, VqAttention, WindowKeys, blockwise, naive, stream,
};
use transformer_vq::{Error, Scalar};

/// One form: from inputs, a state and the gradient of the output to everything that it computes.
struct Form<T> {
    name: &'static str,
    blocks: Blocks,
    run: fn(&VqAttention, &Problem<T>) -> Result<Computed<T>, Error>,
}

/// Into which blocks a form cuts a piece. The share of cached codes depends on it, and the outputs do when the codebook has
/// moved since the window was filled: what is recent for one block may leave the window, and is read with today's codewords
/// then.
#[derive(Clone, Copy, PartialEq)]
enum Blocks {
    /// Those that attention says.
    Given,
    /// Tokens.
    Tokens,
    /// Both, by the lengths of the pieces that it is fed.
    Mixed,
}

impl Blocks {
    /// What the definition says of these blocks.
    fn definition<T: Scalar>(
        self,
        attention: &VqAttention,
        problem: &Problem<T>,
    ) -> Result<Computed<T>, Error> {
        match self {
            Blocks::Given => run_naive(attention, problem),
            Blocks::Tokens => infer_naive(&VqAttention { block_len: 1, ..*attention }, problem),
            Blocks::Mixed => infer_naive(attention, problem),
        }
    }
}

struct Computed<T> {
    output: Output<T>,
    state: AttentionState<T>,
    /// Forms that only infer have none.
    gradients: Option<Gradients<T>>,
}

/// Every form there is; a new kernel is one more line.
fn forms<T: Scalar>() -> Vec<Form<T>> {
    vec![
        Form { name: "blockwise", blocks: Blocks::Given, run: run_blockwise },
        Form { name: "stream by token", blocks: Blocks::Tokens, run: |a, p| run_stream(a, p, &[1]) },
        Form {
            name: "stream by pieces",
            blocks: Blocks::Mixed,
            run: |a, p| run_stream(a, p, &[3, 1, 7, 20]),
        },
    ]
}

fn infer_naive<T: Scalar>(attention: &VqAttention, problem: &Problem<T>) -> Result<Computed<T>, Error> {
    let (inputs, k_hat) = (problem.inputs(), problem.k_hat());
    let (output, state) = naive::forward(attention, &inputs, k_hat.view(), &problem.state)?;
    Ok(Computed { output, state, gradients: None })
}

fn run_naive<T: Scalar>(attention: &VqAttention, problem: &Problem<T>) -> Result<Computed<T>, Error> {
    let (inputs, k_hat, d_out) = (problem.inputs(), problem.k_hat(), problem.d_out.view());
    let gradients = naive::backward(attention, &inputs, k_hat.view(), &problem.state, d_out)?;
    Ok(Computed { gradients: Some(gradients), ..infer_naive(attention, problem)? })
}

fn run_blockwise<T: Scalar>(attention: &VqAttention, problem: &Problem<T>) -> Result<Computed<T>, Error> {
    let mut state = problem.state.clone();
    let (output, saved) = blockwise::forward(attention, &problem.inputs(), &mut state)?;
    let gradients = blockwise::backward(attention, &problem.inputs(), saved, problem.d_out.view())?;
    Ok(Computed { output, state, gradients: Some(gradients) })
}

fn run_stream<T: Scalar>(
    attention: &VqAttention,
    problem: &Problem<T>,
    pieces: &[usize],
) -> Result<Computed<T>, Error> {
    let mut state = problem.state.clone();
    let (t, mut from) = (problem.q.nrows(), 0);
    let mut outputs = vec![];
    for &len in pieces.iter().cycle() {
        let to = (from + len).min(t);
        outputs.push(stream::push(attention, &problem.piece(from..to), &mut state)?);
        from = to;
        if from == t {
            break;
        }
    }
    let join = |f: fn(&Output<T>) -> &Array1<T>| {
        concatenate(Axis(0), &outputs.iter().map(|o| f(o).view()).collect::<Vec<_>>()).unwrap()
    };
    let out = concatenate(Axis(0), &outputs.iter().map(|o| o.out.view()).collect::<Vec<_>>()).unwrap();
    let output = Output { out, lse: join(|o| &o.lse), cached_mass: join(|o| &o.cached_mass) };
    Ok(Computed { output, state, gradients: None })
}

fn relative_rms<T: Scalar, U: Scalar, D: Dimension>(
    got: ArrayView<'_, T, D>,
    expected: ArrayView<'_, U, D>,
) -> f64 {
    assert_eq!(got.shape(), expected.shape());
    let (got, expected): (ArrayViewD<T>, ArrayViewD<U>) = (got.into_dyn(), expected.into_dyn());
    let (mut difference, mut size) = (0.0, 0.0);
    for (got, expected) in got.iter().zip(&expected) {
        difference += (got.as_f64() - expected.as_f64()).powi(2);
        size += expected.as_f64().powi(2);
    }
    // Inputs are of order one. Where a gradient cancels (all keys with one code), what is left is the rounding of its
    // terms, which has no relative precision: such an array is measured against 0.1.
    let floor = 0.01 * got.len() as f64;
    if difference == 0.0 { 0.0 } else { (difference / size.max(floor)).sqrt() }
}

const CACHED_MASS: &str = "cached mass";

/// The relative RMS of everything two forms computed, by name.
fn errors<T: Scalar, U: Scalar>(got: &Computed<T>, expected: &Computed<U>) -> Vec<(f64, &'static str)> {
    let mut errors = vec![
        (relative_rms(got.output.out.view(), expected.output.out.view()), "out"),
        (relative_rms(got.output.lse.view(), expected.output.lse.view()), "lse"),
        (relative_rms(got.output.cached_mass.view(), expected.output.cached_mass.view()), CACHED_MASS),
        (relative_rms(got.state.cache().mean(), expected.state.cache().mean()), "mean"),
    ];
    assert_eq!(got.state.cache().count(), expected.state.cache().count());
    assert_eq!(got.state.position(), expected.state.position());
    let (window, expected_window) = (got.state.window_keys(), expected.state.window_keys());
    assert_eq!(window.codes, expected_window.codes);
    errors.push((relative_rms(window.k_hat.view(), expected_window.k_hat.view()), "window k^"));
    errors.push((relative_rms(window.v.view(), expected_window.v.view()), "window v"));
    if let (Some(got), Some(expected)) = (&got.gradients, &expected.gradients) {
        errors.push((relative_rms(got.q.view(), expected.q.view()), "dq"));
        errors.push((relative_rms(got.k_hat.view(), expected.k_hat.view()), "dk^"));
        errors.push((relative_rms(got.v.view(), expected.v.view()), "dv"));
        errors.push((relative_rms(got.codewords.view(), expected.codewords.view()), "dc"));
        if let (Some(got), Some(expected)) = (&got.biases, &expected.biases) {
            errors.push((relative_rms(got.content.view(), expected.content.view()), "du"));
            errors.push((relative_rms(got.position.view(), expected.position.view()), "dw"));
            errors.push((relative_rms(got.relative.view(), expected.relative.view()), "dr"));
        }
    }
    errors
}

/// The same numbers in f64.
fn in_f64(attention: &VqAttention, problem: &Problem<f32>) -> Problem<f64> {
    fn cast<D: Dimension>(array: &Array<f32, D>) -> Array<f64, D> {
        array.mapv(f64::from)
    }
    let Problem { q, codes, v, codewords, biases, starts, d_out, state } = problem;
    let (cache, window) = (state.cache(), state.window_keys());
    let (mean, residual) = (cache.mean().mapv(f64::from), cache.residual().mapv(f64::from));
    let cache = CompressiveCache::from_parts(mean, residual, cache.count().to_owned()).unwrap();
    let window = WindowKeys { codes: window.codes, k_hat: cast(&window.k_hat), v: cast(&window.v) };
    let state = AttentionState::from_parts(state.position(), attention.window, cache, &window).unwrap();
    Problem {
        q: cast(q),
        codes: codes.clone(),
        v: cast(v),
        codewords: cast(codewords),
        biases: biases.as_ref().map(|(u, w, r)| (cast(u), cast(w), cast(r))),
        starts: starts.clone(),
        d_out: cast(d_out),
        state,
    }
}

proptest! {
    #![proptest_config(crate::support::config(400))]

    #[test]
    fn every_form_equals_the_definition(case in cases()) {
        let problem = Problem::<f64>::new(&case);
        // One document, some of about 40 tokens, many of about 5. Sums over many short documents cancel, each document's own
        // more than the whole: `documents` compares them with those of each document alone.
        let of = |tokens| problem.clone().with_documents(tokens, case.seed);
        for (problem, sums) in [(problem.clone(), true), (of(40), true), (of(5), false)] {
            for form in forms() {
                let mixed = form.blocks == Blocks::Mixed;
                if case.moved && mixed {
                    continue;
                }
                let expected = form.blocks.definition(&case.attention, &problem).unwrap();
                let got = (form.run)(&case.attention, &problem).unwrap();
                for (error, place) in errors(&got, &expected) {
                    let is_sum = ["dc", "du", "dw", "dr"].contains(&place);
                    let holds = error <= 1e-13 || (is_sum && !sums) || (mixed && place == CACHED_MASS);
                    prop_assert!(holds, "{}: {place} differs by {error:e}", form.name);
                }
            }
        }
    }
}

/// Errors are pooled over cases, array by array: in a single small one the definition may be lucky.
#[test]
fn in_f32_no_form_errs_more_than_twice_as_much_as_the_definition() {
    for (cache, gradient_through_cache) in [(true, true), (true, false), (false, true)] {
        let mut squares = BTreeMap::<(&str, &str), f64>::new();
        let mut add = |form, errors: Vec<(f64, &'static str)>| {
            for (error, place) in errors {
                *squares.entry((place, form)).or_default() += error * error;
            }
        };
        const CASES: u64 = 24;
        for seed in 0..CASES {
            // 1, 2, 4, ... 64 and beyond the piece.
            let attention = VqAttention {
                block_len: 1 << (seed % 8),
                window: [0, 5, 16, 30][seed as usize % 4],
                cache,
                gradient_through_cache,
            };
            let (t, before, biases) = (100 - seed as usize, 3 * seed as usize, seed % 3 != 0);
            let case =
                Case { t, before, n_codes: 12, d_k: 16, d_v: 8, biases, moved: false, attention, seed };
            let problem = Problem::<f32>::new(&case);
            let double = in_f64(&attention, &problem);
            let exact = run_naive(&attention, &double).unwrap();
            add("naive", errors(&run_naive(&attention, &problem).unwrap(), &exact));
            for form in forms() {
                let exact = form.blocks.definition(&attention, &double).unwrap();
                let mut errors = errors(&(form.run)(&attention, &problem).unwrap(), &exact);
                errors.retain(|&(_, place)| form.blocks != Blocks::Mixed || place != CACHED_MASS);
                add(form.name, errors);
            }
        }
        let rms = |square: f64| (square / CASES as f64).sqrt();
        for (&(place, form), &square) in &squares {
            let (error, naive) = (rms(square), rms(squares[&(place, "naive")]));
            assert!(error <= 2.0 * naive + 1e-7, "{form}: {place}: {error:e}, naive {naive:e}");
        }
    }
}
