//! Laws of the whole model: threads, pieces, causality, masks, precision.

use ndarray::{Array1, Array2, Array3, Axis, concatenate, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::VqAttention;
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Estimator, Rotation, Smoothing};
use transformer_vq::generate::{Scorer, log_probabilities};
use transformer_vq::model::{
    CodewordGradient, LearningConfig, LossAndGradients, ModelConfig, Parameters, Transformer,
};
use transformer_vq::ops::cross_entropy;
use transformer_vq::train::{AdamW, Batch, Trainer};

const B: usize = 3;
const T: usize = 41;
const VOCAB: usize = 11;

pub fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        d_model: 16,
        n_layers: 3,
        n_heads: 1,
        d_k: 8,
        d_v: 12,
        n_codes: 9,
        attention: VqAttention { block_len: 8, window: 5, ..VqAttention::default() },
        commit_weight: 0.2,
        codebook_decay: 0.9,
        ..ModelConfig::default()
    }
}

/// Every option at least once.
fn configs() -> [ModelConfig; 7] {
    let two_heads = ModelConfig {
        n_heads: 2,
        tied_embedding: true,
        absolute_positions: true,
        logit_scale: 0.7,
        ..small()
    };
    let window_only = VqAttention { cache: false, ..small().attention };
    let constant_blocks = VqAttention { gradient_through_cache: false, window: 0, ..small().attention };
    [
        small(),
        two_heads,
        ModelConfig { attention: window_only, final_norm: false, ..small() },
        ModelConfig { attention: constant_blocks, ..small() },
        ModelConfig {
            learning: LearningConfig::Gradient(CodewordGradient {
                codebook_weight: 0.3,
                from_attention: true,
            }),
            estimator: Estimator::Directional,
            n_heads: 2,
            ..small()
        },
        ModelConfig {
            learning: LearningConfig::Linear {
                d_basis: 6,
                learned_basis: false,
                bias: true,
                gradient: CodewordGradient { codebook_weight: 0.3, from_attention: false },
            },
            estimator: Estimator::Rotation(Rotation::default()),
            ..small()
        },
        ModelConfig {
            learning: LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } },
            estimator: Estimator::None,
            ..small()
        },
    ]
}

/// A model whose biases and scalars have left zero, where mistakes hide.
fn model(config: &ModelConfig) -> Transformer {
    let mut model = Transformer::new(config.clone(), 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for mut parameter in model.parameters_mut() {
        parameter.value.mapv_inplace(|x| x + rng.random_range(-0.2..0.2));
    }
    model
}

fn tokens(seed: u64, dim: (usize, usize)) -> Array2<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn(dim, || rng.random_range(0..VOCAB as u32))
}

fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

fn bits<T: Scalar>(parameters: &Parameters<T>) -> Vec<u64> {
    parameters
        .views()
        .iter()
        .flat_map(|p| p.value.iter().map(|x| x.as_f64().to_bits()).collect::<Vec<_>>())
        .collect()
}

/// Losses and gradients after another piece.
fn run<T: Scalar>(
    model: &Transformer<T>,
    targets: &Array2<u32>,
    mask: Option<&Array2<bool>>,
) -> LossAndGradients<T> {
    let mut state = model.new_state(B).unwrap();
    model.push(tokens(7, (B, 10)).view(), &mut state).unwrap();
    let mask = mask.map(|mask| mask.view());
    model.loss_and_gradients(tokens(1, (B, T)).view(), targets.view(), mask, &mut state).unwrap()
}

#[test]
fn any_number_of_threads_gives_the_same_losses_and_gradients() {
    for config in configs() {
        let model = model(&config);
        let on = |threads| {
            let result = on_threads(threads, || run(&model, &tokens(2, (B, T)), None));
            let stats = Vec::from_iter(result.layers.iter().map(|layer| layer.stats.clone()));
            ([result.loss.to_bits(), result.commit_loss.to_bits()], bits(&result.gradients), stats)
        };
        let expected = on(1);
        assert!(on(2) == expected && on(8) == expected);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_ten_steps() {
    for config in configs() {
        let on = |threads| {
            let mut trainer = Trainer::new(model(&config), AdamW::default()).unwrap();
            let steps = (0..10).map(|step| {
                let all = tokens(step, (B, T + 1));
                let (tokens, targets) =
                    (all.slice(s![.., ..T]).to_owned(), all.slice(s![.., 1..]).to_owned());
                trainer.step(&Batch { tokens, targets, first: step % 4 == 0 }, 1.0).unwrap()
            });
            let reports: Vec<_> = on_threads(threads, || steps.collect());
            (bits(trainer.model().parameters()), reports, trainer.into_model())
        };
        let expected = on(1);
        assert!(on(2) == expected && on(8) == expected);
        assert!(expected.2 != model(&config), "the steps move something");
    }
}

#[test]
fn pieces_with_carried_state_equal_the_whole() {
    for config in configs() {
        let model = model(&config).cast::<f64>();
        let tokens = tokens(5, (B, T));
        let mut state = model.new_state(B).unwrap();
        let (whole, ..) = model.forward(tokens.view(), None, &mut state).unwrap();
        let prepared = model.prepare().unwrap();
        for len in [1, 3, 13, T] {
            let [mut forward, mut push, mut decode] = [(); 3].map(|()| model.new_state(B).unwrap());
            let mut pieces: [Vec<Array3<f64>>; 3] = Default::default();
            for piece in tokens.axis_chunks_iter(Axis(1), len) {
                pieces[0].push(model.forward(piece, None, &mut forward).unwrap().0);
                pieces[1].push(model.push(piece, &mut push).unwrap());
                pieces[2].push(prepared.push(piece, &mut decode).unwrap().0);
            }
            for pieces in pieces {
                let logits = concatenate(Axis(1), &Vec::from_iter(pieces.iter().map(|p| p.view()))).unwrap();
                let error = relative_rms(&logits, &whole);
                assert!(error <= 1e-12, "pieces of {len}: {error:e}");
            }
            for state in [&forward, &push, &decode] {
                assert_eq!(state.position(), T as u64);
            }
            assert_eq!(push.size_in_bytes(), model.new_state(B).unwrap().size_in_bytes());
        }
    }
}

#[test]
fn decoded_logits_have_the_same_bits_on_any_number_of_threads() {
    for config in configs() {
        let (model, tokens) = (model(&config), tokens(5, (B, T)));
        let decode = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (prepared, mut state) = (model.prepare().unwrap(), model.new_state(B).unwrap());
                let logits = tokens
                    .axis_chunks_iter(Axis(1), 1)
                    .map(|token| prepared.push(token, &mut state).unwrap().0.mapv(f32::to_bits));
                (Vec::from_iter(logits), state.clone())
            })
        };
        let expected = decode(1);
        assert!(decode(2) == expected && decode(5) == expected);
    }
}

#[test]
fn sequences_of_a_batch_do_not_meet() {
    for config in configs() {
        let model = model(&config).cast::<f64>();
        let tokens = tokens(5, (B, T));
        let together = model.push(tokens.view(), &mut model.new_state(B).unwrap()).unwrap();
        for (one, together) in tokens.axis_chunks_iter(Axis(0), 1).zip(together.axis_chunks_iter(Axis(0), 1))
        {
            let alone = model.push(one, &mut model.new_state(1).unwrap()).unwrap();
            assert!(relative_rms(&alone, &together) <= 1e-13);
        }
    }
}

#[test]
fn future_tokens_do_not_change_past_logits() {
    for config in configs() {
        let model = model(&config);
        let base = tokens(5, (B, T));
        let forward = |tokens: &Array2<u32>| {
            let (logits, ..) = model.forward(tokens.view(), None, &mut model.new_state(B).unwrap()).unwrap();
            logits.mapv(f32::to_bits)
        };
        let expected = forward(&base);
        for cut in [0, 1, 7, 8, 20, T - 1, T] {
            let mut changed = base.clone();
            changed.slice_mut(s![.., cut..]).mapv_inplace(|token| (token + 3) % VOCAB as u32);
            let got = forward(&changed);
            assert_eq!(got.slice(s![.., ..cut, ..]), expected.slice(s![.., ..cut, ..]), "cut at {cut}");
            assert!(cut == T || got != expected);
        }
    }
}

#[test]
fn scores_are_the_log_softmax_of_the_logits() {
    for config in configs() {
        let model = model(&config).cast::<f64>();
        let text: Array1<u32> = tokens(6, (1, T)).row(0).to_owned();
        let (before, after) = (text.slice(s![..-1]), text.slice(s![1..]));
        let mut state = model.new_state(1).unwrap();
        let (logits, ..) = model.forward(before.insert_axis(Axis(0)), None, &mut state).unwrap();
        let all = cross_entropy::log_softmax(logits.index_axis(Axis(0), 0)).unwrap();
        let expected = Array1::from_shape_fn(T - 1, |i| all[[i, after[i] as usize]]);
        for piece_len in [1, 2, 17, usize::MAX] {
            let got = log_probabilities(&model, text.view(), piece_len).unwrap();
            assert!(relative_rms(&got, &expected) <= 1e-12, "pieces of {piece_len}");
        }
        let mut scorer = Scorer::new(&model).unwrap();
        scorer.push(before, after).unwrap();
        assert!((scorer.nats_per_token() + expected.mean().unwrap()).abs() < 1e-12);
        assert_eq!(log_probabilities(&model, text.slice(s![..1]), 5).unwrap().len(), 0);
    }
}

#[test]
fn targets_of_masked_positions_are_not_looked_at() {
    for config in configs() {
        let model = model(&config).cast::<f64>();
        let mask = Array2::from_shape_fn((B, T), |(b, t)| (b + 2 * t) % 5 > 1);
        let targets = tokens(2, (B, T));
        let mut changed = targets.clone();
        changed.zip_mut_with(&mask, |target, &counts| *target = if counts { *target } else { u32::MAX });
        let (a, b) = (run(&model, &targets, Some(&mask)), run(&model, &changed, Some(&mask)));
        assert_eq!((a.loss, a.commit_loss, bits(&a.gradients)), (b.loss, b.commit_loss, bits(&b.gradients)));
        // The mean is over what counts.
        let mut state = model.new_state(B).unwrap();
        model.push(tokens(7, (B, 10)).view(), &mut state).unwrap();
        let (logits, ..) = model.forward(tokens(1, (B, T)).view(), None, &mut state).unwrap();
        let (mut sum, mut n) = (0.0, 0.0);
        for ((b, t), _) in mask.indexed_iter().filter(|&(_, &counts)| counts) {
            sum -= cross_entropy::log_softmax(logits.index_axis(Axis(0), b)).unwrap()
                [[t, targets[[b, t]] as usize]];
            n += 1.0;
        }
        assert!((a.loss - sum / n).abs() < 1e-13);
        assert_eq!(a.layers[0].stats.counts().sum(), n as u64 * config.n_heads as u64);
    }
}

#[test]
fn without_counted_positions_nothing_is_learned() {
    for config in configs() {
        let model = model(&config);
        let nothing = Array2::from_elem((B, T), false);
        let result = run(&model, &Array2::from_elem((B, T), u32::MAX), Some(&nothing));
        assert_eq!((result.loss, result.commit_loss, result.total), (0.0, 0.0, 0.0));
        assert!(result.gradients.views().iter().all(|p| p.value.iter().all(|&d| d == 0.0)));
        assert!(result.layers.iter().all(|layer| layer.stats.counts().sum() == 0));
    }
}

#[test]
fn f32_agrees_with_f64() {
    for config in configs() {
        let (single, targets) = (model(&config), tokens(2, (B, T)));
        let (a, b) = (run(&single, &targets, None), run(&single.cast::<f64>(), &targets, None));
        assert!((a.loss - b.loss).abs() < 1e-5 * b.loss, "{} {}", a.loss, b.loss);
        assert!((a.commit_loss - b.commit_loss).abs() < 1e-5 * b.commit_loss);
        for (a, b) in a.gradients.views().into_iter().zip(b.gradients.views()) {
            let error = relative_rms(&a.value, &b.value);
            assert!(error < 3e-5, "{}: {error:e}", a.name);
        }
        let (a, b) = (single.new_state(B), single.cast::<f64>().new_state(B));
        let tokens = tokens(1, (B, T));
        let a = single.push(tokens.view(), &mut a.unwrap()).unwrap();
        let b = single.cast::<f64>().push(tokens.view(), &mut b.unwrap()).unwrap();
        assert!(relative_rms(&a, &b) < 1e-5, "{:e}", relative_rms(&a, &b));
        assert_eq!(single.cast::<f64>().cast::<f32>(), single);
    }
}

/// What moves in three steps, by kind of learning: every parameter that there is, and moving averages.
#[test]
fn every_kind_of_learning_moves_what_it_should() {
    for config in configs() {
        let before = model(&config);
        let mut trainer = Trainer::new(before.clone(), AdamW::default()).unwrap();
        for step in 0..3 {
            let all = tokens(step, (B, T + 1));
            let (tokens, targets) = (all.slice(s![.., ..T]).to_owned(), all.slice(s![.., 1..]).to_owned());
            trainer.step(&Batch { tokens, targets, first: step == 0 }, 1.0).unwrap();
        }
        let after = trainer.into_model();
        for (old, new) in before.parameters().views().iter().zip(after.parameters().views()) {
            assert!(old.value != new.value, "{} has not moved", old.name);
        }
        let by_average = matches!(config.learning, LearningConfig::Ema { .. });
        assert_eq!(before.learning() != after.learning(), by_average);
        for (old, new) in before.codebooks().iter().zip(after.codebooks()) {
            assert_ne!(old.codewords(), new.codewords());
        }
        let total = config.n_parameters();
        assert_eq!(after.parameters().len() as u128, total);
    }
}
