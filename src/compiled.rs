//! Generic functions that are compiled in this crate, once for `f32` and once for `f64`.
//!
//! A generic function is compiled anew in every program that calls it, and what attention and models call is large: kernels
//! for each instruction set, in parallel loops. A static holds the address of one instance and is not generic itself: it is
//! compiled where it stands, and programs only call through it.

/// The instance of a generic function for `T`, compiled in this crate: `compiled_here!(T, f::<T>, fn(&[T]) -> T)(x)` calls
/// `f::<T>(x)`. Types are written out: neither `Self` nor other parameters of the function around it are known here.
macro_rules! compiled_here {
    ($T:ident, $function:expr, $pointer:ty) => {{
        let of_f32: &dyn std::any::Any = {
            type $T = f32;
            #[allow(clippy::type_complexity)]
            static INSTANCE: $pointer = $function;
            &INSTANCE
        };
        let of_f64: &dyn std::any::Any = {
            type $T = f64;
            #[allow(clippy::type_complexity)]
            static INSTANCE: $pointer = $function;
            &INSTANCE
        };
        #[allow(clippy::type_complexity)]
        let instance: Option<&$pointer> = of_f32.downcast_ref().or_else(|| of_f64.downcast_ref());
        *instance.expect("a Scalar is f32 or f64")
    }};
}
pub(crate) use compiled_here;
