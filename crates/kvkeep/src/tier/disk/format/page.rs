//! Pages and numbers: what every part of the format is made of.

use twox_hash::XxHash3_64;

/// The unit of everything: what `O_DIRECT` and the arena agree on.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Version of all formats below. A file of another one is not touched.
pub(crate) const VERSION: u32 = 1;
/// Where a page keeps the xxh3 of all before it.
pub(super) const PAGE_SUM_AT: usize = PAGE_BYTES - 8;

/// Names one cache directory: segments of another one are foreign.
pub(crate) type StoreId = [u8; 16];

/// How payloads are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CipherKind {
    None,
    XChaCha20Poly1305,
}

/// What a directory is: in its manifest and in every segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store_id: StoreId,
    pub(crate) cipher: CipherKind,
    /// What the right key makes of `store_id`; zero without a cipher.
    pub(crate) key_check: [u8; 16],
}

impl CipherKind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::XChaCha20Poly1305 => 1,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::XChaCha20Poly1305),
            _ => None,
        }
    }
}

impl Identity {
    pub(super) fn put(&self, put: &mut Put<'_>) {
        put.bytes(&self.store_id);
        put.u8(self.cipher.code());
        // Once more, so that another version and a flipped bit can be told apart.
        put.u32(VERSION);
        put.skip(3);
        put.bytes(&self.key_check);
    }

    pub(super) fn take(take: &mut Take<'_>) -> Option<Self> {
        let store_id = take.array()?;
        let cipher = CipherKind::from_code(take.u8()?)?;
        take.skip(4 + 3)?;
        Some(Self { store_id, cipher, key_check: take.array()? })
    }
}

/// The checksum of payloads, indexes and pages: xxh3, 64 bits, seed 0.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Writes fields one after the other. What does not fit is dropped: sizes are constants.
pub(super) struct Put<'a> {
    bytes: &'a mut [u8],
    pub(super) at: usize,
}

impl<'a> Put<'a> {
    pub(super) fn new(bytes: &'a mut [u8]) -> Self {
        bytes.fill(0);
        Self { bytes, at: 0 }
    }

    pub(super) fn bytes(&mut self, from: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.at..self.at + from.len()) {
            to.copy_from_slice(from);
        }
        self.at += from.len();
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn skip(&mut self, bytes: usize) {
        self.at += bytes;
    }

    pub(super) fn seek(&mut self, at: usize) {
        self.at = at;
    }
}

/// Reads fields one after the other; `None` at the end of the bytes.
pub(super) struct Take<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Take<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let bytes = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn skip(&mut self, bytes: usize) -> Option<()> {
        self.bytes(bytes).map(drop)
    }

    pub(super) fn seek(&mut self, at: usize) {
        self.at = at;
    }
}

/// Starts a page that [`finish_page`] will close.
pub(super) fn begin_page<'a>(page: &'a mut [u8], magic: &[u8; 8]) -> Put<'a> {
    let mut put = Put::new(page);
    put.bytes(magic);
    put.u32(VERSION);
    put
}

/// Adds the checksum over all of the page before it.
pub(super) fn finish_page(page: &mut [u8]) {
    if let Some((body, sum)) = page.get_mut(..PAGE_BYTES).and_then(|page| page.split_at_mut_checked(PAGE_SUM_AT)) {
        sum.copy_from_slice(&checksum(body).to_le_bytes());
    }
}

/// The fields of a page whose magic, version and checksum are right.
pub(super) fn open_page<'a>(page: &'a [u8], magic: &[u8; 8]) -> Option<Take<'a>> {
    let page = page.get(..PAGE_BYTES)?;
    let mut take = Take::new(page);
    if take.bytes(8)? != magic || take.u32()? != VERSION {
        return None;
    }
    let (body, sum) = page.split_at_checked(PAGE_SUM_AT)?;
    (sum == checksum(body).to_le_bytes()).then_some(take)
}
