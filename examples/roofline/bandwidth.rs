//! How fast memory streams: one pass over more than the caches hold.

use std::fmt;
use std::fs;
use std::hint::black_box;
use std::time::Instant;

use fearless_simd::{Level, Simd, dispatch};
use rayon::prelude::*;

/// What is assumed where the system does not say how large its last cache is.
const USUAL_CACHE: usize = 32 << 20;

/// Numbers in memory, four times as many as the last cache holds.
pub struct Memory {
    threads: usize,
    words: Vec<u64>,
}

impl Memory {
    /// To be streamed by so many threads.
    pub fn new(threads: usize) -> Self {
        let len = beyond_caches() / size_of::<u64>();
        Memory { threads, words: (0..len as u64).collect() }
    }

    /// Bytes per second of one pass that reads.
    pub fn read(&self) -> f64 {
        let begun = Instant::now();
        let sums = self.words.par_chunks(self.part());
        let sum = sums.map(|words| dispatch!(Level::new(), simd => sum(simd, words)));
        black_box(sum.reduce(|| 0, u64::wrapping_add));
        size_of_val(&*self.words) as f64 / begun.elapsed().as_secs_f64()
    }

    /// Bytes per second, read and written, of one pass that copies into memory in use.
    pub fn copy(&self) -> f64 {
        let mut copy = vec![1; self.words.len()];
        let begun = Instant::now();
        let parts = copy.par_chunks_mut(self.part()).zip(self.words.par_chunks(self.part()));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        let seconds = begun.elapsed().as_secs_f64();
        black_box(copy);
        2.0 * size_of_val(&*self.words) as f64 / seconds
    }

    /// Words of each thread.
    fn part(&self) -> usize {
        self.words.len().div_ceil(self.threads)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", size_of_val(&*self.words) >> 20)
    }
}

/// Vectorised by the compiler, at the level that it is called at.
#[inline(always)]
fn sum<S: Simd>(_: S, words: &[u64]) -> u64 {
    words.iter().fold(0, |sum: u64, &word| sum.wrapping_add(word))
}

/// Bytes that no cache holds: four times the last level of the first processor, at most 1 GiB.
pub fn beyond_caches() -> usize {
    let level = |index: u32| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = fs::read_to_string(path).ok()?;
        Some(text.trim().strip_suffix('K')?.parse::<usize>().ok()? << 10)
    };
    let last = (0..8).filter_map(level).max().unwrap_or(USUAL_CACHE);
    (4 * last).clamp(USUAL_CACHE, 1 << 30)
}
