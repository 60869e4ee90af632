//! Trains one hand-made layer on `attention` and `codebook` alone, without the crate's `model`. Runs for a few seconds.
//!
//! Every token has a kind (one of 24) and a value; the layer has to give, at each token, the mean value of all tokens of
//! that kind so far. Attention can do that: queries of a kind must find keys of the same kind. Almost all of those lie beyond
//! the window, so they are read through the codebook. The example shows the whole circle: forward, a loss of your own,
//! backward, an update of your own arrays, and the codebook's update.
//!
//! ```sh
//! cargo run --release --no-default-features --example own_model
//! ```

use ndarray::{Array, Array1, Array2, Array3, Array4, ArrayView4, Dimension, Zip};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::{BatchInputs, VqAttention};
use transformer_vq::codebook::{Codebook, Ema, Estimator};

const KINDS: usize = 24;
const BATCH: usize = 4;
const LEN: usize = 512;
const HEADS: usize = 2;
const D_K: usize = 16;
const CODES: usize = 32;
const STEPS: usize = 300;

/// What the layer learns: a query and a key per kind and head, and how heads weigh values. Its gradient has the same type.
#[derive(Clone)]
struct Layer {
    queries: Array2<f32>, // [kinds, H K]
    keys: Array2<f32>,    // [kinds, H K]
    values: Array1<f32>,  // [H]
    output: Array1<f32>,  // [H]
}

impl Layer {
    fn zeros() -> Self {
        let table = || Array2::zeros((KINDS, HEADS * D_K));
        Layer { queries: table(), keys: table(), values: Array1::zeros(HEADS), output: Array1::zeros(HEADS) }
    }

    fn random(rng: &mut ChaCha8Rng) -> Self {
        let mut table = || Array2::from_shape_simple_fn((KINDS, HEADS * D_K), || rng.random_range(-1.0..1.0));
        let (queries, keys) = (table(), table());
        Layer { queries, keys, values: Array1::ones(HEADS), output: Array1::from_elem(HEADS, 0.5) }
    }
}

/// Sequences of kinds and values, and what the layer should say.
struct Batch {
    kinds: Array2<usize>, // [B, T]
    values: Array2<f32>,  // [B, T]
    targets: Array2<f32>, // [B, T]
}

impl Batch {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let kinds = Array2::from_shape_simple_fn((BATCH, LEN), || rng.random_range(0..KINDS));
        let values = Array2::from_shape_simple_fn((BATCH, LEN), || rng.random_range(-1.0..1.0f32));
        let mut targets = Array2::zeros((BATCH, LEN));
        for b in 0..BATCH {
            let (mut sums, mut counts) = ([0.0; KINDS], [0.0; KINDS]);
            for t in 0..LEN {
                let kind = kinds[[b, t]];
                sums[kind] += values[[b, t]];
                counts[kind] += 1.0;
                targets[[b, t]] = sums[kind] / counts[kind];
            }
        }
        Batch { kinds, values, targets }
    }
}

/// Rows of a table by kind: [B, T, H, K].
fn look_up(table: &Array2<f32>, kinds: &Array2<usize>) -> Array4<f32> {
    Array4::from_shape_fn((BATCH, LEN, HEADS, D_K), |(b, t, h, k)| table[[kinds[[b, t]], h * D_K + k]])
}

/// The gradient of [`look_up`]'s table, added to `d_table`. `d` [B, H, T, K].
fn look_up_backward(d: ArrayView4<'_, f32>, kinds: &Array2<usize>, d_table: &mut Array2<f32>) {
    for ((b, h, t, k), &d) in d.indexed_iter() {
        d_table[[kinds[[b, t]], h * D_K + k]] += d;
    }
}

/// One step: forward, loss, backward. Returns the loss, the gradient, and the share of attention on cached codes.
fn learn(
    attention: &VqAttention,
    layer: &Layer,
    codebook: &mut Codebook<f32>,
    batch: &Batch,
) -> Result<(f32, Layer, f32), Error> {
    // Arrays come as [B, T, H, width]; attention takes [B, H, T, width]: permuted views, no copies.
    let (q, k) = (look_up(&layer.queries, &batch.kinds), look_up(&layer.keys, &batch.kinds));
    let v =
        Array4::from_shape_fn((BATCH, LEN, HEADS, 1), |(b, t, h, _)| batch.values[[b, t]] * layer.values[h]);
    let per_head = [0, 2, 1, 3];
    let [q, k, v] = [&q, &k, &v].map(|x| x.view().permuted_axes(per_head));
    let inputs = BatchInputs::new(q, k, v);
    let mut states = attention.new_states(BATCH, codebook, 1)?;
    let (output, saved) = attention.forward(&inputs, codebook, &mut states)?;

    // A loss of our own: half the mean squared error of a weighted sum over heads.
    let prediction: Array2<f32> = Array2::from_shape_fn((BATCH, LEN), |(b, t)| {
        (0..HEADS).map(|h| layer.output[h] * output.out[[b, h, t, 0]]).sum()
    });
    let d_prediction = (&prediction - &batch.targets) / (BATCH * LEN) as f32;
    let loss = 0.5 * (&prediction - &batch.targets).mapv(|e| e * e).mean().unwrap_or_default();

    let mut d = Layer::zeros();
    let d_out =
        Array4::from_shape_fn(output.out.dim(), |(b, h, t, _)| d_prediction[[b, t]] * layer.output[h]);
    Zip::indexed(&output.out).for_each(|(b, h, t, _), &o| d.output[h] += d_prediction[[b, t]] * o);
    let commit_weight = 1e-3;
    let gradients =
        attention.backward(&inputs, saved, d_out.view(), Estimator::StraightThrough, commit_weight)?;
    look_up_backward(gradients.q.view(), &batch.kinds, &mut d.queries);
    look_up_backward(gradients.k.view(), &batch.kinds, &mut d.keys);
    Zip::indexed(&gradients.v).for_each(|(b, h, t, _), &d_v| d.values[h] += d_v * batch.values[[b, t]]);

    codebook.update(&output.stats)?;
    Ok((loss, d, output.cached_mass.mean().unwrap_or_default()))
}

/// Adam for one array: `m` and `v` are the moving averages of the gradient and of its square.
fn adam<D: Dimension>(
    step: i32,
    x: &mut Array<f32, D>,
    d: &Array<f32, D>,
    m: &mut Array<f32, D>,
    v: &mut Array<f32, D>,
) {
    let (unbias_m, unbias_v) = (1.0 / (1.0 - 0.9f32.powi(step)), 1.0 / (1.0 - 0.99f32.powi(step)));
    Zip::from(x).and(d).and(m).and(v).for_each(|x, &d, m, v| {
        *m += 0.1 * (d - *m);
        *v += 0.01 * (d * d - *v);
        *x -= 0.02 * *m * unbias_m / ((*v * unbias_v).sqrt() + 1e-8);
    });
}

fn main() -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let attention = VqAttention { block_len: 32, window: 16, ..VqAttention::default() };
    let mut layer = Layer::random(&mut rng);
    // Codewords begin at keys; there are more codes than kinds.
    let start = Array3::from_shape_fn((HEADS, CODES, D_K), |(h, s, k)| layer.keys[[s % KINDS, h * D_K + k]]);
    let mut codebook = Codebook::ema(Ema::from_codewords(start, 0.95)?);
    let (mut m, mut v) = (Layer::zeros(), Layer::zeros());

    println!("{:>5}  {:>10}  {:>22}", "step", "loss", "attention beyond window");
    for step in 1..=STEPS {
        let batch = Batch::random(&mut rng);
        let (loss, d, cached) = learn(&attention, &layer, &mut codebook, &batch)?;
        adam(step as i32, &mut layer.queries, &d.queries, &mut m.queries, &mut v.queries);
        adam(step as i32, &mut layer.keys, &d.keys, &mut m.keys, &mut v.keys);
        adam(step as i32, &mut layer.values, &d.values, &mut m.values, &mut v.values);
        adam(step as i32, &mut layer.output, &d.output, &mut m.output, &mut v.output);
        if step % 30 == 0 || step == 1 {
            println!("{step:>5}  {loss:>10.6}  {:>20.1} %", 100.0 * cached);
        }
    }
    Ok(())
}
