//! Starting, reviving, distances, regularisers and structures of codebooks.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4};
use transformer_vq::codebook::start;

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
