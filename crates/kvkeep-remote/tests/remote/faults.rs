//! Faults between a node and its store: nothing is wrong, late, or gone for good. `make test-remote` runs it.
//!
//! The bar is the deadline and 10 ms, for each of the two blocks of a lookup: where the first has come, the second may
//! take as long again. 99 lookups of 100 take no longer than that for one block. On a machine that does other things a
//! thread may not run for longer than 10 ms: so none may be late by more than
//! [`TOLERANCE`] and four times what a thread that only sleeps meanwhile oversleeps. How late both were is printed.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::proxy::{Mode, Proxy};
use crate::common::server::{Cluster, RedisServer, S3Server};
use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::Tier;
use kvkeep_remote::RemoteConfig;

const DEADLINE: Duration = Duration::from_millis(50);
/// The S3 server of these tests takes 40 ms for a small object: it waits for an acknowledgement in between.
const S3_DEADLINE: Duration = Duration::from_millis(200);
const BAR: Duration = Duration::from_millis(10);
const TOLERANCE: Duration = Duration::from_millis(50);
const BACK: Duration = Duration::from_secs(2);
/// RAM in which a prompt of four blocks drives out all others.
const LITTLE_RAM: u64 = 4 * (32 << 10);

/// Lookups of what is in the store, in turns, so that each has to be read from there.
struct Load {
    node: Node,
    deadline: Duration,
    model: kvkeep::Namespace,
    next: u32,
}

impl Load {
    const PROMPTS: u32 = 12;

    fn new(config: RemoteConfig, deadline: Duration) -> Self {
        let node = Node::new(&config.deadline(deadline), LITTLE_RAM);
        let model = namespace("m");
        for number in 0..Self::PROMPTS {
            node.store(&model, &prompt(number, 2));
            node.cache.flush().unwrap();
        }
        Self { node, deadline, model, next: 0 }
    }

    /// One lookup; none of its bytes is wrong.
    fn turn(&mut self) -> (usize, Duration) {
        self.next = (self.next + 1) % Self::PROMPTS;
        self.node.lookup(&self.model, &prompt(self.next, 2))
    }

    /// Goes on for so long, beside a thread that only sleeps.
    fn run(&mut self, time: Duration) -> Run {
        let (stop, stopped) = mpsc::channel::<()>();
        let sleeper = thread::spawn(move || {
            let mut longest = Duration::ZERO;
            loop {
                let began = Instant::now();
                let over = stopped.recv_timeout(Duration::from_millis(1)) != Err(mpsc::RecvTimeoutError::Timeout);
                longest = longest.max(began.elapsed());
                if over {
                    return longest;
                }
            }
        });
        let run = self.turns(time);
        drop(stop);
        Run { overslept: sleeper.join().unwrap(), ..run }
    }

    /// Runs until nearly all is found, on a machine that may be busy.
    fn finds_nearly_all(&mut self, what: &str) {
        let runs: Vec<Run> = (0..8).map(|_| self.run(Duration::from_millis(500))).collect();
        assert!(runs.iter().any(|run| run.hits * 10 > run.lookups * 9), "{what}: {runs:?}");
    }

    fn turns(&mut self, time: Duration) -> Run {
        let (began, mut run) = (Instant::now(), Run { deadline: self.deadline, ..Run::default() });
        while began.elapsed() < time {
            let (found, took) = self.turn();
            run.lookups += 1;
            run.hits += usize::from(found == 2 * BLOCK_TOKENS);
            run.late += usize::from(took > self.deadline + BAR);
            run.longest = run.longest.max(took);
            // What was missed is stored again, as a request would.
            if found < 2 * BLOCK_TOKENS {
                self.node.store(&self.model, &prompt(self.next, 2));
            }
        }
        run
    }
}

/// What became of lookups.
#[derive(Debug, Default)]
struct Run {
    lookups: usize,
    hits: usize,
    late: usize,
    longest: Duration,
    deadline: Duration,
    overslept: Duration,
}

impl Run {
    fn was_in_time(&self, what: &str) {
        println!("{what}: {self:?}");
        let tolerance = TOLERANCE + 4 * self.overslept;
        assert!(self.longest < 2 * self.deadline + BAR + tolerance, "{what}: {self:?}");
        assert!(self.late * 100 <= self.lookups || self.overslept > BAR, "{what}: {self:?}");
    }
}

fn nothing_is_wrong_late_or_gone(store: &str, mut load: Load, proxy: &Proxy) {
    load.finds_nearly_all("before");
    for mode in [Mode::Delay(Duration::from_millis(200)), Mode::Drop, Mode::Cut, Mode::Corrupt] {
        proxy.set(mode);
        let run = load.run(Duration::from_millis(1500));
        proxy.set(Mode::Pass);
        let back = until("the tier is back", || load.turn().0 == 2 * BLOCK_TOKENS && load.node.tier.works());
        run.was_in_time(&format!("{store}, {mode:?}"));
        println!("{store}, {mode:?}: back after {back:?}");
        assert!(back < BACK, "{mode:?}: {back:?}");
    }
    // A write that was under way when the fault ended may still be lost: a flush says so, and a later one has it written.
    let whole = until("all is written", || load.node.cache.flush().is_ok());
    println!("{store}: all is written after {whole:?}");
    load.finds_nearly_all("after");
    println!("{:?}", load.node.tier.stats());
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn through_delays_drops_cuts_and_wrong_bytes_nothing_from_redis_is_wrong_late_or_gone_for_good() {
    let server = RedisServer::start(&[]);
    let proxy = Proxy::to(server.port);
    let url = format!("redis://127.0.0.1:{}", proxy.port);
    let load = Load::new(RemoteConfig::new(url).prefix(prefix()), DEADLINE);
    nothing_is_wrong_late_or_gone("redis", load, &proxy);
}

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn through_delays_drops_cuts_and_wrong_bytes_nothing_from_s3_is_wrong_late_or_gone_for_good() {
    let server = S3Server::start();
    let proxy = Proxy::to(server.port);
    let load = Load::new(server.config_at(proxy.port), S3_DEADLINE);
    nothing_is_wrong_late_or_gone("s3", load, &proxy);
}

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn a_block_that_is_long_in_coming_is_asked_for_once_more_if_that_is_wanted() {
    let server = S3Server::start();
    let proxy = Proxy::to(server.port);
    let hits = |hedge: Option<Duration>| {
        let mut load = Load::new(server.config_at(proxy.port).hedge(hedge), Duration::from_millis(500));
        proxy.set(Mode::Stall);
        let run = load.run(Duration::from_secs(4));
        proxy.set(Mode::Pass);
        println!("{run:?}");
        run.hits * 100 / run.lookups.max(1)
    };
    let (without, with) = (hits(None), hits(Some(Duration::from_millis(100))));
    println!("of 100 lookups, {without} found their blocks in time asking once, {with} asking again after 100 ms");
    assert!(with > 80 && with > without, "{without} {with}");
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_server_that_is_killed_and_comes_back_empty_is_used_again() {
    let mut server = RedisServer::start(&[]);
    let mut load = Load::new(RemoteConfig::new(server.url()).prefix(prefix()), DEADLINE);
    server.kill();
    load.run(Duration::from_secs(1)).was_in_time("killed");
    assert!(load.node.tier.stats().failing);
    server.restart();
    let back = until("the tier is back", || load.node.tier.works());
    println!("back {back:?} after the server");
    assert!(back < BACK, "{back:?}");
    load.run(Duration::from_millis(500));
    load.node.cache.flush().unwrap();
    load.finds_nearly_all("what was lost is written again");
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_master_that_is_killed_under_load_makes_no_request_wrong_or_late() {
    let mut cluster = Cluster::start();
    let mut load = Load::new(RemoteConfig::new(cluster.url()).prefix(prefix()), DEADLINE);
    load.finds_nearly_all("before");
    let killed = &mut cluster.servers[1];
    killed.kill();
    let run = load.run(Duration::from_secs(3));
    run.was_in_time("without a master of three");
    assert!(run.hits > 0, "the others are still used");
    killed.restart();
    // It takes no requests for the first two seconds: so Redis has it.
    let killed = &cluster.servers[1];
    until("it takes requests", || killed.ask(&["cluster", "info"]).contains("cluster_state:ok"));
    let back = until("all is found again", || {
        let run = load.run(Duration::from_millis(50));
        run.hits == run.lookups
    });
    println!("all found again {back:?} after the master took requests again");
    assert!(back < BACK, "{back:?}");
}
