//! What somebody might run instead, at fixed speeds, and how many times as fast this crate is.
//!
//! The speeds were measured elsewhere, on two threads of an x86-64 machine with AVX-512: they say something only beside a run
//! on two threads of such a machine. Sources:
//!
//! - PyTorch 2.15, its fused quadratic attention (`scaled_dot_product_attention`, causal), milliseconds, against attention
//!   without relative biases, which it does not have;
//! - the published JAX implementation of Transformer-VQ on jax 0.10, CPU, tokens per second: whole gated units with their
//!   projections, the training step of four small units, sampling one sequence from that model.
//!
//! `asked` is the margin that this crate means to keep.

use crate::attention::{Buffers, Problem};
use crate::machine::Measured;
use crate::report::Report;
use crate::shapes::Shape;
use crate::{Result, Run, decoding, training, unit};

/// Shape, tokens, milliseconds forward, milliseconds forward and backward, margin.
const PYTORCH: [(&str, usize, [f64; 2], f64); 4] = [
    ("wide", 8192, [125.0, 375.0], 4.0),
    ("wide", 32_768, [1785.0, 5577.0], 14.0),
    ("multi-head", 8192, [533.0, 1915.0], 8.0),
    ("multi-head", 32_768, [6499.0, 27_136.0], 26.0),
];

/// Shape, tokens per second forward and forward and backward, margins of each.
const JAX_UNITS: [(&str, [f64; 2], [f64; 2]); 2] =
    [("paper", [10_000.0, 2700.0], [1.4, 1.8]), ("small", [45_000.0, 10_400.0], [2.5, 3.5])];

/// Tokens per second, margin.
const JAX_STEP: (f64, f64) = (2360.0, 3.3);
const JAX_SAMPLING: (f64, f64) = (606.0, 3.0);

const PASSES: [&str; 2] = ["forward", "fwd+bwd"];

/// One row per pass, or per speed.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    report.table(&["instead", "T", "unit", "theirs", "here", "times as fast", "asked"])?;
    let of_name = |name: &str| run.shapes.iter().copied().find(|shape| shape.name == name);
    for (name, t, theirs, asked) in PYTORCH {
        let Some(shape) = of_name(name).filter(|_| run.length.is_none_or(|length| length == t)) else {
            continue;
        };
        for ((pass, measured), theirs) in PASSES.iter().zip(without_biases(run, shape, t)?).zip(theirs) {
            let here = 1e3 * measured.seconds();
            let what = format!("PyTorch, {} x {}, {pass}", shape.heads, shape.d_v);
            row(report, [&what, &t.to_string(), "ms"], [theirs, here], theirs / here, asked)?;
        }
    }
    for (name, theirs, asked) in JAX_UNITS {
        let Some(shape) = of_name(name) else { continue };
        let measured = unit::measure(run, shape, unit::T)?;
        for (n, (pass, measured)) in PASSES.iter().zip(measured).enumerate() {
            let here = unit::T as f64 / measured.seconds();
            let what = format!("JAX, {name} unit, {pass}");
            let at = [&*what, &unit::T.to_string(), "tokens/s"];
            row(report, at, [theirs[n], here], here / theirs[n], asked[n])?;
        }
    }
    if let Some(small) = of_name("small") {
        let step = training::TOKENS as f64 / training::measure(run, small)?.seconds();
        let sampled = decoding::sampling(run, small)?;
        let t = training::TOKENS.to_string();
        for (what, t, here, (theirs, asked)) in
            [("JAX, training step", &*t, step, JAX_STEP), ("JAX, sampling", "1", sampled, JAX_SAMPLING)]
        {
            row(report, [what, t, "tokens/s"], [theirs, here], here / theirs, asked)?;
        }
    }
    report.end()
}

/// Attention without biases, forward, and forward and backward.
fn without_biases(run: &Run<'_>, shape: &Shape, t: usize) -> Result<[Measured; 2]> {
    let problem = Problem::new(shape, t, false)?;
    let mut buffers = Buffers::default();
    let operations = shape.operations(t, false);
    let forward = run.machine.pairs(run.pairs, operations, &mut || {
        problem.forward(&mut buffers).expect("checked before");
    });
    let both = run.machine.pairs(run.pairs, 3.0 * operations, &mut || {
        problem.forward_backward(&mut buffers).expect("checked before");
    });
    Ok([forward, both])
}

fn row(
    report: &mut Report,
    [what, t, unit]: [&str; 3],
    [theirs, here]: [f64; 2],
    times: f64,
    asked: f64,
) -> Result {
    let number = |x: f64| if x < 100.0 { format!("{x:.1}") } else { format!("{x:.0}") };
    let cells =
        [what, t, unit, &number(theirs), &number(here), &format!("{times:.2}"), &format!("{asked:.1}")];
    report.row(&cells)
}
