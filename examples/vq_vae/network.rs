//! Encoder and decoder, with their gradients.
//!
//! ```text
//! (1) h = silu(x W0 + b0)                     a patch by itself
//! (2) k = silu(around(h) W1 + b1) W2 + b2     with its eight neighbours: the key
//! (3) x' = silu(around(k^) W3 + b3) W4 + b4   from the codewords of patch and neighbours
//! ```

use transformer_vq::codebook::start;
use transformer_vq::ndarray::{Array1, Array2, ArrayView2, ArrayViewD, ArrayViewMutD, Axis, s};
use transformer_vq::ops::{linear, silu};
use transformer_vq::{Error, Scalar};

use crate::images::{GRID, PATCHES, WIDTH};

/// Patches that [`around`] puts side by side.
const AROUND: usize = 9;
/// Width of the hidden rows of encoder and decoder.
const HIDDEN: (usize, usize) = (64, 128);

/// Weights, or their gradients.
pub struct Network<T> {
    layers: Vec<Linear<T>>,
}

struct Linear<T> {
    w: Array2<T>,
    bias: Array1<T>,
}

/// What backward needs of forward: the input of every layer, and what went into the activations.
pub struct Saved<T> {
    inputs: Vec<Array2<T>>,
    before: Vec<Array2<T>>,
}

impl<T: Scalar> Network<T> {
    /// Random weights, for keys of width `d_k`.
    pub fn new(d_k: usize, seed: u64) -> Result<Self, Error> {
        let (encoder, decoder) = HIDDEN;
        let sizes = [
            (WIDTH, encoder),
            (AROUND * encoder, encoder),
            (encoder, d_k),
            (AROUND * d_k, decoder),
            (decoder, WIDTH),
        ];
        let layer = |(i, (input, output)): (u64, (usize, usize))| {
            let w = start::random(1, input, output, (input as f64).sqrt().recip(), seed.wrapping_add(i))?;
            Ok(Linear { w: w.index_axis_move(Axis(0), 0), bias: Array1::zeros(output) })
        };
        Ok(Network { layers: (0..).zip(sizes).map(layer).collect::<Result<_, Error>>()? })
    }

    pub fn zeros_like(&self) -> Self {
        let zeros = |l: &Linear<T>| Linear { w: Array2::zeros(l.w.dim()), bias: Array1::zeros(l.bias.dim()) };
        Network { layers: self.layers.iter().map(zeros).collect() }
    }

    /// Every array with its gradient, for an optimizer.
    pub fn pairs<'a>(
        &'a mut self,
        d: &'a Network<T>,
    ) -> impl Iterator<Item = (ArrayViewMutD<'a, T>, ArrayViewD<'a, T>)> {
        self.layers.iter_mut().zip(&d.layers).flat_map(|(p, d)| {
            [
                (p.w.view_mut().into_dyn(), d.w.view().into_dyn()),
                (p.bias.view_mut().into_dyn(), d.bias.view().into_dyn()),
            ]
        })
    }

    /// (1) and (2): keys [N, K] of patches [N, WIDTH].
    pub fn encode(&self, x: ArrayView2<'_, T>) -> Result<(Array2<T>, Saved<T>), Error> {
        let (hidden, before) = self.activated(0, x)?;
        let hidden = around(hidden.view());
        let (with_neighbours, before_key) = self.activated(1, hidden.view())?;
        let keys = self.linear(2, with_neighbours.view())?;
        Ok((
            keys,
            Saved { inputs: vec![x.to_owned(), hidden, with_neighbours], before: vec![before, before_key] },
        ))
    }

    /// (3): patches [N, WIDTH] from quantized keys [N, K].
    pub fn decode(&self, quantized: ArrayView2<'_, T>) -> Result<(Array2<T>, Saved<T>), Error> {
        let quantized = around(quantized);
        let (hidden, before) = self.activated(3, quantized.view())?;
        let x = self.linear(4, hidden.view())?;
        Ok((x, Saved { inputs: vec![quantized, hidden], before: vec![before] }))
    }

    /// The gradient of the quantized keys; that of the weights is added to `d`.
    pub fn decode_backward(
        &self,
        saved: &Saved<T>,
        d_x: ArrayView2<'_, T>,
        d: &mut Network<T>,
    ) -> Result<Array2<T>, Error> {
        let d_hidden = self.linear_backward(4, &saved.inputs[1], d_x, d)?;
        let d_before = silu::backward(saved.before[0].view(), d_hidden.view())?;
        Ok(around_backward(self.linear_backward(3, &saved.inputs[0], d_before.view(), d)?.view()))
    }

    /// Adds the gradient of the encoder's weights to `d`.
    pub fn encode_backward(
        &self,
        saved: &Saved<T>,
        d_keys: ArrayView2<'_, T>,
        d: &mut Network<T>,
    ) -> Result<(), Error> {
        let d_hidden = self.linear_backward(2, &saved.inputs[2], d_keys, d)?;
        let d_before = silu::backward(saved.before[1].view(), d_hidden.view())?;
        let d_hidden = around_backward(self.linear_backward(1, &saved.inputs[1], d_before.view(), d)?.view());
        let d_before = silu::backward(saved.before[0].view(), d_hidden.view())?;
        self.linear_backward(0, &saved.inputs[0], d_before.view(), d)?;
        Ok(())
    }

    fn linear(&self, i: usize, x: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
        let Linear { w, bias } = &self.layers[i];
        linear::forward(x, w.view(), Some(bias.view()))
    }

    /// After and before the activation.
    fn activated(&self, i: usize, x: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>), Error> {
        let before = self.linear(i, x)?;
        Ok((silu::forward(before.view())?, before))
    }

    fn linear_backward(
        &self,
        i: usize,
        x: &Array2<T>,
        d_y: ArrayView2<'_, T>,
        d: &mut Network<T>,
    ) -> Result<Array2<T>, Error> {
        let Linear { w, bias } = &mut d.layers[i];
        linear::backward(x.view(), self.layers[i].w.view(), d_y, w.view_mut(), Some(bias.view_mut()))
    }
}

/// Each patch's row with those of its eight neighbours [N, 9 C]; zero beyond the border.
fn around<T: Scalar>(x: ArrayView2<'_, T>) -> Array2<T> {
    let width = x.ncols();
    let mut y = Array2::zeros((x.nrows(), AROUND * width));
    for_each_neighbour(x.nrows(), |row, i, neighbour| {
        y.slice_mut(s![row, i * width..(i + 1) * width]).assign(&x.row(neighbour));
    });
    y
}

/// The gradient of what went into [`around`].
fn around_backward<T: Scalar>(d_y: ArrayView2<'_, T>) -> Array2<T> {
    let width = d_y.ncols() / AROUND;
    let mut d_x = Array2::<T>::zeros((d_y.nrows(), width));
    for_each_neighbour(d_y.nrows(), |row, i, neighbour| {
        let mut d = d_x.row_mut(neighbour);
        d += &d_y.slice(s![row, i * width..(i + 1) * width]);
    });
    d_x
}

/// Calls `f` with a row, the number of a neighbour (itself is one), and the neighbour's row.
fn for_each_neighbour(rows: usize, mut f: impl FnMut(usize, usize, usize)) {
    for row in 0..rows {
        let (image, place) = (row / PATCHES, row % PATCHES);
        for i in 0..AROUND {
            // One up and left where it is 0.
            let (y, x) = (place / GRID + i / 3, place % GRID + i % 3);
            if (1..=GRID).contains(&y) && (1..=GRID).contains(&x) {
                f(row, i, image * PATCHES + (y - 1) * GRID + x - 1);
            }
        }
    }
}
