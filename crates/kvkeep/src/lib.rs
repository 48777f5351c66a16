//! Prefill once.
