//! Inputs at the edge of what makes sense: fewer keys than codes, identical keys, zeros, one code, one dimension, everything
//! masked. What every public function makes of them is defined, finite, and the same as its formula. (What is not a number is
//! refused: tests/errors.)

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, Axis, s};
use transformer_vq::codebook::revive::replacements;
use transformer_vq::codebook::{
    CodeStats, Codebook, CodebookParameters, Ema, Estimator, Residual, Rotation, RotationScale,
    RotationVariant, Smoothing, codebook_loss, commitment, cosine, groups, lookup, nearest_pair, orthogonal,
    start,
};
use transformer_vq::{Error, ndarray};

fn estimators() -> Vec<Estimator> {
    let mut all = vec![Estimator::StraightThrough, Estimator::Directional, Estimator::None];
    for variant in [RotationVariant::Paper, RotationVariant::Normalized] {
        for scale in [RotationScale::Ratio, RotationScale::AtMost(2.0), RotationScale::One] {
            all.push(Estimator::Rotation(Rotation { variant, scale }));
        }
    }
    all
}

/// Keys and codewords by name; H = 2.
fn cases() -> Vec<(&'static str, Array4<f64>, Array3<f64>)> {
    let numbers = |n, k, seed| start::random::<f64>(2, n, k, 1.0, seed).unwrap();
    let keys = |n, k| numbers(n, k, 1).insert_axis(Axis(0));
    let same = |value| Array4::from_elem((1, 2, 9, 3), value);
    vec![
        ("ordinary", keys(30, 3), numbers(5, 3, 2)),
        ("one key", keys(1, 3), numbers(5, 3, 2)),
        ("fewer keys than codes", keys(4, 3), numbers(5, 3, 2)),
        ("identical keys", same(0.7), numbers(5, 3, 2)),
        ("keys on their codewords", numbers(5, 3, 2).insert_axis(Axis(0)), numbers(5, 3, 2)),
        ("zero keys", same(0.0), numbers(5, 3, 2)),
        ("zero codewords", keys(9, 3), Array3::zeros((2, 5, 3))),
        ("nothing but zeros", same(0.0), Array3::zeros((2, 5, 3))),
        ("identical codewords", keys(9, 3), Array3::from_elem((2, 5, 3), 0.4)),
        ("one code", keys(9, 3), numbers(1, 3, 2)),
        ("one dimension", keys(9, 1), numbers(5, 1, 2)),
        ("one code, one dimension", keys(9, 1), numbers(1, 1, 2)),
        ("one of everything", keys(1, 1), numbers(1, 1, 2)),
    ]
}

fn finite<'a>(x: impl IntoIterator<Item = &'a f64>) -> bool {
    x.into_iter().all(|x| x.is_finite())
}

fn assign(keys: ArrayView4<'_, f64>, codewords: ArrayView3<'_, f64>) -> Array3<u32> {
    Codebook::frozen(codewords.to_owned()).unwrap().assign(keys).unwrap()
}

#[test]
fn codes_losses_and_statistics() {
    for (name, keys, codewords) in cases() {
        let (_, _, n, d_k) = keys.dim();
        let (codes, n_codes) = (assign(keys.view(), codewords.view()), codewords.len_of(Axis(1)));
        let quantized = lookup(codes.view(), codewords.view()).unwrap();
        let left = &keys - &quantized;
        let squares = left.mapv(|x| x * x);
        // No other codeword is nearer.
        for (b, h, t, code) in ndarray::indices((1, 2, n, n_codes)) {
            let e = &keys.slice(s![b, h, t, ..]) - &codewords.slice(s![h, code, ..]);
            let best = squares.slice(s![b, h, t, ..]).sum();
            assert!(e.dot(&e) >= best * (1.0 - 1e-14), "{name}");
        }
        let (z, table) = (codes.view(), codewords.view());
        let loss = commitment::loss(keys.view(), z, table, None).unwrap();
        assert!((loss - squares.sum() / n as f64).abs() <= 1e-14 * loss, "{name}");
        let relative = commitment::relative_error(keys.view(), z, table, None).unwrap();
        for (h, &relative) in relative.iter().enumerate() {
            let of = |x: &Array4<f64>| x.index_axis(Axis(1), h).iter().map(|x| x * x).sum::<f64>();
            let expected = if of(&left) == 0.0 { 0.0 } else { of(&left) / of(&keys) };
            assert!(relative == expected || (relative / expected - 1.0).abs() < 1e-13, "{name}");
        }
        let d = commitment::backward(keys.view(), z, table, None, 0.5).unwrap();
        assert!((&d - &(&left / n as f64)).iter().all(|e| e.abs() < 1e-15), "{name}");

        let stats = CodeStats::collect(keys.view(), z, n_codes, None).unwrap();
        for h in 0..2 {
            let used: std::collections::BTreeSet<_> = codes.slice(s![.., h, ..]).iter().copied().collect();
            assert_eq!(stats.counts().row(h).sum(), n as u64, "{name}");
            assert_eq!(stats.usage()[h], used.len() as f64 / n_codes as f64, "{name}");
            let perplexity = stats.perplexity()[h];
            assert!((1.0..used.len() as f64 + 1e-12).contains(&perplexity), "{name}: {perplexity}");
            assert!((stats.entropy()[h].exp() - perplexity).abs() < 1e-12, "{name}");
        }
        let total = stats.sums().sum_axis(Axis(1)) - keys.sum_axis(Axis(2)).index_axis(Axis(0), 0);
        assert!(total.iter().all(|e| e.abs() < 1e-13), "{name}");
        // What pulls codewords is what pulls keys, the other way round.
        let pull = codebook_loss::backward(&stats, table, 0.5).unwrap();
        let balance = pull.sum_axis(Axis(1)) + d.sum_axis(Axis(2)).index_axis(Axis(0), 0);
        assert_eq!(pull.dim(), (2, n_codes, d_k));
        assert!(balance.iter().all(|e| e.abs() < 1e-13), "{name}");
    }
}

#[test]
fn gradients_through_the_quantizer() {
    for (name, keys, codewords) in cases() {
        let codes = assign(keys.view(), codewords.view());
        let g = start::random(2, keys.len_of(Axis(2)), keys.len_of(Axis(3)), 1.0, 5).unwrap();
        let g = g.insert_axis(Axis(0));
        let length = |x: ndarray::ArrayView1<'_, f64>| x.dot(&x).sqrt();
        for estimator in estimators() {
            let (keys, codes, table) = (keys.view(), codes.view(), codewords.view());
            let d = estimator.key_gradient(keys, codes, table, g.clone()).unwrap();
            let d_codewords = estimator.codeword_gradient(keys, codes, table, g.view()).unwrap();
            assert!(finite(&d) && finite(&d_codewords), "{name} {estimator:?}");
            for ((b, h, t), &code) in codes.indexed_iter() {
                let of = s![b, h, t, ..];
                let [key, g, d] = [keys, g.view(), d.view()].map(|x| x.slice_move(of));
                let codeword = table.slice(s![h, code as usize, ..]);
                let lengths = length(d) / length(g);
                let expected = match estimator {
                    Estimator::None => 0.0,
                    Estimator::Rotation(Rotation { variant: RotationVariant::Paper, scale }) => {
                        // Without a direction, or with no more than one, straight through.
                        let turns = key.len() > 1 && length(key) > 0.0 && length(codeword) > 0.0;
                        match scale {
                            _ if !turns => 1.0,
                            RotationScale::AtMost(most) => most.min(length(codeword) / length(key)),
                            RotationScale::One => 1.0,
                            RotationScale::Ratio => length(codeword) / length(key),
                        }
                    }
                    Estimator::StraightThrough => 1.0,
                    _ => continue,
                };
                assert!((lengths - expected).abs() <= 1e-12 * expected, "{name} {estimator:?}: {lengths}");
            }
        }
    }
}

#[test]
fn learning_starting_and_reviving() {
    for (name, keys, codewords) in cases() {
        let (codes, n_codes) = (assign(keys.view(), codewords.view()), codewords.len_of(Axis(1)));
        let stats = CodeStats::collect(keys.view(), codes.view(), n_codes, None).unwrap();
        for smoothing in [Smoothing::CountClamp, Smoothing::Laplace { epsilon: 1e-5 }] {
            let ema = Ema::from_codewords(codewords.clone(), 0.5).unwrap().with_smoothing(smoothing);
            let mut codebook = Codebook::ema(ema.unwrap());
            let loss = |codebook: &Codebook<f64>| {
                let codewords = codebook.codewords();
                commitment::loss(keys.view(), codes.view(), codewords.view(), None).unwrap()
            };
            let before = loss(&codebook);
            codebook.update(&stats).unwrap();
            assert!(finite(&codebook.codewords()) && loss(&codebook) <= before + 1e-8, "{name}");
            for round in 0..3 {
                codebook.revive(keys.view(), None, 0.5, round).unwrap();
                assert!(finite(&codebook.codewords()), "{name}");
            }
        }
        // One matrix and its bias, on a basis that may be zero.
        let weight = Array3::from_elem((2, keys.len_of(Axis(3)), codewords.len_of(Axis(2))), 0.5);
        let linear = Codebook::linear(codewords.clone(), weight, None, true).unwrap();
        let mut gradients: CodebookParameters<f64> = linear.parameters().zeros_like();
        let d = codebook_loss::backward(&stats, linear.codewords().view(), 1.0).unwrap();
        linear.backward(d.view(), &mut gradients).unwrap();
        assert!(gradients.views().iter().all(|(_, d)| finite(d)), "{name}");

        let furthest = keys.iter().fold(0.0, |most: f64, k| most.max(k.abs()));
        for steps in [None, Some(0), Some(4)] {
            let started = match steps {
                None => start::sample(keys.view(), n_codes, None, 1),
                Some(steps) => start::k_means(keys.view(), n_codes, None, steps, 1),
            };
            // Keys, or means of them.
            assert!(started.unwrap().iter().all(|c| c.abs() <= furthest * (1.0 + 1e-15)), "{name}");
        }
        // Codes that nothing takes get keys that nothing serves, as long as there are any.
        let usage = stats.counts().mapv(|n| n as f64);
        let found = replacements(usage.view(), keys.view(), codewords.view(), None, 1e-3, 1).unwrap();
        let left = &keys - &lookup(codes.view(), codewords.view()).unwrap();
        for h in 0..2 {
            let idle = usage.row(h).iter().filter(|&&n| n == 0.0).count();
            let open = left.slice(s![0, h, .., ..]).rows().into_iter().filter(|e| e.dot(e) > 0.0).count();
            assert_eq!(found.iter().filter(|found| found.head == h).count(), idle.min(open), "{name}");
        }
    }
}

#[test]
fn structures_distances_and_regularisers() {
    for (name, keys, codewords) in cases() {
        let (n_codes, d_k) = (codewords.len_of(Axis(1)), codewords.len_of(Axis(2)));
        let level = || Codebook::ema(Ema::from_codewords(codewords.clone(), 0.9).unwrap());
        let mut residual = Residual::new(vec![level(), level()]).unwrap();
        let (output, saved) = residual.forward(keys.view(), None).unwrap();
        assert!(finite(&output.quantized) && output.commit_loss().is_finite(), "{name}");
        let relative = output.relative_errors();
        assert!(relative.iter().all(|&e| e >= 0.0), "{name}"); // infinite for zero keys, never NaN
        let ones = Array4::ones(keys.dim());
        for estimator in estimators() {
            let d = saved.clone().backward(keys.view(), None, ones.view(), estimator, 0.3).unwrap();
            assert!(finite(&d), "{name} {estimator:?}");
        }
        residual.update(&output.stats).unwrap();
        residual.revive(keys.view(), None, 0.5, 1).unwrap();
        assert!(residual.levels().iter().all(|level| finite(&level.codewords())), "{name}");

        let units = cosine::normalize(keys.view()).unwrap();
        for (key, unit) in keys.rows().into_iter().zip(units.rows()) {
            let length = if key.iter().all(|&k| k == 0.0) { 0.0 } else { 1.0 };
            assert!((unit.dot(&unit) - length).abs() < 1e-14, "{name}");
        }
        assert!(finite(&cosine::backward(keys.view(), ones.view()).unwrap()), "{name}");
        let (loss, gradient) = orthogonal::loss_and_gradient(codewords.view(), 1.0).unwrap();
        assert!((0.0..=2.0).contains(&loss) && finite(&gradient), "{name}: {loss}");
        assert!((orthogonal::loss(codewords.view()).unwrap() - loss).abs() < 1e-15, "{name}");
        let nearest = nearest_pair(codewords.view()).unwrap();
        assert!(nearest.iter().all(|&d| if n_codes == 1 { d == f64::INFINITY } else { d >= 0.0 }), "{name}");

        let vectors = groups::join(keys.view()).unwrap();
        for n_groups in [1, 2, 2 * d_k] {
            let parts = groups::split(vectors.view(), n_groups).unwrap();
            assert_eq!(groups::join(parts.view()).unwrap(), vectors, "{name}");
        }
    }
}

/// No position counts: nothing is lost, nothing learned; only a start needs at least one key.
#[test]
fn everything_masked() {
    for (name, keys, codewords) in cases() {
        let (_, _, n, d_k) = keys.dim();
        let (codes, n_codes) = (assign(keys.view(), codewords.view()), codewords.len_of(Axis(1)));
        let none = Array2::from_elem((1, n), false);
        let (z, table, mask) = (codes.view(), codewords.view(), Some(none.view()));
        assert_eq!(commitment::loss(keys.view(), z, table, mask), Ok(0.0), "{name}");
        assert_eq!(commitment::mean_error(keys.view(), z, table, mask).unwrap().sum(), 0.0, "{name}");
        assert_eq!(commitment::relative_error(keys.view(), z, table, mask).unwrap().sum(), 0.0, "{name}");
        let d = commitment::backward(keys.view(), z, table, mask, 1.0).unwrap();
        assert_eq!(d, Array4::<f64>::zeros(keys.dim()), "{name}");
        let stats = CodeStats::collect(keys.view(), z, n_codes, mask).unwrap();
        assert_eq!(stats, CodeStats::zeros(2, n_codes, d_k).unwrap(), "{name}");
        assert_eq!((stats.usage().sum(), stats.entropy().sum(), stats.perplexity().sum()), (0.0, 0.0, 0.0));
        let pull = codebook_loss::backward(&stats, table, 1.0).unwrap();
        assert_eq!(pull, Array3::<f64>::zeros(codewords.dim()), "{name}");
        let mut codebook = Codebook::ema(Ema::from_codewords(codewords.clone(), 0.5).unwrap());
        codebook.update(&stats).unwrap();
        assert_eq!(codebook.codewords(), codewords, "{name}");
        assert_eq!(codebook.revive(keys.view(), mask, 0.9, 1), Ok(0), "{name}");
        let mut residual = Residual::new(vec![codebook]).unwrap();
        let (output, saved) = residual.forward(keys.view(), mask).unwrap();
        assert_eq!((output.commit_loss(), &output.stats), (0.0, &vec![stats]), "{name}");
        let ones = Array4::ones(keys.dim());
        let d = saved.backward(keys.view(), mask, ones.view(), Estimator::StraightThrough, 1.0).unwrap();
        assert_eq!(d, ones, "{name}");
        assert_eq!(residual.revive(keys.view(), mask, 0.9, 1), Ok(vec![0]), "{name}");
        let empty = Err(Error::Empty { what: "keys" });
        assert_eq!(start::sample(keys.view(), n_codes, mask, 1), empty, "{name}");
        assert_eq!(start::k_means(keys.view(), n_codes, mask, 2, 1), empty, "{name}");
    }
}
