//! The encoder written a second time, on the definition of attention, in `f64`.
//!
//! It is also the surrogate that gradients are of: codes are frozen; where keys share the gradient of their codeword, the
//! codeword that queries read moves with the mean of J (k - k0) over its keys, k0 those of the unmoved parameters and J the
//! estimator's; the commitment loss reads the unmoved codewords.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView1, ArrayView2, Axis, s};
use transformer_vq::attention::bidirectional::{Inputs, naive};
use transformer_vq::codebook::{Codebook, Estimator};
use transformer_vq::model::{
    Encoder, EncoderBatch, EncoderConfig, EncoderHead, EncoderParameters, EncoderUnitParameters,
    FeedForwardParameters, NormParameters,
};

pub struct Naive<'a> {
    config: &'a EncoderConfig,
    codebooks: &'a [Codebook<f64>],
    batch: &'a EncoderBatch<'a>,
    /// Of every unit, at the unmoved parameters.
    frozen: Vec<Frozen>,
}

struct Frozen {
    keys: Array4<f64>,
    codes: Array3<u32>,
}

/// What a batch gives.
pub struct Outcome {
    /// [B L, C].
    pub logits: Array2<f64>,
    pub total: f64,
}

impl<'a> Naive<'a> {
    pub fn new(encoder: &'a Encoder<f64>, batch: &'a EncoderBatch<'a>) -> Self {
        let mut naive =
            Naive { config: encoder.config(), codebooks: encoder.codebooks(), batch, frozen: vec![] };
        // Unit by unit, each with those before it frozen.
        for unit in 0..naive.config.n_layers {
            let mut x = naive.embed(encoder.parameters());
            for before in 0..unit {
                x = naive.unit(before, &encoder.parameters().layers[before], x).0;
            }
            let keys = naive.keys(&encoder.parameters().layers[unit], &x);
            let codes = naive.codebooks[unit].assign(keys.view()).unwrap();
            naive.frozen.push(Frozen { keys, codes });
        }
        naive
    }

    pub fn run(&self, p: &EncoderParameters<f64>) -> Outcome {
        let (mut x, mut commit_loss) = (self.embed(p), 0.0);
        for (i, unit) in p.layers.iter().enumerate() {
            let (y, commit) = self.unit(i, unit, x);
            x = y;
            commit_loss += commit;
        }
        let y = normalize(&x, &p.final_norm);
        let (b, t) = self.batch.tokens.dim();
        let features = match self.config.head {
            EncoderHead::MaskedToken => y,
            EncoderHead::Classes { .. } => {
                let mut means = Array2::zeros((b, y.ncols()));
                for (b, mut mean) in means.outer_iter_mut().enumerate() {
                    let at: Vec<usize> = (0..t).filter(|&j| self.exists(b, j)).map(|j| b * t + j).collect();
                    mean.assign(&y.select(Axis(0), &at).mean_axis(Axis(0)).unwrap());
                }
                means
            }
        };
        let logits = features.dot(&p.output) + &p.output_bias;
        let per_sequence = self.batch.targets.ncols();
        let (mut sum, mut n) = (0.0, 0.0);
        for ((b, l), &target) in self.batch.targets.indexed_iter() {
            let counts = match self.batch.counted {
                Some(counted) => counted[[b, l]],
                None => self.config.head != EncoderHead::MaskedToken || self.exists(b, l),
            };
            if counts {
                let row = logits.row(b * per_sequence + l);
                sum += row.mapv(f64::exp).sum().ln() - row[target as usize];
                n += 1.0;
            }
        }
        let loss = if n == 0.0 { 0.0 } else { sum / n };
        Outcome { logits, total: loss + self.config.commit_weight * commit_loss }
    }

    fn exists(&self, b: usize, t: usize) -> bool {
        self.batch.exists.is_none_or(|exists| exists[[b, t]])
    }

    fn embed(&self, p: &EncoderParameters<f64>) -> Array2<f64> {
        let ((b, t), d) = (self.batch.tokens.dim(), self.config.d_model);
        Array2::from_shape_fn((b * t, d), |(row, i)| {
            let (b, t) = (row / t, row % t);
            let token = if self.exists(b, t) { self.batch.tokens[[b, t]] as usize } else { 0 };
            let wavelength = self.config.position_lambda.powf((2 * (i % (d / 2))) as f64 / d as f64);
            let angle = t as f64 / wavelength;
            let sinusoid = if i < d / 2 { angle.sin() } else { angle.cos() };
            p.embedding[[token, i]] + p.position_scale[0] * sinusoid
        })
    }

    /// [B T, H K] as [B, H, T, K], every row of every head normalised.
    fn heads(&self, x: Array2<f64>, n_heads: usize) -> Array4<f64> {
        let scale = (self.config.d_k as f64).powf(-0.25);
        let mut x = self.split(x, n_heads);
        for mut row in x.rows_mut() {
            let rms = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + 1e-6;
            row.mapv_inplace(|x| scale * x / rms.sqrt());
        }
        x
    }

    fn split(&self, x: Array2<f64>, n_heads: usize) -> Array4<f64> {
        let (b, t) = self.batch.tokens.dim();
        let width = x.ncols() / n_heads;
        Array4::from_shape_fn((b, n_heads, t, width), |(b, h, j, i)| x[[b * t + j, h * width + i]])
    }

    fn keys(&self, p: &EncoderUnitParameters<f64>, x: &Array2<f64>) -> Array4<f64> {
        self.heads(normalize(x, &p.norm).dot(&p.w_k), self.config.key_heads())
    }

    /// The unit's output and its commitment loss.
    fn unit(&self, i: usize, p: &EncoderUnitParameters<f64>, x: Array2<f64>) -> (Array2<f64>, f64) {
        let ((b, t), config) = (self.batch.tokens.dim(), self.config);
        let (key_heads, group) = (config.key_heads(), config.n_heads / config.key_heads());
        let x_norm = normalize(&x, &p.norm);
        let (q, k) = (self.heads(x_norm.dot(&p.w_q), config.n_heads), self.keys(p, &x));
        let v = x_norm.dot(&p.w_v);
        let v = self.split(if config.gate { v.mapv(silu) } else { v }, key_heads);
        let (codewords, codes) = (self.codebooks[i].codewords(), &self.frozen[i].codes);
        let (mut squares, mut counted) = (0.0, 0.0);
        for (b, j) in ndarray::indices((b, t)).into_iter().filter(|&(b, j)| self.exists(b, j)) {
            counted += 1.0;
            for h in 0..key_heads {
                let codeword = codewords.slice(s![h, codes[[b, h, j]] as usize, ..]);
                squares += (&k.slice(s![b, h, j, ..]) - &codeword).mapv(|e| e * e).sum();
            }
        }
        let mut out = Array2::zeros((b * t, config.n_heads * config.d_v));
        for (b, head) in ndarray::indices((b, config.n_heads)) {
            let h = head / group;
            let read = self.read(i, (b, h), &k, codewords.index_axis(Axis(0), h));
            let exists: Array1<bool> = (0..t).map(|j| self.exists(b, j)).collect();
            let inputs = Inputs {
                q: q.slice(s![b, head, .., ..]),
                codes: codes.slice(s![b, h, ..]),
                v: v.slice(s![b, h, .., ..]),
                codewords: read.view(),
                key_mask: Some(exists.view()),
            };
            let columns = head * config.d_v..(head + 1) * config.d_v;
            out.slice_mut(s![b * t..(b + 1) * t, columns]).assign(&naive::forward(&inputs).unwrap().out);
        }
        if let Some(w_gate) = &p.w_gate {
            out *= &x_norm.dot(w_gate).mapv(silu);
        }
        let mut y = x + out.dot(&p.w_out);
        if let Some(FeedForwardParameters { norm, w_in, w_gate, w_out }) = &p.feed_forward {
            let y_norm = normalize(&y, norm);
            let inner = match w_gate {
                Some(w_gate) => y_norm.dot(w_in) * y_norm.dot(w_gate).mapv(silu),
                None => y_norm.dot(w_in).mapv(gelu),
            };
            y += &inner.dot(w_out);
        }
        (y, squares / counted)
    }

    /// The codewords as the queries of sequence b read them.
    fn read(
        &self,
        i: usize,
        (b, h): (usize, usize),
        k: &Array4<f64>,
        codewords: ArrayView2<'_, f64>,
    ) -> Array2<f64> {
        let mut read = codewords.to_owned();
        if !self.config.attention.key_gradient {
            return read;
        }
        let Some(Frozen { keys, codes }) = self.frozen.get(i) else { return read };
        for (code, mut codeword) in read.outer_iter_mut().enumerate() {
            let is_here = |&j: &usize| self.exists(b, j) && codes[[b, h, j]] as usize == code;
            let here: Vec<usize> = (0..codes.dim().2).filter(is_here).collect();
            for &j in &here {
                let at = keys.slice(s![b, h, j, ..]);
                let moved = &k.slice(s![b, h, j, ..]) - &at;
                let moved = self.through(moved, at, codewords.row(code));
                codeword.scaled_add(1.0 / here.len() as f64, &moved);
            }
        }
        read
    }

    /// J of the estimator.
    fn through(
        &self,
        moved: Array1<f64>,
        key: ArrayView1<'_, f64>,
        codeword: ArrayView1<'_, f64>,
    ) -> Array1<f64> {
        match self.config.estimator {
            Estimator::StraightThrough => moved,
            Estimator::Directional => {
                let between = &codeword - &key;
                let along = between.dot(&moved) / between.dot(&between);
                moved - between * along
            }
            Estimator::Rotation(_) => {
                // The paper's variant, as a dense matrix: lambda (I - 2 r r^T + 2 c~ u^T), r = (u + c~) / |u + c~|.
                let length = |x: &Array1<f64>| x.dot(x).sqrt();
                let (key, codeword) = (key.to_owned(), codeword.to_owned());
                let (u, c) = (&key / length(&key), &codeword / length(&codeword));
                let r = &u + &c;
                let turned = &moved - &(&r * (2.0 * r.dot(&moved) / r.dot(&r))) + &c * (2.0 * u.dot(&moved));
                turned * (length(&codeword) / length(&key))
            }
            Estimator::None => moved * 0.0,
            other => panic!("no definition of {other:?} here"),
        }
    }
}

fn normalize(x: &Array2<f64>, NormParameters { gain, bias }: &NormParameters<f64>) -> Array2<f64> {
    let mut y = x.clone();
    for mut row in y.outer_iter_mut() {
        let rms = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + 1e-6;
        row /= rms.sqrt();
    }
    y * gain + bias
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}
