//! Writing: the header is made from views of the arrays, then each array is converted and written in turn.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use ndarray::{ArrayView, ArrayViewD, Dimension};
use safetensors::tensor::Dtype;

use super::{BUFFER_LEN, TensorFile, header};
use crate::model::write_atomically;
use crate::{Error, Scalar};

/// A type of element that can be written: `f32`, `f64`, `u32`, `u64` or `i64`.
pub trait Element: Copy + fmt::Debug + Send + Sync {
    /// What the format calls it.
    const DTYPE: Dtype;
    /// Appends the little-endian bytes.
    fn append_to(self, bytes: &mut Vec<u8>);
}

impl<T: Scalar> Element for T {
    const DTYPE: Dtype = if size_of::<T>() == size_of::<f32>() { Dtype::F32 } else { Dtype::F64 };

    fn append_to(self, bytes: &mut Vec<u8>) {
        match T::DTYPE {
            Dtype::F32 => bytes.extend((self.as_f64() as f32).to_le_bytes()),
            _ => bytes.extend(self.as_f64().to_le_bytes()),
        }
    }
}

impl Element for u32 {
    const DTYPE: Dtype = Dtype::U32;

    fn append_to(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for u64 {
    const DTYPE: Dtype = Dtype::U64;

    fn append_to(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for i64 {
    const DTYPE: Dtype = Dtype::I64;

    fn append_to(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

/// An array whose element type is known to itself alone.
trait Elements: fmt::Debug + Send + Sync {
    fn dtype(&self) -> Dtype;
    fn shape(&self) -> &[usize];
    fn write_to(&self, out: &mut dyn Write) -> io::Result<()>;
}

impl<E: Element> Elements for ArrayViewD<'_, E> {
    fn dtype(&self) -> Dtype {
        E::DTYPE
    }

    fn shape(&self) -> &[usize] {
        (**self).shape()
    }

    fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(BUFFER_LEN);
        for &x in self {
            if bytes.len() == BUFFER_LEN {
                out.write_all(&bytes)?;
                bytes.clear();
            }
            x.append_to(&mut bytes);
        }
        out.write_all(&bytes)
    }
}

/// A view of an array and the name that it is to be written under.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    name: String,
    elements: Arc<dyn Elements + 'a>,
}

impl<'a> Tensor<'a> {
    /// Names an array of `f32`, `f64`, `u32`, `u64` or `i64`, of any shape and layout.
    pub fn new<E: Element, D: Dimension>(name: impl Into<String>, array: ArrayView<'a, E, D>) -> Self {
        Tensor { name: name.into(), elements: Arc::new(array.into_dyn()) }
    }
}

impl TensorFile {
    /// Writes arrays and texts, in place of what stood there, all or nothing. The same arrays give the same bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; then the old file, if there was one, is untouched. [`Error::Invalid`] for a
    /// name that comes twice or is the format's own `__metadata__`, and for a header above 100 MB; [`Error::TooLarge`]
    /// for arrays that no file could hold.
    pub fn write<'a>(
        path: impl AsRef<Path>,
        tensors: impl IntoIterator<Item = Tensor<'a>>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let mut tensors: Vec<Tensor<'a>> = tensors.into_iter().collect();
        // Wide elements first, so that each array starts at a multiple of its element's size.
        tensors.sort_by(|a, b| {
            (Reverse(a.elements.dtype()), &a.name).cmp(&(Reverse(b.elements.dtype()), &b.name))
        });
        let described = tensors.iter().map(|t| (t.name.as_str(), t.elements.dtype(), t.elements.shape()));
        let header = header::compose(described, metadata)?;
        write_atomically(path, |out| {
            out.write_all(&(header.len() as u64).to_le_bytes())?;
            out.write_all(&header)?;
            tensors.iter().try_for_each(|tensor| tensor.elements.write_to(out))
        })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, Array3, arr0, s};
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn every_type_and_layout_comes_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all.safetensors");
        // Bit patterns over the whole range: subnormal numbers, infinities, minus zero, NaN.
        let mut bits = 1u64;
        let mut next = || {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bits ^ (bits >> 29)
        };
        let quiet = |x: u32| if f32::from_bits(x).is_nan() { x | 0x0040_0000 } else { x };
        let single = Array2::from_shape_fn((300, 170), |_| f32::from_bits(quiet((next() >> 32) as u32)));
        let double = Array3::from_shape_fn((2, 5, 3), |_| f64::from_bits(next()));
        let special = Array1::from(vec![-0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE / 4.0]);
        let (seed, empty) = (arr0(u64::MAX), Array2::<f64>::zeros((0, 4)));
        let (codes, steps) = (Array1::from(vec![0, u32::MAX]), Array1::from(vec![i64::MIN, i64::MAX]));
        let texts = BTreeMap::from([("config".to_string(), "{\"a\": 1}".to_string())]);
        let tensors = || {
            [
                Tensor::new("single", single.view()),
                Tensor::new("transposed", single.t()),
                Tensor::new("every other", single.slice(s![..;2, ..;-1])),
                Tensor::new("double", double.view()),
                Tensor::new("special", special.view()),
                Tensor::new("seed", seed.view()),
                Tensor::new("empty", empty.view()),
                Tensor::new("codes", codes.view()),
                Tensor::new("steps", steps.view()),
            ]
        };
        TensorFile::write(&path, tensors(), &texts).unwrap();

        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata(), &texts);
        let f32_bits = |name: &str| file.array_any_shape::<f32>(name).unwrap().mapv(f32::to_bits);
        assert_eq!(f32_bits("single"), single.mapv(f32::to_bits).into_dyn());
        assert_eq!(f32_bits("transposed"), single.t().mapv(f32::to_bits).into_dyn());
        assert_eq!(f32_bits("every other"), single.slice(s![..;2, ..;-1]).mapv(f32::to_bits).into_dyn());
        assert_eq!(f32_bits("special"), special.mapv(f32::to_bits).into_dyn());
        let got = file.array::<f64>("double", &[2, 5, 3]).unwrap();
        assert_eq!(got.mapv(f64::to_bits), double.mapv(f64::to_bits).into_dyn());
        assert_eq!(file.array::<f64>("empty", &[0, 4]).unwrap(), empty.clone().into_dyn());
        assert_eq!(file.integers::<u64>("seed", &[]).unwrap(), seed.clone().into_dyn());
        assert_eq!(file.integers::<i64>("codes", &[2]).unwrap(), codes.mapv(i64::from).into_dyn());
        assert_eq!(file.integers::<i64>("steps", &[2]).unwrap(), steps.clone().into_dyn());

        // Any order gives the same bytes, and the format's own library reads them.
        let bytes = std::fs::read(&path).unwrap();
        let mut reversed = tensors();
        reversed.reverse();
        TensorFile::write(&path, reversed, &texts).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.len(), 9);
        let start = bytes.as_ptr() as usize;
        for (name, tensor) in theirs.tensors() {
            let offset = tensor.data().as_ptr() as usize - start;
            let aligned = offset.is_multiple_of(tensor.dtype().bitsize() / 8);
            assert!(aligned || tensor.data().is_empty(), "{name}");
        }
        assert_eq!(theirs.tensor("codes").unwrap().data(), [0, 0, 0, 0, 255, 255, 255, 255]);
    }

    #[test]
    fn arrays_around_the_size_of_the_buffer_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let full = BUFFER_LEN / size_of::<u32>();
        for len in [0, 1, full - 1, full, full + 1, 2 * full, 2 * full + 1] {
            let x = Array1::from_iter(1..=len as u32);
            TensorFile::write(&path, [Tensor::new("x", x.view())], &BTreeMap::new()).unwrap();
            assert_eq!(TensorFile::open(&path).unwrap().integers::<u32>("x", &[len]), Ok(x.into_dyn()));
        }
    }

    #[test]
    fn what_is_refused_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let one = Array1::from(vec![1.0f64]);
        let twice = [Tensor::new("a", one.view()), Tensor::new("a", one.view())];
        let error = TensorFile::write(&path, twice, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "tensors", .. }), "{error}");
        assert!(!path.exists());
        let nowhere = folder.path().join("missing").join("file");
        let error = TensorFile::write(&nowhere, [], &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Io { action: "write", .. }), "{error}");
    }
}
