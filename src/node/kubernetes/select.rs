//! Decides which pods are enrolled: Istio ambient's rules, as a function of a pod, the labels of its namespace, and the
//! settings. Pure.

use super::facts::PodFacts;
use crate::node::selectors::{Enablement, Labels, NAMES};

impl Enablement {
    /// Whether a pod is enrolled; the error says why not.
    pub fn enrols(&self, pod: &PodFacts, namespace: &Labels) -> Result<(), &'static str> {
        if pod.ended {
            return Err("its containers have ended");
        }
        if pod.host_network {
            return Err("it is in the host's network namespace");
        }
        if pod.has_sidecar {
            return Err("it has a sidecar");
        }
        if self.excluded.contains(&*pod.namespace) {
            return Err("its namespace is excluded");
        }
        if is_node_tunnel(&self.own_namespace, pod) {
            return Err("it is a node tunnel itself");
        }
        if self.selects(&pod.labels, namespace) { Ok(()) } else { Err("no selector matches it") }
    }
}

/// Whether a pod is a daemon of the mesh itself. The labels count only in the daemon's own namespace.
fn is_node_tunnel(own_namespace: &str, pod: &PodFacts) -> bool {
    let label = |key: &str| pod.labels.get(key).map(String::as_str);
    let [app, name] = NAMES;
    let named = label(app) == Some("ztunnel") || label(name) == Some("culvert");
    *pod.namespace == *own_namespace && named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::selectors::{EnablementSelector, MODE, default_selectors};

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn enablement(selectors: Vec<EnablementSelector>) -> Enablement {
        let excluded = ["kube-system".to_owned()].into();
        Enablement { selectors, excluded, own_namespace: "istio-system".into() }
    }

    #[test]
    fn labels_enrol_as_in_istio() {
        let rules = enablement(default_selectors());
        type Pairs = &'static [(&'static str, &'static str)];
        let cases: [(Pairs, Pairs, bool); 9] = [
            (&[], &[], false),
            (&[(MODE, "ambient")], &[], true),
            (&[], &[(MODE, "ambient")], true),
            (&[(MODE, "none")], &[(MODE, "ambient")], false),
            (&[(MODE, "ambient")], &[(MODE, "none")], true),
            (&[(MODE, "other")], &[(MODE, "ambient")], true),
            (&[(MODE, "")], &[(MODE, "ambient")], true),
            (&[(MODE, "Ambient")], &[], false),
            (&[("istio-injection", "enabled")], &[(MODE, "ambient")], true),
        ];
        for (pod, namespace, expected) in cases {
            let facts = PodFacts { labels: labels(pod), namespace: "a".into(), ..PodFacts::default() };
            assert_eq!(rules.enrols(&facts, &labels(namespace)).is_ok(), expected, "{pod:?} in {namespace:?}");
        }
    }

    #[test]
    fn excluded_pods_are_not_enrolled_whatever_their_labels() {
        let rules = enablement(vec![EnablementSelector::default()]);
        let base = || PodFacts { namespace: "a".into(), ..PodFacts::default() };
        assert_eq!(rules.enrols(&base(), &Labels::new()), Ok(()), "empty selectors take everything");
        for (pod, word) in [
            (PodFacts { host_network: true, ..base() }, "host"),
            (PodFacts { ended: true, ..base() }, "ended"),
            (PodFacts { has_sidecar: true, ..base() }, "sidecar"),
            (PodFacts { namespace: "kube-system".into(), ..base() }, "excluded"),
            (
                PodFacts { namespace: "istio-system".into(), labels: labels(&[("app", "ztunnel")]), ..base() },
                "node tunnel",
            ),
        ] {
            assert!(rules.enrols(&pod, &Labels::new()).is_err_and(|why| why.contains(word)), "{word}");
        }
        let elsewhere = PodFacts { labels: labels(&[("app", "ztunnel")]), ..base() };
        assert_eq!(
            rules.enrols(&elsewhere, &Labels::new()),
            Ok(()),
            "the label counts only in the daemon's own namespace"
        );
    }

    #[test]
    fn labels_that_decide_nothing_are_dropped() {
        let enabled = enablement(default_selectors());
        let mut kept: Labels = (0..1000).map(|n| (format!("l{n}"), String::new())).collect();
        kept.extend(labels(&[(MODE, "ambient"), ("app", "a")]));
        enabled.prune(&mut kept);
        assert_eq!(kept, labels(&[(MODE, "ambient"), ("app", "a")]));
    }
}
