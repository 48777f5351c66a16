//! The library's errors as Python exceptions, and its rejections as values.
//!
//! The classes are Python's (`kvkeep._errors`), one for each variant, so that they can be
//! `ValueError`, `TypeError` or `MemoryError` as well; the stable ABI makes classes with
//! one base only.

use kvkeep::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// Why something was not admitted. A stated result, not an exception: the cache works on.
#[pyclass(frozen, module = "kvkeep")]
#[derive(Debug, Clone)]
pub(crate) struct Rejection {
    rejection: kvkeep::Rejection,
}

/// What became of a store: true if it was admitted.
#[pyclass(frozen, module = "kvkeep")]
#[derive(Debug)]
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
    raise(class_name(error), &error.to_string())
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
        Error::Disk { .. } => "DiskError",
        Error::DiskLocked { .. } => "DiskLockedError",
        Error::DiskRefused { .. } => "DiskRefusedError",
        Error::NoDisk => "NoDiskError",
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
