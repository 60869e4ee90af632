//! Gradients of micro-batches, merged, are those of one batch of all their sequences; so are the steps taken with them.

use crate::runs::{batches, bits, config, progress, train, trainer};
use crate::worst::worst;
use transformer_vq::codebook::{Estimator, Rotation};
use transformer_vq::model::{
    CodebookStart, CodewordGradient, Dropout, LearningConfig, ModelConfig, Revival, Transformer,
};
use transformer_vq::ndarray::{Array2, ArrayD, ArrayViewD, s};
use transformer_vq::train::{Batch, Gradients, Progress, Trainer};
use transformer_vq::{Error, Scalar};

/// Six sequences side by side.
fn wide() -> Progress {
    let mut progress = progress();
    progress.batches.batch_size = 6;
    progress
}

/// Every kind of learning that has statistics or gradients of its own.
fn kinds() -> Vec<ModelConfig> {
    let gradient = CodewordGradient { codebook_weight: 0.3, from_attention: true };
    let linear = LearningConfig::Linear { d_basis: 3, learned_basis: true, bias: true, gradient };
    let revival = Some(Revival { ratio: 0.5, every: 2 });
    let base = ModelConfig { commit_weight: 0.2, ..config() };
    vec![
        base.clone(),
        ModelConfig { start: CodebookStart::KMeans { steps: 3 }, revival, ..base.clone() },
        ModelConfig {
            learning: LearningConfig::Gradient(gradient),
            estimator: Estimator::Rotation(Rotation::default()),
            ..base.clone()
        },
        ModelConfig { learning: linear, tied_embedding: true, ..base.clone() },
        ModelConfig { dropout: Dropout { embedding: 0.2, residual: 0.2, sinusoid: 0.2, layer: 0.3 }, ..base },
    ]
}

fn error<T: Scalar>(got: ArrayViewD<'_, T>, expected: ArrayViewD<'_, T>) -> (f64, f64) {
    let squares = |x: T, y: f64| (x.as_f64() - y).powi(2);
    let errors = got.iter().zip(&expected).map(|(&a, &b)| squares(a, b.as_f64())).sum::<f64>();
    (errors, expected.iter().map(|&b| squares(b, 0.0)).sum())
}

/// Relative RMS error of gradients, statistics and losses: of each array (f64), of each kind together (f32).
fn differ<T: Scalar>(got: &Gradients<T>, expected: &Gradients<T>, each: bool) -> f64 {
    assert_eq!((got.tokens, got.stats.len()), (expected.tokens, expected.stats.len()));
    let losses =
        [(got.loss, expected.loss), (got.commit_loss, expected.commit_loss), (got.total, expected.total)];
    let mut all = Vec::from_iter(losses.map(|(a, b)| (a / b - 1.0).abs()));
    let (got_views, views) = (got.parameters.views(), expected.parameters.views());
    let pairs: Vec<_> =
        got_views.iter().zip(&views).map(|(a, b)| error(a.value.view(), b.value.view())).collect();
    let (mut errors, mut sizes) = (0.0, 0.0);
    for ((e, size), p) in pairs.into_iter().zip(&views) {
        if each && size > 1e-20 {
            assert!((e / size).sqrt() < 1e-10, "{}: {e:e} of {size:e}", p.name);
            all.push((e / size).sqrt());
        }
        (errors, sizes) = (errors + e, sizes + size);
    }
    all.push((errors / sizes).sqrt());
    for (a, b) in got.stats.iter().zip(&expected.stats) {
        assert_eq!(a.counts(), b.counts());
        let (e, size) = error(a.sums().into_dyn(), b.sums().into_dyn());
        all.push((e / size).sqrt());
    }
    for (a, b) in got.keys.iter().zip(&expected.keys) {
        let (e, size) = error(a.view().into_dyn(), b.view().into_dyn());
        all.push((e / size).sqrt());
    }
    worst(all)
}

fn gradients_agree<T: Scalar>(bound: f64) {
    let mut errors = vec![];
    for config in kinds() {
        let mut begun = trainer::<T>(config);
        let mut progress = wide();
        // In the middle of a sequence: every micro-batch has a state of its own.
        train(&mut begun, &mut progress, 4);
        let batch = batches(&progress).next_batch().unwrap();
        assert!(!batch.first);
        let expected = begun.clone().gradients(&batch).unwrap();
        assert_eq!(expected.tokens, 42);
        for parts in [2, 3, 4, 6] {
            let mut parted = begun.clone().with_micro_batches(parts).unwrap();
            errors.push(differ(&parted.gradients(&batch).unwrap(), &expected, bound < 1e-10));
        }
    }
    let error = worst(errors);
    println!("worst error of gradients: {error:e}");
    assert!(error < bound, "{error:e}");
}

#[test]
fn micro_batches_have_the_gradients_of_the_whole() {
    gradients_agree::<f64>(1e-12);
    gradients_agree::<f32>(1e-6);
}

/// Everything that a trainer has learned: parameters and codewords.
fn learned<T: Scalar>(model: &Transformer<T>) -> Vec<ArrayD<T>> {
    let parameters = model.parameters().views().into_iter().map(|p| p.value.to_owned());
    let codewords = model.codebooks().into_iter().map(|codebook| codebook.codewords().to_owned().into_dyn());
    parameters.chain(codewords).collect()
}

fn runs_agree<T: Scalar>(steps: u64, bound: f64) {
    let mut all = vec![];
    for config in kinds() {
        let (mut whole, mut progress) = (trainer::<T>(config.clone()), wide());
        let expected = train(&mut whole, &mut progress, steps);
        for parts in [2, 6] {
            let (mut parted, mut progress) =
                (trainer::<T>(config.clone()).with_micro_batches(parts).unwrap(), wide());
            let reports = train(&mut parted, &mut progress, steps);
            for (a, b) in reports.iter().zip(&expected) {
                assert!((a.loss / b.loss - 1.0).abs() < bound && a.usage == b.usage, "{a:?}, not {b:?}");
                assert!((a.commit_loss / b.commit_loss - 1.0).abs() < bound, "{a:?}, not {b:?}");
            }
            let arrays = learned(parted.model()).into_iter().zip(learned(whole.model()));
            let (errors, sizes) = arrays
                .map(|(a, b)| error(a.view(), b.view()))
                .fold((0.0, 0.0), |(e, s), (error, size)| (e + error, s + size));
            all.push((errors / sizes).sqrt());
        }
    }
    let error = worst(all);
    println!("worst error of parameters and codewords: {error:e}");
    assert!(error < bound, "{error:e}");
}

#[test]
fn steps_of_micro_batches_are_steps_of_the_whole() {
    runs_agree::<f64>(8, 1e-12);
    runs_agree::<f32>(1, 1e-6);
}

#[test]
fn positions_that_count_decide_the_weights() {
    for config in kinds() {
        let model = trainer::<f64>(config).into_model();
        let batch = batches(&wide()).next_batch().unwrap();
        // Rows with many, few and no positions that count.
        let mask = Array2::from_shape_fn((6, 7), |(b, t)| match b {
            0 | 1 => true,
            2 | 3 => t == b,
            _ => false,
        });
        let rows = |from: usize, to: usize| {
            let mut state = model.new_state(to - from).unwrap();
            let (tokens, targets) =
                (batch.tokens.slice(s![from..to, ..]), batch.targets.slice(s![from..to, ..]));
            let mask = mask.slice(s![from..to, ..]);
            Gradients::collect(&model, tokens, targets, Some(mask), &mut state).unwrap()
        };
        let whole = rows(0, 6);
        assert_eq!(whole.tokens, 16);
        for cuts in [&[0, 2, 6][..], &[0, 1, 3, 4, 6], &[0, 4, 5, 6]] {
            let parts = || cuts.windows(2).map(|cut| rows(cut[0], cut[1]));
            let mut forwards = parts().next().unwrap();
            parts().skip(1).for_each(|part| forwards.merge(part).unwrap());
            assert!(differ(&forwards, &whole, true) < 1e-12);
            // The order of machines does not matter but to rounding; parts without a position come first here.
            let mut backwards: Vec<_> = parts().collect();
            let mut merged = backwards.pop().unwrap();
            backwards.into_iter().rev().for_each(|part| merged.merge(part).unwrap());
            merged.keys.clear();
            let mut expected = whole.clone();
            expected.keys.clear();
            assert!(differ(&merged, &expected, true) < 1e-12);
        }
    }
}

#[test]
fn machines_that_exchange_gradients_stay_the_same() {
    // Random starts: codebooks that begin at keys are started before they are handed out.
    let dropout = Dropout { embedding: 0.2, residual: 0.3, sinusoid: 0.2, layer: 0.2 };
    let config = ModelConfig { revival: Some(Revival { ratio: 0.5, every: 2 }), dropout, ..config() };
    let (mut whole, mut progress) = (trainer::<f64>(config.clone()), wide());
    let mut all = batches(&progress);
    let mut machines = [0, 4].map(|first| trainer::<f64>(config.clone()).with_first_sequence(first));
    for step in 0..6 {
        let (batch, factor) = (all.next_batch().unwrap(), progress.factor(step));
        let rows = |from: usize, to: usize| Batch {
            tokens: batch.tokens.slice(s![from..to, ..]).to_owned(),
            targets: batch.targets.slice(s![from..to, ..]).to_owned(),
            first: batch.first,
        };
        let mut merged = machines[0].gradients(&rows(0, 4)).unwrap();
        merged.merge(machines[1].gradients(&rows(4, 6)).unwrap()).unwrap();
        let report = whole.step(&batch, factor).unwrap();
        for machine in &mut machines {
            let got = machine.apply(merged.clone(), factor).unwrap();
            assert!((got.loss / report.loss - 1.0).abs() < 1e-12);
        }
        progress.position = all.position();
    }
    assert_eq!(machines[0].model(), machines[1].model());
    for (a, b) in learned(machines[0].model()).iter().zip(&learned(whole.model())) {
        let (errors, size) = error(a.view(), b.view());
        assert!((errors / size.max(1e-6)).sqrt() < 1e-11);
    }
}

#[test]
fn gradients_and_apply_are_a_step() {
    let (mut whole, mut parts) = (trainer::<f32>(config()), trainer::<f32>(config()));
    let mut all = batches(&progress());
    for _ in 0..5 {
        let batch = all.next_batch().unwrap();
        let before = bits(&parts, &progress());
        parts.gradients(&batch).unwrap();
        assert!(bits(&parts, &progress()) == before, "nothing is learned yet");
        let gradients = parts.gradients(&batch).unwrap();
        assert_eq!(parts.apply(gradients, 1.0), whole.step(&batch, 1.0));
        assert!(bits(&parts, &progress()) == bits(&whole, &progress()));
    }
}

#[test]
fn codebooks_that_begin_at_keys_do_so_after_a_refusal_too() {
    let start = CodebookStart::KMeans { steps: 3 };
    let config = ModelConfig { start, ..config() };
    let (mut trainer, mut whole) = (trainer::<f32>(config.clone()), trainer::<f32>(config));
    let batch = batches(&progress()).next_batch().unwrap();
    let gradients = trainer.gradients(&batch).unwrap();
    assert!(trainer.apply(gradients.clone(), f64::NAN).is_err());
    assert_eq!(trainer.apply(gradients, 1.0), whole.step(&batch, 1.0));
    assert!(bits(&trainer, &progress()) == bits(&whole, &progress()));
}

#[test]
fn what_does_not_fit_is_refused_and_loses_nothing() {
    let batch = batches(&progress()).next_batch().unwrap();
    let mut trainer = trainer::<f32>(config());
    let mine = trainer.gradients(&batch).unwrap();
    let others = [
        ModelConfig { d_v: 6, ..config() },
        ModelConfig { n_layers: 2, ..config() },
        ModelConfig { n_codes: 6, ..config() },
        ModelConfig { revival: Some(Revival { ratio: 0.5, every: 2 }), ..config() },
    ];
    for other in others {
        let mut other = crate::runs::trainer::<f32>(other);
        let theirs = other.gradients(&batch).unwrap();
        let mut merged = mine.clone();
        let refused = merged.merge(theirs.clone());
        assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
        assert_eq!(merged, mine);
    }
    let before = bits(&trainer, &progress());
    let theirs = |config| crate::runs::trainer::<f32>(config).gradients(&batch).unwrap();
    for config in [ModelConfig { d_v: 6, ..config() }, ModelConfig { n_codes: 6, ..config() }] {
        assert!(matches!(trainer.apply(theirs(config), 1.0), Err(Error::Shape { .. })));
    }
    let mut poisoned = mine.clone();
    poisoned.total = f64::NAN;
    assert!(matches!(trainer.apply(poisoned, 1.0), Err(Error::Diverged { .. })));
    assert!(matches!(trainer.apply(mine.clone(), f64::NAN), Err(Error::Invalid { what: "factor", .. })));
    assert!(bits(&trainer, &progress()) == before);
    // What was refused can be done again, and is then the whole step: the state that is carried on moves with it.
    let mut whole = crate::runs::trainer::<f32>(config());
    assert_eq!(trainer.apply(mine, 1.0), whole.step(&batch, 1.0));
    assert!(bits(&trainer, &progress()) == bits(&whole, &progress()));

    let refused = |error: Error| error.to_string();
    assert_eq!(
        refused(trainer.clone().with_micro_batches(0).unwrap_err()),
        "`micro_batches` must be at least 1, got 0"
    );
    let mut parted: Trainer = trainer.clone().with_micro_batches(3).unwrap();
    assert_eq!(
        refused(parted.step(&batch, 1.0).unwrap_err()),
        "`sequences of a batch` must be at least the 3 micro-batches, got 2"
    );
    let mut parted = trainer.with_micro_batches(2).unwrap();
    let before = bits(&parted, &progress());
    let mut beyond = batch.clone();
    beyond.tokens[[1, 3]] = 12;
    assert!(matches!(parted.step(&beyond, 1.0), Err(Error::OutOfRange { what: "tokens", .. })));
    let mut short = batch;
    short.targets = short.targets.slice(s![.., 1..]).to_owned();
    assert!(matches!(parted.step(&short, 1.0), Err(Error::Shape { what: "targets", .. })));
    assert!(bits(&parted, &progress()) == before);
}
