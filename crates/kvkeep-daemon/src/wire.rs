//! What every byte on the socket means. A frame is its length in 4 bytes, then one message: a byte that says which, and its
//! fields, little-endian.
//!
//! Invariant: whatever comes in is a message or an error, never a panic, and takes no more memory than it has bytes. A
//! format of a library's was the alternative: keys and hashes are most of it, and those are plain bytes.

use std::io;

use kvkeep::tiers::{BlockKey, BlockMeta, Forget, Located};
use kvkeep::{BlockHash, NamespaceId};

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

/// What is not a message.
fn garbage() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what came is no message of this version")
}

/// Writes fields.
#[derive(Default)]
struct Put(Vec<u8>);

/// Reads fields; `None` where there are none any more.
struct Take<'a>(&'a [u8]);

impl Put {
    fn kind(kind: u8) -> Self {
        Self(vec![kind])
    }

    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
    }

    fn key(&mut self, key: &BlockKey) {
        self.0.extend_from_slice(key.hash());
        self.u32(key.layer());
    }

    fn list<T>(&mut self, items: &[T], mut each: impl FnMut(&mut Self, &T)) {
        self.u32(u32::try_from(items.len()).unwrap_or(u32::MAX));
        items.iter().for_each(|item| each(self, item));
    }

    fn meta(&mut self, meta: &BlockMeta) {
        self.bytes(&meta.to_bytes().unwrap_or_default());
    }
}

impl<'a> Take<'a> {
    fn slice(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.slice(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Option<bool> {
        self.u8().filter(|byte| *byte < 2).map(|byte| byte == 1)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = self.u32()?;
        self.slice(count as usize)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }

    fn key(&mut self) -> Option<BlockKey> {
        Some(BlockKey::new(self.array()?, self.u32()?))
    }

    fn namespace(&mut self) -> Option<NamespaceId> {
        self.array().map(NamespaceId::from_bytes)
    }

    /// Each item takes a byte at least: no list is longer than what came.
    fn list<T>(&mut self, mut each: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()? as usize;
        if count > self.0.len() {
            return None;
        }
        (0..count).map(|_| each(self)).collect()
    }

    fn meta(&mut self) -> Option<BlockMeta> {
        BlockMeta::from_bytes(self.bytes()?)
    }

    fn end<T>(&self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

impl Request {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let put = match self {
            Self::Hello { version, purpose, tenant, token } => {
                let mut put = Put::kind(1);
                put.u32(*version);
                put.u8(*purpose as u8);
                put.bytes(tenant.as_bytes());
                put.bytes(token.as_bytes());
                put
            }
            Self::Locate(id, keys) => keys_of(2, id, keys),
            Self::Hold(wanted) => {
                let mut put = Put::kind(3);
                put.list(wanted, |put, (key, namespace)| {
                    put.key(key);
                    put.0.extend_from_slice(namespace.as_bytes());
                });
                put
            }
            Self::Release => Put::kind(4),
            Self::Begin(metas) => {
                let mut put = Put::kind(5);
                put.list(metas, Put::meta);
                put
            }
            Self::Piece { room, slot, bytes, sum } => {
                let mut put = Put::kind(6);
                [*room, *slot, *bytes].into_iter().for_each(|value| put.u32(value));
                put.u64(*sum);
                put
            }
            Self::Seal(which) => {
                let mut put = Put::kind(7);
                put.list(which, |put, whole| put.u8(u8::from(*whole)));
                put
            }
            Self::Forget(Gone::Keys(id, keys)) => keys_of(8, id, keys),
            Self::Forget(Gone::Replaced(id, keys)) => keys_of(9, id, keys),
            Self::Forget(Gone::Namespace(id)) => namespace_of(10, id),
            Self::Forget(Gone::All) => Put::kind(11),
            Self::Flush => Put::kind(12),
            Self::Stats => Put::kind(13),
            Self::Usage => Put::kind(14),
            Self::PrefixLengths(id, max_bytes) => {
                let mut put = namespace_of(15, id);
                put.u64(*max_bytes);
                put
            }
            Self::Layers(id) => namespace_of(16, id),
            Self::Settle(number) => {
                let mut put = Put::kind(17);
                put.u64(*number);
                put
            }
        };
        put.0
    }

    /// # Errors
    /// For what is no request.
    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        Self::take(bytes).ok_or_else(garbage)
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        let mut take = Take(bytes);
        let request = match take.u8()? {
            1 => Self::Hello {
                version: take.u32()?,
                purpose: match take.u8()? {
                    0 => Purpose::Ask,
                    1 => Purpose::Read,
                    2 => Purpose::Write,
                    3 => Purpose::Listen,
                    _ => return None,
                },
                tenant: take.text()?,
                token: take.text()?,
            },
            2 => Self::Locate(take.namespace()?, take.list(Take::key)?),
            3 => Self::Hold(take.list(|take| Some((take.key()?, take.namespace()?)))?),
            4 => Self::Release,
            5 => Self::Begin(take.list(Take::meta)?),
            6 => Self::Piece { room: take.u32()?, slot: take.u32()?, bytes: take.u32()?, sum: take.u64()? },
            7 => Self::Seal(take.list(Take::flag)?),
            8 => Self::Forget(Gone::Keys(take.namespace()?, take.list(Take::key)?)),
            9 => Self::Forget(Gone::Replaced(take.namespace()?, take.list(Take::key)?)),
            10 => Self::Forget(Gone::Namespace(take.namespace()?)),
            11 => Self::Forget(Gone::All),
            12 => Self::Flush,
            13 => Self::Stats,
            14 => Self::Usage,
            15 => Self::PrefixLengths(take.namespace()?, take.u64()?),
            16 => Self::Layers(take.namespace()?),
            17 => Self::Settle(take.u64()?),
            _ => return None,
        };
        take.end(request)
    }
}

fn keys_of(kind: u8, id: &NamespaceId, keys: &[BlockKey]) -> Put {
    let mut put = namespace_of(kind, id);
    put.list(keys, Put::key);
    put
}

fn namespace_of(kind: u8, id: &NamespaceId) -> Put {
    let mut put = Put::kind(kind);
    put.0.extend_from_slice(id.as_bytes());
    put
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let put = match self {
            Self::Welcome { capacity_bytes, region_bytes } => {
                let mut put = Put::kind(1);
                put.u64(*capacity_bytes);
                put.u64(*region_bytes);
                put
            }
            Self::Refused(why) => {
                let mut put = Put::kind(2);
                put.bytes(why.as_bytes());
                put
            }
            Self::Located(located) => {
                let mut put = Put::kind(3);
                put.list(located, put_located);
                put
            }
            Self::Held(held) => {
                let mut put = Put::kind(4);
                put.list(held, |put, held| {
                    put.u8(u8::from(held.is_some()));
                    if let Some((offset, meta)) = held {
                        put.u64(*offset);
                        put.meta(meta);
                    }
                });
                put
            }
            Self::Released(held) => {
                let mut put = Put::kind(5);
                put.u8(u8::from(*held));
                put
            }
            Self::Begun(fates) => {
                let mut put = Put::kind(6);
                put.list(fates, |put, fate| put.u8(*fate as u8));
                put
            }
            Self::Took { slot, is_right } => {
                let mut put = Put::kind(7);
                put.u32(*slot);
                put.u8(u8::from(*is_right));
                put
            }
            Self::Sealed(sealed) => {
                let mut put = Put::kind(8);
                put.list(sealed, |put, sealed| put.u8(sealed.map_or(2, u8::from)));
                put
            }
            Self::Forgotten { found, entries } => {
                let mut put = Put::kind(9);
                put.u64(*entries);
                put.list(found, |put, found| put.u8(u8::from(*found)));
                put
            }
            Self::Done(error) => {
                let mut put = Put::kind(10);
                put.u8(u8::from(error.is_some()));
                put.bytes(error.as_deref().unwrap_or_default().as_bytes());
                put
            }
            Self::Figures(figures) => {
                let mut put = Put::kind(11);
                let Figures { entries, used_bytes, capacity_bytes, held_bytes, index_bytes, evictions } = *figures;
                let all = [entries, used_bytes, capacity_bytes, held_bytes, index_bytes, evictions];
                all.into_iter().for_each(|figure| put.u64(figure));
                put
            }
            Self::Usage(usage) => {
                let mut put = Put::kind(12);
                put.list(usage, |put, (id, entries, bytes)| {
                    put.0.extend_from_slice(id.as_bytes());
                    put.u64(*entries);
                    put.u64(*bytes);
                });
                put
            }
            Self::Numbers(numbers) => {
                let mut put = Put::kind(13);
                put.list(numbers, |put, number| put.u64(*number));
                put
            }
            Self::Changed { came, went } => {
                let mut put = Put::kind(14);
                put.list(came, |put, (block, namespace)| {
                    put.0.extend_from_slice(block.as_bytes());
                    put.0.extend_from_slice(namespace.as_bytes());
                });
                put.list(went, |put, block| put.0.extend_from_slice(block.as_bytes()));
                put
            }
            Self::Mark(number) => {
                let mut put = Put::kind(15);
                put.u64(*number);
                put
            }
        };
        put.0
    }

    /// # Errors
    /// For what is no answer.
    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        Self::take(bytes).ok_or_else(garbage)
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        let mut take = Take(bytes);
        let answer = match take.u8()? {
            1 => Self::Welcome { capacity_bytes: take.u64()?, region_bytes: take.u64()? },
            2 => Self::Refused(take.text()?),
            3 => Self::Located(take.list(take_located)?),
            4 => {
                Self::Held(take.list(|take| Some(if take.flag()? { Some((take.u64()?, take.meta()?)) } else { None }))?)
            }
            5 => Self::Released(take.flag()?),
            6 => Self::Begun(take.list(|take| match take.u8()? {
                0 => Some(Fate::There),
                1 => Some(Fate::Room),
                2 => Some(Fate::Refused),
                _ => None,
            })?),
            7 => Self::Took { slot: take.u32()?, is_right: take.flag()? },
            8 => Self::Sealed(take.list(|take| match take.u8()? {
                0 => Some(Some(false)),
                1 => Some(Some(true)),
                2 => Some(None),
                _ => None,
            })?),
            9 => Self::Forgotten { entries: take.u64()?, found: take.list(Take::flag)? },
            10 => {
                let (is_error, text) = (take.flag()?, take.text()?);
                Self::Done(is_error.then_some(text))
            }
            11 => Self::Figures(Figures {
                entries: take.u64()?,
                used_bytes: take.u64()?,
                capacity_bytes: take.u64()?,
                held_bytes: take.u64()?,
                index_bytes: take.u64()?,
                evictions: take.u64()?,
            }),
            12 => Self::Usage(take.list(|take| Some((take.namespace()?, take.u64()?, take.u64()?)))?),
            13 => Self::Numbers(take.list(Take::u64)?),
            14 => {
                let block = |take: &mut Take<'_>| take.array().map(BlockHash::from_bytes);
                let came = take.list(|take| Some((block(take)?, take.namespace()?)))?;
                Self::Changed { came, went: take.list(block)? }
            }
            15 => Self::Mark(take.u64()?),
            _ => return None,
        };
        take.end(answer)
    }
}

fn put_located(put: &mut Put, located: &Option<Located>) {
    put.u8(u8::from(located.is_some()));
    if let Some(located) = located {
        put.0.extend_from_slice(located.namespace.as_bytes());
        put.u64(located.raw_bytes);
        put.u32(located.compute_us);
    }
}

fn take_located(take: &mut Take<'_>) -> Option<Option<Located>> {
    Some(if take.flag()? { Some(Located::raw(take.namespace()?, take.u64()?, take.u32()?)) } else { None })
}

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
