//! The daemon's side of its CNI plugin: a pod's first process starts when its capture is in place, or not at all.
//!
//! The plugin (`culvert cni`, run by the container runtime) sends one packet to the daemon's socket, with the pod's network
//! namespace beside it, and waits for one answer. Both are the same binary; fields may be added, never changed.

pub mod install;

use crate::sys::netns::Netns;
use crate::sys::seqpacket::{Listener, Seqpacket};
use crate::task::Group;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Bytes of a packet at most.
const PACKET: usize = 64 * 1024;
/// How long a plugin may take to say what it wants.
const QUESTION: Duration = Duration::from_secs(5);
/// How long the daemon may take to answer; runtimes give a plugin minutes, but one at a time for each pod.
pub const ANSWER: Duration = Duration::from_secs(10);
/// Questions that may wait.
const QUEUE: usize = 64;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verb {
    /// A pod's namespace is ready; its processes start after the answer.
    Add,
    /// A pod's namespace goes.
    Del,
    /// Is the pod still captured, if it is to be?
    Check,
    /// Is the daemon there?
    Status,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// What is asked for.
    pub verb: Verb,
    /// Name of the pod.
    #[serde(default)]
    pub name: String,
    /// Its namespace.
    #[serde(default)]
    pub namespace: String,
    /// Its uid, where the runtime says it.
    #[serde(default)]
    pub uid: Option<String>,
    /// The addresses that earlier plugins have given it.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
}

/// The answer: nothing, or why not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Why not.
    #[serde(default)]
    pub error: Option<String>,
}

/// A question that waits for its answer.
#[derive(Debug)]
pub struct Asked {
    /// The question.
    pub question: Question,
    /// The pod's namespace.
    pub netns: Option<Netns>,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// Takes questions at `socket` for as long as the group lives.
pub fn listen(socket: &Path, tasks: &Group) -> io::Result<mpsc::Receiver<Asked>> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let listener = Listener::bind(socket)?;
    let (send, asked) = mpsc::channel(QUEUE);
    let group = tasks.clone();
    tasks.spawn(async move {
        loop {
            match listener.accept().await {
                Ok(connection) => group.spawn(serve(connection, send.clone())),
                Err(error) => {
                    tracing::warn!(%error, "a connection of the CNI plugin could not be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(asked)
}

async fn serve(connection: Seqpacket, asked: mpsc::Sender<Asked>) {
    let result = match tokio::time::timeout(QUESTION, connection.receive(PACKET)).await {
        Ok(Ok(mut packet)) => match (serde_json::from_slice::<Question>(&packet.bytes), packet.truncated) {
            (Ok(question), false) => {
                let netns = packet.descriptors.pop().and_then(|descriptor| {
                    Netns::handed_over(descriptor, &format!("(netns of {}/{})", question.namespace, question.name)).ok()
                });
                answer(question, netns, &asked).await
            }
            (Err(error), false) => Err(format!("the daemon does not understand the plugin: {error}")),
            (_, true) => Err("the plugin's question is too long".into()),
        },
        // Whoever connected has nothing to say.
        Ok(Err(_)) | Err(_) => return,
    };
    if let Ok(bytes) = serde_json::to_vec(&Answer { error: result.err() }) {
        // The plugin has been killed where this fails; the runtime asks again.
        let _ = connection.send(&bytes).await;
    }
}

async fn answer(question: Question, netns: Option<Netns>, asked: &mpsc::Sender<Asked>) -> Result<(), String> {
    if question.verb == Verb::Add && netns.is_none() {
        return Err("the plugin has sent no network namespace".into());
    }
    let (answer, answered) = oneshot::channel();
    let ask = async {
        let gone = || "the daemon is ending; try again".to_owned();
        asked.send(Asked { question, netns, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    };
    let late = || format!("no answer within {} s", ANSWER.as_secs());
    tokio::time::timeout(ANSWER, ask).await.unwrap_or_else(|_| Err(late()))
}

/// Asks the daemon, as the plugin does.
pub async fn ask(socket: &Path, question: &Question, netns: Option<&std::fs::File>) -> Result<(), String> {
    let path = socket.display();
    let away = |error: io::Error| format!("the daemon does not answer at {path}: {error}; the pod must wait for it");
    let bytes = serde_json::to_vec(question).map_err(|error| error.to_string())?;
    let work = async {
        let connection = Seqpacket::connect(socket).map_err(away)?;
        match netns {
            Some(netns) => connection.send_with(&bytes, netns).await,
            None => connection.send(&bytes).await,
        }
        .map_err(away)?;
        let packet = connection.receive(PACKET).await.map_err(away)?;
        if packet.bytes.is_empty() {
            return Err(format!("the daemon at {path} has ended; the pod must wait for the next one"));
        }
        let answer: Answer = serde_json::from_slice(&packet.bytes)
            .map_err(|error| format!("the daemon's answer is not understood: {error}"))?;
        answer.error.map_or(Ok(()), Err)
    };
    let late = || format!("the daemon at {path} did not answer in time");
    tokio::time::timeout(ANSWER + QUESTION, work).await.unwrap_or_else(|_| Err(late()))
}
