//! What is said of an object in its status: whether it is enforced as it is written, and what is not. Pure, apart from
//! [`write`].

mod queue;
mod write;

pub use write::write;

use super::notes::Notes;
use super::object::Kind;
use super::served;
use crate::mesh::Text;
use serde_json::{Value, json};

/// Type of the condition.
pub const ACCEPTED: &str = "Accepted";

/// Whether an object is enforced, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// As it is written.
    Accepted,
    /// As it is written, but something in it can never match.
    NeverMatches,
    /// It is evaluated and logged, not enforced, as it says itself.
    DryRun,
    /// Something is enforced in another way than it is written; more is refused than it says, never less.
    PartlyEnforced,
    /// Not at all.
    NotEnforced,
    /// Not at all, because an older object of the same level takes its place.
    Shadowed,
    /// It cannot be read, so every connection that it may be about is refused.
    Unreadable,
    /// Its namespace has too many policies, so every connection to the workloads there is refused.
    TooMany,
}

impl Reason {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::NeverMatches => "NeverMatches",
            Self::DryRun => "DryRun",
            Self::PartlyEnforced => "PartlyEnforced",
            Self::NotEnforced => "NotEnforced",
            Self::Shadowed => "Shadowed",
            Self::Unreadable => "Unreadable",
            Self::TooMany => "TooManyPolicies",
        }
    }

    /// Whether the object means here what it says.
    pub fn is_accepted(self) -> bool {
        matches!(self, Self::Accepted | Self::NeverMatches | Self::DryRun)
    }
}

/// A condition, without the times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The reason, which includes the status.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Condition {
    /// A condition.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The condition of an object with these notes, which is enforced. `otherwise` is the reason if there are none.
    pub fn of_notes(notes: &Notes, otherwise: Reason, message: &str) -> Self {
        let reason = match (notes.is_different(), notes.has_impossible()) {
            (true, _) => Reason::PartlyEnforced,
            (false, true) if otherwise == Reason::Accepted => Reason::NeverMatches,
            (false, _) => otherwise,
        };
        let texts: Vec<String> =
            [message.to_owned(), notes.text()].into_iter().filter(|text| !text.is_empty()).collect();
        let message = if texts.is_empty() { "enforced as it is written".to_owned() } else { texts.join("; ") };
        Self { reason, message }
    }

    /// What is said instead while the object's namespace is closed, because it has too many policies. What is not
    /// enforced at all still is not.
    pub fn in_namespace(&self, closed: bool) -> Self {
        if !closed || self.reason == Reason::NotEnforced {
            return self.clone();
        }
        let (count, kib) = (served::COUNT_MAX, served::BYTES_MAX >> 10);
        let most = format!("{count} policies and {kib} KiB of them at most");
        let effect = "until there are fewer, every connection to its workloads is refused";
        Self::new(Reason::TooMany, format!("the namespace has too many policies ({most}): {effect}"))
    }
}

/// A status that an object should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Kind of the object.
    pub kind: Kind,
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// The generation that was converted.
    pub generation: i64,
    /// What is said of it.
    pub condition: Condition,
}

/// What an object's status says, as far as it is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    status: String,
    reason: String,
    message: String,
    generation: Option<i64>,
}

impl Said {
    /// Reads a status; `None` if it says nothing of ours.
    pub fn of(status: &Value) -> Option<Self> {
        let condition = own(status)?;
        let text = |name: &str| condition.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let generation = number(condition.get("observedGeneration")).or(number(status.get("observedGeneration")));
        Some(Self { status: text("status"), reason: text("reason"), message: text("message"), generation })
    }

    /// Whether this is what should be said. A generation that the API has not kept, as with other definitions of these
    /// kinds, does not count: it would be written again and again.
    pub fn is(&self, condition: &Condition, generation: i64) -> bool {
        self.status == word(condition.reason)
            && self.reason == condition.reason.word()
            && self.message == condition.message
            && self.generation.is_none_or(|said| said == generation)
    }
}

/// A status with ours in it. Conditions of others stay, and so does the time of the last transition if there was none.
pub fn merged(status: &Value, wanted: &Wanted, now: &Value) -> Value {
    let word = word(wanted.condition.reason);
    let old = own(status).filter(|old| old.get("status").and_then(Value::as_str) == Some(word));
    let since = old.and_then(|old| old.get("lastTransitionTime")).filter(|time| time.is_string()).unwrap_or(now);
    let ours = json!({
        "type": ACCEPTED,
        "status": word,
        "reason": wanted.condition.reason.word(),
        "message": wanted.condition.message,
        "lastTransitionTime": since,
        "observedGeneration": wanted.generation,
    });
    let others = conditions(status).filter(|condition| !is_own(condition)).cloned();
    json!({
        "observedGeneration": wanted.generation,
        "conditions": others.chain([ours]).collect::<Vec<Value>>(),
    })
}

fn word(reason: Reason) -> &'static str {
    if reason.is_accepted() { "True" } else { "False" }
}

fn conditions(status: &Value) -> impl Iterator<Item = &Value> {
    status.get("conditions").and_then(Value::as_array).into_iter().flatten()
}

fn is_own(condition: &Value) -> bool {
    condition.get("type").and_then(Value::as_str) == Some(ACCEPTED)
}

fn own(status: &Value) -> Option<&Value> {
    conditions(status).find(|condition| is_own(condition))
}

/// A number, which Istio also writes as a text.
fn number(value: Option<&Value>) -> Option<i64> {
    value.and_then(|value| value.as_i64().or_else(|| value.as_str()?.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(reason: Reason, message: &str, generation: i64) -> Wanted {
        let condition = Condition::new(reason, message);
        Wanted { kind: Kind::Authorization, namespace: "a".into(), name: "p".into(), generation, condition }
    }

    #[test]
    fn what_is_written_is_what_is_wanted_and_what_others_said_stays() {
        let now = json!("2026-01-01T00:00:00Z");
        let other = json!({"type": "WaypointAccepted", "status": "True"});
        let first = merged(&json!({"conditions": [other]}), &wanted(Reason::Accepted, "", 1), &now);
        assert_eq!(first["conditions"][0], other);
        assert!(Said::of(&first).unwrap().is(&Condition::new(Reason::Accepted, ""), 1));
        // The time stays for as long as the status does.
        let later = json!("2026-02-02T00:00:00Z");
        let second = merged(&first, &wanted(Reason::NeverMatches, "x", 2), &later);
        assert_eq!(second["conditions"][1]["lastTransitionTime"], now);
        assert_eq!((&second["observedGeneration"], second["conditions"].as_array().unwrap().len()), (&json!(2), 2));
        let third = merged(&second, &wanted(Reason::NotEnforced, "x", 2), &later);
        assert_eq!(third["conditions"][1]["lastTransitionTime"], later);
        assert_eq!(third["conditions"][1]["status"], "False");
    }

    #[test]
    fn a_status_differs_when_any_part_of_it_does() {
        let now = json!("2026-01-01T00:00:00Z");
        let status = merged(&Value::Null, &wanted(Reason::PartlyEnforced, "m", 3), &now);
        let said = Said::of(&status).unwrap();
        assert!(said.is(&Condition::new(Reason::PartlyEnforced, "m"), 3));
        assert!(!said.is(&Condition::new(Reason::PartlyEnforced, "n"), 3));
        assert!(!said.is(&Condition::new(Reason::Shadowed, "m"), 3));
        assert!(!said.is(&Condition::new(Reason::PartlyEnforced, "m"), 4));
        for nothing in [json!(null), json!({}), json!({"conditions": {}}), json!({"conditions": [1, {"type": 2}]})] {
            assert_eq!(Said::of(&nothing), None, "{nothing}");
        }
        // Istio's own definitions keep numbers as texts, or drop them.
        let text = json!({"observedGeneration": "3", "conditions": [
            {"type": "Accepted", "status": "False", "reason": "PartlyEnforced", "message": "m"}]});
        assert!(Said::of(&text).unwrap().is(&Condition::new(Reason::PartlyEnforced, "m"), 3));
        assert!(!Said::of(&text).unwrap().is(&Condition::new(Reason::PartlyEnforced, "m"), 4));
        let none = json!({"conditions": text["conditions"]});
        assert!(Said::of(&none).unwrap().is(&Condition::new(Reason::PartlyEnforced, "m"), 4));
    }
}
