//! Runs the `nft` program inside a network namespace. A pod may have written any number of rules there, so reading them
//! is bounded in time, length and memory.

use crate::sys::limits;
use crate::sys::netns::{Netns, NetnsError};
use crate::task::thread;
use serde_json::Value;
use std::io;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// How long `nft` may take to list rules. It takes a few milliseconds unless a pod floods it.
const LIST_DEADLINE: Duration = Duration::from_secs(2);
/// Most bytes of a listing that are read: some ten thousand rules.
const LISTING_MAX: u64 = 2 << 20;
/// Most memory that `nft` may use; it counts towards the daemon's limit.
const MEMORY_MAX: u64 = 256 << 20;
/// Most bytes of standard error that are read.
const ERROR_MAX: u64 = 4096;

/// Message of `nft` for a table that does not exist (ENOENT).
const NOT_THERE: &str = "No such file or directory";

/// How long `nft` or the kernel may take to write rules.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// Why rules could not be listed or written.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// `nft` cannot be run.
    #[error("cannot run nft: {0}; install nftables")]
    NotRun(io::Error),
    /// `nft` refused the rules.
    #[error("nft refused the rules: {0}; {hint}", hint = hint(_0))]
    Failed(String),
    /// The rules in the network namespace cannot be listed.
    #[error("the pod's nftables cannot be read: {0}")]
    Unreadable(String),
    /// Writing took too long.
    #[error("writing the rules took longer than {} s", WRITE_DEADLINE.as_secs())]
    Deadline,
}

fn hint(said: &str) -> &'static str {
    if said.contains("not permitted") {
        "the daemon needs CAP_NET_ADMIN"
    } else {
        "does the kernel have nf_tables with nat, conntrack and fib?"
    }
}

/// One of our tables as the kernel lists it. It is only ever compared with another listing, to detect changes.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing(Value);

/// Applies the deadline of writing to `work`.
pub async fn within<T, E: From<NftError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    tokio::time::timeout(WRITE_DEADLINE, work).await.unwrap_or_else(|_| Err(NftError::Deadline.into()))
}

/// Runs an `nft` script in a network namespace as one transaction, with a deadline.
pub async fn apply(netns: &Netns, script: &str) -> Result<(), NftError> {
    within(write(netns, script)).await
}

/// Lists one of our tables.
pub async fn listing(netns: &Netns, family: &str, name: &str) -> Result<Listing, NftError> {
    Ok(ours(&table(netns, family, name).await?))
}

/// Runs an `nft` script in a network namespace as one transaction, without a deadline.
pub async fn write(netns: &Netns, script: &str) -> Result<(), NftError> {
    run(netns, &["-f", "-"], script).await.map(drop)
}

/// Lists all rules of a network namespace, without the elements of sets, of which there may be millions.
pub async fn ruleset(netns: &Netns) -> Result<Value, NftError> {
    list(netns, &["-t", "-j", "list", "ruleset"]).await
}

/// Lists one table as `nft` prints it; null if it does not exist.
pub async fn table(netns: &Netns, family: &str, name: &str) -> Result<Value, NftError> {
    match list(netns, &["-j", "list", "table", family, name]).await {
        Err(NftError::Failed(said)) if said.contains(NOT_THERE) => Ok(Value::Null),
        listed => listed,
    }
}

/// Extracts the rules of our table from a listing. Counters are left out: they change without a change of rules.
fn ours(all: &Value) -> Listing {
    let is_rule = |object: &&Value| ["table", "chain", "rule", "set"].iter().any(|kind| object.get(kind).is_some());
    let objects = all.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let mut table = Value::Array(objects.filter(is_rule).cloned().collect());
    without_handles(&mut table);
    Listing(table)
}

/// Removes handles, which every write assigns anew.
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
    let listed = tokio::time::timeout(LIST_DEADLINE, run(netns, arguments, "")).await;
    let too_slow = || NftError::Unreadable(format!("listing them takes longer than {} s", LIST_DEADLINE.as_secs()));
    // A pod can write rules that `nft` fails to list. A missing permission is our own fault instead.
    let printed = listed.map_err(|_| too_slow())?.map_err(|error| match error {
        NftError::Failed(said) if !said.contains(NOT_THERE) && !said.contains("not permitted") => {
            NftError::Unreadable(format!("nft fails to list them: {said}"))
        }
        error => error,
    })?;
    // On a helper thread: the listing may be long.
    let parsed =
        thread::run_blocking(move || serde_json::from_slice(&printed).map_err(|error| error.to_string())).await;
    let parsed = parsed.unwrap_or_else(|| Err("the helper thread failed".into()));
    parsed.map_err(|error| NftError::Unreadable(format!("the list is not JSON: {error}")))
}

/// Runs `nft` inside a network namespace and returns what it prints.
async fn run(netns: &Netns, arguments: &[&str], script: &str) -> Result<Vec<u8>, NftError> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // The child inherits the network namespace that the thread is in when it starts.
    let mut child = netns.enter(|| command.spawn())?.map_err(NftError::NotRun)?;
    if let Some(pid) = child.id() {
        limits::bound_memory(pid, MEMORY_MAX);
    }
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write_script = async {
        if let Some(mut stdin) = stdin {
            // If `nft` ends before it has read everything, it says why on standard error.
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
    let read_error = async {
        if let Some(stderr) = stderr {
            stderr.take(ERROR_MAX).read_to_end(&mut said).await?;
        }
        Ok::<_, io::Error>(())
    };
    // If the output is too long, this end of the pipe is closed, and `nft` ends.
    let ((), too_long, error_read) = tokio::join!(write_script, read, read_error);
    if too_long.map_err(NftError::NotRun)? {
        return Err(NftError::Unreadable(format!("the list is longer than {} MiB", LISTING_MAX >> 20)));
    }
    error_read.map_err(NftError::NotRun)?;
    if child.wait().await.map_err(NftError::NotRun)?.success() {
        return Ok(printed);
    }
    let said = String::from_utf8_lossy(&said);
    if said.contains("Memory allocation") || said.contains("out of memory") {
        return Err(NftError::Unreadable(format!("listing them takes more than {} MiB", MEMORY_MAX >> 20)));
    }
    Err(NftError::Failed(said.lines().next().unwrap_or("no reason given").trim().to_owned()))
}
