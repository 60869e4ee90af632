//! What a codebook does beside finding codes, against the memory bandwidth of this machine.
//!
//! Runs for about ten seconds, on one thread: `RAYON_NUM_THREADS` sets another number.
//!
//! Both operations read their arrays once and do little per number, so memory is what can bound them. The yardsticks do the
//! least that can be done with such arrays, four times the size of a large last-level cache, and are timed in turn with the
//! operations, which therefore find their arrays in memory:
//!
//! ```text
//! rotation backward   reads k and g, writes g      y_i = y_i / 2 + x_i   reads x and y, writes y
//! statistics          read k, write little         sum of x_i            reads x
//! ```
//!
//! A ratio of 1 is the yardstick's speed. Checked once, before anything is timed: rotated gradients keep their lengths, and the
//! sums of all codes are the sums of all keys.
//!
//! Bias: the best of many runs, f32. Codes are random: neighbouring keys seldom share one, which is the worst for the
//! statistics. Checks of the input are in the figures; so is the allocation of the statistics, but rotation works in place.

use std::hint::black_box;
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use transformer_vq::codebook::{CodeStats, Estimator, Rotation};
use transformer_vq::ndarray::{Array3, Array4, Axis};

const N: usize = 32_768;
const K: usize = 128;
const S: usize = 512;
const ROUNDS: usize = 60;
const CHUNK: usize = 1 << 14;
/// Numbers of a yardstick's array: 128 MiB, four times the last-level cache of a large machine.
const LARGE: usize = 1 << 25;

/// Rows of length 1.
fn unit_rows(rng: &mut ChaCha8Rng, rows: usize) -> Vec<f32> {
    let mut all = vec![];
    for _ in 0..rows {
        let row: Vec<f32> = (0..K).map(|_| rng.random_range(-1.0..1.0)).collect();
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        all.extend(row.iter().map(|x| x / length));
    }
    all
}

fn halve_and_add(x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y = 0.5 * *y + x;
        }
    });
}

fn sum(x: &[f32]) -> f32 {
    let of_chunk = |x: &[f32]| {
        let mut lanes = [0.0f32; 64];
        for x in x.as_chunks::<64>().0 {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += x;
            }
        }
        lanes.iter().sum::<f32>()
    };
    x.par_chunks(CHUNK).map(of_chunk).sum()
}

/// Seconds.
fn time<R>(f: impl FnOnce() -> R) -> f64 {
    let start = Instant::now();
    black_box(f());
    start.elapsed().as_secs_f64()
}

fn main() {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let keys = Array4::from_shape_vec((1, 1, N, K), unit_rows(&mut rng, N)).unwrap();
    let codewords = Array3::from_shape_vec((1, S, K), unit_rows(&mut rng, S)).unwrap();
    let codes = Array3::from_shape_simple_fn((1, 1, N), || rng.random_range(0..S as u32));
    let mut d = Some(Array4::from_shape_vec((1, 1, N, K), unit_rows(&mut rng, N)).unwrap());
    let (x, mut y) = (vec![1.0f32; LARGE], vec![2.0f32; LARGE]);
    let estimator = Estimator::Rotation(Rotation::default());

    let rotated =
        estimator.key_gradient(keys.view(), codes.view(), codewords.view(), d.clone().unwrap()).unwrap();
    assert!(rotated.rows().into_iter().all(|row| (row.dot(&row) - 1.0).abs() < 1e-4));
    let stats = CodeStats::collect(keys.view(), codes.view(), S, None).unwrap();
    let (sums, expected) = (stats.sums().sum_axis(Axis(1)), keys.sum_axis(Axis(2)).remove_axis(Axis(0)));
    assert!((sums - expected).iter().all(|e| e.abs() < 1e-2) && stats.counts().sum() == N as u64);

    let mut best = [f64::INFINITY; 4];
    for _ in 0..ROUNDS {
        let times = [
            time(|| halve_and_add(&x, &mut y)),
            time(|| {
                let gradient = d.take().expect("given back");
                let gradient = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), gradient);
                d = Some(gradient.unwrap());
            }),
            time(|| sum(&x)),
            time(|| CodeStats::collect(keys.view(), codes.view(), S, None).unwrap()),
        ];
        best.iter_mut().zip(times).for_each(|(best, time)| *best = best.min(time));
    }
    println!("N = {N}, K = {K}, S = {S}, f32, {} thread(s), best of {ROUNDS}", rayon::current_num_threads());
    println!("{:18}  {:>8}  {:>8}  {:>9}  {:>5}", "", "ms", "GB/s", "yardstick", "ratio");
    let bytes = |arrays: usize| (arrays * N * K * size_of::<f32>()) as f64 / 1e9;
    for (name, bytes, yardstick, time) in
        [("rotation backward", bytes(3), best[0], best[1]), ("statistics", bytes(1), best[2], best[3])]
    {
        let yardstick = yardstick * (N * K) as f64 / LARGE as f64;
        let (ms, ratio) = (time * 1e3, yardstick / time);
        println!("{name:18}  {ms:8.2}  {:8.2}  {:9.2}  {ratio:5.2}", bytes / time, bytes / yardstick);
    }
}
