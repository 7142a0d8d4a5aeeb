//! What a large cluster costs the control plane, from the API's JSON to the catalog: `cargo bench --bench facts`.
//!
//! 50,000 pods of 5,000 services in 500 namespaces on 1,000 nodes, with a slice for each service. The JSON of a pod has
//! the size that it has in a cluster, most of which is skipped.

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a measurement prints, and ends by panicking")]

use culvert::measured_facts::Listed;
use nix::sys::resource::{UsageWho, getrusage};
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const PODS: usize = 50_000;
const SERVICES: usize = 5_000;
const NAMESPACES: usize = 500;
const NODES: usize = 1_000;
const PAGE: usize = 500;
/// Single changes that are measured.
const CHANGES: usize = 20_000;

fn main() {
    let before = resident();
    let mut listed = Listed::default();
    let mut bytes = 0;
    let nodes = (0..NODES).map(node);
    let mut cpu = pages(nodes, &mut bytes, |page| listed.nodes(page));
    cpu += pages((0..SERVICES).map(service), &mut bytes, |page| listed.services(page));
    cpu += pages((0..SERVICES).map(slice), &mut bytes, |page| listed.slices(page));
    cpu += pages((0..PODS).map(|number| pod(number, true)), &mut bytes, |page| listed.pods(page));
    let facts = spent(|| {
        listed.listed();
        assert_eq!(listed.publish(), PODS + SERVICES);
    });
    println!("{PODS} pods, {SERVICES} services, {} MB of JSON", bytes / 1_000_000);
    println!(
        "first answer: {:.2} s of CPU for the lists, {:.2} s for the facts",
        cpu.as_secs_f64(),
        facts.as_secs_f64()
    );
    println!("memory: {} MiB more than before", (resident().saturating_sub(before)) >> 20);
    let pods: Vec<String> = (0..CHANGES).map(|number| pod(number * 7 % PODS, number % 2 == 0)).collect();
    let mut counted = 0;
    let begun = Instant::now();
    for pod in &pods {
        listed.pod(pod.as_bytes()).expect("a pod");
        counted += listed.publish();
    }
    let each = begun.elapsed() / u32::try_from(CHANGES).expect("a number");
    println!("a change of a pod: {each:?}, {counted} of {CHANGES} changed a fact");
    let services: Vec<String> = (0..CHANGES / 10).map(|number| renamed(&service(number), number)).collect();
    let begun = Instant::now();
    let mut counted = 0;
    for service in &services {
        listed.service(service.as_bytes()).expect("a service");
        counted += listed.publish();
    }
    let each = begun.elapsed() / u32::try_from(services.len()).expect("a number");
    println!("a change of a service and its pods: {each:?}, {counted} facts by {} changes", services.len());
}

/// The CPU time that reading all pages costs.
fn pages<E: std::fmt::Debug>(
    objects: impl Iterator<Item = String>,
    bytes: &mut usize,
    mut read: impl FnMut(&[u8]) -> Result<(), E>,
) -> Duration {
    let mut cpu = Duration::ZERO;
    let mut objects = objects.peekable();
    while objects.peek().is_some() {
        let items: Vec<String> = objects.by_ref().take(PAGE).collect();
        let page = format!(r#"{{"kind":"List","apiVersion":"v1","metadata":{{}},"items":[{}]}}"#, items.join(","));
        *bytes += page.len();
        cpu += spent(|| read(page.as_bytes()).expect("a page"));
    }
    cpu
}

fn spent(work: impl FnOnce()) -> Duration {
    let before = cpu();
    work();
    cpu().saturating_sub(before)
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("usage");
    let of = |time: nix::sys::time::TimeVal| {
        Duration::from_micros(u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).expect("a time"))
    };
    of(usage.user_time()) + of(usage.system_time())
}

/// The process's resident memory at its highest.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    let kilobytes: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kilobytes << 10
}

fn namespace(service: usize) -> usize {
    service % NAMESPACES
}

fn node(number: usize) -> String {
    let zone = number % 3;
    format!(
        r#"{{"metadata":{{"name":"node-{number}","labels":{{"topology.kubernetes.io/region":"r1","topology.kubernetes.io/zone":"z{zone}"}}}}}}"#
    )
}

fn service(number: usize) -> String {
    let (a, b, namespace) = (number >> 8, number & 0xff, namespace(number));
    format!(
        r#"{{"metadata":{{"namespace":"ns-{namespace}","name":"web-{number}","uid":"5a5c1c0e-0000-4000-8000-{number:012}"}},"spec":{{"type":"ClusterIP",
        "clusterIP":"10.96.{a}.{b}","clusterIPs":["10.96.{a}.{b}"],"ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack","sessionAffinity":"None",
        "selector":{{"app":"web-{number}","tier":"front"}},"ports":[{{"name":"http","port":80,"targetPort":"http","protocol":"TCP"}},
        {{"name":"admin","port":9000,"targetPort":9000,"protocol":"TCP"}}]}},"status":{{"loadBalancer":{{}}}}}}"#
    )
}

/// The same service with another port, which its pods map too.
fn renamed(service: &str, number: usize) -> String {
    service.replace(r#""port":9000"#, &format!(r#""port":{}"#, 10_000 + number))
}

fn slice(number: usize) -> String {
    let namespace = namespace(number);
    let per = PODS / SERVICES;
    let endpoints: Vec<String> = (0..per)
        .map(|n| {
            let pod = n * SERVICES + number;
            let (a, b, c) = (pod >> 16, pod >> 8 & 0xff, pod & 0xff);
            format!(
                r#"{{"addresses":["10.{a}.{b}.{c}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"nodeName":"node-{}","zone":"z1",
                "targetRef":{{"kind":"Pod","namespace":"ns-{namespace}","name":"{}","uid":"{}"}}}}"#,
                pod % NODES,
                pod_name(pod),
                pod_uid(pod)
            )
        })
        .collect();
    format!(
        r#"{{"metadata":{{"namespace":"ns-{namespace}","name":"web-{number}-abcde","labels":{{"kubernetes.io/service-name":"web-{number}",
        "endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io"}}}},"addressType":"IPv4","endpoints":[{}],
        "ports":[{{"name":"http","port":8080,"protocol":"TCP"}}]}}"#,
        endpoints.join(",")
    )
}

fn pod_name(number: usize) -> String {
    format!("web-{}-7d9f8b6c5d-{number:05}", number % SERVICES)
}

fn pod_uid(number: usize) -> String {
    format!("0b2e3a3c-0000-4000-8000-{number:012}")
}

fn pod(number: usize, ready: bool) -> String {
    let service = number % SERVICES;
    let (a, b, c) = (number >> 16, number >> 8 & 0xff, number & 0xff);
    let (namespace, node) = (namespace(service), number % NODES);
    let fields: Vec<String> = (0..60).map(|n| format!(r#""f:field{n}":{{".":{{}},"f:name":{{}}}}"#)).collect();
    let env: Vec<String> =
        (0..20).map(|n| format!(r#"{{"name":"VARIABLE_{n}","value":"some value of it {n}"}}"#)).collect();
    let condition = |kind: &str, status: bool| {
        let status = if status { "True" } else { "False" };
        format!(
            r#"{{"type":"{kind}","status":"{status}","lastProbeTime":null,"lastTransitionTime":"2026-01-01T00:00:00Z"}}"#
        )
    };
    let conditions: Vec<String> = ["PodScheduled", "Initialized", "ContainersReady", "PodReadyToStartContainers"]
        .map(|kind| condition(kind, true))
        .into_iter()
        .chain([condition("Ready", ready)])
        .collect();
    format!(
        r#"{{"metadata":{{"name":"{}","generateName":"web-{service}-7d9f8b6c5d-","namespace":"ns-{namespace}","uid":"{}","resourceVersion":"{number}",
        "creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"app":"web-{service}","tier":"front","version":"v1","pod-template-hash":"7d9f8b6c5d",
        "app.kubernetes.io/managed-by":"helm"}},"annotations":{{"ambient.istio.io/redirection":"enabled","checksum/config":"0123456789abcdef0123456789abcdef"}},
        "ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-{service}-7d9f8b6c5d","uid":"1","controller":true,"blockOwnerDeletion":true}}],
        "managedFields":[{{"manager":"kube-controller-manager","operation":"Update","apiVersion":"v1","time":"2026-01-01T00:00:00Z","fieldsType":"FieldsV1",
        "fieldsV1":{{{}}}}}]}},"spec":{{"volumes":[{{"name":"token","projected":{{"sources":[{{"serviceAccountToken":{{"expirationSeconds":3607,"path":"token"}}}}],"defaultMode":420}}}}],
        "containers":[{{"name":"web","image":"registry.example/shop/web:1.2.3","ports":[{{"name":"http","containerPort":8080,"protocol":"TCP"}}],"env":[{}],
        "resources":{{"requests":{{"cpu":"100m","memory":"128Mi"}}}},"volumeMounts":[{{"name":"token","readOnly":true,"mountPath":"/var/run/secrets/token"}}],
        "imagePullPolicy":"IfNotPresent"}}],"restartPolicy":"Always","terminationGracePeriodSeconds":30,"dnsPolicy":"ClusterFirst","serviceAccountName":"web-{service}",
        "serviceAccount":"web-{service}","nodeName":"node-{node}","securityContext":{{}},"schedulerName":"default-scheduler"}},"status":{{"phase":"Running","conditions":[{}],
        "hostIP":"192.168.0.1","podIP":"10.{a}.{b}.{c}","podIPs":[{{"ip":"10.{a}.{b}.{c}"}}],"startTime":"2026-01-01T00:00:00Z","containerStatuses":[{{"name":"web",
        "state":{{"running":{{"startedAt":"2026-01-01T00:00:00Z"}}}},"ready":true,"restartCount":0,"image":"registry.example/shop/web:1.2.3","imageID":"sha256:0123456789abcdef",
        "containerID":"containerd://0123456789abcdef0123456789abcdef","started":true}}],"qosClass":"Burstable"}}}}"#,
        pod_name(number),
        pod_uid(number),
        fields.join(","),
        env.join(","),
        conditions.join(",")
    )
}
