//! Several sequences at once are each what it would be alone.

use transformer_vq::attention::VqAttention;
use transformer_vq::generate::{BatchGenerator, Generator, Sampler};
use transformer_vq::model::{ModelConfig, Transformer, UnitKind};
use transformer_vq::ndarray::{Array2, Axis};

const SEEDS: [u64; 3] = [9, 4, 9];
const TOKENS: usize = 40;

/// A model whose draws differ, quantized and exact units in it.
fn model() -> Transformer<f64> {
    let config = ModelConfig {
        vocab_size: 13,
        d_model: 12,
        n_layers: 2,
        n_heads: 2,
        d_k: 4,
        d_v: 6,
        n_codes: 5,
        units: vec![UnitKind::Vq, UnitKind::Quadratic],
        attention: VqAttention { block_len: 4, window: 5, ..VqAttention::default() },
        ..ModelConfig::default()
    };
    Transformer::new(config, 3).unwrap().cast()
}

fn written(generator: &mut Generator<'_, f64>) -> Vec<u32> {
    (0..TOKENS).map(|_| generator.next_token().unwrap()).collect()
}

fn written_by_all(streams: &mut BatchGenerator<'_, f64>) -> Vec<Vec<u32>> {
    let mut texts = vec![vec![]; SEEDS.len()];
    for _ in 0..TOKENS {
        let tokens = streams.next_tokens().unwrap();
        texts.iter_mut().zip(tokens).for_each(|(text, token)| text.push(token));
    }
    texts
}

#[test]
fn streams_side_by_side_write_what_each_would_alone() {
    let (model, sampler) = (model(), Sampler { temperature: 0.9, top_k: Some(9), top_p: Some(0.95) });
    let prompts = Array2::from_shape_fn((3, 17), |(b, t)| ((b * 5 + t * t) % 13) as u32);
    let mut streams = BatchGenerator::new(&model, sampler, &SEEDS).unwrap();
    streams.read(prompts.view()).unwrap();
    let texts = written_by_all(&mut streams);
    assert_eq!(streams.state().position(), (17 + TOKENS) as u64);
    for (b, seed) in SEEDS.into_iter().enumerate() {
        let mut alone = Generator::new(&model, sampler, seed).unwrap();
        alone.read(prompts.index_axis(Axis(0), b)).unwrap();
        assert_eq!(texts[b], written(&mut alone), "stream {b}");
    }
    assert!(texts[0] != texts[1] && texts[0] != texts[2], "prompts and seeds matter");
}

#[test]
fn branches_go_on_from_one_prompt_and_leave_it_as_it_was() {
    let (model, sampler) = (model(), Sampler::default());
    let prompt = Array2::from_shape_fn((1, 11), |(_, t)| (t * 7 % 13) as u32);
    let mut trunk = Generator::new(&model, sampler, SEEDS[0]).unwrap();
    trunk.read(prompt.row(0)).unwrap();
    let texts = written_by_all(&mut trunk.branch(&SEEDS).unwrap());
    assert_eq!(texts[0], texts[2], "the same seed");
    assert_ne!(texts[0], texts[1]);
    assert_eq!(texts[0], written(&mut trunk), "nothing was drawn from the trunk");
}
