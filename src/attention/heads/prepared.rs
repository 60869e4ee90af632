//! Heads made ready to infer: what follows from codebook and biases alone is computed once, for any number of pieces.
//!
//! One token of every sequence goes through it in two steps:
//!
//! ```text
//! per head:               c'_s . (q + u)  and  c'_s . k       one product, for all sequences together; c' = c - mean of c
//!                         (q + w) . r_d                       another
//!                         a_s = c'_s . (q + u) + mean . (q + u),   z from c'_s . k as in `assign`
//! per sequence and head:  attention as in `stream`            the codes of its window, its values, its cache
//! ```
//!
//! A key of the window scores as its code does, as long as codewords have not moved since it was stored: that is seen by comparing
//! them, once for the same codewords. Otherwise its own product is taken.
//!
//! So codewords and relative biases are read once for all sequences, codewords for queries and keys alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{Array2, Array3, ArrayView1, ArrayView3, ArrayView4, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::forward::{self, fit_all};
use super::{BatchBiases, BatchInputs, BatchOutput, parts};
use crate::attention::stream::{self, Scored};
use crate::attention::{AttentionState, VqAttention};
use crate::codebook::packed::{PackedCodewords, Table};
use crate::codebook::{Codebook, commitment};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::matmul::PackedWeights;
use crate::ops::threads::in_pool;
use crate::{Error, Scalar};

/// Attention over heads with a codebook and relative biases that stay as they are: for decoding, where to make them ready costs
/// more than a token.
///
/// ```
/// use transformer_vq::attention::VqAttention;
/// use transformer_vq::codebook::{Codebook, Ema};
/// use transformer_vq::ndarray::{Array4, array};
///
/// let attention = VqAttention { window: 2, ..VqAttention::default() };
/// let codebook = Codebook::ema(Ema::from_codewords(array![[[1.0, 0.0], [0.0, 1.0]]], 0.99)?);
/// let heads = attention.prepare(&codebook, None)?;
/// let mut states = attention.new_states(1, &codebook, 1)?;
/// for t in 0..100 {
///     let (q, k) = (Array4::zeros((1, 1, 1, 2)), Array4::ones((1, 1, 1, 2)));
///     let v = Array4::from_elem((1, 1, 1, 1), f64::from(t));
///     let output = heads.push(q.view(), k.view(), v.view(), &mut states)?;
///     // A query of zeros attends to everything equally: the mean of 0, 1, ..., t.
///     assert!((output.out[[0, 0, 0, 0]] - f64::from(t) / 2.0).abs() < 1e-12);
/// }
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PreparedHeads<T = f32> {
    attention: VqAttention,
    table: Table<T>,
    /// u, w [H, K] and r [Hk, M+1, K].
    biases: Option<(Array2<T>, Array2<T>, Array3<T>)>,
    columns: Arc<[HeadColumns<T>]>,
}

impl VqAttention {
    /// This attention made ready to infer, with copies of the codewords and biases as they are now.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it cannot be computed, [`Error::Shape`] and [`Error::NotFinite`] for biases.
    pub fn prepare<T: Scalar>(
        &self,
        codebook: &Codebook<T>,
        biases: Option<BatchBiases<'_, T>>,
    ) -> Result<PreparedHeads<T>, Error> {
        compiled_here!(
            T,
            VqAttention::prepare_here::<T>,
            fn(&VqAttention, &Codebook<T>, Option<BatchBiases<'_, T>>) -> Result<PreparedHeads<T>, Error>
        )(self, codebook, biases)
    }

    fn prepare_here<T: Scalar>(
        &self,
        codebook: &Codebook<T>,
        biases: Option<BatchBiases<'_, T>>,
    ) -> Result<PreparedHeads<T>, Error> {
        self.validate()?;
        if let Some(biases) = &biases {
            // Any number of query heads that the codebook's key heads divide.
            let (h, n_key_heads) = (biases.content.nrows(), codebook.n_heads());
            let h = if h > 0 && h.is_multiple_of(n_key_heads) { h } else { n_key_heads };
            biases.check((h, n_key_heads), codebook.d_k(), self.window)?;
        }
        let table = Table::new(codebook.codewords());
        let columns = HeadColumns::all(&table, biases.as_ref().map(|biases| biases.relative));
        let biases = biases.map(|b| (b.content.to_owned(), b.position.to_owned(), b.relative.to_owned()));
        Ok(PreparedHeads { attention: *self, table, biases, columns })
    }
}

impl<T: Scalar> PreparedHeads<T> {
    /// As [`VqAttention::push`]: the outputs of a piece of any size, `states` [B, Hk] move on. A codebook does not learn from what
    /// it infers: the statistics in the output are empty.
    ///
    /// # Shapes
    /// Queries, already scaled [B, H, T, K], keys [B, Hk, T, K], values [B, Hk, T, V].
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite. The states are then as they were.
    pub fn push(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        states: &mut Array2<AttentionState<T>>,
    ) -> Result<BatchOutput<T>, Error> {
        let inputs = BatchInputs::new(q, k, v);
        inputs.check_shapes(&self.attention, self.table.codewords.dim(), states)?;
        if let Some((content, ..)) = &self.biases {
            let (b, _, t, k) = inputs.q.dim();
            check_shape("q", &[b, content.nrows(), t, k], inputs.q.shape())?;
        }
        inputs.check_finite()?;
        let biases = self.biases.as_ref().map(|(content, position, relative)| BatchBiases {
            content: content.view(),
            position: position.view(),
            relative: relative.view(),
        });
        let inputs = BatchInputs { biases, ..inputs };
        Ok(self.attention.push_unchecked(&inputs, &self.table, Some(&self.columns), states))
    }
}

impl VqAttention {
    /// [`push`](Self::push) on what is known to fit, without statistics: to clear their sums costs more than a token.
    pub(crate) fn push_unchecked<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        table: &Table<T>,
        columns: Option<&[HeadColumns<T>]>,
        states: &mut Array2<AttentionState<T>>,
    ) -> BatchOutput<T> {
        compiled_here!(
            T,
            VqAttention::push_unchecked_here::<T>,
            fn(
                &VqAttention,
                &BatchInputs<'_, T>,
                &Table<T>,
                Option<&[HeadColumns<T>]>,
                &mut Array2<AttentionState<T>>,
            ) -> BatchOutput<T>
        )(self, inputs, table, columns, states)
    }

    fn push_unchecked_here<T: Scalar>(
        &self,
        inputs: &BatchInputs<'_, T>,
        table: &Table<T>,
        columns: Option<&[HeadColumns<T>]>,
        states: &mut Array2<AttentionState<T>>,
    ) -> BatchOutput<T> {
        let counting = inputs.counting();
        let inputs = &inputs.with_mask(counting.as_ref());
        let mut output = BatchOutput::default();
        let plain = inputs.starts.is_none() && inputs.lengths.is_none();
        match columns {
            Some(columns) if plain && inputs.q.len_of(Axis(2)) == 1 => {
                in_pool(|| push_token(self, inputs, table, columns, states, &mut output));
            }
            _ => {
                forward::run(self, inputs, table, states, stream::run, &mut output);
            }
        }
        output
    }
}

/// What the tokens of all sequences are multiplied with in one key head.
#[derive(Debug)]
pub(crate) struct HeadColumns<T> {
    /// c' [K, S].
    centred: PackedWeights<T>,
    /// r [K, M+1].
    relative: Option<PackedWeights<T>>,
    /// A number of these codewords' own, not 0.
    table: u64,
}

/// The last number that was given to a table of codewords.
static LAST_TABLE: AtomicU64 = AtomicU64::new(0);

impl<T: Scalar> HeadColumns<T> {
    /// Of every key head; `relative` [Hk, M+1, K].
    pub fn all(table: &Table<T>, relative: Option<ArrayView3<'_, T>>) -> Arc<[Self]> {
        let head = |(h, packed): (usize, &PackedCodewords<T>)| HeadColumns {
            centred: PackedWeights::new(&[packed.centred.t()]),
            relative: relative.map(|r| PackedWeights::new(&[r.index_axis_move(Axis(0), h).reversed_axes()])),
            table: 1 + LAST_TABLE.fetch_add(1, Ordering::Relaxed),
        };
        table.packed.iter().enumerate().map(head).collect()
    }
}

/// The first step's results for one key head; G query heads read it.
struct HeadScores<T> {
    /// q + u [B G, K], then keys [B, K].
    rows: Array2<T>,
    /// Scores of codes [B G, S], then what became the codes.
    products: Array2<T>,
    /// [B G, M+1]
    biases: Option<Array2<T>>,
    codes: Vec<u32>,
}

fn push_token<T: Scalar>(
    attention: &VqAttention,
    inputs: &BatchInputs<'_, T>,
    table: &Table<T>,
    columns: &[HeadColumns<T>],
    states: &mut Array2<AttentionState<T>>,
    output: &mut BatchOutput<T>,
) {
    fit_all(inputs, output);
    let (n_key_heads, group) = (columns.len(), inputs.group());
    let score = |h: usize| score(inputs, table, &columns[h], h);
    let scores: Vec<_> = (0..n_key_heads).into_par_iter().map(score).collect();
    let mut outs = parts(&mut output.out).into_iter();
    let first_reads: Vec<_> = states.iter().map(AttentionState::first_reads).collect();
    let tasks: Vec<_> =
        states.iter_mut().map(|state| (state, outs.by_ref().take(group).collect::<Vec<_>>())).collect();
    let results: Vec<_> = tasks
        .into_par_iter()
        .enumerate()
        .map(|(n, (state, outs))| {
            // A thread takes states in turn: it asks for the next while it reads this one.
            if let Some(next) = first_reads.get(n + 1) {
                next.iter().for_each(|memory| memory.ask());
            }
            let (b, h) = (n / n_key_heads, n % n_key_heads);
            let HeadScores { rows, products, biases, codes } = &scores[h];
            let v = inputs.v.slice(s![b, h, 0, ..]);
            let codewords = table.codewords.index_axis(Axis(0), h);
            let looks_up = state.holds_codewords(columns[h].table, codewords);
            let attend = |(member, mut out): (usize, ArrayViewMut2<'_, T>)| {
                let [q, content] = [rows, products].map(|array| array.row(b * group + member));
                let biases = biases.as_ref().map(|biases| biases.row(b * group + member));
                let token = Scored {
                    q,
                    content: content.to_slice().expect(CONTIGUOUS),
                    biases: biases.map(|biases| biases.to_slice().expect(CONTIGUOUS)),
                    code: codes[b],
                    looks_up,
                    v,
                };
                stream::attend(attention, &token, state, out.row_mut(0))
            };
            let of_queries: Vec<_> = outs.into_par_iter().enumerate().map(attend).collect();
            state.push_codeword(codes[b], codewords, v);
            let key = inputs.k.slice(s![b, h, .., ..]);
            let error = commitment::squared_error(key, ArrayView1::from(&codes[b..=b]), codewords, None);
            (codes[b], of_queries, error)
        })
        .collect();
    let mut errors = 0.0;
    for (n, (code, of_queries, error)) in results.into_iter().enumerate() {
        let (b, h) = (n / n_key_heads, n % n_key_heads);
        output.codes[[b, h, 0]] = code;
        for (member, numbers) in of_queries.into_iter().enumerate() {
            let at = [b, h * group + member, 0];
            (output.lse[at], output.cached_mass[at]) = numbers;
        }
        errors += error;
    }
    output.commit_loss = errors / inputs.counted().max(1) as f64;
}

const CONTIGUOUS: &str = "freshly made";

/// The first step for key head h.
fn score<T: Scalar>(
    inputs: &BatchInputs<'_, T>,
    table: &Table<T>,
    columns: &HeadColumns<T>,
    h: usize,
) -> HeadScores<T> {
    let group = inputs.group();
    let members = h * group..(h + 1) * group;
    let q = inputs.q.slice(s![.., members.clone(), 0, ..]); // [B, G, K]
    let k = inputs.k.slice(s![.., h, 0, ..]); // [B, K]
    let (b, d_k) = k.dim();
    let n_queries = b * group;
    let mut rows = Array2::zeros((n_queries + b, d_k));
    let all = q.rows().into_iter().chain(k.rows());
    rows.rows_mut().into_iter().zip(all).for_each(|(mut row, x)| row.assign(&x));
    let mut q_position = None;
    if let Some(biases) = &inputs.biases {
        let mut q_content = rows.slice_mut(s![..n_queries, ..]);
        let mut q = q_content.to_owned();
        for (n, (mut content, mut position)) in q_content.rows_mut().into_iter().zip(q.rows_mut()).enumerate()
        {
            content += &biases.content.row(members.start + n % group);
            position += &biases.position.row(members.start + n % group);
        }
        q_position = Some(q);
    }
    let (mut products, biases) = rayon::join(
        || columns.centred.product(rows.view()),
        || columns.relative.as_ref().zip(q_position).map(|(relative, q)| relative.product(q.view())),
    );
    let packed = &table.packed[h];
    for (mut content, q) in products.rows_mut().into_iter().zip(rows.rows()).take(n_queries) {
        content += packed.mean.dot(&q);
    }
    let of_key = |(key, products): (_, ArrayView1<'_, T>)| {
        packed.nearest(key, products.to_slice().expect(CONTIGUOUS)).0
    };
    let codes = k.rows().into_iter().zip(products.rows().into_iter().skip(n_queries)).map(of_key).collect();
    HeadScores { rows, products, biases, codes }
}
