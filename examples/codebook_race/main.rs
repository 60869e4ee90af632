//! A race between ways of learning a codebook, on a mixture with twice as many clusters as codes.
//!
//! About two minutes on two cores. Every racer sees the same batches of fresh keys, and is judged on keys that none has seen, by
//! the mean squared error (relative to the best of three runs of k-means++ with 30 steps on 131072 keys), by the part of its
//! codes that is in use, and by their perplexity. Racers with an encoder learn their keys as well, as in an auto-encoder:
//! `keys = x A`, decoded by `x' = c B`; for them the error is `|x - x'|^2`, and each rule races with every estimator of the keys'
//! gradient.
//!
//! Prints a table that fills while they run; into `--out` go the table (`table.md`), and error and usage over steps (`race.svg`).
//!
//! ```sh
//! cargo run --release --example codebook_race
//! cargo run --release --example codebook_race -- --codes 256 --steps 400 --only SimVQ
//! ```

#[path = "../support/adam.rs"]
mod adam;
#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
#[path = "../support/learner.rs"]
mod learner;
mod mixture;
#[path = "../support/out.rs"]
mod out;
mod picture;
mod racers;
mod runner;
#[path = "../support/say.rs"]
mod say;
mod table;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use exit::exit;
use mixture::Mixture;
use out::Folder;
use racers::{Racer, racers};
use rayon::prelude::*;
use runner::{Quantizer, Runner};
use say::say;
use table::Live;
use transformer_vq::codebook::{CodeStats, assign, nearest_pair, start};
use transformer_vq::ndarray::{Array2, ArrayView2, Axis};

/// Keys of one batch.
const BATCH: usize = 4096;
/// Keys by which racers are judged.
const JUDGED: usize = 32_768;
/// Keys, steps and runs of the yardstick.
const K_MEANS: (usize, usize, u64) = (131_072, 30, 3);
/// Points of a curve.
const POINTS: u64 = 20;

/// Races ways of learning a codebook against k-means++ with restarts.
#[derive(Debug, Parser)]
#[command(name = "codebook_race")]
pub struct Args {
    /// Codes; the mixture has twice as many clusters
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 14))]
    codes: u32,
    /// Batches of 4096 keys
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Race only those whose rule holds this text, in whatever case
    #[arg(long, default_value = "")]
    only: String,
    /// Highest rate of Adam, for codewords that learn by gradient
    #[arg(long, default_value_t = 0.03, value_parser = learner::rate)]
    rate: f32,
    /// Seed of the mixture, the keys and the starts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the table and the picture
    #[arg(long, default_value = "runs/codebook_race")]
    out: PathBuf,
}

/// How a codebook does on the judged keys.
#[derive(Debug, Clone, Copy)]
pub struct Score {
    /// Mean squared error.
    error: f64,
    /// Part of the codes in use.
    usage: f64,
    perplexity: f64,
    nearest_pair: f64,
}

impl Score {
    /// Of who has met what is no number.
    const NONE: Score =
        Score { error: f64::NAN, usage: f64::NAN, perplexity: f64::NAN, nearest_pair: f64::NAN };
}

/// A racer and its scores over the steps.
pub struct Curve {
    racer: Racer,
    points: Vec<(u64, Score)>,
    /// Steps after which it had diverged; it races no further.
    diverged: Option<u64>,
}

impl Curve {
    /// What came of a step or of a judgement. Who diverges is out of the race, and None; the others go on.
    fn unless_diverged<T>(
        &mut self,
        step: u64,
        result: Result<T, transformer_vq::Error>,
    ) -> Result<Option<T>, String> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(transformer_vq::Error::NotFinite { .. }) => {
                self.diverged = Some(step);
                self.points.push((step, Score::NONE));
                Ok(None)
            }
            Err(error) => Err(format!("{}: {error}", self.racer)),
        }
    }
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let (n_codes, begin) = (args.codes as usize, Instant::now());
    let chosen = chosen(&args.only)?;
    let folder = Folder::create(&args.out)?;
    let curve = |racer| Curve { racer, points: vec![], diverged: None };
    let mut curves = Vec::from_iter(chosen.into_iter().map(curve));
    let mixture = Mixture::new(2 * n_codes, args.seed)?;
    let judged = mixture.keys(JUDGED, u64::MAX)?;
    say(format!("{} racers, {n_codes} codes, {} batches of {BATCH} keys", curves.len(), args.steps));
    let best = yardstick(&mixture, judged.view(), args)?;

    let live = Live::new(&best, &curves, args.steps)?;
    let first = mixture.keys(BATCH, 0)?;
    let new = |curve: &Curve| {
        let runner = Runner::new(&curve.racer, first.view(), args);
        runner.map_err(|error| format!("{}: {error}", curve.racer))
    };
    let mut runners = curves.par_iter().map(new).collect::<Result<Vec<_>, _>>()?;
    for step in 0..=args.steps {
        if step % args.steps.div_ceil(POINTS) == 0 || step == args.steps {
            let judge = |(runner, curve): (&Runner, &mut Curve)| {
                let quantizer = runner.quantizer(judged.view());
                let score = quantizer.and_then(|quantizer| judge(judged.view(), &quantizer));
                let score = curve.unless_diverged(step, score)?;
                curve.points.extend(score.map(|score| (step, score)));
                Ok::<(), String>(())
            };
            let racing = runners.par_iter().zip(&mut curves).filter(|(_, curve)| curve.diverged.is_none());
            racing.try_for_each(judge)?;
            live.show(step, &best, &curves);
        }
        if step < args.steps {
            let (keys, rate) = (mixture.keys(BATCH, step)?, 1.0 - step as f32 / args.steps as f32);
            let racing =
                runners.par_iter_mut().zip(&mut curves).filter(|(_, curve)| curve.diverged.is_none());
            racing.try_for_each(|(runner, curve)| {
                curve.unless_diverged(step, runner.step(keys.view(), step, rate)).map(drop)
            })?;
            live.tick(step);
        }
    }
    live.end();
    let table = format!("{}\n{}", table::rows(&best, &curves).join("\n"), diverged(&curves));
    folder.write("table.md", &table)?;
    let path = folder.write("race.svg", picture::draw(&curves, best.error)?)?;
    say(table);
    say(format!("{:.0} s; error and usage over steps: {}", begin.elapsed().as_secs_f64(), path.display()));
    Ok(())
}

/// Who is out of the race, a line each.
fn diverged(curves: &[Curve]) -> String {
    let line = |curve: &Curve| {
        let steps = curve.diverged?;
        Some(format!("\n- {}: not a number after {steps} steps; a lower --rate may help", curve.racer))
    };
    let lines = String::from_iter(curves.iter().filter_map(line));
    if lines.is_empty() { lines } else { lines + "\n" }
}

/// Those whose rule holds a text.
fn chosen(only: &str) -> Result<Vec<Racer>, String> {
    let wanted = only.to_lowercase();
    let holds = |racer: &Racer| racer.rule.to_lowercase().contains(&wanted);
    let (chosen, others): (Vec<_>, Vec<_>) = racers().into_iter().partition(holds);
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    let mut rules = Vec::from_iter(others.iter().map(|racer| racer.rule));
    rules.sort_unstable();
    rules.dedup();
    Err(format!("no rule holds {only:?}; they are: {}", rules.join("; ")))
}

/// The best of some runs of k-means++.
fn yardstick(mixture: &Mixture, judged: ArrayView2<'_, f32>, args: &Args) -> Result<Score, Box<dyn Error>> {
    let (n_keys, steps, runs) = K_MEANS;
    let sample = mixture.keys(n_keys, u64::MAX - 1)?.insert_axis(Axis(0)).insert_axis(Axis(0)); // [1, 1, N, K]
    let mut best: Option<Score> = None;
    for run in 0..runs {
        let codewords =
            start::k_means(sample.view(), args.codes as usize, None, steps, args.seed.wrapping_add(run))?;
        let codewords = codewords.index_axis_move(Axis(0), 0);
        let quantizer = Quantizer { keys: judged.to_owned(), decoded: codewords.clone(), codewords };
        let score = judge(judged, &quantizer)?;
        best = best.filter(|best| best.error < score.error).or(Some(score));
    }
    Ok(best.expect("at least one run"))
}

/// How well `x` [N, D] is served.
fn judge(x: ArrayView2<'_, f32>, quantizer: &Quantizer) -> Result<Score, transformer_vq::Error> {
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
