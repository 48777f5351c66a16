//! Figures as one JSON object, and as a table for people.

use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment, Color};
use serde::Serialize;

use super::{Bar, Figure};
use crate::style;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Results<'a> {
    results: &'a [Figure],
}

pub(super) fn print(figures: &[Figure], json: bool) -> Result<()> {
    if json {
        style::say(&serde_json::to_string_pretty(&Results { results: figures })?)
    } else {
        style::say(&table(figures))
    }
}

fn table(figures: &[Figure]) -> String {
    let mut table = style::table();
    let head = |text: &str| Cell::new(text).add_attribute(Attribute::Bold);
    table.set_header(["", "measured", "reference", "", "ratio", "promised"].map(head));
    for figure in figures {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let color = match figure.meets() {
            Some(true) => Color::Green,
            Some(false) => Color::Red,
            None => Color::Reset,
        };
        table.add_row(vec![
            Cell::new(&figure.name),
            right(format!("{} {}", number(figure.value), figure.unit)),
            right(number(figure.reference)),
            Cell::new(figure.against),
            right(format!("{:.2}", figure.ratio)).fg(color).add_attribute(Attribute::Bold),
            right(promise(figure)).fg(color),
        ]);
    }
    table.to_string()
}

fn promise(figure: &Figure) -> String {
    let met = match figure.meets() {
        Some(true) => "met",
        _ => "NOT MET",
    };
    match figure.bar {
        Some(Bar::AtMost(bar)) => format!("at most {bar:.2}: {met}"),
        Some(Bar::AtLeast(bar)) => format!("at least {bar:.2}: {met}"),
        None => String::new(),
    }
}

/// Three digits are enough for people.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_promised_keys() {
        let figures = [Figure::rate("copy", 9.5, "GB/s", 10.0, "memcpy").bar(Bar::AtLeast(0.9))];
        let json = serde_json::to_value(Results { results: &figures }).unwrap();
        let figure = &json["results"][0];
        assert_eq!(figure["name"], "copy");
        assert_eq!(figure["unit"], "GB/s");
        assert_eq!(
            [&figure["value"], &figure["reference"], &figure["ratio"]].map(|n| n.as_f64().unwrap()),
            [9.5, 10.0, 0.95]
        );
        assert_eq!(figure["bar"]["at_least"], 0.9);
    }

    #[test]
    fn the_table_says_what_is_met_and_what_is_not() {
        let met = Figure::cost("a", 1.0, "ns", 2.0, "other").bar(Bar::AtMost(1.0));
        let missed = Figure::cost("b", 3.0, "ns", 2.0, "other").bar(Bar::AtMost(1.0));
        let said = table(&[met, missed]);
        assert!(said.contains("at most 1.00: met") && said.contains("at most 1.00: NOT MET"), "{said}");
    }
}
