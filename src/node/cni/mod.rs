//! The daemon's side of its CNI plugin: a pod's first process starts once the pod is captured, or not at all.
//!
//! The plugin (`culvert cni`, run by the container runtime) sends one packet to the daemon's socket, with the pod's
//! network namespace as a descriptor, and waits for one answer. Both sides may be of different versions: fields may be
//! added, but never changed.

pub mod install;

use crate::node::active_daemon::ActiveRole;
use crate::sys::netns::Netns;
use crate::sys::seqpacket::{Listener, Seqpacket};
use crate::task::Group;
use crate::task::backoff::Backoff;
use crate::task::files::{remove_leftovers, temporary_name, was_there};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

/// Most bytes of a packet.
const PACKET_BYTES_MAX: usize = 64 * 1024;
/// How long a plugin may take to send its request.
const QUESTION_WITHIN: Duration = Duration::from_secs(5);
/// How long the daemon may take to answer. Runtimes give a plugin minutes, but run one at a time for each pod.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Time between updates of the file that says when the daemon was last running.
const SEEN_EVERY: Duration = Duration::from_secs(5);
/// First and longest wait after the socket could not be bound.
const BIND_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Requests that may wait.
const QUEUE: usize = 64;

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verb {
    /// A pod's network namespace is ready; the pod's processes start after the answer.
    Add,
    /// A pod's network namespace is being removed.
    Del,
    /// Is the pod still captured, if it is enrolled?
    Check,
    /// Is the daemon running?
    Status,
}

/// A request of the plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginRequest {
    /// What it asks.
    pub verb: Verb,
    /// Name of the pod.
    #[serde(default)]
    pub name: String,
    /// Namespace of the pod.
    #[serde(default)]
    pub namespace: String,
    /// Uid of the pod, if the runtime gives it.
    #[serde(default)]
    pub uid: Option<String>,
    /// Addresses that earlier plugins have assigned to the pod.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
}

/// The answer to a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Why not; `None` means yes.
    #[serde(default)]
    pub error: Option<String>,
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct PendingRequest {
    /// The request.
    pub request: PluginRequest,
    /// The pod's network namespace.
    pub netns: Option<Netns>,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// Accepts requests at `socket` while this daemon is active, for as long as the group lives. Requests that were
/// accepted before the daemon goes on standby are answered too.
pub fn listen(socket: &Path, role: &ActiveRole, tasks: &Group) -> io::Result<mpsc::Receiver<PendingRequest>> {
    let mut role_changes = role.subscribe();
    let mut listener = match *role_changes.borrow_and_update() {
        true => Some(bind(socket)?),
        false => None,
    };
    let mut ticks = tokio::time::interval(SEEN_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (send, asked) = mpsc::channel(QUEUE);
    let (group, socket) = (tasks.clone(), socket.to_owned());
    tasks.spawn(async move {
        loop {
            let accepted = async {
                match &listener {
                    Some((listener, _)) => listener.accept().await,
                    None => std::future::pending().await,
                }
            };
            let ours = *role_changes.borrow();
            tokio::select! {
                accepted = accepted => match accepted {
                    Ok(connection) => group.spawn(serve(connection, send.clone())),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection of the CNI plugin");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                changed = role_changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let ours = *role_changes.borrow_and_update();
                    if ours {
                        // Another daemon was active in between, and has bound the path.
                        listener = bind_again(&socket).await;
                    }
                }
                _ = ticks.tick(), if ours => {
                    // An ending daemon, or `culvert cleanup`, may have removed the socket.
                    if id(&socket) != listener.as_ref().and_then(|(_, bound)| *bound) {
                        tracing::warn!(socket = %socket.display(), "the CNI plugin's socket was removed or replaced; binding it again");
                        listener = bind_again(&socket).await;
                    }
                    write_last_seen(&socket);
                }
            }
        }
    });
    Ok(asked)
}

/// A listener, and device and inode of its socket when it was bound.
type Bound = (Listener, Option<(u64, u64)>);

fn bind(socket: &Path) -> io::Result<Bound> {
    let (folder, name) = (socket.parent(), socket.file_name().and_then(|name| name.to_str()));
    let (Some(folder), Some(name)) = (folder, name) else { return Err(io::ErrorKind::InvalidInput.into()) };
    std::fs::create_dir_all(folder)?;
    remove_leftovers(folder, name);
    let listener = Listener::bind(socket, &folder.join(temporary_name(name)))?;
    write_last_seen(socket);
    Ok((listener, id(socket)))
}

/// Device and inode of a file.
fn id(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

async fn bind_again(socket: &Path) -> Option<Bound> {
    let mut backoff = Backoff::new(BIND_AGAIN.0, BIND_AGAIN.1);
    loop {
        match bind(socket) {
            Ok(listener) => return Some(listener),
            Err(error) => {
                tracing::error!(socket = %socket.display(), %error, "cannot listen for the CNI plugin; trying again")
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

/// The file beside the daemon's socket whose modification time says when a daemon was last running.
fn last_seen_file(socket: &Path) -> PathBuf {
    let mut name = socket.file_name().unwrap_or_default().to_owned();
    name.push(".seen");
    socket.with_file_name(name)
}

/// Records that the daemon is running.
fn write_last_seen(socket: &Path) {
    // The file only helps to explain why a pod does not start.
    let _ = std::fs::write(
        last_seen_file(socket),
        "The modification time of this file is when culvert was last running.\n",
    );
}

/// Removes the socket and the file beside it, if they exist. Returns whether either did.
pub fn remove_socket(socket: &Path) -> io::Result<bool> {
    let mut removed = false;
    for path in [socket, &last_seen_file(socket)] {
        removed |= was_there(std::fs::remove_file(path))?;
    }
    Ok(removed)
}

/// When a daemon was last running, and how long ago that is; `None` if that is not known.
pub fn last_seen(socket: &Path) -> Option<(SystemTime, Duration)> {
    let at = std::fs::metadata(last_seen_file(socket)).and_then(|metadata| metadata.modified()).ok()?;
    Some((at, at.elapsed().unwrap_or_default()))
}

async fn serve(connection: Seqpacket, asked: mpsc::Sender<PendingRequest>) {
    let result = match tokio::time::timeout(QUESTION_WITHIN, connection.receive(PACKET_BYTES_MAX)).await {
        Ok(Ok(mut packet)) => match (serde_json::from_slice::<PluginRequest>(&packet.bytes), packet.truncated) {
            (Ok(request), false) => {
                let netns = packet.descriptors.pop().and_then(|descriptor| {
                    Netns::handed_over(descriptor, &format!("(netns of {}/{})", request.namespace, request.name)).ok()
                });
                answer(request, netns, &asked).await
            }
            (Err(error), false) => Err(format!("invalid request from the CNI plugin: {error}")),
            (_, true) => Err("the request of the CNI plugin is too long".into()),
        },
        // The client has sent nothing.
        Ok(Err(_)) | Err(_) => return,
    };
    if let Ok(bytes) = serde_json::to_vec(&Answer { error: result.err() }) {
        // If this fails, the plugin has been killed; the runtime asks again.
        let _ = connection.send(&bytes).await;
    }
}

async fn answer(
    request: PluginRequest,
    netns: Option<Netns>,
    asked: &mpsc::Sender<PendingRequest>,
) -> Result<(), String> {
    if request.verb == Verb::Add && netns.is_none() {
        return Err("the plugin has sent no network namespace".into());
    }
    let (answer, answered) = oneshot::channel();
    let ask = async {
        let gone = || "the daemon is ending; try again".to_owned();
        asked.send(PendingRequest { request, netns, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    };
    let late = || format!("no answer within {} s", ANSWER_WITHIN.as_secs());
    tokio::time::timeout(ANSWER_WITHIN, ask).await.unwrap_or_else(|_| Err(late()))
}

/// Why a request was not answered with yes.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The daemon is not running, or does not answer.
    #[error("{0}")]
    Away(String),
    /// The daemon says no, or not yet.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon, as the plugin does.
pub async fn ask(socket: &Path, request: &PluginRequest, netns: Option<&std::fs::File>) -> Result<(), AskError> {
    let path = socket.display();
    let away = |error: io::Error| AskError::Away(format!("does not answer at {path}: {error}"));
    let bytes = serde_json::to_vec(request).map_err(|error| AskError::Refused(error.to_string()))?;
    let work = async {
        let connection = Seqpacket::connect(socket).map_err(away)?;
        match netns {
            Some(netns) => connection.send_with(&bytes, netns).await,
            None => connection.send(&bytes).await,
        }
        .map_err(away)?;
        let packet = connection.receive(PACKET_BYTES_MAX).await.map_err(away)?;
        if packet.bytes.is_empty() {
            return Err(AskError::Away(format!("ended before it answered at {path}")));
        }
        let answer: Answer = serde_json::from_slice(&packet.bytes)
            .map_err(|error| AskError::Refused(format!("invalid answer from the daemon: {error}")))?;
        answer.error.map_or(Ok(()), |why| Err(AskError::Refused(why)))
    };
    let late = || {
        AskError::Away(format!("does not answer at {path} within {} s", (ANSWER_WITHIN + QUESTION_WITHIN).as_secs()))
    };
    tokio::time::timeout(ANSWER_WITHIN + QUESTION_WITHIN, work).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_removed_socket_is_bound_again() {
        let folder = std::env::temp_dir().join(format!("culvert-cni-socket-{}", std::process::id()));
        let socket = folder.join("cni.sock");
        let tasks = Group::default();
        let role = ActiveRole::sole();
        let _asked = listen(&socket, &role, &tasks).unwrap();
        remove_socket(&socket).unwrap();
        tokio::time::sleep(SEEN_EVERY * 2).await;
        assert!(Seqpacket::connect(&socket).is_ok(), "nothing listens on the socket");
        let before = id(&socket);
        tokio::time::sleep(SEEN_EVERY * 3).await;
        assert_eq!(id(&socket), before, "an intact socket stays");
        tasks.cut();
        tasks.finished().await;
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
