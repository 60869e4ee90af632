//! How a model's codebooks start from keys, and how training revives their idle codes.

use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{Codebook, Learning, Smoothing};
use transformer_vq::model::{
    CodebookStart, CodewordGradient, LearningConfig, ModelConfig, Revival, Transformer,
};
use transformer_vq::ndarray::{Array2, Array4, ArrayView1, Axis, s};
use transformer_vq::train::{AdamW, Batch, Gradients, Trainer};
use transformer_vq::{Error, Scalar};

fn config() -> ModelConfig {
    let attention = VqAttention { block_len: 8, window: 8, ..VqAttention::default() };
    let sizes = ModelConfig {
        vocab_size: 12,
        d_model: 6,
        n_layers: 2,
        n_heads: 2,
        d_k: 4,
        d_v: 5,
        ..Default::default()
    };
    ModelConfig { attention, n_codes: 7, codebook_decay: 0.5, ..sizes }
}

const EVERY_STEP: Revival = Revival { ratio: 0.5, every: 1 };

fn batch(seed: u32) -> Batch {
    let all = Array2::from_shape_fn((2, 33), |(b, t)| (t as u32 * t as u32 + 7 * b as u32 + seed) % 11);
    Batch {
        tokens: all.slice(s![.., ..32]).to_owned(),
        targets: all.slice(s![.., 1..]).to_owned(),
        first: true,
    }
}

/// The keys of every unit.
fn keys<T: Scalar>(model: &Transformer<T>, batch: &Batch) -> Vec<Array4<T>> {
    let mut state = model.new_state(2).unwrap();
    let (_, reports, _) = model.forward(batch.tokens.view(), None, &mut state).unwrap();
    reports.into_iter().map(|report| report.keys.expect("the configuration revives")).collect()
}

fn is_key<T: Scalar>(codeword: ArrayView1<'_, T>, keys: &Array4<T>, head: usize) -> bool {
    keys.index_axis(Axis(1), head).rows().into_iter().any(|key| key == codeword)
}

#[test]
fn codebooks_start_at_keys_unit_by_unit() {
    let config = ModelConfig { revival: Some(EVERY_STEP), n_layers: 3, ..config() };
    let mut model = Transformer::new(config, 1).unwrap();
    let batch = batch(0);
    // Without steps of Lloyd every codeword is a key: of the units behind as well, whose keys depend on the codewords before.
    model.start_codebooks(batch.tokens.view(), 0, 5).unwrap();
    let started = keys(&model, &batch);
    for (codebook, keys) in model.codebooks().iter().zip(&started) {
        for (head, codewords) in codebook.codewords().outer_iter().enumerate() {
            assert!(codewords.outer_iter().all(|codeword| is_key(codeword, keys, head)));
        }
    }
    let same = model.clone();
    model.start_codebooks(batch.tokens.view(), 0, 5).unwrap();
    assert_eq!(model, same, "the same seed gives the same codewords");
    model.start_codebooks(batch.tokens.view(), 0, 6).unwrap();
    assert_ne!(model, same);
}

#[test]
fn every_kind_that_can_starts_with_the_first_step() {
    let gradient = CodewordGradient { codebook_weight: 0.1, from_attention: false };
    let kinds = [
        LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } },
        LearningConfig::Gradient(gradient),
        LearningConfig::Frozen,
    ];
    for learning in kinds {
        let start = CodebookStart::KMeans { steps: 4 };
        let model = Transformer::new(ModelConfig { learning, start, ..config() }, 1).unwrap();
        let mut expected = model.clone();
        expected.start_codebooks(batch(0).tokens.view(), 4, 0).unwrap();
        assert_ne!(expected, model);
        for (before, after) in model.learning().iter().zip(expected.learning()) {
            if let (Learning::Ema(before), Learning::Ema(after)) = (before, after) {
                assert_eq!((before.smoothing(), before.decay()), (after.smoothing(), after.decay()));
            }
        }
        // A rate of 0: the optimizer moves nothing.
        let still = AdamW { learning_rate: 0.0, weight_decay: 0.0, ..AdamW::default() };
        let mut trainer = Trainer::new(model.clone(), still).unwrap();
        trainer.step(&batch(0), 1.0).unwrap();
        let stats = keys_stats(&expected);
        expected.update_codebooks(&stats).unwrap();
        assert_eq!(trainer.model(), &expected);
        // Only with the first.
        let before = trainer.model().clone();
        trainer.step(&batch(3), 1.0).unwrap();
        assert_eq!(trainer.model().parameters(), before.parameters());
    }
}

fn keys_stats(model: &Transformer) -> Vec<transformer_vq::codebook::CodeStats<f32>> {
    let mut state = model.new_state(2).unwrap();
    let (_, reports, _) = model.forward(batch(0).tokens.view(), None, &mut state).unwrap();
    reports.into_iter().map(|report| report.stats).collect()
}

#[test]
fn a_basis_times_a_matrix_cannot_be_written() {
    let gradient = CodewordGradient { codebook_weight: 0.1, from_attention: false };
    let learning = LearningConfig::Linear { d_basis: 3, learned_basis: true, bias: true, gradient };
    let mut model = Transformer::new(ModelConfig { learning, ..config() }, 1).unwrap();
    let before = model.clone();
    let refused = model.start_codebooks(batch(0).tokens.view(), 2, 0);
    assert!(matches!(refused, Err(Error::Invalid { what: "codebooks", .. })), "{refused:?}");
    assert_eq!(model, before);
}

#[test]
fn codes_revive_at_keys_that_count_alone() {
    let model = Transformer::<f32>::new(ModelConfig { revival: Some(EVERY_STEP), ..config() }, 2).unwrap();
    let (batch, state) = (batch(0), || model.new_state(1).unwrap());
    // The first sequence counts, half of the second and none of the third.
    let len = batch.tokens.ncols();
    let row = |b: usize| (batch.tokens.slice(s![b..=b, ..]), batch.targets.slice(s![b..=b, ..]));
    let collect = |b: usize, until: usize| {
        let mask = (until < len).then(|| Array2::from_shape_fn((1, len), |(_, t)| t < until));
        let mask = mask.as_ref().map(|mask| mask.view());
        Gradients::collect(&model, row(b).0, row(b).1, mask, &mut state()).unwrap()
    };
    let mut gradients = collect(0, len);
    assert_eq!(gradients.counts, None);
    gradients.merge(collect(1, len / 2)).unwrap();
    gradients.merge(collect(1, 0)).unwrap();
    let counts = gradients.counts.clone().unwrap();
    assert_eq!(counts, Array2::from_shape_fn((3, len), |(b, t)| t < [len, len / 2, 0][b]));

    // Those that do not belong to the keys, or to no keys at all, are told.
    for n_keys in [0, gradients.keys.len()] {
        let mut wrong = collect(0, len);
        wrong.counts = Some(Array2::from_elem((1, len + 1), true));
        let mut merged = gradients.clone();
        for gradients in [&mut wrong, &mut merged] {
            gradients.keys.truncate(n_keys);
        }
        let before = merged.clone();
        assert!(matches!(merged.merge(wrong), Err(Error::Shape { what: "counts", .. })));
        assert_eq!(merged, before);
    }

    let keys = gradients.keys.clone();
    let mut trainer = Trainer::new(model.clone(), AdamW::default()).unwrap();
    trainer.apply(gradients.clone(), 1.0).unwrap();
    let mut expected = model.clone();
    expected.update_codebooks(&gradients.stats).unwrap();
    let mut expected = expected.codebooks();
    for (i, (codebook, keys)) in expected.iter_mut().zip(&keys).enumerate() {
        let seen = codebook.clone();
        codebook.revive(keys.view(), Some(counts.view()), EVERY_STEP.ratio, i as u64).unwrap();
        assert_ne!(*codebook, seen, "no code was idle");
    }
    assert_eq!(trainer.model().codebooks(), expected);
}

#[test]
fn training_revives_as_a_codebook_does_on_its_own() {
    let with = |revival| Transformer::new(ModelConfig { revival, ..config() }, 2).unwrap();
    let mut plain = Trainer::new(with(None), AdamW::default()).unwrap();
    let every = Revival { every: 3, ..EVERY_STEP };
    let mut revived = Trainer::new(with(Some(every)), AdamW::default()).unwrap();
    for step in 0..3 {
        let keys = keys(revived.model(), &batch(step));
        let (a, b) = (plain.step(&batch(step), 1.0).unwrap(), revived.step(&batch(step), 1.0).unwrap());
        assert_eq!(a, b);
        let mut expected = plain.model().codebooks();
        if step == 2 {
            let revive = |(i, codebook): (usize, &mut Codebook<f32>)| {
                let seed = (2 * config().n_layers + i) as u64;
                codebook.revive(keys[i].view(), None, every.ratio, seed).unwrap()
            };
            let n_revived: usize = expected.iter_mut().enumerate().map(revive).sum();
            assert!(n_revived > 0, "no code was idle");
        }
        assert_eq!(revived.model().codebooks(), expected, "step {step}");
    }
    assert_eq!(revived.model().parameters(), plain.model().parameters());
}
