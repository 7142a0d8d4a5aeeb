//! Captures one pod, step by step: listen in its network namespace; identify the pod by the mesh facts and the
//! addresses in the namespace; redirect its traffic (unless an agent does); check the result. Traffic is never
//! redirected to a port without a listener, and no connection is carried before the pod is identified.

use super::active_daemon::ActiveRole;
use super::config::{Config, PodSource};
use super::error::CaptureError;
use super::preexisting::{Preexisting, Uncaptured};
use super::spec::PodSpec;
use super::{capture_check, legs, listeners, nft, own_rules, redirect};
use crate::connection::dial::direct::SocketConfig;
use crate::connection::{Pod, Workers};
use crate::dns::{self, Dns, KnownClient};
use crate::mesh::address::is_link_local;
use crate::mesh::workload::{NetworkMode, pod_uid};
use crate::mesh::{SpiffeName, Workload};
use crate::sys::netns::Netns;
use crate::task::{Drain, Group, thread};
use crate::{identity, mesh, ports};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;
use tokio::time::Instant;

/// Addresses of a pod's interfaces that are kept beside those of its workload.
const ADDRESSES_MAX: usize = 1024;

/// Everything that capturing a pod needs.
#[derive(Debug)]
pub struct Capturer {
    /// Settings.
    pub config: Config,
    /// Settings of the pods' sockets.
    pub sockets: SocketConfig,
    /// Mesh facts.
    pub mesh: Arc<mesh::Store>,
    /// Certificates.
    pub identities: Arc<identity::CertificateStore>,
    /// DNS of pods.
    pub dns: Arc<Dns>,
    /// Workers that carry the connections.
    pub workers: Arc<Workers>,
    /// Ends with the process; the pods' drains are children of it.
    pub drain: Drain,
    /// Which network namespace belongs to which pod.
    pub claims: Claims,
    /// Whether this daemon is active.
    pub role: ActiveRole,
    /// Tag of this node in tables and file names; see [`Config::node_tag`].
    pub node_tag: String,
}

/// A pod in whose network namespace the daemon listens.
#[derive(Debug)]
pub struct Listening {
    /// The pod as its connections see it.
    pub pod: Arc<Pod>,
    /// Its accept loops.
    pub accepting: Group,
    /// Whether IPv6 is used in the namespace.
    pub ipv6: bool,
    /// The pod's DNS server, if its DNS is captured.
    pub dns: OnceLock<dns::Serving>,
    claim: Option<Claim>,
}

impl Listening {
    /// Makes room for the pod's next task to listen in the namespace while open connections end. The accept loops have
    /// ended before.
    pub async fn make_room(&mut self) {
        if let Some(dns) = self.dns.take() {
            dns.end().await;
        }
        self.claim = None;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Accept loops end only by their pod's drain.
        self.pod.drain.at_once();
    }
}

/// Keeps a certificate requested for as long as it lives.
#[derive(Debug)]
pub struct Certificate {
    identity: SpiffeName,
    identities: Arc<identity::CertificateStore>,
}

impl Certificate {
    fn want(identity: SpiffeName, identities: &Arc<identity::CertificateStore>) -> Self {
        identities.want(&identity);
        Self { identity, identities: identities.clone() }
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        self.identities.forget(&self.identity);
    }
}

/// An identified pod. Holds its certificate for as long as the identification stands.
#[derive(Debug)]
pub struct Approved {
    certificate: Certificate,
    pod: Arc<Pod>,
}

impl Drop for Approved {
    fn drop(&mut self) {
        self.pod.identity.send_replace(None);
    }
}

impl Capturer {
    /// Listens in a pod's network namespace. Connections wait until the pod is approved.
    pub fn listen(&self, spec: &PodSpec) -> Result<Listening, CaptureError> {
        let netns = spec.netns.open()?;
        self.refuse_host(&netns)?;
        // Only now: later the rules are ours, whatever a process in the pod writes into them. With an agent, they are the
        // agent's matter.
        if self.config.redirect && !matches!(self.config.source, PodSource::Own(_)) {
            own_rules::refuse(&netns)?;
        }
        let held: Vec<IpAddr> = netns.addresses()?.into_iter().map(|(ip, _)| ip).collect();
        if let Some(missing) = spec.ips.first().filter(|_| !spec.ips.iter().any(|ip| held.contains(ip))) {
            return Err(not_the_pod(&netns, *missing, &held));
        }
        let claim = self.claims.claim(&netns, spec)?;
        let ipv6 = self.config.ipv6 && netns.has_ipv6()?;
        let listeners = listeners::bind(&self.config, &netns, ipv6, &self.sockets.legs)?;
        let resolver = self.dns.resolver(&spec.namespace, &netns);
        let pod = Arc::new(Pod {
            uid: spec.uid.clone(),
            capture: Pod::next_capture(),
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            mesh_uid: pod_uid(&self.config.cluster_id, &spec.namespace, &spec.name),
            netns,
            sockets: self.sockets,
            resolver,
            dns: Default::default(),
            legs: Default::default(),
            identity: watch::Sender::default(),
            addresses: ArcSwap::from_pointee(held),
            drain: self.drain.child(),
            active: Default::default(),
            usage: Default::default(),
            capture_checks: Default::default(),
        });
        let accepting = Group::default();
        for (listener, entrance) in listeners {
            self.workers.serve(&pod, listener, entrance, &accepting);
        }
        let listening = Listening { pod, accepting, ipv6, dns: OnceLock::new(), claim: Some(claim) };
        self.serve_dns(spec, &listening);
        Ok(listening)
    }

    /// Serves the pod's DNS if that is wanted and not done yet. Returns whether it has begun now. A pod whose DNS
    /// cannot be served keeps its own resolvers, unless an agent redirects its DNS; the rest of its traffic is captured
    /// all the same.
    pub fn serve_dns(&self, spec: &PodSpec, listening: &Listening) -> bool {
        if !self.wants_dns(spec) || listening.dns.get().is_some() {
            return false;
        }
        let pod = &listening.pod;
        let bound = dns::Listeners::bind(&pod.netns, listening.ipv6, self.config.mark, self.config.reuse_port);
        let bound = bound
            .map_err(CaptureError::from)
            .and_then(|bound| bound.map_err(|source| CaptureError::Port { port: ports::DNS, source }));
        match bound {
            Ok(listeners) => {
                pod.dns.store(true, Ordering::Relaxed);
                let asker = Box::new(PodAsker { pod: pod.clone(), mesh: self.mesh.clone() });
                let label = format!("{}/{}", spec.namespace, spec.name);
                let serving = self.dns.serve(&spec.uid, label, pod.resolver.clone(), asker, listeners);
                listening.dns.set(serving).is_ok()
            }
            Err(error) => {
                let (namespace, name) = (&*spec.namespace, &*spec.name);
                tracing::error!(namespace, name, %error, "cannot serve the pod's DNS; trying again");
                false
            }
        }
    }

    /// Identifies a pod: finds its workload, and requires that the namespace holds all of the workload's addresses.
    /// From then on the pod's certificate is requested.
    pub fn approve(&self, spec: &PodSpec, listening: &Listening) -> Result<Approved, CaptureError> {
        // A missing policy means that there is none only once all policies have been announced.
        if let Some(missing) = self.mesh.load().synced.missing() {
            return Err(CaptureError::FactsIncomplete(missing));
        }
        let workload = self.workload(spec)?;
        let identity = workload.identity()?;
        let held = all_addresses(&listening.pod.netns, &workload)?;
        listening.pod.addresses.store(Arc::new(held));
        let certificate = Certificate::want(identity.clone(), &self.identities);
        let approved = Approved { certificate, pod: listening.pod.clone() };
        listening.pod.identity.send_replace(Some(identity));
        Ok(approved)
    }

    /// Requests the certificate of a pod that the mesh does not know yet, by what its enrolment says, so that it is
    /// there when the facts arrive. It carries no traffic: only the facts identify a pod.
    pub fn prefetch_certificate(&self, spec: &PodSpec) -> Option<Certificate> {
        let identity = SpiffeName::new(&self.config.trust_domain, &spec.namespace, &spec.service_account).ok()?;
        (!spec.ips.is_empty()).then(|| Certificate::want(identity, &self.identities))
    }

    /// Checks that the facts still agree with the pod's approval.
    pub fn recheck(&self, spec: &PodSpec, approved: &Approved) -> Result<(), CaptureError> {
        let workload = self.workload(spec)?;
        let identity = &approved.certificate.identity;
        if !workload.has_identity(identity) {
            return Err(CaptureError::IdentityChanged(identity.clone(), workload.identity()?));
        }
        let pod = &approved.pod;
        let known = pod.addresses.load();
        if workload.ips.iter().any(|ip| !known.contains(ip)) {
            // An address may have been added to the pod since.
            pod.addresses.store(Arc::new(all_addresses(&pod.netns, &workload)?));
        }
        Ok(())
    }

    fn workload(&self, spec: &PodSpec) -> Result<Arc<Workload>, CaptureError> {
        let snapshot = self.mesh.load();
        let found = snapshot.workload_of_pod(&spec.namespace, &spec.name);
        let workload = found.ok_or_else(|| {
            let (mut name, own) = (format!("{}/{}", spec.namespace, spec.name), &self.config.cluster_id);
            let elsewhere = snapshot.clusters_of_pod(&spec.namespace, &spec.name);
            let abroad = |cluster: &&&mesh::Text| !own.is_empty() && !cluster.is_empty() && ****cluster != **own;
            if let Some(other) = elsewhere.iter().find(abroad) {
                name += &format!(" in cluster {own} (CLUSTER_ID), only one in cluster {other},");
            } else if !elsewhere.is_empty() {
                name += &format!(" on node {} (NODE_NAME), only one with another node or none,", self.config.node_name);
            }
            CaptureError::NoFacts(name)
        })?;
        if workload.service_account != spec.service_account {
            let (own, facts) = (spec.service_account.to_string(), workload.service_account.to_string());
            return Err(CaptureError::ServiceAccount { own, facts });
        }
        Ok(workload.clone())
    }

    fn wants_dns(&self, spec: &PodSpec) -> bool {
        spec.settings.dns.unwrap_or(self.dns.captures())
    }

    /// Writes the redirection. Returns what istio-cni had left and was removed, and which other rules there are.
    pub async fn redirect(
        &self,
        spec: &PodSpec,
        listening: &Listening,
        spared: Vec<(SocketAddr, SocketAddr)>,
        taken_over: bool,
        recreate_chains: bool,
    ) -> Result<redirect::Installed, CaptureError> {
        let rules = redirect::Redirection { spared, recreate_chains, ..self.rules(spec, listening) };
        let _guard = self.role.write_guard().ok_or(redirect::RedirectError::OnStandby)?;
        Ok(redirect::install(&listening.pod.netns, &rules, taken_over).await?)
    }

    /// Whether the node's own connections to pods get the source address of kubelet probes.
    pub fn marks_kubelet_probes(&self) -> bool {
        matches!(self.config.source, PodSource::Kubernetes(_))
    }

    fn rules(&self, spec: &PodSpec, listening: &Listening) -> redirect::Redirection {
        redirect::Redirection {
            node_tag: self.node_tag.clone(),
            own: redirect::OwnPackets::Mark(self.config.mark),
            ipv6: listening.ipv6,
            dns: self.wants_dns(spec) && listening.dns.get().is_some(),
            bypass_inbound: spec.settings.bypass_inbound,
            plaintext_ports: Vec::new(),
            virtual_interfaces: spec.settings.virtual_interfaces.clone(),
            probes: self.marks_kubelet_probes(),
            addresses: listening.pod.addresses.load().iter().copied().filter(|ip| !is_link_local(*ip)).collect(),
            recreate_chains: false,
            spared: Vec::new(),
        }
    }

    /// Reads the namespace's addresses again, up to a limit. If that fails, the known ones stay.
    pub async fn refresh_addresses(&self, listening: &Listening) {
        let netns = listening.pod.netns.clone();
        // On a helper thread: a pod may give itself any number of addresses.
        if let Some(Ok(held)) = thread::run_blocking(move || netns.addresses()).await {
            let own = listening.pod.facts_now(&self.mesh).map(|(_, workload)| workload.ips.clone()).unwrap_or_default();
            let mut held: Vec<IpAddr> = held.into_iter().map(|(ip, _)| ip).collect();
            held.sort_by_key(|ip| !own.contains(ip));
            held.truncate(ADDRESSES_MAX);
            listening.pod.addresses.store(Arc::new(held));
        }
    }

    /// Checks that the pod's outbound and inbound connections arrive at the daemon. Returns why the inbound direction
    /// could not be verified, if so.
    pub async fn check(&self, spec: &PodSpec, listening: &Listening) -> Result<Option<String>, CaptureError> {
        let pod = &listening.pod;
        let outbound = capture_check::check_outbound(pod, listening.ipv6).await;
        if let PodSource::Own(own) = &self.config.source {
            return Ok(capture_check::of_own(own.user, outbound)?);
        }
        outbound?;
        let known = pod.facts_now(&self.mesh).map(|(_, workload)| workload.ips.clone());
        let mut ips = known.unwrap_or_else(|| spec.ips.clone());
        ips.retain(|ip| ip.is_ipv4() || listening.ipv6);
        Ok(capture_check::check_inbound(pod, &ips, !spec.settings.bypass_inbound, &self.vantage_points()).await?)
    }

    /// Namespaces from which the pod can be called as its clients call it: the node's and the daemon's own.
    fn vantage_points(&self) -> Vec<capture_check::VantagePoint> {
        let own = Netns::open(Path::new("/proc/self/ns/net")).ok();
        let host = Netns::open(&self.config.host_netns).ok();
        let is_host = own.is_some() && own == host;
        let side = |name, netns, is_sure| capture_check::VantagePoint { name, netns, is_sure };
        let from_host = host.map(|netns| side("the node", netns, self.marks_kubelet_probes()));
        let from_own = own.filter(|_| !is_host).map(|netns| side("the daemon", netns, self.config.redirect));
        match self.config.source {
            PodSource::Kubernetes(_) => from_host.into_iter().chain(from_own).collect(),
            // The agent gives the node's own connections the address of kubelet probes.
            PodSource::Agent(_) => from_own.into_iter().collect(),
            PodSource::File(_) => from_own.into_iter().chain(from_host).collect(),
            PodSource::Own(_) => Vec::new(),
        }
    }

    /// Removes the rules that a failed attempt or an earlier daemon has left in a pod that is not enrolled any more,
    /// unless another pod has the namespace, or the pod has written them itself.
    pub async fn remove_rules(&self, spec: &PodSpec) {
        self.clean_up(spec, true).await;
    }

    /// Like [`Self::remove_rules`], but keeps what open connections need.
    pub async fn stop_redirecting(&self, spec: &PodSpec) {
        self.clean_up(spec, false).await;
    }

    async fn clean_up(&self, spec: &PodSpec, all: bool) {
        let Some(_guard) = self.role.write_guard().filter(|_| self.config.redirect) else { return };
        let Ok(netns) = spec.netns.open() else { return };
        let Ok(_claim) = self.claims.claim(&netns, spec) else { return };
        // Without its rules, the traffic of a workload that carries itself would pass in plaintext.
        if self.refuse_host(&netns).is_err() || !matches!(own_rules::are_in(&netns), Ok(false)) {
            return;
        }
        // Without our tables, equal routes belong to another program.
        let there = async |table| !matches!(nft::table(&netns, "inet", table).await, Ok(listed) if listed.is_null());
        let is_there = there(redirect::TABLE).await || (all && there(legs::TABLE).await);
        if !is_there {
            return;
        }
        let removed = match all {
            true => redirect::remove(&netns, true).await,
            false => redirect::stop_redirecting(&netns).await,
        };
        if let Err(error) = removed {
            tracing::warn!(namespace = &*spec.namespace, name = &*spec.name, %error, "cannot remove the pod's rules");
        }
    }

    /// Refuses the network namespaces of the daemon and of the host, whatever addresses they hold.
    fn refuse_host(&self, netns: &Netns) -> Result<(), CaptureError> {
        if let PodSource::Own(_) = self.config.source {
            return Ok(());
        }
        let hosts = [Path::new("/proc/self/ns/net"), Path::new("/proc/1/ns/net"), &self.config.host_netns];
        let same = |path: &Path| Netns::open(path).is_ok_and(|host| host.id() == netns.id());
        if hosts.into_iter().any(same) { Err(CaptureError::HostNetns(netns.path().to_owned())) } else { Ok(()) }
    }

    /// Begins to end the capture of a pod: stops redirecting new traffic, then ends the listeners. The rules that bring
    /// back the replies of open connections stay; the caller removes them. Returns which connections are not captured
    /// from now on.
    pub async fn stop_capturing(&self, spec: &PodSpec, listening: &Listening) -> Uncaptured {
        let pod = &listening.pod;
        let mut older = Preexisting::default();
        if self.config.redirect
            && let Ok(table) = nft::table(&pod.netns, "inet", redirect::TABLE).await
        {
            older = Preexisting::spared_by(pod, &table);
        }
        // Listed before the rules go, so that a connection opened in plaintext is never taken for a captured one.
        let uncaptured = older.at_release(pod);
        if let Some(_guard) = self.role.write_guard().filter(|_| self.config.redirect) {
            let complain = |error: redirect::RedirectError| {
                tracing::warn!(namespace = &*pod.namespace, name = &*pod.name, %error, "cannot remove the pod's rules");
            };
            redirect::stop_capturing(&pod.netns, &self.rules(spec, listening)).await.unwrap_or_else(complain);
        }
        pod.drain.gently();
        listening.accepting.finished().await;
        uncaptured
    }

    /// Waits until `deadline` for the last connections of a released pod, then cuts them.
    pub async fn end_by(&self, deadline: Instant, listening: &Listening) {
        let pod = &listening.pod;
        pod.active.close();
        if tokio::time::timeout_at(deadline, pod.active.wait()).await.is_err() {
            let cut = pod.active.len();
            tracing::warn!(
                namespace = &*pod.namespace,
                name = &*pod.name,
                cut,
                "connections were cut at the release deadline of the pod"
            );
        }
        pod.drain.at_once();
        pod.active.wait().await;
    }
}

/// A pod as its DNS server sees it.
#[derive(Debug)]
struct PodAsker {
    pod: Arc<Pod>,
    mesh: Arc<mesh::Store>,
}

impl dns::ClientFacts for PodAsker {
    fn now(&self) -> KnownClient {
        self.pod.facts_now(&self.mesh)
    }

    fn soon(&self) -> Pin<Box<dyn Future<Output = KnownClient> + Send + '_>> {
        Box::pin(self.pod.facts(&self.mesh))
    }
}

/// The addresses of the namespace, if it holds all of the workload's.
fn all_addresses(netns: &Netns, workload: &Workload) -> Result<Vec<IpAddr>, CaptureError> {
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
    let path = netns.path().to_owned();
    if held.is_empty() {
        return CaptureError::NoNetwork(path);
    }
    let held: Vec<String> = held.iter().map(ToString::to_string).collect();
    CaptureError::NotThePod { path, missing, held: held.join(", ") }
}

/// Which network namespace belongs to which pod; each belongs to one at most.
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
        let mut taken = self.taken.lock();
        if let Some(other) = taken.get(&netns.id()) {
            return Err(CaptureError::NetnsTaken(netns.path().to_owned(), other.clone()));
        }
        taken.insert(netns.id(), format!("{}/{}", spec.namespace, spec.name));
        Ok(Claim { claims: self.clone(), id: netns.id() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.taken.lock().remove(&self.id);
    }
}
