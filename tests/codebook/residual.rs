//! Codebooks in turn, and vectors in groups: codes, sums, losses, gradients, statistics.

use crate::estimators::estimators;
use ndarray::{Array2, Array3, Array4, ArrayView1, ArrayView4, Axis, concatenate, s};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{
    CodeStats, Codebook, Ema, Estimator, Residual, assign_naive, commitment, groups, lookup, start,
};
use transformer_vq::{Error, ndarray};

/// B, H, T, K, S of each level.
const SIZES: [([usize; 4], &[usize]); 5] = [
    ([1, 1, 1, 1], &[1]),
    ([2, 3, 7, 3], &[5]),
    ([3, 2, 20, 8], &[4, 6, 3]),
    ([1, 2, 40, 1], &[3, 70]),
    ([2, 1, 0, 3], &[4, 4]),
];

struct Case {
    keys: Array4<f64>,
    mask: Array2<bool>,
    residual: Residual<f64>,
}

fn keys([b, h, t, k]: [usize; 4], seed: u64) -> Array4<f64> {
    let numbers: Array3<f64> = start::random(b * h, t.max(1), k, 1.0, seed).unwrap();
    numbers.into_shape_with_order((b, h, t.max(1), k)).unwrap().slice_move(s![.., .., ..t, ..])
}

fn case(dim: [usize; 4], n_codes: &[usize]) -> Case {
    let level = |(l, &n): (usize, &usize)| {
        let codewords = start::random(dim[1], n, dim[3], 0.5f64.powi(l as i32), 10 + l as u64).unwrap();
        Codebook::ema(Ema::from_codewords(codewords, 0.9).unwrap())
    };
    let residual = Residual::new(n_codes.iter().enumerate().map(level).collect()).unwrap();
    let mask = Array2::from_shape_fn((dim[0], dim[2]), |(b, t)| (b + t) % 3 != 1);
    Case { keys: keys(dim, 3), mask, residual }
}

#[test]
fn codes_and_sums_are_their_definition() {
    for (dim @ [b, h, t, _], n_codes) in SIZES {
        let Case { keys, residual, .. } = case(dim, n_codes);
        let (output, _) = residual.forward(keys.view(), None).unwrap();
        assert_eq!(residual.encode(keys.view()).unwrap(), output.codes);
        assert_eq!(output.codes.dim(), (n_codes.len(), b, h, t));
        for (b, h) in ndarray::indices((b, h)) {
            let mut left = keys.slice(s![b, h, .., ..]).to_owned();
            let mut sum = Array2::zeros(left.dim());
            for (l, level) in residual.levels().iter().enumerate() {
                let codewords = level.codewords().index_axis_move(Axis(0), h);
                let codes = assign_naive(left.view(), codewords.view()).unwrap();
                assert_eq!(output.codes.slice(s![l, b, h, ..]), codes);
                let vectors = codewords.select(Axis(0), &codes.mapv(|code| code as usize).to_vec());
                left -= &vectors;
                sum += &vectors;
                // The first levels alone.
                let coarse = residual.decode(output.codes.slice(s![..=l, .., .., ..])).unwrap();
                assert_eq!(coarse.slice(s![b, h, .., ..]), sum);
            }
            assert_eq!(output.quantized.slice(s![b, h, .., ..]), sum);
        }
    }
}

#[test]
fn decoding_gives_what_forward_gave_bit_for_bit() {
    for (dim, n_codes) in SIZES {
        let Case { keys, mask, residual } = case(dim, n_codes);
        let (output, _) = residual.forward(keys.view(), Some(mask.view())).unwrap();
        let decoded = residual.decode(output.codes.view()).unwrap();
        assert_eq!(decoded.mapv(f64::to_bits), output.quantized.mapv(f64::to_bits));
        // The mask decides what counts, not what is quantized.
        assert_eq!(residual.forward(keys.view(), None).unwrap().0.quantized, output.quantized);
    }
}

#[test]
fn one_level_is_a_codebook() {
    let Case { keys, mask, residual } = case([2, 3, 30, 3], &[5]);
    let (codebook, mask) = (&residual.levels()[0], Some(mask.view()));
    let (output, saved) = residual.forward(keys.view(), mask).unwrap();
    let codes = codebook.assign(keys.view()).unwrap();
    let (codes, codewords, keys) = (codes.view(), codebook.codewords(), keys.view());
    assert_eq!(output.codes.index_axis(Axis(0), 0), codes);
    assert_eq!(output.quantized, lookup(codes, codewords.view()).unwrap());
    assert_eq!(output.stats, [CodeStats::collect(keys, codes, 5, mask).unwrap()]);
    assert_eq!(output.commit_loss(), commitment::loss(keys, codes, codewords.view(), mask).unwrap());
    let relative = commitment::relative_error(keys, codes, codewords.view(), mask).unwrap();
    assert!((&output.relative_errors().row(0) - &relative).iter().all(|e| e.abs() < 1e-15));
    let zeros = Array4::zeros(keys.dim());
    assert_eq!(
        saved.backward(keys, mask, zeros.view(), Estimator::StraightThrough, 0.3),
        commitment::backward(keys, codes, codewords.view(), mask, 0.3)
    );
    let minus_zero = Codebook::ema(Ema::from_codewords(Array3::from_elem((3, 1, 3), -0.0), 0.9).unwrap());
    let (output, _) = Residual::new(vec![minus_zero]).unwrap().forward(keys, None).unwrap();
    assert!(output.quantized.iter().all(|x| x.to_bits() == (-0.0f64).to_bits()));
}

/// The surrogate: codes, and for the estimator's part the codewords too, held fixed; straight through, k^ = k + const.
#[test]
fn gradients_equal_finite_differences() {
    let weight = 0.7;
    for (dim, n_codes) in SIZES {
        let Case { keys: x, mask, residual } = case(dim, n_codes);
        let d_quantized = keys(dim, 5);
        for mask in [None, Some(mask.view())] {
            let (output, saved) = residual.forward(x.view(), mask).unwrap();
            let value = |x: ArrayView4<'_, f64>| {
                let (mut left, mut loss) = (x.to_owned(), (&x * &d_quantized).sum());
                for (codes, level) in output.codes.outer_iter().zip(residual.levels()) {
                    let codewords = level.codewords();
                    loss += weight * commitment::loss(left.view(), codes, codewords.view(), mask).unwrap();
                    left -= &lookup(codes, codewords.view()).unwrap();
                }
                loss
            };
            let expected = finite_difference(value, &x, 1e-2);
            let estimator = Estimator::StraightThrough;
            let got = saved.backward(x.view(), mask, d_quantized.view(), estimator, weight).unwrap();
            assert!(relative_rms(&got, &expected) <= 1e-9, "{:e}", relative_rms(&got, &expected));
            // What does not count feels no commitment.
            for ((b, t), _) in
                mask.iter().flat_map(|mask| mask.indexed_iter()).filter(|(_, counts)| !**counts)
            {
                assert_eq!(got.slice(s![b, .., t, ..]), d_quantized.slice(s![b, .., t, ..]));
            }
        }
    }
}

/// Each vector its own codeword: the estimator sees the sum of all levels as one look-up. The commitment does not pass it.
#[test]
fn estimators_see_the_sum_of_all_levels() {
    for (dim @ [b, _, t, _], n_codes) in SIZES {
        let Case { keys: x, mask, residual } = case(dim, n_codes);
        let d_quantized = keys(dim, 5);
        let own = Array3::from_shape_fn((1, dim[1], t), |(_, _, t)| t as u32);
        for (estimator, mask) in
            estimators().into_iter().flat_map(|estimator| [(estimator, None), (estimator, Some(mask.view()))])
        {
            let (output, saved) = residual.forward(x.view(), mask).unwrap();
            let backward = |estimator, weight| {
                saved.clone().backward(x.view(), mask, d_quantized.view(), estimator, weight).unwrap()
            };
            let got = backward(estimator, 0.0);
            for b in 0..b {
                let (keys, sums) = (x.slice(s![b..=b, .., .., ..]), output.quantized.index_axis(Axis(0), b));
                let d = d_quantized.slice(s![b..=b, .., .., ..]).to_owned();
                let expected = estimator.key_gradient(keys, own.view(), sums, d).unwrap();
                assert_eq!(got.slice(s![b..=b, .., .., ..]), expected, "{estimator:?} {dim:?}");
            }
            let expected = got + backward(Estimator::StraightThrough, 0.7) - &d_quantized;
            for (got, expected) in backward(estimator, 0.7).iter().zip(&expected) {
                let error = (got - expected).abs();
                assert!(error <= 1e-13 * (1.0 + expected.abs()), "{estimator:?} {dim:?}: {error:e}");
            }
        }
    }
}

#[test]
fn losses_and_statistics_are_those_of_what_is_left() {
    for (dim, n_codes) in SIZES {
        let Case { keys, mask, residual } = case(dim, n_codes);
        let counted = mask.iter().filter(|&&counts| counts).count().max(1) as f64;
        let weight = |b, t| if mask[[b, t]] { 1.0 / counted } else { 0.0 };
        let (output, _) = residual.forward(keys.view(), Some(mask.view())).unwrap();
        let mut left = keys.clone();
        for (l, level) in residual.levels().iter().enumerate() {
            let codes = output.codes.index_axis(Axis(0), l);
            let stats = CodeStats::collect(left.view(), codes, level.n_codes(), Some(mask.view())).unwrap();
            assert_eq!(output.stats[l], stats);
            left -= &lookup(codes, level.codewords().view()).unwrap();
            let mut errors = vec![0.0; dim[1]];
            left.indexed_iter().for_each(|((b, h, t, _), e)| errors[h] += weight(b, t) * e * e);
            for (h, &error) in errors.iter().enumerate() {
                assert!((output.mean_errors[[l, h]] - error).abs() <= 1e-13 * error);
                let square: f64 = keys
                    .indexed_iter()
                    .filter(|((_, g, ..), _)| *g == h)
                    .map(|((b, _, t, _), k)| weight(b, t) * k * k)
                    .sum();
                let relative = output.relative_errors()[[l, h]];
                assert!(square == 0.0 || (relative - error / square).abs() <= 1e-13 * relative);
            }
        }
        assert_eq!(output.commit_loss(), output.mean_errors.sum());
        // Nothing counts: no loss, no statistics.
        let none = mask.mapv(|_| false);
        let (output, _) = residual.forward(keys.view(), Some(none.view())).unwrap();
        assert_eq!((output.commit_loss(), output.relative_errors().sum()), (0.0, 0.0));
        assert!(output.stats.iter().all(|stats| stats.counts().sum() == 0));
    }
}

#[test]
fn statistics_of_micro_batches_merge() {
    let Case { keys, mask, residual } = case([4, 2, 25, 6], &[7, 5]);
    let (whole, _) = residual.forward(keys.view(), Some(mask.view())).unwrap();
    let mut merged: Vec<_> = [7, 5].map(|n| CodeStats::zeros(2, n, 6).unwrap()).into();
    for b in 0..4 {
        let (keys, mask) = (keys.slice(s![b..=b, .., .., ..]), mask.slice(s![b..=b, ..]));
        let (part, _) = residual.forward(keys, Some(mask)).unwrap();
        merged.iter_mut().zip(&part.stats).for_each(|(all, part)| all.merge(part).unwrap());
    }
    let [mut once, mut in_parts] = [(); 2].map(|()| residual.clone());
    once.update(&whole.stats).unwrap();
    in_parts.update(&merged).unwrap();
    assert_eq!(merged[0].counts(), whole.stats[0].counts());
    for (a, b) in once.levels().iter().zip(in_parts.levels()) {
        assert!(relative_rms(&a.codewords(), &b.codewords()) < 1e-14);
    }
    // Forward, encode and decode leave the codebooks alone; an update that fails does as well.
    let before = residual.clone();
    let mut same = residual;
    let wrong = [merged[0].clone(), merged[0].clone()];
    assert!(matches!(same.update(&wrong), Err(Error::Shape { what: "stats", .. })));
    assert!(matches!(same.update(&merged[..1]), Err(Error::Shape { what: "stats", .. })));
    assert_eq!(same, before);
}

#[test]
fn levels_started_from_what_is_left_halve_the_error_again_and_again() {
    let x = keys([2, 2, 400, 4], 8);
    let started = |n_levels| {
        Residual::from_keys(x.view(), n_levels, |level, left| {
            let codewords = start::k_means(left, 16, None, 10, level as u64)?;
            Ok(Codebook::ema(Ema::from_codewords(codewords, 0.99)?))
        })
        .unwrap()
    };
    let residual = started(4);
    let (output, _) = residual.forward(x.view(), None).unwrap();
    for h in 0..2 {
        let errors = output.mean_errors.column(h);
        assert!(errors.windows(2).into_iter().all(|pair| pair[1] < 0.6 * pair[0]), "{errors}");
    }
    assert_eq!(residual.levels()[..2], *started(2).levels());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert_eq!(pool.install(|| started(4)), residual);
    let (on_three, _) = pool.install(|| residual.forward(x.view(), None)).unwrap();
    assert_eq!(on_three, output);
}

#[test]
fn each_level_is_revived_with_what_is_left() {
    let Case { keys, mask, .. } = case([2, 1, 200, 4], &[1]);
    let level = |offset: f64| {
        let mut codewords: Array3<f64> = start::random(1, 8, 4, 1.0, 1).unwrap();
        codewords.slice_mut(s![.., 5.., ..]).fill(offset);
        let counts = Array2::from_shape_fn((1, 8), |(_, code)| if code < 5 { 9.0 } else { 0.1 });
        let sums = &codewords * &counts.view().insert_axis(Axis(2));
        Codebook::ema(Ema::new(sums, counts, 0.9).unwrap())
    };
    let mut residual = Residual::new(vec![level(1e3), level(-1e3)]).unwrap();
    let before = residual.forward(keys.view(), None).unwrap().0.commit_loss();
    assert_eq!(residual.revive(keys.view(), Some(mask.view()), 0.1, 1), Ok(vec![3, 3]));
    assert!(residual.forward(keys.view(), None).unwrap().0.commit_loss() < before);
    let codes = residual.levels()[0].assign(keys.view()).unwrap();
    let left = &keys - &lookup(codes.view(), residual.levels()[0].codewords().view()).unwrap();
    for (level, left) in residual.levels().iter().zip([&keys, &left]) {
        for codeword in level.codewords().slice(s![0, 5.., ..]).outer_iter() {
            let is = |row: ArrayView1<'_, f64>| (&row - &codeword).iter().all(|e| e.abs() < 1e-14);
            let counted = |(b, t): &(usize, usize)| mask[[*b, *t]];
            assert!(ndarray::indices((2, 200)).into_iter().filter(counted).any(|(b, t)| is(left.slice(s![
                b,
                0,
                t,
                ..
            ]))));
        }
    }
    assert_eq!(residual.revive(keys.view(), None, 0.1, 1), Ok(vec![0, 0]));
}

#[test]
fn groups_are_slices_of_the_width() {
    let x = keys([1, 3, 5, 12], 9).index_axis_move(Axis(0), 0); // [B, T, D]
    for n_groups in [1, 2, 3, 12] {
        let parts = groups::split(x.view(), n_groups).unwrap();
        assert_eq!(parts.dim(), (3, n_groups, 5, 12 / n_groups));
        for ((b, h, t, k), &part) in parts.indexed_iter() {
            assert_eq!(part, x[[b, t, h * 12 / n_groups + k]]);
        }
        assert_eq!(groups::join(parts.view()).unwrap(), x);
        // Any strides.
        let backward = x.slice(s![.., ..;-1, ..;-1]);
        assert_eq!(groups::join(groups::split(backward, n_groups).unwrap().view()).unwrap(), backward);
    }
    for dim in [(0, 5, 4), (2, 0, 4), (2, 5, 0)] {
        let empty = Array3::<f32>::zeros(dim);
        assert_eq!(groups::join(groups::split(empty.view(), 2).unwrap().view()).unwrap(), empty);
    }
    // A group quantizes as if it were alone.
    let codewords: Array3<f64> = start::random(3, 6, 4, 1.0, 2).unwrap();
    let codebook = |codewords| Codebook::ema(Ema::from_codewords(codewords, 0.9).unwrap());
    let parts = groups::split(x.view(), 3).unwrap();
    let codes = codebook(codewords.clone()).assign(parts.view()).unwrap();
    let alone = [0, 1, 2].map(|h| {
        let alone = codebook(codewords.slice(s![h..=h, .., ..]).to_owned());
        alone.assign(groups::split(x.slice(s![.., .., 4 * h..4 * h + 4]), 1).unwrap().view()).unwrap()
    });
    assert_eq!(codes, concatenate![Axis(1), alone[0], alone[1], alone[2]]);
}
