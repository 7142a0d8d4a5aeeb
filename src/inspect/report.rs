//! `culvert report`: everything that a bug report needs, in one archive: the pages of every daemon as they are, and what
//! went wrong while they were collected. The pages contain no keys, tokens or header values.

use super::Outcome;
use super::nodes::page_name;
use super::text::printable;
use crate::cluster::{AskError, ClusterError, Daemon, Daemons, Question};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::StreamExt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The pages of a daemon: path, and file in the archive.
const PAGES: [(&str, &str); 9] = [
    ("/status", "status.json"),
    ("/pods", "pods.json"),
    ("/connections", "connections.json"),
    ("/history?limit=5000", "history.json"),
    ("/plaintext", "plaintext.json"),
    ("/set_aside", "set_aside.json"),
    ("/kernel", "kernel.json"),
    ("/metrics", "metrics.txt"),
    // The longest one, at the end: what comes after a late one is not asked for.
    ("/config_dump", "config_dump.json"),
];

/// Nodes that are asked at the same time. Their pages are in memory until they are written.
const AT_ONCE: usize = 4;

/// The longest page, in bytes.
const PAGE_MAX: usize = 32 << 20;

/// Writes the archive to a new file, which is removed again if that fails.
pub async fn to_file(
    daemons: &Daemons,
    timeout: Duration,
    about: &[(&str, String)],
    path: &Path,
) -> Result<(String, Outcome), ReportError> {
    // Only its owner may read who talks to whom.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(ReportError::Write)?;
    let written = write(daemons, timeout, about, io::BufWriter::new(file)).await;
    if written.is_err() {
        // What is wrong with the folder is in the first error already.
        let _ = std::fs::remove_file(path);
    }
    written
}

/// Writes the archive to `out`. `about` is text about this command and machine, by file name. Returns a line about each
/// node for people.
pub async fn write(
    daemons: &Daemons,
    timeout: Duration,
    about: &[(&str, String)],
    out: impl Write,
) -> Result<(String, Outcome), ReportError> {
    let all = daemons.find(timeout).await?;
    let now = SystemTime::now();
    let mut archive = Archive::new(out, now);
    archive.add("README.txt", README.as_bytes())?;
    for (name, text) in about {
        archive.add(name, text.as_bytes())?;
    }
    let (mut lines, mut missing, mut silent) = (Vec::new(), Vec::new(), 0);
    let mut asking = futures_util::stream::iter(&all).map(|daemon| collect(daemons, daemon, timeout)).buffered(AT_ONCE);
    while let Some(Collected { daemon, pages, errors }) = asking.next().await {
        let folder = if daemon.node.is_empty() { "this-node".to_owned() } else { page_name(&daemon.node) };
        for (file, page) in pages {
            archive.add(&format!("nodes/{folder}/{file}"), &page)?;
        }
        silent += usize::from(errors.len() == PAGES.len());
        lines.push(match errors.first() {
            None => format!("{}: all pages", daemon.name()),
            Some(first) => format!("{}: {} of {} pages are missing: {first}", daemon.name(), errors.len(), PAGES.len()),
        });
        missing.extend(errors.into_iter().map(|error| format!("{}: {error}", daemon.name())));
    }
    archive.add("missing.txt", (missing.join("\n") + "\n").as_bytes())?;
    archive.finish()?;
    let outcome = match (missing.is_empty(), silent == all.len()) {
        (true, _) => Outcome::Green,
        (false, true) => Outcome::Unknown,
        (false, false) => Outcome::Red,
    };
    Ok((lines.join("\n"), outcome))
}

/// The pages of one daemon.
struct Collected<'a> {
    daemon: &'a Daemon,
    /// File in the archive, and content.
    pages: Vec<(&'static str, Bytes)>,
    /// What could not be read.
    errors: Vec<String>,
}

/// Asks one daemon for its pages. One that does not answer is not asked for the others.
async fn collect<'a>(daemons: &Daemons, daemon: &'a Daemon, timeout: Duration) -> Collected<'a> {
    let mut collected = Collected { daemon, pages: Vec::new(), errors: Vec::new() };
    let mut silent = false;
    for (path, file) in PAGES {
        if silent {
            collected.errors.push(format!("{path}: not asked for after that"));
            continue;
        }
        let question = Question { max: PAGE_MAX, ..Question::get(path, timeout) };
        match daemons.ask(daemon, &question).await {
            Ok(answer) if answer.status == 200 => collected.pages.push((file, answer.body)),
            Ok(answer) => collected.errors.push(format!("{path}: status {}", answer.status)),
            Err(error) => {
                silent = !matches!(error, AskError::TooLong(_));
                collected.errors.push(printable(&format!("{path}: {error}")));
            }
        }
    }
    collected
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The daemons cannot be found.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// It cannot be written.
    #[error("the archive cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// A tar archive that is compressed while it is written.
struct Archive<W: Write> {
    tar: tar::Builder<GzEncoder<W>>,
    folder: String,
    seconds: u64,
}

impl<W: Write> Archive<W> {
    fn new(out: W, now: SystemTime) -> Self {
        let stamp = humantime::format_rfc3339_seconds(now).to_string().replace(':', "-");
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let tar = tar::Builder::new(GzEncoder::new(out, Compression::default()));
        Self { tar, folder: format!("culvert-report-{stamp}"), seconds }
    }

    fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.seconds);
        self.tar.append_data(&mut header, format!("{}/{name}", self.folder), content)
    }

    fn finish(self) -> io::Result<()> {
        self.tar.into_inner()?.finish()?.flush()
    }
}

/// The first thing that a reader sees.
const README: &str = "\
This archive was made by `culvert report`.

It contains no private keys, no tokens and no values of headers: the daemon shows them nowhere. It does contain names and
addresses of pods, services, nodes and identities, certificates without their keys, policies, and who was connected to
whom. Read it before you give it to somebody else.

version.txt    the program that made this
doctor.txt     `culvert doctor`, or what the daemons say about themselves
nodes/NAME/    the pages of each daemon's admin port
missing.txt    what could not be read, and why
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{daemon_pod, with_api};
    use std::io::Read;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn a_node_that_cannot_be_reached_is_asked_once_and_no_file_is_left_after_an_error() {
        let forwards = Arc::new(AtomicUsize::new(0));
        let counted = forwards.clone();
        let daemons = with_api(move |path| {
            counted.fetch_add(usize::from(path.ends_with("/portforward")), Ordering::Relaxed);
            Some(vec![daemon_pod("ztunnel-1")])
        });
        let timeout = Duration::from_secs(5);
        let mut archive = Vec::new();
        let (text, outcome) = write(&daemons, timeout, &[], &mut archive).await.unwrap();
        assert!(text.starts_with("n1: 9 of 9 pages are missing: /status: port-forward"), "{text}");
        assert_eq!((outcome, forwards.load(Ordering::Relaxed)), (Outcome::Unknown, 1));
        let path = std::env::temp_dir().join(format!("culvert-report-test-{}.tar.gz", std::process::id()));
        assert!(to_file(&with_api(|_| None), timeout, &[], &path).await.is_err());
        assert!(!path.exists());
        to_file(&daemons, timeout, &[], &path).await.unwrap();
        assert!(to_file(&with_api(|_| None), timeout, &[], &path).await.is_err());
        assert!(path.exists(), "the file of an earlier report stays");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_archive_can_be_read_and_only_by_its_owner() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes, UNIX_EPOCH + Duration::from_secs(1));
        archive.add("nodes/n1/status.json", b"{}").unwrap();
        archive.add(&format!("nodes/{}/x", "long".repeat(60)), b"x").unwrap();
        archive.finish().unwrap();
        let mut read = tar::Archive::new(flate2::read::GzDecoder::new(bytes.as_slice()));
        let files: Vec<(String, u32, String)> = read
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let (path, mode) = (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap());
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                (path, mode, text)
            })
            .collect();
        let first = "culvert-report-1970-01-01T00-00-01Z/nodes/n1/status.json";
        assert_eq!(files[0], (first.to_owned(), 0o600, "{}".to_owned()));
        assert!(files[1].0.contains("longlong") && files[1].2 == "x");
    }
}
