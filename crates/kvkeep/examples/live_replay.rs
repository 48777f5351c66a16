//! Drives a live cache, RAM and disk, with a recorded trace and blocks of two bytes, and prints what it hit beside what
//! the replay without payload says.
//!
//! `kvkeep replay` answers in seconds for any capacity; this shows that the product does as it says.
//!
//!     cargo run --release --example live_replay -- TRACE RAM_BLOCKS DISK_BLOCKS [ADMISSION...]

#[path = "../tests/common/live.rs"]
mod live;

use std::error::Error;
use std::io::{BufRead, BufReader};

use kvkeep::{Admission, PolicyKind, Simulation};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trace, ram, disk, rules @ ..] = arguments.as_slice() else {
        return Err("give TRACE RAM_BLOCKS DISK_BLOCKS [ADMISSION...]".into());
    };
    let (requests, ram, disk) = (read(trace)?, ram.parse()?, disk.parse()?);
    let rules = if rules.is_empty() { vec!["all".to_owned()] } else { rules.to_vec() };
    let all: usize = requests.iter().map(Vec::len).sum();
    let rate = |blocks: usize| 100.0 * blocks as f64 / all as f64;
    println!("{trace}, {ram} + {disk} blocks: % hit, blocks written (and again) to the disk");
    for rule in rules {
        let rule: Admission = rule.parse()?;
        let mut replay = Simulation::new(ram, PolicyKind::Adaptive)?.with_disk(disk, rule)?;
        let said: usize = requests.iter().map(|blocks| replay.request(blocks).total()).sum();
        let live = live::live(&requests, ram, disk, rule)?;
        println!(
            "{rule}: live {:.1}% ({} blocks from the disk), {} written and {} again; replay {:.1}%, {} written and {} again",
            rate(live.blocks),
            live.from_disk,
            live.written,
            live.again,
            rate(said),
            replay.disk_written_blocks(),
            replay.disk_reinserted_blocks()
        );
    }
    Ok(())
}

/// The blocks of each request, from JSON lines with `hash_ids`.
fn read(trace: &str) -> Result<Vec<Vec<u64>>, Box<dyn Error>> {
    let mut requests = Vec::new();
    for line in BufReader::new(std::fs::File::open(trace)?).lines() {
        let line = line?;
        let ids = line.split_once("\"hash_ids\"").and_then(|(_, rest)| rest.split_once('[')?.1.split_once(']'));
        let (ids, _) = ids.ok_or("a line without hash_ids")?;
        let ids = ids.split(',').map(str::trim).filter(|id| !id.is_empty());
        requests.push(ids.map(str::parse).collect::<Result<_, _>>()?);
    }
    Ok(requests)
}
