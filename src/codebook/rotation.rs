//! The rotation trick: a gradient that keeps its angle to the vector it belongs to.
//!
//! A quantized key is its key, turned into the codeword's direction and stretched to the codeword's length. The turn and
//! the stretch are taken as constants, so the gradient of the quantized key, turned back and stretched, is that of the key:
//!
//! ```text
//! (1)  u = k / |k|,   c~ = c / |c|,   lambda = |c| / |k|
//! (2)  t = (u + c~) / |u + c~|,   R = I - 2 t t^T + 2 c~ u^T            a rotation: R u = c~, the rest stays
//! (3)  k^ = lambda R k = c
//! (4)  a = u . g,   b = c~ . g,   s = |u + c~|^2,   r = 2 (a + b) / s
//!      d_k = lambda R^T g = lambda (g + (2 b - r) u - r c~)              variant `Paper`
//! (5)  d_k = lambda (I - u u^T) R^T g = lambda (g + (b - r) u - r c~)    variant `Normalized`
//! ```
//!
//! Five sums and one pass of three terms per key; no matrix. s is a sum of squares: as 2 (1 + u . c~) it would lose its
//! digits where key and codeword are nearly opposite. Where (2) has no answer:
//! - K = 1, a zero vector, or one whose square leaves the range of the type: straight-through, d_k = g.
//! - s < 1e-6 (opposite but for a thousandth of a radian): R is the reflection I - 2 u u^T, which maps u to -u too.
//!
//! |d_k| = lambda |g| in (4). lambda is large where keys are short beside their codewords: [`RotationScale`] bounds it.
//!
//! Cost: 12 N K, one pass over keys and gradients. Source: Fifty et al., "Restructuring Vector Quantization with the
//! Rotation Trick" (arXiv 2410.06424).

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use super::estimator::contiguous_rows;
use crate::Scalar;
use crate::error::Error;
use crate::ops::simd::on_best_simd;

/// Below this s a rotation gives way to a reflection.
const LEAST_SQUARE: f64 = 1e-6;

/// Which rotation trick.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(
    feature = "model",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, rename_all = "snake_case")
)]
pub struct Rotation {
    /// What is constant.
    pub variant: RotationVariant,
    /// What becomes of lambda.
    pub scale: RotationScale,
}

/// The two rotation tricks that the authors have published; they are different estimators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "model",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, rename_all = "snake_case")
)]
pub enum RotationVariant {
    /// lambda and R are constants, as the paper has it (its table 1, and `vector-quantize-pytorch`).
    #[default]
    Paper,
    /// `|c| R (k / |k|)` with |c| and R constant but not |k|: what the key's length would feel is left out (the paper's
    /// tables 3 and 4: VQGAN and ViT-VQGAN).
    Normalized,
}

/// The length of the gradient that the rotation trick returns, in lengths of the one it gets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(
    feature = "model",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, rename_all = "snake_case")
)]
pub enum RotationScale {
    /// lambda = |c| / |k|.
    #[default]
    Ratio,
    /// lambda = |c| / |k|, but at most this.
    AtMost(f64),
    /// lambda = 1: the gradient is turned only.
    One,
}

impl RotationScale {
    pub(super) fn validate(self) -> Result<(), Error> {
        match self {
            RotationScale::AtMost(most) if !(most.is_finite() && most > 0.0) => {
                Err(Error::invalid("scale", "finite and above 0", most))
            }
            _ => Ok(()),
        }
    }
}

/// (4) or (5) in place: `d` comes as g and leaves as d_k.
///
/// # Shapes
/// `keys` [N, K], `codes` `[N]`, `codewords` [S, K], `d` [N, K], of any strides.
pub(super) fn backward<T: Scalar>(
    rotation: Rotation,
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    d: ArrayViewMut2<'_, T>,
) {
    contiguous_rows(keys, codewords, d, |keys, codewords, d| {
        on_best_simd!(rotate_rows(Constants::new(rotation), keys, codes, codewords, d));
    });
}

/// A [`Rotation`] in numbers of one type.
#[derive(Debug, Clone, Copy)]
struct Constants<T> {
    /// What u gets of b: 2 in (4), 1 in (5).
    radial: T,
    /// lambda = min(most, |c| / |k|), or 1.
    most: T,
    stretch: bool,
    least_square: T,
    /// Smaller squares lose digits to underflow.
    least: T,
}

impl<T: Scalar> Constants<T> {
    fn new(rotation: Rotation) -> Self {
        let (one, two) = (T::one(), T::one() + T::one());
        Constants {
            radial: if rotation.variant == RotationVariant::Paper { two } else { one },
            most: match rotation.scale {
                RotationScale::AtMost(most) => T::from_f64(most),
                RotationScale::Ratio | RotationScale::One => T::infinity(),
            },
            stretch: rotation.scale != RotationScale::One,
            least_square: T::from_f64(LEAST_SQUARE),
            least: T::min_positive_value() / T::epsilon(),
        }
    }
}

#[inline(always)]
fn rotate_rows<T: Scalar>(
    constants: Constants<T>,
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    mut d: ArrayViewMut2<'_, T>,
) {
    for ((key, &code), mut d) in keys.outer_iter().zip(codes).zip(d.outer_iter_mut()) {
        let codeword = codewords.row(code as usize);
        let (key, codeword) = (key.to_slice().expect("contiguous"), codeword.to_slice().expect("contiguous"));
        rotate(constants, key, codeword, d.as_slice_mut().expect("contiguous"));
    }
}

/// One key.
#[inline(always)]
fn rotate<T: Scalar>(constants: Constants<T>, key: &[T], codeword: &[T], d: &mut [T]) {
    let [kk, cc, kg, cg] = dots(key, codeword, d);
    let in_range = constants.least <= kk && constants.least <= cc && (kk + cc + kg + cg).is_finite();
    if key.len() <= 1 || !in_range {
        return;
    }
    // (1)
    let (to_unit, to_direction) = (kk.sqrt().recip(), cc.sqrt().recip());
    let ratio = cc.sqrt() * to_unit;
    let ratio = if ratio > constants.most { constants.most } else { ratio };
    let lambda = if constants.stretch { ratio } else { T::one() };
    // (4)
    let (a, b) = (kg * to_unit, cg * to_direction);
    let s = square_of_sum(key, to_unit, codeword, to_direction);
    let (along_key, along_codeword) = if s < constants.least_square {
        (-constants.radial * a, T::zero())
    } else {
        let r = (a + b + a + b) / s;
        (constants.radial * b - r, -r)
    };
    let (along_key, along_codeword) = (along_key * to_unit, along_codeword * to_direction);
    for ((d, &k), &c) in d.iter_mut().zip(key).zip(codeword) {
        *d = lambda * (*d + along_key * k + along_codeword * c);
    }
}

/// Partial results per lane: sums of floating-point numbers cannot be reordered, a vector register needs them apart.
const LANES: usize = 16;

/// k . k, c . c, k . g and c . g.
#[inline(always)]
fn dots<T: Scalar>(k: &[T], c: &[T], g: &[T]) -> [T; 4] {
    let (k, k_rest) = k.as_chunks::<LANES>();
    let (c, c_rest) = c.as_chunks::<LANES>();
    let (g, g_rest) = g.as_chunks::<LANES>();
    let mut sums = [[T::zero(); LANES]; 4];
    for ((k, c), g) in k.iter().zip(c).zip(g) {
        for i in 0..LANES {
            sums[0][i] += k[i] * k[i];
            sums[1][i] += c[i] * c[i];
            sums[2][i] += k[i] * g[i];
            sums[3][i] += c[i] * g[i];
        }
    }
    for (i, ((&k, &c), &g)) in k_rest.iter().zip(c_rest).zip(g_rest).enumerate() {
        sums[0][i] += k * k;
        sums[1][i] += c * c;
        sums[2][i] += k * g;
        sums[3][i] += c * g;
    }
    sums.map(sum_of_lanes)
}

/// The sum of `(x k_i + y c_i)^2`: s of (4).
#[inline(always)]
fn square_of_sum<T: Scalar>(k: &[T], x: T, c: &[T], y: T) -> T {
    let ((k, k_rest), (c, c_rest)) = (k.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let mut sums = [T::zero(); LANES];
    for (k, c) in k.iter().zip(c) {
        for i in 0..LANES {
            let e = x * k[i] + y * c[i];
            sums[i] += e * e;
        }
    }
    for ((sum, &k), &c) in sums.iter_mut().zip(k_rest).zip(c_rest) {
        let e = x * k + y * c;
        *sum += e * e;
    }
    sum_of_lanes(sums)
}

/// The sum of the lanes, by halves.
#[inline(always)]
fn sum_of_lanes<T: Scalar>(mut lanes: [T; LANES]) -> T {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}
