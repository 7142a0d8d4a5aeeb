//! Label selectors.

use serde_json::Value;
use std::collections::BTreeMap;

/// What one label must be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

/// A label selector: all requirements must hold. One without requirements selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<(String, Requirement)>);

impl Selector {
    /// Reads the API's form. `None` for one that is not understood.
    pub fn read(value: &Value) -> Option<Self> {
        let mut all = Vec::new();
        for (key, wanted) in value.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            all.push((key.clone(), Requirement::In(vec![wanted.as_str()?.to_owned()])));
        }
        for expression in value.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let key = expression.get("key")?.as_str()?.to_owned();
            let values = || {
                let values = expression.get("values")?.as_array()?;
                values.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
            };
            let requirement = match expression.get("operator")?.as_str()? {
                "In" => Requirement::In(values()?),
                "NotIn" => Requirement::NotIn(values()?),
                "Exists" => Requirement::Exists,
                "DoesNotExist" => Requirement::DoesNotExist,
                _ => return None,
            };
            all.push((key, requirement));
        }
        Some(Self(all))
    }

    /// Whether it selects an object with these labels.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, requirement)| {
            let value = labels.get(key);
            match requirement {
                Requirement::In(values) => value.is_some_and(|value| values.contains(value)),
                Requirement::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Requirement::Exists => value.is_some(),
                Requirement::DoesNotExist => value.is_none(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors_mean_what_the_api_says() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned()), ("tier".to_owned(), "".to_owned())]);
        let one = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        for (selector, expected) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "web", "zone": "a"}}), false),
            (one("app", "In", &["x", "web"]), true),
            (one("app", "NotIn", &["web"]), false),
            (one("other", "NotIn", &["web"]), true),
            (one("tier", "Exists", &[]), true),
            (one("tier", "DoesNotExist", &[]), false),
            (one("other", "Exists", &[]), false),
        ] {
            assert_eq!(Selector::read(&selector).unwrap().matches(&labels), expected, "{selector}");
        }
        for bad in [one("app", "Like", &[]), json!({"matchLabels": {"app": 1}}), json!({"matchExpressions": [{}]})] {
            assert_eq!(Selector::read(&bad), None, "{bad}");
        }
    }
}
