//! Units that are computed again in backward give the gradients, and the runs, of those that are kept: bit for bit.

use crate::layouts::{self, DROPOUT, layouts, model, piece_of_training};
use crate::runs::{batches, config, progress, train, trainer};
use transformer_vq::codebook::{Estimator, Rotation};
use transformer_vq::model::{
    CodewordGradient, Dropout, FeedForward, FeedForwardKind, LearningConfig, ModelConfig, Revival, UnitKind,
};
use transformer_vq::ndarray::Array2;
use transformer_vq::train::{Gradients, Trainer};

/// Every layout, whole and dropped; kinds of learning beside.
fn configs() -> Vec<ModelConfig> {
    let gradient = CodewordGradient { codebook_weight: 0.3, from_attention: true };
    let base = ModelConfig { commit_weight: 0.2, n_layers: 3, ..config() };
    let mut all = vec![
        ModelConfig { revival: Some(Revival { ratio: 0.5, every: 2 }), ..base.clone() },
        ModelConfig {
            learning: LearningConfig::Gradient(gradient),
            estimator: Estimator::Rotation(Rotation::default()),
            dropout: Dropout { embedding: 0.1, residual: 0.2, sinusoid: 0.2, layer: 0.3 },
            ..base.clone()
        },
        ModelConfig {
            units: vec![UnitKind::Quadratic, UnitKind::Window, UnitKind::Vq],
            feed_forward: Some(FeedForward { width: 9, kind: FeedForwardKind::SwiGlu }),
            ..base
        },
    ];
    for (_, config) in layouts() {
        all.push(ModelConfig { dropout: DROPOUT, ..config.clone() });
        all.push(config);
    }
    all
}

#[test]
fn gradients_and_runs_keep_their_bits() {
    for (config, micro_batches) in configs().into_iter().flat_map(|config| [(config.clone(), 1), (config, 2)])
    {
        let again = ModelConfig { recompute: true, ..config.clone() };
        let [mut kept, mut again]: [Trainer<f32>; 2] = [config, again]
            .map(|config| trainer(config).with_dropout_seed(3).with_micro_batches(micro_batches).unwrap());
        let (mut progress, mut progress_again) = (progress(), progress());
        // In the middle of a sequence: states matter.
        let reports = train(&mut kept, &mut progress, 5);
        assert_eq!(train(&mut again, &mut progress_again, 5), reports);
        let batch = batches(&progress).next_batch().unwrap();
        assert!(!batch.first);
        let [a, b]: [Gradients<f32>; 2] = [&mut kept, &mut again].map(|t| t.gradients(&batch).unwrap());
        assert_eq!(a, b);
    }
}

#[test]
fn masked_losses_and_their_gradients_keep_their_bits() {
    let mask = Array2::from_shape_fn((layouts::B, layouts::T), |(b, t)| (b + 2 * t) % 5 > 1);
    for config in configs() {
        let again = ModelConfig { recompute: true, ..config.clone() };
        let run = |config: &ModelConfig| {
            let (got, state) = piece_of_training(&model(config), Some(&mask));
            let stats = Vec::from_iter(got.layers.into_iter().map(|layer| layer.stats));
            ([got.loss, got.commit_loss, got.total], got.gradients, stats, state)
        };
        assert!(run(&config) == run(&again), "{config:?}");
    }
}
