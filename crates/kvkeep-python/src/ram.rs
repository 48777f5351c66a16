//! The cache's memory by address, for `kvkeep._device`, which has a GPU copy from and to it.
//!
//! Invariant: what an address is given for is held: pages to read until `Held` is dropped, pages to write until the
//! function that got them returns. The GPU's runtime is called in Python, through torch, which has it anyway. Linking it
//! here was the alternative: a wheel for each release of CUDA.

use std::sync::Arc;

use kvkeep::{CachedLayers, DType, PrivateTensor, Shape, TensorSpec, TensorView};
use pyo3::prelude::*;

use crate::convert;
use crate::error::to_python;
use crate::fork::Holding;

/// The memory that a cache keeps blocks in.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Ram(pub(crate) kvkeep::Ram);

/// Pages that stay readable, and are not evicted, while this lives.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Held {
    _holding: HeldPages,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held")]
enum HeldPages {
    Blocks(Arc<Holding<kvkeep::Match>>),
    Layers(Holding<CachedLayers>),
}

/// First block, blocks, and the address of the first of them: a run of blocks whose pages lie behind each other.
pub(crate) type Run = (usize, usize, usize);

/// Address, dtype code and shape.
pub(crate) type Place = (usize, usize, Vec<usize>);

/// Dtype code and shape.
pub(crate) type RawSpec = (usize, Vec<usize>);

/// What memory is given out in.
const PAGE_BYTES: usize = 4096;

/// How often waiting is tried: it fails where Ctrl-C comes in between, or for good where the device is lost.
const WAITS: usize = 4;

#[pymethods]
impl Ram {
    #[getter]
    fn address(&self) -> usize {
        self.0.address().as_ptr() as usize
    }

    #[getter]
    fn capacity_bytes(&self) -> usize {
        self.0.capacity_bytes()
    }

    /// Brings memory behind the first `bytes` bytes, and keeps it there.
    fn keep_until(&self, py: Python<'_>, bytes: usize) {
        py.detach(|| self.0.keep_until(bytes));
    }
}

impl Held {
    pub(crate) fn blocks(found: Arc<Holding<kvkeep::Match>>) -> Self {
        Self { _holding: HeldPages::Blocks(found) }
    }

    /// Layers, and where K and V of each lie.
    pub(crate) fn layers(found: CachedLayers) -> (Self, Vec<Place>) {
        let of =
            |view: TensorView<'_>| (view.bytes().as_ptr() as usize, code(view.dtype()), view.shape().dims().to_vec());
        let places = found.iter().flat_map(|(k, v)| [of(k), of(v)]).collect();
        (Self { _holding: HeldPages::Layers(Holding::new(found)) }, places)
    }
}

/// Where a tensor of a holder's own lies.
pub(crate) fn place(tensor: &PrivateTensor) -> Place {
    (tensor.address.as_ptr() as usize, code(tensor.dtype), tensor.shape.dims().to_vec())
}

fn code(dtype: DType) -> usize {
    DType::ALL.iter().position(|other| *other == dtype).unwrap_or(usize::MAX)
}

/// Blocks by number and address, as runs of those that lie behind each other.
pub(crate) fn runs(blocks: impl Iterator<Item = (usize, usize)>, block_bytes: usize) -> Vec<Run> {
    let stride = block_bytes.next_multiple_of(PAGE_BYTES);
    let mut runs: Vec<Run> = Vec::new();
    for (block, address) in blocks {
        match runs.last_mut() {
            Some((first, count, start)) if *first + *count == block && *start + *count * stride == address => {
                *count += 1;
            }
            _ => runs.push((block, 1, address)),
        }
    }
    runs
}

/// Has pages written by `write(where)`, and waits with `wait()` until nothing writes them any more, whatever was raised.
pub(crate) fn written<T>(write: &Py<PyAny>, wait: &Py<PyAny>, places: T) -> PyResult<()>
where
    T: for<'py> IntoPyObject<'py>,
{
    Python::attach(|py| {
        let mut raised = write.call1(py, (places,)).err();
        // Ctrl-C may come here too, and must not free pages that a device still writes.
        for _ in 0..WAITS {
            match wait.call0(py) {
                Ok(_) => break,
                Err(error) => _ = raised.get_or_insert(error),
            }
        }
        raised.map_or(Ok(()), Err)
    })
}

/// Element type and shape, as the library has them.
pub(crate) fn spec((code, dims): &RawSpec) -> PyResult<TensorSpec> {
    Ok((convert::dtype(*code)?, Shape::new(dims).map_err(|error| to_python(&error))?))
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn blocks_behind_each_other_are_one_run_and_others_are_not() {
        let blocks = [(3, 0x1000), (4, 0x3000), (5, 0x5000), (7, 0x7000), (8, 0x8000)];
        assert_eq!(runs(blocks.into_iter(), 4097), [(3, 3, 0x1000), (7, 1, 0x7000), (8, 1, 0x8000)]);
        assert!(runs(std::iter::empty(), 1).is_empty());
    }
}
