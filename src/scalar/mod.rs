//! The element type of every array: `f32` to work with, `f64` to check gradients with.

use ndarray::NdFloat;

mod exp;

mod sealed {
    use fearless_simd::{Simd, SimdFloat, SimdFloatElement};

    use super::exp::Constants;

    pub trait Sealed: SimdFloatElement + 'static {
        /// As many of these numbers as a register holds.
        type Vector<S: Simd>: SimdFloat<S, Element = Self>;
        /// What the exponential is made of.
        const EXP: Constants<Self>;
        /// The number whose exponent is in the low bits of this one.
        fn power_of_two(self) -> Self;
        /// A number that stands for a code among others of its kind, not to be counted with.
        fn from_code(code: u32) -> Self;
        /// The code that a number stands for.
        fn code(self) -> u32;
    }
    impl Sealed for f32 {
        type Vector<S: Simd> = S::f32s;
        const EXP: Constants<f32> = super::exp::F32;

        #[inline(always)]
        fn power_of_two(self) -> Self {
            f32::from_bits(self.to_bits() << Self::EXP.mantissa_bits)
        }

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
        const EXP: Constants<f64> = super::exp::F64;

        #[inline(always)]
        fn power_of_two(self) -> Self {
            f64::from_bits(self.to_bits() << Self::EXP.mantissa_bits)
        }

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
    #[inline(always)]
    fn exp_fast(self, fused: bool) -> Self {
        exp::of_one(self, fused)
    }
}

impl Scalar for f32 {
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn as_f64(self) -> f64 {
        self.into()
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
}
