//! Running the `nft` program inside a namespace. What is there a pod may have written, as much as it likes: reading it has
//! bounds in time, length and memory.

use crate::sys::limits;
use crate::sys::netns::{Netns, NetnsError};
use crate::task::thread;
use serde_json::Value;
use std::io;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// How long `nft` may take to list something. It takes a few milliseconds where nobody means ill.
const READING: Duration = Duration::from_secs(2);
/// Bytes of a listing that are read: some ten thousand rules.
const LISTING_MAX: u64 = 2 << 20;
/// Memory that `nft` may use; it is charged to us.
const MEMORY_MAX: u64 = 256 << 20;
/// Bytes of what `nft` says on standard error that are read.
const ERROR_MAX: u64 = 4096;

/// What `nft` says of a table that is not there (ENOENT).
const NOT_THERE: &str = "No such file or directory";

/// How long `nft` or the kernel may take to write rules.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why rules could not be listed or written.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// `nft` cannot be run.
    #[error("cannot run nft: {0}; install nftables")]
    NotRun(io::Error),
    /// `nft` refused the rules.
    #[error("nft refused the rules: {0}; {hint}", hint = hint(_0))]
    Failed(String),
    /// The rules in the namespace cannot be listed.
    #[error("the pod's nftables cannot be read: {0}")]
    Unreadable(String),
    /// Too slow.
    #[error("writing the rules took longer than {} s", DEADLINE.as_secs())]
    Deadline,
}

fn hint(said: &str) -> &'static str {
    if said.contains("not permitted") {
        "the daemon needs CAP_NET_ADMIN"
    } else {
        "does the kernel have nf_tables with nat, conntrack and fib?"
    }
}

/// Our rules as the kernel lists them, to see whether they are still the same. Only ever compared with another listing.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing(Value);

/// Bounds the time of a piece of work that writes rules.
pub async fn within<T, E: From<NftError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| Err(NftError::Deadline.into()))
}

/// Runs an `nft` script in a namespace as one transaction, with a deadline.
pub async fn apply(netns: &Netns, script: &str) -> Result<(), NftError> {
    within(write(netns, script)).await
}

/// One of our tables as the namespace has it now.
pub async fn listing(netns: &Netns, family: &str, name: &str) -> Result<Listing, NftError> {
    Ok(ours(&table(netns, family, name).await?))
}

/// Runs a script in a namespace, as one transaction.
pub async fn write(netns: &Netns, script: &str) -> Result<(), NftError> {
    run(netns, &["-f", "-"], script).await.map(drop)
}

/// Everything in a namespace but the elements of sets, of which there may be millions.
pub async fn ruleset(netns: &Netns) -> Result<Value, NftError> {
    list(netns, &["-t", "-j", "list", "ruleset"]).await
}

/// One table as `nft` prints it; null where there is none.
pub async fn table(netns: &Netns, family: &str, name: &str) -> Result<Value, NftError> {
    match list(netns, &["-j", "list", "table", family, name]).await {
        Err(NftError::Failed(said)) if said.contains(NOT_THERE) => Ok(Value::Null),
        listed => listed,
    }
}

/// Our table among what is listed. Counters say nothing of the rules.
fn ours(all: &Value) -> Listing {
    let is_rule = |object: &&Value| ["table", "chain", "rule", "set"].iter().any(|kind| object.get(kind).is_some());
    let objects = all.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let mut table = Value::Array(objects.filter(is_rule).cloned().collect());
    without_handles(&mut table);
    Listing(table)
}

/// Handles are given anew with each writing, and say nothing.
fn without_handles(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("handle");
            map.values_mut().for_each(without_handles);
        }
        Value::Array(all) => all.iter_mut().for_each(without_handles),
        _ => {}
    }
}

async fn list(netns: &Netns, arguments: &[&str]) -> Result<Value, NftError> {
    let listed = tokio::time::timeout(READING, run(netns, arguments, "")).await;
    let slow = || NftError::Unreadable(format!("listing them takes longer than {} s", READING.as_secs()));
    // What a pod has written may be too odd for the program that lists it; that it is not allowed to is our own lack.
    let printed = listed.map_err(|_| slow())?.map_err(|error| match error {
        NftError::Failed(said) if !said.contains(NOT_THERE) && !said.contains("not permitted") => {
            NftError::Unreadable(format!("nft fails to list them: {said}"))
        }
        error => error,
    })?;
    // Beside the others: it may be long.
    let parsed =
        thread::run_blocking(move || serde_json::from_slice(&printed).map_err(|error| error.to_string())).await;
    let parsed = parsed.unwrap_or_else(|| Err("it could not be read".into()));
    parsed.map_err(|error| NftError::Unreadable(format!("their list is not JSON: {error}")))
}

/// Runs `nft` inside a namespace and gives what it prints.
async fn run(netns: &Netns, arguments: &[&str], script: &str) -> Result<Vec<u8>, NftError> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // The child inherits the namespace that the thread is in when it is started.
    let mut child = netns.enter(|| command.spawn())?.map_err(NftError::NotRun)?;
    if let Some(pid) = child.id() {
        limits::bound_memory(pid, MEMORY_MAX);
    }
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let give = async {
        if let Some(mut stdin) = stdin {
            // If nft ends before it has read all, it says why on standard error.
            let _ = stdin.write_all(script.as_bytes()).await;
        }
    };
    let (mut printed, mut said) = (Vec::new(), Vec::new());
    let read = async {
        if let Some(stdout) = stdout {
            stdout.take(LISTING_MAX + 1).read_to_end(&mut printed).await?;
        }
        Ok::<_, io::Error>(printed.len() as u64 > LISTING_MAX)
    };
    let hear = async {
        if let Some(stderr) = stderr {
            stderr.take(ERROR_MAX).read_to_end(&mut said).await?;
        }
        Ok::<_, io::Error>(())
    };
    // The end of its output is closed on it where that is too long, and it ends.
    let ((), too_long, heard) = tokio::join!(give, read, hear);
    if too_long.map_err(NftError::NotRun)? {
        return Err(NftError::Unreadable(format!("their list is longer than {} MiB", LISTING_MAX >> 20)));
    }
    heard.map_err(NftError::NotRun)?;
    if child.wait().await.map_err(NftError::NotRun)?.success() {
        return Ok(printed);
    }
    let said = String::from_utf8_lossy(&said);
    if said.contains("Memory allocation") || said.contains("out of memory") {
        return Err(NftError::Unreadable(format!("listing them takes more than {} MiB", MEMORY_MAX >> 20)));
    }
    Err(NftError::Failed(said.lines().next().unwrap_or("no reason given").trim().to_owned()))
}
