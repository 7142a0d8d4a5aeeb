//! What a name means to the pod that asks: pure, from the facts of one moment.
//!
//! A name is *ours* when a service of the mesh has it, or a pod behind a headless one; it is *perhaps ours* when it only
//! becomes a name of the mesh by guessing at what was left out of it. Such a name may exist elsewhere, so the pod's own
//! resolver is asked first, and the mesh answers where that one denies the name. All else is none of our business.

use super::message::Kind;
use crate::mesh::service::{HealthPolicy, IpFamilies};
use crate::mesh::workload::Health;
use crate::mesh::{Service, ServiceKey, Snapshot, Wanted, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Addresses in one answer: those of more endpoints would not fit into any message.
const ADDRESSES_MAX: usize = 2000;

/// Labels of the longest name that may be a Kubernetes name with parts left out: `pod.service.namespace.svc`.
const SHORT_LABELS: usize = 4;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The facts.
    pub snapshot: &'a Snapshot,
    /// The pod's workload.
    pub workload: &'a Workload,
    /// Search domains of the pod, lower case, without dots around them.
    pub search: &'a [String],
    /// Domain of the cluster as set.
    pub cluster_domain: &'a str,
    /// Namespace that is preferred where several services have a name and none is the pod's own or canonical.
    pub preferred_namespace: &'a str,
    /// Whether IPv6 addresses are told.
    pub ipv6: bool,
}

/// What is to be done with a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Ask the pod's resolvers.
    Forward,
    /// Answer.
    Answer(Answer),
    /// Ask the pod's resolvers; where they deny the name, give this answer, also where they do not answer and this one has
    /// records.
    ForwardOr(Answer),
}

/// An answer of our own. Without records it says that the name exists and has none of that type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the name asked for is another name of, where the records are told under that one.
    pub alias: Option<String>,
    /// The records.
    pub records: Vec<Record>,
    /// The zone whose authority says so.
    pub zone: String,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An address: A or AAAA.
    Address(IpAddr),
    /// A port of an endpoint: SRV.
    Service {
        /// The port.
        port: u16,
        /// Host name of the endpoint.
        target: String,
        /// Its addresses, told beside it.
        addresses: Vec<IpAddr>,
    },
}

/// What a name has been found to be.
#[derive(Clone, Debug)]
struct Found {
    service: Arc<Service>,
    /// One pod behind it, where the name is the pod's.
    pod: Option<Arc<Workload>>,
    wildcard: bool,
}

/// Decides about the question for `name` (lower case, without the dot at its end).
pub fn decide(asker: &Asker<'_>, name: &str, kind: Kind) -> Plan {
    if kind == Kind::Srv && name.starts_with('_') {
        return ports(asker, name).map_or(Plan::Forward, Plan::Answer);
    }
    let Some((found, alias, sure)) = find(asker, name) else { return Plan::Forward };
    let kubernetes = is_kubernetes(asker, &found.service);
    let records = match kind {
        Kind::A | Kind::Aaaa | Kind::Any => addresses(asker, &found, kind).into_iter().map(Record::Address).collect(),
        _ => Vec::new(),
    };
    let zone = zone(&found.service, kubernetes, alias.as_deref().unwrap_or(name));
    let answer = Answer { alias: alias.filter(|_| !found.wildcard), records, zone };
    match kind {
        Kind::A | Kind::Aaaa | Kind::Any if sure => Plan::Answer(answer),
        // These carry addresses too, which would lead around the ones of the mesh.
        Kind::Https if sure => Plan::Answer(answer),
        // A cluster's services have no other records than addresses and ports, and the names of ports are known there.
        Kind::Other if sure && kubernetes => Plan::Answer(answer),
        // Mail exchangers and the like of a host that somebody else serves.
        _ => Plan::ForwardOr(answer),
    }
}

/// What has to be asked of a control plane that tells only when asked before [`decide`] can be relied upon.
pub fn wanted(asker: &Asker<'_>, name: &str) -> Option<Wanted> {
    // `service.namespace.svc.domain`, perhaps with a pod in front.
    let labels: Vec<&str> = name.split('.').collect();
    let at = labels.iter().position(|label| *label == "svc");
    let key = match at {
        Some(at @ 2..=3) => {
            let namespace = labels.get(at - 1)?;
            ServiceKey { namespace: (*namespace).into(), hostname: labels.get(at - 2..)?.join(".").into() }
        }
        Some(_) => return None,
        None if labels.len() < 2 => return None,
        // A host of a ServiceEntry: those of the pod's own namespace can be asked for by name.
        None => {
            let bare = asker.search.iter().find_map(|domain| strip(name, domain)).unwrap_or(name);
            ServiceKey { namespace: asker.workload.namespace.clone(), hostname: bare.into() }
        }
    };
    asker.snapshot.unasked(Wanted::Service(key))
}

/// The service or pod behind a name, with the name that was meant where it is not the one asked for, and whether that is
/// sure.
fn find(asker: &Asker<'_>, name: &str) -> Option<(Found, Option<String>, bool)> {
    if let Some(found) = exact(asker, name).or_else(|| wildcard(asker, name)) {
        return Some((found, None, true));
    }
    if let Some(found) = completed(asker, name) {
        // Neither a name without dots nor one below `svc` is anybody else's.
        let sure = !name.contains('.') || name.ends_with(".svc");
        return Some((found, None, sure));
    }
    for domain in asker.search {
        let Some(bare) = strip(name, domain) else { continue };
        let of_cluster = in_cluster(asker, domain);
        let found = exact(asker, bare).or_else(|| wildcard(asker, bare));
        match found {
            // What is in the cluster's own domain and no service or pod of it was completed by the pod's resolver.
            Some(found) if of_cluster => return Some((found, Some(bare.to_owned()), true)),
            Some(found) if bare.contains('.') => return Some((found, Some(bare.to_owned()), false)),
            _ => {}
        }
        if of_cluster && let Some(found) = completed(asker, bare) {
            return Some((found, Some(bare.to_owned()), false));
        }
    }
    None
}

fn strip<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    name.strip_suffix(domain)?.strip_suffix('.').filter(|bare| !bare.is_empty())
}

/// A service by its host name, or a pod behind a headless service by its own.
fn exact(asker: &Asker<'_>, name: &str) -> Option<Found> {
    if let Some(service) = service(asker, name) {
        return Some(Found { service, pod: None, wildcard: false });
    }
    let (pod, rest) = name.split_once('.')?;
    let service = service(asker, rest).filter(|service| service.vips.is_empty())?;
    let pod = endpoints(asker, &service).into_iter().find(|workload| &*workload.name == pod)?;
    Some(Found { service: service.clone(), pod: Some(pod), wildcard: false })
}

/// The service with the longest wildcard around a name.
fn wildcard(asker: &Asker<'_>, name: &str) -> Option<Found> {
    let mut rest = name;
    while let Some((_, parent)) = rest.split_once('.') {
        if let Some(service) = service(asker, &format!("*.{parent}")) {
            return Some(Found { service, pod: None, wildcard: true });
        }
        rest = parent;
    }
    None
}

/// A service of the cluster whose name becomes whole by one of the pod's search domains.
fn completed(asker: &Asker<'_>, name: &str) -> Option<Found> {
    if name.split('.').count() > SHORT_LABELS {
        return None;
    }
    let domains = asker.search.iter().filter(|domain| in_cluster(asker, domain));
    domains.map(|domain| format!("{name}.{domain}")).find_map(|whole| exact(asker, &whole))
}

/// Whether a search domain is one of the cluster: its domain as set, or as the pod's own search list shows it.
fn in_cluster(asker: &Asker<'_>, domain: &str) -> bool {
    let below = |zone: &str| domain == zone || strip(domain, zone).is_some();
    let own = format!("{}.svc.", asker.workload.namespace);
    below(asker.cluster_domain) || asker.search.iter().filter_map(|shown| shown.strip_prefix(&own)).any(below)
}

/// The service with this host name that the pod sees: of its own namespace, else a canonical one, else of the preferred
/// namespace, else the first. One without address is not ours unless it is Kubernetes': others tell its endpoints.
fn service(asker: &Asker<'_>, hostname: &str) -> Option<Arc<Service>> {
    let namespace = &*asker.workload.namespace;
    let has_records = |service: &&Arc<Service>| !service.vips.is_empty() || is_kubernetes(asker, service);
    let claims = asker.snapshot.services_by_hostname(hostname).iter();
    let visible: Vec<&Arc<Service>> = claims.filter(|s| s.visible_to(namespace)).filter(has_records).collect();
    let of = |wanted: &str| visible.iter().copied().find(|service| &*service.key.namespace == wanted);
    let canonical = visible.iter().copied().find(|service| service.canonical);
    let chosen = of(namespace).or(canonical).or_else(|| of(asker.preferred_namespace));
    chosen.or(visible.first().copied()).cloned()
}

/// Whether a service is one of Kubernetes, by its host name, whatever the domain of its cluster.
fn is_kubernetes(asker: &Asker<'_>, service: &Service) -> bool {
    let host = &*service.key.hostname;
    let below = |zone: &str| strip(host, zone).is_some_and(|rest| rest.ends_with(".svc"));
    host.starts_with(&format!("{}.{}.svc.", service.name, service.key.namespace)) || below(asker.cluster_domain)
}

/// The zone in whose name it is said that there is no record; always around the name.
fn zone(service: &Service, kubernetes: bool, name: &str) -> String {
    let host = &*service.key.hostname;
    let zone = match host.split_once(".svc.") {
        Some((_, domain)) if kubernetes => domain,
        _ => host.strip_prefix("*.").unwrap_or(host),
    };
    if name == zone || strip(name, zone).is_some() { zone.to_owned() } else { name.to_owned() }
}

/// Endpoints of a headless service that its clients may be told: in their network, healthy unless that does not count.
fn endpoints(asker: &Asker<'_>, service: &Service) -> Vec<Arc<Workload>> {
    let any = service.load_balancer.as_ref().is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
    let told =
        |workload: &Workload| workload.network == asker.workload.network && (any || workload.health == Health::Healthy);
    let all = asker.snapshot.endpoints(&service.key).map(|endpoint| endpoint.workload);
    all.filter(|workload| told(workload)).cloned().collect()
}

fn addresses(asker: &Asker<'_>, found: &Found, kind: Kind) -> Vec<IpAddr> {
    let families = found.service.ip_families;
    let wanted = |ip: &IpAddr| {
        let (asked, offered) = if ip.is_ipv4() {
            (kind != Kind::Aaaa, families != Some(IpFamilies::V6))
        } else {
            (kind != Kind::A && asker.ipv6, families != Some(IpFamilies::V4))
        };
        asked && offered && !ip.is_unspecified()
    };
    // The first address of each family of a workload, as clients of a headless service would otherwise see one endpoint
    // several times.
    let of_workload = |workload: &Workload| {
        let first = |v4: bool| workload.ips.iter().copied().filter(&wanted).find(|ip| ip.is_ipv4() == v4);
        [first(true), first(false)].into_iter().flatten().collect::<Vec<_>>()
    };
    match &found.pod {
        Some(pod) => of_workload(pod),
        None if found.service.vips.is_empty() => {
            let all = endpoints(asker, &found.service);
            all.iter().flat_map(|workload| of_workload(workload)).take(ADDRESSES_MAX).collect()
        }
        None => {
            let own = found.service.vips.iter().filter(|vip| vip.network == asker.workload.network);
            own.map(|vip| vip.ip).filter(wanted).collect()
        }
    }
}

/// `_port._tcp.service`: the port of each endpoint of a headless service, or that of the service itself. Names of ports
/// are not in what a control plane tells; those that are not known are for the pod's resolvers.
fn ports(asker: &Asker<'_>, name: &str) -> Option<Answer> {
    let (port, rest) = name.strip_prefix('_')?.split_once("._tcp.")?;
    let service = service(asker, rest)?;
    let number = *service.port_names.get(port)?;
    let whole = |workload: Option<&Workload>| Found {
        service: service.clone(),
        pod: workload.map(|workload| Arc::new(workload.clone())),
        wildcard: false,
    };
    let target_port = |workload: &Workload| {
        let own = workload.services.get(&service.key).and_then(|ports| ports.get(&number));
        own.or(service.ports.get(&number)).copied().filter(|port| *port != 0).unwrap_or(number)
    };
    let records = if service.vips.is_empty() {
        let record = |workload: Arc<Workload>| Record::Service {
            port: target_port(&workload),
            target: format!("{}.{rest}", workload.name),
            addresses: addresses(asker, &whole(Some(&workload)), Kind::Any),
        };
        endpoints(asker, &service).into_iter().take(ADDRESSES_MAX).map(record).collect()
    } else {
        let addresses = addresses(asker, &whole(None), Kind::Any);
        vec![Record::Service { port: number, target: rest.to_owned(), addresses }]
    };
    let zone = zone(&service, is_kubernetes(asker, &service), rest);
    Some(Answer { alias: None, records, zone })
}
