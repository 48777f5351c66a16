//! What comes to the daemon and goes from it, heard and reported, for a cache with a listener.
//!
//! Invariant: while the daemon is away nothing is in it, as far as is told: it finds nothing then.

use std::sync::Arc;
use std::time::Duration;

use kvkeep::tiers::Deadline;

use crate::channel::Channel;
use crate::link;
use crate::lock;
use crate::shared::{News, Shared};
use crate::wire::{Answer, Message, Purpose};

/// How often it is looked whether anything is still wanted, and between two tries to connect.
const TICK: Duration = Duration::from_millis(100);

/// The thread's work.
pub(crate) fn run(shared: &Arc<Shared>) {
    while !shared.is_closed() {
        if shared.is_up()
            && let Ok(welcomed) = link::connect(&shared.config, Purpose::Listen)
        {
            hear(shared, welcomed.channel);
            lock(&shared.news).forget_all();
        }
        shared.pause(TICK);
    }
}

fn hear(shared: &Shared, mut channel: Channel) {
    while !shared.is_closed() {
        let answer = match channel.receive(Deadline::after(TICK)) {
            Ok(Some(frame)) => Answer::decode(&frame),
            Ok(None) => continue,
            Err(error) => Err(error),
        };
        let Ok(answer) = answer else { return };
        let mut news = lock(&shared.news);
        match answer {
            Answer::Changed { came, went } => {
                let News { reports: Some(reports), known, .. } = &mut *news else { return };
                for (block, namespace) in came {
                    known.insert(block);
                    reports.block_came(block, namespace);
                }
                for block in went {
                    known.remove(&block);
                    reports.block_went(&block);
                }
            }
            Answer::Mark(number) => {
                news.mark = number;
                shared.heard.notify_all();
            }
            _ => return,
        }
    }
}

impl News {
    fn forget_all(&mut self) {
        if let Some(reports) = &self.reports {
            self.known.iter().for_each(|block| reports.block_went(block));
        }
        self.known.clear();
    }
}
