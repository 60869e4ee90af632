//! Attention of the shapes that models use.

use std::hint::black_box;

use transformer_vq::attention::{
    BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved, Biases, Inputs, VqAttention, naive,
};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema, Estimator};
use transformer_vq::ndarray::{Array2, Array3, Array4, Axis, s};
use transformer_vq::ops::aligned;

use crate::report::Report;
use crate::shapes::{Normal, Shape};
use crate::{Result, Run, agree};

/// One sequence.
pub struct Problem {
    attention: VqAttention,
    codebook: Codebook<f32>,
    pub q: Array4<f32>,
    pub k: Array4<f32>,
    pub v: Array4<f32>,
    pub d_out: Array4<f32>,
    biases: Option<[Array3<f32>; 3]>,
}

impl Problem {
    pub fn new(shape: &Shape, t: usize, biases: bool) -> Result<Self> {
        let mut normal = Normal::new(t as u64);
        let &Shape { heads, d_k, d_v, n_codes, block_len, .. } = shape;
        // Queries and keys as a unit of the model has them: of RMS 1, times K^(-1/4).
        let scale = (d_k as f32).powf(-0.25);
        let codewords = normal.array((heads, n_codes, d_k), scale);
        let mut array = |width, scale| -> Result<Array4<f32>> {
            let mut array = aligned::zeros((1, t, heads, width))?;
            normal.fill(array.view_mut(), scale);
            Ok(array.permuted_axes([0, 2, 1, 3]))
        };
        let (q, k, v, d_out) = (array(d_k, scale)?, array(d_k, scale)?, array(d_v, 1.0)?, array(d_v, 1.0)?);
        let rows = [1, 1, block_len + 1];
        let biases = biases.then(|| rows.map(|n| normal.array((heads, n, d_k), 0.1)));
        let codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99)?);
        Ok(Problem { attention: shape.attention(), codebook, q, k, v, d_out, biases })
    }

    fn inputs(&self) -> BatchInputs<'_, f32> {
        BatchInputs {
            biases: self.biases.as_ref().map(|[content, position, relative]| BatchBiases {
                content: content.index_axis(Axis(1), 0),
                position: position.index_axis(Axis(1), 0),
                relative: relative.view(),
            }),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    pub fn forward(&self, buffers: &mut Buffers) -> Result<BatchSaved<f32>> {
        let mut states = self.attention.new_states(1, &self.codebook, self.v.len_of(Axis(3)))?;
        let output = &mut buffers.output;
        Ok(self.attention.forward_into(&self.inputs(), &self.codebook, &mut states, output)?)
    }

    pub fn forward_backward(&self, buffers: &mut Buffers) -> Result {
        let saved = self.forward(buffers)?;
        let (inputs, d_out) = (self.inputs(), self.d_out.view());
        let (through, gradients) = (Estimator::StraightThrough, &mut buffers.gradients);
        Ok(self.attention.backward_into(&inputs, saved, d_out, through, 1e-4, gradients)?)
    }

    /// Compares output and the gradients of q and v with the definition, for one head.
    fn check(&self) -> Result {
        let mut buffers = Buffers::default();
        self.forward_backward(&mut buffers)?;
        let head = |x: &Array4<f32>| x.slice(s![0, 0, .., ..]).to_owned();
        let (q, v, d_out) = (head(&self.q), head(&self.v), head(&self.d_out));
        let codebook = self.codebook.codewords();
        let codewords = codebook.index_axis(Axis(0), 0);
        let codes = buffers.output.codes.slice(s![0, 0, ..]);
        let k_hat: Array2<f32> = codewords.select(Axis(0), &codes.mapv(|code| code as usize).to_vec());
        let biases = self.biases.as_ref().map(|[content, position, relative]| Biases {
            content: content.slice(s![0, 0, ..]),
            position: position.slice(s![0, 0, ..]),
            relative: relative.index_axis(Axis(0), 0),
        });
        let inputs = Inputs { q: q.view(), codes, v: v.view(), codewords, biases, starts: None };
        let states = self.attention.new_states(1, &self.codebook, v.ncols())?;
        let state = &states[[0, 0]];
        let (expected, _) = naive::forward(&self.attention, &inputs, k_hat.view(), state)?;
        let d = naive::backward(&self.attention, &inputs, k_hat.view(), state, d_out.view())?;
        for (got, expected) in
            [(&buffers.output.out, expected.out), (&buffers.gradients.q, d.q), (&buffers.gradients.v, d.v)]
        {
            agree("attention and its definition", relative_rms(&head(got), &expected), 1e-4)?;
        }
        Ok(())
    }
}

/// Results, in memory that stays.
#[derive(Default)]
pub struct Buffers {
    pub output: BatchOutput<f32>,
    pub gradients: BatchGradients<f32>,
}

/// Compares each shape with the definition, on so many tokens that the last of them read from the cache.
pub fn check(shapes: &[&Shape], biases: bool) -> Result {
    shapes.iter().try_for_each(|shape| Problem::new(shape, 2 * shape.block_len + 16, biases)?.check())
}

/// One row per shape and length.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    report.table(&[
        "attention",
        "T",
        "forward tokens/s",
        "GFLOP/s",
        "ratio",
        "fwd+bwd tokens/s",
        "GFLOP/s",
        "ratio",
    ])?;
    for shape in &run.shapes {
        for &t in &run.lengths {
            let problem = Problem::new(shape, t, run.biases)?;
            let mut buffers = Buffers::default();
            let operations = shape.operations(t, run.biases);
            let forward = run.machine.pairs(run.pairs, operations, &mut || {
                black_box(problem.forward(&mut buffers).expect("checked before"));
            });
            let both = run.machine.pairs(run.pairs, 3.0 * operations, &mut || {
                problem.forward_backward(&mut buffers).expect("checked before");
            });
            let speed = |amount: f64, seconds: f64| format!("{:.0}", amount / seconds);
            report.row(&[
                shape.name.to_string(),
                t.to_string(),
                speed(t as f64, forward.seconds()),
                speed(operations / 1e9, forward.seconds()),
                format!("{:.2}", forward.ratio()),
                speed(t as f64, both.seconds()),
                speed(3.0 * operations / 1e9, both.seconds()),
                format!("{:.2}", both.ratio()),
            ])?;
        }
    }
    report.end()
}
