//! Checkpoints come back bit for bit, survive being killed, and believe nothing that a file says.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/training.rs"]
mod training;

use std::fs;
use std::path::Path;

use counting::peak_bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use training::{bits, config, files, progress, train, trainer};
use transformer_vq::attention::VqAttention;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::ndarray::array;
use transformer_vq::train::{Budget, Progress, RecentLoss, Schedule, Trainer};
use transformer_vq::{Error, Scalar};

const JSON: &str = "checkpoint.json";
const TENSORS: [&str; 2] = ["tensors-a.safetensors", "tensors-b.safetensors"];

/// A checkpoint of training after a few steps, in the middle of a sequence.
fn saved<T: Scalar>() -> (TempDir, Trainer<T>, Progress) {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, mut progress) = (trainer::<T>(config()), progress());
    train(&mut trainer, &mut progress, 5);
    trainer.save(folder.path(), &progress).unwrap();
    (folder, trainer, progress)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
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
    let path = folder.join(TENSORS[0]);
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

fn model_comes_back<T: Scalar>(config: ModelConfig) {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, mut progress) = (trainer::<T>(config), progress());
    train(&mut trainer, &mut progress, 2);
    let path = folder.path().join("made").join("on the way");
    trainer.model().save(&path).unwrap();
    let mut loaded = Transformer::<T>::load(&path).unwrap();
    assert_eq!(&loaded, trainer.model());
    let tokens = array![[0, 11, 3, 3, 7, 1, 2]];
    let logits =
        |model: &Transformer<T>| model.push(tokens.view(), &mut model.new_state(1).unwrap()).unwrap();
    assert_eq!(logits(&loaded), logits(trainer.model()));
    // Also the sign of a zero.
    loaded.parameters_mut().output_bias.fill(-T::zero());
    loaded.save(&path).unwrap();
    let bias = Transformer::<T>::load(&path).unwrap().parameters().output_bias.clone();
    assert!(bias.iter().all(|x| x.is_sign_negative()));
}

#[test]
fn models_come_back_bit_for_bit() {
    for (tied, absolute, norm) in [(false, true, true), (true, false, false), (true, true, true)] {
        let options =
            ModelConfig { tied_embedding: tied, absolute_positions: absolute, final_norm: norm, ..config() };
        model_comes_back::<f32>(options.clone());
        model_comes_back::<f64>(options);
    }
    let attention = VqAttention { window: 0, cache: false, gradient_through_cache: false, block_len: 1 };
    model_comes_back::<f32>(ModelConfig {
        attention,
        logit_scale: 1.0 / 3.0,
        commit_weight: 0.1 + 0.2,
        ..config()
    });
}

fn training_comes_back<T: Scalar>() {
    for steps in [0, 1, 3, 5] {
        let folder = tempfile::tempdir().unwrap();
        let (mut trainer, mut progress) = (trainer::<T>(config()), progress());
        train(&mut trainer, &mut progress, steps);
        trainer.save(folder.path(), &progress).unwrap();
        let (loaded, loaded_progress) = Trainer::<T>::load(folder.path()).unwrap();
        assert_eq!((loaded.steps(), &loaded_progress), (steps, &progress));
        assert_eq!(loaded.optimizer(), trainer.optimizer());
        assert!(bits(&loaded, &loaded_progress) == files(folder.path()));
        assert_eq!(&Transformer::<T>::load(folder.path()).unwrap(), trainer.model());
    }
}

#[test]
fn training_comes_back_bit_for_bit() {
    training_comes_back::<f32>();
    training_comes_back::<f64>();
    // f64 is rounded to f32, f32 is exact in f64.
    let (folder, trainer, _) = saved::<f64>();
    assert_eq!(Transformer::<f32>::load(folder.path()).unwrap(), trainer.model().cast());
    let (folder, trainer, _) = saved::<f32>();
    assert_eq!(Trainer::<f64>::load(folder.path()).unwrap().0.model(), &trainer.model().cast());
    // The time of day is a budget too.
    let budget = Budget::Seconds(100.0 / 3.0);
    let progress = Progress { budget, recent: RecentLoss { steps: 3, nats: 0.1 + 0.7 }, ..progress() };
    trainer.clone().save(folder.path(), &progress).unwrap();
    assert_eq!(Trainer::<f32>::load(folder.path()).unwrap().1, progress);
}

#[test]
fn saving_again_takes_the_other_name_and_leaves_one_file() {
    let (folder, mut trainer, progress) = saved::<f32>();
    for i in 1..6 {
        assert_eq!(names(folder.path()), [JSON, TENSORS[(i - 1) % 2]]);
        trainer.save(folder.path(), &progress).unwrap();
        assert_eq!(Trainer::<f32>::load(folder.path()).unwrap().0.model(), trainer.model());
    }
    // A format that this crate cannot read is not overwritten before the new one is there either.
    edit_json(folder.path(), |json| *json = json!({"format_version": 9, "tensors": TENSORS[0]}));
    fs::write(folder.path().join(TENSORS[0]), "theirs").unwrap();
    fs::remove_file(folder.path().join(TENSORS[1])).unwrap();
    trainer.save(folder.path(), &progress).unwrap();
    assert_eq!(names(folder.path()), [JSON, TENSORS[1]]);
}

#[test]
fn what_a_killed_save_leaves_does_no_harm() {
    let (folder, mut trainer, mut progress) = saved::<f32>();
    let whole = fs::read(folder.path().join(TENSORS[0])).unwrap();
    for cut in [0, 7, whole.len() / 2, whole.len()] {
        fs::write(folder.path().join(TENSORS[1]), &whole[..cut]).unwrap();
        fs::write(folder.path().join(".tmpa1b2.tmp"), &whole[..cut]).unwrap();
        let (loaded, loaded_progress) = Trainer::<f32>::load(folder.path()).unwrap();
        assert!(bits(&loaded, &loaded_progress) == bits(&trainer, &progress));
    }
    train(&mut trainer, &mut progress, 7);
    trainer.save(folder.path(), &progress).unwrap();
    assert_eq!(names(folder.path()), [".tmpa1b2.tmp", JSON, TENSORS[1]]);
    let (loaded, loaded_progress) = Trainer::<f32>::load(folder.path()).unwrap();
    assert!(bits(&loaded, &loaded_progress) == bits(&trainer, &progress));
}

#[test]
fn what_could_not_be_loaded_does_not_replace_what_can() {
    let (folder, trainer, progress) = saved::<f32>();
    let before = files(folder.path());
    let mut model = trainer.model().clone();
    model.parameters_mut().layers[1].w_v[[2, 3]] = f32::NAN;
    let expected = Error::Invalid {
        what: "checkpoint",
        expected: "of finite numbers".into(),
        got: "NaN in `model.layers.1.w_v`".into(),
    };
    assert_eq!(model.save(folder.path()), Err(expected.clone()));
    let mut poisoned = Trainer::new(model, *trainer.optimizer()).unwrap();
    assert_eq!(poisoned.save(folder.path(), &progress), Err(expected));
    let wrong = [
        (Progress { seconds: f64::NAN, ..progress.clone() }, "seconds"),
        (Progress { seconds: -1.0, ..progress.clone() }, "seconds"),
        (Progress { budget: Budget::Steps(0), ..progress.clone() }, "budget"),
        (Progress { budget: Budget::Seconds(0.0), ..progress.clone() }, "budget"),
        (Progress { budget: Budget::Seconds(f64::INFINITY), ..progress.clone() }, "budget"),
        (Progress { recent: RecentLoss { steps: 1, nats: f64::NAN }, ..progress.clone() }, "recent.nats"),
        (Progress { schedule: Schedule { warmup: 2.0, alpha: 0.1 }, ..progress.clone() }, "warmup"),
    ];
    for (progress, field) in wrong {
        let error = trainer.clone().save(folder.path(), &progress).unwrap_err();
        assert!(matches!(error, Error::Invalid { what, .. } if what == field), "{field}: {error}");
    }
    assert!(files(folder.path()) == before);
    assert_eq!(names(folder.path()), [JSON, TENSORS[0]]);
    // A folder that cannot be one.
    let error = trainer.model().save(folder.path().join(JSON).join("below")).unwrap_err();
    assert!(matches!(error, Error::Io { action: "create", .. }), "{error}");
    let error = Transformer::<f32>::load(folder.path().join("missing")).unwrap_err();
    assert!(matches!(error, Error::Io { action: "read", .. }), "{error}");
}

#[test]
fn every_cut_is_noticed() {
    let (folder, ..) = saved::<f32>();
    for name in [JSON, TENSORS[0]] {
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
    for name in [JSON, TENSORS[0]] {
        let hidden = folder.path().join("hidden");
        fs::rename(folder.path().join(name), &hidden).unwrap();
        assert!(refusal(folder.path()).starts_with("cannot read "));
        fs::rename(&hidden, folder.path().join(name)).unwrap();
    }
}

#[test]
fn flipped_bits_are_noticed_or_harmless() {
    let (folder, ..) = saved::<f32>();
    for name in [JSON, TENSORS[0]] {
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
    let (folder, ..) = saved::<f32>();
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
        (|json| json["tensors"] = json!(TENSORS[1]), "cannot read"),
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

    let training: [(Edit, &str); 10] = [
        (|json| *json = Value::Null, "a model without its training"),
        (|json| json["surprise"] = json!(1), "training: unknown field `surprise`"),
        (|json| json["progress"]["surprise"] = json!(1), "training: unknown field `surprise`"),
        (|json| json["optimizer"]["beta1"] = json!(1.0), "`beta1` must be in [0, 1)"),
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
    let (folder, ..) = saved::<f32>();
    let path = folder.path().join(TENSORS[0]);
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
        fs::copy(elsewhere.path().join(TENSORS[0]), &path).unwrap();
        refused("belongs to another model than checkpoint.json describes");
    }
    // A model alone, where training is expected.
    let elsewhere = tempfile::tempdir().unwrap();
    trainer::<f32>(config()).model().save(elsewhere.path()).unwrap();
    fs::copy(elsewhere.path().join(TENSORS[0]), &path).unwrap();
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
    Trainer::<f32>::load(folder.path()).unwrap();
}

#[test]
fn absurd_sizes_allocate_nothing() {
    let (folder, ..) = saved::<f32>();
    let sound = files(folder.path());
    let huge = [0, 1 << 31, (1 << 31) - 200, (1 << 32) - 2, 4_000_000_000, 1 << 40, u64::MAX / 2, u64::MAX];
    let fields =
        ["vocab_size", "d_model", "n_layers", "n_heads", "d_k", "d_v", "n_codes", "window", "block_len"];
    for (field, size) in fields.into_iter().flat_map(|field| huge.map(|size| (field, size))) {
        for (file, to) in [JSON, TENSORS[0]].into_iter().zip(&sound) {
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
