//! The definition: every query meets every key, in plain loops.
//!
//! ```text
//! (1)  s_ij  = (q_i + u) . key_j + [i-j <= M] (q_i + w) . r_{i-j}
//! (2)  p_ij  = n_j exp(s_ij - lse_i),  lse_i = log sum_j n_j exp(s_ij)
//! (3)  o_i   = sum_j p_ij v_j
//! ```
//!
//! `key_j` is the quantized key `k^_j` where j is *recent* for i (not more than M before i's block begins), and today's
//! codeword of j's code otherwise. In exact arithmetic the two are the same number; they differ in what they are a function of,
//! so the block length is part of the definition of the gradient. What a carried state has summed up takes part as it
//! was summed up: each code as `n_s = N_s` keys with one value, the mean. Everything else has n = 1.
//!
//! Where documents start in the piece, j runs over the tokens of i's own document alone, from its first on.
//!
//! This is the oracle of the other forms: it shares no code with them and is never made faster. Cost: T^2 (K + V).

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use super::{
    AttentionState, BiasGradients, CompressiveCache, Gradients, Inputs, Output, VqAttention,
    state::WindowKeys,
};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// What a query attends to.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// All tokens of one code in the carried cache.
    Code(usize),
    /// A key of the carried window, by age: 0 is the oldest.
    Carried(usize),
    /// A key of this piece.
    Key(usize),
}

/// One term of a query's softmax.
#[derive(Debug, Clone, Copy)]
struct Term {
    source: Source,
    /// Attended one by one; otherwise read through the codebook.
    recent: bool,
    /// i - j, if a relative bias applies.
    distance: Option<usize>,
    /// n_j.
    count: f64,
}

struct Definition<'a, T> {
    attention: &'a VqAttention,
    inputs: Inputs<'a, T>,
    k_hat: ArrayView2<'a, T>,
    state: &'a AttentionState<T>,
    window: WindowKeys<T>,
}

impl<'a, T: Scalar> Definition<'a, T> {
    fn new(
        attention: &'a VqAttention,
        inputs: &'a Inputs<'_, T>,
        k_hat: &'a ArrayView2<'_, T>,
        state: &'a AttentionState<T>,
    ) -> Result<Self, Error> {
        inputs.check(attention, state)?;
        check_shape("k_hat", inputs.q.shape(), k_hat.shape())?;
        check_finite("k_hat", k_hat.view())?;
        let (inputs, k_hat) = (inputs.reborrow(), k_hat.view());
        Ok(Definition { attention, inputs, k_hat, state, window: state.window_keys() })
    }

    /// Where the document of token i starts, if that is in this piece.
    fn document(&self, i: usize) -> Option<usize> {
        (0..=i).rev().find(|&j| self.inputs.starts.is_some_and(|starts| starts[j]))
    }

    /// Blocks are counted from the start of the piece or of the document.
    fn block_start(&self, i: usize) -> usize {
        let first = self.document(i).unwrap_or(0);
        i - (i - first) % self.attention.block_len
    }

    /// Everything that query i sees.
    fn terms(&self, i: usize) -> Vec<Term> {
        let (window, cache) = (self.attention.window, self.attention.cache);
        let carried = self.window.codes.len();
        let mut terms = Vec::new();
        let document = self.document(i);
        for (s, &count) in self.state.cache().count().indexed_iter() {
            if cache && count > 0 && document.is_none() {
                let source = Source::Code(s);
                terms.push(Term { source, recent: false, distance: None, count: count as f64 });
            }
        }
        for n in document.map_or(0, |first| carried + first)..carried + i + 1 {
            let source = if n < carried { Source::Carried(n) } else { Source::Key(n - carried) };
            let distance = carried + i - n;
            // Key n lies at position n - carried of this piece.
            let recent = n + window >= carried + self.block_start(i);
            let distance = (distance <= window).then_some(distance);
            if cache || distance.is_some() {
                terms.push(Term { source, recent, distance, count: 1.0 });
            }
        }
        terms
    }

    fn key(&self, term: &Term) -> ArrayView1<'_, T> {
        let codeword = |code: u32| self.inputs.codewords.row(code as usize);
        match (term.source, term.recent) {
            (Source::Code(s), _) => self.inputs.codewords.row(s),
            (Source::Carried(n), true) => self.window.k_hat.row(n),
            (Source::Carried(n), false) => codeword(self.window.codes[n]),
            (Source::Key(j), true) => self.k_hat.row(j),
            (Source::Key(j), false) => codeword(self.inputs.codes[j]),
        }
    }

    fn code(&self, source: Source) -> usize {
        match source {
            Source::Code(s) => s,
            Source::Carried(n) => self.window.codes[n] as usize,
            Source::Key(j) => self.inputs.codes[j] as usize,
        }
    }

    fn value(&self, source: Source) -> ArrayView1<'_, T> {
        match source {
            Source::Code(s) => self.state.cache.mean().slice_move(ndarray::s![s, ..]),
            Source::Carried(n) => self.window.v.row(n),
            Source::Key(j) => self.inputs.v.row(j),
        }
    }

    /// (1)
    fn score(&self, i: usize, term: &Term) -> T {
        let q = self.inputs.q.row(i);
        let key = self.key(term);
        let Some(biases) = &self.inputs.biases else { return q.dot(&key) };
        let content = (&q + &biases.content).dot(&key);
        match term.distance {
            Some(d) => content + (&q + &biases.position).dot(&biases.relative.row(d)),
            None => content,
        }
    }

    /// (2): the terms of query i, their weights, lse.
    fn softmax(&self, i: usize) -> (Vec<Term>, Vec<T>, T) {
        let terms = self.terms(i);
        let scores: Vec<T> = terms.iter().map(|term| self.score(i, term)).collect();
        let max = scores.iter().fold(T::neg_infinity(), |max, &s| max.max(s));
        let weights = terms.iter().zip(&scores).map(|(term, &s)| T::from_f64(term.count) * (s - max).exp());
        let weights: Vec<T> = weights.collect();
        let sum: T = weights.iter().copied().sum();
        (terms, weights.iter().map(|&w| w / sum).collect(), max + sum.ln())
    }

    /// The state after this piece: every token of the last document that is older than M is summed up under its code.
    fn next_state(&self) -> Result<AttentionState<T>, Error> {
        let t = self.inputs.q.nrows();
        let document = t.checked_sub(1).and_then(|last| self.document(last));
        let carried = if document.is_some() { 0 } else { self.window.codes.len() };
        let first = document.unwrap_or(0);
        let total = carried + t - first;
        let cached = total.saturating_sub(self.attention.window);
        let source =
            |n: usize| if n < carried { Source::Carried(n) } else { Source::Key(first + n - carried) };
        let mut count = self.state.cache().count().to_owned();
        let mut sums = self.state.cache().mean().to_owned();
        if document.is_some() {
            count.fill(0);
            sums.fill(T::zero());
        }
        for (mut sum, &n) in sums.axis_iter_mut(Axis(0)).zip(&count) {
            sum *= T::from_f64(n as f64);
        }
        for n in 0..cached {
            let code = self.code(source(n));
            count[code] += 1;
            let mut sum = sums.row_mut(code);
            sum += &self.value(source(n));
        }
        for (mut sum, &n) in sums.axis_iter_mut(Axis(0)).zip(&count) {
            sum /= T::from_f64(n.max(1) as f64);
        }
        let residual = Array2::zeros(sums.raw_dim());
        let kept = total - cached;
        let (d_k, d_v) = (self.inputs.q.ncols(), self.inputs.v.ncols());
        let mut keys = WindowKeys {
            codes: Array1::zeros(kept),
            k_hat: Array2::zeros((kept, d_k)),
            v: Array2::zeros((kept, d_v)),
        };
        for (slot, n) in (cached..total).enumerate() {
            let term = Term { source: source(n), recent: true, distance: None, count: 1.0 };
            keys.codes[slot] = self.code(term.source) as u32;
            keys.k_hat.row_mut(slot).assign(&self.key(&term));
            keys.v.row_mut(slot).assign(&self.value(term.source));
        }
        let before = if document.is_some() { 0 } else { self.state.position() };
        let position = before + (t - first) as u64;
        let cache = CompressiveCache::from_parts(sums, residual, count)?;
        AttentionState::from_parts(position, self.attention.window, cache, &keys)
    }
}

/// Outputs of one piece, and the state after it.
///
/// `k_hat` [T, K] are the quantized keys, `codewords.row(codes[j])` in use; that they can be moved on their own is what a
/// finite-difference check of the gradient needs.
///
/// # Errors
/// Shapes that do not fit, numbers that are not finite, codes that are not below S, an impossible [`VqAttention`].
pub fn forward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    k_hat: ArrayView2<'_, T>,
    state: &AttentionState<T>,
) -> Result<(Output<T>, AttentionState<T>), Error> {
    compiled_here!(
        T,
        forward_here::<T>,
        fn(
            &VqAttention,
            &Inputs<'_, T>,
            ArrayView2<'_, T>,
            &AttentionState<T>,
        ) -> Result<(Output<T>, AttentionState<T>), Error>
    )(attention, inputs, k_hat, state)
}

fn forward_here<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    k_hat: ArrayView2<'_, T>,
    state: &AttentionState<T>,
) -> Result<(Output<T>, AttentionState<T>), Error> {
    let definition = Definition::new(attention, inputs, &k_hat, state)?;
    let t = inputs.q.nrows();
    let mut output = Output {
        out: Array2::zeros(inputs.v.raw_dim()),
        lse: Array1::zeros(t),
        cached_mass: Array1::zeros(t),
    };
    for i in 0..t {
        let (terms, weights, lse) = definition.softmax(i);
        output.lse[i] = lse;
        for (term, &p) in terms.iter().zip(&weights) {
            output.out.row_mut(i).scaled_add(p, &definition.value(term.source)); // (3)
            if !term.recent {
                output.cached_mass[i] += p;
            }
        }
    }
    Ok((output, definition.next_state()?))
}

/// Gradients of one piece. The state it began with is a constant.
///
/// ```text
/// (3)  dp_ij = dO_i . v_j            dv_j += p_ij dO_i
/// (2)  ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
/// (1)  dq_i += ds_ij (key_j + r_{i-j})     du += ds_ij key_j     dw += ds_ij r_{i-j}     dr_{i-j} += ds_ij (q_i + w)
///      dkey_j += ds_ij (q_i + u)     to k^_j where j is recent, to the codeword where it is not
/// ```
///
/// Without `gradient_through_cache`, v and k^ receive from queries of their own block only.
///
/// # Shapes
/// `d_out` [T, V].
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    k_hat: ArrayView2<'_, T>,
    state: &AttentionState<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    compiled_here!(
        T,
        backward_here::<T>,
        fn(
            &VqAttention,
            &Inputs<'_, T>,
            ArrayView2<'_, T>,
            &AttentionState<T>,
            ArrayView2<'_, T>,
        ) -> Result<Gradients<T>, Error>
    )(attention, inputs, k_hat, state, d_out)
}

fn backward_here<T: Scalar>(
    attention: &VqAttention,
    inputs: &Inputs<'_, T>,
    k_hat: ArrayView2<'_, T>,
    state: &AttentionState<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    let definition = Definition::new(attention, inputs, &k_hat, state)?;
    check_shape("d_out", inputs.v.shape(), d_out.shape())?;
    check_finite("d_out", d_out)?;
    let (t, k) = inputs.q.dim();
    let (mut d_q, mut d_k_hat) = (Array2::zeros((t, k)), Array2::zeros((t, k)));
    let mut d_v = Array2::zeros(inputs.v.raw_dim());
    let mut d_codewords = Array2::zeros(inputs.codewords.raw_dim());
    let mut d_biases = inputs.biases.map(|biases| BiasGradients {
        content: Array1::zeros(k),
        position: Array1::zeros(k),
        relative: Array2::zeros(biases.relative.raw_dim()),
    });
    for i in 0..t {
        let (terms, weights, _) = definition.softmax(i);
        let q = inputs.q.row(i);
        let q_content = inputs.biases.map_or(q.to_owned(), |biases| &q + &biases.content);
        let d_weights: Vec<T> =
            terms.iter().map(|term| d_out.row(i).dot(&definition.value(term.source))).collect();
        let delta: T = weights.iter().zip(&d_weights).map(|(&p, &d_p)| p * d_p).sum();
        for ((term, &p), &d_p) in terms.iter().zip(&weights).zip(&d_weights) {
            let reaches = |j: usize| attention.gradient_through_cache || j >= definition.block_start(i);
            if let Source::Key(j) = term.source
                && reaches(j)
            {
                d_v.row_mut(j).scaled_add(p, &d_out.row(i)); // (3)
            }
            let d_s = p * (d_p - delta); // (2)
            let key = definition.key(term);
            d_q.row_mut(i).scaled_add(d_s, &key); // (1)
            match term.source {
                Source::Key(j) if term.recent && reaches(j) => d_k_hat.row_mut(j).scaled_add(d_s, &q_content),
                _ if term.recent => {}
                source => d_codewords.row_mut(definition.code(source)).scaled_add(d_s, &q_content),
            }
            let (Some(biases), Some(d_biases)) = (&inputs.biases, &mut d_biases) else { continue };
            d_biases.content.scaled_add(d_s, &key);
            let Some(distance) = term.distance else { continue };
            let r = biases.relative.row(distance);
            d_q.row_mut(i).scaled_add(d_s, &r);
            d_biases.position.scaled_add(d_s, &r);
            d_biases.relative.row_mut(distance).scaled_add(d_s, &(&q + &biases.position));
        }
    }
    Ok(Gradients { q: d_q, k_hat: d_k_hat, v: d_v, codewords: d_codewords, biases: d_biases })
}
