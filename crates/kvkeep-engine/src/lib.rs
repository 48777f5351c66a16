//! A real model with KV in and out.
