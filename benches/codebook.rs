//! What a codebook does beside finding codes, against the memory bandwidth of this machine.
//!
//! Runs for about ten seconds, on one thread: `RAYON_NUM_THREADS` sets another number.
//!
//! Both operations read their arrays once and do little per number, so memory is what can bound them. The yardsticks do the
//! least that can be done with the same arrays:
//!
//! ```text
//! rotation backward   reads k and g, writes g      g_i = g_i / 2 + k_i   reads k and g, writes g
//! statistics          read k, write little         sum of k_i            reads k
//! ```
//!
//! A ratio of 1 is the yardstick's speed. Every pass goes through eight batches, 128 MiB of keys and as much of gradients: four
//! times the last-level cache of a large machine, so that all of it comes from memory, and what a batch leaves to be written is
//! written while the next one runs. Operation and yardstick take turns; the ratio is the median of those of the rounds.
//!
//! Checked once, before anything is timed: rotated gradients keep their lengths, and the sums of all codes are the sums of all
//! keys.
//!
//! Bias: f32; called on a thread of the pool, as a training step calls. Codes are random: neighbouring keys seldom share one,
//! which is the worst for the statistics. Checks of the input are in the figures; so is the allocation of the statistics, but
//! rotation works in place. As in any program that has freed a large array before, the allocator keeps small ones it gets back.

use std::hint::black_box;
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use transformer_vq::codebook::{CodeStats, Estimator, Rotation};
use transformer_vq::ndarray::{Array3, Array4, ArrayView3, Axis};

const N: usize = 32_768;
const K: usize = 128;
const S: usize = 512;
const BATCHES: usize = 8;
const ROUNDS: usize = 31;
const CHUNK: usize = 1 << 14;

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

/// Seconds per batch.
fn time(batches: &mut [Batch], mut f: impl FnMut(&mut Batch)) -> f64 {
    let start = Instant::now();
    batches.iter_mut().for_each(&mut f);
    start.elapsed().as_secs_f64() / BATCHES as f64
}

struct Batch {
    keys: Array4<f32>,
    codes: Array3<u32>,
    gradient: Option<Array4<f32>>,
}

impl Batch {
    fn new(rng: &mut ChaCha8Rng) -> Self {
        let mut rows = || Array4::from_shape_vec((1, 1, N, K), unit_rows(rng, N)).unwrap();
        let (keys, gradient) = (rows(), Some(rows()));
        Batch {
            keys,
            codes: Array3::from_shape_simple_fn((1, 1, N), || rng.random_range(0..S as u32)),
            gradient,
        }
    }

    fn rotate(&mut self, codewords: ArrayView3<'_, f32>) {
        let gradient = self.gradient.take().expect("given back");
        let estimator = Estimator::Rotation(Rotation::default());
        let gradient = estimator.key_gradient(self.keys.view(), self.codes.view(), codewords, gradient);
        self.gradient = Some(gradient.unwrap());
    }

    fn collect(&self) -> CodeStats<f32> {
        CodeStats::collect(self.keys.view(), self.codes.view(), S, None).unwrap()
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn run() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let codewords = Array3::from_shape_vec((1, S, K), unit_rows(&mut rng, S)).unwrap();
    // Until a large array has been freed, the C library returns even the tables of statistics to the system every time.
    drop(Batch::new(&mut rng));
    let mut batches: Vec<_> = (0..BATCHES).map(|_| Batch::new(&mut rng)).collect();

    batches[0].rotate(codewords.view());
    let rotated = batches[0].gradient.as_ref().unwrap();
    assert!(rotated.rows().into_iter().all(|row| (row.dot(&row) - 1.0).abs() < 1e-4));
    let (stats, keys) = (batches[0].collect(), &batches[0].keys);
    let (sums, expected) = (stats.sums().sum_axis(Axis(1)), keys.sum_axis(Axis(2)).remove_axis(Axis(0)));
    assert!((sums - expected).iter().all(|e| e.abs() < 1e-2) && stats.counts().sum() == N as u64);

    let mut times = [const { Vec::<f64>::new() }; 4];
    for _ in 0..ROUNDS {
        let round = [
            time(&mut batches, |batch| {
                let gradient = batch.gradient.as_mut().unwrap();
                halve_and_add(batch.keys.as_slice().unwrap(), gradient.as_slice_mut().unwrap());
            }),
            time(&mut batches, |batch| batch.rotate(codewords.view())),
            time(&mut batches, |batch| {
                black_box(sum(batch.keys.as_slice().unwrap()));
            }),
            time(&mut batches, |batch| drop(black_box(batch.collect()))),
        ];
        times.iter_mut().zip(round).for_each(|(times, time)| times.push(time));
    }
    println!("N = {N}, K = {K}, S = {S}, f32, {} thread(s), {ROUNDS} rounds", rayon::current_num_threads());
    println!("{:18}  {:>8}  {:>8}  {:>9}  {:>5}", "", "ms", "GB/s", "yardstick", "ratio");
    let bytes = |arrays: usize| (arrays * N * K * size_of::<f32>()) as f64 / 1e9;
    let [halved, rotated, summed, collected] = times;
    for (name, bytes, yardstick, time) in
        [("rotation backward", bytes(3), halved, rotated), ("statistics", bytes(1), summed, collected)]
    {
        let ratio = median(yardstick.iter().zip(&time).map(|(yardstick, time)| yardstick / time).collect());
        let (yardstick, time) = (median(yardstick), median(time));
        println!(
            "{name:18}  {:8.2}  {:8.2}  {:9.2}  {ratio:5.2}",
            time * 1e3,
            bytes / time,
            bytes / yardstick
        );
    }
}

fn main() {
    // On one thread unless another number is asked for.
    let threads = if std::env::var_os("RAYON_NUM_THREADS").is_some() { 0 } else { 1 };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run);
}
