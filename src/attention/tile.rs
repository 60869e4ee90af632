//! The scores of one tile: what its 64 queries make of all codes and of the recent keys.
//!
//! Scores lie transposed, codes or keys in rows and the queries side by side in a row, in the lanes of the processor. So the
//! score row of a key is a copy of the row of its code, a maximum or a sum over keys is an addition of rows, and the gradient
//! of a code is the sum of its keys' rows. Lanes without a query hold numbers that nobody reads.
//!
//! ```text
//! (1)  content[s][i] = (q_i + u) . c_s
//! (2)  recent[j][i]  = content[z_j][i] + (q_i + w) . r_{i-j}
//! (3)  p = exp(score + ln N - shift_i)
//! ```

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::block::Tile;
use super::blockwise::Piece;
use super::kernels::{add_terms, exponentiate, scatter, score_gradients, softmax};
use super::skew::{self, Source};
use crate::Scalar;
use crate::ops::finite::all_finite;
use crate::ops::matmul::product;
use crate::ops::simd::{LANES, Row, Rows, on_best_simd};
use crate::ops::transpose::{MOST_LANES, transpose};
use crate::ops::triangle::Triangle;

/// The matrix [rows, 64] of these rows.
pub(super) fn view<T>(rows: &[Row<T>]) -> ArrayView2<'_, T> {
    rows.into()
}

/// As [`view`], to write to.
pub(super) fn view_mut<T>(rows: &mut [Row<T>]) -> ArrayViewMut2<'_, T> {
    rows.into()
}

/// Buffers for the scores of one tile, made once per piece.
#[derive(Debug)]
pub(super) struct Scores<T> {
    /// The codes whose scores these are.
    codes: Range<usize>,
    /// (1), then p of cached codes `[S]`.
    pub content: Rows<T>,
    /// (2), then p of recent keys; a tile uses the first of them, one per row [M + L].
    recent: Rows<T>,
    /// q + u [64, K].
    q_content: Array2<T>,
    /// Its transpose `[K]`.
    q_content_t: Rows<T>,
    /// q + w [64, K].
    q_position: Array2<T>,
    /// (q + w) . r, in the layout of [`skew`].
    bias: Array2<T>,
}

impl<T: Scalar> Scores<T> {
    pub fn new(piece: &Piece<'_, T>) -> Self {
        let (t, k) = piece.inputs.q.dim();
        let attention = piece.attention;
        let rows = attention.block_len.min(t) + attention.window.min(piece.window.codes.len() + t);
        let biased = if piece.inputs.biases.is_some() { LANES } else { 0 };
        Scores {
            codes: 0..piece.inputs.codewords.nrows(),
            content: Rows::zeros(piece.inputs.codewords.nrows()),
            recent: Rows::zeros(rows),
            q_content: Array2::zeros((LANES, k)),
            q_content_t: Rows::zeros(k),
            q_position: Array2::zeros((biased, k)),
            bias: skew::zeros(biased, attention.window),
        }
    }

    /// Buffers for (1) of some codes only, without recent keys.
    pub fn of_codes(piece: &Piece<'_, T>, codes: Range<usize>) -> Self {
        let k = piece.inputs.q.ncols();
        Scores {
            content: Rows::zeros(codes.len()),
            codes,
            recent: Rows::zeros(0),
            q_content: Array2::zeros((LANES, k)),
            q_content_t: Rows::zeros(k),
            q_position: Array2::zeros((0, k)),
            bias: skew::zeros(0, 0),
        }
    }

    /// Takes in the tile's queries and computes (1).
    pub fn fill_content(&mut self, piece: &Piece<'_, T>, tile: &Tile) {
        let q = piece.inputs.q.slice(s![tile.queries(), ..]);
        let content = self.q_content.as_slice_mut().expect("contiguous");
        if self.q_position.nrows() > 0 {
            let position = self.q_position.as_slice_mut().expect("contiguous");
            let terms: [&[T]; 2] = [&piece.content_bias, &piece.position_bias];
            on_best_simd!(add_terms(q, terms, [content, position]));
        } else {
            on_best_simd!(add_terms(q, [&piece.content_bias], [content]));
        }
        transpose(self.q_content.slice(s![..tile.len, ..]), &mut self.q_content_t);
        let codewords = piece.inputs.codewords.slice(s![self.codes.clone(), ..]);
        // The tile of a short document leaves most lanes without a query.
        let lanes = tile.len.next_multiple_of(MOST_LANES);
        let q_t = view(&self.q_content_t).slice_move(s![.., ..lanes]);
        product(codewords, q_t, view_mut(&mut self.content).slice_move(s![.., ..lanes]));
    }

    /// Computes (2) from (1); minus infinity where a query does not see a key.
    pub fn fill_recent(&mut self, piece: &Piece<'_, T>, tile: &Tile) {
        let (old, keys) = tile.parts();
        let recent = &mut self.recent[..tile.rows.len()];
        let (carried, own) = recent.split_at_mut(old.len());
        product(piece.carried_keys(tile), view(&self.q_content_t), view_mut(carried));
        let (content, codes) = (&*self.content, &piece.codes[keys]);
        if let Some(relative_t) = &piece.relative_t {
            let q_position = self.q_position.slice(s![..tile.len, ..]);
            let bias = skew::inside_mut(&mut self.bias, tile.len);
            relative_t.product((q_position, Triangle::Full), 0, bias, false);
            let first = tile.rows.start;
            skew::add(tile, &self.bias, Source::Row, (first, carried));
            skew::add(tile, &self.bias, Source::Codes(content, codes), (first + old.len(), own));
        } else {
            for (row, &code) in own.iter_mut().zip(codes) {
                *row = content[code as usize];
            }
        }
        // With a cache, only the tile's own keys are hidden from some of its queries.
        let whole = if tile.block.cache { recent.len() - tile.len } else { 0 };
        for (row, r) in recent[whole..].iter_mut().zip(tile.rows.start + whole..) {
            let seen = tile.seen(r);
            row[..seen.start].fill(T::neg_infinity());
            row[seen.end..].fill(T::neg_infinity());
        }
    }

    /// (3) with each query's largest score as its shift: shifts, sums over cached codes, and sums over all that is seen.
    pub fn softmax(&mut self, tile: &Tile, log_counts: &[T]) -> [Row<T>; 3] {
        let (content, recent) = (&mut self.content[..log_counts.len()], &mut self.recent[..tile.rows.len()]);
        on_best_simd!(simd => softmax(simd, content, log_counts, recent))
    }

    /// (3) for cached codes.
    pub fn exponentiate_cached(&mut self, log_counts: &[T], shift: &Row<T>) {
        on_best_simd!(simd => exponentiate(simd, &mut self.content[..log_counts.len()], log_counts, shift));
    }

    /// (3) for recent keys.
    pub fn exponentiate_recent(&mut self, tile: &Tile, shift: &Row<T>) {
        on_best_simd!(simd => exponentiate(simd, &mut self.recent[..tile.rows.len()], &[], shift));
    }

    /// Whether the tile's queries are finite.
    pub fn finite(&self, tile: &Tile) -> bool {
        all_finite(self.q_content(tile))
    }

    /// Scores or p of recent keys, one per row of the tile.
    pub fn recent(&self, tile: &Tile) -> &[Row<T>] {
        &self.recent[..tile.rows.len()]
    }

    /// q + u [len, K].
    pub fn q_content(&self, tile: &Tile) -> ArrayView2<'_, T> {
        self.q_content.slice(s![..tile.len, ..])
    }

    /// q + w [len, K], where there are biases.
    pub fn q_position(&self, tile: &Tile) -> ArrayView2<'_, T> {
        self.q_position.slice(s![..tile.len, ..])
    }
}

/// Gradients of the scores of one tile, in the layout of [`Scores`].
#[derive(Debug)]
pub(super) struct ScoreGradients<T> {
    /// `[S]`.
    pub content: Rows<T>,
    /// [M + L].
    recent: Rows<T>,
    /// Of (q + w) . r, in the layout of [`skew`].
    bias: Array2<T>,
}

impl<T: Scalar> ScoreGradients<T> {
    pub fn new(scores: &Scores<T>) -> Self {
        ScoreGradients {
            content: Rows::zeros(scores.content.len()),
            recent: Rows::zeros(scores.recent.len()),
            bias: Array2::zeros(scores.bias.raw_dim()),
        }
    }

    /// One per row of the tile.
    pub fn recent(&self, tile: &Tile) -> &[Row<T>] {
        &self.recent[..tile.rows.len()]
    }

    /// As [`recent`](Self::recent), to write to.
    pub fn recent_mut(&mut self, tile: &Tile) -> &mut [Row<T>] {
        &mut self.recent[..tile.rows.len()]
    }

    /// Turns d_p into d_score: `d_s = p (d_p - sum p d_p)`, over cached codes and recent keys; then `p` of cached codes into
    /// p / N, given the codes' `shares` 1 / N.
    pub fn softmax_backward(&mut self, scores: &mut Scores<T>, tile: &Tile, cached: usize, shares: &[T]) {
        let rows = tile.rows.len();
        let content = (&mut scores.content[..cached], &mut self.content[..cached]);
        let recent = (&scores.recent[..rows], &mut self.recent[..rows]);
        on_best_simd!(score_gradients(content, recent, shares));
    }

    /// Adds the rows of the piece's keys to the rows of their codes: the look-up of (2), backward.
    pub fn scatter(&mut self, piece: &Piece<'_, T>, tile: &Tile) {
        let (old, keys) = tile.parts();
        let recent = &self.recent[old.len()..tile.rows.len()];
        on_best_simd!(scatter(recent, &piece.codes[keys], &mut self.content));
    }

    /// Gradient of `(q + w) R^T`, distances from M down to 0: the skew of (2), backward [len, M+1].
    pub fn bias(&mut self, tile: &Tile) -> ArrayView2<'_, T> {
        skew::collect(tile, &self.recent[..tile.rows.len()], &mut self.bias);
        skew::inside(&self.bias, tile.len)
    }
}
