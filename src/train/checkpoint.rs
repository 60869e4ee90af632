//! Everything that resuming needs, in the files of a model checkpoint.
//!
//! Beside the model's tensors (see [`Transformer::save`](crate::model::Transformer::save)):
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `adamw.m.<parameter>`, `adamw.v.<parameter>` | as the parameter | the optimizer's moments |
//! | `state.<unit>.position` | [B, Hk] | tokens seen |
//! | `state.<unit>.mean`, `.residual` | [B, Hk, S, V] | compressive cache |
//! | `state.<unit>.count` | [B, Hk, S] | |
//! | `state.<unit>.codes` | [B, Hk, M] | window, oldest first, zeros where no token has been yet |
//! | `state.<unit>.k_hat`, `.v` | [B, Hk, M, K], [B, Hk, M, V] | |
//! | `state.<unit>.k`, `.v` | [B, Hk, P, K], [B, Hk, P, V] | of exact attention, in place of all but the position |
//!
//! Random streams are functions of a seed and a position (see [`Batches`](super::Batches)), so [`Progress`] holds them.

use std::path::Path;

use ndarray::{Array, Array2, ArrayD, ArrayView, Axis, Dimension, Ix1, Ix2, s};
use serde::{Deserialize, Serialize};

use super::key_values::{self, KeyValueArrays};
use super::trainer::{Moments, Trainer};
use super::{AdamW, BatchConfig, Schedule};
use crate::attention::{AttentionState, CompressiveCache, WindowKeys};
use crate::model::checkpoint::{self, file_error, named, read_model, read_parameters, tensor};
use crate::model::{ModelConfig, ModelState, Parameters, Tensor, TensorFile, UnitKind, UnitState};
use crate::{Error, Scalar};

/// A count above this one is refused: there must be room to go on.
const MOST_COUNTED: u64 = i64::MAX as u64;

/// Where a training loop stands, apart from the trainer itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Which batches are drawn: sizes and seed.
    pub batches: BatchConfig,
    /// Batches handed out so far ([`Batches::position`](super::Batches::position)).
    pub position: u64,
    /// Seconds of training so far, over all sittings.
    pub seconds: f64,
    /// The factor on the learning rate.
    pub schedule: Schedule,
    /// When the run is over.
    pub budget: Budget,
    /// What the next line of the log will tell of.
    pub recent: RecentLoss,
}

/// The mean loss of the steps since a loop last reported it, in a form that outlives the process.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecentLoss {
    /// Steps since then.
    pub steps: u64,
    /// Sum of their losses, nats per token.
    pub nats: f64,
}

impl RecentLoss {
    /// Adds the loss of one step, nats per token.
    pub fn add(&mut self, loss: f64) {
        self.steps = self.steps.saturating_add(1);
        self.nats += loss;
    }

    /// Nats per token; 0 before the first step.
    pub fn mean(&self) -> f64 {
        self.nats / self.steps.max(1) as f64
    }
}

/// When a run is over; its schedule follows the same clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// After so many steps: the result depends on the seed alone.
    Steps(u64),
    /// After so many seconds of training.
    Seconds(f64),
}

impl Progress {
    /// Checks that a run can go on from here.
    ///
    /// # Errors
    /// [`Error::Invalid`] for seconds or a mean loss that are not finite, an empty budget, and as [`Schedule::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !(positive(self.seconds) || self.seconds == 0.0) {
            return Err(Error::invalid("seconds", "finite and not negative", self.seconds));
        }
        match self.budget {
            Budget::Steps(0) => return Err(Error::invalid("budget", "at least one step", 0)),
            Budget::Seconds(seconds) if !positive(seconds) => {
                return Err(Error::invalid("budget", "a positive number of seconds", seconds));
            }
            _ => {}
        }
        if !self.recent.nats.is_finite() {
            return Err(Error::invalid("recent.nats", "finite", self.recent.nats));
        }
        self.schedule.validate()
    }

    /// How much of the run is over, from 0 to 1, after `step` steps.
    pub fn fraction(&self, step: u64) -> f64 {
        let fraction = match self.budget {
            Budget::Steps(steps) => step as f64 / steps.max(1) as f64,
            Budget::Seconds(seconds) => self.seconds / seconds,
        };
        if fraction < 1.0 { fraction } else { 1.0 }
    }

    /// The factor on the learning rate after `step` steps.
    pub fn factor(&self, step: u64) -> f64 {
        match self.budget {
            Budget::Steps(steps) => self.schedule.factor_at_step(step, steps),
            Budget::Seconds(_) => self.schedule.factor_at_progress(self.fraction(step)),
        }
    }
}

/// The `training` part of the JSON file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    optimizer: AdamW,
    steps: u64,
    #[serde(default)]
    dropout_seed: u64,
    #[serde(default)]
    sequence: u64,
    carries_state: bool,
    progress: Progress,
}

pub(super) fn save<T: Scalar>(trainer: &Trainer<T>, folder: &Path, progress: &Progress) -> Result<(), Error> {
    progress.validate()?;
    let training = Training {
        optimizer: trainer.optimizer,
        steps: trainer.steps,
        dropout_seed: trainer.dropout_seed,
        sequence: trainer.sequence,
        carries_state: trainer.state.is_some(),
        progress: progress.clone(),
    };
    let training = serde_json::to_value(training)
        .map_err(|e| file_error(folder.into(), format!("cannot be described: {e}")))?;
    let states = trainer.state.as_ref().map_or(vec![], |state| state.layers().to_vec());
    let quantized: Vec<_> = states
        .iter()
        .map(|states| states.quantized().map(|states| StateArrays::new(&states.to_owned())))
        .collect();
    let quadratic: Vec<_> =
        states.iter().map(|states| states.quadratic().map(|states| KeyValueArrays::new(states))).collect();
    let mut tensors = named("adamw.m", &trainer.moments.m)?;
    tensors.extend(named("adamw.v", &trainer.moments.v)?);
    for (i, (quantized, quadratic)) in quantized.iter().zip(&quadratic).enumerate() {
        let prefix = format!("state.{i}");
        if let Some(arrays) = quantized {
            tensors.extend(arrays.tensors(&prefix)?);
        }
        if let Some(arrays) = quadratic {
            tensors.extend(arrays.tensors(&prefix)?);
        }
    }
    checkpoint::write(folder, &trainer.model, tensors, Some(training))
}

pub(super) fn load<T: Scalar>(folder: &Path) -> Result<(Trainer<T>, Progress), Error> {
    let (manifest, file) = checkpoint::open(folder)?;
    let wrong = |problem: String| file_error(folder.join("checkpoint.json"), problem);
    let training = manifest.training.ok_or_else(|| wrong("a model without its training".into()))?;
    let training: Training = serde_json::from_value(training).map_err(|e| wrong(format!("training: {e}")))?;
    training.optimizer.validate().map_err(|e| wrong(e.to_string()))?;
    training.progress.validate().map_err(|e| wrong(e.to_string()))?;
    if training.steps > MOST_COUNTED {
        return Err(wrong(format!("{} steps, more than can have been", training.steps)));
    }
    let config = manifest.model;
    let m = read_parameters("adamw.m", &config, &file)?;
    let v: Parameters<T> = read_parameters("adamw.v", &config, &file)?;
    // A step would take its root.
    if let Some(p) = v.views().into_iter().find(|p| p.value.iter().any(|&x| x < T::zero())) {
        let problem = format!("`adamw.v.{}` holds a negative mean of squares", p.name);
        return Err(file_error(file.path().into(), problem));
    }
    let state = if training.carries_state { Some(read_state(&config, &file)?) } else { None };
    let trainer = Trainer {
        model: read_model(config, &file)?,
        optimizer: training.optimizer,
        moments: Moments { m, v },
        steps: training.steps,
        dropout_seed: training.dropout_seed,
        sequence: training.sequence,
        state,
        last_checkpoint: None,
    };
    Ok((trainer, training.progress))
}

/// The states [B, H] of one unit, as arrays.
struct StateArrays<T> {
    position: Array2<u64>,
    mean: ArrayD<T>,
    residual: ArrayD<T>,
    count: ArrayD<u64>,
    codes: ArrayD<u32>,
    k_hat: ArrayD<T>,
    v: ArrayD<T>,
}

impl<T: Scalar> StateArrays<T> {
    fn new(states: &Array2<AttentionState<T>>) -> Self {
        let windows: Vec<_> = states.iter().map(|state| (state.window_keys(), state.window())).collect();
        StateArrays {
            position: states.map(AttentionState::position),
            mean: stacked(states, states.iter().map(|state| state.cache().mean())),
            residual: stacked(states, states.iter().map(|state| state.cache().residual())),
            count: stacked(states, states.iter().map(|state| state.cache().count())),
            codes: padded(states, &windows, |keys| keys.codes.view()),
            k_hat: padded(states, &windows, |keys| keys.k_hat.view()),
            v: padded(states, &windows, |keys| keys.v.view()),
        }
    }

    fn tensors(&self, prefix: &str) -> Result<Vec<Tensor<'_>>, Error> {
        Ok(vec![
            Tensor::new(format!("{prefix}.position"), self.position.view()),
            tensor(format!("{prefix}.mean"), self.mean.view())?,
            tensor(format!("{prefix}.residual"), self.residual.view())?,
            Tensor::new(format!("{prefix}.count"), self.count.view()),
            Tensor::new(format!("{prefix}.codes"), self.codes.view()),
            tensor(format!("{prefix}.k_hat"), self.k_hat.view())?,
            tensor(format!("{prefix}.v"), self.v.view())?,
        ])
    }
}

/// Arrays of one shape, one per state, as one array [B, H, ..].
pub(super) fn stacked<'a, E: Clone + 'a, D: Dimension, S>(
    states: &Array2<S>,
    parts: impl Iterator<Item = ArrayView<'a, E, D>>,
) -> ArrayD<E> {
    let parts: Vec<_> = parts.map(|part| part.into_dyn()).collect();
    let shape: Vec<usize> = states.shape().iter().chain(parts[0].shape()).copied().collect();
    let stack = ndarray::stack(Axis(0), &parts).expect("states of one unit have one shape");
    stack.into_shape_with_order(shape).expect("as many elements")
}

/// [`stacked`], each part filled up with zeros to M rows.
fn padded<E: Clone + Default, D: Dimension, T, S>(
    states: &Array2<S>,
    windows: &[(WindowKeys<T>, usize)],
    part: impl Fn(&WindowKeys<T>) -> ArrayView<'_, E, D>,
) -> ArrayD<E> {
    let full = windows.iter().map(|(keys, window)| {
        let part = part(keys);
        let mut shape = part.raw_dim();
        shape[0] = *window;
        let mut full = Array::<E, D>::default(shape);
        full.slice_axis_mut(Axis(0), (..part.len_of(Axis(0))).into()).assign(&part);
        full
    });
    let full: Vec<_> = full.collect();
    stacked(states, full.iter().map(|part| part.view()))
}

/// What [`StateArrays`] has written, unit by unit.
fn read_state<T: Scalar>(config: &ModelConfig, file: &TensorFile) -> Result<ModelState<T>, Error> {
    let read = |i| match config.unit(i) {
        UnitKind::Quadratic => key_values::read(config, i, file).map(UnitState::from),
        _ => read_states(config, i, file).map(UnitState::from),
    };
    let layers: Vec<UnitState<T>> = (0..config.n_layers).map(read).collect::<Result<_, Error>>()?;
    let wrong = |problem: String| file_error(file.path().into(), format!("state: {problem}"));
    if let Some(i) = layers.iter().position(|states| states.dim() != layers[0].dim()) {
        let (b, other) = (layers[0].dim().0, layers[i].dim().0);
        return Err(wrong(format!("{b} sequences in unit 0, {other} in unit {i}")));
    }
    ModelState::from_parts(layers).map_err(|e| wrong(e.to_string()))
}

/// The states [B, H] of one unit.
fn read_states<T: Scalar>(
    config: &ModelConfig,
    unit: usize,
    file: &TensorFile,
) -> Result<Array2<AttentionState<T>>, Error> {
    let (n_heads, &ModelConfig { n_codes, d_k, d_v, .. }) = (config.key_heads(), config);
    let window = config.attention.window;
    let wrong = |problem: String| file_error(file.path().into(), format!("state.{unit}: {problem}"));
    let name = |part: &str| format!("state.{unit}.{part}");
    let b = match *file.shape(&name("position"))? {
        [b, h] if b > 0 && h == n_heads => b,
        ref shape => return Err(wrong(format!("position {shape:?}, expected [B, {n_heads}] with B > 0"))),
    };
    let position = file.integers::<u64>(&name("position"), &[b, n_heads])?;
    let position = position.into_dimensionality::<Ix2>().expect("its shape has been checked");
    if let Some(position) = position.iter().find(|&&p| p > MOST_COUNTED) {
        return Err(wrong(format!("position {position}, more than can have been")));
    }
    let mean = file.array::<T>(&name("mean"), &[b, n_heads, n_codes, d_v])?;
    let residual = file.array::<T>(&name("residual"), &[b, n_heads, n_codes, d_v])?;
    let count = file.integers::<u64>(&name("count"), &[b, n_heads, n_codes])?;
    let codes = file.integers::<u32>(&name("codes"), &[b, n_heads, window])?;
    let k_hat = file.array::<T>(&name("k_hat"), &[b, n_heads, window, d_k])?;
    let v = file.array::<T>(&name("v"), &[b, n_heads, window, d_v])?;
    let mut states = Vec::with_capacity(position.len());
    for ((b, h), &position) in position.indexed_iter() {
        let held = usize::try_from(position).map_or(window, |p| p.min(window));
        let table = |array: &ArrayD<T>| -> Array2<T> {
            let part = array.slice(s![b, h, .., ..]).into_dimensionality::<Ix2>();
            part.expect("its shape has been checked").to_owned()
        };
        let rows = |array: &ArrayD<T>| table(array).slice_move(s![..held, ..]);
        let counts =
            count.slice(s![b, h, ..]).into_dimensionality::<Ix1>().expect("its shape has been checked");
        let held_codes = codes.slice(s![b, h, ..held]).into_dimensionality::<Ix1>();
        let keys = WindowKeys {
            codes: held_codes.expect("its shape has been checked").to_owned(),
            k_hat: rows(&k_hat),
            v: rows(&v),
        };
        let cache = CompressiveCache::from_parts(table(&mean), table(&residual), counts.to_owned());
        let state = cache.and_then(|cache| AttentionState::from_parts(position, window, cache, &keys));
        states.push(state.map_err(|e| wrong(e.to_string()))?);
    }
    Ok(Array2::from_shape_vec(position.raw_dim(), states).expect("one state per position"))
}
