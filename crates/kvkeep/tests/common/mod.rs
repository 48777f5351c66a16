//! KV whose every byte says where it belongs, so that a wrong byte is seen.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::allow_attributes,
    reason = "each test file uses its part, and a test that panics fails"
)]

use kvkeep::{DType, KvCache, KvLayout, LayerView, Match, Namespace, StoreOptions, StoreReport, TensorView, TokenId};

pub const BLOCK_TOKENS: usize = 4;
pub const LAYERS: usize = 3;

/// A block of this layout is exactly one page: 3 layers, 4 tokens; rounded up from 1,536 bytes.
pub fn layout() -> KvLayout {
    KvLayout::new(LAYERS as u32, 2, 32, DType::U8).unwrap().with_block_tokens(BLOCK_TOKENS as u32).unwrap()
}

pub fn namespace(model: &str) -> Namespace {
    Namespace::new(model, layout())
}

/// The bytes of one layer's K or V for these tokens; depends on the whole prefix, as attention does.
pub fn bytes(tokens: &[TokenId], layer: usize, side: u64, token_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ (layer as u64) << 8 ^ side;
    tokens
        .iter()
        .flat_map(|token| {
            state = (state ^ u64::from(*token)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(23);
            (0..token_bytes).map(move |i| (state >> (i % 8 * 8)) as u8 ^ i as u8).collect::<Vec<u8>>()
        })
        .collect()
}

pub struct Kv(Vec<(Vec<u8>, Vec<u8>)>, usize);

impl Kv {
    pub fn of(tokens: &[TokenId], from: usize) -> Self {
        let rows = 64;
        let side = |layer, side| bytes(tokens, layer, side, rows)[from * rows..].to_vec();
        Self((0..LAYERS).map(|layer| (side(layer, 0), side(layer, 1))).collect(), tokens.len() - from)
    }

    pub fn views(&self) -> Vec<LayerView<'_>> {
        let view = |bytes| TensorView::new(DType::U8, &[self.1, 2, 32], bytes).unwrap();
        self.0.iter().map(|(k, v)| LayerView { k: view(k), v: view(v) }).collect()
    }
}

pub fn store(cache: &KvCache, namespace: &Namespace, tokens: &[TokenId]) -> StoreReport {
    cache.store_from(namespace, tokens, 0, &Kv::of(tokens, 0).views(), &StoreOptions::default()).unwrap()
}

/// Every matched byte is the one that belongs to these tokens.
pub fn assert_right(found: &Match, tokens: &[TokenId]) {
    let cached = &tokens[..found.cached_tokens()];
    for layer in 0..LAYERS {
        let (k, v) = (bytes(cached, layer, 0, 64), bytes(cached, layer, 1, 64));
        for block in 0..found.blocks() {
            let view = found.layer(block, layer).unwrap();
            let span = block * BLOCK_TOKENS * 64..(block + 1) * BLOCK_TOKENS * 64;
            assert_eq!(view.k.bytes(), &k[span.clone()]);
            assert_eq!(view.v.bytes(), &v[span]);
        }
    }
}
