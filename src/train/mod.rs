//! (train)

mod adamw;
mod schedule;

pub use adamw::AdamW;
pub use schedule::Schedule;
