//! What stands for encryption in a build without the feature `encryption`: no key can be had, so nothing encrypted opens.
//!
//! A tier that writes what was to be encrypted as it is was the alternative: a secret would lie there unprotected.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::format::StoreId;
use crate::error::{Error, Result};

/// A key, of which there is none.
#[derive(Debug)]
pub(crate) enum Cipher {}

impl Cipher {
    pub(crate) fn from_file(path: &Path) -> Result<Self> {
        let path = path.display();
        let text = format!("the key file {path}: this build cannot encrypt: build kvkeep with its feature encryption");
        Err(Error::Config(text))
    }

    pub(crate) fn check(&self, _: &StoreId) -> [u8; 16] {
        match *self {}
    }

    pub(crate) fn seal(&self, _: &[u8; 24], _: u32, _: &[u8], _: &mut [u8]) -> Option<[u8; 16]> {
        match *self {}
    }

    pub(crate) fn open(&self, _: &[u8; 24], _: u32, _: &[u8], _: &mut [u8], _: &[u8]) -> bool {
        match *self {}
    }
}

/// 24 random bytes.
pub(crate) fn random_nonce() -> std::io::Result<[u8; 24]> {
    let mut nonce = [0; 24];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_encryption_says_so_instead_of_writing_what_anybody_can_read() {
        let error = Cipher::from_file(Path::new("/key")).unwrap_err().to_string();
        assert!(error.contains("feature encryption"), "{error}");
        assert_ne!(random_nonce().unwrap(), random_nonce().unwrap());
    }
}
