//! Watches the wire between the nodes: which ports carry traffic, and whether a canary text is readable.

use super::world::WIRE;
use crate::ports::HBONE;
use crate::sys::netns::Netns;
use crate::sys::sniffer::Sniffer;
use crate::task::thread::blocking;
use anyhow::Context;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What was seen on the wire.
#[derive(Clone, Debug, Default)]
pub struct WireStats {
    /// TCP payload bytes by port: the port of tunnels, or the lower of the two ports, which is the server's here.
    pub bytes_by_port: BTreeMap<u16, u64>,
    /// Frames that contain the canary in the clear.
    pub canaries: u64,
    /// TCP payload bytes on other ports than the port of tunnels.
    pub plaintext_bytes: u64,
    /// Number of frames.
    pub frames: u64,
    /// Frames that the kernel dropped because they were not read in time.
    pub dropped: u64,
}

/// A sniffer that runs until its result is taken.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<WireStats>>,
}

impl Watch {
    /// Starts the sniffer in the namespace of node 1.
    pub fn start(node1: &Netns, canary: &str) -> anyhow::Result<Self> {
        let sniffer = node1.enter(|| Sniffer::open(WIRE))?.context("cannot open a packet socket")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, canary) = (stop.clone(), canary.as_bytes().to_vec());
        let thread = blocking(move || watch(&sniffer, &flag, &canary));
        Ok(Self { stop, thread })
    }

    /// Ends the sniffer and returns what it has seen.
    pub fn take(self) -> anyhow::Result<WireStats> {
        // Frames that are still on the wire arrive within this time. Nothing marks the last one.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the sniffer panicked"))?
    }
}

fn watch(sniffer: &Sniffer, stop: &AtomicBool, canary: &[u8]) -> anyhow::Result<WireStats> {
    let mut seen = WireStats::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match sniffer.next(&mut buffer)? {
            Some(length) => look(buffer.get(..length).unwrap_or_default(), canary, &mut seen),
            None if stop.load(Ordering::Relaxed) => break,
            None => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    seen.dropped = u64::from(sniffer.dropped()?);
    Ok(seen)
}

fn look(frame: &[u8], canary: &[u8], seen: &mut WireStats) {
    seen.frames += 1;
    if frame.windows(canary.len()).any(|window| window == canary) {
        seen.canaries += 1;
    }
    let Some((source, destination, payload)) = tcp(frame) else { return };
    if payload > 0 {
        let port = if [source, destination].contains(&HBONE) { HBONE } else { source.min(destination) };
        *seen.bytes_by_port.entry(port).or_default() += payload;
        if port != HBONE {
            seen.plaintext_bytes += payload;
        }
    }
}

/// Source port, destination port and payload length of a TCP segment in an Ethernet frame.
fn tcp(frame: &[u8]) -> Option<(u16, u16, u64)> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let (start, protocol, end) = match word(12)? {
        0x0800 => {
            let header = usize::from(*frame.get(14)? & 0xf) * 4;
            (14 + header, *frame.get(23)?, 14 + usize::from(word(16)?))
        }
        0x86dd => (54, *frame.get(20)?, 54 + usize::from(word(18)?)),
        _ => return None,
    };
    if protocol != 6 {
        return None;
    }
    // A length field of 0 means more than 64 KiB, because the frame is not segmented yet. Then the frame's own length
    // counts.
    let end = if end <= start { frame.len() } else { end };
    let header = usize::from(*frame.get(start + 12)? >> 4) * 4;
    let payload = end.saturating_sub(start + header);
    Some((word(start)?, word(start + 2)?, payload as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_and_canaries_are_seen_and_tunnels_are_counted_separately() {
        let frame = |from: u16, to: u16, payload: &[u8]| {
            let mut frame = vec![0; 12];
            frame.extend([0x08, 0x00, 0x45, 0x00]);
            frame.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend(from.to_be_bytes());
            frame.extend(to.to_be_bytes());
            frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
            frame.extend(payload);
            frame
        };
        let mut seen = WireStats::default();
        look(&frame(40_000, HBONE, b"ciphertext"), b"canary", &mut seen);
        assert_eq!((seen.plaintext_bytes, seen.canaries), (0, 0));
        look(&frame(8080, 40_000, b"the canary sings"), b"canary", &mut seen);
        look(&frame(8080, 40_000, b""), b"canary", &mut seen);
        assert_eq!((seen.plaintext_bytes, seen.canaries, seen.frames), (16, 1, 3));
        look(b"short", b"canary", &mut seen);
    }
}
