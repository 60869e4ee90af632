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

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2, Axis};

use super::estimator::contiguous_rows;
use crate::Scalar;
use crate::error::Error;
use crate::ops::rows::{SUMS, sum_of_lanes};
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

/// (4) or (5) in place: `d` comes as g and leaves as d_k. `squares` are those of the codewords: [`squares`].
///
/// Returns false if a number of keys or gradients is not finite (or a sum of their squares and products overflows); its row
/// is then as it came. The answer costs no pass over memory.
///
/// # Shapes
/// `keys` [N, K], `codes` `[N]`, `codewords` [S, K], `squares` `[S]`, `d` [N, K], of any strides.
pub(super) fn backward<T: Scalar>(
    rotation: Rotation,
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    squares: &[T],
    d: ArrayViewMut2<'_, T>,
) -> bool {
    contiguous_rows(keys, codewords, d, |keys, codewords, d| {
        rotate_rows(Constants::new(rotation), keys, codes, codewords, squares, d)
    })
}

/// |c|^2 `[S]` of codewords [S, K].
pub(super) fn squares<T: Scalar>(codewords: ArrayView2<'_, T>) -> Vec<T> {
    // The order of a sum must not depend on strides.
    codewords.as_standard_layout().outer_iter().map(|c| c.dot(&c)).collect()
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

/// Rows that are treated together, step by step. The first step does little else than read from memory, many cache lines at
/// once; the later ones find the rows in the cache. Each is compiled by itself: one loop over all of it leaves the compiler
/// without registers, and its sums in memory.
const ROWS: usize = 32;

/// One number per row.
type PerRow<T> = [T; ROWS];

fn rotate_rows<T: Scalar>(
    constants: Constants<T>,
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    squares: &[T],
    mut d: ArrayViewMut2<'_, T>,
) -> bool {
    let (d_k, mut finite) = (keys.ncols(), true);
    let chunks = keys.axis_chunks_iter(Axis(0), ROWS).zip(codes.axis_chunks_iter(Axis(0), ROWS));
    for ((keys, codes), mut d) in chunks.zip(d.axis_chunks_iter_mut(Axis(0), ROWS)) {
        let mut sums = Sums::new();
        on_best_simd!(sums.of_keys(keys, d.view()));
        on_best_simd!(sums.of_codewords(keys, codes, codewords, squares, d.view()));
        let mut s = on_best_simd!(sums.square_of_sum());
        for (i, &code) in codes.iter().enumerate() {
            finite &= (sums.kk[i] + sums.kg[i]).is_finite();
            // Where little is left of 1 + u . c~, its digits are gone.
            if s[i] < T::one() {
                let (x, y) = (sums.kk[i].sqrt().recip(), sums.cc[i].sqrt().recip());
                s[i] = square_of_sum(row(keys, i), x, row(codewords, code as usize), y);
            }
        }
        let factors = on_best_simd!(sums.factors(constants, d_k, s));
        on_best_simd!(factors.apply(keys, codes, codewords, d.view_mut()));
    }
    finite
}

#[inline(always)]
fn row<'a, T: Scalar>(rows: ArrayView2<'a, T>, i: usize) -> &'a [T] {
    rows.index_axis_move(Axis(0), i).to_slice().expect("contiguous rows")
}

/// Sums over the elements of a key, a codeword and a gradient.
#[derive(Debug, Clone, Copy)]
struct Sums<T> {
    kk: PerRow<T>,
    cc: PerRow<T>,
    kc: PerRow<T>,
    kg: PerRow<T>,
    cg: PerRow<T>,
}

/// What rotates a row: `lambda (g + key k + codeword c)`.
#[derive(Debug, Clone, Copy)]
struct Factors<T> {
    lambda: PerRow<T>,
    key: PerRow<T>,
    codeword: PerRow<T>,
}

impl<T: Scalar> Sums<T> {
    /// Those of keys and codewords of length 1.
    fn new() -> Self {
        let (zeros, ones) = ([T::zero(); ROWS], [T::one(); ROWS]);
        Sums { kk: ones, cc: ones, kc: zeros, kg: zeros, cg: zeros }
    }

    #[inline(always)]
    fn of_keys(&mut self, keys: ArrayView2<'_, T>, d: ArrayView2<'_, T>) {
        for i in 0..keys.nrows() {
            let key = row(keys, i);
            (self.kk[i], self.kg[i]) = dots(key, key, row(d, i));
        }
    }

    #[inline(always)]
    fn of_codewords(
        &mut self,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        squares: &[T],
        d: ArrayView2<'_, T>,
    ) {
        for (i, &code) in codes.iter().enumerate() {
            self.cc[i] = squares[code as usize];
            (self.kc[i], self.cg[i]) = dots(row(codewords, code as usize), row(keys, i), row(d, i));
        }
    }

    /// s = 2 (1 + u . c~).
    #[inline(always)]
    fn square_of_sum(&self) -> PerRow<T> {
        let mut s = self.kc;
        for ((s, kk), cc) in s.iter_mut().zip(&self.kk).zip(&self.cc) {
            let cosine = *s / (kk.sqrt() * cc.sqrt());
            *s = T::one() + T::one() + cosine + cosine;
        }
        s
    }

    /// (4) or (5).
    #[inline(always)]
    fn factors(&self, constants: Constants<T>, d_k: usize, s: PerRow<T>) -> Factors<T> {
        let zeros = [T::zero(); ROWS];
        let mut factors = Factors { lambda: [T::one(); ROWS], key: zeros, codeword: zeros };
        for (i, s) in s.into_iter().enumerate() {
            let (kk, cc) = (self.kk[i], self.cc[i]);
            // (1)
            let (to_unit, to_direction) = (kk.sqrt().recip(), cc.sqrt().recip());
            let ratio = cc.sqrt() * to_unit;
            let ratio = if ratio > constants.most { constants.most } else { ratio };
            let lambda = if constants.stretch { ratio } else { T::one() };
            // (4)
            let (a, b) = (self.kg[i] * to_unit, self.cg[i] * to_direction);
            let r = (a + b + a + b) / s;
            let opposite = s < constants.least_square;
            let of_key = if opposite { -constants.radial * a } else { constants.radial * b - r };
            let of_codeword = if opposite { T::zero() } else { -r };
            let in_range = (d_k > 1)
                & (constants.least <= kk)
                & (constants.least <= cc)
                & (kk + cc + self.kg[i] + self.cg[i]).is_finite();
            factors.lambda[i] = if in_range { lambda } else { T::one() };
            factors.key[i] = if in_range { of_key * to_unit } else { T::zero() };
            factors.codeword[i] = if in_range { of_codeword * to_direction } else { T::zero() };
        }
        factors
    }
}

impl<T: Scalar> Factors<T> {
    #[inline(always)]
    fn apply(
        &self,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        mut d: ArrayViewMut2<'_, T>,
    ) {
        for (i, (&code, mut d)) in codes.iter().zip(d.outer_iter_mut()).enumerate() {
            let (lambda, of_key, of_codeword) = (self.lambda[i], self.key[i], self.codeword[i]);
            let (key, codeword) = (row(keys, i), row(codewords, code as usize));
            for ((d, &k), &c) in d.as_slice_mut().expect("contiguous rows").iter_mut().zip(key).zip(codeword)
            {
                *d = lambda * (*d + of_key * k + of_codeword * c);
            }
        }
    }
}

/// x . y and x . z.
#[inline(always)]
fn dots<T: Scalar>(x: &[T], y: &[T], z: &[T]) -> (T, T) {
    let (x, x_rest) = x.as_chunks::<SUMS>();
    let (y, y_rest) = y.as_chunks::<SUMS>();
    let (z, z_rest) = z.as_chunks::<SUMS>();
    let (mut xy, mut xz) = ([T::zero(); SUMS], [T::zero(); SUMS]);
    for ((x, y), z) in x.iter().zip(y).zip(z) {
        for lane in 0..SUMS {
            xy[lane] += x[lane] * y[lane];
            xz[lane] += x[lane] * z[lane];
        }
    }
    for (lane, ((&x, &y), &z)) in x_rest.iter().zip(y_rest).zip(z_rest).enumerate() {
        xy[lane] += x * y;
        xz[lane] += x * z;
    }
    (sum_of_lanes(xy), sum_of_lanes(xz))
}

/// The sum of `(x k_i + y c_i)^2`: s of (4).
#[inline(always)]
fn square_of_sum<T: Scalar>(k: &[T], x: T, c: &[T], y: T) -> T {
    let ((k, k_rest), (c, c_rest)) = (k.as_chunks::<SUMS>(), c.as_chunks::<SUMS>());
    let mut sums = [T::zero(); SUMS];
    for (k, c) in k.iter().zip(c) {
        for ((sum, &k), &c) in sums.iter_mut().zip(k).zip(c) {
            let e = x * k + y * c;
            *sum += e * e;
        }
    }
    for ((sum, &k), &c) in sums.iter_mut().zip(k_rest).zip(c_rest) {
        let e = x * k + y * c;
        *sum += e * e;
    }
    sum_of_lanes(sums)
}
