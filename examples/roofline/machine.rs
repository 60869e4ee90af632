//! What the machine can do: the matrix product, fused multiply-adds in registers, memory.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use fearless_simd::{Level, Simd, SimdBase, SimdFloat, dispatch};
use rayon::prelude::*;

/// Side of the matrices whose product is the yardstick.
const SIDE: usize = 2048;

/// The yardsticks on a number of threads.
pub struct Machine {
    threads: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    peak: f64,
}

impl Machine {
    /// On the threads of the current pool.
    pub fn new(threads: usize) -> Self {
        let matrix = |step: usize| (0..SIDE * SIDE).map(|i| ((i * step) % 31) as f32 / 31.0 - 0.5).collect();
        Machine { threads, a: matrix(7), b: matrix(11), peak: multiply_adds(threads) }
    }

    /// Operations per second of one product just now.
    pub fn product(&self) -> f64 {
        let mut c = vec![0.0f32; SIDE * SIDE];
        let rows = SIDE.div_ceil(self.threads);
        let begun = Instant::now();
        c.par_chunks_mut(rows * SIDE)
            .zip(self.a.par_chunks(rows * SIDE))
            .for_each(|(c, a)| product(a, &self.b, c));
        let seconds = begun.elapsed().as_secs_f64();
        black_box(c);
        2.0 * (SIDE as f64).powi(3) / seconds
    }

    /// Runs `task`, `operations` large, and the product in turn, `pairs` times: medians of seconds and of the ratio of speeds.
    pub fn pairs(&self, pairs: usize, operations: f64, mut task: impl FnMut()) -> Measured {
        task(); // warms buffers
        let mut seconds = vec![];
        let mut ratios = vec![];
        for _ in 0..pairs {
            let product = self.product();
            let begun = Instant::now();
            let mut n = 0;
            // Short tasks are repeated for as long as the product takes.
            while n == 0 || begun.elapsed().as_secs_f64() < 0.1 {
                task();
                n += 1;
            }
            let one = begun.elapsed().as_secs_f64() / f64::from(n);
            seconds.push(one);
            ratios.push(operations / one / product);
        }
        Measured { seconds: median(&mut seconds), ratio: median(&mut ratios) }
    }
}

/// Medians over pairs.
pub struct Measured {
    pub seconds: f64,
    pub ratio: f64,
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut products: Vec<f64> = (0..5).map(|_| self.product()).collect();
        write!(
            f,
            "{:?}: product {:.0} GFLOP/s, multiply-adds in registers {:.0} GFLOP/s",
            Level::new(),
            median(&mut products) / 1e9,
            self.peak / 1e9
        )
    }
}

/// C <- A B, B square.
fn product(a: &[f32], b: &[f32], c: &mut [f32]) {
    let (m, n) = (a.len() / SIDE, SIDE as isize);
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    // SAFETY: a and c hold m rows of SIDE numbers, b holds SIDE rows, and c is borrowed mutably.
    unsafe {
        let none = gemm::Parallelism::None;
        gemm::gemm(m, SIDE, SIDE, c, 1, n, false, a, 1, n, b, 1, n, 0.0, 1.0, false, false, false, none);
    }
}

/// Operations per second of multiply-adds that stay in registers, on all threads together, the best of five.
fn multiply_adds(threads: usize) -> f64 {
    const ROUNDS: usize = 1 << 22;
    let run = || {
        let begun = Instant::now();
        let sums =
            (0..threads).into_par_iter().map(|_| dispatch!(Level::new(), simd => chains(simd, ROUNDS)));
        let operations: usize = sums.sum();
        operations as f64 / begun.elapsed().as_secs_f64()
    };
    (0..5).map(|_| run()).fold(0.0, f64::max)
}

/// Ten independent chains of multiply-adds; returns how many operations that were.
#[inline(always)]
fn chains<S: Simd>(simd: S, rounds: usize) -> usize {
    let splat = |x: f32| S::f32s::splat(simd, black_box(x));
    let (factor, term) = (splat(0.999), splat(0.001));
    let mut sums = [splat(0.5); 10];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(factor, term);
        }
    }
    black_box(sums);
    2 * rounds * sums.len() * S::f32s::LEN
}
