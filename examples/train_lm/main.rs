//! Trains a byte-level Transformer-VQ on text, end to end: data, training, checkpoints, evaluation, a sample.
//!
//! Without arguments about two minutes on two cores, on this crate's own sources and documentation. Into `--out` go the
//! checkpoint (`checkpoint.json`, `tensors-*.safetensors`), the options (`run.json`), `log.csv` (columns: see `log.rs`) and
//! `curves.svg`. The last line printed is `val_bits_per_byte: X`: the whole held-out tenth, each byte predicted once, read
//! as one stream with carried state.
//!
//! ```sh
//! cargo run --release --example train_lm
//! cargo run --release --example train_lm -- --data FILE --minutes 5 --out runs/mine
//! cargo run --release --example train_lm -- --resume runs/mine
//! ```
//!
//! A run can be stopped (Ctrl-C, or `--stop-after`) and resumed; with a budget of `--steps` it then ends in the same bits
//! as if it had never been stopped. Killed, it goes on from the last line of its log.

mod args;
#[path = "../support/chart.rs"]
mod chart;
mod log;
mod picture;
mod run;
#[path = "../support/sizes.rs"]
mod sizes;
#[path = "../support/text.rs"]
mod text;

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use args::Args;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use log::{Log, Row};
use run::Run;
use text::{bits, score};
use transformer_vq::generate::{Generator, Sampler};
use transformer_vq::model::Transformer;
use transformer_vq::ndarray::Array1;
use transformer_vq::train::{Budget, ByteText, Progress};

/// Evaluations on a part of the held-out text, each with a checkpoint, over a whole run.
const EVALUATIONS: u64 = 20;
/// Bytes of each.
const EVALUATION_LEN: usize = 16 * 1024;

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
    finish(run.trainer.model(), &run.text, run.held_out, run.options.seed)
}

/// Trains until the run is over or `stop` says so, given the steps taken, and leaves a checkpoint.
fn train(run: &mut Run, stop: impl Fn(u64) -> bool) -> Result<(), Box<dyn Error>> {
    let Run { folder, options, text, held_out, batches, trainer, progress, .. } = run;
    let mut log = Log::open(folder, trainer.steps(), trainer.model().config().n_layers)?;
    let evaluated = held_out.start..held_out.end.min(held_out.start + EVALUATION_LEN);
    let per_step = (options.sizes.batch_size * options.sizes.update_len) as u64;
    let bar = progress_bar();

    // The clock of a run stands still between sittings.
    let (before, begun) = (progress.seconds, Instant::now());
    let (mut since, mut steps_since) = (begun, 0);
    while progress.fraction(trainer.steps()) < 1.0 && !stop(trainer.steps()) {
        let evaluations = |progress: &Progress, step| (progress.fraction(step) * EVALUATIONS as f64) as u64;
        let due = evaluations(progress, trainer.steps());
        let factor = progress.factor(trainer.steps());
        let report = trainer.step(&batches.next_batch(), factor)?;
        progress.position = batches.position();
        progress.seconds = before + begun.elapsed().as_secs_f64();
        progress.recent.add(report.loss);
        steps_since += 1;
        let tokens_per_second = (steps_since * per_step) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        show(&bar, progress, report.step, tokens_per_second);
        if evaluations(progress, report.step) > due {
            let nats = score(trainer.model(), text, evaluated.clone())?.nats_per_token();
            progress.seconds = before + begun.elapsed().as_secs_f64();
            let row = Row {
                step: report.step,
                seconds: progress.seconds,
                tokens: report.step * per_step,
                learning_rate: trainer.optimizer().learning_rate() * factor,
                tokens_per_second,
                train_bits_per_byte: bits(progress.recent.mean()),
                val_bits_per_byte: bits(nats),
                perplexity: report.perplexity,
            };
            bar.suspend(|| say(&row));
            log.push(row)?;
            progress.recent = Default::default();
            trainer.save(&*folder, progress)?;
            (since, steps_since) = (Instant::now(), 0);
        }
    }
    bar.finish_and_clear();
    // An evaluation at the very last step has saved all there is.
    if steps_since > 0 {
        trainer.save(&*folder, progress)?;
    }
    Ok(())
}

/// Prints a line. A reader that has gone away is no reason to end the training.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn describe(run: &Run) {
    let (config, (training, held_out)) = (run.trainer.model().config(), (&run.training, &run.held_out));
    say(format!("{}: {} bytes to learn from, {} held out", run.text_name(), training.len(), held_out.len()));
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

fn show(bar: &ProgressBar, progress: &Progress, step: u64, tokens_per_second: f64) {
    let fraction = progress.fraction(step);
    let left = progress.seconds * (1.0 - fraction) / fraction.max(1e-6);
    let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
    bar.set_position((fraction * 1000.0) as u64);
    bar.set_message(format!(
        "{}  {:.3} bits/byte  {tokens_per_second:.0} bytes/s  {} left",
        done(progress, step),
        bits(progress.recent.mean()),
        indicatif::HumanDuration(left),
    ));
}

/// A sample, and the whole held-out text with and without the compressive cache.
fn finish(
    model: &Transformer,
    text: &ByteText,
    held_out: Range<usize>,
    seed: u64,
) -> Result<(), Box<dyn Error>> {
    let sampler = Sampler { temperature: 0.8, top_k: None, top_p: Some(0.95) };
    let mut generator = Generator::new(model, sampler, seed)?;
    let prompt = &text.as_bytes()[held_out.start..held_out.end.min(held_out.start + 64)];
    generator.read(Array1::from_iter(prompt.iter().map(|&byte| byte.into())).view())?;
    let sample = (0..400)
        .map(|_| Ok(generator.next_token()? as u8))
        .collect::<Result<Vec<u8>, transformer_vq::Error>>()?;
    say(format!("\n--- sample after {:?}:", String::from_utf8_lossy(prompt)));
    say(format!("{}\n---", String::from_utf8_lossy(&sample)));

    let begun = Instant::now();
    let with_cache = score(model, text, held_out.clone())?;
    let without = model.clone().with_cache(false);
    let without_cache = score(&without, text, held_out)?;
    say(format!(
        "held out: {} bytes in {:.0} s; attention on cached codes: {:.1} %",
        with_cache.tokens(),
        begun.elapsed().as_secs_f64(),
        100.0 * with_cache.cached_mass(),
    ));
    say(format!("val_bits_per_byte without the cache: {:.4}", without_cache.bits_per_byte()));
    say(format!("val_bits_per_byte: {:.4}", with_cache.bits_per_byte()));
    Ok(())
}
