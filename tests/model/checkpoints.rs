//! Checkpoints come back bit for bit, and one that is killed while it is written leaves the one before.

use std::fs;
use std::path::Path;

use crate::runs::{bits, config, files, progress, train, trainer};
use tempfile::TempDir;
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};
use transformer_vq::model::{
    CodebookStart, CodewordGradient, LearningConfig, ModelConfig, Revival, Transformer,
};
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
    loaded.parameters_mut().last_mut().unwrap().value.fill(-T::zero()); // the output's bias
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

/// From keys of the first batch, with new starts for idle codes.
fn revived() -> ModelConfig {
    let revival = Some(Revival { ratio: 1.0 / 3.0, every: 2 });
    ModelConfig { start: CodebookStart::KMeans { steps: 3 }, revival, ..config() }
}

/// Every kind of learning, every estimator.
fn kinds() -> Vec<ModelConfig> {
    let gradient = CodewordGradient { codebook_weight: 0.1 + 0.2, from_attention: true };
    let linear = |learned_basis, bias| LearningConfig::Linear { d_basis: 3, learned_basis, bias, gradient };
    let scaled = Rotation { variant: RotationVariant::Normalized, scale: RotationScale::AtMost(1.0 / 3.0) };
    [
        (LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } }, Estimator::None),
        (LearningConfig::Gradient(gradient), Estimator::Directional),
        (linear(false, false), Estimator::Rotation(Rotation::default())),
        (linear(false, true), Estimator::Rotation(scaled)),
        (linear(true, true), Estimator::StraightThrough),
        (LearningConfig::Frozen, Estimator::StraightThrough),
    ]
    .map(|(learning, estimator)| ModelConfig { learning, estimator, ..config() })
    .into()
}

#[test]
fn every_kind_of_learning_comes_back_bit_for_bit() {
    for config in kinds().into_iter().chain([revived()]) {
        model_comes_back::<f32>(config.clone());
        model_comes_back::<f64>(config.clone());
        training_of::<f32>(&config);
    }
}

/// What was written before there was a choice.
#[test]
fn older_checkpoints_are_read_as_what_they_were() {
    let (folder, trainer, progress) = saved::<f32>();
    let json = folder.path().join(JSON);
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let new = [
        "learning",
        "estimator",
        "start",
        "revival",
        "n_key_heads",
        "gate",
        "feed_forward",
        "units",
        "dropout",
        "recompute",
    ];
    for field in new {
        assert!(manifest["model"].as_object_mut().unwrap().remove(field).is_some());
    }
    let training = manifest["training"].as_object_mut().unwrap();
    for field in ["groups", "micro_batches", "dropout_seed", "sequence"] {
        assert!(training.remove(field).is_some());
    }
    assert_eq!(training["optimizer"].as_object_mut().unwrap().remove("kind"), Some("adamw".into()));
    let schedule = training["progress"]["schedule"].as_object_mut().unwrap();
    assert_eq!(schedule.remove("decay"), Some("cosine".into()));
    fs::write(&json, manifest.to_string()).unwrap();
    // The tensor file repeats the configuration.
    let path = folder.path().join(TENSORS[0]);
    let bytes = fs::read(&path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut information = metadata.metadata().clone().unwrap();
    let mut model: serde_json::Value = serde_json::from_str(&information["model"]).unwrap();
    for field in new {
        model.as_object_mut().unwrap().remove(field);
    }
    information.insert("model".into(), model.to_string());
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let old = safetensors::serialize(tensors, Some(information)).unwrap();
    fs::write(&path, old).unwrap();
    let (loaded, loaded_progress) = Trainer::<f32>::load(folder.path()).unwrap();
    // But for the step with which its sequences began, which only dropout asks for.
    let same = |trainer: &Trainer<f32>, progress: &Progress| {
        let [json, tensors] = bits(trainer, progress);
        let mut manifest: serde_json::Value = serde_json::from_slice(&json).unwrap();
        manifest["training"]["sequence"] = 0.into();
        (manifest, tensors)
    };
    assert!(same(&loaded, &loaded_progress) == same(&trainer, &progress), "the same run");
    assert_eq!(loaded.model(), trainer.model());
    assert_eq!(loaded.optimizer(), trainer.optimizer());
    assert_eq!(loaded.model().config().learning, LearningConfig::default());
    assert_eq!(loaded.model().config().estimator, Estimator::StraightThrough);
    // The same run: without dropout it does not matter with which step its sequences began.
    let end = loaded.steps() + 2;
    let [mut loaded, mut trainer] = [loaded, trainer];
    train(&mut loaded, &mut loaded_progress.clone(), end);
    train(&mut trainer, &mut progress.clone(), end);
    assert_eq!(loaded.model(), trainer.model());
}

#[test]
fn codebooks_that_cannot_be_are_refused() {
    for config in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let model = trainer::<f32>(config.clone()).model().clone();
        model.save(folder.path()).unwrap();
        // The arrays of another kind of learning.
        for other in kinds().into_iter().filter(|other| other.learning != config.learning) {
            let edit = |text: &str| {
                let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
                let part = if json.get("model").is_some() { &mut json["model"] } else { &mut json };
                part["learning"] = serde_json::to_value(&other.learning).unwrap();
                json.to_string()
            };
            let broken = tempfile::tempdir().unwrap();
            let json = fs::read_to_string(folder.path().join(JSON)).unwrap();
            fs::write(broken.path().join(JSON), edit(&json)).unwrap();
            let bytes = fs::read(folder.path().join(TENSORS[0])).unwrap();
            let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            let mut information = metadata.metadata().clone().unwrap();
            information.insert("model".into(), edit(&information["model"]));
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
            let bytes = safetensors::serialize(tensors, Some(information)).unwrap();
            fs::write(broken.path().join(TENSORS[0]), bytes).unwrap();
            let error = Transformer::<f32>::load(broken.path()).unwrap_err();
            assert!(matches!(error, Error::File { .. }), "{error}");
        }
    }
}

fn training_comes_back<T: Scalar>() {
    training_of::<T>(&config());
}

fn training_of<T: Scalar>(config: &ModelConfig) {
    for steps in [0, 1, 3, 5] {
        let folder = tempfile::tempdir().unwrap();
        let (mut trainer, mut progress) = (trainer::<T>(config.clone()), progress());
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
    let theirs = format!(r#"{{"format_version": 9, "tensors": "{}"}}"#, TENSORS[0]);
    fs::write(folder.path().join(JSON), theirs).unwrap();
    fs::write(folder.path().join(TENSORS[0]), "theirs").unwrap();
    fs::remove_file(folder.path().join(TENSORS[1])).unwrap();
    trainer.save(folder.path(), &progress).unwrap();
    assert_eq!(names(folder.path()), [JSON, TENSORS[1]]);
    // What cannot be read may name any tensor file: none is touched.
    let before = fs::read(folder.path().join(TENSORS[1])).unwrap();
    fs::remove_file(folder.path().join(JSON)).unwrap();
    fs::create_dir(folder.path().join(JSON)).unwrap();
    let error = trainer.save(folder.path(), &progress).unwrap_err();
    assert!(matches!(error, Error::Io { action: "read", .. }), "{error}");
    assert_eq!(names(folder.path()), [JSON, TENSORS[1]]);
    assert_eq!(fs::read(folder.path().join(TENSORS[1])).unwrap(), before);
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
    let mut parameters = model.parameters_mut();
    parameters.iter_mut().find(|p| p.name == "layers.1.w_v").unwrap().value[[2, 3].as_ref()] = f32::NAN;
    drop(parameters);
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
        (
            Progress { schedule: Schedule { warmup: 2.0, ..Schedule::default() }, ..progress.clone() },
            "warmup",
        ),
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
