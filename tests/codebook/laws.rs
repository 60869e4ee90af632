//! What may change and what may not when codes, heads or masked keys do. (A5, B1, B4, C6, D2 and E5 of the test plan.)

use crate::support::normal;
use ndarray::{Array1, Array2, Array3, Array4, ArrayView1, ArrayView3, ArrayView4, Axis, array, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{
    CodeStats, Codebook, Ema, Estimator, Rotation, RotationScale, RotationVariant, Smoothing, codebook_loss,
    commitment, cosine, lookup,
};
use transformer_vq::ndarray;

fn estimators() -> [Estimator; 5] {
    let rotation = |variant| Estimator::Rotation(Rotation { variant, scale: RotationScale::Ratio });
    [
        Estimator::StraightThrough,
        rotation(RotationVariant::Paper),
        rotation(RotationVariant::Normalized),
        Estimator::Directional,
        Estimator::None,
    ]
}

/// All that a codebook makes of keys and of a gradient of the quantized ones.
struct Everything {
    codes: Array3<u32>,
    quantized: Array4<f64>,
    loss: f64,
    errors: Array1<f64>,
    commitment: Array4<f64>,
    stats: CodeStats<f64>,
    d_codewords: Array3<f64>,
    d_keys: Vec<Array4<f64>>,
}

fn everything(keys: ArrayView4<'_, f64>, codewords: ArrayView3<'_, f64>, d: &Array4<f64>) -> Everything {
    let codes = Codebook::frozen(codewords.to_owned()).unwrap().assign(keys).unwrap();
    let (z, n_codes) = (codes.view(), codewords.len_of(Axis(1)));
    let stats = CodeStats::collect(keys, z, n_codes, None).unwrap();
    let through = |estimator: Estimator| estimator.key_gradient(keys, z, codewords, d.clone()).unwrap();
    Everything {
        quantized: lookup(z, codewords).unwrap(),
        loss: commitment::loss(keys, z, codewords, None).unwrap(),
        errors: commitment::mean_error(keys, z, codewords, None).unwrap(),
        commitment: commitment::backward(keys, z, codewords, None, 0.7).unwrap(),
        d_codewords: codebook_loss::backward(&stats, codewords, 0.7).unwrap(),
        d_keys: estimators().map(through).to_vec(),
        stats,
        codes,
    }
}

fn case() -> (Array4<f64>, Array3<f64>, Array4<f64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let dim = (2, 3, 40, 5);
    (normal(&mut rng, dim), normal(&mut rng, (3, 8, 5)), normal(&mut rng, dim))
}

#[test]
fn permuting_codewords_permutes_codes_only() {
    let (keys, codewords, d) = case();
    let from = [3, 0, 7, 1, 6, 2, 5, 4]; // the new codeword s was from[s]
    let a = everything(keys.view(), codewords.view(), &d);
    let b = everything(keys.view(), codewords.select(Axis(1), &from).view(), &d);
    assert_ne!(a.codes, b.codes);
    assert_eq!(a.codes, b.codes.mapv(|code| from[code as usize] as u32));
    assert_eq!((&a.quantized, a.loss, &a.commitment), (&b.quantized, b.loss, &b.commitment));
    assert_eq!(a.d_keys, b.d_keys);
    assert_eq!(a.stats.sums().select(Axis(1), &from), b.stats.sums());
    assert_eq!(a.stats.counts().select(Axis(1), &from), b.stats.counts());
    assert_eq!(a.d_codewords.select(Axis(1), &from), b.d_codewords);
}

#[test]
fn permuting_heads_permutes_everything() {
    let (keys, codewords, d) = case();
    let from = [2, 0, 1];
    let a = everything(keys.view(), codewords.view(), &d);
    let heads = |x: &Array4<f64>| x.select(Axis(1), &from);
    let b = everything(heads(&keys).view(), codewords.select(Axis(0), &from).view(), &heads(&d));
    assert_eq!(a.codes.select(Axis(1), &from), b.codes);
    assert_eq!((heads(&a.quantized), heads(&a.commitment)), (b.quantized, b.commitment));
    assert_eq!(a.errors.select(Axis(0), &from), b.errors);
    assert!((a.loss / b.loss - 1.0).abs() < 1e-15);
    assert_eq!(a.stats.sums().select(Axis(0), &from), b.stats.sums());
    assert_eq!(a.stats.counts().select(Axis(0), &from), b.stats.counts());
    assert_eq!(a.d_codewords.select(Axis(0), &from), b.d_codewords);
    assert_eq!(a.d_keys.iter().map(heads).collect::<Vec<_>>(), b.d_keys);
}

/// Whatever it learns by; a linear codebook decodes by its matrix, not to the rows of its basis.
#[test]
fn every_kind_decodes_to_its_codewords_bit_for_bit() {
    let (keys, codewords, _) = case();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (weight, bias): (Array3<f64>, Array2<f64>) = (normal(&mut rng, (3, 5, 5)), normal(&mut rng, (3, 5)));
    let linear = |bias: Option<&Array2<f64>>, learned| {
        Codebook::linear(codewords.clone(), weight.clone(), bias.cloned(), learned).unwrap()
    };
    let ema = Ema::from_codewords(codewords.clone(), 0.9).unwrap();
    let laplace = ema.clone().with_smoothing(Smoothing::Laplace { epsilon: 1e-3 }).unwrap();
    for (kind, codebook) in [
        Codebook::ema(ema),
        Codebook::ema(laplace),
        Codebook::gradient(codewords.clone()).unwrap(),
        Codebook::frozen(codewords.clone()).unwrap(),
        linear(None, false),
        linear(Some(&bias), false),
        linear(Some(&bias), true),
    ]
    .into_iter()
    .enumerate()
    {
        let (codes, table) = (codebook.assign(keys.view()).unwrap(), codebook.codewords());
        let quantized = lookup(codes.view(), table.view()).unwrap();
        for ((b, h, t), &code) in codes.indexed_iter() {
            let [row, codeword] = [quantized.slice(s![b, h, t, ..]), table.slice(s![h, code as usize, ..])];
            assert_eq!(row.mapv(f64::to_bits), codeword.mapv(f64::to_bits));
            if kind >= 4 {
                assert_ne!(row, codewords.slice(s![h, code as usize, ..]));
            }
        }
    }
}

/// A masked position has a code and a codeword, and that is all.
#[test]
fn masked_keys_change_nothing_that_counts() {
    let (keys, codewords, _) = case();
    let mask = Array2::from_shape_fn((2, 40), |(b, t)| (3 * b + t) % 4 != 2);
    let mut others = keys.clone();
    for ((b, t), _) in mask.indexed_iter().filter(|(_, counts)| !**counts) {
        others.slice_mut(s![b, .., t, ..]).mapv_inplace(|k| 30.0 - k);
    }
    let codebook = Codebook::frozen(codewords.clone()).unwrap();
    let (table, mask_view) = (codewords.view(), Some(mask.view()));
    let of = |keys: &Array4<f64>| {
        let codes = codebook.assign(keys.view()).unwrap();
        let (keys, z) = (keys.view(), codes.view());
        let stats = CodeStats::collect(keys, z, 8, mask_view).unwrap();
        let d_codewords = codebook_loss::backward(&stats, table, 1.0).unwrap();
        let errors = commitment::mean_error(keys, z, table, mask_view).unwrap();
        let relative = commitment::relative_error(keys, z, table, mask_view).unwrap();
        let d = commitment::backward(keys, z, table, mask_view, 1.0).unwrap();
        (codes, (stats, d_codewords, errors, relative, d))
    };
    let ((codes, counted), (other_codes, other_counted)) = (of(&keys), of(&others));
    assert_ne!(codes, other_codes);
    assert_eq!(counted, other_counted);
    let d = counted.4;
    for ((b, t), &counts) in mask.indexed_iter() {
        assert!(d.slice(s![b, .., t, ..]).iter().all(|&d| (d != 0.0) == counts));
    }
}

/// On the sphere lambda is 1, and the gradient of the raw key is (g + (b - r) u - r c~) / |k|, of either variant.
#[test]
fn rotation_after_normalization_is_its_closed_form() {
    let (keys, codewords, d) = case();
    let units = cosine::normalize(keys.view()).unwrap();
    let table = cosine::normalize(codewords.view()).unwrap();
    let codes = Codebook::frozen(table.clone()).unwrap().assign(units.view()).unwrap();
    for estimator in &estimators()[1..3] {
        let d_units = estimator.key_gradient(units.view(), codes.view(), table.view(), d.clone()).unwrap();
        let got = cosine::backward(keys.view(), d_units.view()).unwrap();
        let mut expected = Array4::zeros(keys.dim());
        for ((b, h, t), &code) in codes.indexed_iter() {
            let row = |x: &Array4<f64>| x.slice(s![b, h, t, ..]).to_owned();
            let (k, u, g, c) = (row(&keys), row(&units), row(&d), table.slice(s![h, code as usize, ..]));
            let (along_u, along_c) = (u.dot(&g), c.dot(&g));
            let r = (along_u + along_c) / (1.0 + u.dot(&c));
            let d = (&g + &(&u * (along_c - r)) - &(&c * r)) / k.dot(&k).sqrt();
            expected.slice_mut(s![b, h, t, ..]).assign(&d);
        }
        assert!(relative_rms(&got, &expected) < 1e-13, "{:e}", relative_rms(&got, &expected));
    }
}

/// The share of epsilon: at most ten times epsilon over the count.
#[test]
fn laplace_leaves_centroids_by_its_epsilon_only() {
    for (repeats, epsilon) in [(1, 1e-5), (10, 1e-5), (10, 1e-3), (100, 1e-3)] {
        let one = array![[1.0, 2.0], [3.0, 2.0], [-5.0, 0.0], [-7.0, 1.0], [-9.0, 2.0]];
        let keys = Array4::from_shape_fn((1, 1, 5 * repeats, 2), |(_, _, t, k)| one[[t % 5, k]]);
        let codes = Array3::from_shape_fn((1, 1, 5 * repeats), |(_, _, t)| u32::from(t % 5 > 1));
        let stats = CodeStats::collect(keys.view(), codes.view(), 2, None).unwrap();
        let ema = Ema::from_codewords(Array3::ones((1, 2, 2)), 0.8).unwrap();
        let mut codebook = Codebook::ema(ema.with_smoothing(Smoothing::Laplace { epsilon }).unwrap());
        (0..300).for_each(|_| codebook.update(&stats).unwrap());
        let codewords = codebook.codewords();
        for (code, centroid) in [array![2.0, 2.0], array![-7.0, 1.0]].iter().enumerate() {
            let error = distance(codewords.slice(s![0, code, ..]), centroid) / centroid.dot(centroid).sqrt();
            let share = epsilon / stats.counts()[[0, code]] as f64;
            assert!(error < 10.0 * share && error > 0.01 * share, "{error:e} for {share:e}");
        }
    }
}

fn distance(a: ArrayView1<'_, f64>, b: &Array1<f64>) -> f64 {
    (&a - b).mapv(|e| e * e).sum().sqrt()
}
