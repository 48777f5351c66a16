//! The entropy coder: Huffman codes of at most 11 bits, of which a decoder looks up several at once.
//!
//! A plane is coded as four streams, one for each quarter of it, so that a processor can work on four at a time. A
//! window of 11 bits names all the symbols that are whole in it: of exponents of real KV, three or four.
//! Lengths are the best under their bound: package-merge (Larmore and Hirschberg, 1990).
//!
//! Coded: the first and the last symbol; the lengths from one to the other, 4 bits each, low bits first; the bytes of the
//! first three streams, 2 bytes each; the streams. Codes are canonical: ascending by length, then by symbol. Bits go
//! from the highest of a byte to the lowest.
//!
//! Invariant: a code is complete. So every window begins with a symbol, and a decoder that is fed anything goes on.
//!
//! rANS was the alternative, with 32 states in AVX2 registers: its tables and states make as much of a layer's block
//! longer as its codes save, and it codes at half and decodes at two thirds of the rate.

/// The most bits of a symbol, and those of the largest window.
const MOST_BITS: u8 = 11;
const STREAMS: usize = 4;
const SIZES_BYTES: usize = 2 * (STREAMS - 1);
/// Windows to be had from the 57 bits or more that a refill gives.
const LOOKUPS: usize = 5;
/// Symbols that are coded before bits are written: with 7 that are left over, they fit 64 bits.
const TOGETHER: usize = 5;

/// How many bits each symbol takes; 0 where it does not occur.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lengths([u8; 256]);

/// A symbol that occurs, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Leaf {
    count: u32,
    symbol: u8,
}

/// The code of each symbol, and its length.
#[derive(Debug)]
struct Codes {
    bits: [u32; 256],
    lengths: [u8; 256],
}

/// What each window begins with, from the lowest byte on: up to six symbols, how many, and their bits.
#[derive(Debug)]
struct Windows {
    /// The largest windows are the second half.
    tables: Vec<u64>,
    /// What is left of 64 bits without a window.
    shift: u32,
}

/// A stream that is read.
#[derive(Debug)]
struct Reader<'a> {
    bytes: &'a [u8],
    /// The next bits, from the highest on.
    bits: u64,
    /// How many of all bits were used.
    used: usize,
}

/// Codes a plane into the beginning of `into`, and says how many bytes that takes; `None` if there is no room.
#[inline(always)]
pub(super) fn encode(lengths: &Lengths, symbols: &[u8], into: &mut [u8]) -> Option<usize> {
    let head = lengths.write(into)?;
    let (sizes, streams) = into.get_mut(head..)?.split_first_chunk_mut::<SIZES_BYTES>()?;
    let (codes, mut at) = (Codes::new(lengths), 0);
    let mut sizes = sizes.as_chunks_mut().0.iter_mut();
    for part in symbols.chunks(symbols.len().div_ceil(STREAMS)) {
        let bytes = codes.write(part, streams.get_mut(at..)?)?;
        if let Some(size) = sizes.next() {
            *size = u16::try_from(bytes).ok()?.to_le_bytes();
        }
        at += bytes;
    }
    Some(head + SIZES_BYTES + at)
}

/// Decodes a plane; `None` if the bytes are not exactly one of so many symbols.
#[inline(always)]
pub(super) fn decode(stored: &[u8], symbols: &mut [u8]) -> Option<()> {
    let (lengths, stored) = Lengths::read(stored)?;
    let (sizes, stored) = stored.split_first_chunk::<SIZES_BYTES>()?;
    let mut readers = Reader::four(sizes, stored)?;
    let windows = Windows::new(&lengths);
    let quarter = symbols.len().div_ceil(STREAMS);
    let (half, back) = symbols.split_at_mut_checked(2 * quarter)?;
    let (first, second) = half.split_at_mut_checked(quarter)?;
    let (third, fourth) = back.split_at_mut_checked(quarter)?;
    let mut parts = [first, second, third, fourth];
    let mut at = [0; STREAMS];
    // It ends where one of them has not enough any more.
    let _ = decode_together(&windows, &mut readers, &mut parts, &mut at);
    for ((reader, part), at) in readers.into_iter().zip(parts).zip(at) {
        reader.finish(&lengths, &windows, part.get_mut(at..)?)?;
    }
    Some(())
}

/// Goes on while each stream has bytes for a refill, and each part room for what comes of it.
#[inline(always)]
fn decode_together(
    windows: &Windows,
    readers: &mut [Reader<'_>; STREAMS],
    parts: &mut [&mut [u8]; STREAMS],
    at: &mut [usize; STREAMS],
) -> Option<()> {
    let table = windows.largest();
    loop {
        for reader in readers.iter_mut() {
            reader.refill()?;
        }
        for _ in 0..LOOKUPS {
            for ((reader, part), at) in readers.iter_mut().zip(parts.iter_mut()).zip(at.iter_mut()) {
                // All eight bytes of the entry: what is no symbol is overwritten.
                let to = part.get_mut(*at..)?.first_chunk_mut()?;
                *to = reader.look_up(table);
                let [.., count, _] = *to;
                *at += usize::from(count);
            }
        }
    }
}

impl Lengths {
    /// The best ones for a plane with these counts; `None` if it has fewer than two symbols.
    pub(super) fn of(counts: &[u32; 256]) -> Option<Self> {
        let mut leaves = Vec::with_capacity(counts.len());
        let occur = (0..=u8::MAX).zip(counts).filter(|(_, count)| **count > 0);
        leaves.extend(occur.map(|(symbol, count)| Leaf { count: *count, symbol }));
        if leaves.len() < 2 {
            return None;
        }
        leaves.sort_unstable();
        let mut lengths = [0; 256];
        for (leaf, length) in leaves.iter().zip(package_merge(&leaves, most_bits(counts.iter().sum()))) {
            *lengths.get_mut(usize::from(leaf.symbol))? = length;
        }
        Some(Self(lengths))
    }

    /// Bytes that a plane with these counts takes, with all that stands before its streams.
    pub(super) fn bytes(&self, counts: &[u32; 256]) -> usize {
        let bits: u64 = self.0.iter().zip(counts).map(|(length, count)| u64::from(*length) * u64::from(*count)).sum();
        let streams = usize::try_from(bits / 8).unwrap_or(usize::MAX).saturating_add(STREAMS);
        streams.saturating_add(2 + self.span().len().div_ceil(2) + SIZES_BYTES)
    }

    /// From the first symbol to the last.
    fn span(&self) -> std::ops::Range<usize> {
        let occurs = |length: &u8| *length > 0;
        let first = self.0.iter().position(occurs).unwrap_or_default();
        first..self.0.iter().rposition(occurs).map_or(first, |last| last + 1)
    }

    fn bits(&self, symbol: u8) -> usize {
        self.0.get(usize::from(symbol)).copied().unwrap_or_default().into()
    }

    fn write(&self, into: &mut [u8]) -> Option<usize> {
        let span = self.span();
        let (ends, nibbles) = into.split_first_chunk_mut()?;
        *ends = [u8::try_from(span.start).ok()?, u8::try_from(span.end.checked_sub(1)?).ok()?];
        let nibbles = nibbles.get_mut(..span.len().div_ceil(2))?;
        for (to, pair) in nibbles.iter_mut().zip(self.0.get(span)?.chunks(2)) {
            *to = pair.iter().rev().fold(0, |byte, length| byte << 4 | length);
        }
        Some(ends.len() + nibbles.len())
    }

    /// Those of a complete code, and what follows them.
    fn read(stored: &[u8]) -> Option<(Self, &[u8])> {
        let ([first, last], stored) = stored.split_first_chunk()?;
        let mut lengths = [0; 256];
        let wanted = lengths.get_mut(usize::from(*first)..=usize::from(*last))?;
        let (nibbles, stored) = stored.split_at_checked(wanted.len().div_ceil(2))?;
        for (pair, byte) in wanted.chunks_mut(2).zip(nibbles) {
            pair.iter_mut().zip([byte & 15, byte >> 4]).for_each(|(length, nibble)| *length = nibble);
        }
        let mut taken = 0u32;
        for length in lengths.into_iter().filter(|length| *length > 0) {
            taken += 1 << MOST_BITS.checked_sub(length)?;
        }
        (taken == 1 << MOST_BITS).then_some((Self(lengths), stored))
    }

    /// Symbols with their lengths in the order of their codes.
    fn in_order(&self) -> Vec<(u8, u8)> {
        let mut order = Vec::with_capacity(self.0.len());
        order.extend((0..=u8::MAX).zip(self.0).filter(|(_, length)| *length > 0));
        order.sort_by_key(|(_, length)| *length);
        order
    }
}

/// The most bits of a symbol, of a plane with so many: long windows look up more at once, and take longer to make.
fn most_bits(symbols: u32) -> u8 {
    match symbols {
        0..6000 => MOST_BITS - 2,
        6000..24000 => MOST_BITS - 1,
        _ => MOST_BITS,
    }
}

/// Lengths for 2 to 256 leaves in ascending order, such that their code is complete and none is longer than `most`.
fn package_merge(leaves: &[Leaf], most: u8) -> [u8; 256] {
    let (mut packages, mut before, mut count) = ([0u32; 512], [0; 512], 0);
    let mut are_leaves = [[false; 512]; MOST_BITS as usize];
    for flags in are_leaves.iter_mut().take(most.into()) {
        before.iter_mut().zip(&packages).take(count).for_each(|(to, package)| *to = *package);
        let (pairs, _) = before.get(..count).unwrap_or_default().as_chunks::<2>();
        let mut pairs = pairs.iter().map(|[a, b]| a + b).peekable();
        let mut rest = leaves.iter().map(|leaf| leaf.count).peekable();
        count = 0;
        for (package, flag) in packages.iter_mut().zip(flags) {
            *flag = match (rest.peek(), pairs.peek()) {
                (Some(leaf), Some(pair)) => leaf <= pair,
                (leaf, _) => leaf.is_some(),
            };
            let Some(next) = (if *flag { rest.next() } else { pairs.next() }) else { break };
            *package = next;
            count += 1;
        }
    }
    let mut lengths = [0; 256];
    let mut taken = 2 * leaves.len().saturating_sub(1);
    for flags in are_leaves.iter().take(most.into()).rev() {
        let singles = flags.iter().take(taken).filter(|leaf| **leaf).count();
        lengths.iter_mut().take(singles).for_each(|length| *length += 1);
        taken = 2 * (taken - singles);
    }
    lengths
}

impl Codes {
    fn new(lengths: &Lengths) -> Self {
        let (mut bits, mut next) = ([0; 256], 0);
        for (symbol, length) in lengths.in_order() {
            if let Some(code) = bits.get_mut(usize::from(symbol)) {
                *code = next >> (MOST_BITS - length);
            }
            next += 1u32 << (MOST_BITS - length);
        }
        Self { bits, lengths: lengths.0 }
    }

    /// Code and bits of a symbol.
    #[inline(always)]
    fn of(&self, symbol: u8) -> (u64, u32) {
        let bits = self.bits.get(usize::from(symbol)).copied().unwrap_or_default();
        let length = self.lengths.get(usize::from(symbol)).copied().unwrap_or_default();
        (bits.into(), length.into())
    }

    /// Writes a stream, and says how many bytes it has.
    #[inline(always)]
    fn write(&self, symbols: &[u8], into: &mut [u8]) -> Option<usize> {
        let join = |a: (u64, u32), b: (u64, u32)| (a.0 << b.1 | b.0, a.1 + b.1);
        let (mut pending, mut at) = ((0, 0), 0);
        let (groups, last) = symbols.as_chunks::<TOGETHER>();
        for group in groups {
            let [a, b, c, d, e] = group.map(|symbol| self.of(symbol));
            pending = join(pending, join(join(a, b), join(join(c, d), e)));
            let (bits, count) = pending;
            *into.get_mut(at..)?.first_chunk_mut()? = (bits << (u64::BITS - count)).to_be_bytes();
            at += (count / 8) as usize;
            pending.1 %= 8;
        }
        let (bits, count) = last.iter().fold(pending, |pending, symbol| join(pending, self.of(*symbol)));
        let bytes = count.div_ceil(8) as usize;
        // None if there is no bit.
        let rest = bits.checked_shl(u64::BITS - count).unwrap_or_default().to_be_bytes();
        into.get_mut(at..at + bytes)?.copy_from_slice(rest.get(..bytes)?);
        Some(at + bytes)
    }
}

impl Windows {
    const SYMBOLS: u64 = (1 << 48) - 1;
    /// The count of a window with six symbols; none has seven.
    const FULL: u64 = 6 << 48;

    /// Those of 0, 1, 2 ... bits one behind the other, each from the smaller ones: a symbol, and what the bits behind it
    /// begin with.
    #[inline(always)]
    fn new(lengths: &Lengths) -> Self {
        let order = lengths.in_order();
        let most = order.last().map_or(0, |(_, length)| *length);
        let mut tables = vec![0u64; 2 << most];
        for bits in 1..=most {
            let (smaller, mut table) = tables.split_at_mut(1 << bits);
            for (symbol, length) in order.iter().take_while(|(_, length)| *length <= bits) {
                let count = 1usize << (bits - length);
                let head = u64::from(*symbol) | 1 << 48 | u64::from(*length) << 56;
                let (run, rest) = table.split_at_mut(count.min(table.len()));
                for (to, behind) in run.iter_mut().zip(smaller.get(count..2 * count).unwrap_or_default()) {
                    let both = head + ((behind & Self::SYMBOLS) << 8) + (behind & !Self::SYMBOLS);
                    *to = if behind & Self::FULL == Self::FULL { head } else { both };
                }
                table = rest;
            }
        }
        Self { tables, shift: u64::BITS - u32::from(most) }
    }

    /// The largest ones, and how far bits are shifted to be one.
    #[inline(always)]
    fn largest(&self) -> (&[u64], u32) {
        (self.tables.get(self.tables.len() / 2..).unwrap_or_default(), self.shift)
    }
}

impl<'a> Reader<'a> {
    fn four(sizes: &[u8; SIZES_BYTES], mut stored: &'a [u8]) -> Option<[Self; STREAMS]> {
        let reader = |bytes| Self { bytes, bits: 0, used: 0 };
        let mut next = |low, high| {
            let stream;
            (stream, stored) = stored.split_at_checked(u16::from_le_bytes([low, high]).into())?;
            Some(reader(stream))
        };
        let [a, b, c, d, e, f] = *sizes;
        let (first, second, third) = (next(a, b)?, next(c, d)?, next(e, f)?);
        Some([first, second, third, reader(stored)])
    }

    /// At least 57 bits, if so many bytes are there.
    #[inline(always)]
    fn refill(&mut self) -> Option<()> {
        let next = self.bytes.get(self.used / 8..)?.first_chunk()?;
        self.bits = u64::from_be_bytes(*next) << (self.used % 8);
        Some(())
    }

    /// The same at the end of the stream, behind which are zeros.
    #[inline(always)]
    fn refill_at_end(&mut self) {
        let rest = self.bytes.get(self.used / 8..).unwrap_or_default();
        let mut next = [0; 8];
        next.iter_mut().zip(rest).for_each(|(to, byte)| *to = *byte);
        self.bits = u64::from_be_bytes(next) << (self.used % 8);
    }

    /// What the next window begins with.
    #[inline(always)]
    fn look_up(&mut self, (table, shift): (&[u64], u32)) -> [u8; 8] {
        let window = usize::try_from(self.bits >> shift).unwrap_or_default();
        let entry = table.get(window).copied().unwrap_or_default().to_le_bytes();
        let [.., bits] = entry;
        self.bits <<= bits;
        self.used += usize::from(bits);
        entry
    }

    /// The symbols that are left; `None` if the stream does not end with them.
    #[inline(always)]
    fn finish(mut self, lengths: &Lengths, windows: &Windows, mut symbols: &mut [u8]) -> Option<()> {
        while !symbols.is_empty() {
            self.refill_at_end();
            let before = self.used;
            let entry = self.look_up(windows.largest());
            let [.., count, _] = entry;
            let (to, rest) = symbols.split_at_mut(symbols.len().min(count.into()));
            if to.len() < count.into() {
                self.used = before + entry.iter().take(to.len()).map(|symbol| lengths.bits(*symbol)).sum::<usize>();
            }
            to.iter_mut().zip(entry).for_each(|(to, symbol)| *to = symbol);
            symbols = rest;
        }
        (self.used.div_ceil(8) == self.bytes.len()).then_some(())
    }
}
