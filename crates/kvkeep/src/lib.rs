//! Prefill once: an embeddable cache for the attention keys and values (KV) of LLM prompts.
//!
//! When a model reads a prompt it computes keys and values for every token of it. Serving
//! reads the same system prompts, documents and chats all day. This crate keeps their KV
//! and hands it back, so that only what is new has to be computed.
//!
//! Two front doors over one [`Store`]:
//! - [`KvCache`], by tokens: the longest run of resident blocks of a prompt, pinned, to be
//!   borrowed or copied into an engine's tensors. What engines use.
//! - [`SimpleKvCache`], by prefix text and layer: K and V of any shape, handed back as stored.
//!
//! Behind RAM there may be a directory on a disk (`DiskConfig`): what is stored goes there too, a
//! restart finds it again, and what RAM has evicted is loaded from there where that is faster than
//! computing it again. `Archive` looks at such a directory from outside.
//!
//! It is synchronous, runs on any number of threads, and knows nothing of models.
//!
//! Features, both on by default: `disk` (the disk tier), and `encryption` (of what lies there).

#[cfg(test)]
extern crate self as kvkeep;

mod block;
mod cache;
mod chain;
mod clock;
mod codec;
mod config;
mod error;
mod event;
mod eviction;
mod flight;
mod index;
mod key;
mod layout;
mod lend;
mod named;
mod namespaces;
mod process;
mod quantized;
mod record;
mod simulation;
mod slots;
mod stats;
mod store;
mod sync;
mod table;
mod tensor;
#[cfg(test)]
mod tests;
mod tier;

pub use cache::{Begun, KvCache, Look, Match, Missing, Residency, StoreReport};
pub use chain::Chain;
pub use clock::{Clock, ManualClock, SystemClock};
#[cfg(feature = "disk")]
pub use config::DiskConfig;
pub use config::{CacheConfig, Stop, StoreOptions, WritePolicy};
pub use error::{Error, OneLine, Rejection, Result};
pub use event::{Event, EventSink};
pub use eviction::{Admission, PolicyKind, Priority};
pub use key::{BlockHash, Namespace, NamespaceId, TokenId};
pub use layout::{DEFAULT_BLOCK_TOKENS, KvLayout, LayerShape, LayerView, LayerViewMut, TokenOrder};
pub use named::{
    CachedKv, CachedLayers, DEFAULT_MAX_SIZE_GIB, DEFAULT_TTL, Evicted, HashedPrefix, LayerKv, LayerSpec, MAX_LAYERS,
    Outcome, PrivateLayers, PrivateTensor, SimpleKvCache,
};
pub use namespaces::{NamespaceUsage, Usage};
pub use process::Process;
pub use quantized::{
    DEFAULT_EXACT_TOKENS, DEFAULT_QUANTIZER, OwnedTensor, Prefix, QuantizationLoss, QuantizedKvCache, Quantizer,
    SideLoss,
};
pub use record::TraceRecorder;
pub use simulation::{Changes, Hits, Simulation};
pub use stats::{Stats, TierStats};
pub use store::{Lease, LeaseId, Leased, Ram, Removed, Store};
pub use tensor::{DType, Element, MAX_RANK, Shape, TensorSpec, TensorView, TensorViewMut};
pub use tier::Tier;
#[cfg(feature = "disk")]
pub use tier::disk::{Archive, Contents, ManifestState, RecordInfo, RecordState, Verified};

/// What it takes to write a [`Tier`], and some that are there.
pub mod tiers {
    pub use crate::block::{BlockKey, BlockMeta, Facts};
    pub use crate::clock::Deadline;
    pub use crate::codec::{Codec, CodecId, Codecs, Lossless, Raw};
    pub use crate::event::Reports;
    pub use crate::layout::{Frame, Side};
    #[cfg(feature = "disk")]
    pub use crate::store::{Host, HostedRoom, HostedRun, Offered};
    pub use crate::tier::around::{Fault, Limit, Meter, Metered};
    #[cfg(any(test, feature = "contract"))]
    pub use crate::tier::contract;
    #[cfg(feature = "disk")]
    pub use crate::tier::disk::{Message, Messages};
    pub use crate::tier::memory::MemoryTier;
    pub use crate::tier::{Epoch, Forget, Forgets, Forgotten, Located, Offer, Payload, Read, ReadTarget};
}

/// Feeds bytes to every decoder of the disk format. For `fuzz/` alone.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn fuzz_disk_format(bytes: &[u8]) {
    tier::disk::decode_anything(bytes);
}

/// Feeds bytes to every codec, as what is stored and as a block. For `fuzz/` alone.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn fuzz_codecs(bytes: &[u8]) {
    codec::code_anything(bytes);
}

/// The snippets that people paste: compiled and run.
#[cfg(doctest)]
mod readmes {
    #[doc = include_str!("../../../README.md")]
    struct Repository;
    #[doc = include_str!("../README.md")]
    struct Crate;
    #[doc = include_str!("../../../docs/events.md")]
    struct Events;
}
