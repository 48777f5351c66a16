//! Text to tokens and back, built from a GGUF file's metadata.
//!
//! Invariant: control tokens such as `<|im_end|>` come out of text only where the caller
//! says that the text may hold them; a user's text never does by default. Decoding works on
//! bytes, so a streamed answer never shows half a character. Shipping a `tokenizer.json`
//! beside the model was the alternative: a second file that can be of another model.

use std::collections::HashMap;
use std::ops::Range;

use aho_corasick::{AhoCorasick, Input, MatchKind};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::error::{EngineError, Result};
use crate::gguf::Gguf;

/// What splits text before byte-pair encoding, by its name in GGUF files.
const SUPPORTED_PRE: &str = "default, gpt-2, smollm, llama-bpe, qwen2";
/// Published pre-tokenizer of Llama 3; Qwen 2 differs in taking digits one by one.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Keys of the tokens that end an answer or a turn of it.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
/// Control tokens that end a turn or a text in published models. Files often name one of them under
/// `eos_token_id` while the chat template ends its turns with another.
const END_NAMES: [&str; 17] = [
    "</s>",
    "<EOT>",
    "<|call|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|endofturn|>",
    "<|eom|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];
/// `SentencePiece` writes a space as this.
const SPACE: &str = "\u{2581}";

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    pieces: Vec<Piece>,
    longest_bytes: usize,
    /// Finds control tokens by their texts, the longest of several.
    specials: AhoCorasick,
    special_ids: Vec<u32>,
    family: Family,
    add_space: bool,
    bos: Option<u32>,
    adds_bos: bool,
    eos: Option<u32>,
    /// Whatever ends an answer, the model's own end included.
    ends: Vec<u32>,
}

/// A token's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Bytes(Vec<u8>),
    Control(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Bytes written as printable characters.
    ByteLevel,
    SentencePiece,
}

/// Turns a stream of tokens into a stream of text, whole characters at a time.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
    text: String,
    started: bool,
}

impl Tokenizer {
    pub(crate) fn read(gguf: &Gguf) -> Result<Self> {
        let missing = |key: &str| EngineError::Missing(format!("tokenizer.ggml.{key}"));
        let tokens = gguf.texts("tokenizer.ggml.tokens").ok_or_else(|| missing("tokens"))?;
        let kinds = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
        let kind = |id: usize| kinds.get(id).copied().unwrap_or(1);
        let family = match gguf.text("tokenizer.ggml.model") {
            Some("gpt2") => Family::ByteLevel,
            Some("llama") => Family::SentencePiece,
            other => {
                let other = other.unwrap_or("none");
                let reason = format!("model {other:?} is not supported: \"gpt2\" and \"llama\" are");
                return Err(EngineError::Tokenizer(reason));
            }
        };
        let bytes_of = byte_alphabet();
        let piece = |(id, text): (usize, &&str)| match kind(id) {
            3 => Piece::Control((*text).to_owned()),
            _ => Piece::Bytes(piece_bytes(text, family, kind(id), &bytes_of)),
        };
        let pieces: Vec<Piece> = tokens.iter().enumerate().map(piece).collect();
        let (texts, special_ids): (Vec<&str>, Vec<u32>) = (0u32..).zip(&pieces).filter_map(special).unzip();
        let specials = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
        let specials = specials.map_err(|error| EngineError::Tokenizer(error.to_string()))?;
        let vocab: Vocab = (0u32..)
            .zip(tokens.iter().zip(&pieces))
            .filter(|(_, (_, piece))| matches!(piece, Piece::Bytes(_)))
            .map(|(id, (text, _))| ((*text).to_owned(), id))
            .collect();
        let bytes = |piece: &Piece| if let Piece::Bytes(bytes) = piece { bytes.len() } else { 0 };
        let id = |key: &str| gguf.number(key).and_then(|id| u32::try_from(id).ok());
        let named = (0u32..).zip(&pieces).filter(|(_, piece)| piece.ends_a_turn()).map(|(id, _)| id);
        let ends = END_KEYS.into_iter().filter_map(id).chain(named).collect();
        Ok(Self {
            bpe: build(gguf, vocab, family)?,
            longest_bytes: pieces.iter().map(bytes).max().unwrap_or(0),
            ends,
            pieces,
            specials,
            special_ids,
            family,
            add_space: gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(family == Family::SentencePiece),
            bos: id("tokenizer.ggml.bos_token_id"),
            adds_bos: gguf.flag("tokenizer.ggml.add_bos_token").unwrap_or(family == Family::SentencePiece),
            eos: id("tokenizer.ggml.eos_token_id"),
        })
    }

    /// The tokens of a text. With `parse_special`, control tokens written out in the text
    /// become those tokens; without, they are text like any other. No token is added. A byte
    /// that the vocabulary has no token for at all is left out, as the published tokenizers do
    /// (SmolLM2 lacks six of the ASCII control bytes and the lead bytes of unassigned planes).
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the text cannot be encoded.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        let mut plain_from = 0;
        let mut at = 0;
        while parse_special && let Some((special, id)) = self.next_special(text, at) {
            self.encode_plain(text.get(plain_from..special.start).unwrap_or_default(), &mut tokens)?;
            tokens.push(id);
            at = special.end;
            plain_from = at;
        }
        self.encode_plain(text.get(plain_from..).unwrap_or_default(), &mut tokens)?;
        Ok(tokens)
    }

    /// As [`Tokenizer::encode`] with `parse_special`, but control tokens with `guard` inside are
    /// text, and `guard` is then left out.
    pub(crate) fn encode_guarded(&self, text: &str, guard: char) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some((special, id)) = self.next_special(text, at) {
            self.encode_plain(&text.get(at..special.start).unwrap_or_default().replace(guard, ""), &mut tokens)?;
            tokens.push(id);
            at = special.end;
        }
        self.encode_plain(&text.get(at..).unwrap_or_default().replace(guard, ""), &mut tokens)?;
        Ok(tokens)
    }

    /// The same text with `guard` inside every control token, so that it is none.
    pub(crate) fn guard(&self, text: &str, guard: char) -> String {
        let mut guarded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((Range { start, .. }, _)) = self.next_special(rest, 0) {
            // One character at a time: what follows may begin another control token.
            let first = rest.get(start..).and_then(|rest| rest.chars().next()).map_or(1, char::len_utf8);
            guarded.push_str(rest.get(..start + first).unwrap_or_default());
            guarded.push(guard);
            rest = rest.get(start + first..).unwrap_or_default();
        }
        guarded + rest
    }

    /// The text of tokens, control tokens left out; bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text: String = tokens.iter().map(|token| stream.push(*token).to_owned()).collect();
        text.push_str(stream.finish());
        text
    }

    /// As [`Tokenizer::decode`], with control tokens written out: what [`Tokenizer::encode`] with
    /// `parse_special` makes the same tokens of, but for bytes that are no UTF-8.
    #[must_use]
    pub fn decode_all(&self, tokens: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text = String::new();
        for token in tokens {
            if let Some(control) = self.control_text(*token) {
                text.push_str(stream.finish());
                text.push_str(control);
            }
            text.push_str(stream.push(*token));
        }
        text.push_str(stream.finish());
        text
    }

    /// A text's tokens as a prompt by itself: control tokens written out in it are those tokens, and
    /// the token that the model expects before a text comes first, once.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.encode(text, true)?;
        let bos = self.bos().filter(|bos| tokens.first() != Some(bos));
        Ok(bos.into_iter().chain(tokens).collect())
    }

    /// A decoder for tokens that come one by one.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, pending: Vec::new(), text: String::new(), started: false }
    }

    /// The bytes that a token stands for; none for a control token.
    #[must_use]
    pub fn bytes(&self, token: u32) -> &[u8] {
        match self.pieces.get(token as usize) {
            Some(Piece::Bytes(bytes)) => bytes,
            _ => &[],
        }
    }

    /// The most bytes that one token stands for.
    #[must_use]
    pub fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }

    /// Number of tokens.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    /// Does this token end an answer? Every token does that ends a turn or a text in the
    /// vocabulary, whichever of them the file calls its end.
    #[must_use]
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// The token that the model expects before a plain text; chat templates write it themselves.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    /// A control token's text.
    pub(crate) fn control_text(&self, token: u32) -> Option<&str> {
        match self.pieces.get(token as usize) {
            Some(Piece::Control(text)) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn bos_text(&self) -> &str {
        self.bos.and_then(|bos| self.control_text(bos)).unwrap_or_default()
    }

    pub(crate) fn eos_text(&self) -> &str {
        self.eos.and_then(|eos| self.control_text(eos)).unwrap_or_default()
    }

    fn encode_plain(&self, text: &str, tokens: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let error = |error: tokenizers::Error| EngineError::Tokenizer(error.to_string());
        let encoding = match self.family {
            Family::ByteLevel => self.bpe.encode_fast(text, false),
            Family::SentencePiece => {
                let prefix = if self.add_space { SPACE } else { "" };
                self.bpe.encode_fast(prefix.to_owned() + &text.replace(' ', SPACE), false)
            }
        };
        tokens.extend_from_slice(encoding.map_err(error)?.get_ids());
        Ok(())
    }

    /// The first control token from byte `from` on: where, and its id.
    fn next_special(&self, text: &str, from: usize) -> Option<(Range<usize>, u32)> {
        let found = self.specials.find(Input::new(text).range(from..))?;
        Some((found.range(), *self.special_ids.get(found.pattern().as_usize())?))
    }
}

impl Piece {
    fn ends_a_turn(&self) -> bool {
        matches!(self, Self::Control(text) if END_NAMES.contains(&text.as_str()))
    }
}

impl TextStream<'_> {
    /// The text that this token completes: possibly none, never half a character.
    pub fn push(&mut self, token: u32) -> &str {
        self.text.clear();
        if let Some(Piece::Bytes(bytes)) = self.tokenizer.pieces.get(token as usize) {
            let strip = !self.started && self.tokenizer.add_space && self.tokenizer.family == Family::SentencePiece;
            self.started = true;
            let bytes = if strip { bytes.strip_prefix(b" ").unwrap_or(bytes) } else { bytes };
            self.pending.extend_from_slice(bytes);
            self.take_whole();
        }
        &self.text
    }

    /// What is left at the end: a broken character becomes U+FFFD.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
        &self.text
    }

    /// Moves whole characters from the pending bytes to the text; broken ones become U+FFFD.
    fn take_whole(&mut self) {
        let mut taken = 0;
        loop {
            let rest = self.pending.get(taken..).unwrap_or_default();
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.text.push_str(text);
                    taken += text.len();
                    break;
                }
                Err(error) => {
                    let valid = rest.get(..error.valid_up_to()).unwrap_or_default();
                    self.text.push_str(&String::from_utf8_lossy(valid));
                    taken += valid.len();
                    let Some(broken) = error.error_len() else { break };
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    taken += broken;
                }
            }
        }
        self.pending.drain(..taken);
    }
}

fn special((id, piece): (u32, &Piece)) -> Option<(&str, u32)> {
    match piece {
        Piece::Control(text) if !text.is_empty() => Some((text, id)),
        _ => None,
    }
}

fn build(gguf: &Gguf, vocab: Vocab, family: Family) -> Result<tokenizers::Tokenizer> {
    let error = |error: tokenizers::Error| EngineError::Tokenizer(error.to_string());
    let bpe = BPE::builder();
    match family {
        Family::ByteLevel => {
            let (splitter, ignore_merges) = pre_tokenizer(gguf.text("tokenizer.ggml.pre").unwrap_or("default"))?;
            let merges = gguf
                .texts("tokenizer.ggml.merges")
                .ok_or_else(|| EngineError::Missing("tokenizer.ggml.merges".to_owned()))?;
            let split = |merge: &&str| merge.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned()));
            let merges: Merges = merges.iter().filter_map(split).collect();
            let bpe = bpe.vocab_and_merges(vocab, merges).ignore_merges(ignore_merges).build().map_err(error)?;
            let mut tokenizer = tokenizers::Tokenizer::new(bpe);
            tokenizer.with_pre_tokenizer(Some(splitter));
            Ok(tokenizer)
        }
        Family::SentencePiece => {
            let scores = gguf
                .reals("tokenizer.ggml.scores")
                .ok_or_else(|| EngineError::Missing("tokenizer.ggml.scores".to_owned()))?;
            let merges = merges_by_score(&vocab, &scores);
            let unknown = gguf.number("tokenizer.ggml.unknown_token_id").unwrap_or(0);
            let unknown = vocab.iter().find(|(_, id)| **id as usize == unknown).map(|(text, _)| text.clone());
            let bpe = bpe.vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
            let bpe = if let Some(unknown) = unknown { bpe.unk_token(unknown) } else { bpe };
            Ok(tokenizers::Tokenizer::new(bpe.build().map_err(error)?))
        }
    }
}

/// The published splitter of a family, and whether whole words skip the merges.
fn pre_tokenizer(name: &str) -> Result<(PreTokenizerWrapper, bool)> {
    let regex = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let split = Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| EngineError::Tokenizer(error.to_string()))?;
        let parts = vec![split.into(), ByteLevel::new(false, false, false).into()];
        Ok(Sequence::new(parts).into())
    };
    let bytes = ByteLevel::new(false, false, true);
    match name {
        "default" | "gpt-2" => Ok((bytes.into(), false)),
        "smollm" => Ok((Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into(), false)),
        "llama-bpe" | "llama3" => Ok((regex(LLAMA3_SPLIT)?, true)),
        "qwen2" => Ok((regex(QWEN2_SPLIT)?, false)),
        other => Err(EngineError::Tokenizer(format!("pre-tokenizer {other:?} is not supported: {SUPPORTED_PRE} are"))),
    }
}

/// `SentencePiece` files list scores, not merges: a pair merges if the whole is a token, the
/// best-scored whole first.
fn merges_by_score(vocab: &Vocab, scores: &[f32]) -> Merges {
    let mut merges = Vec::new();
    for (whole, id) in vocab {
        let score = scores.get(*id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        for (at, _) in whole.char_indices().skip(1) {
            let (left, right) = whole.split_at(at);
            if vocab.contains_key(left) && vocab.contains_key(right) {
                merges.push((score, *id, left.to_owned(), right.to_owned()));
            }
        }
    }
    merges.sort_by(|a, b| {
        let longer_left = b.2.chars().count().cmp(&a.2.chars().count());
        b.0.total_cmp(&a.0).then(longer_left).then(a.1.cmp(&b.1))
    });
    merges.into_iter().map(|(_, _, left, right)| (left, right)).collect()
}

fn piece_bytes(text: &str, family: Family, kind: i64, bytes_of: &HashMap<char, u8>) -> Vec<u8> {
    match family {
        Family::ByteLevel => {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| bytes_of.get(&c).copied()).collect();
            bytes.unwrap_or_else(|| text.as_bytes().to_vec())
        }
        Family::SentencePiece => {
            let byte = text.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'));
            match byte.filter(|_| kind == 6).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => vec![byte],
                None => text.replace(SPACE, " ").into_bytes(),
            }
        }
    }
}

/// GPT-2's byte alphabet: printable bytes stand for themselves, the others for U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100u32;
    let mut alphabet = HashMap::new();
    for byte in 0..=u8::MAX {
        let stand_in = if printable(byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        };
        alphabet.insert(stand_in, byte);
    }
    alphabet
}
