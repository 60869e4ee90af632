//! The fair competitor: exact causal softmax attention over keys that are not quantized, as fast as this crate can make it.
//!
//! ```text
//! (1)  s_ij = q_i . k_j                                  j <= i
//! (2)  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//! (3)  o_i  = sum_j p_ij v_j
//! ```
//!
//! No T x T matrix is ever whole. Blocks of queries meet tiles of keys; what a query has seen so far is held as a maximum m,
//! a sum l and an unfinished output, which the next tile corrects:
//!
//! ```text
//! (4)  m' = max(m, max_j s_ij)    l <- l exp(m - m') + sum_j exp(s_ij - m')    o <- o exp(m - m') + sum_j exp(s_ij - m') v_j
//! ```
//!
//! What makes it fast is what makes [`blockwise`](super::blockwise) fast: the same matrix product and exponential, scores
//! that lie transposed (keys in rows, queries side by side), and recomputation in backward from `lse` alone. The half that
//! causality hides is skipped: only a tile that holds keys of the block's own queries is masked, and it is cut into
//! strips of 64 keys, each of which meets the queries from its first key on.
//!
//! Cost: T^2 (K + V) operations forward, T^2 (3 K + 2 V) backward, T^2 / 2 exponentials in each. Memory beyond inputs and
//! outputs: one tile of scores forward, two backward.
//! Source: the running maximum and sum are those of FlashAttention (Dao et al., arXiv 2205.14135).

use std::ops::Range;

use fearless_simd::Simd;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, s};

use crate::error::{check_finite, check_shape};
use crate::ops::matmul::{add_product, product};
use crate::ops::simd::{fused, on_best_simd};
use crate::{Error, Scalar};

/// Queries of a block, and keys of a tile. Measured (f32, K = V = 64, T = 4096): 128, 256, 512 queries x 256, 512, 1024 keys
/// differ by 5 % at most; tiles of 128 keys are up to 9 % slower. This pair, half a megabyte of scores, is within 1 % of the best.
const BLOCK: usize = 256;
const TILE: usize = 512;

/// Keys of a tile that is masked.
const STRIP: usize = 64;

/// Queries and the keys they meet in one product.
#[derive(Debug, Clone)]
struct Tile {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Tile {
    /// All that the queries of a block see: whole tiles before the block, strips inside.
    fn all(block: Range<usize>) -> impl Iterator<Item = Tile> {
        let (start, end) = (block.start, block.end);
        let before = (0..start)
            .step_by(TILE)
            .map(move |key| Tile { queries: start..end, keys: key..start.min(key + TILE) });
        let inside =
            block.step_by(STRIP).map(move |key| Tile { queries: key..end, keys: key..end.min(key + STRIP) });
        before.chain(inside)
    }

    /// The first of the tile's queries that sees its key `r`.
    fn first_lane(&self, r: usize) -> usize {
        (self.keys.start + r).saturating_sub(self.queries.start)
    }

    /// (1) transposed: keys in rows, queries in columns, in the upper left corner of `scores`.
    fn scores<T: Scalar>(&self, q: ArrayView2<'_, T>, k: ArrayView2<'_, T>, scores: &mut Array2<T>) {
        let (keys, queries) = (self.keys.clone(), self.queries.clone());
        let scores = scores.slice_mut(s![..keys.len(), ..queries.len()]);
        product(k.slice_move(s![keys, ..]), q.slice(s![queries, ..]).t(), scores);
    }

    /// What [`scores`](Self::scores) has filled.
    fn view<'a, T>(&self, scores: &'a Array2<T>) -> ArrayView2<'a, T> {
        scores.slice(s![..self.keys.len(), ..self.queries.len()])
    }
}

/// The blocks of T queries.
fn blocks(t: usize) -> impl Iterator<Item = Range<usize>> {
    (0..t).step_by(BLOCK).map(move |start| start..t.min(start + BLOCK))
}

/// A tile of scores, as large as T tokens need.
fn score_buffer<T: Scalar>(t: usize) -> Array2<T> {
    Array2::zeros((t.min(TILE), t.min(BLOCK)))
}

/// Outputs o [T, V], and lse `[T]`, the logarithm of each query's sum of `exp(score)`.
///
/// ```
/// use transformer_vq::attention::quadratic;
/// use transformer_vq::ndarray::array;
///
/// // A query of zeros attends to everything equally: the means of 1; of 1, 3; of 1, 3, 8.
/// let (q, k, v) = (array![[0.0], [0.0], [0.0]], array![[5.0], [1.0], [2.0]], array![[1.0], [3.0], [8.0]]);
/// let (out, _) = quadratic::forward(q.view(), k.view(), v.view())?;
/// assert_eq!(out, array![[1.0], [2.0], [4.0]]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
///
/// # Shapes
/// `q` [T, K], already scaled, `k` [T, K], `v` [T, V].
///
/// # Errors
/// [`Error::Shape`], [`Error::NotFinite`].
pub fn forward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
) -> Result<(Array2<T>, Array1<T>), Error> {
    check_inputs(q, k, v)?;
    let t = q.nrows();
    let mut out = Array2::zeros(v.raw_dim());
    let mut lse = Array1::zeros(t);
    let mut scores = score_buffer(t);
    for block in blocks(t) {
        let mut max = vec![T::neg_infinity(); block.len()];
        let mut sum = vec![T::zero(); block.len()];
        let mut factor = vec![T::zero(); block.len()];
        for tile in Tile::all(block.clone()) {
            tile.scores(q, k, &mut scores); // (1)
            let seen = tile.queries.start - block.start..;
            let running = Running {
                max: &mut max[seen.clone()],
                sum: &mut sum[seen.clone()],
                factor: &mut factor[seen],
            };
            let stride = scores.ncols();
            on_best_simd!(simd => exponentiate(simd, &tile, stride, slice_mut(&mut scores), running)); // (4)
            let mut out = out.slice_mut(s![tile.queries.clone(), ..]);
            for (mut row, &factor) in
                out.rows_mut().into_iter().zip(&factor[tile.queries.start - block.start..])
            {
                row *= factor;
            }
            add_product(tile.view(&scores).t(), v.slice(s![tile.keys.clone(), ..]), out);
        }
        for (i, row) in block.enumerate() {
            lse[row] = max[i] + sum[i].ln(); // (2)
            let mut out = out.row_mut(row);
            out *= T::one() / sum[i]; // (3)
        }
    }
    Ok((out, lse))
}

/// d_q [T, K], d_k [T, K], d_v [T, V].
pub type Gradients<T> = (Array2<T>, Array2<T>, Array2<T>);

/// Gradients of `sum(d_out * out)` with respect to q, k and v.
///
/// ```text
/// (3)  dp_ij = dO_i . v_j               dv_j = sum_{i>=j} p_ij dO_i
/// (2)  ds_ij = p_ij (dp_ij - dO_i . o_i)
/// (1)  dq_i  = sum_{j<=i} ds_ij k_j     dk_j = sum_{i>=j} ds_ij q_i
/// ```
///
/// # Shapes
/// `q`, `k`, `v` as in [`forward`], `out` [T, V] and `lse` `[T]` from there, `d_out` [T, V].
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    check_inputs(q, k, v)?;
    let t = q.nrows();
    check_shape("out", v.shape(), out.shape())?;
    check_shape("lse", &[t], lse.shape())?;
    check_shape("d_out", v.shape(), d_out.shape())?;
    check_finite("out", out)?;
    check_finite("lse", lse)?;
    check_finite("d_out", d_out)?;
    let delta: Vec<T> =
        d_out.rows().into_iter().zip(out.rows()).map(|(d_out, out)| d_out.dot(&out)).collect();
    let lse = lse.to_vec();
    let (mut d_q, mut d_k) = (Array2::zeros(q.raw_dim()), Array2::zeros(k.raw_dim()));
    let mut d_v = Array2::zeros(v.raw_dim());
    let (mut scores, mut d_scores) = (score_buffer(t), score_buffer(t));
    let stride = scores.ncols();
    for tile in blocks(t).flat_map(Tile::all) {
        let (keys, queries) = (tile.keys.clone(), tile.queries.clone());
        tile.scores(q, k, &mut scores);
        tile.scores(d_out, v, &mut d_scores); // (3), of the same form
        let of_queries = (&lse[queries.clone()], &delta[queries.clone()]);
        let (p, d_p) = (slice_mut(&mut scores), slice_mut(&mut d_scores));
        on_best_simd!(simd => score_gradients(simd, &tile, stride, p, d_p, of_queries)); // (2)
        let d_out = d_out.slice(s![queries.clone(), ..]);
        add_product(tile.view(&scores), d_out, d_v.slice_mut(s![keys.clone(), ..])); // (3)
        let d = tile.view(&d_scores);
        add_product(d.t(), k.slice(s![keys.clone(), ..]), d_q.slice_mut(s![queries.clone(), ..])); // (1)
        add_product(d, q.slice(s![queries, ..]), d_k.slice_mut(s![keys, ..]));
    }
    Ok((d_q, d_k, d_v))
}

fn check_inputs<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
) -> Result<(), Error> {
    check_shape("k", q.shape(), k.shape())?;
    check_shape("v", &[q.nrows(), v.ncols()], v.shape())?;
    check_finite("q", q)?;
    check_finite("k", k)?;
    check_finite("v", v)
}

fn slice_mut<T>(array: &mut Array2<T>) -> &mut [T] {
    array.as_slice_mut().expect("buffers are contiguous")
}

/// What a tile's queries have seen so far (4), one number per query.
struct Running<'a, T> {
    max: &'a mut [T],
    sum: &'a mut [T],
    /// `exp(m - m')`.
    factor: &'a mut [T],
}

/// (4): scores become `exp(s - m')`, 0 where a query does not see a key.
#[inline(always)]
fn exponentiate<S: Simd, T: Scalar>(
    simd: S,
    tile: &Tile,
    stride: usize,
    scores: &mut [T],
    running: Running<'_, T>,
) {
    let Running { max, sum, factor } = running;
    let lanes = max.len();
    factor.copy_from_slice(max);
    for r in 0..tile.keys.len() {
        let from = tile.first_lane(r);
        for (max, &score) in max[from..].iter_mut().zip(&scores[r * stride..][from..lanes]) {
            *max = if score > *max { score } else { *max };
        }
    }
    // The first tile of a query leaves no maximum of -inf: it holds key 0, which every query sees.
    for ((factor, &max), sum) in factor.iter_mut().zip(&*max).zip(&mut *sum) {
        *factor = (*factor - max).exp_fast(fused(simd));
        *sum *= *factor;
    }
    for r in 0..tile.keys.len() {
        let from = tile.first_lane(r);
        let row = &mut scores[r * stride..][..lanes];
        row[..from].fill(T::zero());
        for ((score, &max), sum) in row[from..].iter_mut().zip(&max[from..]).zip(&mut sum[from..]) {
            *score = (*score - max).exp_fast(fused(simd));
            *sum += *score;
        }
    }
}

/// (2), backward: scores become p, and d_p becomes d_s.
#[inline(always)]
fn score_gradients<S: Simd, T: Scalar>(
    simd: S,
    tile: &Tile,
    stride: usize,
    scores: &mut [T],
    d: &mut [T],
    (lse, delta): (&[T], &[T]),
) {
    let lanes = lse.len();
    for r in 0..tile.keys.len() {
        let from = tile.first_lane(r);
        let (row, d_row) = (&mut scores[r * stride..][..lanes], &mut d[r * stride..][..lanes]);
        row[..from].fill(T::zero());
        d_row[..from].fill(T::zero());
        let of_queries = lse[from..].iter().zip(&delta[from..]);
        for ((score, d), (&lse, &delta)) in row[from..].iter_mut().zip(&mut d_row[from..]).zip(of_queries) {
            *score = (*score - lse).exp_fast(fused(simd));
            *d = *score * (*d - delta);
        }
    }
}
