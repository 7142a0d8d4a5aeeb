//! Writes log lines to standard output from a thread of its own, many at once while many come.
//!
//! The first line after a quiet time is written at once. Further ones wait for [`PAUSE`], so that a busy log costs the
//! threads that log neither a system call nor a wake-up for each line.

use parking_lot::{Condvar, Mutex};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::fmt::MakeWriter;

/// Most lines that wait for a slow reader.
const LINES_MAX: usize = 10_000;

/// Most bytes that wait for a slow reader.
const BYTES_MAX: usize = 8 << 20;

/// Bytes of memory that are kept for the next lines.
const KEEP: usize = 64 * 1024;

/// How long lines are collected after a write.
const PAUSE: Duration = Duration::from_millis(10);

/// How long the end of the process waits for a reader of the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Takes log lines. Clones share the queue.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<Shared>);

/// Writes the lines that still wait when it is dropped.
#[derive(Debug)]
pub struct LinesGuard(Lines);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write, or the end has come.
    more: Condvar,
    /// The thread has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    lines: usize,
    dropped: usize,
    /// Whether the thread waits for a line, and not for the end of a pause.
    idle: bool,
    ending: bool,
    ended: bool,
}

impl Lines {
    /// A queue, its guard, and the work of the thread that writes its lines to `output`.
    pub fn new(output: impl Write + Send + 'static) -> (Self, LinesGuard, impl FnOnce() + Send + 'static) {
        let lines = Self::default();
        let shared = lines.0.clone();
        (lines.clone(), LinesGuard(lines), move || shared.write_to(output))
    }

    /// Number of lines dropped so far because the output was not read fast enough.
    pub fn dropped(&self) -> usize {
        self.0.queue.lock().dropped
    }
}

impl Shared {
    fn write_to(&self, mut output: impl Write) {
        let mut batch = Vec::new();
        loop {
            let mut queue = self.queue.lock();
            while queue.bytes.is_empty() && !queue.ending {
                queue.idle = true;
                self.more.wait(&mut queue);
            }
            queue.idle = false;
            if queue.bytes.is_empty() {
                queue.ended = true;
                self.ended.notify_all();
                return;
            }
            std::mem::swap(&mut batch, &mut queue.bytes);
            queue.lines = 0;
            drop(queue);
            // If nobody can read the log, there is nobody to tell.
            let _ = output.write_all(&batch).and_then(|()| output.flush());
            batch.clear();
            batch.shrink_to(KEEP);
            let mut queue = self.queue.lock();
            if !queue.ending {
                self.more.wait_for(&mut queue, PAUSE);
            }
        }
    }
}

/// One call is one line.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue.lock();
        if queue.lines >= LINES_MAX || queue.bytes.len().saturating_add(line.len()) > BYTES_MAX {
            queue.dropped = queue.dropped.saturating_add(1);
        } else {
            queue.bytes.extend_from_slice(line);
            queue.lines += 1;
            if std::mem::take(&mut queue.idle) {
                self.0.more.notify_one();
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl Drop for LinesGuard {
    fn drop(&mut self) {
        let shared = &self.0.0;
        let mut queue = shared.queue.lock();
        queue.ending = true;
        shared.more.notify_one();
        if !queue.ended {
            shared.ended.wait_for(&mut queue, LAST_LINES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Sends each write to a channel with room for none, so that a write lasts until it is received.
    struct Output(mpsc::SyncSender<String>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            self.0.send(text).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn say(lines: &Lines, text: &str) {
        let mut writer = lines.make_writer();
        writer.write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    #[test]
    fn lines_arrive_in_order_and_those_that_wait_in_one_write() {
        let (send, receive) = mpsc::sync_channel(0);
        let (lines, guard, work) = Lines::new(Output(send));
        std::thread::spawn(work);
        say(&lines, "first");
        assert_eq!(receive.recv().unwrap(), "first\n");
        for text in ["second", "third"] {
            say(&lines, text);
        }
        // The thread pauses, or has taken the second line already.
        let mut rest = receive.recv().unwrap();
        if rest == "second\n" {
            rest += &receive.recv().unwrap();
        }
        assert_eq!(rest, "second\nthird\n");
        say(&lines, "last");
        let read = std::thread::spawn(move || receive.recv());
        drop(guard);
        assert_eq!(read.join().unwrap().unwrap(), "last\n");
    }

    #[test]
    fn what_nobody_reads_is_bounded_and_counted() {
        let (send, receive) = mpsc::sync_channel(0);
        let (lines, guard, work) = Lines::new(Output(send));
        std::thread::spawn(work);
        say(&lines, "first");
        // Once it waits for its reader, the thread takes no more lines.
        while lines.0.queue.lock().lines > 0 {
            std::thread::yield_now();
        }
        for _ in 0..LINES_MAX + 3 {
            say(&lines, "x");
        }
        assert_eq!(lines.dropped(), 3);
        assert_eq!(receive.recv().unwrap(), "first\n");
        assert_eq!(receive.recv().unwrap().len(), LINES_MAX * 2);
        say(&lines, &"y".repeat(BYTES_MAX));
        assert_eq!(lines.dropped(), 4);
        drop(guard);
    }
}
