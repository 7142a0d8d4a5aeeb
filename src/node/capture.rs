//! Capturing one pod: check that the namespace is the pod's, listen in it, redirect, verify. In this order, so that
//! nothing is ever redirected to a port where nobody listens.

use super::{CaptureError, PodSpec, redirect, verify};
use crate::connection::{Entrance, Pod, Workers};
use crate::mesh::workload::NetworkMode;
use crate::mesh::{Snapshot, SpiffeName, Workload};
use crate::sys::netns::Netns;
use crate::sys::socket::bind_capture;
use crate::task::{Drain, Group};
use crate::{identity, mesh};
use std::collections::HashMap;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Listeners of a pod, and how a connection came to them.
const LISTENERS: [(u16, Entrance); 3] =
    [(15001, Entrance::Outbound), (15006, Entrance::Plaintext), (15008, Entrance::Tunnel)];

/// What capturing needs.
#[derive(Debug)]
pub struct Capturer {
    /// Settings.
    pub config: super::Config,
    /// Facts.
    pub mesh: Arc<mesh::Store>,
    /// Certificates.
    pub identities: Arc<identity::Store>,
    /// Workers that carry the connections.
    pub workers: Arc<Workers>,
    /// The end of the process; pods' drains are below it.
    pub drain: Drain,
    /// Which namespaces belong to which pod.
    pub claims: Claims,
}

/// A captured pod.
#[derive(Debug)]
pub struct Captured {
    /// What its connections know of it.
    pub pod: Arc<Pod>,
    /// Its accept loops.
    pub accepting: Group,
    /// Whether IPv6 is redirected.
    pub ipv6: bool,
    identity: SpiffeName,
    identities: Arc<identity::Store>,
    _claim: Claim,
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.identities.forget(&self.identity);
    }
}

impl Capturer {
    /// Captures a pod, or says why not; after an error nothing of the attempt is left but, where only the verification
    /// failed, the rules: refusing traffic is better than passing it.
    pub async fn capture(&self, spec: &PodSpec) -> Result<Captured, CaptureError> {
        let snapshot = self.mesh.load();
        let workload = known(&snapshot, spec)?;
        let identity = workload.identity()?;
        let netns = Netns::open(&spec.netns)?;
        let addresses = holds(&netns, workload)?;
        not_ours(&netns)?;
        let claim = self.claims.claim(&netns, spec)?;
        let ipv6 = self.config.ipv6 && netns.has_ipv6()?;
        let listeners = self.bind(&netns, ipv6)?;

        let pod = Arc::new(Pod {
            uid: spec.uid.clone(),
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            service_account: spec.service_account.clone(),
            netns: netns.clone(),
            addresses,
            drain: self.drain.child(),
            active: Default::default(),
            probes: Default::default(),
        });
        self.identities.want(&identity);
        let captured = Captured {
            pod: pod.clone(),
            accepting: Group::default(),
            ipv6,
            identity,
            identities: self.identities.clone(),
            _claim: claim,
        };
        for (listener, entrance) in listeners {
            self.workers.serve(&pod, listener, entrance, &captured.accepting);
        }
        let redirected = async {
            redirect::install(&netns, self.config.mark, ipv6).await?;
            Ok(verify::verify(&pod, ipv6).await?)
        };
        match redirected.await {
            Ok(()) => Ok(captured),
            Err(error) => {
                pod.drain.at_once();
                captured.accepting.finished().await;
                Err(error)
            }
        }
    }

    fn bind(&self, netns: &Netns, ipv6: bool) -> Result<Vec<(TcpListener, Entrance)>, CaptureError> {
        let bind = |(port, entrance)| {
            let bound = netns.enter(|| bind_capture(port, ipv6, self.config.mark, self.config.reuse_port))?;
            Ok((bound.map_err(|source| CaptureError::Port { port, source })?, entrance))
        };
        LISTENERS.into_iter().map(bind).collect()
    }

    /// Whether the facts still say what the pod was captured by.
    pub fn still(&self, spec: &PodSpec, captured: &Captured) -> Result<(), CaptureError> {
        let snapshot = self.mesh.load();
        let workload = known(&snapshot, spec)?;
        let now = workload.identity()?;
        if now != captured.identity {
            return Err(CaptureError::IdentityChanged(captured.identity.clone(), now));
        }
        let missing = workload.ips.iter().find(|ip| !captured.pod.addresses.contains(ip));
        missing.map_or(Ok(()), |missing| Err(not_the_pod(&captured.pod.netns, *missing, &captured.pod.addresses)))
    }

    /// Removes rules that an attempt, or an earlier daemon, has left in the namespace of a pod that is wanted no more,
    /// unless the namespace is another pod's.
    pub async fn clean(&self, spec: &PodSpec) {
        let Ok(netns) = Netns::open(&spec.netns) else { return };
        let Ok(_claim) = self.claims.claim(&netns, spec) else { return };
        if not_ours(&netns).is_ok()
            && let Err(error) = redirect::remove(&netns, true).await
        {
            tracing::warn!(namespace = &*spec.namespace, name = &*spec.name, %error, "rules not removed");
        }
    }

    /// Ends the capture of a pod: new traffic is no longer redirected, then the listeners end, then the connections,
    /// within the deadline. What brings their replies back stays until then, and is for the caller to remove.
    pub async fn release(&self, captured: &Captured) {
        let pod = &captured.pod;
        let complain = |error: redirect::RedirectError| {
            tracing::warn!(namespace = &*pod.namespace, name = &*pod.name, %error, "rules not removed");
        };
        redirect::stop_capturing(&pod.netns, self.config.mark).await.unwrap_or_else(complain);
        pod.drain.gently();
        captured.accepting.finished().await;
        pod.active.close();
        if tokio::time::timeout(self.config.release_deadline, pod.active.wait()).await.is_err() {
            let cut = pod.active.len();
            tracing::warn!(
                namespace = &*pod.namespace,
                name = &*pod.name,
                cut,
                "connections cut: the pod was released"
            );
        }
        pod.drain.at_once();
        pod.active.wait().await;
    }
}

fn known<'a>(snapshot: &'a Snapshot, spec: &PodSpec) -> Result<&'a Arc<Workload>, CaptureError> {
    let found = snapshot.workload_of_pod(&spec.namespace, &spec.name);
    let workload = found.ok_or_else(|| CaptureError::NoFacts(format!("{}/{}", spec.namespace, spec.name)))?;
    if workload.service_account != spec.service_account {
        let (own, facts) = (spec.service_account.to_string(), workload.service_account.to_string());
        return Err(CaptureError::ServiceAccount { own, facts });
    }
    Ok(workload)
}

/// The addresses of the namespace, if it holds all of the workload's.
fn holds(netns: &Netns, workload: &Workload) -> Result<Vec<IpAddr>, CaptureError> {
    if workload.ips.is_empty() || workload.network_mode == NetworkMode::HostNetwork {
        return Err(CaptureError::NoOwnAddress(workload.uid.to_string()));
    }
    let held: Vec<IpAddr> = netns.addresses()?.into_iter().map(|(ip, _)| ip).collect();
    match workload.ips.iter().find(|ip| !held.contains(ip)) {
        None => Ok(held),
        Some(missing) => Err(not_the_pod(netns, *missing, &held)),
    }
}

fn not_the_pod(netns: &Netns, missing: IpAddr, held: &[IpAddr]) -> CaptureError {
    let names: Vec<String> = held.iter().map(ToString::to_string).collect();
    let held = if names.is_empty() { "none".into() } else { names.join(", ") };
    CaptureError::NotThePod { path: netns.path().to_owned(), missing, held }
}

/// The daemon's own namespace and that of the host are nobody's pod, whatever addresses they hold.
fn not_ours(netns: &Netns) -> Result<(), CaptureError> {
    let hosts = ["/proc/self/ns/net", "/proc/1/ns/net"];
    let same = |path: &str| Netns::open(Path::new(path)).is_ok_and(|host| host.id() == netns.id());
    if hosts.into_iter().any(same) { Err(CaptureError::Host(netns.path().to_owned())) } else { Ok(()) }
}

/// Which namespaces belong to which pod: one each.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    taken: Arc<Mutex<HashMap<(u64, u64), String>>>,
}

#[derive(Debug)]
struct Claim {
    claims: Claims,
    id: (u64, u64),
}

impl Claims {
    fn claim(&self, netns: &Netns, spec: &PodSpec) -> Result<Claim, CaptureError> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = taken.get(&netns.id()) {
            return Err(CaptureError::Taken(netns.path().to_owned(), other.clone()));
        }
        taken.insert(netns.id(), format!("{}/{}", spec.namespace, spec.name));
        Ok(Claim { claims: self.clone(), id: netns.id() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
