//! The fair competitor: exact attention without a codebook, and the speed-up over it.
//!
//! Heads run at once, and each of them on all threads. Results go to memory that stays, as those of attention over codes do.

use std::hint::black_box;

use rayon::prelude::*;
use transformer_vq::attention::quadratic;
use transformer_vq::check::relative_rms;
use transformer_vq::ndarray::{Array1, Array2, ArrayView2, s};

use crate::attention::{Buffers, Problem};
use crate::machine::{Measured, Task, rounds};
use crate::report::Report;
use crate::{Result, Run, agree};

/// The longest sequence that is affordable, unless it is asked for.
const LONGEST: usize = 32_768;
/// Tokens whose results are compared with a plain softmax.
const CHECKED: usize = 300;

/// Results of one head, in memory that stays.
#[derive(Default)]
struct Kept {
    out: Array2<f32>,
    lse: Array1<f32>,
    gradients: quadratic::Gradients<f32>,
}

/// A problem's keys as they are.
struct Exact<'a> {
    problem: &'a Problem,
}

impl<'a> Exact<'a> {
    /// q, k, v and d_out.
    fn head(&self, n: usize) -> [ArrayView2<'a, f32>; 4] {
        let Problem { q, k, v, d_out, .. } = self.problem;
        [q, k, v, d_out].map(|x| x.slice(s![0, n, .., ..]))
    }

    /// Into one of `kept` per head.
    fn forward(&self, kept: &mut [Kept]) -> Result {
        let heads = kept.par_iter_mut().enumerate();
        heads.try_for_each(|(n, Kept { out, lse, .. })| {
            let [q, k, v, _] = self.head(n);
            quadratic::forward_into(q, k, v, out, lse)
        })?;
        Ok(())
    }

    fn forward_backward(&self, kept: &mut [Kept]) -> Result {
        self.forward(kept)?;
        let heads = kept.par_iter_mut().enumerate();
        heads.try_for_each(|(n, Kept { out, lse, gradients })| {
            let [q, k, v, d_out] = self.head(n);
            quadratic::backward_into(q, k, v, (out.view(), lse.view()), d_out, gradients)
        })?;
        Ok(())
    }

    /// Compares the last outputs of the first head with a plain softmax.
    fn check(&self) -> Result {
        let [q, k, v, _] = self.head(0).map(|x| x.slice_move(s![..CHECKED.min(x.nrows()), ..]));
        let (out, _) = quadratic::forward(q, k, v)?;
        let last = q.nrows() - 1;
        let scores = k.dot(&q.row(last)); // the last query sees every key
        let max = scores.fold(f32::NEG_INFINITY, |max, &score| max.max(score));
        let p = scores.mapv(|score| (score - max).exp());
        let expected = p.dot(&v) / p.sum();
        agree(
            "quadratic attention and a plain softmax",
            relative_rms(&out.row(last).to_owned(), &expected),
            1e-4,
        )
    }
}

/// One row per shape and length.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    report.table(&[
        "quadratic",
        "T",
        "forward tokens/s",
        "GFLOP/s",
        "ratio",
        "speed-up of VQ",
        "over operations",
        "fwd+bwd tokens/s",
        "GFLOP/s",
        "ratio",
        "speed-up of VQ",
        "over operations",
    ])?;
    for shape in run.shapes.iter().filter(|shape| run.one_shape || shape.compared) {
        for &t in run.lengths.iter().filter(|&&t| t <= LONGEST || run.length.is_some()) {
            let problem = Problem::new(shape, t, run.biases)?;
            let exact = Exact { problem: &problem };
            let mut kept: Vec<_> = (0..shape.heads).map(|_| Kept::default()).collect();
            exact.check()?;
            let mut buffers = Buffers::default();
            let operations = [shape.quadratic_operations(t), shape.operations(t, run.biases)];
            let forward = compare(
                run,
                operations,
                &mut || exact.forward(&mut kept).expect("checked before"),
                &mut || {
                    black_box(problem.forward(&mut buffers).expect("checked before"));
                },
            );
            let both = compare(
                run,
                operations.map(|operations| 3.0 * operations),
                &mut || exact.forward_backward(&mut kept).expect("checked before"),
                &mut || problem.forward_backward(&mut buffers).expect("checked before"),
            );
            let mut cells = vec![shape.name.to_string(), t.to_string()];
            for ([exact_time, linear_time], passes) in [(&forward, 1.0), (&both, 3.0)] {
                let speed_up = exact_time.over(linear_time);
                cells.extend([
                    format!("{:.0}", t as f64 / exact_time.seconds()),
                    format!("{:.0}", passes * operations[0] / exact_time.seconds() / 1e9),
                    format!("{:.2}", exact_time.ratio()),
                    format!("{speed_up:.2}"),
                    format!("{:.2}", speed_up * operations[1] / operations[0]),
                ]);
            }
            report.row(&cells)?;
        }
    }
    report.end()
}

/// Quadratic and linear attention in turn.
fn compare(
    run: &Run<'_>,
    [of_exact, of_linear]: [f64; 2],
    exact: &mut dyn FnMut(),
    linear: &mut dyn FnMut(),
) -> [Measured; 2] {
    let tasks = [Task { amount: of_exact, run: exact }, Task { amount: of_linear, run: linear }];
    rounds(run.pairs, || run.machine.product(), tasks)
}
