//! A race between ways of learning a codebook, on a mixture with twice as many clusters as codes.
//!
//! Two minutes on one core. Every racer sees the same batches of fresh keys, and is judged on keys that none has seen, by the mean
//! squared error (relative to the best of three runs of k-means++ with 30 steps on 131072 keys), by the part of its codes
//! that is in use, and by their perplexity. Racers with an encoder learn their keys as well, as in an auto-encoder:
//! `keys = x A`, decoded by `x' = c B`; for them the error is `|x - x'|^2`.
//!
//! Prints a table; into `--out` goes `race.svg`, error and usage over steps.
//!
//! ```sh
//! cargo run --release --example codebook_race
//! cargo run --release --example codebook_race -- --codes 256 --steps 400
//! ```

mod mixture;
mod picture;
mod racers;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use mixture::Mixture;
use racers::{Quantizer, RACERS, Racer, Runner};
use transformer_vq::codebook::{CodeStats, assign, nearest_pair, start};
use transformer_vq::ndarray::{Array2, ArrayView2, Axis};

/// Keys of one batch.
const BATCH: usize = 4096;
/// Keys by which racers are judged.
const JUDGED: usize = 32_768;
/// Keys, steps and runs of the yardstick.
const K_MEANS: (usize, usize, u64) = (131_072, 30, 3);
/// Points of a curve.
const POINTS: u64 = 25;

/// Races ways of learning a codebook against k-means++ with restarts.
#[derive(Debug, Parser)]
#[command(name = "codebook_race")]
struct Args {
    /// Codes; the mixture has twice as many clusters
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    codes: u32,
    /// Batches of 4096 keys
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Race only those whose name holds this text
    #[arg(long, default_value = "")]
    only: String,
    /// Seed of the mixture, the keys and the starts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the picture
    #[arg(long, default_value = "runs/codebook_race")]
    out: PathBuf,
}

/// How a codebook does on the judged keys.
#[derive(Debug, Clone, Copy)]
struct Score {
    /// Mean squared error.
    error: f64,
    /// Part of the codes in use.
    usage: f64,
    perplexity: f64,
    nearest_pair: f64,
}

/// A racer's scores over the steps.
struct Curve {
    name: &'static str,
    points: Vec<(u64, Score)>,
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
    let n_codes = args.codes as usize;
    let mixture = Mixture::new(2 * n_codes, args.seed)?;
    let judged = mixture.keys(JUDGED, u64::MAX)?;
    println!(
        "{:<44} {:>8} {:>6} {:>7} {:>10} {:>8} {:>7}",
        "", "error", "/best", "usage", "perplexity", "nearest", "seconds"
    );

    let (n_keys, steps, runs) = K_MEANS;
    let begin = Instant::now();
    let sample = mixture.keys(n_keys, u64::MAX - 1)?.insert_axis(Axis(0)).insert_axis(Axis(0)); // [1, 1, N, K]
    let mut best: Option<Score> = None;
    for seed in 0..runs {
        let codewords = start::k_means(sample.view(), n_codes, None, steps, args.seed + seed)?;
        let codewords = codewords.index_axis_move(Axis(0), 0);
        let quantizer = Quantizer { keys: judged.clone(), decoded: codewords.clone(), codewords };
        let score = judge(judged.view(), &quantizer)?;
        best = best.filter(|best| best.error < score.error).or(Some(score));
    }
    let best = best.expect("at least one run");
    print_row(&format!("k-means++, best of {runs}"), &best, &best, begin);

    let mut curves = vec![];
    for racer in RACERS.iter().filter(|racer| racer.name.contains(&args.only)) {
        let begin = Instant::now();
        let curve = race(racer, args, &mixture, judged.view())?;
        let (_, last) = curve.points.last().expect("judged at the end");
        print_row(racer.name, last, &best, begin);
        curves.push(curve);
    }
    std::fs::create_dir_all(&args.out)?;
    let path = args.out.join("race.svg");
    std::fs::write(&path, picture::draw(&curves, best.error)?)?;
    println!("\nerror and usage over steps: {}", path.display());
    Ok(())
}

fn race(
    racer: &Racer,
    args: &Args,
    mixture: &Mixture,
    judged: ArrayView2<'_, f32>,
) -> Result<Curve, Box<dyn Error>> {
    let first = mixture.keys(BATCH, 0)?;
    let mut runner = Runner::new(racer, first.view(), args.codes as usize, args.seed)?;
    let style = ProgressStyle::with_template("{prefix:<44} {bar:20} {pos}/{len}  {msg}")?;
    let bar = ProgressBar::new(args.steps).with_style(style).with_prefix(racer.name);
    let mut curve = Curve { name: racer.name, points: vec![] };
    for step in 0..=args.steps {
        if step % args.steps.div_ceil(POINTS) == 0 || step == args.steps {
            let score = judge(judged, &runner.quantizer(judged)?)?;
            bar.set_message(format!("error {:.4}  usage {:.1} %", score.error, 100.0 * score.usage));
            curve.points.push((step, score));
        }
        if step < args.steps {
            runner.step(mixture.keys(BATCH, step)?.view(), step)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(curve)
}

/// How well `x` [N, D] is served.
fn judge(x: ArrayView2<'_, f32>, quantizer: &Quantizer) -> Result<Score, Box<dyn Error>> {
    let Quantizer { keys, codewords, decoded } = quantizer;
    let (keys, codewords) = (keys.view(), codewords.view());
    let codes = assign(keys, codewords)?;
    let rows = Vec::from_iter(codes.iter().map(|&code| code as usize));
    let error: Array2<f32> = &x - &decoded.select(Axis(0), &rows);
    let error = error.iter().map(|&e| f64::from(e * e)).sum::<f64>() / x.nrows() as f64;
    let one_head = keys.insert_axis(Axis(0)).insert_axis(Axis(0));
    let codes = codes.insert_axis(Axis(0)).insert_axis(Axis(0));
    let stats = CodeStats::collect(one_head, codes.view(), codewords.nrows(), None)?;
    let nearest_pair = nearest_pair(codewords.insert_axis(Axis(0)))?[0];
    Ok(Score { error, usage: stats.usage()[0], perplexity: stats.perplexity()[0], nearest_pair })
}

fn print_row(name: &str, score: &Score, best: &Score, begin: Instant) {
    println!(
        "{name:<44} {:>8.4} {:>6.3} {:>5.1} % {:>10.0} {:>8.4} {:>7.1}",
        score.error,
        score.error / best.error,
        100.0 * score.usage,
        score.perplexity,
        score.nearest_pair,
        begin.elapsed().as_secs_f64()
    );
}
