//! Pure functions on arrays, each with its gradient beside it.
//!
//! Rows are tokens. A function that takes an array it does not need later borrows it; gradients of parameters are added to
//! what the caller brings, gradients of inputs are returned.
//!
//! Arrays may have any strides: where the elements of a row are not neighbours, a copy is made first. Every function checks
//! shapes and indices before it computes or adds anything. None looks for NaN or infinities: these pass through to the rows
//! (and sums) that they reach, and are refused where a model, a codebook or attention is entered.
//!
//! Work on many rows is shared among the threads of the current rayon pool. It is cut by shape alone and summed in a fixed
//! order, so that the result has the same bits for any number of threads; few rows stay on the calling thread.

pub mod aligned;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub(crate) mod exp;
pub(crate) mod finite;
pub mod gelu;
pub mod linear;
pub(crate) mod matmul;
pub(crate) mod parallel;
pub mod positions;
pub mod rms_norm;
pub(crate) mod rows;
pub mod silu;
pub(crate) mod simd;
pub(crate) mod threads;
pub(crate) mod transpose;
pub(crate) mod triangle;

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2};

    use super::*;

    fn numbers(dim: (usize, usize), seed: usize) -> Array2<f32> {
        Array2::from_shape_fn(dim, |(i, j)| ((i * 31 + j * 17 + seed * 7 + 1) as f32).sin())
    }

    /// Everything that runs on threads, on enough rows for several tasks, the last of them ragged.
    fn run_all() -> Vec<Array2<f32>> {
        let (n, width) = (1001, 66);
        let (x, g, d_y, w) = (
            numbers((n, width), 1),
            numbers((n, width), 2),
            numbers((n, width), 3),
            numbers((width, width), 4),
        );
        let (x, g, d_y, w) = (x.view(), g.view(), d_y.view(), w.view());
        let (gain, tokens) = (w.row(0), Array1::from_shape_fn(n, |i| (i * i % 13) as u32));
        let (heads, saved_heads) = rms_norm::forward(x, 2, 0.5).unwrap();
        let (affine, saved) = rms_norm::forward_affine(x, gain, w.row(1)).unwrap();
        let mut sums = numbers((3, width), 5);
        let (mut d_w, mut d_table) = (Array2::zeros(w.dim()), Array2::zeros(w.dim()));
        let mut sum_rows = sums.outer_iter_mut();
        let [d_gain, d_bias, d_b] = [(); 3].map(|()| sum_rows.next().unwrap());
        let d_affine = rms_norm::backward_affine(x, &saved, gain, d_y, d_gain, d_bias).unwrap();
        let d_x = linear::backward(x, w, d_y, d_w.view_mut(), Some(d_b)).unwrap();
        embedding::backward(tokens.view(), d_y, d_table.view_mut()).unwrap();
        let (d_o, d_g) = silu::gate_backward(x, g, d_y).unwrap();
        let (loss, d_logits) = cross_entropy::forward_backward(x, tokens.view(), None).unwrap();
        let loss = Array2::from_shape_fn((1, 4), |(_, i)| (loss.to_bits() >> (16 * i) & 0xffff) as f32);
        vec![
            heads,
            rms_norm::backward(x, &saved_heads, 2, 0.5, d_y).unwrap(),
            affine,
            d_affine,
            sums,
            silu::forward(x).unwrap(),
            silu::backward(x, d_y).unwrap(),
            silu::gate(x, g).unwrap(),
            d_o,
            d_g,
            gelu::forward(x).unwrap(),
            gelu::backward(x, d_y).unwrap(),
            linear::forward(x, w, Some(gain)).unwrap(),
            d_x,
            d_w,
            embedding::forward(w, tokens.view()).unwrap(),
            d_table,
            loss,
            d_logits,
            cross_entropy::log_softmax(x).unwrap(),
            positions::sinusoids(7, n, width, 1e5).unwrap(),
        ]
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let arrays = pool.install(run_all);
            Vec::from_iter(arrays.iter().map(|array| array.mapv(f32::to_bits)))
        };
        let expected = on(1);
        for threads in [2, 3, 5] {
            assert_eq!(on(threads), expected);
        }
    }
}
