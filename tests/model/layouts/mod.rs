//! Every way to build a unit, through one table: the laws of the whole model, checkpoints and resuming. That their gradients are
//! right is the business of `gradients`.

mod dropout;
mod sizes;

use crate::runs::{STEPS, bits, progress, train, trainer};
use ndarray::{Array2, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::VqAttention;
use transformer_vq::check::relative_rms;
use transformer_vq::generate::{Generator, Sampler, Scorer};
use transformer_vq::model::{
    CodewordGradient, Dropout, DropoutSeed, FeedForward, FeedForwardKind, LearningConfig, LossAndGradients,
    ModelConfig, ModelState, Transformer, UnitKind,
};
use transformer_vq::train::Trainer;

pub const B: usize = 2;
pub const T: usize = 37;
const VOCAB: usize = 12;

const SWIGLU: Option<FeedForward> = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 10 });
pub const DROPOUT: Dropout = Dropout { embedding: 0.1, residual: 0.2, sinusoid: 0.2, layer: 0.2 };
const GELU: Option<FeedForward> = Some(FeedForward { kind: FeedForwardKind::Gelu, width: 14 });

fn small() -> ModelConfig {
    ModelConfig { vocab_size: VOCAB, d_v: 6, ..crate::transformer::small() }
}

/// Every layout, by name.
pub fn layouts() -> Vec<(&'static str, ModelConfig)> {
    let heads = |n_heads, n_key_heads, gate| ModelConfig { n_heads, n_key_heads, gate, ..small() };
    let by_gradient =
        LearningConfig::Gradient(CodewordGradient { codebook_weight: 0.3, from_attention: true });
    let hybrid = vec![UnitKind::Quadratic, UnitKind::Vq, UnitKind::Window];
    vec![
        ("one gated head", small()),
        ("of the other tests", crate::runs::config()),
        ("three gated heads", heads(3, None, true)),
        ("multi-head", heads(3, None, false)),
        ("grouped", heads(4, Some(2), false)),
        ("grouped, gated", heads(6, Some(2), true)),
        ("multi-query", heads(4, Some(1), false)),
        ("SwiGLU", ModelConfig { feed_forward: SWIGLU, gate: false, ..small() }),
        ("multi-head, GELU", ModelConfig { feed_forward: GELU, ..heads(2, None, false) }),
        ("exact", ModelConfig { units: vec![UnitKind::Quadratic], ..small() }),
        ("grouped, exact", ModelConfig { units: vec![UnitKind::Quadratic], ..heads(4, Some(2), false) }),
        ("window only", ModelConfig { units: vec![UnitKind::Window], ..small() }),
        ("hybrid", ModelConfig { units: hybrid.clone(), feed_forward: GELU, ..heads(2, Some(1), true) }),
        ("dropout", ModelConfig { dropout: DROPOUT, units: hybrid, feed_forward: SWIGLU, ..small() }),
        (
            "grouped, SwiGLU",
            ModelConfig { feed_forward: SWIGLU, learning: by_gradient, ..heads(4, Some(2), true) },
        ),
    ]
}

/// A model whose biases and scalars have left zero, where mistakes hide.
pub fn model(config: &ModelConfig) -> Transformer {
    let mut model = Transformer::new(config.clone(), 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for mut parameter in model.parameters_mut() {
        parameter.value.mapv_inplace(|x| x + rng.random_range(-0.2..0.2));
    }
    model
}

fn tokens(seed: u64, t: usize) -> Array2<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((B, t), || rng.random_range(0..VOCAB as u32))
}

/// Losses and gradients of a piece after another one, with dropout if there is some, and the state after it.
pub fn piece_of_training<N: Scalar>(
    model: &Transformer<N>,
    mask: Option<&Array2<bool>>,
) -> (LossAndGradients<N>, ModelState<N>) {
    let mut state = model.new_state(B).unwrap();
    model.push(tokens(7, 10).view(), &mut state).unwrap();
    let (inputs, targets, mask) = (tokens(1, T), tokens(2, T), mask.map(|mask| mask.view()));
    let seed = Some(DropoutSeed { seed: 1, step: 2, sequence: 3, first: 0 });
    let got =
        model.loss_and_gradients_dropping(inputs.view(), targets.view(), mask, &mut state, seed).unwrap();
    (got, state)
}

fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
fn pieces_and_single_tokens_give_the_whole() {
    for (name, config) in layouts() {
        let model = model(&config).cast::<f64>();
        let (prepared, tokens) = (model.prepare().unwrap(), tokens(5, T));
        let (whole, ..) = model.forward(tokens.view(), None, &mut model.new_state(B).unwrap()).unwrap();
        for len in [1, 3, 10, T] {
            let [mut pushed, mut decoded, mut carried] = [(); 3].map(|()| model.new_state(B).unwrap());
            for from in (0..T).step_by(len) {
                let piece = tokens.slice(s![.., from..T.min(from + len)]);
                let expected = whole.slice(s![.., from..T.min(from + len), ..]);
                let close = |form: &str, got: &ndarray::Array3<f64>| {
                    let error = relative_rms(got, &expected);
                    assert!(error <= 1e-12, "{name}: {form} of {len} at {from}: {error:e}");
                };
                close("push", &model.push(piece, &mut pushed).unwrap());
                close("decoding", &prepared.push(piece, &mut decoded).unwrap().0);
                close("forward", &model.forward(piece, None, &mut carried).unwrap().0);
            }
            assert_eq!([&pushed, &decoded, &carried].map(|state| state.position()), [T as u64; 3], "{name}");
        }
    }
}

/// No key lies so near the border of two cells that rounding gives it another code.
#[test]
fn decoding_in_f32_gives_the_logits_in_f64() {
    for (name, config) in layouts() {
        let (single, tokens) = (model(&config), tokens(5, T));
        let double = single.cast::<f64>();
        let (expected, ..) = double.forward(tokens.view(), None, &mut double.new_state(B).unwrap()).unwrap();
        let (prepared, mut state) = (single.prepare().unwrap(), single.new_state(B).unwrap());
        for t in 0..T {
            let (logits, _) = prepared.push(tokens.slice(s![.., t..=t]), &mut state).unwrap();
            let error = relative_rms(&logits, &expected.slice(s![.., t..=t, ..]));
            assert!(error < 1e-5, "{name}, token {t}: {error:e}");
        }
    }
}

#[test]
fn a_scorer_tells_the_mean_of_the_shares_that_units_report() {
    for (name, config) in layouts() {
        let model = model(&config).cast::<f64>();
        let text = tokens(5, T + 1);
        let (before, after) = (text.slice(s![..1, ..T]), text.row(0));
        let after = after.slice(s![1..]);
        for len in [1, 7, T] {
            let (mut scorer, mut state) = (Scorer::new(&model).unwrap(), model.new_state(1).unwrap());
            let (prepared, mut sum) = (model.prepare().unwrap(), 0.0);
            for from in (0..T).step_by(len) {
                let tokens = from..T.min(from + len);
                let piece = before.slice(s![.., tokens.clone()]);
                scorer.push(piece.row(0), after.slice(s![tokens.clone()])).unwrap();
                let (_, reports) = prepared.push(piece, &mut state).unwrap();
                let shares = reports.iter().map(|report| report.cached_mass * tokens.len() as f64);
                sum += shares.sum::<f64>();
                let expected = sum / (tokens.end * config.n_layers) as f64;
                assert!((scorer.cached_mass() - expected).abs() < 1e-14, "{name}, pieces of {len}");
            }
        }
        // Training reports the same of a whole piece.
        let mut scorer = Scorer::new(&model).unwrap();
        scorer.push(before.row(0), after).unwrap();
        let (_, reports, _) = model.forward(before, None, &mut model.new_state(1).unwrap()).unwrap();
        let mean = reports.iter().map(|report| report.cached_mass).sum::<f64>() / config.n_layers as f64;
        assert!((scorer.cached_mass() - mean).abs() < 1e-14, "{name}");
        let reads_a_cache = (0..config.n_layers).any(|unit| config.unit(unit) == UnitKind::Vq);
        assert_eq!(mean > 0.0, reads_a_cache, "{name}: {mean}");
    }
}

#[test]
fn block_length_does_not_matter() {
    for (name, config) in layouts() {
        let of = |block_len| {
            let attention = VqAttention { block_len, ..config.attention };
            let model = model(&ModelConfig { attention, ..config.clone() }).cast::<f64>();
            model.push(tokens(5, T).view(), &mut model.new_state(B).unwrap()).unwrap()
        };
        for block_len in [1, 5, 64] {
            assert!(relative_rms(&of(block_len), &of(8)) <= 1e-12, "{name}");
        }
    }
}

#[test]
fn future_tokens_do_not_change_past_logits() {
    for (name, config) in layouts() {
        let model = model(&config);
        let forward = |tokens: &Array2<u32>| {
            let (logits, ..) = model.forward(tokens.view(), None, &mut model.new_state(B).unwrap()).unwrap();
            logits.mapv(f32::to_bits)
        };
        let base = tokens(5, T);
        let expected = forward(&base);
        for cut in [0, 1, 8, 20, T - 1] {
            let mut changed = base.clone();
            changed.slice_mut(s![.., cut..]).mapv_inplace(|token| (token + 3) % VOCAB as u32);
            let got = forward(&changed);
            assert_eq!(
                got.slice(s![.., ..cut, ..]),
                expected.slice(s![.., ..cut, ..]),
                "{name}, cut at {cut}"
            );
            assert!(got != expected);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_losses_and_gradients() {
    for (name, config) in layouts() {
        let model = model(&config);
        let on = |threads| {
            on_threads(threads, || {
                let (got, state) = piece_of_training(&model, None);
                let gradients = got.gradients.views().into_iter().map(|p| p.value.mapv(f32::to_bits));
                (got.loss.to_bits(), got.commit_loss.to_bits(), Vec::from_iter(gradients), state)
            })
        };
        let expected = on(1);
        assert!(on(2) == expected && on(5) == expected, "{name}");
    }
}

#[test]
fn in_f32_losses_and_gradients_are_those_in_f64() {
    for (name, config) in layouts() {
        let single = model(&config);
        let (a, _) = piece_of_training(&single, None);
        let (b, _) = piece_of_training(&single.cast::<f64>(), None);
        assert!((a.loss - b.loss).abs() < 1e-5 * b.loss, "{name}: {} {}", a.loss, b.loss);
        assert!((a.commit_loss - b.commit_loss).abs() <= 1e-5 * b.commit_loss, "{name}");
        for (a, b) in a.gradients.views().into_iter().zip(b.gradients.views()) {
            let error = relative_rms(&a.value, &b.value);
            assert!(error < 3e-5, "{name}: {}: {error:e}", a.name);
        }
    }
}

fn a_run_goes_on_after_a_checkpoint<T: Scalar>(config: &ModelConfig, name: &str) {
    let (mut whole, mut end) = (trainer::<T>(config.clone()), progress());
    let reports = train(&mut whole, &mut end, STEPS);
    let expected = bits(&whole, &end);
    for stop in [0, 2, 4, STEPS] {
        let folder = tempfile::tempdir().unwrap();
        let (mut first, mut until) = (trainer::<T>(config.clone()), progress());
        train(&mut first, &mut until, stop);
        first.save(folder.path(), &until).unwrap();
        assert_eq!(&Transformer::<T>::load(folder.path()).unwrap(), first.model(), "{name}");
        let (mut second, mut from) = Trainer::<T>::load(folder.path()).unwrap();
        assert_eq!(train(&mut second, &mut from, STEPS), reports[stop as usize..], "{name} after {stop}");
        assert!(bits(&second, &from) == expected, "{name} after {stop}");
    }
}

#[test]
fn a_run_stopped_and_resumed_ends_in_the_same_bits() {
    for (name, config) in layouts() {
        a_run_goes_on_after_a_checkpoint::<f32>(&config, name);
    }
    for (name, config) in &layouts()[4..=4] {
        a_run_goes_on_after_a_checkpoint::<f64>(config, name);
    }
}

#[test]
fn training_moves_every_parameter_and_writing_goes_on() {
    for (name, config) in layouts() {
        let (mut trainer, mut progress) = (trainer::<f32>(config), progress());
        let before = trainer.model().clone();
        train(&mut trainer, &mut progress, STEPS);
        let after = trainer.into_model();
        for (old, new) in before.parameters().views().iter().zip(after.parameters().views()) {
            assert!(old.value != new.value, "{name}: {} has not moved", old.name);
        }
        let write = || {
            let mut generator = Generator::new(&after, Sampler::default(), 7).unwrap();
            generator.read(tokens(3, 9).row(0)).unwrap();
            Vec::from_iter((0..20).map(|_| generator.next_token().unwrap()))
        };
        assert_eq!(write(), write(), "{name}");
    }
}
