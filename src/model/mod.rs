//! (model)

mod atomic_file;

pub use atomic_file::write_atomically;
