//! Activations of one batch of rows, in panels: `[columns / 16][rows][16]`.
//!
//! A product's outputs are whole panels, so tasks get disjoint slices without locks or
//! `unsafe`; row-major would interleave the columns of all tasks in every row.

use std::ops::Range;

use crate::simd::LANES;

/// A matrix whose memory is kept when it changes its number of rows.
#[derive(Debug, Default)]
pub(crate) struct Acts {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Acts {
    pub(crate) fn new(columns: usize) -> Self {
        Self { data: Vec::new(), rows: 0, columns: columns.next_multiple_of(LANES) }
    }

    /// Contents are unspecified afterwards; kernels overwrite them.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
        self.data.resize(rows * self.columns, 0.0);
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Floats from one panel to the next.
    pub(crate) fn stride(&self) -> usize {
        self.rows * LANES
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.data
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub(crate) fn panels(&self, panels: Range<usize>) -> &[f32] {
        let stride = self.stride();
        self.data.get(panels.start * stride..panels.end * stride).unwrap_or_default()
    }

    pub(crate) fn panels_mut(&mut self, panels: Range<usize>) -> &mut [f32] {
        let stride = self.stride();
        self.data.get_mut(panels.start * stride..panels.end * stride).unwrap_or_default()
    }

    /// The pieces of a row, in order, 16 columns each.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.stride().max(1)).filter_map(move |panel| panel.get(row * LANES..(row + 1) * LANES))
    }

    /// Writes one row from a row-major slice.
    pub(crate) fn set_row(&mut self, row: usize, values: &[f32]) {
        let stride = self.stride().max(1);
        for (panel, values) in self.data.chunks_exact_mut(stride).zip(values.chunks(LANES)) {
            if let Some(to) = panel.get_mut(row * LANES..row * LANES + values.len()) {
                to.copy_from_slice(values);
            }
        }
    }

    /// Copies one row of another matrix of as many columns.
    pub(crate) fn set_row_from(&mut self, row: usize, other: &Self, other_row: usize) {
        let stride = self.stride().max(1);
        for (panel, values) in self.data.chunks_exact_mut(stride).zip(other.row(other_row)) {
            if let Some(to) = panel.get_mut(row * LANES..(row + 1) * LANES) {
                to.copy_from_slice(values);
            }
        }
    }
}
