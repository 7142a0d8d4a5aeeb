//! The resources of one type that the daemon holds, by name. Pure.

use super::decode::Decoded;
use crate::mesh::Text;
use crate::proto::envoy::service::discovery::v3::Resource;
use std::collections::{HashMap, HashSet};

/// The resources of one type.
#[derive(Debug, Default)]
pub(super) struct ResourceSet {
    pub(super) held: HashMap<Text, HeldResource>,
    /// Whether the first response of this stream has come.
    pub(super) answered: bool,
    /// Whether the first response of this stream lists everything that exists.
    pub(super) complete: bool,
    /// Whether any response has ever come.
    pub(super) synced: bool,
}

/// A resource that was accepted.
#[derive(Debug)]
pub(super) struct HeldResource {
    /// Its version; empty if a newer version was refused, so that the server sends it again.
    pub(super) version: Text,
    /// The resource itself, if it is kept for the state file.
    pub(super) resource: Option<Resource>,
}

/// A decoded resource, with notes about values that are valid and may not do what their author believes.
pub(super) struct Accepted<T> {
    pub(super) value: T,
    pub(super) notes: Vec<String>,
}

impl ResourceSet {
    /// Decodes one resource and holds it. What is wrong with it is added to `faults`, by name. A refused version leaves
    /// the earlier one in place, so that a later removal is noticed, but forgets its version, so that the server sends
    /// it again.
    pub(super) fn accept<T>(
        &mut self,
        mut resource: Resource,
        keep: bool,
        faults: &mut Vec<String>,
        decode: impl FnOnce(&[u8]) -> Result<Decoded<T>, String>,
    ) -> Option<Accepted<T>> {
        let name = resource.name.clone();
        let bytes = resource.resource.as_ref().map(|any| any.value.as_slice());
        let (accepted, found) = match bytes.ok_or_else(|| "is empty".to_owned()).and_then(decode) {
            Ok(Decoded { value, faults, notes }) => {
                let version = std::mem::take(&mut resource.version).into();
                let held = HeldResource { version, resource: keep.then_some(resource) };
                self.held.insert(name.as_str().into(), held);
                (Some(Accepted { value, notes }), faults)
            }
            Err(fault) => (None, vec![fault]),
        };
        if !found.is_empty()
            && let Some(held) = self.held.get_mut(name.as_str())
        {
            held.version = "".into();
        }
        faults.extend(found.into_iter().map(|fault| format!("{name}: {fault}")));
        accepted
    }

    /// Drops and returns the names that a response removes: those that it lists as removed, and if it is a complete
    /// list, those that it lacks. `seen` are the resources that the response contains.
    pub(super) fn remove_gone(&mut self, seen: &HashSet<Text>, removed: Vec<String>) -> Vec<String> {
        let is_complete = self.complete && !self.answered;
        (self.answered, self.synced) = (true, true);
        let mut gone: Vec<String> = removed.into_iter().filter(|name| !seen.contains(name.as_str())).collect();
        if is_complete {
            gone.extend(self.held.keys().filter(|name| !seen.contains(*name)).map(ToString::to_string));
        }
        for name in &gone {
            self.held.remove(name.as_str());
        }
        gone
    }
}
