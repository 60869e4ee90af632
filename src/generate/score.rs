//! How probable a model finds a given text.

use ndarray::{Array1, ArrayView1, ArrayView2, Axis};

use crate::error::check_shape;
use crate::model::{ModelState, Prepared, Transformer, check_tokens};
use crate::ops::cross_entropy;
use crate::{Error, Scalar};

/// Reads a text as one stream, in pieces of any size, with carried state, and keeps the sums.
///
/// ```
/// use transformer_vq::generate::Scorer;
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::array;
///
/// let model = Transformer::new(ModelConfig { n_layers: 1, ..ModelConfig::default() }, 1)?;
/// let mut scorer = Scorer::new(&model)?;
/// let log_probabilities = scorer.push(array![116, 104].view(), array![104, 101].view())?; // "th" -> "he"
/// assert_eq!(log_probabilities.len(), 2);
/// assert!((scorer.nats_per_token() + log_probabilities.mean().unwrap() as f64).abs() < 1e-6);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Scorer<'m, T = f32> {
    model: Prepared<'m, T>,
    state: ModelState<T>,
    tokens: u64,
    nats: f64,
    cached_mass: f64,
}

impl<'m, T: Scalar> Scorer<'m, T> {
    /// Begins a text.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn new(model: &'m Transformer<T>) -> Result<Self, Error> {
        Ok(Scorer {
            model: model.prepare()?,
            state: model.new_state(1)?,
            tokens: 0,
            nats: 0.0,
            cached_mass: 0.0,
        })
    }

    /// The log-probability of each target, in nats, given its token and all before it.
    ///
    /// # Shapes
    /// `tokens` and `targets` `[T]`; target t follows token t.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::OutOfRange`]. The scorer is then as it was.
    pub fn push(
        &mut self,
        tokens: ArrayView1<'_, u32>,
        targets: ArrayView1<'_, u32>,
    ) -> Result<Array1<T>, Error> {
        check_shape("targets", tokens.shape(), targets.shape())?;
        let vocab_size = self.model.model().config().vocab_size;
        if let Some((i, &token)) = targets.indexed_iter().find(|&(_, &token)| token as usize >= vocab_size) {
            return Err(Error::OutOfRange {
                what: "targets",
                index: vec![i],
                got: token.into(),
                limit: vocab_size,
            });
        }
        let one: ArrayView2<'_, u32> = tokens.insert_axis(Axis(0));
        let (logits, reports) = self.model.push(one, &mut self.state)?;
        let log_probabilities = cross_entropy::log_probabilities(logits.index_axis(Axis(0), 0), targets)?;
        self.tokens += targets.len() as u64;
        self.nats -= log_probabilities.iter().map(|p| p.as_f64()).sum::<f64>();
        let mass = reports.iter().map(|report| report.cached_mass).sum::<f64>() / reports.len() as f64;
        self.cached_mass += mass * targets.len() as f64;
        Ok(log_probabilities)
    }

    /// Targets so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Mean loss so far; 0 before the first token.
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }

    /// Mean loss so far where a token is a byte; 0 before the first.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats_per_token() / std::f64::consts::LN_2
    }

    /// The share of attention that fell on cached codes so far, mean over units, heads and queries.
    pub fn cached_mass(&self) -> f64 {
        self.cached_mass / self.tokens.max(1) as f64
    }
}

/// The log-probability, in nats, of every token of a text but the first, given all before it [T - 1].
///
/// Memory does not grow with the text, apart from the answer: it is read `piece_len` tokens at a time.
///
/// # Errors
/// [`Error::Empty`] for a text without tokens, [`Error::Invalid`] for a `piece_len` of 0, [`Error::OutOfRange`].
pub fn log_probabilities<T: Scalar>(
    model: &Transformer<T>,
    text: ArrayView1<'_, u32>,
    piece_len: usize,
) -> Result<Array1<T>, Error> {
    if text.is_empty() {
        return Err(Error::Empty { what: "text" });
    }
    if piece_len == 0 {
        return Err(Error::invalid("piece_len", "at least 1", piece_len));
    }
    check_tokens("text", text.insert_axis(Axis(0)), None, model.config().vocab_size)?;
    let mut scorer = Scorer::new(model)?;
    let (tokens, targets) = (text.slice(ndarray::s![..-1]), text.slice(ndarray::s![1..]));
    let mut all = Vec::with_capacity(targets.len());
    let pieces =
        tokens.axis_chunks_iter(Axis(0), piece_len).zip(targets.axis_chunks_iter(Axis(0), piece_len));
    for (tokens, targets) in pieces {
        all.extend(scorer.push(tokens, targets)?);
    }
    Ok(Array1::from_vec(all))
}
