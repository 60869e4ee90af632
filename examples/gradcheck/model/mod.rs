//! Level 4: the whole model. Its surrogate is written here a second time, on the definition of attention: codes are frozen,
//! recent keys read `c_z + J (k - k0)` with k0 the keys of the unmoved model and J the estimator's, cached keys read the
//! codebook (which moves with its parameters, where attention's gradient is to reach them), and the state that is carried in (or
//! handed from block to block, where that is a constant) is that of the unmoved model.

use ndarray::{Array2, ArrayD};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::VqAttention;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};
use transformer_vq::model::{
    CodewordGradient, Dropout, DropoutSeed, FeedForward, FeedForwardKind, LearningConfig, ModelConfig,
    Transformer, UnitKind,
};

use super::Check;
use super::worst::worst;

mod formulas;
mod surrogate;

use surrogate::Surrogate;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-8 };
    vec![
        check("model: one head", || error(&small(), false)),
        check("model: two heads, tied, absolute, masked", || {
            let options =
                ModelConfig { n_heads: 2, tied_embedding: true, absolute_positions: true, ..small() };
            error(&options, true)
        }),
        check("model: blocks constant, no final norm", || {
            let attention = VqAttention { gradient_through_cache: false, ..small().attention };
            error(&ModelConfig { attention, final_norm: false, ..small() }, false)
        }),
        check("model: window only, masked", || {
            let attention = VqAttention { cache: false, ..small().attention };
            error(&ModelConfig { attention, ..small() }, true)
        }),
        check("model: rotation, Laplace", || {
            let smoothing = Smoothing::Laplace { epsilon: 1e-5 };
            let estimator = rotation(RotationVariant::Paper, RotationScale::Ratio);
            error(&ModelConfig { learning: LearningConfig::Ema { smoothing }, estimator, ..small() }, false)
        }),
        check("model: rotation of unit vectors, frozen", || {
            let estimator = rotation(RotationVariant::Normalized, RotationScale::AtMost(0.9));
            error(&ModelConfig { learning: LearningConfig::Frozen, estimator, ..small() }, true)
        }),
        check("model: learned codewords, no estimator", || {
            let learning = LearningConfig::Gradient(by_gradient(false));
            error(&ModelConfig { learning, estimator: Estimator::None, ..small() }, true)
        }),
        check("model: codewords by attention, two heads", || {
            let learning = LearningConfig::Gradient(by_gradient(true));
            error(&ModelConfig { learning, n_heads: 2, ..small() }, false)
        }),
        check("model: SimVQ", || error(&linear(false, false, false), false)),
        check("model: SimVQ by attention, directional", || {
            error(&ModelConfig { estimator: Estimator::Directional, ..linear(false, true, true) }, true)
        }),
        check("model: SimVQ, learned basis, rotation", || {
            let estimator = rotation(RotationVariant::Paper, RotationScale::One);
            error(&ModelConfig { estimator, n_heads: 2, ..linear(true, true, true) }, true)
        }),
        check("model: no gate", || error(&ModelConfig { gate: false, ..small() }, false)),
        check("model: multi-query, masked", || error(&grouped(3, 1), true)),
        check("model: grouped, no gate, SwiGLU", || {
            let feed_forward = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 5 });
            error(&ModelConfig { gate: false, feed_forward, ..grouped(4, 2) }, false)
        }),
        check("model: GELU, masked", || {
            let feed_forward = Some(FeedForward { kind: FeedForwardKind::Gelu, width: 8 });
            error(&ModelConfig { feed_forward, ..small() }, true)
        }),
        check("model: grouped, codewords by attention", || {
            let learning = LearningConfig::Gradient(by_gradient(true));
            error(&ModelConfig { learning, ..grouped(4, 2) }, true)
        }),
        check("model: exact attention, masked", || {
            error(&ModelConfig { units: vec![UnitKind::Quadratic], ..grouped(2, 1) }, true)
        }),
        check("model: VQ, exact, window only", || {
            let units = vec![UnitKind::Vq, UnitKind::Quadratic, UnitKind::Window];
            let learning = LearningConfig::Gradient(by_gradient(true));
            error(&ModelConfig { units, learning, n_layers: 3, d_v: 3, ..small() }, false)
        }),
        check("model: dropout of everything", || {
            let dropout = Dropout { embedding: 0.2, residual: 0.3, sinusoid: 0.25, layer: 0.3 };
            let feed_forward = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 3 });
            // Dropped numbers leave short rows to normalise: the loss is curved, and the error falls as step^4 down to here.
            error_at(&ModelConfig { dropout, feed_forward, n_layers: 3, d_v: 3, ..small() }, true, 1.5e-4)
        }),
        check("model: dropout, exact, absolute positions", || {
            let dropout = Dropout { embedding: 0.2, residual: 0.3, sinusoid: 0.25, layer: 0.0 };
            let units = vec![UnitKind::Quadratic, UnitKind::Vq];
            error(&ModelConfig { dropout, units, absolute_positions: true, d_v: 3, ..small() }, false)
        }),
        check("model: grouped, blocks constant, SimVQ", || {
            let attention = VqAttention { gradient_through_cache: false, ..small().attention };
            let learning = linear(true, true, true).learning;
            error(&ModelConfig { attention, learning, ..grouped(4, 2) }, false)
        }),
    ]
}

fn rotation(variant: RotationVariant, scale: RotationScale) -> Estimator {
    Estimator::Rotation(Rotation { variant, scale })
}

fn by_gradient(from_attention: bool) -> CodewordGradient {
    CodewordGradient { codebook_weight: 0.2, from_attention }
}

fn linear(learned_basis: bool, bias: bool, from_attention: bool) -> ModelConfig {
    let gradient = by_gradient(from_attention);
    ModelConfig { learning: LearningConfig::Linear { d_basis: 3, learned_basis, bias, gradient }, ..small() }
}

fn grouped(n_heads: usize, n_key_heads: usize) -> ModelConfig {
    ModelConfig { n_heads, n_key_heads: Some(n_key_heads), d_v: 3, ..small() }
}

fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 7,
        d_model: 6,
        n_layers: 2,
        n_heads: 1,
        d_k: 4,
        d_v: 5,
        n_codes: 5,
        attention: VqAttention { block_len: 3, window: 2, ..VqAttention::default() },
        logit_scale: 0.8,
        commit_weight: 0.3,
        ..ModelConfig::default()
    }
}

/// [`error_at`] the step that suits all but the most curved losses.
fn error(config: &ModelConfig, masked: bool) -> f64 {
    error_at(config, masked, 1e-3)
}

/// The largest error over the gradients of all parameters.
fn error_at(config: &ModelConfig, masked: bool, step: f64) -> f64 {
    const BATCH: usize = 2;
    let model = Transformer::new(config.clone(), 5).unwrap().cast::<f64>();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut parameters = model.parameters().clone();
    for mut parameter in parameters.views_mut() {
        // Biases and scalars start at zero, where mistakes hide.
        parameter.value.mapv_inplace(|x| x + rng.random_range(-0.2..0.2));
    }
    let model = Transformer::from_parts(config.clone(), parameters, model.learning().to_vec()).unwrap();
    let mut tokens =
        |t| Array2::from_shape_simple_fn((BATCH, t), || rng.random_range(0..config.vocab_size as u32));
    let (before, piece, targets) = (tokens(8), tokens(10), tokens(10));
    let mask = masked.then(|| Array2::from_shape_fn((BATCH, 10), |(b, t)| (b + 2 * t) % 5 > 0));
    let mut state = model.new_state(BATCH).unwrap();
    model.push(before.view(), &mut state).unwrap();

    let seed = DropoutSeed { seed: 3, step: 7, sequence: 5, first: 0 };
    let surrogate = Surrogate::new(&model, &state, &piece, &targets, mask.as_ref(), seed);
    let mask = mask.as_ref().map(|mask| mask.view());
    let got = model
        .loss_and_gradients_dropping(piece.view(), targets.view(), mask, &mut state, Some(seed))
        .unwrap();
    let of_total = (surrogate.total(model.parameters()) / got.total - 1.0).abs();
    let of_gradients = got.gradients.views().into_iter().enumerate().map(|(i, gradient)| {
        let mut moved = model.parameters().clone();
        let at = model.parameters().views()[i].value.to_owned();
        let expected = finite_difference(
            |x| {
                moved.views_mut()[i].value.assign(&x);
                surrogate.total(&moved)
            },
            &at,
            step,
        );
        let gradient: ArrayD<f64> = gradient.value.to_owned();
        relative_rms(&gradient, &expected)
    });
    worst(of_gradients.chain([of_total]))
}
