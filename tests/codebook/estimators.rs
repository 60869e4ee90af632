//! Gradients through the quantizer: each estimator against its definition, written out a second time with matrices.

use crate::support::normal;
use ndarray::{Array1, Array2, Array3, Array4, ArrayView1, Axis, array, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::check::{finite_difference, relative_rms};
use transformer_vq::codebook::{Codebook, Estimator, Rotation, RotationScale, RotationVariant, lookup};
use transformer_vq::{Error, Scalar, ndarray};

const SIZES: [[usize; 5]; 6] = // B, H, T, K, S
    [
        [1, 1, 1, 2, 1],
        [2, 3, 7, 3, 5],
        [1, 1, 700, 16, 17],
        [1, 2, 20, 33, 70],
        [2, 2, 0, 3, 4],
        [1, 1, 9, 128, 2],
    ];

pub fn rotation(variant: RotationVariant, scale: RotationScale) -> Estimator {
    Estimator::Rotation(Rotation { variant, scale })
}

pub fn rotations() -> Vec<(RotationVariant, RotationScale)> {
    let scales = [RotationScale::Ratio, RotationScale::AtMost(0.9), RotationScale::One];
    let variants = [RotationVariant::Paper, RotationVariant::Normalized];
    variants.into_iter().flat_map(|variant| scales.map(|scale| (variant, scale))).collect()
}

pub fn estimators() -> Vec<Estimator> {
    let mut all = vec![Estimator::StraightThrough, Estimator::Directional, Estimator::None];
    all.extend(rotations().into_iter().map(|(variant, scale)| rotation(variant, scale)));
    all
}

pub struct Case<T> {
    pub keys: Array4<T>,
    pub codes: Array3<u32>,
    pub codewords: Array3<T>,
    pub d: Array4<T>,
}

pub fn case<T: Scalar>([b, h, t, k, n_codes]: [usize; 5]) -> Case<T> {
    let mut rng = ChaCha8Rng::seed_from_u64((t + k) as u64);
    Case {
        keys: normal(&mut rng, (b, h, t, k)),
        codewords: normal(&mut rng, (h, n_codes, k)),
        d: normal(&mut rng, (b, h, t, k)),
        codes: Array3::from_shape_simple_fn((b, h, t), || rng.random_range(0..n_codes as u32)),
    }
}

impl<T: Scalar> Case<T> {
    pub fn key_gradient(&self, estimator: Estimator) -> Array4<T> {
        let Case { keys, codes, codewords, d } = self;
        estimator.key_gradient(keys.view(), codes.view(), codewords.view(), d.clone()).unwrap()
    }

    pub fn codeword_gradient(&self, estimator: Estimator) -> Array3<T> {
        let Case { keys, codes, codewords, d } = self;
        estimator.codeword_gradient(keys.view(), codes.view(), codewords.view(), d.view()).unwrap()
    }

    /// Calls `f(index, key, codeword, g)` for every key.
    pub fn rows(
        &self,
        mut f: impl FnMut([usize; 3], ArrayView1<'_, T>, ArrayView1<'_, T>, ArrayView1<'_, T>),
    ) {
        for ((b, h, t), &code) in self.codes.indexed_iter() {
            let of = s![b, h, t, ..];
            let codeword = self.codewords.slice(s![h, code as usize, ..]);
            f([b, h, t], self.keys.slice(of), codeword, self.d.slice(of));
        }
    }
}

fn outer(a: &Array1<f64>, b: &Array1<f64>) -> Array2<f64> {
    a.view().insert_axis(Axis(1)).dot(&b.view().insert_axis(Axis(0)))
}

pub fn length(x: &Array1<f64>) -> f64 {
    x.dot(x).sqrt()
}

/// R of the paper.
pub fn dense(key: ArrayView1<'_, f64>, codeword: ArrayView1<'_, f64>) -> Array2<f64> {
    let (key, codeword) = (key.to_owned(), codeword.to_owned());
    let (u, c) = (&key / length(&key), &codeword / length(&codeword));
    let t = &u + &c;
    let t = &t / length(&t);
    Array2::eye(key.len()) - outer(&t, &t) * 2.0 + outer(&c, &u) * 2.0
}

/// lambda, and lambda (I - u u^T for `Normalized`) R^T.
pub fn dense_backward(
    (variant, scale): (RotationVariant, RotationScale),
    key: ArrayView1<'_, f64>,
    codeword: ArrayView1<'_, f64>,
) -> (f64, Array2<f64>) {
    let ratio = length(&codeword.to_owned()) / length(&key.to_owned());
    let lambda = match scale {
        RotationScale::Ratio => ratio,
        RotationScale::AtMost(most) => ratio.min(most),
        RotationScale::One => 1.0,
    };
    let back = dense(key, codeword).reversed_axes() * lambda;
    let u = key.to_owned() / length(&key.to_owned());
    let kept = Array2::eye(key.len()) - outer(&u, &u);
    (lambda, if variant == RotationVariant::Normalized { kept.dot(&back) } else { back })
}

/// 1e-13, which is far above what the sums lose and far below any term.
#[test]
fn rotation_is_the_dense_matrix() {
    for size in SIZES {
        let case = case::<f64>(size);
        for (variant, scale) in rotations() {
            let got = case.key_gradient(rotation(variant, scale));
            let mut expected = Array4::zeros(got.raw_dim());
            case.rows(|[b, h, t], key, codeword, g| {
                let (_, back) = dense_backward((variant, scale), key, codeword);
                expected.slice_mut(s![b, h, t, ..]).assign(&back.dot(&g));
            });
            let error = relative_rms(&got, &expected);
            assert!(error <= 1e-13, "{variant:?} {scale:?} {size:?}: {error:e}");
        }
    }
}

/// What is constant in the surrogate is taken at the unmoved keys.
#[test]
fn key_gradients_equal_finite_differences_of_the_surrogates() {
    for size in [[1, 1, 1, 2, 1], [2, 2, 5, 3, 4], [1, 1, 4, 17, 3]] {
        let case = case::<f64>(size);
        for estimator in estimators() {
            let surrogate = |keys: ndarray::ArrayView4<'_, f64>, codewords: &Array3<f64>| {
                let mut total = 0.0;
                case.rows(|[b, h, t], base, base_codeword, g| {
                    let key = keys.slice(s![b, h, t, ..]);
                    let codeword = codewords.slice(s![h, case.codes[[b, h, t]] as usize, ..]);
                    let (key, base) = (key.to_owned(), base.to_owned());
                    total += match estimator {
                        Estimator::StraightThrough => (&key - &base + codeword).dot(&g),
                        Estimator::Directional => {
                            let e = &base_codeword - &base;
                            let t = &e / length(&e);
                            (&key + &t * length(&(&codeword - &key))).dot(&g)
                        }
                        Estimator::Rotation(Rotation { variant: RotationVariant::Paper, scale }) => {
                            let (_, back) =
                                dense_backward((RotationVariant::Paper, scale), base.view(), base_codeword);
                            back.t().dot(&(&key - &base)).dot(&g)
                        }
                        Estimator::Rotation(Rotation { scale, .. }) => {
                            let (lambda, _) =
                                dense_backward((RotationVariant::Paper, scale), base.view(), base_codeword);
                            let r = dense(base.view(), base_codeword);
                            r.dot(&(&key / length(&key))).dot(&g) * lambda * length(&base)
                        }
                        _ => base_codeword.dot(&g),
                    };
                });
                total
            };
            let got = case.key_gradient(estimator);
            let expected = finite_difference(|keys| surrogate(keys, &case.codewords), &case.keys, 1e-3);
            assert!(relative_rms(&got, &expected) <= 1e-8, "{estimator:?}");
            if estimator == Estimator::Directional {
                let f = |codewords: ndarray::ArrayView3<'_, f64>| {
                    surrogate(case.keys.view(), &codewords.to_owned())
                };
                let expected = finite_difference(f, &case.codewords, 1e-3);
                assert!(relative_rms(&case.codeword_gradient(estimator), &expected) <= 1e-8);
            }
        }
    }
}

/// It is the derivative of the look-up; under the directional estimator keys and codewords share the gradient.
#[test]
fn codeword_gradients_are_sums_over_keys() {
    for size in SIZES {
        let case = case::<f64>(size);
        for estimator in estimators() {
            let d_keys = case.key_gradient(estimator);
            let mut expected = Array3::<f64>::zeros(case.codewords.raw_dim());
            case.rows(|[b, h, t], _, _, g| {
                let code = case.codes[[b, h, t]] as usize;
                let mut sum = expected.slice_mut(s![h, code, ..]);
                sum += &g;
                if estimator == Estimator::Directional {
                    sum -= &d_keys.slice(s![b, h, t, ..]);
                }
            });
            let error = relative_rms(&case.codeword_gradient(estimator), &expected);
            assert!(error <= 1e-13, "{estimator:?} {size:?}: {error:e}");
        }
    }
    let case = case::<f64>(SIZES[1]);
    let f = |codewords: ndarray::ArrayView3<'_, f64>| {
        (&lookup(case.codes.view(), codewords).unwrap() * &case.d).sum()
    };
    let expected = finite_difference(f, &case.codewords, 1e-2);
    assert!(relative_rms(&case.codeword_gradient(Estimator::StraightThrough), &expected) <= 1e-10);
}

#[test]
fn straight_through_passes_everything_and_none_nothing() {
    let case = case::<f32>(SIZES[1]);
    assert_eq!(case.key_gradient(Estimator::StraightThrough), case.d);
    assert_eq!(case.key_gradient(Estimator::None), Array4::<f32>::zeros(case.d.raw_dim()));
}

#[test]
fn the_quantized_key_is_the_codeword_bit_for_bit() {
    let Case { keys, codewords, .. } = case::<f32>([2, 3, 50, 8, 6]);
    let codebook = Codebook::frozen(codewords.clone()).unwrap();
    let codes = codebook.assign(keys.view()).unwrap();
    let quantized = lookup(codes.view(), codebook.codewords().view()).unwrap();
    for ((b, h, t), &code) in codes.indexed_iter() {
        assert_eq!(quantized.slice(s![b, h, t, ..]), codewords.slice(s![h, code as usize, ..]));
    }
}

#[test]
fn rotation_keeps_lengths_and_angles() {
    let paper = rotation(RotationVariant::Paper, RotationScale::Ratio);
    let normalized = rotation(RotationVariant::Normalized, RotationScale::Ratio);
    for size in SIZES {
        let case = case::<f64>(size);
        let (d, d_normalized) = (case.key_gradient(paper), case.key_gradient(normalized));
        case.rows(|[b, h, t], key, codeword, g| {
            let (key, codeword, g) = (key.to_owned(), codeword.to_owned(), g.to_owned());
            let d = d.slice(s![b, h, t, ..]).to_owned();
            let lambda = length(&codeword) / length(&key);
            assert!((length(&d) / (lambda * length(&g)) - 1.0).abs() < 1e-12);
            let cosine = |x: &Array1<f64>, y: &Array1<f64>| x.dot(y) / (length(x) * length(y));
            assert!((cosine(&d, &key) - cosine(&g, &codeword)).abs() < 1e-12);
            // The other variant has no part along the key.
            let radial = d_normalized.slice(s![b, h, t, ..]).dot(&key);
            assert!(radial.abs() < 1e-12 * lambda * length(&g) * length(&key));
        });
    }
    // What is orthogonal to key and codeword is stretched only; what is along the codeword goes along the key.
    let keys = array![[[[1.0, 1.0, 0.0]], [[3.0, 0.0, 4.0]]]];
    let codewords = array![[[0.0, 2.0, 0.0]], [[0.0, 10.0, 0.0]]];
    let (codes, d) = (Array3::zeros((1, 2, 1)), array![[[[0.0, 0.0, 5.0]], [[0.0, 1.0, 0.0]]]]);
    let d = paper.key_gradient(keys.view(), codes.view(), codewords.view(), d).unwrap();
    let expected = array![[[[0.0, 0.0, 5.0 * 2f64.sqrt()]], [[1.2, 0.0, 1.6]]]];
    assert!(relative_rms(&d, &expected) < 1e-15);
}

/// <g, J v> = <J^T g, v>, J v by the dense matrix.
#[test]
fn rotation_is_the_adjoint_of_its_forward() {
    let case = case::<f64>([1, 1, 40, 6, 5]);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for (variant, scale) in rotations() {
        let d = case.key_gradient(rotation(variant, scale));
        case.rows(|[b, h, t], key, codeword, g| {
            let v: Array1<f64> = normal(&mut rng, 6);
            let forward = dense_backward((variant, scale), key, codeword).1.reversed_axes();
            let (there, back) = (forward.dot(&v).dot(&g), d.slice(s![b, h, t, ..]).dot(&v));
            assert!((there - back).abs() < 1e-12);
        });
    }
}

#[test]
fn f32_agrees_with_f64() {
    for size in SIZES {
        let double = case::<f64>(size);
        let single = Case {
            keys: double.keys.mapv(|x| x as f32),
            codes: double.codes.clone(),
            codewords: double.codewords.mapv(|x| x as f32),
            d: double.d.mapv(|x| x as f32),
        };
        for estimator in estimators() {
            let error = relative_rms(&single.key_gradient(estimator), &double.key_gradient(estimator));
            assert!(error < 1e-5, "{estimator:?}: {error:e}");
            let error =
                relative_rms(&single.codeword_gradient(estimator), &double.codeword_gradient(estimator));
            assert!(error < 1e-5, "{estimator:?}: {error:e}");
        }
    }
}

#[test]
fn strides_and_threads_change_no_bit() {
    let Case { keys, codes, codewords, d } = case::<f32>([2, 3, 600, 9, 5]);
    for estimator in estimators() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let d_keys = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), d.clone());
                let d_codewords =
                    estimator.codeword_gradient(keys.view(), codes.view(), codewords.view(), d.view());
                (d_keys.unwrap(), d_codewords.unwrap())
            })
        };
        let expected = run(1);
        assert_eq!(run(3), expected);
        // Token by token in memory, as attention has it; and dimension by dimension.
        for axes in [[0, 2, 1, 3], [3, 0, 2, 1]] {
            let back = |x: &Array4<f32>| {
                let moved = x.view().permuted_axes(axes).as_standard_layout().into_owned();
                let mut inverse = [0; 4];
                axes.into_iter().enumerate().for_each(|(i, axis)| inverse[axis] = i);
                moved.permuted_axes(inverse)
            };
            let (keys, d, codewords) = (back(&keys), back(&d), codewords.clone().reversed_axes());
            let codewords = codewords.as_standard_layout().into_owned().reversed_axes();
            assert!(!keys.is_standard_layout() && !codewords.is_standard_layout());
            let d_codewords =
                estimator.codeword_gradient(keys.view(), codes.view(), codewords.view(), d.view()).unwrap();
            let d_keys = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), d).unwrap();
            assert_eq!((d_keys, d_codewords), expected);
        }
    }
}

#[test]
fn bad_input_is_refused() {
    let Case { keys, codes, codewords, d } = case::<f64>([2, 3, 300, 4, 5]);
    let both = |estimator: Estimator,
                keys: &Array4<f64>,
                codes: &Array3<u32>,
                codewords: &Array3<f64>,
                d: &Array4<f64>| {
        let a =
            estimator.codeword_gradient(keys.view(), codes.view(), codewords.view(), d.view()).unwrap_err();
        let b = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), d.clone()).unwrap_err();
        assert_eq!(a, b);
        a
    };
    for most in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let estimator = rotation(RotationVariant::Paper, RotationScale::AtMost(most));
        let error = both(estimator, &keys, &codes, &codewords, &d);
        assert!(matches!(error, Error::Invalid { what: "scale", .. }), "{error}");
    }
    for estimator in estimators() {
        let shape = |what: &str, error| {
            assert!(matches!(&error, Error::Shape { what: w, .. } if *w == what), "{error}")
        };
        shape("codes", both(estimator, &keys, &Array3::zeros((2, 3, 299)), &codewords, &d));
        shape("codewords", both(estimator, &keys, &codes, &Array3::zeros((3, 5, 3)), &d));
        shape("codewords", both(estimator, &keys, &codes, &Array3::zeros((2, 5, 4)), &d));
        shape("d_quantized", both(estimator, &keys, &codes, &codewords, &Array4::zeros((2, 3, 300, 3))));
        let mut beyond = codes.clone();
        beyond[[1, 0, 2]] = 5;
        let error = both(estimator, &keys, &beyond, &codewords, &d);
        assert!(matches!(error, Error::OutOfRange { what: "codes", got: 5, limit: 5, .. }));
        for bad in [f64::NAN, f64::INFINITY] {
            let place = [1, 2, 290, 3];
            let at = |x: &Array4<f64>| {
                let mut x = x.clone();
                x[place] = bad;
                x
            };
            let not_finite = |what| Error::NotFinite { what, index: place.to_vec(), value: bad.to_string() };
            assert_eq!(both(estimator, &at(&keys), &codes, &codewords, &d), not_finite("keys"));
            assert_eq!(both(estimator, &keys, &codes, &codewords, &at(&d)), not_finite("d_quantized"));
            let error = both(estimator, &keys, &codes, &(&codewords * bad), &d);
            assert!(matches!(error, Error::NotFinite { what: "codewords", .. }));
        }
    }
}
