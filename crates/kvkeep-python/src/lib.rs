//! The extension module of the Python package `kvkeep`: both front doors of the cache, for
//! numpy arrays and torch tensors.
//!
//! It is thin: it turns Python's arguments into the library's and back, and releases the
//! GIL while payload is copied, long texts and token ids are hashed, and threads wait. What
//! is nicer to say in Python (dtypes, devices, defaults) is said there. The alternative, one
//! Python class over a few raw calls, cost more time in a hit than the hit itself.
//!
//! One wheel serves every CPython from 3.10 on (abi3), so there is no buffer protocol here:
//! memory comes in as address, dtype and shape, and goes out through `__array_interface__`
//! (numpy) or DLPack (torch).

mod array;
mod convert;
mod engine_blocks;
mod engine_jobs;
mod engine_news;
mod engine_ram;
mod engine_rows;
mod engine_tier;
mod error;
mod fork;
mod hashes;
mod logs;
mod mapped;
mod memory;
mod named;
mod open;
mod quantized;
mod ram;
mod remote;
mod stats;
mod tokens;
mod torch;

use pyo3::prelude::*;

/// The extension module behind the package `kvkeep`.
#[pymodule]
mod _kvkeep {
    #[pymodule_export]
    use crate::array::Memory;
    #[pymodule_export]
    use crate::engine_ram::{EngineBegun, EngineHeld, EngineRam};
    #[pymodule_export]
    use crate::engine_tier::EngineTier;
    #[pymodule_export]
    use crate::error::{Outcome, Rejection};
    #[pymodule_export]
    use crate::fork::before_fork;
    #[pymodule_export]
    use crate::hashes::{blake3, checksum};
    #[pymodule_export]
    use crate::mapped::files_behind;
    #[pymodule_export]
    use crate::named::NamedCache;
    #[pymodule_export]
    use crate::quantized::{Quantizer, prefix_of_text, prefix_of_tokens};
    #[pymodule_export]
    use crate::ram::{Held, Ram};
    #[pymodule_export]
    use crate::tokens::{Match, Namespace, StoreReport, TokenCache};

    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::logs::forward();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("DTYPES", crate::convert::dtype_names())
    }
}
