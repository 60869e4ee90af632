//! A run that is stopped anywhere, saved, loaded and continued is the run that was never stopped, bit for bit; and a step
//! that cannot be taken leaves everything as it was.

use crate::layouts::DROPOUT;
use crate::runs::{STEPS, bits, config, progress, train, trainer, trainer_with};
use transformer_vq::attention::VqAttention;
use transformer_vq::model::{CodebookStart, ModelConfig, Revival, Transformer};
use transformer_vq::train::{Adafactor, AdamW, Batch, Lion, ParameterGroup, Trainer};
use transformer_vq::{Error, Scalar};

fn stopped_after_any_step<T: Scalar>(config: &ModelConfig) {
    stopped(|| trainer::<T>(config.clone()), 0..=STEPS);
}

fn stopped<T: Scalar>(begin: impl Fn() -> Trainer<T>, stops: impl IntoIterator<Item = u64>) {
    let (mut whole, mut end) = (begin(), progress());
    let reports = train(&mut whole, &mut end, STEPS);
    let expected = bits(&whole, &end);
    for stop in stops {
        let folder = tempfile::tempdir().unwrap();
        let (mut first, mut until) = (begin(), progress());
        train(&mut first, &mut until, stop);
        first.save(folder.path(), &until).unwrap();
        drop(first);
        let (mut second, mut from) = Trainer::<T>::load(folder.path()).unwrap();
        assert_eq!((second.steps(), &from), (stop, &until));
        assert_eq!((second.groups(), second.micro_batches()), (begin().groups(), begin().micro_batches()));
        assert_eq!(train(&mut second, &mut from, STEPS), reports[stop as usize..], "after {stop}");
        assert!(bits(&second, &from) == expected, "after {stop}");
    }
}

#[test]
fn a_run_stopped_after_any_step_ends_in_the_same_bits() {
    stopped_after_any_step::<f32>(&config());
    stopped_after_any_step::<f64>(&config());
    let revival = Some(Revival { ratio: 0.5, every: 2 });
    let start = CodebookStart::KMeans { steps: 3 };
    stopped_after_any_step::<f32>(&ModelConfig { start, revival, ..config() });
    for window in [0, 1, 30] {
        let attention = VqAttention { window, ..config().attention };
        let tied_embedding = window == 1;
        let config = ModelConfig { attention, tied_embedding, absolute_positions: false, ..config() };
        stopped_after_any_step::<f32>(&config);
    }
}

#[test]
fn a_run_of_any_optimizer_that_is_stopped_ends_in_the_same_bits() {
    let stops = [0, 1, 5, 12];
    stopped(|| trainer_with::<f32>(config(), Lion { clip: Some(0.1 + 0.2), ..Lion::default() }), stops);
    stopped(|| trainer_with::<f32>(config(), Adafactor::default()), stops);
    stopped(|| trainer_with::<f64>(config(), Adafactor { relative: None, ..Adafactor::default() }), stops);
    let groups = || {
        let frozen = ParameterGroup { frozen: true, ..ParameterGroup::new("layers.1.*") };
        let slow = ParameterGroup { learning_rate: 1.0 / 3.0, ..ParameterGroup::new("*.w_*") };
        vec![frozen, ParameterGroup { weight_decay: Some(0.1 + 0.2), ..slow }]
    };
    stopped(|| trainer::<f32>(config()).with_groups(groups()).unwrap().with_micro_batches(2).unwrap(), stops);
    stopped(|| trainer_with::<f32>(config(), Lion::default()).with_groups(groups()).unwrap(), stops);
}

/// Masks of a seed of their own, drawn for micro-batches.
fn dropping<T: Scalar>(seed: u64) -> Trainer<T> {
    let config = ModelConfig { dropout: DROPOUT, ..config() };
    trainer::<T>(config).with_dropout_seed(seed).with_micro_batches(2).unwrap()
}

#[test]
fn a_run_with_dropout_that_is_stopped_ends_in_the_same_bits() {
    stopped(|| dropping::<f32>(7), [0, 1, 2, 4, 12]);
    stopped(|| dropping::<f64>(u64::MAX), [4]);
}

/// Or the test above could not tell that a seed has been forgotten.
#[test]
fn another_seed_of_dropout_is_another_run() {
    let losses =
        |seed| Vec::from_iter(train(&mut dropping::<f32>(seed), &mut progress(), 3).iter().map(|r| r.loss));
    assert_eq!(losses(7), losses(7));
    assert!(losses(7).iter().zip(losses(0)).all(|(a, b)| *a != b));
}

#[test]
fn a_run_saved_at_every_step_is_the_run_that_never_was() {
    let folder = tempfile::tempdir().unwrap();
    let (mut whole, mut end) = (trainer::<f32>(config()), progress());
    train(&mut whole, &mut end, STEPS);
    trainer::<f32>(config()).save(folder.path(), &progress()).unwrap();
    for step in 1..=STEPS {
        let (mut trainer, mut progress) = Trainer::<f32>::load(folder.path()).unwrap();
        train(&mut trainer, &mut progress, step);
        trainer.save(folder.path(), &progress).unwrap();
    }
    let (trainer, progress) = Trainer::<f32>::load(folder.path()).unwrap();
    assert!(bits(&trainer, &progress) == bits(&whole, &end));
}

/// A model after a few steps, and the batch that comes next, in the middle of a sequence.
fn begun() -> (Trainer<f32>, Batch) {
    let (mut trainer, mut progress) = (trainer(config()), progress());
    train(&mut trainer, &mut progress, 4);
    let batch = crate::runs::batches(&progress).next_batch().unwrap();
    assert!(!batch.first);
    (trainer, batch)
}

/// Compares two models by their bits: a NaN equals itself.
fn same_bits(a: &Transformer<f32>, b: &Transformer<f32>) -> bool {
    let numbers = |model: &Transformer<f32>| {
        let numbers =
            model.parameters().views().into_iter().flat_map(|p| p.value.iter().copied().collect::<Vec<_>>());
        numbers.map(f32::to_bits).collect::<Vec<_>>()
    };
    numbers(a) == numbers(b) && a.codebooks() == b.codebooks()
}

#[test]
fn a_poisoned_parameter_is_a_divergence_that_changes_nothing() {
    let (trained, batch) = begun();
    let n_arrays = trained.model().parameters().views().len();
    let mut diverged = 0;
    for (array, poison) in
        (0..n_arrays).flat_map(|i| [f32::NAN, f32::INFINITY, f32::MAX, -1e25].map(|x| (i, x)))
    {
        let mut model = trained.model().clone();
        let (mut views, mut name) = (model.parameters_mut(), String::new());
        for p in &mut views[array..=array] {
            name.clone_from(&p.name);
            p.value.fill(poison);
        }
        let mut trainer = Trainer::new(model.clone(), *trained.optimizer()).unwrap();
        match trainer.step(&batch, 1.0) {
            Err(Error::Diverged { step: 0, checkpoint: None, .. }) => {
                diverged += 1;
                assert!(same_bits(trainer.model(), &model), "{poison} in {name}");
                assert_eq!(trainer.steps(), 0);
            }
            // A large number is no error where a norm takes it back.
            Ok(report) => {
                assert!(poison.is_finite(), "{poison} in {name}");
                assert!(report.loss.is_finite() && report.gradient_norm.is_finite(), "{poison} in {name}");
            }
            Err(other) => panic!("{poison} in {name}: {other}"),
        }
    }
    assert!(diverged >= 2 * n_arrays, "{diverged} of {}", 4 * n_arrays);
}

#[test]
fn a_run_that_diverges_names_its_last_checkpoint_and_can_be_saved_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, batch) = begun();
    // One step far too long: the loss before it is sound, the loss after it is not.
    trainer.step(&batch, 1e37).unwrap();
    trainer.save(folder.path(), &progress()).unwrap();
    let before = bits(&trainer, &progress());
    let error = trainer.step(&batch, 1.0).unwrap_err();
    assert!(
        matches!(&error, Error::Diverged { step: 5, checkpoint: Some(path), .. } if path == folder.path()),
        "{error}"
    );
    let message = error.to_string();
    assert!(message.contains("at step 5") && message.contains(folder.path().to_str().unwrap()), "{message}");
    assert!(bits(&trainer, &progress()) == before);
    let (mut loaded, _) = Trainer::<f32>::load(folder.path()).unwrap();
    assert_eq!(loaded.step(&batch, 1.0).unwrap_err().to_string(), message, "also known after loading");
}

#[test]
fn a_step_that_is_refused_changes_nothing() {
    let (mut trainer, batch) = begun();
    let before = bits(&trainer, &progress());
    let mut beyond = batch.clone();
    beyond.tokens[[1, 3]] = 12;
    let mut beyond_targets = batch.clone();
    beyond_targets.targets[[0, 0]] = u32::MAX;
    let mut short = batch.clone();
    short.targets = short.targets.slice(transformer_vq::ndarray::s![.., 1..]).to_owned();
    let empty = Batch { tokens: Default::default(), targets: Default::default(), first: true };
    let mut narrow = batch.clone();
    narrow.tokens = narrow.tokens.slice(transformer_vq::ndarray::s![..1, ..]).to_owned();
    narrow.targets = narrow.targets.slice(transformer_vq::ndarray::s![..1, ..]).to_owned();
    let refused = [
        (&batch, f64::NAN, "`factor`"),
        (&batch, f64::INFINITY, "`factor`"),
        (&beyond, 1.0, "`tokens` holds 12 at index [1, 3]"),
        (&beyond_targets, 1.0, "`targets` holds 4294967295 at index [0, 0]"),
        (&short, 1.0, "`targets` has shape [2, 6], expected [2, 7]"),
        (&empty, 1.0, "`batch` is empty"),
        (&narrow, 1.0, "`state`"),
    ];
    for (batch, factor, words) in refused {
        let message = trainer.step(batch, factor).unwrap_err().to_string();
        assert!(message.contains(words), "{words}: {message}");
        assert!(bits(&trainer, &progress()) == before, "{words}");
    }
    assert!(Trainer::new(trainer.into_model(), AdamW { beta1: 1.0, ..AdamW::default() }).is_err());
}
