//! Feeds anything to every codec: as what is stored, and as a block that must come back: `make fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvkeep::fuzz_codecs(bytes));
