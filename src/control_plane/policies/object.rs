//! The objects that are converted, as far as their meaning depends on them. Pure.

use super::shallow::shallow;
use crate::control_plane::facts::api::{HasMetadata, Metadata};
use crate::mesh::Text;
use kube::core::{ApiResource, GroupVersionKind};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// AuthorizationPolicy.
    Authorization,
    /// PeerAuthentication.
    Authentication,
}

impl Kind {
    /// Both kinds.
    #[cfg(test)]
    pub const ALL: [Self; 2] = [Self::Authorization, Self::Authentication];

    /// The kind's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorization => "AuthorizationPolicy",
            Self::Authentication => "PeerAuthentication",
        }
    }

    /// Where the API serves it.
    pub fn resource(self) -> ApiResource {
        let plural = match self {
            Self::Authorization => "authorizationpolicies",
            Self::Authentication => "peerauthentications",
        };
        let kind = GroupVersionKind::gvk("security.istio.io", "v1", self.name());
        ApiResource::from_gvk_with_plural(&kind, plural)
    }
}

/// An object as the API gives it, with what is needed of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Written {
    metadata: Metadata,
    #[serde(deserialize_with = "shallow")]
    spec: Value,
    #[serde(deserialize_with = "shallow")]
    status: Value,
}

impl HasMetadata for Written {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// An AuthorizationPolicy or a PeerAuthentication.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// When it was created, in seconds since 1970.
    pub created: Option<i64>,
    /// Counts the changes of its spec.
    pub generation: i64,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// `spec`, or null.
    pub spec: Value,
    /// `status`, or null.
    pub status: Value,
}

impl Object {
    /// `namespace/name`.
    pub fn key(&self) -> Text {
        format!("{}/{}", self.namespace, self.name).into()
    }
}

impl From<Written> for Object {
    fn from(Written { metadata, spec, status }: Written) -> Self {
        Self {
            namespace: metadata.namespace.unwrap_or_default().into(),
            name: metadata.name.unwrap_or_default().into(),
            created: metadata.creation_timestamp.map(|time| time.0.as_second()),
            generation: metadata.generation.unwrap_or_default(),
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
            spec,
            status,
        }
    }
}

/// A field that is there: null counts as absent.
pub fn present<'a>(object: &'a Value, field: &str) -> Option<&'a Value> {
    object.get(field).filter(|value| !value.is_null())
}

/// The labels that `spec.selector` asks for; `None` if it selects every workload. The error says what is wrong with it.
pub fn selector(spec: &Value) -> Result<Option<Labels>, String> {
    let Some(selector) = present(spec, "selector") else { return Ok(None) };
    let Some(fields) = selector.as_object() else { return Err("spec.selector is not an object".into()) };
    if let Some(other) = fields.keys().find(|key| *key != "matchLabels") {
        return Err(format!("spec.selector.{} is not known", brief(other)));
    }
    let Some(labels) = present(selector, "matchLabels") else { return Ok(None) };
    let Some(labels) = labels.as_object() else { return Err("spec.selector.matchLabels is not an object".into()) };
    let one = |(key, value): (&String, &Value)| match value.as_str() {
        Some(value) if !key.is_empty() && !key.contains('*') && !value.contains('*') => {
            Ok((key.clone(), value.to_owned()))
        }
        _ => Err(format!("spec.selector.matchLabels: {} is not a label that a pod can have", quoted(key))),
    };
    let labels = labels.iter().map(one).collect::<Result<Labels, String>>()?;
    Ok(Some(labels).filter(|labels| !labels.is_empty()))
}

/// Most characters of a value that are repeated in a message.
const SHOWN: usize = 60;

/// The beginning of a value of an object, for a message.
pub fn brief(value: &str) -> String {
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", value.get(..end).unwrap_or_default()),
        None => value.to_owned(),
    }
}

/// The beginning of a value of an object, in quotation marks.
pub fn quoted(value: &str) -> String {
    format!("{:?}", brief(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_matters_is_taken_from_an_object_of_the_api() {
        let written: Written = serde_json::from_value(json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"namespace": "a", "name": "p", "generation": 3, "creationTimestamp": "1970-01-01T00:01:00Z",
                "labels": {"x": "y"}, "annotations": {"istio.io/dry-run": "true"}},
            "spec": {"action": "DENY"}, "status": {"observedGeneration": 2},
        }))
        .unwrap();
        let object = Object::from(written);
        assert_eq!((&*object.key(), object.created, object.generation), ("a/p", Some(60), 3));
        assert_eq!((object.labels["x"].as_str(), object.annotations["istio.io/dry-run"].as_str()), ("y", "true"));
        assert_eq!((&object.spec["action"], &object.status["observedGeneration"]), (&json!("DENY"), &json!(2)));
        let bare: Written = serde_json::from_value(json!({"metadata": {}})).unwrap();
        assert_eq!(Object::from(bare), Object { namespace: "".into(), name: "".into(), ..Object::default() });
    }

    #[test]
    fn an_empty_selector_selects_everything_and_a_strange_one_is_refused() {
        for everything in [json!({}), json!(null), json!({"selector": {}}), json!({"selector": {"matchLabels": {}}})] {
            assert_eq!(selector(&everything), Ok(None), "{everything}");
        }
        let one = selector(&json!({"selector": {"matchLabels": {"app": "x"}}})).unwrap().unwrap();
        assert_eq!(one, Labels::from([("app".into(), "x".into())]));
        for strange in [
            json!({"selector": "app=x"}),
            json!({"selector": {"matchExpressions": []}}),
            json!({"selector": {"matchLabels": ["app"]}}),
            json!({"selector": {"matchLabels": {"app": 1}}}),
            json!({"selector": {"matchLabels": {"app": "*"}}}),
            json!({"selector": {"matchLabels": {"": "x"}}}),
        ] {
            assert!(selector(&strange).is_err(), "{strange}");
        }
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        assert_eq!(brief(&"ä".repeat(100)), format!("{}…", "ä".repeat(60)));
        assert_eq!(quoted("a\"b"), "\"a\\\"b\"");
    }
}
