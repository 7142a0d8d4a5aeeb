//! The daemons of a cluster, found through the Kubernetes API and asked through port-forwards to their admin ports,
//! which listen on loopback only. Beside it the daemon of this machine, which is asked directly.
//!
//! Every question has a deadline and a limit for its answer. Many daemons are asked at the same time, and one that does
//! not answer is named with the reason while the others are shown.

mod candidates;
pub mod control_plane;
mod find;
mod line;
mod logs;
mod question;
mod recent;

pub use self::find::PodPlace;
use self::line::Line;
pub use self::logs::LogLines;
pub use self::question::{Answer, AskError, Cluster, ClusterError, Daemon, Place, Question};
pub use self::recent::Recent;
use crate::task::Group;
use crate::telemetry::log::with_causes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// Daemons that are asked at the same time.
const AT_ONCE: usize = 32;

/// Asks daemons. Connections to them are kept for the next question.
pub struct Daemons {
    place: Place,
    client: Option<kube::Client>,
    lines: Mutex<HashMap<Daemon, Line>>,
    /// The last list, and when it was made.
    found: Mutex<Option<(Instant, Recent)>>,
    tasks: Group,
}

impl fmt::Debug for Daemons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemons").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.tasks.cut();
    }
}

impl Daemons {
    /// Reads the credentials. Nothing is asked yet.
    pub async fn open(place: Place) -> Result<Self, ClusterError> {
        let client = match &place {
            Place::Here(_) => None,
            Place::Cluster(cluster) => Some(find::client(cluster).await?),
        };
        Ok(Self { place, client, lines: Mutex::default(), found: Mutex::default(), tasks: Group::default() })
    }

    /// Where they are.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The daemons, sorted by node. There is at least one, and one for each node that was asked for.
    pub async fn find(&self, deadline: Duration) -> Result<Vec<Daemon>, ClusterError> {
        let found = match (&self.place, &self.client) {
            (Place::Cluster(cluster), Some(client)) => {
                let found = tokio::time::timeout(deadline, find::daemons(client, cluster)).await;
                found.unwrap_or_else(|_| Err(ClusterError::Api(AskError::Late(deadline).to_string())))
            }
            _ => Ok(vec![Daemon::default()]),
        };
        self.keep(found)
    }

    /// The daemon on the node of a pod, `NAMESPACE/NAME`, and what the API says about the pod. On this machine the
    /// daemon is the only one.
    pub async fn find_of_pod(&self, pod: &str, deadline: Duration) -> Result<(Daemon, PodPlace), ClusterError> {
        let place = self.place_of_pod(pod, deadline).await?;
        let daemon = place.daemon(&self.find(deadline).await?)?;
        Ok((daemon, place))
    }

    /// What the API says about a pod, `NAMESPACE/NAME`.
    pub async fn place_of_pod(&self, pod: &str, deadline: Duration) -> Result<PodPlace, ClusterError> {
        let late = || ClusterError::Api(AskError::Late(deadline).to_string());
        match &self.client {
            None => Ok(PodPlace::here(pod)),
            Some(client) => tokio::time::timeout(deadline, find::place_of(client, pod)).await.map_err(|_| late())?,
        }
    }

    /// The replicas of culvert's control plane in a namespace. `None` on this machine, where there is no API to ask.
    pub async fn control_plane(
        &self,
        namespace: &str,
        deadline: Duration,
    ) -> Option<Result<Vec<control_plane::Replica>, ClusterError>> {
        let client = self.client.as_ref()?;
        let replicas = tokio::time::timeout(deadline, control_plane::replicas(client, namespace)).await;
        Some(replicas.unwrap_or_else(|_| Err(ClusterError::Api(AskError::Late(deadline).to_string()))))
    }

    /// The policies of which the control plane says that they are not enforced as they are written.
    pub async fn policies_not_enforced(&self, deadline: Duration) -> control_plane::Policies {
        let Some(client) = self.client.as_ref() else { return control_plane::Policies::default() };
        control_plane::not_enforced(client, deadline).await
    }

    /// Asks one daemon.
    pub async fn ask(&self, daemon: &Daemon, question: &Question) -> Result<Answer, AskError> {
        let asked = tokio::time::timeout(question.deadline, self.ask_by_line(daemon, question)).await;
        asked.unwrap_or(Err(AskError::Late(question.deadline)))
    }

    /// Asks all of them, a limited number at the same time. The answers are in the order of the daemons.
    pub async fn ask_all(&self, daemons: &[Daemon], question: &Question) -> Vec<Result<Answer, AskError>> {
        // Not by a closure, of which the compiler cannot see that callers may send the whole to another thread.
        let mut asking = Vec::with_capacity(daemons.len());
        for (at, daemon) in daemons.iter().enumerate() {
            asking.push(async move { (at, self.ask(daemon, question).await) });
        }
        let mut answers: Vec<_> = futures_util::stream::iter(asking).buffer_unordered(AT_ONCE).collect().await;
        answers.sort_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// Asks by the connection of an earlier question, where it still works, or else by a new one.
    async fn ask_by_line(&self, daemon: &Daemon, question: &Question) -> Result<Answer, AskError> {
        let kept = self.lines.lock().remove(daemon);
        if let Some(mut line) = kept
            && line.is_open().await
            && let Ok(answer) = line.ask(question).await
        {
            self.lines.lock().insert(daemon.clone(), line);
            return Ok(answer);
        }
        let mut line = self.line(daemon).await?;
        let answer = line.ask(question).await?;
        self.lines.lock().insert(daemon.clone(), line);
        Ok(answer)
    }

    async fn line(&self, daemon: &Daemon) -> Result<Line, AskError> {
        if let Some(why) = &daemon.down {
            return Err(AskError::Down(why.clone()));
        }
        match (&self.place, &self.client) {
            (Place::Cluster(cluster), Some(client)) => {
                let pods: kube::Api<k8s_openapi::api::core::v1::Pod> =
                    kube::Api::namespaced(client.clone(), &daemon.namespace);
                let forwarder = pods.portforward(&daemon.pod, &[cluster.admin_port]).await;
                let forwarder = forwarder.map_err(|error| AskError::Unreachable(refused(&error)))?;
                Line::of_forwarder(forwarder, cluster.admin_port, &self.tasks).await
            }
            (Place::Here(address), _) => Line::connect(*address, &self.tasks).await,
            (Place::Cluster(_), None) => Err(AskError::Unreachable("there is no client".to_owned())),
        }
    }
}

/// Why the API does not forward a port.
fn refused(error: &kube::Error) -> String {
    let text = with_causes(error);
    match text.contains("403") {
        true => format!("port-forward: {text}; your account needs the right to create pods/portforward"),
        false => format!("port-forward: {text}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A pod of the DaemonSet that runs on n1.
    pub(crate) fn daemon_pod(name: &str) -> Value {
        let owner =
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "ztunnel", "uid": "1", "controller": true});
        json!({"metadata": {"name": name, "namespace": "istio-system", "ownerReferences": [owner]},
            "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"}})
    }

    /// Daemons of a cluster whose API lists these pods, fails where there is no list, and knows nothing else. It gets
    /// the path of each request.
    pub(crate) fn with_api(pods: impl Fn(&str) -> Option<Vec<Value>> + Clone + Send + Sync + 'static) -> Daemons {
        let answer = move |request: axum::extract::Request| {
            let (path, pods) = (request.uri().path(), pods(request.uri().path()));
            let (status, body) = match pods {
                Some(pods) if path == "/api/v1/pods" => {
                    (200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods}))
                }
                Some(_) => (404, json!({"kind": "Status", "status": "Failure", "code": 404, "message": "not here"})),
                None => (500, json!({"kind": "Status", "status": "Failure", "code": 500, "message": "away"})),
            };
            let answer = http::Response::builder().status(status).body(body.to_string()).unwrap();
            async move { answer }
        };
        let client = kube::Client::new(axum::Router::new().fallback(answer), "default");
        let cluster =
            Cluster { kubeconfig: None, context: None, namespace: None, nodes: Vec::new(), admin_port: 15000 };
        Daemons {
            place: Place::Cluster(cluster),
            client: Some(client),
            lines: Mutex::default(),
            found: Mutex::default(),
            tasks: Group::default(),
        }
    }
}
