//! Moving averages, with the count clamp and with Laplace smoothing.

use crate::support::normal;
use ndarray::{Array1, Array3, Axis, array, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, Learning, Smoothing};
use transformer_vq::ndarray;

/// B, H, T, K, S and the width of a basis.
use crate::learning::{Batch, SIZES};

/// Laplace's divisors, one number at a time.
fn laplace(counts: &[f64], epsilon: f64) -> Vec<f64> {
    let total: f64 = counts.iter().sum();
    counts.iter().map(|n| (n + epsilon) / (total + counts.len() as f64 * epsilon) * total).collect()
}

#[test]
fn one_step_of_laplace_is_the_closed_form() {
    for size in SIZES {
        let [_, h, _, k, n_codes, _] = size;
        for epsilon in [1e-5, 0.5] {
            let start: Array3<f64> = normal(&mut ChaCha8Rng::seed_from_u64(1), (h, n_codes, k));
            let ema = Ema::from_codewords(start.clone(), 0.9).unwrap();
            let ema = ema.with_smoothing(Smoothing::Laplace { epsilon }).unwrap();
            let mut codebook = Codebook::ema(ema);
            // All counts are 1: so are the divisors.
            assert!(relative_rms(&codebook.codewords(), &start) < 1e-14);
            let stats = Batch::new(size).stats(n_codes);
            codebook.update(&stats).unwrap();
            let Learning::Ema(ema) = codebook.learning() else { panic!() };
            assert_eq!(ema.smoothing(), Smoothing::Laplace { epsilon });
            let sums = &start * 0.9 + &stats.sums() * (1.0 - 0.9);
            let counts = stats.counts().mapv(|n| 0.9 + (1.0 - 0.9) * n as f64);
            assert_eq!((ema.sums(), ema.counts()), (sums.view(), counts.view()));
            let mut expected = sums;
            for (mut table, counts) in expected.outer_iter_mut().zip(counts.outer_iter()) {
                let divisors = laplace(&counts.to_vec(), epsilon);
                assert!((divisors.iter().sum::<f64>() / counts.sum() - 1.0).abs() < 1e-14);
                table /= &Array1::from(divisors).insert_axis(Axis(1));
            }
            assert!(relative_rms(&codebook.codewords(), &expected) < 1e-14);
        }
    }
}

/// The mean of the keys, but for the share of epsilon.
#[test]
fn constant_data_lead_to_centroids() {
    let keys = array![[[[1.0, 2.0], [3.0, 2.0], [-5.0, 0.0], [-7.0, 1.0]]]];
    let codes = array![[[0u32, 0, 1, 1]]];
    let stats = CodeStats::collect(keys.view(), codes.view(), 2, None).unwrap();
    for smoothing in [Smoothing::CountClamp, Smoothing::Laplace { epsilon: 1e-5 }] {
        let ema = Ema::from_codewords(Array3::ones((1, 2, 2)), 0.8).unwrap();
        let mut codebook = Codebook::ema(ema.with_smoothing(smoothing).unwrap());
        for _ in 0..200 {
            codebook.update(&stats).unwrap();
        }
        let expected = array![[[2.0, 2.0], [-6.0, 0.5]]];
        assert!(relative_rms(&codebook.codewords(), &expected) < 1e-5);
    }
}

/// Its direction stays, its length never grows, and it is gone in the end.
#[test]
fn an_unused_code_stays_and_fades_under_laplace() {
    let start = array![[[3.0f64, 4.0], [1.0, 0.0]]];
    let ema = Ema::from_codewords(start, 0.5).unwrap();
    let mut codebook = Codebook::ema(ema.with_smoothing(Smoothing::Laplace { epsilon: 1e-5 }).unwrap());
    let keys = array![[[[1.0, 0.5]]]];
    let stats = CodeStats::collect(keys.view(), array![[[1]]].view(), 2, None).unwrap();
    let mut norms = vec![5.0f64];
    for _ in 0..40 {
        codebook.update(&stats).unwrap();
        let codeword: Array1<f64> = codebook.codewords().slice(s![0, 0, ..]).to_owned();
        assert!((codeword[0] * 4.0 - codeword[1] * 3.0).abs() < 1e-12);
        norms.push(codeword[0].hypot(codeword[1]));
    }
    assert!((norms[1] / 5.0 - 1.0).abs() < 1e-4, "the first update throws nothing away: {}", norms[1]);
    assert!(norms.windows(2).all(|pair| pair[1] <= pair[0]));
    assert!(norms[40] < 1e-5);
}
