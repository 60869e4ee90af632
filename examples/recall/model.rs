//! The model of every competitor: two units of attention, of which only the second one differs.
//!
//! ```text
//! (1)  x = E[tokens]
//! (2)  x <- x + attention(q, k, v) Wo      twice; x~ = RMSNorm(x),  q, k = scale RMSNorm(x~ Wq), scale RMSNorm(x~ Wk),  v = x~ Wv
//! (3)  logits = RMSNorm(x) W
//! ```
//!
//! The first unit sees a window, with a learned bias per distance: there a key can meet the value before it. The second unit
//! has no biases: there a question can find its key. Its queries and keys share one projection, Wq = Wk: equal tokens are near each
//! other from the beginning, and keys, to which no gradient comes through the cache, learn with the queries.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::attention::VqAttention;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, start};
use transformer_vq::ndarray::{Array1, Array2, Array3, ArrayView2, ArrayViewD, ArrayViewMutD};
use transformer_vq::ops::{cross_entropy, embedding, linear, rms_norm};

use crate::adam::Adam;
use crate::attention::{Attention, Inputs, Quantized, one_head};
use crate::task::{Batch, N_VALUES};

/// D, and the width of values.
pub const WIDTH: usize = 64;
/// Width of a key, unless a competitor has another.
pub const D_K: usize = 64;
/// M of the first unit.
pub const BINDING_WINDOW: usize = 8;
/// Codes of the first unit, in which distance alone matters.
const BINDING_CODES: usize = 16;
/// What a codebook keeps of its past at each step.
const DECAY: f64 = 0.95;
/// Steps between two looks for idle codes, and what counts as idle.
const REVIVE: (u64, f64) = (5, 0.1);

/// The second unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Vq { n_codes: usize, cache: bool },
    Quadratic,
    Linear { d_k: usize },
}

/// Learned arrays, their gradients.
struct Parameters {
    embedding: Array2<f32>,
    units: [Unit; 2],
    output: Array2<f32>,
}

struct Unit {
    w_q: Array2<f32>,
    w_k: Array2<f32>,
    w_v: Array2<f32>,
    w_out: Array2<f32>,
    /// [1, M+1, K]
    relative: Option<Array3<f32>>,
}

pub struct Model {
    parameters: Parameters,
    attention: [Attention; 2],
    adam: Adam,
    steps: u64,
}

/// What a step or an evaluation saw.
pub struct Report {
    pub loss: f64,
    /// Of the questions, in [0, 1].
    pub accuracy: f64,
    /// Of the second unit, if it has a codebook.
    pub quantized: Option<Quantized>,
}

impl Model {
    /// A model that has seen one batch, from whose keys its codebooks begin.
    pub fn new(
        kind: Kind,
        attention: VqAttention,
        first: &Batch,
        vocab_size: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let d_k = if let Kind::Linear { d_k } = kind { d_k } else { D_K };
        let mut units = [Unit::random(D_K, true, &mut rng), Unit::random(d_k, false, &mut rng)];
        units[1].w_q.assign(&units[1].w_k.clone());
        let parameters = Parameters {
            embedding: normal((vocab_size, WIDTH), 1.0, &mut rng),
            units,
            output: Array2::zeros((WIDTH, N_VALUES)),
        };
        let binding = VqAttention { window: BINDING_WINDOW, cache: false, ..attention };
        let empty = |attention: VqAttention, n_codes: usize| {
            let codewords = start::random(1, n_codes, D_K, 1.0, seed)?;
            Ok::<_, Error>(Attention::Vq(attention, Codebook::ema(Ema::from_codewords(codewords, DECAY)?)))
        };
        let second = match kind {
            Kind::Vq { n_codes, cache } => empty(VqAttention { cache, ..attention }, n_codes)?,
            Kind::Quadratic => Attention::Quadratic,
            Kind::Linear { .. } => Attention::Linear,
        };
        let attention = [empty(binding, BINDING_CODES)?, second];
        let mut model = Model { parameters, attention, adam: Adam::default(), steps: 0 };
        model.start_codebooks(first, seed)?;
        Ok(model)
    }

    /// Bytes of what the second unit carries from token to token, for one sequence.
    pub fn state_bytes(&self) -> Result<Option<usize>, Error> {
        match &self.attention[1] {
            Attention::Vq(attention, codebook) => {
                Ok(Some(attention.new_states(1, codebook, WIDTH)?[[0, 0]].size_in_bytes()))
            }
            Attention::Quadratic => Ok(None),
            Attention::Linear => Ok(Some(linear_bytes(self.parameters.units[1].w_k.ncols()))),
        }
    }

    /// Learns from a batch.
    pub fn step(&mut self, batch: &Batch, rate: f32) -> Result<Report, Error> {
        let mut d = self.parameters.zeros();
        let (report, learned) = self.pass(batch, Some(&mut d))?;
        self.steps += 1;
        for (attention, learned) in self.attention.iter_mut().zip(&learned) {
            if let (Attention::Vq(_, codebook), Some((stats, keys))) = (attention, learned) {
                codebook.update(stats)?;
                if self.steps.is_multiple_of(REVIVE.0) {
                    let keys = one_head(keys.view(), batch.tokens.nrows());
                    codebook.revive(keys, None, REVIVE.1, self.steps)?;
                }
            }
        }
        self.adam.step(rate, self.parameters.views_mut().into_iter().zip(d.views()));
        Ok(report)
    }

    /// How a batch is answered.
    pub fn judge(&self, batch: &Batch) -> Result<Report, Error> {
        Ok(self.pass(batch, None)?.0)
    }

    /// Forward, and, with somewhere to add gradients, backward; with what codebooks learn from.
    #[allow(clippy::type_complexity)]
    fn pass(
        &self,
        batch: &Batch,
        d: Option<&mut Parameters>,
    ) -> Result<(Report, [Option<(CodeStats<f32>, Array2<f32>)>; 2]), Error> {
        let Parameters { embedding: table, units, output } = &self.parameters;
        let (n_sequences, tokens) = (batch.tokens.nrows(), Array1::from_iter(batch.tokens.iter().copied()));
        let mut x = embedding::forward(table.view(), tokens.view())?; // (1)
        let (mut saved, mut learned, mut last) = (vec![], [None, None], None);
        for (i, (unit, attention)) in units.iter().zip(&self.attention).enumerate() {
            let active = unit.activate(x.view(), attention)?; // (2)
            let (out, of_attention, quantized) = attention.forward(&active.inputs(unit, n_sequences))?;
            x = x + linear::forward(out.view(), unit.w_out.view(), None)?;
            if let Some(quantized) = &quantized {
                learned[i] = Some((quantized.stats.clone(), active.k.clone()));
            }
            last = quantized;
            saved.push((active, out, of_attention));
        }
        let (normed, norm) = rms_norm::forward(x.view(), 1, 1.0)?; // (3)
        let logits = linear::forward(normed.view(), output.view(), None)?;
        let accuracy = accuracy(&logits, batch);
        let asked = Some(batch.asked.view());
        let (loss, d_logits) = cross_entropy::forward_backward(logits.view(), batch.answers.view(), asked)?;
        let report = Report { loss, accuracy, quantized: last };
        let Some(d) = d else { return Ok((report, learned)) };

        // (3)
        let d_output = d.output.view_mut();
        let d_normed = linear::backward(normed.view(), output.view(), d_logits.view(), d_output, None)?;
        let mut d_x = rms_norm::backward(x.view(), &norm, 1, 1.0, d_normed.view())?;
        // (2)
        let of_units = units.iter().zip(&self.attention).zip(&mut d.units).zip(saved).rev();
        for (((unit, attention), d), (active, out, saved)) in of_units {
            let (w, d_w) = (unit.w_out.view(), d.w_out.view_mut());
            let d_out = linear::backward(out.view(), w, d_x.view(), d_w, None)?;
            let d_attention = attention.backward(&active.inputs(unit, n_sequences), saved, d_out.view())?;
            if let (Some(d), Some(d_relative)) = (&mut d.relative, d_attention.relative) {
                *d += &d_relative;
            }
            let scale = active.scale;
            let d_q =
                rms_norm::backward(active.q_raw.view(), &active.q_norm, 1, scale, d_attention.q.view())?;
            let d_k =
                rms_norm::backward(active.k_raw.view(), &active.k_norm, 1, scale, d_attention.k.view())?;
            let mut d_x_norm = Array2::zeros(d_x.raw_dim());
            for (w, d_w, d_y) in [
                (&unit.w_q, &mut d.w_q, &d_q),
                (&unit.w_k, &mut d.w_k, &d_k),
                (&unit.w_v, &mut d.w_v, &d_attention.v),
            ] {
                let x = active.x_norm.view();
                linear::add_backward(x, w.view(), d_y.view(), d_w.view_mut(), None, d_x_norm.view_mut())?;
            }
            d_x += &rms_norm::backward(active.x.view(), &active.norm, 1, 1.0, d_x_norm.view())?;
        }
        // One projection in two arrays: both get the gradient of both.
        let Unit { w_q, w_k, .. } = &mut d.units[1];
        *w_q += &*w_k;
        w_k.assign(w_q);
        // (1)
        embedding::backward(tokens.view(), d_x.view(), d.embedding.view_mut())?;
        Ok((report, learned))
    }

    /// k-means on the keys of a batch, unit by unit.
    fn start_codebooks(&mut self, batch: &Batch, seed: u64) -> Result<(), Error> {
        let (n, tokens) = (batch.tokens.nrows(), Array1::from_iter(batch.tokens.iter().copied()));
        let mut x = embedding::forward(self.parameters.embedding.view(), tokens.view())?;
        for (unit, attention) in self.parameters.units.iter().zip(&mut self.attention) {
            let active = unit.activate(x.view(), attention)?;
            if let Attention::Vq(_, codebook) = attention {
                let keys = one_head(active.k.view(), n);
                let codewords = start::k_means(keys, codebook.n_codes(), None, 10, seed)?;
                *codebook = Codebook::ema(Ema::from_codewords(codewords, DECAY)?);
            }
            let (out, ..) = attention.forward(&active.inputs(unit, n))?;
            x = x + linear::forward(out.view(), unit.w_out.view(), None)?;
        }
        Ok(())
    }
}

/// Bytes of the state of linear attention.
pub fn linear_bytes(d_k: usize) -> usize {
    d_k * (WIDTH + 1) * size_of::<f32>()
}

/// The share of questions whose most probable answer is right.
fn accuracy(logits: &Array2<f32>, batch: &Batch) -> f64 {
    let (mut asked, mut right) = (0, 0);
    for (i, row) in logits.outer_iter().enumerate().filter(|&(i, _)| batch.asked[i]) {
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(answer, _)| answer as u32);
        asked += 1;
        right += usize::from(best == Some(batch.answers[i]));
    }
    right as f64 / asked as f64
}

/// The inside of a unit before attention.
struct Active {
    x: Array2<f32>,
    x_norm: Array2<f32>,
    norm: rms_norm::Saved<f32>,
    scale: f32,
    q_raw: Array2<f32>,
    q_norm: rms_norm::Saved<f32>,
    q: Array2<f32>,
    k_raw: Array2<f32>,
    k_norm: rms_norm::Saved<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
}

impl Active {
    fn inputs<'a>(&'a self, unit: &'a Unit, batch: usize) -> Inputs<'a> {
        let relative = unit.relative.as_ref().map(|relative| relative.view());
        Inputs { batch, q: self.q.view(), k: self.k.view(), v: self.v.view(), relative }
    }
}

impl Unit {
    fn random(d_k: usize, biased: bool, rng: &mut ChaCha8Rng) -> Self {
        let deviation = (WIDTH as f64).sqrt().recip();
        Unit {
            w_q: normal((WIDTH, d_k), deviation, rng),
            w_k: normal((WIDTH, d_k), deviation, rng),
            w_v: normal((WIDTH, WIDTH), deviation, rng),
            w_out: normal((WIDTH, WIDTH), deviation, rng),
            relative: biased.then(|| Array3::zeros((1, BINDING_WINDOW + 1, d_k))),
        }
    }

    /// (2) before attention. The scale of the paper, but for linear attention, whose features want numbers around 1.
    fn activate(&self, x: ArrayView2<'_, f32>, attention: &Attention) -> Result<Active, Error> {
        let (x_norm, norm) = rms_norm::forward(x, 1, 1.0)?;
        let scale = match attention {
            Attention::Linear => 1.0,
            _ => (D_K as f32).powf(-0.25),
        };
        let q_raw = linear::forward(x_norm.view(), self.w_q.view(), None)?;
        let k_raw = linear::forward(x_norm.view(), self.w_k.view(), None)?;
        let v = linear::forward(x_norm.view(), self.w_v.view(), None)?;
        let (q, q_norm) = rms_norm::forward(q_raw.view(), 1, scale)?;
        let (k, k_norm) = rms_norm::forward(k_raw.view(), 1, scale)?;
        Ok(Active { x: x.to_owned(), x_norm, norm, scale, q_raw, q_norm, q, k_raw, k_norm, k, v })
    }
}

impl Parameters {
    fn zeros(&self) -> Self {
        let unit = |unit: &Unit| Unit {
            w_q: Array2::zeros(unit.w_q.raw_dim()),
            w_k: Array2::zeros(unit.w_k.raw_dim()),
            w_v: Array2::zeros(unit.w_v.raw_dim()),
            w_out: Array2::zeros(unit.w_out.raw_dim()),
            relative: unit.relative.as_ref().map(|relative| Array3::zeros(relative.raw_dim())),
        };
        Parameters {
            embedding: Array2::zeros(self.embedding.raw_dim()),
            units: [unit(&self.units[0]), unit(&self.units[1])],
            output: Array2::zeros(self.output.raw_dim()),
        }
    }

    fn views(&self) -> Vec<ArrayViewD<'_, f32>> {
        let mut all = vec![self.embedding.view().into_dyn(), self.output.view().into_dyn()];
        for Unit { w_q, w_k, w_v, w_out, relative } in &self.units {
            all.extend([w_q, w_k, w_v, w_out].map(|w| w.view().into_dyn()));
            all.extend(relative.as_ref().map(|relative| relative.view().into_dyn()));
        }
        all
    }

    /// In the order of [`views`](Self::views).
    fn views_mut(&mut self) -> Vec<ArrayViewMutD<'_, f32>> {
        let mut all = vec![self.embedding.view_mut().into_dyn(), self.output.view_mut().into_dyn()];
        for Unit { w_q, w_k, w_v, w_out, relative } in &mut self.units {
            all.extend([w_q, w_k, w_v, w_out].map(|w| w.view_mut().into_dyn()));
            all.extend(relative.as_mut().map(|relative| relative.view_mut().into_dyn()));
        }
        all
    }
}

/// Numbers from N(0, deviation^2) (Box and Muller).
fn normal((rows, columns): (usize, usize), deviation: f64, rng: &mut ChaCha8Rng) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, columns), || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        (deviation * (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    })
}
