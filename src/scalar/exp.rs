//! The exponential, without branches and without a table.
//!
//! ```text
//! (1)  exp(x) = 2^n exp(r)     n = round(x / ln 2)     r = x - n ln 2     |r| <= ln 2 / 2
//! (2)  exp(r) = 1 + r + r^2 (c_2 + c_3 r + ...)
//! ```
//!
//! n is found by adding and subtracting a number so large that its last bit counts ones: the sum is rounded to an integer. That
//! number is the bias of exponents above a multiple of two to the power of their bits, so the low bits of the sum are the
//! exponent of 2^n. ln 2 is split in a part with trailing zeros, so that n times it is exact, and a rest. The clamps lie where
//! 2^n, put together from the bits of n, is 0 on one side and infinity on the other.

use super::Scalar;

/// What (1) and (2) need of a type.
#[derive(Debug)]
pub struct Constants<T: 'static> {
    pub lowest: T,
    pub highest: T,
    pub log2_e: T,
    pub round: T,
    pub ln2_high: T,
    pub ln2_low: T,
    /// c_2, c_3, ...
    pub coefficients: &'static [T],
    /// Bits behind the exponent.
    pub mantissa_bits: u32,
}

pub(super) const F32: Constants<f32> = Constants {
    lowest: -88.0,
    highest: 89.0,
    log2_e: std::f32::consts::LOG2_E,
    round: 12_583_039.0,      // 1.5 * 2^23 + 127
    ln2_high: 0.693_359_4,    // 355 / 512
    ln2_low: -2.121_944_4e-4, // ln 2 - 355 / 512
    // The least largest relative error of exp(r) on the interval, 3.6e-9, which Remez's exchange finds.
    coefficients: &[0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454],
    mantissa_bits: 23,
};

pub(super) const F64: Constants<f64> = Constants {
    lowest: -709.0,
    highest: 710.0,
    log2_e: std::f64::consts::LOG2_E,
    round: 6_755_399_441_056_767.0,     // 1.5 * 2^52 + 1023
    ln2_high: 0.693_147_180_559_208_2,  // ln 2 cut to 40 bits
    ln2_low: 7.371_002_565_167_799e-13, // ln 2 minus that
    // Taylor's, cut where the next term is below the rounding of the sum.
    coefficients: &[
        1.0 / 2.0,
        1.0 / 6.0,
        1.0 / 24.0,
        1.0 / 120.0,
        1.0 / 720.0,
        1.0 / 5040.0,
        1.0 / 40_320.0,
        1.0 / 362_880.0,
        1.0 / 3_628_800.0,
        1.0 / 39_916_800.0,
        1.0 / 479_001_600.0,
        1.0 / 6_227_020_800.0,
    ],
    mantissa_bits: 52,
};

/// [`Scalar::exp_fast`].
#[inline(always)]
pub(super) fn of_one<T: Scalar>(x: T, fused: bool) -> T {
    let c = &T::EXP;
    let add = |a: T, b: T, c: T| if fused { a.mul_add(b, c) } else { a * b + c };
    let x = if x < c.lowest { c.lowest } else { x };
    let x = if x > c.highest { c.highest } else { x };
    let shifted = add(x, c.log2_e, c.round);
    let n = shifted - c.round;
    let r = add(n, -c.ln2_low, add(n, -c.ln2_high, x)); // (1)
    let (&last, others) = c.coefficients.split_last().expect("a few");
    let p = others.iter().rev().fold(last, |p, &c| add(p, r, c));
    let p = add(p * r, r, r) + T::one(); // (2)
    p * shifted.power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_its_stated_bound() {
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
    fn beyond_its_range() {
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
