//! Codewords made ready for the fast assignment: centred, with their offsets and the bound on rounding.
//!
//! Formulas (2) and (5), and what (4) falls back on, are those of [`assign`](super::assign()).

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, Axis};

use crate::Scalar;
use crate::ops::rows::SUMS;
use crate::ops::simd::on_best_simd;

/// The codewords of all heads, made ready for any number of keys.
#[derive(Debug, Clone)]
pub(crate) struct Table<T> {
    /// C `[H, S, K]`.
    pub codewords: Array3<T>,
    /// One per head.
    pub packed: Vec<PackedCodewords<T>>,
}

impl<T: Scalar> Table<T> {
    pub(crate) fn new(codewords: Array3<T>) -> Self {
        let packed = codewords.outer_iter().map(PackedCodewords::new).collect();
        Table { codewords, packed }
    }

    /// S.
    pub(crate) fn n_codes(&self) -> usize {
        self.codewords.len_of(Axis(1))
    }
}

/// One head's codewords, made ready for (3) and (4).
#[derive(Debug, Clone)]
pub(crate) struct PackedCodewords<T> {
    pub codewords: Array2<T>, // [S, K]
    /// c'
    pub centred: Array2<T>, // [S, K]
    /// mu
    pub mean: Array1<T>, // [K]
    /// h
    pub offsets: Vec<T>, // [S]
    /// max |c|
    pub norm: f64,
    /// max |c'|
    pub centred_norm: f64,
    /// max |h|
    pub offset: f64,
}

impl<T: Scalar> PackedCodewords<T> {
    /// (2), from codewords [S, K] with S > 0.
    pub(crate) fn new(codewords: ArrayView2<'_, T>) -> Self {
        let exact = codewords.mapv(|c| c.as_f64());
        let mean = exact.mean_axis(Axis(0)).expect("at least one codeword");
        let exact_centred = &exact - &mean;
        let offsets: Vec<f64> =
            exact_centred.outer_iter().map(|row| row.dot(&row) / 2.0 + mean.dot(&row)).collect();
        // f64::max would drop a NaN, which says that something has overflowed and that (3) cannot be used.
        let max = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
        Self {
            codewords: codewords.as_standard_layout().into_owned(),
            centred: exact_centred.mapv(T::from_f64),
            mean: mean.mapv(T::from_f64),
            norm: exact.outer_iter().map(norm).fold(0.0, max),
            centred_norm: exact_centred.outer_iter().map(norm).fold(0.0, max),
            offset: offsets.iter().map(|h| h.abs()).fold(0.0, max),
            offsets: offsets.into_iter().map(T::from_f64).collect(),
        }
    }

    /// (5), given |k|.
    pub(super) fn tolerance(&self, key_norm: f64) -> f64 {
        let terms = self.codewords.ncols() as f64 + 4.0;
        let scale = key_norm * self.centred_norm + self.offset;
        let distance = (key_norm + self.norm) * (key_norm + self.norm);
        // No partial sum of (3) exceeds this scale.
        if scale < T::max_value().as_f64() / 4.0 {
            let tiny = T::min_positive_value().as_f64() * (1.0 + key_norm);
            terms * (T::epsilon().as_f64() * scale + 8.0 * f64::EPSILON * distance + tiny)
        } else {
            f64::INFINITY
        }
    }

    /// (3) and (4) of one key: its code, and whether its norm is finite.
    ///
    /// # Shapes
    /// `key` `[K]`, `products` `[S]`: `c'_s . k`.
    pub(crate) fn nearest(&self, key: ArrayView1<'_, T>, products: &[T]) -> (u32, bool) {
        let best = on_best_simd!(lowest(&self.offsets, products));
        let key_norm = norm(key);
        let tolerance = self.tolerance(key_norm);
        (self.settle(key, products.iter().copied(), best.as_f64(), tolerance), key_norm.is_finite())
    }

    /// (1) among the codes whose score is at most `tolerance` above the best one.
    pub(super) fn settle(
        &self,
        key: ArrayView1<'_, T>,
        products: impl Iterator<Item = T>,
        best: f64,
        tolerance: f64,
    ) -> u32 {
        let (mut nearest, mut least) = (0, f64::INFINITY);
        for (((code, codeword), &h), p) in
            (0..).zip(self.codewords.outer_iter()).zip(&self.offsets).zip(products)
        {
            // After an overflow this is infinite or NaN, never above an infinite tolerance.
            let far = (h - p).as_f64() - best > tolerance;
            if far {
                continue;
            }
            let distance = key.iter().zip(codeword).fold(0.0, |sum, (&k, &c)| {
                let e = k.as_f64() - c.as_f64();
                sum + e * e
            });
            if distance < least {
                (nearest, least) = (code, distance);
            }
        }
        nearest
    }
}

/// The lowest of the scores (3).
#[inline(always)]
fn lowest<T: Scalar>(offsets: &[T], products: &[T]) -> T {
    let ((h, h_rest), (p, p_rest)) = (offsets.as_chunks::<SUMS>(), products.as_chunks::<SUMS>());
    let lower = |score: T, best: T| if score < best { score } else { best };
    let mut lanes = [T::infinity(); SUMS];
    for (h, p) in h.iter().zip(p) {
        for ((best, &h), &p) in lanes.iter_mut().zip(h).zip(p) {
            *best = if h - p < *best { h - p } else { *best };
        }
    }
    let rest = h_rest.iter().zip(p_rest).map(|(&h, &p)| h - p);
    lanes.iter().copied().chain(rest).fold(T::infinity(), lower)
}

/// |row|. Where the squares vanish, what is lost is below the last term of (5).
pub(super) fn norm<T: Scalar>(row: ArrayView1<'_, T>) -> f64 {
    row.dot(&row).as_f64().sqrt()
}
