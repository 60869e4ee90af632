//! Attention over batch x heads: the functions of one head and of the codebook, called one by one, give the same numbers;
//! memory layouts and numbers of threads change no bit.

use crate::support::random;
use ndarray::{Array1, Array2, Array3, Array4, ArrayView4, ArrayViewD, Axis, ShapeBuilder, concatenate, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::Scalar;
use transformer_vq::attention::{
    AttentionState, BatchBiasGradients, BatchBiases, BatchGradients, BatchInputs, BatchOutput, Biases,
    Inputs, VqAttention, blockwise,
};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, Estimator, commitment};

const B: usize = 3;
const H: usize = 2;
const S: usize = 7;
const K: usize = 5;
const V: usize = 4;
const COMMIT_WEIGHT: f64 = 0.3;

type States<T> = Array2<AttentionState<T>>;

/// Everything that attention over batch x heads takes; contiguous.
struct Batch<T> {
    attention: VqAttention,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    biases: Option<(Array2<T>, Array2<T>, Array3<T>)>,
    mask: Option<Array2<bool>>,
    codebook: Codebook<T>,
    states: States<T>,
    d_out: Array4<T>,
}

impl<T: Scalar> Batch<T> {
    /// `t` tokens after 11 others.
    fn new(attention: VqAttention, t: usize, biased: bool, masked: bool) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(t as u64);
        let codebook = Codebook::ema(Ema::from_codewords(random(rng, (H, S, K)), 0.9).unwrap());
        let biases = biased
            .then(|| (random(rng, (H, K)), random(rng, (H, K)), random(rng, (H, attention.window + 1, K))));
        let states = attention.new_states(B, &codebook, V).unwrap();
        let mut part =
            |t: usize| [random(rng, (B, H, t, K)), random(rng, (B, H, t, K)), random(rng, (B, H, t, V))];
        let [q, k, v] = part(11);
        let d_out = Array4::zeros((0, 0, 0, 0));
        let mut batch = Batch { attention, q, k, v, biases, mask: None, codebook, states, d_out };
        let mut states = batch.states.clone();
        attention.push(&batch.inputs(), &batch.codebook, &mut states).unwrap();
        [batch.q, batch.k, batch.v] = part(t);
        batch.states = states;
        batch.mask = masked.then(|| Array2::from_shape_fn((B, t), |(b, t)| (b + 2 * t) % 5 > 1));
        batch.d_out = random(rng, (B, H, t, V));
        batch
    }

    fn inputs(&self) -> BatchInputs<'_, T> {
        BatchInputs {
            biases: self.biases.as_ref().map(|(u, w, r)| BatchBiases {
                content: u.view(),
                position: w.view(),
                relative: r.view(),
            }),
            mask: self.mask.as_ref().map(|mask| mask.view()),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    /// Forward and backward; `d_out` comes in a layout of its own.
    fn run(
        &self,
        inputs: &BatchInputs<'_, T>,
        d_out: ArrayView4<'_, T>,
    ) -> (BatchOutput<T>, States<T>, BatchGradients<T>) {
        let mut states = self.states.clone();
        let (output, saved) = self.attention.forward(inputs, &self.codebook, &mut states).unwrap();
        let estimator = Estimator::StraightThrough;
        let gradients = self.attention.backward(inputs, saved, d_out, estimator, COMMIT_WEIGHT).unwrap();
        (output, states, gradients)
    }

    /// The bits of all that forward and backward return.
    fn bits(
        &self,
        inputs: &BatchInputs<'_, T>,
        d_out: ArrayView4<'_, T>,
    ) -> (Vec<u64>, CodeStats<T>, States<T>) {
        let (output, states, gradients) = self.run(inputs, d_out);
        let mut bits: Vec<u64> = vec![output.commit_loss.to_bits()];
        let mut add =
            |numbers: &mut dyn Iterator<Item = &T>| bits.extend(numbers.map(|x| x.as_f64().to_bits()));
        add(&mut output.out.iter());
        add(&mut output.lse.iter());
        add(&mut output.cached_mass.iter());
        add(&mut gradients.q.iter());
        add(&mut gradients.k.iter());
        add(&mut gradients.v.iter());
        add(&mut gradients.codewords.iter());
        if let Some(biases) = &gradients.biases {
            add(&mut biases.content.iter());
            add(&mut biases.position.iter());
            add(&mut biases.relative.iter());
        }
        bits.extend(output.codes.iter().map(|&code| u64::from(code)));
        (bits, output.stats, states)
    }
}

/// With and without cache, gradient through it, biases and mask; no token, few, more than keys are treated at once (64), and
/// more than a task takes (1024).
fn batches<T: Scalar>() -> Vec<Batch<T>> {
    let base = VqAttention { block_len: 6, window: 4, ..VqAttention::default() };
    let batch =
        |attention, biased, masked| [0, 1, 3, 25, 70, 1100].map(|t| Batch::new(attention, t, biased, masked));
    let mut all = vec![];
    all.extend(batch(base, true, true));
    all.extend(batch(base, false, false));
    all.extend(batch(VqAttention { gradient_through_cache: false, ..base }, true, false));
    all.extend(batch(VqAttention { cache: false, ..base }, true, true));
    all.extend(batch(VqAttention { window: 0, block_len: 40, ..base }, true, false));
    all
}

#[test]
fn heads_are_the_functions_of_one_head_called_one_by_one() {
    for batch in batches::<f64>() {
        let (output, states, gradients) = batch.run(&batch.inputs(), batch.d_out.view());
        // Equal to the bit, unless backward is cut into segments.
        let bound = if batch.q.len_of(Axis(2)) < 1024 { 0.0 } else { 1e-14 };
        let (keys, codewords) = (batch.k.view(), batch.codebook.codewords());
        let codes = batch.codebook.assign(keys).unwrap();
        assert_eq!(output.codes, codes);
        let mask = batch.mask.as_ref().map(|mask| mask.view());
        assert_eq!(output.stats, CodeStats::collect(keys, codes.view(), S, mask).unwrap());
        let loss = commitment::loss(keys, codes.view(), codewords.view(), mask).unwrap();
        assert!((output.commit_loss - loss).abs() <= 1e-15 * loss, "{} {loss}", output.commit_loss);
        let mut d_k =
            commitment::backward(keys, codes.view(), codewords.view(), mask, COMMIT_WEIGHT).unwrap();
        let mut d_codewords = Array3::<f64>::zeros(codewords.raw_dim());
        let mut d_biases = gradients.biases.clone();
        if let Some(d) = &mut d_biases {
            d.content.fill(0.0);
            d.position.fill(0.0);
            d.relative.fill(0.0);
        }
        for (b, h) in ndarray::indices((B, H)) {
            let inputs = Inputs {
                q: batch.q.slice(s![b, h, .., ..]),
                codes: codes.slice(s![b, h, ..]),
                v: batch.v.slice(s![b, h, .., ..]),
                codewords: codewords.slice(s![h, .., ..]),
                biases: batch.biases.as_ref().map(|(u, w, r)| Biases {
                    content: u.row(h),
                    position: w.row(h),
                    relative: r.slice(s![h, .., ..]),
                }),
                starts: None,
            };
            let mut state = batch.states[[b, h]].clone();
            let (one, saved) = blockwise::forward(&batch.attention, &inputs, &mut state).unwrap();
            assert_eq!(output.out.slice(s![b, h, .., ..]), one.out);
            assert_eq!(output.lse.slice(s![b, h, ..]), one.lse);
            assert_eq!(output.cached_mass.slice(s![b, h, ..]), one.cached_mass);
            assert_eq!(states[[b, h]], state);
            let d_out = batch.d_out.slice(s![b, h, .., ..]);
            let d = blockwise::backward(&batch.attention, &inputs, saved, d_out).unwrap();
            assert!(relative_rms(&gradients.q.slice(s![b, h, .., ..]), &d.q) <= bound);
            assert!(relative_rms(&gradients.v.slice(s![b, h, .., ..]), &d.v) <= bound);
            let mut d_k = d_k.slice_mut(s![b, h, .., ..]);
            d_k += &d.k_hat; // straight through
            let mut sum = d_codewords.index_axis_mut(Axis(0), h);
            sum += &d.codewords;
            for (d_k_hat, &code) in d.k_hat.outer_iter().zip(output.codes.slice(s![b, h, ..])) {
                let mut sum = sum.row_mut(code as usize);
                sum += &d_k_hat;
            }
            if let (Some(sums), Some(d)) = (&mut d_biases, d.biases) {
                let (mut u, mut w) = (sums.content.row_mut(h), sums.position.row_mut(h));
                u += &d.content;
                w += &d.position;
                let mut r = sums.relative.index_axis_mut(Axis(0), h);
                r += &d.relative;
            }
        }
        assert!(relative_rms(&gradients.k, &d_k) < bound + 1e-15);
        assert!(relative_rms(&gradients.codewords, &d_codewords) < bound + 1e-15);
        if let (Some(got), Some(expected)) = (&gradients.biases, &d_biases) {
            assert!(relative_rms(&got.content, &expected.content) <= bound);
            assert!(relative_rms(&got.position, &expected.position) <= bound);
            assert!(relative_rms(&got.relative, &expected.relative) <= bound);
        }
    }
}

/// A copy with the axes of memory in the order [B, T, H, width].
fn token_major<T: Scalar>(array: &Array4<T>) -> Array4<T> {
    let array = array.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    array.permuted_axes([0, 2, 1, 3])
}

/// A copy that lies backwards in memory, with NaN between its elements; to be seen through [`unfold`].
fn folded<T: Scalar>(array: &Array4<T>) -> Array4<T> {
    let (b, h, t, width) = array.dim();
    let mut folded = Array4::from_elem((b, h, t, 2 * width), T::nan());
    folded.slice_mut(s![..;-1, ..;-1, ..;-1, ..;-2]).assign(array);
    folded
}

fn unfold<T>(array: &Array4<T>) -> ArrayView4<'_, T> {
    array.slice(s![..;-1, ..;-1, ..;-1, ..;-2])
}

/// Arrays [B, T, H, width] give the bits of arrays [B, H, T, width]. Any other strides give the same codes, statistics and
/// states, and the rest to rounding: products of such views add up in another order.
fn layouts<T: Scalar>() {
    for batch in batches::<T>() {
        let expected = batch.bits(&batch.inputs(), batch.d_out.view());
        let arrays = [&batch.q, &batch.k, &batch.v, &batch.d_out];
        let [q, k, v, d_out] = arrays.map(token_major);
        let inputs = BatchInputs { q: q.view(), k: k.view(), v: v.view(), ..batch.inputs() };
        assert!(batch.bits(&inputs, d_out.view()) == expected);

        let [q, k, v, d_out] = arrays.map(folded);
        let inputs = BatchInputs { q: unfold(&q), k: unfold(&k), v: unfold(&v), ..batch.inputs() };
        let (bits, stats, states) = batch.bits(&inputs, unfold(&d_out));
        assert_eq!((stats, states), (expected.1, expected.2));
        for (got, expected) in bits.into_iter().zip(expected.0) {
            let [got, expected] = [got, expected].map(f64::from_bits);
            // Sums over more than a thousand tokens are large.
            let scale = if batch.q.len_of(Axis(2)) > 100 { expected.abs().max(1.0) } else { 1.0 };
            let error = (got - expected).abs() / scale;
            assert!(error < 50.0 * T::epsilon().as_f64(), "{error:e}");
        }
    }
}

#[test]
fn layouts_do_not_matter_in_f32() {
    layouts::<f32>();
}

#[test]
fn layouts_do_not_matter_in_f64() {
    layouts::<f64>();
}

#[test]
fn the_layout_of_states_does_not_matter() {
    let batch = &batches::<f64>()[3];
    let (expected, expected_states, _) = batch.run(&batch.inputs(), batch.d_out.view());
    let mut states = Array2::from_shape_fn((B, H).f(), |index| batch.states[index].clone());
    let (output, _) = batch.attention.forward(&batch.inputs(), &batch.codebook, &mut states).unwrap();
    assert!((output.out, states) == (expected.out, expected_states));
}

#[test]
fn outputs_are_laid_out_token_by_token() {
    for batch in batches::<f32>() {
        let (output, _, gradients) = batch.run(&batch.inputs(), batch.d_out.view());
        for array in [output.out, gradients.q, gradients.k, gradients.v] {
            assert!(array.permuted_axes([0, 2, 1, 3]).is_standard_layout());
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut batches = batches::<f32>();
            // Long enough to be cut into segments, by number of threads forward and by sizes backward.
            let attention = VqAttention { block_len: 100, window: 70, ..VqAttention::default() };
            batches.push(Batch::new(attention, 2100, true, true));
            Vec::from_iter(batches.iter().map(|batch| batch.bits(&batch.inputs(), batch.d_out.view())))
        })
    };
    let expected = on(1);
    assert!(on(2) == expected);
    assert!(on(8) == expected);
}

/// Gradients of u, w and r, to be compared.
fn of_biases(d: &BatchGradients<f64>) -> Option<[ArrayViewD<'_, f64>; 3]> {
    let BatchBiasGradients { content, position, relative } = d.biases.as_ref()?;
    Some([content.view().into_dyn(), position.view().into_dyn(), relative.view().into_dyn()])
}

#[test]
fn arrays_that_the_caller_keeps_may_hold_anything() {
    let (mut output, mut gradients) = (BatchOutput::default(), BatchGradients::default());
    for batch in batches::<f64>() {
        let (expected, expected_states, expected_d) = batch.run(&batch.inputs(), batch.d_out.view());
        // First arrays of the last batch's shapes, then of this one's, full of NaN.
        for _ in 0..2 {
            let mut states = batch.states.clone();
            let inputs = batch.inputs();
            let saved =
                batch.attention.forward_into(&inputs, &batch.codebook, &mut states, &mut output).unwrap();
            let (through, d_out) = (Estimator::StraightThrough, batch.d_out.view());
            batch
                .attention
                .backward_into(&inputs, saved, d_out, through, COMMIT_WEIGHT, &mut gradients)
                .unwrap();
            assert_eq!((&output.out, &output.codes), (&expected.out, &expected.codes));
            assert_eq!((&output.lse, &output.cached_mass), (&expected.lse, &expected.cached_mass));
            assert_eq!((&output.stats, output.commit_loss), (&expected.stats, expected.commit_loss));
            assert_eq!(states, expected_states);
            assert_eq!((&gradients.q, &gradients.k), (&expected_d.q, &expected_d.k));
            assert_eq!((&gradients.v, &gradients.codewords), (&expected_d.v, &expected_d.codewords));
            assert_eq!(of_biases(&gradients), of_biases(&expected_d));
            output.out.fill(f64::NAN);
            output.lse.fill(f64::NAN);
            output.cached_mass.fill(f64::NAN);
            output.codes.fill(u32::MAX);
            output.commit_loss = f64::NAN;
            gradients.q.fill(f64::NAN);
            gradients.k.fill(f64::NAN);
            gradients.v.fill(f64::NAN);
            gradients.codewords.fill(f64::NAN);
            if let Some(biases) = &mut gradients.biases {
                biases.content.fill(f64::NAN);
                biases.position.fill(f64::NAN);
                biases.relative.fill(f64::NAN);
            }
        }
    }
}

#[test]
fn states_carry_a_sequence_from_piece_to_piece() {
    for batch in batches::<f64>() {
        let inputs = batch.inputs();
        let (whole, whole_states, _) = batch.run(&inputs, batch.d_out.view());
        let t = batch.q.len_of(Axis(2));
        for len in [1, 7, 100] {
            let (mut by_forward, mut by_push) = (batch.states.clone(), batch.states.clone());
            let mut outs = vec![Array4::zeros((B, H, 0, V))];
            for from in (0..t).step_by(len) {
                let tokens = from..t.min(from + len);
                let piece = BatchInputs {
                    q: inputs.q.slice(s![.., .., tokens.clone(), ..]),
                    k: inputs.k.slice(s![.., .., tokens.clone(), ..]),
                    v: inputs.v.slice(s![.., .., tokens.clone(), ..]),
                    biases: inputs.biases.clone(),
                    mask: inputs.mask.map(|mask| mask.slice_move(s![.., tokens.clone()])),
                    starts: None,
                    lengths: None,
                };
                let (forward, _) = batch.attention.forward(&piece, &batch.codebook, &mut by_forward).unwrap();
                let push = batch.attention.push(&piece, &batch.codebook, &mut by_push).unwrap();
                assert_eq!((&push.codes, &push.stats), (&forward.codes, &forward.stats));
                assert_eq!(push.commit_loss, forward.commit_loss);
                assert!(relative_rms(&push.out, &forward.out) < 1e-13);
                assert!(relative_rms(&push.lse, &forward.lse) < 1e-13);
                outs.push(push.out);
            }
            let out = concatenate(Axis(2), &Vec::from_iter(outs.iter().map(|out| out.view()))).unwrap();
            assert!(relative_rms(&out, &whole.out) < 1e-13);
            assert_eq!((&by_forward, &by_push), (&whole_states, &whole_states));
        }
    }
}

#[test]
fn prepared_heads_infer_as_any_others() {
    for batch in batches::<f64>() {
        let biases = batch.inputs().biases;
        let heads = batch.attention.prepare(&batch.codebook, biases).unwrap();
        let t = batch.q.len_of(Axis(2));
        for len in [1, 2, 7] {
            let (mut states, mut expected_states) = (batch.states.clone(), batch.states.clone());
            for from in (0..t).step_by(len) {
                let tokens = s![.., .., from..t.min(from + len), ..];
                let [q, k, v] = [&batch.q, &batch.k, &batch.v].map(|x| x.slice(tokens));
                let got = heads.push(q, k, v, &mut states).unwrap();
                let inputs = BatchInputs { biases: batch.inputs().biases, ..BatchInputs::new(q, k, v) };
                let expected = batch.attention.push(&inputs, &batch.codebook, &mut expected_states).unwrap();
                assert_eq!((&got.codes, got.commit_loss), (&expected.codes, expected.commit_loss));
                assert!(relative_rms(&got.out, &expected.out) < 1e-14);
                assert!(relative_rms(&got.lse, &expected.lse) < 1e-14);
                assert!(relative_rms(&got.cached_mass, &expected.cached_mass) < 1e-13);
                assert_eq!(got.stats, CodeStats::default());
                assert!(got.out.permuted_axes([0, 2, 1, 3]).is_standard_layout());
            }
            assert_eq!(states, expected_states);
        }
    }
}

/// Sizes at which a head's products are shared among threads.
#[test]
fn a_token_has_the_same_bits_among_others_and_on_any_number_of_threads() {
    let attention = VqAttention { window: 600, ..VqAttention::default() };
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let (n, h, d_k, d_v) = (300, 2, 96, 192);
    let codebook = Codebook::ema(Ema::from_codewords(random::<f32, _>(rng, (h, n, d_k)), 0.9).unwrap());
    let (u, w) = (random(rng, (h, d_k)), random(rng, (h, d_k)));
    let relative = random(rng, (h, attention.window + 1, d_k));
    let biases = BatchBiases { content: u.view(), position: w.view(), relative: relative.view() };
    let heads = attention.prepare(&codebook, Some(biases)).unwrap();
    let mut part =
        |t: usize| [random(rng, (B, h, t, d_k)), random(rng, (B, h, t, d_k)), random(rng, (B, h, t, d_v))];
    let ([q, k, v], token) = (part(1100), part(1));
    let mut start = attention.new_states(B, &codebook, d_v).unwrap();
    heads.push(q.view(), k.view(), v.view(), &mut start).unwrap();
    let push = |threads: usize, sequences: std::ops::Range<usize>| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut states = start.slice(s![sequences.clone(), ..]).to_owned();
        let [q, k, v] = token.each_ref().map(|x| x.slice(s![sequences.clone(), .., .., ..]));
        let output = pool.install(|| heads.push(q, k, v, &mut states).unwrap());
        (output.out, output.lse, output.codes, states)
    };
    let all = push(1, 0..B);
    assert!(push(2, 0..B) == all && push(5, 0..B) == all);
    for b in 0..B {
        let one = push(3, b..b + 1);
        let own = s![b..b + 1, .., ..];
        assert_eq!(one.0, all.0.slice(s![b..b + 1, .., .., ..]));
        assert_eq!((one.1.view(), one.2.view()), (all.1.slice(own), all.2.slice(own)));
        assert_eq!(one.3, all.3.slice(s![b..b + 1, ..]));
    }
}

#[test]
fn masked_positions_count_in_loss_and_statistics_only() {
    let mut batch =
        Batch::<f64>::new(VqAttention { block_len: 6, window: 4, ..VqAttention::default() }, 25, true, true);
    let (masked, masked_states, d_masked) = batch.run(&batch.inputs(), batch.d_out.view());
    let mask = batch.mask.take().unwrap();
    let (open, open_states, d_open) = batch.run(&batch.inputs(), batch.d_out.view());
    assert_eq!((&masked.out, &masked.codes, masked_states), (&open.out, &open.codes, open_states));
    assert_eq!((&d_masked.q, &d_masked.v, &d_masked.codewords), (&d_open.q, &d_open.v, &d_open.codewords));
    let counted = mask.iter().filter(|&&counts| counts).count();
    assert_eq!(masked.stats.counts().sum(), (counted * H) as u64);
    assert_eq!(open.stats.counts().sum(), (B * H * 25) as u64);
    batch.mask = Some(mask.mapv(|_| false));
    let (nothing, _, d_nothing) = batch.run(&batch.inputs(), batch.d_out.view());
    assert_eq!((nothing.commit_loss, nothing.stats), (0.0, CodeStats::zeros(H, S, K).unwrap()));
    // Where a position does not count, its key hears of the output alone.
    for ((b, t), _) in mask.indexed_iter().filter(|&(_, &counts)| !counts) {
        let at = s![b, .., t, ..];
        assert_eq!(d_masked.k.slice(at), d_nothing.k.slice(at));
        assert_ne!(d_open.k.slice(at), d_nothing.k.slice(at));
    }
    let all: Array1<f64> = d_masked.k.iter().copied().collect();
    assert!(all.iter().all(|d| d.is_finite()));
}
