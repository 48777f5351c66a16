//! Get and put between two processes, each beside memcpy of the same bytes in the same run: blocks of 2 MiB, a batch of
//! them at a time, rounds in turns, medians. Run it alone on its machine.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that fails ends")]

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("a daemon needs Linux");
}

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io::BufRead;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::sync::mpsc::{Sender, channel};
    use std::time::{Duration, Instant};

    use kvkeep::tiers::{BlockMeta, Payload, ReadTarget};
    use kvkeep::{CacheConfig, Chain, KvCache, KvLayout, Namespace, StoreOptions};
    use kvkeep_daemon::{Daemon, DaemonConfig, DaemonTier, DaemonTierConfig, Tenant};

    const BLOCK_BYTES: usize = 2 << 20;
    const BLOCKS: u32 = 64;
    const RAM_BYTES: u64 = 512 << 20;
    const ROUNDS: usize = 15;

    pub(super) fn main() {
        if let Some(socket) = std::env::args().nth(1) {
            let config = DaemonConfig::new(socket, vec![Tenant::without_token(RAM_BYTES)]);
            let _daemon = Daemon::start(&config).unwrap();
            println!("ready");
            std::io::stdin().lines().for_each(drop);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("daemon.sock");
        let began = Instant::now();
        let mut daemon = Command::new(std::env::current_exe().unwrap())
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        std::io::BufReader::new(daemon.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        println!("start: {:.0} ms from the process's beginning until it listens", began.elapsed().as_secs_f64() * 1e3);
        measure(&socket);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    struct Lent(Arc<Vec<u8>>);

    impl Payload for Lent {
        fn bytes(&self) -> &[u8] {
            &self.0
        }
    }

    struct Target {
        bytes: Vec<u8>,
        answer: Sender<(bool, Vec<u8>)>,
    }

    impl ReadTarget for Target {
        fn bytes_mut(&mut self) -> &mut [u8] {
            &mut self.bytes
        }

        fn complete(self: Box<Self>, read: Option<BlockMeta>) {
            self.answer.send((read.is_some(), self.bytes)).unwrap();
        }
    }

    fn chain(number: u32, blocks: u32) -> Chain {
        let layout = KvLayout::opaque(u32::try_from(BLOCK_BYTES).unwrap(), 1).unwrap();
        let tokens: Vec<u32> = (0..blocks).map(|token| number * 1000 + token).collect();
        Chain::of(&Namespace::new("m", layout), &tokens).unwrap()
    }

    fn get(cache: &KvCache, chain: &Chain, buffers: &mut Vec<Vec<u8>>) -> Duration {
        let (answer, answers) = channel();
        let targets: Vec<Box<dyn ReadTarget>> = buffers
            .drain(..chain.blocks())
            .map(|bytes| Box::new(Target { bytes, answer: answer.clone() }) as Box<dyn ReadTarget>)
            .collect();
        let began = Instant::now();
        cache.read_lent(chain, 0, targets);
        for _ in 0..chain.blocks() {
            let (hit, bytes) = answers.recv().unwrap();
            assert!(hit, "a miss");
            buffers.push(bytes);
        }
        began.elapsed()
    }

    fn put(cache: &KvCache, chain: &Chain, from: &[Arc<Vec<u8>>]) -> Duration {
        let payloads = from.iter().take(chain.blocks());
        let payloads = payloads.map(|bytes| Arc::new(Lent(Arc::clone(bytes))) as Arc<dyn Payload>).collect();
        let began = Instant::now();
        assert_eq!(cache.write_lent(chain, 0, payloads, &StoreOptions::default()), chain.blocks());
        cache.flush().unwrap();
        began.elapsed()
    }

    fn memcpy(from: &[Arc<Vec<u8>>], into: &mut [Vec<u8>], threads: usize) -> Duration {
        let began = Instant::now();
        let part = from.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for (from, into) in from.chunks(part).zip(into.chunks_mut(part)) {
                let copy = move || from.iter().zip(into).for_each(|(from, into)| into.copy_from_slice(from));
                if threads == 1 {
                    copy();
                } else {
                    scope.spawn(copy);
                }
            }
        });
        began.elapsed()
    }

    fn measure(socket: &Path) {
        let config = DaemonTierConfig::new(socket).queue_bytes(1 << 30).deadline(Duration::from_secs(5));
        let tier = Arc::new(DaemonTier::open(&config).unwrap());
        let cache = KvCache::new(CacheConfig::without_ram().tier(tier)).unwrap();
        let block = |number: u32| {
            Arc::new((0..BLOCK_BYTES).map(|at| (at as u64 ^ u64::from(number)).to_le_bytes()[0]).collect())
        };
        let from: Vec<Arc<Vec<u8>>> = (0..BLOCKS).map(block).collect();
        let mut buffers: Vec<Vec<u8>> = (0..BLOCKS).map(|_| vec![1; BLOCK_BYTES]).collect();
        let mut into = buffers.clone();
        // So that what is written to has memory, as it has in a daemon that has run for a while.
        put(&cache, &chain(0, BLOCKS), &from);
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); 6];
        for round in 0..ROUNDS {
            let number = 100 + u32::try_from(round).unwrap();
            // What is stored next evicts nothing, and lies where something lay before.
            cache.store_handle().clear();
            let (all, one) = (chain(number, BLOCKS), chain(10_000 + number, 1));
            let took = [
                memcpy(&from, &mut into, 1),
                put(&cache, &all, &from),
                memcpy(&from, &mut into, 2),
                get(&cache, &all, &mut buffers),
                put(&cache, &one, &from),
                get(&cache, &one, &mut buffers),
            ];
            times.iter_mut().zip(took).for_each(|(times, took)| times.push(took.as_secs_f64()));
        }
        // Reads end in any order.
        cache.store_handle().clear();
        put(&cache, &chain(1, BLOCKS), &from);
        get(&cache, &chain(1, BLOCKS), &mut buffers);
        buffers.sort_unstable();
        let mut right: Vec<&Vec<u8>> = from.iter().map(AsRef::as_ref).collect();
        right.sort_unstable();
        assert!(buffers.iter().zip(right).all(|(one, other)| one == other), "wrong bytes");
        let median = |times: &mut Vec<f64>| {
            times.sort_unstable_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap()
        };
        let seconds: Vec<f64> = times.iter_mut().map(median).collect();
        let [copy, put_all, copy_two, get_all, put_one, get_one] = seconds.try_into().expect("six");
        let gbs = |seconds: f64, blocks: u32| f64::from(blocks) * BLOCK_BYTES as f64 / seconds / 1e9;
        println!("memcpy, one thread:  {:.2} GB/s; two threads: {:.2} GB/s", gbs(copy, BLOCKS), gbs(copy_two, BLOCKS));
        for (what, seconds, blocks) in [
            ("get", get_all, BLOCKS),
            ("put", put_all, BLOCKS),
            ("get of one block", get_one, 1),
            ("put of one block", put_one, 1),
        ] {
            let rate = gbs(seconds, blocks);
            println!("{what}: {rate:.2} GB/s, {:.2} of memcpy by one thread", rate / gbs(copy, BLOCKS));
        }
        lookups(&cache);
    }

    /// What it takes to know what is there.
    fn lookups(cache: &KvCache) {
        for (what, chain) in [("1 key", chain(100, 1)), ("64 keys", chain(100, 64)), ("512 keys", chain(500, 512))] {
            let mut times: Vec<f64> = (0..200)
                .map(|_| {
                    let began = Instant::now();
                    std::hint::black_box(cache.where_lent(&chain));
                    began.elapsed().as_secs_f64() * 1e6
                })
                .collect();
            times.sort_unstable_by(f64::total_cmp);
            println!("a look-up of {what}: {:.0} us", times.get(100).unwrap());
        }
    }
}
