//! Training on short texts, for long ones.
//!
//! Every sequence has its own facts. Each step learns from two batches, one after the other:
//!
//! ```text
//! near   64 sequences of 64 bytes about few names: a name and its fact share a block, where gradients reach keys
//! far    4 sequences of 1,024 bytes about many, from an empty state; every second time, how they go on, after a longer past
//! ```
//!
//! What a state knows of the past is a count and a mean value per code. With all counts multiplied by n it is the state after a
//! text that said everything n times: the past is n times as long, at no cost. So queries learn to find one key among ten millions,
//! from texts of 2,048 bytes.

use std::f64::consts::LN_2;
use std::ops::Range;

use indicatif::ProgressBar;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::{AttentionState, CompressiveCache, VqAttention};
use transformer_vq::model::{ModelConfig, ModelState, Revival, Transformer, UnitKind, UnitState};
use transformer_vq::ndarray::Array2;
use transformer_vq::train::{AdamW, Gradients, Schedule, Trainer};

use crate::text::{N_NAMES, Text, Written};

/// How unequal names are.
pub const POWER: f64 = 1.5;
/// A step takes about as long as reading so many bytes.
pub const STEP_COST: u64 = 40_000;

/// Near sequences of a step, their bytes, and the names in each.
const NEAR: usize = 64;
const NEAR_LEN: usize = 64;
const NEAR_NAMES: usize = 6;
/// Far sequences, and the bytes of each of their halves.
const FAR: usize = 4;
const FAR_LEN: usize = 1024;
/// Names that the second half of a far sequence adds.
const LATE_NAMES: usize = 48;
/// How many times a past is made longer, at most.
const LONGER: f64 = 1e4;
/// The part of the steps before pasts are made longer, in which the second unit's queries and keys are one projection.
const BEGINNING: f64 = 0.2;

/// Wide keys tell one name from millions of other bytes: a query and its own key have a score of up to sqrt(K). The first unit
/// sees a window: there a name meets the digit before it. No gate: with one, so few steps do not learn the task.
pub fn config(short: bool) -> ModelConfig {
    ModelConfig {
        d_model: 128,
        n_layers: 2,
        d_k: if short { 32 } else { 512 },
        d_v: 128,
        n_codes: 256,
        gate: false,
        units: vec![UnitKind::Window, UnitKind::Vq],
        attention: VqAttention { block_len: 64, window: 8, ..VqAttention::default() },
        commit_weight: 0.03,
        codebook_decay: 0.95,
        revival: Some(Revival { ratio: 0.1, every: 5 }),
        ..ModelConfig::default()
    }
}

/// A model that has learned for so many steps.
pub fn train(config: ModelConfig, steps: u64, seed: u64, bar: &ProgressBar) -> Result<Transformer, Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut model = Transformer::new(config, seed)?;
    // The second unit's queries and keys begin as one projection: then a name finds itself.
    let w_k = model.parameters().layers[1].w_k.clone().into_dyn();
    for mut w_q in model.parameters_mut().into_iter().filter(|parameter| parameter.name == "layers.1.w_q") {
        w_q.value.assign(&w_k);
    }
    let mut texts = vec![far_text(&mut rng)];
    model.start_codebooks(tokens(&texts, 0, FAR_LEN).view(), 10, seed)?;
    let mut state = model.new_state(FAR)?;
    let optimizer = AdamW { learning_rate: 1e-2, clip: Some(1.0), ..AdamW::default() };
    let mut trainer = Trainer::new(model, optimizer)?;
    let schedule = Schedule::new(0.1, 0.1)?;
    for step in 0..steps {
        let beginning = (step as f64) < BEGINNING * steps as f64;
        let factor = schedule.factor_at_step(step, steps);
        let near = Vec::from_iter((0..NEAR).map(|_| near_text(&mut rng)));
        let mut empty = trainer.model().new_state(NEAR)?;
        learn(&mut trainer, &near, 0..NEAR_LEN, &mut empty, beginning, factor)?;
        let from = if step % 2 == 0 { 0 } else { FAR_LEN };
        if from == 0 {
            texts = Vec::from_iter((0..FAR).map(|_| far_text(&mut rng)));
            state = trainer.model().new_state(FAR)?;
        } else if !beginning {
            state = longer(&state, rng.random_range(0.0..LONGER.ln()).exp() as u64)?;
        }
        let loss = learn(&mut trainer, &texts, from..from + FAR_LEN, &mut state, beginning, factor)?;
        bar.inc(STEP_COST);
        bar.set_message(format!("learning: {:.3} bits per byte", loss / LN_2));
    }
    Ok(trainer.into_model())
}

/// One step on these bytes of the texts; the loss.
fn learn(
    trainer: &mut Trainer,
    texts: &[Vec<u8>],
    bytes: Range<usize>,
    state: &mut ModelState<f32>,
    one_projection: bool,
    factor: f64,
) -> Result<f64, Error> {
    let (tokens, targets) =
        (tokens(texts, bytes.start, bytes.len()), tokens(texts, bytes.start + 1, bytes.len()));
    let mut gradients = Gradients::collect(trainer.model(), tokens.view(), targets.view(), None, state)?;
    if one_projection {
        let unit = &mut gradients.parameters.layers[1];
        unit.w_q += &unit.w_k;
        unit.w_k.assign(&unit.w_q);
    }
    Ok(trainer.apply(gradients, factor)?.loss)
}

/// The state after a text that said everything `factor` times.
fn longer(state: &ModelState<f32>, factor: u64) -> Result<ModelState<f32>, Error> {
    let of_head = |state: &AttentionState<f32>| {
        let (cache, keys) = (state.cache(), state.window_keys());
        let counts = cache.count().mapv(|n| n * factor);
        let position = counts.sum() + keys.codes.len() as u64;
        let cache =
            CompressiveCache::from_parts(cache.mean().to_owned(), cache.residual().to_owned(), counts)?;
        AttentionState::from_parts(position, state.window(), cache, &keys)
    };
    let of_unit = |unit: &UnitState<f32>| {
        let states = unit.quantized().expect("no unit is exact");
        let longer = states.iter().map(of_head).collect::<Result<Vec<_>, Error>>()?;
        Ok(UnitState::from(Array2::from_shape_vec(states.dim(), longer).expect("one for one")))
    };
    ModelState::from_parts(state.layers().iter().map(of_unit).collect::<Result<Vec<_>, Error>>()?)
}

/// So many bytes of each text [texts, len].
fn tokens(texts: &[Vec<u8>], from: usize, len: usize) -> Array2<u32> {
    Array2::from_shape_fn((texts.len(), len), |(b, t)| u32::from(texts[b][from + t]))
}

/// A text about few names, all as frequent.
fn near_text(rng: &mut ChaCha8Rng) -> Vec<u8> {
    let (mut text, _) = Text::new(NEAR_NAMES, 0.0, ChaCha8Rng::seed_from_u64(rng.random()));
    let mut written = Written::default();
    while written.bytes.len() <= NEAR_LEN {
        text.line(&mut written);
    }
    written.bytes
}

/// A text about few names or many; in its second half, every other line is about names that are new there.
fn far_text(rng: &mut ChaCha8Rng) -> Vec<u8> {
    let n_names = rng.random_range(16..=N_NAMES - LATE_NAMES);
    let (mut text, late) = Text::new(n_names, POWER, ChaCha8Rng::seed_from_u64(rng.random()));
    let mut written = Written::default();
    while written.bytes.len() <= 2 * FAR_LEN {
        if written.bytes.len() < FAR_LEN || rng.random() {
            text.line(&mut written);
        } else {
            text.about(late[rng.random_range(0..LATE_NAMES)], &mut written);
        }
    }
    written.bytes
}
