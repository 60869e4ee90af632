//! Quadratic attention equals the definition in which every key is its own codeword.

use crate::support::random;
use ndarray::{Array1, Array2, ArrayD, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::quadratic::{self, KeyValues};
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, naive};
use transformer_vq::check::relative_rms;
use transformer_vq::{Error, Scalar};

/// Lengths around the edges of rows of lanes (64), tiles (128, 512) and blocks (256), and one of several segments.
const LENGTHS: [usize; 17] = [0, 1, 2, 63, 64, 65, 127, 129, 255, 256, 257, 320, 511, 513, 777, 1100, 2111];

struct Problem {
    q: Array2<f64>,
    k: Array2<f64>,
    v: Array2<f64>,
    d_out: Array2<f64>,
}

/// Everything that attention computes: o, lse, dq, dk, dv.
struct Computed<T> {
    out: Array2<T>,
    lse: Array1<T>,
    gradients: [Array2<T>; 3],
}

impl Problem {
    fn new(t: usize, d_k: usize, d_v: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
        // Scores grow along the sequence, so that the running maximum moves in every tile.
        let trend = |q: Array2<f64>| &q * &Array2::from_shape_fn((t, 1), |(i, _)| 1.0 + i as f64 / 400.0);
        Problem {
            q: trend(random(&mut rng, (t, d_k))),
            k: trend(random(&mut rng, (t, d_k))),
            v: random(&mut rng, (t, d_v)),
            d_out: random(&mut rng, (t, d_v)),
        }
    }

    fn quadratic<T: Scalar>(&self) -> Computed<T> {
        let [q, k, v, d_out] = [&self.q, &self.k, &self.v, &self.d_out].map(|x| x.mapv(T::from_f64));
        let (out, lse) = quadratic::forward(q.view(), k.view(), v.view()).unwrap();
        let d =
            quadratic::backward(q.view(), k.view(), v.view(), out.view(), lse.view(), d_out.view()).unwrap();
        Computed { out, lse, gradients: [d.q, d.k, d.v] }
    }

    /// The definition with codes 0..T and the keys as codewords.
    fn naive<T: Scalar>(&self) -> Computed<T> {
        let [q, k, v, d_out] = [&self.q, &self.k, &self.v, &self.d_out].map(|x| x.mapv(T::from_f64));
        let (t, d_k) = k.dim();
        if t == 0 {
            // No key, no codeword: the definition does not begin.
            return Computed { out: v.clone(), lse: Array1::zeros(0), gradients: [q, k, v] };
        }
        let attention = VqAttention { block_len: 32, window: 16, ..VqAttention::default() };
        let state = AttentionState::new(t, d_k, v.ncols(), attention.window).unwrap();
        let codes = Array1::from_iter(0..t as u32);
        let inputs = Inputs {
            q: q.view(),
            codes: codes.view(),
            v: v.view(),
            codewords: k.view(),
            biases: None,
            starts: None,
        };
        let (output, _) = naive::forward(&attention, &inputs, k.view(), &state).unwrap();
        let d = naive::backward(&attention, &inputs, k.view(), &state, d_out.view()).unwrap();
        Computed { out: output.out, lse: output.lse, gradients: [d.q, d.k_hat + d.codewords, d.v] }
    }
}

impl<T: Scalar> Computed<T> {
    /// Relative RMS of o, lse, dq, dk, dv.
    fn errors<U: Scalar>(&self, expected: &Computed<U>) -> [f64; 5] {
        let [q, k, v] = [0, 1, 2].map(|n| {
            let (got, expected) = (&self.gradients[n], &expected.gradients[n]);
            // A single key has a probability of 1 whatever the query: its gradients are 0 but for rounding.
            if got.nrows() == 1 && n < 2 {
                got.mapv(T::as_f64).sum().abs()
            } else {
                relative_rms(got, expected)
            }
        });
        [relative_rms(&self.out, &expected.out), relative_rms(&self.lse, &expected.lse), q, k, v]
    }
}

#[test]
fn it_equals_the_definition_where_every_key_is_its_own_codeword() {
    // Widths of less than a register, of several, and of more than register tiles take as they lie.
    let lengths = LENGTHS.map(|t| (t, 5, 3));
    for (t, d_k, d_v) in
        lengths.into_iter().chain([(300, 1, 1), (300, 33, 70), (300, 300, 1), (200, 2, 2100)])
    {
        let problem = Problem::new(t, d_k, d_v);
        let errors = problem.quadratic::<f64>().errors(&problem.naive::<f64>());
        assert!(errors.iter().all(|&error| error <= 1e-13), "T = {t}, K = {d_k}, V = {d_v}: {errors:?}");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let problem = Problem::new(3333, 20, 18);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| problem.quadratic::<f32>())
    };
    let expected = on(1);
    for threads in [2, 3, 5] {
        let got = on(threads);
        assert_eq!(
            (got.out, got.lse, got.gradients),
            (expected.out.clone(), expected.lse.clone(), expected.gradients.clone())
        );
    }
}

#[test]
fn in_f32_it_is_as_exact_as_the_definition_in_f32() {
    for t in [1, 65, 257, 777] {
        let problem = Problem::new(t, 5, 3);
        let exact = problem.naive::<f64>();
        let (errors, naive) =
            (problem.quadratic::<f32>().errors(&exact), problem.naive::<f32>().errors(&exact));
        for (error, naive) in errors.into_iter().zip(naive) {
            assert!(error <= 2.0 * naive + 1e-7, "T = {t}: {error:e}, naive {naive:e}");
        }
    }
}

#[test]
fn widths_need_not_be_positive_and_strides_do_not_matter() {
    // Keys without width score 0: the mean of what was seen. Values without width leave lse.
    let v = Array2::from_shape_fn((300, 1), |(i, _)| i as f64);
    let empty = Array2::<f64>::zeros((300, 0));
    let (out, lse) = quadratic::forward(empty.view(), empty.view(), v.view()).unwrap();
    let (nothing, same) = quadratic::forward(empty.view(), empty.view(), empty.view()).unwrap();
    assert_eq!((nothing.dim(), &same), ((300, 0), &lse));
    for i in 0..300 {
        assert!(
            (out[[i, 0]] - i as f64 / 2.0).abs() < 1e-11 && (lse[i] - (i as f64 + 1.0).ln()).abs() < 1e-13
        );
    }
    let wide = Problem::new(300, 8, 6);
    let (q, k) = (wide.q.slice(s![.., ..;2]), wide.k.slice(s![.., ..;-2]));
    let (v, d_out) = (wide.v.slice(s![.., ..;2]), wide.d_out.slice(s![.., ..;-2]));
    let own = [q, k, v, d_out].map(|x| x.as_standard_layout().into_owned());
    let [q_own, k_own, v_own, d_out_own] = own.each_ref().map(|x| x.view());
    let (out, lse) = quadratic::forward(q, k, v).unwrap();
    assert_eq!(quadratic::forward(q_own, k_own, v_own).unwrap(), (out.clone(), lse.clone()));
    let (out, lse) = (out.view(), lse.view());
    let d = quadratic::backward(q, k, v, out, lse, d_out).unwrap();
    let d_own = quadratic::backward(q_own, k_own, v_own, out, lse, d_out_own).unwrap();
    assert_eq!((d.q, d.k, d.v), (d_own.q, d_own.k, d_own.v));
}

#[test]
fn what_kept_arrays_hold_does_not_matter() {
    let mut d = quadratic::Gradients::default();
    // Of the right shapes, but not laid out number by number.
    let transposed = || Array2::from_elem((3, 2100), f64::NAN).reversed_axes();
    let (mut out, mut lse) = (transposed(), Array1::zeros(4200).slice_move(s![..;2]));
    d.v = transposed();
    // Lengths of two segments of keys, of one, and of two again; widths that come and go.
    for (t, d_k, d_v) in [(2100, 5, 3), (2100, 5, 3), (90, 4, 6), (2100, 5, 3)] {
        let Problem { q, k, v, d_out } = Problem::new(t, d_k, d_v);
        let (q, k, v, d_out) = (q.view(), k.view(), v.view(), d_out.view());
        quadratic::forward_into(q, k, v, &mut out, &mut lse).unwrap();
        assert_eq!((out.clone(), lse.clone()), quadratic::forward(q, k, v).unwrap());
        quadratic::backward_into(q, k, v, (out.view(), lse.view()), d_out, &mut d).unwrap();
        let fresh = quadratic::backward(q, k, v, out.view(), lse.view(), d_out).unwrap();
        assert_eq!((&d.q, &d.k, &d.v), (&fresh.q, &fresh.k, &fresh.v));
        let short = q.slice(s![1.., ..]);
        let before = (out.clone(), d.q.clone());
        quadratic::forward_into(short, k, v, &mut out, &mut lse).unwrap_err();
        quadratic::backward_into(short, k, v, (out.view(), lse.view()), d_out, &mut d).unwrap_err();
        assert_eq!((&out, &d.q), (&before.0, &before.1));
        d.q.fill(f64::NAN);
        d.k.fill(f64::NAN);
        d.v.fill(f64::NAN);
        out.fill(f64::NAN);
    }
}

#[test]
fn later_tokens_leave_earlier_outputs_their_bits() {
    let problem = Problem::new(777, 5, 3);
    let Problem { q, k, v, .. } = &problem;
    let (before, lse_before) = quadratic::forward(q.view(), k.view(), v.view()).unwrap();
    for from in [1, 64, 300, 776] {
        let (mut k, mut v) = (k.clone(), v.clone());
        k.slice_mut(s![from.., ..]).fill(9.0);
        v.slice_mut(s![from.., ..]).fill(-9.0);
        let (out, lse) = quadratic::forward(q.view(), k.view(), v.view()).unwrap();
        assert_eq!(out.slice(s![..from, ..]), before.slice(s![..from, ..]));
        assert_eq!(lse.slice(s![..from]), lse_before.slice(s![..from]));
        assert_ne!(out.row(from), before.row(from));
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let Problem { q, k, v, d_out } = Problem::new(4, 3, 2);
    let (out, lse) = quadratic::forward(q.view(), k.view(), v.view()).unwrap();
    let shape = |what, expected: &[usize], got: &[usize]| Error::Shape {
        what,
        expected: expected.to_vec(),
        got: got.to_vec(),
    };
    let short = |x: &Array2<f64>| x.slice(s![..3, ..]).to_owned();
    let forward = |q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>| {
        quadratic::forward(q.view(), k.view(), v.view()).unwrap_err()
    };
    assert_eq!(forward(&q, &short(&k), &v), shape("k", &[4, 3], &[3, 3]));
    assert_eq!(forward(&q, &v, &v), shape("k", &[4, 3], &[4, 2]));
    assert_eq!(forward(&q, &k, &short(&v)), shape("v", &[4, 2], &[3, 2]));
    let backward = |q: &Array2<f64>, out: &Array2<f64>, lse: &Array1<f64>, d_out: &Array2<f64>| {
        quadratic::backward(q.view(), k.view(), v.view(), out.view(), lse.view(), d_out.view()).unwrap_err()
    };
    assert_eq!(backward(&short(&q), &out, &lse, &d_out), shape("k", &[3, 3], &[4, 3]));
    assert_eq!(backward(&q, &short(&out), &lse, &d_out), shape("out", &[4, 2], &[3, 2]));
    assert_eq!(backward(&q, &out, &lse.slice(s![..3]).to_owned(), &d_out), shape("lse", &[4], &[3]));
    assert_eq!(backward(&q, &out, &lse, &short(&d_out)), shape("d_out", &[4, 2], &[3, 2]));

    let bad = |x: &Array2<f64>, value| {
        let mut x = x.clone();
        x[[2, 1]] = value;
        x
    };
    let not_finite =
        |what, value: &str| Error::NotFinite { what, index: vec![2, 1], value: value.to_string() };
    assert_eq!(forward(&bad(&q, f64::NAN), &k, &v), not_finite("q", "NaN"));
    assert_eq!(forward(&q, &bad(&k, f64::INFINITY), &v), not_finite("k", "inf"));
    assert_eq!(forward(&q, &k, &bad(&v, f64::NEG_INFINITY)), not_finite("v", "-inf"));
    assert_eq!(backward(&bad(&q, f64::NAN), &out, &lse, &d_out), not_finite("q", "NaN"));
    assert_eq!(backward(&q, &bad(&out, f64::NAN), &lse, &d_out), not_finite("out", "NaN"));
    assert_eq!(backward(&q, &out, &lse, &bad(&d_out, f64::NAN)), not_finite("d_out", "NaN"));
    let mut lse = lse;
    lse[3] = f64::NAN;
    let expected = Error::NotFinite { what: "lse", index: vec![3], value: "NaN".to_string() };
    assert_eq!(backward(&q, &out, &lse, &d_out), expected);
}

/// The last queries of a sequence, with biases of the distances 0..=M, against the definition in which every key is its own
/// codeword: there, queries before them count for nothing, and what a key gets is what it gets as a recent key and as a codeword.
fn pieces_equal_the_definition(t: usize, from: usize, window: usize) {
    let (d_k, d_v) = (5, 3);
    let Problem { q, k, v, d_out } = Problem::new(t, d_k, d_v);
    let mut rng = ChaCha8Rng::seed_from_u64((t + window) as u64);
    let (u, w) = (random(&mut rng, d_k), random(&mut rng, d_k));
    let r: Array2<f64> = random(&mut rng, (window + 1, d_k));
    let biases = Biases { content: u.view(), position: w.view(), relative: r.view() };

    let attention = VqAttention { block_len: 32, window, ..VqAttention::default() };
    let state = AttentionState::new(t, d_k, d_v, window).unwrap();
    let codes = Array1::from_iter(0..t as u32);
    let inputs = Inputs {
        q: q.view(),
        codes: codes.view(),
        v: v.view(),
        codewords: k.view(),
        biases: Some(biases),
        starts: None,
    };
    let (whole, _) = naive::forward(&attention, &inputs, k.view(), &state).unwrap();
    let mut counted = d_out.clone();
    counted.slice_mut(s![..from, ..]).fill(0.0);
    let d = naive::backward(&attention, &inputs, k.view(), &state, counted.view()).unwrap();

    let (piece, d_out) = (s![from.., ..], d_out.slice(s![from.., ..]));
    let mut all = KeyValues::new(d_k, d_v).unwrap();
    all.push(k.slice(s![..from, ..]), v.slice(s![..from, ..])).unwrap();
    all.push(k.slice(piece), v.slice(piece)).unwrap();
    assert_eq!((all.keys(), all.values(), all.position()), (k.view(), v.view(), t as u64));
    let q = q.slice(piece);
    let (out, lse) = quadratic::attend(q, Some(biases), &all).unwrap();
    let got = quadratic::attend_backward(q, Some(biases), &all, out.view(), lse.view(), d_out).unwrap();

    let close = |what: &str, error: f64| {
        assert!(error <= 1e-13, "{what}: {error:e}, T = {t} from {from}, M = {window}");
    };
    close("out", relative_rms(&out, &whole.out.slice(piece)));
    close("lse", relative_rms(&lse, &whole.lse.slice(s![from..])));
    close("q", relative_rms(&got.q, &d.q.slice(piece)));
    close("k", relative_rms(&got.k, &(&d.k_hat + &d.codewords).slice(piece)));
    close("v", relative_rms(&got.v, &d.v.slice(piece)));
    let (got, d) = (got.biases.unwrap(), d.biases.unwrap());
    close("u", relative_rms(&got.content, &d.content));
    close("w", relative_rms(&got.position, &d.position));
    close("r", relative_rms(&got.relative, &d.relative));
    // A token at a time.
    let mut all = KeyValues::new(d_k, d_v).unwrap();
    for i in 0..t.min(150) {
        all.push(k.slice(s![i..=i, ..]), v.slice(s![i..=i, ..])).unwrap();
        let (one, lse) = quadratic::attend(inputs.q.slice(s![i..=i, ..]), Some(biases), &all).unwrap();
        close("a token's out", relative_rms(&one.row(0), &whole.out.row(i)));
        assert!((lse[0] - whole.lse[i]).abs() <= 1e-12);
    }
}

#[test]
fn pieces_with_biases_equal_the_definition() {
    for (t, from) in [(1, 0), (5, 0), (70, 0), (70, 69), (130, 64), (200, 65), (300, 280), (333, 1)] {
        for window in [0, 3, 70, 500] {
            pieces_equal_the_definition(t, from, window);
        }
    }
    // Keys in more than one segment.
    pieces_equal_the_definition(2100, 90, 70);
}

/// A piece with biases of the distances 0..=M, in precision T.
struct Piece<T> {
    q: Array2<T>,
    biases: (Array1<T>, Array1<T>, Array2<T>),
    all: KeyValues<T>,
    d_out: Array2<T>,
}

impl<T: Scalar> Piece<T> {
    /// The last queries of a sequence.
    fn new(t: usize, from: usize, window: usize, (d_k, d_v): (usize, usize)) -> Self {
        let (Problem { q, k, v, d_out }, piece) = (Problem::new(t, d_k, d_v), s![from.., ..]);
        let rng = &mut ChaCha8Rng::seed_from_u64((t + window) as u64);
        let biases: (Array1<f64>, Array1<f64>, Array2<f64>) =
            (random(rng, d_k), random(rng, d_k), random(rng, (window + 1, d_k)));
        let mut all = KeyValues::new(d_k, d_v).unwrap();
        all.push(k.mapv(T::from_f64).view(), v.mapv(T::from_f64).view()).unwrap();
        Piece {
            q: q.slice(piece).mapv(T::from_f64),
            biases: (biases.0.mapv(T::from_f64), biases.1.mapv(T::from_f64), biases.2.mapv(T::from_f64)),
            all,
            d_out: d_out.slice(piece).mapv(T::from_f64),
        }
    }

    /// o, lse, dq, dk, dv, du, dw, dr.
    fn run(&self) -> [ArrayD<T>; 8] {
        let (u, w, r) = &self.biases;
        let biases = Some(Biases { content: u.view(), position: w.view(), relative: r.view() });
        let (q, all) = (self.q.view(), &self.all);
        let (out, lse) = quadratic::attend(q, biases, all).unwrap();
        let d =
            quadratic::attend_backward(q, biases, all, out.view(), lse.view(), self.d_out.view()).unwrap();
        let of_biases = d.biases.unwrap();
        [
            out.into_dyn(),
            lse.into_dyn(),
            d.q.into_dyn(),
            d.k.into_dyn(),
            d.v.into_dyn(),
            of_biases.content.into_dyn(),
            of_biases.position.into_dyn(),
            of_biases.relative.into_dyn(),
        ]
    }
}

/// Pieces of one block and of several; keys of one segment and of several.
const PIECES: [(usize, usize, usize); 4] = [(70, 64, 3), (300, 0, 70), (333, 30, 500), (2100, 90, 70)];

#[test]
fn pieces_with_biases_in_f32_agree_with_those_in_f64() {
    for (t, from, window) in PIECES {
        let single = Piece::<f32>::new(t, from, window, (5, 3)).run();
        let double = Piece::<f64>::new(t, from, window, (5, 3)).run();
        for (i, (got, expected)) in single.iter().zip(&double).enumerate() {
            let error = relative_rms(got, expected);
            assert!(error < 1e-5, "array {i}: {error:e}, T = {t} from {from}, M = {window}");
        }
    }
}

#[test]
fn pieces_with_biases_have_the_same_bits_on_any_number_of_threads() {
    for (t, from, window) in PIECES {
        let piece = Piece::<f32>::new(t, from, window, (20, 18));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| piece.run())
        };
        let expected = on(1);
        assert!(on(2) == expected && on(5) == expected, "T = {t} from {from}, M = {window}");
    }
}

#[test]
fn keys_and_values_are_checked_and_kept() {
    for (d_k, d_v) in [(usize::MAX, 1), (1, usize::MAX)] {
        assert!(matches!(KeyValues::<f32>::new(d_k, d_v), Err(Error::TooLarge { .. })));
    }
    let k = Array2::<f64>::ones((3, 2));
    let mut all = KeyValues::new(2, 4).unwrap();
    all.push(k.view(), Array2::ones((3, 4)).view()).unwrap();
    let kept = all.clone();
    let refused = |error: Error, words: &str| assert!(error.to_string().starts_with(words), "{error}");
    refused(all.push(k.view(), Array2::ones((2, 4)).view()).unwrap_err(), "`v` has shape [2, 4]");
    refused(all.push(Array2::ones((3, 1)).view(), Array2::ones((3, 4)).view()).unwrap_err(), "`k`");
    refused(all.push(k.view(), Array2::from_elem((3, 4), f64::NAN).view()).unwrap_err(), "`v`");
    refused(all.push((&k / 0.0).view(), Array2::ones((3, 4)).view()).unwrap_err(), "`k`");
    assert_eq!(all, kept);
    assert!(all.size_in_bytes() >= 3 * 6 * 8);
    let attend = |q: Array2<f64>| quadratic::attend(q.view(), None, &kept).unwrap_err();
    refused(attend(Array2::ones((4, 2))), "`q`");
    refused(attend(Array2::ones((2, 3))), "`q`");
    refused(attend(Array2::from_elem((2, 2), f64::INFINITY)), "`q`");
    let (one, r) = (Array1::ones(2), Array2::<f64>::ones((1, 2)));
    let with = |content: &Array1<f64>, position: &Array1<f64>, relative: &Array2<f64>| {
        let biases = Biases { content: content.view(), position: position.view(), relative: relative.view() };
        quadratic::attend(k.view(), Some(biases), &kept).map(|_| ())
    };
    assert!(with(&one, &one, &r).is_ok());
    refused(with(&Array1::ones(3), &one, &r).unwrap_err(), "`biases.content`");
    refused(with(&one, &Array1::ones(1), &r).unwrap_err(), "`biases.position`");
    refused(with(&one, &one, &Array2::ones((0, 2))).unwrap_err(), "`biases.relative`");
    refused(with(&one, &one, &(&r / 0.0)).unwrap_err(), "`biases.relative`");
    let (out, lse) = quadratic::attend(k.view(), None, &kept).unwrap();
    let backward = |lse: Array1<f64>, d_out: Array2<f64>| {
        quadratic::attend_backward(k.view(), None, &kept, out.view(), lse.view(), d_out.view()).unwrap_err()
    };
    refused(backward(Array1::ones(2), out.clone()), "`lse`");
    refused(backward(lse, Array2::ones((3, 3))), "`d_out`");
}
