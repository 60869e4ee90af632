//! Loops compiled once per instruction set, the best one picked when the program runs; rows of lanes for them.

use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

use fearless_simd::{Level, Simd, SimdBase};

use super::aligned::Aligned;
use crate::Scalar;

/// Runs an expression compiled for AVX-512, AVX2, NEON or the plain target, whichever the processor has.
///
/// The expression should be one call of an `#[inline(always)]` function whose loops run over slices: those loops are
/// then vectorised for each instruction set. `on_best_simd!(simd => f(simd, ...))` hands the function what it was compiled for.
macro_rules! on_best_simd {
    ($simd:ident => $call:expr) => {
        fearless_simd::dispatch!($crate::ops::simd::level(), $simd => $call)
    };
    ($call:expr) => {
        fearless_simd::dispatch!($crate::ops::simd::level(), _ => $call)
    };
}
pub(crate) use on_best_simd;

/// [`on_best_simd`] in registers of at most 32 bytes, for passes that wait for memory: of the loads of an array that does not
/// begin on a cache line, every second lies on two lines instead of each, and a load that does costs two.
macro_rules! on_narrow_simd {
    ($simd:ident => $call:expr) => {
        fearless_simd::dispatch!($crate::ops::simd::narrow(), $simd => $call)
    };
}
pub(crate) use on_narrow_simd;

/// The instruction set that this program uses: the best that the processor has, or the lesser one that the environment
/// variable `TRANSFORMER_VQ_SIMD` names at the first call (`avx2`, `plain`), so that both can be tested and measured.
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let best = Level::new();
        match std::env::var("TRANSFORMER_VQ_SIMD").as_deref() {
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Ok("avx2") => best.as_avx2().map_or(best, Level::Avx2),
            Ok("plain") => Level::baseline(),
            _ => best,
        }
    })
}

/// [`level`], or AVX2 in place of AVX-512.
pub(crate) fn narrow() -> Level {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return level().as_avx2().map_or(level(), Level::Avx2);
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    level()
}

/// Every instruction set that this processor has, of those that the kernels are compiled for.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Level> {
    let best = Level::new();
    let mut levels = vec![Level::baseline()];
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    levels.extend(best.as_avx2().map(Level::Avx2));
    levels.push(best);
    levels
}

/// Whether a multiplication and an addition are one instruction.
#[inline(always)]
pub(crate) fn fused<S: Simd>(simd: S) -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return matches!(simd.level(), Level::Avx512(_) | Level::Avx2(_));
    #[cfg(target_arch = "aarch64")]
    return matches!(simd.level(), Level::Neon(_));
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    return {
        let _ = simd;
        false
    };
}

/// Whether a register holds 64 bytes: AVX-512, which other processors have no name for.
#[inline(always)]
pub(crate) fn wide_registers<S: Simd>(_: S) -> bool {
    S::f32s::LEN * size_of::<f32>() == 64
}

/// Whether there are 32 vector registers, not 16.
#[inline(always)]
pub(crate) fn many_registers<S: Simd>(simd: S) -> bool {
    wide_registers(simd) || cfg!(target_arch = "aarch64")
}

/// Numbers that a pass works on side by side: four registers of the widest kind.
pub(crate) const LANES: usize = 64;

/// A row of lanes.
pub(crate) type Row<T> = [T; LANES];

/// Rows of lanes, each of which begins on a cache line.
#[derive(Debug)]
pub(crate) struct Rows<T>(Aligned<T>);

impl<T: Scalar> Rows<T> {
    /// Rows of zeros.
    pub fn zeros(rows: usize) -> Self {
        Rows(Aligned::zeros(rows * LANES))
    }
}

impl<T> Deref for Rows<T> {
    type Target = [Row<T>];

    fn deref(&self) -> &[Row<T>] {
        self.0.as_chunks().0
    }
}

impl<T> DerefMut for Rows<T> {
    fn deref_mut(&mut self) -> &mut [Row<T>] {
        self.0.as_chunks_mut().0
    }
}
