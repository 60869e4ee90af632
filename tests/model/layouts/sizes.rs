//! What a configuration says of a model's sizes is what is there.

use transformer_vq::model::{Dropout, FeedForward, FeedForwardKind, ModelConfig, Transformer, UnitKind};

use super::{B, SWIGLU, VOCAB, layouts, model, small, tokens};

#[test]
fn the_state_grows_only_where_attention_is_exact() {
    for (name, config) in layouts() {
        let model = model(&config);
        let mut state = model.new_state(B).unwrap();
        let empty = state.size_in_bytes();
        model.push(tokens(5, 100).view(), &mut state).unwrap();
        let grows = (0..config.n_layers).any(|unit| config.unit(unit) == UnitKind::Quadratic);
        assert_eq!(state.size_in_bytes() > empty, grows, "{name}");
        for (unit, states) in state.layers().iter().enumerate() {
            let of_kind = config.unit(unit) == UnitKind::Quadratic;
            assert_eq!((states.quadratic().is_some(), states.quantized().is_none()), (of_kind, of_kind));
            assert_eq!(states.dim(), (B, config.key_heads()));
        }
        // A state of other kinds is refused and kept.
        let units =
            vec![if config.unit(0) == UnitKind::Quadratic { UnitKind::Vq } else { UnitKind::Quadratic }];
        let other = Transformer::new(ModelConfig { units, ..config }, 1).unwrap();
        let before = state.clone();
        let message = other.push(tokens(5, 3).view(), &mut state).unwrap_err().to_string();
        assert!(message.contains("`state`") && message.contains("in unit 0"), "{message}");
        assert_eq!(state, before);
    }
}

#[test]
fn parameters_are_as_many_as_said() {
    for (name, config) in layouts() {
        let model = Transformer::new(config.clone(), 1).unwrap();
        assert_eq!(model.parameters().len() as u128, config.n_parameters(), "{name}");
    }
}

#[test]
fn impossible_configurations_have_sizes_too() {
    let most = usize::MAX;
    let units = vec![UnitKind::Quadratic, UnitKind::Vq];
    let wide = ModelConfig { d_k: most, d_v: most, units: units.clone(), ..small() };
    assert_eq!(wide.state_bytes(1, u64::MAX, most), u128::MAX);
    assert_eq!(wide.operations_per_token(u64::MAX), u128::MAX);
    let mut window = ModelConfig { n_codes: most, ..small() };
    window.attention.window = most;
    assert!(window.state_bytes(1, 0, 4) > 1 << 64 && window.operations_per_token(0) > 1 << 64);
    // Units of which there are many are counted, not walked through.
    let deep = |n_layers| ModelConfig { n_layers, units: units.clone(), ..small() };
    let parts = |config: ModelConfig| {
        [config.n_parameters(), config.state_bytes(1, 10, 4), config.operations_per_token(10)]
    };
    let [two, three, five, many] = [2, 3, 5, most].map(|n_layers| parts(deep(n_layers)));
    for i in 0..3 {
        // A pair more adds as much every time, and 2^64 - 1 units are 2^63 - 2 pairs after the first three.
        let pair = five[i] - three[i];
        assert_eq!(parts(deep(4))[i] - two[i], pair);
        assert_eq!(many[i], three[i] + pair * ((most as u128 - 3) / 2));
    }
}

#[test]
fn states_and_operations_are_as_many_as_said() {
    for (name, config) in layouts() {
        let model = model(&config);
        let mut state = model.new_state(B).unwrap();
        for (position, t) in [(0, 0), (3, 3), (40, 37)] {
            if t > 0 {
                model.push(tokens(5, t).view(), &mut state).unwrap();
            }
            let (held, said) = (state.size_in_bytes() as u128, config.state_bytes(B, position, 4));
            let grows = (0..config.n_layers).any(|unit| config.unit(unit) == UnitKind::Quadratic);
            assert!(
                if grows { (said..=2 * said).contains(&held) } else { held == said },
                "{name}: {held}, {said}"
            );

            // Counted over the arrays that a token meets.
            let (h, k, v) = (config.n_heads, config.d_k, config.d_v);
            let mut products = config.d_model * VOCAB;
            for parameter in model.parameters().views() {
                let name = &parameter.name;
                if name.contains(".w_") && !name.contains("w_relative") {
                    products += parameter.value.len();
                }
            }
            for (unit, states) in state.layers().iter().enumerate() {
                products += h * (config.attention.window + 1) * k;
                if let Some(states) = states.quadratic() {
                    let seen = states[[0, 0]].keys().nrows() + 1;
                    products += h * seen * (k + v);
                } else {
                    let state = &states.quantized().unwrap()[[0, 0]];
                    let (window, codes) = (state.window_keys().codes.len(), state.cache().count().len());
                    let values = if config.unit(unit) == UnitKind::Vq { codes } else { 0 } + window + 1;
                    products += config.key_heads() * codes * k + h * ((codes + window) * k + values * v);
                }
            }
            assert_eq!(config.operations_per_token(position), 2 * products as u128, "{name} at {position}");
        }
    }
}

#[test]
fn named_models_have_the_sizes_that_the_paper_gives() {
    let named = [
        (ModelConfig::enwik8(), 190e6),
        (ModelConfig::pg19(), 1.3e9),
        (ModelConfig::imagenet64(), 1.2e9),
        (ModelConfig::tiny(), 0.56e6),
        (ModelConfig::laptop(), 4.3e6),
    ];
    for (config, about) in named {
        config.validate().unwrap();
        let n = config.n_parameters() as f64;
        assert!((0.95..1.05).contains(&(n / about)), "{n}");
        // 48 gated units of width D with K = 128 and V = 2 D have D (3 K + 3 V) weights each, with the sinusoids' matrix.
        if config.n_layers == 48 {
            let (d, v) = (config.d_model as f64, config.d_v as f64);
            assert!((48.0 * d * 3.0 * (128.0 + v) / n - 1.0).abs() < 0.06, "{n}");
        }
        let one_token = config.operations_per_token(1_000_000) as f64;
        assert!(one_token > 1.9 * n - 2.0 * (config.vocab_size * config.d_model) as f64);
        assert_eq!(config.operations_per_token(u64::MAX), config.operations_per_token(1_000_000));
        assert_eq!(config.state_bytes(2, 5, 4), config.state_bytes(2, u64::MAX, 4));
    }
    for (config, d_model) in [(ModelConfig::tiny(), 128), (ModelConfig::laptop(), 320)] {
        let model = Transformer::new(config.clone(), 1).unwrap();
        assert_eq!((model.parameters().len() as u128, config.d_model), (config.n_parameters(), d_model));
    }
}

#[test]
fn kinds_and_rates_are_checked() {
    let refused = |config: ModelConfig, what: &str| {
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(&format!("`{what}`")), "{message}");
    };
    refused(ModelConfig { units: vec![UnitKind::Vq; 4], ..small() }, "units");
    for n_key_heads in [0, 2, 4, 9] {
        refused(ModelConfig { n_heads: 3, n_key_heads: Some(n_key_heads), ..small() }, "n_key_heads");
    }
    let feed_forward = Some(FeedForward { kind: FeedForwardKind::Gelu, width: 0 });
    refused(ModelConfig { feed_forward, ..small() }, "feed_forward.width");
    for rate in [-0.1, 1.0, f64::NAN] {
        let none = Dropout::default();
        for (dropout, what) in [
            (Dropout { embedding: rate, ..none }, "dropout.embedding"),
            (Dropout { residual: rate, ..none }, "dropout.residual"),
            (Dropout { sinusoid: rate, ..none }, "dropout.sinusoid"),
            (Dropout { layer: rate, ..none }, "dropout.layer"),
        ] {
            refused(ModelConfig { dropout, ..small() }, what);
        }
    }
    let all = ModelConfig { units: vec![UnitKind::Quadratic, UnitKind::Vq], ..small() };
    assert_eq!(Vec::from_iter(all.codebook_units()), [1]);
    assert_eq!([0, 1, 2, 3].map(|unit| all.unit(unit)), [UnitKind::Quadratic, UnitKind::Vq].repeat(2)[..]);
}

/// What was drawn for a seed before there were layouts is drawn today.
#[test]
fn more_options_change_no_older_number() {
    let old = Transformer::new(small(), 3).unwrap();
    let new = Transformer::new(ModelConfig { feed_forward: SWIGLU, n_layers: 1, ..small() }, 3).unwrap();
    let (a, b) = (&old.parameters().layers[0], &new.parameters().layers[0]);
    assert_eq!((&a.w_q, &a.w_gate, &a.w_out), (&b.w_q, &b.w_gate, &b.w_out));
}
