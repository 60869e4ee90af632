//! The rotation trick's backward on rows that lie one after the other; formulas as numbered in [`rotation`](super::rotation).

use std::ops::Range;

use fearless_simd::{Simd, SimdBase, SimdFloat};

use super::rotation::{Rotation, RotationScale, RotationVariant};
use crate::Scalar;
use crate::ops::aligned::LINE;
use crate::ops::matmul::{ask, ask_for_pages, ask_second_level};
use crate::ops::rows::{SUMS, sum_of_lanes};
use crate::ops::transpose::MOST_LANES;

/// Below this s a rotation gives way to a reflection.
const LEAST_SQUARE: f64 = 1e-6;

/// A [`Rotation`] in numbers of one type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants<T> {
    /// What u gets of b: 2 in (4), 1 in (5).
    radial: T,
    /// lambda = min(most, |c| / |k|), or 1.
    most: T,
    stretch: bool,
    least_square: T,
    /// Smaller squares lose digits to underflow.
    least: T,
    /// Its root.
    least_length: T,
}

impl<T: Scalar> Constants<T> {
    pub(super) fn new(rotation: Rotation) -> Self {
        let (one, two) = (T::one(), T::one() + T::one());
        let least = T::min_positive_value() / T::epsilon();
        Constants {
            radial: if rotation.variant == RotationVariant::Paper { two } else { one },
            most: match rotation.scale {
                RotationScale::AtMost(most) => T::from_f64(most),
                RotationScale::Ratio | RotationScale::One => T::infinity(),
            },
            stretch: rotation.scale != RotationScale::One,
            least_square: T::from_f64(LEAST_SQUARE),
            least,
            least_length: least.sqrt(),
        }
    }
}

/// How many rows before its turn a codeword is asked for, which lies anywhere in the table, and a row, which the processor
/// foresees until a page of memory ends.
const CODES_AHEAD: usize = 4;
const ROWS_AHEAD: usize = 16;

/// What a pass reads, row by row: keys [N, K], codes `[N]`, codewords [S, K] and their lengths `[S]`, all in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub width: usize,
    pub keys: &'a [T],
    pub codes: &'a [u32],
    pub codewords: &'a [T],
    /// As [`lengths`](super::rotation::lengths) has them.
    pub lengths: &'a [(T, T)],
}

impl<'a, T: Scalar> Rows<'a, T> {
    #[inline(always)]
    fn of(self, i: usize) -> Range<usize> {
        i * self.width..(i + 1) * self.width
    }

    #[inline(always)]
    fn key(self, i: usize) -> &'a [T] {
        &self.keys[self.of(i)]
    }

    /// The codeword of a key.
    #[inline(always)]
    fn codeword(self, i: usize) -> &'a [T] {
        &self.codewords[self.of(self.codes[i] as usize)]
    }

    #[inline(always)]
    fn sums<S: Simd>(self, simd: S, i: usize, d: &[T]) -> Sums<T> {
        Sums::new(simd, self.key(i), self.codeword(i), &d[self.of(i)])
    }

    #[inline(always)]
    fn factors(self, constants: Constants<T>, i: usize, sums: Sums<T>) -> Option<Factors<T>> {
        sums.factors(constants, self.key(i), self.codeword(i), self.lengths[self.codes[i] as usize])
    }
}

/// [`backward`](super::rotation::backward) where all rows, those of `d` [N, K] too, lie one after the other.
///
/// Row by row: sums, which bring the row from memory; three factors; then one pass that finds the row in the cache, and asks
/// for later rows meanwhile, line by line. While a row has its pass, the next one has its factors and the one after its sums:
/// none waits for roots and quotients of another.
#[inline(always)]
pub(super) fn rotate<S: Simd, T: Scalar>(
    simd: S,
    constants: Constants<T>,
    rows: Rows<'_, T>,
    d: &mut [T],
) -> bool {
    let n = rows.codes.len();
    if n == 0 {
        return true;
    }
    let mut sums = rows.sums(simd, 0, d);
    let mut finite = sums.are_finite();
    let mut factors = rows.factors(constants, 0, sums);
    sums = rows.sums(simd, 1.min(n - 1), d);
    for i in 0..n {
        let (of_next, of_this) = (sums, factors);
        if i + 2 < n {
            sums = rows.sums(simd, i + 2, d);
        }
        if i + 1 < n {
            finite &= of_next.are_finite();
            factors = rows.factors(constants, i + 1, of_next);
        }
        let (key, d) = (rows.key(i), &mut d[rows.of(i)]);
        let later = Later {
            key: address_of(key, ROWS_AHEAD * rows.width),
            d: address_of(d, ROWS_AHEAD * rows.width),
            codeword: address_of(rows.codeword((i + CODES_AHEAD).min(n - 1)), 0),
        };
        ask_for_pages(i, n, later.key, size_of_val(key) as isize);
        ask_for_pages(i, n, later.d, size_of_val(key) as isize);
        if let Some(factors) = of_this {
            factors.apply(simd, key, rows.codeword(i), d, later);
        }
    }
    finite
}

/// Where what is needed later begins: nothing is read there, and past the end of an array nothing need be.
#[derive(Debug, Clone, Copy)]
struct Later {
    key: *const u8,
    d: *const u8,
    codeword: *const u8,
}

impl Later {
    /// Asks for the line at this byte of each.
    #[inline(always)]
    fn ask(self, byte: usize) {
        ask_second_level(self.key.wrapping_add(byte));
        ask_second_level(self.d.wrapping_add(byte));
        ask(self.codeword.wrapping_add(byte));
    }
}

#[inline(always)]
fn address_of<T>(x: &[T], index: usize) -> *const u8 {
    x.as_ptr().wrapping_add(index).cast()
}

/// Sums over the elements of a key, a codeword and a gradient.
#[derive(Debug, Clone, Copy)]
struct Sums<T> {
    kk: T,
    kc: T,
    kg: T,
    cg: T,
}

/// What rotates a row: `lambda g + key k + codeword c`.
#[derive(Debug, Clone, Copy)]
struct Factors<T> {
    lambda: T,
    key: T,
    codeword: T,
}

impl<T: Scalar> Sums<T> {
    /// The sums of one row, those of even and of odd vectors apart: half as long to wait for.
    #[inline(always)]
    fn new<S: Simd>(simd: S, key: &[T], codeword: &[T], g: &[T]) -> Self {
        let lanes = T::Vector::<S>::LEN;
        let zero = T::Vector::<S>::splat(simd, T::zero());
        let (mut even, mut odd) = ([zero; 4], [zero; 4]);
        let whole = key.len() / lanes * lanes;
        let (keys, codewords, gradients) =
            (key.chunks_exact(2 * lanes), codeword.chunks_exact(2 * lanes), g.chunks_exact(2 * lanes));
        let last = (keys.remainder(), codewords.remainder(), gradients.remainder());
        for ((k, c), g) in keys.zip(codewords).zip(gradients) {
            add_products(simd, &mut even, &k[..lanes], &c[..lanes], &g[..lanes]);
            add_products(simd, &mut odd, &k[lanes..], &c[lanes..], &g[lanes..]);
        }
        if last.0.len() >= lanes {
            add_products(simd, &mut even, &last.0[..lanes], &last.1[..lanes], &last.2[..lanes]);
        }
        let all = [even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]];
        let [mut kk, mut kc, mut kg, mut cg] = sums_of_lanes::<S, T>(all);
        for ((&k, &c), &g) in key[whole..].iter().zip(&codeword[whole..]).zip(&g[whole..]) {
            kk += k * k;
            kc += k * c;
            kg += k * g;
            cg += c * g;
        }
        Sums { kk, kc, kg, cg }
    }

    /// Whether key and gradient are, and their products.
    #[inline(always)]
    fn are_finite(self) -> bool {
        (self.kk + self.kg).is_finite()
    }

    /// (4) or (5); none where d_k = g.
    #[inline(always)]
    fn factors(
        &self,
        constants: Constants<T>,
        key: &[T],
        codeword: &[T],
        (length, to_direction): (T, T),
    ) -> Option<Factors<T>> {
        let Sums { kk, kc, kg, cg } = *self;
        let in_range = (constants.least <= kk)
            & (constants.least_length <= length)
            & (kk + length * length + kg + cg).is_finite();
        if !in_range || key.len() == 1 {
            return None;
        }
        // (1)
        let to_unit = kk.sqrt().recip();
        let ratio = length * to_unit;
        let ratio = if ratio > constants.most { constants.most } else { ratio };
        let lambda = if constants.stretch { ratio } else { T::one() };
        // (4)
        let (a, b) = (kg * to_unit, cg * to_direction);
        let cosine = kc * to_unit * to_direction;
        let s = T::one() + T::one() + cosine + cosine;
        let directions = Directions { lambda, to_unit, to_direction, a, b };
        if s < T::one() {
            return Some(directions.far_apart(constants, key, codeword));
        }
        Some(directions.factors(constants, s))
    }
}

/// What (4) and (5) need beside s.
#[derive(Debug, Clone, Copy)]
struct Directions<T> {
    lambda: T,
    /// 1 / |k|.
    to_unit: T,
    /// 1 / |c|.
    to_direction: T,
    a: T,
    b: T,
}

impl<T: Scalar> Directions<T> {
    /// (4) or (5).
    #[inline(always)]
    fn factors(self, constants: Constants<T>, s: T) -> Factors<T> {
        let Directions { lambda, to_unit, to_direction, a, b } = self;
        let r = (a + b + a + b) / s;
        let key = lambda * (constants.radial * b - r) * to_unit;
        Factors { lambda, key, codeword: -lambda * r * to_direction }
    }

    /// The same where little is left of 1 + u . c~, whose digits are gone.
    ///
    /// Rare, and by itself: the loop over rows keeps the registers.
    #[cold]
    #[inline(never)]
    fn far_apart(self, constants: Constants<T>, key: &[T], codeword: &[T]) -> Factors<T> {
        let Directions { lambda, to_unit, to_direction, a, .. } = self;
        let s = square_of_sum(key, to_unit, codeword, to_direction);
        if s < constants.least_square {
            let key = -lambda * constants.radial * a * to_unit;
            return Factors { lambda, key, codeword: T::zero() };
        }
        self.factors(constants, s)
    }
}

impl<T: Scalar> Factors<T> {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, key: &[T], codeword: &[T], d: &mut [T], later: Later) {
        let lanes = T::Vector::<S>::LEN;
        let factors = [
            T::Vector::<S>::splat(simd, self.lambda),
            T::Vector::<S>::splat(simd, self.key),
            T::Vector::<S>::splat(simd, self.codeword),
        ];
        let Some(last) = d.len().checked_sub(lanes) else {
            for ((d, &k), &c) in d.iter_mut().zip(key).zip(codeword) {
                *d = self.lambda * *d + self.key * k + self.codeword * c;
            }
            return;
        };
        // The two ends as they come; between them, vectors that lie on one line each.
        let first = rotated::<S, T>(simd, factors, key, codeword, d, 0);
        let end = rotated::<S, T>(simd, factors, key, codeword, d, last);
        let start = d.as_ptr().align_offset(lanes * size_of::<T>()).min(lanes);
        for at in (start..last).step_by(lanes) {
            let byte = (at - start) * size_of::<T>();
            if byte.is_multiple_of(LINE) {
                later.ask(byte);
            }
            rotated::<S, T>(simd, factors, key, codeword, d, at).store_slice(&mut d[at..at + lanes]);
        }
        first.store_slice(&mut d[..lanes]);
        end.store_slice(&mut d[last..]);
    }
}

/// A vector of what [`Factors`] make of a row.
#[inline(always)]
fn rotated<S: Simd, T: Scalar>(
    simd: S,
    [lambda, of_key, of_codeword]: [T::Vector<S>; 3],
    key: &[T],
    codeword: &[T],
    d: &[T],
    at: usize,
) -> T::Vector<S> {
    let of = at..at + T::Vector::<S>::LEN;
    let k = T::Vector::<S>::from_slice(simd, &key[of.clone()]);
    let c = T::Vector::<S>::from_slice(simd, &codeword[of.clone()]);
    let g = T::Vector::<S>::from_slice(simd, &d[of]);
    of_codeword.mul_add(c, of_key.mul_add(k, g * lambda))
}

/// Adds the products of a vector of each to kk, kc, kg and cg.
#[inline(always)]
fn add_products<S: Simd, T: Scalar>(
    simd: S,
    [kk, kc, kg, cg]: &mut [T::Vector<S>; 4],
    k: &[T],
    c: &[T],
    g: &[T],
) {
    let k = T::Vector::<S>::from_slice(simd, k);
    let c = T::Vector::<S>::from_slice(simd, c);
    let g = T::Vector::<S>::from_slice(simd, g);
    *kk = k.mul_add(k, *kk);
    *kc = k.mul_add(c, *kc);
    *kg = k.mul_add(g, *kg);
    *cg = c.mul_add(g, *cg);
}

/// The sums of all lanes of each.
///
/// Two vectors, interleaved, add up to one that holds both in half as many lanes.
#[inline(always)]
fn sums_of_lanes<S: Simd, T: Scalar>([a, b, c, d]: [T::Vector<S>; 4]) -> [T; 4] {
    let add = |x: T::Vector<S>, y: T::Vector<S>| {
        let (low, high) = x.interleave(y);
        low + high
    };
    let len = T::Vector::<S>::LEN;
    let mut lanes = [T::zero(); MOST_LANES];
    if len == 2 {
        add(a, b).store_slice(&mut lanes[..2]);
        add(c, d).store_slice(&mut lanes[2..4]);
        return [0, 1, 2, 3].map(|i| lanes[i]);
    }
    let mut all = add(add(a, c), add(b, d));
    let mut each = 1;
    while each < len / 4 {
        all = add(all, all);
        each *= 2;
    }
    all.store_slice(&mut lanes[..len]);
    [0, 1, 2, 3].map(|i| lanes[i * each])
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
