//! Random events, with lists in between: what is published equals what a list from scratch gives, policies and all.

use super::*;
use crate::control_plane::catalog::Resource;
use crate::control_plane::policies;
use crate::control_plane::running_pods::RunningPod;
use crate::control_plane::watch::object::Item;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeMap;

type Objects = BTreeMap<(usize, String, String), Value>;
type Published = BTreeMap<(catalog::Kind, String), Arc<Resource>>;

const KINDS: [Kind; 3] = [Kind::Pods, Kind::AuthorizationPolicies, Kind::PeerAuthentications];

#[derive(Clone, Debug)]
enum Op {
    Set(Kind, Value),
    Gone(Kind, &'static str, &'static str),
    /// A list that lacks the objects of one namespace, whose end nobody saw.
    List(Kind, &'static str),
    /// A list that breaks off.
    Broken(Kind),
    Publish,
}

fn spaces() -> impl Strategy<Value = &'static str> {
    select(vec!["a", "b", "istio-system"])
}

fn names() -> impl Strategy<Value = &'static str> {
    select(vec!["x", "y"])
}

fn selectors() -> impl Strategy<Value = Value> {
    option::of(select(vec!["1", "2"]))
        .prop_map(|app| app.map_or(json!(null), |app| json!({"matchLabels": {"app": app}})))
}

prop_compose! {
    fn objects()(
        (namespace, name) in (spaces(), names()), selector in selectors(), app in select(vec!["1", "2"]),
        (mode, port) in (select(vec!["STRICT", "PERMISSIVE", "UNSET"]), option::of(select(vec!["STRICT", "PERMISSIVE"]))),
        (action, rules) in (select(vec!["ALLOW", "DENY", "AUDIT"]), select(vec![json!([]), json!([{}])])),
        phase in select(vec!["Running", "Running", "Failed"]),
        which in 0usize..3,
    ) -> Op {
        let ports = port.map_or(json!(null), |mode| json!({"80": {"mode": mode}}));
        let mut object = match which {
            0 => pod(name, phase),
            1 => policy(json!({"selector": selector, "action": action, "rules": rules})),
            _ => json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {},
                "spec": {"selector": selector, "mtls": {"mode": mode}, "portLevelMtls": ports}}),
        };
        let metadata = &mut object["metadata"];
        (metadata["namespace"], metadata["name"]) = (namespace.into(), name.into());
        if which == 0 {
            metadata["labels"]["app"] = app.into();
        }
        Op::Set(KINDS[which], object)
    }
}

fn ops() -> impl Strategy<Value = Op> {
    let kinds = || select(KINDS.to_vec());
    prop_oneof![
        8 => objects(),
        3 => (kinds(), spaces(), names()).prop_map(|(kind, namespace, name)| Op::Gone(kind, namespace, name)),
        1 => (kinds(), spaces()).prop_map(|(kind, namespace)| Op::List(kind, namespace)),
        1 => kinds().prop_map(Op::Broken),
        2 => Just(Op::Publish),
    ]
}

fn key(object: &Value) -> (Text, Text) {
    let text = |name: &str| Text::from(object["metadata"][name].as_str().unwrap());
    (text("namespace"), text("name"))
}

fn set(kind: Kind, object: &Value) -> Event {
    let read = || Box::new(serde_json::from_value::<policies::Written>(object.clone()).unwrap().into());
    let item = match kind {
        Kind::Pods => Item::Pod(serde_json::from_value(object.clone()).unwrap()),
        Kind::AuthorizationPolicies => Item::Authorization(read()),
        _ => Item::Authentication(read()),
    };
    Event::Set(kind, key(object), item)
}

fn publish(fold: &mut Fold, published: &mut Published) {
    for (kind, name, resource) in fold.take_changes() {
        match resource {
            Some(resource) => drop(published.insert((kind, name.to_string()), resource)),
            None => drop(published.remove(&(kind, name.to_string()))),
        }
    }
}

fn running(pods: &RunningPods) -> Vec<Option<RunningPod>> {
    let all = ["a", "b", "istio-system"].into_iter().flat_map(|namespace| ["x", "y"].map(|name| (namespace, name)));
    all.map(|(namespace, name)| pods.get(namespace, name)).collect()
}

fn of_kind(objects: &Objects, kind: Kind) -> Vec<Value> {
    objects.iter().filter(|((of, ..), _)| *of == kind as usize).map(|(_, object)| object.clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_is_announced_what_is_published_is_what_a_list_gives(ops in vec(ops(), 1..80)) {
        let pods = Arc::<RunningPods>::default();
        let mut fold = Fold::new(&cluster(), pods.clone());
        let (mut objects, mut published) = (Objects::new(), Published::new());
        for op in ops {
            match op {
                Op::Set(kind, object) => {
                    fold.apply(set(kind, &object));
                    let (namespace, name) = key(&object);
                    objects.insert((kind as usize, namespace.to_string(), name.to_string()), object);
                }
                Op::Gone(kind, namespace, name) => {
                    fold.apply(Event::Gone(kind, (namespace.into(), name.into())));
                    objects.remove(&(kind as usize, namespace.to_owned(), name.to_owned()));
                }
                Op::List(kind, vanished) => {
                    objects.retain(|(of, namespace, _), _| *of != kind as usize || namespace != vanished);
                    fold.apply(Event::Begun(kind));
                    of_kind(&objects, kind).iter().for_each(|object| fold.apply(set(kind, object)));
                    fold.apply(Event::Listed(kind));
                }
                Op::Broken(kind) => {
                    fold.apply(Event::Begun(kind));
                    of_kind(&objects, kind).iter().take(1).for_each(|object| fold.apply(set(kind, object)));
                    fold.apply(Event::Begun(kind));
                    of_kind(&objects, kind).iter().for_each(|object| fold.apply(set(kind, object)));
                    fold.apply(Event::Listed(kind));
                }
                Op::Publish => publish(&mut fold, &mut published),
            }
        }
        publish(&mut fold, &mut published);
        let fresh = Arc::<RunningPods>::default();
        let (mut scratch, mut expected) = (Fold::new(&cluster(), fresh.clone()), Published::new());
        for kind in KINDS {
            of_kind(&objects, kind).iter().for_each(|object| scratch.apply(set(kind, object)));
        }
        publish(&mut scratch, &mut expected);
        prop_assert_eq!(published, expected);
        prop_assert_eq!(running(&pods), running(&fresh));
    }
}
