//! Trains a Transformer-VQ on text or images, end to end: data, training, checkpoints, evaluation, a sample.
//!
//! Without arguments about two minutes on two cores, on this crate's own sources and documentation. Into `--out` go the
//! checkpoint (`checkpoint.json`, `tensors-*.safetensors`), the options (`run.json`), `log.csv` (columns: see `log.rs`) and
//! `curves.svg`, of images a `sample.png`; an earlier run that was there goes into the folder `previous`. The last line printed
//! is `val_bits_per_byte: X`: the whole held-out part, each token predicted once, read as one stream with carried state, in bits
//! per byte of the text whatever the tokens are.
//!
//! ```sh
//! cargo run --release --example train_lm
//! cargo run --release --example train_lm -- --data FILE --minutes 5 --out runs/mine
//! cargo run --release --example train_lm -- --resume runs/mine
//! cargo run --release --example train_lm -- --data BOOKS --optimizer lion --schedule linear --accumulate 4
//! cargo run --release --example train_lm -- --data PICTURES --images --freeze 'layers.0.*'
//! cargo run --release --features tokenizers --example train_lm -- --data FILE --tokenizer tokenizer.json
//! ```
//!
//! A run can be stopped (Ctrl-C, SIGTERM, or `--stop-after`) and resumed; with a budget of `--steps` it then ends in the same bits
//! as if it had never been stopped. Killed, it goes on from the last line of its log.

mod args;
#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
mod log;
mod picture;
#[path = "../support/process.rs"]
mod process;
mod run;
mod sample;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/sizes.rs"]
mod sizes;
#[path = "../support/text.rs"]
mod text;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use args::Args;
use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use log::{Log, Row};
use run::Run;
use say::say;
use text::{bits, score};
use transformer_vq::train::{Budget, Corpus, Progress};

/// Evaluations on a part of the held-out text, each with a checkpoint, over a whole run.
const EVALUATIONS: u64 = 20;
/// Tokens of each.
const EVALUATION_LEN: usize = 16 * 1024;
/// Between two checkpoints there is never more time than this: what a crash can cost.
const LONGEST_UNSAVED: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
    }
    let mut run = match &args.resume {
        Some(folder) => Run::resume(folder.clone())?,
        None => Run::begin(args, args.out.clone().unwrap_or_else(|| PathBuf::from("runs/train_lm")))?,
    };
    describe(&run);

    // The first Ctrl-C ends training at the next step, the second one ends the process.
    let interrupted = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&interrupted);
    ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })?;

    if run.is_over() {
        say(format!("this run is over, after {} steps; here is its result again", run.trainer.steps()));
    } else {
        let stop = |steps| interrupted.load(Ordering::SeqCst) || args.stop_after.is_some_and(|n| steps >= n);
        train(&mut run, stop)?;
        if !run.is_over() {
            say(format!(
                "stopped after {}; continue with: --resume {}",
                done(&run.progress, run.trainer.steps()),
                run.folder.display(),
            ));
            return Ok(());
        }
        say(format!("{} steps in {:.0} s", run.trainer.steps(), run.progress.seconds));
    }
    interrupted.store(true, Ordering::SeqCst); // there is nothing left to save
    finish(&run)
}

/// Trains until the run is over or `stop` says so, given the steps taken, and leaves a checkpoint.
fn train(run: &mut Run, stop: impl Fn(u64) -> bool) -> Result<(), Box<dyn Error>> {
    let Run { folder, options, text, held_out, batches, trainer, progress, .. } = run;
    let mut log = Log::open(folder, trainer.steps(), trainer.model().config().n_layers)?;
    let evaluated = held_out.start..held_out.end.min(held_out.start + EVALUATION_LEN);
    let per_step = (progress.batches.batch_size * options.sizes.update_len) as u64;
    let (evaluated_size, tokens_per_byte) = (text.size_of(evaluated.clone())?, tokens_per_byte(text));
    let bar = progress_bar();

    // The clock of a run stands still between sittings.
    let (before, begun) = (progress.seconds, Instant::now());
    let (mut since, mut steps_since, mut saved) = (begun, 0, begun);
    while progress.fraction(trainer.steps()) < 1.0 && !stop(trainer.steps()) {
        let evaluations = |progress: &Progress, step| (progress.fraction(step) * EVALUATIONS as f64) as u64;
        let due = evaluations(progress, trainer.steps());
        let factor = progress.factor(trainer.steps());
        let report = trainer.step(&batches.next_batch()?, factor)?;
        progress.position = batches.position();
        progress.seconds = before + begun.elapsed().as_secs_f64();
        progress.recent.add(report.loss);
        steps_since += 1;
        let tokens_per_second = (steps_since * per_step) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        show(&bar, progress, report.step, tokens_per_second, tokens_per_byte);
        if evaluations(progress, report.step) > due {
            let nats = score(trainer.model(), text, evaluated.clone())?.nats_per_token();
            progress.seconds = before + begun.elapsed().as_secs_f64();
            let row = Row {
                step: report.step,
                seconds: progress.seconds,
                tokens: report.step * per_step,
                learning_rate: trainer.optimizer().learning_rate() * factor,
                tokens_per_second,
                train_bits_per_byte: bits(progress.recent.mean()) * tokens_per_byte,
                val_bits_per_byte: evaluated_size.bits_per_byte(nats),
                perplexity: report.perplexity,
            };
            bar.suspend(|| say(&row));
            log.push(row)?;
            progress.recent = Default::default();
            trainer.save(&*folder, progress)?;
            (since, steps_since, saved) = (Instant::now(), 0, Instant::now());
        } else if saved.elapsed() > LONGEST_UNSAVED {
            trainer.save(&*folder, progress)?;
            saved = Instant::now();
        }
    }
    bar.finish_and_clear();
    // An evaluation at the very last step has saved all there is.
    if steps_since > 0 {
        trainer.save(&*folder, progress)?;
    }
    Ok(())
}

fn describe(run: &Run) {
    let (config, (training, held_out)) = (run.trainer.model().config(), (&run.training, &run.held_out));
    say(format!("{}: {} tokens to learn from, {} held out", run.text_name(), training.len(), held_out.len()));
    say(format!(
        "{} parameters, {} units of width {}, {} codes; {} threads; into {}",
        config.n_parameters(),
        config.n_layers,
        config.d_model,
        config.n_codes,
        rayon::current_num_threads(),
        run.folder.display(),
    ));
}

/// How far a run has come, in the units of its budget.
fn done(progress: &Progress, step: u64) -> String {
    match progress.budget {
        Budget::Steps(steps) => format!("{step} of {steps} steps"),
        Budget::Seconds(seconds) => format!("{step} steps, {:.0} of {seconds:.0} s", progress.seconds),
    }
}

/// One line on a terminal; nothing elsewhere.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1000);
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}");
    bar.set_style(style.expect("a valid template").progress_chars("=> "));
    bar
}

fn show(bar: &ProgressBar, progress: &Progress, step: u64, tokens_per_second: f64, tokens_per_byte: f64) {
    let fraction = progress.fraction(step);
    let left = progress.seconds * (1.0 - fraction) / fraction.max(1e-6);
    let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
    bar.set_position((fraction * 1000.0) as u64);
    bar.set_message(format!(
        "{}  {:.3} bits/byte  {tokens_per_second:.0} tokens/s  {} left",
        done(progress, step),
        bits(progress.recent.mean()) * tokens_per_byte,
        indicatif::HumanDuration(left),
    ));
}

/// 1 for bytes, less for a tokenizer.
fn tokens_per_byte(text: &Corpus) -> f64 {
    text.len() as f64 / text.n_bytes() as f64
}

/// A sample, and the whole held-out part with and without the compressive cache.
fn finish(run: &Run) -> Result<(), Box<dyn Error>> {
    let (model, text, held_out) = (run.trainer.model(), &run.text, run.held_out.clone());
    sample::show(run)?;
    let begun = Instant::now();
    let size = text.size_of(held_out.clone())?;
    let with_cache = score(model, text, held_out.clone())?;
    let (seconds, peak_memory) = (begun.elapsed().as_secs_f64(), process::peak());
    let without = model.clone().with_cache(false);
    let without_cache = score(&without, text, held_out)?;
    say(format!(
        "held out: {} tokens, {} bytes, in {:.0} s; attention on cached codes: {:.1} %",
        size.tokens,
        size.bytes,
        seconds,
        100.0 * with_cache.cached_mass(),
    ));
    if let Some(bytes) = peak_memory {
        say(format!("peak memory: {:.0} MB", bytes as f64 / 1e6));
    }
    let [nats, nats_without] = [&with_cache, &without_cache].map(|scorer| scorer.nats_per_token());
    say(format!("val_bits_per_byte without the cache: {:.4}", size.bits_per_byte(nats_without)));
    say(format!("val_nats_per_token: {nats:.4}"));
    if text.image_shape().is_none() {
        say(format!("val_word_perplexity: {:.4e}", size.word_perplexity(nats)));
    }
    say(format!("val_bits_per_byte: {:.4}", size.bits_per_byte(nats)));
    Ok(())
}
