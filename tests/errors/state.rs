//! States and caches, made and put together again.

use ndarray::{Array1, Array2};
use transformer_vq::attention::{AttentionState, CompressiveCache, WindowKeys};

use super::{BAD, refused};

const S: usize = 5;
const K: usize = 3;
const V: usize = 2;

fn cache(counts: [u64; S]) -> CompressiveCache<f64> {
    let zeros = || Array2::zeros((S, V));
    CompressiveCache::from_parts(zeros(), zeros(), Array1::from_iter(counts)).unwrap()
}

fn keys(held: usize) -> WindowKeys<f64> {
    WindowKeys { codes: Array1::zeros(held), k_hat: Array2::zeros((held, K)), v: Array2::zeros((held, V)) }
}

#[test]
fn states_that_cannot_exist_are_refused() {
    refused(AttentionState::<f32>::new(usize::MAX, 1, 1, 1), "TooLarge", "state");
    refused(AttentionState::<f32>::new(1, 1, usize::MAX, 0), "TooLarge", "state");
    refused(AttentionState::<f32>::new(1, usize::MAX, 1, 1), "TooLarge", "state");
    refused(AttentionState::<f32>::new(1, 1, 1, usize::MAX), "TooLarge", "state");
    refused(AttentionState::<f64>::new(1, 1 << 32, 1, 1 << 32), "TooLarge", "state");
    refused(AttentionState::<f64>::new(usize::MAX, 0, 0, 0), "TooLarge", "state");
    refused(AttentionState::<f64>::new(0, 0, 0, usize::MAX), "TooLarge", "state");
    let empty = AttentionState::<f64>::new(0, 0, 0, 0).unwrap();
    assert_eq!((empty.position(), empty.window(), empty.window_keys().codes.len()), (0, 0, 0));
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let state =
        |position, cache, keys: &WindowKeys<f64>| AttentionState::from_parts(position, 3, cache, keys);
    let good = || cache([1, 0, 2, 0, 4]);
    assert!(state(10, good(), &keys(3)).is_ok());
    assert!(state(2, cache([0; S]), &keys(2)).is_ok());
    refused(state(10, good(), &keys(2)), "Shape", "codes");
    refused(state(2, cache([0; S]), &keys(3)), "Shape", "codes");
    refused(state(10, good(), &WindowKeys { k_hat: Array2::zeros((2, K)), ..keys(3) }), "Shape", "k_hat");
    refused(state(10, good(), &WindowKeys { v: Array2::zeros((3, V + 1)), ..keys(3) }), "Shape", "v");
    refused(
        state(10, good(), &WindowKeys { codes: Array1::from_elem(3, 5), ..keys(3) }),
        "OutOfRange",
        "codes",
    );
    for bad in BAD {
        let (k_hat, v) = (Array2::from_elem((3, K), bad), Array2::from_elem((3, V), bad));
        refused(state(10, good(), &WindowKeys { k_hat, ..keys(3) }), "NotFinite", "k_hat");
        refused(state(10, good(), &WindowKeys { v, ..keys(3) }), "NotFinite", "v");
    }
    for position in [9, 11, 1 << 40] {
        refused(state(position, good(), &keys(3)), "Invalid", "sum of counts");
    }
    refused(state(10, cache([u64::MAX, 8, 0, 0, 0]), &keys(3)), "Invalid", "sum of counts");
    // From here on, positions could not be counted.
    for position in [1 << 63, u64::MAX] {
        refused(state(position, cache([position - 3, 0, 0, 0, 0]), &keys(3)), "Invalid", "position");
    }
    let last = i64::MAX as u64;
    assert!(state(last, cache([last - 3, 0, 0, 0, 0]), &keys(3)).is_ok());
}

#[test]
fn caches_are_checked() {
    let (zeros, counts) = (|s, v| Array2::<f64>::zeros((s, v)), Array1::zeros);
    refused(CompressiveCache::from_parts(zeros(S, V), zeros(S, 1), counts(S)), "Shape", "residual");
    refused(CompressiveCache::from_parts(zeros(S, V), zeros(S, V), counts(4)), "Shape", "count");
    for bad in BAD {
        let bad = Array2::from_elem((S, V), bad);
        refused(CompressiveCache::from_parts(bad.clone(), zeros(S, V), counts(S)), "NotFinite", "mean");
        refused(CompressiveCache::from_parts(zeros(S, V), bad, counts(S)), "NotFinite", "residual");
    }
    let mut full = cache([1, u64::MAX, 0, 0, 0]);
    let before = full.clone();
    refused(full.merge(&cache([1, 1, 0, 0, 0])), "Invalid", "other");
    let other = CompressiveCache::from_parts(zeros(S, 1), zeros(S, 1), counts(S)).unwrap();
    refused(full.merge(&other), "Shape", "other");
    assert_eq!(full, before);
}
