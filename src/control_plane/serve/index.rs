//! Finds addresses for clients that ask for them one by one: by a further name, by service, and by node. Pure.
//!
//! It follows the newest edition that anybody uses. Somebody who looks up for an older one may miss what has just
//! changed; that reaches them with the changes to the newer edition.

use crate::control_plane::catalog::{Edition, Kind, Resource};
use crate::mesh::Text;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Names by some key.
type Names = HashMap<Text, BTreeSet<Text>>;

/// The index of all addresses.
#[derive(Debug, Default)]
pub struct Index {
    at: Arc<Edition>,
    by_alias: Names,
    by_service: Names,
    by_node: Names,
}

impl Index {
    /// Whether it is at this edition, or at a newer one.
    pub fn has(&self, edition: &Edition) -> bool {
        self.at.number >= edition.number
    }

    /// Follows the catalog to an edition. Without effect if it is there already.
    pub fn advance(&mut self, to: &Arc<Edition>) {
        if self.has(to) {
            return;
        }
        let from = std::mem::replace(&mut self.at, to.clone());
        let changed = to.changed_since(from.number);
        let names: BTreeSet<&Text> = match changed {
            Some(changed) => changed.filter(|(kind, _)| *kind == Kind::Address).map(|(_, name)| name).collect(),
            None => from.addresses.keys().chain(to.addresses.keys()).collect(),
        };
        for name in names {
            match (from.addresses.get(name), to.addresses.get(name)) {
                (Some(old), Some(new)) if Arc::ptr_eq(old, new) => {}
                (old, new) => {
                    old.into_iter().for_each(|old| self.change(name, old, false));
                    new.into_iter().for_each(|new| self.change(name, new, true));
                }
            }
        }
    }

    fn change(&mut self, name: &Text, resource: &Resource, add: bool) {
        let change = |names: &mut Names, key: &Text| match add {
            true => drop(names.entry(key.clone()).or_default().insert(name.clone())),
            false => {
                let Some(known) = names.get_mut(key) else { return };
                known.remove(name);
                if known.is_empty() {
                    names.remove(key);
                }
            }
        };
        resource.aliases.iter().for_each(|alias| change(&mut self.by_alias, alias));
        resource.services.iter().for_each(|service| change(&mut self.by_service, service));
        if !resource.node.is_empty() {
            change(&mut self.by_node, &resource.node);
        }
    }

    /// What has this further name.
    pub fn with_alias(&self, alias: &str) -> impl Iterator<Item = &Text> {
        self.by_alias.get(alias).into_iter().flatten()
    }

    /// The workloads of a service.
    pub fn of_service(&self, service: &str) -> impl Iterator<Item = &Text> {
        self.by_service.get(service).into_iter().flatten()
    }

    /// The workloads on a node.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Text> {
        self.by_node.get(node).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::Catalog;

    fn workload(ip: &str, service: &str, node: &str) -> Option<Arc<Resource>> {
        let (content, version) = (bytes::Bytes::new(), format!("{ip}{service}{node}").into());
        let (aliases, services) = (vec![ip.into()], vec![service.into()]);
        Some(Arc::new(Resource { content, version, aliases, services, node: node.into() }))
    }

    #[test]
    fn it_follows_changes_and_forgets_what_is_gone() {
        let (catalog, mut index) = (Catalog::default(), Index::default());
        let set = |name: &str, resource| catalog.apply(vec![(Kind::Address, name.into(), resource)]);
        let current = || catalog.follow().borrow().clone();
        let list =
            |names: &mut dyn Iterator<Item = &Text>| names.map(ToString::to_string).collect::<Vec<_>>().join(",");
        set("w1", workload("/10.0.0.1", "a/web", "n1"));
        set("w2", workload("/10.0.0.1", "a/web", ""));
        let old = current();
        index.advance(&old);
        assert_eq!(list(&mut index.with_alias("/10.0.0.1")), "w1,w2");
        assert_eq!(
            (list(&mut index.of_service("a/web")), list(&mut index.on_node("n1"))),
            ("w1,w2".into(), "w1".into())
        );
        set("w1", workload("/10.0.0.9", "a/web", "n2"));
        set("w2", None);
        index.advance(&current());
        index.advance(&old);
        assert_eq!(
            (list(&mut index.with_alias("/10.0.0.1")), list(&mut index.on_node("n1"))),
            (String::new(), String::new())
        );
        assert_eq!(
            (list(&mut index.with_alias("/10.0.0.9")), list(&mut index.of_service("a/web"))),
            ("w1".into(), "w1".into())
        );
        set("w1", None);
        index.advance(&current());
        assert!(index.by_alias.is_empty() && index.by_service.is_empty() && index.by_node.is_empty());
    }
}
