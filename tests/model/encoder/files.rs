//! An encoder comes back from its file bit for bit, and whatever else stands in a file is refused with words.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tempfile::tempdir;
use transformer_vq::model::{Encoder, Tensor, TensorFile};
use transformer_vq::ndarray::{ArrayD, array};
use transformer_vq::{Error, Scalar};

use super::{bits, configs, encoder, small};

fn comes_back<T: Scalar>(mut encoder: Encoder<T>) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("encoder.safetensors");
    // Also the sign of a zero.
    encoder.parameters_mut().last_mut().unwrap().value.fill(-T::zero());
    encoder.save(&path).unwrap();
    let loaded = Encoder::<T>::load(&path).unwrap();
    assert_eq!(loaded, encoder);
    assert!(bits(loaded.parameters()) == bits(encoder.parameters()));
    let first = fs::read(&path).unwrap();
    loaded.save(&path).unwrap();
    assert!(fs::read(&path).unwrap() == first);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn encoders_come_back_bit_for_bit() {
    for config in configs() {
        comes_back(encoder(&config));
        comes_back(encoder(&config).cast::<f64>());
    }
}

/// Everything in a file, to be changed.
struct Contents {
    tensors: BTreeMap<String, ArrayD<f32>>,
    metadata: BTreeMap<String, String>,
}

impl Contents {
    fn read(path: &Path) -> Self {
        let file = TensorFile::open(path).unwrap();
        let read = |name: &str| (name.to_string(), file.array_any_shape(name).unwrap());
        Contents { tensors: file.names().map(read).collect(), metadata: file.metadata().clone() }
    }

    fn write(&self, path: &Path) {
        let tensors = self.tensors.iter().map(|(name, array)| Tensor::new(name, array.view()));
        TensorFile::write(path, tensors, &self.metadata).unwrap();
    }
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("encoder.safetensors");
    encoder(&small()).save(&path).unwrap();
    let refused = |change: &dyn Fn(&mut Contents)| {
        let mut contents = Contents::read(&path);
        change(&mut contents);
        let damaged = folder.path().join("damaged.safetensors");
        contents.write(&damaged);
        match Encoder::<f32>::load(&damaged).unwrap_err() {
            Error::File { path, problem } => {
                assert_eq!(path, damaged);
                problem
            }
            error => panic!("{error}"),
        }
    };
    let says = |problem: String, words: &str| assert!(problem.contains(words), "{words}: {problem}");
    let drop_key = |key: &'static str| move |contents: &mut Contents| drop(contents.metadata.remove(key));
    says(refused(&drop_key("encoder")), "not an encoder: the metadata has no `encoder`");
    says(refused(&drop_key("format_version")), "not an encoder: the metadata has no `format_version`");
    let set = |key: &'static str, value: &'static str| {
        move |contents: &mut Contents| drop(contents.metadata.insert(key.into(), value.into()))
    };
    says(refused(&set("format_version", "2")), "format version 2, this crate reads 1");
    says(refused(&set("encoder", "{}")), "metadata `encoder`: missing field");
    let edit = |from: &'static str, to: &'static str| {
        move |contents: &mut Contents| {
            let config = contents.metadata.get_mut("encoder").unwrap();
            assert!(config.contains(from), "{config}");
            *config = config.replace(from, to);
        }
    };
    says(refused(&edit("\"d_model\":6", "\"d_model\":5")), "`d_model` must be even");
    says(refused(&edit("\"d_model\":6", "\"d_model\":8")), "a model of this configuration has");
    says(refused(&edit("\"n_layers\":2", "\"n_layers\":4000000000")), "a model of this configuration has");
    says(refused(&edit("\"n_codes\":4", "\"n_codes\":5")), "codebooks.0.sums");
    says(refused(&|contents| drop(contents.tensors.remove("encoder.output"))), "holds");
    says(refused(&|contents| drop(contents.tensors.remove("codebooks.1.counts"))), "codebooks.1.counts");
    let nan = |name: &'static str| {
        move |contents: &mut Contents| {
            *contents.tensors.get_mut(name).unwrap().first_mut().unwrap() = f32::NAN
        }
    };
    says(refused(&nan("encoder.layers.1.w_k")), "tensor `encoder.layers.1.w_k` holds NaN");
    says(refused(&nan("codebooks.0.sums")), "codebooks.0: `sums` is NaN");
    let renamed = |contents: &mut Contents| {
        let gain = contents.tensors.remove("encoder.final_norm.gain").unwrap();
        contents.tensors.insert("encoder.final_norm.size".into(), gain);
    };
    says(refused(&renamed), "encoder.final_norm.gain");

    // Cut anywhere, or something else.
    let whole = fs::read(&path).unwrap();
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(Encoder::<f32>::load(&path), Err(Error::File { .. })), "{len} bytes");
    }
    fs::write(&path, "no tensors at all").unwrap();
    assert!(matches!(Encoder::<f32>::load(&path), Err(Error::File { .. })));
    let missing = Encoder::<f32>::load(folder.path().join("missing")).unwrap_err();
    assert!(matches!(missing, Error::Io { action: "read", .. }), "{missing:?}");
}

#[test]
fn what_could_not_be_loaded_is_not_saved() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("encoder.safetensors");
    let mut encoder = encoder(&small());
    encoder.save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    encoder.parameters_mut()[0].value.fill(f32::INFINITY);
    let error = encoder.save(&path).unwrap_err();
    assert!(error.to_string().contains("inf in `encoder.embedding`"), "{error}");
    assert!(fs::read(&path).unwrap() == good);
    // A file of a language model is none of an encoder.
    let metadata = BTreeMap::from([("model".to_string(), "{}".to_string())]);
    TensorFile::write(&path, [Tensor::new("model.embedding", array![[1f32]].view())], &metadata).unwrap();
    let error = Encoder::<f32>::load(&path).unwrap_err().to_string();
    assert!(error.contains("not an encoder"), "{error}");
}
