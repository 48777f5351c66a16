//! Tensors and token ids that Python code lends for the time of one call.
//!
//! Invariant: whoever reads or writes lent memory holds the object that owns it, and has asked that object itself
//! where its memory is. So nothing that Python code does meanwhile (drop it, clear the list that it was in, `set_` it to
//! other memory, `resize` it) takes the memory away:
//! - a numpy array says through `__array_struct__` what it is, and does not let itself be resized while it is held;
//! - of a torch tensor its storage is held, checked to span what the tensor shows, and can no longer be resized
//!   (`kvkeep._tensors.lend_torch`), as after `Tensor.numpy`.
//!
//! What has to be copied first is copied to be read, and refused to be written. The bytes are only copied: a tensor that
//! another thread writes meanwhile yields the bytes of before, of after, or of both. Addresses as integers from
//! Python were the alternative: then each caller has to keep the right object alive, and one did not.

#![expect(unsafe_code, reason = "memory that Python owns")]

use std::ffi::{c_char, c_int, c_void};
use std::slice;

use kvkeep::{DType, Shape, TensorView, TensorViewMut};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyType};

use crate::convert;
use crate::error::{raise, to_python};

/// A tensor that is lent, and what keeps its memory where it is.
#[derive(Debug)]
pub(crate) struct Lent {
    address: usize,
    bytes: usize,
    dtype: DType,
    shape: Shape,
    is_torch: bool,
    _owner: Py<PyAny>,
}

/// Token ids that are lent.
#[derive(Debug)]
pub(crate) struct Tokens {
    address: usize,
    count: usize,
    _owner: Py<PyAny>,
}

/// What is to be done with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read; where it has to be made contiguous or brought to the CPU, a copy is.
    Read,
    /// Written, in place.
    Write,
    /// Written, and nobody else has it yet.
    WriteNew,
}

/// numpy's `PyArrayInterface`: what a capsule of `__array_struct__` holds.
#[repr(C)]
struct ArrayInterface {
    two: c_int,
    rank: c_int,
    kind: c_char,
    item_bytes: c_int,
    flags: c_int,
    shape: *const isize,
    strides: *const isize,
    data: *mut c_void,
}

const CONTIGUOUS: c_int = 0x1;
const ALIGNED: c_int = 0x100;
const NATIVE: c_int = 0x200;
const WRITEABLE: c_int = 0x400;

/// What an array says of itself.
struct Described {
    address: usize,
    kind: u8,
    item_bytes: usize,
    flags: c_int,
    dims: Vec<usize>,
}

impl Lent {
    pub(crate) fn new(tensor: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        if tensor.is_instance(ndarray(tensor.py())?)? {
            Self::numpy(tensor, access)
        } else {
            Self::torch(tensor, access)
        }
    }

    fn numpy(array: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        let unsupported = |message: &str| Err(raise("UnsupportedTensorError", message));
        let described = Described::of(array)?;
        if described.flags & NATIVE == 0 {
            return unsupported(
                "an array in the other byte order is not kept: convert it, as in array.astype(array.dtype.newbyteorder('='))",
            );
        }
        if described.flags & CONTIGUOUS == 0 && access == Access::Read {
            let copied =
                array.py().import(intern!(array.py(), "numpy"))?.call_method1("ascontiguousarray", (array,))?;
            return Self::described(&copied, &Described::of(&copied)?);
        }
        if described.flags & CONTIGUOUS == 0 {
            return unsupported(
                "an array to be written must be contiguous: load into one of its own and copy from there",
            );
        }
        if described.flags & WRITEABLE == 0 && access != Access::Read {
            return unsupported("an array to be written must be writeable: this one is read-only");
        }
        Self::described(array, &described)
    }

    fn described(array: &Bound<'_, PyAny>, described: &Described) -> PyResult<Self> {
        let dtype = described.dtype().map_or_else(|| dtype_of(array), Ok)?;
        Self::checked(described.address, dtype, &described.dims, false, array.clone().unbind())
    }

    /// A torch tensor; anything else is refused by name.
    fn torch(tensor: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        static LEND: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let lend = LEND.import(tensor.py(), "kvkeep._tensors", "lend_torch")?;
        let lent = lend.call1((tensor, access != Access::Read, access == Access::WriteNew))?;
        let (address, code, dims, owner): (usize, usize, Vec<usize>, Py<PyAny>) = lent.extract()?;
        Self::checked(address, convert::dtype(code)?, &dims, true, owner)
    }

    fn checked(address: usize, dtype: DType, dims: &[usize], is_torch: bool, owner: Py<PyAny>) -> PyResult<Self> {
        let shape = Shape::new(dims).map_err(|error| to_python(&error))?;
        let bytes = shape.size_bytes(dtype).ok_or_else(|| raise("SizeOverflowError", "the tensor is too large"))?;
        Ok(Self { address: if bytes == 0 { 0 } else { address }, bytes, dtype, shape, is_torch, _owner: owner })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it lies, for as long as this is held.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    pub(crate) fn is_torch(&self) -> bool {
        self.is_torch
    }

    /// The tensor, to be read.
    pub(crate) fn view(&self) -> kvkeep::Result<TensorView<'_>> {
        let bytes = match self.address {
            0 => &[],
            // SAFETY: the owner, which is held, said that so many bytes lie there.
            address => unsafe { slice::from_raw_parts(address as *const u8, self.bytes) },
        };
        TensorView::new(self.dtype, self.shape.dims(), bytes)
    }

    /// The tensor, to be written.
    pub(crate) fn view_mut(&mut self) -> kvkeep::Result<TensorViewMut<'_>> {
        let bytes = match self.address {
            0 => &mut [],
            // SAFETY: as above; it was lent to be written and, by `no_overlap`, no other tensor of the call
            // shares a byte with it.
            address => unsafe { slice::from_raw_parts_mut(address as *mut u8, self.bytes) },
        };
        TensorViewMut::new(self.dtype, self.shape.dims(), bytes)
    }
}

impl Tokens {
    /// An array of `uint32`, as `kvkeep._tokens.token_ids` makes them.
    pub(crate) fn new(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let wanted = CONTIGUOUS | ALIGNED | NATIVE;
        if array.is_instance(ndarray(array.py())?)?
            && let Described { address, kind: b'u', item_bytes: 4, flags, dims } = Described::of(array)?
            && let ([count], true) = (dims.as_slice(), flags & wanted == wanted)
        {
            return Ok(Self { address, count: *count, _owner: array.clone().unbind() });
        }
        Err(raise("TokenIdError", "token ids must be a contiguous numpy array of uint32 in one dimension"))
    }

    pub(crate) fn ids(&self) -> &[u32] {
        if self.address == 0 || self.count == 0 {
            return &[];
        }
        // SAFETY: the array, which is held, said that so many aligned `uint32` lie there.
        unsafe { slice::from_raw_parts(self.address as *const u32, self.count) }
    }
}

impl Described {
    fn of(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let capsule = array.getattr(intern!(array.py(), "__array_struct__"))?.cast_into::<PyCapsule>()?;
        let interface = capsule.pointer_checked(None)?.cast::<ArrayInterface>();
        // SAFETY: such a capsule has no name and holds this; it lives until the end of this function.
        let ArrayInterface { two, rank, kind, item_bytes, flags, shape, data, .. } = unsafe { interface.read() };
        let rank = usize::try_from(rank).unwrap_or(0);
        if two != 2 || (rank > 0 && shape.is_null()) {
            return Err(raise("UnsupportedTensorError", "the array does not describe itself as numpy's do"));
        }
        // SAFETY: as many as the rank says.
        let dims = if rank == 0 { &[] } else { unsafe { slice::from_raw_parts(shape, rank) } };
        Ok(Self {
            address: data as usize,
            #[expect(clippy::cast_sign_loss, reason = "a letter")]
            kind: kind as u8,
            item_bytes: usize::try_from(item_bytes).unwrap_or(0),
            flags,
            dims: dims.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect(),
        })
    }

    /// `None` for what numpy has no letter of its own for.
    fn dtype(&self) -> Option<DType> {
        Some(match (self.kind, self.item_bytes) {
            (b'f', 8) => DType::F64,
            (b'f', 4) => DType::F32,
            (b'f', 2) => DType::F16,
            (b'i', 8) => DType::I64,
            (b'i', 4) => DType::I32,
            (b'i', 2) => DType::I16,
            (b'i', 1) => DType::I8,
            (b'u', 1) => DType::U8,
            _ => return None,
        })
    }
}

/// Refuses tensors to be written that share memory.
pub(crate) fn no_overlap<'a>(tensors: impl Iterator<Item = &'a Lent>) -> PyResult<()> {
    let mut spans: Vec<_> = tensors.filter(|lent| lent.bytes > 0).map(|lent| (lent.address, lent.bytes)).collect();
    spans.sort_unstable();
    let overlap = |pair: &[(usize, usize)]| matches!(pair, [(one, bytes), (next, _)] if one + bytes > *next);
    if spans.windows(2).any(overlap) {
        return Err(raise("OverlapError", "two of the tensors to be written share memory: give each its own"));
    }
    Ok(())
}

fn ndarray(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static NDARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    NDARRAY.import(py, "numpy", "ndarray")
}

/// The dtype of an array, by its name.
fn dtype_of(array: &Bound<'_, PyAny>) -> PyResult<DType> {
    static CODE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let code = CODE.import(array.py(), "kvkeep._tensors", "dtype_code")?;
    convert::dtype(code.call1((array.getattr(intern!(array.py(), "dtype"))?,))?.extract()?)
}

/// Memory of a weight, for its checksum: nothing where there is no address.
pub(crate) fn lent<'a>(address: usize, bytes: usize) -> &'a [u8] {
    if address == 0 {
        return &[];
    }
    // SAFETY: the caller has the address and the size from a tensor that it keeps alive, and only its bytes are summed.
    unsafe { slice::from_raw_parts(address as *const u8, bytes) }
}
