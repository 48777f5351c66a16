//! The kvkeep command.
fn main() {}
