//! What a trainer is told beside its batches: the optimizer, groups of parameters, a hook on gradients.

use crate::runs::{batches, bits, config, progress, train, trainer, trainer_with};
use safetensors::SafeTensors;
use transformer_vq::model::{LearningConfig, ModelConfig, Transformer};
use transformer_vq::ndarray::ArrayD;
use transformer_vq::train::{
    Adafactor, AdamW, Batch, Budget, Decay, Lion, Optimizer, ParameterGroup, Progress, Schedule, Trainer,
};
use transformer_vq::{Error, Scalar};

fn optimizers() -> [Optimizer; 3] {
    [AdamW::default().into(), Lion::default().into(), Adafactor::default().into()]
}

/// The arrays of a model by name.
fn arrays<T: Scalar>(model: &Transformer<T>) -> Vec<(String, ArrayD<T>)> {
    model.parameters().views().into_iter().map(|p| (p.name, p.value.to_owned())).collect()
}

fn first_batch() -> Batch {
    batches(&progress()).next_batch().unwrap()
}

#[test]
fn every_optimizer_lowers_the_loss_with_its_own_rate() {
    let config = ModelConfig { d_model: 32, d_v: 32, d_k: 8, n_layers: 2, ..config() };
    let [adamw, lion, adafactor] = optimizers();
    let pairs = [
        (adamw, Decay::Cosine),
        (lion, Decay::Linear),
        (adafactor, Decay::InverseSquareRoot),
        (adamw, Decay::Constant),
    ];
    for (optimizer, decay) in pairs {
        let mut trainer = trainer_with::<f32>(config.clone(), optimizer);
        let mut progress = progress();
        progress.schedule = Schedule { warmup: 0.1, alpha: 0.1, decay };
        progress.budget = Budget::Steps(150);
        progress.batches.batch_size = 4;
        let losses: Vec<f64> = train(&mut trainer, &mut progress, 150).iter().map(|r| r.loss).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..5]), mean(&losses[145..]));
        println!("{optimizer:?} {decay:?}: {first:.3} -> {last:.3}");
        assert!(last < 0.85 * first, "{optimizer:?} {decay:?}: {first} -> {last}");
    }
}

#[test]
fn an_optimizer_is_the_default_of_none() {
    assert_eq!(Optimizer::default(), AdamW::default().into());
    for optimizer in optimizers() {
        let json = serde_json::to_string(&optimizer).unwrap();
        assert_eq!(serde_json::from_str::<Optimizer>(&json).unwrap(), optimizer);
        assert!(optimizer.learning_rate() > 0.0 && optimizer.weight_decay() > 0.0);
    }
}

/// Moments of a trainer by the name of their tensor, from its checkpoint.
fn moments(trainer: &Trainer<f32>, progress: &Progress) -> Vec<(String, Vec<f32>)> {
    let [_, tensors] = bits(trainer, progress);
    let tensors = SafeTensors::deserialize(&tensors).unwrap();
    let moments = tensors.tensors().into_iter().filter(|(name, _)| {
        ["adamw.", "lion.", "adafactor."].iter().any(|optimizer| name.starts_with(optimizer))
    });
    let numbers = |bytes: &[u8]| bytes.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    moments.map(|(name, tensor)| (name, numbers(tensor.data()))).collect()
}

#[test]
fn frozen_parameters_and_their_moments_keep_their_bits() {
    let frozen = |pattern: &str| ParameterGroup { frozen: true, ..ParameterGroup::new(pattern) };
    for optimizer in optimizers() {
        let mut plain = trainer_with::<f32>(config(), optimizer);
        let groups = vec![frozen("layers.1.*"), frozen("*.gain"), frozen("embedding")];
        let is_frozen = |name: &str| groups.iter().any(|group| group.matches(name));
        let mut partly = plain.clone().with_groups(groups.clone()).unwrap();
        let before = arrays(plain.model());
        // The factor of the first step is 0.
        let (mut progress_of_plain, mut progress) = (progress(), progress());
        train(&mut plain, &mut progress_of_plain, 5);
        train(&mut partly, &mut progress, 5);
        let (moved, kept) = (arrays(plain.model()), arrays(partly.model()));
        for (i, (name, value)) in before.iter().enumerate() {
            assert_ne!(value, &moved[i].1, "{name} moves");
            assert_eq!(*value == kept[i].1, is_frozen(name), "{name}");
        }
        let moments = moments(&partly, &progress);
        assert!(moments.len() >= before.len());
        for (name, numbers) in moments {
            let parameter = name.splitn(3, '.').nth(2).unwrap();
            assert_eq!(numbers.iter().all(|&x| x == 0.0), is_frozen(parameter), "{name}");
        }
        // All frozen: nothing is left of the gradient, and codebooks learn on.
        let mut still = trainer_with::<f32>(config(), optimizer).with_groups(vec![frozen("*")]).unwrap();
        let codebooks = still.model().codebooks();
        let report = still.step(&first_batch(), 1.0).unwrap();
        assert_eq!((arrays(still.model()), report.gradient_norm), (before, 0.0));
        assert_ne!(still.model().codebooks(), codebooks);
    }
}

#[test]
fn groups_have_their_own_rate_and_decay() {
    let batch = first_batch();
    for optimizer in optimizers() {
        let step = |rate: f64, groups: Vec<ParameterGroup>| {
            let mut trainer = trainer_with::<f32>(config(), optimizer).with_groups(groups).unwrap();
            trainer.step(&batch, rate).unwrap();
            arrays(trainer.model())
        };
        let (whole, half) = (step(1.0, vec![]), step(0.5, vec![]));
        let slow = ParameterGroup { learning_rate: 0.5, ..ParameterGroup::new("layers.*.w_*") };
        let grouped = step(1.0, vec![slow.clone(), ParameterGroup::new("*")]);
        for (i, (name, value)) in grouped.iter().enumerate() {
            let expected = if slow.matches(name) { &half[i].1 } else { &whole[i].1 };
            assert_eq!(value, expected, "{name}");
        }
        // The first match wins.
        assert_eq!(step(1.0, vec![ParameterGroup::new("*"), slow]), whole);
        // Decay alone, of everything that is named.
        let decayed = ParameterGroup { weight_decay: Some(0.25), ..ParameterGroup::new("*.gain") };
        let without = ParameterGroup { weight_decay: Some(0.0), ..ParameterGroup::new("*.w_k") };
        let start = arrays(trainer_with::<f32>(config(), optimizer).model());
        let of_matrices = 1.0 - optimizer.weight_decay();
        for (i, (name, value)) in step(0.0, vec![decayed, without]).into_iter().enumerate() {
            let matrix =
                name.contains("w_") && !name.ends_with("w_k") || name == "embedding" || name == "output";
            let kept = if name.ends_with("gain") { 0.75 } else { [1.0, of_matrices][usize::from(matrix)] };
            let error = value.iter().zip(&start[i].1).map(|(x, old)| (x - kept as f32 * old).abs());
            assert!(error.fold(0.0, f32::max) < 1e-6, "{name}");
        }
    }
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let refused = |group: ParameterGroup, words: &str| {
        let error = trainer::<f32>(config()).with_groups(vec![group]).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    };
    // EMA codebooks are no parameters, and there are three units.
    for pattern in ["layers.3.*", "w_q", "*.codebook.*", ""] {
        refused(
            ParameterGroup::new(pattern),
            &format!(
                "`pattern` must be the name of a parameter, such as \
            layers.0.w_q, with * for any part of it, got `{pattern}`"
            ),
        );
    }
    let base = || ParameterGroup::new("*");
    refused(
        ParameterGroup { learning_rate: f64::NAN, ..base() },
        "`learning_rate of a group` must be finite",
    );
    refused(
        ParameterGroup { weight_decay: Some(1.0), ..base() },
        "`weight_decay of a group` must be in [0, 1)",
    );
    let gradient = serde_json::json!({"gradient": {"codebook_weight": 1e-3, "from_attention": false}});
    let learning: LearningConfig = serde_json::from_value(gradient).unwrap();
    let learned = trainer::<f32>(ModelConfig { learning, ..config() });
    assert!(learned.with_groups(vec![ParameterGroup::new("*.codebook.*")]).is_ok());
}

#[test]
fn a_hook_sees_and_changes_every_gradient_before_the_clip() {
    let batch = first_batch();
    let optimizer = AdamW { weight_decay: 0.0, clip: Some(1e-3), ..AdamW::default() };
    let begin = || trainer_with::<f32>(config(), optimizer);
    let mut plain = begin();
    let report = plain.step(&batch, 1.0).unwrap();
    assert!(report.gradient_norm > 1e-3, "clipped");

    // It sees names in their order and leaves them as they are.
    let mut hooked = begin();
    let (mut names, mut squares) = (vec![], 0.0);
    let seen = hooked.step_with(&batch, 1.0, |name, gradient| {
        names.push(name.to_string());
        squares += gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    });
    assert_eq!(seen.as_ref(), Ok(&report));
    assert!(bits(&hooked, &progress()) == bits(&plain, &progress()));
    assert!(names.iter().eq(plain.model().parameters().views().iter().map(|p| &p.name)));
    assert!((squares.sqrt() / report.gradient_norm - 1.0).abs() < 1e-12, "not clipped yet");

    // Scaling alone is undone by the clip: powers of two, so to the last bits.
    let mut scaled = begin();
    let longer = scaled.step_with(&batch, 1.0, |_, mut gradient| gradient *= 1024.0).unwrap();
    assert_eq!(longer.gradient_norm, 1024.0 * report.gradient_norm);
    for ((name, a), (_, b)) in arrays(scaled.model()).iter().zip(&arrays(plain.model())) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }

    // Only what keeps a gradient moves; frozen parameters are not seen.
    let frozen = ParameterGroup { frozen: true, ..ParameterGroup::new("output*") };
    let mut one = begin().with_groups(vec![frozen]).unwrap();
    let before = arrays(one.model());
    one.step_with(&batch, 1.0, |name, mut gradient| {
        assert!(!name.starts_with("output"), "{name}");
        if name != "layers.1.w_v" {
            gradient.fill(0.0);
        }
    })
    .unwrap();
    for ((name, before), (_, after)) in before.iter().zip(&arrays(one.model())) {
        assert_eq!(before == after, name != "layers.1.w_v", "{name}");
    }
}

#[test]
fn what_a_hook_leaves_must_be_finite() {
    let (mut trainer, mut progress) = (trainer::<f32>(config()), progress());
    train(&mut trainer, &mut progress, 4);
    let batch = batches(&progress).next_batch().unwrap();
    let before = bits(&trainer, &progress);
    for poison in [f32::NAN, f32::INFINITY] {
        let error = trainer.step_with(&batch, 1.0, |name, mut gradient| {
            if name == "output_bias" {
                gradient[[0].as_ref()] = poison;
            }
        });
        assert!(matches!(error, Err(Error::Diverged { step: 4, .. })), "{error:?}");
        assert!(bits(&trainer, &progress) == before);
    }
    trainer.step(&batch, 1.0).unwrap();
}
