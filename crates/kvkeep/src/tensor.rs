//! Borrowed tensors: a dtype, a shape and bytes, checked to fit each other once
//! and for all when the view is made.
//!
//! The cache never computes with elements, so it needs no tensor library: bytes
//! in row-major order are what engines and disks agree on.

use std::fmt;

use crate::error::{Error, Result};

/// The most dimensions a tensor may have.
pub const MAX_RANK: usize = 8;

/// Element types of KV tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit float, 4 exponent and 3 mantissa bits.
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// IEEE 754 double precision: what numpy makes unless told otherwise.
    F64,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer; also how packed 4-bit KV travels.
    I32,
    /// Signed 64-bit integer.
    I64,
}

/// The dimensions of a tensor, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: u8,
}

/// What two tensors of a named entry look like; blocks have their namespace's layout instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PairSpec {
    pub(crate) k: (DType, Shape),
    pub(crate) v: (DType, Shape),
    /// Length of the prefix text the pair is stored under.
    pub(crate) prefix_bytes: usize,
    /// The caller's own mark.
    pub(crate) tag: u8,
}

/// A contiguous, row-major tensor that is only borrowed.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    dtype: DType,
    shape: Shape,
    bytes: &'a [u8],
}

/// A contiguous, row-major tensor to be written into.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    dtype: DType,
    shape: Shape,
    bytes: &'a mut [u8],
}

/// Rust types that are elements of a [`DType`]. The 8-bit floats have no Rust
/// type: make their views from bytes. Other types cannot be made elements: a tensor's bytes are then none that
/// could be one.
pub trait Element: sealed::Plain + Copy + Send + Sync + 'static {
    /// The dtype of this type.
    const DTYPE: DType;
}

/// What a tensor looks like: its element type and shape.
pub type TensorSpec = (DType, Shape);

impl DType {
    /// Every dtype, in the order of their codes.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::I8,
        Self::U8,
        Self::F64,
        Self::I16,
        Self::I32,
        Self::I64,
    ];

    /// Its number on disk: the position in [`DType::ALL`].
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 2,
            Self::F8E4M3 => 3,
            Self::F8E5M2 => 4,
            Self::I8 => 5,
            Self::U8 => 6,
            Self::F64 => 7,
            Self::I16 => 8,
            Self::I32 => 9,
            Self::I64 => 10,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Bytes of one element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 => 1,
        }
    }

    /// The lower-case name, as engines write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::F64 => "f64",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PairSpec {
    /// V begins at a multiple of this behind K, so that it can be borrowed as elements.
    const ALIGN_BYTES: usize = 64;

    /// Where V begins behind K; `None` if that overflows.
    pub(crate) fn v_start(&self) -> Option<usize> {
        self.k.1.size_bytes(self.k.0)?.checked_next_multiple_of(Self::ALIGN_BYTES)
    }

    /// Bytes of both; `None` if that overflows.
    pub(crate) fn payload_bytes(&self) -> Option<usize> {
        self.v_start()?.checked_add(self.v.1.size_bytes(self.v.0)?)
    }
}

impl Shape {
    /// A shape of up to [`MAX_RANK`] dimensions.
    ///
    /// # Errors
    /// [`Error::Rank`] for more dimensions than that.
    pub fn new(dims: &[usize]) -> Result<Self> {
        let mut array = [0; MAX_RANK];
        let rank_error = || Error::Rank { rank: dims.len(), max: MAX_RANK };
        array.get_mut(..dims.len()).ok_or_else(rank_error)?.copy_from_slice(dims);
        let rank = u8::try_from(dims.len()).map_err(|_| rank_error())?;
        Ok(Self { dims: array, rank })
    }

    /// A shape of three dimensions.
    #[must_use]
    pub fn of([outer, middle, inner]: [usize; 3]) -> Self {
        Self { dims: [outer, middle, inner, 0, 0, 0, 0, 0], rank: 3 }
    }

    /// The dimensions, outermost first.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.dims.get(..usize::from(self.rank)).unwrap_or_default()
    }

    /// Bytes of a tensor of this shape; `None` if that overflows.
    #[must_use]
    pub fn size_bytes(&self, dtype: DType) -> Option<usize> {
        self.dims().iter().try_fold(dtype.size_bytes(), |bytes, dim| bytes.checked_mul(*dim))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl<'a> TensorView<'a> {
    /// A tensor over raw bytes in row-major order.
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::SizeOverflow`], or [`Error::BufferLength`] if the
    /// bytes are not exactly as many as shape and dtype ask for.
    pub fn new(dtype: DType, dims: &[usize], bytes: &'a [u8]) -> Result<Self> {
        let shape = checked_shape(dtype, dims, bytes.len())?;
        Ok(Self { dtype, shape, bytes })
    }

    /// A tensor over typed elements in row-major order.
    ///
    /// # Errors
    /// As [`TensorView::new`].
    pub fn of<T: Element>(elements: &'a [T], dims: &[usize]) -> Result<Self> {
        Self::new(T::DTYPE, dims, bytemuck::cast_slice(elements))
    }

    /// For bytes whose length is known to fit.
    pub(crate) fn trusted(dtype: DType, shape: Shape, bytes: &'a [u8]) -> Self {
        Self { dtype, shape, bytes }
    }

    /// A tensor without elements.
    pub(crate) fn empty() -> TensorView<'static> {
        let shape = Shape { dims: [0; MAX_RANK], rank: 1 };
        TensorView { dtype: DType::U8, shape, bytes: &[] }
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The raw bytes, row-major, little-endian.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements, without copying.
    ///
    /// # Errors
    /// [`Error::Cast`] if `T` is not the tensor's dtype or the bytes are not aligned for it.
    pub fn elements<T: Element>(&self) -> Result<&'a [T]> {
        let cast = |reason: String| Error::Cast { wanted: T::DTYPE, reason };
        if T::DTYPE != self.dtype {
            return Err(cast(format!("its dtype is {}", self.dtype)));
        }
        bytemuck::try_cast_slice(self.bytes).map_err(|error| cast(error.to_string()))
    }
}

impl<'a> TensorViewMut<'a> {
    /// A tensor to be written, over raw bytes in row-major order.
    ///
    /// # Errors
    /// As [`TensorView::new`].
    pub fn new(dtype: DType, dims: &[usize], bytes: &'a mut [u8]) -> Result<Self> {
        let shape = checked_shape(dtype, dims, bytes.len())?;
        Ok(Self { dtype, shape, bytes })
    }

    /// A tensor to be written, over typed elements in row-major order.
    ///
    /// # Errors
    /// As [`TensorView::new`].
    pub fn of<T: Element>(elements: &'a mut [T], dims: &[usize]) -> Result<Self> {
        Self::new(T::DTYPE, dims, bytemuck::cast_slice_mut(elements))
    }

    /// The same tensor, read-only.
    #[must_use]
    pub fn as_view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: self.shape, bytes: self.bytes }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}

fn checked_shape(dtype: DType, dims: &[usize], got_bytes: usize) -> Result<Shape> {
    let shape = Shape::new(dims)?;
    let expected_bytes = shape.size_bytes(dtype).ok_or(Error::SizeOverflow("the tensor's size"))?;
    if expected_bytes == got_bytes {
        Ok(shape)
    } else {
        Err(Error::BufferLength { shape, dtype, expected_bytes, got_bytes })
    }
}

/// What an element is inside: not for others to implement or to see.
mod sealed {
    /// Any bytes are a value, and a value is its bytes.
    pub trait Plain: bytemuck::Pod {}
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),+ $(,)?) => {$(
        impl sealed::Plain for $type {}
        impl Element for $type { const DTYPE: DType = DType::$dtype; }
    )+};
}

elements! {
    f32 => F32, half::f16 => F16, half::bf16 => BF16, i8 => I8, u8 => U8, f64 => F64, i16 => I16, i32 => I32, i64 => I64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_whose_bytes_do_not_fit_its_shape_is_refused() {
        let bytes = [0u8; 24];
        assert!(TensorView::new(DType::F32, &[2, 3], &bytes).is_ok());
        let error = TensorView::new(DType::F32, &[2, 4], &bytes).unwrap_err();
        assert!(error.to_string().contains("takes 32 bytes, the buffer has 24"), "{error}");
        assert!(matches!(TensorView::new(DType::F32, &[usize::MAX, 2], &bytes), Err(Error::SizeOverflow(_))));
        assert!(matches!(TensorView::new(DType::U8, &[1; 9], &bytes), Err(Error::Rank { .. })));
    }

    #[test]
    fn elements_come_back_only_as_the_dtype_they_are() {
        let data = [1.0f32, 2.0];
        let view = TensorView::of(&data, &[2]).unwrap();
        assert_eq!(view.elements::<f32>().unwrap(), &data);
        assert!(matches!(view.elements::<i8>(), Err(Error::Cast { .. })));
    }
}
