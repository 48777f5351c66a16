//! Encryption at rest: XChaCha20-Poly1305 under one key from a file.
//!
//! Each piece of a payload is sealed by itself, bound to the whole record header (key,
//! namespace, lengths, place in the directory), so that a piece that was moved or swapped
//! does not open. Nonces are 24 random bytes a record: no counter has to survive a crash.
//! AES-256-GCM was the alternative: its nonces are too short to be random.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use chacha20poly1305::aead::{AeadInOut, Generate};
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};

use super::format::StoreId;
use crate::error::{Error, Result};

const KEY_BYTES: usize = 32;

/// A key, ready for use.
pub(crate) struct Cipher(XChaCha20Poly1305);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    /// Reads a key of 32 raw bytes or 64 hexadecimal digits from a file that only its owner may read.
    pub(crate) fn from_file(path: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let refused = |why: String| Error::Config(format!("the key file {}: {why}", path.display()));
        let file = File::open(path).map_err(|error| refused(error.to_string()))?;
        let mode = file.metadata().map_err(|error| refused(error.to_string()))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(refused(format!("others may read it (mode {:o}): run chmod 600", mode & 0o777)));
        }
        let mut bytes = Vec::new();
        file.take(4096).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
        let key = parse_key(&bytes).ok_or_else(|| refused("it must hold 32 bytes or 64 hexadecimal digits".into()))?;
        Ok(Self::new(&key))
    }

    pub(crate) fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self(XChaCha20Poly1305::new(key.into()))
    }

    /// What this key makes of a directory's id: tells a wrong key before anything is read.
    pub(crate) fn check(&self, store_id: &StoreId) -> [u8; 16] {
        let mut nonce = [0; 24];
        if let Some(head) = nonce.first_chunk_mut::<16>() {
            *head = *store_id;
        }
        let sealed = self.0.encrypt_inout_detached(&nonce.into(), b"kvkeep key check 1", (&mut [][..]).into());
        sealed.map_or([0; 16], Into::into)
    }

    /// Encrypts a piece in place; gives its tag.
    pub(crate) fn seal(&self, nonce: &[u8; 24], piece: u32, bound: &[u8], bytes: &mut [u8]) -> Option<[u8; 16]> {
        self.0.encrypt_inout_detached(&piece_nonce(nonce, piece), bound, bytes.into()).ok().map(Into::into)
    }

    /// Decrypts a piece in place; `false` if a bit of it or of what it is bound to is wrong.
    pub(crate) fn open(&self, nonce: &[u8; 24], piece: u32, bound: &[u8], bytes: &mut [u8], tag: &[u8]) -> bool {
        let Ok(tag) = Tag::try_from(tag) else { return false };
        self.0.decrypt_inout_detached(&piece_nonce(nonce, piece), bound, bytes.into(), &tag).is_ok()
    }
}

/// 24 random bytes.
pub(crate) fn random_nonce() -> std::io::Result<[u8; 24]> {
    XNonce::try_generate().map(Into::into).map_err(|error| std::io::Error::other(error.to_string()))
}

/// Each piece has a nonce of its own: the record's with the piece's number mixed into its end.
fn piece_nonce(nonce: &[u8; 24], piece: u32) -> XNonce {
    let mut nonce = *nonce;
    if let Some(tail) = nonce.last_chunk_mut::<4>() {
        *tail = (u32::from_le_bytes(*tail) ^ piece).to_le_bytes();
    }
    nonce.into()
}

fn parse_key(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    if let Ok(key) = bytes.try_into() {
        return Some(key);
    }
    let text = std::str::from_utf8(bytes).ok()?.trim();
    if text.len() != 2 * KEY_BYTES {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (position, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * position..2 * position + 2)?, 16).ok()?;
    }
    Some(key)
}
