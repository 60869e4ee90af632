//! Codes that hardly any key takes get new codewords, drawn from the keys that are served worst.
//!
//! ```text
//! (1) code s is idle if N_s < ratio (sum_s N_s) / S                      N the usage: counts of keys, moving or not
//! (2) its codeword becomes k_j with probability |k_j - c_{z_j}|^2 / sum_j |k_j - c_{z_j}|^2, no key taken twice
//! (3) moving averages:   N_s <- (sum_s N_s) / S,   sums_s <- N_s k_j
//! ```
//!
//! The threshold (1) is a ratio to even usage: it does not depend on the size of batches. By (3) a revived code counts as
//! much as the average one, so that it has `ln(ratio) / ln(decay)` updates in which to find keys before it is idle again;
//! sums and counts change together, and the codeword follows from them. Keys count where the mask is true.
//!
//! A small ratio (0.1) replaces what is unused. A larger one (0.3 to 0.5) also breaks up codes that share one cluster of keys
//! while another cluster waits for its first. Drawn evenly from all keys, new codewords would go where most keys are, which is
//! where the codes are already.
//!
//! Codebooks that learn otherwise take [`replacements`] and write them themselves.
//!
//! Cost: one assignment of the keys if a code is idle, nothing else. Sources: the ratio is Moshi's (Défossez et al., 2024),
//! the draw that of k-means++.

use ndarray::{Array1, ArrayView2, ArrayView3, ArrayView4, Axis};
use rayon::prelude::*;

use super::random::Random;
use super::start::{counted, rows};
use super::{Codebook, Learning, assign, check_mask, kmeans};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// A code, and the codeword that it is to have from now on.
#[derive(Debug, Clone, PartialEq)]
pub struct Replacement<T> {
    /// The head of the code.
    pub head: usize,
    /// The code that was idle.
    pub code: usize,
    /// One of the keys `[K]`.
    pub codeword: Array1<T>,
}

/// (1) and (2): the idle codes of all heads in their order, each with its new codeword.
///
/// Fewer than are idle if fewer keys differ from their codewords: what is served exactly needs no further code.
///
/// # Shapes
/// `usage` [H, S], `keys` [B, H, T, K] of any strides, `codewords` [H, S, K], `mask` [B, T]: true where a position counts,
/// without one all do.
///
/// # Errors
/// [`Error::Shape`], [`Error::Empty`] (codewords), [`Error::NotFinite`], and [`Error::Invalid`] for a ratio outside 0 .. 1
/// or a usage below 0.
pub fn replacements<T: Scalar>(
    usage: ArrayView2<'_, f64>,
    keys: ArrayView4<'_, T>,
    codewords: ArrayView3<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
    ratio: f64,
    seed: u64,
) -> Result<Vec<Replacement<T>>, Error> {
    let (n_sequences, n_heads, len, d_k) = keys.dim();
    let n_codes = codewords.len_of(Axis(1));
    check_shape("codewords", &[n_heads, n_codes, d_k], codewords.shape())?;
    check_shape("usage", &[n_heads, n_codes], usage.shape())?;
    check_mask(mask, n_sequences, len)?;
    assign::check_codewords(codewords)?;
    check_finite("keys", keys)?;
    check_finite("usage", usage)?;
    if let Some(count) = usage.iter().find(|&&count| count < 0.0) {
        return Err(Error::invalid("usage", "0 or more", count));
    }
    if !(0.0..1.0).contains(&ratio) {
        return Err(Error::invalid("ratio", "0 or more, and below 1", ratio));
    }
    let positions = counted(n_sequences, len, mask);
    let of_head = |head: usize| {
        let usage = usage.row(head);
        let least = ratio * usage.sum() / n_codes as f64;
        let idle: Vec<usize> = (0..n_codes).filter(|&code| usage[code] < least).collect();
        if idle.is_empty() || positions.is_empty() {
            return Ok(vec![]);
        }
        let (keys, codewords) = (rows(keys, head, &positions), codewords.index_axis(Axis(0), head));
        let codes = assign(keys.view(), codewords)?;
        let errors = kmeans::errors(keys.view(), &codes, codewords);
        let drawn = Random::new(seed, head).distinct(errors, idle.len());
        let replace = |(code, j)| Replacement { head, code, codeword: Array1::from(keys.row(j).to_vec()) };
        Ok(idle.into_iter().zip(drawn).map(replace).collect())
    };
    let heads: Vec<Vec<_>> = (0..n_heads).into_par_iter().map(of_head).collect::<Result<_, Error>>()?;
    Ok(heads.concat())
}

impl<T: Scalar> Codebook<T> {
    /// Gives idle codes a new start at keys; the number of codes that got one.
    ///
    /// To be called after an [`update`](Codebook::update), with the keys of that step, every few steps. A code is idle if it is
    /// used less than `ratio` times as often as the average code; 0 replaces none. `seed` decides which keys
    /// are drawn: pass another one at each step. Formulas: [`revive`](super::revive).
    ///
    /// # Shapes
    /// As [`replacements`].
    ///
    /// # Errors
    /// As [`replacements`], and [`Error::Invalid`] for a codebook that does not learn by moving averages: only these
    /// remember their usage. The codebook is then as it was.
    pub fn revive(
        &mut self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
        ratio: f64,
        seed: u64,
    ) -> Result<usize, Error> {
        compiled_here!(
            T,
            Codebook::<T>::revive_here,
            fn(
                &mut Codebook<T>,
                ArrayView4<'_, T>,
                Option<ArrayView2<'_, bool>>,
                f64,
                u64,
            ) -> Result<usize, Error>
        )(self, keys, mask, ratio, seed)
    }

    fn revive_here(
        &mut self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
        ratio: f64,
        seed: u64,
    ) -> Result<usize, Error> {
        let Learning::Ema(ema) = &self.learning else {
            let expected = "a codebook that learns by moving averages (see `replacements`)";
            return Err(Error::invalid("codebook", expected, "one that counts nothing"));
        };
        let usage = ema.counts().mapv(Scalar::as_f64);
        let replacements = replacements(usage.view(), keys, ema.codewords().view(), mask, ratio, seed)?;
        if let Learning::Ema(ema) = &mut self.learning {
            ema.replace(&replacements)?;
        }
        Ok(replacements.len())
    }
}
