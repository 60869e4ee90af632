//! (model)

mod atomic_file;
mod tensor_file;

pub use atomic_file::write_atomically;
pub use tensor_file::{Tensor, TensorFile};
