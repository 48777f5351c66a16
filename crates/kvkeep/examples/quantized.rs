//! Keys and values in fewer bytes: what each codec makes of them, and what comes back.
//!
//! `cargo run --example quantized`

use kvkeep::tiers::Codecs;
use kvkeep::{QuantizedKvCache, Quantizer, TensorView};

fn main() -> kvkeep::Result<()> {
    // K of one layer, [batch, heads, tokens, dim]: some channels are larger than others, as in real keys.
    let k: Vec<f32> = (0..3 * 512 * 64).map(|at| (at % 64) as f32 / 8.0 + (at as f32 * 0.37).sin()).collect();
    let view = TensorView::of(&k, &[1, 3, 512, 64])?;
    println!("{:<10} {:>6} {:>12} {:>12}", "codec", "ratio", "mean error", "max error");
    for codec in Codecs::names() {
        let error = Quantizer::named(codec)?.measure_quantization_error(view, view);
        println!("{codec:<10} {:>6.2} {:>12.5} {:>12.5}", error.ratio, error.k.mean, error.k.max);
    }
    let cache = QuantizedKvCache::with_max_size_gib(0.1, "int4")?;
    let prompt = [101, 7592, 2088];
    let _ = cache.cache_kv(&prompt, 0, view, view)?;
    if let Some((found, _)) = cache.get_cached_kv(&prompt, 0)? {
        println!("found {:?} of {}", found.view().shape(), found.view().dtype());
    }
    cache.print_stats();
    Ok(())
}
