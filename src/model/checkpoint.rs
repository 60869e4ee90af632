//! A model in a folder: `checkpoint.json` (configuration) and a `safetensors` file (arrays).
//!
//! The JSON file names the tensor file and is written last. Each file is written whole or not at all, and a new tensor file
//! never takes the name of the one in use, so a process that is killed at any moment leaves the last good checkpoint.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `model.<parameter>` | as in [`Parameters`] | for example `model.layers.0.w_q` |
//! | `codebooks.<unit>.sums` | [H, S, K] | moving averages |
//! | `codebooks.<unit>.counts` | [H, S] | |
//!
//! Training adds its own; a model can be loaded from either.

use std::path::{Path, PathBuf};

use ndarray::{ArrayD, Ix2, Ix3};
use serde::{Deserialize, Serialize};

use super::tensor_file::{Tensor, TensorFile};
use super::{ModelConfig, Parameters, Transformer, write_atomically};
use crate::codebook::{Codebook, Ema, Learning};
use crate::{Error, Scalar};

/// Raised whenever an older reader would misread what is written.
const FORMAT_VERSION: u32 = 1;

const MANIFEST: &str = "checkpoint.json";
/// A checkpoint takes the one that the last did not.
const TENSOR_FILES: [&str; 2] = ["tensors-a.safetensors", "tensors-b.safetensors"];

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
    /// [`Error::Io`]; an earlier checkpoint in that folder is then still whole.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), Error> {
        write(folder.as_ref(), self, vec![], None)
    }
}

impl<T: Scalar> Transformer<T> {
    /// Reads the model that [`save`](Self::save) or a training checkpoint left in a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::File`] if it is not what it should be, saying why.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let (manifest, file) = open(folder.as_ref())?;
        read_model(manifest.model, &file)
    }
}

/// Writes a model with more tensors beside it.
pub(crate) fn write<'a, T: Scalar>(
    folder: &Path,
    model: &'a Transformer<T>,
    more: Vec<Tensor<'a>>,
    training: Option<serde_json::Value>,
) -> Result<(), Error> {
    let failed = |action, e: std::io::Error| {
        let (path, message) = (folder.to_path_buf(), e.to_string());
        Error::Io { path, action, message }
    };
    std::fs::create_dir_all(folder).map_err(|e| failed("create", e))?;
    let [a, b] = TENSOR_FILES;
    let in_use = read_manifest(folder).ok().map(|manifest| manifest.tensors);
    let name = if in_use.as_deref() == Some(a) { b } else { a };

    let mut tensors = named("model", model.parameters());
    for (i, codebook) in model.codebooks().iter().enumerate() {
        let Learning::Ema(ema) = codebook.learning();
        tensors.push(Tensor::new(format!("codebooks.{i}.sums"), ema.sums()));
        tensors.push(Tensor::new(format!("codebooks.{i}.counts"), ema.counts()));
    }
    tensors.extend(more);
    TensorFile::write(folder.join(name), tensors, &Default::default())?;

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

/// Every array of `parameters`, its name behind `prefix`.
pub(crate) fn named<'a, T: Scalar>(prefix: &str, parameters: &'a Parameters<T>) -> Vec<Tensor<'a>> {
    parameters.views().into_iter().map(|p| Tensor::new(format!("{prefix}.{}", p.name), p.value)).collect()
}

/// Opens the checkpoint in a folder.
pub(crate) fn open(folder: &Path) -> Result<(Manifest, TensorFile), Error> {
    let manifest = read_manifest(folder)?;
    let path = folder.join(MANIFEST);
    if manifest.format_version != FORMAT_VERSION {
        let (expected, got) = (FORMAT_VERSION, manifest.format_version);
        return Err(file_error(path, format!("format version {got}, this crate reads {expected}")));
    }
    if !TENSOR_FILES.contains(&manifest.tensors.as_str()) {
        return Err(file_error(path, format!("`{}` is not the name of a tensor file", manifest.tensors)));
    }
    manifest.model.validate().map_err(|e| file_error(path, e.to_string()))?;
    let file = TensorFile::open(folder.join(&manifest.tensors))?;
    Ok((manifest, file))
}

fn read_manifest(folder: &Path) -> Result<Manifest, Error> {
    let path = folder.join(MANIFEST);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::Io {
        path: path.clone(),
        action: "read",
        message: e.to_string(),
    })?;
    serde_json::from_str(&text).map_err(|e| file_error(path, format!("not a checkpoint: {e}")))
}

pub(crate) fn file_error(path: PathBuf, problem: String) -> Error {
    Error::File { path, problem }
}

/// The model of an open checkpoint.
pub(crate) fn read_model<T: Scalar>(config: ModelConfig, file: &TensorFile) -> Result<Transformer<T>, Error> {
    let parameters = read_parameters("model", &config, file)?;
    let ModelConfig { n_heads, n_codes, d_k, codebook_decay, .. } = config;
    let codebook = |i: usize| {
        let sums: ArrayD<T> = file.array(&format!("codebooks.{i}.sums"), &[n_heads, n_codes, d_k])?;
        let counts: ArrayD<T> = file.array(&format!("codebooks.{i}.counts"), &[n_heads, n_codes])?;
        let sums = sums.into_dimensionality::<Ix3>().expect("its shape has been checked");
        let counts = counts.into_dimensionality::<Ix2>().expect("its shape has been checked");
        let ema = Ema::new(sums, counts, codebook_decay);
        let ema = ema.map_err(|e| file_error(file.path().into(), format!("codebooks.{i}: {e}")))?;
        Ok(Codebook::ema(ema))
    };
    let codebooks = (0..config.n_layers).map(codebook).collect::<Result<_, Error>>()?;
    Transformer::from_parts(config, parameters, codebooks)
}

/// The arrays that [`named`] has written.
pub(crate) fn read_parameters<T: Scalar>(
    prefix: &str,
    config: &ModelConfig,
    file: &TensorFile,
) -> Result<Parameters<T>, Error> {
    // Before anything is allocated: does the file hold as much as the configuration says?
    let expected = config.n_parameters();
    let found = file.count_elements(&format!("{prefix}."));
    if found != expected {
        let problem =
            format!("`{prefix}.*` holds {found} numbers, a model of this configuration has {expected}");
        return Err(file_error(file.path().into(), problem));
    }
    let mut parameters = Parameters::zeros(config);
    for mut parameter in parameters.views_mut() {
        let name = format!("{prefix}.{}", parameter.name);
        let array = file.array::<T>(&name, parameter.value.shape())?;
        if let Some(bad) = array.iter().find(|x| !x.is_finite()) {
            return Err(file_error(file.path().into(), format!("tensor `{name}` holds {bad}")));
        }
        parameter.value.assign(&array);
    }
    Ok(parameters)
}
