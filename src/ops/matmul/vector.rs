//! The product of one row and a matrix as it lies: decoding reads every number of a large matrix for a single token.
//!
//! ```text
//! (1) y[j] <- sum_p x[p] B[p][j]     or the sum of several such products
//! ```
//!
//! Memory is what limits, so B is read in the order in which it lies. Long rows are read several side by side, since a processor
//! fetches ahead for each of them; of short ones y stays in registers, and one after the other is read as one stretch of memory.
//!
//! ```text
//! rows of B contiguous:     for 16 rows p:    for each vector of y:   load, 16 multiply-adds, store
//! short rows:               for each row p:   for each vector of y:   a multiply-add
//! columns contiguous:       for as many columns as a vector has numbers:   one vector of sums each, transposed and added up
//! ```
//!
//! An element of y is one sum in the order of p, or depends on its column alone: it has the same bits wherever columns are cut, so
//! the number of threads may say where.

use fearless_simd::{Level, Simd, SimdBase, SimdFloat, dispatch};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, Axis, s};
use rayon::prelude::*;

use super::prefetch::{ask, ask_second_level};
use super::{add_product, product};
use crate::Scalar;
use crate::ops::simd::{level, many_registers};
use crate::ops::transpose::{MOST_LANES, transpose_square};

/// Bytes of B that one task reads at least: below, handing it to another thread costs more than it saves.
const BYTES_PER_TASK: usize = 1 << 16;

/// Bytes of columns up to which those that are read next are asked for while these are read. A processor does not fetch ahead
/// across pages.
const NEAREST: usize = 1 << 13;

/// Columns of a task are a multiple of this, so that vectors fall as they would without a cut.
const COLUMNS: usize = 64;

/// (1), its columns shared among the threads of the current rayon pool.
///
/// # Shapes
/// Each `x` `[k]` and `b` [k, n] of any strides, any k, at least one of them; `y` `[n]`.
pub(crate) fn vector_product<T: Scalar>(terms: &[(ArrayView1<'_, T>, ArrayView2<'_, T>)], y: &mut [T]) {
    let elements: usize = terms.iter().map(|(_, b)| b.len()).sum();
    let parts = (elements * size_of::<T>() / BYTES_PER_TASK).clamp(1, rayon::current_num_threads());
    let columns = y.len().div_ceil(parts).next_multiple_of(COLUMNS);
    let part = |(n, y): (usize, &mut [T])| {
        let from = n * columns;
        for (n, (x, b)) in terms.iter().enumerate() {
            let x = x.as_standard_layout();
            let x = x.as_slice().expect("standard layout");
            on_one_thread(level(), x, b.slice(s![.., from..from + y.len()]), y, n > 0);
        }
    };
    if columns >= y.len() {
        part((0, y));
    } else {
        y.par_chunks_mut(columns).enumerate().for_each(part);
    }
}

/// `y <- x B`, or `y + x B`.
fn on_one_thread<T: Scalar>(level: Level, x: &[T], b: ArrayView2<'_, T>, y: &mut [T], add: bool) {
    let (k, n) = b.dim();
    assert_eq!((x.len(), y.len()), (k, n), "shapes of a product");
    if k == 0 || n == 0 {
        if !add {
            y.fill(T::zero());
        }
        return;
    }
    let (pointer, strides) = (b.as_ptr(), [b.strides()[0], b.strides()[1]]);
    if strides[1] == 1 || n == 1 {
        // SAFETY: b is valid for k rows of n contiguous numbers, as many as x and y have, and y is borrowed mutably.
        dispatch!(level, simd => unsafe { add_rows(simd, x, pointer, strides[0], y, add) });
    } else if strides[0] == 1 || k == 1 {
        // SAFETY: b is valid for n columns of k contiguous numbers, as many as y and x have, and y is borrowed mutably.
        dispatch!(level, simd => unsafe { dot_columns(simd, x, pointer, strides[1], y, add) });
    } else {
        let x = ArrayView1::from(x).insert_axis(Axis(0));
        let y = ArrayViewMut1::from(y).insert_axis(Axis(0));
        if add { add_product(x, b, y) } else { product(x, b, y) }
    }
}

/// (1) over contiguous rows.
///
/// # Safety
/// `b` must be valid for as many rows as `x` has numbers, `b_row` apart, each as long as `y`.
#[inline(always)]
unsafe fn add_rows<S: Simd, T: Scalar>(simd: S, x: &[T], b: *const T, b_row: isize, y: &mut [T], add: bool) {
    if !add {
        y.fill(T::zero());
    }
    let lanes = T::Vector::<S>::LEN;
    // SAFETY: y has as many vectors as are chosen, and no more.
    unsafe {
        match y.len() {
            n if n == lanes => return add_short::<S, T, 1>(simd, x, b, b_row, y),
            n if n == 2 * lanes => return add_short::<S, T, 2>(simd, x, b, b_row, y),
            n if n == 4 * lanes => return add_short::<S, T, 4>(simd, x, b, b_row, y),
            n if n == 8 * lanes => return add_short::<S, T, 8>(simd, x, b, b_row, y),
            _ => {}
        }
    }
    let mut p = 0;
    while p < x.len() {
        let rows = if many_registers(simd) { (x.len() - p).min(16) } else { (x.len() - p).min(8) };
        // SAFETY: p + the rows of the chosen size <= the rows of b.
        unsafe {
            let b = b.offset(p as isize * b_row);
            p += match rows {
                16 => add_some::<S, T, 16>(simd, &x[p..], b, b_row, y),
                8..16 => add_some::<S, T, 8>(simd, &x[p..], b, b_row, y),
                4..8 => add_some::<S, T, 4>(simd, &x[p..], b, b_row, y),
                _ => add_some::<S, T, 1>(simd, &x[p..], b, b_row, y),
            };
        }
    }
}

/// `y += x B` for rows of V vectors, whose sums stay in registers.
///
/// # Safety
/// As [`add_rows`]; `y` must be V vectors long.
#[inline(always)]
unsafe fn add_short<S: Simd, T: Scalar, const V: usize>(
    simd: S,
    x: &[T],
    b: *const T,
    b_row: isize,
    y: &mut [T],
) {
    let lanes = T::Vector::<S>::LEN;
    let load = |numbers| T::Vector::<S>::from_slice(simd, numbers);
    let mut sums: [T::Vector<S>; V] = std::array::from_fn(|j| load(&y[j * lanes..][..lanes]));
    let mut row = b;
    for &x in x {
        let factor = T::Vector::<S>::splat(simd, x);
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: vector j of a row of b.
            let b = load(unsafe { std::slice::from_raw_parts(row.add(j * lanes), lanes) });
            *sum = factor.mul_add(b, *sum);
        }
        row = row.wrapping_offset(b_row);
    }
    for (y, sum) in y.chunks_exact_mut(lanes).zip(sums) {
        sum.store_slice(y);
    }
}

/// `y += x B` for the first R rows; returns R. Asks for the R rows after them.
///
/// # Safety
/// As [`add_rows`], for R rows.
#[inline(always)]
unsafe fn add_some<S: Simd, T: Scalar, const R: usize>(
    simd: S,
    x: &[T],
    b: *const T,
    b_row: isize,
    y: &mut [T],
) -> usize {
    let x: &[T; R] = x.first_chunk().expect("R rows are left");
    let factors = x.map(|x| T::Vector::<S>::splat(simd, x));
    let rows: [*const T; R] = std::array::from_fn(|i| b.wrapping_offset(i as isize * b_row));
    let lanes = T::Vector::<S>::LEN;
    let whole = y.len() / lanes * lanes;
    let mut at = 0;
    while at < whole {
        let sums = &mut y[at..at + lanes];
        let mut sum = T::Vector::<S>::from_slice(simd, sums);
        for (&factor, row) in factors.iter().zip(&rows) {
            ask_second_level(row.wrapping_offset(R as isize * b_row + at as isize).cast());
            // SAFETY: columns at .. at + lanes of one of R rows.
            let b =
                unsafe { T::Vector::<S>::from_slice(simd, std::slice::from_raw_parts(row.add(at), lanes)) };
            sum = factor.mul_add(b, sum);
        }
        sum.store_slice(sums);
        at += lanes;
    }
    for (j, sum) in y.iter_mut().enumerate().skip(whole) {
        for (&x, row) in x.iter().zip(&rows) {
            // SAFETY: column j of one of R rows.
            *sum += x * unsafe { *row.add(j) };
        }
    }
    R
}

/// (1) over contiguous columns.
///
/// # Safety
/// `b` must be valid for as many columns as `y` has numbers, `b_column` apart, each as long as `x`.
#[inline(always)]
unsafe fn dot_columns<S: Simd, T: Scalar>(
    simd: S,
    x: &[T],
    b: *const T,
    b_column: isize,
    y: &mut [T],
    add: bool,
) {
    let lanes = T::Vector::<S>::LEN;
    let zero = T::Vector::<S>::splat(simd, T::zero());
    let next = lanes as isize * b_column;
    let near = next.unsigned_abs() * size_of::<T>() <= NEAREST;
    let (chunks, rest) = x.split_at(x.len() / lanes * lanes);
    for (block, y) in y.chunks_mut(lanes).enumerate() {
        // Beyond the last column it is taken again, and not stored: every column is summed in the same way.
        let columns: [*const T; MOST_LANES] = std::array::from_fn(|j| {
            b.wrapping_offset((block * lanes + j.min(y.len() - 1)) as isize * b_column)
        });
        let mut sums = [zero; MOST_LANES];
        for (sum, &column) in sums[..lanes].iter_mut().zip(&columns) {
            for (n, x) in chunks.chunks_exact(lanes).enumerate() {
                if near {
                    ask(column.wrapping_offset(next + (n * lanes) as isize).cast());
                }
                // SAFETY: the numbers that stand in a column of b as `x` does in its chunks.
                let b = unsafe { std::slice::from_raw_parts(column.add(n * lanes), lanes) };
                *sum = T::Vector::<S>::from_slice(simd, x).mul_add(T::Vector::<S>::from_slice(simd, b), *sum);
            }
            if !rest.is_empty() {
                // SAFETY: the last numbers of a column of b.
                let b = unsafe { std::slice::from_raw_parts(column.add(chunks.len()), rest.len()) };
                let [x, b] = [rest, b].map(|numbers| load_some::<S, T>(simd, numbers));
                *sum = x.mul_add(b, *sum);
            }
        }
        transpose_square::<S, T>(&mut sums);
        let mut half = lanes / 2;
        while half > 0 {
            for j in 0..half {
                let other = sums[j + half];
                sums[j] += other;
            }
            half /= 2;
        }
        for (y, &sum) in y.iter_mut().zip(sums[0].as_slice()) {
            *y = if add { *y + sum } else { sum };
        }
    }
}

/// These numbers, at most as many as a vector has, then zeros.
#[inline]
pub(super) fn load_some<S: Simd, T: Scalar>(simd: S, numbers: &[T]) -> T::Vector<S> {
    let mut padded = [T::zero(); MOST_LANES];
    padded[..numbers.len()].copy_from_slice(numbers);
    T::Vector::<S>::from_slice(simd, &padded[..T::Vector::<S>::LEN])
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2};

    use super::super::weights::tests::numbers;
    use super::*;
    use crate::ops::simd::levels;

    /// Integers: every sum is exact, so equality is exact.
    fn products_equal_the_definition<T: Scalar>(level: Level) {
        for k in [0, 1, 3, 16, 29, 64, 131] {
            for n in [0, 1, 5, 16, 33, 64, 100] {
                let (b, b_t, wide) =
                    (numbers::<T>(k, n + 3, 1), numbers::<T>(n, k + 2, 2), numbers::<T>(k, 2 * n, 3));
                let views =
                    [b.slice(s![.., 3..]), b_t.slice(s![.., 2..]).reversed_axes(), wide.slice(s![.., ..;2])];
                for b in views
                    .into_iter()
                    .flat_map(|b| [b, b.slice_move(s![..;-1, ..]), b.slice_move(s![.., ..;-1])])
                {
                    let x = numbers::<T>(1, k, 4);
                    let expected = x.dot(&b);
                    let mut y = vec![T::nan(); n];
                    for times in 1..=2 {
                        on_one_thread(level, x.as_slice().unwrap(), b, &mut y, times > 1);
                        let expected = &expected * T::from_f64(times.into());
                        assert_eq!(y, expected.as_slice().unwrap(), "{k} x {n} {level:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_every_size_layout_and_level_equal_the_definition() {
        for level in levels() {
            products_equal_the_definition::<f32>(level);
            products_equal_the_definition::<f64>(level);
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let b = Array2::from_shape_fn((700, 1003), |(p, j)| ((p * 1003 + j) as f32).cos());
        let b_t = b.t().as_standard_layout().into_owned();
        let x = Array2::from_shape_fn((700, 2), |(p, _)| (p as f32).sin());
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                [b.view(), b_t.t()].map(|b| {
                    let mut y = Array1::zeros(1003);
                    vector_product(&[(x.column(0), b), (x.column(1), b)], y.as_slice_mut().unwrap());
                    y.mapv(f32::to_bits)
                })
            })
        };
        let expected = on(1);
        for threads in [2, 3, 16] {
            assert_eq!(on(threads), expected);
        }
    }
}
