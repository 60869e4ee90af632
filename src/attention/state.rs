//! What one head carries from one piece of a sequence to the next. Its size does not grow.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, s};

use super::CompressiveCache;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::ops::matmul::Later;
use crate::{Error, Scalar};

/// Position, compressive cache, and the last M keys and values of one head.
///
/// A key in the window keeps the codeword that it was given, even if the codebook has moved since; a key in the cache is
/// read with today's codewords.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionState<T> {
    position: u64,
    pub(super) cache: CompressiveCache<T>,
    // A ring: the key at position p lies in slot p % M.
    codes: Array1<u32>,
    k_hat: Array2<T>,
    v: Array2<T>,
    table: LastTable,
}

/// The table of codewords that the window's keys are known to be rows of; 0 where nobody has looked. A note, no part of a state:
/// it is written again from the keys themselves.
#[derive(Debug, Clone, Copy, Default)]
struct LastTable(u64);

impl PartialEq for LastTable {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// The keys of a window in the order of their positions, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowKeys<T> {
    /// Codes [min(M, position)].
    pub codes: Array1<u32>,
    /// Quantized keys, each with the codeword it was given [min(M, position), K].
    pub k_hat: Array2<T>,
    /// Values [min(M, position), V].
    pub v: Array2<T>,
}

/// About how many numbers a state of these sizes holds; as large as can be where that overflows.
pub(super) fn state_len(n_codes: usize, d_k: usize, d_v: usize, window: usize) -> usize {
    let cache = n_codes.saturating_mul(d_v.saturating_mul(2).saturating_add(2));
    let window = window.saturating_mul(d_k.saturating_add(d_v).saturating_add(1));
    cache.saturating_add(window)
}

impl<T: Scalar> AttentionState<T> {
    /// The state before the first token.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no memory for such a state.
    pub fn new(n_codes: usize, d_k: usize, d_v: usize, window: usize) -> Result<Self, Error> {
        check_memory::<T>("state", &[state_len(n_codes, d_k, d_v, window)])?;
        Ok(AttentionState {
            position: 0,
            cache: CompressiveCache::new(n_codes, d_v),
            codes: Array1::zeros(window),
            k_hat: Array2::zeros((window, d_k)),
            v: Array2::zeros((window, d_v)),
            table: LastTable::default(),
        })
    }

    /// A state from its parts, as read back from [`position`](Self::position), [`cache`](Self::cache) and
    /// [`window_keys`](Self::window_keys).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::OutOfRange`] for parts that do not belong together, and
    /// [`Error::Invalid`] if the counts do not add up to the tokens beyond the window or the position is above 2^63 - 1.
    pub fn from_parts(
        position: u64,
        window: usize,
        cache: CompressiveCache<T>,
        keys: &WindowKeys<T>,
    ) -> Result<Self, Error> {
        if position > i64::MAX as u64 {
            // So far from the end that no sequence can count beyond it.
            return Err(Error::invalid("position", "at most 2^63 - 1", position));
        }
        let (n_codes, d_v) = cache.mean().dim();
        let d_k = keys.k_hat.ncols();
        let held = usize::try_from(position).map_or(window, |p| p.min(window));
        check_shape("codes", &[held], keys.codes.shape())?;
        check_shape("k_hat", &[held, d_k], keys.k_hat.shape())?;
        check_shape("v", &[held, d_v], keys.v.shape())?;
        check_finite("k_hat", keys.k_hat.view())?;
        check_finite("v", keys.v.view())?;
        if let Some((i, &code)) = keys.codes.indexed_iter().find(|&(_, &code)| code as usize >= n_codes) {
            return Err(Error::OutOfRange {
                what: "codes",
                index: vec![i],
                got: code.into(),
                limit: n_codes,
            });
        }
        let cached = cache.count().iter().try_fold(0u64, |sum, &n| sum.checked_add(n));
        if cached != Some(position - held as u64) {
            let expected = format!("{} (position less window)", position - held as u64);
            return Err(Error::invalid("sum of counts", expected, format!("{cached:?}")));
        }
        let mut state = AttentionState::new(n_codes, d_k, d_v, window)?;
        state.position = position - held as u64;
        state.cache = cache;
        for j in 0..held {
            state.store(keys.codes[j], keys.k_hat.row(j), keys.v.row(j));
        }
        Ok(state)
    }

    /// Forgets everything, as at the start of another document: the state before the first token.
    pub fn reset(&mut self) {
        let held = self.slots().2;
        self.codes.slice_mut(s![..held]).fill(0);
        self.k_hat.slice_mut(s![..held, ..]).fill(T::zero());
        self.v.slice_mut(s![..held, ..]).fill(T::zero());
        self.cache.reset();
        self.position = 0;
    }

    /// The state before the first token, of the same sizes.
    pub(super) fn fresh(&self) -> Self {
        let (n_codes, d_v) = self.cache.mean().dim();
        AttentionState {
            position: 0,
            cache: CompressiveCache::new(n_codes, d_v),
            codes: Array1::zeros(self.window()),
            k_hat: Array2::zeros(self.k_hat.raw_dim()),
            v: Array2::zeros(self.v.raw_dim()),
            table: LastTable::default(),
        }
    }

    /// Tokens seen so far, of the document that goes on.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Counts and mean values of all keys beyond the window.
    pub fn cache(&self) -> &CompressiveCache<T> {
        &self.cache
    }

    /// M, tokens.
    pub fn window(&self) -> usize {
        self.codes.len()
    }

    /// The last min(M, position) keys, oldest first. Copies them.
    pub fn window_keys(&self) -> WindowKeys<T> {
        let m = self.window();
        if self.position <= m as u64 {
            let held = self.position as usize;
            return WindowKeys {
                codes: self.codes.slice(s![..held]).to_owned(),
                k_hat: self.k_hat.slice(s![..held, ..]).to_owned(),
                v: self.v.slice(s![..held, ..]).to_owned(),
            };
        }
        let slots: Vec<usize> = (0..m).map(|j| ((self.position + j as u64) % m as u64) as usize).collect();
        WindowKeys {
            codes: self.codes.select(ndarray::Axis(0), &slots),
            k_hat: self.k_hat.select(ndarray::Axis(0), &slots),
            v: self.v.select(ndarray::Axis(0), &slots),
        }
    }

    /// Bytes of memory: the same before the first token and after the millionth.
    pub fn size_in_bytes(&self) -> usize {
        let numbers = self.k_hat.len() + self.v.len();
        self.cache.size_in_bytes() + numbers * size_of::<T>() + self.codes.len() * size_of::<u32>() + 8
    }

    /// Takes in the next token: it enters the window, and the token that leaves the window enters the cache.
    pub(super) fn push(&mut self, code: u32, k_hat: ArrayView1<'_, T>, v: ArrayView1<'_, T>) {
        let m = self.window();
        if m == 0 {
            self.cache.push(code, v);
        } else if self.position >= m as u64 {
            let slot = (self.position % m as u64) as usize;
            self.cache.push(self.codes[slot], self.v.row(slot));
        }
        self.store(code, k_hat, v);
    }

    fn store(&mut self, code: u32, k_hat: ArrayView1<'_, T>, v: ArrayView1<'_, T>) {
        if self.window() > 0 {
            let slot = (self.position % self.window() as u64) as usize;
            self.codes[slot] = code;
            self.k_hat.row_mut(slot).assign(&k_hat);
            self.v.row_mut(slot).assign(&v);
        }
        self.table = LastTable::default();
        self.position += 1;
    }

    /// Replaces position and window by those after a piece; the cache has been kept up by the caller.
    pub(super) fn advance(
        &mut self,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
    ) {
        let skipped = codes.len().saturating_sub(self.window());
        self.position += skipped as u64;
        for j in skipped..codes.len() {
            self.store(codes[j], codewords.row(codes[j] as usize), v.row(j));
        }
    }

    /// The window's keys, values and codes by slot, and how many slots are filled.
    pub(super) fn slots(&self) -> (ArrayView2<'_, T>, ArrayView2<'_, T>, usize) {
        let held = usize::try_from(self.position).map_or(self.window(), |p| p.min(self.window()));
        (self.k_hat.slice(s![..held, ..]), self.v.slice(s![..held, ..]), held)
    }

    /// Whether each of the window's keys is the codeword that its code has today, so that its score is that of its code. `table`,
    /// not 0, is the same number for the same codewords: they are compared once.
    pub(super) fn holds_codewords(&mut self, table: u64, codewords: ArrayView2<'_, T>) -> bool {
        if self.table.0 != table {
            self.table = LastTable::default();
            let (keys, _, held) = self.slots();
            let same = |(&code, key): (&u32, ArrayView1<'_, T>)| key == codewords.row(code as usize);
            if !self.codes.iter().zip(keys.rows()).take(held).all(same) {
                return false;
            }
            self.table = LastTable(table);
        }
        true
    }

    /// What is read first of a state, and where what is read next begins: codes, counts, and a line of values and of means.
    pub(super) fn first_reads(&self) -> [Later; 4] {
        let line = |array: ArrayView2<'_, T>| {
            let array = array.to_slice().expect("standard layout");
            Later::new(&array[..array.len().min(1)])
        };
        [
            Later::new(self.codes.as_slice().expect("standard layout")),
            Later::new(self.cache.count().to_slice().expect("standard layout")),
            line(self.v.view()),
            line(self.cache.mean()),
        ]
    }

    /// Codes of the window's keys by slot.
    pub(super) fn codes(&self) -> ArrayView1<'_, u32> {
        self.codes.slice(s![..self.slots().2])
    }

    /// [`push`](Self::push) of one of the codewords that [`holds_codewords`](Self::holds_codewords) has just been asked about: its
    /// answer stays right.
    pub(super) fn push_codeword(&mut self, code: u32, codewords: ArrayView2<'_, T>, v: ArrayView1<'_, T>) {
        let table = self.table;
        self.push(code, codewords.row(code as usize), v);
        self.table = table;
    }

    /// The slot that was filled last; 0 where none is.
    pub(super) fn newest(&self) -> usize {
        let last = self.position.saturating_sub(1);
        last.checked_rem(self.window() as u64).unwrap_or(0) as usize
    }

    /// Checks that this state was made for these sizes.
    pub(crate) fn check(&self, n_codes: usize, d_k: usize, d_v: usize, window: usize) -> Result<(), Error> {
        check_shape("state.mean", &[n_codes, d_v], self.cache.mean().shape())?;
        check_shape("state.k_hat", &[window, d_k], self.k_hat.shape())?;
        check_shape("state.v", &[window, d_v], self.v.shape())
    }
}
