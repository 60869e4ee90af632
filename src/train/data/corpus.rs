//! Tokens to learn from: the target of each token is the one after it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ndarray::Array2;

use super::documents::{Documents, Store, files_of};
use super::images::{self, ImageShape};
use super::size::TextSize;
#[cfg(feature = "tokenizers")]
use super::tokenizer::{Encoded, Tokenizer};
use crate::Error;

/// Bytes of enwik8, and how many of them are trained on, validated on and tested on.
const ENWIK8: [usize; 3] = [90_000_000, 5_000_000, 5_000_000];

/// A sequence of tokens, read by ranges. Clones share it.
///
/// | from | tokens |
/// |---|---|
/// | a file, or bytes in memory | its bytes |
/// | a folder of files, such as books | the bytes of each, and after each an end of document |
/// | a folder of PNG images of one size | the bytes of the pixels in raster order, and after each image an end |
/// | any of the first two and a `tokenizer.json` | those of the tokenizer |
///
/// An end of document is the token after the last one of the alphabet: 256 for bytes.
///
/// ```
/// use transformer_vq::train::Corpus;
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// std::fs::write(folder.join("1.txt"), "one").unwrap();
/// std::fs::write(folder.join("2.txt"), "two").unwrap();
/// let corpus = Corpus::open(folder)?;
/// assert_eq!((corpus.len(), corpus.vocab_size()), (8, 257));
/// assert_eq!(corpus.read(2..5)?, [b'e'.into(), 256, b't'.into()]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Corpus {
    documents: Arc<Documents>,
    /// Whether a token follows each document.
    ends: bool,
    images: Option<ImageShape>,
    #[cfg(feature = "tokenizers")]
    encoded: Option<Arc<Encoded>>,
}

#[allow(clippy::len_without_is_empty)] // it never is
impl Corpus {
    /// The part of a text that is usually held out.
    pub const VALIDATION_FRACTION: f64 = 0.1;

    fn new(documents: Documents, ends: bool, images: Option<ImageShape>) -> Self {
        Corpus {
            documents: Arc::new(documents),
            ends,
            images,
            #[cfg(feature = "tokenizers")]
            encoded: None,
        }
    }

    /// A file, or all files of a folder and of the folders in it, in the order of their paths; names that begin with a dot
    /// are left out. Files must stay what they are.
    ///
    /// # Errors
    /// [`Error::Io`] for a file or folder that cannot be read, [`Error::File`] if there is nothing in it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        if path.is_dir() {
            return Ok(Self::new(Documents::of_files(files_of(path, None)?)?, true, None));
        }
        Ok(Self::new(Documents::of_files(vec![path.to_path_buf()])?, false, None))
    }

    /// A text that is in memory already.
    ///
    /// # Errors
    /// [`Error::Empty`] if there is nothing in it.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Err(Error::Empty { what: "text" });
        }
        Ok(Self::new(Documents::new(vec![(bytes.len(), Store::Memory(bytes))]), false, None))
    }

    /// The PNG images of a folder and of the folders in it, in the order of their paths: row by row, pixel by pixel, channel by
    /// channel, a byte each. Palettes are resolved, 16 bits cut to 8. They are decoded once, into a temporary file.
    ///
    /// # Errors
    /// [`Error::Io`] for a file or folder that cannot be read, [`Error::File`] for one that is no PNG image or is not of the
    /// size and channels of the first, and if there is none.
    pub fn images(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let (documents, shape) = images::read(files_of(folder.as_ref(), Some("png"))?)?;
        Ok(Self::new(documents, true, Some(shape)))
    }

    /// The same text as tokens of a tokenizer, document by document, without special tokens. It is encoded once, about a
    /// megabyte at a time cut at the end of a line, into a temporary file.
    ///
    /// # Errors
    /// [`Error::File`] for text that is not UTF-8 or that the tokenizer refuses, [`Error::Io`], and [`Error::Invalid`] for
    /// images.
    #[cfg(feature = "tokenizers")]
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Result<Self, Error> {
        if self.images.is_some() {
            return Err(Error::invalid("corpus", "of text, for a tokenizer", "one of images"));
        }
        self.encoded = Some(Arc::new(Encoded::new(&self.documents, self.ends, tokenizer)?));
        Ok(self)
    }

    /// Tokens, ends of documents included; at least one.
    pub fn len(&self) -> usize {
        #[cfg(feature = "tokenizers")]
        if let Some(encoded) = &self.encoded {
            return encoded.len();
        }
        self.documents.len() + if self.ends { self.documents.all().len() } else { 0 }
    }

    /// How many tokens a model of it must know.
    pub fn vocab_size(&self) -> usize {
        self.alphabet() + usize::from(self.ends)
    }

    /// Tokens that stand for text.
    fn alphabet(&self) -> usize {
        #[cfg(feature = "tokenizers")]
        if let Some(encoded) = &self.encoded {
            return encoded.tokenizer().vocab_size();
        }
        256
    }

    /// The token after each document, if it has one.
    pub fn end_of_document(&self) -> Option<u32> {
        self.ends.then(|| self.alphabet() as u32)
    }

    /// The size of its images, if it is made of them.
    pub fn image_shape(&self) -> Option<ImageShape> {
        self.images
    }

    /// Bytes of all documents.
    pub fn n_bytes(&self) -> usize {
        self.documents.len()
    }

    /// Bytes of the documents, one after the other, whatever the tokens are.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range beyond them, [`Error::Io`] and [`Error::File`] if a file is no longer what it was.
    pub fn read_bytes(&self, range: Range<usize>) -> Result<Vec<u8>, Error> {
        check_range(&range, self.documents.len())?;
        self.documents.read(range)
    }

    /// A range of tokens.
    ///
    /// # Errors
    /// As [`read_bytes`](Self::read_bytes).
    pub fn read(&self, range: Range<usize>) -> Result<Vec<u32>, Error> {
        self.check_range(&range)?;
        #[cfg(feature = "tokenizers")]
        if let Some(encoded) = &self.encoded {
            return encoded.read(range);
        }
        let mut tokens = Vec::with_capacity(range.len());
        let mut at = range.start;
        while at < range.end {
            let (number, offset) = self.place(at);
            let document = &self.documents.all()[number];
            let n = (document.len - offset).min(range.end - at);
            if n == 0 {
                tokens.push(256);
                at += 1;
                continue;
            }
            let mut bytes = vec![0; n];
            document.read(offset, &mut bytes)?;
            tokens.extend(bytes.into_iter().map(u32::from));
            at += n;
        }
        Ok(tokens)
    }

    /// The document of a byte token and the place in it; its end is the place after its bytes.
    fn place(&self, token: usize) -> (usize, usize) {
        let ends = |number: usize| if self.ends { number } else { 0 };
        let number = self.documents.find(|number, document| document.start + ends(number) > token);
        (number, token - self.documents.all()[number].start - ends(number))
    }

    /// Bytes of the documents that stand before this token.
    fn bytes_before(&self, token: usize) -> Result<usize, Error> {
        if token == self.len() {
            return Ok(self.documents.len());
        }
        #[cfg(feature = "tokenizers")]
        if let Some(encoded) = &self.encoded {
            return encoded.bytes_before(token);
        }
        let (number, offset) = self.place(token);
        Ok(self.documents.all()[number].start + offset)
    }

    /// The text of these tokens; ends of documents have none.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a token outside the vocabulary, and what the tokenizer refuses.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, Error> {
        let (alphabet, vocab_size) = (self.alphabet(), self.vocab_size());
        let outside = tokens.iter().position(|&token| token as usize >= vocab_size);
        if let Some(i) = outside {
            let (index, got) = (vec![i], u64::from(tokens[i]));
            return Err(Error::OutOfRange { what: "tokens", index, got, limit: vocab_size });
        }
        let text = tokens.iter().copied().filter(|&token| (token as usize) < alphabet);
        #[cfg(feature = "tokenizers")]
        if let Some(encoded) = &self.encoded {
            return encoded.tokenizer().decode(&Vec::from_iter(text));
        }
        Ok(text.map(|token| token as u8).collect())
    }

    /// Where the training part and the validation part lie: the last `validation_fraction` of the tokens, rounded down,
    /// is held out. A fraction of 0 holds nothing out.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the fraction is not in [0, 1), or is not 0 and would still hold out no token.
    pub fn split(&self, validation_fraction: f64) -> Result<(Range<usize>, Range<usize>), Error> {
        if !(0.0..1.0).contains(&validation_fraction) {
            return Err(Error::invalid("validation_fraction", "in [0, 1)", validation_fraction));
        }
        let len = self.len();
        // A fraction below 1 is so by half a unit in the last place at least, so its product with `len` is below `len`.
        let held_out = (len as f64 * validation_fraction) as usize;
        if held_out == 0 && validation_fraction > 0.0 {
            let expected = format!("0, or at least 1 / {len}: the text has {len} tokens");
            return Err(Error::invalid("validation_fraction", expected, validation_fraction));
        }
        Ok((0..len - held_out, len - held_out..len))
    }

    /// The customary parts of enwik8, to train, to validate and to test: 90, 5 and 5 million bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but a file of 100,000,000 bytes, read as bytes.
    pub fn split_enwik8(&self) -> Result<[Range<usize>; 3], Error> {
        let [training, validation, test] = ENWIK8;
        let expected = training + validation + test;
        if (self.len(), self.n_bytes(), self.alphabet()) != (expected, expected, 256) {
            let got = format!("{} tokens of {} bytes", self.len(), self.n_bytes());
            return Err(Error::invalid("enwik8", format!("{expected} bytes, each a token"), got));
        }
        Ok([0..training, training..training + validation, training + validation..expected])
    }

    /// Cuts a range into consecutive pieces of `piece_len` tokens, the last one as short as it comes, and predicts each
    /// token of it once.
    ///
    /// The token before the range is fed as context of its first one. Only where there is none, at the very beginning of
    /// the text, the first token is fed without being predicted.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `piece_len` is 0, or the range reaches beyond the text or has no token to predict.
    pub fn pieces(&self, range: Range<usize>, piece_len: usize) -> Result<Pieces, Error> {
        if piece_len == 0 {
            return Err(Error::invalid("piece_len", "at least 1", piece_len));
        }
        let Range { start, end } = self.predicted(range)?;
        Ok(Pieces { corpus: self.clone(), next: start - 1, last: end - 1, piece_len })
    }

    /// How much text the [`pieces`](Self::pieces) of a range predict.
    ///
    /// # Errors
    /// As [`pieces`](Self::pieces) and [`read`](Self::read).
    pub fn size_of(&self, range: Range<usize>) -> Result<TextSize, Error> {
        let predicted = self.predicted(range)?;
        let bytes = self.bytes_before(predicted.start)?..self.bytes_before(predicted.end)?;
        Ok(TextSize {
            tokens: predicted.len() as u64,
            bytes: bytes.len() as u64,
            words: self.documents.words(bytes)?,
        })
    }

    /// The tokens of a range that have one before them.
    fn predicted(&self, range: Range<usize>) -> Result<Range<usize>, Error> {
        self.check_range(&range)?;
        if range.end <= range.start.max(1) {
            let expected = "a range with at least one token that has another before it";
            return Err(Error::invalid("range", expected, format!("{range:?}")));
        }
        Ok(range.start.max(1)..range.end)
    }

    /// Checks that a range lies inside the text.
    pub(super) fn check_range(&self, range: &Range<usize>) -> Result<(), Error> {
        check_range(range, self.len())
    }
}

fn check_range(range: &Range<usize>, len: usize) -> Result<(), Error> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::invalid("range", format!("within 0..{len}"), format!("{range:?}")))
}

/// Consecutive pieces of a text, each as `(tokens, targets)` of shape [1, n]; see [`Corpus::pieces`].
#[derive(Debug, Clone)]
pub struct Pieces {
    corpus: Corpus,
    /// The next token to feed.
    next: usize,
    /// The token that is predicted last.
    last: usize,
    piece_len: usize,
}

impl Iterator for Pieces {
    type Item = Result<(Array2<u32>, Array2<u32>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let len = self.piece_len.min(self.last - self.next);
        if len == 0 {
            return None;
        }
        let tokens = self.corpus.read(self.next..self.next + len + 1);
        self.next += len;
        let row = |tokens: &[u32]| Array2::from_shape_fn((1, len), |(_, i)| tokens[i]);
        Some(tokens.map(|tokens| (row(&tokens), row(&tokens[1..]))))
    }
}
