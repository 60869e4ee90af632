//! Keys get the codes that the definition gives them, exactly.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, Axis, array, concatenate, s};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::{Codebook, Ema, assign, assign_naive};
use transformer_vq::{Error, Scalar, ndarray};

/// Uniform in -1 .. 1.
fn numbers<T: Scalar>(rows: usize, cols: usize, seed: u64) -> Array2<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, cols), || T::from_f64(rng.random_range(-1.0..1.0)))
}

#[track_caller]
fn check<T: Scalar>(keys: ArrayView2<'_, T>, codewords: ArrayView2<'_, T>) -> Array1<u32> {
    let codes = assign(keys, codewords).unwrap();
    assert_eq!(codes, assign_naive(keys, codewords).unwrap(), "{:?} {:?}", keys.shape(), codewords.shape());
    codes
}

fn sizes<T: Scalar>() {
    for n in [0, 1, 7, 32, 33, 300, 1024, 1025] {
        for n_codes in [1, 2, 17, 300] {
            for d_k in [1, 3, 16, 128] {
                check(numbers::<T>(n, d_k, 1).view(), numbers::<T>(n_codes, d_k, 2).view());
            }
        }
    }
}

#[test]
fn equals_the_definition_at_every_size() {
    sizes::<f32>();
    sizes::<f64>();
}

#[test]
fn equals_the_definition_for_any_strides() {
    let wide = numbers::<f32>(2 * 21, 3 * 13, 3);
    let tall = numbers::<f32>(13, 40, 4);
    let keys = wide.slice(s![..;2, ..;-3]);
    check(keys, tall.t());
    check(keys, tall.slice(s![.., ..;-1]).t());
    check(tall.t(), keys);
    let one = numbers::<f32>(1, 13, 5);
    check(one.broadcast((50, 13)).unwrap(), keys);
}

proptest! {
    #[test]
    fn equals_the_definition(
        (n, n_codes, d_k) in (0..70usize, 1..40usize, 1..20usize),
        seed: u64,
        // Coarse grids make ties, offsets and scales make rounding visible.
        grid in prop::sample::select(vec![0.5, 1e-2, 1e-9]),
        offset in prop::sample::select(vec![0.0, 1.0, -1e3, 1e7]),
        scale in prop::sample::select(vec![1.0, 1e-3, 1e-30, 1e25]),
    ) {
        let place = |x: f64| scale * ((x / grid).round() * grid + offset);
        let keys = numbers::<f64>(n, d_k, seed).mapv(place);
        let codewords = numbers::<f64>(n_codes, d_k, !seed).mapv(place);
        check(keys.view(), codewords.view());
        check(keys.mapv(|x| x as f32).view(), codewords.mapv(|x| x as f32).view());
    }
}

#[test]
fn equals_the_definition_at_the_ends_of_the_range() {
    for scale in [f32::MAX, f32::MAX / 2.0, 1e20, 1e18, 1e-18, 3e-22, 1e-38, f32::from_bits(5)] {
        for (key_scale, code_scale) in [(scale, scale), (scale, 1.0), (1.0, scale), (scale, 1.0 / scale)] {
            let code_scale = code_scale.min(f32::MAX);
            let keys = numbers::<f32>(1000, 9, 6) * key_scale;
            check(keys.view(), (numbers::<f32>(30, 9, 7) * code_scale).view());
        }
    }
    // The first product overflows halfway to zero.
    let (keys, codewords) = (array![[1e19f32, 1e19]], array![[1e20f32, -1e20], [1e19, 1e19]]);
    assert_eq!(check(keys.view(), codewords.view()).to_vec(), [1]);
    for scale in [f64::MAX, 1e160, 1e150, 1e-150, 1e-160, 1e-307] {
        let keys = numbers::<f64>(40, 9, 6) * scale;
        check(keys.view(), (numbers::<f64>(30, 9, 7) * scale).view());
        check(keys.view(), numbers::<f64>(30, 9, 7).view());
    }
}

#[test]
fn ties_take_the_lowest_code() {
    let codewords = array![[1f32, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]];
    let keys = array![[5f32, 0.0], [-1.0, 3.0], [0.5, 7.0], [-0.5, 0.0], [0.25, 1.0]];
    assert_eq!(check(keys.view(), codewords.view()).to_vec(), [0, 1, 0, 1, 3]);
    let same = Array2::from_elem((700, 20), 0.3f32);
    assert_eq!(check(same.slice(s![..200, ..]), same.view()), Array1::<u32>::zeros(200));
}

#[test]
fn codewords_are_their_own_codes_however_close() {
    let own = Array1::from_iter(0..300);
    let codewords = numbers::<f32>(300, 20, 8);
    assert_eq!(check(codewords.view(), codewords.view()), own);
    // Next to each other in f32, far from zero: the expanded square cannot tell them apart.
    let mut close = Array2::from_elem((300, 20), 5f32);
    for (code, mut codeword) in close.outer_iter_mut().enumerate() {
        codeword[code % 20] += 5.0 * f32::EPSILON * (1 + code / 20) as f32;
    }
    assert_eq!(check(close.view(), close.view()), own);
}

#[test]
fn a_common_offset_changes_nothing() {
    // Multiples of 2^-10, so that adding 2^10 is exact in f32.
    let on_grid = |x: f32| (x * 1024.0).round() / 1024.0;
    let keys = numbers::<f32>(500, 16, 9).mapv(on_grid);
    let codewords = numbers::<f32>(64, 16, 10).mapv(on_grid);
    let codes = check(keys.view(), codewords.view());
    assert_eq!(check((keys + 1024.0).view(), (codewords + 1024.0).view()), codes);
}

#[test]
fn follows_permutations() {
    let (keys, codewords) = (numbers::<f32>(200, 8, 11), numbers::<f32>(50, 8, 12));
    let codes = check(keys.view(), codewords.view());
    assert_eq!(check(keys.view(), codewords.slice(s![..;-1, ..])), codes.mapv(|code| 49 - code));
    assert_eq!(check(keys.slice(s![..;-1, ..]), codewords.view()), codes.slice(s![..;-1]));
}

#[test]
fn follows_reflections_scale_and_padding() {
    let (keys, codewords) = (numbers::<f64>(300, 12, 13), numbers::<f64>(40, 12, 14));
    let codes = check(keys.view(), codewords.view());
    // x -> 3 (x - 2 u (u . x) / |u|^2)
    let u = numbers::<f64>(12, 1, 15);
    let map = (Array2::eye(12) - u.dot(&u.t()) * (2.0 / u.mapv(|x| x * x).sum())) * 3.0;
    assert_eq!(check(keys.dot(&map).view(), codewords.dot(&map).view()), codes);
    let pad = |a: &Array2<f64>| concatenate![Axis(1), a.view(), Array2::zeros((a.nrows(), 5))];
    assert_eq!(check(pad(&keys).view(), pad(&codewords).view()), codes);
}

#[test]
fn neither_cutting_nor_threads_change_a_code() {
    let mut keys = numbers::<f32>(3000, 16, 16);
    let codewords = numbers::<f32>(100, 16, 17);
    for (i, mut key) in keys.outer_iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
        // Halfway between two codewords, up to rounding.
        key.assign(&(&(&codewords.row(i % 100) + &codewords.row(i % 99)) * 0.5));
    }
    let codes = check(keys.view(), codewords.view());
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| assign(keys.view(), codewords.view())).unwrap(), codes);
    }
    for cut in [1, 31, 128, 1000, 2999] {
        let (head, tail) = keys.view().split_at(Axis(0), cut);
        let pieces = [assign(head, codewords.view()).unwrap(), assign(tail, codewords.view()).unwrap()];
        assert_eq!(concatenate![Axis(0), pieces[0], pieces[1]], codes);
    }
    for j in (0..3000).step_by(7) {
        assert_eq!(assign(keys.slice(s![j..j + 1, ..]), codewords.view()).unwrap()[0], codes[j]);
    }
}

#[test]
fn each_head_has_its_own_codewords() {
    let (b, h, t, k, n_codes) = (3, 2, 1030, 6, 20);
    let codewords = numbers::<f32>(h * n_codes, k, 18).into_shape_with_order((h, n_codes, k)).unwrap();
    let tokens = numbers::<f32>(b * t, h * k, 19).into_shape_with_order((b, t, h, k)).unwrap();
    let keys = tokens.view().permuted_axes([0, 2, 1, 3]); // [B, H, T, K]
    let codebook = Codebook::ema(Ema::from_codewords(codewords.clone(), 0.9).unwrap());
    let codes = codebook.assign(keys).unwrap();
    for ((b, h), codes) in ndarray::indices((b, h)).into_iter().zip(codes.rows()) {
        let expected = assign_naive(keys.slice(s![b, h, .., ..]), codewords.slice(s![h, .., ..])).unwrap();
        assert_eq!(codes, expected);
    }
    let swapped =
        Codebook::ema(Ema::from_codewords(codewords.slice(s![..;-1, .., ..]).to_owned(), 0.9).unwrap());
    assert_eq!(swapped.assign(keys.slice(s![.., ..;-1, .., ..])).unwrap(), codes.slice(s![.., ..;-1, ..]));
    for (b, t) in [(0, 5), (2, 0), (0, 0)] {
        let none = codebook.assign(Array4::zeros((b, h, t, k)).view()).unwrap();
        assert_eq!(none, Array3::<u32>::zeros((b, h, t)));
    }
}

#[test]
fn bad_input_is_refused() {
    let (keys, codewords) = (Array2::<f32>::zeros((4, 3)), Array2::<f32>::zeros((2, 3)));
    let both = |keys: ArrayView2<'_, f32>, codewords: ArrayView2<'_, f32>| {
        let error = assign(keys, codewords).unwrap_err();
        assert_eq!(assign_naive(keys, codewords).unwrap_err(), error);
        error
    };
    let narrow = codewords.slice(s![.., ..2]);
    assert_eq!(
        both(keys.view(), narrow),
        Error::Shape { what: "keys", expected: vec![4, 2], got: vec![4, 3] }
    );
    let empty = Error::Empty { what: "codewords" };
    assert_eq!(both(keys.view(), codewords.slice(s![..0, ..])), empty);
    assert_eq!(both(keys.slice(s![.., ..0]), codewords.slice(s![.., ..0])), empty);
    for (value, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let (mut bad_keys, mut bad_codewords) = (keys.clone(), codewords.clone());
        (bad_keys[[2, 1]], bad_codewords[[1, 0]]) = (value, value);
        let error = |what, index| Error::NotFinite { what, index, value: name.to_string() };
        assert_eq!(both(bad_keys.view(), codewords.view()), error("keys", vec![2, 1]));
        assert_eq!(both(keys.view(), bad_codewords.view()), error("codewords", vec![0, 1, 0]));
        let codebook =
            Codebook::ema(Ema::from_codewords(codewords.clone().insert_axis(Axis(0)), 0.9).unwrap());
        let keys4 = bad_keys.insert_axis(Axis(0)).insert_axis(Axis(0));
        assert_eq!(codebook.assign(keys4.view()), Err(error("keys", vec![0, 0, 2, 1])));
        let two_heads = keys4.broadcast((1, 2, 4, 3)).unwrap();
        assert!(matches!(codebook.assign(two_heads), Err(Error::Shape { what: "keys", .. })));
    }
    let point = Array2::<f32>::zeros((1, 1));
    if let Some(many) = point.broadcast((u32::MAX as usize + 1, 1)) {
        assert!(matches!(both(point.view(), many), Error::Invalid { what: "codewords", .. }));
    }
}
