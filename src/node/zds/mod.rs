//! Enrolment by the node's agent (istio-cni) over ZDS: a unix socket on which the agent hands over the pods' network
//! namespaces.
//!
//! Each message gets exactly one answer, in time, however long the pod's start takes; nothing is sent unasked. When the
//! connection ends, pods stay as they are, and the snapshot of the next connection says which of them to release.

pub mod message;
pub mod session;

use crate::node::pods::Pods;
use crate::node::spec::{NetnsRef, PodSpec, Settings};
use crate::sys::netns::Netns;
use crate::sys::seqpacket::{Packet, Seqpacket};
use crate::task::Signal;
use crate::task::backoff::Backoff;
use crate::task::ready::Pending;
use crate::telemetry::log::brief;
use message::{MessageError, PACKET_BYTES_MAX, Request};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use session::{Session, SessionError, Step};
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long a pod's start may take before its request is answered: the agent waits 5 s.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);
/// How long sending an answer may take.
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// Shortest wait before another connection.
const RETRY_MIN: Duration = Duration::from_millis(20);
/// Longest wait before another connection; the agent accepts at most five a second.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Why a connection to the agent ended.
#[derive(Debug, thiserror::Error)]
enum ZdsError {
    #[error("cannot connect to the agent: {0}")]
    Connect(io::Error),
    #[error("the connection to the agent failed: {0}")]
    Io(#[from] io::Error),
    #[error("the agent does not read its socket")]
    Stuck,
    #[error("the agent closed the connection")]
    Closed,
    #[error("invalid message from the agent: {0}")]
    Message(#[from] MessageError),
    #[error("the agent violated the protocol: {0}")]
    Session(#[from] SessionError),
}

/// Metrics of the connection to the agent.
#[derive(Debug, Default)]
pub struct Metrics {
    connected: Gauge,
    disconnects: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "1 while the node's agent is connected and its snapshot is complete, else 0";
        registry.register("culvert_agent_connected", help, self.connected.clone());
        let help = "Connections to the node's agent that ended or failed";
        registry.register("culvert_agent_disconnects", help, self.disconnects.clone());
    }
}

/// The client of the agent.
#[derive(Debug)]
pub struct Client {
    /// The agent's socket.
    pub path: PathBuf,
    /// The pods of this node.
    pub pods: Pods,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Held until the end of the first snapshot.
    pub ready: Option<Pending>,
    /// The last reason for having no connection that was logged.
    pub said: Option<String>,
}

impl Client {
    /// Follows the agent once `facts` completes, until told to stop. From then on the agent announces new pods to the
    /// next daemon.
    pub async fn run(mut self, facts: impl Future<Output = ()>, stop: Signal) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        // Earlier than that, the daemon could listen in a pod without serving it, and would take half of the traffic
        // from the daemon that serves it now.
        tokio::select! {
            () = facts => {}
            () = stop.gentle() => return,
        }
        loop {
            let error = tokio::select! {
                ended = self.session(&mut backoff) => match ended { Err(error) => error, Ok(()) => ZdsError::Closed },
                () = stop.gentle() => return,
            };
            self.metrics.connected.set(0);
            self.metrics.disconnects.inc();
            let (text, path, wait) = (error.to_string(), self.path.display().to_string(), backoff.next());
            if self.said.as_ref() == Some(&text) {
                tracing::debug!(path, %error, retry = %brief(wait), "no connection to the node's agent");
            } else {
                tracing::warn!(path, %error, retry = %brief(wait), "no connection to the node's agent; pods stay as they are");
                self.said = Some(text);
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.gentle() => return,
            }
        }
    }

    async fn session(&mut self, backoff: &mut Backoff) -> Result<(), ZdsError> {
        let socket = Seqpacket::connect(&self.path).map_err(ZdsError::Connect)?;
        send(&socket, &message::hello()).await?;
        let mut session = Session::default();
        loop {
            let packet = socket.receive(PACKET_BYTES_MAX).await?;
            if packet.bytes.is_empty() && packet.descriptors.is_empty() {
                return Ok(());
            }
            let (result, end) = self.take(&mut session, packet, backoff).await;
            send(&socket, &message::ack(&result)).await?;
            if let Some(error) = end {
                return Err(error);
            }
        }
    }

    /// Handles a packet. Returns the answer, and why the connection must end, if so.
    async fn take(
        &mut self,
        session: &mut Session,
        packet: Packet,
        backoff: &mut Backoff,
    ) -> (Result<(), String>, Option<ZdsError>) {
        let Packet { bytes, mut descriptors, truncated } = packet;
        let step = message::decode(&bytes, descriptors.len(), truncated)
            .map_err(ZdsError::from)
            .and_then(|request| session.take(request).map_err(ZdsError::from));
        match step {
            Ok(Step::Add(request)) => (self.add(request, descriptors.pop()).await, None),
            Ok(Step::Keep) => (Ok(()), None),
            Ok(Step::Del(uid)) => {
                self.pods.remove(&uid.as_str().into());
                (Ok(()), None)
            }
            Ok(Step::Retain(named)) => {
                let named: HashSet<_> = named.iter().map(|uid| uid.as_str().into()).collect();
                tracing::info!(pods = named.len(), "the agent's snapshot is complete");
                let missing = self.pods.retain(&named);
                self.pods.show_unknown(missing);
                self.said = None;
                self.metrics.connected.set(1);
                self.ready = None;
                backoff.reset();
                (Ok(()), None)
            }
            Err(error) => (Err(format!("failure to read message : {error}")), Some(error)),
        }
    }

    async fn add(&mut self, request: Request, descriptor: Option<OwnedFd>) -> Result<(), String> {
        let (Request::Add { uid, name, namespace, service_account }, Some(descriptor)) = (request, descriptor) else {
            return Err("not a request to add a pod".into());
        };
        let failed = |reason: String| format!("failure to start proxy : {reason}");
        let label = format!("(handed over for {namespace}/{name})");
        let netns = Netns::handed_over(descriptor, &label).map_err(|error| failed(error.to_string()))?;
        let spec = PodSpec {
            name: name.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
            uid: uid.into(),
            netns: NetnsRef::Handle(netns),
            // The agent decides which pods' DNS is redirected.
            ips: Vec::new(),
            settings: Settings::default(),
            powers: None,
        };
        let answer = self.pods.add(spec);
        match tokio::time::timeout(ANSWER_DEADLINE, answer).await {
            Ok(Ok(answer)) => answer.map_err(failed),
            // The start goes on after this answer; the agent asks again, and finds the pod.
            Ok(Err(_)) | Err(_) => {
                Err(failed("the daemon does not listen in the pod yet; it is still starting to".into()))
            }
        }
    }
}

async fn send(socket: &Seqpacket, bytes: &[u8]) -> Result<(), ZdsError> {
    match tokio::time::timeout(SEND_DEADLINE, socket.send(bytes)).await {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(ZdsError::Stuck),
    }
}
