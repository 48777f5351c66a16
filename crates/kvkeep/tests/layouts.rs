//! Layouts that are not K and V of one shape for every layer: latent attention, layers that differ, opaque blocks. Each
//! in RAM, from the disk, through a codec, and past RAM.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails"
)]

#[path = "common/planes.rs"]
mod planes;

use planes::Planes;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use kvkeep::tiers::{BlockMeta, Codec, CodecId, Codecs, Frame, Payload, ReadTarget};
use kvkeep::{
    CacheConfig, Chain, DType, DiskConfig, Error, KvCache, KvLayout, LayerShape, LayerView, LayerViewMut, Namespace,
    Rejection, StoreOptions, TensorView, TensorViewMut, TokenOrder,
};

const BLOCK_TOKENS: usize = 16;

/// As of a model with latent attention: one tensor a layer.
fn latent() -> KvLayout {
    KvLayout::latent(3, 160, DType::BF16).unwrap().with_block_tokens(BLOCK_TOKENS as u32).unwrap()
}

/// Four kinds of layers: the usual one, wide heads, one tensor only, nothing at all.
fn mixed(order: TokenOrder) -> KvLayout {
    let usual = KvLayout::new(9, 2, 8, DType::F16).unwrap().with_block_tokens(BLOCK_TOKENS as u32).unwrap();
    let wide = LayerShape { kv_heads: 3, k_head_dim: 16, v_head_dim: 12 };
    let single = LayerShape { kv_heads: 1, k_head_dim: 20, v_head_dim: 0 };
    let mixed = usual.with_layers([2, 5, 8], wide).unwrap().with_layers([0], single).unwrap();
    mixed.with_layers([3, 4], LayerShape::NONE).unwrap().with_order(order)
}

fn layouts() -> Vec<KvLayout> {
    vec![latent(), mixed(TokenOrder::TokenHeadDim), mixed(TokenOrder::HeadTokenDim)]
}

fn namespace(layout: KvLayout) -> Namespace {
    Namespace::new("m", layout)
}

fn tokens(blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK_TOKENS) as u32).collect()
}

/// K and V of one layer: bytes that say which token, head and place they are of, in runs that a codec makes shorter.
struct Layer {
    k: (Vec<usize>, Vec<u8>),
    v: (Vec<usize>, Vec<u8>),
}

impl Layer {
    fn of(layout: &KvLayout, layer: usize, tokens: usize) -> Self {
        let shape = layout.layer_shape(layer);
        let side = |number: usize, dim: u32| {
            let (heads, row) = (shape.kv_heads as usize, dim as usize * layout.dtype().size_bytes());
            let is_token_first = layout.order() == TokenOrder::TokenHeadDim;
            let (outer, inner) = if is_token_first { (tokens, heads) } else { (heads, tokens) };
            let mut bytes = Vec::new();
            for (outer, inner) in (0..outer).flat_map(|outer| (0..inner).map(move |inner| (outer, inner))) {
                let (token, head) = if is_token_first { (outer, inner) } else { (inner, outer) };
                bytes.extend(vec![(token * 29 + head * 7 + layer * 3 + number) as u8; row]);
            }
            (vec![outer, inner, dim as usize], bytes)
        };
        Self { k: side(0, shape.k_head_dim), v: side(1, shape.v_head_dim) }
    }

    fn zeroed(&self) -> Self {
        let zeroed = |(dims, bytes): &(Vec<usize>, Vec<u8>)| (dims.clone(), vec![0; bytes.len()]);
        Self { k: zeroed(&self.k), v: zeroed(&self.v) }
    }

    fn view(&self, dtype: DType) -> LayerView<'_> {
        let [k, v] = [&self.k, &self.v].map(|(dims, bytes)| TensorView::new(dtype, dims, bytes).unwrap());
        LayerView { k, v }
    }

    fn view_mut(&mut self, dtype: DType) -> LayerViewMut<'_> {
        let [k, v] = [&mut self.k, &mut self.v].map(|(dims, bytes)| TensorViewMut::new(dtype, dims, bytes).unwrap());
        LayerViewMut { k, v }
    }
}

fn layers(layout: &KvLayout, tokens: usize) -> Vec<Layer> {
    (0..layout.layers()).map(|layer| Layer::of(layout, layer, tokens)).collect()
}

/// RAM of so many pages over a directory.
fn open(pages: u64, dir: &Path, codecs: Codecs) -> KvCache {
    KvCache::new(CacheConfig::new(pages * 4096).disk(DiskConfig::new(dir, 4 << 20).codecs(codecs))).unwrap()
}

fn store(cache: &KvCache, layout: &KvLayout, blocks: usize) {
    let layers = layers(layout, blocks * BLOCK_TOKENS);
    let views: Vec<_> = layers.iter().map(|layer| layer.view(layout.dtype())).collect();
    let report = cache.store(&namespace(*layout), &tokens(blocks), &views).unwrap();
    assert_eq!((report.stored_blocks, report.rejected_blocks), (blocks, 0), "{report:?}");
}

/// Everything is there, by every way of reading it.
fn check(cache: &KvCache, layout: &KvLayout, blocks: usize) {
    let (namespace, tokens, dtype) = (namespace(*layout), tokens(blocks), layout.dtype());
    let right = layers(layout, tokens.len());
    // Parts of the layers, straight from where they lie.
    for range in [0..layout.layers(), 1..2, layout.layers() - 2..layout.layers()] {
        let mut into: Vec<Layer> = right[range.clone()].iter().map(Layer::zeroed).collect();
        let mut views: Vec<_> = into.iter_mut().map(|layer| layer.view_mut(dtype)).collect();
        assert_eq!(cache.load_layers(&namespace, &tokens, range.clone(), &mut views).unwrap(), tokens.len());
        for (layer, right) in into.iter().zip(&right[range]) {
            assert!((&layer.k, &layer.v) == (&right.k, &right.v));
        }
    }
    let found = cache.lookup(&namespace, &tokens).unwrap();
    assert_eq!(found.cached_tokens(), tokens.len());
    let mut into: Vec<Layer> = right.iter().map(Layer::zeroed).collect();
    let mut views: Vec<_> = into.iter_mut().map(|layer| layer.view_mut(dtype)).collect();
    found.load(0..layout.layers(), &mut views).unwrap();
    assert!(into.iter().zip(&right).all(|(layer, right)| (&layer.k, &layer.v) == (&right.k, &right.v)));
    for block in 0..blocks {
        let first = layers(layout, tokens.len());
        for (number, layer) in first.iter().enumerate().filter(|_| layout.order() == TokenOrder::TokenHeadDim) {
            let view = found.layer(block, number).unwrap();
            let part = |bytes: &[u8]| bytes[block * bytes.len() / blocks..][..bytes.len() / blocks].to_vec();
            assert_eq!((view.k.bytes(), view.v.bytes()), (&part(&layer.k.1)[..], &part(&layer.v.1)[..]));
        }
        assert_eq!(found.block(block).unwrap().len(), layout.block_bytes());
    }
    assert!(matches!(found.block(blocks), Err(Error::BlockOutOfRange { .. })));
}

#[test]
fn layers_of_any_shape_come_back_from_ram_from_the_disk_and_through_a_codec() {
    for layout in layouts() {
        for codecs in [Codecs::default(), planes::planes()] {
            let home = tempfile::tempdir().unwrap();
            let cache = open(64, home.path(), codecs.clone());
            store(&cache, &layout, 6);
            check(&cache, &layout, 6);
            cache.close().unwrap();
            let cache = open(64, home.path(), codecs);
            check(&cache, &layout, 6);
            assert_eq!(cache.stats().tiers[0].damaged_total, 0);
        }
    }
}

/// Counts what it decodes.
#[derive(Debug, Default)]
struct Counting(std::sync::atomic::AtomicUsize);

impl Codec for Counting {
    fn id(&self) -> CodecId {
        Planes.id()
    }

    fn name(&self) -> &'static str {
        "counting"
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn encode(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        Planes.encode(frame, raw, into)
    }

    fn decode(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Planes.decode(frame, stored, raw)
    }
}

#[test]
fn loading_some_layers_decodes_those_and_no_others() {
    let (layout, home) = (mixed(TokenOrder::TokenHeadDim), tempfile::tempdir().unwrap());
    store(&open(64, home.path(), planes::planes()), &layout, 6);
    let counting = Arc::new(Counting::default());
    let cache = open(64, home.path(), Codecs::all(counting.clone()));
    let right = Layer::of(&layout, 5, 6 * BLOCK_TOKENS);
    let mut layer = right.zeroed();
    let into = &mut [layer.view_mut(layout.dtype())];
    assert_eq!(cache.load_layers(&namespace(layout), &tokens(6), 5..6, into).unwrap(), 6 * BLOCK_TOKENS);
    assert!((&layer.k, &layer.v) == (&right.k, &right.v));
    assert_eq!(counting.0.load(std::sync::atomic::Ordering::SeqCst), 6 * 2, "K and V of one layer in six blocks");
}

#[test]
fn sizes_are_those_of_the_layers_that_are_there() {
    assert_eq!(latent().block_bytes(), 3 * BLOCK_TOKENS * 160 * 2);
    let mixed = mixed(TokenOrder::TokenHeadDim);
    // Three usual layers (1, 6, 7), three wide ones, one of a single tensor, two of nothing.
    let token = 3 * 2 * 16 + 3 * 3 * 28 + 20;
    assert_eq!((mixed.block_bytes(), mixed.token_bytes()), (BLOCK_TOKENS * token * 2, token * 2));
    assert_eq!(mixed.layer_shape(3), LayerShape::NONE);
    assert!(!mixed.is_uniform() && latent().is_uniform());
    let frames = mixed.frames();
    assert_eq!(frames.len(), 3 * 2 + 3 * 2 + 1);
    assert!(frames.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
    assert_eq!(frames.last().unwrap().range.end, mixed.block_bytes());
    let opaque = KvLayout::opaque(1000, 16).unwrap();
    assert_eq!((opaque.block_bytes(), opaque.block_tokens(), opaque.layers()), (1000, 16, 0));
    assert_eq!(opaque.frames().len(), 1);
}

#[test]
fn a_tensor_of_another_layers_shape_is_refused_by_name() {
    let layout = mixed(TokenOrder::TokenHeadDim);
    let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
    let mut layers = layers(&layout, 2 * BLOCK_TOKENS);
    layers.swap(1, 2);
    let views: Vec<_> = layers.iter().map(|layer| layer.view(layout.dtype())).collect();
    let error = cache.store(&namespace(layout), &tokens(2), &views).unwrap_err();
    assert!(error.to_string().contains("k of layer 1"), "{error}");
    let k = TensorView::new(DType::BF16, &[16, 1, 160], &[0; 5120]).unwrap();
    let one = LayerView::latent(k).unwrap();
    assert_eq!(one.v.shape().dims(), [16, 1, 0]);
    let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
    assert_eq!(cache.store(&namespace(latent()), &tokens(1), &[one; 3]).unwrap().stored_blocks, 1);
}

#[test]
fn what_no_layout_can_say_is_refused_with_a_way_out() {
    let layout = KvLayout::new(9, 2, 8, DType::F16).unwrap();
    let shape = |k_head_dim| LayerShape { kv_heads: 1, k_head_dim, v_head_dim: 1 };
    let two = layout.with_layers([1], shape(1)).unwrap().with_layers([2], shape(2)).unwrap();
    let error = two.with_layers([3], shape(3)).unwrap_err();
    assert!(error.to_string().contains("opaque"), "{error}");
    assert!(two.with_layers([3], shape(2)).is_ok(), "a shape that is there already");
    assert!(layout.with_layers([9], shape(1)).is_err(), "no such layer");
    assert!(layout.with_layers(0..9, LayerShape::NONE).is_err(), "nothing left");
    assert!(layout.with_layers([1], LayerShape { kv_heads: 0, ..shape(1) }).is_err());
    assert!(KvLayout::new(200, 2, 8, DType::F16).unwrap().with_layers([3], shape(1)).is_err());
    assert!(KvLayout::opaque(0, 4).is_err() && KvLayout::opaque(4, 0).is_err());
    assert!(KvLayout::opaque(u32::MAX, 4).is_ok());
    assert!(KvLayout::opaque(100, 4).unwrap().with_layers([0], shape(1)).is_err());
}

/// An engine's row: bytes that nobody but the engine understands.
fn row(number: usize) -> Vec<u8> {
    (0..10_000).map(|at| (at / 500 * (number + 3)) as u8).collect()
}

fn rows(blocks: usize) -> Vec<Vec<u8>> {
    (0..blocks).map(row).collect()
}

fn opaque() -> Namespace {
    namespace(KvLayout::opaque(10_000, 16).unwrap())
}

fn engine_chain(namespace: &Namespace, blocks: u8) -> Chain {
    let hashes: Vec<[u8; 32]> = (0..blocks).map(|number| [number + 1; 32]).collect();
    Chain::external(namespace, &hashes).unwrap()
}

struct Row(Vec<u8>);

impl Payload for Row {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

struct Room(Vec<u8>, usize, Sender<(usize, Option<Vec<u8>>)>);

impl ReadTarget for Room {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        let bytes = read.map(|_| std::mem::take(&mut self.0));
        self.2.send((self.1, bytes)).unwrap();
    }
}

/// Whole rows by the engine's hashes, past RAM, into memory as the engine has it: neither aligned nor in whole pages.
fn read_lent(cache: &KvCache, chain: &Chain) -> Vec<Option<Vec<u8>>> {
    let (sender, answers) = channel();
    let room = |number| Box::new(Room(vec![0; 10_000], number, sender.clone())) as Box<dyn ReadTarget>;
    cache.read_lent(chain, 0, (0..chain.blocks()).map(room).collect());
    drop(sender);
    let mut answers: Vec<_> = answers.iter().collect();
    answers.sort_by_key(|(number, _)| *number);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

#[test]
fn opaque_rows_come_back_from_ram_from_the_disk_and_from_both() {
    let rows = rows(8);
    let slices: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
    let chain = engine_chain(&opaque(), 8);
    for codecs in [Codecs::default(), planes::planes()] {
        let home = tempfile::tempdir().unwrap();
        // In RAM alone.
        let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
        let report = cache.store_blocks(&chain, 0, &slices, &StoreOptions::default()).unwrap();
        assert_eq!((report.stored_blocks, report.rejection), (8, None));
        let found = cache.lookup_chain(&chain);
        assert!((0..8).all(|block| found.block(block).unwrap() == rows[block]));
        assert_eq!(found.cached_tokens(), 8 * 16);
        // On the disk alone.
        let disk = DiskConfig::new(home.path(), 4 << 20).queue_bytes(1 << 20).codecs(codecs.clone());
        let cache = KvCache::new(CacheConfig::without_ram().disk(disk.clone())).unwrap();
        let lent = rows.iter().map(|row| Arc::new(Row(row.clone())) as Arc<dyn Payload>).collect();
        assert_eq!(cache.write_lent(&chain, 0, lent, &StoreOptions::default()), 8);
        cache.flush().unwrap();
        assert!(read_lent(&cache, &chain).into_iter().eq(rows.iter().cloned().map(Some)));
        assert_eq!(cache.stats().used_bytes, 0);
        cache.close().unwrap();
        // In both: what one way wrote the other reads.
        let cache = KvCache::new(CacheConfig::new(1 << 20).disk(disk)).unwrap();
        let found = cache.lookup_chain(&chain);
        assert!((0..8).all(|block| found.block(block).unwrap() == rows[block]));
        let more = engine_chain(&opaque(), 12);
        let new: Vec<Vec<u8>> = (8..12).map(row).collect();
        let report =
            cache.store_blocks(&more, 8, &new.iter().map(Vec::as_slice).collect::<Vec<_>>(), &StoreOptions::default());
        assert_eq!(report.unwrap().stored_blocks, 4);
        cache.flush().unwrap();
        assert!(read_lent(&cache, &more).into_iter().eq((0..12).map(row).map(Some)));
        assert_eq!(cache.lookup_chain(&more).blocks(), 12);
    }
}

#[test]
fn opaque_blocks_have_no_layers_and_say_so() {
    let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
    let (namespace, tokens) = (opaque(), (0..32).collect::<Vec<u32>>());
    let chain = Chain::of(&namespace, &tokens).unwrap();
    let (one, two) = (row(1), row(2));
    cache.store_blocks(&chain, 0, &[&one, &two], &StoreOptions::default()).unwrap();
    let found = cache.lookup_chain(&chain);
    let view = TensorView::new(DType::U8, &[32, 1, 10_000], &[0; 320_000]).unwrap();
    let errors = [
        found.layer(0, 0).unwrap_err(),
        found.load(0..1, &mut []).unwrap_err(),
        cache.load_layers(&namespace, &tokens, 0..1, &mut []).unwrap_err(),
        cache.store(&namespace, &tokens, &[LayerView { k: view, v: view }]).unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().contains("opaque") && error.to_string().contains("whole"), "{error}");
    }
    assert_eq!(found.block(1).unwrap(), two);
}

#[test]
fn blocks_of_another_size_or_behind_a_gap_are_not_stored() {
    let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
    let chain = engine_chain(&opaque(), 4);
    let whole = row(0);
    let options = StoreOptions::default();
    let error = cache.store_blocks(&chain, 0, &[&whole[1..]], &options).unwrap_err();
    assert!(error.to_string().contains("9999") && error.to_string().contains("10000"), "{error}");
    assert!(cache.store_blocks(&chain, 3, &[&whole, &whole], &options).is_err());
    let report = cache.store_blocks(&chain, 2, &[&whole], &options).unwrap();
    assert_eq!((report.stored_blocks, report.rejection), (0, Some(Rejection::PrefixGone { token: 0 })));
    assert_eq!(cache.store_blocks(&chain, 0, &[whole.as_slice(); 2], &options).unwrap().stored_blocks, 2);
    assert_eq!(cache.store_blocks(&chain, 2, &[&whole], &options).unwrap().stored_blocks, 1);
    assert_eq!(cache.lookup_chain(&chain).blocks(), 3);
}
