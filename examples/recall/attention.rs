//! What a unit attends with: the same queries, keys and values for all.

use std::ops::Range;

use transformer_vq::Error;
use transformer_vq::attention::{BatchBiases, BatchInputs, BatchSaved, VqAttention, quadratic};
use transformer_vq::codebook::{CodeStats, Codebook, Estimator};
use transformer_vq::ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, s};

use crate::linear;

/// Weight of the commitment loss.
const COMMIT_WEIGHT: f64 = 0.03;

/// Attention of one head.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // there are two of them
pub enum Attention {
    /// Through a codebook, keys beyond the window seen or not.
    Vq(VqAttention, Codebook<f32>),
    /// Exact, over keys as they are.
    Quadratic,
    /// Without softmax.
    Linear,
}

/// Rows are tokens, sequence after sequence [B T, width]; `relative` [1, M+1, K].
pub struct Inputs<'a> {
    pub batch: usize,
    pub q: ArrayView2<'a, f32>,
    pub k: ArrayView2<'a, f32>,
    pub v: ArrayView2<'a, f32>,
    pub relative: Option<ArrayView3<'a, f32>>,
}

/// What backward needs of forward.
pub enum Saved {
    Vq(BatchSaved<f32>),
    /// Outputs, and the logarithm of each query's sum.
    Quadratic(Array2<f32>, Array1<f32>),
    /// See [`linear`].
    Linear(Array2<f32>),
}

/// What a codebook learns from, and how far keys are from it.
pub struct Quantized {
    pub stats: CodeStats<f32>,
    pub commit_loss: f64,
}

/// Gradients of [`Inputs`].
pub struct Gradients {
    pub q: Array2<f32>,
    pub k: Array2<f32>,
    pub v: Array2<f32>,
    pub relative: Option<Array3<f32>>,
}

impl Attention {
    #[allow(clippy::type_complexity)] // three results of one pass
    pub fn forward(&self, inputs: &Inputs<'_>) -> Result<(Array2<f32>, Saved, Option<Quantized>), Error> {
        let width = inputs.v.ncols();
        match self {
            Attention::Vq(attention, codebook) => {
                let biases = Biases::new(inputs);
                let inputs = inputs.vq(&biases);
                let mut states = attention.new_states(inputs.q.dim().0, codebook, width)?;
                let (output, saved) = attention.forward(&inputs, codebook, &mut states)?;
                let quantized = Quantized { stats: output.stats, commit_loss: output.commit_loss };
                Ok((rows(output.out), Saved::Vq(saved), Some(quantized)))
            }
            Attention::Quadratic => {
                let (mut out, mut lse) = (Array2::zeros(inputs.v.raw_dim()), Array1::zeros(inputs.v.nrows()));
                for tokens in inputs.sequences() {
                    let (q, k, v) = inputs.sequence(&tokens);
                    let (o, l) = quadratic::forward(q, k, v)?;
                    out.slice_mut(s![tokens.clone(), ..]).assign(&o);
                    lse.slice_mut(s![tokens]).assign(&l);
                }
                Ok((out.clone(), Saved::Quadratic(out, lse), None))
            }
            Attention::Linear => {
                let mut out = Array2::zeros(inputs.v.raw_dim());
                let mut all = Array2::zeros((inputs.v.nrows(), width + 1));
                for tokens in inputs.sequences() {
                    let (q, k, v) = inputs.sequence(&tokens);
                    let (o, y) = linear::forward(q, k, v)?;
                    out.slice_mut(s![tokens.clone(), ..]).assign(&o);
                    all.slice_mut(s![tokens, ..]).assign(&y);
                }
                Ok((out, Saved::Linear(all), None))
            }
        }
    }

    /// Gradients of `sum(d_out * out)` and of the commitment loss; `saved` is of the same attention.
    pub fn backward(
        &self,
        inputs: &Inputs<'_>,
        saved: Saved,
        d_out: ArrayView2<'_, f32>,
    ) -> Result<Gradients, Error> {
        let mut d = Gradients {
            q: Array2::zeros(inputs.q.raw_dim()),
            k: Array2::zeros(inputs.k.raw_dim()),
            v: Array2::zeros(inputs.v.raw_dim()),
            relative: None,
        };
        match (self, saved) {
            (Attention::Vq(attention, _), Saved::Vq(saved)) => {
                let biases = Biases::new(inputs);
                let (vq, d_out) = (inputs.vq(&biases), one_head(d_out, inputs.batch));
                let estimator = Estimator::StraightThrough;
                let all = attention.backward(&vq, saved, d_out, estimator, COMMIT_WEIGHT)?;
                let relative = all.biases.map(|biases| biases.relative);
                d = Gradients { q: rows(all.q), k: rows(all.k), v: rows(all.v), relative };
            }
            (_, Saved::Quadratic(out, lse)) => {
                for tokens in inputs.sequences() {
                    let (q, k, v) = inputs.sequence(&tokens);
                    let (out, lse) = (out.slice(s![tokens.clone(), ..]), lse.slice(s![tokens.clone()]));
                    let d_out = d_out.slice(s![tokens.clone(), ..]);
                    let of_sequence = quadratic::backward(q, k, v, out, lse, d_out)?;
                    d.assign(&tokens, [of_sequence.q, of_sequence.k, of_sequence.v]);
                }
            }
            (_, Saved::Linear(y)) => {
                for tokens in inputs.sequences() {
                    let (q, k, v) = inputs.sequence(&tokens);
                    let (y, d_out) = (y.slice(s![tokens.clone(), ..]), d_out.slice(s![tokens.clone(), ..]));
                    d.assign(&tokens, linear::backward(q, k, v, y, d_out)?);
                }
            }
            (_, Saved::Vq(_)) => unreachable!("saved by another attention"),
        }
        Ok(d)
    }
}

impl Gradients {
    fn assign(&mut self, tokens: &Range<usize>, [q, k, v]: [Array2<f32>; 3]) {
        for (all, d) in [(&mut self.q, q), (&mut self.k, k), (&mut self.v, v)] {
            all.slice_mut(s![tokens.clone(), ..]).assign(&d);
        }
    }
}

/// What the crate takes besides learned biases: none of the content, and a constant direction that makes `relative` a bias per
/// distance.
struct Biases {
    content: Array2<f32>,
    position: Array2<f32>,
}

impl Biases {
    fn new(inputs: &Inputs<'_>) -> Self {
        let dim = (1, inputs.q.ncols());
        Biases { content: Array2::zeros(dim), position: Array2::ones(dim) }
    }
}

impl Inputs<'_> {
    /// The rows of each sequence.
    fn sequences(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.q.nrows() / self.batch;
        (0..self.batch).map(move |b| b * len..(b + 1) * len)
    }

    fn sequence(&self, tokens: &Range<usize>) -> (View<'_>, View<'_>, View<'_>) {
        let part = s![tokens.clone(), ..];
        (self.q.slice(part), self.k.slice(part), self.v.slice(part))
    }

    fn vq<'s>(&'s self, biases: &'s Biases) -> BatchInputs<'s, f32> {
        let relative = self.relative.as_ref().map(|relative| BatchBiases {
            content: biases.content.view(),
            position: biases.position.view(),
            relative: relative.view(),
        });
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| one_head(x.view(), self.batch));
        BatchInputs { biases: relative, ..BatchInputs::new(q, k, v) }
    }
}

type View<'a> = ArrayView2<'a, f32>;

/// [B T, width] seen as [B, 1, T, width].
pub fn one_head(rows: ArrayView2<'_, f32>, batch: usize) -> ArrayView4<'_, f32> {
    let (n, width) = rows.dim();
    rows.into_shape_with_order((batch, 1, n / batch, width)).expect("contiguous")
}

/// [B, 1, T, width] as [B T, width].
fn rows(array: Array4<f32>) -> Array2<f32> {
    let (b, _, t, width) = array.dim();
    let array = array.permuted_axes([0, 2, 1, 3]);
    array.into_shape_with_order((b * t, width)).expect("attention lays its results out token by token")
}
