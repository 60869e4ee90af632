//! Shows how near the crate comes to what the processor can do: useful operations per second of every part, as ratios to
//! the speed of a plain matrix product measured next to it.
//!
//! Runs for about four minutes; `--all-lengths` for about forty, `--pairs 3` for less.
//!
//! ```sh
//! cargo run --release --example roofline
//! cargo run --release --example roofline -- --shape small --length 8192 --threads 1
//! ```
//!
//! The yardstick is a product of two 2048 x 2048 matrices in f32 by the `gemm` crate on the same threads. Each measurement
//! is one half of a pair whose other half is that product, so that a machine that slows down slows both; the table has the
//! median of the pairs' ratios. Beside it stands the peak of fused multiply-adds in registers.
//!
//! Useful operations, per query and head: assignment 2 S K, content scores 2 S K, relative biases 2 (M+1) K,
//! values 2 V (S + M + L/2). Forward and backward count three times that, recomputation counts nothing, and neither does what is
//! not a multiply-add: exponentials, look-ups, the statistics that the codebook learns from (all of them are in the time).

mod attention;
mod machine;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use clap::builder::RangedU64ValueParser;

use crate::attention::{SHAPES, Shape};
use crate::machine::Machine;

/// Useful operations per second, as ratios to the matrix product's.
#[derive(Debug, Parser)]
struct Args {
    /// Only this shape: paper, small, multi-head or wide
    #[arg(long)]
    shape: Option<String>,
    /// Only this length, tokens
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(128..=1 << 20))]
    length: Option<usize>,
    /// Lengths 2048, 8192, 32768 and 131072 instead of the first two
    #[arg(long)]
    all_lengths: bool,
    /// Only this many threads; without it, one and then all
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// Pairs of measurements behind each median
    #[arg(long, default_value_t = 15, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    pairs: usize,
    /// Without relative biases
    #[arg(long)]
    no_biases: bool,
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
    for n in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build()?;
        pool.install(|| -> Result<(), transformer_vq::Error> {
            let machine = Machine::new(n);
            println!("\n## {n} thread{}", if n > 1 { "s" } else { "" });
            println!("{machine}\n");
            attention::table(&machine, &shapes, &lengths, args.pairs, !args.no_biases)
        })?;
    }
    Ok(())
}
