//! Sinusoids: the fixed vectors that stand for positions and distances.
//!
//! ```text
//! (1) y_{p, m}           = sin(angle)
//!     y_{p, m + width/2} = cos(angle),   angle = (start + p) / lambda^(2m / width),   m < width/2
//! ```
//! Computed in f64: the absolute error is that of the angle, at most angle (ln lambda + 4) 2^-53, and then one rounding to
//! the type.
//!
//! Cost: a sine and a cosine per pair of elements. Source: Vaswani and others, arXiv 1706.03762.

use ndarray::Array2;

use super::rows;
use crate::error::check_memory;
use crate::{Error, Scalar};

/// The sinusoids of positions `start` to `start + count - 1`, formula (1).
///
/// # Shapes
/// The result is [count, width].
///
/// # Errors
/// `Invalid` if `width` is odd or 0, `lambda` is not a finite number from 1 up, or a position does not fit in 64 bits;
/// `TooLarge` if there is no memory for the result.
pub fn sinusoids<T: Scalar>(start: u64, count: usize, width: usize, lambda: f64) -> Result<Array2<T>, Error> {
    if width == 0 || !width.is_multiple_of(2) {
        return Err(Error::invalid("width", "even and at least 2", width));
    }
    if !(lambda.is_finite() && lambda >= 1.0) {
        return Err(Error::invalid("lambda", "a finite number from 1 up", lambda));
    }
    if start.checked_add(count as u64).is_none() {
        return Err(Error::invalid("start", format!("at most {}", u64::MAX - count as u64), start));
    }
    let mut y = rows::zeros("sinusoids", (count, width))?;
    let half = width / 2;
    check_memory::<f64>("sinusoids", &[half])?;
    let wavelengths = Vec::from_iter((0..half).map(|m| lambda.powf((2 * m) as f64 / width as f64)));
    rows::map((count, width), [], [&mut y], |p, [], [y]| {
        let position = (start + p as u64) as f64;
        let (sines, cosines) = y.split_at_mut(half);
        for ((sine, cosine), wavelength) in sines.iter_mut().zip(cosines).zip(&wavelengths) {
            let (sin, cos) = (position / wavelength).sin_cos(); // (1)
            (*sine, *cosine) = (T::from_f64(sin), T::from_f64(cos));
        }
    });
    Ok(y)
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;

    #[test]
    fn sinusoids_equal_the_definition() {
        for (start, count, width) in [(0, 0, 2), (0, 1, 2), (5, 7, 6), (1 << 40, 3, 10), (0, 300, 130)] {
            let y = sinusoids::<f64>(start, count, width, 1e5).unwrap();
            assert_eq!(y.dim(), (count, width));
            for ((p, j), &y) in y.indexed_iter() {
                let m = j % (width / 2);
                let angle = (start + p as u64) as f64 / 1e5f64.powf(2.0 * m as f64 / width as f64);
                let expected = if j < width / 2 { angle.sin() } else { angle.cos() };
                assert!((y - expected).abs() < 1e-15, "position {p}, column {j}");
            }
        }
    }

    #[test]
    fn known_values() {
        let y = sinusoids::<f64>(0, 3, 4, 100.0).unwrap();
        // Columns: sin p, sin p/10, cos p, cos p/10.
        let expected = [
            [0.0, 0.0, 1.0, 1.0],
            [
                0.841_470_984_807_896_5,
                0.099_833_416_646_828_15,
                0.540_302_305_868_139_8,
                0.995_004_165_278_025_8,
            ],
            [
                0.909_297_426_825_681_7,
                0.198_669_330_795_061_22,
                -0.416_146_836_547_142_4,
                0.980_066_577_841_241_6,
            ],
        ];
        for ((p, j), y) in y.indexed_iter() {
            assert!((y - expected[p][j]).abs() < 1e-15);
        }
    }

    #[test]
    fn a_later_start_is_a_later_piece_and_f32_is_rounded_f64() {
        let whole = sinusoids::<f64>(1000, 40, 16, 1e4).unwrap();
        assert_eq!(sinusoids::<f64>(1013, 27, 16, 1e4).unwrap(), whole.slice(s![13.., ..]));
        assert_eq!(sinusoids::<f32>(1000, 40, 16, 1e4).unwrap(), whole.mapv(|y| y as f32));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refuse = |start, count, width, lambda| sinusoids::<f32>(start, count, width, lambda).unwrap_err();
        assert_eq!(refuse(0, 2, 0, 1e5), Error::invalid("width", "even and at least 2", 0));
        assert_eq!(refuse(0, 2, 3, 1e5), Error::invalid("width", "even and at least 2", 3));
        for lambda in [0.0, -1.0, 0.999, f64::INFINITY, f64::NAN] {
            assert_eq!(
                refuse(0, 2, 2, lambda),
                Error::invalid("lambda", "a finite number from 1 up", lambda)
            );
        }
        let most = format!("at most {}", u64::MAX - 2);
        assert_eq!(refuse(u64::MAX - 1, 2, 2, 1e5), Error::invalid("start", most, u64::MAX - 1));
        assert!(sinusoids::<f32>(u64::MAX - 2, 2, 2, 1e5).unwrap().iter().all(|y| y.is_finite()));
        let too_large = Error::TooLarge { what: "sinusoids", shape: vec![1 << 62, 4] };
        assert_eq!(refuse(0, 1 << 62, 4, 1e5), too_large);
    }
}
