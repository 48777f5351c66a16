use kvkeep_engine::{Engine, EngineOptions};
use std::time::Instant;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let engine = Engine::load(path, &EngineOptions::default()).unwrap();
    for n in [1usize, 2, 4, 8, 1, 4] {
        let begin = Instant::now();
        std::thread::scope(|s| for i in 0..n { let engine=&engine; s.spawn(move || {
            let mut kv = engine.kv(512).unwrap();
            let mut l = engine.prefill(&(0..64).map(|t| t*7+i as u32).collect::<Vec<_>>(), &mut kv).unwrap();
            for _ in 0..64 { l = engine.decode(l.argmax(), &mut kv).unwrap(); }
        });});
        let s = begin.elapsed().as_secs_f64();
        println!("{n}: {:.1} tok/s decode incl. prefill of 64", n as f64*64.0/s);
    }
    // decode beside a prefill of 2000
    let mut kv = engine.kv(600).unwrap();
    let mut l = engine.prefill(&(0..64).collect::<Vec<_>>(), &mut kv).unwrap();
    std::thread::scope(|s| {
        let e=&engine;
        let t = s.spawn(move || { let mut kv = e.kv(2100).unwrap(); let b=Instant::now(); e.prefill(&(0..2000).collect::<Vec<_>>(), &mut kv).unwrap(); b.elapsed() });
        let mut gaps=vec![];
        while !t.is_finished() && gaps.len()<400 { let b=Instant::now(); l = engine.decode(l.argmax(), &mut kv).unwrap(); gaps.push(b.elapsed().as_secs_f64()*1e3); }
        gaps.sort_by(f64::total_cmp);
        println!("beside prefill of 2000 ({:?}): {} tokens, gap p50 {:.0} p95 {:.0} max {:.0} ms", t.join().unwrap(), gaps.len(), gaps[gaps.len()/2], gaps[gaps.len()*95/100], gaps[gaps.len()-1]);
    });
    let mut kv = engine.kv(2100).unwrap(); let b=Instant::now(); engine.prefill(&(0..2000).collect::<Vec<_>>(), &mut kv).unwrap(); println!("prefill alone {:?}", b.elapsed());
}
