//! Adafactor: steps along the gradient over its root mean square, which for a matrix is kept as one row and one column.
//!
//! For step t = 1, 2, ... with the clipped gradient g, means over rows, columns or all numbers of an array, and
//! RMS(x) = sqrt(mean(x x)):
//!
//! ```text
//! (1)  b = 1 - t^(-decay_exponent)
//! (2)  matrix:  r_i <- b r_i + (1 - b) mean_j (g_ij g_ij + eps)       c_j <- b c_j + (1 - b) mean_i (g_ij g_ij + eps)
//!               v^_ij = r_i c_j / mean_i r_i
//!      vector:  v <- b v + (1 - b) (g g + eps),   v^ = v
//! (3)  u = g / sqrt(v^)
//!      u <- u / max(1, RMS(u) / threshold)
//! (4)  p <- p - lr factor s u - wd p       s = max(relative, RMS(p)), or 1 for absolute steps
//! ```
//!
//! An array of higher rank is a row of matrices, which share the numbers of (3) and (4). As b is 0 at first, nothing has to be
//! made up for. There is no mean of the gradient itself: it would take back the memory that the factors save. The paper's own
//! schedule, `min(0.01, 1 / sqrt(t))`, is a [`Schedule`](crate::train::Schedule) with the learning rate of 0.01.
//!
//! Cost: three passes over g, one over p, n + m numbers kept per matrix [n, m]. Sums are taken in `f64`, over stretches of
//! rows that the shape alone decides.
//!
//! Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235).

use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{CHUNK, Moment, Pace, check, common, normal, sum_of_squares};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// The constants of Adafactor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adafactor {
    /// Step size at a factor of 1: of relative steps, as a part of the parameter's root mean square.
    pub learning_rate: f64,
    /// How fast the mean of squares comes to rest, above 0: at step t the old mean has the weight `1 - t^(-decay_exponent)`.
    pub decay_exponent: f64,
    /// Added to squares of the gradient.
    pub epsilon: f64,
    /// The largest root mean square of a step's direction.
    pub threshold: f64,
    /// Steps are relative to the root mean square of their parameter, taken to be at least this; none: absolute.
    pub relative: Option<f64>,
    /// The part of a matrix that one step takes away, in [0, 1).
    pub weight_decay: f64,
    /// The largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: Option<f64>,
}

impl Default for Adafactor {
    /// The paper's constants.
    fn default() -> Self {
        Adafactor {
            learning_rate: 1e-2,
            decay_exponent: 0.8,
            epsilon: 1e-30,
            threshold: 1.0,
            relative: Some(1e-3),
            weight_decay: 2e-4,
            clip: None,
        }
    }
}

impl Adafactor {
    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first field that cannot be.
    pub fn validate(&self) -> Result<(), Error> {
        let [learning_rate, weight_decay, clip] = common(self.learning_rate, self.weight_decay, self.clip);
        let positive = |what, x: f64| (what, x, x > 0.0, "finite and above 0");
        check([
            learning_rate,
            positive("decay_exponent", self.decay_exponent),
            normal("epsilon", self.epsilon),
            positive("threshold", self.threshold),
            positive("relative", self.relative.unwrap_or(1.0)),
            weight_decay,
            clip,
        ])
    }

    pub(super) fn moments(shape: &[usize]) -> Vec<Moment> {
        let moment = |name, shape: &[usize]| Moment { name, shape: shape.to_vec(), squares: true };
        match shape {
            [matrices @ .., n, m] => {
                let with = |width: usize| [matrices, &[width]].concat();
                vec![moment("row", &with(*n)), moment("column", &with(*m))]
            }
            _ => vec![moment("v", shape)],
        }
    }

    /// Moves one parameter and its moments, which are as [`moments`](Self::moments) says.
    pub(super) fn update<T: Scalar>(
        &self,
        t: u64,
        pace: &Pace,
        mut parameter: ArrayViewMutD<'_, T>,
        gradient: ArrayViewD<'_, T>,
        moments: &mut [ArrayD<T>],
    ) {
        if parameter.is_empty() {
            return;
        }
        let shape = parameter.shape().to_vec();
        let s = match self.relative {
            Some(least) => rms(sum_of_squares(parameter.view()), parameter.len()).max(least),
            None => 1.0,
        };
        let gradient = gradient.as_standard_layout();
        let g = gradient.as_slice().expect("standard layout");
        let mut moments: Vec<&mut [T]> =
            moments.iter_mut().map(|x| x.as_slice_mut().expect("made in standard layout")).collect();
        let (keep, scale) = (1.0 - (t as f64).powf(-self.decay_exponent), pace.gradient_scale); // (1)
        let direction = match (&shape[..], &mut moments[..]) {
            ([.., n, m], [rows, columns]) => {
                self.factored([*n, *m], keep, scale, g, rows, columns) // (2)
            }
            (_, [v]) => {
                for (v, &g) in v.iter_mut().zip(g) {
                    let g = g.as_f64() * scale;
                    *v = bounded(keep * v.as_f64() + (1.0 - keep) * (g * g + self.epsilon));
                }
                let root = v.iter().map(|v| over_root(v.as_f64()) * scale).collect();
                Direction { columns: root, rows: vec![1.0], width: g.len(), height: 1 }
            }
            _ => unreachable!("as many moments as the shape has"),
        };
        let size = rms(direction.sum_of_squares(g), g.len()); // (3)
        let rate = self.learning_rate * pace.factor * s / (size / self.threshold).max(1.0); // (4)
        let step = |p: &mut [T]| direction.step(p, g, rate, pace.decay);
        match parameter.as_slice_mut() {
            Some(p) => step(p),
            None => {
                let mut copy = parameter.as_standard_layout().into_owned();
                step(copy.as_slice_mut().expect("standard layout"));
                parameter.assign(&copy);
            }
        }
    }

    /// (2) of matrices [n, m], one after the other, and the direction that follows.
    fn factored<T: Scalar>(
        &self,
        [n, m]: [usize; 2],
        keep: f64,
        scale: f64,
        g: &[T],
        rows: &mut [T],
        columns: &mut [T],
    ) -> Direction {
        let mut direction = Direction { columns: vec![], rows: vec![], width: m, height: n };
        let matrices = g.chunks(n * m).zip(rows.chunks_mut(n)).zip(columns.chunks_mut(m));
        for ((g, rows), columns) in matrices {
            let (row_sums, column_sums) = sums_of_squares(g, m);
            let moving = |old: T, sum: f64, count: usize| {
                let mean = sum * scale * scale / count as f64 + self.epsilon;
                bounded(keep * old.as_f64() + (1.0 - keep) * mean)
            };
            rows.iter_mut().zip(row_sums).for_each(|(r, sum)| *r = moving(*r, sum, m));
            columns.iter_mut().zip(column_sums).for_each(|(c, sum)| *c = moving(*c, sum, n));
            let mean = rows.iter().map(|r| r.as_f64()).sum::<f64>() / n as f64;
            direction.rows.extend(rows.iter().map(|r| over_root(r.as_f64()) / over_root(mean)));
            direction.columns.extend(columns.iter().map(|c| over_root(c.as_f64()) * scale));
        }
        direction
    }
}

/// A mean of squares as it is kept: at most the largest number, so that a gradient whose square has none stops nothing.
fn bounded<T: Scalar>(x: f64) -> T {
    T::from_f64(x.min(T::max_value().as_f64()))
}

/// 1 / sqrt(x), of a number as large as `epsilon` may be at least: moments that begin late in a run are smaller at first.
fn over_root(x: f64) -> f64 {
    x.max(f64::from(f32::MIN_POSITIVE)).sqrt().recip()
}

fn rms(sum_of_squares: f64, count: usize) -> f64 {
    (sum_of_squares / count as f64).sqrt()
}

/// Sums over the rows and over the columns of g g, g a matrix with rows of this width.
fn sums_of_squares<T: Scalar>(g: &[T], width: usize) -> (Vec<f64>, Vec<f64>) {
    let parts: Vec<_> = g
        .par_chunks(stretch(width) * width)
        .map(|g| {
            let (mut rows, mut columns) = (vec![0.0; g.len() / width], vec![0.0; width]);
            on_best_simd!(add_squares(g, &mut rows, &mut columns));
            (rows, columns)
        })
        .collect();
    let (mut rows, mut columns) = (vec![], vec![0.0; width]);
    for (part, sums) in parts {
        rows.extend(part);
        columns.iter_mut().zip(sums).for_each(|(column, sum)| *column += sum);
    }
    (rows, columns)
}

#[inline(always)]
fn add_squares<T: Scalar>(g: &[T], rows: &mut [f64], columns: &mut [f64]) {
    for (g, row) in g.chunks_exact(columns.len()).zip(rows) {
        for (&g, column) in g.iter().zip(columns.iter_mut()) {
            let square = g.as_f64() * g.as_f64();
            *row += square;
            *column += square;
        }
    }
}

/// Rows of this width that one task works on.
fn stretch(width: usize) -> usize {
    (CHUNK / width).max(1)
}

/// u of (3) before its bound: `g_ij rows_i columns_j`, matrix by matrix.
struct Direction {
    rows: Vec<f64>,
    columns: Vec<f64>,
    width: usize,
    height: usize,
}

impl Direction {
    /// Every stretch of rows: the factors of its rows and of its columns.
    fn parts(&self) -> Vec<(&[f64], &[f64])> {
        let matrices = self.rows.chunks(self.height).zip(self.columns.chunks(self.width));
        matrices
            .flat_map(|(rows, columns)| rows.chunks(stretch(self.width)).map(move |rows| (rows, columns)))
            .collect()
    }

    /// The sum of the squares of all its numbers.
    fn sum_of_squares<T: Scalar>(&self, g: &[T]) -> f64 {
        let sum = |((rows, columns), g): ((&[f64], &[f64]), &[T])| on_best_simd!(sum_part(g, rows, columns));
        let sums: Vec<f64> = self.parts().into_par_iter().zip(self.stretches(g)).map(sum).collect();
        sums.iter().sum()
    }

    /// (4)
    fn step<T: Scalar>(&self, p: &mut [T], g: &[T], rate: f64, decay: f64) {
        let mut places = vec![];
        let mut rest = p;
        for g in self.stretches(g) {
            let (place, after) = rest.split_at_mut(g.len());
            places.push((place, g));
            rest = after;
        }
        self.parts().into_par_iter().zip(places).for_each(|((rows, columns), (p, g))| {
            on_best_simd!(step_part(p, g, rows, columns, rate, decay));
        });
    }

    /// The gradient, cut as [`parts`](Self::parts) are.
    fn stretches<'g, T>(&self, g: &'g [T]) -> Vec<&'g [T]> {
        let matrices = g.chunks(self.height * self.width);
        matrices.flat_map(|g| g.chunks(stretch(self.width) * self.width)).collect()
    }
}

#[inline(always)]
fn sum_part<T: Scalar>(g: &[T], rows: &[f64], columns: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (g, &row) in g.chunks_exact(columns.len()).zip(rows) {
        let squares = g.iter().zip(columns).map(|(g, column)| (g.as_f64() * column).powi(2));
        sum += row * row * squares.sum::<f64>();
    }
    sum
}

#[inline(always)]
fn step_part<T: Scalar>(p: &mut [T], g: &[T], rows: &[f64], columns: &[f64], rate: f64, decay: f64) {
    let lines = p.chunks_exact_mut(columns.len()).zip(g.chunks_exact(columns.len()));
    for ((p, g), &row) in lines.zip(rows) {
        let row = row * rate;
        for ((p, &g), column) in p.iter_mut().zip(g).zip(columns) {
            let old = p.as_f64();
            *p = T::from_f64(old - (row * (g.as_f64() * column) + decay * old));
        }
    }
}
