//! The rotation trick where directions are missing, equal or opposite.

use ndarray::{Array1, Array2, Array3, Axis, array, s};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Estimator, RotationScale, RotationVariant};
use transformer_vq::{Scalar, ndarray};

use crate::estimators::{case, dense, dense_backward, length, rotation, rotations};

/// One head, one key.
fn one<T: Scalar>(estimator: Estimator, key: &Array1<T>, codeword: &Array1<T>, g: &Array1<T>) -> Array1<T> {
    let row = |x: &Array1<T>| x.clone().insert_axis(Axis(0)).insert_axis(Axis(0));
    let (keys, codewords) = (row(key).insert_axis(Axis(0)), row(codeword));
    let codes = Array3::zeros((1, 1, 1));
    let d = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), row(g).insert_axis(Axis(0)));
    d.unwrap().slice(s![0, 0, 0, ..]).to_owned()
}

#[test]
fn a_key_on_its_codeword_is_only_stretched() {
    let (key, g) = (array![1.0, -2.0, 0.5], array![0.3, 0.2, -1.0]);
    let paper = |scale| rotation(RotationVariant::Paper, scale);
    let near = |a: &Array1<f64>, b: &Array1<f64>| assert!(relative_rms(a, b) < 1e-14, "{a} {b}");
    near(&one(paper(RotationScale::Ratio), &key, &key, &g), &g);
    near(&one(paper(RotationScale::Ratio), &key, &(&key * 3.0), &g), &(&g * 3.0));
    near(&one(paper(RotationScale::AtMost(2.0)), &key, &(&key * 3.0), &g), &(&g * 2.0));
    near(&one(paper(RotationScale::AtMost(2.0)), &key, &(&key * 0.5), &g), &(&g * 0.5));
    near(&one(paper(RotationScale::One), &key, &(&key * 3.0), &g), &g);
    // Nothing between them has a direction.
    assert_eq!(one(Estimator::Directional, &key, &key, &g), g);
}

#[test]
fn nearly_opposite_vectors_keep_the_length_of_the_gradient() {
    let g = array![0.3, -1.2, 0.7, 0.5];
    let paper = rotation(RotationVariant::Paper, RotationScale::Ratio);
    for exponent in 0..9 {
        let angle = std::f64::consts::PI - 10f64.powi(-exponent);
        let (key, codeword) =
            (array![1.5, 0.0, 0.0, 0.0], array![3.0 * angle.cos(), 3.0 * angle.sin(), 0.0, 0.0]);
        let single = one(paper, &key.mapv(|x| x as f32), &codeword.mapv(|x| x as f32), &g.mapv(|x| x as f32));
        let ratio = length(&single.mapv(f64::from)) / (2.0 * length(&g));
        assert!((ratio - 1.0).abs() < 1e-3, "f32, 1e-{exponent}: {ratio}");
        let double = one(paper, &key, &codeword, &g);
        assert!((length(&double) / (2.0 * length(&g)) - 1.0).abs() < 1e-9, "f64, 1e-{exponent}");
        if exponent <= 2 {
            let expected =
                dense_backward((RotationVariant::Paper, RotationScale::Ratio), key.view(), codeword.view());
            assert!(relative_rms(&double, &expected.1.dot(&g)) < 1e-11);
            assert!(relative_rms(&single, &double) < 1e-4);
        }
    }
}

#[test]
fn opposite_vectors_are_reflected() {
    let (key, g) = (array![1.0, -2.0, 2.0], array![0.5, 1.0, -1.0]);
    let u = &key / 3.0;
    let a = u.dot(&g);
    let paper = rotation(RotationVariant::Paper, RotationScale::Ratio);
    let d = one(paper, &key, &(&key * -2.0), &g);
    assert!(relative_rms(&d, &((&g - &u * (2.0 * a)) * 2.0)) < 1e-15);
    let normalized = rotation(RotationVariant::Normalized, RotationScale::Ratio);
    let d = one(normalized, &key, &(&key * -2.0), &g);
    assert!(relative_rms(&d, &((&g - &u * a) * 2.0)) < 1e-15);
}

fn degenerate<T: Scalar>(tiny: f64, huge: f64) {
    let to = |x: Array1<f64>| x.mapv(T::from_f64);
    let (x, zero, g) = (to(array![1.0, 2.0]), to(array![0.0, 0.0]), to(array![0.5, -3.0]));
    let (tiny, huge) = (&x * T::from_f64(tiny), &x * T::from_f64(huge));
    for (variant, scale) in rotations() {
        let estimator = rotation(variant, scale);
        for (key, codeword) in
            [(&zero, &x), (&x, &zero), (&zero, &zero), (&tiny, &x), (&x, &tiny), (&huge, &x), (&x, &huge)]
        {
            assert_eq!(one(estimator, key, codeword, &g), g, "{estimator:?} {key} {codeword}");
        }
        // In one dimension there is nothing to turn.
        for (key, codeword) in [(1.0, 3.0), (1.0, -3.0), (0.0, 1.0)] {
            let (key, codeword, g) = (to(array![key]), to(array![codeword]), to(array![7.0]));
            assert_eq!(one(estimator, &key, &codeword, &g), g);
        }
    }
    for (key, codeword) in [(&zero, &zero), (&tiny, &zero), (&huge, &x)] {
        assert_eq!(one(Estimator::Directional, key, codeword, &g), g);
    }
    // All of it lies along the line between them.
    assert_eq!(
        one(Estimator::Directional, &to(array![1.0]), &to(array![-3.0]), &to(array![7.0]))[0],
        T::zero()
    );
}

#[test]
fn zero_tiny_huge_and_one_dimensional_vectors() {
    degenerate::<f32>(1e-18, 1e19);
    degenerate::<f64>(1e-150, 1e160);
}

#[test]
fn the_dense_matrix_is_a_rotation_that_takes_key_to_codeword() {
    case::<f64>([1, 1, 30, 5, 7]).rows(|_, key, codeword, _| {
        let r = dense(key, codeword);
        assert!(relative_rms(&r.t().dot(&r), &Array2::<f64>::eye(5)) < 1e-14);
        // A reflection has the determinant -1, and -1 as an eigenvalue of odd multiplicity.
        assert!((determinant(&r) - 1.0).abs() < 1e-13);
        let lambda = length(&codeword.to_owned()) / length(&key.to_owned());
        assert!(relative_rms(&(r.dot(&key) * lambda), &codeword.to_owned()) < 1e-14);
    });
    assert!((determinant(&array![[0.0, 1.0], [1.0, 0.0]]) + 1.0).abs() < 1e-15);
}

/// By elimination.
fn determinant(matrix: &Array2<f64>) -> f64 {
    let (mut a, mut product) = (matrix.clone(), 1.0);
    for i in 0..a.nrows() {
        let pivot = (i..a.nrows()).max_by(|&m, &n| a[[m, i]].abs().total_cmp(&a[[n, i]].abs())).unwrap();
        if pivot != i {
            product = -product;
            for k in 0..a.ncols() {
                a.swap([i, k], [pivot, k]);
            }
        }
        product *= a[[i, i]];
        for m in i + 1..a.nrows() {
            let factor = a[[m, i]] / a[[i, i]];
            for k in i..a.ncols() {
                a[[m, k]] -= factor * a[[i, k]];
            }
        }
    }
    product
}
