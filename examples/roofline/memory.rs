//! Peak memory of attention, each pass in a process of its own, because a peak never comes down again.
//!
//! What counts is the peak less what was resident before the call and less the sizes of what it returns: outputs, and
//! gradients. Inputs and the gradient of the outputs are there before.

use std::process::Command;

use clap::ValueEnum;

use crate::attention::{Buffers, Problem};
use crate::report::Report;
use crate::shapes::{SHAPES, Shape};
use crate::{Args, Result, process};

const T: usize = 131_072;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pass {
    Forward,
    Both,
}

/// One row per pass: the paper's shape, or the one that was asked for.
pub fn table(args: &Args, threads: usize, report: &mut Report) -> Result {
    if process::peak().is_none() {
        return report.paragraph("peak memory: this system does not say");
    }
    let shape = args.shape.as_deref().unwrap_or(SHAPES[0].name);
    let t = args.length.unwrap_or(T).to_string();
    report.table(&["peak memory, MB", "T", "inputs", "results", "beyond these"])?;
    for (pass, name) in [(Pass::Forward, "forward"), (Pass::Both, "fwd+bwd")] {
        let value = pass.to_possible_value().expect("no pass is hidden");
        let mut child = Command::new(std::env::current_exe()?);
        child.args(["--peak-of", value.get_name(), "--shape", shape, "--length", &t]);
        child.args(["--threads", &threads.to_string()]);
        if args.no_biases {
            child.arg("--no-biases");
        }
        let output = child.output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let why = said.lines().next().unwrap_or("it was ended: too little memory?");
            return Err(format!("measuring peak memory of {name}, {}: {why}", output.status).into());
        }
        let mut cells = vec![format!("{shape}, {name}"), t.clone()];
        cells.extend(String::from_utf8(output.stdout)?.split_whitespace().map(str::to_string));
        report.row(&cells)?;
    }
    report.end()
}

/// Prints the numbers of a row, MB.
pub fn print_peak(shape: &Shape, t: usize, biases: bool, pass: Pass) -> Result {
    let problem = Problem::new(shape, t, biases)?;
    let mut buffers = Buffers::default();
    let unknown = "this system does not say how much memory a process has";
    let before = process::resident().ok_or(unknown)?;
    match pass {
        Pass::Forward => drop(problem.forward(&mut buffers)?),
        Pass::Both => problem.forward_backward(&mut buffers)?,
    }
    let peak = process::peak().ok_or(unknown)?;
    let Buffers { output, gradients } = &buffers;
    let numbers =
        [&output.out, &gradients.q, &gradients.k, &gradients.v].map(|x| x.len()).iter().sum::<usize>()
            + output.codes.len()
            + output.lse.len()
            + output.cached_mass.len();
    let inputs = problem.q.len() + problem.k.len() + problem.v.len();
    let inputs = inputs + if pass == Pass::Both { problem.d_out.len() } else { 0 };
    let mb = |bytes: usize| bytes as f64 / 1e6;
    let results = size_of::<f32>() * numbers;
    let beyond = mb(peak) - mb(before + results);
    println!("{:.0} {:.0} {beyond:.1}", mb(size_of::<f32>() * inputs), mb(results));
    Ok(())
}
