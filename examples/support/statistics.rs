//! Numbers that stand for many.
#![allow(dead_code)] // each example takes what it needs

/// NaN of none.
pub fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

/// Standard deviation of what the numbers are a sample of; none of one.
pub fn deviation(numbers: &[f64]) -> Option<f64> {
    let (n, mean) = (numbers.len(), mean(numbers));
    let squares = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
    (n > 1).then(|| (squares / (n - 1) as f64).sqrt())
}

/// Of an even number, the mean of the two in the middle; NaN of none.
pub fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut numbers = Vec::from_iter(numbers);
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        n => (numbers[(n - 1) / 2] + numbers[n / 2]) / 2.0,
    }
}
