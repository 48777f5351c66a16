//! Feeds anything to every decoder of the disk format: `cargo +nightly fuzz run format`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvkeep::fuzz_disk_format(bytes));
