//! Idle codes get a new start at keys. (F2, F3, D5 and H3 of the test plan.)

use ndarray::{Array1, Array2, Array3, Array4, Axis, array, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::codebook::revive::replacements;
use transformer_vq::codebook::{
    CodeStats, Codebook, Ema, Learning, Replacement, Smoothing, commitment, start,
};
use transformer_vq::ndarray;

const H: usize = 2;
const S: usize = 12;

fn numbers(dim: (usize, usize, usize, usize), seed: u64) -> Array4<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array4::from_shape_simple_fn(dim, || rng.random_range(-1.0..1.0))
}

fn state(codebook: &Codebook<f64>) -> &Ema<f64> {
    match codebook.learning() {
        Learning::Ema(ema) => ema,
        other => panic!("learns by {other:?}"),
    }
}

/// Keys, and a codebook of which some codes are far from all of them and have been unused for long.
fn case() -> (Array4<f64>, Codebook<f64>, Array2<bool>) {
    let keys = numbers((3, H, 50, 4), 1);
    let mut codewords = numbers((1, H, S, 4), 2).index_axis_move(Axis(0), 0);
    let far = Array2::from_shape_fn((H, S), |(head, code)| (code + head) % 3 == 0);
    let mut counts = Array2::from_shape_fn((H, S), |(_, code)| 5.0 + code as f64);
    for (at, _) in far.indexed_iter().filter(|(_, far)| **far) {
        codewords.slice_mut(s![at.0, at.1, ..]).fill(1e3);
        counts[at] = 0.2;
    }
    let sums = &codewords * &counts.view().insert_axis(Axis(2));
    (keys, Codebook::ema(Ema::new(sums, counts, 0.9).unwrap()), far)
}

#[test]
fn only_idle_codes_change_and_sums_and_counts_agree() {
    let (keys, mut codebook, far) = case();
    let before = state(&codebook).clone();
    let idle = far.iter().filter(|&&far| far).count();
    assert_eq!(codebook.revive(keys.view(), None, 0.1, 3), Ok(idle));
    let after = state(&codebook);
    assert_eq!(after.decay(), before.decay());
    let codewords = codebook.codewords();
    for ((head, code), &far) in far.indexed_iter() {
        let of = s![head, code, ..];
        if !far {
            assert_eq!(after.counts()[[head, code]], before.counts()[[head, code]]);
            assert_eq!(after.sums().slice(of), before.sums().slice(of));
            continue;
        }
        let mean = before.counts().row(head).sum() / S as f64;
        assert_eq!(after.counts()[[head, code]], mean);
        let codeword = codewords.slice(of);
        assert_eq!(&after.sums().slice(of) / mean, codeword);
        let near = |key: ndarray::ArrayView1<'_, f64>| (&key - &codeword).iter().all(|e| e.abs() < 1e-14);
        let of_head = keys.index_axis(Axis(1), head);
        assert!(of_head.outer_iter().any(|keys| keys.outer_iter().any(near)));
    }
    // All of them are in use now, and none is idle.
    let codes = codebook.assign(keys.view()).unwrap();
    let stats = CodeStats::collect(keys.view(), codes.view(), S, None).unwrap();
    for ((head, code), _) in far.indexed_iter().filter(|(_, far)| **far) {
        assert!(stats.counts()[[head, code]] > 0);
    }
    assert_eq!(codebook.revive(keys.view(), None, 0.1, 4), Ok(0));
}

#[test]
fn a_restarted_code_has_its_codeword_whatever_counts_are_divided_by() {
    let (_, codebook, _) = case();
    for smoothing in [Smoothing::CountClamp, Smoothing::Laplace { epsilon: 0.3 }] {
        let mut ema = state(&codebook).clone().with_smoothing(smoothing).unwrap();
        let codeword = Array1::from_shape_fn(codebook.d_k(), |k| k as f64 - 0.5);
        let restarted = [Replacement { head: 0, code: 1, codeword: codeword.clone() }];
        ema.replace(&restarted).unwrap();
        let codewords = Codebook::ema(ema).codewords();
        let difference = (&codewords.slice(s![0, 1, ..]) - &codeword).mapv(f64::abs).sum();
        assert!(difference < 1e-14, "{smoothing:?}: {difference:e}");
    }
}

/// Without a single key they last ln(0.1) / ln(0.9) = 21.9 updates, as their counts start at the mean.
#[test]
fn revived_codes_have_time_to_find_keys() {
    let (_, mut codebook, far) = case();
    let keys = numbers((1, H, 96, 4), 6);
    codebook.revive(keys.view(), None, 0.1, 3).unwrap();
    // As many keys as keep the mean count at 12, all to the other codes.
    let lively = |head: usize| (0..S as u32).filter(move |&code| !(code as usize + head).is_multiple_of(3));
    let codes = Array3::from_shape_fn((1, H, 96), |(_, head, t)| lively(head).nth(t % 8).unwrap());
    let stats = CodeStats::collect(keys.view(), codes.view(), S, None).unwrap();
    assert!(far.indexed_iter().all(|(at, &far)| far == (stats.counts()[at] == 0)));
    for update in 1..=30 {
        codebook.update(&stats).unwrap();
        let idle = codebook.clone().revive(keys.view(), None, 0.1, 1).unwrap();
        assert!(update > 18 || idle == 0, "{idle} idle after {update} updates");
        assert!(update < 26 || idle == 8, "{idle} idle after {update} updates");
    }
}

#[test]
fn the_threshold_is_a_ratio_to_even_usage() {
    let (keys, codebook, _) = case();
    let codewords = codebook.codewords();
    let usage = array![[10.0, 1.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]];
    let (keys, codewords) = (keys.view(), codewords.slice(s![.., ..4, ..]));
    let idle = |usage: &Array2<f64>, ratio| {
        let found = replacements(usage.view(), keys, codewords, None, ratio, 1).unwrap();
        found.into_iter().map(|Replacement { head, code, .. }| (head, code)).collect::<Vec<_>>()
    };
    // The mean is 2.975. A head without any usage has no code below it.
    assert_eq!(idle(&usage, 0.0), []);
    assert_eq!(idle(&usage, 0.01), [(0, 3)]);
    assert_eq!(idle(&usage, 0.31), [(0, 2), (0, 3)]);
    assert_eq!(idle(&usage, 0.35), [(0, 1), (0, 2), (0, 3)]);
    // Twice the batch, a thousandth of it: the same decisions.
    for scale in [2.0, 1e-3, 1e9] {
        assert_eq!(idle(&(&usage * scale), 0.31), [(0, 2), (0, 3)]);
    }
}

#[test]
fn codewords_are_drawn_by_error_from_keys_that_count() {
    let mut keys = Array4::zeros((1, 1, 100, 2));
    let mut mask = Array2::from_elem((1, 100), true);
    // Most keys are served exactly; two are not, one of them masked, a third ever so little.
    keys.slice_mut(s![.., .., 10, ..]).fill(2.0);
    keys.slice_mut(s![.., .., 20, ..]).fill(9.0);
    keys.slice_mut(s![.., .., 30, ..]).fill(1e-6);
    mask[[0, 20]] = false;
    let codewords = Array3::from_shape_fn((1, 5, 2), |(_, s, _)| -(s as f64));
    let usage = array![[99.0, 0.0, 0.0, 0.0, 0.0]];
    let drawn = |mask: &Array2<bool>, seed| {
        let found =
            replacements(usage.view(), keys.view(), codewords.view(), Some(mask.view()), 0.1, seed).unwrap();
        assert_eq!(Vec::from_iter(found.iter().map(|r| r.code)), Vec::from_iter(1..=found.len()));
        Vec::from_iter(found.into_iter().map(|replacement| replacement.codeword[0]))
    };
    // Four are idle, two keys can serve: no key twice, and no other.
    for seed in 0..20 {
        assert_eq!(drawn(&mask, seed), [2.0, 1e-6]);
    }
    let first_is_9 = (0..500).filter(|&seed| drawn(&mask.mapv(|_| true), seed)[0] == 9.0).count();
    assert!((460..=490).contains(&first_is_9), "{first_is_9} of 500, expected 81 / 85 of them");
    assert!(drawn(&mask.mapv(|_| false), 1).is_empty());
}

#[test]
fn nothing_to_gain_changes_nothing() {
    // Identical keys with a codeword of their own; no keys at all; a single code.
    let codewords = array![[[1.0, 2.0], [7.0, 7.0]]];
    let counts = array![[10.0, 0.0]];
    let sums = &codewords * &counts.view().insert_axis(Axis(2));
    let codebook = Codebook::ema(Ema::new(sums, counts, 0.9).unwrap());
    let mut same = codebook.clone();
    let keys = Array4::from_shape_fn((1, 1, 9, 2), |(_, _, _, k)| [1.0, 2.0][k]);
    assert_eq!(same.revive(keys.view(), None, 0.5, 1), Ok(0));
    assert_eq!(same.revive(keys.slice(s![.., .., ..0, ..]), None, 0.5, 1), Ok(0));
    assert_eq!(same, codebook);
    let mut single = Codebook::ema(Ema::from_codewords(array![[[5.0]]], 0.9).unwrap());
    assert_eq!(single.revive(Array4::zeros((1, 1, 3, 1)).view(), None, 0.9, 1), Ok(0));
    // Errors beyond the range of numbers: a key all the same, or an error where its sum is none.
    let mut far = Codebook::ema(Ema::new(array![[[1.0], [2.0]]], array![[1.0, 0.0]], 0.9).unwrap());
    let huge = Array4::from_elem((1, 1, 5, 1), 1e300);
    assert_eq!(far.revive(huge.view(), None, 0.1, 1), Ok(1));
    assert_eq!(far.codewords()[[0, 1, 0]], 1e300);
    // A mean count below what divides: the codeword is the key all the same.
    let mut faint =
        Codebook::ema(Ema::new(array![[[0.0, 0.0], [0.0, 0.0]]], array![[1e-4, 0.0]], 0.9).unwrap());
    assert_eq!(faint.revive(keys.view(), None, 0.5, 1), Ok(1));
    assert_eq!(faint.codewords(), array![[[0.0, 0.0], [1.0, 2.0]]]);
}

#[test]
fn seeds_and_threads() {
    let (keys, codebook, _) = case();
    let revived = |seed, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut codebook = codebook.clone();
        pool.install(|| codebook.revive(keys.view(), None, 0.1, seed)).unwrap();
        codebook
    };
    assert_eq!(revived(1, 1), revived(1, 4));
    assert_ne!(revived(1, 1), revived(2, 1));
}

/// Codebooks that learn otherwise write the new codewords themselves.
#[test]
fn replacements_serve_any_table_of_codewords() {
    let keys = numbers((2, H, 400, 4), 5);
    let mut codewords: Array3<f64> = start::random(H, S, 4, 1e-3, 1).unwrap() + 5.0;
    let error = |codewords: &Array3<f64>| {
        let codebook = Codebook::ema(Ema::from_codewords(codewords.clone(), 0.9).unwrap());
        let codes = codebook.assign(keys.view()).unwrap();
        let stats = CodeStats::collect(keys.view(), codes.view(), S, None).unwrap();
        let loss = commitment::loss(keys.view(), codes.view(), codewords.view(), None).unwrap();
        (loss, stats.counts().mapv(|n| n as f64))
    };
    let (before, usage) = error(&codewords);
    for Replacement { head, code, codeword } in
        replacements(usage.view(), keys.view(), codewords.view(), None, 0.2, 1).unwrap()
    {
        codewords.slice_mut(s![head, code, ..]).assign(&codeword);
    }
    assert!(error(&codewords).0 < 0.1 * before);
}

/// As many clusters as codes; from random codewords, moving averages leave most codes unused, revival all but none.
#[test]
fn revival_reaches_what_k_means_reaches() {
    let (n_codes, d_k) = (64, 8);
    let centres: Array3<f32> = start::random(1, n_codes, d_k, 1.0, 1).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut batch = |n: usize| {
        let noise: Array3<f32> = start::random(1, n, d_k, 0.1, rng.random()).unwrap();
        let cluster = Array1::from_shape_simple_fn(n, || rng.random_range(0..n_codes));
        Array4::from_shape_fn((1, 1, n, d_k), |(_, _, t, k)| centres[[0, cluster[t], k]] + noise[[0, t, k]])
    };
    let judged = batch(8192);
    let measure = |codebook: &Codebook<f32>| {
        let codes = codebook.assign(judged.view()).unwrap();
        let stats = CodeStats::collect(judged.view(), codes.view(), n_codes, None).unwrap();
        let error =
            commitment::mean_error(judged.view(), codes.view(), codebook.codewords().view(), None).unwrap();
        (error[0], stats.usage()[0])
    };
    let best = (0..4)
        .map(|seed| {
            let codewords = start::k_means(judged.view(), n_codes, None, 30, seed).unwrap();
            measure(&Codebook::ema(Ema::from_codewords(codewords, 0.99).unwrap())).0
        })
        .fold(f64::INFINITY, f64::min);
    let mut run = |ratio| {
        let codewords = start::random(1, n_codes, d_k, 0.1, 7).unwrap();
        let mut codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99).unwrap());
        for step in 0..500 {
            let keys = batch(1024);
            let codes = codebook.assign(keys.view()).unwrap();
            codebook.update(&CodeStats::collect(keys.view(), codes.view(), n_codes, None).unwrap()).unwrap();
            if step % 5 == 0 {
                codebook.revive(keys.view(), None, ratio, step).unwrap();
            }
        }
        measure(&codebook)
    };
    let (alone, usage_alone) = run(0.0);
    let (revived, usage) = run(0.5);
    assert!(usage > 0.95 && revived < 1.05 * best, "{revived} for {best}, usage {usage}");
    assert!(usage_alone < 0.7 && alone > 5.0 * best, "{alone} for {best}, usage {usage_alone}");
}
