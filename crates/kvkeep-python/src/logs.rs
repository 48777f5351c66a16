//! What the core has to say, said through Python's `logging`: as `kvkeep.core`.
//!
//! The core logs without a lock held, so a thread of it may wait for the GIL here. At the end of the interpreter there is
//! none to be had any more, and nothing is said. A crate that forwards `log` records was the alternative: it keeps
//! Python's levels in a cache of its own, which somebody has to reset whenever they change.

use std::fmt::{self, Write as _};

use pyo3::intern;
use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

struct PythonLogging;

/// Begins to forward. A second time does nothing.
pub(crate) fn forward() {
    // Somebody in this process may have set another one: theirs it is.
    let _ = tracing::subscriber::set_global_default(PythonLogging);
}

impl Subscriber for PythonLogging {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO && metadata.is_event()
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = match *event.metadata().level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            _ => 20,
        };
        // None at the end of the interpreter.
        let _ = Python::try_attach(|py| say(py, level, &text.whole()));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// A handler that raises is the application's; whoever is at work here goes on.
fn say(py: Python<'_>, level: i32, text: &str) {
    let said = py
        .import(intern!(py, "logging"))
        .and_then(|logging| logging.call_method1(intern!(py, "getLogger"), (intern!(py, "kvkeep.core"),)))
        .and_then(|logger| logger.call_method1(intern!(py, "log"), (level, intern!(py, "%s"), text)));
    if let Err(error) = said {
        error.write_unraisable(py, None);
    }
}

/// The message, and behind it the other fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn whole(self) -> String {
        if self.fields.is_empty() { self.message } else { format!("{} ({})", self.message, self.fields) }
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let between = if self.fields.is_empty() { "" } else { ", " };
            let _ = write!(self.fields, "{between}{}: {value:?}", field.name());
        }
    }
}
