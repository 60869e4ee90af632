//! Distances, regularisers and measures of codewords. (G1, G2 and part of B and H of the test plan.)

use ndarray::{Array2, Array3, Array4, ArrayView3, Axis, array, s};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{CodeStats, assign, cosine, nearest_pair, orthogonal, start};
use transformer_vq::ndarray;

const SIZES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (2, 5, 3), (1, 7, 1), (3, 2, 16), (1, 70, 8), (2, 0, 3)];

fn numbers((h, n, k): (usize, usize, usize), seed: u64) -> Array3<f64> {
    if n == 0 { Array3::zeros((h, n, k)) } else { start::random(h, n, k, 1.0, seed).unwrap() }
}

#[test]
fn unit_vectors_have_length_1_and_the_same_direction() {
    for size in SIZES {
        let x = numbers(size, 1) * 1e-3;
        let y = cosine::normalize(x.view()).unwrap();
        for (x, y) in x.rows().into_iter().zip(y.rows()) {
            let length = x.dot(&x).sqrt();
            assert!((y.dot(&y) - 1.0).abs() < 1e-14);
            assert!((&y * length - x).iter().all(|e| e.abs() < 1e-17));
        }
        // Nothing is left to do.
        let again = cosine::normalize(y.view()).unwrap();
        assert!((&again - &y).iter().all(|e| e.abs() < 1e-15));
        let single = cosine::normalize(x.mapv(|x| x as f32).view()).unwrap();
        assert!((single.mapv(f64::from) - &y).iter().all(|e| e.abs() < 2e-7));
    }
    let ends = array![[0.0, 0.0], [3e-7, 4e-7], [f64::MAX, 0.0], [f64::MAX, -f64::MAX], [1e-300, 0.0]];
    let half = 0.5f64.sqrt();
    let expected = array![[0.0, 0.0], [0.3, 0.4], [1.0, 0.0], [half, -half], [1e-294, 0.0]];
    let got = cosine::normalize(ends.view()).unwrap();
    assert!((&got - &expected).iter().all(|e| e.abs() < 1e-15), "{got}");
    assert_eq!(cosine::normalize(array![[f32::MAX, 0.0]].view()).unwrap(), array![[1.0, 0.0]]);
    assert!(cosine::backward(ends.view(), expected.view()).unwrap().iter().all(|d| d.is_finite()));
}

#[test]
fn unit_vectors_pass_gradients() {
    for size in SIZES {
        // Of length about 1, and shorter than what is divided by: steps that stay there.
        for (scale, step) in [(1.0, 1e-3), (1e-7, 1e-9)] {
            let (x, d_y) = (numbers(size, 2) * scale, numbers(size, 3));
            let x = if scale == 1.0 { &x + &x.signum() * 0.5 } else { x };
            let value = |x: ArrayView3<'_, f64>| (cosine::normalize(x).unwrap() * &d_y).sum();
            let expected = finite_difference(value, &x, step);
            let got = cosine::backward(x.view(), d_y.view()).unwrap();
            // In one dimension only the sign is left: no gradient, which rounding blurs.
            if size.2 == 1 && scale == 1.0 {
                assert!((&got - &expected).iter().all(|e| e.abs() < 1e-12));
            } else {
                assert!(relative_rms(&got, &expected) <= 1e-8, "{:e}", relative_rms(&got, &expected));
            }
        }
    }
}

#[test]
fn the_nearest_on_the_sphere_is_at_the_smallest_angle() {
    let (keys, codewords) = (numbers((1, 300, 6), 4), numbers((1, 40, 6), 5));
    let [keys, codewords] = [keys, codewords].map(|x| x.index_axis_move(Axis(0), 0));
    let unit = |x: &Array2<f64>| cosine::normalize(x.view()).unwrap();
    let codes = assign(unit(&keys).view(), unit(&codewords).view()).unwrap();
    for (key, &code) in keys.outer_iter().zip(&codes) {
        let cosine = |codeword: ndarray::ArrayView1<'_, f64>| {
            key.dot(&codeword) / (key.dot(&key) * codeword.dot(&codeword)).sqrt()
        };
        let best = codewords.outer_iter().map(cosine).fold(-2.0, f64::max);
        assert!(cosine(codewords.row(code as usize)) >= best - 1e-14);
    }
    // Lengths do not matter.
    let longer = &keys * &Array2::from_shape_fn((300, 1), |(j, _)| 1.0 + j as f64);
    assert_eq!(assign(unit(&longer).view(), unit(&codewords).view()).unwrap(), codes);
    let zero = Array2::zeros((3, 6));
    assert!(assign(unit(&zero).view(), unit(&codewords).view()).unwrap().iter().all(|&code| code < 40));
}

#[test]
fn the_orthogonal_loss_is_its_definition() {
    for size @ (h, n_codes, _) in SIZES {
        let codewords = numbers(size, 6);
        let expected: f64 = ndarray::indices((h, n_codes, n_codes))
            .into_iter()
            .filter(|(_, i, j)| i != j)
            .map(|(h, i, j)| {
                let (a, b) = (codewords.slice(s![h, i, ..]), codewords.slice(s![h, j, ..]));
                a.dot(&b).powi(2) / (a.dot(&a) * b.dot(&b)) / (n_codes * n_codes) as f64
            })
            .sum();
        let loss = orthogonal::loss(codewords.view()).unwrap();
        let (with_gradient, _) = orthogonal::loss_and_gradient(codewords.view(), 0.3).unwrap();
        if n_codes > 0 {
            assert!((loss - expected).abs() <= 1e-13 * expected, "{loss} {expected}");
            assert_eq!(loss, with_gradient);
            // Lengths do not matter.
            assert!((orthogonal::loss((&codewords * 7.0).view()).unwrap() - loss).abs() <= 1e-14);
        }
    }
    let orthogonal_codewords = Array3::from_shape_fn((2, 4, 5), |(_, s, k)| if s == k { 3.0 } else { 0.0 });
    let (loss, gradient) = orthogonal::loss_and_gradient(orthogonal_codewords.view(), 1.0).unwrap();
    assert_eq!((loss, gradient), (0.0, Array3::<f64>::zeros((2, 4, 5))));
    // All alike: every pair counts 1. Zeros: no direction, no loss.
    let alike = Array3::<f32>::ones((1, 4, 4));
    assert_eq!(orthogonal::loss(alike.view()).unwrap(), 0.75);
    assert_eq!(orthogonal::loss((&alike * 0.0).view()).unwrap(), 0.0);
    let (_, gradient) = orthogonal::loss_and_gradient((&alike * 0.0).view(), 1.0).unwrap();
    assert_eq!(gradient, Array3::<f32>::zeros((1, 4, 4)));
}

#[test]
fn the_orthogonal_gradient_equals_finite_differences() {
    let weight = 0.7;
    for size in SIZES {
        let codewords = numbers(size, 7);
        let codewords = &codewords + &codewords.signum() * 0.5;
        let loss = |codewords: ArrayView3<'_, f64>| weight * orthogonal::loss(codewords).unwrap();
        let expected = finite_difference(loss, &codewords, 1e-3);
        let (_, got) = orthogonal::loss_and_gradient(codewords.view(), weight).unwrap();
        if size.1 == 1 || size.2 == 1 {
            assert!((&got - &expected).iter().all(|e| e.abs() < 1e-11));
        } else {
            assert!(relative_rms(&got, &expected) <= 1e-8, "{:e}", relative_rms(&got, &expected));
        }
        let (_, single) = orthogonal::loss_and_gradient(codewords.mapv(|c| c as f32).view(), weight).unwrap();
        assert!((single.mapv(f64::from) - &got).iter().all(|e| e.abs() < 1e-6));
    }
    // Lower after a step against it.
    let codewords = numbers((1, 8, 8), 8);
    let (loss, gradient) = orthogonal::loss_and_gradient(codewords.view(), 1.0).unwrap();
    assert!(orthogonal::loss((&codewords - &(gradient * 0.5)).view()).unwrap() < loss);
}

#[test]
fn threads_change_no_bit_of_loss_and_gradient() {
    let codewords = numbers((2, 300, 8), 9).mapv(|c| c as f32);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (loss, gradient) = orthogonal::loss_and_gradient(codewords.view(), 1.0).unwrap();
            let pairs = nearest_pair(codewords.view()).unwrap();
            (loss.to_bits(), gradient.mapv(f32::to_bits), pairs.mapv(f64::to_bits))
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn the_nearest_pair_is_its_definition() {
    for size @ (h, n_codes, _) in SIZES.into_iter().filter(|size| size.1 > 0) {
        let codewords = numbers(size, 10);
        let nearest = nearest_pair(codewords.view()).unwrap();
        assert_eq!(nearest.len(), h);
        for (codewords, nearest) in codewords.outer_iter().zip(nearest) {
            let mut expected = f64::INFINITY;
            for (i, j) in ndarray::indices((n_codes, n_codes)).into_iter().filter(|(i, j)| i != j) {
                let e = &codewords.row(i) - &codewords.row(j);
                expected = expected.min(e.dot(&e).sqrt());
            }
            assert!(nearest == expected || (nearest / expected - 1.0).abs() < 1e-14);
        }
    }
    let twice = array![[[1f32, 2.0], [3.0, 4.0], [1.0, 2.0]], [[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]]];
    assert_eq!(nearest_pair(twice.view()).unwrap(), array![0.0, 5.0]);
}

#[test]
fn entropy_and_perplexity_of_even_and_single_use() {
    let of = |codes: Vec<u32>| {
        let keys = Array4::<f32>::zeros((1, 1, codes.len(), 1));
        let codes = Array3::from_shape_vec((1, 1, codes.len()), codes).unwrap();
        CodeStats::collect(keys.view(), codes.view(), 512, None).unwrap()
    };
    let even = of((0..1024).map(|t| t % 512).collect());
    assert!((even.entropy()[0] - 512f64.ln()).abs() < 1e-13 && (even.perplexity()[0] - 512.0).abs() < 1e-9);
    let one = of(vec![3; 9]);
    assert_eq!((one.entropy()[0].to_bits(), one.perplexity()[0]), (0, 1.0));
    let none = of(vec![]);
    assert_eq!((none.entropy()[0], none.perplexity()[0]), (0.0, 0.0));
    let uneven = of(vec![0, 0, 0, 1]);
    assert!((uneven.entropy()[0] - (0.75 * (4f64 / 3.0).ln() + 0.25 * 4f64.ln())).abs() < 1e-15);
    assert!(uneven.entropy()[0] <= 512f64.ln());
}
