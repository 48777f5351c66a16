//! How a value becomes bytes and is itself again: said once for each, so that both directions agree.
//!
//! Invariant: reading never panics, and takes no more memory than the bytes that came.

use kvkeep::tiers::{BlockKey, BlockMeta, Located};
use kvkeep::{BlockHash, NamespaceId};

/// A value on the socket.
pub(crate) trait Field: Sized {
    fn put(&self, into: &mut Vec<u8>);

    /// Takes it off the front of what came; `None` if that is no such value.
    fn take(from: &mut &[u8]) -> Option<Self>;
}

/// For an enum: a byte that says which, and the fields of that one.
macro_rules! one_of {
    ($name:ty: $($number:literal = $variant:ident $(($($at:ident),+))? $({$($field:ident),+})?),+ $(,)?) => {
        impl Field for $name {
            fn put(&self, into: &mut Vec<u8>) {
                match self {
                    $(Self::$variant $(($($at),+))? $({$($field),+})? => {
                        into.push($number);
                        $($($at.put(into);)+)?
                        $($($field.put(into);)+)?
                    })+
                }
            }

            fn take(from: &mut &[u8]) -> Option<Self> {
                Some(match u8::take(from)? {
                    $($number => {
                        $($(let $at = Field::take(from)?;)+)?
                        $($(let $field = Field::take(from)?;)+)?
                        Self::$variant $(($($at),+))? $({$($field),+})?
                    })+
                    _ => return None,
                })
            }
        }
    };
}
pub(super) use one_of;

/// For a struct: its fields.
macro_rules! all_of {
    ($name:ident { $($field:ident),+ }) => {
        impl Field for $name {
            fn put(&self, into: &mut Vec<u8>) {
                let Self { $($field),+ } = self;
                $($field.put(into);)+
            }

            fn take(from: &mut &[u8]) -> Option<Self> {
                $(let $field = Field::take(from)?;)+
                Some(Self { $($field),+ })
            }
        }
    };
}
pub(super) use all_of;

fn slice<'a>(from: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(count)?;
    *from = rest;
    Some(taken)
}

/// Bytes with their number before them.
fn put_bytes(bytes: &[u8], into: &mut Vec<u8>) {
    count(bytes.len()).put(into);
    into.extend_from_slice(bytes);
}

fn take_bytes<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let count = u32::take(from)?;
    slice(from, count as usize)
}

/// What does not fit a frame is refused as a whole.
fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

impl<const N: usize> Field for [u8; N] {
    fn put(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(self);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        slice(from, N)?.try_into().ok()
    }
}

impl Field for u8 {
    fn put(&self, into: &mut Vec<u8>) {
        into.push(*self);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        <[u8; 1]>::take(from).map(|[byte]| byte)
    }
}

impl Field for u32 {
    fn put(&self, into: &mut Vec<u8>) {
        self.to_le_bytes().put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Field::take(from).map(Self::from_le_bytes)
    }
}

impl Field for u64 {
    fn put(&self, into: &mut Vec<u8>) {
        self.to_le_bytes().put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Field::take(from).map(Self::from_le_bytes)
    }
}

impl Field for bool {
    fn put(&self, into: &mut Vec<u8>) {
        into.push(u8::from(*self));
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        u8::take(from).filter(|byte| *byte < 2).map(|byte| byte == 1)
    }
}

impl Field for String {
    fn put(&self, into: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Self::from_utf8(take_bytes(from)?.to_vec()).ok()
    }
}

impl<T: Field> Field for Option<T> {
    fn put(&self, into: &mut Vec<u8>) {
        self.is_some().put(into);
        self.iter().for_each(|value| value.put(into));
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some(if bool::take(from)? { Some(T::take(from)?) } else { None })
    }
}

/// Each item takes a byte at least: no list is longer than what came.
impl<T: Field> Field for Vec<T> {
    fn put(&self, into: &mut Vec<u8>) {
        count(self.len()).put(into);
        self.iter().for_each(|item| item.put(into));
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        let count = u32::take(from)? as usize;
        if count > from.len() {
            return None;
        }
        (0..count).map(|_| T::take(from)).collect()
    }
}

impl<A: Field, B: Field> Field for (A, B) {
    fn put(&self, into: &mut Vec<u8>) {
        self.0.put(into);
        self.1.put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some((A::take(from)?, B::take(from)?))
    }
}

impl<A: Field, B: Field, C: Field> Field for (A, B, C) {
    fn put(&self, into: &mut Vec<u8>) {
        self.0.put(into);
        self.1.put(into);
        self.2.put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some((A::take(from)?, B::take(from)?, C::take(from)?))
    }
}

impl Field for NamespaceId {
    fn put(&self, into: &mut Vec<u8>) {
        self.as_bytes().put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Field::take(from).map(Self::from_bytes)
    }
}

impl Field for BlockHash {
    fn put(&self, into: &mut Vec<u8>) {
        self.as_bytes().put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Field::take(from).map(Self::from_bytes)
    }
}

impl Field for BlockKey {
    fn put(&self, into: &mut Vec<u8>) {
        self.hash().put(into);
        self.layer().put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some(Self::new(Field::take(from)?, Field::take(from)?))
    }
}

/// One that cannot be described becomes nothing, which is no description.
impl Field for BlockMeta {
    fn put(&self, into: &mut Vec<u8>) {
        put_bytes(&self.to_bytes().unwrap_or_default(), into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Self::from_bytes(take_bytes(from)?)
    }
}

impl Field for Located {
    fn put(&self, into: &mut Vec<u8>) {
        self.namespace.put(into);
        self.raw_bytes.put(into);
        self.compute_us.put(into);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some(Self::raw(Field::take(from)?, Field::take(from)?, Field::take(from)?))
    }
}
