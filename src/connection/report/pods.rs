//! The pods that connections are reported of: their names, and the plaintext that each has sent and received. Pods that
//! are gone stay for a while, so that the history can name them.

use super::direction::Direction;
use super::plaintext::{Action, Counts, Ledger, Peer};
use crate::mesh::Text;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Pods that are known at once. Beyond it those that are gone are forgotten, the oldest first.
const PODS_MAX: usize = 1_024;

/// The pods of this node, and those that have been here lately.
#[derive(Clone, Debug, Default)]
pub struct KnownPods(Arc<Mutex<All>>);

#[derive(Debug, Default)]
struct All {
    by_uid: HashMap<Text, KnownPod>,
    /// Uids, the longest known first.
    order: VecDeque<Text>,
}

impl All {
    fn forget(&mut self, uid: &Text) {
        let Some(mut gone) = self.by_uid.remove(uid) else { return };
        gone.earlier.add(&gone.plaintext.total.ended_by(SystemTime::now()));
        let of_its_name = |pod: &&mut KnownPod| pod.name == gone.name && pod.namespace == gone.namespace;
        if let Some(heir) = self.by_uid.values_mut().find(of_its_name) {
            heir.earlier.add(&gone.earlier);
        }
    }
}

/// What is known about a pod.
#[derive(Clone, Debug)]
pub struct KnownPod {
    /// Its namespace.
    pub namespace: Text,
    /// Its name.
    pub name: Text,
    /// Since when it has been counted.
    pub since: SystemTime,
    /// Its plaintext connections.
    pub plaintext: Ledger,
    /// Those of earlier pods of its name that have been forgotten, so that its series does not go back.
    earlier: Counts,
}

impl KnownPods {
    /// A pod is captured. If there are too many pods, one that is not `here` any more is forgotten.
    pub fn add(&self, uid: &Text, (namespace, name): (&Text, &Text), here: impl Fn(&Text) -> bool) {
        let mut all = self.0.lock();
        if let Some(known) = all.by_uid.get_mut(uid) {
            (known.namespace, known.name) = (namespace.clone(), name.clone());
            return;
        }
        let (namespace, name) = (namespace.clone(), name.clone());
        let (plaintext, earlier) = Default::default();
        let pod = KnownPod { namespace, name, since: SystemTime::now(), plaintext, earlier };
        all.by_uid.insert(uid.clone(), pod);
        all.order.push_back(uid.clone());
        if all.order.len() > PODS_MAX
            && let Some(gone) = all.order.iter().position(|uid| !here(uid))
            && let Some(uid) = all.order.remove(gone)
        {
            all.forget(&uid);
        }
    }

    /// Adds a pod with plaintext, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        self.add(&"".into(), (&"".into(), &"".into()), |_| true);
        self.plaintext(&"".into(), |ledger| ledger.refuse(Direction::Inbound, &Peer::Service("".into())));
    }

    /// The namespace and name of a pod.
    pub fn name_of(&self, uid: &Text) -> Option<(Text, Text)> {
        self.0.lock().by_uid.get(uid).map(|pod| (pod.namespace.clone(), pod.name.clone()))
    }

    /// Changes the plaintext of a pod.
    pub(super) fn plaintext(&self, uid: &Text, change: impl FnOnce(&mut Ledger)) {
        if let Some(pod) = self.0.lock().by_uid.get_mut(uid) {
            change(&mut pod.plaintext);
        }
    }

    /// A plaintext connection begins to be carried.
    pub(super) fn plaintext_begins(&self, uid: &Text, direction: Direction, peer: &Peer) {
        self.plaintext(uid, |ledger| ledger.begin(direction, peer));
    }

    /// It has ended.
    pub(super) fn plaintext_ends(&self, uid: &Text, direction: Direction, peer: &Peer) {
        self.plaintext(uid, |ledger| ledger.end(direction, peer));
    }

    /// All pods with their uids, one after the other, so that the lock is held for a moment only.
    pub fn list(&self) -> Vec<(Text, KnownPod)> {
        let uids: Vec<Text> = self.0.lock().order.iter().cloned().collect();
        let pod = |uid: Text| {
            let pod = self.0.lock().by_uid.get(&uid).cloned()?;
            Some((uid, pod))
        };
        uids.into_iter().filter_map(pod).collect()
    }

    /// The sums of each pod by its name: a pod that was replaced by one of its name continues its series.
    fn sums(&self) -> BTreeMap<(Text, Text), Counts> {
        let mut sums: BTreeMap<(Text, Text), Counts> = BTreeMap::new();
        for pod in self.0.lock().by_uid.values() {
            let sum = sums.entry((pod.namespace.clone(), pod.name.clone())).or_default();
            sum.add(&pod.plaintext.total);
            sum.add(&pod.earlier);
        }
        sums
    }
}

impl Collector for KnownPods {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (sums, now) = (self.sums(), SystemTime::now());
        let used = || {
            sums.iter().flat_map(|((namespace, name), counts)| {
                let all = Action::ALL.into_iter().map(move |action| (action, counts.of(action)));
                let used = all.filter(|(_, tally)| tally.count > 0);
                used.map(move |(action, tally)| {
                    ([("namespace", &**namespace), ("pod", &**name), ("action", action.word())], tally)
                })
            })
        };
        // A family without a series would have a type and no name that shows it.
        if used().next().is_none() {
            return Ok(());
        }
        let help = "Plaintext connections of each pod: accepted, opened, or refused";
        let mut family = encoder.encode_descriptor("culvert_plaintext_connections", help, None, MetricType::Counter)?;
        for (labels, tally) in used() {
            ConstCounter::new(tally.count).encode(family.encode_family(&labels)?)?;
        }
        let help = "When each pod last had a plaintext connection open, or refused one, in seconds since 1970";
        let mut family = encoder.encode_descriptor("culvert_plaintext_last_seconds", help, None, MetricType::Gauge)?;
        for (labels, tally) in used() {
            let last = tally.last(now).and_then(|last| last.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
            let gauge = ConstGauge::new(i64::try_from(last.as_secs()).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_are_gone_are_forgotten_before_any_that_is_here() {
        let pods = KnownPods::default();
        let name = |n: usize| Text::from(format!("pod-{n}"));
        for n in 0..PODS_MAX + 10 {
            pods.add(&name(n), (&"ns".into(), &name(n)), |uid| *uid == name(0));
        }
        assert_eq!(pods.list().len(), PODS_MAX);
        assert!(pods.name_of(&name(0)).is_some(), "it is here");
        assert!(pods.name_of(&name(1)).is_none() && pods.name_of(&name(11)).is_some());
    }

    #[test]
    fn a_pod_that_replaces_another_of_its_name_continues_its_series() {
        let (pods, mut registry) = (KnownPods::default(), prometheus_client::registry::Registry::default());
        registry.register_collector(Box::new(pods.clone()));
        for uid in ["old", "new"] {
            pods.add(&uid.into(), (&"shop".into(), &"db-0".into()), |_| true);
            let peer = Peer::Address([10, 0, 0, 1].into());
            pods.plaintext_begins(&uid.into(), Direction::Inbound, &peer);
            pods.plaintext_ends(&uid.into(), Direction::Inbound, &peer);
        }
        let others = |n: usize| Text::from(format!("other-{n}"));
        // The old one is forgotten.
        for n in 0..PODS_MAX {
            pods.add(&others(n), (&"other".into(), &others(n)), |uid| &**uid != "old");
        }
        assert!(pods.name_of(&"old".into()).is_none() && pods.name_of(&"new".into()).is_some());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let line = "culvert_plaintext_connections_total{namespace=\"shop\",pod=\"db-0\",action=\"accepted\"} 2\n";
        assert!(text.contains(line), "{text}");
        assert_eq!(text.matches("culvert_plaintext_connections_total{").count(), 1, "{text}");
    }
}
