//! Text as bytes: a token is a byte, and the target of each token is the byte after it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ndarray::Array2;

use crate::Error;

/// A text held in memory. Clones share it.
#[derive(Debug, Clone)]
pub struct ByteText {
    bytes: Arc<Vec<u8>>,
}

impl ByteText {
    /// The part of a text that is usually held out.
    pub const VALIDATION_FRACTION: f64 = 0.1;

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::File`] if there is nothing in it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let read = std::fs::read(path);
        let bytes =
            read.map_err(|e| Error::Io { path: path.to_path_buf(), action: "read", message: e.to_string() })?;
        ByteText::from_bytes(bytes)
            .map_err(|_| Error::File { path: path.to_path_buf(), problem: "the text is empty".to_string() })
    }

    /// Takes a text that is in memory already.
    ///
    /// # Errors
    /// [`Error::Empty`] if there is nothing in it.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Err(Error::Empty { what: "text" });
        }
        Ok(ByteText { bytes: Arc::new(bytes) })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where the training part and the validation part lie: the last `validation_fraction` of the bytes, rounded down,
    /// is held out. A fraction of 0 holds nothing out.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the fraction is not in [0, 1), or is not 0 and would still hold out no byte.
    pub fn split(&self, validation_fraction: f64) -> Result<(Range<usize>, Range<usize>), Error> {
        if !(0.0..1.0).contains(&validation_fraction) {
            return Err(Error::invalid("validation_fraction", "in [0, 1)", validation_fraction));
        }
        let len = self.bytes.len();
        // A fraction below 1 is so by half a unit in the last place at least, so its product with `len` is below `len`.
        let held_out = (len as f64 * validation_fraction) as usize;
        if held_out == 0 && validation_fraction > 0.0 {
            let expected = format!("0, or at least 1 / {len}: the text has {len} bytes");
            return Err(Error::invalid("validation_fraction", expected, validation_fraction));
        }
        Ok((0..len - held_out, len - held_out..len))
    }

    /// Cuts a range into consecutive pieces of `piece_len` tokens, the last one as short as it comes, and predicts each
    /// byte of it once.
    ///
    /// The byte before the range is fed as context of its first byte. Only where there is none, at the very beginning of
    /// the text, the first byte is fed without being predicted.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `piece_len` is 0, or the range reaches beyond the text or has no byte to predict.
    pub fn pieces(&self, range: Range<usize>, piece_len: usize) -> Result<Pieces, Error> {
        if piece_len == 0 {
            return Err(Error::invalid("piece_len", "at least 1", piece_len));
        }
        self.check_range(&range)?;
        let next = range.start.saturating_sub(1);
        if range.is_empty() || range.end - next < 2 {
            let expected = "a range with at least one byte that has another before it";
            return Err(Error::invalid("range", expected, format!("{range:?}")));
        }
        Ok(Pieces { text: self.clone(), next, last: range.end - 1, piece_len })
    }

    /// Checks that a range lies inside the text.
    pub(super) fn check_range(&self, range: &Range<usize>) -> Result<(), Error> {
        if range.start <= range.end && range.end <= self.bytes.len() {
            return Ok(());
        }
        Err(Error::invalid("range", format!("within 0..{}", self.bytes.len()), format!("{range:?}")))
    }
}

/// Consecutive pieces of a text, each as `(tokens, targets)` of shape [1, n]; see [`ByteText::pieces`].
#[derive(Debug, Clone)]
pub struct Pieces {
    text: ByteText,
    /// The next token to feed.
    next: usize,
    /// The byte that is predicted last.
    last: usize,
    piece_len: usize,
}

impl Iterator for Pieces {
    type Item = (Array2<u32>, Array2<u32>);

    fn next(&mut self) -> Option<Self::Item> {
        let len = self.piece_len.min(self.last - self.next);
        if len == 0 {
            return None;
        }
        let bytes = &self.text.bytes[self.next..self.next + len + 1];
        self.next += len;
        let row = |bytes: &[u8]| Array2::from_shape_fn((1, len), |(_, i)| u32::from(bytes[i]));
        Some((row(bytes), row(&bytes[1..])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text whose bytes tell where they are, up to 251.
    fn text(len: usize) -> ByteText {
        ByteText::from_bytes((0..len).map(|i| (i % 251) as u8).collect()).unwrap()
    }

    #[test]
    fn pieces_predict_each_byte_once() {
        let text = text(60);
        for range in [0..60, 0..2, 1..2, 1..60, 50..60, 59..60, 13..40] {
            for piece_len in [1, 2, 3, 7, 59, 60, 1000] {
                let mut stream: Vec<u32> = Vec::new();
                for (tokens, targets) in text.pieces(range.clone(), piece_len).unwrap() {
                    assert_eq!(tokens.dim(), targets.dim());
                    assert!(tokens.ncols() >= 1 && tokens.ncols() <= piece_len && tokens.nrows() == 1);
                    assert_eq!(targets, &tokens + 1, "each byte is fed just before it is predicted");
                    stream.extend(&targets);
                }
                let expected: Vec<u32> = (range.start.max(1) as u32..range.end as u32).collect();
                assert_eq!(stream, expected, "{range:?} in pieces of {piece_len}");
            }
        }
        let lens: Vec<usize> = text.pieces(10..20, 4).unwrap().map(|(tokens, _)| tokens.ncols()).collect();
        assert_eq!(lens, [4, 4, 2]);
    }

    #[test]
    fn the_last_part_is_held_out() {
        assert_eq!(text(100).split(ByteText::VALIDATION_FRACTION), Ok((0..90, 90..100)));
        assert_eq!(text(19).split(0.1), Ok((0..18, 18..19)));
        assert_eq!(text(5).split(0.0), Ok((0..5, 5..5)));
        assert_eq!(text(2).split(0.999), Ok((0..1, 1..2)));
        for len in [2, 3, 1000, 1024, 4097] {
            assert_eq!(text(len).split(1.0 - f64::EPSILON / 2.0), Ok((0..1, 1..len)));
        }
        for fraction in [0.1, -0.1, 1.0, 2.0, f64::NAN] {
            let error = text(9).split(fraction).unwrap_err();
            assert!(matches!(error, Error::Invalid { what: "validation_fraction", .. }), "{error}");
        }
        let error = text(9).split(0.1).unwrap_err().to_string();
        assert!(error.contains("9 bytes") && error.contains("0.1"), "{error}");
    }

    #[test]
    fn impossible_pieces_are_refused() {
        let refused = |range: Range<usize>, piece_len: usize, name: &str| {
            let error = text(50).pieces(range, piece_len).unwrap_err();
            assert!(matches!(&error, Error::Invalid { what, .. } if *what == name), "{error}");
        };
        refused(0..50, 0, "piece_len");
        refused(0..51, 4, "range");
        for empty in [0..0, 0..1, 20..20, 50..50] {
            refused(empty, 4, "range");
        }
    }

    #[test]
    fn files_are_read_whole_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        std::fs::write(&path, b"any bytes \xff\x00").unwrap();
        assert_eq!(ByteText::open(&path).unwrap().as_bytes(), b"any bytes \xff\x00");
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(ByteText::open(&path), Err(Error::File { path: p, .. }) if p == path));
        for missing in [folder.path().join("missing"), folder.path().to_path_buf()] {
            let error = ByteText::open(&missing).unwrap_err();
            assert!(matches!(error, Error::Io { path, action: "read", .. } if path == missing));
        }
        assert_eq!(ByteText::from_bytes(Vec::new()).unwrap_err(), Error::Empty { what: "text" });
    }
}
