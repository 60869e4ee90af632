//! What each kind of codebook is worth to a language model: one change at a time.
//!
//! Trains the model of `train_lm` once for each kind (see `kinds.rs`), from the same seed, on the same batches, with the same
//! recipe and for the same time, and prints a table: bits per byte on the held-out tenth of the text, each byte predicted once,
//! read as one stream; perplexity and usage of the codes there, mean over units; the share of attention that falls on cached
//! codes; steps and seconds of training. Without arguments a quarter of a minute per kind, about six minutes; such short runs
//! tell what fails, not what is best. The table goes into `--out` as `table.md`.
//!
//! ```sh
//! cargo run --release --example codebooks_in_attention
//! cargo run --release --example codebooks_in_attention -- --data FILE --minutes 5 --only default,rotation,sim-vq
//! ```

#[path = "../support/exit.rs"]
mod exit;
mod kinds;
#[path = "../support/out.rs"]
mod out;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/sizes.rs"]
mod sizes;
#[path = "../support/statistics.rs"]
mod statistics;
#[path = "../support/text.rs"]
mod text;

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use kinds::{KINDS, Kind};
use out::Folder;
use say::say;
use sizes::Sizes;
use statistics::mean;
use text::{batches, bits, name, read_text, score, split};
use transformer_vq::codebook::CodeStats;
use transformer_vq::model::{ModelConfig, Transformer};
use transformer_vq::train::{Budget, Corpus};

/// Bytes of the held-out text whose codes are counted.
const COUNTED: usize = 64 * 1024;

/// Trains a language model once for each kind of codebook.
#[derive(Debug, Parser)]
#[command(name = "codebooks_in_attention")]
struct Args {
    /// Text to learn, a file or a folder of files; its last tenth is held out [default: this crate's sources and documentation]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,

    /// Train each kind for this long by the wall clock
    #[arg(long, value_name = "X", default_value_t = 0.25, value_parser = sizes::positive)]
    minutes: f64,

    /// Train each kind for this many steps; the result then depends on the seed alone
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,

    /// Only these kinds, in their order [default: all]
    #[arg(long, value_name = "KIND,...", value_delimiter = ',')]
    only: Vec<String>,

    /// Seed of weights and batches
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Folder for the table
    #[arg(long, value_name = "DIR", default_value = "runs/codebooks_in_attention")]
    out: PathBuf,

    #[command(flatten)]
    sizes: Sizes,
}

/// What came of one kind.
struct Row {
    name: &'static str,
    what: &'static str,
    outcome: Outcome,
    steps: u64,
    seconds: f64,
}

enum Outcome {
    /// What was no longer a number.
    Diverged(String),
    Trained {
        bits_per_byte: f64,
        perplexity: f64,
        usage: f64,
        cached_mass: f64,
    },
}

const HEAD: &str = "| kind | bits per byte | perplexity | usage | cached | steps | seconds | |\n\
                    |---|---:|---:|---:|---:|---:|---:|---|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| {:<20} ", self.name)?;
        match &self.outcome {
            Outcome::Diverged(what) => write!(f, "| NaN: {what} | | | ")?,
            Outcome::Trained { bits_per_byte, perplexity, usage, cached_mass } => write!(
                f,
                "| {bits_per_byte:.4} | {perplexity:5.1} | {:5.1} % | {:4.1} % ",
                100.0 * usage,
                100.0 * cached_mass
            )?,
        }
        write!(f, "| {:5} | {:3.0} | {} |", self.steps, self.seconds, self.what)
    }
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(unknown) = args.only.iter().find(|only| KINDS.iter().all(|kind| kind.name != **only)) {
        let names = Vec::from_iter(KINDS.iter().map(|kind| kind.name));
        return Err(format!("there is no kind {unknown:?}, only {}", names.join(", ")).into());
    }
    let chosen = |kind: &&Kind| args.only.is_empty() || args.only.iter().any(|only| only == kind.name);
    let kinds = Vec::from_iter(KINDS.iter().filter(chosen));
    let text = read_text(args.data.as_deref())?;
    // All are looked at before the first is trained.
    let base = ModelConfig { vocab_size: text.vocab_size(), ..args.sizes.model() };
    let configs = kinds.iter().map(|kind| changed(&base, kind, args)).collect::<Result<Vec<_>, _>>()?;
    let folder = Folder::create(&args.out)?;
    let each = match args.steps {
        Some(steps) => format!("{steps} steps"),
        None => format!("{:.0} seconds", 60.0 * args.minutes),
    };
    let (name, threads) = (name(args.data.as_deref()), rayon::current_num_threads());
    say(format!("{name}; {} kinds, {each} each, {threads} threads\n", kinds.len()));
    say(HEAD);
    let mut table = format!("{HEAD}\n");
    for (kind, config) in kinds.into_iter().zip(configs) {
        let row = train(kind, config, &text, args)?;
        table += &format!("{row}\n");
        // After each kind, for who stops before the last.
        folder.write("table.md", &table)?;
        say(row);
    }
    say(format!("\ninto {folder}"));
    Ok(())
}

/// The model of a kind, which can be trained as the options say.
fn changed(config: &ModelConfig, kind: &Kind, args: &Args) -> Result<ModelConfig, Box<dyn Error>> {
    let mut config = config.clone();
    (kind.change)(&mut config, args.sizes.gradient());
    let model = Transformer::new(config.clone(), args.seed);
    let trainer = model.and_then(|model| args.sizes.trainer(model));
    trainer.map_err(|error| format!("{}: {error}", kind.name))?;
    Ok(config)
}

fn train(kind: &Kind, config: ModelConfig, text: &Corpus, args: &Args) -> Result<Row, Box<dyn Error>> {
    let budget = args.steps.map_or(Budget::Seconds(60.0 * args.minutes), Budget::Steps);
    let mut progress = args.sizes.progress(budget, args.seed)?;
    let (training, held_out) = split(text, &progress)?;
    let mut batches = batches(text, training, &progress)?;
    let mut trainer = args.sizes.trainer(Transformer::new(config, args.seed)?)?;
    let style = ProgressStyle::with_template("{prefix:20} {bar:24} {percent:>3}%  {msg}")?;
    let bar = ProgressBar::new(1000).with_style(style).with_prefix(kind.name);
    let begun = Instant::now();
    let mut diverged = None;
    while progress.fraction(trainer.steps()) < 1.0 {
        let factor = progress.factor(trainer.steps());
        match trainer.step(&batches.next_batch()?, factor) {
            Ok(report) => {
                let perplexity = mean(&report.perplexity);
                progress.recent.add(report.loss);
                bar.set_position((progress.fraction(report.step) * 1000.0) as u64);
                bar.set_message(format!(
                    "{:.3} bits/byte, perplexity {perplexity:.0}",
                    bits(progress.recent.mean())
                ));
                if progress.recent.steps == 50 {
                    progress.recent = Default::default();
                }
            }
            Err(transformer_vq::Error::Diverged { step, loss, .. }) => {
                diverged = Some(format!("loss {loss} after {step} steps"));
                break;
            }
            Err(error) => return Err(error.into()),
        }
        progress.seconds = begun.elapsed().as_secs_f64();
    }
    bar.set_message("reading the held-out text");
    let outcome = match diverged {
        Some(what) => Outcome::Diverged(what),
        None => judge(trainer.model(), text, held_out)?,
    };
    bar.finish_and_clear();
    let Kind { name, what, .. } = *kind;
    Ok(Row { name, what, outcome, steps: trainer.steps(), seconds: progress.seconds })
}

/// How the held-out text is predicted, and which codes its keys take.
fn judge(model: &Transformer, text: &Corpus, held_out: Range<usize>) -> Result<Outcome, Box<dyn Error>> {
    let scorer = score(model, text, held_out.clone())?;
    let bits_per_byte = text.size_of(held_out.clone())?.bits_per_byte(scorer.nats_per_token());
    if !bits_per_byte.is_finite() {
        return Ok(Outcome::Diverged(format!("{bits_per_byte} bits per byte")));
    }
    let mut state = model.new_state(1)?;
    let mut stats: Vec<CodeStats<f32>> = vec![];
    for piece in text.pieces(held_out.start..held_out.end.min(held_out.start + COUNTED), 2048)? {
        let (tokens, _) = piece?;
        let (_, reports, _) = model.forward(tokens.view(), None, &mut state)?;
        if stats.is_empty() {
            stats = reports.into_iter().map(|report| report.stats).collect();
        } else {
            stats.iter_mut().zip(reports).try_for_each(|(stats, report)| stats.merge(&report.stats))?;
        }
    }
    let mean = |of: fn(&CodeStats<f32>) -> f64| mean(&Vec::from_iter(stats.iter().map(of)));
    Ok(Outcome::Trained {
        bits_per_byte,
        perplexity: mean(|stats| stats.perplexity().mean().unwrap_or_default()),
        usage: mean(|stats| stats.usage().mean().unwrap_or_default()),
        cached_mass: scorer.cached_mass(),
    })
}
