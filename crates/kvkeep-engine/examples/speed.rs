//! Prefill and decode speed of a model.
use std::time::Instant;

use kvkeep_engine::{Engine, EngineOptions};

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let start = Instant::now();
    let engine = Engine::load(path, &EngineOptions::default()).unwrap();
    println!("load {:?}", start.elapsed());
    let mut kv = engine.kv(4096).unwrap();
    for n in [16usize, 64, 256, 1024, 2048] {
        let tokens: Vec<u32> = (0..n as u32).map(|i| 100 + (i * 7919) % 40000).collect();
        let mut times = Vec::new();
        for _ in 0..5 {
            kv.truncate(0);
            let start = Instant::now();
            engine.prefill(&tokens, &mut kv).unwrap();
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!("prefill {n}: best {:.1} median {:.1} tok/s ({:.1} ms)", n as f64 / times[0], n as f64 / times[2], times[2]*1e3);
    }
    for at in [16, 1024] {
    let mut times = Vec::new();
    kv.truncate(at);
    for i in 0..64 {
        let start = Instant::now();
        engine.decode(100 + i, &mut kv).unwrap();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    println!("decode at {at}: best {:.1} median {:.1} tok/s", 1.0 / times[0], 1.0 / times[32]);
    }
    // quick sanity: greedy continuation of "Once upon a time" style ids printed as ids
    kv.truncate(0);
    let mut l = engine.prefill(&[1, 504, 5345], &mut kv).unwrap();
    for _ in 0..10 { let t = l.argmax(); print!("{t} "); l = engine.decode(t, &mut kv).unwrap(); }
    println!();
}
