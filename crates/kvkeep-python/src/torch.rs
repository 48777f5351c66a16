//! Torch tensors over the memory of a hit, made through DLPack's C exchange table, which
//! torch publishes as `torch.Tensor.__dlpack_c_exchange_api__`.
//!
//! A hit of 32 layers makes 64 tensors, and their making is most of its cost: about 0.3 µs
//! each this way, each with a storage of its own. Alternatives that lost: `unbind` of one
//! tensor over all layers (as fast, but layers share a storage and a version counter, so saving
//! one saves all and writing one upsets autograd for all), `from_dlpack` (twice as slow),
//! `from_numpy` (ten times). A torch without the table takes that last way.

#![expect(unsafe_code, reason = "DLPack is a C interface")]

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use kvkeep::{DType, MAX_RANK, PrivateTensor, Shape};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::array;
use crate::named::Hit;

const TABLE_NAME: &CStr = c"dlpack_exchange_api";
/// The version of DLPack whose layouts are written down here.
const MAJOR: u32 = 1;
const CPU: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    version: Version,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
    flags: u64,
    tensor: DlTensor,
}

/// `DLPackExchangeAPI`, as far as it is used.
#[repr(C)]
struct Table {
    version: Version,
    previous: *mut c_void,
    _allocator: *const c_void,
    _from_object: *const c_void,
    to_object: Option<unsafe extern "C" fn(*mut Managed, *mut *mut c_void) -> c_int>,
}

/// The descriptions of all tensors of a hit, in one piece, and the hit that they show.
/// Each tensor that torch has made owns one count of it.
#[expect(clippy::vec_box, reason = "descriptions point to what is in the boxes")]
struct Batch {
    tensors: Vec<UnsafeCell<Managed>>,
    /// What descriptions point to: one for a run of tensors of one shape.
    _dims: Vec<Box<Dims>>,
    _hit: Arc<Hit>,
}

/// A shape in DLPack's words.
struct Dims {
    shape: Shape,
    sizes: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
}

// SAFETY: descriptions are written before torch sees them and only read after; torch may
// call a deleter on any thread, and all that does is to drop a count.
unsafe impl Send for Batch {}
// SAFETY: as above.
unsafe impl Sync for Batch {}

/// Torch's way to make tensors, found once.
enum Maker {
    Table(NonNull<Table>),
    FromNumpy,
}

// SAFETY: the table is a constant of torch, which is never unloaded.
unsafe impl Send for Maker {}
// SAFETY: as above.
unsafe impl Sync for Maker {}

/// Torch tensors over these tensors of a hit, in order.
pub(crate) fn tensors<'py>(
    py: Python<'py>,
    hit: &Arc<Hit>,
    tensors: &[PrivateTensor],
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    static MAKER: PyOnceLock<Maker> = PyOnceLock::new();
    match MAKER.get_or_try_init(py, || find(py))? {
        Maker::Table(table) => through_table(py, *table, hit, tensors),
        Maker::FromNumpy => tensors.iter().map(|tensor| from_numpy(py, hit, tensor)).collect(),
    }
}

fn find(py: Python<'_>) -> PyResult<Maker> {
    let class = py.import("torch")?.getattr("Tensor")?;
    let Ok(capsule) = class.getattr("__dlpack_c_exchange_api__") else { return Ok(Maker::FromNumpy) };
    let Ok(capsule) = capsule.cast_into::<PyCapsule>() else { return Ok(Maker::FromNumpy) };
    let Ok(table) = capsule.pointer_checked(Some(TABLE_NAME)) else { return Ok(Maker::FromNumpy) };
    let mut table = table.cast::<Table>();
    loop {
        // SAFETY: the name says what the capsule holds; every version of the table begins like this.
        let (version, previous) = unsafe { ((*table.as_ptr()).version, (*table.as_ptr()).previous) };
        match NonNull::new(previous.cast::<Table>()) {
            _ if version.major == MAJOR => return Ok(Maker::Table(table)),
            Some(older) => table = older,
            None => return Ok(Maker::FromNumpy),
        }
    }
}

fn through_table<'py>(
    py: Python<'py>,
    table: NonNull<Table>,
    hit: &Arc<Hit>,
    tensors: &[PrivateTensor],
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    // SAFETY: `find` checked the version; the table is a constant.
    let Some(to_object) = (unsafe { (*table.as_ptr()).to_object }) else {
        return Err(PyRuntimeError::new_err("torch's DLPack table has no way to make a tensor"));
    };
    let batch = Arc::new(Batch::of(hit, tensors));
    let make = |cell: &UnsafeCell<Managed>| {
        let managed = cell.get();
        // SAFETY: nobody else knows the description yet. The count taken here keeps the batch,
        // and with it all that the description points to, until the deleter runs.
        unsafe { (*managed).manager_ctx = Arc::into_raw(Arc::clone(&batch)).cast_mut().cast() };
        let mut object = ptr::null_mut();
        // SAFETY: a filled description and a place for the answer, with the GIL held, as the table asks.
        let failed = unsafe { to_object(managed, &raw mut object) } != 0;
        if failed || object.is_null() {
            // Whether torch took the description is not known, so its count stays taken.
            return Err(PyErr::take(py).unwrap_or_else(|| PyRuntimeError::new_err("torch made no tensor")));
        }
        // SAFETY: torch answers with a new reference to a Python object.
        Ok(unsafe { Bound::from_owned_ptr(py, object.cast()) })
    };
    batch.tensors.iter().map(make).collect()
}

impl Batch {
    fn of(hit: &Arc<Hit>, tensors: &[PrivateTensor]) -> Self {
        let mut dims: Vec<Box<Dims>> = Vec::with_capacity(2);
        let mut descriptions = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            if dims.last().is_none_or(|dims| dims.shape != tensor.shape) {
                dims.push(Box::new(Dims::of(tensor.shape)));
            }
            let Some(dims) = dims.last() else { continue };
            descriptions.push(UnsafeCell::new(dims.describe(tensor)));
        }
        Self { tensors: descriptions, _dims: dims, _hit: Arc::clone(hit) }
    }
}

impl Dims {
    fn of(shape: Shape) -> Self {
        let (mut sizes, mut strides) = ([0; MAX_RANK], [0; MAX_RANK]);
        let mut stride = 1;
        let places = sizes.iter_mut().zip(&mut strides).take(shape.dims().len()).rev();
        for ((size, place), dim) in places.zip(shape.dims().iter().rev()) {
            *size = i64::try_from(*dim).unwrap_or(i64::MAX);
            *place = stride;
            stride *= *size;
        }
        Self { shape, sizes, strides }
    }

    fn describe(&self, tensor: &PrivateTensor) -> Managed {
        let (code, bits) = dlpack_type(tensor.dtype);
        Managed {
            version: Version { major: MAJOR, minor: 0 },
            manager_ctx: ptr::null_mut(),
            deleter: Some(drop_count),
            flags: 0,
            tensor: DlTensor {
                data: tensor.address.as_ptr().cast(),
                device_type: CPU,
                device_id: 0,
                ndim: i32::try_from(self.shape.dims().len()).unwrap_or(0),
                code,
                bits,
                lanes: 1,
                // Only read, like everything in a description.
                shape: self.sizes.as_ptr().cast_mut(),
                strides: self.strides.as_ptr().cast_mut(),
                byte_offset: 0,
            },
        }
    }
}

unsafe extern "C" fn drop_count(managed: *mut Managed) {
    // SAFETY: torch calls this once for each description that it took; the count is the one
    // that `through_table` put there.
    drop(unsafe { Arc::from_raw((*managed).manager_ctx.cast::<Batch>().cast_const()) });
}

/// DLPack's type code and bits.
fn dlpack_type(dtype: DType) -> (u8, u8) {
    match dtype {
        DType::F64 => (2, 64),
        DType::F32 => (2, 32),
        DType::F16 => (2, 16),
        DType::BF16 => (4, 16),
        DType::F8E4M3 => (10, 8),
        DType::F8E5M2 => (12, 8),
        DType::I64 => (0, 64),
        DType::I32 => (0, 32),
        DType::I16 => (0, 16),
        DType::I8 => (0, 8),
        _ => (1, 8),
    }
}

fn from_numpy<'py>(py: Python<'py>, hit: &Arc<Hit>, tensor: &PrivateTensor) -> PyResult<Bound<'py, PyAny>> {
    let torch = py.import("torch")?;
    let bytes = torch.call_method1("from_numpy", (array::bytes(py, hit, tensor)?,))?;
    let dtype = py.import("kvkeep._tensors")?.call_method1("torch_dtype", (tensor.dtype.name(),))?;
    bytes.call_method1("view", (dtype,))?.call_method1("view", (tensor.shape.dims().to_vec(),))
}
