//! (train)

mod schedule;

pub use schedule::Schedule;
