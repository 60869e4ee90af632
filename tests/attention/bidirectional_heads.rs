//! Bidirectional attention over batch x heads: the functions of one head and of the codebook, called one by one, give the same
//! numbers; memory layouts and numbers of threads change no bit.

use crate::support::random;
use ndarray::{Array2, Array3, Array4, ArrayView4, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::{
    BidirectionalAttention, BidirectionalGradients, BidirectionalInputs, BidirectionalOutput, bidirectional,
};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, Estimator, Rotation, commitment};

const B: usize = 3;
const H: usize = 2;
const S: usize = 7;
const K: usize = 5;
const V: usize = 4;
const COMMIT_WEIGHT: f64 = 0.3;

struct Batch<T> {
    attention: BidirectionalAttention,
    estimator: Estimator,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    mask: Option<Array2<bool>>,
    codebook: Codebook<T>,
    d_out: Array4<T>,
}

impl<T: Scalar> Batch<T> {
    /// `group` query heads for each key head.
    fn new((t, keys, group): (usize, usize, usize), key_gradient: bool, masked: bool) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64((t * 100 + keys) as u64);
        Batch {
            attention: BidirectionalAttention { key_gradient },
            estimator: Estimator::StraightThrough,
            q: random(rng, (B, group * H, t, K)),
            k: random(rng, (B, H, keys, K)),
            v: random(rng, (B, H, keys, V)),
            // The last sequence has no key.
            mask: masked.then(|| Array2::from_shape_fn((B, keys), |(b, j)| b < 2 && (b + 2 * j) % 5 > 1)),
            codebook: Codebook::ema(Ema::from_codewords(random(rng, (H, S, K)), 0.9).unwrap()),
            d_out: random(rng, (B, group * H, t, V)),
        }
    }

    fn inputs(&self) -> BidirectionalInputs<'_, T> {
        BidirectionalInputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            key_mask: self.mask.as_ref().map(|mask| mask.view()),
        }
    }

    fn run(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        d_out: ArrayView4<'_, T>,
    ) -> (BidirectionalOutput<T>, BidirectionalGradients<T>) {
        let (output, saved) = self.attention.forward(inputs, &self.codebook).unwrap();
        let gradients = self.attention.backward(inputs, saved, d_out, self.estimator, COMMIT_WEIGHT).unwrap();
        (output, gradients)
    }

    /// The bits of all that forward and backward return.
    fn bits(
        &self,
        inputs: &BidirectionalInputs<'_, T>,
        d_out: ArrayView4<'_, T>,
    ) -> (Vec<u64>, CodeStats<T>) {
        let (output, gradients) = self.run(inputs, d_out);
        let mut bits: Vec<u64> = vec![output.commit_loss.to_bits()];
        for array in [&output.out, &gradients.q, &gradients.k, &gradients.v] {
            bits.extend(array.iter().map(|x| x.as_f64().to_bits()));
        }
        for array in [&output.lse, &gradients.codewords] {
            bits.extend(array.iter().map(|x| x.as_f64().to_bits()));
        }
        bits.extend(output.codes.iter().map(|&code| u64::from(code)));
        (bits, output.stats)
    }
}

fn batches<T: Scalar>() -> Vec<Batch<T>> {
    let mut all = vec![];
    for sizes in [(0, 4, 1), (1, 0, 1), (3, 1, 2), (70, 25, 1), (9, 130, 3), (9, 1100, 2)] {
        for (key_gradient, masked) in [(false, false), (true, false), (false, true), (true, true)] {
            all.push(Batch::new(sizes, key_gradient, masked));
        }
    }
    all
}

#[test]
fn heads_are_the_functions_of_one_head_called_one_by_one() {
    for batch in batches::<f64>() {
        let (output, gradients) = batch.run(&batch.inputs(), batch.d_out.view());
        let (keys, codewords) = (batch.k.view(), batch.codebook.codewords());
        let codes = batch.codebook.assign(keys).unwrap();
        assert_eq!(output.codes, codes);
        let mask = batch.mask.as_ref().map(|mask| mask.view());
        assert_eq!(output.stats, CodeStats::collect(keys, codes.view(), S, mask).unwrap());
        let loss = commitment::loss(keys, codes.view(), codewords.view(), mask).unwrap();
        assert!((output.commit_loss - loss).abs() <= 1e-15 * loss, "{} {loss}", output.commit_loss);
        let mut d_k =
            commitment::backward(keys, codes.view(), codewords.view(), mask, COMMIT_WEIGHT).unwrap();
        let mut d_v = Array4::<f64>::zeros(batch.v.raw_dim());
        let mut d_codewords = Array3::<f64>::zeros(codewords.raw_dim());
        let group = batch.q.dim().1 / H;
        for (b, head) in ndarray::indices((B, group * H)) {
            let h = head / group;
            let inputs = bidirectional::Inputs {
                q: batch.q.slice(s![b, head, .., ..]),
                codes: codes.slice(s![b, h, ..]),
                v: batch.v.slice(s![b, h, .., ..]),
                codewords: codewords.slice(s![h, .., ..]),
                key_mask: mask.as_ref().map(|mask| mask.row(b)),
            };
            let (one, saved) = bidirectional::forward(&inputs).unwrap();
            assert_eq!(output.out.slice(s![b, head, .., ..]), one.out);
            assert_eq!(output.lse.slice(s![b, head, ..]), one.lse);
            let d_out = batch.d_out.slice(s![b, head, .., ..]);
            let d = bidirectional::backward(&inputs, saved, d_out).unwrap();
            assert_eq!(gradients.q.slice(s![b, head, .., ..]), d.q);
            let (mut d_v, mut d_k) = (d_v.slice_mut(s![b, h, .., ..]), d_k.slice_mut(s![b, h, .., ..]));
            d_v += &d.v;
            let mut sum = d_codewords.slice_mut(s![h, .., ..]);
            sum += &d.codewords;
            if batch.attention.key_gradient {
                d_k +=
                    &bidirectional::key_gradient(inputs.codes, inputs.key_mask, d.codewords.view()).unwrap();
            }
        }
        let bound = if group == 1 { 1e-15 } else { 1e-14 };
        assert!(relative_rms(&gradients.k, &d_k) < bound);
        assert!(relative_rms(&gradients.v, &d_v) < bound);
        // Where keys have the gradient, codewords get it through them.
        assert!(relative_rms(&gradients.codewords, &d_codewords) < 1e-14);
    }
}

#[test]
fn keys_pass_what_they_share_through_the_estimator() {
    let rotation = Estimator::Rotation(Rotation::default());
    let all = [rotation, Estimator::Directional, Estimator::None];
    // Keys of one task, and of two (of 1024).
    for (estimator, masked, keys) in
        all.into_iter().flat_map(|e| [(e, false, 30), (e, true, 30), (e, true, 1100)])
    {
        let plain = Batch::<f64>::new((20, keys, 1), true, masked);
        let (keys, codewords) = (plain.k.view(), plain.codebook.codewords());
        let shared = |batch: &Batch<f64>| {
            let (_, saved) = batch.attention.forward(&batch.inputs(), &batch.codebook).unwrap();
            let (inputs, d_out) = (batch.inputs(), batch.d_out.view());
            batch.attention.backward(&inputs, saved, d_out, batch.estimator, 0.0).unwrap()
        };
        let quantized = shared(&plain).k; // straight through
        let codes = plain.codebook.assign(keys).unwrap();
        let (codes, codewords) = (codes.view(), codewords.view());
        let d_k = estimator.key_gradient(keys, codes, codewords, quantized.clone()).unwrap();
        let d_c = estimator.codeword_gradient(keys, codes, codewords, quantized.view()).unwrap();
        let got = shared(&Batch { estimator, ..plain });
        assert!(relative_rms(&got.k, &d_k) < 1e-14, "{estimator:?}");
        assert!(relative_rms(&got.codewords, &d_c) < 1e-14, "{estimator:?}");
    }
}

#[test]
fn keys_that_do_not_exist_take_no_part() {
    for key_gradient in [false, true] {
        let batch = Batch::<f64>::new((20, 30, 2), key_gradient, true);
        let mask = batch.mask.as_ref().unwrap();
        let (output, gradients) = batch.run(&batch.inputs(), batch.d_out.view());
        assert_eq!(output.stats.counts().sum(), (H * mask.iter().filter(|&&m| m).count()) as u64);
        for ((b, j), _) in mask.indexed_iter().filter(|&(_, &exists)| !exists) {
            for array in [&gradients.k, &gradients.v] {
                assert!(array.slice(s![b, .., j, ..]).iter().all(|&d| d == 0.0));
            }
        }
        // The last sequence has none.
        assert!(output.out.slice(s![2, .., .., ..]).iter().all(|&o| o == 0.0));
        assert!(output.lse.slice(s![2, .., ..]).iter().all(|&lse| lse == f64::NEG_INFINITY));
        assert!(gradients.q.slice(s![2, .., .., ..]).iter().all(|&d| d == 0.0));
        // A shorter sequence is a padded one.
        let mut padded = Batch::<f64>::new((20, 30, 2), key_gradient, false);
        padded.mask = Some(Array2::from_shape_fn((B, 30), |(_, j)| j < 19));
        let mut short = Batch::<f64>::new((20, 30, 2), key_gradient, false);
        (short.k, short.v) =
            (short.k.slice(s![.., .., ..19, ..]).to_owned(), short.v.slice(s![.., .., ..19, ..]).to_owned());
        let (a, d_a) = padded.run(&padded.inputs(), padded.d_out.view());
        let (b, d_b) = short.run(&short.inputs(), short.d_out.view());
        assert_eq!((&a.out, &a.lse, a.commit_loss, &a.stats), (&b.out, &b.lse, b.commit_loss, &b.stats));
        assert_eq!((&d_a.q, &d_a.codewords), (&d_b.q, &d_b.codewords));
        assert_eq!(d_a.k.slice(s![.., .., ..19, ..]), d_b.k);
        assert_eq!(d_a.v.slice(s![.., .., ..19, ..]), d_b.v);
    }
}

/// A copy with the axes of memory in the order [B, T, H, width].
fn token_major<T: Scalar>(array: &Array4<T>) -> Array4<T> {
    let array = array.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    array.permuted_axes([0, 2, 1, 3])
}

#[test]
fn layouts_change_no_bit() {
    for batch in batches::<f32>() {
        let expected = batch.bits(&batch.inputs(), batch.d_out.view());
        let [q, k, v, d_out] = [&batch.q, &batch.k, &batch.v, &batch.d_out].map(token_major);
        let inputs =
            BidirectionalInputs { q: q.view(), k: k.view(), v: v.view(), key_mask: batch.inputs().key_mask };
        assert!(batch.bits(&inputs, d_out.view()) == expected);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut batches = batches::<f32>();
            batches.push(Batch::new((1100, 1300, 1), true, true));
            Vec::from_iter(batches.iter().map(|batch| batch.bits(&batch.inputs(), batch.d_out.view())))
        })
    };
    let expected = on(1);
    assert!(on(2) == expected);
    assert!(on(8) == expected);
}

#[test]
fn arrays_that_the_caller_keeps_may_hold_anything() {
    let (mut output, mut gradients) = (BidirectionalOutput::default(), BidirectionalGradients::default());
    for batch in batches::<f64>() {
        let (expected, expected_d) = batch.run(&batch.inputs(), batch.d_out.view());
        // First arrays of the last batch's shapes, then of this one's, full of NaN.
        for _ in 0..2 {
            let inputs = batch.inputs();
            let saved = batch.attention.forward_into(&inputs, &batch.codebook, &mut output).unwrap();
            let (estimator, d_out) = (batch.estimator, batch.d_out.view());
            batch
                .attention
                .backward_into(&inputs, saved, d_out, estimator, COMMIT_WEIGHT, &mut gradients)
                .unwrap();
            assert_eq!((&output.out, &output.codes), (&expected.out, &expected.codes));
            assert_eq!((&output.lse, &output.stats), (&expected.lse, &expected.stats));
            assert_eq!(output.commit_loss, expected.commit_loss);
            assert_eq!((&gradients.q, &gradients.k), (&expected_d.q, &expected_d.k));
            assert_eq!((&gradients.v, &gradients.codewords), (&expected_d.v, &expected_d.codewords));
            for array in [&mut output.out, &mut gradients.q, &mut gradients.k, &mut gradients.v] {
                assert!(array.view().permuted_axes([0, 2, 1, 3]).is_standard_layout());
                array.fill(f64::NAN);
            }
            output.lse.fill(f64::NAN);
            output.codes.fill(u32::MAX);
            output.commit_loss = f64::NAN;
            gradients.codewords.fill(f64::NAN);
        }
    }
}
