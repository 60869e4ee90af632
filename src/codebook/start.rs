//! First codewords: random, keys, or the centres of clusters of keys.
//!
//! ```text
//! (1) random:   c_s from N(0, deviation^2)
//! (2) sample:   c_s = k_j, S different positions j drawn evenly
//! (3) k_means:  c_s by k-means++, each next key drawn in proportion to its squared distance from the codewords so far;
//!               then steps of Lloyd: each codeword the mean of the keys nearest to it
//! ```
//!
//! Keys count where the mask is true; each head has keys, draws and codewords of its own. The same seed gives the same
//! codewords, for any number of threads, and draws one head as if it were alone at its place. A codebook is made of them by its
//! kind of learning, such as [`Ema::from_codewords`](super::Ema::from_codewords), which derives its state from
//! them: nothing is stored twice.
//!
//! Fewer keys than codes: (2) takes each key in turn, over again; (3) does so with the different ones among the
//! keys. Codewords then repeat; as ties take the lowest code, the repetitions stay unused until
//! [revived](super::Codebook::revive) or moved.
//!
//! Cost: (2) N K. (3) seeding about as much as one assignment of the keys; a step one assignment and N K. Source: k-means++
//! (Arthur and Vassilvitskii, 2007).
//!
//! ```
//! use transformer_vq::codebook::{Codebook, Ema, start};
//! use transformer_vq::ndarray::{Array4, array};
//!
//! let keys = Array4::from_shape_fn((1, 1, 90, 2), |(_, _, t, k)| if t % 3 == k { 6.0 } else { 0.0 }); // three places
//! let codewords = start::k_means(keys.view(), 3, None, 10, 1)?;
//! let codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99)?);
//! let mut codes = codebook.assign(keys.view())?.into_raw_vec_and_offset().0;
//! codes.truncate(3);
//! codes.sort();
//! assert_eq!(codes, [0, 1, 2]);
//! # Ok::<(), transformer_vq::Error>(())
//! ```

use ndarray::{Array2, Array3, ArrayView2, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::check_mask;
use super::kmeans;
use super::random::Random;
use crate::compiled::compiled_here;
use crate::error::check_memory;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// (1): codewords [H, S, K] from the normal distribution.
///
/// The published start of moving averages is [`Ema::random`](super::Ema::random), this with a deviation of `1 / sqrt(H S)`.
///
/// # Errors
/// [`Error::Empty`] (H, S or K = 0), [`Error::TooLarge`], and [`Error::Invalid`] for a deviation that is negative or not
/// finite.
pub fn random<T: Scalar>(
    n_heads: usize,
    n_codes: usize,
    d_k: usize,
    deviation: f64,
    seed: u64,
) -> Result<Array3<T>, Error> {
    check_memory::<T>("codewords", &[n_heads, n_codes, d_k])?;
    if n_heads == 0 || n_codes == 0 || d_k == 0 {
        return Err(Error::Empty { what: "codewords" });
    }
    if !(0.0..f64::INFINITY).contains(&deviation) {
        return Err(Error::invalid("deviation", "0 or more, and finite", deviation));
    }
    let mut codewords = Array3::zeros((n_heads, n_codes, d_k));
    for (head, mut codewords) in codewords.outer_iter_mut().enumerate() {
        let mut random = Random::new(seed, head);
        codewords.mapv_inplace(|_| T::from_f64(deviation * random.normal()));
    }
    Ok(codewords)
}

/// (2): codewords [H, S, K] that are keys.
///
/// # Shapes
/// `keys` [B, H, T, K] of any strides, `mask` [B, T]: true where a position counts, without one all do.
///
/// # Errors
/// [`Error::Shape`], [`Error::Empty`] (no key that counts, or H, S or K = 0), [`Error::NotFinite`], [`Error::TooLarge`].
pub fn sample<T: Scalar>(
    keys: ArrayView4<'_, T>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
    seed: u64,
) -> Result<Array3<T>, Error> {
    compiled_here!(
        T,
        sample_here::<T>,
        fn(ArrayView4<'_, T>, usize, Option<ArrayView2<'_, bool>>, u64) -> Result<Array3<T>, Error>
    )(keys, n_codes, mask, seed)
}

fn sample_here<T: Scalar>(
    keys: ArrayView4<'_, T>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
    seed: u64,
) -> Result<Array3<T>, Error> {
    of_heads(keys, n_codes, mask, seed, |keys, random| {
        let drawn = random.distinct(vec![1.0; keys.nrows()], n_codes);
        let repeated: Vec<usize> = drawn.iter().copied().cycle().take(n_codes).collect();
        Ok(keys.select(Axis(0), &repeated))
    })
}

/// (3): codewords [H, S, K] by k-means++ and at most `steps` steps of Lloyd; it stops where a step changes no code.
///
/// # Shapes
/// `keys` [B, H, T, K] of any strides, `mask` [B, T]: true where a position counts, without one all do.
///
/// # Errors
/// As [`sample`], and [`Error::Invalid`] for more codes than a `u32` can name.
pub fn k_means<T: Scalar>(
    keys: ArrayView4<'_, T>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
    steps: usize,
    seed: u64,
) -> Result<Array3<T>, Error> {
    compiled_here!(
        T,
        k_means_here::<T>,
        fn(ArrayView4<'_, T>, usize, Option<ArrayView2<'_, bool>>, usize, u64) -> Result<Array3<T>, Error>
    )(keys, n_codes, mask, steps, seed)
}

fn k_means_here<T: Scalar>(
    keys: ArrayView4<'_, T>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
    steps: usize,
    seed: u64,
) -> Result<Array3<T>, Error> {
    if u32::try_from(n_codes).is_err() {
        return Err(Error::invalid("n_codes", "at most 2^32 - 1", n_codes));
    }
    of_heads(keys, n_codes, mask, seed, |keys, random| kmeans::k_means(keys.view(), n_codes, steps, random))
}

/// Checks, then the codewords that `codewords_of` makes of each head's keys that count [N, K].
fn of_heads<T: Scalar>(
    keys: ArrayView4<'_, T>,
    n_codes: usize,
    mask: Option<ArrayView2<'_, bool>>,
    seed: u64,
    codewords_of: impl Fn(Array2<T>, &mut Random) -> Result<Array2<T>, Error> + Sync,
) -> Result<Array3<T>, Error> {
    let (n_sequences, n_heads, len, d_k) = keys.dim();
    check_mask(mask, n_sequences, len)?;
    check_memory::<T>("codewords", &[n_heads, n_codes, d_k])?;
    if n_heads == 0 || n_codes == 0 || d_k == 0 {
        return Err(Error::Empty { what: "codewords" });
    }
    check_finite("keys", keys)?;
    let positions = counted(n_sequences, len, mask);
    if positions.is_empty() {
        return Err(Error::Empty { what: "keys" });
    }
    let heads: Vec<_> = (0..n_heads)
        .into_par_iter()
        .map(|head| codewords_of(rows(keys, head, &positions), &mut Random::new(seed, head)))
        .collect::<Result<_, _>>()?;
    let mut codewords = Array3::zeros((n_heads, n_codes, d_k));
    codewords.outer_iter_mut().zip(&heads).for_each(|(mut codewords, head)| codewords.assign(head));
    Ok(codewords)
}

/// The positions (sequence, position) that count.
pub(super) fn counted(
    n_sequences: usize,
    len: usize,
    mask: Option<ArrayView2<'_, bool>>,
) -> Vec<(usize, usize)> {
    let all = ndarray::indices((n_sequences, len)).into_iter();
    all.filter(|&position| mask.is_none_or(|mask| mask[position])).collect()
}

/// One head's keys at these positions [N, K].
pub(super) fn rows<T: Scalar>(
    keys: ArrayView4<'_, T>,
    head: usize,
    positions: &[(usize, usize)],
) -> Array2<T> {
    let mut rows = Array2::zeros((positions.len(), keys.len_of(Axis(3))));
    for (mut row, &(sequence, position)) in rows.outer_iter_mut().zip(positions) {
        row.assign(&keys.slice(s![sequence, head, position, ..]));
    }
    rows
}
