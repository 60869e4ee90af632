//! Codebooks that learn: gradients of codewords, basis, matrix and bias; moving averages; what each kind moves.

use crate::support::normal;
use ndarray::{Array2, Array3, Array4, ArrayD, ArrayView3, Axis, array, s};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{
    Basis, CodeStats, Codebook, CodebookParameters, Ema, Learning, Smoothing, assign_naive, codebook_loss,
    commitment, lookup,
};
use transformer_vq::ndarray;

/// B, H, T, K, S and the width of a basis.
pub const SIZES: [[usize; 6]; 5] =
    [[1, 1, 1, 1, 1, 1], [2, 3, 7, 3, 5, 4], [3, 1, 40, 8, 4, 2], [1, 2, 20, 5, 17, 9], [2, 2, 0, 3, 4, 3]];

/// Every kind that learns by gradient, and one that has nothing to move.
pub fn codebooks([_, h, _, k, n_codes, f]: [usize; 6]) -> Vec<Codebook<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (codewords, basis) = (normal(&mut rng, (h, n_codes, k)), normal(&mut rng, (h, n_codes, f)));
    let weight: Array3<f64> = normal(&mut rng, (h, k, f));
    let bias: Array2<f64> = normal(&mut rng, (h, k));
    let linear = |bias, learned| Codebook::linear(basis.clone(), weight.clone(), bias, learned).unwrap();
    vec![
        Codebook::gradient(codewords.clone()).unwrap(),
        linear(None, false),
        linear(Some(bias.clone()), false),
        linear(None, true),
        linear(Some(bias), true),
        Codebook::frozen(codewords).unwrap(),
    ]
}

pub struct Batch {
    pub keys: Array4<f64>,
    pub codes: Array3<u32>,
    pub mask: Array2<bool>,
}

impl Batch {
    pub fn new([b, h, t, k, n_codes, _]: [usize; 6]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(t as u64);
        Batch {
            keys: normal(&mut rng, (b, h, t, k)),
            codes: Array3::from_shape_simple_fn((b, h, t), || rng.random_range(0..n_codes as u32)),
            mask: Array2::from_shape_simple_fn((b, t), || rng.random()),
        }
    }

    pub fn stats(&self, n_codes: usize) -> CodeStats<f64> {
        CodeStats::collect(self.keys.view(), self.codes.view(), n_codes, Some(self.mask.view())).unwrap()
    }

    pub fn loss(&self, codewords: ArrayView3<'_, f64>) -> f64 {
        commitment::loss(self.keys.view(), self.codes.view(), codewords, Some(self.mask.view())).unwrap()
    }
}

/// With parameter `i` moved to `x`.
fn moved(codebook: &Codebook<f64>, i: usize, x: ndarray::ArrayViewD<'_, f64>) -> Codebook<f64> {
    let mut parameters = codebook.parameters().clone();
    parameters.views_mut()[i].1.assign(&x);
    let mut codebook = codebook.clone();
    codebook.set_parameters(parameters).unwrap();
    codebook
}

/// `f` of the codewords, differentiated by every parameter of every kind, against `d_codewords` taken backward.
fn parameters_follow(
    size: [usize; 6],
    f: impl Fn(ArrayView3<'_, f64>) -> f64,
    d_codewords: impl Fn(&Array3<f64>) -> Array3<f64>,
) {
    for codebook in codebooks(size) {
        let mut gradients = codebook.parameters().zeros_like();
        codebook.backward(d_codewords(&codebook.codewords()).view(), &mut gradients).unwrap();
        // Gradients are added.
        codebook.backward(d_codewords(&codebook.codewords()).view(), &mut gradients).unwrap();
        assert_eq!(gradients.views().len(), codebook.parameters().views().len());
        for (i, (name, got)) in gradients.views().into_iter().enumerate() {
            let at: ArrayD<f64> = codebook.parameters().views()[i].1.to_owned();
            let expected =
                finite_difference(|x| 2.0 * f(moved(&codebook, i, x).codewords().view()), &at, 1e-2);
            let error = relative_rms(&got, &expected);
            assert!(error <= 1e-8, "{name} {size:?}: {error:e}");
        }
    }
}

#[test]
fn the_codebook_loss_equals_finite_differences_for_every_parameter() {
    for size in SIZES {
        let batch = Batch::new(size);
        let weight = 0.7;
        let d = |codewords: &Array3<f64>| {
            codebook_loss::backward(&batch.stats(size[4]), codewords.view(), weight).unwrap()
        };
        parameters_follow(size, |codewords| weight * batch.loss(codewords), d);
    }
}

/// A gradient that comes from elsewhere: from attention, say.
#[test]
fn any_gradient_of_the_codewords_reaches_every_parameter() {
    for size in SIZES {
        let [_, h, _, k, n_codes, _] = size;
        let pull: Array3<f64> = normal(&mut ChaCha8Rng::seed_from_u64(3), (h, n_codes, k));
        let f = |codewords: ArrayView3<'_, f64>| (&codewords * &codewords * &pull).sum();
        parameters_follow(size, f, |codewords| codewords * &pull * 2.0);
    }
}

#[test]
fn each_weight_pulls_its_own_side() {
    let size = SIZES[2];
    let (batch, codebook) = (Batch::new(size), codebooks(size).remove(0));
    let (codes, codewords, mask) = (batch.codes.view(), codebook.codewords(), Some(batch.mask.view()));
    let d_keys =
        |weight| commitment::backward(batch.keys.view(), codes, codewords.view(), mask, weight).unwrap();
    let d_codewords =
        |weight| codebook_loss::backward(&batch.stats(size[4]), codewords.view(), weight).unwrap();
    assert!(d_keys(0.0).iter().all(|&d| d == 0.0) && d_codewords(0.0).iter().all(|&d| d == 0.0));
    assert!(relative_rms(&d_keys(3.0), &(d_keys(1.0) * 3.0)) < 1e-15);
    assert!(relative_rms(&d_codewords(3.0), &(d_codewords(1.0) * 3.0)) < 1e-15);
    // What pulls keys and what pulls codewords is equal and opposite.
    let mut sums = Array3::<f64>::zeros(codewords.raw_dim());
    for ((b, h, t), &code) in batch.codes.indexed_iter() {
        let mut sum = sums.slice_mut(s![h, code as usize, ..]);
        sum -= &d_keys(1.0).slice(s![b, h, t, ..]);
    }
    assert!(relative_rms(&d_codewords(1.0), &sums) < 1e-13);
}

/// One code is selected, once: who moves?
#[test]
fn one_selected_code_moves_all_codewords_of_a_linear_codebook_and_one_of_a_plain_one() {
    let size = [1, 1, 1, 5, 12, 7];
    let [_, _, _, k, n_codes, _] = size;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let keys: Array4<f64> = normal(&mut rng, (1, 1, 1, k));
    let rate = 0.1;
    for (kind, mut codebook) in codebooks(size).into_iter().enumerate() {
        let before = codebook.codewords();
        let codes = codebook.assign(keys.view()).unwrap();
        let selected = codes[[0, 0, 0]] as usize;
        let stats = CodeStats::collect(keys.view(), codes.view(), n_codes, None).unwrap();
        let d_codewords = codebook_loss::backward(&stats, before.view(), 1.0).unwrap();
        let mut gradients = codebook.parameters().zeros_like();
        codebook.backward(d_codewords.view(), &mut gradients).unwrap();
        let mut parameters = codebook.parameters().clone();
        for ((_, mut p), (_, d)) in parameters.views_mut().into_iter().zip(gradients.views()) {
            p.scaled_add(-rate, &d);
        }
        codebook.set_parameters(parameters).unwrap();
        let step = (codebook.codewords() - &before).remove_axis_of_one();
        let moved = |s: usize| step.row(s).iter().any(|&x| x != 0.0);
        let expected = match kind {
            0 => (0..n_codes).map(|s| s == selected).collect(),
            5 => vec![false; n_codes],
            _ => vec![true; n_codes],
        };
        assert_eq!((0..n_codes).map(moved).collect::<Vec<_>>(), expected, "kind {kind}");
        // The basis alone frozen: along one line, as far as the rows of the basis agree.
        if let Learning::Linear(Basis::Frozen(basis)) = codebook.learning() {
            let basis = basis.index_axis(Axis(0), 0);
            let bias = if codebook.parameters().bias.is_some() { 1.0 } else { 0.0 };
            let along = d_codewords.slice(s![0, selected, ..]).to_owned() * -rate;
            let share = |s: usize| basis.row(s).dot(&basis.row(selected)) + bias;
            let expected = Array2::from_shape_fn((n_codes, k), |(s, k)| share(s) * along[k]);
            assert!(relative_rms(&step, &expected) < 1e-13);
            // The basis itself has not moved.
            assert!(!codebook.parameters().views().iter().any(|(name, _)| *name == "basis"));
        }
    }
}

trait OneHead {
    fn remove_axis_of_one(self) -> Array2<f64>;
}

impl OneHead for Array3<f64> {
    fn remove_axis_of_one(self) -> Array2<f64> {
        self.index_axis_move(Axis(0), 0)
    }
}

/// What is folded is what the formula says, and what codes are decoded to.
#[test]
fn folded_codewords_are_the_basis_times_the_matrix() {
    for size in SIZES {
        for codebook in &codebooks(size)[1..5] {
            let parameters = codebook.parameters();
            let basis = match codebook.learning() {
                Learning::Linear(Basis::Frozen(basis)) => basis,
                _ => parameters.basis.as_ref().unwrap(),
            };
            let weight = parameters.weight.as_ref().unwrap();
            let expected = Array3::from_shape_fn((size[1], size[4], size[3]), |(h, s, k)| {
                let bias = parameters.bias.as_ref().map_or(0.0, |bias| bias[[h, k]]);
                (0..size[5]).map(|f| basis[[h, s, f]] * weight[[h, k, f]]).sum::<f64>() + bias
            });
            let codewords = codebook.codewords();
            assert!(relative_rms(&codewords, &expected) < 1e-14);
            let keys = Batch::new(size).keys;
            let codes = codebook.assign(keys.view()).unwrap();
            for ((b, h), _) in Array2::<u8>::zeros((size[0], size[1])).indexed_iter() {
                let naive = assign_naive(keys.slice(s![b, h, .., ..]), codewords.slice(s![h, .., ..]));
                assert_eq!(codes.slice(s![b, h, ..]), naive.unwrap());
            }
            let quantized = lookup(codes.view(), codewords.view()).unwrap();
            assert_eq!(codebook.assign(quantized.view()).unwrap(), codes);
            assert_eq!((codebook.n_heads(), codebook.n_codes(), codebook.d_k()), (size[1], size[4], size[3]));
        }
    }
}

/// A basis of codewords with the identity behind it is those codewords, to the bit.
#[test]
fn the_identity_changes_nothing() {
    let codewords: Array3<f64> = normal(&mut ChaCha8Rng::seed_from_u64(1), (2, 9, 4));
    let weight = ndarray::stack![Axis(0), Array2::eye(4), Array2::eye(4)];
    let codebook = Codebook::linear(codewords.clone(), weight, None, true).unwrap();
    assert_eq!(codebook.codewords(), codewords);
}

#[test]
fn statistics_and_evaluation_move_nothing_that_learns_by_gradient() {
    let size = SIZES[1];
    let batch = Batch::new(size);
    for mut codebook in codebooks(size) {
        let before = codebook.clone();
        codebook.assign(batch.keys.view()).unwrap();
        codebook.update(&batch.stats(size[4])).unwrap();
        let mut gradients = codebook.parameters().zeros_like();
        codebook.backward(Array3::ones(codebook.codewords().raw_dim()).view(), &mut gradients).unwrap();
        assert_eq!(codebook, before);
        assert_eq!(codebook.cast::<f32>().cast::<f64>().cast::<f32>(), codebook.cast::<f32>());
        let single = codebook.cast::<f32>();
        assert!(relative_rms(&single.codewords(), &codebook.codewords()) < 1e-6);
    }
}

/// The codebook loss by plain steps finds the mean of its keys, as Lloyd does.
#[test]
fn gradient_steps_lead_to_the_centroids() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let keys: Array4<f64> = normal(&mut rng, (1, 1, 60, 3));
    let mut codebook = Codebook::gradient(normal(&mut rng, (1, 4, 3))).unwrap();
    let codes = codebook.assign(keys.view()).unwrap();
    let stats = CodeStats::collect(keys.view(), codes.view(), 4, None).unwrap();
    for _ in 0..2000 {
        let d = codebook_loss::backward(&stats, codebook.codewords().view(), 1.0).unwrap();
        let codewords = codebook.codewords() - d * 0.5;
        codebook
            .set_parameters(CodebookParameters { codewords: Some(codewords), ..Default::default() })
            .unwrap();
    }
    let counts = stats.counts().mapv(|n| n as f64).insert_axis(Axis(2));
    let codewords = codebook.codewords();
    for ((h, s), &n) in stats.counts().indexed_iter().filter(|&(_, &n)| n > 0) {
        assert!(n > 0);
        let mean = &stats.sums().slice(s![h, s, ..]) / counts[[h, s, 0]];
        assert!(relative_rms(&codewords.slice(s![h, s, ..]).to_owned(), &mean) < 1e-10);
    }
}

proptest! {
    #![proptest_config(crate::support::config(40))]

    /// The sizes of the test plan: the gradient of the codebook loss is its definition, key by key.
    #[test]
    fn the_codebook_gradient_is_its_definition(
        t in prop::sample::select(vec![0usize, 1, 7, 1000]),
        n_codes in prop::sample::select(vec![1usize, 2, 17, 512]),
        k in prop::sample::select(vec![1usize, 3, 16, 128]),
        h in prop::sample::select(vec![1usize, 3]),
    ) {
        let batch = Batch::new([1, h, t, k, n_codes, 1]);
        let codewords: Array3<f64> = normal(&mut ChaCha8Rng::seed_from_u64(4), (h, n_codes, k));
        let got = codebook_loss::backward(&batch.stats(n_codes), codewords.view(), 0.3).unwrap();
        let counted = batch.mask.iter().filter(|&&counts| counts).count();
        let mut expected = Array3::<f64>::zeros(codewords.raw_dim());
        for ((b, h, t), &code) in batch.codes.indexed_iter().filter(|((b, _, t), _)| batch.mask[[*b, *t]]) {
            let of = s![h, code as usize, ..];
            let pull = &codewords.slice(of) - &batch.keys.slice(s![b, h, t, ..]);
            expected.slice_mut(of).scaled_add(2.0 * 0.3 / counted as f64, &pull);
        }
        prop_assert!(relative_rms(&got, &expected) < 1e-12);
    }
}

#[test]
fn without_counted_positions_codewords_get_nothing() {
    let mut batch = Batch::new(SIZES[1]);
    batch.mask.fill(false);
    for codebook in codebooks(SIZES[1]) {
        let d = codebook_loss::backward(&batch.stats(5), codebook.codewords().view(), 1.0).unwrap();
        assert_eq!(d, Array3::<f64>::zeros(d.raw_dim()));
    }
    // Moving averages fade alike: the codewords stay.
    let ema = Ema::from_codewords(Array3::ones((3, 5, 3)), 0.5).unwrap();
    let mut codebook = Codebook::ema(ema.with_smoothing(Smoothing::Laplace { epsilon: 1e-5 }).unwrap());
    codebook.update(&batch.stats(5)).unwrap();
    assert!(relative_rms(&codebook.codewords(), &Array3::<f64>::ones((3, 5, 3))) < 1e-14);
}

/// One code, one dimension: the mean of all keys, by every kind.
#[test]
fn one_code_and_one_dimension() {
    let keys = Array4::from_shape_fn((1, 1, 4, 1), |(_, _, t, _)| t as f64);
    let one = |x: f64| Array3::from_elem((1, 1, 1), x);
    let ema = |smoothing| {
        Codebook::ema(Ema::from_codewords(one(7.0), 0.0).unwrap().with_smoothing(smoothing).unwrap())
    };
    for mut codebook in [
        ema(Smoothing::CountClamp),
        ema(Smoothing::Laplace { epsilon: 1e-5 }),
        Codebook::gradient(one(7.0)).unwrap(),
        Codebook::linear(one(2.0), one(3.5), Some(array![[0.0]]), true).unwrap(),
    ] {
        let codes = codebook.assign(keys.view()).unwrap();
        assert_eq!(codes, Array3::<u32>::zeros((1, 1, 4)));
        let stats = CodeStats::collect(keys.view(), codes.view(), 1, None).unwrap();
        codebook.update(&stats).unwrap();
        let mut parameters = codebook.parameters().clone();
        for _ in 0..400 {
            codebook.set_parameters(parameters.clone()).unwrap();
            let d = codebook_loss::backward(&stats, codebook.codewords().view(), 1.0).unwrap();
            let mut gradients = parameters.zeros_like();
            codebook.backward(d.view(), &mut gradients).unwrap();
            for ((_, mut p), (_, d)) in parameters.views_mut().into_iter().zip(gradients.views()) {
                p.scaled_add(-0.02, &d);
            }
        }
        assert!((codebook.codewords()[[0, 0, 0]] - 1.5).abs() < 1e-4, "{codebook:?}");
    }
}
