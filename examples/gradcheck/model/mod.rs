//! Level 4: the whole model. Its surrogate is written here a second time, on the definition of attention: codes are frozen,
//! recent keys read `c_z + J (k - k0)` with k0 the keys of the unmoved model and J the estimator's, cached keys read the
//! codebook (which moves with its parameters, where attention's gradient is to reach them), and the state that is carried in (or handed from block to block, where that is a constant) is that of the unmoved model.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, Axis, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, naive};
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{
    Codebook, Estimator, Learning, Rotation, RotationScale, RotationVariant, Smoothing, assign_naive,
};
use transformer_vq::model::{
    CodewordGradient, LayerParameters, LearningConfig, ModelConfig, ModelState, NormParameters, Parameters,
    Transformer,
};
use transformer_vq::ops::{cross_entropy, positions};

use super::Check;

pub fn checks() -> Vec<Check> {
    let check = |name, worst_error| Check { name, worst_error, tolerance: 1e-8 };
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
        check("model: rotation, Laplace", || {
            let smoothing = Smoothing::Laplace { epsilon: 1e-5 };
            let estimator = rotation(RotationVariant::Paper, RotationScale::Ratio);
            error(&ModelConfig { learning: LearningConfig::Ema { smoothing }, estimator, ..small() }, false)
        }),
        check("model: rotation of unit vectors, frozen", || {
            let estimator = rotation(RotationVariant::Normalized, RotationScale::AtMost(0.9));
            error(&ModelConfig { learning: LearningConfig::Frozen, estimator, ..small() }, true)
        }),
        check("model: learned codewords, no estimator", || {
            let learning = LearningConfig::Gradient(by_gradient(false));
            error(&ModelConfig { learning, estimator: Estimator::None, ..small() }, true)
        }),
        check("model: codewords by attention, two heads", || {
            let learning = LearningConfig::Gradient(by_gradient(true));
            error(&ModelConfig { learning, n_heads: 2, ..small() }, false)
        }),
        check("model: SimVQ", || error(&linear(false, false, false), false)),
        check("model: SimVQ by attention, directional", || {
            error(&ModelConfig { estimator: Estimator::Directional, ..linear(false, true, true) }, true)
        }),
        check("model: SimVQ, learned basis, rotation", || {
            let estimator = rotation(RotationVariant::Paper, RotationScale::One);
            error(&ModelConfig { estimator, n_heads: 2, ..linear(true, true, true) }, true)
        }),
    ]
}

fn rotation(variant: RotationVariant, scale: RotationScale) -> Estimator {
    Estimator::Rotation(Rotation { variant, scale })
}

fn by_gradient(from_attention: bool) -> CodewordGradient {
    CodewordGradient { codebook_weight: 0.2, from_attention }
}

fn linear(learned_basis: bool, bias: bool, from_attention: bool) -> ModelConfig {
    let gradient = by_gradient(from_attention);
    ModelConfig { learning: LearningConfig::Linear { d_basis: 3, learned_basis, bias, gradient }, ..small() }
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
    let model = Transformer::from_parts(config.clone(), parameters, model.learning().to_vec()).unwrap();
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
    learning: &'a [Learning<f64>],
    codewords: Vec<Array3<f64>>,
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
    /// As attention's gradient moves them.
    codewords: Array2<f64>,
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
        let learning = model.learning();
        let mut surrogate =
            Surrogate { config, learning, codewords, piece, targets, mask, start, frozen: vec![] };
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
        let base = quantized(frozen, self.codewords[unit].index_axis(Axis(0), h));
        let mut k_hat = quantized(frozen, head.codewords.view());
        for (j, mut k_hat) in k_hat.outer_iter_mut().enumerate() {
            let [k, k0, c0] = [&head.k, &frozen.keys, &base].map(|rows| rows.row(j).to_owned());
            let moved = match self.config.estimator {
                Estimator::Directional => {
                    let e = &c0 - &k0;
                    &k + &(&e / length(&e) * length(&(&k_hat - &k)))
                }
                Estimator::StraightThrough => &k_hat + &k - &k0,
                Estimator::Rotation(rotation) => &k_hat + &jacobian(rotation, &k0, &c0).dot(&(&k - &k0)),
                _ => k_hat.to_owned(),
            };
            k_hat.assign(&moved);
        }
        let rows = s![tokens.clone(), ..];
        let inputs = Inputs {
            q: head.q.slice(rows),
            codes: frozen.codes.slice(s![tokens]),
            v: head.v.slice(rows),
            codewords: head.codewords.view(),
            biases: Some(Biases {
                content: head.content.view(),
                position: head.position.view(),
                relative: head.relative.view(),
            }),
            starts: None,
        };
        let (output, state) =
            naive::forward(&self.config.attention, &inputs, k_hat.slice(rows), state).unwrap();
        (output.out, state)
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
        let gradient = match self.config.learning {
            LearningConfig::Gradient(gradient) | LearningConfig::Linear { gradient, .. } => gradient,
            _ => CodewordGradient { codebook_weight: 0.0, from_attention: false },
        };
        let (mut commit_loss, mut codebook_loss) = (0.0, 0.0);
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
                codebook,
            } = layer;
            let codebook = Codebook::new(self.learning[unit].clone(), codebook.clone()).unwrap();
            let moved = codebook.codewords();
            let seen = if gradient.from_attention { &moved } else { &self.codewords[unit] };
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
                        codewords: seen.index_axis(Axis(0), h).to_owned(),
                    };
                    let out = attend(self, unit, sequence, h, &head);
                    let gate = normed.dot(&w_gate.slice(values)).mapv(silu);
                    gated.slice_mut(values).assign(&(out * gate));
                    if let Some(frozen) = self.frozen.get((unit * b + sequence) * n_heads + h) {
                        let [base, moved] = [&self.codewords[unit], &moved]
                            .map(|codewords| quantized(frozen, codewords.index_axis(Axis(0), h)));
                        let mean = |distance: Array2<f64>| {
                            let squares = (&distance * &distance).sum_axis(Axis(1));
                            let counted_squares = (0..t).filter(|&i| counts(sequence, i)).map(|i| squares[i]);
                            counted_squares.sum::<f64>() / counted
                        };
                        commit_loss += mean(&head.k - &base);
                        codebook_loss += mean(&frozen.keys - &moved);
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
        loss + self.config.commit_weight * commit_loss + gradient.codebook_weight * codebook_loss
    }
}

/// The codeword of each key.
fn quantized(frozen: &Frozen, codewords: ArrayView2<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn(frozen.keys.raw_dim(), |(j, k)| codewords[[frozen.codes[j] as usize, k]])
}

/// J of the rotation trick, with matrices.
fn jacobian(rotation: Rotation, key: &Array1<f64>, codeword: &Array1<f64>) -> Array2<f64> {
    let outer =
        |a: &Array1<f64>, b: &Array1<f64>| Array2::from_shape_fn((a.len(), b.len()), |(i, j)| a[i] * b[j]);
    let (u, c) = (key / length(key), codeword / length(codeword));
    let t = &u + &c;
    let (t, identity) = (&t / length(&t), Array2::<f64>::eye(key.len()));
    let r = &identity - &(outer(&t, &t) * 2.0) + &(outer(&c, &u) * 2.0);
    let ratio = length(codeword) / length(key);
    let lambda = match rotation.scale {
        RotationScale::Ratio => ratio,
        RotationScale::AtMost(most) => ratio.min(most),
        RotationScale::One => 1.0,
    };
    match rotation.variant {
        RotationVariant::Paper => r * lambda,
        RotationVariant::Normalized => r.dot(&(identity - outer(&u, &u))) * lambda,
    }
}

fn length(x: &Array1<f64>) -> f64 {
    x.dot(x).sqrt()
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
