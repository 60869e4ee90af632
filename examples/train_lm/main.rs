//! Trains a byte-level Transformer-VQ on text, end to end: data, training, checkpoints, evaluation, a sample.
//!
//! Without arguments about two minutes on two cores, on this crate's own sources and documentation. Into `--out` go
//! checkpoints (`checkpoint.json`, `tensors-*.safetensors`), `log.csv` and `curves.svg`. The last line printed is
//! `val_bits_per_byte: X`: the whole held-out tenth, each byte predicted once, read as one stream with carried state.
//!
//! ```sh
//! cargo run --release --example train_lm
//! cargo run --release --example train_lm -- --data FILE --minutes 5 --out runs/mine
//! cargo run --release --example train_lm -- --resume runs/mine
//! ```

mod args;
mod log;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use args::{Args, Sizes};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use log::{Log, Row};
use serde::{Deserialize, Serialize};
use transformer_vq::generate::{Generator, Sampler, Scorer};
use transformer_vq::model::{Transformer, write_atomically};
use transformer_vq::ndarray::Array1;
use transformer_vq::train::{
    BatchConfig, Batches, Budget, ByteText, Progress, Schedule, StepReport, Trainer,
};

/// Evaluations on a part of the held-out text, over a whole run.
const EVALUATIONS: u64 = 20;
/// Bytes of each.
const EVALUATION_LEN: usize = 16 * 1024;
/// Bytes that evaluation reads at once.
const PIECE_LEN: usize = 2048;
/// Part of the text that is held out.
const HELD_OUT: f64 = 0.1;

/// What a run was begun with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    /// None: the crate's own sources and documentation.
    data: Option<PathBuf>,
    seed: u64,
    sizes: Sizes,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
    }
    let folder = args.resume.as_ref().or(args.out.as_ref()).cloned();
    let folder = folder.unwrap_or_else(|| PathBuf::from("runs/train_lm"));
    let (run, mut trainer, mut progress) =
        if args.resume.is_some() { resume(&folder)? } else { begin(args, &folder)? };

    let text = read_text(run.data.as_deref())?;
    let (training, held_out) = text.split(HELD_OUT)?;
    let mut batches = Batches::new(text.clone(), training.clone(), progress.batches)?;
    batches.seek(progress.position);
    let mut log = Log::open(&folder, trainer.steps())?;
    describe(&run, &trainer, &folder, training.len(), held_out.len());

    let interrupted = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&interrupted);
    ctrlc::set_handler(move || handler.store(true, Ordering::SeqCst))?;

    // The clock of a run stands still between sittings.
    let before = Duration::from_secs_f64(progress.seconds);
    let begun = Instant::now();
    let bar = progress_bar(&progress, trainer.steps());
    let per_step = (run.sizes.batch_size * run.sizes.update_len) as u64;
    let mut since = Window::new(begun);
    let stopped =
        |steps: u64| interrupted.load(Ordering::SeqCst) || args.stop_after.is_some_and(|n| steps >= n);
    while progress.fraction(trainer.steps()) < 1.0 && !stopped(trainer.steps()) {
        let evaluations = |progress: &Progress, step| (progress.fraction(step) * EVALUATIONS as f64) as u64;
        let due = evaluations(&progress, trainer.steps());
        let factor = progress.factor(trainer.steps());
        let report = trainer.step(&batches.next_batch(), factor)?;
        progress.position = batches.position();
        progress.seconds = (before + begun.elapsed()).as_secs_f64();
        since.add(&report, per_step);
        show(&bar, &progress, &report, &since);
        if evaluations(&progress, report.step) > due {
            let end = held_out.end.min(held_out.start + EVALUATION_LEN);
            let nats = score(trainer.model(), &text, held_out.start..end)?.nats_per_token();
            progress.best_validation = Some(progress.best_validation.map_or(nats, |best| best.min(nats)));
            progress.seconds = (before + begun.elapsed()).as_secs_f64();
            let row = Row {
                step: report.step,
                seconds: progress.seconds,
                tokens: report.step * per_step,
                learning_rate: trainer.optimizer().learning_rate * factor,
                tokens_per_second: since.tokens_per_second(),
                train_bits_per_byte: bits(since.loss()),
                val_bits_per_byte: bits(nats),
                perplexity: report.perplexity,
            };
            bar.println(format!(
                "step {:6}   train {:.3}   validation {:.3} bits per byte   {:.0} bytes/s   codes in use {:.0?}",
                row.step, row.train_bits_per_byte, row.val_bits_per_byte, row.tokens_per_second, row.perplexity,
            ));
            log.push(row)?;
            trainer.save(&folder, &progress)?;
            since = Window::new(Instant::now());
        }
    }
    bar.finish_and_clear();
    trainer.save(&folder, &progress)?;
    println!("step {}, {:.0} s, checkpoint in {}", trainer.steps(), progress.seconds, folder.display());
    if progress.fraction(trainer.steps()) < 1.0 {
        println!("continue with: --resume {}", folder.display());
        if interrupted.load(Ordering::SeqCst) {
            return Ok(());
        }
    }
    finish(trainer.model(), &text, held_out, run.seed)
}

/// A new run: its folder, its options in `run.json`, a model with random weights.
fn begin(args: &Args, folder: &Path) -> Result<(Run, Trainer, Progress), Box<dyn Error>> {
    let run = Run { data: args.data.clone(), seed: args.seed.unwrap_or(1), sizes: args.sizes.clone() };
    let sizes = &run.sizes;
    let budget = match (args.steps, args.minutes) {
        (Some(steps), _) => Budget::Steps(steps),
        (None, minutes) => Budget::Seconds(60.0 * minutes.unwrap_or(2.0)),
    };
    let batches = BatchConfig {
        batch_size: sizes.batch_size,
        sequence_len: sizes.sequence_len,
        update_len: sizes.update_len,
        seed: run.seed,
    };
    let schedule = Schedule::new(sizes.warmup, 0.1)?;
    let model = Transformer::new(sizes.model(), run.seed)?;
    let trainer = Trainer::new(model, sizes.optimizer())?;
    let progress = Progress { batches, position: 0, seconds: 0.0, schedule, budget, best_validation: None };
    std::fs::create_dir_all(folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    write_atomically(folder.join("run.json"), |out| Ok(serde_json::to_writer_pretty(out, &run)?))?;
    Ok((run, trainer, progress))
}

fn resume(folder: &Path) -> Result<(Run, Trainer, Progress), Box<dyn Error>> {
    let path = folder.join("run.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let run = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let (trainer, progress) = Trainer::load(folder)?;
    Ok((run, trainer, progress))
}

/// The text to learn. Without a file: README, documentation and sources of this crate, in the order of their names.
fn read_text(data: Option<&Path>) -> Result<ByteText, Box<dyn Error>> {
    if let Some(path) = data {
        return Ok(ByteText::open(path)?);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md")];
    let mut folders: Vec<PathBuf> =
        ["src", "docs", "examples", "tests", "benches"].map(|name| root.join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut bytes = vec![];
    for path in files {
        bytes.extend(std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?);
    }
    Ok(ByteText::from_bytes(bytes)?)
}

fn describe(run: &Run, trainer: &Trainer, folder: &Path, training: usize, held_out: usize) {
    let data = run
        .data
        .as_ref()
        .map_or("this crate's sources and documentation".into(), |data| data.display().to_string());
    let config = trainer.model().config();
    println!("{data}: {training} bytes to learn from, {held_out} held out");
    println!(
        "{} parameters, {} units of width {}, {} codes; {} threads; into {}",
        config.n_parameters(),
        config.n_layers,
        config.d_model,
        config.n_codes,
        rayon::current_num_threads(),
        folder.display(),
    );
}

fn progress_bar(progress: &Progress, step: u64) -> ProgressBar {
    let bar = ProgressBar::new(1000);
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}");
    bar.set_style(style.expect("a valid template").progress_chars("=> "));
    bar.set_position((progress.fraction(step) * 1000.0) as u64);
    bar
}

fn show(bar: &ProgressBar, progress: &Progress, report: &StepReport, since: &Window) {
    let fraction = progress.fraction(report.step);
    let left = Duration::from_secs_f64(progress.seconds * (1.0 - fraction) / fraction.max(1e-6));
    bar.set_position((fraction * 1000.0) as u64);
    bar.set_message(format!(
        "step {}  loss {:.3}  {:.3} bits/byte  {:.0} bytes/s  {} left",
        report.step,
        since.loss(),
        bits(since.loss()),
        since.tokens_per_second(),
        indicatif::HumanDuration(left),
    ));
}

/// Means since the last row of the log.
struct Window {
    begun: Instant,
    steps: u64,
    tokens: u64,
    nats: f64,
}

impl Window {
    fn new(begun: Instant) -> Self {
        Window { begun, steps: 0, tokens: 0, nats: 0.0 }
    }

    fn add(&mut self, report: &StepReport, tokens: u64) {
        self.steps += 1;
        self.tokens += tokens;
        self.nats += report.loss;
    }

    fn loss(&self) -> f64 {
        self.nats / self.steps.max(1) as f64
    }

    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.begun.elapsed().as_secs_f64().max(1e-9)
    }
}

fn bits(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

/// Reads a range of the text as one stream with carried state.
fn score<'m>(
    model: &'m Transformer,
    text: &ByteText,
    range: std::ops::Range<usize>,
) -> Result<Scorer<'m>, Box<dyn Error>> {
    let mut scorer = Scorer::new(model)?;
    for (tokens, targets) in text.pieces(range, PIECE_LEN)? {
        scorer.push(tokens.row(0), targets.row(0))?;
    }
    Ok(scorer)
}

/// A sample, and the whole held-out text with and without the compressive cache.
fn finish(
    model: &Transformer,
    text: &ByteText,
    held_out: std::ops::Range<usize>,
    seed: u64,
) -> Result<(), Box<dyn Error>> {
    let sampler = Sampler { temperature: 0.8, top_k: None, top_p: Some(0.95) };
    let mut generator = Generator::new(model, sampler, seed)?;
    let prompt = &text.as_bytes()[held_out.start..held_out.end.min(held_out.start + 64)];
    generator.read(Array1::from_iter(prompt.iter().map(|&byte| byte.into())).view())?;
    let sample = (0..400)
        .map(|_| Ok(generator.next_token()? as u8))
        .collect::<Result<Vec<u8>, transformer_vq::Error>>()?;
    println!("\n--- sample after {:?}:", String::from_utf8_lossy(prompt));
    println!("{}\n---", String::from_utf8_lossy(&sample));

    let begun = Instant::now();
    let with_cache = score(model, text, held_out.clone())?;
    let without = model.clone().with_cache(false);
    let without_cache = score(&without, text, held_out)?;
    println!(
        "held out: {} bytes in {:.0} s; attention on cached codes: {:.1} %",
        with_cache.tokens(),
        begun.elapsed().as_secs_f64(),
        100.0 * with_cache.cached_mass(),
    );
    println!("val_bits_per_byte without the cache: {:.4}", without_cache.bits_per_byte());
    println!("val_bits_per_byte: {:.4}", with_cache.bits_per_byte());
    Ok(())
}
