//! Blocks as messages, for tiers that keep each block by itself: a header page, then the payload without padding.
//!
//! The header is that of a record (docs/format.md), of no place. So whatever comes back is checked as the disk checks
//! it: magic, version, key, namespace, lengths, and every piece of the payload by its checksum or its tag. A format of
//! their own was the alternative: each one more is one more that has to be right.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::crypt::{Cipher, random_nonce};
use super::format::{CipherKind, Content, PAGE_BYTES, Place, RecordHeader};
use super::segment::check_pieces;
use super::tier::{block_meta, record_meta};
use crate::block::{BlockKey, BlockMeta};
use crate::codec::Codecs;
use crate::error::Result;
use crate::key::NamespaceId;

/// Bytes of a tag.
const TAG_BYTES: usize = 16;

/// Makes messages of blocks, and blocks of messages.
#[derive(Clone, Default)]
pub struct Messages {
    codecs: Codecs,
    cipher: Option<Arc<Cipher>>,
}

/// A block as it is sent.
#[derive(Debug)]
#[non_exhaustive]
pub struct Message<'a> {
    /// Of the form that is sent.
    pub meta: BlockMeta,
    /// One page.
    pub header: Vec<u8>,
    /// What comes behind it.
    pub payload: Cow<'a, [u8]>,
}

impl Messages {
    /// Bytes of a header.
    pub const HEADER_BYTES: usize = PAGE_BYTES;

    /// Encodes with these codecs, and reads with all that they know.
    #[must_use]
    pub fn new(codecs: Codecs) -> Self {
        Self { codecs, cipher: None }
    }

    /// Encrypts payloads with XChaCha20-Poly1305 under the key in this file, and reads none that are not: 32 bytes or
    /// 64 hexadecimal digits, readable by its owner alone.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if that is no key file.
    pub fn key_file(self, key_file: &Path) -> Result<Self> {
        Ok(Self { cipher: Some(Arc::new(Cipher::from_file(key_file)?)), ..self })
    }

    /// Are payloads encrypted?
    #[must_use]
    pub fn are_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// The codecs.
    #[must_use]
    pub fn codecs(&self) -> &Codecs {
        &self.codecs
    }

    /// The message of a block with these bytes. `None` for one that no header can describe.
    #[must_use]
    pub fn encode<'a>(&self, meta: &BlockMeta, bytes: &'a [u8], now_ms: u64) -> Option<Message<'a>> {
        let (meta, mut payload) = match meta.encoded(&self.codecs, bytes) {
            Some((meta, encoded)) => (meta, Cow::Owned(encoded)),
            None => (meta.clone(), Cow::Borrowed(bytes.get(..usize::try_from(meta.stored_bytes).ok()?)?)),
        };
        if matches!(meta.content, Content::Nothing) {
            return None;
        }
        let record = record_meta(&meta, now_ms);
        let place = Place { store_id: [0; 16], segment: 0, page: 0 };
        let (cipher, nonce) = match &self.cipher {
            Some(_) => (CipherKind::XChaCha20Poly1305, random_nonce().ok()?),
            None => (CipherKind::None, [0; 24]),
        };
        let content = meta.content.clone();
        let mut header =
            RecordHeader { meta: record, place, durable_pages: 0, cipher, nonce, content, list: Vec::new() };
        match &self.cipher {
            None => header.list = record.sums(&payload),
            Some(cipher) => seal(cipher, &mut header, payload.to_mut())?,
        }
        let mut page = vec![0; PAGE_BYTES];
        header.encode(&mut page);
        let is_itself = RecordHeader::decode(&page).is_some_and(|again| again == header);
        is_itself.then_some(Message { meta, header: page, payload })
    }

    /// What a header says, if it is whole. When it expires is as seen at this time.
    #[must_use]
    pub fn describe(&self, header: &[u8], now_ms: u64) -> Option<BlockMeta> {
        let mut header = RecordHeader::decode(header).filter(|header| header.meta.kind.is_stored())?;
        header.meta = header.meta.expiring(header.meta.expires_at_ms(now_ms));
        Some(block_meta(header))
    }

    /// Writes the bytes of `range` of the block, all of them if `None`, into the beginning of `into`, and zeros behind
    /// them. `None` if the message is not that of this key in this namespace, or a bit of it is wrong.
    #[must_use]
    pub fn decode(
        &self,
        wanted: (&BlockKey, NamespaceId),
        message: &[u8],
        range: Option<Range<usize>>,
        into: &mut [u8],
        now_ms: u64,
    ) -> Option<BlockMeta> {
        let (page, payload) = message.split_at_checked(PAGE_BYTES)?;
        let header = RecordHeader::decode(page)?;
        let is_wanted = header.meta.key == *wanted.0 && header.meta.namespace == wanted.1;
        if !is_wanted || !header.meta.kind.is_stored() || header.meta.stored_bytes != payload.len() as u64 {
            return None;
        }
        let payload = self.checked(&header, payload)?;
        let meta = self.describe(page, now_ms)?;
        meta.decode(&self.codecs, &payload, range, into).then_some(meta)
    }

    /// The payload, decrypted, if it is what it was.
    fn checked<'a>(&self, header: &RecordHeader, payload: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        if self.cipher.is_none() && header.cipher == CipherKind::None {
            return (header.meta.sums(payload) == header.list).then_some(Cow::Borrowed(payload));
        }
        let mut payload = payload.to_vec();
        check_pieces(header, 0, self.cipher.as_deref(), &mut payload).ok()?;
        Some(Cow::Owned(payload))
    }
}

/// Encrypts a payload in place, piece by piece, and lists the tags.
fn seal(cipher: &Cipher, header: &mut RecordHeader, payload: &mut [u8]) -> Option<()> {
    let piece_bytes = 1usize << header.meta.piece_shift(header.cipher);
    // What a piece is bound to says how many there are.
    header.list = vec![0; payload.len().div_ceil(piece_bytes) * TAG_BYTES];
    let bound = header.bound();
    let mut tags = Vec::with_capacity(header.list.len());
    for (number, piece) in (0..).zip(payload.chunks_mut(piece_bytes)) {
        tags.extend_from_slice(&cipher.seal(&header.nonce, number, &bound, piece)?);
    }
    header.list = tags;
    Some(())
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { codecs, cipher } = self;
        f.debug_struct("Messages").field("codecs", &codecs.name()).field("encrypts", &cipher.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Facts;
    use crate::codec::Lossless;
    use crate::key::ObjectKey;
    use crate::layout::KvLayout;
    use crate::tensor::DType;

    const BYTES: usize = 300_000;

    fn meta() -> BlockMeta {
        let layout = KvLayout::new(2, 1, 37_500, DType::BF16).unwrap().with_block_tokens(1).unwrap();
        let facts = Facts::raw(ObjectKey::numbered(7), NamespaceId::named("n"), BYTES as u64);
        BlockMeta {
            facts: Facts { expires_at_ms: 5000, compute_us: 9, ..facts },
            begins: false,
            content: Content::Block { layout, model: "m".into() },
        }
    }

    fn all() -> Vec<Messages> {
        let ciphers: &[Option<Arc<Cipher>>] = &[
            None,
            #[cfg(feature = "encryption")]
            Some(Arc::new(Cipher::new(&[7; 32]))),
        ];
        let codecs = [Codecs::default(), Codecs::all(Arc::new(Lossless::new()))];
        let with =
            |cipher: &Option<Arc<Cipher>>| codecs.clone().map(|codecs| Messages { codecs, cipher: cipher.clone() });
        ciphers.iter().flat_map(with).collect()
    }

    fn whole(message: &Message<'_>) -> Vec<u8> {
        [message.header.as_slice(), &message.payload].concat()
    }

    fn decode(messages: &Messages, bytes: &[u8], range: Option<Range<usize>>) -> Option<(BlockMeta, Vec<u8>)> {
        let mut into = vec![9; range.as_ref().map_or(BYTES, ExactSizeIterator::len) + 10];
        let meta = meta();
        let read = messages.decode((&meta.key, meta.namespace), bytes, range, &mut into, 1000)?;
        assert_eq!(into.split_off(into.len() - 10), [0; 10], "zeros behind it");
        Some((read.decoded(), into))
    }

    #[test]
    fn a_block_as_one_message_is_itself_again_whole_and_in_parts() {
        let payload: Vec<u8> = (0..BYTES).map(|at| (at / 1000).to_le_bytes()[0]).collect();
        for messages in all() {
            let message = messages.encode(&meta(), &payload, 1000).unwrap();
            assert_eq!(messages.describe(&message.header, 1000), Some(message.meta.clone()));
            assert_eq!(decode(&messages, &whole(&message), None), Some((meta(), payload.clone())), "{messages:?}");
            let part = 150_001..160_000;
            assert_eq!(
                decode(&messages, &whole(&message), Some(part.clone())).unwrap().1,
                payload[part],
                "{messages:?}"
            );
            assert!(messages.encode(&meta(), &payload[1..], 1000).is_none());
        }
    }

    #[test]
    fn a_message_that_is_damaged_foreign_or_cut_is_no_block() {
        let payload: Vec<u8> = (0..BYTES).map(|at| (at / 1000).to_le_bytes()[0]).collect();
        let every = all();
        for messages in &every {
            let bytes = whole(&messages.encode(&meta(), &payload, 1000).unwrap());
            let all_of_the_header_and_some = (0..Messages::HEADER_BYTES).chain((4096..bytes.len()).step_by(997));
            for at in all_of_the_header_and_some {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1;
                assert_eq!(decode(messages, &flipped, None), None, "{messages:?}: {at}");
            }
            for end in [0, 4095, 4096, 4097, bytes.len() - 1] {
                assert_eq!(decode(messages, &bytes[..end], None), None);
            }
            let mut into = vec![0; BYTES];
            let (key, other) = (meta().key, BlockKey(ObjectKey::numbered(8)));
            let foreign = NamespaceId::named("m");
            assert_eq!(messages.decode((&other, meta().namespace), &bytes, None, &mut into, 1000), None);
            assert_eq!(messages.decode((&key, foreign), &bytes, None, &mut into, 1000), None);
            assert_eq!(messages.decode((&key, meta().namespace), &bytes, None, &mut into[1..], 1000), None);
            let strangers = every.iter().filter(|other| other.are_encrypted() != messages.are_encrypted());
            strangers.for_each(|other| assert_eq!(decode(other, &bytes, None), None, "another key, or none"));
        }
    }

    /// Times of day are trusted no further than on the disk.
    #[test]
    fn a_message_from_under_a_clock_that_was_ahead_lives_no_longer_than_it_was_given() {
        let (messages, payload) = (Messages::default(), vec![1; BYTES]);
        let message = messages
            .encode(&BlockMeta { facts: Facts { expires_at_ms: 90_000, ..meta().facts }, ..meta() }, &payload, 80_000)
            .unwrap();
        assert_eq!(messages.describe(&message.header, 1000).unwrap().expires_at_ms, 11_000);
    }
}
