//! Bytes that an application has not taken yet. Small pieces are copied together, so that many tiny frames do not cost
//! many times their size.

use std::collections::VecDeque;
use std::io::IoSlice;

/// Memory of one piece at least, in bytes.
const CHUNK_MIN: usize = 2 * 1024;

/// Memory of one piece at most, in bytes.
const CHUNK_MAX: usize = 64 * 1024;

/// Bytes that wait, in order. An idle connection owns no buffer, and only a pointer for it.
#[derive(Debug, Default)]
pub struct Backlog(Option<Box<Chunks>>);

#[derive(Debug, Default)]
struct Chunks {
    all: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are gone already.
    start: usize,
    bytes: usize,
    memory: usize,
}

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Memory that they use, in bytes.
    pub fn memory(&self) -> usize {
        self.0.as_ref().map_or(0, |chunks| chunks.memory)
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.get_or_insert_default().push(bytes);
        }
    }

    /// The first pieces, for one write.
    pub fn slices(&self) -> [IoSlice<'_>; 8] {
        let (start, mut chunks) = self.0.as_ref().map(|chunks| (chunks.start, chunks.all.iter())).unwrap_or_default();
        let first = chunks.next().and_then(|chunk| chunk.get(start..)).unwrap_or_default();
        let mut first = Some(first);
        std::array::from_fn(|_| {
            let piece = first.take().or_else(|| chunks.next().map(Vec::as_slice));
            IoSlice::new(piece.unwrap_or_default())
        })
    }

    /// Removes bytes that were written.
    pub fn advance(&mut self, written: usize) {
        if self.0.as_mut().is_some_and(|chunks| chunks.advance(written)) {
            self.0 = None;
        }
    }

    /// All bytes, as pieces.
    pub fn into_chunks(self) -> impl Iterator<Item = Vec<u8>> {
        let Chunks { all, mut start, .. } = self.0.map(|chunks| *chunks).unwrap_or_default();
        all.into_iter().map(move |mut chunk| {
            chunk.drain(..std::mem::take(&mut start).min(chunk.len()));
            chunk
        })
    }
}

impl Chunks {
    fn push(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len();
        while !bytes.is_empty() {
            let free = self.all.back().map_or(0, |last| last.capacity() - last.len());
            if free == 0 {
                let chunk = Vec::with_capacity(bytes.len().clamp(CHUNK_MIN, CHUNK_MAX));
                self.memory += chunk.capacity();
                self.all.push_back(chunk);
                continue;
            }
            let Some((now, rest)) = bytes.split_at_checked(free.min(bytes.len())) else { return };
            if let Some(last) = self.all.back_mut() {
                last.extend_from_slice(now);
            }
            bytes = rest;
        }
    }

    /// Removes bytes from the front. Says whether none is left.
    fn advance(&mut self, mut written: usize) -> bool {
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(first) = self.all.front() {
            let left = first.len() - self.start;
            if written < left {
                self.start += written;
                return false;
            }
            written -= left;
            self.start = 0;
            if let Some(chunk) = self.all.pop_front() {
                self.memory -= chunk.capacity();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(
            steps in prop::collection::vec((0usize..200_000, 0usize..300_000), 0..30), small in any::<bool>(),
        ) {
            let (mut backlog, mut next, mut expected) = (Backlog::default(), 0u32, VecDeque::<u8>::new());
            for (push, take) in steps {
                let push = if small { push % 100 } else { push };
                let bytes: Vec<u8> = (0..push).map(|_| { next += 1; (next % 251) as u8 }).collect();
                expected.extend(&bytes);
                backlog.push(&bytes);
                let mut out = Vec::new();
                for slice in &backlog.slices() {
                    out.extend_from_slice(slice);
                }
                out.truncate(take);
                prop_assert!(out.iter().eq(expected.iter().take(out.len())));
                expected.drain(..out.len());
                backlog.advance(out.len());
                let chunks = backlog.0.as_deref();
                prop_assert_eq!(chunks.map_or(0, |chunks| chunks.bytes), expected.len());
                prop_assert_eq!(backlog.is_empty(), expected.is_empty());
                let capacity = chunks.map_or(0, |chunks| chunks.all.iter().map(Vec::capacity).sum());
                prop_assert_eq!(backlog.memory(), capacity);
                prop_assert!(backlog.memory() <= 2 * expected.len() + CHUNK_MAX + CHUNK_MIN);
            }
            let rest: Vec<u8> = backlog.into_chunks().flatten().collect();
            prop_assert!(rest.iter().eq(expected.iter()));
        }
    }
}
