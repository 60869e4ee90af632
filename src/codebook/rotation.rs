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

use fearless_simd::{Simd, SimdBase, SimdFloat};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2, s};

use crate::Scalar;
use crate::error::Error;
use crate::ops::matmul::prefetch_beyond;
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
    mut d: ArrayViewMut2<'_, T>,
) -> bool {
    let (constants, codewords) = (Constants::new(rotation), codewords.as_standard_layout());
    let codewords = (codewords.as_slice().expect("standard layout"), squares);
    let (n, width) = keys.dim();
    if width == 0 {
        return true;
    }
    if let (Some(keys), Some(codes), Some(d)) = (keys.as_slice(), codes.as_slice(), d.as_slice_mut()) {
        return on_best_simd!(simd => rotate(simd, constants, width, (keys, codes), codewords, d));
    }
    let mut finite = true;
    for start in (0..n).step_by(COPIED_ROWS) {
        let of = s![start..n.min(start + COPIED_ROWS), ..];
        let (keys, mut d) = (keys.slice(of), d.slice_mut(of));
        let (keys, mut copy) = (keys.as_standard_layout(), d.as_standard_layout().into_owned());
        let codes: Vec<u32> = codes.iter().skip(start).take(COPIED_ROWS).copied().collect();
        let (keys, in_order) = (keys.as_slice().expect("standard layout"), copy.as_slice_mut());
        let in_order = in_order.expect("standard layout");
        finite &= on_best_simd!(simd => rotate(simd, constants, width, (keys, &codes), codewords, in_order));
        d.assign(&copy);
    }
    finite
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

/// Rows that are treated together: few, so that what one step leaves is in the first-level cache for the next.
const ROWS: usize = 4;

/// Rows that are copied at once where they do not lie one after the other; a multiple of [`ROWS`].
const COPIED_ROWS: usize = 64;

/// One number per row.
type PerRow<T> = [T; ROWS];

/// [`backward`] where all rows lie one after the other; `codewords` and their squares.
///
/// Step by step for [`ROWS`] rows: five sums each, which bring the rows from memory; three factors each, side by side; then
/// one pass that finds the rows in the cache. While it lasts, the next rows are on their way.
#[inline(always)]
fn rotate<S: Simd, T: Scalar>(
    simd: S,
    constants: Constants<T>,
    width: usize,
    (keys, codes): (&[T], &[u32]),
    (codewords, squares): (&[T], &[T]),
    d: &mut [T],
) -> bool {
    let mut finite = true;
    let groups = keys.chunks(ROWS * width).zip(codes.chunks(ROWS)).zip(d.chunks_mut(ROWS * width));
    for ((keys, codes), d) in groups {
        let sums = Sums::new(simd, width, keys, codes, (codewords, squares), d);
        let mut s = sums.square_of_sum();
        for (i, s) in s.iter_mut().enumerate() {
            finite &= (sums.kk[i] + sums.kg[i]).is_finite();
            // Where little is left of 1 + u . c~, its digits are gone.
            if *s < T::one() && i < codes.len() {
                let (x, y) = (sums.kk[i].sqrt().recip(), sums.cc[i].sqrt().recip());
                *s = square_of_sum(row(keys, i, width), x, row(codewords, codes[i] as usize, width), y);
            }
        }
        sums.factors(constants, width, s).apply(simd, width, keys, codes, codewords, d);
    }
    finite
}

#[inline(always)]
fn row<T>(rows: &[T], i: usize, width: usize) -> &[T] {
    &rows[i * width..][..width]
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

/// What rotates a row: `lambda g + key k + codeword c`.
#[derive(Debug, Clone, Copy)]
struct Factors<T> {
    lambda: PerRow<T>,
    key: PerRow<T>,
    codeword: PerRow<T>,
}

impl<T: Scalar> Sums<T> {
    /// The sums of at most [`ROWS`] rows.
    #[inline(always)]
    fn new<S: Simd>(
        simd: S,
        width: usize,
        keys: &[T],
        codes: &[u32],
        (codewords, squares): (&[T], &[T]),
        d: &[T],
    ) -> Self {
        let lanes = T::Vector::<S>::LEN;
        let whole = width / lanes * lanes;
        let zero = T::Vector::<S>::splat(simd, T::zero());
        let mut partial = [zero; 4 * ROWS];
        let mut cc = [T::zero(); ROWS];
        let rows = keys.chunks_exact(width).zip(d.chunks_exact(width)).zip(codes);
        for (i, ((key, g), &code)) in rows.enumerate() {
            prefetch_beyond(key, ROWS);
            cc[i] = squares[code as usize];
            let codeword = row(codewords, code as usize, width);
            let (mut kk, mut kc, mut kg, mut cg) = (zero, zero, zero, zero);
            let chunks = key.chunks_exact(lanes).zip(codeword.chunks_exact(lanes));
            for ((k, c), g) in chunks.zip(g.chunks_exact(lanes)) {
                let k = T::Vector::<S>::from_slice(simd, k);
                let c = T::Vector::<S>::from_slice(simd, c);
                let g = T::Vector::<S>::from_slice(simd, g);
                kk = k.mul_add(k, kk);
                kc = k.mul_add(c, kc);
                kg = k.mul_add(g, kg);
                cg = c.mul_add(g, cg);
            }
            (partial[i], partial[ROWS + i]) = (kk, kc);
            (partial[2 * ROWS + i], partial[3 * ROWS + i]) = (kg, cg);
        }
        let mut sums = [T::zero(); 4 * ROWS];
        for (sums, partial) in sums.chunks_exact_mut(lanes).zip(partial.chunks_exact_mut(lanes)) {
            sums_of_lanes::<S, T>(partial);
            partial[0].store_slice(sums);
        }
        if whole < width {
            let rows = keys.chunks_exact(width).zip(d.chunks_exact(width)).zip(codes);
            for (i, ((key, g), &code)) in rows.enumerate() {
                let codeword = row(codewords, code as usize, width);
                for ((&k, &c), &g) in key[whole..].iter().zip(&codeword[whole..]).zip(&g[whole..]) {
                    sums[i] += k * k;
                    sums[ROWS + i] += k * c;
                    sums[2 * ROWS + i] += k * g;
                    sums[3 * ROWS + i] += c * g;
                }
            }
        }
        let [kk, kc, kg, cg] = [0, 1, 2, 3].map(|j| sums.as_chunks::<ROWS>().0[j]);
        Sums { kk, cc, kc, kg, cg }
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
            factors.key[i] = if in_range { lambda * of_key * to_unit } else { T::zero() };
            factors.codeword[i] = if in_range { lambda * of_codeword * to_direction } else { T::zero() };
        }
        factors
    }
}

impl<T: Scalar> Factors<T> {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, width: usize, keys: &[T], codes: &[u32], codewords: &[T], d: &mut [T]) {
        let lanes = T::Vector::<S>::LEN;
        let whole = width / lanes * lanes;
        let rows = keys.chunks_exact(width).zip(d.chunks_exact_mut(width)).zip(codes);
        for (i, ((key, d), &code)) in rows.enumerate() {
            let codeword = row(codewords, code as usize, width);
            prefetch_beyond(d, ROWS);
            let (lambda, of_key, of_codeword) = (self.lambda[i], self.key[i], self.codeword[i]);
            let chunks = d.chunks_exact_mut(lanes).zip(key.chunks_exact(lanes));
            for ((d, k), c) in chunks.zip(codeword.chunks_exact(lanes)) {
                let k = T::Vector::<S>::from_slice(simd, k);
                let c = T::Vector::<S>::from_slice(simd, c);
                let g = T::Vector::<S>::from_slice(simd, d);
                let turned = T::Vector::<S>::splat(simd, of_key).mul_add(k, g * lambda);
                T::Vector::<S>::splat(simd, of_codeword).mul_add(c, turned).store_slice(d);
            }
            let rest = d[whole..].iter_mut().zip(&key[whole..]);
            for ((d, &k), &c) in rest.zip(&codeword[whole..]) {
                *d = lambda * *d + of_key * k + of_codeword * c;
            }
        }
    }
}

/// The first of as many vectors as a register has lanes <- the sums of all lanes of each.
///
/// Two vectors, interleaved, add up to one that holds both in half as many lanes.
#[inline(always)]
fn sums_of_lanes<S: Simd, T: Scalar>(vectors: &mut [T::Vector<S>]) {
    let mut half = vectors.len() / 2;
    while half > 0 {
        for i in 0..half {
            let (low, high) = vectors[i].interleave(vectors[i + half]);
            vectors[i] = low + high;
        }
        half /= 2;
    }
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
