//! What dropout drops, and when its masks change. That forward and backward use the same is the business of `gradients`.

use transformer_vq::model::{Dropout, DropoutSeed, ModelConfig, Transformer};

use super::{B, GELU, T, model, small, tokens};

/// The cross-entropy of a batch with dropout.
fn loss_with(dropout: Dropout, seed: Option<DropoutSeed>) -> f64 {
    let model = model(&ModelConfig { dropout, feed_forward: GELU, ..small() });
    let mut state = model.new_state(B).unwrap();
    let (inputs, targets) = (tokens(1, T), tokens(2, T));
    let (inputs, targets) = (inputs.view(), targets.view());
    model.loss_and_gradients_dropping(inputs, targets, None, &mut state, seed).unwrap().loss
}

#[test]
fn masks_follow_what_they_are_drawn_for() {
    let (none, base) = (Dropout::default(), DropoutSeed { seed: 1, step: 2, sequence: 2, first: 0 });
    let plain = loss_with(none, None);
    let of_update = [Dropout { embedding: 0.3, ..none }, Dropout { residual: 0.3, ..none }];
    let of_sequence = [Dropout { sinusoid: 0.3, ..none }, Dropout { layer: 0.4, ..none }];
    let all = of_update.map(|rates| (rates, true)).into_iter().chain(of_sequence.map(|rates| (rates, false)));
    for (rates, by_step) in all {
        let of = |seed| loss_with(rates, Some(seed));
        let with = of(base);
        assert!(with != plain && with.is_finite(), "{rates:?}");
        assert_eq!(loss_with(rates, None), plain, "evaluation drops nothing: {rates:?}");
        assert_eq!(of(base), with, "{rates:?}");
        assert_eq!(of(DropoutSeed { step: 3, ..base }) != with, by_step, "{rates:?}");
        assert_eq!(of(DropoutSeed { sequence: 3, ..base }) != with, !by_step, "{rates:?}");
        assert!(of(DropoutSeed { seed: 9, ..base }) != with, "{rates:?}");
    }
    assert_eq!(loss_with(none, Some(base)), plain);
}

/// A sequence that passes by all units is its embedding alone.
#[test]
fn a_dropped_unit_is_passed_by() {
    let dropout = Dropout { layer: 0.999_999, ..Dropout::default() };
    let config = ModelConfig { dropout, feed_forward: GELU, ..small() };
    let mut model = model(&config);
    let seed = Some(DropoutSeed { seed: 1, step: 0, sequence: 0, first: 0 });
    let (inputs, targets) = (tokens(1, T), tokens(2, T));
    let loss = |model: &Transformer| {
        let mut state = model.new_state(B).unwrap();
        let (inputs, targets) = (inputs.view(), targets.view());
        model.loss_and_gradients_dropping(inputs, targets, None, &mut state, seed).unwrap().loss
    };
    let before = loss(&model);
    for parameter in model.parameters_mut() {
        if parameter.name.starts_with("layers.") && parameter.name.contains("w_out") {
            let mut value = parameter.value;
            value.fill(3.0);
        }
    }
    assert_eq!(loss(&model), before);
}
