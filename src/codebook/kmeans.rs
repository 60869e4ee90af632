//! k-means++ and the steps of Lloyd, for the keys of one head.
//!
//! ```text
//! (1) D_j = min_{s chosen} |k_j - c_s|^2,   the next codeword is k_j with probability D_j / sum D           k-means++
//! (2) c_s <- mean of the keys whose nearest codeword is c_s                                                 Lloyd
//! ```
//!
//! As it stands (1) costs one pass over the keys per codeword, which memory bounds. The same draws, in rounds that cost one
//! matrix product each: distances only fall while codewords are added, so those of an earlier round are bounds u_j >= D_j,
//! and
//!
//! ```text
//! (3) propose j with probability u_j / sum u, accept it with probability D_j / u_j
//! (4) after a round:   u_j <- min(u_j, |k_j|^2 + 2 min_s (|c_s|^2 / 2 - k_j . c_s) + tau_j),   s accepted in the round
//! ```
//!
//! gives each key with the probability (1), whatever the bounds. D_j of a proposed key is summed from squared differences, so
//! a key equal to a codeword is never accepted; tau_j bounds the rounding of (4). A round makes as many proposals as there are
//! codewords. One without success is followed by exact bounds from one assignment: then either the next proposal is
//! accepted, or every key has its codeword.
//!
//! A code that has lost all its keys takes a key drawn with a probability that is its share of the error, so that the error still
//! never rises.
//!
//! Cost: seeding 2 N S K operations in matrix products, at least S^2 K / 2 in plain loops for the proposals, and some log2 S
//! passes over the bounds; a step of Lloyd one assignment and one pass over the keys. Sources: Arthur and Vassilvitskii
//! (2007), Lloyd (1982).

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, Zip};
use rayon::prelude::*;

use super::random::{Random, running_sums};
use super::{CodeStats, assign};
use crate::ops::matmul::product;
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// Proposals that a round makes at least, to repay its pass over the keys.
const LEAST_PROPOSALS: usize = 64;

/// Keys whose bounds are computed by one product.
const BLOCK: usize = 128;

/// Keys of one task.
const KEYS_PER_TASK: usize = 8 * BLOCK;

/// Codewords [S, K] from keys [N, K], N and S > 0: (1), then at most `steps` times (2), fewer if nothing changes any more.
///
/// Where fewer different keys than codes exist, each is a codeword, and further codewords repeat them.
pub(super) fn k_means<T: Scalar>(
    keys: ArrayView2<'_, T>,
    n_codes: usize,
    steps: usize,
    random: &mut Random,
) -> Result<Array2<T>, Error> {
    // Largest element in 1 .. 4, by a power of two: rounds nothing, and no square over- or underflows.
    let largest = keys.fold(T::zero(), |largest, &x| largest.max(x.abs())).as_f64();
    let most = -T::min_positive_value().as_f64().log2();
    let exponent = if largest > 0.0 { largest.log2().floor().clamp(-most, most) as i32 } else { 0 };
    let scale = T::from_f64(2f64.powi(-exponent));
    let keys = keys.mapv(|x| x * scale); // [N, K]
    let chosen = seed(keys.view(), n_codes, random)?;
    let repeated: Vec<usize> = chosen.iter().copied().cycle().take(n_codes).collect();
    let mut codewords = keys.select(Axis(0), &repeated); // [S, K]
    let mut last_codes = None;
    for _ in 0..steps {
        let codes = assign(keys.view(), codewords.view())?;
        if last_codes.as_ref() == Some(&codes) {
            break;
        }
        lloyd(keys.view(), &codes, &mut codewords, random)?;
        last_codes = Some(codes);
    }
    Ok(codewords / scale)
}

/// (1) by (3) and (4): the indices of `n_codes` keys, fewer if no further key differs from those chosen.
fn seed<T: Scalar>(
    keys: ArrayView2<'_, T>,
    n_codes: usize,
    random: &mut Random,
) -> Result<Vec<usize>, Error> {
    let zero = Array1::zeros(keys.ncols());
    let squares: Vec<f64> = keys.outer_iter().map(|key| squared_distance(key, zero.view())).collect();
    let mut bounds = vec![f64::INFINITY; keys.nrows()];
    let mut chosen = vec![random.below(keys.nrows())];
    let mut n_bounded = 0;
    while chosen.len() < n_codes {
        lower_bounds(keys, &squares, &chosen[n_bounded..], &mut bounds);
        n_bounded = chosen.len();
        let running = running_sums(&bounds);
        let mut refused = vec![];
        for _ in 0..LEAST_PROPOSALS.max(chosen.len()) {
            let Some(j) = random.weighted(&running) else { return Ok(chosen) };
            let distance = nearest(keys, j, &chosen);
            // Less than (3) wants where rounding has put the bound below the distance.
            if random.uniform() * bounds[j] < distance {
                chosen.push(j);
                if chosen.len() == n_codes {
                    return Ok(chosen);
                }
            } else {
                refused.push((j, distance));
            }
        }
        refused.into_iter().for_each(|(j, distance)| bounds[j] = bounds[j].min(distance));
        if chosen.len() == n_bounded {
            let codewords = keys.select(Axis(0), &chosen);
            let codes = assign(keys, codewords.view())?;
            bounds = errors(keys, &codes, codewords.view());
        }
    }
    Ok(chosen)
}

/// (4) for codewords that are the `chosen` keys; those keys get 0.
fn lower_bounds<T: Scalar>(keys: ArrayView2<'_, T>, squares: &[f64], chosen: &[usize], bounds: &mut [f64]) {
    let codewords = keys.select(Axis(0), chosen); // [b, K]
    let halves: Vec<T> = chosen.iter().map(|&j| T::from_f64(squares[j] / 2.0)).collect();
    let norm = chosen.iter().map(|&j| squares[j]).fold(0.0, f64::max).sqrt();
    let relative = (keys.ncols() as f64 + 4.0) * T::epsilon().as_f64();
    let tasks = bounds.par_chunks_mut(KEYS_PER_TASK).zip(squares.par_chunks(KEYS_PER_TASK));
    keys.axis_chunks_iter(Axis(0), KEYS_PER_TASK).into_par_iter().zip(tasks).for_each(
        |(keys, (bounds, squares))| {
            let mut products = vec![T::zero(); codewords.nrows() * BLOCK.min(keys.nrows())];
            let mut lowest = [T::zero(); BLOCK];
            let blocks = bounds.chunks_mut(BLOCK).zip(squares.chunks(BLOCK));
            for (keys, (bounds, squares)) in keys.axis_chunks_iter(Axis(0), BLOCK).zip(blocks) {
                let n = bounds.len();
                let (products, lowest) = (&mut products[..codewords.nrows() * n], &mut lowest[..n]);
                let matrix = ArrayViewMut2::from_shape((codewords.nrows(), n), &mut *products);
                product(codewords.view(), keys.t(), matrix.expect("rows of n")); // [b, n]
                on_best_simd!(lowest_scores(products, &halves, lowest));
                for ((bound, &square), &score) in bounds.iter_mut().zip(squares).zip(&*lowest) {
                    let rounding = relative * (square.sqrt() + norm).powi(2);
                    *bound = bound.min((square + 2.0 * score.as_f64() + rounding).max(0.0));
                }
            }
        },
    );
    chosen.iter().for_each(|&j| bounds[j] = 0.0);
}

/// `lowest_j = min_s (halves_s - products_sj)`.
#[inline(always)]
fn lowest_scores<T: Scalar>(products: &[T], halves: &[T], lowest: &mut [T]) {
    lowest.fill(T::infinity());
    for (products, &half) in products.chunks_exact(lowest.len()).zip(halves) {
        for (lowest, &p) in lowest.iter_mut().zip(products) {
            let score = half - p;
            *lowest = if score < *lowest { score } else { *lowest };
        }
    }
}

/// D of key j.
fn nearest<T: Scalar>(keys: ArrayView2<'_, T>, j: usize, chosen: &[usize]) -> f64 {
    let distance = |&s: &usize| squared_distance(keys.row(j), keys.row(s));
    chosen.iter().map(distance).fold(f64::INFINITY, f64::min)
}

/// One step (2); codes without keys are drawn anew, as far as there is error to draw from.
fn lloyd<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: &Array1<u32>,
    codewords: &mut Array2<T>,
    random: &mut Random,
) -> Result<(), Error> {
    let one_head = keys.insert_axis(Axis(0)).insert_axis(Axis(0)); // [1, 1, N, K]
    let of_head = codes.view().insert_axis(Axis(0)).insert_axis(Axis(0)); // [1, 1, N]
    let stats = CodeStats::collect(one_head, of_head, codewords.nrows(), None)?;
    let counts = stats.counts().index_axis_move(Axis(0), 0);
    let lost: Vec<usize> = (0..codewords.nrows()).filter(|&code| counts[code] == 0).collect();
    let drawn = match lost.len() {
        0 => vec![],
        n => random.distinct(errors(keys, codes, codewords.view()), n),
    };
    Zip::from(codewords.rows_mut()).and(stats.sums().index_axis(Axis(0), 0).rows()).and(&counts).for_each(
        |mut codeword, sum, &count| {
            if count > 0 {
                codeword.assign(&(&sum / T::from_f64(count as f64)));
            }
        },
    );
    lost.into_iter().zip(drawn).for_each(|(code, j)| codewords.row_mut(code).assign(&keys.row(j)));
    Ok(())
}

/// `|k_j - c_{z_j}|^2`, one per key `[N]`.
pub(super) fn errors<T: Scalar>(
    keys: ArrayView2<'_, T>,
    codes: &Array1<u32>,
    codewords: ArrayView2<'_, T>,
) -> Vec<f64> {
    let error = |(key, &code): (_, &u32)| squared_distance(key, codewords.row(code as usize));
    keys.outer_iter().zip(codes).map(error).collect()
}

/// In `f64`, from differences.
fn squared_distance<T: Scalar>(a: ArrayView1<'_, T>, b: ArrayView1<'_, T>) -> f64 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| {
        let e = a.as_f64() - b.as_f64();
        sum + e * e
    })
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn numbers<T: Scalar>(rows: usize, cols: usize, offset: f64) -> Array2<T> {
        let mut random = Random::new(rows as u64, cols);
        Array2::from_shape_simple_fn((rows, cols), || T::from_f64(offset + random.normal()))
    }

    fn error<T: Scalar>(keys: &Array2<T>, codewords: &Array2<T>) -> f64 {
        let codes = assign(keys.view(), codewords.view()).unwrap();
        errors(keys.view(), &codes, codewords.view()).iter().sum()
    }

    /// The probability of each ordered choice of three keys, multiplied out, against how often it comes.
    #[test]
    fn rounds_draw_as_the_definition_does() {
        let keys = array![[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-4.0, 2.0], [1.0, 0.0]];
        let n = keys.nrows();
        let d = |j: usize, chosen: &[usize]| nearest(keys.view(), j, chosen);
        let p = |j: usize, chosen: &[usize]| d(j, chosen) / (0..n).map(|i| d(i, chosen)).sum::<f64>();
        let runs = 40_000;
        let mut counts = ndarray::Array3::<u32>::zeros((n, n, n));
        let mut random = Random::new(11, 0);
        for _ in 0..runs {
            let chosen = seed(keys.view(), 3, &mut random).unwrap();
            counts[[chosen[0], chosen[1], chosen[2]]] += 1;
        }
        for ((a, b, c), &count) in counts.indexed_iter() {
            let expected = p(b, &[a]) * p(c, &[a, b]) / n as f64 * f64::from(runs);
            let deviation = expected.sqrt();
            assert!((f64::from(count) - expected).abs() <= 5.0 * deviation, "{a}{b}{c}: {count}, {expected}");
        }
    }

    fn bounds_hold<T: Scalar>() {
        for (n, d_k, offset) in [(1, 1, 0.0), (40, 3, 0.0), (1025, 16, 0.0), (300, 128, 30.0)] {
            let keys = numbers::<T>(n, d_k, offset);
            let zero = Array1::zeros(d_k);
            let squares = Vec::from_iter(keys.outer_iter().map(|key| squared_distance(key, zero.view())));
            let mut bounds = vec![f64::INFINITY; n];
            let mut chosen = vec![];
            for new in [vec![0], (0..n).step_by(7).collect(), vec![n - 1]] {
                chosen.extend(&new);
                lower_bounds(keys.view(), &squares, &new, &mut bounds);
                for (j, &bound) in bounds.iter().enumerate() {
                    let d = nearest(keys.view(), j, &chosen);
                    let size = 4.0 * squares.iter().copied().fold(0.0, f64::max);
                    let slack = 4.0 * (d_k as f64 + 4.0) * T::epsilon().as_f64() * size;
                    assert!((d..=d + slack).contains(&bound), "key {j} of {n}: {bound:e} for {d:e}");
                }
            }
        }
    }

    #[test]
    fn bounds_are_above_distances_and_close() {
        bounds_hold::<f32>();
        bounds_hold::<f64>();
    }

    /// Rounding beyond the distances themselves: most proposals are refused, every key is found all the same.
    #[test]
    fn close_keys_far_away_are_told_apart() {
        let keys = Array2::from_shape_fn((200, 20), |(j, k)| {
            if j % 20 == k { 1000.0 * (1.0 + f32::EPSILON * (1 + j / 20) as f32) } else { 1000.0 }
        });
        let mut chosen = seed(keys.view(), 200, &mut Random::new(1, 0)).unwrap();
        chosen.sort_unstable();
        assert_eq!(chosen, Vec::from_iter(0..200));
    }

    #[test]
    fn a_key_that_has_its_codeword_is_not_drawn() {
        let keys = Array2::from_shape_fn((3000, 2), |(j, k)| ((j % 40) * (k + 1)) as f32);
        for n_codes in [1, 39, 40, 41, 100] {
            let mut places = seed(keys.view(), n_codes, &mut Random::new(2, 0)).unwrap();
            places.iter_mut().for_each(|j| *j %= 40);
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), n_codes.min(40));
        }
    }

    /// Codewords far from every key lose them all, and are drawn anew: the error falls at every step.
    #[test]
    fn lost_codes_come_back_and_the_error_never_rises() {
        let keys = numbers::<f64>(500, 4, 0.0);
        let mut random = Random::new(4, 0);
        let mut codewords = numbers::<f64>(30, 4, 0.0);
        codewords.slice_mut(ndarray::s![10.., ..]).fill(1e3);
        let mut last = error(&keys, &codewords);
        for step in 0..8 {
            let codes = assign(keys.view(), codewords.view()).unwrap();
            lloyd(keys.view(), &codes, &mut codewords, &mut random).unwrap();
            let now = error(&keys, &codewords);
            assert!(now < last, "{now} after {last}");
            last = now;
            let codes = assign(keys.view(), codewords.view()).unwrap();
            let used = (0..30).filter(|&code| codes.iter().any(|&z| z == code)).count();
            assert!(used == 30 || step == 0, "{used} in use after step {step}");
        }
        // Without error there is nothing to draw from.
        let keys = array![[1.0, 2.0], [1.0, 2.0]];
        let mut codewords = array![[1.0, 2.0], [7.0, 7.0]];
        lloyd(keys.view(), &array![0, 0], &mut codewords, &mut random).unwrap();
        assert_eq!(codewords, array![[1.0, 2.0], [7.0, 7.0]]);
    }
}
