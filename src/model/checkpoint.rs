//! A model in a folder: `checkpoint.json` (configuration) and a `safetensors` file (arrays).
//!
//! The JSON file names the tensor file and is written last. Each file is written whole or not at all, and a new tensor file
//! never takes the name of the one in use, so a process that is killed at any moment leaves the last good checkpoint.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `model.<parameter>` | as in [`Parameters`] | for example `model.layers.0.w_q` |
//! | `codebooks.<unit>.sums` | [Hk, S, K] | of moving averages |
//! | `codebooks.<unit>.counts` | [Hk, S] | |
//! | `codebooks.<unit>.basis` | [Hk, S, f] | of a linear codebook, if frozen |
//! | `codebooks.<unit>.codewords` | [Hk, S, K] | of a frozen codebook |
//!
//! What the optimizer moves of a codebook is among the parameters. A configuration without `learning` and `estimator`, as older
//! ones are, means moving averages with the count clamp, and straight-through.
//!
//! Training adds its own; a model can be loaded from either. The tensor file repeats the configuration in its metadata, key
//! `model`, so that a file of another model is told even where the shapes agree.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayD, ArrayView, Dimension, Ix2, Ix3};
use serde::{Deserialize, Serialize};

use super::tensor_file::{Tensor, TensorFile};
use super::{
    LearningConfig, ModelConfig, Parameter, ParameterMut, Parameters, Transformer, write_atomically,
};
use crate::codebook::{Basis, Ema, Learning};
use crate::compiled::compiled_here;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// Raised whenever an older reader would misread what is written.
const FORMAT_VERSION: u32 = 1;

const MANIFEST: &str = "checkpoint.json";
/// A checkpoint takes the one that the last did not.
const TENSOR_FILES: [&str; 2] = ["tensors-a.safetensors", "tensors-b.safetensors"];
/// Key of the tensor file's metadata.
const CONFIG: &str = "model";

/// The JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    format_version: u32,
    /// Name of the tensor file in the same folder.
    tensors: String,
    pub model: ModelConfig,
    /// What training adds.
    pub training: Option<serde_json::Value>,
}

impl<T: Scalar> Transformer<T> {
    /// Writes the model into a folder, which is made if need be.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] for numbers that are not finite, which [`load`](Self::load) would refuse. An
    /// earlier checkpoint in that folder is then still whole.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), Error> {
        compiled_here!(
            T,
            |model, folder| write(folder, model, vec![], None),
            fn(&Transformer<T>, &Path) -> Result<(), Error>
        )(self, folder.as_ref())
    }

    /// Reads the model that [`save`](Self::save) or a training checkpoint left in a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::File`] if it is not what it should be, saying why.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, Error> {
        compiled_here!(T, load::<T>, fn(&Path) -> Result<Transformer<T>, Error>)(folder.as_ref())
    }
}

fn load<T: Scalar>(folder: &Path) -> Result<Transformer<T>, Error> {
    let (manifest, file) = open(folder)?;
    read_model(manifest.model, &file)
}

/// Writes a model with more tensors beside it.
pub(crate) fn write<'a, T: Scalar>(
    folder: &Path,
    model: &'a Transformer<T>,
    more: Vec<Tensor<'a>>,
    training: Option<serde_json::Value>,
) -> Result<(), Error> {
    let mut tensors = named("model", model.parameters())?;
    for (i, learning) in model.config().codebook_units().zip(model.learning()) {
        match learning {
            Learning::Ema(ema) => tensors.extend(ema_tensors(i, ema)?),
            Learning::Linear(Basis::Frozen(basis)) => {
                tensors.push(tensor(format!("codebooks.{i}.basis"), basis.view())?);
            }
            Learning::Frozen(codewords) => {
                tensors.push(tensor(format!("codebooks.{i}.codewords"), codewords.view())?);
            }
            Learning::Gradient | Learning::Linear(Basis::Learned) => {}
        }
    }
    tensors.extend(more);
    let config = serde_json::to_string(model.config())
        .map_err(|e| file_error(folder.into(), format!("the model cannot be described: {e}")))?;

    std::fs::create_dir_all(folder).map_err(|e| io_error(folder, "create", &e))?;
    let [a, b] = TENSOR_FILES;
    let name = if name_in_use(folder)?.as_deref() == Some(a) { b } else { a };
    TensorFile::write(folder.join(name), tensors, &BTreeMap::from([(CONFIG.into(), config)]))?;

    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        tensors: name.into(),
        model: model.config().clone(),
        training,
    };
    write_atomically(folder.join(MANIFEST), |out| {
        serde_json::to_writer_pretty(&mut *out, &manifest)?;
        out.write_all(b"\n")
    })?;
    // What the old checkpoint was made of; nothing depends on its going.
    let other = if name == a { b } else { a };
    let _ = std::fs::remove_file(folder.join(other));
    Ok(())
}

/// The tensor file that the checkpoint in this folder names, if there is one, however old or new its format is. One that cannot
/// be read is an error: it may name any.
fn name_in_use(folder: &Path) -> Result<Option<String>, Error> {
    let path = folder.join(MANIFEST);
    let json = match std::fs::read(&path) {
        Ok(json) => json,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(&path, "read", &e)),
    };
    let manifest: Option<serde_json::Value> = serde_json::from_slice(&json).ok();
    Ok(manifest.and_then(|manifest| Some(manifest.get("tensors")?.as_str()?.to_string())))
}

/// An array to be saved. Numbers that could not be loaded again must not replace those that can.
pub(crate) fn tensor<'a, T: Scalar, D: Dimension>(
    name: String,
    array: ArrayView<'a, T, D>,
) -> Result<Tensor<'a>, Error> {
    match array.iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(Error::invalid("checkpoint", "of finite numbers", format!("{bad} in `{name}`"))),
        None => Ok(Tensor::new(name, array)),
    }
}

/// Every array of `parameters`, its name behind `prefix`.
pub(crate) fn named<'a, T: Scalar>(
    prefix: &str,
    parameters: &'a Parameters<T>,
) -> Result<Vec<Tensor<'a>>, Error> {
    named_views(prefix, parameters.views())
}

/// Every one of these arrays, its name behind `prefix`.
pub(super) fn named_views<'a, T: Scalar>(
    prefix: &str,
    views: Vec<Parameter<'a, T>>,
) -> Result<Vec<Tensor<'a>>, Error> {
    views.into_iter().map(|p| tensor(format!("{prefix}.{}", p.name), p.value)).collect()
}

/// Opens the checkpoint in a folder.
pub(crate) fn open(folder: &Path) -> Result<(Manifest, TensorFile), Error> {
    let manifest = read_manifest(&folder.join(MANIFEST))?;
    let file = TensorFile::open(folder.join(&manifest.tensors))?;
    let wrong = |problem: String| file_error(file.path().into(), problem);
    let config = file.metadata().get(CONFIG);
    let config = config.ok_or_else(|| wrong(format!("the metadata has no `{CONFIG}`")))?;
    let config: ModelConfig =
        serde_json::from_str(config).map_err(|e| wrong(format!("metadata `{CONFIG}`: {e}")))?;
    if config != manifest.model {
        return Err(wrong(format!("belongs to another model than {MANIFEST} describes")));
    }
    Ok((manifest, file))
}

fn read_manifest(path: &Path) -> Result<Manifest, Error> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let wrong = |problem: String| file_error(path.into(), problem);
    let foreign = |e: serde_json::Error| wrong(format!("not a checkpoint: {e}"));
    let json = std::fs::read(path).map_err(|e| io_error(path, "read", &e))?;
    // The version alone comes first: another one may have other fields.
    let Version { format_version } = serde_json::from_slice(&json).map_err(foreign)?;
    if format_version != FORMAT_VERSION {
        return Err(wrong(format!("format version {format_version}, this crate reads {FORMAT_VERSION}")));
    }
    let manifest: Manifest = serde_json::from_slice(&json).map_err(foreign)?;
    // Only the two names that are ever written: a path could lead out of the folder.
    if !TENSOR_FILES.contains(&manifest.tensors.as_str()) {
        return Err(wrong(format!("`{}` is not the name of a tensor file", manifest.tensors)));
    }
    manifest.model.validate().map_err(|e| wrong(e.to_string()))?;
    Ok(manifest)
}

fn io_error(path: &Path, action: &'static str, e: &std::io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), action, message: e.to_string() }
}

pub(crate) fn file_error(path: PathBuf, problem: String) -> Error {
    Error::File { path, problem }
}

/// The model of an open checkpoint.
pub(crate) fn read_model<T: Scalar>(config: ModelConfig, file: &TensorFile) -> Result<Transformer<T>, Error> {
    let parameters = read_parameters("model", &config, file)?;
    let learning = config.codebook_units().map(|i| read_learning(&config, i, file));
    let learning = learning.collect::<Result<_, Error>>()?;
    let model = Transformer::from_parts(config, parameters, learning);
    model.map_err(|e| file_error(file.path().into(), e.to_string()))
}

/// What the optimizer does not move of the codebook of unit i.
fn read_learning<T: Scalar>(config: &ModelConfig, i: usize, file: &TensorFile) -> Result<Learning<T>, Error> {
    let (n_heads, &ModelConfig { n_codes, d_k, codebook_decay, .. }) = (config.key_heads(), config);
    let wrong = |e: Error| wrong_codebook(i, file, e);
    let table = |name: &str, width: usize| -> Result<Array3<T>, Error> {
        let array: ArrayD<T> = file.array(&format!("codebooks.{i}.{name}"), &[n_heads, n_codes, width])?;
        Ok(array.into_dimensionality::<Ix3>().expect("its shape has been checked"))
    };
    let finite = |table: Array3<T>| check_finite("codebook", table.view()).map(|()| table).map_err(wrong);
    Ok(match config.learning {
        LearningConfig::Ema { smoothing } => {
            let ema = read_ema(i, (n_heads, n_codes, d_k), codebook_decay, file)?;
            Learning::Ema(ema.with_smoothing(smoothing).map_err(wrong)?)
        }
        LearningConfig::Gradient(_) => Learning::Gradient,
        LearningConfig::Linear { learned_basis: true, .. } => Learning::Linear(Basis::Learned),
        LearningConfig::Linear { d_basis, .. } => {
            Learning::Linear(Basis::Frozen(finite(table("basis", d_basis)?)?))
        }
        LearningConfig::Frozen => Learning::Frozen(finite(table("codewords", d_k)?)?),
    })
}

fn wrong_codebook(i: usize, file: &TensorFile, e: Error) -> Error {
    file_error(file.path().into(), format!("codebooks.{i}: {e}"))
}

/// The moving averages of unit i, of H heads with S codes of width K.
pub(super) fn read_ema<T: Scalar>(
    i: usize,
    (n_heads, n_codes, d_k): (usize, usize, usize),
    decay: f64,
    file: &TensorFile,
) -> Result<Ema<T>, Error> {
    let sums: ArrayD<T> = file.array(&format!("codebooks.{i}.sums"), &[n_heads, n_codes, d_k])?;
    let counts: ArrayD<T> = file.array(&format!("codebooks.{i}.counts"), &[n_heads, n_codes])?;
    let sums = sums.into_dimensionality::<Ix3>().expect("its shape has been checked");
    let counts = counts.into_dimensionality::<Ix2>().expect("its shape has been checked");
    Ema::new(sums, counts, decay).map_err(|e| wrong_codebook(i, file, e))
}

/// The tensors of the moving averages of unit i.
pub(super) fn ema_tensors<T: Scalar>(i: usize, ema: &Ema<T>) -> Result<[Tensor<'_>; 2], Error> {
    let sums = tensor(format!("codebooks.{i}.sums"), ema.sums())?;
    Ok([sums, tensor(format!("codebooks.{i}.counts"), ema.counts())?])
}

/// The arrays that [`named`] has written.
pub(crate) fn read_parameters<T: Scalar>(
    prefix: &str,
    config: &ModelConfig,
    file: &TensorFile,
) -> Result<Parameters<T>, Error> {
    check_count(prefix, config.n_parameters(), file)?;
    let mut parameters = Parameters::zeros(config);
    read_views(prefix, parameters.views_mut(), file)?;
    Ok(parameters)
}

/// Before anything is allocated: does the file hold as much as the configuration says?
pub(super) fn check_count(prefix: &str, expected: u128, file: &TensorFile) -> Result<(), Error> {
    let found = file.count_elements(&format!("{prefix}."));
    if found == expected {
        return Ok(());
    }
    let problem = format!("`{prefix}.*` holds {found} numbers, a model of this configuration has {expected}");
    Err(file_error(file.path().into(), problem))
}

/// Fills these arrays with those that [`named_views`] has written.
pub(super) fn read_views<T: Scalar>(
    prefix: &str,
    views: Vec<ParameterMut<'_, T>>,
    file: &TensorFile,
) -> Result<(), Error> {
    for mut parameter in views {
        let name = format!("{prefix}.{}", parameter.name);
        let array = file.array::<T>(&name, parameter.value.shape())?;
        if let Some(bad) = array.iter().find(|x| !x.is_finite()) {
            return Err(file_error(file.path().into(), format!("tensor `{name}` holds {bad}")));
        }
        parameter.value.assign(&array);
    }
    Ok(())
}
