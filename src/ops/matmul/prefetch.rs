//! Asks for memory before it is read.
//!
//! A head's rows lie far apart in an array that is laid out token by token, so that the processor does not foresee the next
//! one: reading a row for the first time would wait for memory. A hint changes nothing where it is wrong.

use ndarray::{ArrayView1, ArrayView2, Axis, s};

use crate::Scalar;
use crate::ops::aligned::LINE;

/// Bytes of a page of memory, or of a part of one.
const PAGE: usize = 4096;

/// Rows whose pages are asked for at once.
const ROWS_OF_PAGES: usize = 128;

/// Asks for these rows, if they lie apart from each other and their elements side by side. Rows without gaps a processor foresees
/// by itself.
#[inline]
pub(crate) fn prefetch<T: Scalar>(rows: ArrayView2<'_, T>) {
    if !rows.is_standard_layout() && rows.strides()[1] == 1 {
        // They come slowly, and many: the first-level cache has no room for them so early.
        lines(rows, ask_second_level);
    }
}

/// Asks for a row, if its elements lie side by side.
#[inline]
pub(crate) fn prefetch_row<T: Scalar>(row: ArrayView1<'_, T>) {
    if row.strides()[0] == 1 {
        lines(row.insert_axis(Axis(0)), ask);
    }
}

/// How many rows before its turn a row is asked for.
const AHEAD: usize = 12;

/// At row `row` of a pass over `rows`: asks for one a little later, if there are gaps between rows and none within them.
#[inline(always)]
pub(crate) fn prefetch_ahead<T: Scalar>(rows: ArrayView2<'_, T>, row: usize) {
    let (n, width) = rows.dim();
    if row + AHEAD < n && rows.strides()[0] != width as isize {
        prefetch_row(rows.index_axis_move(Axis(0), row + AHEAD));
    }
}

/// Asks for as many of the first of these rows as are at most one page long, if their elements lie side by side.
#[inline]
pub(crate) fn prefetch_first<T: Scalar>(rows: ArrayView2<'_, T>) {
    if rows.strides()[1] != 1 {
        return;
    }
    let (n, width) = rows.dim();
    let first = PAGE / (width * size_of::<T>()).max(1);
    lines(rows.slice_move(s![..first.min(n), ..]), ask);
}

/// Memory to ask for at a time when what lies there may not be borrowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Later {
    address: usize,
    bytes: usize,
}

impl Later {
    pub fn new<T>(elements: &[T]) -> Self {
        Later { address: elements.as_ptr().addr(), bytes: size_of_val(elements) }
    }

    /// Asks for all of it, into the second-level cache.
    #[inline]
    pub fn ask(self) {
        let line = |at| ask_second_level(std::ptr::without_provenance(self.address.wrapping_add(at)));
        (0..self.bytes).step_by(LINE).for_each(line);
    }
}

/// What to do with each cache line of rows whose elements lie side by side.
#[inline(always)]
fn lines<T: Scalar>(rows: ArrayView2<'_, T>, ask: impl Fn(*const u8)) {
    let (n, width) = rows.dim();
    let stride = rows.strides()[0] * size_of::<T>() as isize;
    let mut row = rows.as_ptr().cast::<u8>();
    for _ in 0..n {
        (0..width * size_of::<T>()).step_by(LINE).for_each(|line| ask(row.wrapping_add(line)));
        row = row.wrapping_offset(stride);
    }
}

/// At every 128th row of a pass over `rows` rows: asks for a line of each page of memory that the next 128 lie on, the first of
/// which begins at `address`, the others `stride` bytes apart.
///
/// A hint on a page that the processor has not met holds up what follows it until the page is found. Where many are asked for
/// at once, they are found side by side.
#[inline(always)]
pub(crate) fn ask_for_pages(row: usize, rows: usize, address: *const u8, stride: isize) {
    if !row.is_multiple_of(ROWS_OF_PAGES) {
        return;
    }
    let rows_per_page = (PAGE / stride.unsigned_abs().max(1)).max(1);
    for later in (0..ROWS_OF_PAGES.min(rows - row)).step_by(rows_per_page) {
        ask_second_level(address.wrapping_offset(stride.wrapping_mul(later as isize)));
    }
}

/// Asks for a cache line; the address need not be valid.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn ask(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch is a hint: it neither faults nor changes memory, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn ask(_: *const u8) {}

/// As [`ask`], into the second-level cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn ask_second_level(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn ask_second_level(_: *const u8) {}
