//! Asks for memory before it is read.
//!
//! A head's rows lie far apart in an array that is laid out token by token, so that the processor does not foresee the next
//! one: reading a row for the first time would wait for memory. A hint costs nothing where it is wrong.

use ndarray::ArrayView2;

use crate::Scalar;
use crate::ops::simd::LINE;

/// Asks for these rows, if their elements lie side by side.
#[inline]
pub(crate) fn prefetch<T: Scalar>(rows: ArrayView2<'_, T>) {
    let (n, width) = rows.dim();
    if n == 0 || width == 0 || rows.strides()[1] != 1 {
        return;
    }
    let bytes = width * size_of::<T>();
    let stride = rows.strides()[0] * size_of::<T>() as isize;
    let mut row = rows.as_ptr().cast::<u8>();
    for _ in 0..n {
        for line in (0..bytes).step_by(LINE) {
            ask(row.wrapping_add(line));
        }
        row = row.wrapping_offset(stride);
    }
}

/// Asks for what lies `rows` rows of this length after a row, be it there or not.
#[inline(always)]
pub(crate) fn prefetch_beyond<T: Scalar>(row: &[T], rows: usize) {
    let beyond = row.as_ptr().wrapping_add(rows * row.len()).cast::<u8>();
    for line in (0..size_of_val(row)).step_by(LINE) {
        ask(beyond.wrapping_add(line));
    }
}

/// Asks for a cache line; the address need not be valid.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn ask(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch is a hint: it neither faults nor changes memory, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(super) fn ask(_: *const u8) {}
