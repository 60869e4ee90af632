//! Directional reparameterisation: key and codeword share the gradient between them.
//!
//! The quantized key is its key, moved towards the codeword by the distance between the two; the direction is taken as a
//! constant, the distance is not:
//!
//! ```text
//! (1)  e = c - k,   t = sg(e / |e|),   k^ = k + t |c - k|  ( = c )
//! (2)  d_k = g - t (t . g)
//! (3)  d_c += t (t . g)
//! ```
//!
//! What pushes the quantized key along t is the codeword's, the rest is the key's; the two add up to g. A key on its
//! codeword (or so near or so far that |e|^2 leaves the range of the type) keeps all of g.
//!
//! Cost: 5 N K each. Source: DiVeQ (Vali et al., 2025), without its noise: t is exact.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use super::estimator::contiguous_rows;
use crate::Scalar;
use crate::ops::rows::dot;
use crate::ops::simd::on_best_simd;

/// (2) in place: `d` comes as g and leaves as d_k.
///
/// # Shapes
/// `keys` [N, K], `codes` `[N]`, `codewords` [S, K], `d` [N, K], of any strides.
pub(super) fn backward<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    d: ArrayViewMut2<'_, T>,
) {
    contiguous_rows(keys, codewords, d, |keys, codewords, d| {
        on_best_simd!(subtract_shares(keys, codes, codewords, d));
    });
}

#[inline(always)]
fn subtract_shares<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    mut d: ArrayViewMut2<'_, T>,
) {
    let mut e = vec![T::zero(); keys.ncols()];
    for ((key, &code), mut d) in keys.outer_iter().zip(codes).zip(d.outer_iter_mut()) {
        let codeword = codewords.row(code as usize);
        let (key, codeword) = (key.to_slice().expect("contiguous"), codeword.to_slice().expect("contiguous"));
        let d = d.as_slice_mut().expect("contiguous");
        let share = share(key, codeword, d, &mut e);
        for (d, &e) in d.iter_mut().zip(&e) {
            *d -= share * e;
        }
    }
}

/// (3).
///
/// # Shapes
/// As [`backward`]; `d_codewords` [S, K].
pub(super) fn add_codeword_gradient<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    d: ArrayView2<'_, T>,
    mut d_codewords: ArrayViewMut2<'_, T>,
) {
    let (keys, codewords, d) =
        (keys.as_standard_layout(), codewords.as_standard_layout(), d.as_standard_layout());
    let mut e = vec![T::zero(); keys.ncols()];
    for ((key, &code), d) in keys.outer_iter().zip(codes).zip(d.outer_iter()) {
        let codeword = codewords.row(code as usize);
        let [key, codeword, d] = [key, codeword, d].map(|row| row.to_slice().expect("standard layout"));
        let share = share(key, codeword, d, &mut e);
        let mut d_codeword = d_codewords.row_mut(code as usize);
        d_codeword.iter_mut().zip(&e).for_each(|(d, &e)| *d += share * e);
    }
}

/// `e`, and what it is multiplied by: t (t . g) = e (e . g) / |e|^2.
#[inline(always)]
fn share<T: Scalar>(key: &[T], codeword: &[T], g: &[T], e: &mut [T]) -> T {
    for ((e, &k), &c) in e.iter_mut().zip(key).zip(codeword) {
        *e = c - k;
    }
    let square = dot(e, e);
    let least = T::min_positive_value() / T::epsilon();
    if least <= square && square.is_finite() { dot(e, g) / square } else { T::zero() }
}
