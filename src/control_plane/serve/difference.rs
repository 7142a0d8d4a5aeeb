//! What has changed between two editions of the catalog, in the form in which it is sent. Pure.
//!
//! Most streams are at the same edition and need the same difference, so [`Differences`] keeps the last ones: each is
//! found and encoded once, and all streams share the bytes.

use crate::control_plane::catalog::{Edition, Kind, Resource};
use crate::mesh::Text;
use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};

/// How many differences are kept, and how many bytes of them. The newest is always kept.
const KEPT_MAX: usize = 32;
const KEPT_BYTES_MAX: usize = 64 << 20;

/// Fields of `DeltaDiscoveryResponse` and of `Resource`.
mod field {
    pub(super) const RESOURCES: u32 = 2;
    pub(super) const TYPE_URL: u32 = 4;
    pub(super) const NONCE: u32 = 5;
    pub(super) const REMOVED: u32 = 6;
    pub(super) const VERSION: u32 = 1;
    pub(super) const CONTENT: u32 = 2;
    pub(super) const NAME: u32 = 3;
    pub(super) const ALIASES: u32 = 4;
    pub(super) const ANY_URL: u32 = 1;
    pub(super) const ANY_VALUE: u32 = 2;
}

/// A difference in resources of one type.
#[derive(Debug)]
pub struct Difference {
    kind: Kind,
    /// Resources that are new or have changed.
    pub resources: Vec<(Text, Arc<Resource>)>,
    /// Names of resources that are gone.
    pub removed: Vec<Text>,
    encoded: OnceLock<[Bytes; 2]>,
}

impl Difference {
    /// What has to be said to somebody who knows `from` so that they know `to`.
    pub fn between(kind: Kind, from: &Edition, to: &Edition) -> Self {
        let mut difference = Self { kind, resources: Vec::new(), removed: Vec::new(), encoded: OnceLock::new() };
        let (before, after) = (from.of(kind), to.of(kind));
        if from.number == 0 {
            difference.resources = after.iter().map(|(name, resource)| (name.clone(), resource.clone())).collect();
            return difference;
        }
        let changed = to.changed_since(from.number);
        let names: BTreeSet<&Text> = match changed {
            Some(names) => names.filter(|(of, _)| *of == kind).map(|(_, name)| name).collect(),
            None => before.keys().chain(after.keys()).collect(),
        };
        for name in names {
            match (before.get(name), after.get(name)) {
                (Some(old), Some(new)) if old.version == new.version => {}
                (_, Some(new)) => difference.resources.push((name.clone(), new.clone())),
                (Some(_), None) => difference.removed.push(name.clone()),
                (None, None) => {}
            }
        }
        difference
    }

    /// The encoded resources.
    pub fn resource_bytes(&self) -> Bytes {
        let [resources, _] = self.encoded();
        resources.clone()
    }

    /// The encoded names of what is gone.
    pub fn removed_bytes(&self) -> Bytes {
        let [_, removed] = self.encoded();
        removed.clone()
    }

    fn encoded(&self) -> &[Bytes; 2] {
        self.encoded.get_or_init(|| [resources(self.kind, &self.resources, false), removed(&self.removed)])
    }

    fn size(&self) -> usize {
        self.resources.iter().map(|(name, resource)| name.len() + resource.content.len()).sum()
    }
}

/// The last differences, for all streams.
#[derive(Debug, Default)]
pub struct Differences(Mutex<VecDeque<Kept>>);

#[derive(Debug)]
struct Kept {
    key: (Kind, u64, u64),
    size: usize,
    difference: Arc<OnceLock<Arc<Difference>>>,
}

impl Differences {
    /// The difference between two editions. Only those who want the same one wait while it is found.
    pub fn between(&self, kind: Kind, from: &Edition, to: &Edition) -> Arc<Difference> {
        let key = (kind, from.number, to.number);
        let cell = {
            let mut kept = self.0.lock();
            match kept.iter().find(|kept| kept.key == key) {
                Some(known) => known.difference.clone(),
                None => {
                    let cell = Arc::<OnceLock<_>>::default();
                    kept.push_back(Kept { key, size: 0, difference: cell.clone() });
                    cell
                }
            }
        };
        let mut is_new = false;
        let difference = cell.get_or_init(|| {
            is_new = true;
            Arc::new(Difference::between(kind, from, to))
        });
        if is_new {
            self.shrink(key, difference.size());
        }
        difference.clone()
    }

    /// Notes the size of a new difference, and drops the oldest ones beyond the limits.
    fn shrink(&self, key: (Kind, u64, u64), size: usize) {
        let mut kept = self.0.lock();
        if let Some(new) = kept.iter_mut().find(|kept| kept.key == key) {
            new.size = size;
        }
        let bytes = |kept: &VecDeque<Kept>| kept.iter().map(|kept| kept.size).sum::<usize>();
        while kept.len() > 1 && (kept.len() > KEPT_MAX || bytes(&kept) > KEPT_BYTES_MAX) {
            kept.pop_front();
        }
    }
}

/// The beginning of a response, which is different for each stream.
pub fn head(kind: Kind, nonce: &str) -> Bytes {
    let mut out = BytesMut::new();
    put(&mut out, field::TYPE_URL, kind.url().as_bytes());
    put(&mut out, field::NONCE, nonce.as_bytes());
    out.freeze()
}

/// Resources as fields of a response.
pub fn resources(kind: Kind, resources: &[(Text, Arc<Resource>)], aliases: bool) -> Bytes {
    let url = kind.url().as_bytes();
    let mut out = BytesMut::new();
    for (name, resource) in resources {
        let any = length(url.len()) + length(resource.content.len());
        let aliases = if aliases { resource.aliases.as_slice() } else { &[] };
        let aliases_length: usize = aliases.iter().map(|alias| length(alias.len())).sum();
        let whole = length(resource.version.len()) + length(any) + length(name.len()) + aliases_length;
        key(&mut out, field::RESOURCES, whole);
        put(&mut out, field::VERSION, resource.version.as_bytes());
        key(&mut out, field::CONTENT, any);
        put(&mut out, field::ANY_URL, url);
        put(&mut out, field::ANY_VALUE, &resource.content);
        put(&mut out, field::NAME, name.as_bytes());
        aliases.iter().for_each(|alias| put(&mut out, field::ALIASES, alias.as_bytes()));
    }
    out.freeze()
}

/// Names of what is gone, as fields of a response.
pub fn removed(names: &[Text]) -> Bytes {
    let mut out = BytesMut::new();
    names.iter().for_each(|name| put(&mut out, field::REMOVED, name.as_bytes()));
    out.freeze()
}

/// Bytes that a field with a content of this length takes. All our field numbers fit into one byte.
fn length(content: usize) -> usize {
    1 + encoded_len_varint(content as u64) + content
}

fn key(out: &mut BytesMut, number: u32, content: usize) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(content as u64, out);
}

fn put(out: &mut BytesMut, number: u32, content: &[u8]) {
    key(out, number, content.len());
    out.put_slice(content);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::Catalog;
    use crate::proto::envoy::service::discovery::v3 as wire;
    use prost::Message;

    fn resource(version: &str, content: &[u8]) -> Arc<Resource> {
        let content = Bytes::copy_from_slice(content);
        let aliases = vec!["/10.0.0.1".into()];
        Arc::new(Resource { content, version: version.into(), aliases, services: vec![], node: "".into() })
    }

    #[test]
    fn what_is_written_by_hand_is_what_prost_reads() {
        let long = vec![7; 70_000];
        let all = [("c1//Pod/a/w".into(), resource("v1", b"content")), ("a/b".into(), resource("", &long))];
        for aliases in [false, true] {
            let bytes = [
                head(Kind::Address, "n7"),
                resources(Kind::Address, &all, aliases),
                removed(&["gone".into(), "".into()]),
            ];
            let read = wire::DeltaDiscoveryResponse::decode(bytes.concat().as_slice()).unwrap();
            let expected = |(name, resource): &(Text, Arc<Resource>)| wire::Resource {
                name: name.to_string(),
                version: resource.version.to_string(),
                aliases: if aliases { vec!["/10.0.0.1".into()] } else { vec![] },
                resource: Some(prost_types::Any {
                    type_url: Kind::Address.url().into(),
                    value: resource.content.to_vec(),
                }),
                ttl: None,
            };
            let whole = wire::DeltaDiscoveryResponse {
                type_url: Kind::Address.url().into(),
                nonce: "n7".into(),
                resources: all.iter().map(expected).collect(),
                removed_resources: vec!["gone".into(), String::new()],
                ..Default::default()
            };
            assert_eq!(read, whole);
        }
    }

    #[test]
    fn a_difference_is_found_once_and_is_the_same_whether_changes_are_remembered_or_compared() {
        let (catalog, differences) = (Catalog::default(), Differences::default());
        let current = || catalog.follow().borrow().clone();
        let set = |name: &str, version: &str| (Kind::Address, name.into(), Some(resource(version, b"")));
        catalog.apply(vec![set("a", "1"), set("b", "1"), set("c", "1")]);
        let first = current();
        catalog.apply(vec![set("a", "2"), (Kind::Address, "b".into(), None), set("c", "2"), set("d", "1")]);
        catalog.apply(vec![set("c", "1"), (Kind::Address, "d".into(), None), set("e", "1")]);
        let last = current();
        let names = |difference: &Difference| -> (Vec<String>, Vec<String>) {
            let changed = difference.resources.iter().map(|(name, _)| name.to_string()).collect();
            (changed, difference.removed.iter().map(ToString::to_string).collect())
        };
        let expected = (vec!["a".to_owned(), "e".into()], vec!["b".to_owned()]);
        let remembered = differences.between(Kind::Address, &first, &last);
        assert_eq!(names(&remembered), expected, "not what changed and changed back");
        assert!(Arc::ptr_eq(&remembered, &differences.between(Kind::Address, &first, &last)));
        // Too much has happened since: everything is compared.
        (0..1000).for_each(|n| catalog.apply(vec![set("f", &n.to_string())]));
        catalog.apply(vec![(Kind::Address, "f".into(), None)]);
        assert!(current().changed_since(first.number).is_none());
        assert_eq!(names(&differences.between(Kind::Address, &first, &current())), expected);
        assert_eq!(names(&differences.between(Kind::Authorization, &first, &last)), (vec![], vec![]));
    }

    #[test]
    fn few_differences_are_kept() {
        let (catalog, differences) = (Catalog::default(), Differences::default());
        let editions: Vec<Arc<Edition>> = (0..100)
            .map(|n: usize| {
                catalog.apply(vec![(Kind::Address, "a".into(), Some(resource(&n.to_string(), &vec![0; 4 << 20])))]);
                catalog.follow().borrow().clone()
            })
            .collect();
        for pair in editions.windows(2) {
            differences.between(Kind::Address, &pair[0], &pair[1]);
            differences.between(Kind::Authorization, &pair[0], &pair[1]);
        }
        let kept = differences.0.lock();
        assert!(kept.len() <= KEPT_MAX && kept.iter().map(|kept| kept.size).sum::<usize>() <= KEPT_BYTES_MAX);
        assert!(kept.iter().any(|kept| kept.key == (Kind::Authorization, 99, 100)));
    }
}
