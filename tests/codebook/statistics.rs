//! Sums and counts of more keys than one stretch takes. (D6 and A7 of the test plan: batches, shards, threads.)

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::CodeStats;
use transformer_vq::ndarray;

/// Integers, so that every order of summation gives the same: B, H, T, K.
fn case(dim: (usize, usize, usize, usize), n_codes: u32) -> (Array4<f32>, Array3<u32>, Array2<bool>) {
    let mut rng = ChaCha8Rng::seed_from_u64(dim.2 as u64);
    let keys = Array4::from_shape_simple_fn(dim, || rng.random_range(-9i32..10) as f32);
    let codes = Array3::from_shape_simple_fn((dim.0, dim.1, dim.2), || rng.random_range(0..n_codes));
    let mask = Array2::from_shape_simple_fn((dim.0, dim.2), || rng.random_range(0..4) > 0);
    (keys, codes, mask)
}

fn collect(
    keys: ArrayView4<'_, f32>,
    codes: ArrayView3<'_, u32>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
) -> CodeStats<f32> {
    CodeStats::collect(keys, codes, n_codes, mask).unwrap()
}

#[test]
fn many_keys_are_all_added_once() {
    // Sequences that end inside a stretch, beside its end, and that hold several; few and many codes, few and many columns.
    for (dim @ (b, h, t, k), n_codes) in [
        ((7, 2, 1900, 3), 5),
        ((1, 1, 13_001, 70), 3),
        ((13_000, 1, 1, 2), 1),
        ((2, 1, 4096, 1), 40),
        ((3, 1, 9000, 2), 400),
    ] {
        let (keys, codes, mask) = case(dim, n_codes as u32);
        for mask in [None, Some(mask.view())] {
            let mut sums = Array3::<f32>::zeros((h, n_codes, k));
            let mut counts = Array2::<u64>::zeros((h, n_codes));
            for (b, h, t) in ndarray::indices((b, h, t)) {
                if mask.is_none_or(|mask| mask[[b, t]]) {
                    let code = codes[[b, h, t]] as usize;
                    counts[[h, code]] += 1;
                    let mut sum = sums.slice_mut(s![h, code, ..]);
                    sum += &keys.slice(s![b, h, t, ..]);
                }
            }
            let stats = collect(keys.view(), codes.view(), n_codes, mask);
            assert_eq!((stats.sums(), stats.counts()), (sums.view(), counts.view()), "{dim:?}");
        }
    }
}

#[test]
fn shards_of_any_size_merge_into_the_whole() {
    let (keys, codes, mask) = case((2, 2, 10_000, 3), 9);
    let whole = collect(keys.view(), codes.view(), 9, Some(mask.view()));
    for len in [1000, 4097, 9999] {
        let mut merged = CodeStats::zeros(2, 9, 3).unwrap();
        for start in (0..10_000).step_by(len) {
            let of = start..10_000.min(start + len);
            let keys = keys.slice(s![.., .., of.clone(), ..]);
            let (codes, mask) = (codes.slice(s![.., .., of.clone()]), mask.slice(s![.., of]));
            merged.merge(&collect(keys, codes, 9, Some(mask))).unwrap();
        }
        assert_eq!(merged, whole);
    }
}

/// Numbers whose sums depend on the order.
#[test]
fn threads_and_strides_change_no_bit() {
    for (dim, n_codes) in [((2, 3, 7001, 20), 6), ((1, 1, 300, 130), 6), ((1, 1, 20_000, 70), 100)] {
        let (keys, codes, mask) = case(dim, n_codes as u32);
        let keys = keys.mapv(|x| 1.0 / (x + 9.5));
        let moved = keys.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().into_owned();
        let moved = moved.permuted_axes([0, 3, 1, 2]);
        assert!(moved == keys && (dim.1 == 1 || !moved.is_standard_layout()));
        let run = |threads: usize, keys: ArrayView4<'_, f32>| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| collect(keys, codes.view(), n_codes, Some(mask.view())))
        };
        let expected = run(1, keys.view());
        for threads in [1, 2, 3, 8] {
            assert_eq!(run(threads, keys.view()), expected);
            assert_eq!(run(threads, moved.view()), expected);
        }
    }
}
