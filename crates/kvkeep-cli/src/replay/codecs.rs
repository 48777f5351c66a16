//! Codecs as far as a replay sees them: how many more blocks the same bytes hold, and how long decoding a hit takes.
//!
//! Invariant: a codec is in the last tier alone: in the disk if there is one, else in RAM. Ratios and rates are figures that
//! were measured, never guessed from a trace.

use std::fmt;
use std::str::FromStr;

/// A codec by its name, how many times smaller it makes KV, and the bytes of KV that it decodes in a second.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Codec {
    pub(crate) name: String,
    pub(crate) ratio: f64,
    pub(crate) decode_bytes_per_s: f64,
}

/// What `kvkeep bench codecs` printed of bf16 (docs/codecs.md): ratio, and GB/s of one core.
const MEASURED: [(&str, f64, f64); 7] = [
    ("raw", 1.0, f64::INFINITY),
    ("lossless", 1.49, 2.6),
    ("int8", 1.88, 5.3),
    ("fp8", 1.94, 3.5),
    ("k8v4", 2.45, 3.6),
    ("int4", 3.54, 3.4),
    ("nf4", 3.85, 1.7),
];

impl Codec {
    /// Blocks that the bytes of so many hold.
    pub(crate) fn blocks(&self, blocks: u32) -> u32 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts of floats stay in range")]
        let more = (f64::from(blocks) * self.ratio) as u32;
        more.max(1)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl FromStr for Codec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, figures) = text.split_once('=').map_or((text, None), |(name, figures)| (name, Some(figures)));
        let says = || {
            let names = MEASURED.map(|(name, ..)| name).join(", ");
            format!("give one of {names}, or NAME=RATIO@GB_PER_S, such as mine=2.5@4")
        };
        let figures = match figures {
            Some(figures) => {
                figures.split_once('@').and_then(|(ratio, rate)| Some((ratio.parse().ok()?, rate.parse().ok()?)))
            }
            None => MEASURED.iter().find(|(other, ..)| *other == name).map(|(_, ratio, rate)| (*ratio, *rate)),
        };
        let is_right =
            |(ratio, rate): &(f64, f64)| *ratio >= 1.0 && ratio.is_finite() && *rate > 0.0 && !name.is_empty();
        let (ratio, rate) = figures.filter(is_right).ok_or_else(says)?;
        Ok(Self { name: name.to_owned(), ratio, decode_bytes_per_s: rate * 1e9 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_codec_is_known_by_its_name_or_by_its_figures() {
        let int4: Codec = "int4".parse().unwrap();
        assert_eq!((int4.blocks(1000), int4.to_string()), (3540, "int4".to_owned()));
        let mine: Codec = "mine=2.5@4".parse().unwrap();
        assert_eq!(mine, Codec { name: "mine".into(), ratio: 2.5, decode_bytes_per_s: 4e9 });
        for wrong in ["zip", "mine=2.5", "mine=0.5@4", "mine=2@0", "=2@2", "mine=x@2"] {
            assert!(wrong.parse::<Codec>().unwrap_err().contains("NAME=RATIO@GB_PER_S"), "{wrong}");
        }
    }

    /// A name that replay does not know is one that people cannot try.
    #[test]
    fn every_codec_of_the_library_has_figures() {
        for name in kvkeep::tiers::Codecs::names() {
            assert!(name.parse::<Codec>().is_ok(), "{name}");
        }
    }
}
