//! Bidirectional attention equals its definition, outputs and every gradient; and it obeys laws that need none.

use crate::support::random;
use crate::support::worst::worst;
use std::collections::BTreeMap;

use ndarray::{Array1, Array2, ArrayRef, Axis, Dimension, concatenate, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::bidirectional::{self, Gradients, Inputs, Output, naive};
use transformer_vq::check::relative_rms;

/// Which keys exist.
#[derive(Debug, Clone, Copy)]
enum Mask {
    Absent,
    All,
    Nothing,
    /// About two of three.
    Some,
    /// The first half, as where the rest is padding.
    Prefix,
}

const MASKS: [Mask; 5] = [Mask::Absent, Mask::All, Mask::Nothing, Mask::Some, Mask::Prefix];

/// Queries, keys, codes, K, V: lengths around the edges of tiles (64), tasks (256) and segments (512); fewer keys than codes.
const SIZES: [(usize, usize, usize, usize, usize); 16] = [
    (0, 5, 3, 2, 2),
    (5, 0, 3, 2, 2),
    (0, 0, 1, 1, 1),
    (1, 1, 1, 1, 1),
    (1, 40, 7, 5, 3),
    (40, 1, 7, 5, 3),
    (7, 9, 1, 4, 3),
    (63, 130, 20, 5, 4),
    (64, 64, 64, 8, 8),
    (65, 150, 12, 33, 70),
    (128, 7, 300, 6, 0),
    (255, 60, 9, 3, 5),
    (257, 70, 31, 4, 2),
    (513, 40, 16, 5, 3),
    (1100, 60, 17, 3, 5),
    (70, 90, 10, 5, 600),
];

#[derive(Clone)]
struct Problem<T> {
    q: Array2<T>,
    codes: Array1<u32>,
    v: Array2<T>,
    codewords: Array2<T>,
    mask: Option<Array1<bool>>,
    d_out: Array2<T>,
}

impl Problem<f64> {
    fn new((t, keys, n_codes, d_k, d_v): (usize, usize, usize, usize, usize), mask: Mask) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64((1000 * t + keys) as u64);
        Problem {
            q: 3.0 * random(rng, (t, d_k)),
            codes: Array1::from_shape_simple_fn(keys, || rng.random_range(0..n_codes as u32)),
            v: random(rng, (keys, d_v)),
            codewords: random(rng, (n_codes, d_k)),
            d_out: random(rng, (t, d_v)),
            mask: match mask {
                Mask::Absent => None,
                Mask::All => Some(Array1::from_elem(keys, true)),
                Mask::Nothing => Some(Array1::from_elem(keys, false)),
                Mask::Some => Some(Array1::from_shape_simple_fn(keys, || rng.random_range(0..3) > 0)),
                Mask::Prefix => Some(Array1::from_shape_fn(keys, |j| 2 * j < keys)),
            },
        }
    }

    fn cast<U: Scalar>(&self) -> Problem<U> {
        Problem {
            q: self.q.mapv(U::from_f64),
            codes: self.codes.clone(),
            v: self.v.mapv(U::from_f64),
            codewords: self.codewords.mapv(U::from_f64),
            mask: self.mask.clone(),
            d_out: self.d_out.mapv(U::from_f64),
        }
    }
}

type Computed<T> = (Output<T>, Gradients<T>);

impl<T: Scalar> Problem<T> {
    fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            q: self.q.view(),
            codes: self.codes.view(),
            v: self.v.view(),
            codewords: self.codewords.view(),
            key_mask: self.mask.as_ref().map(|mask| mask.view()),
        }
    }

    fn naive(&self) -> Computed<T> {
        let inputs = self.inputs();
        (naive::forward(&inputs).unwrap(), naive::backward(&inputs, self.d_out.view()).unwrap())
    }

    fn fast(&self) -> Computed<T> {
        let inputs = self.inputs();
        let (output, saved) = bidirectional::forward(&inputs).unwrap();
        (output, bidirectional::backward(&inputs, saved, self.d_out.view()).unwrap())
    }

    fn out(&self) -> Array2<T> {
        bidirectional::forward(&self.inputs()).unwrap().0.out
    }

    /// The same with other keys: those at these positions.
    fn keys(&self, positions: &[usize]) -> Self {
        Problem {
            codes: self.codes.select(Axis(0), positions),
            v: self.v.select(Axis(0), positions),
            mask: self.mask.as_ref().map(|mask| mask.select(Axis(0), positions)),
            ..self.clone()
        }
    }
}

/// By name; lse where it is finite.
fn errors<T: Scalar, U: Scalar>(got: &Computed<T>, expected: &Computed<U>) -> [(f64, &'static str); 5] {
    let (output, d) = got;
    let (expected, expected_d) = expected;
    let nothing = expected.lse.iter().all(|lse| lse.as_f64() == f64::NEG_INFINITY);
    assert_eq!(nothing, output.lse.iter().all(|lse| lse.as_f64() == f64::NEG_INFINITY));
    let lse = if nothing { 0.0 } else { relative_rms(&output.lse, &expected.lse) };
    [
        (relative_rms(&output.out, &expected.out), "out"),
        (lse, "lse"),
        (against_one(&d.q, &expected_d.q), "dq"),
        (relative_rms(&d.v, &expected_d.v), "dv"),
        (against_one(&d.codewords, &expected_d.codewords), "dc"),
    ]
}

/// Relative RMS; where a gradient cancels (a single code has a share of 1, whatever the query), what is left is the rounding of
/// terms of order one, and is measured against them.
fn against_one<T: Scalar, U: Scalar>(got: &Array2<T>, expected: &Array2<U>) -> f64 {
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.as_f64().abs()));
    if largest > 1e-5 {
        return relative_rms(got, expected);
    }
    worst(got.iter().zip(expected).map(|(a, b)| (a.as_f64() - b.as_f64()).abs()))
}

fn bits<T: Scalar, D: Dimension>(array: &ArrayRef<T, D>) -> Vec<u64> {
    array.iter().map(|x| x.as_f64().to_bits()).collect()
}

#[test]
fn it_equals_the_definition() {
    for sizes in SIZES {
        for mask in MASKS {
            let problem = Problem::new(sizes, mask);
            for (error, place) in errors(&problem.fast(), &problem.naive()) {
                assert!(error <= 1e-13, "{sizes:?}, {mask:?}: {place} differs by {error:e}");
            }
        }
    }
}

/// Errors are pooled over masks, array by array: in a single small case the definition may be lucky.
#[test]
fn in_f32_it_errs_at_most_twice_as_much_as_the_definition() {
    for sizes in SIZES {
        let mut squares = BTreeMap::<(&str, &str), f64>::new();
        for mask in MASKS {
            let problem = Problem::new(sizes, mask);
            let (exact, single) = (problem.naive(), problem.cast::<f32>());
            for (form, computed) in [("naive", single.naive()), ("fast", single.fast())] {
                for (error, place) in errors(&computed, &exact) {
                    *squares.entry((place, form)).or_default() += error * error / MASKS.len() as f64;
                }
            }
        }
        for (&(place, _), square) in squares.iter().filter(|((_, form), _)| *form == "fast") {
            let (error, naive) = (square.sqrt(), squares[&(place, "naive")].sqrt());
            assert!(error <= 2.0 * naive + 1e-7, "{sizes:?}: {place}: {error:e}, naive {naive:e}");
        }
    }
}

#[test]
fn a_query_without_a_visible_key_gets_nothing_and_gives_nothing() {
    for sizes in SIZES {
        let problem = Problem::new(sizes, Mask::Nothing);
        for (output, d) in [problem.fast(), problem.naive()] {
            assert!(output.out.iter().all(|&o| o == 0.0));
            assert!(output.lse.iter().all(|&lse| lse == f64::NEG_INFINITY));
            assert!(d.q.iter().chain(&d.v).chain(&d.codewords).all(|&d| d == 0.0));
        }
    }
}

#[test]
fn what_does_not_exist_gets_no_gradient_and_does_not_matter() {
    for sizes in SIZES {
        let problem = Problem::new(sizes, Mask::Some);
        let (output, d) = problem.fast();
        let mask = problem.mask.clone().unwrap();
        let exists: Vec<usize> = (0..mask.len()).filter(|&j| mask[j]).collect();
        for j in (0..mask.len()).filter(|&j| !mask[j]) {
            assert!(d.v.row(j).iter().all(|&d| d == 0.0));
        }
        // A padded sequence is the shorter one, to the bit.
        let short = Problem { mask: None, ..problem.keys(&exists) };
        let (short_output, short_d) = short.fast();
        assert_eq!((&output.out, &output.lse), (&short_output.out, &short_output.lse));
        assert_eq!((&d.q, &d.codewords), (&short_d.q, &short_d.codewords));
        assert_eq!(d.v.select(Axis(0), &exists), short_d.v);
        // Whatever the padding holds.
        let mut other = problem.clone();
        for j in (0..mask.len()).filter(|&j| !mask[j]) {
            other.v.row_mut(j).fill(1e9);
            other.codes[j] = 0;
        }
        let (other_output, other_d) = other.fast();
        assert_eq!((other_output.out, other_output.lse), (output.out, output.lse));
        assert_eq!((other_d.q, other_d.v, other_d.codewords), (d.q, d.v, d.codewords));
    }
}

#[test]
fn permuting_keys_with_their_values_changes_nothing() {
    for sizes in SIZES {
        let problem = Problem::new(sizes, Mask::Some);
        let backward: Vec<usize> = (0..sizes.1).rev().collect();
        let ((a, d_a), (b, d_b)) = (problem.fast(), problem.keys(&backward).fast());
        let d_b = Gradients { v: d_b.v.select(Axis(0), &backward), ..d_b };
        for (error, place) in errors(&(a, d_a), &(b, d_b)) {
            assert!(error <= 1e-13, "{sizes:?}: {place} differs by {error:e}");
        }
    }
}

#[test]
fn one_code_for_all_keys_gives_the_mean() {
    let mut problem = Problem::new((130, 77, 5, 4, 3), Mask::Absent);
    problem.codes.fill(3);
    let mean = problem.v.mean_axis(Axis(0)).unwrap();
    for out in problem.out().rows() {
        assert!(relative_rms(&out.to_owned(), &mean) < 1e-14);
    }
}

#[test]
fn constant_values_give_that_constant() {
    let mut problem = Problem::new((130, 77, 5, 4, 3), Mask::Some);
    problem.v.fill(0.75);
    assert!(problem.out().iter().all(|&o: &f64| (o - 0.75).abs() < 1e-15 * 4.0));
}

#[test]
fn every_key_its_own_codeword_gives_exact_softmax_attention() {
    let (t, keys) = (70, 90);
    let mut problem = Problem::new((t, keys, keys, 4, 3), Mask::Absent);
    problem.codes = Array1::from_iter(0..keys as u32);
    let k = &problem.codewords; // the keys themselves
    let weights = problem.q.dot(&k.t()).mapv(f64::exp);
    let expected = weights.dot(&problem.v) / weights.sum_axis(Axis(1)).insert_axis(Axis(1));
    assert!(relative_rms(&problem.out(), &expected) < 1e-14);
}

#[test]
fn keys_of_two_sets_together_are_the_merge_of_what_each_set_gives() {
    for (cut, mask) in [0, 1, 30, 76, 77].into_iter().flat_map(|cut| MASKS.map(|mask| (cut, mask))) {
        let problem = Problem::new((66, 77, 9, 4, 3), mask);
        let ((whole, _), t) = (problem.fast(), problem.q.nrows());
        let part = |keys: std::ops::Range<usize>| problem.keys(&keys.collect::<Vec<_>>()).fast().0;
        let (a, b) = (part(0..cut), part(cut..77));
        for i in 0..t {
            let share = |part: &Output<f64>| {
                if whole.lse[i] == f64::NEG_INFINITY { 0.0 } else { (part.lse[i] - whole.lse[i]).exp() }
            };
            let merged = &a.out.row(i) * share(&a) + &b.out.row(i) * share(&b);
            let error = worst((&merged - &whole.out.row(i)).into_iter().map(f64::abs));
            assert!(error < 1e-14, "cut at {cut}, {mask:?}: {error:e}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // Several tasks forward, several segments backward, values shared among threads in columns.
    for sizes in [(2111, 300, 40, 5, 3), (600, 20_000, 30, 4, 64)] {
        let problem = Problem::new(sizes, Mask::Prefix).cast::<f32>();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (output, d) = pool.install(|| problem.fast());
            [output.out, d.q, d.v, d.codewords].map(|array| bits(&array))
        };
        let expected = on(1);
        assert!(on(2) == expected && on(8) == expected, "{sizes:?}");
    }
}

#[test]
fn strides_do_not_matter() {
    let wide = Problem::new((150, 90, 11, 8, 6), Mask::Absent);
    let (q, codewords) = (wide.q.slice(s![.., ..;-2]), wide.codewords.slice(s![.., ..;2]));
    let (v, d_out) = (wide.v.slice(s![..;-1, ..;2]), wide.d_out.slice(s![.., ..;-2]));
    let strided = Inputs { q, v, codewords, ..wide.inputs() };
    let own = [q, v, codewords, d_out].map(|x| x.as_standard_layout().into_owned());
    let [q, v, codewords] = [&own[0], &own[1], &own[2]].map(|x| x.view());
    let contiguous = Inputs { q, v, codewords, ..wide.inputs() };
    let (got, saved) = bidirectional::forward(&strided).unwrap();
    let got = (got, bidirectional::backward(&strided, saved, d_out).unwrap());
    let (expected, saved) = bidirectional::forward(&contiguous).unwrap();
    let expected = (expected, bidirectional::backward(&contiguous, saved, own[3].view()).unwrap());
    for (error, place) in errors(&got, &expected) {
        assert!(error <= 1e-14, "{place} differs by {error:e}");
    }
}

#[test]
fn keys_share_the_gradient_of_their_codeword() {
    let problem = Problem::new((40, 60, 70, 4, 3), Mask::Some);
    let d = problem.fast().1;
    let mask = problem.mask.as_ref().map(|mask| mask.view());
    let shares = bidirectional::key_gradient(problem.codes.view(), mask, d.codewords.view()).unwrap();
    let mut sums = Array2::<f64>::zeros(d.codewords.raw_dim());
    for ((j, &code), share) in problem.codes.iter().enumerate().zip(shares.rows()) {
        let mut sum = sums.row_mut(code as usize);
        sum += &share;
        let others = (0..60).filter(|&i| mask.unwrap()[i] && problem.codes[i] == code);
        assert!(others.clone().all(|i| !mask.unwrap()[j] || shares.row(i) == share), "equal shares");
        assert!(mask.unwrap()[j] || share.iter().all(|&d| d == 0.0));
    }
    assert!(relative_rms(&sums, &d.codewords) < 1e-14);
    // Of all keys, a half twice is the whole.
    let twice = concatenate(Axis(0), &[problem.codes.view(), problem.codes.view()]).unwrap();
    let mask = Array1::from_shape_fn(120, |j| mask.unwrap()[j % 60]);
    let halves = bidirectional::key_gradient(twice.view(), Some(mask.view()), d.codewords.view()).unwrap();
    assert!(relative_rms(&(&halves.slice(s![60.., ..]) * 2.0), &shares) < 1e-15);
}
