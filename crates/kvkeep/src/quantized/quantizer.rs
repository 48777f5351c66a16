//! Tensors to bytes and back, and how far they are from what they were.
//!
//! Invariant: bytes say themselves what they are. A tensor is made only of what this codec has written, and a damaged head
//! asks for no more memory than its bytes can be decoded to. Dtype and shape in the entry were the alternative: there
//! stands what the codec made, bytes of one dimension.

use std::sync::Arc;

use crate::codec::{Codec, CodecId, Codecs, numbers};
use crate::error::Result;
use crate::layout::{Frame, Side, TokenOrder};
use crate::tensor::{DType, Shape, TensorView, TensorViewMut};

/// Tokens that are kept as they are, unless said otherwise: the first, which all others attend to, and the most recent.
pub const DEFAULT_EXACT_TOKENS: [u32; 2] = [4, 32];

/// Makes bytes of K or V, and K or V again.
#[derive(Debug, Clone)]
pub struct Quantizer {
    codec: Arc<dyn Codec>,
    order: TokenOrder,
    exact_tokens: [u32; 2],
}

/// A tensor with memory of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedTensor {
    dtype: DType,
    shape: Shape,
    bytes: usize,
    /// Wide enough for any element.
    memory: Vec<u64>,
}

/// How far K and V are from what a codec makes of them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct QuantizationLoss {
    /// Bytes as they were over bytes that are kept.
    pub ratio: f64,
    /// Of the keys.
    pub k: SideLoss,
    /// Of the values.
    pub v: SideLoss,
}

/// Of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct SideLoss {
    /// Mean of the elements' absolute differences.
    pub mean: f64,
    /// The largest of them.
    pub max: f64,
    /// Root of the mean square of the differences over that of the elements.
    pub relative: f64,
}

impl Quantizer {
    /// By the codec of this name, one of [`Codecs::names`]. Tensors are `[.., heads, tokens, dim]`, as transformers has
    /// them, and the first and the most recent tokens stay exact ([`DEFAULT_EXACT_TOKENS`]).
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for any other name.
    pub fn named(codec: &str) -> Result<Self> {
        let codec = Codecs::known_as(codec)?;
        Ok(Self { codec, order: TokenOrder::HeadTokenDim, exact_tokens: DEFAULT_EXACT_TOKENS })
    }

    /// Tensors are `[.., tokens, heads, dim]`, or `[.., heads, tokens, dim]`.
    #[must_use]
    pub fn order(self, order: TokenOrder) -> Self {
        Self { order, ..self }
    }

    /// So many tokens at the beginning and at the end stay exact.
    #[must_use]
    pub fn exact_tokens(self, first: u32, last: u32) -> Self {
        Self { exact_tokens: [first, last], ..self }
    }

    /// The codec's name.
    #[must_use]
    pub fn codec(&self) -> &'static str {
        self.codec.name()
    }

    /// The name of a cache for what this makes, where it would else have this one.
    #[must_use]
    pub fn cache_name(&self, name: &str) -> String {
        format!("{name}\0{}", self.codec.name())
    }

    /// The bytes of a tensor. What a codec cannot make smaller is among them as it is. `tag` is the caller's own mark.
    #[must_use]
    pub fn encode(&self, side: Side, tensor: TensorView<'_>, tag: u8) -> Vec<u8> {
        let (dtype, shape, raw) = (tensor.dtype(), tensor.shape(), tensor.bytes());
        let mut head = Head { codec: self.codec.id(), dtype, shape, side, order: self.order, tag };
        let mut room = vec![0; raw.len().saturating_sub(1)];
        let frame = head.frame(raw.len(), self.exact_tokens);
        let made = Some(&self.codec).filter(|codec| codec.id() != CodecId::RAW);
        let made = made.and_then(|codec| codec.encode(&frame, raw, &mut room)).and_then(|bytes| room.get(..bytes));
        if made.is_none() {
            head.codec = CodecId::RAW;
        }
        let mut stored = head.write();
        stored.extend_from_slice(made.unwrap_or(raw));
        stored
    }

    /// What a tensor's bytes say it is: its dtype, its shape and the caller's mark. `None` for what is no tensor's bytes.
    #[must_use]
    pub fn spec(stored: &[u8]) -> Option<(DType, Shape, u8)> {
        Head::read(stored).map(|(head, _)| (head.dtype, head.shape, head.tag))
    }

    /// The tensor again, into one of the same dtype and shape. `false` if these are not bytes that this codec made of
    /// such a one.
    #[must_use]
    pub fn decode_into(&self, stored: &[u8], into: &mut TensorViewMut<'_>) -> bool {
        let Some((head, kept)) = Head::read(stored) else { return false };
        let is_same = (head.dtype, head.shape) == (into.as_view().dtype(), into.as_view().shape());
        is_same && self.decode_bytes(&head, kept, into.bytes_mut())
    }

    /// The tensor again. `None` if these are not bytes that this codec made.
    #[must_use]
    pub fn decode(&self, stored: &[u8]) -> Option<OwnedTensor> {
        let (head, kept) = Head::read(stored)?;
        // No more memory than a codec can make of these bytes: a damaged shape asks for none.
        let most = kept.len().saturating_mul(MOST_RATIO);
        let bytes = head.shape.size_bytes(head.dtype).filter(|bytes| *bytes <= most)?;
        let mut tensor = OwnedTensor::zeroed(head.dtype, head.shape)?;
        debug_assert_eq!(bytes, tensor.bytes);
        self.decode_bytes(&head, kept, tensor.bytes_mut()).then_some(tensor)
    }

    fn decode_bytes(&self, head: &Head, kept: &[u8], into: &mut [u8]) -> bool {
        if head.codec == CodecId::RAW {
            let is_whole = kept.len() == into.len();
            if is_whole {
                into.copy_from_slice(kept);
            }
            return is_whole;
        }
        head.codec == self.codec.id() && self.codec.decode(&head.frame(into.len(), [0; 2]), kept, into)
    }

    /// How far K and V of one layer are from what the codec makes of them.
    #[must_use]
    pub fn measure_quantization_error(&self, k: TensorView<'_>, v: TensorView<'_>) -> QuantizationLoss {
        let (kept_k, kept_v) = (self.encode(Side::K, k, 0), self.encode(Side::V, v, 0));
        let error = |was: TensorView<'_>, kept: &[u8]| {
            let came = self.decode(kept);
            came.map_or_else(SideLoss::default, |came| SideLoss::of(was, came.view()))
        };
        let raw = k.bytes().len() + v.bytes().len();
        QuantizationLoss {
            ratio: raw as f64 / (kept_k.len() + kept_v.len()).max(1) as f64,
            k: error(k, &kept_k),
            v: error(v, &kept_v),
        }
    }
}

impl OwnedTensor {
    fn zeroed(dtype: DType, shape: Shape) -> Option<Self> {
        let bytes = shape.size_bytes(dtype)?;
        Some(Self { dtype, shape, bytes, memory: vec![0; bytes.div_ceil(size_of::<u64>())] })
    }

    /// The tensor.
    #[must_use]
    pub fn view(&self) -> TensorView<'_> {
        let bytes = bytemuck::cast_slice::<u64, u8>(&self.memory);
        TensorView::trusted(self.dtype, self.shape, bytes.get(..self.bytes).unwrap_or_default())
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.memory).get_mut(..self.bytes).unwrap_or_default()
    }
}

impl SideLoss {
    /// Of tensors of one dtype and shape; none of what is no float of 16 or 32 bits, which comes back exactly.
    fn of(was: TensorView<'_>, came: TensorView<'_>) -> Self {
        let [Some(was), Some(came)] = [was, came].map(|tensor| numbers(tensor.dtype(), tensor.bytes())) else {
            return Self::default();
        };
        let (mut sum, mut max, mut square, mut all) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (was, came) in was.iter().zip(&came).filter(|(was, _)| was.is_finite()) {
            let (was, difference) = (f64::from(*was), (f64::from(*was) - f64::from(*came)).abs());
            (sum, max) = (sum + difference, max.max(difference));
            (square, all) = (square + difference * difference, all + was * was);
        }
        let relative = if square == 0.0 { 0.0 } else { (square / all).sqrt() };
        Self { mean: sum / was.len().max(1) as f64, max, relative }
    }
}

/// In front of an entry's bytes: the codec, the dtype, the dimensions' number, side and order, the caller's mark; then
/// each dimension in 8 bytes.
const HEAD_BYTES: usize = 5;

/// One byte of `lossless` can stand for a piece of 64 KiB at most.
const MOST_RATIO: usize = 64 << 10;

/// What an entry's bytes begin with.
#[derive(Debug, Clone, Copy)]
struct Head {
    codec: CodecId,
    dtype: DType,
    shape: Shape,
    side: Side,
    order: TokenOrder,
    tag: u8,
}

impl Head {
    fn write(&self) -> Vec<u8> {
        let dims = self.shape.dims();
        let order = u8::from(self.order == TokenOrder::HeadTokenDim);
        let kind = u8::from(self.side == Side::V) | order << 1;
        // At most eight dimensions.
        let rank = u8::try_from(dims.len()).unwrap_or(u8::MAX);
        let mut bytes = vec![self.codec.0, self.dtype.code(), rank, kind, self.tag];
        dims.iter().for_each(|dim| bytes.extend((*dim as u64).to_le_bytes()));
        bytes
    }

    /// And what is behind it.
    fn read(stored: &[u8]) -> Option<(Self, &[u8])> {
        let ([codec, dtype, rank, kind, tag], rest) = stored.split_first_chunk::<HEAD_BYTES>()?;
        let (dims, rest) = rest.split_at_checked(usize::from(*rank) * 8)?;
        let dims = dims.as_chunks().0.iter().map(|dim| usize::try_from(u64::from_le_bytes(*dim)).ok());
        let shape = Shape::new(&dims.collect::<Option<Vec<_>>>()?).ok()?;
        let side = if kind & 1 == 0 { Side::K } else { Side::V };
        let order = if kind & 2 == 0 { TokenOrder::TokenHeadDim } else { TokenOrder::HeadTokenDim };
        let (codec, dtype) = (CodecId(*codec), DType::from_code(*dtype)?);
        (*kind < 4).then_some((Self { codec, dtype, shape, side, order, tag: *tag }, rest))
    }

    /// The tensor as a codec takes it: dimensions before those of heads, tokens and elements count as heads.
    fn frame(&self, bytes: usize, exact_tokens: [u32; 2]) -> Frame {
        let (side, dtype, dims) = (Some(self.side), self.dtype, self.shape.dims());
        let folded = match (self.order, dims) {
            (TokenOrder::HeadTokenDim, [outer @ .., tokens, dim]) => Some([outer.iter().product(), *tokens, *dim]),
            (TokenOrder::TokenHeadDim, [outer @ .., tokens, heads, dim]) if outer.iter().all(|dim| *dim == 1) => {
                Some([*tokens, *heads, *dim])
            }
            _ => None,
        };
        let shape = folded.and_then(|dims| Shape::new(&dims).ok());
        let order = shape.map(|_| self.order);
        Frame { range: 0..bytes, layer: 0, side, dtype, shape: shape.unwrap_or(self.shape), order, exact_tokens }
    }
}
