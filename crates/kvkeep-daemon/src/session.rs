//! One connection to the daemon, on a thread of its own: a request, its answer, the next request.
//!
//! Invariants:
//! - What a connection holds or is writing ends with it, however its client ends, and with its lease: without a sign of
//!   life for so long, all of it is free. A client that comes later is told so.
//! - The memory that a client writes is copied out before anything of it is believed, and copied once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use kvkeep::NamespaceId;
use kvkeep::OneLine;
use kvkeep::tiers::{BlockKey, BlockMeta, Deadline, HostedRoom, HostedRun, Offered};

use crate::channel::Channel;
use crate::memory::{Mapping, staging};
use crate::server::{Region, Shared};
use crate::wire::{Answer, Fate, Figures, Message, PIECE_BYTES, PIECES, Purpose, Request, VERSION};

/// What a client has to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// What a look at a disk may take.
const LOOK_TIME: Duration = Duration::from_millis(50);
/// What telling listeners may take.
const SETTLE_TIME: Duration = Duration::from_secs(5);
/// A listener's connection is looked at so often while nothing happens.
const LISTEN_TICK: Duration = Duration::from_millis(200);

/// What a connection has of its region.
#[derive(Debug)]
pub(crate) struct Session {
    region: Arc<Region>,
    lease: Duration,
    held: Option<HostedRun>,
    rooms: Vec<Option<Room>>,
    /// A writer's.
    staging: Option<Mapping>,
    /// When what it holds ends.
    ends_at: Instant,
}

/// A block that is being written.
#[derive(Debug)]
struct Room {
    room: HostedRoom,
    filled: usize,
}

impl Session {
    /// Serves one connection until it ends.
    pub(crate) fn serve(shared: &Arc<Shared>, mut channel: Channel) -> io::Result<()> {
        let Some((mut session, purpose)) = Self::begin(shared, &mut channel)? else { return Ok(()) };
        if purpose == Purpose::Listen {
            return listen(shared, &session.region, &mut channel);
        }
        loop {
            let until = if session.has_lease() { session.left() } else { Deadline::never() };
            match channel.receive(until) {
                Ok(Some(frame)) => {
                    let answer = Request::decode(&frame).and_then(|request| session.answer(request));
                    match answer {
                        Ok(answer) => channel.send(&answer.encode())?,
                        Err(error) => return refuse(&mut channel, &error),
                    }
                }
                Ok(None) => session.let_go(),
                // Its length is no length.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return refuse(&mut channel, &error),
                Err(error) => return Err(error),
            }
        }
    }

    /// Says hello; `None` for one who was refused.
    fn begin(shared: &Arc<Shared>, channel: &mut Channel) -> io::Result<Option<(Self, Purpose)>> {
        let frame = match channel.receive(Deadline::after(HELLO_TIME)) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(None),
            Err(error) => return refuse(channel, &error).map(|()| None),
        };
        // After its hello: a socket that is closed with something unread in it loses what was said last.
        let peer = rustix::net::sockopt::socket_peercred(&*channel).map(|peer| peer.uid);
        if peer != Ok(rustix::process::geteuid()) {
            let why = "this daemon serves its own user alone: start one as yours";
            return refuse(channel, &io::Error::other(why)).map(|()| None);
        }
        let (purpose, tenant, token) = match Request::decode(&frame) {
            Ok(Request::Hello { version: VERSION, purpose, tenant, token }) => (purpose, tenant, token),
            Ok(Request::Hello { version, .. }) => {
                let why =
                    format!("the daemon speaks version {VERSION}, the client {version}: use one release for both");
                return refuse(channel, &io::Error::other(why)).map(|()| None);
            }
            Ok(_) => return refuse(channel, &io::Error::other("the first message is a hello")).map(|()| None),
            Err(error) => return refuse(channel, &error).map(|()| None),
        };
        let Some(region) = shared.region(&tenant, &token) else {
            // The same for a name that there is and one that there is not.
            let why = "no tenant has this name and this token: see the daemon's file of tenants";
            return refuse(channel, &io::Error::other(why)).map(|()| None);
        };
        let welcome = Answer::Welcome { capacity_bytes: region.tenant.ram_bytes, region_bytes: region.bytes };
        let welcome = welcome.encode();
        let mut session = Self {
            lease: shared.lease,
            held: None,
            rooms: Vec::new(),
            staging: None,
            ends_at: Instant::now(),
            region: Arc::clone(&region),
        };
        match purpose {
            Purpose::Read => channel.send_with(&welcome, std::os::fd::AsFd::as_fd(&region.file))?,
            Purpose::Write => {
                let bytes = (PIECES * PIECE_BYTES) as u64;
                let file = staging(bytes)?;
                session.staging = Some(Mapping::of_reader(&file, bytes)?);
                channel.send_with(&welcome, std::os::fd::AsFd::as_fd(&file))?;
            }
            Purpose::Ask | Purpose::Listen => channel.send(&welcome)?,
        }
        Ok(Some((session, purpose)))
    }

    fn has_lease(&self) -> bool {
        self.held.is_some() || !self.rooms.is_empty()
    }

    fn left(&self) -> Deadline {
        Deadline::after(self.ends_at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    }

    /// A sign of life: what it holds goes on, if it has not ended.
    fn renew(&mut self) {
        if self.has_lease() && self.ends_at <= Instant::now() {
            self.let_go();
        }
        self.ends_at = Instant::now() + self.lease;
    }

    fn let_go(&mut self) {
        self.held = None;
        self.rooms.clear();
    }

    fn answer(&mut self, request: Request) -> io::Result<Answer> {
        let host = &self.region.host;
        Ok(match request {
            Request::Hello { .. } => return Err(io::Error::other("a hello comes once")),
            Request::Locate(id, keys) => Answer::Located(host.locate(id, &keys, Deadline::after(LOOK_TIME))),
            Request::Hold(wanted) => self.hold(&wanted),
            Request::Release => {
                self.renew();
                Answer::Released(self.held.take().is_some())
            }
            Request::Begin(metas) => self.begin_rooms(metas),
            Request::Piece { room, slot, bytes, sum } => self.take_piece(room, slot, bytes, sum),
            Request::Seal(which) => self.seal(&which),
            Request::Forget(gone) => {
                let forgotten = host.forget(&gone.as_forget());
                Answer::Forgotten { found: forgotten.found, entries: forgotten.entries }
            }
            Request::Flush => Answer::Done(host.flush().err().map(|error| OneLine(&error).to_string())),
            Request::Stats => Answer::Figures(figures(&self.region)),
            Request::Usage => {
                let usage = host.usage();
                let in_ram = |of: &kvkeep::NamespaceUsage| {
                    let ram =
                        of.tiers.iter().find(|(name, _)| name == "ram").map(|(_, taken)| *taken).unwrap_or_default();
                    (of.id, ram.entries, ram.bytes)
                };
                Answer::Usage(usage.iter().map(in_ram).collect())
            }
            Request::PrefixLengths(id, max_bytes) => {
                let lengths = host.prefix_lengths(id, usize::try_from(max_bytes).unwrap_or(usize::MAX));
                Answer::Numbers(lengths.into_iter().map(|length| length as u64).collect())
            }
            Request::Layers(id) => Answer::Numbers(vec![u64::from(host.layers(id))]),
            Request::Settle(number) => {
                host.settle_events(SETTLE_TIME);
                self.region.hub.mark(number);
                Answer::Done(None)
            }
        })
    }

    fn hold(&mut self, wanted: &[(BlockKey, NamespaceId)]) -> Answer {
        // First: what it held is not read any more.
        self.held = None;
        let run = self.region.host.hold(wanted);
        let place = |block: &Option<(usize, BlockMeta)>| block.as_ref().map(|(at, meta)| (*at as u64, meta.clone()));
        let held = run.blocks().iter().map(place).collect();
        self.held = Some(run);
        self.ends_at = Instant::now() + self.lease;
        Answer::Held(held)
    }

    fn begin_rooms(&mut self, metas: Vec<BlockMeta>) -> Answer {
        self.rooms.clear();
        let mut fates = Vec::with_capacity(metas.len());
        for offered in self.region.host.begin(metas) {
            let (fate, room) = match offered {
                Offered::There => (Fate::There, None),
                Offered::Room(room) => (Fate::Room, Some(Room { room: *room, filled: 0 })),
                _ => (Fate::Refused, None),
            };
            fates.push(fate);
            self.rooms.push(room);
        }
        self.ends_at = Instant::now() + self.lease;
        Answer::Begun(fates)
    }

    /// Copies a piece to where it belongs, and looks whether it is what its writer says.
    fn take_piece(&mut self, room: u32, slot: u32, bytes: u32, sum: u64) -> Answer {
        self.renew();
        let place = self.rooms.get_mut(room as usize);
        let is_right = place.is_some_and(|place| {
            let taken = place.as_mut().is_some_and(|room| {
                let copied = copy_piece(self.staging.as_ref(), room, slot, bytes);
                room.filled += bytes as usize;
                copied == Some(sum)
            });
            if !taken {
                *place = None;
            }
            taken
        });
        Answer::Took { slot, is_right }
    }

    fn seal(&mut self, which: &[bool]) -> Answer {
        self.renew();
        let mut rooms = std::mem::take(&mut self.rooms);
        rooms.resize_with(which.len(), || None);
        let is_whole = |room: &Room| room.filled as u64 == room.room.meta().raw_bytes;
        let rooms: Vec<Option<HostedRoom>> = rooms
            .into_iter()
            .zip(which)
            .map(|(room, wanted)| room.filter(|room| *wanted && is_whole(room)).map(|room| room.room))
            .collect();
        let whole: Vec<bool> = rooms.iter().map(Option::is_some).collect();
        let mut new = self.region.host.seal(rooms.into_iter().flatten().collect()).into_iter();
        Answer::Sealed(whole.into_iter().map(|whole| if whole { new.next() } else { None }).collect())
    }
}

fn copy_piece(staging: Option<&Mapping>, room: &mut Room, slot: u32, bytes: u32) -> Option<u64> {
    let (slot, bytes) = (slot as usize, bytes as usize);
    if slot >= PIECES || bytes > PIECE_BYTES {
        return None;
    }
    let part = room.room.part_mut(room.filled, bytes)?;
    staging?.copy_out_summed((slot * PIECE_BYTES) as u64, part)
}

fn figures(region: &Region) -> Figures {
    let stats = region.host.stats();
    let on_disk = stats.tiers.iter().map(|tier| tier.entries).max().unwrap_or(0);
    Figures {
        entries: stats.entries.max(on_disk),
        used_bytes: stats.used_bytes,
        capacity_bytes: stats.capacity_bytes,
        held_bytes: stats.held_bytes,
        index_bytes: stats.index_bytes,
        evictions: stats.evictions,
    }
}

fn refuse(channel: &mut Channel, error: &io::Error) -> io::Result<()> {
    channel.send(&Answer::Refused(error.to_string()).encode())
}

/// Tells a client what comes and goes, for as long as it listens.
fn listen(shared: &Arc<Shared>, region: &Region, channel: &mut Channel) -> io::Result<()> {
    let (there, changes) = region.hub.subscribe();
    for answer in there {
        channel.send(&answer.encode())?;
    }
    while !shared.is_over.load(Ordering::SeqCst) {
        match changes.recv_timeout(LISTEN_TICK) {
            Ok(answer) => channel.send(&answer.encode())?,
            // It says nothing; that it has gone is seen here.
            Err(RecvTimeoutError::Timeout) => drop(channel.receive(Deadline::after(Duration::from_millis(1)))?),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}
