//! The model, its configuration and state, generation.

use ndarray::{Array1, Array2, Array3, array};
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{CodeStats, Estimator, Rotation, RotationScale, Smoothing};
use transformer_vq::generate::{BatchGenerator, Generator, Sampler, Scorer, log_probabilities};
use transformer_vq::model::{
    CodebookStart, CodewordGradient, Encoder, EncoderConfig, LearningConfig, ModelConfig, ModelState,
    Revival, Transformer, UnitState, published,
};

use super::refused;

const VOCAB: usize = 7;

fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        d_model: 8,
        n_layers: 2,
        n_heads: 2,
        d_k: 4,
        d_v: 6,
        n_codes: 5,
        attention: VqAttention { block_len: 4, window: 3, ..VqAttention::default() },
        ..ModelConfig::default()
    }
}

fn model() -> Transformer {
    Transformer::new(small(), 1).unwrap()
}

#[test]
fn impossible_configurations_are_told_apart() {
    type Spoil = fn(&mut ModelConfig, usize);
    let sizes: [(&str, Spoil); 7] = [
        ("vocab_size", |c, n| c.vocab_size = n),
        ("d_model", |c, n| c.d_model = n),
        ("n_layers", |c, n| c.n_layers = n),
        ("n_heads", |c, n| c.n_heads = n),
        ("d_k", |c, n| c.d_k = n),
        ("d_v", |c, n| c.d_v = n),
        ("n_codes", |c, n| c.n_codes = n),
    ];
    let check = |config: ModelConfig, variant: &str, what: &str| {
        refused(config.validate(), variant, what);
        refused(Transformer::new(config, 1), variant, what);
    };
    for (what, spoil) in sizes {
        for n in [0, 1 << 32, usize::MAX] {
            let mut config = small();
            spoil(&mut config, n);
            check(config, "Invalid", what);
        }
    }
    type SpoilFloat = fn(&mut ModelConfig, f64);
    let floats: [(&str, SpoilFloat, &[f64]); 4] = [
        ("logit_scale", |c, x| c.logit_scale = x, &[]),
        ("position_lambda", |c, x| c.position_lambda = x, &[0.0, -1.0, 0.5]),
        ("commit_weight", |c, x| c.commit_weight = x, &[-1e-9]),
        ("codebook_decay", |c, x| c.codebook_decay = x, &[-0.1, 1.1]),
    ];
    for (what, spoil, more) in floats {
        for &x in super::BAD.iter().chain(more) {
            let mut config = small();
            spoil(&mut config, x);
            check(config, "Invalid", what);
        }
    }
    check(ModelConfig { d_model: 9, ..small() }, "Invalid", "d_model");
    let attention = |block_len, window| VqAttention { block_len, window, ..small().attention };
    check(ModelConfig { attention: attention(0, 3), ..small() }, "Invalid", "block_len");
    for attention in [attention(usize::MAX, 3), attention(4, usize::MAX), attention(1 << 31, 1)] {
        check(ModelConfig { attention, ..small() }, "Invalid", "block_len + window");
    }
    // Each size is possible, their product is not.
    let most = u32::MAX as usize;
    check(ModelConfig { vocab_size: most, d_model: most - 1, ..small() }, "TooLarge", "embedding");
    check(ModelConfig { n_heads: most, d_v: most, ..small() }, "TooLarge", "projections");
    check(
        ModelConfig { n_layers: 1 << 20, n_heads: 1 << 20, n_codes: 1 << 30, ..small() },
        "TooLarge",
        "codebooks",
    );
    let attention = attention(4, 1 << 30);
    check(ModelConfig { attention, n_layers: 1 << 20, n_heads: 1 << 20, ..small() }, "TooLarge", "windows");
}

#[test]
fn impossible_learning_and_estimators_are_refused() {
    let by = |codebook_weight| CodewordGradient { codebook_weight, from_attention: false };
    let linear =
        |d_basis, gradient| LearningConfig::Linear { d_basis, learned_basis: false, bias: false, gradient };
    let with = |learning| ModelConfig { learning, ..small() }.validate();
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        refused(with(LearningConfig::Gradient(by(bad))), "Invalid", "codebook_weight");
        refused(with(linear(4, by(bad))), "Invalid", "codebook_weight");
        let smoothing = Smoothing::Laplace { epsilon: bad };
        refused(with(LearningConfig::Ema { smoothing }), "Invalid", "epsilon");
        let scale = RotationScale::AtMost(bad);
        let estimator = Estimator::Rotation(Rotation { scale, ..Rotation::default() });
        refused(ModelConfig { estimator, ..small() }.validate(), "Invalid", "scale");
    }
    refused(with(linear(0, by(1.0))), "Invalid", "d_basis");
    let start = CodebookStart::KMeans { steps: 1 };
    refused(ModelConfig { start, learning: linear(4, by(1.0)), ..small() }.validate(), "Invalid", "start");
    let revived = |ratio, every| ModelConfig { revival: Some(Revival { ratio, every }), ..small() };
    for bad in [f64::NAN, 1.0, -0.1] {
        refused(revived(bad, 1).validate(), "Invalid", "revival.ratio");
    }
    refused(revived(0.1, 0).validate(), "Invalid", "revival.every");
    let frozen = ModelConfig { learning: LearningConfig::Frozen, ..revived(0.1, 1) };
    refused(frozen.validate(), "Invalid", "revival");
    let huge = LearningConfig::Linear {
        d_basis: u32::MAX as usize,
        learned_basis: true,
        bias: true,
        gradient: by(1.0),
    };
    let huge = ModelConfig { learning: huge, n_codes: u32::MAX as usize, d_k: 1, d_v: 1, ..small() };
    refused(huge.validate(), "TooLarge", "bases");
    assert!(huge.n_parameters() > 1 << 60);
}

#[test]
fn learning_that_the_configuration_does_not_have_is_refused() {
    let gradient = CodewordGradient { codebook_weight: 1.0, from_attention: false };
    let linear = |learned_basis| LearningConfig::Linear { d_basis: 4, learned_basis, bias: false, gradient };
    let laplace = LearningConfig::Ema { smoothing: Smoothing::Laplace { epsilon: 1e-5 } };
    let kinds = [
        LearningConfig::default(),
        laplace,
        LearningConfig::Gradient(gradient),
        linear(false),
        linear(true),
        LearningConfig::Frozen,
    ];
    let models = kinds.map(|learning| Transformer::new(ModelConfig { learning, ..small() }, 1).unwrap());
    for (i, model) in models.iter().enumerate() {
        for (j, other) in models.iter().enumerate() {
            let (config, parameters) = (model.config().clone(), model.parameters().clone());
            let result = Transformer::from_parts(config, parameters, other.learning().to_vec());
            if i == j {
                assert_eq!(&result.unwrap(), model);
            } else {
                refused(result, "Invalid", "codebooks");
            }
        }
        // The published names hold one kind.
        let tensors = published::to_tensors(model);
        let gradients = published::parameters_to_tensors(model.config(), model.parameters());
        if i == 0 {
            assert_eq!(&published::from_tensors(model.config().clone(), tensors.unwrap()).unwrap(), model);
            gradients.unwrap();
        } else {
            refused(tensors, "Invalid", "learning");
            refused(gradients, "Invalid", "learning");
            refused(
                published::from_tensors::<f32>(model.config().clone(), Default::default()),
                "Invalid",
                "learning",
            );
        }
    }
    // A basis of another size.
    let wide = LearningConfig::Linear { d_basis: 5, learned_basis: false, bias: false, gradient };
    let wide = Transformer::new(ModelConfig { learning: wide, ..small() }, 1).unwrap();
    let (config, parameters) = (models[3].config().clone(), models[3].parameters().clone());
    refused(Transformer::from_parts(config, parameters, wide.learning().to_vec()), "Shape", "weight");
}

#[test]
fn parts_of_another_model_are_refused() {
    let from_parts = |config, parameters, codebooks| Transformer::from_parts(config, parameters, codebooks);
    let (parameters, codebooks) = (model().parameters().clone(), model().learning().to_vec());
    assert_eq!(from_parts(small(), parameters.clone(), codebooks.clone()), Ok(model()));
    for config in [
        ModelConfig { d_model: 10, ..small() },
        ModelConfig { n_layers: 3, ..small() },
        ModelConfig { vocab_size: 8, ..small() },
        ModelConfig { tied_embedding: true, ..small() },
        ModelConfig { absolute_positions: true, ..small() },
        ModelConfig { final_norm: false, ..small() },
    ] {
        refused(from_parts(config, parameters.clone(), codebooks.clone()), "Shape", "parameters");
    }
    // As many arrays, but others.
    let other = ModelConfig { tied_embedding: true, absolute_positions: true, ..small() };
    refused(from_parts(other, parameters.clone(), codebooks.clone()), "Invalid", "parameters");
    let other = ModelConfig { codebook_decay: 0.5, ..small() };
    refused(from_parts(other, parameters.clone(), codebooks.clone()), "Invalid", "codebooks");
    refused(
        from_parts(ModelConfig { n_layers: 0, ..small() }, parameters.clone(), vec![]),
        "Invalid",
        "n_layers",
    );
    refused(from_parts(small(), parameters.clone(), codebooks[..1].to_vec()), "Shape", "codebooks");
    let other = ModelConfig { n_codes: 6, ..small() };
    refused(from_parts(other, parameters, codebooks), "Shape", "codebooks");
}

#[test]
fn arrays_under_other_names_are_refused() {
    let gradient = CodewordGradient { codebook_weight: 1.0, from_attention: false };
    let config = ModelConfig { learning: LearningConfig::Gradient(gradient), ..small() };
    let model = Transformer::new(config, 1).unwrap();
    let mut state = model.new_state(1).unwrap();
    let (logits, _, saved) = model.forward(array![[1, 2]].view(), None, &mut state).unwrap();
    let mut gradients = model.zero_gradients();
    let codebook = &mut gradients.layers[0].codebook;
    codebook.basis = codebook.codewords.take();
    let before = gradients.clone();
    refused(model.backward(saved, logits, &mut gradients), "Invalid", "gradients");
    assert_eq!(gradients, before);

    // What is written under published names belongs to the configuration.
    let (config, mut parameters) = (small(), self::model().parameters().clone());
    parameters.layers[0].w_k = Array2::zeros((4, 8));
    refused(published::parameters_to_tensors(&config, &parameters), "Shape", "parameters");
    let fewer = ModelConfig { n_layers: 1, ..small() };
    refused(published::parameters_to_tensors(&fewer, self::model().parameters()), "Shape", "parameters");
}

/// Each array could be addressed, but no machine has the memory: an allocation that fails would end the process.
#[test]
fn models_larger_than_memory_are_refused() {
    let config = ModelConfig { d_model: 1 << 24, d_k: 1 << 24, n_heads: 1, ..small() };
    config.validate().unwrap();
    refused(Transformer::new(config.clone(), 1), "TooLarge", "parameters");
    let parts = (model().parameters().clone(), model().learning().to_vec());
    refused(Transformer::from_parts(config.clone(), parts.0, parts.1), "TooLarge", "parameters");
    let published = ModelConfig { learning: LearningConfig::default(), ..config };
    refused(published::from_tensors::<f32>(published, Default::default()), "TooLarge", "parameters");
    let encoder = EncoderConfig { d_model: 1 << 24, d_k: 1 << 24, n_heads: 1, ..EncoderConfig::default() };
    encoder.validate().unwrap();
    refused(Encoder::new(encoder, 1), "TooLarge", "parameters");
}

#[test]
fn states_are_checked() {
    let model = model();
    refused(model.new_state(0), "Empty", "batch");
    refused(model.new_state(usize::MAX), "TooLarge", "states");
    refused(model.new_state(1 << 58), "TooLarge", "states");
    refused(ModelState::<f32>::from_parts(vec![]), "Empty", "states");
    refused(
        ModelState::<f32>::from_parts(vec![UnitState::Quantized(
            Array2::from_shape_vec((0, 2), vec![]).unwrap(),
        )]),
        "Empty",
        "states",
    );
    let mut moved = model.new_state(1).unwrap();
    model.push(array![[1, 2]].view(), &mut moved).unwrap();
    let layers = vec![model.new_state(1).unwrap().layers()[0].clone(), moved.layers()[1].clone()];
    refused(ModelState::from_parts(layers), "Invalid", "position of a state");
    assert_eq!(ModelState::from_parts(moved.layers().to_vec()), Ok(moved));

    // States of another batch, number of units, heads, codes, widths or window.
    let of = |config| Transformer::new(config, 1).unwrap().new_state(1).unwrap();
    let attention = VqAttention { window: 4, ..small().attention };
    for (state, what) in [
        (model.new_state(2).unwrap(), "state"),
        (of(ModelConfig { n_layers: 1, ..small() }), "state"),
        (of(ModelConfig { n_heads: 1, ..small() }), "state"),
        (of(ModelConfig { n_codes: 6, ..small() }), "state.mean"),
        (of(ModelConfig { d_v: 5, ..small() }), "state.mean"),
        (of(ModelConfig { d_k: 5, ..small() }), "state.k_hat"),
        (of(ModelConfig { attention, ..small() }), "state.k_hat"),
    ] {
        let mut used = state.clone();
        refused(model.forward(array![[1, 2]].view(), None, &mut used), "Shape", what);
        refused(model.push(array![[1, 2]].view(), &mut used), "Shape", what);
        assert_eq!(used, state);
    }
}

#[test]
fn batches_are_checked_and_the_state_is_kept() {
    let model = model();
    let mut state = model.new_state(2).unwrap();
    model.push(array![[1, 2, 3], [4, 5, 6]].view(), &mut state).unwrap();
    let before = state.clone();
    let good = array![[0, 1, 2], [6, 5, 4]];
    let mut bad = good.clone();
    bad[[1, 2]] = VOCAB as u32;
    let other = Array2::<u32>::zeros((2, 4));
    let mask = |dim| Array2::from_elem(dim, true);

    refused(model.push(bad.view(), &mut state), "OutOfRange", "tokens");
    refused(model.forward(bad.view(), None, &mut state), "OutOfRange", "tokens");
    refused(model.forward(good.view(), Some(mask((3, 2)).view()), &mut state), "Shape", "mask");
    refused(model.push(Array2::zeros((0, 3)).view(), &mut state), "Shape", "state");
    let mut losses =
        |tokens: &Array2<u32>, targets: &Array2<u32>, mask: Option<Array2<bool>>, variant, what| {
            let mask = mask.as_ref().map(|mask| mask.view());
            refused(model.loss_and_gradients(tokens.view(), targets.view(), mask, &mut state), variant, what);
        };
    losses(&bad, &good, None, "OutOfRange", "tokens");
    losses(&good, &bad, None, "OutOfRange", "targets");
    losses(&good, &bad, Some(mask((2, 3))), "OutOfRange", "targets");
    losses(&good, &other, None, "Shape", "targets");
    losses(&good, &good, Some(mask((2, 4))), "Shape", "mask");
    losses(&Array2::zeros((2, 0)), &Array2::zeros((2, 0)), None, "Empty", "tokens");
    losses(&Array2::zeros((0, 0)), &Array2::zeros((0, 0)), None, "Empty", "tokens");
    assert_eq!(state, before);

    let (logits, _, saved) = model.forward(good.view(), None, &mut state).unwrap();
    let mut gradients = model.zero_gradients();
    let wrong = Array3::zeros((2, 3, VOCAB + 1));
    refused(model.backward(saved.clone(), wrong, &mut gradients), "Shape", "d_logits");
    let config = ModelConfig { n_layers: 1, ..small() };
    let other = Transformer::new(config, 1).unwrap();
    refused(model.backward(saved.clone(), logits.clone(), &mut other.zero_gradients()), "Shape", "gradients");
    refused(other.backward(saved.clone(), logits.clone(), &mut other.zero_gradients()), "Invalid", "saved");
    assert_eq!(gradients, model.zero_gradients());
    assert!(model.backward(saved, logits, &mut gradients).is_ok());
    // No token is a piece too.
    let nothing = model.push(Array2::zeros((2, 0)).view(), &mut state).unwrap();
    assert_eq!((nothing.dim(), state.position()), ((2, 0, VOCAB), 6));
}

#[test]
fn codebooks_learn_only_from_their_own_statistics() {
    let mut model = model();
    let stats = |n_codes| CodeStats::zeros(2, n_codes, 4).unwrap();
    refused(model.update_codebooks(&[stats(5)]), "Shape", "stats");
    refused(model.update_codebooks(&[stats(6), stats(5)]), "Shape", "stats");
    assert_eq!(model, self::model());
}

#[test]
fn generation_is_checked_and_keeps_its_place() {
    let model = model();
    for (sampler, what) in [
        (Sampler { temperature: f64::NAN, ..Sampler::default() }, "temperature"),
        (Sampler { temperature: -1.0, ..Sampler::default() }, "temperature"),
        (Sampler { top_k: Some(0), ..Sampler::default() }, "top_k"),
        (Sampler { top_p: Some(0.0), ..Sampler::default() }, "top_p"),
        (Sampler { top_p: Some(1.1), ..Sampler::default() }, "top_p"),
    ] {
        refused(Generator::new(&model, sampler, 1), "Invalid", what);
    }
    let mut generator = Generator::new(&model, Sampler::default(), 1).unwrap();
    refused(generator.next_token(), "Empty", "prompt");
    generator.read(Array1::zeros(0).view()).unwrap();
    refused(generator.next_token(), "Empty", "prompt");
    // Beyond the first piece of the prompt, so that none of it may be read.
    let mut prompt = Array1::zeros(3000);
    prompt[2999] = VOCAB as u32;
    refused(generator.read(prompt.view()), "OutOfRange", "tokens");
    assert_eq!(generator.state().position(), 0);

    let mut broken = model.clone();
    broken.parameters_mut().last_mut().unwrap().value.fill(f32::NAN);
    let mut generator = Generator::new(&broken, Sampler::default(), 1).unwrap();
    generator.read(array![1].view()).unwrap();
    refused(generator.next_token(), "NotFinite", "logits");
    assert_eq!(generator.state().position(), 1);

    let mut streams = BatchGenerator::new(&model, Sampler::default(), &[1, 2]).unwrap();
    refused(streams.next_tokens(), "Empty", "prompt");
    refused(streams.read(Array2::zeros((3, 1)).view()), "Shape", "tokens");
    let mut prompts = Array2::zeros((2, 3000));
    prompts[[1, 2999]] = VOCAB as u32;
    refused(streams.read(prompts.view()), "OutOfRange", "tokens");
    assert_eq!(streams.state().position(), 0);
    refused(BatchGenerator::new(&model, Sampler::default(), &[]), "Empty", "seeds");
    refused(
        BatchGenerator::new(&model, Sampler { top_k: Some(0), ..Sampler::default() }, &[1]),
        "Invalid",
        "top_k",
    );
    let mut generator = Generator::new(&model, Sampler::default(), 1).unwrap();
    refused(generator.branch(&[1]), "Empty", "prompt");
    generator.read(array![1].view()).unwrap();
    refused(generator.branch(&[]), "Empty", "seeds");

    let mut scorer = Scorer::new(&model).unwrap();
    let (good, bad) = (array![1, 2], array![1, VOCAB as u32]);
    refused(scorer.push(good.view(), array![1].view()), "Shape", "targets");
    refused(scorer.push(good.view(), bad.view()), "OutOfRange", "targets");
    refused(scorer.push(bad.view(), good.view()), "OutOfRange", "tokens");
    assert_eq!((scorer.tokens(), scorer.nats_per_token(), scorer.cached_mass()), (0, 0.0, 0.0));
    assert_eq!(scorer.push(Array1::zeros(0).view(), Array1::zeros(0).view()).unwrap().len(), 0);

    refused(log_probabilities(&model, Array1::zeros(0).view(), 4), "Empty", "text");
    refused(log_probabilities(&model, good.view(), 0), "Invalid", "piece_len");
    refused(log_probabilities(&model, array![1, 9, 1].view(), 4), "OutOfRange", "text");
    refused(log_probabilities(&model, array![9, 1, 1].view(), 4), "OutOfRange", "text");
    refused(log_probabilities(&model, array![9].view(), 4), "OutOfRange", "text");
}
