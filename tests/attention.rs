//! Every form of attention computes the same function as the definition: outputs, states and every gradient.

mod support;

use ndarray::{Array1, Array2, ArrayView, ArrayViewD, Axis, Dimension, concatenate, s};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use support::{Case, Problem};
use transformer_vq::attention::{
    AttentionState, Gradients, Inputs, Output, VqAttention, blockwise, naive, stream,
};
use transformer_vq::{Error, Scalar};

/// One form: from inputs, a state and the gradient of the output to everything that it computes.
struct Form<T> {
    name: &'static str,
    /// Equal even when the codebook has moved since the window was filled. Cutting a piece in two is not: what is
    /// recent for the second half may leave the window, and is read with today's codewords then.
    any_codebook: bool,
    run: fn(&VqAttention, &Problem<T>) -> Result<Computed<T>, Error>,
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
        Form { name: "blockwise", any_codebook: true, run: run_blockwise },
        Form { name: "stream by token", any_codebook: false, run: |a, p| run_stream(a, p, &[1]) },
        Form { name: "stream by pieces", any_codebook: false, run: |a, p| run_stream(a, p, &[3, 1, 7, 20]) },
    ]
}

fn run_naive<T: Scalar>(attention: &VqAttention, problem: &Problem<T>) -> Result<Computed<T>, Error> {
    let (inputs, k_hat) = (problem.inputs(), problem.k_hat());
    let (output, state) = naive::forward(attention, &inputs, k_hat.view(), &problem.state)?;
    let d_out = problem.d_out.view();
    let gradients = naive::backward(attention, &inputs, k_hat.view(), &problem.state, d_out)?;
    Ok(Computed { output, state, gradients: Some(gradients) })
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
        outputs.push(stream::push(attention, &piece(problem, from, to), &mut state)?);
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

/// Tokens from..to of a problem.
fn piece<T: Scalar>(problem: &Problem<T>, from: usize, to: usize) -> Inputs<'_, T> {
    let inputs = problem.inputs();
    Inputs {
        q: inputs.q.slice_move(s![from..to, ..]),
        codes: inputs.codes.slice_move(s![from..to]),
        v: inputs.v.slice_move(s![from..to, ..]),
        ..inputs
    }
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

/// The worst relative RMS over everything two forms computed, and where.
fn worst<T: Scalar, U: Scalar>(got: &Computed<T>, expected: &Computed<U>) -> (f64, &'static str) {
    let mut errors = vec![
        (relative_rms(got.output.out.view(), expected.output.out.view()), "out"),
        (relative_rms(got.output.lse.view(), expected.output.lse.view()), "lse"),
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
    // NaN must not hide behind a comparison.
    errors.into_iter().fold((0.0, "nothing"), |worst, e| if e.0 <= worst.0 { worst } else { e })
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0..90usize, 0..60usize, 2..9usize, 3..8usize, 1..6usize);
    let attention = (1..40usize, 0..30usize, any::<bool>(), any::<bool>());
    (sizes, attention, any::<[bool; 2]>(), any::<u64>()).prop_map(
        |(sizes, attention, [biases, moved], seed)| {
            let (t, before, n_codes, d_k, d_v) = sizes;
            let (block_len, window, cache, gradient_through_cache) = attention;
            let attention = VqAttention { block_len, window, cache, gradient_through_cache };
            Case { t, before, n_codes, d_k, d_v, biases, moved, attention, seed }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_form_equals_the_definition(case in cases()) {
        let problem = Problem::<f64>::new(&case);
        let expected = run_naive(&case.attention, &problem).unwrap();
        for form in forms() {
            if case.moved && !form.any_codebook {
                continue;
            }
            let got = (form.run)(&case.attention, &problem).unwrap();
            let (error, place) = worst(&got, &expected);
            prop_assert!(error <= 1e-13, "{}: {place} differs by {error:e}", form.name);
        }
    }
}
