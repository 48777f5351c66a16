//! Small values from Python's form into the library's.

use std::time::Duration;

use kvkeep::{DType, PolicyKind, Priority};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::error::raise;

/// The names under which Python speaks of the library's dtypes, in the order of their codes.
pub(crate) fn dtype_names() -> Vec<&'static str> {
    DType::ALL.iter().map(|dtype| dtype.name()).collect()
}

/// The dtype of a code, which is its place in `DTYPES`.
pub(crate) fn dtype(code: usize) -> PyResult<DType> {
    DType::ALL.get(code).copied().ok_or_else(|| raise("UnsupportedTensorError", &format!("no dtype has code {code}")))
}

/// A layer, or how many there are. What no `usize` can be is out of range, and not an overflow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerCount(pub(crate) usize);

impl<'a, 'py> FromPyObject<'a, 'py> for LayerCount {
    type Error = PyErr;

    fn extract(layer: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        layer.extract().map(Self).map_err(|error: PyErr| {
            if error.is_instance_of::<PyOverflowError>(layer.py()) {
                raise("LayerOutOfRangeError", &format!("layer {} is out of range: layers are counted from 0", *layer))
            } else {
                error
            }
        })
    }
}

/// The eviction policy of a name.
pub(crate) fn policy(name: &str) -> PyResult<PolicyKind> {
    PolicyKind::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
        let names = PolicyKind::ALL.map(PolicyKind::name).join(", ");
        raise("ConfigError", &format!("policy is {name:?}: give one of {names}"))
    })
}

/// The priority of a name.
pub(crate) fn priority(name: &str) -> PyResult<Priority> {
    match name {
        "drop-first" => Ok(Priority::DropFirst),
        "normal" => Ok(Priority::Normal),
        "keep-longer" => Ok(Priority::KeepLonger),
        other => {
            Err(raise("ConfigError", &format!("priority is {other:?}: give 'drop-first', 'normal' or 'keep-longer'")))
        }
    }
}

/// Seconds as Python gives them; `None` stays `None`.
pub(crate) fn seconds(seconds: Option<f64>, what: &str) -> PyResult<Option<Duration>> {
    let Some(seconds) = seconds else { return Ok(None) };
    // What is too long to be a duration never expires, which is what was asked for.
    if seconds >= 0.0 {
        return Ok(Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)));
    }
    Err(raise("ConfigError", &format!("{what} is {seconds}: give a number of seconds from 0 on, or None")))
}

/// Seconds that are to be waited: some, and not for ever.
pub(crate) fn some_seconds(seconds: f64, what: &str) -> PyResult<Duration> {
    if seconds > 0.0 && seconds.is_finite() {
        return Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
    }
    Err(raise("ConfigError", &format!("{what} is {seconds}: give a finite number of seconds above 0")))
}
