//! What the machine can do: the matrix product, fused multiply-adds in registers, memory; and measuring next to these.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use fearless_simd::{Level, Simd, SimdBase, SimdFloat, dispatch};
use rayon::prelude::*;

use crate::bandwidth::Memory;
use crate::statistics::median;

/// Side of the matrices whose product is the yardstick.
const SIDE: usize = 2048;
/// Short tasks are repeated for as long, seconds.
const SHORTEST: f64 = 0.05;
/// A round that takes longer needs no other before it, seconds.
const LONG: f64 = 10.0;

/// The yardsticks on a number of threads.
pub struct Machine {
    threads: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    pub memory: Memory,
}

impl Machine {
    /// On the threads of the current pool.
    pub fn new(threads: usize) -> Self {
        let matrix = |step: usize| (0..SIDE * SIDE).map(|i| ((i * step) % 31) as f32 / 31.0 - 0.5).collect();
        Machine { threads, a: matrix(7), b: matrix(11), memory: Memory::new(threads) }
    }

    pub fn threads(&self) -> usize {
        self.threads
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

    /// Runs `task`, `operations` large, and the product in turn.
    pub fn pairs(&self, pairs: Rounds, operations: f64, task: &mut dyn FnMut()) -> Measured {
        let [measured] = rounds(pairs, || self.product(), [Task { amount: operations, run: task }]);
        measured
    }
}

/// How often a task and its yardstick are measured.
#[derive(Debug, Clone, Copy)]
pub enum Rounds {
    Exactly(usize),
    /// 15, but not beyond what is affordable: of tasks that take long, at least 5, of those that take very long 3.
    Affordable,
}

impl Rounds {
    const MOST: usize = 15;
    const FEW: usize = 5;
    const LEAST: usize = 3;
    /// Seconds that 15 rounds of a measurement may take, and that 5 may.
    const BUDGET: f64 = 3.0;
    const LONG_BUDGET: f64 = 30.0;

    fn goes_on(self, done: usize, seconds: f64) -> bool {
        match self {
            Rounds::Exactly(n) => done < n,
            Rounds::Affordable if seconds < Self::BUDGET => done < Self::MOST,
            Rounds::Affordable if seconds < Self::LONG_BUDGET => done < Self::FEW,
            Rounds::Affordable => done < Self::LEAST,
        }
    }
}

/// Something to be timed.
pub struct Task<'a> {
    /// How much it does: operations, or bytes.
    pub amount: f64,
    pub run: &'a mut dyn FnMut(),
}

/// Runs the tasks in turn, each right after a measurement of the speed that it is compared with.
pub fn rounds<const N: usize>(n: Rounds, yardstick: impl Fn() -> f64, tasks: [Task<'_>; N]) -> [Measured; N] {
    rounds_against(n, [&yardstick as &dyn Fn() -> f64; N], tasks)
}

/// [`rounds`] with a yardstick for each task.
pub fn rounds_against<const N: usize>(
    n: Rounds,
    yardsticks: [&dyn Fn() -> f64; N],
    mut tasks: [Task<'_>; N],
) -> [Measured; N] {
    let mut measured = std::array::from_fn(|_| Measured::default());
    let (mut done, mut begun) = (0, Instant::now());
    let mut first = true;
    while n.goes_on(done, begun.elapsed().as_secs_f64()) {
        for ((task, yardstick), measured) in tasks.iter_mut().zip(yardsticks).zip(&mut measured) {
            task.measure(yardstick(), measured);
        }
        // In the first round buffers come to life and caches fill. In a long one that is nothing.
        if std::mem::take(&mut first) && begun.elapsed().as_secs_f64() < LONG {
            measured = std::array::from_fn(|_| Measured::default());
            begun = Instant::now();
        } else {
            done += 1;
        }
    }
    measured
}

impl Task<'_> {
    fn measure(&mut self, yardstick: f64, measured: &mut Measured) {
        let begun = Instant::now();
        let mut calls = 0;
        while calls == 0 || begun.elapsed().as_secs_f64() < SHORTEST {
            (self.run)();
            calls += 1;
        }
        let one = begun.elapsed().as_secs_f64() / f64::from(calls);
        measured.seconds.push(one);
        measured.ratios.push(self.amount / one / yardstick);
    }
}

/// A task's rounds.
#[derive(Default)]
pub struct Measured {
    seconds: Vec<f64>,
    ratios: Vec<f64>,
}

impl Measured {
    /// Of one call, median.
    pub fn seconds(&self) -> f64 {
        median(self.seconds.iter().copied())
    }

    /// Its speed over the yardstick's: median over rounds.
    pub fn ratio(&self) -> f64 {
        median(self.ratios.iter().copied())
    }

    /// Its ratio over that of another task of the same rounds: median over rounds.
    pub fn ratio_over(&self, other: &Self) -> f64 {
        median(self.ratios.iter().zip(&other.ratios).map(|(mine, other)| mine / other))
    }

    /// How many times as long it takes as another task of the same rounds: median over rounds.
    pub fn over(&self, other: &Self) -> f64 {
        median(self.seconds.iter().zip(&other.seconds).map(|(mine, other)| mine / other))
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_five = |measure: &dyn Fn() -> f64| median((0..5).map(|_| measure())) / 1e9;
        let level = format!("{:?}", level());
        write!(
            f,
            "{}: product {:.0} GFLOP/s, multiply-adds in registers {:.0} GFLOP/s; memory ({}): reading {:.1} GB/s, copying \
             {:.1} GB/s",
            level.split('(').next().unwrap_or(&level),
            of_five(&|| self.product()),
            multiply_adds(self.threads) / 1e9,
            self.memory,
            of_five(&|| self.memory.read()),
            of_five(&|| self.memory.copy()),
        )
    }
}

/// The instruction set that the crate uses, which `TRANSFORMER_VQ_SIMD` may have made a lesser one.
fn level() -> Level {
    let best = Level::new();
    match std::env::var("TRANSFORMER_VQ_SIMD").as_deref() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Ok("avx2") => best.as_avx2().map_or(best, Level::Avx2),
        Ok("plain") => Level::baseline(),
        _ => best,
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
        let sums = (0..threads).into_par_iter().map(|_| dispatch!(level(), simd => chains(simd, ROUNDS)));
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
