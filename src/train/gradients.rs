//! What a batch says about a model, in a form that adds up: micro-batches, threads and machines merge theirs into one step.
//!
//! ```text
//! (1)  of n positions that count:   loss, commitment loss, total and its gradients are means over them
//! (2)  merged:   x <- n_a / (n_a + n_b) x_a + n_b / (n_a + n_b) x_b          statistics and counts are added
//! ```
//!
//! So the merged gradients of micro-batches are those of one batch of all their sequences, to rounding, the codebooks'
//! included.

use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView2, Axis, Zip, concatenate, s};

use super::Batch;
use crate::codebook::CodeStats;
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::model::{DropoutSeed, LossAndGradients, ModelState, Parameters, Transformer, UnitState};
use crate::{Error, Scalar};

/// Losses, gradients and statistics of some positions: everything that [`Trainer::apply`](super::Trainer::apply) needs.
///
/// ```
/// use transformer_vq::model::{ModelConfig, Transformer};
/// use transformer_vq::ndarray::{Array2, s};
/// use transformer_vq::train::Gradients;
///
/// let config = ModelConfig { d_model: 8, n_layers: 1, d_k: 4, d_v: 8, n_codes: 4, ..ModelConfig::default() };
/// let model = Transformer::new(config, 1)?;
/// let text = Array2::from_shape_fn((3, 21), |(b, t)| (60 + 7 * b + t % 5) as u32);
/// let of_rows = |from: usize, to: usize| {
///     let (tokens, targets) = (text.slice(s![from..to, ..-1]), text.slice(s![from..to, 1..]));
///     Gradients::collect(&model, tokens, targets, None, &mut model.new_state(to - from)?)
/// };
/// let mut merged = of_rows(0, 1)?;
/// merged.merge(of_rows(1, 3)?)?;
/// assert_eq!(merged.tokens, 60);
/// assert!((merged.loss - of_rows(0, 3)?.loss).abs() < 1e-6);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<T = f32> {
    /// Positions that count.
    pub tokens: u64,
    /// Cross-entropy, nats per token.
    pub loss: f64,
    /// Commitment loss, summed over units, without its weight.
    pub commit_loss: f64,
    /// What the gradient is of: the losses with their weights.
    pub total: f64,
    /// The gradient of `total`.
    pub parameters: Parameters<T>,
    /// What codebooks learn from, one per unit.
    pub stats: Vec<CodeStats<T>>,
    /// The keys [B, H, T, K] of every unit, if the configuration revives codes; otherwise none.
    pub keys: Vec<Array4<T>>,
    /// Which of these keys count [B, T]; without it all do.
    pub counts: Option<Array2<bool>>,
}

impl<T: Scalar> Gradients<T> {
    /// Losses, gradients and statistics of a batch; `state` moves from before the piece to after it.
    ///
    /// # Shapes
    /// `tokens`, `targets` and `mask` [B, T]; a position counts where the mask is true, without one all do.
    ///
    /// # Errors
    /// As [`Transformer::loss_and_gradients`]. The state is then as it was.
    pub fn collect(
        model: &Transformer<T>,
        tokens: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
    ) -> Result<Self, Error> {
        Self::collect_dropping(model, tokens, targets, mask, state, None)
    }

    /// [`collect`](Self::collect) with dropout as the configuration says, if there is a seed.
    ///
    /// # Errors
    /// As there.
    pub fn collect_dropping(
        model: &Transformer<T>,
        tokens: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        mask: Option<ArrayView2<'_, bool>>,
        state: &mut ModelState<T>,
        dropout: Option<DropoutSeed>,
    ) -> Result<Self, Error> {
        let LossAndGradients { loss, commit_loss, total, gradients, layers } =
            model.loss_and_gradients_dropping(tokens, targets, mask, state, dropout)?;
        let counted = mask.map_or(tokens.len(), |mask| mask.iter().filter(|&&counts| counts).count());
        let (stats, keys): (Vec<_>, Vec<_>) =
            layers.into_iter().map(|layer| (layer.stats, layer.keys)).unzip();
        let keys: Vec<_> = keys.into_iter().flatten().collect();
        Ok(Gradients {
            tokens: counted as u64,
            loss,
            commit_loss,
            total,
            parameters: gradients,
            stats,
            counts: mask.filter(|_| !keys.is_empty()).map(|mask| mask.to_owned()),
            keys,
        })
    }

    /// Takes in what other positions say, of the same model: means over n_a and n_b positions become means over all of them,
    /// statistics and counts are added. Keys are those of `self`, then the others.
    ///
    /// # Errors
    /// [`Error::Shape`] if arrays differ in more than the number of sequences. Nothing has been merged then.
    pub fn merge(&mut self, other: Self) -> Result<(), Error> {
        compiled_here!(
            T,
            Gradients::<T>::merge_here,
            fn(&mut Gradients<T>, Gradients<T>) -> Result<(), Error>
        )(self, other)
    }

    fn merge_here(&mut self, other: Self) -> Result<(), Error> {
        self.parameters.check_like("gradients", &other.parameters)?;
        check_shape("stats", &[self.stats.len()], &[other.stats.len()])?;
        for (mine, theirs) in self.stats.iter().zip(&other.stats) {
            check_shape("stats", mine.sums().shape(), theirs.sums().shape())?;
        }
        check_shape("keys", &[self.keys.len()], &[other.keys.len()])?;
        for (mine, theirs) in self.keys.iter().zip(&other.keys) {
            check_shape("keys", &mine.shape()[1..], &theirs.shape()[1..])?;
        }
        let counts = self.counts_with(&other)?;
        let tokens = self.tokens.saturating_add(other.tokens);
        // Without any position, both are zero.
        let part = if tokens == 0 { 0.0 } else { other.tokens as f64 / tokens as f64 };
        let mix =
            |mine: f64, theirs: f64| if part == 0.0 { mine } else { mine * (1.0 - part) + theirs * part };
        self.loss = mix(self.loss, other.loss);
        self.commit_loss = mix(self.commit_loss, other.commit_loss);
        self.total = mix(self.total, other.total);
        if part > 0.0 {
            let (rest, part) = (T::from_f64(1.0 - part), T::from_f64(part));
            for (mine, theirs) in self.parameters.views_mut().into_iter().zip(other.parameters.views()) {
                Zip::from(mine.value).and(theirs.value).par_for_each(|a, &b| *a = *a * rest + b * part);
            }
        }
        self.tokens = tokens;
        for (mine, theirs) in self.stats.iter_mut().zip(&other.stats) {
            mine.merge(theirs)?;
        }
        self.counts = counts;
        for (mine, theirs) in self.keys.iter_mut().zip(&other.keys) {
            *mine = concatenate(Axis(0), &[mine.view(), theirs.view()]).expect("shapes have been compared");
        }
        Ok(())
    }
}

impl<T> Gradients<T> {
    /// Which keys of both count, if not all do.
    fn counts_with(&self, other: &Self) -> Result<Option<Array2<bool>>, Error> {
        if self.counts.is_none() && other.counts.is_none() {
            return Ok(None);
        }
        let [mine, theirs] = [self.counting()?, other.counting()?];
        check_shape("counts", &[theirs.nrows(), mine.ncols()], theirs.shape())?;
        Ok(Some(concatenate(Axis(0), &[mine.view(), theirs.view()]).expect("as wide as each other")))
    }

    /// Which keys count [B, T].
    fn counting(&self) -> Result<Array2<bool>, Error> {
        let dim = |keys: &Array4<T>| (keys.len_of(Axis(0)), keys.len_of(Axis(2)));
        let all = || Array2::from_elem(self.keys.first().map_or((0, 0), dim), true);
        let counts = self.counts.clone().unwrap_or_else(all);
        for (b, t) in self.keys.iter().map(dim) {
            check_shape("counts", &[b, t], counts.shape())?;
        }
        Ok(counts)
    }
}

/// (2) of a batch in parts, each some of its rows: the merged gradients, and the states after all rows.
pub(super) fn accumulate<T: Scalar>(
    model: &Transformer<T>,
    batch: &Batch,
    state: &ModelState<T>,
    parts: usize,
    dropout: DropoutSeed,
) -> Result<(Gradients<T>, ModelState<T>), Error> {
    let n = batch.tokens.nrows();
    check_shape("state", &[n], &[state.batch()])?;
    check_shape("targets", batch.tokens.shape(), batch.targets.shape())?;
    let mut merged: Option<Gradients<T>> = None;
    let mut states = vec![];
    for part in 0..parts {
        let rows = part * n / parts..(part + 1) * n / parts;
        let mut state = state_of_rows(state, rows.clone())?;
        // Its rows of the masks.
        let dropout = DropoutSeed { first: dropout.first + rows.start as u64, ..dropout };
        let (tokens, targets) = (batch.tokens.slice(s![rows.clone(), ..]), batch.targets.slice(s![rows, ..]));
        let gradients = Gradients::collect_dropping(model, tokens, targets, None, &mut state, Some(dropout))?;
        match &mut merged {
            Some(merged) => merged.merge(gradients)?,
            None => merged = Some(gradients),
        }
        states.push(state);
    }
    let units = 0..states[0].layers().len();
    let joined = units.map(|unit| UnitState::join(states.iter().map(|state| &state.layers()[unit])));
    let joined = ModelState::from_parts(joined.collect())?;
    Ok((merged.expect("at least one part"), joined))
}

/// The states of some sequences of a batch.
fn state_of_rows<T: Scalar>(state: &ModelState<T>, rows: Range<usize>) -> Result<ModelState<T>, Error> {
    ModelState::from_parts(state.layers().iter().map(|states| states.rows(rows.clone())).collect())
}
