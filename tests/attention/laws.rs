//! Laws that every form of attention obeys, whatever its inputs.
//!
//! To the bit: what a query sees is never touched by later tokens, and the state after a sequence does not depend on how it
//! was cut into pieces, blocks or single tokens. Outputs of another cut are equal to rounding.

use crate::support::worst::worst;
use crate::support::{Case, Problem, cases};
use ndarray::{Array, Array1, Array2, ArrayRef, Axis, Dimension, concatenate, s};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{
    AttentionState, CompressiveCache, Gradients, Output, VqAttention, blockwise, naive, stream,
};
use transformer_vq::codebook::assign;

type Form = fn(&VqAttention, &Problem<f64>) -> (Output<f64>, AttentionState<f64>);

const FORMS: [(&str, Form); 3] = [("naive", by_definition), ("blockwise", by_blocks), ("stream", by_token)];

fn by_definition(attention: &VqAttention, problem: &Problem<f64>) -> (Output<f64>, AttentionState<f64>) {
    naive::forward(attention, &problem.inputs(), problem.k_hat().view(), &problem.state).unwrap()
}

fn by_blocks(attention: &VqAttention, problem: &Problem<f64>) -> (Output<f64>, AttentionState<f64>) {
    let mut state = problem.state.clone();
    (blockwise::forward(attention, &problem.inputs(), &mut state).unwrap().0, state)
}

fn by_token(attention: &VqAttention, problem: &Problem<f64>) -> (Output<f64>, AttentionState<f64>) {
    let t = problem.q.nrows();
    cut(attention, problem, &(0..=t).collect::<Vec<_>>())
}

/// The stream in pieces that begin and end at `cuts`.
fn cut(
    attention: &VqAttention,
    problem: &Problem<f64>,
    cuts: &[usize],
) -> (Output<f64>, AttentionState<f64>) {
    let mut state = problem.state.clone();
    let nothing = stream::push(attention, &problem.piece(0..0), &mut state).unwrap();
    let mut outputs = vec![nothing];
    for ends in cuts.windows(2) {
        outputs.push(stream::push(attention, &problem.piece(ends[0]..ends[1]), &mut state).unwrap());
    }
    let join = |f: fn(&Output<f64>) -> &Array1<f64>| {
        concatenate(Axis(0), &outputs.iter().map(|o| f(o).view()).collect::<Vec<_>>()).unwrap()
    };
    let out = concatenate(Axis(0), &outputs.iter().map(|o| o.out.view()).collect::<Vec<_>>()).unwrap();
    (Output { out, lse: join(|o| &o.lse), cached_mass: join(|o| &o.cached_mass) }, state)
}

fn gradients(attention: &VqAttention, problem: &Problem<f64>) -> Gradients<f64> {
    let (inputs, mut state) = (problem.inputs(), problem.state.clone());
    let (_, saved) = blockwise::forward(attention, &inputs, &mut state).unwrap();
    blockwise::backward(attention, &inputs, saved, problem.d_out.view()).unwrap()
}

/// The largest difference; numbers here are of order one. Infinite where one is NaN.
fn difference<D: Dimension>(a: &ArrayRef<f64, D>, b: &ArrayRef<f64, D>) -> f64 {
    assert_eq!(a.shape(), b.shape());
    worst(a.iter().zip(b).map(|(a, b)| (a - b).abs()))
}

fn bits<D: Dimension>(array: &ArrayRef<f64, D>) -> Array<u64, D> {
    array.mapv(f64::to_bits)
}

/// Which of the keys 0..=i query i sees.
fn seen(attention: &VqAttention, i: usize) -> std::ops::RangeInclusive<usize> {
    let first = if attention.cache { 0 } else { i.saturating_sub(attention.window) };
    first..=i
}

/// A case whose sequence begins with its piece.
fn fresh(case: Case) -> Case {
    Case { before: 0, moved: false, ..case }
}

proptest! {
    #![proptest_config(crate::support::config(150))]

    #[test]
    fn block_length_does_not_matter(case in cases(), block_len in 1..50usize) {
        let one = case.attention;
        let other = VqAttention { block_len, ..one };
        for case in [Case { moved: false, ..case }, fresh(case)] {
            let problem = Problem::new(&case);
            let ((a, a_state), (b, b_state)) = (by_blocks(&one, &problem), by_blocks(&other, &problem));
            prop_assert!(difference(&a.out, &b.out) < 1e-13);
            prop_assert!(difference(&a.lse, &b.lse) < 1e-13);
            prop_assert_eq!(a_state, b_state, "to the bit");
            let (a, b) = (gradients(&one, &problem), gradients(&other, &problem));
            prop_assert!(difference(&a.q, &b.q) < 1e-12);
            if let (Some(a), Some(b)) = (&a.biases, &b.biases) {
                prop_assert!(difference(&a.content, &b.content) < 1e-12);
                prop_assert!(difference(&a.position, &b.position) < 1e-12);
                prop_assert!(difference(&a.relative, &b.relative) < 1e-12);
            }
            if one.gradient_through_cache {
                prop_assert!(difference(&a.v, &b.v) < 1e-12);
                // A carried key gives its gradient to its codeword if it is cached, to nobody if it is recent.
                if case.before == 0 {
                    prop_assert!(difference(&per_code(&problem, &a), &per_code(&problem, &b)) < 1e-12);
                }
            }
        }
    }

    #[test]
    fn future_tokens_do_not_change_the_past(case in cases(), cut in any::<prop::sample::Index>()) {
        let problem = Problem::new(&case);
        let cut = cut.index(case.t + 1);
        let mut changed = problem.clone();
        let mut rng = ChaCha8Rng::seed_from_u64(case.seed ^ 1);
        changed.q.slice_mut(s![cut.., ..]).mapv_inplace(|_| rng.random_range(-9.0..9.0));
        changed.v.slice_mut(s![cut.., ..]).mapv_inplace(|_| rng.random_range(-9.0..9.0));
        changed.codes.slice_mut(s![cut..]).mapv_inplace(|_| rng.random_range(0..case.n_codes as u32));
        for (name, form) in FORMS {
            let (a, b) = (form(&case.attention, &problem).0, form(&case.attention, &changed).0);
            prop_assert_eq!(bits(&a.out.slice(s![..cut, ..])), bits(&b.out.slice(s![..cut, ..])), "{}", name);
            prop_assert_eq!(bits(&a.lse.slice(s![..cut])), bits(&b.lse.slice(s![..cut])), "{}", name);
            let (a, b) = (a.cached_mass.slice(s![..cut]), b.cached_mass.slice(s![..cut]));
            prop_assert_eq!(bits(&a), bits(&b), "{}", name);
        }
    }

    #[test]
    fn permuting_codewords_permutes_codes_only(case in cases()) {
        let problem = Problem::new(&fresh(case));
        let mut rng = ChaCha8Rng::seed_from_u64(case.seed ^ 2);
        let mut order: Vec<(u64, usize)> = (0..case.n_codes).map(|code| (rng.random(), code)).collect();
        order.sort();
        // Row s of the permuted table is row `from[s]` of the table; code z becomes `to[z]`.
        let from: Vec<usize> = order.into_iter().map(|(_, code)| code).collect();
        let to = |z: u32| from.iter().position(|&code| code == z as usize).unwrap() as u32;
        let mut permuted = problem.clone();
        permuted.codewords = problem.codewords.select(Axis(0), &from);
        permuted.codes.mapv_inplace(to);
        let codes = assign(problem.q.view(), problem.codewords.view()).unwrap();
        prop_assert_eq!(codes.mapv(to), assign(problem.q.view(), permuted.codewords.view()).unwrap());
        for (name, form) in FORMS {
            let ((a, a_state), (b, b_state)) =
                (form(&case.attention, &problem), form(&case.attention, &permuted));
            prop_assert!(difference(&a.out, &b.out) < 1e-13, "{}", name);
            let mean = a_state.cache().mean().select(Axis(0), &from);
            prop_assert_eq!(mean, b_state.cache().mean(), "{}", name);
        }
        let (a, b) = (gradients(&case.attention, &problem), gradients(&case.attention, &permuted));
        prop_assert!(difference(&a.q, &b.q) < 1e-12);
        prop_assert!(difference(&a.k_hat, &b.k_hat) < 1e-12);
        prop_assert!(difference(&a.v, &b.v) < 1e-12);
        prop_assert!(difference(&a.codewords.select(Axis(0), &from), &b.codewords) < 1e-12);
    }

    #[test]
    fn constant_values_give_that_constant(case in cases(), constant in -100.0..100.0f64) {
        let mut problem = Problem::new(&fresh(case));
        problem.v.fill(constant);
        let expected = problem.v.clone();
        for (name, form) in FORMS {
            let (output, state) = form(&case.attention, &problem);
            prop_assert!(difference(&output.out, &expected) < 1e-14 * constant.abs().max(1.0), "{}", name);
            for (mean, &n) in state.cache().mean().outer_iter().zip(state.cache().count()) {
                let constant = Array1::from_elem(case.d_v, if n == 0 { 0.0 } else { constant });
                prop_assert!(difference(&mean, &constant) < 1e-12, "{} {}", name, mean);
            }
        }
    }

    #[test]
    fn outputs_stay_inside_the_range_of_visible_values(case in cases()) {
        let problem = Problem::new(&fresh(case));
        for (name, form) in FORMS {
            let (output, _) = form(&case.attention, &problem);
            for ((i, d), &o) in output.out.indexed_iter() {
                let values = || seen(&case.attention, i).map(|j| problem.v[[j, d]]);
                let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(-f64::INFINITY, f64::max));
                prop_assert!(least - 1e-14 <= o && o <= most + 1e-14, "{}: {} <= {} <= {}", name, least, o, most);
            }
        }
    }

    #[test]
    fn one_code_for_all_keys_gives_the_plain_mean(case in cases()) {
        let mut problem = Problem::new(&Case { biases: false, ..fresh(case) });
        problem.codes.fill(case.n_codes as u32 - 1);
        let expected = Array2::from_shape_fn(problem.v.dim(), |(i, d)| {
            let seen = seen(&case.attention, i);
            let n = seen.clone().count() as f64;
            seen.map(|j| problem.v[[j, d]]).sum::<f64>() / n
        });
        for (name, form) in FORMS {
            let (output, _) = form(&case.attention, &problem);
            prop_assert!(difference(&output.out, &expected) < 1e-13, "{}", name);
        }
    }

    #[test]
    fn a_codeword_for_every_key_gives_exact_softmax_attention(case in cases()) {
        let case = Case { n_codes: case.t.max(1), ..fresh(case) };
        let mut problem = Problem::new(&case);
        problem.codes = Array1::from_iter(0..case.t as u32);
        let keys = &problem.codewords;
        let mut expected = Array2::zeros(problem.v.raw_dim());
        for i in 0..case.t {
            let (mut sum, mut out) = (0.0, Array1::<f64>::zeros(case.d_v));
            for j in seen(&case.attention, i) {
                let mut score: f64 = problem.q.row(i).dot(&keys.row(j));
                if let Some((u, w, r)) = &problem.biases {
                    score += u.dot(&keys.row(j));
                    if i - j <= case.attention.window {
                        score += (&problem.q.row(i) + w).dot(&r.row(i - j));
                    }
                }
                sum += score.exp();
                out.scaled_add(score.exp(), &problem.v.row(j));
            }
            expected.row_mut(i).assign(&(out / sum));
        }
        for (name, form) in FORMS {
            let (output, _) = form(&case.attention, &problem);
            prop_assert!(difference(&output.out, &expected) < 1e-12, "{}", name);
        }
    }

    #[test]
    fn counts_add_up_to_tokens(case in cases()) {
        let problem = Problem::new(&case);
        for (name, form) in FORMS {
            let (_, state) = form(&case.attention, &problem);
            let (tokens, held) = (case.before + case.t, state.window_keys().codes.len());
            prop_assert_eq!(state.position(), tokens as u64, "{}", name);
            prop_assert_eq!(held, tokens.min(case.attention.window), "{}", name);
            prop_assert_eq!(state.cache().count().sum() + held as u64, tokens as u64, "{}", name);
        }
    }

    #[test]
    fn pushing_in_two_pieces_equals_one(case in cases(), place in any::<prop::sample::Index>()) {
        let problem = Problem::new(&Case { moved: false, ..case });
        let (place, attention) = (place.index(case.t + 1), &case.attention);
        let (whole, whole_state) = by_blocks(attention, &problem);
        for cuts in [vec![0, case.t], vec![0, place, case.t], (0..=case.t).collect()] {
            let (pieces, state) = cut(attention, &problem, &cuts);
            prop_assert!(difference(&pieces.out, &whole.out) < 1e-13);
            prop_assert!(difference(&pieces.lse, &whole.lse) < 1e-13);
            prop_assert_eq!(&state, &whole_state, "to the bit");
        }
    }

    #[test]
    fn a_stream_of_tokens_is_blocks_of_one(case in cases()) {
        let problem = Problem::new(&Case { moved: false, ..case });
        let single = VqAttention { block_len: 1, ..case.attention };
        let (blocks, _) = by_blocks(&single, &problem);
        // Its own block length plays no part.
        let (stream, _) = by_token(&case.attention, &problem);
        prop_assert!(difference(&stream.out, &blocks.out) < 1e-13);
        prop_assert!(difference(&stream.lse, &blocks.lse) < 1e-13);
        prop_assert!(difference(&stream.cached_mass, &blocks.cached_mass) < 1e-13);
    }

    #[test]
    fn a_state_can_be_cloned_saved_and_restored(case in cases()) {
        let problem = Problem::new(&case);
        let state = &problem.state;
        let cache = state.cache();
        let parts = (cache.mean().to_owned(), cache.residual().to_owned(), cache.count().to_owned());
        let cache = CompressiveCache::from_parts(parts.0, parts.1, parts.2).unwrap();
        let keys = state.window_keys();
        let window = case.attention.window;
        let restored = AttentionState::from_parts(state.position(), window, cache, &keys).unwrap();
        prop_assert_eq!(&restored, state);
        let empty = AttentionState::<f64>::new(case.n_codes, case.d_k, case.d_v, window).unwrap();
        for (name, form) in FORMS {
            let mut other = problem.clone();
            other.state = restored.clone();
            let ((a, a_state), (b, b_state)) = (form(&case.attention, &problem), form(&case.attention, &other));
            prop_assert_eq!(bits(&a.out), bits(&b.out), "{}", name);
            prop_assert_eq!(a_state.size_in_bytes(), empty.size_in_bytes(), "{}", name);
            prop_assert_eq!(a_state, b_state, "{}", name);
        }
    }
}

/// `dc_s + sum_{j: z_j = s} dk^_j`.
fn per_code(problem: &Problem<f64>, gradients: &Gradients<f64>) -> Array2<f64> {
    let mut sums = gradients.codewords.clone();
    for (d_k_hat, &code) in gradients.k_hat.outer_iter().zip(&problem.codes) {
        let mut sum = sums.row_mut(code as usize);
        sum += &d_k_hat;
    }
    sums
}

#[test]
fn a_difference_is_seen() {
    let a = ndarray::array![1.0, 2.0];
    assert_eq!(difference(&a, &ndarray::array![1.0, 1.5]), 0.5);
    assert_eq!(difference(&a, &ndarray::array![3.0, 2.0]), 2.0);
    assert_eq!(difference(&a, &ndarray::array![f64::NAN, 2.0]), f64::INFINITY);
}
