//! Named arrays in a file of the `safetensors` format, which PyTorch, JAX, candle and burn read and write too.
//!
//! ```text
//! 8 bytes    length N of the header, little-endian
//! N bytes    JSON: {"__metadata__": {"key": "value"},
//!                   "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
//! the rest   the elements, row-major, little-endian, without gaps
//! ```
//!
//! A file is written whole or not at all. A file that is read may be anything: its header is checked against the file's
//! size before memory is asked for, and an array is read when it is asked for, one buffer at a time.

mod header;
mod read;
mod write;

pub use read::TensorFile;
pub use write::Tensor;

/// Bytes that are converted at once: a multiple of every element's size.
const BUFFER_LEN: usize = 1 << 16;
