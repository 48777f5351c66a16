//! Tensors through a codec and back, for `kvkeep.QuantizedKVCache`.

use kvkeep::tiers::Side;
use kvkeep::{Prefix, TokenOrder};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::error::{raise, to_python};
use crate::memory::{Access, Lent, Tokens};

/// The caller's mark of what came in as a torch tensor.
const TORCH: u8 = 1;

/// Mean, largest and relative difference.
type RawError = (f64, f64, f64);

/// Makes bytes of K or V, and K or V again.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Quantizer(kvkeep::Quantizer);

#[pymethods]
impl Quantizer {
    #[new]
    fn new(codec: &str, head_first: bool, exact_tokens: (u32, u32)) -> PyResult<Self> {
        let quantizer = kvkeep::Quantizer::named(codec).map_err(|error| to_python(&error))?;
        let order = if head_first { TokenOrder::HeadTokenDim } else { TokenOrder::TokenHeadDim };
        Ok(Self(quantizer.order(order).exact_tokens(exact_tokens.0, exact_tokens.1)))
    }

    /// The name of a cache for what this makes.
    fn cache_name(&self) -> String {
        self.0.cache_name("default")
    }

    /// The bytes of K, or of V.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        tensor: &Bound<'py, PyAny>,
        is_value: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let lent = Lent::new(tensor, Access::Read)?;
        let tag = if lent.is_torch() { TORCH } else { 0 };
        let side = if is_value { Side::V } else { Side::K };
        let bytes = py.detach(|| Ok(self.0.encode(side, lent.view()?, tag)));
        bytes.map(|bytes| PyBytes::new(py, &bytes)).map_err(|error: kvkeep::Error| to_python(&error))
    }

    /// The code of the dtype, the shape, and whether it came in as a tensor of torch.
    #[staticmethod]
    fn spec<'py>(py: Python<'py>, stored: &Bound<'py, PyAny>) -> PyResult<(u8, Bound<'py, PyTuple>, bool)> {
        let lent = Lent::new(stored, Access::Read)?;
        let stored = lent.view().map_err(|error| to_python(&error))?;
        let (dtype, shape, tag) = kvkeep::Quantizer::spec(stored.bytes()).ok_or_else(damaged)?;
        let code = kvkeep::DType::ALL.iter().position(|other| *other == dtype).unwrap_or_default();
        Ok((u8::try_from(code)?, PyTuple::new(py, shape.dims())?, tag == TORCH))
    }

    /// Writes the tensor again into one of the same dtype and shape, which nobody else has.
    fn decode(&self, py: Python<'_>, stored: &Bound<'_, PyAny>, into: &Bound<'_, PyAny>) -> PyResult<()> {
        let (lent, mut to) = (Lent::new(stored, Access::Read)?, Lent::new(into, Access::WriteNew)?);
        let done = py.detach(|| Ok(self.0.decode_into(lent.view()?.bytes(), &mut to.view_mut()?)));
        if done.map_err(|error: kvkeep::Error| to_python(&error))? { Ok(()) } else { Err(damaged()) }
    }

    /// The ratio, and the errors of K and of V.
    fn measure(
        &self,
        py: Python<'_>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
    ) -> PyResult<(f64, RawError, RawError)> {
        let (k, v) = (Lent::new(k, Access::Read)?, Lent::new(v, Access::Read)?);
        let measured = py.detach(|| Ok(self.0.measure_quantization_error(k.view()?, v.view()?)));
        let measured = measured.map_err(|error: kvkeep::Error| to_python(&error))?;
        let of = |side: kvkeep::SideLoss| (side.mean, side.max, side.relative);
        Ok((measured.ratio, of(measured.k), of(measured.v)))
    }
}

/// A text that stands for these tokens, and for nothing else.
#[pyfunction]
pub(crate) fn prefix_of_tokens(tokens: &Bound<'_, PyAny>) -> PyResult<String> {
    let tokens = Tokens::new(tokens)?;
    text(Prefix::Tokens(tokens.ids()))
}

/// A text that stands for this one, and for no tokens.
#[pyfunction]
pub(crate) fn prefix_of_text(prefix: &str) -> PyResult<String> {
    text(Prefix::Text(prefix))
}

fn text(prefix: Prefix<'_>) -> PyResult<String> {
    prefix.text().map(std::borrow::Cow::into_owned).map_err(|error| to_python(&error))
}

fn damaged() -> PyErr {
    raise("KvkeepError", "these are not bytes that this codec made of such a tensor")
}
