//! Codebooks: assignment, look-up, losses, statistics, learning.

use ndarray::{Array1, Array2, Array3, Array4, s};
use transformer_vq::codebook::{CodeStats, Codebook, Ema, assign, assign_naive, commitment, lookup};

use super::{BAD, refused};

const H: usize = 2;
const S: usize = 5;
const K: usize = 3;

fn codebook() -> Codebook<f64> {
    Codebook::ema(Ema::from_codewords(Array3::from_elem((H, S, K), 0.5), 0.9).unwrap())
}

#[test]
fn codebooks_that_cannot_be_are_refused() {
    let new = |sums: (usize, usize, usize), counts: (usize, usize), decay| {
        Ema::<f64>::new(Array3::zeros(sums), Array2::ones(counts), decay)
    };
    refused(new((H, S, K), (H, S + 1), 0.9), "Shape", "counts");
    for empty in [(0, S, K), (H, 0, K), (H, S, 0)] {
        refused(new(empty, (empty.0, empty.1), 0.9), "Empty", "codewords");
        refused(Ema::from_codewords(Array3::<f64>::zeros(empty), 0.9), "Empty", "codewords");
        refused(Ema::random(empty.0, empty.1, empty.2, 0.9, || 0.0), "Empty", "codewords");
    }
    for decay in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        refused(new((H, S, K), (H, S), decay), "Invalid", "decay");
    }
    for bad in BAD {
        let sums = Array3::from_elem((H, S, K), bad);
        refused(Ema::new(sums.clone(), Array2::ones((H, S)), 0.9), "NotFinite", "sums");
        refused(Ema::from_codewords(sums, 0.9), "NotFinite", "sums");
        let counts = Array2::from_elem((H, S), bad);
        refused(Ema::new(Array3::zeros((H, S, K)), counts, 0.9), "NotFinite", "counts");
        refused(Ema::random(1, 1, 1, 0.9, || bad), "NotFinite", "sums");
    }
    refused(Ema::new(Array3::zeros((H, S, K)), Array2::from_elem((H, S), -1.0), 0.9), "Invalid", "counts");
    // Finite sums whose codewords are not.
    refused(
        Ema::new(Array3::from_elem((1, 1, 1), f64::MAX), Array2::zeros((1, 1)), 0.9),
        "NotFinite",
        "codewords",
    );
    for (h, s, k) in [(usize::MAX, 1, 1), (1, usize::MAX, 1), (1, 1, usize::MAX), (1 << 22, 1 << 22, 1 << 22)]
    {
        refused(Ema::random(h, s, k, 0.9, || 0.0), "TooLarge", "codewords");
        refused(CodeStats::<f32>::zeros(h, s, k), "TooLarge", "stats");
    }
    refused(CodeStats::<f32>::zeros(usize::MAX, 1, 0), "TooLarge", "stats");
    // What could be addressed, but that no machine has the memory for.
    refused(CodeStats::<f32>::zeros(1, 1 << 50, 1), "TooLarge", "stats");
    refused(Ema::random(1, 1 << 40, 1 << 10, 0.9, || 0.0), "TooLarge", "codewords");
    refused(Ema::from_codewords(Array3::<f32>::zeros((1, 1 << 58, 0)), 0.9), "TooLarge", "counts");
    let wide = Array3::<f32>::zeros((1, 1 << 23, 1));
    refused(Codebook::linear(wide.clone(), wide, None, false), "TooLarge", "codewords");
    let (keys, codes) = (Array4::<f32>::zeros((1, 1, 1, 1)), Array3::<u32>::zeros((1, 1, 1)));
    let codeword = Array3::<f32>::zeros((1, 1, 1));
    let many = keys.broadcast((1, 1, 1 << 50, 1)).unwrap();
    refused(assign(many.slice(s![0, 0, .., ..]), codeword.slice(s![0, .., ..])), "TooLarge", "codes");
    refused(assign_naive(many.slice(s![0, 0, .., ..]), codeword.slice(s![0, .., ..])), "TooLarge", "codes");
    let codes = codes.broadcast((1, 1, 1 << 50)).unwrap();
    refused(lookup(codes, codeword.view()), "TooLarge", "quantized keys");
}

#[test]
fn assignment_checks_keys_and_codewords() {
    for f in [assign::<f64>, assign_naive::<f64>] {
        let codewords = Array2::zeros((S, K));
        let keys = |dim| Array2::zeros(dim);
        refused(f(keys((4, K + 1)).view(), codewords.view()), "Shape", "keys");
        refused(f(keys((4, 0)).view(), codewords.view()), "Shape", "keys");
        refused(f(keys((4, K)).view(), keys((0, K)).view()), "Empty", "codewords");
        refused(f(keys((4, 0)).view(), keys((S, 0)).view()), "Empty", "codewords");
        assert_eq!(f(keys((0, K)).view(), codewords.view()).unwrap().len(), 0);
        for bad in BAD {
            let (mut keys, mut codewords) = (Array2::zeros((2000, K)), codewords.clone());
            keys[[1999, 1]] = bad;
            refused(f(keys.view(), codewords.view()), "NotFinite", "keys");
            codewords[[0, 2]] = bad;
            refused(f(Array2::zeros((4, K)).view(), codewords.view()), "NotFinite", "codewords");
        }
    }
    let keys = |h, k, fill| Array4::from_elem((2, h, 4, k), fill);
    refused(codebook().assign(keys(H, K + 1, 0.0).view()), "Shape", "keys");
    refused(codebook().assign(keys(H + 1, K, 0.0).view()), "Shape", "keys");
    for bad in BAD {
        refused(codebook().assign(keys(H, K, bad).view()), "NotFinite", "keys");
    }
    for (b, t) in [(0, 4), (2, 0)] {
        assert_eq!(codebook().assign(Array4::zeros((b, H, t, K)).view()).unwrap().dim(), (b, H, t));
    }
}

#[test]
fn look_ups_and_losses_check_codes_codewords_keys_and_mask() {
    let codes = Array3::<u32>::zeros((2, H, 4));
    let codewords = Array3::<f64>::zeros((H, S, K));
    refused(lookup(codes.view(), Array3::<f64>::zeros((H + 1, S, K)).view()), "Shape", "codewords");
    refused(lookup(codes.view(), Array3::<f64>::zeros((H, 0, K)).view()), "OutOfRange", "codes");
    let mut beyond = codes.clone();
    beyond[[1, 1, 3]] = S as u32;
    refused(lookup(beyond.view(), codewords.view()), "OutOfRange", "codes");

    let keys = Array4::<f64>::zeros((2, H, 4, K));
    let mask = Array2::from_elem((2, 4), true);
    let all = |keys: &Array4<f64>,
               codes: &Array3<u32>,
               codewords: &Array3<f64>,
               mask: &Array2<bool>,
               variant,
               what| {
        let (keys, codes, codewords, mask) = (keys.view(), codes.view(), codewords.view(), Some(mask.view()));
        refused(commitment::loss(keys, codes, codewords, mask), variant, what);
        refused(commitment::backward(keys, codes, codewords, mask, 1.0), variant, what);
        refused(commitment::mean_error(keys, codes, codewords, mask), variant, what);
        refused(commitment::relative_error(keys, codes, codewords, mask), variant, what);
    };
    all(&keys, &Array3::zeros((2, H, 5)), &codewords, &mask, "Shape", "codes");
    all(&keys, &beyond, &codewords, &mask, "OutOfRange", "codes");
    all(&keys, &codes, &Array3::zeros((H, S, K + 1)), &mask, "Shape", "codewords");
    all(&keys, &codes, &Array3::zeros((1, S, K)), &mask, "Shape", "codewords");
    all(&keys, &codes, &codewords, &Array2::from_elem((4, 2), true), "Shape", "mask");
    for bad in BAD {
        all(&Array4::from_elem(keys.dim(), bad), &codes, &codewords, &mask, "NotFinite", "keys");
        all(&keys, &codes, &Array3::from_elem((H, S, K), bad), &mask, "NotFinite", "codewords");
        let result = commitment::backward(keys.view(), codes.view(), codewords.view(), None, bad);
        refused(result, "Invalid", "weight");
    }
    // No heads, no codes, no keys: nothing to lose.
    let nothing = (Array4::<f64>::zeros((0, 0, 0, 0)), Array3::zeros((0, 0, 0)), Array3::zeros((0, 0, 0)));
    assert_eq!(commitment::loss(nothing.0.view(), nothing.1.view(), nothing.2.view(), None), Ok(0.0));
    assert_eq!(lookup(nothing.1.view(), nothing.2.view()).unwrap().len(), 0);
}

#[test]
fn statistics_and_updates_are_checked_and_atomic() {
    let (keys, codes) = (Array4::<f64>::zeros((2, H, 4, K)), Array3::<u32>::zeros((2, H, 4)));
    let mask = Array2::from_elem((2, 4), true);
    let collect = |keys: &Array4<f64>, codes: &Array3<u32>, n_codes, mask: &Array2<bool>| {
        CodeStats::collect(keys.view(), codes.view(), n_codes, Some(mask.view()))
    };
    refused(collect(&keys, &Array3::zeros((1, H, 4)), S, &mask), "Shape", "codes");
    refused(collect(&keys, &Array3::from_elem((2, H, 4), 5), S, &mask), "OutOfRange", "codes");
    refused(collect(&keys, &codes, 0, &mask), "OutOfRange", "codes");
    refused(collect(&keys, &codes, usize::MAX, &mask), "TooLarge", "stats");
    refused(collect(&keys, &codes, S, &Array2::from_elem((2, 5), true)), "Shape", "mask");
    for bad in BAD {
        refused(collect(&Array4::from_elem(keys.dim(), bad), &codes, S, &mask), "NotFinite", "keys");
    }
    let mut stats = collect(&keys, &codes, S, &mask).unwrap();
    refused(stats.merge(&CodeStats::zeros(H, S + 1, K).unwrap()), "Shape", "other");
    let mut book = codebook();
    for (h, s, k) in [(H + 1, S, K), (H, S + 1, K), (H, S, K + 1), (0, 0, 0)] {
        refused(book.update(&CodeStats::zeros(h, s, k).unwrap()), "Shape", "stats");
    }
    // Keys that are finite add up to what is not.
    let huge = collect(&Array4::from_elem(keys.dim(), f64::MAX), &codes, S, &mask).unwrap();
    refused(book.update(&huge), "NotFinite", "stats.sums");
    assert_eq!(book, codebook());
    let nothing = CodeStats::<f64>::zeros(0, 0, 0).unwrap();
    assert_eq!((nothing.usage(), nothing.perplexity()), (Array1::zeros(0), Array1::zeros(0)));
    let no_codes = CodeStats::<f64>::zeros(1, 0, 1).unwrap();
    assert_eq!((no_codes.usage()[0], no_codes.perplexity()[0]), (0.0, 0.0));
}
