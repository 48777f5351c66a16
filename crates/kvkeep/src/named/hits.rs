//! What a hit by prefix hands out: tensors that are borrowed from the cache, or that are the holder's own to write to.
//!
//! Invariant: a hit pins its pages while it lives, so its bytes stay what they are after eviction, removal and the end of
//! the cache. Copies were the alternative: a hit would cost memory and the time of a memcpy for what is mostly only read.

use std::ptr::NonNull;

use crate::error::{Error, Result};
use crate::store::{Pin, PrivatePin};
use crate::tensor::{DType, Shape, TensorView};

/// K and V of one layer, borrowed from the cache. Stays valid after eviction and after
/// the cache is gone.
#[derive(Debug)]
pub struct CachedKv(pub(super) CachedLayers);

/// K and V of several layers, borrowed from the cache. Stays valid as [`CachedKv`] does.
#[derive(Debug)]
pub struct CachedLayers {
    pub(super) pin: Pin,
}

/// K and V of several layers in memory of the holder's own. What is written there changes
/// neither the cache nor what another hit shows. Making one copies nothing; a page is copied
/// when it is first written. Its pages cannot be evicted while it lives. It stays valid after
/// removal and after the cache is gone.
#[derive(Debug)]
pub struct PrivateLayers {
    pin: PrivatePin,
}

/// One tensor of [`PrivateLayers`]: memory that is valid while they live, and belongs to their
/// holder alone. It is an address and not a slice, because tensor libraries take addresses.
#[derive(Debug, Clone, Copy)]
pub struct PrivateTensor {
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Shape,
    /// Its first byte, aligned to 64; row-major from here on.
    pub address: NonNull<u8>,
}

impl CachedKv {
    /// The keys, with shape and dtype as stored.
    #[must_use]
    pub fn k(&self) -> TensorView<'_> {
        self.0.views(0).0
    }

    /// The values, with shape and dtype as stored.
    #[must_use]
    pub fn v(&self) -> TensorView<'_> {
        self.0.views(0).1
    }

    /// The same, as layer 0 of one.
    #[must_use]
    pub fn into_layers(self) -> CachedLayers {
        self.0
    }

    /// The same in memory of the holder's own, as layer 0 of one.
    ///
    /// # Errors
    /// [`Error::PrivateMemory`].
    pub fn into_private(self) -> Result<PrivateLayers> {
        self.0.into_private()
    }
}

impl CachedLayers {
    /// How many layers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pin.len()
    }

    /// Never: a hit has at least one layer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// K and V of one layer.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer(&self, layer: usize) -> Result<(TensorView<'_>, TensorView<'_>)> {
        self.pin.check()?;
        if layer >= self.len() {
            return Err(Error::LayerOutOfRange { layer, layers: self.len() });
        }
        Ok(self.views(layer))
    }

    /// What [`StoreOptions::tag`](crate::StoreOptions::tag) said when this layer was stored.
    #[must_use]
    pub fn tag(&self, layer: usize) -> u8 {
        self.pin.spec(layer).map_or(0, |spec| spec.tag)
    }

    /// K and V of every layer, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (TensorView<'_>, TensorView<'_>)> {
        (0..self.len()).map(|layer| self.views(layer))
    }

    fn views(&self, layer: usize) -> (TensorView<'_>, TensorView<'_>) {
        let bytes = self.pin.bytes(layer);
        let view = |(dtype, shape): (DType, Shape), start: usize| {
            let end = start + shape.size_bytes(dtype).unwrap_or(0);
            TensorView::trusted(dtype, shape, bytes.get(start..end).unwrap_or_default())
        };
        match self.pin.spec(layer).filter(|_| self.pin.check().is_ok()) {
            Some(spec) => (view(spec.k, 0), view(spec.v, spec.v_start().unwrap_or(0))),
            None => (TensorView::empty(), TensorView::empty()),
        }
    }

    /// The same in memory of the holder's own.
    ///
    /// # Errors
    /// [`Error::PrivateMemory`].
    pub fn into_private(self) -> Result<PrivateLayers> {
        Ok(PrivateLayers { pin: self.pin.into_private()? })
    }
}

impl PrivateLayers {
    /// How many layers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pin.pin().len()
    }

    /// Never: a hit has at least one layer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// K and V of one layer.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer(&self, layer: usize) -> Result<(PrivateTensor, PrivateTensor)> {
        let pair = || {
            let (spec, address) = (self.pin.pin().spec(layer)?, self.pin.address(layer)?);
            let v_start = spec.v_start()?;
            let tensor = |(dtype, shape), address| PrivateTensor { dtype, shape, address };
            Some((tensor(spec.k, address), tensor(spec.v, offset(address, v_start)?)))
        };
        pair().ok_or(Error::LayerOutOfRange { layer, layers: self.len() })
    }

    /// Do the layers lie behind each other in one piece of memory, with nothing else in
    /// between? They do if they were stored together and the cache had enough free pages in a row.
    #[must_use]
    pub fn is_one_run(&self) -> bool {
        self.pin.is_one_run()
    }

    /// What [`StoreOptions::tag`](crate::StoreOptions::tag) said when this layer was stored.
    #[must_use]
    pub fn tag(&self, layer: usize) -> u8 {
        self.pin.pin().spec(layer).map_or(0, |spec| spec.tag)
    }
}

/// So many bytes further on.
fn offset(address: NonNull<u8>, bytes: usize) -> Option<NonNull<u8>> {
    NonNull::new(address.as_ptr().wrapping_add(bytes))
}
