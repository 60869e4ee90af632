//! Grouped queries: fewer heads of keys and values than of queries give what each query head with a copy of its key head gives,
//! and the gradients of a key head are the sums over its copies. In every form, whatever the layout, on any number of threads.

use crate::support::random;
use ndarray::{Array, Array1, Array2, Array3, Array4, Axis, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::attention::{
    AttentionState, BatchBiases, BatchGradients, BatchInputs, BatchOutput, VqAttention,
};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema, Estimator};

const B: usize = 2;
const H: usize = 6;
const S: usize = 7;
const K: usize = 5;
const V: usize = 4;
const COMMIT_WEIGHT: f64 = 0.3;
const ATTENTION: VqAttention =
    VqAttention { block_len: 6, window: 4, cache: true, gradient_through_cache: true };

type States = Array2<AttentionState<f64>>;

/// Everything that attention takes, with so many key heads.
#[derive(Clone)]
struct Batch {
    attention: VqAttention,
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
    biases: Option<(Array2<f64>, Array2<f64>, Array3<f64>)>,
    mask: Array2<bool>,
    codewords: Array3<f64>,
    states: States,
    d_out: Array4<f64>,
}

/// Each slice of an axis so many times in a row.
fn repeat<E: Clone, D: ndarray::RemoveAxis>(array: &Array<E, D>, axis: usize, times: usize) -> Array<E, D> {
    let n = array.len_of(Axis(axis));
    array.select(Axis(axis), &Vec::from_iter((0..n * times).map(|i| i / times)))
}

impl Batch {
    /// `t` tokens after 11 others, with `n_key_heads` heads of keys and values.
    fn new(attention: VqAttention, n_key_heads: usize, t: usize, biased: bool) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64((t + n_key_heads) as u64);
        let codewords = random(rng, (n_key_heads, S, K));
        let relative = random(rng, (n_key_heads, attention.window + 1, K));
        let biases = biased.then(|| (random(rng, (H, K)), random(rng, (H, K)), relative));
        let mut part = |t: usize| {
            let (k, v) = (random(rng, (B, n_key_heads, t, K)), random(rng, (B, n_key_heads, t, V)));
            (random(rng, (B, H, t, K)), k, v)
        };
        let ((q, k, v), mask) = (part(11), Array2::from_elem((B, 11), true));
        let d_out = Array4::zeros((B, H, 11, V));
        let states = Array2::default((0, 0)).mapv(|()| unreachable!());
        let mut batch = Batch { attention, q, k, v, biases, mask, codewords, states, d_out };
        let mut states = attention.new_states(B, &batch.codebook(), V).unwrap();
        attention.push(&batch.inputs(), &batch.codebook(), &mut states).unwrap();
        batch.states = states;
        (batch.q, batch.k, batch.v) = part(t);
        batch.mask = Array2::from_shape_fn((B, t), |(b, t)| (b + 2 * t) % 5 > 1);
        batch.d_out = random(rng, (B, H, t, V));
        batch
    }

    fn group(&self) -> usize {
        H / self.k.len_of(Axis(1))
    }

    fn codebook(&self) -> Codebook<f64> {
        Codebook::ema(Ema::from_codewords(self.codewords.clone(), 0.9).unwrap())
    }

    fn inputs(&self) -> BatchInputs<'_, f64> {
        BatchInputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            biases: self.biases(),
            mask: Some(self.mask.view()),
            starts: None,
            lengths: None,
        }
    }

    fn biases(&self) -> Option<BatchBiases<'_, f64>> {
        let (u, w, r) = self.biases.as_ref()?;
        Some(BatchBiases { content: u.view(), position: w.view(), relative: r.view() })
    }

    /// The same with one copy of its key head for each query head.
    fn repeated(&self) -> Batch {
        let group = self.group();
        Batch {
            k: repeat(&self.k, 1, group),
            v: repeat(&self.v, 1, group),
            biases: self.biases.clone().map(|(u, w, r)| (u, w, repeat(&r, 0, group))),
            codewords: repeat(&self.codewords, 0, group),
            states: repeat(&self.states, 1, group),
            ..self.clone()
        }
    }

    fn run(&self) -> (BatchOutput<f64>, States, BatchGradients<f64>) {
        let (codebook, mut states) = (self.codebook(), self.states.clone());
        let (output, saved) = self.attention.forward(&self.inputs(), &codebook, &mut states).unwrap();
        let (estimator, d_out) = (Estimator::StraightThrough, self.d_out.view());
        let d = self.attention.backward(&self.inputs(), saved, d_out, estimator, COMMIT_WEIGHT).unwrap();
        (output, states, d)
    }
}

/// The sum over the members of every group along an axis.
fn sum_groups<D: ndarray::RemoveAxis>(array: &Array<f64, D>, axis: usize, group: usize) -> Array<f64, D> {
    let n = array.len_of(Axis(axis)) / group;
    let firsts = Vec::from_iter((0..n).map(|i| i * group));
    let mut sum = array.select(Axis(axis), &firsts);
    for member in 1..group {
        sum += &array.select(Axis(axis), &Vec::from_iter(firsts.iter().map(|i| i + member)));
    }
    sum
}

fn batches() -> Vec<Batch> {
    let options = [
        (ATTENTION, true),
        (VqAttention { gradient_through_cache: false, ..ATTENTION }, false),
        (VqAttention { cache: false, ..ATTENTION }, true),
        (VqAttention { window: 0, block_len: 40, ..ATTENTION }, true),
    ];
    let sizes = [(1, 25), (2, 25), (3, 1), (3, 3), (2, 0), (6, 9)];
    let all = options.into_iter().flat_map(|(attention, biased)| {
        sizes.map(|(n_key_heads, t)| Batch::new(attention, n_key_heads, t, biased))
    });
    all.collect()
}

#[test]
fn a_group_is_a_key_head_repeated() {
    for batch in batches() {
        let group = batch.group();
        let (output, states, d) = batch.run();
        let (expected, expected_states, expected_d) = batch.repeated().run();
        assert_eq!((&output.out, &output.lse), (&expected.out, &expected.lse));
        assert_eq!(output.cached_mass, expected.cached_mass);
        assert_eq!(repeat(&output.codes, 1, group), expected.codes);
        assert_eq!(repeat(&states, 1, group), expected_states);
        assert_eq!(repeat(&output.stats.counts().to_owned(), 0, group), expected.stats.counts());
        assert_eq!(repeat(&output.stats.sums().to_owned(), 0, group), expected.stats.sums());
        let loss = expected.commit_loss / group as f64;
        assert!((output.commit_loss - loss).abs() <= 1e-15 * loss);
        assert_eq!(d.q, expected_d.q);
        // The commitment loss reaches a key once, not once per copy: so only what attention gives is compared with the sum.
        let (batch, repeated) = (&batch, &batch.repeated());
        let without_loss = |batch: &Batch| {
            let (mut states, codebook) = (batch.states.clone(), batch.codebook());
            let saved = batch.attention.forward(&batch.inputs(), &codebook, &mut states).unwrap().1;
            let (estimator, d_out) = (Estimator::StraightThrough, batch.d_out.view());
            batch.attention.backward(&batch.inputs(), saved, d_out, estimator, 0.0).unwrap()
        };
        let (attention, copies) = (without_loss(batch), without_loss(repeated));
        let close = |what: &str, error: f64| assert!(error <= 1e-14, "{what}: {error:e}");
        close("k", relative_rms(&attention.k, &sum_groups(&copies.k, 1, group)));
        close("v", relative_rms(&d.v, &sum_groups(&expected_d.v, 1, group)));
        close("c", relative_rms(&d.codewords, &sum_groups(&expected_d.codewords, 0, group)));
        let (of_loss, of_copies) = (&d.k - &attention.k, &expected_d.k - &copies.k);
        let first = sum_groups(&of_copies, 1, group) / group as f64;
        assert!((&of_loss - &first).iter().all(|x| x.abs() < 1e-14));
        if let (Some(d), Some(expected)) = (d.biases, expected_d.biases) {
            assert_eq!((d.content, d.position), (expected.content, expected.position));
            close("r", relative_rms(&d.relative, &sum_groups(&expected.relative, 0, group)));
        }
    }
}

#[test]
fn pieces_and_single_tokens_give_the_whole() {
    for batch in batches() {
        let (whole, whole_states, _) = batch.run();
        let prepared = batch.attention.prepare(&batch.codebook(), batch.biases()).unwrap();
        let t = batch.q.len_of(Axis(2));
        for len in [1, 7, 100] {
            let (mut states, mut prepared_states) = (batch.states.clone(), batch.states.clone());
            for from in (0..t).step_by(len) {
                let tokens = s![.., .., from..t.min(from + len), ..];
                let inputs = batch.inputs();
                let (q, k, v) = (inputs.q.slice(tokens), inputs.k.slice(tokens), inputs.v.slice(tokens));
                let piece = BatchInputs { q, k, v, mask: None, ..inputs.clone() };
                let pushed = batch.attention.push(&piece, &batch.codebook(), &mut states).unwrap();
                let decoded = prepared.push(q, k, v, &mut prepared_states).unwrap();
                for got in [&pushed, &decoded] {
                    assert!(relative_rms(&got.out, &whole.out.slice(tokens)) <= 1e-13);
                    let tokens = s![.., .., from..t.min(from + len)];
                    assert_eq!(got.codes, whole.codes.slice(tokens));
                    assert!(relative_rms(&got.lse, &whole.lse.slice(tokens)) <= 1e-13);
                }
                assert!((pushed.commit_loss - decoded.commit_loss).abs() < 1e-14);
            }
            assert_eq!((&states, &prepared_states), (&whole_states, &whole_states));
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let mut batches = batches();
    let attention = VqAttention { block_len: 100, window: 70, ..ATTENTION };
    batches.push(Batch::new(attention, 2, 1100, true));
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let numbers = batches.iter().map(|batch| {
                let (output, states, d) = batch.run();
                let biases = d.biases.map(|d| (d.content, d.position, d.relative));
                (output.out, output.lse, output.codes, states, (d.q, d.k, d.v, d.codewords, biases))
            });
            Vec::from_iter(numbers)
        })
    };
    let expected = on(1);
    assert!(on(2) == expected && on(5) == expected);
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    let good = Batch::new(ATTENTION, 3, 5, true);
    let refused = |batch: &Batch, what: &str| {
        let mut states = good.states.clone();
        let result = batch.attention.forward(&batch.inputs(), &good.codebook(), &mut states);
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with(&format!("`{what}`")), "{message}");
        assert_eq!(states, good.states);
    };
    let (k, v) = (Array4::zeros((B, 4, 5, K)), Array4::zeros((B, 4, 5, V)));
    refused(&Batch { k, v, ..good.clone() }, "k");
    let (k, v) = (Array4::zeros((B, 0, 5, K)), Array4::zeros((B, 0, 5, V)));
    refused(&Batch { k, v, ..good.clone() }, "k");
    refused(&Batch { v: Array4::zeros((B, 6, 5, V)), ..good.clone() }, "v");
    let (k, v) = (Array4::zeros((B, 2, 5, K)), Array4::zeros((B, 2, 5, V)));
    let relative = Array3::zeros((2, 5, K));
    let biases = good.biases.clone().map(|(u, w, _)| (u, w, relative));
    refused(&Batch { k, v, biases, ..good.clone() }, "k");
    let biases = good.biases.clone().map(|(u, w, r)| (u, w, repeat(&r, 0, 2)));
    refused(&Batch { biases, ..good.clone() }, "biases.relative");
    // Prepared for six query heads, asked with three.
    let prepared = good.attention.prepare(&good.codebook(), good.biases()).unwrap();
    let three = good.q.slice(s![.., ..3, .., ..]);
    let result = prepared.push(three, good.k.view(), good.v.view(), &mut good.states.clone());
    assert!(result.unwrap_err().to_string().starts_with("`q`"));
}

#[test]
fn one_query_head_sees_what_one_head_of_attention_sees() {
    let batch = Batch::new(ATTENTION, 2, 25, false);
    let (output, ..) = batch.run();
    for h in 0..H {
        let of_head = |array: &Array4<f64>, h: usize| array.slice(s![.., h..h + 1, .., ..]).to_owned();
        let key_head = h / batch.group();
        let one = Batch {
            q: of_head(&batch.q, h),
            k: of_head(&batch.k, key_head),
            v: of_head(&batch.v, key_head),
            codewords: batch.codewords.slice(s![key_head..key_head + 1, .., ..]).to_owned(),
            states: batch.states.slice(s![.., key_head..key_head + 1]).to_owned(),
            ..batch.clone()
        };
        let mut states = one.states.clone();
        let (alone, _) = one.attention.forward(&one.inputs(), &one.codebook(), &mut states).unwrap();
        let expected: Array1<f64> = alone.out.iter().copied().collect();
        let got: Array1<f64> = of_head(&output.out, h).iter().copied().collect();
        assert_eq!(got, expected);
    }
}
