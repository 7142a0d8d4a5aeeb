//! The watch against an API in memory, in simulated time.

mod api;
mod folds;

use super::*;
use crate::control_plane::catalog::{self, Edition};
use crate::control_plane::policies::status::Wanted;
use crate::mesh::Text;
use crate::task::Group;
use api::Api as Fake;
use serde_json::{Value, json};
use tokio::sync::watch;

fn cluster() -> Cluster {
    Cluster {
        namespace: "istio-system".into(),
        trust_domain: "cluster.local".into(),
        id: "c1".into(),
        domain: "cluster.local".into(),
    }
}

/// A watch of an API.
struct World {
    api: Fake,
    editions: watch::Receiver<Arc<Edition>>,
    pods: Arc<RunningPods>,
    metrics: Arc<Metrics>,
    statuses: mpsc::Receiver<Wanted>,
    group: Group,
}

impl World {
    fn start(api: Fake, room: usize) -> Self {
        let client = Client::new(api.clone(), "default");
        let (catalog, pods, metrics) = (Arc::<Catalog>::default(), Arc::<RunningPods>::default(), Arc::default());
        let (sender, statuses) = mpsc::channel(room);
        let group = Group::default();
        let (editions, running, counted) = (catalog.follow(), pods.clone(), Arc::clone(&metrics));
        group.spawn(async move { follow_cluster(client, &cluster(), (catalog, running, counted), sender).await });
        Self { api, editions, pods, metrics, statuses, group }
    }

    /// Waits until an edition is as wanted.
    async fn until(&mut self, wanted: impl Fn(&Edition) -> bool) -> Arc<Edition> {
        let found = tokio::time::timeout(Duration::from_secs(3_600), self.editions.wait_for(|edition| wanted(edition)));
        found.await.expect("it comes within an hour").unwrap().clone()
    }

    async fn knows(&mut self, name: &str, known: bool) -> Arc<Edition> {
        let name = format!("c1//Pod/a/{name}");
        self.until(|edition| edition.complete && edition.addresses.contains_key(&*name) == known).await
    }

    async fn end(self) {
        self.group.cut();
        self.group.finished().await;
    }
}

fn pod(name: &str, phase: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "a", "name": name, "uid": format!("uid-{name}"), "labels": {"app": "x"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:metadata": {}}}]},
        "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.1"}]}})
}

fn policy(spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"namespace": "a", "name": "allow", "generation": 1}, "spec": spec})
}

#[tokio::test(start_paused = true)]
async fn everything_is_served_once_every_kind_is_listed_and_every_change_after_that() {
    let api = Fake::default();
    (0..1_200).for_each(|n| api.set("pods", pod(&format!("p{n}"), "Running")));
    api.set("authorizationpolicies", policy(json!({"selector": {"matchLabels": {"app": "x"}}})));
    let mut world = World::start(api, 10);
    let first = world.until(|edition| edition.complete).await;
    assert_eq!((first.addresses.size(), first.authorizations.size()), (1_200, 1));
    assert_eq!(world.api.lists("pods"), 3, "pages of 500");
    assert!(world.pods.is_complete() && world.pods.runs("n1", "a", "web"));
    world.api.set("pods", pod("new", "Running"));
    let second = world.knows("new", true).await;
    assert!(!first.addresses.contains_key("c1//Pod/a/new"), "editions do not change");
    assert_eq!(second.addresses.size(), 1_201);
    world.api.remove("pods", "a", "new");
    world.knows("new", false).await;
    assert!(world.pods.get("a", "new").is_none());
    world.api.set("pods", pod("p0", "Succeeded"));
    world.knows("p0", false).await;
    assert!(world.pods.get("a", "p0").is_none() && world.pods.get("a", "p1").is_some());
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_vanished_unseen_is_removed_by_the_next_list() {
    let api = Fake::default();
    ["stays", "goes"].iter().for_each(|name| api.set("pods", pod(name, "Running")));
    let mut world = World::start(api, 10);
    world.until(|edition| edition.complete).await;
    // Nothing of this is announced: the API goes away, and has forgotten when it comes back.
    world.api.set_away(true);
    tokio::time::sleep(Duration::from_secs(60)).await;
    world.api.remove("pods", "a", "goes");
    world.api.set("pods", pod("comes", "Running"));
    world.api.forget();
    tokio::time::sleep(Duration::from_secs(3_000)).await;
    let edition = world.editions.borrow().clone();
    assert!(edition.complete && edition.addresses.size() == 2, "what is served stays");
    assert!(world.pods.get("a", "goes").is_some());
    assert!(world.metrics.failures(Kind::Pods).get() > 10);
    assert_eq!(world.metrics.connected(Kind::Pods).get(), 0);
    world.api.set_away(false);
    world.knows("comes", true).await;
    let last = world.knows("goes", false).await;
    assert!(last.addresses.contains_key("c1//Pod/a/stays") && world.pods.get("a", "goes").is_none());
    assert_eq!(world.metrics.connected(Kind::Pods).get(), 1);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_the_cluster_lacks_is_waited_for_without_holding_up_the_others() {
    let api = Fake::default();
    api.set("pods", pod("p", "Running"));
    let lacking = ["authorizationpolicies", "peerauthentications", "gateways"];
    lacking.iter().for_each(|plural| api.set_unknown(plural, true));
    let mut world = World::start(api, 10);
    world.knows("p", true).await;
    assert_eq!(world.metrics.failures(Kind::Gateways).get(), 0);
    lacking.iter().for_each(|plural| world.api.set_unknown(plural, false));
    world.api.set("authorizationpolicies", policy(json!({})));
    world.until(|edition| edition.authorizations.contains_key("a/allow")).await;
    // A kind that is known and then not any more keeps its objects for a while.
    for away in [240, 600] {
        world.api.set_unknown("authorizationpolicies", true);
        world.api.forget();
        tokio::time::sleep(Duration::from_secs(away)).await;
        assert_eq!(world.editions.borrow().authorizations.contains_key("a/allow"), away == 240, "after {away} s");
        world.api.set_unknown("authorizationpolicies", false);
        world.until(|edition| edition.authorizations.contains_key("a/allow")).await;
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_somebody_nests_without_end_hides_no_other_object() {
    let nested = (0..500).fold(json!(1), |inner, _| json!([inner]));
    let api = Fake::default();
    let named = |name: &str| {
        let mut policy = policy(json!({"rules": [{}]}));
        policy["metadata"]["name"] = name.into();
        policy
    };
    let mut hostile = named("hostile");
    hostile["status"] = json!({"conditions": nested, "more": nested});
    hostile["metadata"]["managedFields"] = json!([{"fieldsV1": nested}]);
    hostile["more"] = nested.clone();
    api.set("authorizationpolicies", hostile);
    api.set("authorizationpolicies", named("other"));
    let mut world = World::start(api, 10);
    let first = world.until(|edition| edition.complete).await;
    assert_eq!(first.authorizations.size(), 2);
    let mut later = named("later");
    later["spec"]["more"] = nested;
    world.api.set("authorizationpolicies", later);
    world.until(|edition| edition.authorizations.contains_key("a/later")).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_makes_a_new_list() {
    let api = Fake::default();
    let mut world = World::start(api, 10);
    world.until(|edition| edition.complete).await;
    let mut strange = policy(json!({}));
    strange["metadata"]["labels"] = json!("none");
    world.api.set("authorizationpolicies", strange);
    let lists = world.api.lists("authorizationpolicies");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(world.api.lists("authorizationpolicies") > lists, "what it said would be lost");
    assert!(world.metrics.failures(Kind::AuthorizationPolicies).get() > 0);
    world.api.set("authorizationpolicies", policy(json!({})));
    world.until(|edition| edition.authorizations.contains_key("a/allow")).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_served_while_a_kind_cannot_be_listed() {
    for lacking in ["pods", "services", "endpointslices", "nodes", "namespaces"] {
        let api = Fake::default();
        api.set("pods", pod("p", "Running"));
        api.set_unknown(lacking, true);
        let mut world = World::start(api, 10);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let edition = world.editions.borrow().clone();
        assert!(!edition.complete && edition.addresses.is_empty(), "{lacking}");
        assert_eq!(world.pods.is_complete(), lacking != "pods");
        world.api.set_unknown(lacking, false);
        world.knows("p", true).await;
        world.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn statuses_wait_for_room_and_only_the_last_one_of_an_object_is_kept() {
    let api = Fake::default();
    let mut world = World::start(api, 1);
    world.until(|edition| edition.complete).await;
    let named = |name: &str, generation: u64, spec: Value| {
        let mut policy = policy(spec);
        policy["metadata"]["name"] = name.into();
        policy["metadata"]["generation"] = generation.into();
        policy
    };
    for generation in 1..=20 {
        for name in ["a1", "a2", "a3"] {
            world.api.set("authorizationpolicies", named(name, generation, json!({})));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut last = std::collections::BTreeMap::new();
    let mut count = 0;
    while let Ok(Some(wanted)) = tokio::time::timeout(Duration::from_secs(5), world.statuses.recv()).await {
        last.insert(wanted.name.to_string(), wanted.generation);
        count += 1;
    }
    assert_eq!(last.values().copied().collect::<Vec<_>>(), [20, 20, 20]);
    assert!(count <= 6, "{count} statuses for three objects");
    // Without a writer the facts go on.
    world.statuses.close();
    world.api.set("authorizationpolicies", named("a4", 1, json!({})));
    world.until(|edition| edition.authorizations.contains_key("a/a4")).await;
    world.api.set("pods", pod("late", "Running"));
    world.knows("late", true).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_runs_if_its_phase_says_so_and_it_has_a_node_and_an_account_of_its_own() {
    let api = Fake::default();
    let without = |name: &str, field: &str| {
        let mut pod = pod(name, "Running");
        pod["spec"].as_object_mut().unwrap().remove(field);
        pod
    };
    for (name, object) in [
        ("running", pod("running", "Running")),
        ("pending", pod("pending", "Pending")),
        ("failed", pod("failed", "Failed")),
        ("succeeded", pod("succeeded", "Succeeded")),
        ("unknown", pod("unknown", "Unknown")),
        ("waiting", without("waiting", "nodeName")),
        ("static", without("static", "serviceAccountName")),
    ] {
        assert_eq!(object["metadata"]["name"], name);
        api.set("pods", object);
    }
    let mut world = World::start(api, 10);
    world.until(|edition| edition.complete).await;
    let runs = |name: &&str| world.pods.get("a", name).is_some();
    let all = ["running", "pending", "failed", "succeeded", "unknown", "waiting", "static"];
    assert_eq!(all.into_iter().filter(runs).collect::<Vec<_>>(), ["running", "pending"]);
    world.end().await;
}
