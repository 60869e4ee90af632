//! Attention on random arrays: the README's snippet, its difference from the definition, its time against quadratic attention.
//! Runs for a few seconds.
//!
//! ```sh
//! cargo run --release --no-default-features --example quickstart
//! ```

use std::time::{Duration, Instant};

use ndarray::{Array3, Array4, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use transformer_vq::Error;
use transformer_vq::attention::{AttentionState, BatchInputs, Inputs, VqAttention, naive, quadratic};
use transformer_vq::codebook::{Codebook, Ema, Estimator, lookup};

const HEADS: usize = 2;
const CODES: usize = 256;
const WIDTH: usize = 64;

fn main() -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let attention = VqAttention { block_len: 128, window: 128, ..VqAttention::default() };
    let codewords = Array3::from_shape_simple_fn((HEADS, CODES, WIDTH), || rng.random_range(-0.5..0.5f32));
    let mut codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99)?);

    println!(
        "{HEADS} heads in parallel, widths {WIDTH}, {CODES} codes, forward; quantized: assignment of keys included"
    );
    println!(
        "{:>7}  {:>14}  {:>12}  {:>9}  {:>14}",
        "tokens", "quantized, ms", "quadratic, ms", "speed-up", "off definition"
    );
    for len in [1024, 4096, 16384] {
        let mut random =
            || Array4::from_shape_simple_fn((1, HEADS, len, WIDTH), || rng.random_range(-0.5..0.5f32));
        let (q, k, v) = (random(), random(), random());
        let inputs = BatchInputs::new(q.view(), k.view(), v.view());

        let of_codes = || {
            let mut states = attention.new_states(1, &codebook, WIDTH)?;
            attention.forward(&inputs, &codebook, &mut states)
        };
        let of_keys = || {
            (0..HEADS).into_par_iter().try_for_each(|h| {
                let head = s![0, h, .., ..];
                quadratic::forward(q.slice(head), k.slice(head), v.slice(head)).map(drop)
            })
        };
        // Once without the clock: threads and buffers come to life.
        of_codes()?;
        of_keys()?;
        let begun = Instant::now();
        let (output, saved) = of_codes()?;
        let linear = begun.elapsed();
        let begun = Instant::now();
        of_keys()?;
        let quadratic = begun.elapsed();

        // The definition takes each query with each key: only for the shortest.
        let difference = if len == 1024 {
            let codewords = codebook.codewords();
            let k_hat = lookup(output.codes.view(), codewords.view())?;
            let head = Inputs {
                q: q.slice(s![0, 0, .., ..]),
                codes: output.codes.slice(s![0, 0, ..]),
                v: v.slice(s![0, 0, .., ..]),
                codewords: codewords.slice(s![0, .., ..]),
                biases: None,
                starts: None,
            };
            let state = AttentionState::new(CODES, WIDTH, WIDTH, attention.window)?;
            let (expected, _) = naive::forward(&attention, &head, k_hat.slice(s![0, 0, .., ..]), &state)?;
            let difference = &expected.out - &output.out.slice(s![0, 0, .., ..]);
            format!("{:.1e}", difference.fold(0.0, |worst: f32, d| worst.max(d.abs())))
        } else {
            String::new()
        };
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        println!(
            "{len:>7}  {:>14.1}  {:>13.1}  {:>9.1}  {difference:>14}",
            ms(linear),
            ms(quadratic),
            ms(quadratic) / ms(linear)
        );

        // Backward: your loss gives d_out, every gradient comes back, and the codebook learns from the keys.
        let d_out = output.out.mapv(|o| 2.0 * o);
        let gradients = attention.backward(&inputs, saved, d_out.view(), Estimator::StraightThrough, 1e-4)?;
        assert_eq!(gradients.k.dim(), k.dim());
        codebook.update(&output.stats)?;
    }
    Ok(())
}
