//! Learning, the commitment loss, look-ups and metrics, through the public functions.

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis, Dimension, array, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, Learning, commitment, lookup};
use transformer_vq::{Error, Scalar, ndarray};

const SIZES: [[usize; 5]; 5] = // B, H, T, K, S
    [[1, 1, 1, 1, 1], [2, 3, 7, 3, 5], [3, 1, 40, 8, 4], [1, 2, 20, 5, 70], [2, 2, 0, 3, 4]];

struct Case {
    keys: Array4<f64>,
    codes: Array3<u32>,
    mask: Array2<bool>,
    codebook: Codebook<f64>,
}

fn case([b, h, t, k, n_codes]: [usize; 5]) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
    let mut number = || rng.random_range(-1.0..1.0);
    let keys = Array4::from_shape_simple_fn((b, h, t, k), &mut number);
    let codewords = Array3::from_shape_simple_fn((h, n_codes, k), &mut number);
    let mask = Array2::from_shape_simple_fn((b, t), || number() < 0.5);
    let codebook = Codebook::ema(Ema::from_codewords(codewords, 0.9).unwrap());
    let codes = codebook.assign(keys.view()).unwrap();
    Case { keys, codes, mask, codebook }
}

fn stats<T: Scalar>(case: &Case, keys: ArrayView4<'_, T>) -> CodeStats<T> {
    let mask = Some(case.mask.view());
    CodeStats::collect(keys, case.codes.view(), case.codebook.n_codes(), mask).unwrap()
}

/// Root mean square of the difference, relative to that of `b`.
fn relative_rms<D: Dimension>(a: &ndarray::Array<f64, D>, b: &ndarray::Array<f64, D>) -> f64 {
    let square = |x: &ndarray::Array<f64, D>| x.mapv(|x| x * x).sum();
    (square(&(a - b)) / square(b).max(f64::MIN_POSITIVE)).sqrt()
}

fn state(codebook: &Codebook<f64>) -> &Ema<f64> {
    match codebook.learning() {
        Learning::Ema(ema) => ema,
        other => panic!("learns by {other:?}"),
    }
}

#[test]
fn relative_rms_sees_a_difference() {
    assert_eq!(relative_rms(&array![3.0, 5.0], &array![3.0, 4.0]), 0.2);
    assert_eq!(relative_rms(&array![3.0, 4.0], &array![3.0, 4.0]), 0.0);
    assert_eq!(relative_rms(&array![3.0, 3.0], &array![3.0, 4.0]), 0.2);
}

#[test]
fn look_ups_return_codewords_bit_for_bit() {
    for size in SIZES {
        let Case { codes, codebook, .. } = case(size);
        let codewords = codebook.codewords();
        let quantized = lookup(codes.view(), codewords.view()).unwrap();
        for ((b, h, t), &code) in codes.indexed_iter() {
            assert_eq!(quantized.slice(s![b, h, t, ..]), codewords.slice(s![h, code as usize, ..]));
        }
        // What is quantized once stays.
        assert_eq!(codebook.assign(quantized.view()).unwrap(), codes);
    }
}

#[test]
fn commitment_loss_is_its_definition() {
    for size @ [b, h, t, k, _] in SIZES {
        let Case { keys, codes, mask, codebook } = case(size);
        let codewords = codebook.codewords();
        let nothing = Array2::from_elem((b, t), false);
        for mask in [None, Some(mask.view()), Some(nothing.view())] {
            let counts = |b, t| mask.is_none_or(|mask| mask[[b, t]]);
            let (mut squares, mut norms, mut counted) = (0.0, 0.0, 0);
            for ((b, t), _) in nothing.indexed_iter().filter(|&((b, t), _)| counts(b, t)) {
                counted += 1;
                for (h, k) in ndarray::indices((h, k)) {
                    let key = keys[[b, h, t, k]];
                    squares += (key - codewords[[h, codes[[b, h, t]] as usize, k]]).powi(2);
                    norms += key * key;
                }
            }
            let expected = if counted == 0 { 0.0 } else { squares / f64::from(counted) };
            let (keys, codes, codewords) = (keys.view(), codes.view(), codewords.view());
            let loss = commitment::loss(keys, codes, codewords, mask).unwrap();
            assert!((loss - expected).abs() <= 1e-13 * expected, "{loss} {expected}");
            let by_head = commitment::mean_error(keys, codes, codewords, mask).unwrap();
            assert_eq!((by_head.len(), by_head.sum()), (h, loss));
            let relative = commitment::relative_error(keys, codes, codewords, mask).unwrap();
            if h == 1 && counted > 0 {
                assert!((relative[0] - squares / norms).abs() <= 1e-13 * relative[0]);
            }
            assert!(counted > 0 || (relative.sum(), by_head.sum()) == (0.0, 0.0));
        }
    }
    let relative = |key: f64, codeword: f64| {
        let (keys, codewords) =
            (Array4::from_elem((1, 1, 2, 3), key), Array3::from_elem((1, 1, 3), codeword));
        let codes = Array3::zeros((1, 1, 2));
        commitment::relative_error(keys.view(), codes.view(), codewords.view(), None).unwrap()[0]
    };
    assert_eq!((relative(1.0, 0.0), relative(0.0, 0.0), relative(0.0, 1.0)), (1.0, 0.0, f64::INFINITY));
}

/// Codes are frozen, as codewords are: the loss is a function of the keys alone.
#[test]
fn commitment_gradient_equals_finite_differences() {
    let (weight, step) = (0.7, 1e-2);
    for size in SIZES {
        let Case { keys, codes, mask, codebook } = case(size);
        let codewords = codebook.codewords();
        for mask in [None, Some(mask.view())] {
            let gradient =
                commitment::backward(keys.view(), codes.view(), codewords.view(), mask, weight).unwrap();
            let expected = Array4::from_shape_fn(keys.dim(), |index| {
                let at = |steps: f64| {
                    let mut keys = keys.clone();
                    keys[index] += steps * step;
                    weight * commitment::loss(keys.view(), codes.view(), codewords.view(), mask).unwrap()
                };
                (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step)
            });
            assert!(relative_rms(&gradient, &expected) <= 1e-10, "{:e}", relative_rms(&gradient, &expected));
            for ((b, h, t, k), &d) in gradient.indexed_iter() {
                let counts = mask.is_none_or(|mask| mask[[b, t]]);
                let pull = keys[[b, h, t, k]] - codewords[[h, codes[[b, h, t]] as usize, k]];
                assert_eq!(d != 0.0, counts && pull != 0.0);
            }
        }
    }
}

#[test]
fn without_counted_positions_the_commitment_gradient_is_zero() {
    let Case { keys, codes, mask, codebook } = case(SIZES[1]);
    let none = mask.mapv(|_| false);
    let gradient =
        commitment::backward(keys.view(), codes.view(), codebook.codewords().view(), Some(none.view()), 1.0);
    assert_eq!(gradient, Ok(Array4::zeros(keys.dim())));
}

#[test]
fn f32_agrees_with_f64() {
    let Case { keys, codes, mask, codebook } = case(SIZES[2]);
    let (keys32, codewords32) = (keys.mapv(|x| x as f32), codebook.cast::<f32>().codewords());
    let (mask, codewords) = (Some(mask.view()), codebook.codewords());
    let loss = commitment::loss(keys.view(), codes.view(), codewords.view(), mask).unwrap();
    let loss32 = commitment::loss(keys32.view(), codes.view(), codewords32.view(), mask).unwrap();
    assert!((loss32 / loss - 1.0).abs() < 1e-6);
    let d = commitment::backward(keys.view(), codes.view(), codewords.view(), mask, 0.3).unwrap();
    let d32 = commitment::backward(keys32.view(), codes.view(), codewords32.view(), mask, 0.3).unwrap();
    assert!(relative_rms(&d32.mapv(f64::from), &d) < 1e-6);
}

#[test]
fn statistics_are_their_definition() {
    for size in SIZES {
        let case = case(size);
        let stats = stats(&case, case.keys.view());
        let [_, h, _, k, n_codes] = size;
        let (mut sums, mut counts) =
            (Array3::<f64>::zeros((h, n_codes, k)), Array2::<u64>::zeros((h, n_codes)));
        for ((b, h, t), &code) in case.codes.indexed_iter().filter(|((b, _, t), _)| case.mask[[*b, *t]]) {
            counts[[h, code as usize]] += 1;
            let mut sum = sums.slice_mut(s![h, code as usize, ..]);
            sum += &case.keys.slice(s![b, h, t, ..]);
        }
        assert_eq!((stats.sums(), stats.counts()), (sums.view(), counts.view()));
        let all = CodeStats::collect(case.keys.view(), case.codes.view(), n_codes, None).unwrap();
        assert_eq!(all.counts().sum(), case.codes.len() as u64);
    }
}

#[test]
fn micro_batches_merge_into_the_batch() {
    let case = case([6, 2, 50, 8, 20]);
    let n_codes = case.codebook.n_codes();
    let whole = stats(&case, case.keys.view());
    for size in [1, 2, 4] {
        let mut merged = CodeStats::zeros(2, n_codes, 8).unwrap();
        for i in (0..6).step_by(size) {
            let of = s![i..(i + size).min(6), .., ..];
            let part = CodeStats::collect(
                case.keys.slice(s![i..(i + size).min(6), .., .., ..]),
                case.codes.slice(of),
                n_codes,
                Some(case.mask.slice(s![i..(i + size).min(6), ..])),
            );
            merged.merge(&part.unwrap()).unwrap();
        }
        assert_eq!(merged.counts(), whole.counts());
        assert!(relative_rms(&merged.sums().to_owned(), &whole.sums().to_owned()) < 1e-15);
    }
}

#[test]
fn an_update_is_the_closed_form() {
    for size in SIZES {
        let mut case = case(size);
        let stats = stats(&case, case.keys.view());
        let before = state(&case.codebook).clone();
        case.codebook.update(&stats).unwrap();
        let after = state(&case.codebook);
        let sums = &before.sums() * 0.9 + &stats.sums() * (1.0 - 0.9);
        let counts = &before.counts() * 0.9 + stats.counts().mapv(|n| n as f64) * (1.0 - 0.9);
        assert_eq!((after.sums(), after.counts()), (sums.view(), counts.view()));
        let divisors = counts.mapv(|n| n.max(0.01)).insert_axis(Axis(2));
        assert_eq!(case.codebook.codewords(), sums / divisors);
    }
}

#[test]
fn unused_codes_stay_and_later_fade() {
    let mut codebook = Codebook::ema(Ema::from_codewords(array![[[3.0, 4.0], [1.0, 0.0]]], 0.5).unwrap());
    let keys = array![[[[1.0, 0.5]]]];
    let stats = CodeStats::collect(keys.view(), array![[[1]]].view(), 2, None).unwrap();
    let mut norms = vec![5.0];
    for _ in 0..20 {
        codebook.update(&stats).unwrap();
        let codewords = codebook.codewords();
        let (x, y): (f64, f64) = (codewords[[0, 0, 0]], codewords[[0, 0, 1]]);
        assert_eq!(x * 4.0, y * 3.0);
        norms.push(x.hypot(y));
    }
    // 0.5^6 > 0.01 > 0.5^7.
    assert_eq!(norms[..7], [5.0; 7]);
    assert!(norms[6..].windows(2).all(|pair| pair[1] < pair[0]));
    assert_eq!(norms[20], 5.0 * 0.5f64.powi(20) / 0.01);
}

/// Without memory an update is a step of Lloyd's algorithm.
#[test]
fn distortion_never_rises_without_memory() {
    let case = case([2, 2, 200, 4, 16]);
    let start = case.codebook.codewords();
    let mut codebook = Codebook::ema(Ema::from_codewords(start, 0.0).unwrap());
    let mut last = f64::INFINITY;
    for _ in 0..10 {
        let codes = codebook.assign(case.keys.view()).unwrap();
        let loss =
            commitment::loss(case.keys.view(), codes.view(), codebook.codewords().view(), None).unwrap();
        assert!(loss <= last * (1.0 + 1e-14), "{loss} after {last}");
        last = loss;
        codebook.update(&CodeStats::collect(case.keys.view(), codes.view(), 16, None).unwrap()).unwrap();
    }
}

#[test]
fn only_an_update_changes_a_codebook() {
    let Case { keys, mut codebook, .. } = case(SIZES[1]);
    let before = codebook.clone();
    let codes = codebook.assign(keys.view()).unwrap();
    let codewords = codebook.codewords();
    lookup(codes.view(), codewords.view()).unwrap();
    commitment::backward(keys.view(), codes.view(), codewords.view(), None, 1.0).unwrap();
    let stats = CodeStats::collect(keys.view(), codes.view(), 5, None).unwrap();
    assert_eq!(codebook, before);
    // One that fails leaves no trace either.
    assert!(matches!(
        codebook.update(&CodeStats::zeros(3, 5, 4).unwrap()),
        Err(Error::Shape { what: "stats", .. })
    ));
    let huge = CodeStats::collect(
        (keys * 1e308 * 2.0).mapv(|x| x.clamp(-1.7e308, 1.7e308)).view(),
        codes.view(),
        5,
        None,
    );
    assert!(matches!(codebook.update(&huge.unwrap()), Err(Error::NotFinite { .. })));
    assert_eq!(codebook, before);
    codebook.update(&stats).unwrap();
    assert_ne!(codebook, before);
}

#[test]
fn usage_and_perplexity() {
    let of = |codes: &[u32]| {
        let codes = Array3::from_shape_vec((1, 1, codes.len()), codes.to_vec()).unwrap();
        let keys = Array4::<f32>::zeros((1, 1, codes.len(), 1));
        let stats = CodeStats::collect(keys.view(), codes.view(), 4, None).unwrap();
        (stats.usage()[0], stats.perplexity()[0])
    };
    let (usage, perplexity) = of(&[0, 1, 2, 3, 3, 2, 1, 0]);
    assert!(usage == 1.0 && (perplexity - 4.0).abs() < 1e-14);
    assert_eq!(of(&[2, 2, 2]), (0.25, 1.0));
    assert_eq!(of(&[]), (0.0, 0.0));
    let (usage, perplexity) = of(&[0, 0, 0, 1]);
    assert_eq!(usage, 0.5);
    assert!((perplexity - (0.75f64.powf(-0.75) * 0.25f64.powf(-0.25))).abs() < 1e-14);
}

#[test]
fn the_random_start_is_the_published_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut normal = || {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    let ema = Ema::random(2, 50, 100, 0.99, &mut normal).unwrap();
    let codebook = Codebook::ema(ema.clone());
    assert_eq!((codebook.n_heads(), codebook.n_codes(), codebook.d_k()), (2, 50, 100));
    assert_eq!((ema.counts(), ema.decay()), (Array2::ones((2, 50)).view(), 0.99));
    let variance = ema.sums().mapv(|x| x * x).mean().unwrap();
    assert!((variance * 2.0 * 50.0 - 1.0).abs() < 0.05, "{variance}");
    // Its double holds the same numbers.
    assert_eq!(codebook.cast::<f64>().codewords().mapv(|c| c as f32), codebook.codewords());
    assert_eq!(codebook.cast::<f64>().cast::<f32>(), codebook);
    let huge = Ema::random(usize::MAX, 2, 2, 0.99, normal);
    assert!(matches!(huge, Err(Error::TooLarge { .. })));
}

#[test]
fn bad_states_are_refused() {
    let (sums, counts) = (Array3::<f32>::ones((1, 2, 3)), Array2::<f32>::ones((1, 2)));
    let new = |sums: &Array3<f32>, counts: &Array2<f32>, decay| {
        Ema::new(sums.clone(), counts.clone(), decay).unwrap_err()
    };
    assert!(matches!(new(&sums, &Array2::ones((2, 1)), 0.9), Error::Shape { what: "counts", .. }));
    for decay in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(new(&sums, &counts, decay), Error::Invalid { what: "decay", .. }));
    }
    assert!(matches!(new(&sums, &-&counts, 0.9), Error::Invalid { what: "counts", .. }));
    assert!(matches!(new(&(&sums * f32::NAN), &counts, 0.9), Error::NotFinite { what: "sums", .. }));
    assert!(matches!(new(&sums, &(&counts * f32::INFINITY), 0.9), Error::NotFinite { what: "counts", .. }));
    // Finite sums over small counts are not yet finite codewords.
    assert!(matches!(
        new(&(&sums * 1e37), &(&counts * 0.0), 0.9),
        Error::NotFinite { what: "codewords", .. }
    ));
    for dim in [(0, 2, 3), (1, 0, 3), (1, 2, 0)] {
        let empty = Ema::from_codewords(Array3::<f32>::zeros(dim), 0.9);
        assert_eq!(empty, Err(Error::Empty { what: "codewords" }));
    }
}

#[test]
fn bad_arguments_are_refused() {
    let Case { keys, codes, mask, codebook } = case([2, 2, 5, 3, 4]);
    let codewords = codebook.codewords();
    let all =
        |keys: ArrayView4<'_, f64>, codes: &Array3<u32>, codewords: &Array3<f64>, mask: &Array2<bool>| {
            let (codes, codewords, mask) = (codes.view(), codewords.view(), Some(mask.view()));
            let error = commitment::loss(keys, codes, codewords, mask).unwrap_err();
            assert_eq!(commitment::backward(keys, codes, codewords, mask, 1.0), Err(error.clone()));
            assert_eq!(commitment::mean_error(keys, codes, codewords, mask), Err(error.clone()));
            assert_eq!(commitment::relative_error(keys, codes, codewords, mask), Err(error.clone()));
            (error.clone(), CodeStats::collect(keys, codes, 4, mask).err() == Some(error))
        };
    let shape = |what, expected: &[usize], got: &[usize]| Error::Shape {
        what,
        expected: expected.to_vec(),
        got: got.to_vec(),
    };
    let short = codes.slice(s![.., .., 1..]).to_owned();
    assert_eq!(all(keys.view(), &short, &codewords, &mask), (shape("codes", &[2, 2, 5], &[2, 2, 4]), true));
    let one_head = codewords.slice(s![..1, .., ..]).to_owned();
    assert_eq!(
        all(keys.view(), &codes, &one_head, &mask),
        (shape("codewords", &[2, 4, 3], &[1, 4, 3]), false)
    );
    assert_eq!(lookup(codes.view(), one_head.view()), Err(shape("codewords", &[2, 4, 3], &[1, 4, 3])));
    let turned = mask.t().to_owned();
    assert_eq!(all(keys.view(), &codes, &codewords, &turned), (shape("mask", &[2, 5], &[5, 2]), true));
    let mut beyond = codes.clone();
    beyond[[1, 0, 3]] = 4;
    let error = Error::OutOfRange { what: "codes", index: vec![1, 0, 3], got: 4, limit: 4 };
    assert_eq!(all(keys.view(), &beyond, &codewords, &mask), (error.clone(), true));
    assert_eq!(lookup(beyond.view(), codewords.view()), Err(error));
    let mut bad = keys.clone();
    bad[[0, 1, 2, 0]] = f64::NAN;
    let error = Error::NotFinite { what: "keys", index: vec![0, 1, 2, 0], value: "NaN".to_string() };
    assert_eq!(all(bad.view(), &codes, &codewords, &mask), (error, true));
    let (error, _) = all(keys.view(), &codes, &(&codewords * f64::INFINITY), &mask);
    assert!(matches!(error, Error::NotFinite { what: "codewords", .. }));
    let weight = commitment::backward(keys.view(), codes.view(), codewords.view(), None, f64::NAN);
    assert!(matches!(weight, Err(Error::Invalid { what: "weight", .. })));
    let mut zeros = CodeStats::<f64>::zeros(2, 4, 3).unwrap();
    assert_eq!(zeros.merge(&CodeStats::zeros(2, 3, 3).unwrap()), Err(shape("other", &[2, 4, 3], &[2, 3, 3])));
    assert!(matches!(CodeStats::<f64>::zeros(2, usize::MAX, 3), Err(Error::TooLarge { .. })));
    let many = array![[[0u32]]];
    let many = many.broadcast((1, 1, usize::MAX / 8)).unwrap();
    assert!(matches!(lookup(many, Array3::<f64>::ones((1, 1, 9)).view()), Err(Error::TooLarge { .. })));
}
