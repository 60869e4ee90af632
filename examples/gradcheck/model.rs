//! Level 4: the whole model. Its surrogate is written here a second time, on the definition of attention: codes are frozen,
//! recent keys read `c_z + (k - k0)` with k0 the keys of the unmoved model, cached keys read the codebook, and the state
//! that is carried in (or handed from block to block, where that is a constant) is that of the unmoved model.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayD, Axis, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, naive};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::assign_naive;
use transformer_vq::model::{
    LayerParameters, ModelConfig, ModelState, NormParameters, Parameters, Transformer,
};
use transformer_vq::ops::{cross_entropy, positions};

use super::Check;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-7 };
    vec![
        check("model: one head", || error(&small(), false)),
        check("model: two heads, tied, absolute, masked", || {
            let options =
                ModelConfig { n_heads: 2, tied_embedding: true, absolute_positions: true, ..small() };
            error(&options, true)
        }),
        check("model: blocks constant, no final norm", || {
            let attention = VqAttention { gradient_through_cache: false, ..small().attention };
            error(&ModelConfig { attention, final_norm: false, ..small() }, false)
        }),
        check("model: window only, masked", || {
            let attention = VqAttention { cache: false, ..small().attention };
            error(&ModelConfig { attention, ..small() }, true)
        }),
    ]
}

fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 7,
        d_model: 6,
        n_layers: 2,
        n_heads: 1,
        d_k: 4,
        d_v: 5,
        n_codes: 5,
        attention: VqAttention { block_len: 3, window: 2, ..VqAttention::default() },
        logit_scale: 0.8,
        commit_weight: 0.3,
        ..ModelConfig::default()
    }
}

/// The largest error over the gradients of all parameters.
fn error(config: &ModelConfig, masked: bool) -> f64 {
    const BATCH: usize = 2;
    let model = Transformer::new(config.clone(), 5).unwrap().cast::<f64>();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut parameters = model.parameters().clone();
    for mut parameter in parameters.views_mut() {
        // Biases and scalars start at zero, where mistakes hide.
        parameter.value.mapv_inplace(|x| x + rng.random_range(-0.2..0.2));
    }
    let model = Transformer::from_parts(config.clone(), parameters, model.codebooks().to_vec()).unwrap();
    let mut tokens =
        |t| Array2::from_shape_simple_fn((BATCH, t), || rng.random_range(0..config.vocab_size as u32));
    let (before, piece, targets) = (tokens(8), tokens(10), tokens(10));
    let mask = masked.then(|| Array2::from_shape_fn((BATCH, 10), |(b, t)| (b + 2 * t) % 5 > 0));
    let mut state = model.new_state(BATCH).unwrap();
    model.push(before.view(), &mut state).unwrap();

    let surrogate = Surrogate::new(&model, &state, &piece, &targets, mask.as_ref());
    let mask = mask.as_ref().map(|mask| mask.view());
    let got = model.loss_and_gradients(piece.view(), targets.view(), mask, &mut state).unwrap();
    let mut worst: f64 = (surrogate.total(model.parameters()) / got.total - 1.0).abs();
    for (i, gradient) in got.gradients.views().into_iter().enumerate() {
        let mut moved = model.parameters().clone();
        let at = model.parameters().views()[i].value.to_owned();
        let expected = finite_difference(
            |x| {
                moved.views_mut()[i].value.assign(&x);
                surrogate.total(&moved)
            },
            &at,
            1e-3,
        );
        let gradient: ArrayD<f64> = gradient.value.to_owned();
        worst = worst.max(relative_rms(&gradient, &expected));
    }
    worst
}

/// Everything that stays as it is while parameters are moved.
struct Surrogate<'a> {
    config: &'a ModelConfig,
    codewords: Vec<ndarray::Array3<f64>>,
    piece: &'a Array2<u32>,
    targets: &'a Array2<u32>,
    mask: Option<&'a Array2<bool>>,
    start: u64,
    /// By unit, sequence and head.
    frozen: Vec<Frozen>,
}

/// One head of one sequence in the unmoved model.
struct Frozen {
    codes: Array1<u32>,
    keys: Array2<f64>,
    /// Stretches over which gradients flow, each with the state before it.
    stretches: Vec<(Range<usize>, AttentionState<f64>)>,
}

/// The arrays of one head of one sequence.
struct Head {
    q: Array2<f64>,
    k: Array2<f64>,
    v: Array2<f64>,
    content: Array1<f64>,
    position: Array1<f64>,
    relative: Array2<f64>,
}

/// Attention of one head: unit, sequence, head and its arrays give [T, V].
type Attend<'a> = dyn FnMut(&Surrogate<'_>, usize, usize, usize, &Head) -> Array2<f64> + 'a;

impl<'a> Surrogate<'a> {
    fn new(
        model: &'a Transformer<f64>,
        state: &ModelState<f64>,
        piece: &'a Array2<u32>,
        targets: &'a Array2<u32>,
        mask: Option<&'a Array2<bool>>,
    ) -> Self {
        let codewords = model.codebooks().iter().map(|codebook| codebook.codewords()).collect();
        let (config, start) = (model.config(), state.position());
        let mut surrogate = Surrogate { config, codewords, piece, targets, mask, start, frozen: vec![] };
        // The unmoved model, which freezes unit by unit.
        let mut frozen = vec![];
        surrogate.run(model.parameters(), &mut |surrogate, unit, b, h, head| {
            let codewords = surrogate.codewords[unit].index_axis(Axis(0), h);
            let codes = assign_naive(head.k.view(), codewords).unwrap();
            let t = codes.len();
            let through = surrogate.config.attention.gradient_through_cache;
            let len = if through { t } else { surrogate.config.attention.block_len };
            let mut state = state.layers()[unit][[b, h]].clone();
            let mut one = Frozen { codes, keys: head.k.clone(), stretches: vec![] };
            let mut out = Array2::zeros(head.v.raw_dim());
            for from in (0..t).step_by(len) {
                let tokens = from..t.min(from + len);
                let before = state.clone();
                let (o, after) = surrogate.attend(&one, unit, h, head, tokens.clone(), &before);
                out.slice_mut(s![tokens.clone(), ..]).assign(&o);
                state = after;
                one.stretches.push((tokens, before));
            }
            frozen.push(one);
            out
        });
        surrogate.frozen = frozen;
        surrogate
    }

    /// The total loss with these parameters.
    fn total(&self, parameters: &Parameters<f64>) -> f64 {
        let (b, n_heads) = (self.piece.nrows(), self.config.n_heads);
        self.run(parameters, &mut |surrogate, unit, sequence, h, head| {
            let frozen = &surrogate.frozen[(unit * b + sequence) * n_heads + h];
            let mut out = Array2::zeros(head.v.raw_dim());
            for (tokens, state) in &frozen.stretches {
                let (o, _) = surrogate.attend(frozen, unit, h, head, tokens.clone(), state);
                out.slice_mut(s![tokens.clone(), ..]).assign(&o);
            }
            out
        })
    }

    /// The definition of attention on one stretch, with surrogate keys.
    fn attend(
        &self,
        frozen: &Frozen,
        unit: usize,
        h: usize,
        head: &Head,
        tokens: Range<usize>,
        state: &AttentionState<f64>,
    ) -> (Array2<f64>, AttentionState<f64>) {
        let codewords = self.codewords[unit].index_axis(Axis(0), h);
        let k_hat = self.quantized(frozen, unit, h) + &head.k - &frozen.keys;
        let rows = s![tokens.clone(), ..];
        let inputs = Inputs {
            q: head.q.slice(rows),
            codes: frozen.codes.slice(s![tokens]),
            v: head.v.slice(rows),
            codewords,
            biases: Some(Biases {
                content: head.content.view(),
                position: head.position.view(),
                relative: head.relative.view(),
            }),
        };
        let (output, state) =
            naive::forward(&self.config.attention, &inputs, k_hat.slice(rows), state).unwrap();
        (output.out, state)
    }

    fn quantized(&self, frozen: &Frozen, unit: usize, h: usize) -> Array2<f64> {
        let codewords = self.codewords[unit].index_axis(Axis(0), h);
        Array2::from_shape_fn(frozen.keys.raw_dim(), |(j, k)| codewords[[frozen.codes[j] as usize, k]])
    }

    /// The model by its formulas, attention left to `attend(unit, sequence, head)`; returns the total loss.
    fn run(&self, parameters: &Parameters<f64>, attend: &mut Attend<'_>) -> f64 {
        let ModelConfig { d_model, n_heads, d_k, d_v, position_lambda, .. } = *self.config;
        let (b, t) = self.piece.dim();
        let scale = (d_k as f64).powf(-0.25);
        let sinusoids: Array2<f64> = positions::sinusoids(self.start, t, d_model, position_lambda).unwrap();
        let distances: Array2<f64> =
            positions::sinusoids(0, self.config.attention.window + 1, d_model, position_lambda).unwrap();
        let counts = |sequence: usize, i: usize| self.mask.is_none_or(|mask| mask[[sequence, i]]);
        let counted = (0..b * t).filter(|n| counts(n / t, n % t)).count() as f64;

        let mut x: Vec<Array2<f64>> = (0..b)
            .map(|sequence| {
                let tokens: Vec<usize> =
                    self.piece.row(sequence).iter().map(|&token| token as usize).collect();
                let embedded = parameters.embedding.select(Axis(0), &tokens);
                embedded + parameters.position_scale.as_ref().map_or(0.0, |scale| scale[0]) * &sinusoids
            })
            .collect();
        let mut commit_loss = 0.0;
        for (unit, layer) in parameters.layers.iter().enumerate() {
            let LayerParameters {
                norm,
                w_q,
                w_k,
                w_v,
                w_gate,
                w_relative,
                w_out,
                content_bias,
                position_bias,
            } = layer;
            let relative = distances.dot(w_relative) * scale;
            for (sequence, x) in x.iter_mut().enumerate() {
                let normed = normalize(x, norm);
                let mut gated = Array2::zeros((t, n_heads * d_v));
                for h in 0..n_heads {
                    let keys = s![.., h * d_k..(h + 1) * d_k];
                    let values = s![.., h * d_v..(h + 1) * d_v];
                    let head = Head {
                        q: rms(&normed.dot(&w_q.slice(keys))) * scale,
                        k: rms(&normed.dot(&w_k.slice(keys))) * scale,
                        v: normed.dot(&w_v.slice(values)).mapv(silu),
                        content: &content_bias.row(h) * scale,
                        position: &position_bias.row(h) * scale,
                        relative: relative.slice(keys).to_owned(),
                    };
                    let out = attend(self, unit, sequence, h, &head);
                    let gate = normed.dot(&w_gate.slice(values)).mapv(silu);
                    gated.slice_mut(values).assign(&(out * gate));
                    if let Some(frozen) = self.frozen.get((unit * b + sequence) * n_heads + h) {
                        let distance = &head.k - &self.quantized(frozen, unit, h);
                        let squares = (&distance * &distance).sum_axis(Axis(1));
                        let sum: f64 = (0..t).filter(|&i| counts(sequence, i)).map(|i| squares[i]).sum();
                        commit_loss += sum / counted;
                    }
                }
                *x += &gated.dot(w_out);
            }
        }
        let mut loss = 0.0;
        for (sequence, x) in x.iter().enumerate() {
            let x = parameters.final_norm.as_ref().map_or(x.clone(), |norm| normalize(x, norm));
            let output = parameters.output.as_ref().map_or(parameters.embedding.t(), |output| output.view());
            let logits = (x.dot(&output) + &parameters.output_bias) * self.config.logit_scale;
            let log_probabilities = cross_entropy::log_softmax(logits.view()).unwrap();
            for i in (0..t).filter(|&i| counts(sequence, i)) {
                loss -= log_probabilities[[i, self.targets[[sequence, i]] as usize]] / counted;
            }
        }
        loss + self.config.commit_weight * commit_loss
    }
}

/// Rows over their root mean square.
fn rms(x: &Array2<f64>) -> Array2<f64> {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        row /= (mean + 1e-6).sqrt();
    }
    y
}

fn normalize(x: &Array2<f64>, norm: &NormParameters<f64>) -> Array2<f64> {
    rms(x) * &norm.gain + &norm.bias
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
