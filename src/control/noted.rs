//! Changes of policies, for the history.

use crate::mesh::{Snapshot, Text};
use crate::telemetry::changes::{Changes, What};
use std::collections::BTreeSet;

/// Policies that are named one by one. More of them at once, as a whole mesh brings, become one entry.
const NAMED_MAX: usize = 20;

/// Notes what has become of the policies with these keys.
pub(super) fn policies(changes: &Changes, before: &Snapshot, after: &Snapshot, keys: BTreeSet<Text>) {
    let mut noted = Vec::new();
    for key in keys {
        let text = match (before.policy(&key), after.policy(&key)) {
            (None, Some(_)) => "The policy was added.",
            (Some(_), None) => "The policy was removed.",
            (Some(old), Some(new)) if old != new => "The policy was changed.",
            _ => continue,
        };
        noted.push((key, text));
    }
    if noted.len() > NAMED_MAX {
        let count = noted.len();
        let text =
            format!("{count} policies were added, changed or removed; now there are {}.", after.policies().count());
        changes.note(What::Policy, "", text);
    } else {
        noted.into_iter().for_each(|(key, text)| changes.note(What::Policy, &*key, text));
    }
    if before.egress != after.egress {
        changes.note(What::Policy, "", "The egress policies were changed.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::yaml;
    use crate::mesh::Store;
    use crate::telemetry::ring::Bounds;

    /// The mesh file with these policies, and the port that they allow.
    fn facts(policies: &[(String, u16)]) -> crate::mesh::Facts {
        let one = |(name, port): &(String, u16)| {
            format!(
                "- {{name: {name}, namespace: a, scope: Namespace, action: Allow, dryRun: false, rules: [[[{{destinationPorts: [{port}]}}]]]}}\n"
            )
        };
        yaml::facts(&format!("policies:\n{}", policies.iter().map(one).collect::<String>())).unwrap()
    }

    #[test]
    fn policies_that_differ_are_named_and_many_are_counted() {
        let (store, changes) = (Store::default(), Changes::new(Bounds { entries: 100, bytes: 100_000 }));
        let mut noted = Vec::new();
        let named = |name: &str| (name.to_owned(), 80);
        for next in [
            vec![named("one"), named("two")],
            vec![named("one"), ("two".into(), 81)],
            vec![named("two")],
            (0..21).map(|n| named(&format!("p{n}"))).collect(),
        ] {
            let before = store.load();
            store.replace(facts(&next));
            let after = store.load();
            let keys = before.policies().chain(after.policies()).map(|policy| policy.key.clone()).collect();
            policies(&changes, &before, &after, keys);
            let mut all = changes.ring().newest(100, |_| true);
            all.truncate(all.len() - noted.len());
            noted.extend(all.iter().rev().map(|change| (change.subject.clone(), change.text.clone())));
        }
        let shown: Vec<_> = noted.iter().map(|(subject, text)| (subject.as_str(), text.as_str())).collect();
        assert_eq!(
            shown,
            [
                ("a/one", "The policy was added."),
                ("a/two", "The policy was added."),
                ("a/two", "The policy was changed."),
                ("a/one", "The policy was removed."),
                ("a/two", "The policy was changed."),
                ("", "22 policies were added, changed or removed; now there are 21."),
            ]
        );
    }
}
