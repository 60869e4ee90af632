//! Small pictures to learn from: one to three shapes on a plain ground, in four greys.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Pixels of a side.
pub const SIDE: usize = 16;
pub const PIXELS: usize = SIDE * SIDE;
/// Greys.
pub const LEVELS: u8 = 4;

/// The pixels row by row, each below [`LEVELS`].
pub type Picture = Vec<u8>;

/// A picture at random.
pub fn draw(rng: &mut ChaCha8Rng) -> Picture {
    let mut greys = Vec::from_iter(0..LEVELS);
    greys.shuffle(rng);
    let mut picture = vec![greys[0]; PIXELS];
    for &grey in &greys[1..rng.random_range(2..=usize::from(LEVELS))] {
        let covers = shape(rng);
        for (i, pixel) in picture.iter_mut().enumerate() {
            if covers((i % SIDE) as f32 + 0.5, (i / SIDE) as f32 + 0.5) {
                *pixel = grey;
            }
        }
    }
    picture
}

/// Which places a shape covers.
fn shape(rng: &mut ChaCha8Rng) -> impl Fn(f32, f32) -> bool + use<> {
    let side = SIDE as f32;
    let (kind, size) = (rng.random_range(0..4), rng.random_range(2.5..5.5f32));
    let (cx, cy) = (rng.random_range(size..side - size), rng.random_range(size..side - size));
    move |x: f32, y: f32| {
        let (x, y) = ((x - cx).abs(), (y - cy).abs());
        match kind {
            0 => x.hypot(y) < size,                     // disc
            1 => (x.hypot(y) - size + 1.0).abs() < 1.0, // ring
            2 => x.max(y) < size * 0.85,                // square
            _ => x.max(y) < size && x.min(y) < 1.0,     // cross
        }
    }
}
