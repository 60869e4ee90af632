//! The worst of several errors, for gradcheck and for tests.

/// The largest of errors that are not negative. A NaN is worse than any number, which a plain maximum would leave out.
pub fn worst(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors
        .into_iter()
        .fold(0.0, |worst: f64, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) })
}
