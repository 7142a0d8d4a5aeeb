//! Which labels enrol a pod: Kubernetes label selectors for pods and their namespaces, read from YAML. Unknown fields
//! and operators are refused. Pure.

use kube::core::{Expression, Selector, SelectorExt};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// Label by which a namespace or a pod joins the mesh (`ambient`) or stays out of it (`none`).
pub const MODE: &str = "istio.io/dataplane-mode";
/// Labels that identify a node tunnel.
pub const NAMES: [&str; 2] = ["app", "app.kubernetes.io/name"];

/// Settings that decide which pods are enrolled.
#[derive(Clone, Debug)]
pub struct Enablement {
    /// A pod is enrolled if any of these selects it.
    pub selectors: Vec<EnablementSelector>,
    /// Namespaces whose pods are never enrolled.
    pub excluded: BTreeSet<String>,
    /// Namespace of the daemon itself.
    pub own_namespace: String,
}

/// Selects the pods that both selectors match. An empty selector matches everything.
#[derive(Clone, Debug, Default)]
pub struct EnablementSelector {
    pods: Selector,
    namespaces: Selector,
    /// The labels that either selector reads.
    keys: BTreeSet<String>,
}

/// An [`EnablementSelector`] in YAML.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SelectorYaml {
    #[serde(default)]
    pod_selector: LabelSelectorYaml,
    #[serde(default)]
    namespace_selector: LabelSelectorYaml,
}

/// A label selector of Kubernetes. Its own type refuses no unknown fields, and a mistyped field would select every pod.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LabelSelectorYaml {
    #[serde(default)]
    match_labels: Labels,
    #[serde(default)]
    match_expressions: Vec<ExpressionYaml>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpressionYaml {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl ExpressionYaml {
    fn read(self) -> Result<Expression, String> {
        let Self { key, operator, values } = self;
        let needs_values = matches!(operator, Operator::In | Operator::NotIn);
        if needs_values == values.is_empty() {
            let what = if needs_values { "needs values" } else { "takes no values" };
            return Err(format!("{operator:?} on {key:?} {what}"));
        }
        Ok(match operator {
            Operator::In => Expression::In(key, values),
            // As in Kubernetes, this also matches objects without the label.
            Operator::NotIn => Expression::NotIn(key, values),
            Operator::Exists => Expression::Exists(key),
            Operator::DoesNotExist => Expression::DoesNotExist(key),
        })
    }
}

impl LabelSelectorYaml {
    /// The selector; adds the labels that it reads to `keys`.
    fn read(self, keys: &mut BTreeSet<String>) -> Result<Selector, String> {
        keys.extend(self.match_labels.keys().cloned());
        keys.extend(self.match_expressions.iter().map(|expression| expression.key.clone()));
        let mut selector: Selector = self.match_labels.into_iter().collect();
        for expression in self.match_expressions {
            selector.extend([expression.read()?]);
        }
        Ok(selector)
    }
}

impl SelectorYaml {
    fn read(self) -> Result<EnablementSelector, String> {
        let mut keys = BTreeSet::new();
        let pods = self.pod_selector.read(&mut keys)?;
        let namespaces = self.namespace_selector.read(&mut keys)?;
        Ok(EnablementSelector { pods, namespaces, keys })
    }
}

/// Istio's own rules: a pod labelled `ambient`, and a pod of a namespace labelled `ambient` unless the pod is labelled
/// `none`.
pub fn default_selectors() -> Vec<EnablementSelector> {
    let ambient = || Selector::from(Expression::Equal(MODE.into(), "ambient".into()));
    let not_none = Expression::NotIn(MODE.into(), ["none".to_owned()].into());
    let keys = || BTreeSet::from([MODE.to_owned()]);
    vec![
        EnablementSelector { pods: ambient(), namespaces: Selector::default(), keys: keys() },
        EnablementSelector { pods: not_none.into(), namespaces: ambient(), keys: keys() },
    ]
}

/// Reads a YAML list of selectors. An error names the field, operator or expression that is wrong.
pub fn read_selectors(text: &str) -> Result<Vec<EnablementSelector>, String> {
    let selectors: Vec<SelectorYaml> = crate::task::files::from_yaml(text)?;
    selectors.into_iter().map(SelectorYaml::read).collect()
}

impl Enablement {
    /// Whether any selector matches a pod's labels and those of its namespace.
    pub fn selects(&self, pod: &Labels, namespace: &Labels) -> bool {
        self.selectors.iter().any(|selector| selector.pods.matches(pod) && selector.namespaces.matches(namespace))
    }

    /// Removes the labels that no decision depends on.
    pub fn prune(&self, labels: &mut Labels) {
        labels.retain(|key, _| {
            NAMES.contains(&key.as_str()) || self.selectors.iter().any(|selector| selector.keys.contains(key))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_work_as_in_kubernetes() {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let text = "[{podSelector: {matchExpressions: [{key: a, operator: In, values: [x, y]}, {key: b, operator: DoesNotExist}]},\
                     namespaceSelector: {matchLabels: {c: d}}}]";
        let selectors = read_selectors(text).unwrap();
        let rules = Enablement { selectors, excluded: BTreeSet::new(), own_namespace: "istio-system".into() };
        for (pod, expected) in
            [(&[("a", "x")][..], true), (&[("a", "z")], false), (&[("a", "y"), ("b", "")], false), (&[], false)]
        {
            assert_eq!(rules.selects(&labels(pod), &labels(&[("c", "d")])), expected, "{pod:?}");
            assert!(!rules.selects(&labels(pod), &Labels::new()));
        }
        let mut kept = labels(&[("a", ""), ("b", ""), ("c", ""), ("d", ""), ("app", "")]);
        rules.prune(&mut kept);
        assert_eq!(kept, labels(&[("a", ""), ("b", ""), ("c", ""), ("app", "")]));
        for (bad, word) in [
            ("[{podSelector: {matchExpressions: [{key: a, operator: Gt, values: [x]}]}}]", "Gt"),
            ("[{podSelector: {matchExpressions: [{key: a, operator: In}]}}]", "needs values"),
            ("[{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [x]}]}}]", "takes no values"),
            ("[{podSelecter: {}}]", "podSelecter"),
        ] {
            let error = read_selectors(bad).err().unwrap();
            assert!(error.contains(word), "{error}");
        }
    }
}
