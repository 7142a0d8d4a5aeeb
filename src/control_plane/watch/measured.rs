//! What `tests/bench/facts.rs` measures: lists of the API become facts, and changes of objects become changes of facts.

use super::fold::Fold;
use super::object::{Event, Item, Key, Kind, Object, Watched};
use crate::control_plane::facts::api;
use crate::control_plane::{Catalog, Cluster};
use crate::mesh::Text;
use kube::Resource;
use kube::api::ObjectList;
use std::sync::Arc;

/// A control plane that is told what the API says.
#[derive(Debug)]
pub struct Listed {
    fold: Fold,
    catalog: Catalog,
}

impl Default for Listed {
    fn default() -> Self {
        let cluster = Cluster {
            namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            id: "Kubernetes".into(),
            domain: "cluster.local".into(),
        };
        let mut fold = Fold::new(&cluster, Arc::default());
        Kind::ALL.into_iter().for_each(|kind| fold.apply(Event::Begun(kind)));
        Self { fold, catalog: Catalog::default() }
    }
}

impl Listed {
    /// A page of pods.
    pub fn pods(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        self.page(Kind::Pods, json, Item::Pod)
    }

    /// A page of services.
    pub fn services(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        self.page(Kind::Services, json, Item::Service)
    }

    /// A page of slices.
    pub fn slices(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        self.page(Kind::EndpointSlices, json, Item::Slice)
    }

    /// A page of nodes.
    pub fn nodes(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        self.page(Kind::Nodes, json, Item::Node)
    }

    fn page<T: Watched>(
        &mut self,
        kind: Kind,
        json: &[u8],
        item: fn(Box<Object<T>>) -> Item,
    ) -> Result<(), serde_json::Error> {
        for object in serde_json::from_slice::<ObjectList<Object<T>>>(json)?.items {
            self.fold.apply(Event::Set(kind, key(&object), item(Box::new(object))));
        }
        Ok(())
    }

    /// All lists are complete.
    pub fn listed(&mut self) {
        Kind::ALL.into_iter().for_each(|kind| self.fold.apply(Event::Listed(kind)));
    }

    /// A pod has changed.
    pub fn pod(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        let object: Object<api::Pod> = serde_json::from_slice(json)?;
        self.fold.apply(Event::Set(Kind::Pods, key(&object), Item::Pod(Box::new(object))));
        Ok(())
    }

    /// A service has changed.
    pub fn service(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        let object: Object<api::Service> = serde_json::from_slice(json)?;
        self.fold.apply(Event::Set(Kind::Services, key(&object), Item::Service(Box::new(object))));
        Ok(())
    }

    /// Publishes what has changed, and says how much that was.
    pub fn publish(&mut self) -> usize {
        let changes = self.fold.take_changes();
        let count = changes.len();
        self.catalog.apply(changes);
        count
    }
}

fn key<T: Watched>(object: &Object<T>) -> Key {
    let text = |text: &Option<String>| Text::from(text.as_deref().unwrap_or_default());
    (text(&object.meta().namespace), text(&object.meta().name))
}
