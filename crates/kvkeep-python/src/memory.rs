//! Tensors that Python code lends for the time of one call: address, dtype code and shape.
//!
//! Soundness: `kvkeep._tensors` reads the three from the tensor itself, contiguous and on the
//! CPU, and its caller keeps the tensor alive until the call returns. The bytes are only
//! copied. A tensor that another thread writes meanwhile yields the bytes of before, of after,
//! or of both, as with every other reader of such memory.

#![expect(unsafe_code, reason = "memory that Python owns")]

use std::slice;

use kvkeep::{DType, Shape, TensorView, TensorViewMut};
use pyo3::PyResult;

use crate::convert;
use crate::error::{raise, to_python};

/// Address, dtype code and shape of a contiguous tensor, as Python gives them.
pub(crate) type RawTensor = (usize, usize, Vec<usize>);

/// A tensor that is lent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lent {
    address: usize,
    bytes: usize,
    dtype: DType,
    shape: Shape,
}

impl Lent {
    pub(crate) fn new((address, code, dims): &RawTensor) -> PyResult<Self> {
        let (dtype, shape) = (convert::dtype(*code)?, Shape::new(dims).map_err(|error| to_python(&error))?);
        let bytes = shape.size_bytes(dtype).ok_or_else(|| raise("SizeOverflowError", "the tensor is too large"))?;
        Ok(Self { address: if bytes == 0 { 0 } else { *address }, bytes, dtype, shape })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The tensor, to be read.
    pub(crate) fn view(&self) -> kvkeep::Result<TensorView<'_>> {
        TensorView::new(self.dtype, self.shape.dims(), lent(self.address, self.bytes))
    }

    /// The tensor, to be written.
    pub(crate) fn view_mut(&mut self) -> kvkeep::Result<TensorViewMut<'_>> {
        let bytes = match self.address {
            0 => &mut [],
            // SAFETY: see the top; the caller checked that it is writable and, with
            // `no_overlap`, that no other tensor of the call shares a byte with it.
            address => unsafe { slice::from_raw_parts_mut(address as *mut u8, self.bytes) },
        };
        TensorViewMut::new(self.dtype, self.shape.dims(), bytes)
    }
}

/// Token ids that are lent: address and count of contiguous `uint32`.
pub(crate) fn lent_tokens<'a>(address: usize, count: usize) -> &'a [u32] {
    if address == 0 || count == 0 {
        return &[];
    }
    // SAFETY: see the top; `kvkeep._tokens` hands over numpy arrays of aligned `uint32`.
    unsafe { slice::from_raw_parts(address as *const u32, count) }
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

/// Memory that is lent: nothing where there is no address.
pub(crate) fn lent<'a>(address: usize, bytes: usize) -> &'a [u8] {
    if address == 0 {
        return &[];
    }
    // SAFETY: see the top.
    unsafe { slice::from_raw_parts(address as *const u8, bytes) }
}
