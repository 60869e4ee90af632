//! Decoding: token by token, where every weight and every state is read for each token, and memory is what limits.
//!
//! Bytes of a step: all weights that a token meets, codewords and relative biases once, and of every stream the mean values of
//! its caches and the codes and values of its windows. Weights are read once for all streams, states are not: `at most` is how many
//! times as many tokens eight streams could have as one by these bytes, if both read as fast. Nobody waits for a million tokens:
//! states are put together from parts that such a position would have, random values under evenly spread counts.

use std::hint::black_box;

use transformer_vq::Transformer;
use transformer_vq::attention::{AttentionState, CompressiveCache, WindowKeys};
use transformer_vq::check::relative_rms;
use transformer_vq::generate::{Generator, Sampler};
use transformer_vq::model::{ModelState, Prepared};
use transformer_vq::ndarray::{Array1, Array2, ArrayView2, Axis, array, s};

use crate::bandwidth::beyond_caches;
use crate::machine::{Task, rounds};
use crate::report::Report;
use crate::shapes::{Normal, Shape};
use crate::{Result, Run, agree, training};

/// Positions whose latency is compared.
const NEAR: u64 = 64_000;
const FAR: u64 = 1_000_000;
const STREAMS: usize = 8;
/// The multi-head shape in a model as wide as its heads together, twice as wide: weights grow with the square of the width, states
/// with the width. Here they are a twelfth.
const WIDER: Shape = Shape {
    name: "multi-head",
    heads: 16,
    d_k: 64,
    d_v: 64,
    n_codes: 256,
    block_len: 128,
    d_model: 1024,
    gated: false,
    compared: true,
};
/// Tokens that are pushed one by one and at once, to be compared.
const CHECKED: usize = 8;

/// One row per model: of units of the paper's and of the multi-head shape, larger than the last cache, and the one whose
/// training step is measured, which is not; last, one whose states are small beside its weights.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    report.table(&[
        "decoding",
        "MB/token",
        "latency ms",
        "tokens/s",
        "GB/s",
        "over memory",
        "at 1M / at 64k",
        "8 streams tokens/s",
        "over one",
        "at most",
        "over memory",
    ])?;
    let wider = (!run.one_shape).then_some(&WIDER);
    for shape in run.shapes.iter().copied().chain(wider) {
        let Some((model, what)) = model(shape, run.one_shape)? else { continue };
        row(run, report, shape, &model, what)?;
    }
    report.end()?;
    let Some(small) = run.shapes.iter().find(|shape| shape.name == "small") else { return Ok(()) };
    let speed = sampling(run, small)?;
    report.paragraph(&format!("sampling one sequence from the small model: {speed:.0} tokens/s"))
}

/// Tokens per second of one sequence from the model whose training step is measured.
pub fn sampling(run: &Run<'_>, shape: &Shape) -> Result<f64> {
    let model = training::model(shape)?;
    let sampler = Sampler { temperature: 1.0, top_k: None, top_p: None };
    let mut generator = Generator::new(&model, sampler, 7)?;
    generator.read(array![32].view())?;
    let sample = &mut || {
        black_box(generator.next_token().expect("something was read"));
    };
    let [sampled] = rounds(run.pairs, || 1.0, [Task { amount: 1.0, run: sample }]);
    Ok(1.0 / sampled.seconds())
}

/// The model that stands for a shape, and its name.
fn model(shape: &Shape, asked_for: bool) -> Result<Option<(Transformer<f32>, String)>> {
    if shape.name == "small" {
        return Ok(Some((training::model(shape)?, "small, in cache".to_string())));
    }
    if !(shape.compared || asked_for) {
        return Ok(None);
    }
    let units = beyond_caches().div_ceil(4 * shape.unit_weights());
    let model = Transformer::new(shape.model(units, 256), 1)?;
    Ok(Some((model, format!("{} D={} x {units}", shape.name, shape.d_model))))
}

fn row(run: &Run<'_>, report: &mut Report, shape: &Shape, model: &Transformer<f32>, name: String) -> Result {
    let prepared = model.prepare()?;
    let (mut near, mut far) = (state_at(model, NEAR, 1)?, state_at(model, FAR, 1)?);
    let mut streams = state_at(model, NEAR, STREAMS)?;
    check(&prepared, &near, &streams)?;
    let tokens = Array2::from_shape_fn((STREAMS, 1), |(stream, _)| 97 + stream as u32);
    let token = tokens.slice(s![..1, ..]);
    let push = |tokens: ArrayView2<'_, u32>, state: &mut ModelState<f32>| {
        black_box(prepared.push(tokens, state).expect("checked before"));
    };
    let units = model.config().n_layers;
    let tasks = [
        Task { amount: bytes(shape, units, 1), run: &mut || push(token, &mut near) },
        Task { amount: bytes(shape, units, 1), run: &mut || push(token, &mut far) },
        Task { amount: bytes(shape, units, STREAMS), run: &mut || push(tokens.view(), &mut streams) },
    ];
    let [near, far, eight] = rounds(run.pairs, || run.machine.memory.read(), tasks);
    report.row(&[
        name,
        format!("{:.1}", bytes(shape, units, 1) / 1e6),
        format!("{:.3}", 1e3 * near.seconds()),
        format!("{:.1}", 1.0 / near.seconds()),
        format!("{:.1}", bytes(shape, units, 1) / near.seconds() / 1e9),
        format!("{:.2}", near.ratio()),
        format!("{:.3}", far.over(&near)),
        format!("{:.1}", STREAMS as f64 / eight.seconds()),
        format!("{:.2}", STREAMS as f64 / eight.over(&near)),
        format!("{:.2}", STREAMS as f64 * bytes(shape, units, 1) / bytes(shape, units, STREAMS)),
        format!("{:.2}", eight.ratio()),
    ])
}

/// That one step of so many streams touches.
fn bytes(shape: &Shape, units: usize, streams: usize) -> f64 {
    let &Shape { heads, d_k, d_v, n_codes, block_len: window, d_model, .. } = shape;
    let of_unit = shape.unit_weights() + 2 * d_model + heads * d_k * (n_codes + window + 1);
    let state = heads * (n_codes * d_v + window * (1 + d_v));
    let output = d_model * 256;
    (size_of::<f32>() * (output + units * (of_unit + streams * state))) as f64
}

/// The state of streams that have come so far.
fn state_at(model: &Transformer<f32>, position: u64, streams: usize) -> Result<ModelState<f32>> {
    let config = model.config();
    let (window, n_codes, d_v) = (config.attention.window, config.n_codes, config.d_v);
    let cached = position - window as u64;
    let share = |s: usize| cached / n_codes as u64 + u64::from((s as u64) < cached % n_codes as u64);
    let mut normal = Normal::new(position);
    let mut head = |codewords: ArrayView2<'_, f32>| -> Result<AttentionState<f32>> {
        // A mean of that many values is small.
        let mean = normal.array((n_codes, d_v), (n_codes as f32 / cached as f32).sqrt());
        let count = Array1::from_shape_fn(n_codes, share);
        let cache = CompressiveCache::from_parts(mean, Array2::zeros((n_codes, d_v)), count)?;
        let codes: Vec<usize> = (0..window).map(|j| (j * 7) % n_codes).collect();
        let keys = WindowKeys {
            k_hat: codewords.select(Axis(0), &codes),
            codes: codes.iter().map(|&code| code as u32).collect(),
            v: normal.array((window, d_v), 1.0),
        };
        Ok(AttentionState::from_parts(position, window, cache, &keys)?)
    };
    let mut layers = vec![];
    for codebook in model.codebooks() {
        let codewords = codebook.codewords();
        let states = (0..streams * codebook.n_heads())
            .map(|n| head(codewords.index_axis(Axis(0), n % codebook.n_heads())))
            .collect::<Result<Vec<_>>>()?;
        layers.push(Array2::from_shape_vec((streams, codebook.n_heads()), states)?.into());
    }
    Ok(ModelState::from_parts(layers)?)
}

/// Compares tokens one by one with all at once, and a stream among others with itself alone.
fn check(prepared: &Prepared<'_>, state: &ModelState<f32>, streams: &ModelState<f32>) -> Result {
    let tokens = Array2::from_shape_fn((1, CHECKED), |(_, i)| 97 + i as u32);
    let (whole, _) = prepared.push(tokens.view(), &mut state.clone())?;
    let mut state = state.clone();
    for (i, token) in tokens.axis_chunks_iter(Axis(1), 1).enumerate() {
        let (logits, _) = prepared.push(token, &mut state)?;
        let expected = whole.slice(s![.., i..=i, ..]).to_owned();
        agree("tokens one by one and at once", relative_rms(&logits, &expected), 1e-3)?;
    }
    let last = STREAMS - 1..;
    let of_last = streams.layers().iter().map(|states| states.of_sequence(STREAMS - 1));
    let mut alone = ModelState::from_parts(of_last.collect::<std::result::Result<_, _>>()?)?;
    let tokens = Array2::from_shape_fn((STREAMS, 1), |(stream, _)| 97 + stream as u32);
    let (together, _) = prepared.push(tokens.view(), &mut streams.clone())?;
    let (alone, _) = prepared.push(tokens.slice(s![last.clone(), ..]), &mut alone)?;
    let together = together.slice(s![last, .., ..]).to_owned();
    agree("a stream among others and alone", relative_rms(&together, &alone), 1e-3)
}
