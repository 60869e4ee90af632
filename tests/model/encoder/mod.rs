//! The encoder: its gradients, padding, files, what it refuses, and that it learns.

use ndarray::{Array2, ArrayD, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::BidirectionalAttention;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{Estimator, Rotation};
use transformer_vq::model::{
    Encoder, EncoderBatch, EncoderConfig, EncoderHead, EncoderLoss, EncoderParameters, FeedForward,
    FeedForwardKind,
};
use transformer_vq::{Error, Scalar};

mod files;
mod naive;
mod training;

use naive::Naive;

const B: usize = 3;
const T: usize = 8;
const CLASSES: EncoderHead = EncoderHead::Classes { n_classes: 3 };

fn small() -> EncoderConfig {
    EncoderConfig {
        vocab_size: 7,
        d_model: 6,
        n_layers: 2,
        n_heads: 2,
        d_k: 4,
        d_v: 3,
        n_codes: 4,
        commit_weight: 0.3,
        position_lambda: 50.0,
        attention: BidirectionalAttention { key_gradient: false },
        ..EncoderConfig::default()
    }
}

/// Every option at least once.
fn configs() -> [EncoderConfig; 7] {
    let keys_share = BidirectionalAttention { key_gradient: true };
    let feed_forward = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 5 });
    [
        small(),
        EncoderConfig { attention: keys_share, ..small() },
        EncoderConfig { head: CLASSES, ..small() },
        EncoderConfig { head: CLASSES, attention: keys_share, n_key_heads: Some(1), ..small() },
        EncoderConfig { gate: false, feed_forward, attention: keys_share, ..small() },
        EncoderConfig { attention: keys_share, estimator: Estimator::Directional, n_layers: 3, ..small() },
        EncoderConfig {
            attention: keys_share,
            estimator: Estimator::Rotation(Rotation::default()),
            feed_forward: Some(FeedForward { kind: FeedForwardKind::Gelu, width: 5 }),
            ..small()
        },
    ]
}

/// An encoder whose biases have left zero, where mistakes hide.
fn encoder(config: &EncoderConfig) -> Encoder {
    let mut encoder = Encoder::new(config.clone(), 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for mut parameter in encoder.parameters_mut() {
        parameter.value.mapv_inplace(|x| x + rng.random_range(-0.2..0.2));
    }
    encoder
}

/// Arrays of a batch.
#[derive(Clone)]
struct Arrays {
    tokens: Array2<u32>,
    exists: Option<Array2<bool>>,
    targets: Array2<u32>,
    counted: Option<Array2<bool>>,
}

impl Arrays {
    /// The first sequence with holes, the second shorter, the third whole; about half of the targets count.
    fn new(config: &EncoderConfig, padded: bool) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let mut random =
            |dim, below: usize| Array2::from_shape_simple_fn(dim, || rng.random_range(0..below as u32));
        let exists = padded.then(|| Array2::from_shape_fn((B, T), |(b, t)| [t % 4 != 1, t < 5, true][b]));
        let targets = if config.head == EncoderHead::MaskedToken { (B, T) } else { (B, 1) };
        let counted = padded.then(|| {
            let exists = exists.as_ref().unwrap();
            Array2::from_shape_fn(targets, |(b, t)| (b + t) % 2 == 0 && exists[[b, t]])
        });
        Arrays {
            tokens: random((B, T), config.vocab_size),
            exists,
            targets: random(targets, config.n_outputs()),
            counted,
        }
    }

    fn batch(&self) -> EncoderBatch<'_> {
        EncoderBatch {
            tokens: self.tokens.view(),
            exists: self.exists.as_ref().map(|exists| exists.view()),
            targets: self.targets.view(),
            counted: self.counted.as_ref().map(|counted| counted.view()),
        }
    }
}

fn bits<T: Scalar>(parameters: &EncoderParameters<T>) -> Vec<u64> {
    let bits = |value: ndarray::ArrayViewD<'_, T>| Vec::from_iter(value.iter().map(|x| x.as_f64().to_bits()));
    parameters.views().into_iter().flat_map(|p| bits(p.value)).collect()
}

#[test]
fn every_gradient_agrees_with_finite_differences() {
    for (n, config) in configs().into_iter().enumerate() {
        for padded in [false, true] {
            let (encoder, arrays) = (encoder(&config).cast::<f64>(), Arrays::new(&config, padded));
            let batch = arrays.batch();
            let naive = Naive::new(&encoder, &batch);
            let got = encoder.loss_and_gradients(&batch).unwrap();
            let expected = naive.run(encoder.parameters());
            assert!((got.total / expected.total - 1.0).abs() < 1e-13);
            let mut worst: (f64, String) = (0.0, String::new());
            for (i, gradient) in got.gradients.views().into_iter().enumerate() {
                let mut moved = encoder.parameters().clone();
                let at = encoder.parameters().views()[i].value.to_owned();
                let total = |x: ndarray::ArrayViewD<'_, f64>| {
                    moved.views_mut()[i].value.assign(&x);
                    naive.run(&moved).total
                };
                let expected = finite_difference(total, &at, 3e-4);
                let gradient_value: ArrayD<f64> = gradient.value.to_owned();
                let error = relative_rms(&gradient_value, &expected);
                if error > worst.0 {
                    worst = (error, gradient.name);
                }
            }
            println!("configuration {n}, padded {padded}: {:.1e} at {}", worst.0, worst.1);
            assert!(worst.0 <= 1e-8, "configuration {n}, padded {padded}: {:e} at {}", worst.0, worst.1);
        }
    }
}

#[test]
fn logits_are_those_of_the_definition() {
    for config in configs() {
        let (encoder, arrays) = (encoder(&config).cast::<f64>(), Arrays::new(&config, true));
        let batch = arrays.batch();
        let got = encoder.forward(batch.tokens, batch.exists).unwrap();
        let expected = Naive::new(&encoder, &batch).run(encoder.parameters()).logits;
        let got = got.to_shape(expected.raw_dim()).unwrap().to_owned();
        assert!(relative_rms(&got, &expected) < 1e-13);
        let stream = encoder.encode(batch.tokens, batch.exists).unwrap();
        assert_eq!(stream.dim(), (B, T, config.d_model));
    }
}

#[test]
fn padding_influences_nothing() {
    for config in configs() {
        let (encoder, arrays) = (encoder(&config), Arrays::new(&config, true));
        let exists = arrays.exists.clone().unwrap();
        let mut changed = arrays.clone();
        changed.tokens.zip_mut_with(&exists, |token, &exists| {
            *token = if exists { *token } else { u32::MAX };
        });
        let logits = |arrays: &Arrays| {
            let mut logits = encoder.forward(arrays.tokens.view(), Some(exists.view())).unwrap();
            if config.head == EncoderHead::MaskedToken {
                for ((b, t), _) in exists.indexed_iter().filter(|&(_, &exists)| !exists) {
                    logits.slice_mut(s![b, t, ..]).fill(0.0);
                }
            }
            logits.mapv(f32::to_bits)
        };
        assert_eq!(logits(&arrays), logits(&changed));
        let run = |arrays: &Arrays| {
            let EncoderLoss { loss, commit_loss, total, gradients, units } =
                encoder.loss_and_gradients(&arrays.batch()).unwrap();
            ([loss, commit_loss, total].map(f64::to_bits), bits(&gradients), units)
        };
        assert!(run(&arrays) == run(&changed));
    }
}

/// A sequence alone and without its padding says what it says among others, behind which there is padding.
#[test]
fn sequences_do_not_meet_and_their_ends_do_not_matter() {
    for config in configs() {
        let encoder = encoder(&config).cast::<f64>();
        let arrays = Arrays::new(&config, false);
        let lengths = [3, T, 5];
        let exists = Array2::from_shape_fn((B, T), |(b, t)| t < lengths[b]);
        let together = encoder.forward(arrays.tokens.view(), Some(exists.view())).unwrap();
        for (b, len) in lengths.into_iter().enumerate() {
            let alone = encoder.forward(arrays.tokens.slice(s![b..=b, ..len]), None).unwrap();
            let together = together.slice(s![b..=b, ..alone.dim().1, ..]);
            assert!(relative_rms(&alone, &together) < 1e-13);
        }
        // Gradients too: of one sequence, with more and more padding.
        let targets = arrays.targets.slice(s![..1, ..]);
        let run = |padding: usize| {
            let mut tokens = Array2::from_elem((1, 5 + padding), 1);
            tokens.slice_mut(s![.., ..5]).assign(&arrays.tokens.slice(s![..1, ..5]));
            let exists = Array2::from_shape_fn(tokens.dim(), |(_, t)| t < 5);
            let of_positions =
                Array2::from_shape_fn(tokens.dim(), |(_, t)| targets[[0, t % targets.ncols()]]);
            let targets = if config.head == EncoderHead::MaskedToken { of_positions.view() } else { targets };
            let (tokens, exists) = (tokens.view(), Some(exists.view()));
            encoder.loss_and_gradients(&EncoderBatch { tokens, exists, targets, counted: None }).unwrap()
        };
        let (short, long) = (run(0), run(70));
        assert!((short.total - long.total).abs() < 1e-13);
        for (short, long) in short.gradients.views().into_iter().zip(long.gradients.views()) {
            let error = relative_rms(&short.value, &long.value);
            assert!(error < 1e-11, "{}: {error:e}", short.name);
        }
        for (short, long) in short.units.iter().zip(&long.units) {
            assert_eq!(short.stats.counts(), long.stats.counts());
            assert_eq!(short.stats.counts().sum(), 5 * config.key_heads() as u64);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits_and_f32_agrees_with_f64() {
    for config in configs() {
        let (encoder, arrays) = (encoder(&config), Arrays::new(&config, true));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let result = pool.install(|| encoder.loss_and_gradients(&arrays.batch()).unwrap());
            (result.total.to_bits(), bits(&result.gradients))
        };
        assert!(on(1) == on(2) && on(1) == on(5));
        let (single, double) = (&encoder, encoder.cast::<f64>());
        let a = single.loss_and_gradients(&arrays.batch()).unwrap();
        let b = double.loss_and_gradients(&arrays.batch()).unwrap();
        assert!((a.total / b.total - 1.0).abs() < 1e-5);
        for (a, b) in a.gradients.views().into_iter().zip(b.gradients.views()) {
            let error = relative_rms(&a.value, &b.value);
            assert!(error < 1e-4, "{}: {error:e}", a.name);
        }
        assert_eq!(double.cast::<f32>(), encoder);
        assert_eq!(encoder.parameters().len() as u128, config.n_parameters());
    }
}

#[test]
fn without_targets_that_count_only_the_commitment_is_left() {
    for config in configs() {
        let (encoder, mut arrays) = (encoder(&config), Arrays::new(&config, true));
        arrays.counted = Some(Array2::from_elem(arrays.targets.dim(), false));
        arrays.targets.fill(u32::MAX);
        let result = encoder.loss_and_gradients(&arrays.batch()).unwrap();
        assert_eq!(result.loss, 0.0);
        assert!(result.commit_loss > 0.0);
        assert!(result.gradients.output.iter().all(|&d| d == 0.0));
        assert!(result.gradients.layers[0].w_k.iter().any(|&d| d != 0.0));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for head in [EncoderHead::MaskedToken, CLASSES] {
        let config = EncoderConfig { head, ..small() };
        let (encoder, good) = (encoder(&config), Arrays::new(&config, true));
        let refused = |change: &dyn Fn(&mut Arrays)| {
            let mut arrays = good.clone();
            change(&mut arrays);
            encoder.loss_and_gradients(&arrays.batch()).unwrap_err()
        };
        let forward_refused = |change: &dyn Fn(&mut Arrays)| {
            let mut arrays = good.clone();
            change(&mut arrays);
            let EncoderBatch { tokens, exists, .. } = arrays.batch();
            encoder.forward(tokens, exists).unwrap_err()
        };
        let outside = |what, index: [usize; 2], got, limit| Error::OutOfRange {
            what,
            index: index.to_vec(),
            got,
            limit,
        };
        let shape = |what, expected: [usize; 2], got: [usize; 2]| Error::Shape {
            what,
            expected: expected.to_vec(),
            got: got.to_vec(),
        };
        // Tokens and where they exist.
        let beyond = |arrays: &mut Arrays| arrays.tokens[[1, 2]] = 7;
        assert_eq!(refused(&beyond), outside("tokens", [1, 2], 7, 7));
        assert_eq!(forward_refused(&beyond), outside("tokens", [1, 2], 7, 7));
        let padding = |arrays: &mut Arrays| arrays.exists.as_mut().unwrap().row_mut(2).fill(false);
        for error in [refused(&padding), forward_refused(&padding)] {
            let words = "`exists` must be true somewhere in every sequence, got nowhere in sequence 2";
            assert_eq!(error.to_string(), words);
        }
        let short = |arrays: &mut Arrays| arrays.exists = Some(Array2::from_elem((B, T - 1), true));
        assert_eq!(refused(&short), shape("exists", [B, T], [B, T - 1]));
        assert_eq!(forward_refused(&short), shape("exists", [B, T], [B, T - 1]));
        for dim in [(0, T), (B, 0)] {
            let none = |arrays: &mut Arrays| {
                (arrays.tokens, arrays.exists) = (Array2::zeros(dim), None);
            };
            assert_eq!(refused(&none), Error::Empty { what: "tokens" });
            assert_eq!(forward_refused(&none), Error::Empty { what: "tokens" });
        }
        // Targets.
        let (l, limit) = (good.targets.ncols(), config.n_outputs());
        let beyond = |arrays: &mut Arrays| arrays.targets.fill(limit as u32);
        assert_eq!(refused(&beyond), outside("targets", [0, 0], limit as u64, limit));
        let wide = |arrays: &mut Arrays| arrays.targets = Array2::zeros((B, l + 1));
        assert_eq!(refused(&wide), shape("targets", [B, l], [B, l + 1]));
        let wide = |arrays: &mut Arrays| arrays.counted = Some(Array2::from_elem((B, l + 1), true));
        assert_eq!(refused(&wide), shape("counted", [B, l], [B, l + 1]));
    }
    // Padding cannot count.
    let (encoder, mut arrays) = (encoder(&small()), Arrays::new(&small(), true));
    arrays.counted.as_mut().unwrap()[[1, 6]] = true;
    let error = encoder.loss_and_gradients(&arrays.batch()).unwrap_err();
    assert_eq!(
        error,
        Error::Invalid {
            what: "counted",
            expected: "false where no token exists".into(),
            got: "true".into()
        }
    );
}

#[test]
fn encoders_that_cannot_be_are_refused() {
    let invalid = |config: EncoderConfig| match Encoder::new(config, 1).unwrap_err() {
        Error::Invalid { what, .. } => what,
        error => panic!("{error}"),
    };
    assert_eq!(invalid(EncoderConfig { vocab_size: 0, ..small() }), "vocab_size");
    assert_eq!(invalid(EncoderConfig { d_model: 7, ..small() }), "d_model");
    assert_eq!(invalid(EncoderConfig { n_layers: 0, ..small() }), "n_layers");
    assert_eq!(invalid(EncoderConfig { n_key_heads: Some(3), ..small() }), "n_key_heads");
    assert_eq!(invalid(EncoderConfig { n_codes: 0, ..small() }), "n_codes");
    assert_eq!(invalid(EncoderConfig { position_lambda: 0.5, ..small() }), "position_lambda");
    assert_eq!(invalid(EncoderConfig { commit_weight: f64::NAN, ..small() }), "commit_weight");
    assert_eq!(invalid(EncoderConfig { codebook_decay: 1.5, ..small() }), "codebook_decay");
    assert_eq!(
        invalid(EncoderConfig { head: EncoderHead::Classes { n_classes: 0 }, ..small() }),
        "n_classes"
    );
    let large = EncoderConfig { vocab_size: u32::MAX as usize, d_model: 1 << 31, ..small() };
    assert!(matches!(Encoder::new(large, 1), Err(Error::TooLarge { .. })));
    let json = serde_json::to_string(&small()).unwrap();
    assert_eq!(serde_json::from_str::<EncoderConfig>(&json).unwrap(), small());
    let unknown = json.replacen('{', "{\"width\": 3, ", 1);
    assert!(serde_json::from_str::<EncoderConfig>(&unknown).unwrap_err().to_string().contains("width"));
}

#[test]
fn codebooks_learn_from_statistics_all_or_none() {
    let config = small();
    let (mut encoder, arrays) = (encoder(&config), Arrays::new(&config, true));
    let before = encoder.clone();
    let stats: Vec<_> =
        encoder.loss_and_gradients(&arrays.batch()).unwrap().units.into_iter().map(|u| u.stats).collect();
    assert_eq!(encoder, before);
    assert!(matches!(encoder.update_codebooks(&stats[..1]), Err(Error::Shape { what: "stats", .. })));
    let other = transformer_vq::codebook::CodeStats::zeros(2, 5, 4).unwrap();
    assert!(encoder.update_codebooks(&[stats[0].clone(), other]).is_err());
    assert_eq!(encoder, before);
    encoder.update_codebooks(&stats).unwrap();
    assert!(encoder.codebooks().iter().zip(before.codebooks()).all(|(a, b)| a != b));
    // Started at keys, codes are nearer to them.
    let errors = |encoder: &Encoder| encoder.loss_and_gradients(&arrays.batch()).unwrap().commit_loss;
    let mut started = before.clone();
    let (tokens, exists) = (arrays.tokens.view(), arrays.exists.as_ref().map(|exists| exists.view()));
    started.start_codebooks(tokens, exists, 10, 1).unwrap();
    assert_eq!(started.parameters(), before.parameters());
    assert!(errors(&started) < 0.5 * errors(&before), "{} {}", errors(&started), errors(&before));
    let copy = started.clone();
    assert!(started.start_codebooks(tokens.slice(s![.., ..0]), None, 10, 1).is_err());
    assert_eq!(started, copy);
}
