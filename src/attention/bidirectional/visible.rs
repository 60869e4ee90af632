//! What queries see of all keys together: the codes that occur, how often, and the mean value of each.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};

use crate::attention::CompressiveCache;
use crate::error::check_shape;
use crate::ops::matmul::PackedRows;
use crate::{Error, Scalar};

/// Counts and mean values of the keys that exist. Row u belongs to the u-th of the codes that any of them has.
#[derive(Debug, Clone)]
pub(super) struct Visible<T> {
    /// S.
    n_codes: usize,
    /// The codes that occur, rising `[U]`.
    used: Vec<usize>,
    /// Counts `[U]` and mean values [U, V].
    cache: CompressiveCache<T>,
    /// The codewords of these codes [U, K].
    pub codewords: Array2<T>,
    /// ln N `[U]`.
    pub log_counts: Vec<T>,
}

impl<T: Scalar> Visible<T> {
    /// # Shapes
    /// `codes` and `mask` `[T']`, `v` [T', V], `codewords` [S, K].
    pub fn new(
        codes: ArrayView1<'_, u32>,
        v: ArrayView2<'_, T>,
        codewords: ArrayView2<'_, T>,
        mask: Option<ArrayView1<'_, bool>>,
    ) -> Self {
        let n_codes = codewords.nrows();
        let mut occurs = vec![false; n_codes];
        for run in runs(codes.len(), mask) {
            codes.slice(s![run]).iter().for_each(|&code| occurs[code as usize] = true);
        }
        let used: Vec<usize> = (0..n_codes).filter(|&s| occurs[s]).collect();
        let rows = rows_of_codes(n_codes, &used);
        let mut cache = CompressiveCache::new(used.len(), v.ncols());
        for run in runs(codes.len(), mask) {
            let of_keys: Vec<u32> =
                codes.slice(s![run.clone()]).iter().map(|&code| rows[code as usize]).collect();
            cache.push_rows(&of_keys, v.slice(s![run, ..]), None);
        }
        let log_counts = cache.log_counts();
        Visible { n_codes, codewords: codewords.select(Axis(0), &used), used, cache, log_counts }
    }

    /// Checks that this was made for these sizes.
    pub fn check(&self, (n_codes, d_k): (usize, usize), d_v: usize) -> Result<(), Error> {
        check_shape("saved.codewords", &[n_codes, d_k], &[self.n_codes, self.codewords.ncols()])?;
        check_shape("saved.mean", &[self.used.len(), d_v], self.mean().shape())
    }

    /// Whether these are the codes that it counts, under this mask.
    pub fn counts(&self, codes: ArrayView1<'_, u32>, mask: Option<ArrayView1<'_, bool>>) -> bool {
        let mut counts = vec![0; self.n_codes];
        for run in runs(codes.len(), mask) {
            codes.slice(s![run]).iter().for_each(|&code| counts[code as usize] += 1);
        }
        let mut used = self.used.iter().zip(self.cache.count());
        let expected: u64 = self.cache.count().sum();
        counts.iter().sum::<u64>() == expected && used.all(|(&code, &n)| counts[code] == n)
    }

    /// Whether there is nothing to see.
    pub fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// Mean values [U, V].
    pub fn mean(&self) -> ArrayView2<'_, T> {
        self.cache.mean()
    }

    /// Mean values in the order in which products read them.
    pub fn packed_mean(&self) -> PackedRows<T> {
        PackedRows::from_rows(self.mean())
    }

    /// 1 / N `[U]`.
    pub fn shares(&self) -> Vec<T> {
        self.cache.count().iter().map(|&n| T::from_f64(1.0 / n as f64)).collect()
    }

    /// Each key's row <- that of its code, of rows [U, width]; 0 where the mask hides a key.
    pub fn rows_of_keys(
        &self,
        codes: ArrayView1<'_, u32>,
        mask: Option<ArrayView1<'_, bool>>,
        of_codes: ArrayView2<'_, T>,
        mut of_keys: ArrayViewMut2<'_, T>,
    ) {
        let rows = rows_of_codes(self.n_codes, &self.used);
        for (j, (&code, mut row)) in codes.iter().zip(of_keys.rows_mut()).enumerate() {
            if mask.is_none_or(|mask| mask[j]) {
                row.assign(&of_codes.row(rows[code as usize] as usize));
            } else {
                row.fill(T::zero());
            }
        }
    }

    /// Rows [U, K] <- those of one key among the keys of its code.
    pub fn share(&self, rows: &mut Array2<T>) {
        for (mut row, share) in rows.rows_mut().into_iter().zip(self.shares()) {
            row *= share;
        }
    }

    /// Adds rows [U, K] to those of their codes [S, K].
    pub fn add_to_codes(&self, rows: ArrayView2<'_, T>, mut of_codes: ArrayViewMut2<'_, T>) {
        for (&code, row) in self.used.iter().zip(rows.rows()) {
            let mut sum = of_codes.row_mut(code);
            sum += &row;
        }
    }
}

/// The row of each code that occurs.
fn rows_of_codes(n_codes: usize, used: &[usize]) -> Vec<u32> {
    let mut rows = vec![u32::MAX; n_codes];
    for (row, &code) in (0..).zip(used) {
        rows[code] = row;
    }
    rows
}

/// The longest stretches of keys that exist.
fn runs(len: usize, mask: Option<ArrayView1<'_, bool>>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = vec![];
    for j in (0..len).filter(|&j| mask.is_none_or(|mask| mask[j])) {
        match runs.last_mut() {
            Some(run) if run.end == j => run.end += 1,
            _ => runs.push(j..j + 1),
        }
    }
    runs
}
