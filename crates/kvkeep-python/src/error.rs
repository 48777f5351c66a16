//! The library's errors as Python exceptions, and its rejections as values.
//!
//! The classes are Python's (`kvkeep._errors`), one for each variant, so that they can be
//! `ValueError`, `TypeError` or `MemoryError` as well; the stable ABI makes classes with
//! one base only.

use kvkeep::{Error, OneLine};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// Why something was not admitted. A stated result, not an exception: the cache works on.
#[pyclass(frozen, eq, hash, from_py_object, module = "kvkeep")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Rejection {
    rejection: kvkeep::Rejection,
}

/// What became of a store: true if it was admitted.
#[pyclass(frozen, eq, hash, module = "kvkeep")]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Outcome {
    rejection: Option<kvkeep::Rejection>,
}

/// Anything a call can fail with: the library's errors, or what a caller's code raised.
#[derive(Debug)]
pub(crate) enum CallError {
    Cache(Error),
    Python(PyErr),
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::Cache(error)
    }
}

impl From<PyErr> for CallError {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<CallError> for PyErr {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Cache(error) => to_python(&error),
            CallError::Python(error) => error,
        }
    }
}

/// The exception that mirrors this error.
pub(crate) fn to_python(error: &Error) -> PyErr {
    raise(class_name(error), &OneLine(error).to_string())
}

/// As [`to_python`], of a store: one that was stopped raises what the signal's handler raised.
pub(crate) fn stopped(py: Python<'_>, error: &Error) -> PyErr {
    match error {
        Error::Stopped => PyErr::take(py).unwrap_or_else(|| to_python(error)),
        other => to_python(other),
    }
}

/// An exception of a class in `kvkeep._errors`.
pub(crate) fn raise(class: &str, message: &str) -> PyErr {
    Python::attach(|py| {
        let class = py.import("kvkeep._errors").and_then(|module| module.getattr(class));
        match class.and_then(|class| Ok(class.cast_into::<PyType>()?)) {
            Ok(class) => PyErr::from_type(class, message.to_owned()),
            Err(_) => PyRuntimeError::new_err(message.to_owned()),
        }
    })
}

fn class_name(error: &Error) -> &'static str {
    match error {
        Error::Config(_) => "ConfigError",
        Error::Layout(_) => "LayoutError",
        Error::EmptyTokens => "EmptyTokensError",
        Error::EmptyPrefix => "EmptyPrefixError",
        Error::ZeroLayers => "ZeroLayersError",
        Error::LayerOutOfRange { .. } => "LayerOutOfRangeError",
        Error::LayerCount { .. } => "LayerCountError",
        Error::BlockOutOfRange { .. } => "BlockOutOfRangeError",
        Error::DuplicateLayer(_) => "DuplicateLayerError",
        Error::DTypeMismatch { .. } => "DTypeMismatchError",
        Error::ShapeMismatch { .. } => "ShapeMismatchError",
        Error::BufferLength { .. } => "BufferLengthError",
        Error::Rank { .. } => "RankError",
        Error::EmptyTensor(_) => "EmptyTensorError",
        Error::SizeOverflow(_) => "SizeOverflowError",
        Error::Cast { .. } => "CastError",
        Error::Memory { .. } | Error::PrivateMemory { .. } => "OutOfMemoryError",
        Error::Disk { .. } | Error::NotTaken { .. } | Error::Tier { .. } => "DiskError",
        Error::DiskLocked { .. } => "DiskLockedError",
        Error::DiskRefused { .. } => "DiskRefusedError",
        Error::NoDisk => "NoDiskError",
        Error::Forked => "ForkError",
        _ => "KvkeepError",
    }
}

impl Rejection {
    pub(crate) fn new(rejection: kvkeep::Rejection) -> Self {
        Self { rejection }
    }
}

#[pymethods]
impl Rejection {
    /// As `__reduce__` takes it apart.
    #[new]
    fn of_parts(reason: &str, first: u64, second: u64) -> PyResult<Self> {
        use kvkeep::Rejection::{AllPinned, LargerThanCapacity, OverQuota, PrefixGone};
        let rejection = match reason {
            "larger_than_capacity" => LargerThanCapacity { needed_bytes: first, capacity_bytes: second },
            "all_pinned" => AllPinned { needed_bytes: first, held_bytes: second },
            "over_quota" => OverQuota { needed_bytes: first, share_bytes: second },
            "prefix_gone" => PrefixGone { token: usize::try_from(first).unwrap_or(usize::MAX) },
            other => return Err(PyValueError::new_err(format!("{other:?} is no reason for a rejection"))),
        };
        Ok(Self { rejection })
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (&'static str, u64, u64)) {
        use kvkeep::Rejection::{AllPinned, LargerThanCapacity, OverQuota, PrefixGone};
        let (first, second) = match self.rejection {
            LargerThanCapacity { needed_bytes, capacity_bytes } => (needed_bytes, capacity_bytes),
            AllPinned { needed_bytes, held_bytes } => (needed_bytes, held_bytes),
            OverQuota { needed_bytes, share_bytes } => (needed_bytes, share_bytes),
            PrefixGone { token } => (token as u64, 0),
            _ => (0, 0),
        };
        (py.get_type::<Self>(), (self.reason(), first, second))
    }

    /// `larger_than_capacity`, `all_pinned`, `over_quota` or `prefix_gone`.
    #[getter]
    fn reason(&self) -> &'static str {
        match self.rejection {
            kvkeep::Rejection::LargerThanCapacity { .. } => "larger_than_capacity",
            kvkeep::Rejection::AllPinned { .. } => "all_pinned",
            kvkeep::Rejection::OverQuota { .. } => "over_quota",
            kvkeep::Rejection::PrefixGone { .. } => "prefix_gone",
            _ => "other",
        }
    }

    fn __str__(&self) -> String {
        self.rejection.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<Rejection {}: {}>", self.reason(), self.rejection)
    }
}

impl Outcome {
    pub(crate) fn of(outcome: kvkeep::Outcome) -> Self {
        match outcome {
            kvkeep::Outcome::Rejected(rejection) => Self { rejection: Some(rejection) },
            _ => Self { rejection: None },
        }
    }
}

#[pymethods]
impl Outcome {
    /// As `__reduce__` takes it apart.
    #[new]
    #[pyo3(signature = (rejection))]
    fn of_parts(rejection: Option<Rejection>) -> Self {
        Self { rejection: rejection.map(|Rejection { rejection }| rejection) }
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (Option<Rejection>,)) {
        (py.get_type::<Self>(), (self.rejection(),))
    }

    /// Was it admitted?
    #[getter]
    fn stored(&self) -> bool {
        self.rejection.is_none()
    }

    /// Why not, or None.
    #[getter]
    fn rejection(&self) -> Option<Rejection> {
        self.rejection.map(Rejection::new)
    }

    fn __bool__(&self) -> bool {
        self.stored()
    }

    fn __repr__(&self) -> String {
        match &self.rejection {
            None => "<Outcome stored>".to_owned(),
            Some(rejection) => format!("<Outcome rejected: {rejection}>"),
        }
    }
}
