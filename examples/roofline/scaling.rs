//! What all threads gain over one, and long sequences over short ones: both in turn, so that one run compares them.

use crate::attention::{Buffers, Problem};
use crate::machine::{Machine, Measured, Rounds, Task, rounds, rounds_against};
use crate::report::Report;
use crate::{Result, Run};

/// Tokens of the sequence that threads share, where none is asked for.
const T: usize = 8192;
/// Lengths whose tokens per second are compared with those at the first.
const LENGTHS: [usize; 3] = [8192, 32_768, 131_072];

const PASSES: [fn(&Problem, &mut Buffers) -> Result; 2] =
    [|problem, buffers| problem.forward(buffers).map(drop), Problem::forward_backward];

/// One row per shape: speed on all threads over that on one, and as a share of the product's own gain.
pub fn threads_table(run: &Run<'_>, report: &mut Report) -> Result {
    if run.machine.threads() == 1 {
        return report.paragraph("scaling: one thread alone, nothing to compare");
    }
    let t = run.length.unwrap_or(T);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let one = Machine::new(1);
    let gain = format!("{} threads over one", run.machine.threads());
    report.table(&["scaling, forward", "T", &gain, "over product's", "fwd+bwd", "over product's"])?;
    for shape in &run.shapes {
        let problem = Problem::new(shape, t, run.biases)?;
        let (mut alone, mut together) = (Buffers::default(), Buffers::default());
        let mut cells = vec![shape.name.to_string(), t.to_string()];
        for pass in PASSES {
            let amount = shape.operations(t, run.biases);
            let on_one = &mut || pool.install(|| pass(&problem, &mut alone)).expect("checked before");
            let on_all = &mut || pass(&problem, &mut together).expect("checked before");
            let [on_one, on_all] = rounds_against(
                run.pairs,
                [&|| pool.install(|| one.product()), &|| run.machine.product()],
                [Task { amount, run: on_one }, Task { amount, run: on_all }],
            );
            cells.push(format!("{:.2}", on_one.over(&on_all)));
            cells.push(format!("{:.3}", on_all.ratio_over(&on_one)));
        }
        report.row(&cells)?;
    }
    report.end()
}

/// One row per shape: tokens per second at greater lengths over those at the first, one call after the other, arrays kept.
pub fn lengths_table(run: &Run<'_>, report: &mut Report) -> Result {
    let titles = [1, 2].map(|n| format!("{} / {}", LENGTHS[n], LENGTHS[0]));
    let both = titles.each_ref().map(|title| format!("fwd+bwd {title}"));
    report.table(&["tokens/s, forward", &titles[0], &titles[1], &both[0], &both[1]])?;
    for shape in &run.shapes {
        let mut sequences = vec![];
        for t in LENGTHS {
            sequences.push((Problem::new(shape, t, run.biases)?, Buffers::default()));
        }
        let mut cells = vec![shape.name.to_string()];
        for pass in PASSES {
            let [first, long, longest] = in_turn(run.pairs, pass, &mut sequences);
            for (measured, t) in [(long, LENGTHS[1]), (longest, LENGTHS[2])] {
                cells.push(format!("{:.3}", t as f64 / LENGTHS[0] as f64 / measured.over(&first)));
            }
        }
        report.row(&cells)?;
    }
    report.end()
}

/// The pass on each sequence in turn.
fn in_turn(
    pairs: Rounds,
    pass: fn(&Problem, &mut Buffers) -> Result,
    sequences: &mut [(Problem, Buffers)],
) -> [Measured; 3] {
    let [a, b, c] = sequences else { unreachable!("one of each length") };
    let mut runs = [a, b, c].map(|(problem, buffers)| || pass(problem, buffers).expect("checked before"));
    rounds(pairs, || 1.0, runs.each_mut().map(|run| Task { amount: 1.0, run }))
}
