//! A checkpoint is not believed: what is cut, flipped, foreign or absurd is an error that says so, and costs no memory.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/training.rs"]
mod training;

use std::fs;
use std::path::Path;

use counting::peak_bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use training::{bits, config, files, progress, train, trainer, trainer_with};
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{Adafactor, Lion, Optimizer, ParameterGroup, Trainer};

const JSON: &str = "checkpoint.json";
const TENSORS: &str = "tensors-a.safetensors";

/// A checkpoint of training after a few steps, in the middle of a sequence.
fn saved() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, mut progress) = (trainer::<f32>(config()), progress());
    train(&mut trainer, &mut progress, 5);
    trainer.save(folder.path(), &progress).unwrap();
    folder
}

/// The error of both loaders, which must be the same.
fn refusal(folder: &Path) -> String {
    let trainer = Trainer::<f32>::load(folder).expect_err("a trainer").to_string();
    let model = Transformer::<f32>::load(folder).expect_err("a model").to_string();
    assert_eq!(trainer, model);
    trainer
}

fn edit_json(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(folder.join(JSON)).unwrap()).unwrap();
    edit(&mut json);
    fs::write(folder.join(JSON), json.to_string()).unwrap();
}

/// Changes the header and the elements of the first tensor file.
fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = folder.join(TENSORS);
    let bytes = fs::read(&path).unwrap();
    let (len, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
    edit(&mut header, &mut data);
    let header = header.to_string();
    let len = (header.len() as u64).to_le_bytes();
    fs::write(path, [&len[..], header.as_bytes(), &data].concat()).unwrap();
}

/// Overwrites the first element of a tensor.
fn poke(folder: &Path, name: &str, element: &[u8]) {
    edit_tensors(folder, |header, data| {
        let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + element.len()].copy_from_slice(element);
    });
}

#[test]
fn every_cut_is_noticed() {
    let folder = saved();
    for name in [JSON, TENSORS] {
        let whole = fs::read(folder.path().join(name)).unwrap();
        // But for the line's end after the JSON.
        let last = whole.trim_ascii_end().len();
        for len in (0..last).step_by(last / 200).chain(last - 9..last) {
            fs::write(folder.path().join(name), &whole[..len]).unwrap();
            let message = refusal(folder.path());
            assert!(message.starts_with(folder.path().join(name).to_str().unwrap()), "{len}: {message}");
        }
        fs::write(folder.path().join(name), whole).unwrap();
    }
    Trainer::<f32>::load(folder.path()).unwrap();
    for name in [JSON, TENSORS] {
        let hidden = folder.path().join("hidden");
        fs::rename(folder.path().join(name), &hidden).unwrap();
        assert!(refusal(folder.path()).starts_with("cannot read "));
        fs::rename(&hidden, folder.path().join(name)).unwrap();
    }
}

#[test]
fn flipped_bits_are_noticed_or_harmless() {
    let folder = saved();
    for name in [JSON, TENSORS] {
        let path = folder.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        let header =
            if name == JSON { bytes.len() } else { 8 + usize::from(bytes[0]) + 256 * usize::from(bytes[1]) };
        let beyond = (header..bytes.len()).step_by(97);
        for place in (0..header).step_by(1 + header / 300).chain(beyond) {
            for flip in [0x01, 0x80] {
                bytes[place] ^= flip;
                fs::write(&path, &bytes).unwrap();
                let loaded = Trainer::<f32>::load(folder.path());
                // Both files are plain ASCII as far as they are text.
                assert!(loaded.is_err() || flip == 1 || place >= header, "{name}: {place}");
                bytes[place] ^= flip;
            }
        }
        fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn foreign_json_is_refused_with_its_reason() {
    let folder = saved();
    let path = folder.path().join(JSON);
    let sound = fs::read(&path).unwrap();
    let deep = "[".repeat(100_000);
    for text in ["", " ", "{}", "[]", "null", "7", "\"a\"", "{\"a\":", "\u{0}", &deep, "safetensors"] {
        fs::write(&path, text).unwrap();
        assert!(refusal(folder.path()).contains("not a checkpoint: "), "{text:.20}");
    }
    fs::write(&path, b"\xff\xfe{}").unwrap();
    assert!(refusal(folder.path()).contains("not a checkpoint: "));

    type Edit = fn(&mut Value);
    let cases: [(Edit, &str); 16] = [
        (|json| json["format_version"] = json!(2), "format version 2, this crate reads 1"),
        // A later format is known by its version, whatever its fields are.
        (|json| *json = json!({"format_version": 7, "news": []}), "format version 7"),
        (|json| json["format_version"] = json!(-1), "-1"),
        (|json| json["surprise"] = json!(1), "unknown field `surprise`"),
        (|json| json["model"]["surprise"] = json!(1), "unknown field `surprise`"),
        (|json| json["model"]["attention"]["surprise"] = json!(1), "unknown field `surprise`"),
        (|json| drop(json["model"].as_object_mut().unwrap().remove("d_k")), "missing field `d_k`"),
        (|json| json["tensors"] = json!("../x.safetensors"), "`../x.safetensors` is not the name"),
        (|json| json["tensors"] = json!("/etc/passwd"), "`/etc/passwd` is not the name"),
        (|json| json["tensors"] = json!("tensors-a.safetensors/../x"), "is not the name"),
        (|json| json["tensors"] = json!(""), "`` is not the name"),
        (|json| json["tensors"] = json!("tensors-b.safetensors"), "cannot read"),
        (|json| json["model"]["d_model"] = json!(7), "`d_model` must be even"),
        (|json| json["model"]["n_heads"] = json!(0), "`n_heads` must be between 1"),
        (|json| json["model"]["codebook_decay"] = json!(1.5), "`codebook_decay`"),
        (|json| json["model"]["attention"]["block_len"] = json!(0), "`block_len` must be at least 1"),
    ];
    for (edit, words) in cases {
        fs::write(&path, &sound).unwrap();
        edit_json(folder.path(), edit);
        let message = refusal(folder.path());
        assert!(message.contains(words), "{words}: {message}");
    }

    let training: [(Edit, &str); 16] = [
        (|json| *json = Value::Null, "a model without its training"),
        (|json| json["surprise"] = json!(1), "training: unknown field `surprise`"),
        (|json| json["progress"]["surprise"] = json!(1), "training: unknown field `surprise`"),
        (|json| json["optimizer"]["beta1"] = json!(1.0), "`beta1` must be in [0, 1)"),
        (|json| json["optimizer"]["surprise"] = json!(1), "training: unknown field `surprise`"),
        (|json| json["optimizer"]["kind"] = json!("adam"), "unknown variant `adam`"),
        (|json| json["optimizer"] = json!(null), "training: "),
        (|json| json["groups"] = json!([{"pattern": "x"}]), "missing field `learning_rate`"),
        (
            |json| {
                let group = ParameterGroup::new("layers.9.*");
                json["groups"] = serde_json::to_value([group]).unwrap();
            },
            "`layers.9.*`",
        ),
        (|json| json["micro_batches"] = json!(0), "`micro_batches` must be at least 1"),
        (|json| json["progress"]["schedule"]["alpha"] = json!(-1.0), "`alpha` must be in [0, 1]"),
        (|json| json["progress"]["seconds"] = json!(-1.0), "`seconds` must be finite"),
        (|json| json["progress"]["budget"] = json!({"seconds": 0.0}), "`budget` must be"),
        (|json| json["progress"]["budget"] = json!({"days": 1}), "unknown variant `days`"),
        (|json| json["steps"] = json!(u64::MAX), "18446744073709551615 steps"),
        (|json| json["carries_state"] = json!(1), "training: invalid type"),
    ];
    for (edit, words) in training {
        fs::write(&path, &sound).unwrap();
        edit_json(folder.path(), |json| edit(&mut json["training"]));
        let message = Trainer::<f32>::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains(words), "{words}: {message}");
        Transformer::<f32>::load(folder.path()).unwrap();
    }
}

#[test]
fn tensors_that_do_not_belong_are_refused_with_their_reason() {
    let folder = saved();
    let path = folder.path().join(TENSORS);
    let sound = fs::read(&path).unwrap();
    let refused = |words: &str| {
        let message = Trainer::<f32>::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains(words) && message.starts_with(path.to_str().unwrap()), "{words}: {message}");
        fs::write(&path, &sound).unwrap();
    };

    // Of another model, of other shapes or of the same.
    let others = [
        ModelConfig { d_k: 5, ..config() },
        ModelConfig { n_layers: 2, ..config() },
        ModelConfig { codebook_decay: 0.8, ..config() },
    ];
    for other in others {
        let elsewhere = tempfile::tempdir().unwrap();
        trainer::<f32>(other).model().save(elsewhere.path()).unwrap();
        fs::copy(elsewhere.path().join(TENSORS), &path).unwrap();
        refused("belongs to another model than checkpoint.json describes");
    }
    // A model alone, where training is expected.
    let elsewhere = tempfile::tempdir().unwrap();
    trainer::<f32>(config()).model().save(elsewhere.path()).unwrap();
    fs::copy(elsewhere.path().join(TENSORS), &path).unwrap();
    refused("`adamw.m.*` holds 0 numbers");
    edit_tensors(folder.path(), |header, _| drop(header.as_object_mut().unwrap().remove("__metadata__")));
    refused("the metadata has no `model`");
    edit_tensors(folder.path(), |header, _| header["__metadata__"]["model"] = json!("{}"));
    refused("metadata `model`: missing field");

    let rename = |from: &str, to: &str| {
        edit_tensors(folder.path(), |header, _| {
            header[to] = header.as_object_mut().unwrap().remove(from).unwrap()
        });
    };
    rename("model.layers.1.w_q", "model.layers.1.w_x");
    refused("there is no tensor `model.layers.1.w_q`");
    rename("model.output", "output");
    refused("`model.*` holds ");
    for name in
        ["codebooks.2.sums", "codebooks.0.counts", "state.1.position", "state.0.mean", "state.2.codes"]
    {
        rename(name, "x");
        refused(&format!("there is no tensor `{name}`"));
    }
    edit_tensors(folder.path(), |header, _| header["model.layers.0.w_q"]["shape"] = json!([8, 6]));
    refused("`model.layers.0.w_q` has shape [8, 6], expected [6, 8]");
    edit_tensors(folder.path(), |header, _| header["state.1.position"]["shape"] = json!([4, 1]));
    refused("state.1: position [4, 1], expected [B, 2] with B > 0");
    edit_tensors(folder.path(), |header, _| header["state.1.position"]["shape"] = json!([1, 4]));
    refused("state.1: position [1, 4], expected [B, 2] with B > 0");
    edit_tensors(folder.path(), |header, _| header["state.1.count"]["dtype"] = json!("F64"));
    refused("`state.1.count` holds F64, expected I32");

    let nan = f32::NAN.to_le_bytes();
    let pokes: [(&str, &[u8], &str); 14] = [
        ("model.embedding", &nan, "tensor `model.embedding` holds NaN"),
        ("adamw.m.layers.0.w_q", &f32::INFINITY.to_le_bytes(), "`adamw.m.layers.0.w_q` holds inf"),
        ("adamw.v.layers.0.w_q", &nan, "`adamw.v.layers.0.w_q` holds NaN"),
        (
            "adamw.v.layers.0.w_q",
            &(-1f32).to_le_bytes(),
            "`adamw.v.layers.0.w_q` holds a negative mean of squares",
        ),
        ("codebooks.1.sums", &nan, "codebooks.1: `sums` is NaN"),
        ("codebooks.1.counts", &(-1f32).to_le_bytes(), "codebooks.1: `counts` must be 0 or more, got -1"),
        ("state.0.mean", &nan, "state.0: `mean` is NaN"),
        ("state.0.residual", &nan, "state.0: `residual` is NaN"),
        ("state.2.k_hat", &nan, "state.2: `k_hat` is NaN"),
        ("state.2.v", &nan, "state.2: `v` is NaN"),
        ("state.2.codes", &5u32.to_le_bytes(), "state.2: `codes` holds 5 at index [0], expected less than 5"),
        ("state.1.count", &1000u64.to_le_bytes(), "state.1: `sum of counts` must be 10"),
        ("state.1.count", &u64::MAX.to_le_bytes(), "state.1: `sum of counts` must be 10"),
        ("state.1.position", &u64::MAX.to_le_bytes(), "state.1: position 18446744073709551615"),
    ];
    for (name, element, words) in pokes {
        poke(folder.path(), name, element);
        refused(words);
    }
    // One state more advanced than the others, in itself consistent.
    poke(folder.path(), "state.1.position", &15u64.to_le_bytes());
    edit_tensors(folder.path(), |header, data| {
        let start = header["state.1.count"]["data_offsets"][0].as_u64().unwrap() as usize;
        let count = u64::from_le_bytes(data[start..start + 8].try_into().unwrap()) + 1;
        data[start..start + 8].copy_from_slice(&count.to_le_bytes());
    });
    refused("`position of a state` must be 14, got 15");
    // Nothing of this is left over.
    let (trainer, progress) = Trainer::<f32>::load(folder.path()).unwrap();
    assert!(bits(&trainer, &progress) == files(folder.path()));
}

#[test]
fn moments_of_another_optimizer_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |words: &str| {
        let message = Trainer::<f32>::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains(words), "{words}: {message}");
    };
    trainer_with::<f32>(config(), Lion::default()).save(folder.path(), &progress()).unwrap();
    edit_json(folder.path(), |json| json["training"]["optimizer"]["kind"] = json!("adamw"));
    refused("missing field `epsilon`");
    let adafactor = serde_json::to_value(Optimizer::from(Adafactor::default())).unwrap();
    edit_json(folder.path(), |json| json["training"]["optimizer"] = adafactor);
    refused("`adafactor.row.*` holds 0 numbers");

    let folder = tempfile::tempdir().unwrap();
    trainer_with::<f32>(config(), Adafactor::default()).save(folder.path(), &progress()).unwrap();
    poke(folder.path(), "adafactor.column.layers.0.w_q", &(-1f32).to_le_bytes());
    let message = Trainer::<f32>::load(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("`adafactor.column.layers.0.w_q` holds a negative mean of squares"),
        "{message}"
    );
}

#[test]
fn absurd_sizes_allocate_nothing() {
    let folder = saved();
    let sound = files(folder.path());
    let huge = [0, 1 << 31, (1 << 31) - 200, (1 << 32) - 2, 4_000_000_000, 1 << 40, u64::MAX / 2, u64::MAX];
    let fields =
        ["vocab_size", "d_model", "n_layers", "n_heads", "d_k", "d_v", "n_codes", "window", "block_len"];
    for (field, size) in fields.into_iter().flat_map(|field| huge.map(|size| (field, size))) {
        for (file, to) in [JSON, TENSORS].into_iter().zip(&sound) {
            fs::write(folder.path().join(file), to).unwrap();
        }
        let set = |model: &mut Value| match field {
            "window" | "block_len" => model["attention"][field] = json!(size),
            _ => model[field] = json!(size),
        };
        edit_json(folder.path(), |json| set(&mut json["model"]));
        // First the JSON file alone lies, then both.
        let (peak, message) = peak_bytes(|| refusal(folder.path()));
        assert!(peak < 64 << 20, "{field} = {size}: {peak} bytes for `{message}`");
        edit_tensors(folder.path(), |header, _| {
            let text = &mut header["__metadata__"]["model"];
            let mut model = serde_json::from_str(text.as_str().unwrap()).unwrap();
            set(&mut model);
            *text = json!(model.to_string());
        });
        let (peak, result) = peak_bytes(|| Trainer::<f32>::load(folder.path()));
        assert!(peak < 64 << 20, "{field} = {size}: {peak} bytes");
        // Another block length is another reading of the same numbers.
        assert!(result.is_err() || field == "block_len", "{field} = {size}");
        let (peak, _) = peak_bytes(|| Transformer::<f32>::load(folder.path()));
        assert!(peak < 64 << 20, "{field} = {size}: {peak} bytes");
    }
    let (peak, _) = peak_bytes(|| vec![1u8; 80 << 20]);
    assert!(peak >= 80 << 20, "the measure measures");
}
