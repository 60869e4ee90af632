//! An encoder that fills in what is hidden: bytes of a text, some behind a mask, all read at once.
//!
//! Trains an encoder with bidirectional attention over quantized keys on this crate's own sources, or on `--data`: windows of
//! 32 bytes, of which 15 % are hidden behind token 256. Prints the accuracy and the bits per hidden byte on held-out text,
//! beside those of who knows only how frequent each byte is, and a few held-out lines with their blanks filled. Into
//! `--out` go the encoder (`encoder.safetensors`) and the table (`table.md`). About a minute on two cores.
//!
//! ```sh
//! cargo run --release --example masked_lm
//! cargo run --release --example masked_lm -- --data FILE --minutes 5
//! ```

#[path = "../support/exit.rs"]
mod exit;
#[path = "../support/options.rs"]
mod options;
#[path = "../support/out.rs"]
mod out;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/statistics.rs"]
mod statistics;
mod text;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use options::positive;
use out::Folder;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use say::say;
use statistics::mean;
use text::{LEN, MASK, Text, Windows, bits};
use transformer_vq::model::{Encoder, EncoderConfig};
use transformer_vq::ops::cross_entropy;
use transformer_vq::train::{AdamW, EncoderTrainer, Schedule};

/// Windows of a step.
const BATCH: usize = 32;
/// Windows that are judged, and lines that are shown.
const JUDGED: usize = 512;
const SHOWN: usize = 4;

/// Learns to fill in hidden bytes.
#[derive(Debug, Parser)]
#[command(name = "masked_lm")]
struct Args {
    /// A text, or a folder of texts; without it, this crate's sources
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,

    /// Minutes of training
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive)]
    minutes: f64,

    /// Seed of weights, windows and masks
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Few steps: whether everything runs, not how well
    #[arg(long, conflicts_with = "minutes")]
    short: bool,

    /// Folder for the encoder and the table
    #[arg(long, value_name = "DIR", default_value = "runs/masked_lm")]
    out: PathBuf,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn config() -> EncoderConfig {
    // Eight heads may each learn to look at another distance; short windows want short wavelengths.
    EncoderConfig {
        vocab_size: MASK as usize + 1,
        d_model: 64,
        n_layers: 2,
        n_heads: 8,
        d_k: 16,
        d_v: 16,
        position_lambda: 30.0,
        ..EncoderConfig::default()
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let text = Text::read(args.data.as_deref())?;
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut encoder = Encoder::new(config(), args.seed)?;
    let folder = Folder::create(&args.out)?;
    let (n_parameters, n_bytes) = (encoder.config().n_parameters(), text.training.len());
    say(format!("{n_parameters} parameters, {n_bytes} bytes to learn\n"));
    // Codes that begin at keys are used from the first step on.
    encoder.start_codebooks(
        Windows::draw(&text.training, BATCH, &mut rng).tokens.view(),
        None,
        10,
        args.seed,
    )?;
    let optimizer = AdamW { learning_rate: 1e-2, clip: Some(1.0), ..AdamW::default() };
    let (mut trainer, schedule) = (EncoderTrainer::new(encoder, optimizer)?, Schedule::new(0.05, 0.1)?);

    let (begin, seconds) = (Instant::now(), 60.0 * args.minutes);
    let bar = ProgressBar::new(1000)
        .with_style(ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}  {eta} left")?);
    let is_over = |steps: u64, progress: f64| if args.short { steps == 3 } else { progress >= 1.0 };
    let mut recent = None;
    loop {
        let progress = begin.elapsed().as_secs_f64() / seconds;
        if is_over(trainer.steps(), progress) {
            break;
        }
        let windows = Windows::draw(&text.training, BATCH, &mut rng);
        let report = trainer.step(&windows.batch(), schedule.factor_at_progress(progress))?;
        let recent = recent.insert(recent.map_or(report.loss, |loss| 0.98 * loss + 0.02 * report.loss));
        let (bits, usage) = (bits(*recent), 100.0 * mean(&report.usage));
        bar.set_position((1000.0 * progress) as u64);
        bar.set_message(format!("{bits:.3} bits per hidden byte, {usage:.0} % of codes"));
    }
    bar.finish_and_clear();
    let (steps, encoder) = (trainer.steps(), trainer.into_encoder());
    let path = folder.as_ref().join("encoder.safetensors");
    encoder.save(&path)?;
    say(format!("{steps} steps of {BATCH} windows in {:.0} s\n", begin.elapsed().as_secs_f64()));

    // The same windows and masks whatever the seed.
    let judged = if args.short { 8 } else { JUDGED };
    let windows = Windows::draw(&text.held_out, judged, &mut ChaCha8Rng::seed_from_u64(0));
    let (accuracy, loss) = judge(&encoder, &windows)?;
    let (most_frequent, entropy) = windows.by_frequency(&text.training);
    let mut table = "| held-out text | right | bits per hidden byte |\n|---|---:|---:|\n".to_string();
    for (name, right, nats) in [("encoder", accuracy, loss), ("frequencies of bytes", most_frequent, entropy)]
    {
        table += &format!("| {name} | {:.1} % | {:.3} |\n", 100.0 * right, bits(nats));
    }
    folder.write("table.md", &table)?;
    say(table);
    for window in 0..SHOWN.min(judged) {
        let [hidden, filled, text] = fill(&encoder, &windows, window)?;
        say(format!("hidden  {hidden}\nfilled  {filled}\ntext    {text}\n"));
    }
    say(format!("into {folder}"));
    Ok(())
}

/// The part of the hidden bytes that the encoder finds, and its mean loss, nats per hidden byte.
fn judge(encoder: &Encoder, windows: &Windows) -> Result<(f64, f64), Box<dyn Error>> {
    let (mut right, mut nats, mut hidden) = (0.0, 0.0, 0.0);
    // Few windows at a time: logits are large.
    for windows in windows.parts(BATCH) {
        let logits = encoder.forward(windows.tokens.view(), None)?;
        for (b, logits) in logits.outer_iter().enumerate() {
            let (targets, counted) = (windows.targets.row(b), windows.hidden.row(b));
            let n = counted.iter().filter(|&&hidden| hidden).count() as f64;
            nats += n * cross_entropy::loss(logits, targets, Some(counted))?;
            hidden += n;
            let found = |&t: &usize| counted[t] && best(logits.row(t)) == targets[t];
            right += (0..LEN).filter(found).count() as f64;
        }
    }
    Ok((right / f64::max(hidden, 1.0), nats / f64::max(hidden, 1.0)))
}

/// The most probable byte.
fn best(logits: transformer_vq::ndarray::ArrayView1<'_, f32>) -> u32 {
    let bytes = logits.iter().take(MASK as usize).enumerate();
    bytes.max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(byte, _)| byte as u32)
}

/// A window with its blanks, with what the encoder fills in, and as it was.
fn fill(encoder: &Encoder, windows: &Windows, window: usize) -> Result<[String; 3], Box<dyn Error>> {
    let one = windows.part(window..window + 1);
    let logits = encoder.forward(one.tokens.view(), None)?;
    let show = |byte: u32| match u8::try_from(byte) {
        Ok(byte) if byte.is_ascii_graphic() => char::from(byte),
        Ok(b' ') => ' ',
        Ok(_) => '~',
        Err(_) => '_',
    };
    let filled = |t: usize| {
        if one.hidden[[0, t]] {
            best(logits.slice(transformer_vq::ndarray::s![0, t, ..]))
        } else {
            one.tokens[[0, t]]
        }
    };
    Ok([
        one.tokens.iter().map(|&byte| show(byte)).collect(),
        (0..LEN).map(|t| show(filled(t))).collect(),
        one.targets.iter().map(|&byte| show(byte)).collect(),
    ])
}
