//! 32 layers at once: all or nothing in, all or nothing out, and never a copy to read them.

use std::time::Instant;

use half::bf16;
use kvkeep::{LayerKv, SimpleKvCache, StoreOptions, TensorView};

const LAYERS: usize = 32;
const SHAPE: [usize; 3] = [8, 1024, 128]; // [kv_heads, tokens, head_dim]

fn main() -> kvkeep::Result<()> {
    let cache = SimpleKvCache::with_max_size_gib(1.0)?;
    let elements: usize = SHAPE.iter().product();
    let began = Instant::now();
    let kv: Vec<Vec<bf16>> = (0..LAYERS).map(|layer| vec![bf16::from_f32(layer as f32); elements]).collect();
    let made = began.elapsed();

    let mut layers = Vec::new();
    for (layer, kv) in kv.iter().enumerate() {
        let tensor = TensorView::of(kv, &SHAPE)?;
        layers.push(LayerKv { layer, k: tensor, v: tensor });
    }
    let began = Instant::now();
    let outcome = cache.cache_all_layers_with("system prompt", &layers, &StoreOptions::default().compute_time(made))?;
    println!("{outcome:?}: {LAYERS} layers in {:.1?}", began.elapsed());

    let began = Instant::now();
    let hit = cache.get_all_layers("system prompt", LAYERS)?;
    println!("found, without copying, in {:.1?}", began.elapsed());
    if let Some(hit) = hit {
        for (layer, (k, _)) in hit.iter().enumerate() {
            assert_eq!(k.elements::<bf16>()?.first(), Some(&bf16::from_f32(layer as f32)));
        }
    }
    println!("{}", cache.get_stats());
    Ok(())
}
