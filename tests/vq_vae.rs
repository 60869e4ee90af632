//! The hand-written gradient of the example `vq_vae`, against finite differences.

#[allow(dead_code)] // what only the example draws
#[path = "../examples/vq_vae/images.rs"]
mod images;
#[path = "../examples/vq_vae/network.rs"]
mod network;

use images::{PATCHES, WIDTH};
use network::Network;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::ndarray::{Array1, Array2};

/// Width of a key.
const K: usize = 2;
const STEP: f64 = 1e-3;
const LIMIT: f64 = 1e-8;

fn wave(dim: (usize, usize), step: f64) -> Array2<f64> {
    Array2::from_shape_fn(dim, |(row, column)| ((row * dim.1 + column) as f64 * step).sin())
}

/// Both halves, each pulled along a wave: codewords are constants in between.
fn loss(network: &Network<f64>, x: &Array2<f64>, quantized: &Array2<f64>) -> f64 {
    let keys = network.encode(x.view()).unwrap().0;
    let painted = network.decode(quantized.view()).unwrap().0;
    (&keys * &wave(keys.dim(), 0.3)).sum() + (&painted * &wave(painted.dim(), 0.7)).sum()
}

#[test]
fn every_gradient_agrees_with_finite_differences() {
    // Two pictures: neighbours must not reach from one into the other.
    let (x, quantized) = (wave((2 * PATCHES, WIDTH), 1.3), wave((2 * PATCHES, K), 2.1));
    let mut network: Network<f64> = Network::new(K, 3).unwrap();
    let mut d = network.zeros_like();
    let (keys, encoded) = network.encode(x.view()).unwrap();
    let (painted, decoded) = network.decode(quantized.view()).unwrap();
    network.encode_backward(&encoded, wave(keys.dim(), 0.3).view(), &mut d).unwrap();
    let d_painted = wave(painted.dim(), 0.7);
    let d_quantized = network.decode_backward(&decoded, d_painted.view(), &mut d).unwrap();

    let expected = finite_difference(|quantized| loss(&network, &x, &quantized.to_owned()), &quantized, STEP);
    let error = relative_rms(&d_quantized, &expected);
    assert!(error <= LIMIT, "quantized keys: {error:e}");

    // Some numbers of every array of weights.
    let n_arrays = network.pairs(&d).count();
    assert_eq!(n_arrays, 10);
    for i in 0..n_arrays {
        let by_hand = Array1::from_iter(network.pairs(&d).nth(i).unwrap().1.iter().copied());
        let len = by_hand.len();
        let mut places = vec![0, len / 3, len / 2, len - 1];
        places.dedup();
        let places = Array1::from(places);
        let here = places.mapv(|place| *network.pairs(&d).nth(i).unwrap().0.iter().nth(place).unwrap());
        let mut with = |numbers: &[f64]| {
            let mut array = network.pairs(&d).nth(i).unwrap().0;
            for (&place, &number) in places.iter().zip(numbers) {
                *array.iter_mut().nth(place).unwrap() = number;
            }
            loss(&network, &x, &quantized)
        };
        let expected = finite_difference(|numbers| with(numbers.as_slice().unwrap()), &here, STEP);
        with(here.as_slice().unwrap()); // as it was
        let error = relative_rms(&places.mapv(|place| by_hand[place]), &expected);
        assert!(error <= LIMIT, "array {i}: {error:e}");
    }
}
