//! Reading: nothing that a file says is believed before it has been checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ndarray::ArrayD;
use safetensors::tensor::{Dtype, TensorInfo};

use super::{BUFFER_LEN, header};
use crate::{Error, Scalar};

/// A file of named arrays, open for reading. Clones share the open file.
#[derive(Debug, Clone)]
pub struct TensorFile {
    path: PathBuf,
    file: Arc<Mutex<File>>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Where the elements begin, in bytes.
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and checks its header; the arrays stay on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses, [`Error::File`] if this is not a whole and sound file of the format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let problem = |problem: String| Error::File { path: path.to_path_buf(), problem };
        let refused = |e: io::Error| read_error(path, &e);

        let mut file = File::open(path).map_err(refused)?;
        let len = file.metadata().map_err(refused)?.len();
        let Some(after_length) = len.checked_sub(8) else {
            return Err(problem(format!("not a safetensors file: {len} bytes where at least 8 are needed")));
        };
        let mut header_len = [0; 8];
        file.read_exact(&mut header_len).map_err(refused)?;
        let header_len = u64::from_le_bytes(header_len);
        if header_len > after_length.min(header::MAX_LEN as u64) {
            return Err(problem(format!(
                "cut off, or not a safetensors file: the header is said to have {header_len} bytes, the file has {len}"
            )));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(refused)?;
        let header = header::parse(&header).map_err(problem)?;
        let (promised, found) = (header.data_len, after_length - header_len);
        if promised != found {
            return Err(problem(format!(
                "cut off or damaged: the header tells of {promised} bytes of arrays, there are {found}"
            )));
        }
        Ok(TensorFile {
            path: path.to_path_buf(),
            file: Arc::new(Mutex::new(file)),
            metadata: header.metadata,
            tensors: header.tensors,
            data_start: 8 + header_len,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many elements all arrays whose names begin with `prefix` have together.
    pub(crate) fn count_elements(&self, prefix: &str) -> u128 {
        let named = self.tensors.iter().filter(|(name, _)| name.starts_with(prefix));
        named.map(|(_, info)| info.shape.iter().map(|&n| n as u128).product::<u128>()).sum()
    }

    /// The names of the arrays, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of an array, which stays on the disk.
    ///
    /// # Errors
    /// [`Error::File`] if there is none of this name.
    pub fn shape(&self, name: &str) -> Result<&[usize], Error> {
        Ok(&self.info(name)?.shape)
    }

    /// The texts beside the arrays.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Reads an array that is stored as `F32` or `F64` and must have this shape. Numbers are rounded to `T`.
    ///
    /// # Errors
    /// [`Error::File`] names the file, the array, what was expected and what is there. [`Error::Io`] if the system
    /// refuses.
    pub fn array<T: Scalar>(&self, name: &str, expected_shape: &[usize]) -> Result<ArrayD<T>, Error> {
        self.check_shape(name, expected_shape)?;
        self.array_any_shape(name)
    }

    /// Reads an array that is stored as `F32` or `F64`, in the shape that it has. Numbers are rounded to `T`.
    ///
    /// # Errors
    /// Those of [`array`](TensorFile::array), but for the shape.
    pub fn array_any_shape<T: Scalar>(&self, name: &str) -> Result<ArrayD<T>, Error> {
        let info = self.info(name)?;
        match info.dtype {
            Dtype::F32 => self.read(name, info, |x| Ok(T::from_f64(f32::from_le_bytes(x).into()))),
            Dtype::F64 => self.read(name, info, |x| Ok(T::from_f64(f64::from_le_bytes(x)))),
            found => Err(self.problem(format!("tensor `{name}` holds {found}, expected F32 or F64"))),
        }
    }

    /// Reads an array that is stored as `I32`, `I64`, `U32` or `U64` and must have this shape.
    ///
    /// # Errors
    /// Those of [`array`](TensorFile::array); also [`Error::File`] for a number that `N` cannot hold.
    pub fn integers<N: TryFrom<i128>>(
        &self,
        name: &str,
        expected_shape: &[usize],
    ) -> Result<ArrayD<N>, Error> {
        self.check_shape(name, expected_shape)?;
        self.integers_any_shape(name)
    }

    /// Reads an array that is stored as `I32`, `I64`, `U32` or `U64`, in the shape that it has.
    ///
    /// # Errors
    /// Those of [`integers`](TensorFile::integers), but for the shape.
    pub fn integers_any_shape<N: TryFrom<i128>>(&self, name: &str) -> Result<ArrayD<N>, Error> {
        let info = self.info(name)?;
        let fit = |x: i128| {
            let wrong = |_| {
                self.problem(format!(
                    "tensor `{name}` holds {x}, expected numbers that fit a {}",
                    std::any::type_name::<N>()
                ))
            };
            N::try_from(x).map_err(wrong)
        };
        match info.dtype {
            Dtype::I32 => self.read(name, info, |x| fit(i32::from_le_bytes(x).into())),
            Dtype::I64 => self.read(name, info, |x| fit(i64::from_le_bytes(x).into())),
            Dtype::U32 => self.read(name, info, |x| fit(u32::from_le_bytes(x).into())),
            Dtype::U64 => self.read(name, info, |x| fit(u64::from_le_bytes(x).into())),
            found => {
                Err(self.problem(format!("tensor `{name}` holds {found}, expected I32, I64, U32 or U64")))
            }
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, Error> {
        self.tensors.get(name).ok_or_else(|| self.problem(format!("there is no tensor `{name}`")))
    }

    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), Error> {
        let found = self.shape(name)?;
        if found == expected {
            return Ok(());
        }
        Err(self.problem(format!("tensor `{name}` has shape {found:?}, expected {expected:?}")))
    }

    /// Reads the elements, `BYTES` bytes each, of an array whose type has been looked at.
    fn read<const BYTES: usize, V>(
        &self,
        name: &str,
        info: &TensorInfo,
        decode: impl Fn([u8; BYTES]) -> Result<V, Error>,
    ) -> Result<ArrayD<V>, Error> {
        let refused = |e: io::Error| read_error(&self.path, &e);
        let (start, end) = info.data_offsets;
        // A panic elsewhere cannot have left the file in a state that matters: each read seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(refused)?;
        // A file with holes can promise more than any memory holds.
        let mut values = Vec::new();
        values
            .try_reserve_exact((end - start) / BYTES)
            .map_err(|_| self.problem(format!("tensor `{name}` does not fit into memory")))?;
        let mut buffer = vec![0; BUFFER_LEN.min(end - start)];
        let mut left = end - start;
        while left > 0 {
            let bytes = &mut buffer[..BUFFER_LEN.min(left)];
            file.read_exact(bytes).map_err(refused)?;
            left -= bytes.len();
            for &element in bytes.as_chunks().0 {
                values.push(decode(element)?);
            }
        }
        ArrayD::from_shape_vec(info.shape.clone(), values)
            .map_err(|e| self.problem(format!("tensor `{name}` has shape {:?}: {e}", info.shape)))
    }

    fn problem(&self, problem: String) -> Error {
        Error::File { path: self.path.clone(), problem }
    }
}

/// A file that ends too soon has been changed since it was opened; everything else is the system's refusal.
fn read_error(path: &Path, e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::File { path: path.to_path_buf(), problem: "cut off while it was being read".to_string() }
        }
        _ => Error::Io { path: path.to_path_buf(), action: "read", message: e.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, arr0, array};
    use tempfile::TempDir;

    use super::super::Tensor;
    use super::*;

    fn small() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small.safetensors");
        let (x, n) = (array![[1.5f32, -2.0, 3.25], [0.0, 7.0, 1e30]], Array1::from(vec![-1i64, 1 << 40]));
        let (y, k) = (array![0.1f64, 1e300], arr0(7u32));
        let tensors = [
            Tensor::new("x", x.view()),
            Tensor::new("n", n.view()),
            Tensor::new("y", y.view()),
            Tensor::new("k", k.view()),
        ];
        let texts = BTreeMap::from([("key".to_string(), "value".to_string())]);
        TensorFile::write(&path, tensors, &texts).unwrap();
        (folder, path)
    }

    /// Writes these bytes to a file, opens it, and reads all that is there, by its name and as every type.
    fn read_all(path: &Path, bytes: &[u8]) -> Result<(), Error> {
        std::fs::write(path, bytes).unwrap();
        let file = TensorFile::open(path)?;
        for name in file.names() {
            let (a, b) = (file.array_any_shape::<f32>(name), file.array_any_shape::<f64>(name));
            let (c, d) = (file.integers_any_shape::<i64>(name), file.integers_any_shape::<u32>(name));
            if let (Err(e), Err(_), Err(_), Err(_)) = (a, b, c, d) {
                return Err(e);
            }
        }
        Ok(())
    }

    fn with_header(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn problem(result: Result<impl std::fmt::Debug, Error>) -> String {
        match result {
            Err(Error::File { problem, .. }) => problem,
            other => panic!("expected Error::File, got {other:?}"),
        }
    }

    #[test]
    fn numbers_are_converted() {
        let (_folder, path) = small();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["k", "n", "x", "y"]);
        assert_eq!(file.metadata()["key"], "value");
        assert_eq!((file.shape("x"), file.shape("k")), (Ok(&[2, 3][..]), Ok(&[][..])));
        assert!(problem(file.shape("z")).contains("no tensor `z`"));
        let x = array![[1.5, -2.0, 3.25], [0.0, 7.0, f64::from(1e30f32)]].into_dyn();
        assert_eq!(file.array::<f64>("x", &[2, 3]), Ok(x));
        assert_eq!(file.array::<f32>("y", &[2]), Ok(array![0.1f32, f32::INFINITY].into_dyn()));
        assert_eq!(file.integers::<i64>("n", &[2]), Ok(array![-1i64, 1 << 40].into_dyn()));
        assert_eq!(file.integers::<usize>("k", &[]), Ok(arr0(7usize).into_dyn()));
        let again = file.clone();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(again.integers_any_shape::<u64>("k"), file.integers_any_shape::<u64>("k"));
    }

    #[test]
    fn wrong_expectations_are_named() {
        let (_folder, path) = small();
        let file = TensorFile::open(&path).unwrap();
        assert!(problem(file.array::<f32>("z", &[2])).contains("no tensor `z`"));
        assert!(problem(file.integers::<i64>("z", &[2])).contains("no tensor `z`"));
        let shapes = problem(file.array::<f32>("x", &[3, 2]));
        assert!(shapes.contains("`x`") && shapes.contains("[2, 3]") && shapes.contains("[3, 2]"), "{shapes}");
        assert!(problem(file.integers::<i64>("n", &[])).contains("has shape [2], expected []"));
        assert!(problem(file.array::<f32>("n", &[2])).contains("`n` holds I64, expected F32 or F64"));
        assert!(problem(file.integers::<i64>("x", &[2, 3])).contains("`x` holds F32, expected I32"));
        assert!(
            problem(file.integers::<u64>("n", &[2]))
                .contains("`n` holds -1, expected numbers that fit a u64")
        );
        let message = file.array::<f32>("z", &[2]).unwrap_err().to_string();
        assert!(message.starts_with(path.to_str().unwrap()), "{message}");
    }

    #[test]
    fn every_cut_and_every_appendix_is_noticed() {
        let (_folder, path) = small();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(read_all(&path, &bytes), Ok(()));
        for len in 0..bytes.len() {
            problem(read_all(&path, &bytes[..len]));
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(problem(read_all(&path, &longer)).contains("cut off or damaged"));
        // Cut while it is open.
        std::fs::write(&path, &bytes).unwrap();
        let file = TensorFile::open(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 - 9).unwrap();
        assert!(problem(file.array_any_shape::<f32>("x")).contains("cut off while"));
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let (_folder, path) = small();
        let bytes = std::fs::read(&path).unwrap();
        let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut noticed = 0;
        for place in 0..header_end {
            for flip in (0..8).map(|bit| 1 << bit).chain([0xff]) {
                let mut damaged = bytes.clone();
                damaged[place] ^= flip;
                noticed += usize::from(read_all(&path, &damaged).is_err());
            }
        }
        assert!(noticed > header_end * 9 / 2, "only {noticed} of {} were noticed", header_end * 9);
    }

    #[test]
    fn hostile_and_foreign_files_are_refused() {
        let (_folder, path) = small();
        for len in [1 << 20, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63, u64::MAX - 7, u64::MAX] {
            let mut bytes = len.to_le_bytes().to_vec();
            bytes.extend(b"{}      ");
            assert!(problem(read_all(&path, &bytes)).contains(&len.to_string()));
        }
        // A file that is really that long, but for holes.
        std::fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(300_000_000).unwrap();
        problem(TensorFile::open(&path));

        let entry = |name: &str, dtype: &str, shape: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        assert_eq!(read_all(&path, &with_header("{}", 0)), Ok(()));
        assert!(problem(read_all(&path, &with_header("{\"a\":{}}", 0))).contains("cannot be read"));
        let huge = entry("a", "F32", "[0,9223372036854775808]", "[0,0]");
        assert!(problem(read_all(&path, &with_header(&format!("{{{huge}}}"), 0))).contains("`a` has shape"));
        let half = entry("a", "F16", "[4]", "[0,8]");
        assert!(problem(read_all(&path, &with_header(&format!("{{{half}}}"), 8))).contains("F16"));
        problem(read_all(&path, b"PK\x03\x04 an archive of another program, which is not read here"));
    }

    #[test]
    fn what_the_system_refuses_is_said_in_its_words() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("missing"), folder.path().to_path_buf()] {
            let error = TensorFile::open(&path).unwrap_err();
            assert!(matches!(&error, Error::Io { action: "read", .. } | Error::File { .. }), "{error}");
        }
    }
}
