//! A frame as sections of rows of columns, and where its groups are.
//!
//! A row is the elements of a token in one head, or in all heads where they lie together. Of keys a group is a column of
//! a piece of a section, which has 64 to 127 tokens if there are so many; of values a row. Rows of the first and of the last tokens may be exact: they are in no group.

use super::elements;
use crate::layout::{Frame, Side, TokenOrder};
use crate::tensor::DType;

/// Keys of one channel change with their places: scales of more tokens than this are coarser.
const PIECE_TOKENS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) dtype: DType,
    pub(super) sections: usize,
    /// Of a section.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// A group is a column of a piece, else a row.
    pub(super) by_column: bool,
    /// Of a section.
    rows_a_token: usize,
    /// Tokens at the beginning and at the end that are no part of a group.
    pub(super) exact: [u32; 2],
}

impl Plan {
    /// `None` for what has no groups. Of tokens that are to be exact, at most as many as there are.
    pub(super) fn of(frame: &Frame, raw_bytes: usize, exact: [u32; 2]) -> Option<Self> {
        let &[outer, inner, columns] = frame.shape.dims() else { return None };
        let (sections, rows, columns, rows_a_token) = match (frame.side?, frame.order?) {
            (Side::K, TokenOrder::TokenHeadDim) => (1, outer, inner.checked_mul(columns)?, 1),
            (Side::V, TokenOrder::TokenHeadDim) => (1, outer.checked_mul(inner)?, columns, inner),
            (_, TokenOrder::HeadTokenDim) => (outer, inner, columns, 1),
        };
        let is_float = matches!(frame.dtype, DType::BF16 | DType::F16 | DType::F32);
        let fits = frame.shape.size_bytes(frame.dtype) == Some(raw_bytes) && raw_bytes > 0;
        let tokens = u32::try_from(rows / rows_a_token.max(1)).ok()?;
        let first = exact[0].min(tokens);
        let exact = [first, exact[1].min(tokens - first)];
        let by_column = frame.side == Some(Side::K);
        let plan = Self { dtype: frame.dtype, sections, rows, columns, by_column, rows_a_token, exact };
        (is_float && fits && columns % 2 == 0).then_some(plan)
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.columns * self.dtype.size_bytes()
    }

    pub(super) fn section_bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    /// Rows of a section at its beginning and at its end that are exact.
    pub(super) fn exact_rows(&self) -> [usize; 2] {
        self.exact.map(|tokens| tokens as usize * self.rows_a_token)
    }

    /// Of a section.
    pub(super) fn exact_bytes(&self) -> usize {
        self.exact_rows().iter().sum::<usize>() * self.row_bytes()
    }

    /// Rows of a section that are in groups.
    pub(super) fn coded_rows(&self) -> usize {
        self.rows - self.exact_rows().iter().sum::<usize>()
    }

    /// Rows of each piece of a section.
    pub(super) fn pieces(&self) -> impl Iterator<Item = usize> + use<> {
        let (rows, most) = (self.coded_rows(), PIECE_TOKENS * self.rows_a_token.max(1));
        let pieces = if rows == 0 { 0 } else { (rows / most).max(1) };
        (1..=pieces).map(move |number| if number < pieces { most } else { rows - (pieces - 1) * most })
    }

    /// Of a piece of so many rows.
    pub(super) fn groups(&self, rows: usize) -> usize {
        if self.by_column { self.columns } else { rows }
    }

    pub(super) fn values(&self, raw: &[u8]) -> Vec<f32> {
        elements::read(self.dtype, raw)
    }

    /// The least and the most of each group of a piece, of which these are the rows.
    #[inline(always)]
    pub(super) fn ranges(&self, piece: &[f32]) -> Vec<(f32, f32)> {
        let ends = |(least, most): (f32, f32), value: f32| (least.min(value), most.max(value));
        let none = (f32::INFINITY, f32::NEG_INFINITY);
        let rows = piece.chunks_exact(self.columns);
        if !self.by_column {
            return rows.map(|row| row.iter().copied().fold(none, ends)).collect();
        }
        let mut ranges = vec![none; self.columns];
        for row in rows {
            ranges.iter_mut().zip(row).for_each(|(range, value)| *range = ends(*range, *value));
        }
        ranges
    }
}
