//! Starting, reviving, distances, regularisers and structures of codebooks.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayView4};
use transformer_vq::codebook::revive::replacements;
use transformer_vq::codebook::{
    Codebook, Ema, Estimator, Replacement, Residual, Rotation, RotationScale, cosine, groups, nearest_pair,
    orthogonal, start,
};

use super::{BAD, refused};

const H: usize = 2;
const S: usize = 5;
const K: usize = 3;

#[test]
fn starts_check_keys_mask_and_sizes() {
    let keys = |dim| Array4::<f64>::zeros(dim);
    let mask = Array2::from_elem((2, 4), true);
    let all = |keys: ArrayView4<'_, f64>, n_codes, mask: Option<ArrayView2<'_, bool>>, variant, what| {
        refused(start::sample(keys, n_codes, mask, 1), variant, what);
        refused(start::k_means(keys, n_codes, mask, 3, 1), variant, what);
    };
    let sound = keys((2, H, 4, K));
    for wrong in [(2, 5), (1, 4), (4, 2)] {
        all(sound.view(), S, Some(Array2::from_elem(wrong, true).view()), "Shape", "mask");
    }
    all(sound.view(), S, Some((!&mask).view()), "Empty", "keys");
    for dim in [(0, H, 4, K), (2, H, 0, K)] {
        all(keys(dim).view(), S, None, "Empty", "keys");
    }
    for dim in [(2, 0, 4, K), (2, H, 4, 0)] {
        all(keys(dim).view(), S, None, "Empty", "codewords");
    }
    all(sound.view(), 0, None, "Empty", "codewords");
    refused(start::sample(sound.view(), usize::MAX, None, 1), "TooLarge", "codewords");
    refused(start::k_means(sound.view(), usize::MAX, None, 1, 1), "Invalid", "n_codes");
    refused(start::k_means(sound.view(), u32::MAX as usize + 1, None, 1, 1), "Invalid", "n_codes");
    for bad in BAD {
        // Masked or not: padding is to be numbers.
        let mut keys = sound.clone();
        keys[[1, 1, 3, 0]] = bad;
        all(keys.view(), S, Some(mask.view()), "NotFinite", "keys");
    }
}

#[test]
fn random_codewords_check_sizes_and_deviation() {
    let random = start::random::<f32>;
    for (h, s, k) in [(0, S, K), (H, 0, K), (H, S, 0)] {
        refused(random(h, s, k, 1.0, 1), "Empty", "codewords");
    }
    refused(random(usize::MAX, 2, 2, 1.0, 1), "TooLarge", "codewords");
    for deviation in [-0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused(random(H, S, K, deviation, 1), "Invalid", "deviation");
    }
}

fn codebook(n_heads: usize, n_codes: usize, d_k: usize) -> Codebook<f64> {
    Codebook::ema(Ema::from_codewords(Array3::from_elem((n_heads, n_codes, d_k), 0.5), 0.9).unwrap())
}

#[test]
fn revival_checks_usage_keys_codewords_mask_and_ratio() {
    let (usage, keys) = (Array2::<f64>::ones((H, S)), Array4::<f64>::zeros((2, H, 4, K)));
    let (codewords, mask) = (Array3::<f64>::zeros((H, S, K)), Array2::from_elem((2, 4), true));
    let all = |usage: &Array2<f64>,
               keys: &Array4<f64>,
               codewords: &Array3<f64>,
               mask: &Array2<bool>,
               ratio,
               variant,
               what| {
        let mask = Some(mask.view());
        refused(replacements(usage.view(), keys.view(), codewords.view(), mask, ratio, 1), variant, what);
    };
    all(&Array2::ones((H, S + 1)), &keys, &codewords, &mask, 0.1, "Shape", "usage");
    all(&usage, &Array4::zeros((2, H, 4, K + 1)), &codewords, &mask, 0.1, "Shape", "codewords");
    all(&usage, &keys, &codewords, &Array2::from_elem((2, 3), true), 0.1, "Shape", "mask");
    let none = (Array2::ones((H, 0)), Array3::zeros((H, 0, K)));
    all(&none.0, &keys, &none.1, &mask, 0.1, "Empty", "codewords");
    all(&-&usage, &keys, &codewords, &mask, 0.1, "Invalid", "usage");
    for ratio in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
        all(&usage, &keys, &codewords, &mask, ratio, "Invalid", "ratio");
        let mut codebook = codebook(H, S, K);
        refused(codebook.revive(keys.view(), None, ratio, 1), "Invalid", "ratio");
    }
    for bad in BAD {
        all(&(&usage * bad), &keys, &codewords, &mask, 0.1, "NotFinite", "usage");
        all(&usage, &Array4::from_elem(keys.dim(), bad), &codewords, &mask, 0.1, "NotFinite", "keys");
        let codewords = Array3::from_elem((H, S, K), bad);
        all(&usage, &keys, &codewords, &mask, 0.1, "NotFinite", "codewords");
    }
    let mut same = codebook(H, S, K);
    refused(same.revive(Array4::zeros((2, H + 1, 4, K)).view(), None, 0.1, 1), "Shape", "codewords");
    assert_eq!(same, codebook(H, S, K));
}

#[test]
fn replaced_codes_are_checked_and_nothing_is_half_written() {
    let mut ema = Ema::from_codewords(Array3::from_elem((H, S, K), 0.5), 0.9).unwrap();
    let before = ema.clone();
    let good = Replacement { head: 1, code: 2, codeword: Array1::ones(K) };
    let with = |change: &dyn Fn(&mut Replacement<f64>)| {
        let mut bad = good.clone();
        change(&mut bad);
        [good.clone(), bad]
    };
    refused(ema.replace(&with(&|bad| bad.head = H)), "OutOfRange", "head");
    refused(ema.replace(&with(&|bad| bad.code = S)), "OutOfRange", "code");
    refused(ema.replace(&with(&|bad| bad.codeword = Array1::ones(K + 1))), "Shape", "codeword");
    for value in BAD {
        refused(ema.replace(&with(&|bad| bad.codeword.fill(value))), "NotFinite", "codeword");
    }
    assert_eq!(ema, before);
    ema.replace(&[good]).unwrap();
    assert_ne!(ema, before);
}

#[test]
fn distances_and_regularisers_check_their_vectors() {
    let x = Array3::<f64>::ones((H, S, K));
    refused(cosine::backward(x.view(), Array3::ones((H, S, K + 1)).view()), "Shape", "d_y");
    refused(nearest_pair(Array3::<f64>::ones((H, 0, K)).view()), "Empty", "codewords");
    for bad in BAD {
        let spoilt = &x * bad;
        refused(cosine::normalize(spoilt.view()), "NotFinite", "x");
        refused(cosine::backward(spoilt.view(), x.view()), "NotFinite", "x");
        refused(cosine::backward(x.view(), spoilt.view()), "NotFinite", "d_y");
        refused(orthogonal::loss(spoilt.view()), "NotFinite", "codewords");
        refused(orthogonal::loss_and_gradient(spoilt.view(), 1.0), "NotFinite", "codewords");
        refused(orthogonal::loss_and_gradient(x.view(), bad), "Invalid", "weight");
        refused(nearest_pair(spoilt.view()), "NotFinite", "codewords");
    }
    for nothing in [(0, 0, 0), (1, 0, 3)].map(Array3::<f32>::zeros) {
        assert_eq!(orthogonal::loss(nothing.view()), Ok(0.0));
        assert_eq!(orthogonal::loss_and_gradient(nothing.view(), 1.0), Ok((0.0, nothing)));
    }
}

#[test]
fn levels_and_groups_check_what_belongs_together() {
    refused(Residual::<f64>::new(vec![]), "Empty", "levels");
    refused(Residual::new(vec![codebook(H, S, K), codebook(H + 1, S, K)]), "Shape", "levels");
    refused(Residual::new(vec![codebook(H, S, K), codebook(H, S, K + 1)]), "Shape", "levels");
    let mut residual = Residual::new(vec![codebook(H, S, K), codebook(H, S + 2, K)]).unwrap();
    let keys = Array4::<f64>::zeros((2, H, 4, K));
    let mask = Array2::from_elem((2, 5), true);
    for dim in [(2, H + 1, 4, K), (2, H, 4, K + 1)] {
        let keys = Array4::zeros(dim);
        refused(residual.encode(keys.view()), "Shape", "keys");
        refused(residual.forward(keys.view(), None), "Shape", "keys");
        refused(residual.revive(keys.view(), None, 0.1, 1), "Shape", "keys");
    }
    refused(residual.forward(keys.view(), Some(mask.view())), "Shape", "mask");
    for bad in BAD {
        let keys = Array4::from_elem(keys.dim(), bad);
        refused(residual.encode(keys.view()), "NotFinite", "keys");
        refused(residual.forward(keys.view(), None), "NotFinite", "keys");
        refused(Residual::from_keys(keys.view(), 1, |_, _| Ok(codebook(H, S, K))), "NotFinite", "keys");
    }
    refused(Residual::from_keys(keys.view(), 0, |_, _| Ok(codebook(H, S, K))), "Empty", "levels");
    refused(Residual::from_keys(keys.view(), 1, |_, _| Ok(codebook(H + 1, S, K))), "Shape", "keys");

    let codes = |dim| Array4::<u32>::zeros(dim);
    refused(residual.decode(codes((3, 2, H, 4)).view()), "Shape", "codes");
    refused(residual.decode(codes((2, 2, H + 1, 4)).view()), "Shape", "codes");
    refused(residual.decode(codes((0, 2, H, 4)).view()), "Empty", "codes");
    refused(residual.decode(Array4::from_elem((1, 2, H, 4), S as u32).view()), "OutOfRange", "codes");
    let beyond = Array4::from_shape_fn((2, 2, H, 4), |(l, ..)| if l == 0 { 0 } else { S as u32 + 2 });
    refused(residual.decode(beyond.view()), "OutOfRange", "codes");

    let estimator = Estimator::StraightThrough;
    let backward =
        |keys: &Array4<f64>, mask: Option<&Array2<bool>>, d: &Array4<f64>, weight, variant, what| {
            let (_, saved) = residual.forward(Array4::zeros((2, H, 4, K)).view(), None).unwrap();
            let mask = mask.map(|mask| mask.view());
            refused(saved.backward(keys.view(), mask, d.view(), estimator, weight), variant, what);
        };
    let other = Array4::zeros((2, H, 5, K));
    backward(&other, None, &keys, 1.0, "Shape", "keys");
    backward(&keys, None, &other, 1.0, "Shape", "d_quantized");
    backward(&keys, Some(&mask), &keys, 1.0, "Shape", "mask");
    for bad in BAD {
        backward(&keys, None, &keys, bad, "Invalid", "weight");
        backward(&Array4::from_elem(keys.dim(), bad), None, &keys, 1.0, "NotFinite", "keys");
        backward(&keys, None, &Array4::from_elem(keys.dim(), bad), 1.0, "NotFinite", "d_quantized");
        let scale = RotationScale::AtMost(bad);
        let estimator = Estimator::Rotation(Rotation { scale, ..Rotation::default() });
        let (_, saved) = residual.forward(keys.view(), None).unwrap();
        refused(saved.backward(keys.view(), None, keys.view(), estimator, 1.0), "Invalid", "scale");
    }

    let x = Array3::<f64>::zeros((2, 4, 6));
    for n_groups in [0, 4, 7, usize::MAX] {
        refused(groups::split(x.view(), n_groups), "Invalid", "n_groups");
    }
    refused(groups::split(Array3::<f32>::zeros((1, 1, 0)).view(), usize::MAX), "TooLarge", "keys");
    let point = Array4::<f32>::zeros((1, 1, 1, 1));
    let many = point.broadcast((1 << 20, 1 << 20, 1 << 10, 1 << 10)).unwrap();
    refused(groups::join(many), "TooLarge", "vectors");
}
