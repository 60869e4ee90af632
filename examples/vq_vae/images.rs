//! Pictures to learn from: a few soft-edged shapes before a gradient, drawn anew for every batch.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::ndarray::{Array2, ArrayView2};

/// Pixels of a side.
pub const SIDE: usize = 32;
/// Pixels of a patch's side.
pub const PATCH: usize = 4;
/// Patches of a side.
pub const GRID: usize = SIDE / PATCH;
/// Patches of an image.
pub const PATCHES: usize = GRID * GRID;
/// Numbers of a patch.
pub const WIDTH: usize = PATCH * PATCH * 3;

type Color = [f32; 3];

/// `n` images as rows of patches [n GRID GRID, WIDTH], red, green and blue of each pixel from 0 to 1: the same for the same
/// seed and number of the batch.
pub fn batch(n: usize, seed: u64, number: u64) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number);
    let mut patches = Array2::zeros((n * PATCHES, WIDTH));
    for image in 0..n {
        let scene = Scene::random(&mut rng);
        for y in 0..SIDE {
            for x in 0..SIDE {
                let color = scene.color(x as f32 + 0.5, y as f32 + 0.5);
                let (row, column) = place(image, x, y);
                color.iter().enumerate().for_each(|(i, &value)| patches[[row, column + i]] = value);
            }
        }
    }
    patches
}

/// The color of a pixel.
pub fn pixel(patches: ArrayView2<'_, f32>, image: usize, x: usize, y: usize) -> Color {
    let (row, column) = place(image, x, y);
    [0, 1, 2].map(|i| patches[[row, column + i]])
}

/// The row of a pixel, and the column of its red.
fn place(image: usize, x: usize, y: usize) -> (usize, usize) {
    let row = image * PATCHES + y / PATCH * GRID + x / PATCH;
    (row, (y % PATCH * PATCH + x % PATCH) * 3)
}

struct Scene {
    /// Above and below.
    sky: [Color; 2],
    shapes: Vec<Shape>,
}

struct Shape {
    kind: Kind,
    centre: [f32; 2],
    /// Sine and cosine of its turn.
    turn: [f32; 2],
    /// Half its width and height.
    half: [f32; 2],
    color: Color,
}

#[derive(Clone, Copy)]
enum Kind {
    Disc,
    Ring,
    Rectangle,
}

impl Scene {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let sky = [color(rng), color(rng)];
        let n_shapes = rng.random_range(2..5);
        Scene { sky, shapes: (0..n_shapes).map(|_| Shape::random(rng)).collect() }
    }

    fn color(&self, x: f32, y: f32) -> Color {
        let ground = mix(self.sky[0], self.sky[1], y / SIDE as f32);
        self.shapes.iter().fold(ground, |below, shape| mix(below, shape.color, shape.coverage(x, y)))
    }
}

impl Shape {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let kind = [Kind::Disc, Kind::Ring, Kind::Rectangle][rng.random_range(0..3)];
        let side = SIDE as f32;
        let mut within = |low: f32, high: f32| rng.random_range(low..high) * side;
        let centre = [within(0.1, 0.9), within(0.1, 0.9)];
        let half = [within(0.08, 0.3), within(0.08, 0.3)];
        let angle = rng.random_range(0.0..std::f32::consts::PI);
        Shape { kind, centre, turn: angle.sin_cos().into(), half, color: color(rng) }
    }

    /// How much of a pixel it covers.
    fn coverage(&self, x: f32, y: f32) -> f32 {
        let ([sin, cos], [x, y]) = (self.turn, [x - self.centre[0], y - self.centre[1]]);
        // How far outside of it, in pixels.
        let outside = match self.kind {
            Kind::Disc => x.hypot(y) - self.half[0],
            Kind::Ring => (x.hypot(y) - self.half[0]).abs() - 1.5,
            Kind::Rectangle => {
                let (x, y) = (cos * x + sin * y, cos * y - sin * x);
                (x.abs() - self.half[0]).max(y.abs() - self.half[1])
            }
        };
        (0.5 - outside).clamp(0.0, 1.0)
    }
}

fn color(rng: &mut ChaCha8Rng) -> Color {
    [0; 3].map(|_| rng.random_range(0.05..0.95))
}

fn mix(a: Color, b: Color, share: f32) -> Color {
    [0, 1, 2].map(|i| a[i] + share * (b[i] - a[i]))
}
