//! The model by its formulas, on the definition of attention, with everything frozen that gradients treat as a constant.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, s};
use transformer_vq::attention::quadratic::KeyValues;
use transformer_vq::attention::{AttentionState, Biases, Inputs, VqAttention, naive};
use transformer_vq::codebook::{Codebook, Estimator, Learning, assign_naive};
use transformer_vq::model::{
    CodewordGradient, DropoutSeed, LayerParameters, LearningConfig, ModelConfig, ModelState, Parameters,
    Transformer, UnitKind,
};
use transformer_vq::ops::{cross_entropy, positions};

use super::formulas::{drops, feed_forward, jacobian, length, normalize, rms, silu};

/// Everything that stays as it is while parameters are moved.
pub struct Surrogate<'a> {
    config: &'a ModelConfig,
    /// None in units without a codebook, whose codewords are one of zeros.
    learning: Vec<Option<&'a Learning<f64>>>,
    codewords: Vec<Array3<f64>>,
    piece: &'a Array2<u32>,
    targets: &'a Array2<u32>,
    mask: Option<&'a Array2<bool>>,
    seed: DropoutSeed,
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
    /// Keys and values before the piece, where attention is exact.
    past: Option<KeyValues<f64>>,
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
    pub fn new(
        model: &'a Transformer<f64>,
        state: &ModelState<f64>,
        piece: &'a Array2<u32>,
        targets: &'a Array2<u32>,
        mask: Option<&'a Array2<bool>>,
        seed: DropoutSeed,
    ) -> Self {
        let (config, start) = (model.config(), state.position());
        let (mut learning, mut codewords) = (vec![None; config.n_layers], vec![]);
        codewords.resize(config.n_layers, Array3::zeros((config.key_heads(), 1, config.d_k)));
        for (unit, (one, codebook)) in
            config.codebook_units().zip(model.learning().iter().zip(model.codebooks()))
        {
            (learning[unit], codewords[unit]) = (Some(one), codebook.codewords());
        }
        let frozen = vec![];
        let mut surrogate =
            Surrogate { config, learning, codewords, piece, targets, mask, seed, start, frozen };
        // The unmoved model, which freezes unit by unit.
        let mut frozen = vec![];
        surrogate.run(model.parameters(), &mut |surrogate, unit, b, h, head| {
            let key_head = h / surrogate.group();
            if let Some(states) = state.layers()[unit].quadratic() {
                let past = states[[b, key_head]].clone();
                let out = exactly(head, &past);
                let (codes, keys) = (Array1::zeros(0), head.k.clone());
                frozen.push(Frozen { codes, keys, stretches: vec![], past: Some(past) });
                return out;
            }
            let codewords = surrogate.codewords[unit].index_axis(Axis(0), key_head);
            let codes = assign_naive(head.k.view(), codewords).unwrap();
            let t = codes.len();
            let through = surrogate.config.attention.gradient_through_cache;
            let len = if through { t } else { surrogate.config.attention.block_len };
            let mut state = state.layers()[unit].quantized().unwrap()[[b, key_head]].clone();
            let mut one = Frozen { codes, keys: head.k.clone(), stretches: vec![], past: None };
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

    /// Query heads that read one key head.
    fn group(&self) -> usize {
        self.config.n_heads / self.config.key_heads()
    }

    /// The total loss with these parameters.
    pub fn total(&self, parameters: &Parameters<f64>) -> f64 {
        let (b, n_heads) = (self.piece.nrows(), self.config.n_heads);
        self.run(parameters, &mut |surrogate, unit, sequence, h, head| {
            let frozen = &surrogate.frozen[(unit * b + sequence) * n_heads + h];
            if let Some(past) = &frozen.past {
                return exactly(head, past);
            }
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
        let base = quantized(frozen, self.codewords[unit].index_axis(Axis(0), h / self.group()));
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
        let cache = self.config.attention.cache && self.config.unit(unit) != UnitKind::Window;
        let attention = VqAttention { cache, ..self.config.attention };
        let (output, state) = naive::forward(&attention, &inputs, k_hat.slice(rows), state).unwrap();
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

        let dropped = drops(self.config, self.seed, b, t);
        let mut x: Vec<Array2<f64>> = (0..b)
            .map(|sequence| {
                let tokens: Vec<usize> =
                    self.piece.row(sequence).iter().map(|&token| token as usize).collect();
                let embedded = parameters.embedding.select(Axis(0), &tokens);
                let scale = parameters.position_scale.as_ref().map_or(0.0, |scale| scale[0]);
                (embedded + scale * &sinusoids) * dropped.embedding.slice(s![sequence, .., ..])
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
                feed_forward: second,
            } = layer;
            let moved = match self.learning[unit] {
                Some(learning) => Codebook::new(learning.clone(), codebook.clone()).unwrap().codewords(),
                None => self.codewords[unit].clone(),
            };
            let seen = if gradient.from_attention { &moved } else { &self.codewords[unit] };
            let relative = (&distances * &dropped.sinusoids[unit]).dot(w_relative) * scale;
            for (sequence, x) in x.iter_mut().enumerate() {
                let normed = normalize(x, norm);
                let mut gated = Array2::zeros((t, n_heads * d_v));
                for h in 0..n_heads {
                    let key_head = h / self.group();
                    let queries = s![.., h * d_k..(h + 1) * d_k];
                    let outs = s![.., h * d_v..(h + 1) * d_v];
                    let keys = s![.., key_head * d_k..(key_head + 1) * d_k];
                    let v = normed.dot(&w_v.slice(s![.., key_head * d_v..(key_head + 1) * d_v]));
                    let head = Head {
                        q: rms(&normed.dot(&w_q.slice(queries))) * scale,
                        k: rms(&normed.dot(&w_k.slice(keys))) * scale,
                        v: if w_gate.is_some() { v.mapv(silu) } else { v },
                        content: &content_bias.row(h) * scale,
                        position: &position_bias.row(h) * scale,
                        relative: relative.slice(keys).to_owned(),
                        codewords: seen.index_axis(Axis(0), key_head).to_owned(),
                    };
                    let mut out = attend(self, unit, sequence, h, &head);
                    if let Some(w_gate) = w_gate {
                        out *= &normed.dot(&w_gate.slice(outs)).mapv(silu);
                    }
                    gated.slice_mut(outs).assign(&out);
                    let frozen = self.frozen.get((unit * b + sequence) * n_heads + h);
                    if let Some(frozen) = frozen.filter(|one| h % self.group() == 0 && one.past.is_none()) {
                        let [base, moved] = [&self.codewords[unit], &moved]
                            .map(|codewords| quantized(frozen, codewords.index_axis(Axis(0), key_head)));
                        let mean = |distance: Array2<f64>| {
                            let squares = (&distance * &distance).sum_axis(Axis(1));
                            let counted_squares = (0..t).filter(|&i| counts(sequence, i)).map(|i| squares[i]);
                            counted_squares.sum::<f64>() / counted
                        };
                        commit_loss += mean(&head.k - &base);
                        codebook_loss += mean(&frozen.keys - &moved);
                    }
                }
                let [first, other] = &dropped.branches[unit];
                let of_sequence = s![sequence, .., ..];
                *x += &(gated.dot(w_out) * first.slice(of_sequence));
                if let Some(second) = second {
                    *x += &(feed_forward(x, second) * other.slice(of_sequence));
                }
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

/// Exact attention to the keys before the piece and those of the piece.
fn exactly(head: &Head, past: &KeyValues<f64>) -> Array2<f64> {
    let mut out = Array2::zeros(head.v.raw_dim());
    let n = past.keys().nrows();
    for (i, mut out) in out.outer_iter_mut().enumerate() {
        let at = n + i;
        let q = head.q.row(i);
        let key = |j: usize| if j < n { past.keys().row(j).to_owned() } else { head.k.row(j - n).to_owned() };
        let value =
            |j: usize| if j < n { past.values().row(j).to_owned() } else { head.v.row(j - n).to_owned() };
        let score = |j: usize| {
            let content = (&q + &head.content).dot(&key(j));
            match at - j < head.relative.nrows() {
                true => content + (&q + &head.position).dot(&head.relative.row(at - j)),
                false => content,
            }
        };
        let sum: f64 = (0..=at).map(|j| score(j).exp()).sum();
        (0..=at).for_each(|j| out.scaled_add(score(j).exp() / sum, &value(j)));
    }
    out
}
