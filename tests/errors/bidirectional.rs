//! Bidirectional attention, of one head and over batch x heads.

use ndarray::{Array1, Array2, Array3, Array4, array};
use transformer_vq::attention::bidirectional::{self, Inputs, naive};
use transformer_vq::attention::{BidirectionalAttention, BidirectionalInputs, BidirectionalSaved};
use transformer_vq::codebook::{Codebook, Ema, Estimator};

use super::{BAD, refused};

struct Head {
    q: Array2<f64>,
    codes: Array1<u32>,
    v: Array2<f64>,
    codewords: Array2<f64>,
    mask: Array1<bool>,
}

impl Head {
    fn new() -> Self {
        Head {
            q: Array2::zeros((4, 3)),
            codes: array![0, 1, 4, 4, 2],
            v: Array2::zeros((5, 2)),
            codewords: Array2::zeros((5, 3)),
            mask: array![true, true, false, true, false],
        }
    }

    fn inputs(&self) -> Inputs<'_, f64> {
        Inputs {
            q: self.q.view(),
            codes: self.codes.view(),
            v: self.v.view(),
            codewords: self.codewords.view(),
            key_mask: Some(self.mask.view()),
        }
    }
}

type SpoilHead = fn(&mut Head, f64);

const BAD_HEADS: [(&str, &str, SpoilHead); 10] = [
    ("Shape", "v", |h, _| h.v = Array2::zeros((4, 2))),
    ("Shape", "codewords", |h, _| h.q = Array2::zeros((4, 2))),
    ("Shape", "key_mask", |h, _| h.mask = array![true]),
    ("Empty", "codewords", |h, _| h.codewords = Array2::zeros((0, 3))),
    ("Empty", "codewords", |h, _| (h.q, h.codewords) = (Array2::zeros((4, 0)), Array2::zeros((5, 0)))),
    ("OutOfRange", "codes", |h, _| h.codes[2] = 5), // of a key that does not exist
    ("NotFinite", "q", |h, bad| h.q[[3, 2]] = bad),
    ("NotFinite", "v", |h, bad| h.v[[0, 1]] = bad),
    ("NotFinite", "v", |h, bad| h.v[[4, 0]] = bad), // likewise
    ("NotFinite", "codewords", |h, bad| h.codewords[[3, 0]] = bad),
];

#[test]
fn bad_inputs_of_one_head_are_told_apart() {
    let good = Head::new();
    let saved = || bidirectional::forward(&good.inputs()).unwrap().1;
    let d_out = Array2::zeros((4, 2));
    for bad in BAD {
        for (variant, what, spoil) in BAD_HEADS {
            let mut head = Head::new();
            spoil(&mut head, bad);
            refused(bidirectional::forward(&head.inputs()), variant, what);
            refused(naive::forward(&head.inputs()), variant, what);
            refused(bidirectional::backward(&head.inputs(), saved(), d_out.view()), variant, what);
            refused(naive::backward(&head.inputs(), d_out.view()), variant, what);
        }
        let bad = Array2::from_elem((4, 2), bad);
        refused(bidirectional::backward(&good.inputs(), saved(), bad.view()), "NotFinite", "d_out");
        refused(naive::backward(&good.inputs(), bad.view()), "NotFinite", "d_out");
    }
    let short = Array2::zeros((3, 2));
    refused(bidirectional::backward(&good.inputs(), saved(), short.view()), "Shape", "d_out");
    refused(naive::backward(&good.inputs(), short.view()), "Shape", "d_out");
    let saved_by = |spoil: SpoilHead| {
        let mut head = Head::new();
        spoil(&mut head, 0.0);
        bidirectional::forward(&head.inputs()).unwrap().1
    };
    let backward = |saved| bidirectional::backward(&good.inputs(), saved, d_out.view());
    refused(backward(saved_by(|h, _| h.q = Array2::zeros((3, 3)))), "Shape", "saved.lse");
    refused(backward(saved_by(|h, _| h.v = Array2::zeros((5, 3)))), "Shape", "saved.mean");
    let more_codes: SpoilHead = |h, _| h.codewords = Array2::zeros((6, 3));
    refused(backward(saved_by(more_codes)), "Shape", "saved.codewords");
    // Codes that the saved keys did not have.
    let other_codes: SpoilHead = |h, _| h.codes = array![3, 3, 3, 3, 3];
    refused(backward(saved_by(other_codes)), "Invalid", "codes");
}

#[test]
fn shares_check_codes_and_mask() {
    let d = Array2::<f64>::zeros((3, 2));
    let codes = array![0, 2, 3];
    refused(bidirectional::key_gradient(codes.view(), None, d.view()), "OutOfRange", "codes");
    let (codes, mask) = (array![0, 2], array![true]);
    refused(bidirectional::key_gradient(codes.view(), Some(mask.view()), d.view()), "Shape", "key_mask");
}

const B: usize = 2;
const H: usize = 3;
const G: usize = 2;
const T: usize = 6;
const KEYS: usize = 7;
const S: usize = 5;
const K: usize = 4;
const V: usize = 2;

struct Batch {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    mask: Array2<bool>,
    codebook: Codebook<f32>,
}

fn codebook(dim: (usize, usize, usize)) -> Codebook<f32> {
    Codebook::ema(Ema::from_codewords(Array3::from_shape_fn(dim, |(_, s, _)| s as f32), 0.9).unwrap())
}

impl Batch {
    fn new() -> Self {
        Batch {
            q: Array4::zeros((B, G * H, T, K)),
            k: Array4::zeros((B, H, KEYS, K)),
            v: Array4::zeros((B, H, KEYS, V)),
            mask: Array2::from_shape_fn((B, KEYS), |(b, j)| b == 0 && j < 4),
            codebook: codebook((H, S, K)),
        }
    }

    fn inputs(&self) -> BidirectionalInputs<'_, f32> {
        let key_mask = Some(self.mask.view());
        BidirectionalInputs { q: self.q.view(), k: self.k.view(), v: self.v.view(), key_mask }
    }

    fn saved(&self) -> BidirectionalSaved<f32> {
        BidirectionalAttention::default().forward(&self.inputs(), &self.codebook).unwrap().1
    }
}

type Spoil = fn(&mut Batch, f32);

/// What forward and backward refuse alike.
const BAD_INPUTS: [(&str, &str, Spoil); 14] = [
    ("Shape", "k", |b, _| b.k = Array4::zeros((B + 1, H, KEYS, K))),
    ("Shape", "k", |b, _| b.k = Array4::zeros((B, H, KEYS, K + 1))),
    ("Shape", "k", |b, _| b.k = Array4::zeros((B, H - 1, KEYS, K))),
    ("Shape", "v", |b, _| b.v = Array4::zeros((B, H, KEYS + 1, V))),
    ("Shape", "v", |b, _| b.v = Array4::zeros((B, H + 1, KEYS, V))),
    ("Invalid", "heads of q", |b, _| b.q = Array4::zeros((B, H + 1, T, K))),
    ("Invalid", "heads of q", |b, _| b.q = Array4::zeros((B, 0, T, K))),
    ("Shape", "key_mask", |b, _| b.mask = Array2::from_elem((B, T), true)),
    ("NotFinite", "q", |b, bad| b.q[[1, 2, 5, 3]] = bad),
    ("NotFinite", "q", |b, bad| b.q[[0, 0, 5, 3]] = bad),
    ("NotFinite", "k", |b, bad| b.k[[0, 0, 0, 0]] = bad),
    ("NotFinite", "k", |b, bad| b.k[[1, 2, 6, 3]] = bad), // does not exist
    ("NotFinite", "v", |b, bad| b.v[[0, 1, 3, 1]] = bad),
    ("NotFinite", "v", |b, bad| b.v[[1, 0, 3, 1]] = bad), // likewise
];

#[test]
fn bad_inputs_of_a_batch_are_told_apart() {
    let d_out = Array4::zeros((B, G * H, T, V));
    for attention in [false, true].map(|key_gradient| BidirectionalAttention { key_gradient }) {
        let backward = |batch: &Batch, saved, d_out: &Array4<f32>, weight| {
            let through = Estimator::StraightThrough;
            attention.backward(&batch.inputs(), saved, d_out.view(), through, weight)
        };
        for bad in BAD {
            for (variant, what, spoil) in BAD_INPUTS {
                let mut batch = Batch::new();
                let saved = batch.saved();
                spoil(&mut batch, bad as f32);
                refused(attention.forward(&batch.inputs(), &batch.codebook), variant, what);
                // Backward reads no values.
                if (variant, what) != ("NotFinite", "v") {
                    refused(backward(&batch, saved, &d_out, 0.1), variant, what);
                }
            }
            let batch = Batch::new();
            let mut spoilt = d_out.clone();
            spoilt[[1, 5, 5, 1]] = bad as f32; // of a query that sees nothing
            refused(backward(&batch, batch.saved(), &spoilt, 0.1), "NotFinite", "d_out");
            refused(backward(&batch, batch.saved(), &d_out, bad), "Invalid", "commit_weight");
        }
        let mut batch = Batch::new();
        assert!(backward(&batch, batch.saved(), &d_out, 0.1).is_ok());
        let wide = Array4::zeros((B, G * H, T, V + 1));
        refused(backward(&batch, batch.saved(), &wide, 0.1), "Shape", "d_out");
        for (what, spoil) in [
            ("saved.lse", (|b| b.q = Array4::zeros((B, H, T, K))) as fn(&mut Batch)),
            ("saved.codes", |b| {
                (b.k, b.v, b.mask) = (
                    Array4::zeros((B, H, 1, K)),
                    Array4::zeros((B, H, 1, V)),
                    Array2::from_elem((B, 1), true),
                )
            }),
            ("saved.codewords", |b| {
                (b.q, b.k, b.codebook) =
                    (Array4::zeros((B, H, T, 1)), Array4::zeros((B, H, KEYS, 1)), codebook((H, S, 1)))
            }),
            ("saved.mean", |b| b.v = Array4::zeros((B, H, KEYS, V + 1))),
        ] {
            let mut other = Batch::new();
            spoil(&mut other);
            refused(backward(&batch, other.saved(), &d_out, 0.1), "Shape", what);
        }
        // A mask that shows keys whose codes were not counted.
        batch.k[[0, 0, 6, 0]] = 100.0;
        let saved = batch.saved();
        batch.mask.fill(true);
        refused(backward(&batch, saved, &d_out, 0.1), "Invalid", "key_mask");
        batch.codebook = codebook((H, S, K + 1));
        refused(attention.forward(&batch.inputs(), &batch.codebook), "Shape", "q");
    }
}

#[test]
fn nothing_at_all_is_computed() {
    let attention = BidirectionalAttention { key_gradient: true };
    for (b, t, keys, d_v) in [(0, T, KEYS, V), (B, 0, KEYS, V), (B, T, 0, V), (B, T, KEYS, 0), (0, 0, 0, 0)] {
        let mut batch = Batch::new();
        (batch.q, batch.k) = (Array4::zeros((b, G * H, t, K)), Array4::zeros((b, H, keys, K)));
        (batch.v, batch.mask) = (Array4::zeros((b, H, keys, d_v)), Array2::from_elem((b, keys), true));
        let (output, saved) = attention.forward(&batch.inputs(), &batch.codebook).unwrap();
        assert_eq!((output.out.dim(), output.commit_loss), ((b, G * H, t, d_v), 0.0));
        let d_out = Array4::zeros((b, G * H, t, d_v));
        let through = Estimator::StraightThrough;
        let d = attention.backward(&batch.inputs(), saved, d_out.view(), through, 0.1).unwrap();
        assert_eq!((d.q.dim(), d.v.dim()), ((b, G * H, t, K), (b, H, keys, d_v)));
    }
}
