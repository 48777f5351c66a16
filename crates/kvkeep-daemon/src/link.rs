//! Connections to the daemon: made, and made again when it is back.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kvkeep::tiers::Deadline;

use crate::channel::Channel;
use crate::config::DaemonTierConfig;
use crate::shared::Shared;
use crate::wire::{Answer, Message, Purpose, Request, VERSION};

/// What saying hello may take.
const HELLO_TIME: Duration = Duration::from_secs(1);
/// Between two tries, from the first to the last of a row.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// A connection that nobody uses is asked so often whether it lives.
const IDLE: Duration = Duration::from_secs(1);

/// What the daemon said first.
pub(crate) struct Welcomed {
    pub(crate) channel: Channel,
    pub(crate) file: Option<OwnedFd>,
    pub(crate) capacity_bytes: u64,
    pub(crate) region_bytes: u64,
}

/// A new connection.
///
/// # Errors
/// `PermissionDenied` if the daemon does not want this client; else what kept it.
pub(crate) fn connect(config: &DaemonTierConfig, purpose: Purpose) -> io::Result<Welcomed> {
    let mut channel = Channel::connect(&config.socket)?;
    let (tenant, token) = (config.tenant.clone(), config.token.clone());
    channel.send(&Request::Hello { version: VERSION, purpose, tenant, token }.encode())?;
    match channel.first_answer(Deadline::after(HELLO_TIME))? {
        (Answer::Welcome { capacity_bytes, region_bytes }, file) => {
            Ok(Welcomed { channel, file, capacity_bytes, region_bytes })
        }
        (Answer::Refused(why), _) => Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the daemon did not say welcome")),
    }
}

/// Connects once, and has questions go there.
pub(crate) fn establish(shared: &Shared) -> io::Result<()> {
    let welcomed = connect(&shared.config, Purpose::Ask)?;
    shared.capacity_bytes.store(welcomed.capacity_bytes, std::sync::atomic::Ordering::SeqCst);
    shared.connected(welcomed.channel, HELLO_TIME)
}

/// Keeps the connection: tries again, ever more seldom, while there is none.
pub(crate) fn keep(shared: &Arc<Shared>) {
    let (mut pause, mut was_up) = (FIRST_PAUSE, shared.is_up());
    while !shared.is_closed() {
        if shared.is_up() {
            if !was_up {
                tracing::info!(socket = %shared.config.socket.display(), "the daemon is there");
            }
            (pause, was_up) = (FIRST_PAUSE, true);
            shared.wait_for_loss(IDLE);
            continue;
        }
        if std::mem::take(&mut was_up) {
            tracing::warn!(socket = %shared.config.socket.display(), "the daemon is away: going on without until it is back");
        }
        if let Err(error) = establish(shared) {
            if error.kind() == io::ErrorKind::PermissionDenied && pause < LAST_PAUSE {
                tracing::warn!(%error, "the daemon does not want this client");
            }
            shared.pause(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }
}
