//! The loss that keeps keys near their codewords, and how near they are.
//!
//! ```text
//! (1) E_h = sum_j m_j |k_j - c_{z_j}|^2,   Z = sum m_j                 j over batch and positions, m_j: 1 where counted
//! (2) loss = sum_h E_h / Z                                             0 if nothing counts
//! (3) d_k_j += w (2 / Z) m_j (k_j - c_{z_j})                           w the weight of the loss in the total
//! (4) mean error_h = E_h / Z,   relative error_h = E_h / sum_j m_j |k_j|^2
//! ```
//!
//! The codewords are constants here: this loss moves keys only. Distances are sums of squared differences, never the
//! expanded |k|^2 - 2 k . c + |c|^2, whose rounding can exceed a small distance and even turn negative.
//!
//! Cost: B H T K. Source: VQ-VAE (van den Oord et al., 2017), with the normalisation of Transformer-VQ: a sum over heads and
//! dimensions, a mean over positions.

use ndarray::{
    Array1, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, Zip, arr0, s,
};
use rayon::prelude::*;

use super::{check_codes, check_mask};
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::ops::matmul::prefetch_ahead;
use crate::ops::rows::{SUMS, sum_of_lanes};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// (2): the unweighted loss.
///
/// # Shapes
/// `keys` [B, H, T, K], `codes` [B, H, T], `codewords` [H, S, K], `mask` [B, T]: true where a position counts, without one
/// all do.
///
/// # Errors
/// [`Error::Shape`], [`Error::OutOfRange`] for a code that is not below S, [`Error::NotFinite`] for keys or codewords.
pub fn loss<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
) -> Result<f64, Error> {
    Ok(mean_error(keys, codes, codewords, mask)?.sum())
}

/// (3): the gradient of `weight` times the loss.
///
/// # Shapes
/// As [`loss`]; the gradient of the keys [B, H, T, K].
///
/// # Errors
/// As [`loss`], [`Error::Invalid`] for a weight that is not finite, and [`Error::TooLarge`].
pub fn backward<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
    weight: f64,
) -> Result<Array4<T>, Error> {
    let counted = check(keys, codes, codewords, mask)?;
    if !weight.is_finite() {
        return Err(Error::invalid("weight", "finite", weight));
    }
    check_memory::<T>("gradient", keys.shape())?;
    let mut d_keys = Array4::zeros(keys.dim());
    if counted > 0 {
        let scale = T::from_f64(2.0 * weight / counted as f64);
        d_keys.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(i, mut d_keys)| {
            let mask = mask.as_ref().map(|mask| mask.row(i));
            for (h, d_keys) in d_keys.outer_iter_mut().enumerate() {
                let codewords = codewords.index_axis(Axis(0), h);
                add_gradient(
                    keys.slice(s![i, h, .., ..]),
                    codes.slice(s![i, h, ..]),
                    codewords,
                    mask,
                    scale,
                    d_keys,
                );
            }
        });
    }
    Ok(d_keys)
}

/// (4): the mean squared distance from key to codeword, per head `[H]`; 0 if nothing counts.
///
/// # Shapes
/// As [`loss`].
///
/// # Errors
/// As [`loss`].
pub fn mean_error<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
) -> Result<Array1<f64>, Error> {
    let counted = check(keys, codes, codewords, mask)?;
    Ok(errors(keys, codes, codewords, mask) / counted.max(1) as f64)
}

/// (4): the squared distances to the codewords relative to the squared keys, per head `[H]`.
///
/// 0 if nothing counts or if there is no error; infinite if all keys that count are zero and a codeword is not.
///
/// # Shapes
/// As [`loss`].
///
/// # Errors
/// As [`loss`].
pub fn relative_error<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
) -> Result<Array1<f64>, Error> {
    check(keys, codes, codewords, mask)?;
    let mut relative = errors(keys, codes, codewords, mask);
    // The squares of keys are their squared distances from a codebook whose one codeword is zero.
    let zero_code = arr0(0).into_dyn();
    let zero_codes = zero_code.broadcast(codes.dim()).expect("a scalar has any shape");
    let zeros = Array3::zeros((codewords.len_of(Axis(0)), 1, codewords.len_of(Axis(2))));
    let squares = errors(keys, zero_codes, zeros.view(), mask);
    relative.zip_mut_with(&squares, |error, &square| *error /= if *error > 0.0 { square } else { 1.0 });
    Ok(relative)
}

/// Checks what the public functions take; the number of positions that count.
fn check<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
) -> Result<usize, Error> {
    let (n_sequences, n_heads, len, d_k) = keys.dim();
    let n_codes = codewords.len_of(Axis(1));
    check_shape("codes", &[n_sequences, n_heads, len], codes.shape())?;
    check_shape("codewords", &[n_heads, n_codes, d_k], codewords.shape())?;
    check_mask(mask, n_sequences, len)?;
    check_codes(codes, n_codes)?;
    check_finite("keys", keys)?;
    check_finite("codewords", codewords)?;
    Ok(mask.map_or(n_sequences * len, |mask| mask.iter().filter(|&&counts| counts).count()))
}

/// E of (1), per head `[H]`.
fn errors<T: Scalar>(
    keys: ArrayView4<'_, T>,
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
) -> Array1<f64> {
    let (n_sequences, n_heads, ..) = keys.dim();
    let of_sequences: Vec<f64> = (0..n_sequences * n_heads)
        .into_par_iter()
        .map(|i| {
            let (b, h) = (i / n_heads, i % n_heads);
            let mask = mask.as_ref().map(|mask| mask.row(b));
            let codewords = codewords.index_axis(Axis(0), h);
            squared_error(keys.slice(s![b, h, .., ..]), codes.slice(s![b, h, ..]), codewords, mask)
        })
        .collect();
    Array1::from_shape_fn(n_heads, |h| of_sequences.iter().skip(h).step_by(n_heads).sum())
}

/// One sequence's part of E in (1).
///
/// # Shapes
/// `keys` [N, K], `codes` `[N]`, `codewords` [S, K], `mask` `[N]`.
pub(crate) fn squared_error<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    mask: Option<ArrayView1<'_, bool>>,
) -> f64 {
    debug_assert_eq!(keys.dim(), (codes.len(), codewords.ncols()));
    let mut total = 0.0;
    for (j, (key, &code)) in keys.outer_iter().zip(codes).enumerate() {
        prefetch_ahead(keys, j);
        if mask.is_none_or(|mask| mask[j]) {
            let codeword = codewords.row(code as usize);
            let sums = match (key.to_slice(), codeword.to_slice()) {
                (Some(key), Some(codeword)) => on_best_simd!(squared_distance(key, codeword)),
                _ => {
                    // The same sums: what comes out must not depend on strides.
                    let mut sums = [0.0; SUMS];
                    for (i, (&k, &c)) in key.iter().zip(codeword).enumerate() {
                        sums[i % SUMS] += (k - c).as_f64() * (k - c).as_f64();
                    }
                    sums
                }
            };
            total += sum_of_lanes(sums);
        }
    }
    total
}

/// |k - c|^2 in parts, so that neighbours do not wait for each other.
#[inline(always)]
fn squared_distance<T: Scalar>(key: &[T], codeword: &[T]) -> [f64; SUMS] {
    let mut sums = [0.0; SUMS];
    let (keys, keys_rest) = key.as_chunks::<SUMS>();
    let (codewords, codewords_rest) = codeword.as_chunks::<SUMS>();
    for (key, codeword) in keys.iter().zip(codewords) {
        for ((sum, &k), &c) in sums.iter_mut().zip(key).zip(codeword) {
            let e = (k - c).as_f64();
            *sum += e * e;
        }
    }
    // Masked instructions, as in `dot`.
    if !keys_rest.is_empty() {
        for ((sum, &k), &c) in sums.iter_mut().zip(keys_rest).zip(codewords_rest) {
            let e = (k - c).as_f64();
            *sum += e * e;
        }
    }
    sums
}

/// (3) for one sequence, given `scale` = 2 w / Z.
///
/// # Shapes
/// `keys` and `d_keys` [N, K], `codes` `[N]`, `codewords` [S, K], `mask` `[N]`.
pub(crate) fn add_gradient<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    mask: Option<ArrayView1<'_, bool>>,
    scale: T,
    mut d_keys: ArrayViewMut2<'_, T>,
) {
    debug_assert_eq!(keys.dim(), (codes.len(), codewords.ncols()));
    debug_assert_eq!(keys.dim(), d_keys.dim());
    for (j, ((key, &code), mut d_key)) in
        keys.outer_iter().zip(codes).zip(d_keys.outer_iter_mut()).enumerate()
    {
        if mask.is_none_or(|mask| mask[j]) {
            let codeword = codewords.row(code as usize);
            match (d_key.as_slice_mut(), key.to_slice(), codeword.to_slice()) {
                (Some(d), Some(key), Some(codeword)) => {
                    on_best_simd!(add_scaled_difference(key, codeword, scale, d));
                }
                _ => Zip::from(d_key).and(key).and(codeword).for_each(|d, &k, &c| *d += scale * (k - c)),
            }
        }
    }
}

/// `d <- d + scale (k - c)`.
#[inline(always)]
fn add_scaled_difference<T: Scalar>(key: &[T], codeword: &[T], scale: T, d: &mut [T]) {
    for ((d, &k), &c) in d.iter_mut().zip(key).zip(codeword) {
        *d += scale * (k - c);
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn kernels_read_any_strides_and_add() {
        let keys = array![[2f32, 9.0, 5.0], [1.0, 9.0, 3.0]];
        let keys = keys.slice(s![.., ..;-2]); // (5, 2), (3, 1)
        let codewords = array![[0f32, 0.0], [1.0, 1.0]];
        let codes = array![1, 0];
        let (codes, codewords) = (codes.view(), codewords.view());
        let mask = array![true, false];
        assert_eq!(squared_error(keys, codes, codewords, None), 17.0 + 10.0);
        assert_eq!(squared_error(keys, codes, codewords, Some(mask.view())), 17.0);
        let mut d_keys = array![[100f32, 200.0], [300.0, 400.0]];
        add_gradient(keys, codes, codewords, None, 0.5, d_keys.view_mut());
        assert_eq!(d_keys, array![[102.0, 200.5], [301.5, 400.5]]);
        add_gradient(keys, codes, codewords, Some(mask.view()), 2.0, d_keys.view_mut());
        assert_eq!(d_keys, array![[110.0, 202.5], [301.5, 400.5]]);
    }

    #[test]
    fn threads_change_no_bit() {
        let keys = Array4::from_shape_fn((5, 3, 40, 7), |(b, h, t, k)| (b * h + t * k) as f32 / 7.0 - 3.3);
        let codes = Array3::from_shape_fn((5, 3, 40), |(b, h, t)| ((b + h + t) % 4) as u32);
        let codewords = Array3::from_shape_fn((3, 4, 7), |(h, s, k)| (h + s + k) as f32 / 3.0);
        let (keys, codes, codewords) = (keys.view(), codes.view(), codewords.view());
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let loss = loss(keys, codes, codewords, None).unwrap();
                (loss.to_bits(), backward(keys, codes, codewords, None, 0.1).unwrap())
            })
        };
        assert_eq!(run(1), run(3));
    }
}
