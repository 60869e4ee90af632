//! Prepared heads while codebooks move: a key in the window keeps the codeword that it was given, whatever the table that is
//! decoded with says today.

use crate::support::random;
use ndarray::{Array2, Array4, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{AttentionState, BatchBiases, BatchInputs, PreparedHeads, VqAttention};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema};

const B: usize = 2;
const H: usize = 2;
const S: usize = 6;
const K: usize = 5;
const V: usize = 3;
const WINDOW: usize = 4;
const T: usize = 60;

type States = Array2<AttentionState<f64>>;

/// The same states, read back from their parts.
fn restored(states: &States) -> States {
    states.mapv(|state| {
        let cache = state.cache().clone();
        AttentionState::from_parts(state.position(), state.window(), cache, &state.window_keys()).unwrap()
    })
}

#[test]
fn the_window_keeps_its_codewords_when_codebooks_move() {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let attention = VqAttention { window: WINDOW, ..VqAttention::default() };
    // The second differs from the first in the last codeword of the last head alone, the third everywhere.
    let first = random::<f64, _>(rng, (H, S, K));
    let mut second = first.clone();
    second.slice_mut(s![H - 1, S - 1, ..]).mapv_inplace(|c| c + 0.5);
    let third = random(rng, (H, S, K));
    let codebooks = [first, second, third].map(|c| Codebook::ema(Ema::from_codewords(c, 0.9).unwrap()));
    let (u, w) = (random(rng, (H, K)), random(rng, (H, K)));
    let relative = random(rng, (H, WINDOW + 1, K));
    let biases = || BatchBiases { content: u.view(), position: w.view(), relative: relative.view() };
    let heads: Vec<PreparedHeads<f64>> =
        codebooks.iter().map(|c| attention.prepare(c, Some(biases())).unwrap()).collect();
    let [q, k] = [(); 2].map(|()| random(rng, (B, H, T, K)));
    let v: Array4<f64> = random(rng, (B, H, T, V));
    let mut states = attention.new_states(B, &codebooks[0], V).unwrap();
    let mut by_push = states.clone();
    let mut moved = 0;
    for t in 0..T {
        // Long enough with one for the window to be all its own, and in between changes at every token.
        let n = [0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 1, 1, 1, 1, 1, 1, 2, 1, 2, 2][t % 20];
        // One token of each twenty by other means, unprepared.
        let prepared = t % 20 != 6;
        let tokens = s![.., .., t..=t, ..];
        let [q, k, v] = [&q, &k, &v].map(|x| x.slice(tokens));
        let mut again = restored(&states);
        let inputs = BatchInputs { biases: Some(biases()), ..BatchInputs::new(q, k, v) };
        let push = |states: &mut States| match prepared {
            true => heads[n].push(q, k, v, states).unwrap(),
            false => attention.push(&inputs, &codebooks[n], states).unwrap(),
        };
        let output = push(&mut states);
        // Nothing but what a state says counts: not which tables it has met.
        assert_eq!(output.out, push(&mut again).out, "{t}");
        assert_eq!(states, again);
        let expected = attention.push(&inputs, &codebooks[n], &mut by_push).unwrap();
        assert!(relative_rms(&output.out, &expected.out) < 1e-14, "{t}");
        assert!(relative_rms(&output.lse, &expected.lse) < 1e-14, "{t}");
        assert_eq!(states, by_push);
        // Had the window moved with the codebook, the outputs would be others.
        let codewords = codebooks[n].codewords();
        let strays = states.indexed_iter().any(|((_, h), state)| {
            let keys = state.window_keys();
            let codes = keys.codes.mapv(|code| code as usize).to_vec();
            keys.k_hat != codewords.slice(s![h, .., ..]).select(ndarray::Axis(0), &codes)
        });
        moved += usize::from(strays);
    }
    assert!(moved > T / 5 && moved < T, "{moved}");
}
