//! Everything that resuming needs, in the files of a model checkpoint.
//!
//! Beside the model's tensors (see [`Transformer::save`](crate::model::Transformer::save)):
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `adamw.m.<parameter>`, `adamw.v.<parameter>` | as the parameter | moments of AdamW |
//! | `lion.m.<parameter>` | as the parameter | of Lion |
//! | `adafactor.row.<parameter>`, `.column.<parameter>` | without its last axis, without the one before | of Adafactor, of matrices |
//! | `adafactor.v.<parameter>` | as the parameter | of Adafactor, of vectors |
//! | `state.<unit>.position` | [B, Hk] | tokens seen |
//! | `state.<unit>.mean`, `.residual` | [B, Hk, S, V] | compressive cache |
//! | `state.<unit>.count` | [B, Hk, S] | |
//! | `state.<unit>.codes` | [B, Hk, M] | window, oldest first, zeros where no token has been yet |
//! | `state.<unit>.k_hat`, `.v` | [B, Hk, M, K], [B, Hk, M, V] | |
//! | `state.<unit>.k`, `.v` | [B, Hk, P, K], [B, Hk, P, V] | of exact attention, in place of all but the position |
//!
//! Random streams are functions of a seed and a position (see [`Batches`](super::Batches)), so [`Progress`] holds them. A hook on
//! gradients is code, which no file holds: a loop that has one passes it again.

mod key_values;
mod progress;
mod states;

use std::path::Path;

use key_values::KeyValueArrays;
use ndarray::ArrayD;
pub use progress::{Budget, Progress, RecentLoss};
use serde::{Deserialize, Deserializer, Serialize};
use states::{StateArrays, read_state};

use super::trainer::Trainer;
use super::{Optimizer, ParameterGroup};
use crate::compiled::compiled_here;
use crate::model::checkpoint::{self, file_error, read_model, tensor};
use crate::model::{Tensor, TensorFile, Transformer};
use crate::{Error, Scalar};

/// A count above this one is refused: there must be room to go on.
const MOST_COUNTED: u64 = i64::MAX as u64;

/// The `training` part of the JSON file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    #[serde(deserialize_with = "optimizer")]
    optimizer: Optimizer,
    #[serde(default)]
    groups: Vec<ParameterGroup>,
    #[serde(default = "one")]
    micro_batches: usize,
    steps: u64,
    #[serde(default)]
    dropout_seed: u64,
    #[serde(default)]
    sequence: u64,
    carries_state: bool,
    progress: Progress,
}

fn one() -> usize {
    1
}

/// An optimizer. One without a kind was written when there was no choice.
fn optimizer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Optimizer, D::Error> {
    let mut value = serde_json::Value::deserialize(deserializer)?;
    if let Some(fields) = value.as_object_mut() {
        fields.entry("kind").or_insert_with(|| "adamw".into());
    }
    serde_json::from_value(value).map_err(serde::de::Error::custom)
}

pub(super) fn save<T: Scalar>(trainer: &Trainer<T>, folder: &Path, progress: &Progress) -> Result<(), Error> {
    compiled_here!(T, save_here::<T>, fn(&Trainer<T>, &Path, &Progress) -> Result<(), Error>)(
        trainer, folder, progress,
    )
}

fn save_here<T: Scalar>(trainer: &Trainer<T>, folder: &Path, progress: &Progress) -> Result<(), Error> {
    progress.validate()?;
    let training = Training {
        optimizer: trainer.optimizer,
        groups: trainer.groups.clone(),
        micro_batches: trainer.micro_batches,
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
    let mut tensors = moments(trainer)?;
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

/// The moments of every parameter, `<optimizer>.<moment>.<parameter>`.
fn moments<T: Scalar>(trainer: &Trainer<T>) -> Result<Vec<Tensor<'_>>, Error> {
    let (optimizer, mut tensors) = (trainer.optimizer, vec![]);
    for (parameter, arrays) in trainer.model.parameters().views().iter().zip(&trainer.moments) {
        for (moment, array) in optimizer.moments(parameter.value.shape()).iter().zip(arrays) {
            let name = format!("{}.{}.{}", optimizer.name(), moment.name, parameter.name);
            tensors.push(tensor(name, array.view())?);
        }
    }
    Ok(tensors)
}

pub(super) fn load<T: Scalar>(folder: &Path) -> Result<(Trainer<T>, Progress), Error> {
    compiled_here!(T, load_here::<T>, fn(&Path) -> Result<(Trainer<T>, Progress), Error>)(folder)
}

fn load_here<T: Scalar>(folder: &Path) -> Result<(Trainer<T>, Progress), Error> {
    let (manifest, file) = checkpoint::open(folder)?;
    let wrong = |problem: String| file_error(folder.join("checkpoint.json"), problem);
    let training = manifest.training.ok_or_else(|| wrong("a model without its training".into()))?;
    let training: Training = serde_json::from_value(training).map_err(|e| wrong(format!("training: {e}")))?;
    let Training { optimizer, groups, micro_batches, steps, dropout_seed, sequence, carries_state, progress } =
        training;
    optimizer.validate().map_err(|e| wrong(e.to_string()))?;
    progress.validate().map_err(|e| wrong(e.to_string()))?;
    if steps > MOST_COUNTED {
        return Err(wrong(format!("{steps} steps, more than can have been")));
    }
    // The model comes first: its size is then known not to be absurd.
    let model: Transformer<T> = read_model(manifest.model, &file)?;
    let moments = read_moments(&optimizer, &model, &file)?;
    let state = if carries_state { Some(read_state(model.config(), &file)?) } else { None };
    let trainer = Trainer::begin(model, optimizer, moments).with_groups(groups);
    let trainer = trainer.and_then(|trainer| trainer.with_micro_batches(micro_batches));
    let mut trainer = trainer.map_err(|e| wrong(e.to_string()))?;
    (trainer.steps, trainer.state) = (steps, state);
    (trainer.dropout_seed, trainer.sequence) = (dropout_seed, sequence);
    Ok((trainer, progress))
}

/// What [`moments`] has written.
fn read_moments<T: Scalar>(
    optimizer: &Optimizer,
    model: &Transformer<T>,
    file: &TensorFile,
) -> Result<Vec<Vec<ArrayD<T>>>, Error> {
    let wrong = |problem: String| file_error(file.path().into(), problem);
    let parameters = model.parameters().views();
    let all: Vec<_> = parameters.iter().map(|p| optimizer.moments(p.value.shape())).collect();
    for name in all.iter().flatten().map(|moment| moment.name) {
        let numbers = all.iter().flatten().filter(|moment| moment.name == name);
        let expected: u128 = numbers.map(|moment| moment.shape.iter().product::<usize>() as u128).sum();
        let prefix = format!("{}.{name}.", optimizer.name());
        let found = file.count_elements(&prefix);
        if found != expected {
            let problem =
                format!("`{prefix}*` holds {found} numbers, a model of this configuration has {expected}");
            return Err(wrong(problem));
        }
    }
    let mut arrays = vec![];
    for (parameter, moments) in parameters.iter().zip(all) {
        let mut of_parameter = vec![];
        for moment in moments {
            let name = format!("{}.{}.{}", optimizer.name(), moment.name, parameter.name);
            let array = file.array::<T>(&name, &moment.shape)?;
            if let Some(bad) = array.iter().find(|x| !x.is_finite()) {
                return Err(wrong(format!("tensor `{name}` holds {bad}")));
            }
            // A step would take its root.
            if moment.squares && array.iter().any(|&x| x < T::zero()) {
                return Err(wrong(format!("`{name}` holds a negative mean of squares")));
            }
            of_parameter.push(array);
        }
        arrays.push(of_parameter);
    }
    Ok(arrays)
}
