//! Shows how near the crate comes to what the processor can do: useful operations per second of every part, as ratios to
//! the speed of a plain matrix product measured next to it; decoding, which reads more than it computes, as bytes per second
//! against the bandwidth of memory.
//!
//! Runs for about a quarter of an hour on two cores, first on one thread, then on all, and takes up to 6 GB (sequences of
//! 131072 tokens); `--pairs 15` for three quarters of an hour, `--all-lengths` for more than an hour, `--only` for less.
//! `TRANSFORMER_VQ_SIMD=avx2` measures the kernels of a lesser instruction set; the product is the library's best in any case.
//!
//! ```sh
//! cargo run --release --example roofline
//! cargo run --release --example roofline -- --only attention --shape small --length 8192 --threads 1
//! cargo run --release --example roofline -- --out roofline.md
//! ```
//!
//! The yardstick is a product of two 2048 x 2048 matrices in f32 by the `gemm` crate on the same threads. Each measurement
//! is one half of a pair whose other half is that product (in decoding: a pass over memory), so that a machine that slows
//! down slows both; tables have the medians over pairs, of times and of ratios. Beside the product stands the peak of fused
//! multiply-adds in registers.
//! Everything is checked once before it is timed, against its definition where there is one.
//!
//! Useful operations, per query and head: assignment 2 S K, content scores 2 S K, relative biases 2 (M+1) K,
//! values 2 V (S + M + L/2), without biases 2 V (S + L/2). Forward and backward count three times that, recomputation counts
//! nothing, and neither does what is not a multiply-add: exponentials, look-ups, the statistics that the codebook learns from
//! (all of them are in the time). Further:
//!
//! - `quadratic`: T^2/2 (2 K + 2 V) per head, three times with backward. Its speed-up is the ratio of times; `over operations`
//!   divides that by the ratio of useful operations.
//! - `unit`: 2 D H (2 K + 3 V) per token for the projections, and attention. No unit is public by itself: it is a model of one
//!   unit with a vocabulary of two, embedding and logits included.
//! - `training`: 6 per weight (those that every token is multiplied with) and token, and three times attention's.
//! - `scaling`: attention on one thread and on all, in turn, each next to a product on as many: the gain over the product's own
//!   gain. `lengths`: tokens per second of long sequences over those of short ones, in turn.
//! - `others`: what somebody might run instead, at fixed speeds.
//! - `decoding`, `memory`: bytes; see there. Peak memory is measured on all threads only.

mod assignment;
mod attention;
mod bandwidth;
mod decoding;
#[path = "../support/exit.rs"]
mod exit;
mod machine;
mod memory;
#[path = "../support/options.rs"]
mod options;
mod others;
#[path = "../support/process.rs"]
mod process;
mod quadratic;
mod report;
#[path = "../support/say.rs"]
mod say;
mod scaling;
mod shapes;
#[path = "../support/statistics.rs"]
mod statistics;
mod training;
mod unit;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use exit::exit;
use options::within;

use crate::machine::{Machine, Rounds};
use crate::report::Report;
use crate::shapes::{SHAPES, Shape};

/// As thread pools hand it on.
pub type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Useful operations per second, as ratios to the matrix product's.
#[derive(Debug, Parser)]
struct Args {
    /// Only these parts
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// Only this shape: paper, small, multi-head or wide, in every part that has a shape
    #[arg(long)]
    shape: Option<String>,
    /// Only this length, tokens, of attention (quadratic and others too), unit, scaling and peak memory
    #[arg(long, conflicts_with = "all_lengths", value_parser = within(128..=1 << 20))]
    length: Option<usize>,
    /// Lengths 2048, 8192, 32768 and 131072 instead of the first two (quadratic attention: the first three)
    #[arg(long)]
    all_lengths: bool,
    /// Only this many threads; without it, one and then all
    #[arg(long, value_parser = within(1..=1024))]
    threads: Option<usize>,
    /// Pairs of measurements behind each median; without it 15, but 5 or more after 3 seconds, and 3 or more after 30
    #[arg(long, value_parser = within(1..=1000))]
    pairs: Option<usize>,
    /// Attention without relative biases (units have them)
    #[arg(long)]
    no_biases: bool,
    /// Also writes the tables to this file, as Markdown
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// For the process that measures its own peak memory
    #[arg(long, hide = true)]
    peak_of: Option<memory::Pass>,
}

/// Parts, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    Attention,
    Quadratic,
    Assignment,
    Decoding,
    Unit,
    Training,
    Scaling,
    Lengths,
    Others,
    Memory,
}

/// What every part is told.
pub struct Run<'a> {
    machine: Machine,
    pairs: Rounds,
    shapes: Vec<&'a Shape>,
    /// Whether the shape was asked for, also of parts that otherwise leave it out.
    one_shape: bool,
    length: Option<usize>,
    lengths: Vec<usize>,
    biases: bool,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result {
    let of_name = |shape: &&Shape| args.shape.as_deref().is_none_or(|name| name == shape.name);
    let shapes: Vec<_> = SHAPES.iter().filter(of_name).collect();
    if shapes.is_empty() {
        return Err("--shape is one of paper, small, multi-head, wide".into());
    }
    let lengths = match args.length {
        Some(length) => vec![length],
        None if args.all_lengths => vec![2048, 8192, 32768, 131_072],
        None => vec![2048, 8192],
    };
    let all = std::thread::available_parallelism()?.get();
    let threads = args.threads.map_or_else(|| if all > 1 { vec![1, all] } else { vec![1] }, |n| vec![n]);
    let pool = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build();
    let biases = !args.no_biases;
    let most = *threads.last().expect("one at least");
    if let Some(pass) = args.peak_of {
        return pool(most)?.install(|| memory::print_peak(shapes[0], lengths[0], biases, pass));
    }

    let wanted = |section| args.only.is_empty() || args.only.contains(&section);
    let mut report = Report::new(args.out.as_deref())?;
    pool(most)?.install(|| -> Result {
        attention::check(&shapes, biases)?;
        if wanted(Section::Others) { attention::check(&shapes, false) } else { Ok(()) }
    })?;
    for &n in &threads {
        let report = &mut report;
        pool(n)?.install(|| -> Result {
            let run = Run {
                machine: Machine::new(n),
                pairs: args.pairs.map_or(Rounds::Affordable, Rounds::Exactly),
                shapes: shapes.clone(),
                one_shape: args.shape.is_some(),
                length: args.length,
                lengths: lengths.clone(),
                biases,
            };
            report.heading(&format!("{n} thread{}", if n > 1 { "s" } else { "" }))?;
            report.paragraph(&run.machine.to_string())?;
            let tables = [
                (Section::Attention, attention::table as fn(&Run<'_>, &mut Report) -> Result),
                (Section::Quadratic, quadratic::table),
                (Section::Assignment, assignment::table),
                (Section::Decoding, decoding::table),
                (Section::Unit, unit::table),
                (Section::Training, training::table),
                (Section::Scaling, scaling::threads_table),
                (Section::Lengths, scaling::lengths_table),
                (Section::Others, others::table),
            ];
            // What compares threads or lengths, or is compared with fixed speeds, on all threads only.
            let once = [Section::Scaling, Section::Lengths, Section::Others];
            tables
                .into_iter()
                .filter(|(section, _)| wanted(*section) && (n == most || !once.contains(section)))
                .try_for_each(|(_, table)| table(&run, report))
        })?;
    }
    if wanted(Section::Memory) {
        memory::table(args, most, &mut report)?;
    }
    Ok(())
}

/// No times for what does not compute what it should.
fn agree(what: &str, error: f64, bound: f64) -> Result {
    if error <= bound {
        return Ok(());
    }
    Err(format!("{what} differ by {error:.1e} (relative): no times").into())
}
