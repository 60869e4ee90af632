//! Row-wise work in parallel, and sums along and across rows.
//!
//! Rows are handed out as slices, in chunks of [`per_task`] rows, one task each. Rayon runs a single chunk on the calling
//! thread, so few rows cost nothing extra. What a row gives depends on that row alone, and what is summed over rows is
//! summed in their order: no result depends on the number of threads.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, CowArray, Ix2};
use rayon::prelude::*;

use crate::error::check_memory;
use crate::{Error, Scalar};

/// Elements that one task takes: tens of microseconds of work, far above what giving it to another thread costs.
pub(crate) const ELEMENTS_PER_TASK: usize = 1 << 15;

/// Rows of this width that one task takes.
fn per_task(width: usize) -> usize {
    // At least 16, so that a task's column sums stay small beside the rows they come from.
    (ELEMENTS_PER_TASK / width.max(1)).clamp(16, 256)
}

/// Zeros of shape [rows, width], if there is memory for them.
pub(crate) fn zeros<T: Scalar>(
    what: &'static str,
    (rows, width): (usize, usize),
) -> Result<Array2<T>, Error> {
    check_memory::<T>(what, &[rows, width])?;
    Ok(Array2::zeros((rows, width)))
}

/// The same numbers with the elements of each row side by side: a copy only where they are not.
fn contiguous<T: Scalar>(x: ArrayView2<'_, T>) -> CowArray<'_, T, Ix2> {
    let side_by_side = x.ncols() <= 1 || x.strides()[1] == 1;
    if side_by_side { x.into() } else { x.as_standard_layout().into_owned().into() }
}

/// Row i of each input.
fn slices<'a, T: Scalar, const IN: usize>(inputs: &'a [CowArray<'_, T, Ix2>; IN], i: usize) -> [&'a [T]; IN] {
    inputs.each_ref().map(|x| x.row(i).to_slice().expect("contiguous rows"))
}

/// The results of `f(i, row i of each input, row i of each output)` for the `n` rows, in their order.
///
/// # Shapes
/// `inputs` and `outputs` [n, any width], outputs in standard layout; `width`, that of the widest, sets the chunks.
pub(crate) fn map<T: Scalar, R: Send, const IN: usize, const OUT: usize>(
    (n, width): (usize, usize),
    inputs: [ArrayView2<'_, T>; IN],
    outputs: [&mut Array2<T>; OUT],
    f: impl Fn(usize, [&[T]; IN], [&mut [T]; OUT]) -> R + Sync,
) -> Vec<R> {
    let rows = per_task(width);
    let inputs = inputs.map(contiguous);
    if n <= rows {
        let mut outputs = outputs;
        return (0..n)
            .map(|i| {
                let outputs = outputs.each_mut().map(|y| y.row_mut(i).into_slice().expect("standard layout"));
                f(i, slices(&inputs, i), outputs)
            })
            .collect();
    }
    let mut chunks = outputs.map(|y| y.axis_chunks_iter_mut(Axis(0), rows));
    let tasks: Vec<_> = (0..n)
        .step_by(rows)
        .map(|start| (start, chunks.each_mut().map(|y| y.next().expect("as many rows as the inputs"))))
        .collect();
    let run = |(start, mut outputs): (usize, [_; OUT])| -> Vec<R> {
        (start..n.min(start + rows))
            .map(|i| {
                let outputs = outputs.each_mut().map(|y: &mut ArrayViewMut2<'_, T>| {
                    y.row_mut(i - start).into_slice().expect("standard layout")
                });
                f(i, slices(&inputs, i), outputs)
            })
            .collect()
    };
    tasks.into_par_iter().flat_map_iter(run).collect()
}

/// y <- y + x.
///
/// # Shapes
/// `x` and `y` [N, width], `y` in standard layout.
#[cfg(feature = "model")]
pub(crate) fn add<T: Scalar>(x: ArrayView2<'_, T>, y: &mut Array2<T>) {
    map(x.dim(), [x], [y], |_, [x], [y]| y.iter_mut().zip(x).for_each(|(y, &x)| *y += x));
}

/// Lets `f` add each row of the inputs to the sums: one partial sum per task, the partial sums in the order of the rows.
///
/// # Shapes
/// `inputs` [N, any width], the first of which sets the chunks; `sums` of any length.
pub(crate) fn add_up<T: Scalar, const IN: usize, const OUT: usize>(
    inputs: [ArrayView2<'_, T>; IN],
    mut sums: [ArrayViewMut1<'_, T>; OUT],
    f: impl Fn([&[T]; IN], [&mut [T]; OUT]) + Sync,
) {
    let (n, width) = inputs[0].dim();
    let rows = per_task(width);
    let inputs = inputs.map(contiguous);
    let lengths = sums.each_ref().map(|sum| sum.len());
    let partial: Vec<[Array1<T>; OUT]> = (0..n.div_ceil(rows))
        .into_par_iter()
        .map(|task| {
            let mut partial = lengths.map(Array1::zeros);
            for i in task * rows..n.min((task + 1) * rows) {
                let partial = partial.each_mut().map(|sum| sum.as_slice_mut().expect("standard layout"));
                f(slices(&inputs, i), partial);
            }
            partial
        })
        .collect();
    for partial in &partial {
        sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
    }
}

// Loops below keep one partial result per lane: a vector register needs that, for floating-point sums cannot be reordered.
// They are written without closures, which would not be compiled for the instruction set that is picked at run time.
// What is left of a row becomes masked instructions, of which each costs a dozen cycles: it is skipped where nothing is left.
pub(crate) const SUMS: usize = 16;

/// The sum of `a_i b_i`. Rounding: relative to the sum of `|a_i b_i|` at most `n / 16 + 6` times half an epsilon.
#[inline(always)]
pub(crate) fn dot<T: Scalar>(a: &[T], b: &[T]) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    let mut sums = [T::zero(); SUMS];
    for (a, b) in a.iter().zip(b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    if !a_rest.is_empty() {
        for ((sum, &a), &b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
            *sum += a * b;
        }
    }
    sum_of_lanes(sums)
}

/// The sum of `x_i`, rounded as [`dot`].
#[inline(always)]
pub(crate) fn sum<T: Scalar>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<SUMS>();
    let mut sums = [T::zero(); SUMS];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    if !rest.is_empty() {
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += x;
        }
    }
    sum_of_lanes(sums)
}

/// The sum of partial sums, by halves.
#[inline(always)]
pub(crate) fn sum_of_lanes<T: Scalar>(mut lanes: [T; SUMS]) -> T {
    let mut half = SUMS / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest element; NaN takes no part, and no elements give minus infinity.
#[inline(always)]
pub(crate) fn max<T: Scalar>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<SUMS>();
    let mut lanes = [T::neg_infinity(); SUMS];
    for chunk in chunks {
        for (max, &x) in lanes.iter_mut().zip(chunk) {
            *max = if x > *max { x } else { *max };
        }
    }
    lanes.iter().chain(rest).fold(T::neg_infinity(), |max, &x| if x > max { x } else { max })
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;

    fn numbers(dim: (usize, usize)) -> Array2<f64> {
        Array2::from_shape_fn(dim, |(i, j)| ((i * 31 + j * 17) % 23) as f64 - 11.0)
    }

    const DIMS: [(usize, usize); 8] =
        [(0, 0), (0, 3), (3, 0), (1, 1), (7, 5), (256, 3), (257, 1), (1000, 40)];

    #[test]
    fn every_row_is_met_once_and_in_order() {
        for dim in DIMS {
            let x = numbers((2 * dim.0, 2 * dim.1));
            let strided = x.slice(s![..;2, ..dim.1]);
            let transposed = x.slice(s![dim.0.., dim.1..]).to_owned().reversed_axes();
            let transposed = transposed.as_standard_layout().into_owned();
            let transposed = transposed.t();
            let mut y = Array2::from_elem(dim, f64::NAN);
            let mut index = Array2::from_elem((dim.0, 1), f64::NAN);
            let order = map(dim, [strided, transposed], [&mut y, &mut index], |i, [a, b], [y, index]| {
                index[0] = i as f64;
                (0..dim.1).for_each(|j| y[j] = a[j] - 2.0 * b[j]);
                i
            });
            assert_eq!(y, &strided - &(2.0 * &transposed));
            assert!(index.iter().enumerate().all(|(i, &index)| index == i as f64));
            assert_eq!(order, Vec::from_iter(0..dim.0));
        }
    }

    #[test]
    fn sums_over_rows_equal_the_definition_and_are_added() {
        for dim in DIMS {
            let x = numbers(dim);
            let (mut sums, mut count) = (Array1::from_elem(2 * dim.1 + 1, 0.5), Array1::from_elem(1, 0.25));
            let views = [sums.slice_mut(s![1..;2]), count.view_mut()];
            add_up([x.view()], views, |[x], [sums, count]| {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
                count[0] += 1.0;
            });
            assert_eq!(sums.slice(s![1..;2]), x.sum_axis(Axis(0)) + 0.5);
            assert!(sums.slice(s![..;2]).iter().all(|&sum| sum == 0.5));
            assert_eq!(count[0], dim.0 as f64 + 0.25);
        }
    }

    #[test]
    fn sums_along_a_row_equal_the_definition() {
        for n in (0..70).chain([1000]) {
            // Integers: every order of summation gives the same.
            let x = numbers((2, n));
            let (a, b) = (x.row(0), x.row(1));
            let (a, b) = (a.to_slice().unwrap(), b.to_slice().unwrap());
            assert_eq!(dot(a, b), a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>());
            assert_eq!(sum(a), a.iter().sum::<f64>());
            assert_eq!(max(a), a.iter().fold(f64::NEG_INFINITY, |max, &a| max.max(a)));
            for place in 0..n.min(70) {
                let mut one_large = a.to_vec();
                one_large[place] = 12.0;
                assert_eq!(max(&one_large), 12.0);
            }
        }
    }

    #[test]
    fn what_cannot_exist_is_refused() {
        let shape = vec![usize::MAX, 2];
        assert_eq!(zeros::<f32>("y", (usize::MAX, 2)), Err(Error::TooLarge { what: "y", shape }));
    }
}
