//! Plain loops, compiled once per instruction set, the best one picked when the program runs.

use fearless_simd::Level;

/// Runs an expression compiled for AVX-512, AVX2, NEON or the plain target, whichever the processor has.
///
/// The expression should be one call of an `#[inline(always)]` function whose loops run over slices: those loops are
/// then vectorised for each instruction set.
macro_rules! on_best_simd {
    ($call:expr) => {
        fearless_simd::dispatch!($crate::ops::simd::level(), _ => $call)
    };
}
pub(crate) use on_best_simd;

/// The instruction set that this program uses: the best that the processor has.
pub(crate) fn level() -> Level {
    Level::new()
}
