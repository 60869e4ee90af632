//! Steps of training: they lower the loss, with every optimizer and either head, and refuse what is not finite.

use ndarray::{Array2, Axis};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::BidirectionalAttention;
use transformer_vq::model::{Encoder, EncoderBatch, EncoderConfig, EncoderHead};
use transformer_vq::train::{Adafactor, AdamW, EncoderTrainer, Lion, Optimizer};

use super::{Arrays, bits, encoder, small};

/// The token behind which another is hidden.
const MASK: u32 = 4;
const LEN: usize = 12;

/// Sequences of one token over and over, in which some are hidden: nothing but the others can say which.
fn hidden(rng: &mut ChaCha8Rng) -> Arrays {
    let of_sequence: Vec<u32> = (0..8).map(|_| rng.random_range(0..MASK)).collect();
    let targets = Array2::from_shape_fn((8, LEN), |(b, _)| of_sequence[b]);
    let counted = Array2::from_shape_simple_fn((8, LEN), || rng.random_range(0..4) == 0);
    let exists = Array2::from_shape_fn((8, LEN), |(b, t)| t < LEN - b % 4);
    let counted = counted & &exists;
    let tokens = Array2::from_shape_fn((8, LEN), |at| if counted[at] { MASK } else { targets[at] });
    Arrays { tokens, exists: Some(exists), targets, counted: Some(counted) }
}

/// Random tokens below 4; the class is whether 0 or 1 comes more often.
fn classes(rng: &mut ChaCha8Rng) -> Arrays {
    let tokens = Array2::from_shape_simple_fn((16, LEN), || rng.random_range(0..4));
    let class = tokens.map_axis(Axis(1), |tokens| {
        let count = |token| tokens.iter().filter(|&&t| t == token).count();
        u32::from(count(1) > count(0))
    });
    Arrays { tokens, exists: None, targets: class.insert_axis(Axis(1)), counted: None }
}

fn config(head: EncoderHead) -> EncoderConfig {
    EncoderConfig {
        vocab_size: 5,
        d_model: 16,
        d_k: 8,
        d_v: 8,
        n_codes: 8,
        head,
        attention: BidirectionalAttention { key_gradient: true },
        ..small()
    }
}

fn losses(head: EncoderHead, optimizer: Optimizer, arrays: fn(&mut ChaCha8Rng) -> Arrays) -> [f64; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut trainer = EncoderTrainer::new(Encoder::new(config(head), 1).unwrap(), optimizer).unwrap();
    let losses: Vec<f64> =
        (0..200).map(|_| trainer.step(&arrays(&mut rng).batch(), 1.0).unwrap().loss).collect();
    assert_eq!(trainer.steps(), 200);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let ends = [mean(&losses[..5]), mean(&losses[180..])];
    println!("{head:?} {}: {ends:?}", optimizer.learning_rate());
    ends
}

#[test]
fn it_learns_what_is_hidden_with_every_optimizer() {
    let optimizers: [Optimizer; 3] = [
        AdamW { learning_rate: 5e-3, clip: Some(1.0), ..AdamW::default() }.into(),
        Lion { learning_rate: 1e-3, ..Lion::default() }.into(),
        Adafactor { learning_rate: 2e-2, ..Adafactor::default() }.into(),
    ];
    for optimizer in optimizers {
        let [first, last] = losses(EncoderHead::MaskedToken, optimizer, hidden);
        assert!(last < 0.3 * first, "{optimizer:?}: {first} -> {last}");
    }
}

#[test]
fn it_learns_classes() {
    let optimizer = AdamW { learning_rate: 5e-3, clip: Some(1.0), ..AdamW::default() };
    let [first, last] = losses(EncoderHead::Classes { n_classes: 2 }, optimizer.into(), classes);
    assert!(last < 0.5 * first, "{first} -> {last}");
}

#[test]
fn a_step_moves_every_parameter_and_codebook_and_a_factor_of_zero_only_decays() {
    let (config, adamw) = (small(), AdamW::default());
    let (before, arrays) = (encoder(&config), Arrays::new(&config, true));
    let mut trainer = EncoderTrainer::new(before.clone(), adamw).unwrap();
    let report = trainer.step(&arrays.batch(), 1.0).unwrap();
    let result = before.loss_and_gradients(&arrays.batch()).unwrap();
    assert_eq!((report.step, report.loss, report.commit_loss), (1, result.loss, result.commit_loss));
    assert!(report.usage.iter().chain(&report.perplexity).all(|&x| x > 0.0));
    for (old, new) in before.parameters().views().into_iter().zip(trainer.encoder().parameters().views()) {
        assert_ne!(old.value, new.value, "{}", old.name);
    }
    let mut updated = before.clone();
    updated.update_codebooks(&Vec::from_iter(result.units.into_iter().map(|unit| unit.stats))).unwrap();
    assert_eq!(trainer.encoder().codebooks(), updated.codebooks());
    assert_ne!(updated.codebooks(), before.codebooks());

    let mut trainer = EncoderTrainer::new(before.clone(), adamw).unwrap();
    trainer.step(&arrays.batch(), 0.0).unwrap();
    for (old, new) in before.parameters().views().into_iter().zip(trainer.encoder().parameters().views()) {
        let matrix = old.name.contains("w_") || old.name == "embedding" || old.name == "output";
        assert_eq!(old.decay, matrix, "{}", old.name);
        let kept = if old.decay { 1.0 - adamw.weight_decay as f32 } else { 1.0 };
        let error = ndarray::Zip::from(&old.value)
            .and(&new.value)
            .fold(0f32, |worst, old, new| worst.max((kept * old - new).abs()));
        assert!(error < 1e-6, "{}", old.name);
    }
}

#[test]
fn what_is_not_finite_is_refused_and_changes_nothing() {
    let arrays = Arrays::new(&small(), true);
    let target = arrays.targets[[0, 0]] as usize;
    assert!(arrays.counted.as_ref().unwrap()[[0, 0]]);
    // A target without any probability: the loss is infinite, no gradient is. Elsewhere, attention or its gradient meets it.
    let cases = [
        ("output_bias", target..target + 1, f32::NEG_INFINITY),
        ("output_bias", 0..1, f32::NAN),
        ("output", 0..1, f32::INFINITY),
        ("layers.1.w_q", 0..24, f32::NAN),
        ("embedding", 0..42, f32::NAN),
    ];
    for (name, at, value) in cases {
        let mut encoder = encoder(&small());
        let parameter = encoder.parameters_mut().into_iter().find(|p| p.name == name);
        parameter.unwrap().value.as_slice_mut().unwrap()[at].fill(value);
        let mut trainer = EncoderTrainer::new(encoder, AdamW::default()).unwrap();
        let before = bits(trainer.encoder().parameters());
        let codebooks = trainer.encoder().codebooks().to_vec();
        let error = trainer.step(&arrays.batch(), 1.0).unwrap_err();
        assert!(matches!(error, Error::Diverged { step: 0, checkpoint: None, .. }), "{name}: {error}");
        assert!(bits(trainer.encoder().parameters()) == before);
        assert_eq!((trainer.encoder().codebooks(), trainer.steps()), (&codebooks[..], 0));
    }
    let mut trainer = EncoderTrainer::new(encoder(&small()), AdamW::default()).unwrap();
    let error = trainer.step(&arrays.batch(), f64::NAN).unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "factor", .. }));
    let batch = arrays.batch();
    let error = trainer.step(&EncoderBatch { exists: None, targets: batch.tokens.t(), ..batch }, 1.0);
    assert!(matches!(error, Err(Error::Shape { what: "targets", .. })));
    assert_eq!(*trainer.encoder(), encoder(&small()));
    let wrong = AdamW { beta1: 1.0, ..AdamW::default() };
    assert!(EncoderTrainer::new(encoder(&small()), wrong).is_err());
}
