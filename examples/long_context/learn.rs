//! Training on short texts: every sequence has its own facts.

use indicatif::ProgressBar;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::VqAttention;
use transformer_vq::model::{CodebookStart, ModelConfig, Revival, Transformer};
use transformer_vq::ndarray::Array2;
use transformer_vq::train::{AdamW, Batch, Schedule, Trainer};

use crate::text::{N_NAMES, Text, Written};

/// Bytes of a training sequence: two steps, with state carried from the first to the second.
pub const SEQUENCE_LEN: usize = 2 * UPDATE_LEN;
const UPDATE_LEN: usize = 1024;
/// A step takes about as long as reading so many bytes.
pub const STEP_COST: u64 = 8_000;
/// Sequences side by side.
const BATCH: usize = 4;
/// How unequal names are.
pub const POWER: f64 = 1.0;

/// Wide keys tell one name from half a million other bytes: a query and its own key have a score of up to sqrt(K).
pub fn config(short: bool) -> ModelConfig {
    ModelConfig {
        d_model: 96,
        n_layers: 2,
        d_k: if short { 32 } else { 256 },
        d_v: 96,
        n_codes: 256,
        attention: VqAttention { block_len: 64, window: 16, ..VqAttention::default() },
        commit_weight: 1e-3,
        codebook_decay: 0.95,
        start: CodebookStart::KMeans { steps: 10 },
        revival: Some(Revival { ratio: 0.1, every: 5 }),
        ..ModelConfig::default()
    }
}

/// A model that has learned for so many steps.
pub fn train(config: ModelConfig, steps: u64, seed: u64, bar: &ProgressBar) -> Result<Transformer, Error> {
    let mut model = Transformer::new(config, seed)?;
    // The second unit's queries and keys begin with one projection: then a name finds itself from the beginning.
    let w_k = model.parameters().layers[1].w_k.clone().into_dyn();
    for parameter in model.parameters_mut() {
        if parameter.name == "layers.1.w_q" {
            parameter
                .value
                .into_slice()
                .expect("contiguous")
                .copy_from_slice(w_k.as_slice().expect("contiguous"));
        }
    }
    let optimizer = AdamW { learning_rate: 3e-3, clip: Some(1.0), ..AdamW::default() };
    let mut trainer = Trainer::new(model, optimizer)?;
    let schedule = Schedule::new(0.1, 0.1)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sequences = vec![];
    for step in 0..steps {
        let part = step as usize % (SEQUENCE_LEN / UPDATE_LEN);
        if part == 0 {
            sequences = Vec::from_iter((0..BATCH).map(|_| sequence(&mut rng)));
        }
        let read = |later: usize| {
            let from = part * UPDATE_LEN + later;
            Array2::from_shape_fn((BATCH, UPDATE_LEN), |(b, t)| u32::from(sequences[b][from + t]))
        };
        let batch = Batch { tokens: read(0), targets: read(1), first: part == 0 };
        let report = trainer.step(&batch, schedule.factor_at_step(step, steps))?;
        bar.inc(STEP_COST);
        bar.set_message(format!("learning: {:.3} bits per byte", report.loss / std::f64::consts::LN_2));
    }
    Ok(trainer.into_model())
}

/// A text about few names or many.
fn sequence(rng: &mut ChaCha8Rng) -> Vec<u8> {
    let n_names = rng.random_range(16..=N_NAMES);
    let (mut text, _) = Text::new(n_names, POWER, ChaCha8Rng::seed_from_u64(rng.random()));
    let mut written = Written::default();
    while written.bytes.len() <= SEQUENCE_LEN {
        text.line(&mut written);
    }
    written.bytes
}
