//! This node's pods by the Kubernetes API alone, with no agent: labels say who is in, the node's processes say where its
//! namespace is, and the pod's status annotation tells the mesh when it is captured.
//!
//! Everything is level-triggered: what the API and the node say now is compared with what is done, and the difference is made
//! good. While the API is away what was known stays, and stays verified.

pub mod annotate;
pub mod cgroup;
mod plugin;
mod pod_netns;
mod ready_before_enabled;
mod saved;
pub mod scan;
mod search;
pub mod select;
pub mod uninstall;
pub mod watch;

use self::annotate::Annotator;
use self::pod_netns::Place;
use self::saved::Memory;
use self::search::Search;
use self::select::{Enablement, Fault, Labels, PodFacts};
use self::uninstall::OwnSet;
use self::watch::{Metrics, Told};
use super::active_daemon;
use super::capture::Capturer;
use super::cni;
use super::cni::Asked;
use super::kubelet_probes::Probed;
use super::pods::{NetnsRef, PodSpec, Pods};
use super::status::{Board, State};
use crate::mesh::Text;
use crate::sys::netns::Netns;
use crate::task::ready::Pending;
use crate::task::{Group, Signal};
use crate::telemetry::log::with_causes;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

/// What may be told and not yet be heard.
const QUEUE: usize = 256;
/// Time between looks at whether the processes that led to namespaces are still there.
const LOOK: Duration = Duration::from_secs(1);

/// The shortest time between two complaints about the annotations of one pod.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// What is said of a pod whose sidecar nobody redirects.
const NOT_REDIRECTED: &str = "its sidecar counts on istio-cni to redirect it (container istio-validation has failed), and culvert does not do \
     that: have the sidecar injected with istio-init (pilot.cni.enabled: false in istiod's values), or take it out and label the pod \
     istio.io/dataplane-mode=ambient";

/// Settings of enrolment by Kubernetes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node.
    pub node_name: String,
    /// Name of the daemon's own DaemonSet.
    pub daemonset: String,
    /// Who is in.
    pub enablement: Enablement,
    /// The host's procfs.
    pub proc: PathBuf,
    /// How the API is reached; `None`: as a pod of the cluster.
    pub kubeconfig: Option<PathBuf>,
    /// The CNI plugin, where it is wanted.
    pub cni: Option<cni::install::Config>,
    /// The daemon's own socket for the plugin.
    pub cni_socket: PathBuf,
    /// Where the pods that are enrolled are kept, for a start without the API.
    pub memory: Option<PathBuf>,
}

impl Config {
    /// The folder by which the daemons of a node agree on whose turn it is to write.
    pub fn turns(&self, whose: &str) -> PathBuf {
        self.cni_socket.with_file_name(format!("{}{whose}", active_daemon::FOLDER))
    }
}

/// What the source works with.
pub struct Source {
    /// Settings.
    pub config: Config,
    /// The API.
    pub client: kube::Client,
    /// The set of pods.
    pub pods: Pods,
    /// Their states.
    pub board: Arc<Board>,
    /// Cleans up what is not captured any more.
    pub capturer: Arc<Capturer>,
    /// Told whose kubelet probes are to be let through.
    pub probed: Probed,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Questions of the CNI plugin, where there is one.
    pub plugin: Option<mpsc::Receiver<Asked>>,
    /// Given up when each pod of the first list has had one attempt.
    pub ready: Option<Pending>,
    /// What is known of our DaemonSet.
    pub own_set: Arc<OwnSet>,
}

struct Running {
    source: Source,
    /// `None` until the first list.
    pods: Option<HashMap<Text, PodFacts>>,
    namespaces: Option<HashMap<Text, Labels>>,
    places: HashMap<Text, Place>,
    /// Why a pod has no place, as far as that is known.
    nowhere: HashMap<Text, State>,
    annotator: Annotator,
    scan: Search,
    ready: Option<Arc<Pending>>,
    /// Questions of the CNI plugin that wait for the API, or for the capture.
    asked: Vec<(Asked, Instant)>,
    /// Pods whose leftovers have been looked for, and how often.
    cleaned: HashMap<Text, u32>,
    /// Until when connections in them have their time: another daemon may be letting go of them.
    clean_from: Instant,
    /// What has been said of pods' annotations, and when.
    complained: HashMap<Text, (Vec<Fault>, Instant)>,
    /// Pods that are Ready before their peers know that they take tunnels.
    late: ready_before_enabled::Late,
    memory: Memory,
    tasks: Group,
}

/// Makes the client of the API.
pub async fn client(config: &Config) -> Result<kube::Client, String> {
    let mut settings = match &config.kubeconfig {
        Some(path) => {
            let read = kube::config::Kubeconfig::read_from(path).map_err(|error| with_causes(&error));
            let options = kube::config::KubeConfigOptions::default();
            let settings = match read {
                Ok(file) => kube::Config::from_custom_kubeconfig(file, &options).await.map_err(|e| with_causes(&e)),
                Err(error) => Err(error),
            };
            settings.map_err(|error| format!("KUBECONFIG {}: {error}", path.display()))?
        }
        None => kube::Config::incluster_env().map_err(|error| {
            format!("not in a pod of a cluster ({}), and KUBECONFIG is not set", with_causes(&error))
        })?,
    };
    settings.connect_timeout = Some(Duration::from_secs(5));
    // Longer than any watch; whoever accepts and says nothing is given up.
    settings.read_timeout = Some(Duration::from_secs(u64::from(watch::WATCH_SECONDS) + 10));
    kube::Client::try_from(settings).map_err(|error| with_causes(&error))
}

impl Source {
    /// Follows the API until the process ends.
    pub async fn run(mut self, drain: Signal) {
        let (tell, mut told) = mpsc::channel(QUEUE);
        let tasks = Group::default();
        tasks.spawn(watch::pods(
            self.client.clone(),
            self.config.node_name.clone(),
            tell.clone(),
            self.metrics.clone(),
        ));
        tasks.spawn(watch::namespaces(self.client.clone(), tell, self.metrics.clone()));
        tasks.spawn(self.own_set.clone().follow(self.client.clone(), self.config.clone()));
        let annotator = Annotator::new(self.client.clone(), self.metrics.clone(), tasks.clone());
        let mut states = self.board.subscribe();
        let (ready, mut plugin) = (self.ready.take().map(Arc::new), self.plugin.take());
        let memory = Memory::read(self.config.memory.clone(), &self.config.node_name).await;
        let mut running = Running {
            source: self,
            pods: None,
            namespaces: None,
            places: HashMap::new(),
            nowhere: HashMap::new(),
            annotator,
            scan: Search::default(),
            ready,
            asked: Vec::new(),
            cleaned: HashMap::new(),
            clean_from: Instant::now(),
            complained: HashMap::new(),
            late: Default::default(),
            memory,
            tasks: tasks.clone(),
        };
        let mut turns = running.source.capturer.turn.subscribe();
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let sought = running.scan.running.is_none() && running.is_seeking();
            let asks = async {
                match &mut plugin {
                    Some(plugin) => plugin.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = drain.gentle() => break,
                Some(first) = told.recv() => {
                    running.take(first);
                    while let Ok(more) = told.try_recv() {
                        running.take(more);
                    }
                }
                Some(found) = running.scan.results.1.recv() => running.found(found),
                outcome = running.annotator.outcome() => running.annotator.ended(outcome),
                result = running.memory.outcome() => running.memory.ended(result),
                Ok(()) = states.changed() => {}
                Ok(()) = turns.changed() => running.turn_changed(),
                Some(asked) = asks => running.ask(asked),
                _ = looks.tick() => running.look(),
                () = tokio::time::sleep_until(running.scan.next), if sought => running.start_scan(),
            }
            running.reconcile();
        }
        // Nobody answers them any more: the runtime asks again.
        drop(plugin);
        running.asked.clear();
        running.leave(&drain).await;
        tasks.cut();
        tasks.finished().await;
    }
}

impl Running {
    fn take(&mut self, told: Told) {
        self.scan.soon();
        let enablement = &self.source.config.enablement;
        let of_pod = |mut pod: PodFacts| {
            enablement.prune(&mut pod.labels);
            (pod.uid.clone(), pod)
        };
        let of_namespace = |(name, mut labels): (Text, Labels)| {
            enablement.prune(&mut labels);
            (name, labels)
        };
        match told {
            Told::AllPods(all) => self.pods = Some(all.into_iter().map(of_pod).collect()),
            Told::Pod(pod) => self.pods.get_or_insert_default().extend([of_pod(pod)]),
            Told::NoPod(uid) => drop(self.pods.as_mut().map(|pods| pods.remove(&uid))),
            Told::AllNamespaces(all) => self.namespaces = Some(all.into_iter().map(of_namespace).collect()),
            Told::Namespace(name, labels) => {
                self.namespaces.get_or_insert_default().extend([of_namespace((name, labels))]);
            }
            Told::NoNamespace(name) => drop(self.namespaces.as_mut().map(|all| all.remove(&name))),
        }
    }

    /// Pods that are in; nothing before both lists are there.
    fn wanted(&self) -> Option<Vec<&PodFacts>> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let none = Labels::new();
        let is_in = |pod: &&PodFacts| {
            let labels = namespaces.get(&pod.namespace).unwrap_or(&none);
            self.source.config.enablement.is_in(pod, labels).is_ok()
        };
        Some(pods.values().filter(is_in).collect())
    }

    /// Makes what is done what it should be.
    fn reconcile(&mut self) {
        let Some(wanted) = self.wanted() else {
            self.go_on_by_memory();
            self.answer();
            return;
        };
        let wanted: Vec<PodFacts> = wanted.into_iter().cloned().collect();
        self.end_of_memory();
        if self.source.capturer.mesh.load().synced.missing().is_none() {
            self.source.capturer.turn.becomes_able();
        }
        let uids: HashSet<&Text> = wanted.iter().map(|pod| &pod.uid).collect();
        self.places.retain(|uid, _| uids.contains(uid));
        self.nowhere.retain(|uid, _| uids.contains(uid));
        self.source.probed.set(wanted.iter().map(|pod| (pod.uid.clone(), self.ips(pod))).collect());
        let (mut specs, mut shown) = (Vec::new(), Vec::new());
        for pod in &wanted {
            complain(&mut self.complained, pod);
            // Once it is in it may leave its rules behind.
            self.cleaned.remove(&pod.uid);
            match self.places.get(&pod.uid) {
                Some(place) => {
                    let mut spec = spec(pod, place.netns.clone());
                    if place.path.is_none() && !place.ips.is_empty() {
                        spec.ips.clone_from(&place.ips);
                    }
                    specs.push(spec);
                }
                None => {
                    let why = match pod.ips.is_empty() {
                        true => State::Pending("it has no address yet: its sandbox is not there".into()),
                        false => self
                            .nowhere
                            .get(&pod.uid)
                            .cloned()
                            .unwrap_or_else(|| State::Pending("its network namespace is sought".into())),
                    };
                    let netns = NetnsRef::Path(PathBuf::new());
                    shown.push((PodSpec { netns, ..described(pod) }, why));
                }
            }
        }
        shown.extend(self.not_redirected());
        // Ready when every pod of the first list has been looked for, and each that was found has had its attempt.
        let sought_all = self.scan.running.is_none()
            && wanted.iter().all(|pod| {
                pod.ips.is_empty() || self.places.contains_key(&pod.uid) || self.nowhere.contains_key(&pod.uid)
            });
        self.source.pods.apply(specs, self.ready.as_ref());
        self.source.pods.show(shown);
        if sought_all {
            self.ready = None;
        }
        self.annotate(&wanted);
        self.remember(&wanted);
        // What the plugin has handed over becomes a pod, and what it asks may be answered then.
        if self.answer() {
            self.reconcile();
        }
    }

    /// Pods that nobody redirects, and that are refused by name.
    fn not_redirected(&self) -> Vec<(PodSpec, State)> {
        let all = self.pods.iter().flat_map(HashMap::values).filter(|pod| pod.is_not_redirected && !pod.ended);
        all.map(|pod| (described(pod), State::Failed(NOT_REDIRECTED.into()))).collect()
    }

    /// The addresses of a pod, by whoever knows of its present sandbox.
    fn ips(&self, pod: &PodFacts) -> Vec<IpAddr> {
        match self.places.get(&pod.uid) {
            Some(place) if place.path.is_none() && !place.ips.is_empty() => place.ips.clone(),
            _ => pod.ips.clone(),
        }
    }

    fn annotate(&mut self, wanted: &[PodFacts]) {
        if !self.source.capturer.turn.is_ours() {
            return;
        }
        let Some(pods) = &self.pods else { return };
        let uids: HashSet<&Text> = wanted.iter().map(|pod| &pod.uid).collect();
        let states: BTreeMap<Text, _> =
            self.source.board.list().into_iter().map(|status| (status.spec.uid.clone(), status)).collect();
        for pod in pods.values() {
            match uids.contains(&pod.uid) {
                true => {
                    let status = states.get(&pod.uid);
                    let awaited = self.asked.iter().any(|(asked, _)| plugin::starts(&asked.question, pod));
                    let unborn = awaited || pod.ips.is_empty();
                    if let Ok(value) = annotate::wanted(status, pod.said(), unborn) {
                        self.annotator.see_to(pod, Some(value), awaited);
                    }
                    let captured = status.is_some_and(|status| status.held || status.state == State::Captured);
                    let told = self.annotator.has_enabled(pod).is_ok();
                    let news = self.late.look(pod, captured, told, ready_before_enabled::room);
                    if news.count {
                        self.source.metrics.late();
                    }
                    if news.name {
                        ready_before_enabled::name(pod);
                    }
                }
                // Of one that is not in no more is said; a pod that has ended keeps what it had, nobody asks it any more.
                false if pod.said().is_some() && !pod.ended => self.annotator.see_to(pod, None, false),
                false => {}
            }
        }
        self.late.retain(|uid| uids.contains(uid));
        self.annotator.retain(|uid| pods.contains_key(uid));
        self.cleaned.retain(|uid, _| pods.contains_key(uid));
        self.complained.retain(|uid, _| pods.contains_key(uid));
    }
}

/// Names what of a pod's annotations is not understood: once, and once more where that has changed, but not all the time.
fn complain(complained: &mut HashMap<Text, (Vec<Fault>, Instant)>, pod: &PodFacts) {
    let said = complained.get(&pod.uid);
    let is_said = |fault: &&Fault| said.is_some_and(|(said, _)| said.contains(fault));
    let news: Vec<&Fault> = pod.faults.iter().filter(|fault| !is_said(fault)).collect();
    if news.is_empty() || said.is_some_and(|(_, at)| at.elapsed() < COMPLAIN_EVERY) {
        return;
    }
    for (annotation, value) in news {
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        tracing::warn!(namespace, name, annotation, value, "the pod's annotation is not understood, and left out");
    }
    complained.insert(pod.uid.clone(), (pod.faults.clone(), Instant::now()));
}

fn spec(pod: &PodFacts, netns: Netns) -> PodSpec {
    PodSpec { netns: NetnsRef::Handle(netns), ..described(pod) }
}

fn described(pod: &PodFacts) -> PodSpec {
    PodSpec {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        uid: pod.uid.clone(),
        netns: NetnsRef::Path(PathBuf::new()),
        ips: pod.ips.clone(),
        settings: pod.settings.clone(),
        powers: Some(pod.powers),
    }
}
