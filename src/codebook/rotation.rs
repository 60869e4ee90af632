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
//! Five sums and one pass of three terms per key; no matrix. s = 2 (1 + u . c~), which loses its digits where key and codeword
//! are nearly opposite: below 1 it is summed up as the squares that it is. Where (2) has no answer:
//! - K = 1, a zero vector, or one whose square leaves the range of the type: straight-through, d_k = g.
//! - s < 1e-6 (opposite but for a thousandth of a radian): R is the reflection I - 2 u u^T, which maps u to -u too.
//!
//! |d_k| = lambda |g| in (4). lambda is large where keys are short beside their codewords: [`RotationScale`] bounds it.
//!
//! Cost: 12 N K, one pass over keys and gradients. Source: Fifty et al., "Restructuring Vector Quantization with the
//! Rotation Trick" (arXiv 2410.06424).

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2, s};

use super::rotation_rows::{Constants, Rows, rotate};
use crate::Scalar;
use crate::error::Error;
use crate::ops::rows::dot;
use crate::ops::simd::on_narrow_simd;

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
    /// `d_k = lambda R^T g`, R the rotation that turns k into the direction of c: both are constants, as the paper has it (its
    /// table 1, and `vector-quantize-pytorch`).
    #[default]
    Paper,
    /// `d_k = lambda (I - u u^T) R^T g`, u = k / |k|: the gradient of `|c| R (k / |k|)` with |c| and R constant but not |k|, so
    /// that what the key's length would feel is left out (the paper's tables 3 and 4: VQGAN and ViT-VQGAN).
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

/// (4) or (5) in place: `d` comes as g and leaves as d_k. `lengths` are those of the codewords: [`lengths`].
///
/// Returns false if a number of keys or gradients is not finite (or a sum of their squares and products overflows); its row
/// is then as it came. The answer costs no pass over memory.
///
/// # Shapes
/// `keys` [N, K], `codes` `[N]`, `codewords` [S, K], `lengths` `[S]`, `d` [N, K], of any strides.
pub(super) fn backward<T: Scalar>(
    rotation: Rotation,
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    lengths: &[(T, T)],
    mut d: ArrayViewMut2<'_, T>,
) -> bool {
    let (constants, codewords) = (Constants::new(rotation), codewords.as_standard_layout());
    let codewords = codewords.as_slice().expect("standard layout");
    let (n, width) = keys.dim();
    if width == 0 {
        return true;
    }
    if let (Some(keys), Some(codes), Some(d)) = (keys.as_slice(), codes.as_slice(), d.as_slice_mut()) {
        let rows = Rows { width, keys, codes, codewords, lengths };
        // Loops of known length are shorter: a tenth of the time.
        return match width {
            64 => on_narrow_simd!(simd => rotate(simd, constants, Rows { width: 64, ..rows }, d)),
            128 => on_narrow_simd!(simd => rotate(simd, constants, Rows { width: 128, ..rows }, d)),
            _ => on_narrow_simd!(simd => rotate(simd, constants, rows, d)),
        };
    }
    let mut finite = true;
    for start in (0..n).step_by(COPIED_ROWS) {
        let of = s![start..n.min(start + COPIED_ROWS), ..];
        let (keys, mut d) = (keys.slice(of), d.slice_mut(of));
        let (keys, mut copy) = (keys.as_standard_layout(), d.as_standard_layout().into_owned());
        let codes: Vec<u32> = codes.iter().skip(start).take(COPIED_ROWS).copied().collect();
        let keys = keys.as_slice().expect("standard layout");
        let rows = Rows { width, keys, codes: &codes, codewords, lengths };
        let in_order = copy.as_slice_mut().expect("standard layout");
        finite &= on_narrow_simd!(simd => rotate(simd, constants, rows, in_order));
        d.assign(&copy);
    }
    finite
}

/// |c| and 1 / |c| `[S]` of codewords [S, K].
pub(super) fn lengths<T: Scalar>(codewords: ArrayView2<'_, T>) -> Vec<(T, T)> {
    // The order of a sum must not depend on strides.
    let codewords = codewords.as_standard_layout();
    let mut lengths = Vec::with_capacity(codewords.nrows());
    on_narrow_simd!(_simd => push_lengths(codewords.view(), &mut lengths));
    lengths
}

#[inline(always)]
fn push_lengths<T: Scalar>(codewords: ArrayView2<'_, T>, lengths: &mut Vec<(T, T)>) {
    for codeword in codewords.outer_iter() {
        let codeword = codeword.to_slice().expect("standard layout");
        let length = dot(codeword, codeword).sqrt();
        lengths.push((length, length.recip()));
    }
}

/// Rows that are copied at once where they do not lie one after the other.
const COPIED_ROWS: usize = 64;
