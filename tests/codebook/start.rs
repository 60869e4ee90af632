//! First codewords: random, sampled, by k-means++. (F1 and F3 of the test plan, A7, and what bad input gives.)

use std::collections::BTreeSet;

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis, concatenate, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::{Codebook, Ema, assign, commitment, start};
use transformer_vq::{Error, Scalar, ndarray};

fn numbers<T: Scalar>(dim: (usize, usize, usize, usize), seed: u64) -> Array4<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array4::from_shape_simple_fn(dim, || T::from_f64(rng.random_range(-1.0..1.0)))
}

/// Summed over heads, relative to the keys' number.
fn error<T: Scalar>(keys: ArrayView4<'_, T>, codewords: &Array3<T>) -> f64 {
    let codebook = Codebook::ema(Ema::from_codewords(codewords.clone(), 0.9).unwrap());
    let codes = codebook.assign(keys).unwrap();
    commitment::loss(keys, codes.view(), codewords.view(), None).unwrap()
}

/// The rows of each head, comparable.
fn rows(x: &Array3<f32>, head: usize) -> Vec<Vec<u32>> {
    x.index_axis(Axis(0), head).outer_iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

fn different(rows: &[Vec<u32>]) -> usize {
    rows.iter().collect::<BTreeSet<_>>().len()
}

type Start =
    fn(ArrayView4<'_, f32>, usize, Option<ndarray::ArrayView2<'_, bool>>, u64) -> Result<Array3<f32>, Error>;

/// Both that take keys, k-means with and without steps.
const STARTS: [Start; 3] = [
    start::sample,
    |keys, n_codes, mask, seed| start::k_means(keys, n_codes, mask, 0, seed),
    |keys, n_codes, mask, seed| start::k_means(keys, n_codes, mask, 5, seed),
];

#[test]
fn steps_never_raise_the_error() {
    for (dim, n_codes) in [((2, 2, 300, 3), 20), ((1, 1, 1030, 16), 100), ((3, 1, 40, 1), 30)] {
        let keys = numbers::<f64>(dim, 1);
        let codewords = |steps| start::k_means(keys.view(), n_codes, None, steps, 7).unwrap();
        let errors: Vec<f64> = (0..8).map(|steps| error(keys.view(), &codewords(steps))).collect();
        assert!(errors.windows(2).all(|pair| pair[1] <= pair[0] * (1.0 + 1e-12)), "{errors:?}");
        assert!(errors[7] < 0.95 * errors[0], "{errors:?}");
        // Far beyond the last step that changes a code.
        assert_eq!(codewords(1000), codewords(1001));
        assert!(codewords(5).iter().all(|c| c.is_finite()));
    }
}

#[test]
fn every_cluster_is_found() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let centres = numbers::<f32>((1, 1, 50, 8), 3) * 100.0;
    let keys = Array4::from_shape_fn((2, 1, 2000, 8), |(_, _, t, k)| {
        centres[[0, 0, t * t % 50, k]] + rng.random_range(-0.01..0.01)
    });
    let places = BTreeSet::from_iter((0..2000).map(|t| t * t % 50)).len();
    for seed in 0..5 {
        let codewords = start::k_means(keys.view(), places, None, 2, seed).unwrap();
        assert!(error(keys.view(), &codewords) < 8.0 * 1e-4 / 3.0);
    }
}

#[test]
fn sampled_codewords_are_different_keys() {
    let keys = numbers::<f32>((2, 3, 40, 5), 4);
    for n_codes in [1, 7, 79, 80] {
        for of in &STARTS[..2] {
            let codewords = of(keys.view(), n_codes, None, 5).unwrap();
            assert_eq!(codewords.dim(), (3, n_codes, 5));
            for head in 0..3 {
                let drawn = rows(&codewords, head);
                assert_eq!(different(&drawn), n_codes);
                let tokens =
                    concatenate![Axis(0), keys.slice(s![0, head, .., ..]), keys.slice(s![1, head, .., ..])];
                let all = rows(&tokens.insert_axis(Axis(0)), 0);
                assert!(drawn.iter().all(|row| all.contains(row)));
            }
        }
    }
}

#[test]
fn fewer_keys_than_codes_repeat_and_the_rest_stays_unused() {
    let keys = numbers::<f32>((1, 1, 7, 3), 5);
    for of in STARTS {
        let codewords = of(keys.view(), 20, None, 6).unwrap();
        assert_eq!((codewords.dim(), different(&rows(&codewords, 0))), ((1, 20, 3), 7));
        assert_eq!(error(keys.view(), &codewords), 0.0);
        let one = of(keys.slice(s![.., .., ..1, ..]), 3, None, 6).unwrap();
        assert_eq!(different(&rows(&one, 0)), 1);
    }
    // Fewer different ones, though many.
    let few = Array4::from_shape_fn((2, 1, 3000, 3), |(_, _, t, k)| keys[[0, 0, t % 7, k]]);
    assert_eq!(different(&rows(&STARTS[1](few.view(), 20, None, 6).unwrap(), 0)), 7);
    for of in &STARTS[1..] {
        let codewords = of(few.view(), 20, None, 6).unwrap();
        // Means of equal keys are off by rounding.
        assert!(error(few.view(), &codewords) < 1e-10);
    }
}

#[test]
fn identical_and_zero_keys_give_that_key() {
    for value in [0.0, 2.5, -1e-40, f32::MAX] {
        let keys = Array4::from_elem((2, 2, 3000, 3), value);
        for of in STARTS {
            let codewords = of(keys.view(), 4, None, 1).unwrap();
            assert!(codewords.iter().all(|&c| (c - value).abs() <= 1e-6 * value.abs() + 1e-44), "{value}");
        }
    }
    // Some zeros among others are keys like them.
    let mut keys = numbers::<f32>((1, 1, 50, 3), 8);
    keys.slice_mut(s![.., .., ..10, ..]).fill(0.0);
    let codewords = start::k_means(keys.view(), 41, None, 3, 1).unwrap();
    assert_eq!(error(keys.view(), &codewords), 0.0);
}

#[test]
fn one_code_is_the_mean_and_width_1_works() {
    let keys = numbers::<f64>((3, 2, 100, 4), 6);
    let codewords = start::k_means(keys.view(), 1, None, 1, 1).unwrap();
    let mean = keys.mean_axis(Axis(2)).unwrap().mean_axis(Axis(0)).unwrap();
    assert!((&codewords.index_axis(Axis(1), 0) - &mean).iter().all(|e: &f64| e.abs() < 1e-14));
    let line = numbers::<f32>((1, 1, 500, 1), 7);
    for of in STARTS {
        assert_eq!(different(&rows(&of(line.view(), 30, None, 1).unwrap(), 0)), 30);
        assert_eq!(of(line.slice(s![.., .., ..1, ..]), 1, None, 1).unwrap(), line.slice(s![0, .., ..1, ..]));
    }
}

#[test]
fn powers_of_two_scale_through() {
    let keys = numbers::<f32>((1, 1, 400, 6), 9);
    for of in STARTS {
        let codewords = of(keys.view(), 30, None, 2).unwrap();
        for scale in [2f32.powi(126), 2f32.powi(70), 2f32.powi(-60), 2f32.powi(-100)] {
            assert_eq!(of((&keys * scale).view(), 30, None, 2).unwrap(), &codewords * scale);
        }
    }
    // Squares and sums that would be infinite.
    let keys = numbers::<f32>((1, 1, 400, 6), 9) * f32::MAX;
    assert!(start::k_means(keys.view(), 3, None, 5, 1).unwrap().iter().all(|c| c.is_finite()));
    let keys = numbers::<f64>((1, 1, 400, 6), 9) * f64::MAX;
    assert!(start::k_means(keys.view(), 3, None, 5, 1).unwrap().iter().all(|c| c.is_finite()));
}

#[test]
fn masked_keys_take_no_part() {
    let keys = numbers::<f32>((2, 2, 60, 3), 10);
    let mask = Array2::from_shape_fn((2, 60), |(b, t)| (b * 7 + t) % 3 == 0);
    let mut loud = keys.clone();
    for (b, t) in mask.indexed_iter().filter(|(_, counts)| !**counts).map(|(at, _)| at) {
        loud.slice_mut(s![b, .., t, ..]).fill(1e30);
    }
    let kept = |b: usize| keys.select(Axis(2), &Vec::from_iter((0..60).filter(|&t| mask[[b, t]])));
    let [first, second] = [0, 1].map(|b| kept(b).slice(s![b..b + 1, .., .., ..]).to_owned());
    let only = concatenate![Axis(2), first, second];
    for of in STARTS {
        let codewords = of(loud.view(), 12, Some(mask.view()), 3).unwrap();
        assert!(codewords.iter().all(|c| c.abs() <= 1.0));
        assert_eq!(codewords, of(only.view(), 12, None, 3).unwrap());
        let all = Array2::from_elem((2, 60), true);
        assert_eq!(of(keys.view(), 12, Some(all.view()), 3), of(keys.view(), 12, None, 3));
        let none = Array2::from_elem((2, 60), false);
        assert_eq!(of(keys.view(), 12, Some(none.view()), 3), Err(Error::Empty { what: "keys" }));
    }
}

#[test]
fn seeds_heads_strides_and_threads() {
    let tokens = numbers::<f32>((2, 1500, 3, 4), 11);
    let keys = tokens.view().permuted_axes([0, 2, 1, 3]); // [B, H, T, K]
    for of in STARTS {
        let codewords = of(keys, 70, None, 4).unwrap();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| of(keys, 70, None, 4)).unwrap(), codewords);
        }
        assert_eq!(of(keys.as_standard_layout().view(), 70, None, 4).unwrap(), codewords);
        assert_ne!(of(keys, 70, None, 5).unwrap(), codewords);
        // A head does not hear of those behind it, and does not draw what its neighbours draw.
        let one = of(keys.slice(s![.., ..1, .., ..]), 70, None, 4).unwrap();
        assert_eq!(one, codewords.slice(s![..1, .., ..]));
        let twins = concatenate![Axis(1), keys.slice(s![.., ..1, .., ..]), keys.slice(s![.., ..1, .., ..])];
        let twins = of(twins.view(), 70, None, 4).unwrap();
        assert_ne!(twins.index_axis(Axis(0), 0), twins.index_axis(Axis(0), 1));
    }
}

#[test]
fn codewords_and_the_state_made_of_them_agree() {
    let keys = numbers::<f32>((1, 2, 200, 4), 12);
    for of in STARTS {
        let codewords = of(keys.view(), 16, None, 1).unwrap();
        let codebook = Codebook::ema(Ema::from_codewords(codewords.clone(), 0.9).unwrap());
        assert_eq!(codebook.codewords(), codewords);
    }
}

#[test]
fn random_codewords_have_the_deviation_asked_for() {
    let codewords: Array3<f64> = start::random(3, 100, 40, 0.3, 1).unwrap();
    let mean = |f: &dyn Fn(f64) -> f64| codewords.mapv(f).mean().unwrap();
    assert!(mean(&|c| c).abs() < 0.01 && (mean(&|c| c * c) / 0.09 - 1.0).abs() < 0.03);
    assert_eq!(start::random::<f32>(3, 100, 40, 0.3, 1).unwrap(), codewords.mapv(|c| c as f32));
    assert_eq!(start::random::<f64>(2, 100, 40, 0.3, 1).unwrap(), codewords.slice(s![..2, .., ..]));
    assert_ne!(start::random::<f64>(3, 100, 40, 0.3, 2).unwrap(), codewords);
    assert_eq!(start::random::<f32>(1, 2, 3, 0.0, 1).unwrap(), Array3::<f32>::zeros((1, 2, 3)));
}

#[test]
fn codes_of_k_means_are_all_in_use_where_keys_differ() {
    let keys = numbers::<f32>((1, 1, 4000, 8), 13);
    let codewords = start::k_means(keys.view(), 128, None, 20, 1).unwrap();
    let (keys, codewords) = (keys.slice(s![0, 0, .., ..]), codewords.index_axis(Axis(0), 0));
    let codes = assign(keys, codewords).unwrap();
    assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), 128);
}
