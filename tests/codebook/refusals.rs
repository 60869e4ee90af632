//! What cannot be learnt, or from, is refused.

use ndarray::{Array2, Array3, s};
use transformer_vq::Error;
use transformer_vq::codebook::{
    Basis, CodeStats, Codebook, CodebookParameters, Ema, Learning, Smoothing, codebook_loss,
};
use transformer_vq::ndarray;

/// B, H, T, K, S and the width of a basis.
use crate::learning::{Batch, SIZES, codebooks};

#[test]
fn codebooks_that_cannot_be_are_refused() {
    type Parts = CodebookParameters<f64>;
    let none = Parts::default();
    let (table, weight) = (Array3::<f64>::ones((2, 5, 3)), Array3::<f64>::ones((2, 3, 4)));
    let (basis, bias) = (Array3::<f64>::ones((2, 5, 4)), Array2::<f64>::ones((2, 3)));
    let of = |result: Result<Codebook<f64>, Error>| match result.unwrap_err() {
        Error::Shape { what, .. } => ("Shape", what),
        Error::Invalid { what, .. } => ("Invalid", what),
        Error::Empty { what } => ("Empty", what),
        Error::NotFinite { what, .. } => ("NotFinite", what),
        other => panic!("{other}"),
    };
    // Parameters that do not belong to the kind.
    let codewords = Parts { codewords: Some(table.clone()), ..none.clone() };
    let linear = Parts { weight: Some(weight.clone()), ..none.clone() };
    let frozen = || Learning::Frozen(table.clone());
    for (learning, parameters) in [
        (frozen(), &codewords),
        (frozen(), &linear),
        (Learning::Gradient, &none),
        (Learning::Gradient, &linear),
        (Learning::Gradient, &Parts { bias: Some(bias.clone()), ..codewords.clone() }),
        (Learning::Linear(Basis::Learned), &linear),
        (Learning::Linear(Basis::Frozen(basis.clone())), &none),
        (
            Learning::Linear(Basis::Frozen(basis.clone())),
            &Parts { basis: Some(basis.clone()), ..linear.clone() },
        ),
    ] {
        assert_eq!(of(Codebook::new(learning, parameters.clone())), ("Invalid", "parameters"));
    }
    // Shapes.
    let linear = |basis: &Array3<f64>, weight: &Array3<f64>, bias: Option<Array2<f64>>, learned| {
        of(Codebook::linear(basis.clone(), weight.clone(), bias, learned))
    };
    for learned in [false, true] {
        assert_eq!(linear(&basis, &Array3::ones((2, 3, 3)), None, learned), ("Shape", "weight"));
        assert_eq!(linear(&basis, &Array3::ones((1, 3, 4)), None, learned), ("Shape", "weight"));
        assert_eq!(linear(&basis, &weight, Some(Array2::ones((2, 4))), learned), ("Shape", "bias"));
        let empty = |h, s, f, k| linear(&Array3::ones((h, s, f)), &Array3::ones((h, k, f)), None, learned);
        assert_eq!(empty(0, 5, 4, 3), ("Empty", "codewords"));
        assert_eq!(empty(2, 0, 4, 3), ("Empty", "basis"));
        assert_eq!(empty(2, 5, 0, 3), ("Empty", "basis"));
        assert_eq!(empty(2, 5, 4, 0), ("Empty", "weight"));
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(linear(&(&basis * bad), &weight, None, learned), ("NotFinite", "basis"));
            assert_eq!(linear(&basis, &(&weight * bad), None, learned), ("NotFinite", "weight"));
            assert_eq!(linear(&basis, &weight, Some(&bias * bad), learned), ("NotFinite", "bias"));
        }
        // Finite factors whose product is not.
        assert_eq!(linear(&(&basis * 1e200), &(&weight * 1e200), None, learned), ("NotFinite", "codewords"));
    }
    for dim in [(0, 5, 3), (2, 0, 3), (2, 5, 0)] {
        assert_eq!(of(Codebook::gradient(Array3::ones(dim))), ("Empty", "codewords"));
        assert_eq!(of(Codebook::frozen(Array3::ones(dim))), ("Empty", "codewords"));
    }
    assert_eq!(of(Codebook::gradient(&table * f64::NAN)), ("NotFinite", "codewords"));
    assert_eq!(of(Codebook::frozen(&table * f64::NAN)), ("NotFinite", "codewords"));
}

#[test]
fn bad_gradients_parameters_and_smoothing_are_refused_and_change_nothing() {
    let size = SIZES[1];
    let batch = Batch::new(size);
    for mut codebook in codebooks(size) {
        let before = codebook.clone();
        let (d, mut gradients) = (codebook.codewords(), codebook.parameters().zeros_like());
        let error = codebook.backward(d.slice(s![.., ..4, ..]), &mut gradients).unwrap_err();
        assert!(matches!(error, Error::Shape { what: "d_codewords", .. }));
        let error = codebook.backward((&d * f64::NAN).view(), &mut gradients).unwrap_err();
        assert!(matches!(error, Error::NotFinite { what: "d_codewords", .. }));
        let mut others = CodebookParameters { bias: Some(Array2::zeros((3, 3))), ..Default::default() };
        let error = codebook.backward(d.view(), &mut others).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "gradients", .. }), "{error}");
        assert_eq!(gradients, codebook.parameters().zeros_like());
        let error = codebook.set_parameters(others).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "parameters", .. }), "{error}");
        let mut bad = codebook.parameters().clone();
        if let Some((_, mut first)) = bad.views_mut().pop() {
            first.fill(f64::NAN);
            assert!(matches!(codebook.set_parameters(bad), Err(Error::NotFinite { .. })));
        }
        let error = codebook.update(&CodeStats::zeros(3, 6, 3).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Shape { what: "stats", .. }));
        assert_eq!(codebook, before);
    }
    let codewords: Array3<f64> = Array3::ones((3, 5, 3));
    let loss = |codewords: &Array3<f64>, weight| {
        codebook_loss::backward(&batch.stats(5), codewords.view(), weight).unwrap_err()
    };
    assert!(matches!(loss(&Array3::ones((3, 4, 3)), 1.0), Error::Shape { what: "codewords", .. }));
    assert!(matches!(loss(&(&codewords * f64::NAN), 1.0), Error::NotFinite { what: "codewords", .. }));
    assert!(matches!(loss(&codewords, f64::INFINITY), Error::Invalid { what: "weight", .. }));
    let smoothed = |ema: Ema<f64>, epsilon| ema.with_smoothing(Smoothing::Laplace { epsilon }).unwrap_err();
    for epsilon in [0.0, -1e-5, f64::NAN, f64::INFINITY] {
        let ema = Ema::from_codewords(codewords.clone(), 0.9).unwrap();
        assert!(matches!(smoothed(ema, epsilon), Error::Invalid { what: "epsilon", .. }));
    }
    let without_counts = Ema::new(codewords, Array2::zeros((3, 5)), 0.9).unwrap();
    assert!(matches!(smoothed(without_counts, 1e-5), Error::NotFinite { what: "codewords", .. }));
}
