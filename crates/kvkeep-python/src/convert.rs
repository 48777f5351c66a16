//! Small values from Python's form into the library's.

use std::time::Duration;

use kvkeep::DType;
use pyo3::PyResult;

use crate::error::raise;

/// The names under which Python speaks of the library's dtypes, in the order of their codes.
pub(crate) fn dtype_names() -> Vec<&'static str> {
    DType::ALL.iter().map(|dtype| dtype.name()).collect()
}

/// The dtype of a code, which is its place in `DTYPES`.
pub(crate) fn dtype(code: usize) -> PyResult<DType> {
    DType::ALL.get(code).copied().ok_or_else(|| raise("UnsupportedTensorError", &format!("no dtype has code {code}")))
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
