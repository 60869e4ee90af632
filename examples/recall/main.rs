//! Recall at a distance: what one state of constant size can be asked about.
//!
//! A sequence shows pairs of a value and a key, pauses for longer than window and block together, and asks for the value of one
//! key after the other (see `task.rs`). The same model of two units (see `model.rs`) learns this with five kinds of attention
//! in its second unit: through a codebook with the compressive cache and without it, exact (quadratic), and linear attention
//! without softmax at the same width of keys and at the same bytes of state as the largest codebook. Three seeds each.
//!
//! Prints a table, and writes it (`table.md`) and a picture (`recall.svg`) into `--out`. About six minutes on two cores; what
//! comes out depends on seeds and steps alone.
//!
//! ```sh
//! cargo run --release --example recall
//! cargo run --release --example recall -- --pairs 64 --codes 64,256 --seeds 1
//! ```

#[path = "../support/adam.rs"]
mod adam;
mod attention;
#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
mod linear;
mod model;
#[path = "../support/options.rs"]
mod options;
#[path = "../support/out.rs"]
mod out;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/statistics.rs"]
mod statistics;
mod table;
mod task;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use model::{Kind, Model};
use options::{distinct, within};
use out::Folder;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use say::say;
use table::Row;
use task::Task;
use transformer_vq::attention::{AttentionState, VqAttention};

/// Of the second unit.
const ATTENTION: VqAttention =
    VqAttention { block_len: 32, window: 16, cache: true, gradient_through_cache: true };
/// More than block and window of both units together.
const PAUSE: usize = 96;
/// Sequences of a step.
const BATCH: usize = 8;
/// Pairs and sequences of the short ones: pairs and questions are within one block, where gradients reach keys.
const NEAR_PAIRS: usize = 8;
const NEAR_BATCH: usize = 32;
/// Sequences that are asked after training.
const JUDGED: usize = 64;
const RATE: f32 = 3e-3;
/// The part of the steps in which the rate rises.
const WARMUP: f32 = 0.1;

/// Recall at a distance, with five kinds of attention.
#[derive(Debug, Parser)]
#[command(name = "recall")]
struct Args {
    /// Pairs of a sequence
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "16,64,256")]
    #[arg(default_value_if("short", "true", "8"), value_parser = within(1..=4096))]
    pairs: Vec<usize>,

    /// Codes
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "64,128,256,512")]
    #[arg(default_value_if("short", "true", "32"), value_parser = within(1..=65536))]
    codes: Vec<usize>,

    /// Seeds of weights and sequences
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3")]
    #[arg(default_value_if("short", "true", "1"))]
    seeds: Vec<u64>,

    /// Steps of training, each after one on short sequences
    #[arg(long, value_name = "N", default_value_t = 120, default_value_if("short", "true", "4"))]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,

    /// Few steps with few pairs unless asked for: whether everything runs, not how well
    #[arg(long)]
    short: bool,

    /// Folder for the table and the picture
    #[arg(long, value_name = "DIR", default_value = "runs/recall")]
    out: PathBuf,
}

/// One model to train.
#[derive(Debug, Clone, Copy)]
struct Run {
    n_pairs: usize,
    kind: Kind,
    /// Whose bytes linear attention gets.
    codes_of_state: Option<usize>,
    seed: u64,
}

/// What came of it.
struct Outcome {
    run: Run,
    accuracy: f64,
    /// Of its state, if that is constant.
    bytes: Option<usize>,
    /// Share of codes in use, and relative squared error of quantized keys.
    codebook: Option<(f64, f64)>,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let (output, gradients) = linear::check()?;
    if output > 1e-13 || gradients > 1e-8 {
        return Err(format!("linear attention is wrong: {output:e}, gradients {gradients:e}").into());
    }
    let runs = runs(args)?;
    let folder = Folder::create(&args.out)?;
    let threads = rayon::current_num_threads();
    say(format!("{} models, {} steps each, {threads} threads\n", runs.len(), args.steps));
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}  {eta} left")?;
    let cost = runs.iter().map(|run| run.cost()).sum::<u64>().saturating_mul(args.steps);
    let bar = ProgressBar::new(cost).with_style(style);
    let outcomes = runs
        .into_par_iter()
        .map(|run| train(run, args.steps, &bar))
        .collect::<Result<Vec<_>, transformer_vq::Error>>()?;
    bar.finish_and_clear();
    table::write(&Row::all(&outcomes), args.steps, &folder)
}

/// Everything that is to be compared.
fn runs(args: &Args) -> Result<Vec<Run>, Box<dyn Error>> {
    distinct("--pairs", &args.pairs)?;
    distinct("--codes", &args.codes)?;
    distinct("--seeds", &args.seeds)?;
    let mut runs = vec![];
    for &n_pairs in &args.pairs {
        let mut add = |kind, codes_of_state| {
            runs.extend(args.seeds.iter().map(|&seed| Run { n_pairs, kind, codes_of_state, seed }));
        };
        for &n_codes in &args.codes {
            add(Kind::Vq { n_codes, cache: true }, None);
        }
        // Without codes of its own, one of each: the largest state.
        if let Some(&n_codes) = args.codes.iter().max() {
            add(Kind::Vq { n_codes, cache: false }, None);
            let state = AttentionState::<f32>::new(n_codes, model::D_K, model::WIDTH, ATTENTION.window)?;
            let d_k = (state.size_in_bytes() / model::linear_bytes(1)).max(1);
            add(Kind::Linear { d_k }, Some(n_codes));
        }
        add(Kind::Quadratic, None);
        add(Kind::Linear { d_k: model::D_K }, None);
    }
    Ok(runs)
}

impl Run {
    fn task(&self) -> Task {
        Task { n_keys: self.n_pairs, n_pairs: self.n_pairs, pause: PAUSE }
    }

    /// Of a step, roughly, to know how much is left.
    fn cost(&self) -> u64 {
        let width = match self.kind {
            Kind::Vq { n_codes, .. } => 300 + n_codes,
            Kind::Quadratic => 300 + 2 * self.n_pairs,
            Kind::Linear { d_k } => 300 + 2 * d_k,
        };
        ((4 * self.n_pairs + PAUSE) * width) as u64
    }
}

fn train(run: Run, steps: u64, bar: &ProgressBar) -> Result<Outcome, transformer_vq::Error> {
    let task = run.task();
    let mut rng = ChaCha8Rng::seed_from_u64(run.seed);
    let first = task.batch(BATCH, &mut rng);
    let mut model = Model::new(run.kind, ATTENTION, &first, task.vocab_size(), run.seed)?;
    let near = Task { n_pairs: NEAR_PAIRS.min(run.n_pairs), pause: 0, ..task };
    for step in 0..steps {
        let factor = rate(step as f32 / steps as f32);
        model.step(&near.batch(NEAR_BATCH, &mut rng), factor)?;
        let report = model.step(&task.batch(BATCH, &mut rng), factor)?;
        bar.inc(run.cost());
        bar.set_message(format!("{} pairs, {}: loss {:.2}", run.n_pairs, run.kind, report.loss));
    }
    // Sequences that no training has seen.
    let mut rng = ChaCha8Rng::seed_from_u64(run.seed.wrapping_add(1 << 32));
    let report = model.judge(&task.batch(JUDGED, &mut rng))?;
    let codebook = report.quantized.map(|quantized| {
        let usage = quantized.stats.usage().mean().unwrap_or_default();
        (usage, quantized.commit_loss / (model::D_K as f64).sqrt()) // the squared norm of a key
    });
    Ok(Outcome { run, accuracy: report.accuracy, bytes: model.state_bytes()?, codebook })
}

/// Up, then down along half a cosine.
fn rate(progress: f32) -> f32 {
    let falling = 0.5 + 0.5 * (std::f32::consts::PI * progress).cos();
    RATE * falling * (progress / WARMUP).min(1.0)
}
