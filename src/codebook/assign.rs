//! codes <- the nearest codewords of the keys.
//!
//! [`assign_naive`] is the definition in plain loops, its distances summed in `f64`:
//!
//! ```text
//! (1) z_j = argmin_s |k_j - c_s|^2, a tie takes the lowest s
//! ```
//!
//! [`assign`] returns the same codes, bit for bit, by a matrix product:
//!
//! ```text
//! (2) mu = mean_s c_s,   c'_s = c_s - mu,   h_s = |c'_s|^2 / 2 + mu . c'_s           once per codebook
//! (3) score_sj = h_s - c'_s . k_j  ( = |k_j - c_s|^2 / 2 - |k_j - mu|^2 / 2 )        keys in the SIMD lanes
//! (4) z_j = argmin_s score_sj, if the second best score is more than tau_j above the best;
//!     else (1) among the codes whose score is at most tau_j above the best
//! ```
//!
//! tau_j bounds what rounding can do to the difference of two scores and to the comparison of two distances of (1),
//! with eps the spacing of numbers at 1, in the type T of the arrays and in f64, and tiny the smallest normal number:
//!
//! ```text
//! (5) tau_j = (K + 4) ( eps_T (|k_j| max|c'| + max|h|) + 8 eps_f64 (|k_j| + max|c|)^2 + tiny_T (1 + |k_j|) )
//! ```
//!
//! The first term is the one that counts: a product of K terms is off by at most K eps/2 |k_j||c'_s|, and the roundings
//! of c'_s, of h_s and of the subtraction add three more eps/2; there are two scores. The second term holds the roundings
//! of (1) and, where T is f64, of h_s. The third covers underflow. Where (3) could overflow, tau_j is infinite.
//!
//! So a code depends on its key and the codewords alone: not on the length of the piece it came in, on the number of
//! threads, or on the processor. Without the centring, a common offset of the codewords would make tau_j large and step
//! (4) slow.
//!
//! Cost: 2 N S K operations in the product and about six per score in (4). A key with m codes within tau_j pays m K more in
//! plain loops; where codewords differ that is about one key in a thousand, with m = 2. Scratch: S x 64 scores per task.

use fearless_simd::{Select, Simd, SimdBase};
use ndarray::{Array1, Array3, ArrayView2, ArrayView3, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::packed::PackedCodewords;
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::ops::matmul::{prefetch, product, vector_product};
use crate::ops::simd::{LANES, Row, Rows, many_registers, on_best_simd};
use crate::ops::transpose::transpose;
use crate::{Error, Scalar};

/// Below so many keys, each goes by itself: side by side they would not fill the lanes.
const FEW: usize = 8;

/// Keys of one task: enough to repay its scratch, few enough to share a sequence among threads.
pub(crate) const KEYS_PER_TASK: usize = 1024;

/// The code of each key, by definition: the index of the codeword at the smallest distance, the lowest such index.
///
/// Plain loops over keys, codes and dimensions, differences and sums in `f64`. This is what [`assign`] is tested against.
///
/// # Shapes
/// `keys` [N, K], `codewords` [S, K], the codes `[N]`.
///
/// # Errors
/// [`Error::Shape`] if the widths differ, [`Error::Empty`] without codewords or with K = 0, [`Error::NotFinite`] for NaN and
/// infinities, [`Error::Invalid`] for more codes than a `u32` can name.
pub fn assign_naive<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codewords: ArrayView2<'_, T>,
) -> Result<Array1<u32>, Error> {
    check_codewords(codewords.insert_axis(Axis(0)))?;
    check_shape("keys", &[keys.nrows(), codewords.ncols()], keys.shape())?;
    check_memory::<u32>("codes", &[keys.nrows()])?;
    check_finite("keys", keys)?;
    Ok(keys
        .outer_iter()
        .map(|key| {
            let (mut nearest, mut least) = (0, f64::INFINITY);
            for (code, codeword) in (0..).zip(codewords.outer_iter()) {
                let mut distance = 0.0;
                for (&k, &c) in key.iter().zip(codeword) {
                    let e = k.as_f64() - c.as_f64();
                    distance += e * e;
                }
                if distance < least {
                    (nearest, least) = (code, distance);
                }
            }
            nearest
        })
        .collect())
}

/// The code of each key, exactly as [`assign_naive`] has it, at the speed of a matrix product.
///
/// Runs on the threads of the current rayon pool.
///
/// # Shapes
/// `keys` [N, K], `codewords` [S, K], both of any strides; the codes `[N]`.
///
/// # Errors
/// As [`assign_naive`].
///
/// ```
/// use transformer_vq::codebook::assign;
/// use transformer_vq::ndarray::array;
///
/// let codewords = array![[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]];
/// let keys = array![[1.0, 1.0], [3.0, -1.0], [2.0, 5.0]];
/// // The last key is as far from code 0 as from the others; codes 1 and 2 share a codeword: the lowest wins.
/// assert_eq!(assign(keys.view(), codewords.view())?.to_vec(), [0, 1, 0]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
pub fn assign<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codewords: ArrayView2<'_, T>,
) -> Result<Array1<u32>, Error> {
    compiled_here!(
        T,
        assign_here::<T>,
        fn(ArrayView2<'_, T>, ArrayView2<'_, T>) -> Result<Array1<u32>, Error>
    )(keys, codewords)
}

fn assign_here<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codewords: ArrayView2<'_, T>,
) -> Result<Array1<u32>, Error> {
    check_codewords(codewords.insert_axis(Axis(0)))?;
    check_shape("keys", &[keys.nrows(), codewords.ncols()], keys.shape())?;
    check_memory::<u32>("codes", &[keys.nrows()])?;
    let mut codes = vec![0; keys.nrows()];
    if !assign_in_tasks(&PackedCodewords::new(codewords), keys, &mut codes) {
        check_finite("keys", keys)?;
    }
    Ok(codes.into())
}

/// The codes of keys [B, H, T, K], each head with its own codewords [H, S, K]: codes [B, H, T].
pub(super) fn assign_heads<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codewords: ArrayView3<'_, T>,
) -> Result<Array3<u32>, Error> {
    compiled_here!(
        T,
        assign_heads_here::<T>,
        fn(ArrayView4<'_, T>, ArrayView3<'_, T>) -> Result<Array3<u32>, Error>
    )(keys, codewords)
}

fn assign_heads_here<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codewords: ArrayView3<'_, T>,
) -> Result<Array3<u32>, Error> {
    let (n_sequences, _, len, _) = keys.dim();
    let (n_heads, _, d_k) = codewords.dim();
    check_shape("keys", &[n_sequences, n_heads, len, d_k], keys.shape())?;
    check_memory::<u32>("codes", &[n_sequences, n_heads, len])?;
    let mut codes = vec![0; n_sequences * n_heads * len];
    if len > 0 {
        let packed: Vec<_> = codewords.outer_iter().into_par_iter().map(PackedCodewords::new).collect();
        let finite = codes
            .par_chunks_mut(len)
            .enumerate()
            .map(|(i, codes)| {
                let (sequence, head) = (i / n_heads, i % n_heads);
                assign_in_tasks(&packed[head], keys.slice(s![sequence, head, .., ..]), codes)
            })
            .reduce(|| true, |a, b| a & b);
        if !finite {
            check_finite("keys", keys)?;
        }
    }
    Ok(Array3::from_shape_vec((n_sequences, n_heads, len), codes).expect("as many codes as the shape says"))
}

/// Checks codewords [H, S, K]: at least one, each with a width, finite, and named by a `u32`.
pub(super) fn check_codewords<T: Scalar>(codewords: ArrayView3<'_, T>) -> Result<(), Error> {
    if codewords.is_empty() {
        return Err(Error::Empty { what: "codewords" });
    }
    let n_codes = codewords.len_of(Axis(1));
    if u32::try_from(n_codes).is_err() {
        return Err(Error::invalid("codewords", "at most 2^32 - 1 per head", n_codes));
    }
    check_finite("codewords", codewords)
}

/// One head's keys in tasks of a fixed size; whether every key has a finite norm.
fn assign_in_tasks<T: Scalar>(
    codewords: &PackedCodewords<T>,
    keys: ArrayView2<'_, T>,
    codes: &mut [u32],
) -> bool {
    keys.axis_chunks_iter(Axis(0), KEYS_PER_TASK)
        .into_par_iter()
        .zip(codes.par_chunks_mut(KEYS_PER_TASK))
        .map(|(keys, codes)| assign_into(codewords, keys, codes))
        .reduce(|| true, |a, b| a & b)
}

/// Writes the codes of one head's keys; returns whether every key has a finite norm.
///
/// A key that holds NaN gets some code. The answer tells the caller to look for the place, so that no pass over the keys
/// is spent on the search in the usual case. (The square of a large finite key may overflow: the look finds nothing.)
///
/// # Shapes
/// `keys` [N, K] of any strides, `codes` `[N]`.
pub(crate) fn assign_into<T: Scalar>(
    codewords: &PackedCodewords<T>,
    keys: ArrayView2<'_, T>,
    codes: &mut [u32],
) -> bool {
    debug_assert_eq!(keys.dim(), (codes.len(), codewords.centred.ncols()));
    if keys.nrows() < FEW {
        return assign_each(codewords, keys, codes);
    }
    let n_codes = codewords.offsets.len();
    let mut keys_t = Rows::zeros(keys.ncols());
    let mut products = Rows::zeros(n_codes);
    let mut finite = true;
    let mut rest = keys;
    for (keys, codes) in keys.axis_chunks_iter(Axis(0), LANES).zip(codes.chunks_mut(LANES)) {
        rest = rest.slice_move(s![keys.nrows().., ..]);
        prefetch(rest.slice(s![..rest.nrows().min(LANES), ..]));
        transpose(keys, &mut keys_t);
        let columns: ArrayView2<'_, T> = (&*keys_t).into(); // [K, 64]
        product(codewords.centred.view(), columns, (&mut *products).into()); // [S, 64]
        let lowest = on_best_simd!(simd => find_lowest(simd, &products, &codewords.offsets));
        let norms = on_best_simd!(norms(&keys_t));
        for (j, (key, &key_norm)) in keys.outer_iter().zip(&norms).enumerate() {
            finite &= key_norm.is_finite();
            let tolerance = codewords.tolerance(key_norm);
            let best = lowest.best[j].as_f64();
            // False as well when the scores are infinite or NaN.
            let clear = lowest.second[j].as_f64() - best > tolerance;
            codes[j] = if clear {
                lowest.code[j]
            } else {
                codewords.settle(key, products.iter().map(|row| row[j]), best, tolerance)
            };
        }
    }
    finite
}

/// [`assign_into`], key by key: (3) for all codes, then what (4) falls back on, which finds the code in any case.
fn assign_each<T: Scalar>(
    codewords: &PackedCodewords<T>,
    keys: ArrayView2<'_, T>,
    codes: &mut [u32],
) -> bool {
    let mut products = vec![T::zero(); codewords.offsets.len()];
    let mut finite = true;
    for (key, code) in keys.outer_iter().zip(codes) {
        vector_product(&[(key, codewords.centred.t())], &mut products);
        let (nearest, finite_key) = codewords.nearest(key, &products);
        *code = nearest;
        finite &= finite_key;
    }
    finite
}

/// |k| of each key, from keys in columns [K, 64]. Its rounding, K eps/4, finds room in the 4 of (5) up to K = 5,000.
#[inline(always)]
fn norms<T: Scalar>(keys_t: &[Row<T>]) -> [f64; LANES] {
    let mut squares = [T::zero(); LANES];
    for row in keys_t {
        for (square, &k) in squares.iter_mut().zip(row) {
            *square += k * k;
        }
    }
    squares.map(|square| square.as_f64().sqrt())
}

/// Per key: the lowest score, the second lowest, and the code of the lowest.
struct Lowest<T> {
    best: Row<T>,
    second: Row<T>,
    code: [u32; LANES],
}

/// (3) and the argmin of (4). What is found stays in registers while the codes go by, which a compiler does not see by itself.
///
/// `products` [S, 64], `offsets` `[S]`.
#[inline(always)]
fn find_lowest<S: Simd, T: Scalar>(simd: S, products: &[Row<T>], offsets: &[T]) -> Lowest<T> {
    if many_registers(simd) {
        find_lowest_in_groups::<S, T, 4>(simd, products, offsets)
    } else {
        find_lowest_in_groups::<S, T, 2>(simd, products, offsets)
    }
}

/// [`find_lowest`], N vectors of keys at a time.
#[inline(always)]
fn find_lowest_in_groups<S: Simd, T: Scalar, const N: usize>(
    simd: S,
    products: &[Row<T>],
    offsets: &[T],
) -> Lowest<T> {
    let lanes = T::Vector::<S>::LEN;
    let (mut best_of, mut second_of) = ([T::zero(); LANES], [T::zero(); LANES]);
    let mut code_of = [T::zero(); LANES];
    for first in (0..LANES).step_by(N * lanes) {
        let mut best = [T::Vector::<S>::splat(simd, T::infinity()); N];
        let mut second = best;
        let mut nearest = [T::Vector::<S>::splat(simd, T::zero()); N];
        for ((code, row), &h) in (0..).zip(products).zip(offsets) {
            let code = T::Vector::<S>::splat(simd, T::from_code(code));
            let h = T::Vector::<S>::splat(simd, h);
            for j in 0..N {
                let score = h - T::Vector::<S>::from_slice(simd, &row[first + j * lanes..][..lanes]);
                // The next code waits for a minimum, not for a comparison and a selection.
                let wins = score.simd_lt(best[j]);
                second[j] = second[j].min(best[j].max(score));
                best[j] = score.min(best[j]);
                nearest[j] = wins.select(code, nearest[j]);
            }
        }
        for j in 0..N {
            let at = first + j * lanes..first + (j + 1) * lanes;
            best[j].store_slice(&mut best_of[at.clone()]);
            second[j].store_slice(&mut second_of[at.clone()]);
            nearest[j].store_slice(&mut code_of[at]);
        }
    }
    Lowest { best: best_of, second: second_of, code: code_of.map(T::code) }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::codebook::packed::norm;

    /// Numbers in -1 .. 1 without a pattern, around `offset`.
    fn numbers<T: Scalar>(rows: usize, cols: usize, seed: u64, offset: f64) -> Array2<T> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            T::from_f64(offset + (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        })
    }

    /// Differences of scores as computed differ from the true ones by tau at most, and tau is small.
    fn scores_keep_the_stated_bound<T: Scalar>() {
        for (n_codes, d_k, offset) in
            [(2, 1, 0.0), (17, 3, 0.0), (64, 128, 0.0), (64, 128, 5.0), (64, 16, -100.0)]
        {
            let codewords = numbers::<T>(n_codes, d_k, 1, offset);
            let keys = numbers::<T>(50, d_k, 2, offset);
            let packed = PackedCodewords::new(codewords.view());
            let mut products = Array2::from_elem((n_codes, 50), T::nan());
            product(packed.centred.view(), keys.t(), products.view_mut());
            for (key, products) in keys.outer_iter().zip(products.columns()) {
                let tolerance = packed.tolerance(norm(key));
                let size = (norm(key) + packed.norm).powi(2);
                assert!(
                    tolerance <= 10.0 * (d_k as f64 + 4.0) * T::epsilon().as_f64() * size,
                    "{tolerance:e}"
                );
                let errors =
                    codewords.outer_iter().zip(&packed.offsets).zip(products).map(|((codeword, &h), &p)| {
                        let distance: f64 =
                            key.iter().zip(codeword).map(|(&k, &c)| (k.as_f64() - c.as_f64()).powi(2)).sum();
                        (h - p).as_f64() - distance / 2.0
                    });
                let (least, most) =
                    errors.fold((f64::INFINITY, -f64::INFINITY), |(a, b), e| (e.min(a), e.max(b)));
                assert!(most - least <= tolerance, "{:e} above {tolerance:e}", most - least);
            }
        }
    }

    #[test]
    fn the_tolerance_bounds_the_rounding() {
        scores_keep_the_stated_bound::<f32>();
        scores_keep_the_stated_bound::<f64>();
    }
}
