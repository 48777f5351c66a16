//! Memory handed to numpy through `__array_interface__`, which keeps this object, and so
//! the pages behind it, alive as long as an array shows them.

use std::sync::Arc;

use kvkeep::{DType, PrivateTensor};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

use crate::named::Hit;

/// One tensor's memory, private to whoever holds this.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Memory {
    address: usize,
    typestr: &'static str,
    shape: Vec<usize>,
    _hit: Arc<Hit>,
}

#[pymethods]
impl Memory {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", PyTuple::new(py, &self.shape)?)?;
        interface.set_item("typestr", self.typestr)?;
        interface.set_item("data", (self.address, false))?;
        Ok(interface)
    }
}

/// A numpy array over a tensor of a hit.
pub(crate) fn array<'py>(py: Python<'py>, hit: &Arc<Hit>, tensor: &PrivateTensor) -> PyResult<Bound<'py, PyAny>> {
    let memory = Memory {
        address: tensor.address.as_ptr() as usize,
        typestr: typestr(tensor.dtype),
        shape: tensor.shape.dims().to_vec(),
        _hit: Arc::clone(hit),
    };
    let array = asarray(py)?.call1((memory,))?;
    match extension_name(tensor.dtype) {
        // numpy has no such dtypes of its own; what came in was made with these.
        Some(name) => array.call_method1("view", (py.import("ml_dtypes")?.getattr(name)?,)),
        None => Ok(array),
    }
}

/// The same memory as a flat numpy array of bytes.
pub(crate) fn bytes<'py>(py: Python<'py>, hit: &Arc<Hit>, tensor: &PrivateTensor) -> PyResult<Bound<'py, PyAny>> {
    let length = tensor.shape.size_bytes(tensor.dtype).unwrap_or(0);
    let memory = Memory {
        address: tensor.address.as_ptr() as usize,
        typestr: "|u1",
        shape: vec![length],
        _hit: Arc::clone(hit),
    };
    asarray(py)?.call1((memory,))
}

fn asarray(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static ASARRAY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    ASARRAY.import(py, "numpy", "asarray")
}

fn typestr(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "<f8",
        DType::F32 => "<f4",
        DType::F16 => "<f2",
        DType::BF16 => "<u2",
        DType::I64 => "<i8",
        DType::I32 => "<i4",
        DType::I16 => "<i2",
        DType::I8 => "|i1",
        _ => "|u1",
    }
}

/// The name in `ml_dtypes`.
fn extension_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::BF16 => Some("bfloat16"),
        DType::F8E4M3 => Some("float8_e4m3fn"),
        DType::F8E5M2 => Some("float8_e5m2"),
        _ => None,
    }
}
