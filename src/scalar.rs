//! The element type of every array: `f32` to work with, `f64` to check gradients with.

use ndarray::NdFloat;

mod sealed {
    use fearless_simd::{Simd, SimdFloat, SimdFloatElement};

    pub trait Sealed: SimdFloatElement {
        /// As many of these numbers as a register holds.
        type Vector<S: Simd>: SimdFloat<S, Element = Self>;
        /// A number that stands for a code among others of its kind, not to be counted with.
        fn from_code(code: u32) -> Self;
        /// The code that a number stands for.
        fn code(self) -> u32;
    }
    impl Sealed for f32 {
        type Vector<S: Simd> = S::f32s;

        #[inline(always)]
        fn from_code(code: u32) -> Self {
            f32::from_bits(code)
        }

        #[inline(always)]
        fn code(self) -> u32 {
            self.to_bits()
        }
    }
    impl Sealed for f64 {
        type Vector<S: Simd> = S::f64s;

        #[inline(always)]
        fn from_code(code: u32) -> Self {
            f64::from_bits(code.into())
        }

        #[inline(always)]
        fn code(self) -> u32 {
            self.to_bits() as u32
        }
    }
}

/// `f32` or `f64`. Sealed: kernels may specialise on the two.
///
/// `f32` is what models train and run in. `f64` exists so that a gradient can be checked against finite differences to
/// 1e-8 and better; in `f32` such a check cannot see below 5e-5.
pub trait Scalar:
    NdFloat + Default + std::iter::Sum + Unpin + std::panic::UnwindSafe + sealed::Sealed
{
    /// The nearest number of this type.
    fn from_f64(x: f64) -> Self;
    /// This number, exactly.
    fn as_f64(self) -> f64;
    /// `exp(x)`, built to be vectorised: no branches, no table. `fused` says that the code is compiled for a processor
    /// that multiplies and adds in one instruction; without one, such an operation would be a library call.
    ///
    /// Relative error at most 1.5e-7 (`f32`) and 5e-16 (`f64`) for `x` in [-87, 88] and [-708, 709]; below, 0 or the smallest
    /// normal numbers; above, infinity or the largest finite ones; NaN stays NaN.
    fn exp_fast(self, fused: bool) -> Self;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and r = x - n ln 2, |r| <= ln 2 / 2; exp(r) is its Taylor polynomial,
// cut where the next term is below the rounding of the sum. ln 2 is split in a part with trailing zeros, so that n times
// it is exact, and a rest. Adding and subtracting 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low bits.
// The clamps lie where 2^n, put together from the bits of n, is 0 on one side and infinity on the other.

impl Scalar for f32 {
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn as_f64(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn exp_fast(self, fused: bool) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
        const LN2_HIGH: f32 = 0.693_359_4; // 355 / 512
        const LN2_LOW: f32 = -2.121_944_4e-4; // ln 2 - 355 / 512
        let add = |a: f32, b: f32, c: f32| if fused { a.mul_add(b, c) } else { a * b + c };
        let x = if self < -88.0 { -88.0 } else { self };
        let x = if x > 89.0 { 89.0 } else { x };
        let shifted = add(x, std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = add(n, -LN2_LOW, add(n, -LN2_HIGH, x));
        let p = 1.0 / 5040.0;
        let p = add(p, r, 1.0 / 720.0);
        let p = add(p, r, 1.0 / 120.0);
        let p = add(p, r, 1.0 / 24.0);
        let p = add(p, r, 1.0 / 6.0);
        let p = add(p, r, 0.5);
        let p = add(p * r, r, r) + 1.0;
        p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
    }
}

impl Scalar for f64 {
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn exp_fast(self, fused: bool) -> Self {
        const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
        const LN2_HIGH: f64 = 0.693_147_180_559_208_2; // ln 2 cut to 40 bits
        const LN2_LOW: f64 = 7.371_002_565_167_799e-13; // ln 2 minus that
        let add = |a: f64, b: f64, c: f64| if fused { a.mul_add(b, c) } else { a * b + c };
        let x = if self < -709.0 { -709.0 } else { self };
        let x = if x > 710.0 { 710.0 } else { x };
        let shifted = add(x, std::f64::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = add(n, -LN2_LOW, add(n, -LN2_HIGH, x));
        let p = 1.0 / 6_227_020_800.0; // 1 / 13!
        let p = add(p, r, 1.0 / 479_001_600.0);
        let p = add(p, r, 1.0 / 39_916_800.0);
        let p = add(p, r, 1.0 / 3_628_800.0);
        let p = add(p, r, 1.0 / 362_880.0);
        let p = add(p, r, 1.0 / 40_320.0);
        let p = add(p, r, 1.0 / 5040.0);
        let p = add(p, r, 1.0 / 720.0);
        let p = add(p, r, 1.0 / 120.0);
        let p = add(p, r, 1.0 / 24.0);
        let p = add(p, r, 1.0 / 6.0);
        let p = add(p, r, 0.5);
        let p = add(p * r, r, r) + 1.0;
        p * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_fast_keeps_its_stated_bound() {
        let points = || (0..=1_000_000).map(|i| f64::from(i) / 1e6);
        for fused in [false, true] {
            let worst = points().fold(0.0, |worst: f64, t| {
                let x = (-87.0 + 175.0 * t) as f32;
                worst.max((f64::from(x.exp_fast(fused)) / f64::from(x).exp() - 1.0).abs())
            });
            assert!(worst < 1.5e-7, "f32: {worst:e}");
            let worst = points().fold(0.0, |worst: f64, t| {
                let x = -708.0 + 1417.0 * t;
                worst.max((x.exp_fast(fused) / x.exp() - 1.0).abs())
            });
            assert!(worst < 5e-16, "f64: {worst:e}");
        }
    }

    #[test]
    fn exp_fast_beyond_its_range() {
        for fused in [false, true] {
            assert_eq!(f32::NEG_INFINITY.exp_fast(fused), 0.0);
            assert_eq!((-88f32).exp_fast(fused), 0.0);
            assert!((0.0..1.3e-38).contains(&(-87.5f32).exp_fast(fused)));
            assert!(88.5f32.exp_fast(fused) >= 2e38);
            assert_eq!(f32::INFINITY.exp_fast(fused), f32::INFINITY);
            assert!(f32::NAN.exp_fast(fused).is_nan());
            assert_eq!(0f32.exp_fast(fused), 1.0);
            assert_eq!(f64::NEG_INFINITY.exp_fast(fused), 0.0);
            assert_eq!((-709f64).exp_fast(fused), 0.0);
            assert!(709.5f64.exp_fast(fused) >= 1e308);
            assert_eq!(f64::INFINITY.exp_fast(fused), f64::INFINITY);
            assert!(f64::NAN.exp_fast(fused).is_nan());
            assert_eq!(0f64.exp_fast(fused), 1.0);
        }
    }
}
