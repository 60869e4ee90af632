//! A million tokens through a state of constant size.
//!
//! A model of two units learns, from texts of 2,048 bytes, to complete facts that the same text has told before (see `text.rs`).
//! Then it reads one text of a million bytes as a stream, with the compressive cache and without it: how well it predicts as the
//! text gets longer, how long a byte takes, how large its state is, and whether facts told in the first bytes, and never
//! mentioned since, are known ten thousand to a million bytes later. Three seeds.
//!
//! Prints tables, and writes them (`table.md`) and a picture (`long_context.svg`) into `--out`. About seven minutes on two cores;
//! all but the times depends on seeds and steps alone.
//!
//! ```sh
//! cargo run --release --example long_context
//! cargo run --release --example long_context -- --seeds 1 --len 200000
//! ```

#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
mod learn;
#[path = "../support/options.rs"]
mod options;
#[path = "../support/out.rs"]
mod out;
#[path = "../support/process.rs"]
mod process;
mod report;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/statistics.rs"]
mod statistics;
mod stream;
mod text;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use options::{distinct, within};
use out::Folder;
use rayon::prelude::*;
use report::Outcome;

/// How far back kept facts lie when they are asked about, as parts of the text.
const DISTANCES: [f64; 4] = [0.01, 0.1, 0.5, 0.99];

/// A million tokens through a state of constant size.
#[derive(Debug, Parser)]
#[command(name = "long_context")]
struct Args {
    /// Bytes of the text that is read after training
    #[arg(long, value_name = "N", default_value_t = 1_000_000, default_value_if("short", "true", "20000"))]
    #[arg(value_parser = within(20_000..=1 << 30))]
    len: usize,

    /// Steps of training
    #[arg(long, value_name = "N", default_value_t = 300, default_value_if("short", "true", "4"))]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,

    /// Seeds of weights and texts
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3")]
    #[arg(default_value_if("short", "true", "1"))]
    seeds: Vec<u64>,

    /// Narrow keys; few steps, a short text unless asked for: whether everything runs, not how well
    #[arg(long)]
    short: bool,

    /// Folder for the tables and the picture
    #[arg(long, value_name = "DIR", default_value = "runs/long_context")]
    out: PathBuf,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    distinct("--seeds", &args.seeds)?;
    let folder = Folder::create(&args.out)?;
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}")?;
    let each = learn::STEP_COST.saturating_mul(args.steps).saturating_add(2 * args.len as u64);
    let bar = ProgressBar::new(each.saturating_mul(args.seeds.len() as u64)).with_style(style);
    let config = learn::config(args.short);
    let distances = DISTANCES.map(|part| (part * args.len as f64) as usize);
    let outcome = |&seed: &u64| {
        let model = learn::train(config.clone(), args.steps, seed, &bar)?;
        let text = stream::text(&distances, args.len, seed);
        let on = stream::read(&model, &text, &bar)?;
        let off = stream::read(&model.with_cache(false), &text, &bar)?;
        Ok::<_, transformer_vq::Error>(Outcome { seed, on, off })
    };
    let outcomes = args.seeds.par_iter().map(outcome).collect::<Result<Vec<_>, _>>()?;
    bar.finish_and_clear();
    report::write(&outcomes, &folder)
}
