//! The exponential of several vectors at once.
//!
//! The steps of one exponential wait for each other, some sixty cycles in all, while instructions of the next stand too far
//! behind in the processor's queues to begin. Where vectors take each step side by side, they fill the time. Formulas stand
//! where those of one number do, in `scalar::exp`.

use fearless_simd::{Select, Simd, SimdBase, SimdFloat};

use super::simd::fused;
use crate::Scalar;

/// [`Scalar::exp_fast`] of N vectors, the same bits.
#[inline(always)]
pub(crate) fn exp<S: Simd, T: Scalar, const N: usize>(
    simd: S,
    mut x: [T::Vector<S>; N],
) -> [T::Vector<S>; N] {
    let c = &T::EXP;
    let [lowest, highest] = [c.lowest, c.highest].map(|x| T::Vector::<S>::splat(simd, x));
    let [log2_e, round] = [c.log2_e, c.round].map(|x| T::Vector::<S>::splat(simd, x));
    let ln2 = [-c.ln2_high, -c.ln2_low].map(|x| T::Vector::<S>::splat(simd, x));
    let mut shifted = x;
    for (x, shifted) in x.iter_mut().zip(&mut shifted) {
        *x = clamp(*x, lowest, highest);
        *shifted = x.mul_add(log2_e, round);
    }
    for part in ln2 {
        for (x, &shifted) in x.iter_mut().zip(&shifted) {
            *x = (shifted - round).mul_add(part, *x); // (1)
        }
    }
    let (&last, others) = c.coefficients.split_last().expect("a few");
    let mut p = [T::Vector::<S>::splat(simd, last); N];
    for &c in others.iter().rev() {
        let c = T::Vector::<S>::splat(simd, c);
        for (p, &r) in p.iter_mut().zip(&x) {
            *p = p.mul_add(r, c);
        }
    }
    let one = T::Vector::<S>::splat(simd, T::one());
    for ((p, &r), &shifted) in p.iter_mut().zip(&x).zip(&shifted) {
        *p = (*p * r).mul_add(r, r) + one; // (2)
        *p *= T::Vector::<S>::from_bits(shifted.to_bits() << c.mantissa_bits);
    }
    p
}

/// Vectors that loops take side by side: with them the queues are full, and they divide a row of lanes in every register size.
pub(crate) const TOGETHER: usize = 4;

/// `x <- exp(x - shift)`, the same bits wherever an element stands.
#[inline(always)]
pub(crate) fn exp_of_differences<S: Simd, T: Scalar>(simd: S, x: &mut [T], shift: T) {
    let lanes = T::Vector::<S>::LEN;
    let shifts = T::Vector::<S>::splat(simd, shift);
    let mut groups = x.chunks_exact_mut(TOGETHER * lanes);
    for group in &mut groups {
        let load = |j: usize| T::Vector::<S>::from_slice(simd, &group[j * lanes..][..lanes]) - shifts;
        let e = exp::<S, T, TOGETHER>(simd, std::array::from_fn(load));
        for (j, e) in e.iter().enumerate() {
            e.store_slice(&mut group[j * lanes..][..lanes]);
        }
    }
    for x in groups.into_remainder() {
        *x = (*x - shift).exp_fast(fused(simd));
    }
}

/// `x` between `low` and `high`, NaN where x is NaN.
#[inline(always)]
fn clamp<S: Simd, V: SimdFloat<S>>(x: V, low: V, high: V) -> V {
    // Where one operand is NaN, these processors return it or the second one; others may return the number.
    if cfg!(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")) {
        high.min(low.max(x))
    } else {
        let x = x.simd_lt(low).select(low, x);
        x.simd_gt(high).select(high, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::simd::levels;

    /// Numbers from `x` on: each by itself, as vectors, and as a slice that ends within a group of them.
    #[inline(always)]
    fn every_form<S: Simd, T: Scalar>(simd: S, x: T) -> [Vec<T>; 3] {
        const N: usize = 3;
        let lanes = T::Vector::<S>::LEN;
        let x: Vec<T> = (0..N * lanes).map(|i| x + T::from_f64(0.01 * i as f64)).collect();
        let vectors: [_; N] =
            std::array::from_fn(|i| T::Vector::<S>::from_slice(simd, &x[i * lanes..][..lanes]));
        let vectors = exp::<S, T, N>(simd, vectors).iter().flat_map(|e| e.as_slice().to_vec()).collect();
        let shift = T::from_f64(0.25);
        let mut slice: Vec<T> = x.iter().map(|&x| x + shift).chain(x.iter().map(|&x| x + shift)).collect();
        slice.pop();
        let one = |x: T| x.exp_fast(fused(simd));
        let of_slice: Vec<T> = slice.iter().map(|&x| one(x - shift)).collect();
        exp_of_differences(simd, &mut slice, shift);
        let differ = slice.iter().zip(of_slice).filter(|&(&a, b)| a != b && !(a.is_nan() && b.is_nan()));
        [x.into_iter().map(one).collect(), vectors, differ.map(|(&a, _)| a).collect()]
    }

    fn forms_have_the_same_bits<T: Scalar>() {
        let limits = [-1e9, -709.0, -88.0, -20.0, -0.4, 0.0, 3.0, 88.0, 709.0];
        for x in limits.into_iter().chain([f64::NEG_INFINITY, f64::INFINITY, f64::NAN]) {
            for level in levels() {
                let [one, vectors, differ] =
                    fearless_simd::dispatch!(level, simd => every_form::<_, T>(simd, T::from_f64(x)));
                for (a, b) in one.into_iter().zip(vectors) {
                    assert!(a == b || a.is_nan() && b.is_nan(), "{a} and {b} near {x} {level:?}");
                }
                assert!(differ.is_empty(), "near {x} {level:?}: {differ:?}");
            }
        }
    }

    #[test]
    fn vectors_and_slices_have_the_bits_of_one() {
        forms_have_the_same_bits::<f32>();
        forms_have_the_same_bits::<f64>();
    }
}
