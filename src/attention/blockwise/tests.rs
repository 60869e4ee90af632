//! Segments against one another.

use ndarray::{Array1, Array2};

use super::*;
use crate::attention::Biases;
use crate::check::relative_rms;

fn numbers<T: Scalar>(dim: (usize, usize), seed: usize) -> Array2<T> {
    Array2::from_shape_fn(dim, |(i, j)| T::from_f64(((i * 31 + j * 17 + seed * 7 + 1) as f64).sin()))
}

const T: usize = 300;
const SIZES: (usize, usize) = (7, 5); // S, K
/// Narrow and wide in f64.
const WIDTHS: [usize; 2] = [9, NARROW / 8 + 6];

/// Outputs, and gradients in so many segments.
fn run_in<X: Scalar>(
    attention: &VqAttention,
    v: usize,
    (segments, threads): (usize, usize),
) -> (Output<X>, AttentionState<X>, Gradients<X>) {
    let (s, k) = SIZES;
    let (codewords, values, q) = (numbers((s, k), 1), numbers((T, v), 2), numbers((T, k), 3));
    let codes = Array1::from_shape_fn(T, |j| (j * j % 11 % s) as u32);
    let (bias, relative) = (numbers((2, k), 4), numbers((attention.window + 1, k), 5));
    let inputs = Inputs {
        q: q.view(),
        codes: codes.view(),
        v: values.view(),
        codewords: codewords.view(),
        biases: Some(Biases { content: bias.row(0), position: bias.row(1), relative: relative.view() }),
        starts: None,
    };
    // A piece before this one fills the state.
    let mut state = AttentionState::new(s, k, v, attention.window).unwrap();
    forward(attention, &inputs, &mut state).unwrap();
    let start = state.clone();
    let mut output = Output::zeros(&inputs);
    output.out.fill(X::nan());
    let parts = segments.min(T); // as many as there are blocks, if need be
    let falling = falling(&inputs);
    let relative_t = falling.as_ref();
    let piece = Piece::new(attention, inputs.reborrow(), relative_t, &state);
    assert!(piece.segments(parts, state.cache.clone()).len() >= parts.min(piece.n_blocks()) / 2);
    assert!(forward::run_in_parts(attention, &inputs, relative_t, &mut state, output.rows(), parts));
    let saved = Saved { lse: output.lse.clone(), start };
    let d_out = numbers((T, v), 6);
    let nan = || Array2::from_elem((T, k), X::nan());
    let (mut d_q, mut d_k_hat, mut d_v) = (nan(), nan(), Array2::from_elem((T, v), X::nan()));
    let rows = RowGradients { q: d_q.view_mut(), k_hat: d_k_hat.view_mut(), v: d_v.view_mut() };
    let (codewords, biases, finite) = backward::run_in_parts(
        attention,
        &inputs,
        relative_t,
        saved,
        d_out.view(),
        rows,
        (segments, threads),
    );
    assert!(finite);
    (output, state, Gradients { q: d_q, k_hat: d_k_hat, v: d_v, codewords, biases })
}

#[test]
fn segments_change_no_output_and_gradients_by_rounding_only() {
    for (block_len, window) in [(16, 16), (70, 30), (8, 100), (1, 3), (64, 0)] {
        for (cache, gradient_through_cache) in [(true, true), (true, false), (false, true)] {
            let attention = VqAttention { block_len, window, cache, gradient_through_cache };
            for (v, segments) in WIDTHS.into_iter().flat_map(|v| [2, 3, 5, 1000].map(|n| (v, n))) {
                let (output, state, d) = run_in::<f64>(&attention, v, (1, 1));
                let (output_in, state_in, d_in) = run_in::<f64>(&attention, v, (segments, 3));
                assert_eq!(output.out, output_in.out);
                assert_eq!(output.lse, output_in.lse);
                assert_eq!(output.cached_mass, output_in.cached_mass);
                assert_eq!(state, state_in);
                let (biases, biases_in) = (d.biases.as_ref().unwrap(), d_in.biases.unwrap());
                let bound = |what, error: f64| {
                    assert!(error < 1e-13, "{what}: {error:e}, {attention:?}, V {v}, {segments} segments");
                };
                bound("q", relative_rms(&d_in.q, &d.q));
                bound("k_hat", relative_rms(&d_in.k_hat, &d.k_hat));
                bound("v", relative_rms(&d_in.v, &d.v));
                bound("codewords", relative_rms(&d_in.codewords, &d.codewords));
                bound("content", relative_rms(&biases_in.content, &biases.content));
                bound("position", relative_rms(&biases_in.position, &biases.position));
                bound("relative", relative_rms(&biases_in.relative, &biases.relative));
                // How codes are shared among threads changes no bit.
                assert_eq!(d_in.v, run_in::<f64>(&attention, v, (segments, 1)).2.v);
            }
        }
    }
}
