//! What is said on the socket: a frame is its length in 4 bytes, then one message: a byte that says which, and its
//! fields, little-endian. `field` has the bytes of each.
//!
//! Invariant: whatever comes in is a message or an error, never a panic, and takes no more memory than it has bytes. A
//! format of a library's was the alternative: keys and hashes are most of it, and those are plain bytes.

mod field;

use std::io;

use kvkeep::tiers::{BlockKey, BlockMeta, Forget, Located};
use kvkeep::{BlockHash, NamespaceId};

use field::{Field, all_of, one_of};

/// Both sides must speak the same.
pub(crate) const VERSION: u32 = 1;
/// Keys of one message: more of them go in several.
pub(crate) const MAX_KEYS: usize = 1 << 13;
/// A frame is at most this long.
pub(crate) const MAX_FRAME_BYTES: usize = 8 << 20;
/// A writer's staging memory: so many pieces of so many bytes.
pub(crate) const PIECE_BYTES: usize = 512 << 10;
pub(crate) const PIECES: usize = 4;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Ask,
    Read,
    Write,
    Listen,
}

/// What is to be forgotten, as its own value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gone {
    Keys(NamespaceId, Vec<BlockKey>),
    Replaced(NamespaceId, Vec<BlockKey>),
    Namespace(NamespaceId),
    All,
}

/// A client to the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Hello {
        version: u32,
        purpose: Purpose,
        tenant: String,
        token: String,
    },
    Locate(NamespaceId, Vec<BlockKey>),
    /// Ends what this connection held before.
    Hold(Vec<(BlockKey, NamespaceId)>),
    Release,
    /// Ends what this connection had begun before.
    Begin(Vec<BlockMeta>),
    /// A piece of a block that was begun lies in this slot of the staging memory; its sum.
    Piece {
        room: u32,
        slot: u32,
        bytes: u32,
        sum: u64,
    },
    /// Of those begun, these are whole; the others are dropped.
    Seal(Vec<bool>),
    Forget(Gone),
    Flush,
    Stats,
    Usage,
    PrefixLengths(NamespaceId, u64),
    Layers(NamespaceId),
    /// Has listeners told everything, and then this number.
    Settle(u64),
}

/// What became of a block that a writer offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    There,
    Room,
    Refused,
}

/// Counters and sizes of a tenant's region.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) entries: u64,
    pub(crate) used_bytes: u64,
    pub(crate) capacity_bytes: u64,
    pub(crate) held_bytes: u64,
    pub(crate) index_bytes: u64,
    pub(crate) evictions: u64,
}

/// The daemon to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Welcome {
        capacity_bytes: u64,
        region_bytes: u64,
    },
    Refused(String),
    Located(Vec<Option<Located>>),
    /// Where each lies in the region.
    Held(Vec<Option<(u64, BlockMeta)>>),
    /// Was all of it held until now?
    Released(bool),
    Begun(Vec<Fate>),
    /// The slot is free; was the piece right?
    Took {
        slot: u32,
        is_right: bool,
    },
    /// `None` for what was not whole, else whether it is new.
    Sealed(Vec<Option<bool>>),
    Forgotten {
        found: Vec<bool>,
        entries: u64,
    },
    /// What went wrong, if anything did.
    Done(Option<String>),
    Figures(Figures),
    Usage(Vec<(NamespaceId, u64, u64)>),
    Numbers(Vec<u64>),
    Changed {
        came: Vec<(BlockHash, NamespaceId)>,
        went: Vec<BlockHash>,
    },
    Mark(u64),
}

impl Gone {
    pub(crate) fn of(what: &Forget<'_>) -> Self {
        match what {
            Forget::Keys(id, keys) => Self::Keys(*id, keys.to_vec()),
            Forget::Replaced(id, keys) => Self::Replaced(*id, keys.to_vec()),
            Forget::Namespace(id) => Self::Namespace(*id),
            Forget::All => Self::All,
        }
    }

    /// The same, as many messages as it takes; none where there is nothing.
    pub(crate) fn in_messages(self) -> Vec<Self> {
        match self {
            Self::Keys(id, keys) => keys.chunks(MAX_KEYS).map(|keys| Self::Keys(id, keys.to_vec())).collect(),
            Self::Replaced(id, keys) => keys.chunks(MAX_KEYS).map(|keys| Self::Replaced(id, keys.to_vec())).collect(),
            whole => vec![whole],
        }
    }

    /// Keys that it names.
    pub(crate) fn keys(&self) -> usize {
        match self {
            Self::Keys(_, keys) | Self::Replaced(_, keys) => keys.len(),
            Self::Namespace(_) | Self::All => 0,
        }
    }

    pub(crate) fn as_forget(&self) -> Forget<'_> {
        match self {
            Self::Keys(id, keys) => Forget::Keys(*id, keys),
            Self::Replaced(id, keys) => Forget::Replaced(*id, keys),
            Self::Namespace(id) => Forget::Namespace(*id),
            Self::All => Forget::All,
        }
    }
}

one_of!(Purpose: 0 = Ask, 1 = Read, 2 = Write, 3 = Listen);
one_of!(Gone: 0 = Keys(id, keys), 1 = Replaced(id, keys), 2 = Namespace(id), 3 = All);
one_of!(Fate: 0 = There, 1 = Room, 2 = Refused);
all_of!(Figures { entries, used_bytes, capacity_bytes, held_bytes, index_bytes, evictions });

one_of!(Request:
    1 = Hello { version, purpose, tenant, token },
    2 = Locate(id, keys),
    3 = Hold(wanted),
    4 = Release,
    5 = Begin(metas),
    6 = Piece { room, slot, bytes, sum },
    7 = Seal(which),
    8 = Forget(gone),
    9 = Flush,
    10 = Stats,
    11 = Usage,
    12 = PrefixLengths(id, max_bytes),
    13 = Layers(id),
    14 = Settle(number),
);

one_of!(Answer:
    1 = Welcome { capacity_bytes, region_bytes },
    2 = Refused(why),
    3 = Located(located),
    4 = Held(held),
    5 = Released(held),
    6 = Begun(fates),
    7 = Took { slot, is_right },
    8 = Sealed(sealed),
    9 = Forgotten { found, entries },
    10 = Done(error),
    11 = Figures(figures),
    12 = Usage(usage),
    13 = Numbers(numbers),
    14 = Changed { came, went },
    15 = Mark(number),
);

/// What goes in a frame.
pub(crate) trait Message: Field {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.put(&mut bytes);
        bytes
    }

    /// # Errors
    /// For what is no such message, or more than one.
    fn decode(mut bytes: &[u8]) -> io::Result<Self> {
        let message = Self::take(&mut bytes).filter(|_| bytes.is_empty());
        let garbage = || io::Error::new(io::ErrorKind::InvalidData, "what came is no message of this version");
        message.ok_or_else(garbage)
    }
}

impl Message for Request {}
impl Message for Answer {}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> BlockKey {
        BlockKey::new([byte; 32], u32::from(byte))
    }

    fn id(byte: u8) -> NamespaceId {
        NamespaceId::from_bytes([byte; 32])
    }

    fn requests() -> Vec<Request> {
        vec![
            Request::Hello { version: 1, purpose: Purpose::Write, tenant: "t".into(), token: "é".into() },
            Request::Locate(id(1), vec![key(1), key(2)]),
            Request::Hold(vec![(key(1), id(3))]),
            Request::Release,
            Request::Begin(Vec::new()),
            Request::Piece { room: 1, slot: 2, bytes: 3, sum: 4 },
            Request::Seal(vec![true, false]),
            Request::Forget(Gone::Keys(id(1), vec![key(1)])),
            Request::Forget(Gone::Replaced(id(1), Vec::new())),
            Request::Forget(Gone::Namespace(id(1))),
            Request::Forget(Gone::All),
            Request::Flush,
            Request::Stats,
            Request::Usage,
            Request::PrefixLengths(id(1), 9),
            Request::Layers(id(1)),
            Request::Settle(7),
        ]
    }

    fn answers() -> Vec<Answer> {
        vec![
            Answer::Welcome { capacity_bytes: 2, region_bytes: 3 },
            Answer::Refused("no".into()),
            Answer::Located(vec![None, Some(Located::raw(id(1), 5, 6))]),
            Answer::Held(vec![None]),
            Answer::Released(true),
            Answer::Begun(vec![Fate::There, Fate::Room, Fate::Refused]),
            Answer::Took { slot: 1, is_right: false },
            Answer::Sealed(vec![None, Some(true), Some(false)]),
            Answer::Forgotten { found: vec![true], entries: 4 },
            Answer::Done(None),
            Answer::Done(Some("e".into())),
            Answer::Figures(Figures { entries: 1, ..Figures::default() }),
            Answer::Usage(vec![(id(1), 2, 3)]),
            Answer::Numbers(vec![1, 2]),
            Answer::Changed { came: vec![(BlockHash::from_bytes([1; 32]), id(2))], went: Vec::new() },
            Answer::Mark(3),
        ]
    }

    #[test]
    fn every_message_is_itself_again() {
        for request in requests() {
            assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        }
        for answer in answers() {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
    }

    /// Not all that is flipped is noticed: a number is a number. But nothing panics, and what is cut is no message.
    #[test]
    fn what_is_cut_longer_or_changed_is_an_error_or_another_message_and_never_a_panic() {
        for bytes in requests().iter().map(Request::encode).chain(answers().iter().map(Answer::encode)) {
            for at in 0..bytes.len() {
                for flip in [1, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= flip;
                    let _ = (Request::decode(&changed), Answer::decode(&changed));
                }
            }
        }
        for bytes in requests().iter().map(Request::encode) {
            assert!((0..bytes.len()).all(|end| Request::decode(&bytes[..end]).is_err()));
            assert!(Request::decode(&[bytes, vec![0]].concat()).is_err());
        }
        assert!(Request::decode(&[7, 0xff, 0xff, 0xff, 0xff]).is_err(), "a list that is longer than its message");
    }
}
