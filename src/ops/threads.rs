//! The threads that share work.

/// `f`, on a thread of the current rayon pool.
///
/// From a thread outside of it, such as a program's main thread, each parallel loop is handed over by waking one of the pool's
/// threads and waited for asleep: some tens of microseconds. A token's pass through a model has dozens of loops that take no
/// longer themselves. Entering once, it pays once.
///
/// Loops over many tokens take longer, and gain nothing. Their arrays are better allocated by the thread that calls: allocators keep
/// a part of the heap for each thread, and whichever of the pool's threads runs a pass grows its own.
pub(crate) fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() { f() } else { rayon::scope(|_| f()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn enters_once_and_stays() {
        let here = thread::current().id();
        let (outer, inner) = in_pool(|| (thread::current().id(), in_pool(|| thread::current().id())));
        assert_ne!(outer, here);
        assert_eq!(outer, inner);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let inside = || rayon::current_num_threads();
        assert_eq!(pool.install(|| in_pool(inside)), 1);
    }

    #[test]
    fn panics_and_results_come_back() {
        assert_eq!(in_pool(|| 7), 7);
        assert!(std::panic::catch_unwind(|| in_pool(|| panic!("as it should"))).is_err());
    }
}
