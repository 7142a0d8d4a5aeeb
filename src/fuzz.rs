//! One function for each parser of untrusted input. None of them may panic, whatever its input.
//!
//! The fuzz targets under `fuzz/` call these functions with random input. The test below calls them with the corpora,
//! so that a bug that was found once stays found.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a target says what is wrong by panicking"
)]

use crate::connection::accept::socks::{self, Reply, SocksTarget};
use crate::connection::authorize::Subject;
use crate::connection::authorize::decide::{Applicable, Verdict};
use crate::connection::choose::{Chance, ResolvedNames, route};
use crate::control::xds::{decode, delta, policy, saved};
use crate::control_plane::Cluster;
use crate::control_plane::ca::csr;
use crate::control_plane::policies::{Index, Kind, Object, Written, status};
use crate::daemon::explain::{Question, Wanted, policies_in, question};
use crate::dns::answer::{MeshAnswer, MeshRecord};
use crate::dns::message as dns;
use crate::dns::resolv_conf::ResolvConf;
use crate::hbone::{self, Authority, ConnectRequest, RequestHead};
use crate::identity::{istio_ca, revoked, verify};
use crate::mesh::{Snapshot, SpiffeName, Text, Update, Workload};
use crate::node::zds::message;
use crate::ports::in_pod;
use crate::proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use crate::{admin, control, crypto, doctor};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use rustls::pki_types::CertificateDer;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

/// A resource of the control plane, a whole response, and the state file.
pub fn xds_resources(data: &[u8]) {
    let mut names = decode::Names::default();
    let _ = decode::address("c1//Pod/a/w", data, &mut names);
    let _ = policy::policy("a/p", data);
    let _ = saved::decode(data);
    if let Ok(response) = DeltaDiscoveryResponse::decode(data) {
        let mut machine = delta::Delta::new(true, true);
        let _ = machine.receive(response);
        let _ = machine.saved();
    }
}

/// A packet of the node's agent, with none to two descriptors.
pub fn zds_message(data: &[u8]) {
    let (descriptors, bytes) = data.split_first().map_or((0, data), |(first, rest)| (usize::from(first % 3), rest));
    if let Err(error) = message::decode(bytes, descriptors, false) {
        assert!(message::ack(&Err(error.to_string())).len() < 900, "an answer must fit into a packet");
    }
}

/// A CONNECT request: the authority on the first line, then one header on each line.
pub fn connect_request(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let authority = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    if let Ok(parsed) = Authority::parse(&authority) {
        assert_eq!(
            Authority::parse(&parsed.to_string()).ok(),
            Some(parsed),
            "an accepted authority survives a round trip"
        );
    }
    let mut head = RequestHead::default();
    head.field(b":method", b"CONNECT");
    head.field(b":authority", authority.as_bytes());
    for line in lines.take(64) {
        let (name, value) = line.split_at(line.iter().position(|byte| *byte == b':').unwrap_or(0));
        head.field(name, value.strip_prefix(b":").unwrap_or(value));
    }
    if head.check().is_ok()
        && let Ok(request) = ConnectRequest::from_head(head)
    {
        let _ = request.forwarded_host();
        request.encode(&mut Vec::new());
    }
}

/// A certificate, a chain in PEM as a CA returns it, and a SPIFFE name.
pub fn certificate(data: &[u8]) {
    let _ = verify::peer_name(&CertificateDer::from(data));
    let _ = crypto::certificates_from_pem(data);
    let text = String::from_utf8_lossy(data);
    if let Ok(name) = SpiffeName::parse(&text) {
        assert_eq!(name.to_string(), text, "an accepted name survives a round trip");
    }
    let elements: Vec<String> = text.split("\n\n").map(str::to_owned).collect();
    istio_ca::read_answer(&elements);
}

/// A file with revocation lists.
pub fn crl(data: &[u8]) {
    let _ = revoked::parse(data);
}

/// A signing request of a daemon, in PEM, or as the bytes within it.
pub fn csr(data: &[u8]) {
    let _ = csr::public_key(&String::from_utf8_lossy(data));
    let body = STANDARD.encode(data);
    let _ =
        csr::public_key(&format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"));
}

/// A mesh file.
pub fn mesh_file(data: &[u8]) {
    let _ = control::yaml::facts(&String::from_utf8_lossy(data));
}

/// A DNS request of a pod, and a pod's `resolv.conf`.
pub fn dns_request(data: &[u8]) {
    let records = vec![MeshRecord::Address([10, 0, 0, 1].into()), MeshRecord::Address([0; 16].into())];
    let answer = MeshAnswer { alias: Some("other.example".into()), records, zone: "example".into() };
    if let dns::Request::Question(question) = dns::read(data) {
        for (datagram, limit) in [(true, question.datagram_limit()), (false, u16::MAX)] {
            if let Some(reply) = dns::reply(&question, &answer, 30, datagram) {
                assert!(reply.len() <= usize::from(limit), "a reply must fit");
                assert_eq!(dns::id(&reply), dns::id(data));
            }
        }
    }
    let _ = dns::server_failure(data, None);
    let _ = ResolvConf::parse(&String::from_utf8_lossy(data));
}

/// A resolver's answer: taken as its own question, and as the answer to another question.
pub fn dns_answer(data: &[u8]) {
    let _ = (
        dns::response_kind(data, data),
        dns::response_kind(&[0; 12], data),
        dns::addresses(data),
        dns::is_truncated(data),
    );
    if let Some(lifetime) = dns::lifetime(data) {
        let aged = dns::aged(data.to_vec(), &lifetime.ttl_offsets, lifetime.seconds / 2);
        assert_eq!(aged.len(), data.len());
    }
    if let Some(dns::DanglingAlias { end, .. }) = dns::dangling_alias(data) {
        let answer = MeshAnswer { alias: None, records: Vec::new(), zone: end.clone() };
        let _ = dns::with_alias_target(data, &end, &answer, 30, 512);
    }
}

/// HTTP/2 frames and header blocks.
pub fn http2_frames(data: &[u8]) {
    hbone::fuzz::frames(data);
}

/// A whole HTTP/2 connection, in either role.
pub fn http2_session(data: &[u8]) {
    hbone::fuzz::session(data);
}

/// TLS records, from a peer that knows the keys and from one that does not.
pub fn tls_records(data: &[u8]) {
    hbone::tls::fuzz::records(data);
}

/// A tunnel with sockets and applications, whose peer is authenticated and hostile.
pub fn tunnel(data: &[u8]) {
    hbone::fuzz_tunnel(data);
}

/// What a pod says to the SOCKS5 port.
pub fn socks_request(data: &[u8]) {
    let ask = |data: &[u8]| {
        let mut pair = tokio::io::join(data, Vec::new());
        let read = pin!(socks::request(&mut pair)).poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(asked) = read else { panic!("it waits, although there are no more bytes") };
        let (rest, answer) = pair.into_inner();
        (asked, data.len() - rest.len(), answer)
    };
    let (asked, length, answer) = ask(data);
    let Ok(target) = asked else {
        assert!(answer.len() <= 12, "the method and a refusal at most");
        assert_ne!(answer.get(3), Some(&(Reply::Succeeded as u8)), "no refusal looks like a success");
        return;
    };
    assert_eq!(answer, [5, 0], "the caller answers a good request");
    assert!(ask(&data[..length - 1]).0.is_err(), "every byte that was read is part of the request");
    let (name, port) = match &target {
        SocksTarget::Address(address) => (address.ip().to_string(), address.port()),
        SocksTarget::Host(name, port) => (name.clone(), *port),
    };
    let head = [5, 1, 0, 5, 1, 0, 3, name.len() as u8];
    let again = [&head[..], name.as_bytes(), &port.to_be_bytes()].concat();
    assert_eq!(ask(&again).0.ok(), Some(target), "an accepted target survives a round trip as a name");
}

/// Facts with a pod, a service and what leads elsewhere, for questions about them.
fn small_mesh() -> &'static Snapshot {
    static MESH: LazyLock<Snapshot> = LazyLock::new(|| {
        let facts = control::yaml::facts(include_str!("../fuzz/small_mesh.yaml")).expect("the file is good");
        Snapshot::build(1, facts)
    });
    &MESH
}

/// A question to `culvert explain`: `--from` on the first line, `--to` on the second. And the same bytes as the query
/// string of `/explain`, which others than `culvert explain` may send too.
pub fn explain_question(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = question(&admin::parameters(Some(&text)));
    let (from, to) = text.split_once('\n').unwrap_or((&text, ""));
    let sent = admin::parameters(Some(&doctor::explain::query(from, to)));
    assert_eq!(sent, [("from", from), ("to", to)].map(|(name, value)| (name.to_owned(), value.to_owned())));
    let Ok(Question { namespace, pod, to: wanted }) = question(&sent) else { return };
    assert_eq!(format!("{namespace}/{pod}"), from);
    let target = match wanted {
        Wanted::Address(address) => address,
        Wanted::Name(name, port) => {
            assert_eq!(to.rsplit_once(':').map(|(name, port)| (name, port.parse().ok())), Some((name, Some(port))));
            return;
        }
    };
    let (snapshot, names) = (small_mesh(), ResolvedNames::new());
    let source = snapshot.workload("c1//Pod/a/client").expect("it is in the file");
    let route = route::choose(snapshot, source, target, in_pod(true), &names, &mut Chance::of(&mut |_| 0));
    assert!(
        route.is_err() || !(target.ip().is_loopback() && in_pod(true).contains(&target.port())),
        "{target}: a loop"
    );
}

/// The text of `culvert explain --policy`: what is read decides about connections.
pub fn explain_policies(data: &[u8]) {
    let Ok(policies) = policies_in(&String::from_utf8_lossy(data)) else { return };
    let mut snapshot = small_mesh().clone();
    snapshot.apply(2, Update { policies, ..Update::default() });
    for workload in snapshot.workloads() {
        let (source, destination) = ([10, 0, 0, 1].into(), ([10, 0, 0, 2], 80).into());
        for peer in [None, workload.identity().ok()] {
            let _ = Applicable::for_workload(&snapshot, workload).decide(&Subject { peer, source, destination });
        }
    }
}

/// Objects of the Kubernetes API, in a JSON list or one alone: what they come to decides about connections, is taken
/// back with them, and is said in statuses that are written once.
pub fn policy_objects(data: &[u8]) {
    let objects: Vec<serde_json::Value> = match serde_json::from_slice(data) {
        Ok(serde_json::Value::Array(list)) => list,
        Ok(one) => vec![one],
        Err(_) => return,
    };
    let [namespace, trust_domain, id, domain] =
        ["istio-system", "cluster.local", "Kubernetes", "cluster.local"].map(Text::from);
    let mut index = Index::new(&Cluster { namespace, trust_domain, id, domain });
    let set = |index: &mut Index, peers: bool, object: Object| match peers {
        true => index.set_authentication(object),
        false => index.set_authorization(object),
    };
    let read = |value: serde_json::Value| {
        let peers = value.get("kind").is_some_and(|kind| kind == "PeerAuthentication");
        let written: Written = serde_json::from_value(value).ok()?;
        Some((peers, Object::from(written)))
    };
    let objects: Vec<(bool, Object)> = objects.into_iter().filter_map(read).collect();
    objects.iter().for_each(|(peers, object)| set(&mut index, *peers, object.clone()));
    let changes = index.take_changes();
    let mut snapshot = small_mesh().clone();
    let policies =
        changes.policies.into_iter().map(|(_, policy)| (*policy.expect("nothing has been removed")).clone()).collect();
    snapshot.apply(2, Update { policies, ..Update::default() });
    let labels = objects.iter().filter_map(|(_, object)| object.spec.get("selector")?.get("matchLabels")?.as_object());
    let labels: BTreeMap<String, String> =
        labels.flatten().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect();
    for workload in snapshot.workloads() {
        for labels in [&labels, &BTreeMap::new()] {
            let policies = index.of_workload(&workload.namespace, labels);
            let workload = Workload { policies, ..(**workload).clone() };
            let (source, destination) = ([10, 0, 0, 1].into(), ([10, 0, 0, 2], 80).into());
            for peer in [None, workload.identity().ok()] {
                let subject = Subject { peer, source, destination };
                let verdict = Applicable::for_workload(&snapshot, &workload).verdict(&subject);
                assert!(!matches!(verdict, Verdict::Unknown(_)), "{verdict:?}: a policy is listed and not sent");
            }
        }
    }
    for wanted in changes.statuses {
        assert!(wanted.condition.message.chars().count() < 3_000, "a status must stay short");
        let of_wanted = |(peers, object): &&(bool, Object)| {
            *peers == (wanted.kind == Kind::Authentication)
                && (&object.namespace, &object.name) == (&wanted.namespace, &wanted.name)
        };
        // A later object of the same name has taken the place of an earlier one.
        let (peers, mut object) = objects.iter().rfind(of_wanted).cloned().expect("it is about one of the objects");
        object.status = status::merged(&object.status, &wanted, &"2026-01-01T00:00:00Z".into());
        set(&mut index, peers, object);
    }
    let again = index.take_changes();
    assert_eq!((again.policies.len(), again.statuses.len()), (0, 0), "a status that is written changes nothing");
    for (peers, object) in objects {
        match peers {
            true => index.remove_authentication(&object.namespace, &object.name),
            false => index.remove_authorization(&object.namespace, &object.name),
        }
    }
    let gone = index.take_changes();
    assert!(gone.policies.iter().all(|(_, policy)| policy.is_none()) && gone.statuses.is_empty());
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn no_parser_panics_on_its_corpus() {
        type Target = (&'static str, fn(&[u8]));
        let targets: [Target; 17] = [
            ("dns_request", super::dns_request),
            ("dns_answer", super::dns_answer),
            ("xds_resources", super::xds_resources),
            ("zds_message", super::zds_message),
            ("connect_request", super::connect_request),
            ("certificate", super::certificate),
            ("crl", super::crl),
            ("csr", super::csr),
            ("mesh_file", super::mesh_file),
            ("http2_frames", super::http2_frames),
            ("http2_session", super::http2_session),
            ("tls_records", super::tls_records),
            ("tunnel", super::tunnel),
            ("socks_request", super::socks_request),
            ("explain_question", super::explain_question),
            ("explain_policies", super::explain_policies),
            ("policy_objects", super::policy_objects),
        ];
        for (name, target) in targets {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(seeds.len() >= 5, "{name} has {} seeds", seeds.len());
            for seed in seeds {
                let bytes = std::fs::read(&seed).unwrap();
                target(&bytes);
                // Also with single bytes damaged, and with the end missing.
                for at in (0..bytes.len()).step_by(1 + bytes.len() / 200) {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= 0xff;
                    target(&damaged);
                    target(&bytes[..at]);
                }
            }
        }
    }
}
