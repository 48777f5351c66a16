//! Feeds anything to every decoder of the disk format, as it is and with checksums made right: `make fuzz`.
//! What was decoded must mean the same after it was written again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvkeep::fuzz_disk_format(bytes));
