//! What a name means to the pod that asks: pure, from the facts of one moment.
//!
//! A name is *ours* when a service of the mesh has it, or a pod behind a headless one; it is *perhaps ours* when it only
//! becomes a name of the mesh by guessing at what was left out of it. Such a name may exist elsewhere, so the pod's own
//! resolver is asked first, and the mesh answers where that one denies the name. All else is none of our business.

use super::answer::{MeshAnswer, MeshRecord, QueryKind};
use crate::mesh::{Service, ServiceKey, Snapshot, Wanted, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Addresses in one answer: those of more endpoints would not fit into any message.
const ADDRESSES_MAX: usize = 800;

/// Labels that are taken off a name, one after the other, to find a wildcard around it.
const WILDCARDS_MAX: usize = 16;

/// Labels of the longest name that may be a Kubernetes name with parts left out: `pod.service.namespace.svc`.
const SHORT_LABELS: usize = 4;

/// What one name can make necessary to ask for.
pub const WANTED_MAX: usize = 2;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct LookupContext<'a> {
    /// The facts.
    pub snapshot: &'a Snapshot,
    /// The pod's workload.
    pub workload: &'a Workload,
    /// SearchDomain domains of the pod.
    pub search: &'a [SearchDomain],
    /// Domain of the cluster as set.
    pub cluster_domain: &'a str,
    /// Namespace that is preferred where several services have a name and none is the pod's own or canonical.
    pub preferred_namespace: &'a str,
    /// Whether IPv6 addresses are told.
    pub ipv6: bool,
}

/// A search domain of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchDomain {
    /// The domain, lower case, without dots around it.
    pub domain: String,
    /// Whether it is one of the cluster.
    pub of_cluster: bool,
}

impl SearchDomain {
    /// Those of a pod of `namespace`. Of the cluster is its domain as set, and what the pod's own list shows to be it.
    pub fn list(domains: &[String], namespace: &str, cluster_domain: &str) -> Vec<Self> {
        let own = format!("{namespace}.svc.");
        let shown: Vec<&str> = domains.iter().filter_map(|domain| domain.strip_prefix(&own)).collect();
        let below = |domain: &str, zone: &str| domain == zone || strip(domain, zone).is_some();
        let of_cluster = |domain: &str| below(domain, cluster_domain) || shown.iter().any(|zone| below(domain, zone));
        domains.iter().map(|domain| Self { domain: domain.clone(), of_cluster: of_cluster(domain) }).collect()
    }
}

/// What is to be done with a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Ask the pod's resolvers.
    Forward,
    /// Answer.
    Answer(MeshAnswer),
    /// Ask the pod's resolvers; where they deny the name, give this answer, also where they do not answer and this one has
    /// records.
    ForwardOr(MeshAnswer),
}

/// What a name has been found to be.
#[derive(Clone, Debug)]
struct NameMatch {
    service: Arc<Service>,
    /// One pod behind it, where the name is the pod's.
    pod: Option<Arc<Workload>>,
    wildcard: bool,
}

/// Decides about the question for `name` (lower case, without the dot at its end).
pub fn decide(context: &LookupContext<'_>, name: &str, kind: QueryKind) -> Plan {
    if kind == QueryKind::Srv && name.starts_with('_') {
        return ports(context, name).map_or(Plan::Forward, Plan::Answer);
    }
    let Some((found, alias, sure)) = find(context, name) else { return Plan::Forward };
    let kubernetes = is_kubernetes(context, &found.service);
    let records = match kind {
        QueryKind::A | QueryKind::Aaaa | QueryKind::Any => {
            addresses(context, &found, kind).into_iter().map(MeshRecord::Address).collect()
        }
        _ => Vec::new(),
    };
    let zone = zone(&found.service, kubernetes, alias.as_deref().unwrap_or(name));
    let answer = MeshAnswer { alias: alias.filter(|_| !found.wildcard), records, zone };
    match kind {
        // Of new endpoints nobody tells who tells only when asked.
        _ if found.service.vips.is_empty() && !context.snapshot.is_told_all() => Plan::ForwardOr(answer),
        QueryKind::A | QueryKind::Aaaa | QueryKind::Any if sure => Plan::Answer(answer),
        // These carry addresses too, which would lead around the ones of the mesh.
        QueryKind::Https if sure => Plan::Answer(answer),
        // A cluster's services have no other records than addresses and ports, and the names of ports are known there.
        QueryKind::Other if sure && kubernetes => Plan::Answer(answer),
        // Mail exchangers and the like of a host that somebody else serves.
        _ => Plan::ForwardOr(answer),
    }
}

/// What has to be asked of a control plane that tells only when asked before [`decide`] can be relied upon; there may be
/// more when that has been answered, up to [`WANTED_MAX`] in all.
pub fn wanted(context: &LookupContext<'_>, name: &str) -> Option<Wanted> {
    if context.snapshot.is_told_all() {
        return None;
    }
    // `service.namespace.svc.domain`, perhaps with a pod in front.
    let labels: Vec<&str> = name.split('.').collect();
    let of_cluster = labels.iter().position(|label| *label == "svc").filter(|at| (2..=3).contains(at)).and_then(|at| {
        let hostname = labels.get(at - 2..)?.join(".");
        Some(ServiceKey { namespace: (*labels.get(at - 1)?).into(), hostname: hostname.into() })
    });
    // A host of a ServiceEntry, perhaps completed by the pod's resolver: those of the pod's own namespace can be asked for.
    let bare = context.search.iter().find_map(|search| strip(name, &search.domain)).unwrap_or(name);
    let is_host = bare.contains('.') && !bare.split('.').any(|label| label == "svc");
    let of_host = is_host.then(|| ServiceKey { namespace: context.workload.namespace.clone(), hostname: bare.into() });
    let unasked = |key| context.snapshot.unasked(Wanted::Service(key));
    of_cluster.into_iter().chain(of_host).find_map(unasked)
}

/// The service or pod behind a name, with the name that was meant where it is not the one asked for, and whether that is
/// sure.
fn find(context: &LookupContext<'_>, name: &str) -> Option<(NameMatch, Option<String>, bool)> {
    if let Some(found) = exact(context, name).or_else(|| wildcard(context, name)) {
        return Some((found, None, true));
    }
    if let Some(found) = completed(context, name) {
        // Neither a name without dots nor one below `svc` is anybody else's.
        let sure = !name.contains('.') || name.ends_with(".svc");
        return Some((found, None, sure));
    }
    for SearchDomain { domain, of_cluster } in context.search {
        let (Some(bare), of_cluster) = (strip(name, domain), *of_cluster) else { continue };
        let found = exact(context, bare).or_else(|| wildcard(context, bare));
        match found {
            // What is in the cluster's own domain and no service or pod of it was completed by the pod's resolver.
            Some(found) if of_cluster => return Some((found, Some(bare.to_owned()), true)),
            Some(found) if bare.contains('.') => return Some((found, Some(bare.to_owned()), false)),
            _ => {}
        }
        if of_cluster && let Some(found) = completed(context, bare) {
            return Some((found, Some(bare.to_owned()), false));
        }
    }
    None
}

fn strip<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    name.strip_suffix(domain)?.strip_suffix('.').filter(|bare| !bare.is_empty())
}

/// A service by its host name, or a pod behind a headless service by its own.
fn exact(context: &LookupContext<'_>, name: &str) -> Option<NameMatch> {
    if let Some(service) = service(context, name) {
        return Some(NameMatch { service, pod: None, wildcard: false });
    }
    let (pod, rest) = name.split_once('.')?;
    let service = service(context, rest).filter(|service| service.vips.is_empty())?;
    let pod = endpoints(context, &service).into_iter().find(|workload| &*workload.name == pod)?;
    Some(NameMatch { service: service.clone(), pod: Some(pod), wildcard: false })
}

/// The service with the longest wildcard around a name.
fn wildcard(context: &LookupContext<'_>, name: &str) -> Option<NameMatch> {
    let mut rest = name;
    for _ in 0..WILDCARDS_MAX {
        let (_, parent) = rest.split_once('.')?;
        if let Some(service) = service(context, &format!("*.{parent}")) {
            return Some(NameMatch { service, pod: None, wildcard: true });
        }
        rest = parent;
    }
    None
}

/// A service of the cluster whose name becomes whole by one of the pod's search domains.
fn completed(context: &LookupContext<'_>, name: &str) -> Option<NameMatch> {
    if name.split('.').count() > SHORT_LABELS {
        return None;
    }
    let domains = context.search.iter().filter(|search| search.of_cluster);
    domains.map(|search| format!("{name}.{}", search.domain)).find_map(|whole| exact(context, &whole))
}

/// The service with this host name that the pod sees: of its own namespace, else a canonical one, else of the preferred
/// namespace, else the first. One without address is not ours unless it is Kubernetes': others tell its endpoints.
fn service(context: &LookupContext<'_>, hostname: &str) -> Option<Arc<Service>> {
    let namespace = &*context.workload.namespace;
    let has_records = |service: &&Arc<Service>| !service.vips.is_empty() || is_kubernetes(context, service);
    let claims = context.snapshot.services_by_hostname(hostname).iter();
    let visible = claims.filter(|s| s.visible_to(namespace)).filter(has_records);
    let of = |wanted: &str| visible.clone().find(|service| &*service.key.namespace == wanted);
    let canonical = || visible.clone().find(|service| service.canonical);
    let preferred = || of(context.preferred_namespace);
    of(namespace).or_else(canonical).or_else(preferred).or_else(|| visible.clone().next()).cloned()
}

/// Whether a service is one of Kubernetes, by its host name, whatever the domain of its cluster.
fn is_kubernetes(context: &LookupContext<'_>, service: &Service) -> bool {
    let host = &*service.key.hostname;
    let below = |zone: &str| strip(host, zone).is_some_and(|rest| rest.ends_with(".svc"));
    let rest = host.strip_prefix(&*service.name).and_then(|rest| rest.strip_prefix('.'));
    let rest = rest.and_then(|rest| rest.strip_prefix(&*service.key.namespace));
    rest.is_some_and(|rest| rest.starts_with(".svc.")) || below(context.cluster_domain)
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
fn endpoints(context: &LookupContext<'_>, service: &Service) -> Vec<Arc<Workload>> {
    let told = |workload: &Workload| workload.network == context.workload.network && service.may_use(workload);
    let all = context.snapshot.endpoints(&service.key).map(|endpoint| endpoint.workload);
    all.filter(|workload| told(workload)).cloned().collect()
}

fn addresses(context: &LookupContext<'_>, found: &NameMatch, kind: QueryKind) -> Vec<IpAddr> {
    let wanted = |ip: &IpAddr| {
        let asked = if ip.is_ipv4() { kind != QueryKind::Aaaa } else { kind != QueryKind::A && context.ipv6 };
        asked && found.service.is_offered_in(*ip) && !ip.is_unspecified()
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
            let all = endpoints(context, &found.service);
            all.iter().flat_map(|workload| of_workload(workload)).take(ADDRESSES_MAX).collect()
        }
        None => {
            let own = found.service.vips.iter().filter(|vip| vip.network == context.workload.network);
            own.map(|vip| vip.ip).filter(wanted).collect()
        }
    }
}

/// `_port._tcp.service`: the port of each endpoint of a headless service, or that of the service itself. Names of ports
/// are not in what a control plane tells; those that are not known are for the pod's resolvers.
fn ports(context: &LookupContext<'_>, name: &str) -> Option<MeshAnswer> {
    let (port, rest) = name.strip_prefix('_')?.split_once("._tcp.")?;
    let service = service(context, rest)?;
    let number = *service.port_names.get(port)?;
    let found = |pod: Option<Arc<Workload>>| NameMatch { service: service.clone(), pod, wildcard: false };
    let records = if service.vips.is_empty() {
        let record = |workload: Arc<Workload>| MeshRecord::Service {
            port: service.target_port(workload.services.get(&service.key), number).unwrap_or(number),
            target: format!("{}.{rest}", workload.name),
            addresses: addresses(context, &found(Some(workload)), QueryKind::Any),
        };
        endpoints(context, &service).into_iter().take(ADDRESSES_MAX).map(record).collect()
    } else {
        let addresses = addresses(context, &found(None), QueryKind::Any);
        vec![MeshRecord::Service { port: number, target: rest.to_owned(), addresses }]
    };
    let zone = zone(&service, is_kubernetes(context, &service), rest);
    Some(MeshAnswer { alias: None, records, zone })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::address::{parse_network_address, parse_network_cidr};
    use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, Mode, Visibility};
    use crate::mesh::snapshot::tests::{service, workload};
    use crate::mesh::workload::Health;
    use crate::mesh::{Facts, Store};

    fn entry(namespace: &str, host: &str, vips: &[&str]) -> Service {
        let mut made = service(namespace, "entry", "0.0.0.1", &[(443, 443)]);
        made.key = ServiceKey { namespace: namespace.into(), hostname: host.into() };
        made.vips = vips.iter().map(|vip| parse_network_address(vip).unwrap()).collect();
        made
    }

    fn headless(namespace: &str, name: &str) -> Service {
        Service { vips: vec![], ..service(namespace, name, "0.0.0.1", &[(80, 8080)]) }
    }

    fn endpoint(name: &str, ips: &[&str], of: &Service) -> Workload {
        let mut made = workload("ns1", name, ips[0]);
        made.ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        made.services.insert(of.key.clone(), [(80, 8081)].into());
        made
    }

    /// A mesh with one of everything, asked by a pod of `ns1`.
    fn mesh() -> Store {
        let mut visible_in_ns2 = entry("ns2", "secret.com", &["/240.0.0.7"]);
        visible_in_ns2.visibility = Visibility::Namespace;
        let mut canonical = entry("ns3", "both.com", &["/240.0.0.9"]);
        canonical.canonical = true;
        let mut v6_only = service("ns1", "v6", "10.0.0.9", &[]);
        v6_only.vips.push(parse_network_address("/fd00::9").unwrap());
        v6_only.ip_families = Some(IpFamilies::V6);
        let (db, any, empty) = (headless("ns1", "db"), headless("ns1", "any"), headless("ns1", "empty"));
        let any = Service {
            load_balancer: Some(LoadBalancer {
                preferences: vec![],
                mode: Mode::Standard,
                health_policy: HealthPolicy::AllowAll,
            }),
            ..any
        };
        let db = Service { port_names: [("sql".into(), 80)].into(), ..db };
        let mut abroad = endpoint("db-2", &["10.1.0.3"], &db);
        abroad.network = "other".into();
        let mut ill = endpoint("db-3", &["10.1.0.4"], &db);
        ill.health = Health::Unhealthy;
        ill.services.insert(any.key.clone(), Default::default());
        let external_headless = entry("ns1", "nowhere.com", &[]);
        let workloads = vec![
            endpoint("db-0", &["10.1.0.1", "10.1.9.1", "fd00:1::1"], &db),
            endpoint("db-1", &["10.1.0.2"], &db),
            abroad,
            ill,
            endpoint("ext", &["10.1.0.5"], &external_headless),
        ];
        let mut ranges = entry("ns1", "ranges.com", &[]);
        ranges.cidrs = vec![parse_network_cidr("/198.51.100.0/24").unwrap()];
        let mut remote = service("ns1", "remote", "0.0.0.1", &[]);
        remote.key.hostname = "remote.ns1.svc.other.domain".into();
        remote.vips = vec![parse_network_address("/10.0.0.30").unwrap()];
        let mut web = service("ns1", "web", "10.0.0.1", &[(80, 8080)]);
        web.vips.push(parse_network_address("/fd00::1").unwrap());
        web.port_names = [("http".into(), 80)].into();
        let services = vec![
            web,
            service("ns2", "web", "10.0.0.2", &[]),
            service("com", "google", "10.0.0.66", &[]),
            entry("ns1", "abroad.com", &["other/240.0.0.3"]),
            entry("ns1", "www.google.com", &["/240.0.0.4"]),
            entry("ns1", "*.wild.com", &["/240.0.0.5"]),
            entry("ns1", "*.deep.wild.com", &["/240.0.0.6"]),
            entry("ns2", "both.com", &["/240.0.0.8"]),
            canonical,
            entry("ns4", "tied.com", &["/240.0.0.14"]),
            entry("ns5", "tied.com", &["/240.0.0.15"]),
            entry("ns2", "own.com", &["/240.0.0.10"]),
            entry("ns1", "own.com", &["/240.0.0.11"]),
            visible_in_ns2,
            v6_only,
            db,
            any,
            empty,
            external_headless,
            ranges,
            remote,
        ];
        let store = Store::default();
        store.replace(Facts { workloads, services, policies: vec![] });
        store
    }

    /// What is planned, in short: `a | b` for addresses, `none` for a denial of records, in brackets where the resolver is
    /// asked first; `alias > …` where there is one.
    fn plan(search: &[&str], name: &str, kind: QueryKind) -> String {
        let store = mesh();
        let (snapshot, asks) = (store.load(), workload("ns1", "client", "10.9.9.9"));
        let search: Vec<String> = search.iter().map(|domain| (*domain).to_owned()).collect();
        let search = SearchDomain::list(&search, "ns1", "cluster.local");
        let context = LookupContext {
            snapshot: &snapshot,
            workload: &asks,
            search: &search,
            cluster_domain: "cluster.local",
            preferred_namespace: "ns5",
            ipv6: true,
        };
        let text = |answer: MeshAnswer| {
            let word = |record: &MeshRecord| match record {
                MeshRecord::Address(ip) => ip.to_string(),
                MeshRecord::Service { port, target, addresses } => format!("{port} {target} {}", addresses.len()),
            };
            let mut all: Vec<String> = answer.records.iter().map(word).collect();
            all.sort();
            let records = if all.is_empty() { format!("none of {}", answer.zone) } else { all.join(" | ") };
            answer.alias.map_or_else(String::new, |alias| format!("{alias} > ")) + &records
        };
        match decide(&context, name, kind) {
            Plan::Forward => "forward".into(),
            Plan::Answer(answer) => text(answer),
            Plan::ForwardOr(answer) => format!("[{}]", text(answer)),
        }
    }

    const SEARCH: [&str; 4] = ["ns1.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"];

    #[test]
    fn names_mean_what_they_mean_to_the_pod() {
        let table = [
            // Services, whole and short.
            ("web.ns1.svc.cluster.local", "10.0.0.1"),
            ("web.ns2.svc.cluster.local", "10.0.0.2"),
            ("web", "10.0.0.1"),
            ("web.ns1.svc", "10.0.0.1"),
            ("web.ns2.svc", "10.0.0.2"),
            ("web.ns1", "[10.0.0.1]"),
            ("web.ns2", "[10.0.0.2]"),
            ("nothing", "forward"),
            ("nothing.ns1.svc.cluster.local", "forward"),
            // What exists elsewhere is not taken for a short name; a completed one is asked for as such.
            ("google.com", "[10.0.0.66]"),
            ("google.com.svc.cluster.local", "10.0.0.66"),
            // Hosts of service entries, also completed by the pod's resolver.
            ("www.google.com", "240.0.0.4"),
            ("www.google.com.ns1.svc.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.svc.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.corp.example", "[www.google.com > 240.0.0.4]"),
            ("www.google.com.ns2.svc.cluster.local", "forward"),
            ("web.corp.example", "forward"),
            ("web.ns2.ns1.svc.cluster.local", "[web.ns2 > 10.0.0.2]"),
            // Wildcards: the longest, at any depth, without alias, and not the name below which they are.
            ("a.wild.com", "240.0.0.5"),
            ("a.b.wild.com", "240.0.0.5"),
            ("a.deep.wild.com", "240.0.0.6"),
            ("wild.com", "forward"),
            ("a.wild.com.ns1.svc.cluster.local", "240.0.0.5"),
            // Who has a name: the own namespace, a canonical one, the preferred one; never one that is not visible.
            ("own.com", "240.0.0.11"),
            ("both.com", "240.0.0.9"),
            ("tied.com", "240.0.0.15"),
            ("secret.com", "forward"),
            // Addresses of other networks are none; ranges and endpoints of what is external are not told.
            ("abroad.com", "none of abroad.com"),
            ("ranges.com", "forward"),
            ("nowhere.com", "forward"),
            // Headless services and their pods: in the network, healthy, the first address of each.
            ("db.ns1.svc.cluster.local", "10.1.0.1 | 10.1.0.2"),
            ("db", "10.1.0.1 | 10.1.0.2"),
            ("any.ns1.svc.cluster.local", "10.1.0.4"),
            ("empty.ns1.svc.cluster.local", "none of cluster.local"),
            ("db-0.db.ns1.svc.cluster.local", "10.1.0.1"),
            ("db-0.db.ns1.svc", "10.1.0.1"),
            ("db-0.db", "[10.1.0.1]"),
            ("db-2.db.ns1.svc.cluster.local", "forward"),
            ("db-3.db.ns1.svc.cluster.local", "forward"),
            ("db-0.web.ns1.svc.cluster.local", "forward"),
            // A cluster of another domain.
            ("remote.ns1.svc.other.domain", "10.0.0.30"),
            ("v6.ns1.svc.cluster.local", "none of cluster.local"),
        ];
        for (name, expected) in table {
            assert_eq!(plan(&SEARCH, name, QueryKind::A), expected, "{name}");
        }
    }

    #[test]
    fn types_that_there_are_no_records_of() {
        let web = "web.ns1.svc.cluster.local";
        let table = [
            (web, QueryKind::Aaaa, "fd00::1"),
            (web, QueryKind::Any, "10.0.0.1 | fd00::1"),
            (web, QueryKind::Other, "none of cluster.local"),
            (web, QueryKind::Https, "none of cluster.local"),
            (web, QueryKind::Srv, "[none of cluster.local]"),
            ("web", QueryKind::Other, "none of web"),
            ("v6.ns1.svc.cluster.local", QueryKind::Aaaa, "fd00::9"),
            ("web.ns2.svc.cluster.local", QueryKind::Aaaa, "none of cluster.local"),
            ("db.ns1.svc.cluster.local", QueryKind::Aaaa, "fd00:1::1"),
            ("db-1.db.ns1.svc.cluster.local", QueryKind::Aaaa, "none of cluster.local"),
            ("www.google.com", QueryKind::Aaaa, "none of www.google.com"),
            ("www.google.com", QueryKind::Https, "none of www.google.com"),
            ("www.google.com", QueryKind::Other, "[none of www.google.com]"),
            ("a.b.wild.com", QueryKind::Aaaa, "none of wild.com"),
            ("remote.ns1.svc.other.domain", QueryKind::Other, "none of other.domain"),
            ("_http._tcp.web.ns1.svc.cluster.local", QueryKind::Srv, "80 web.ns1.svc.cluster.local 2"),
            (
                "_sql._tcp.db.ns1.svc.cluster.local",
                QueryKind::Srv,
                "8081 db-0.db.ns1.svc.cluster.local 2 | 8081 db-1.db.ns1.svc.cluster.local 1",
            ),
            ("_other._tcp.db.ns1.svc.cluster.local", QueryKind::Srv, "forward"),
            ("_sql._udp.db.ns1.svc.cluster.local", QueryKind::Srv, "forward"),
            ("_sql._tcp.db.ns1.svc.cluster.local", QueryKind::A, "forward"),
            ("google.com", QueryKind::Other, "[none of google.com]"),
            ("elsewhere.net", QueryKind::Other, "forward"),
        ];
        for (name, kind, expected) in table {
            assert_eq!(plan(&SEARCH, name, kind), expected, "{name} {kind:?}");
        }
    }

    #[test]
    fn a_pod_with_its_own_search_domains_is_asked_for_nothing_else() {
        // `dnsPolicy: Default` or `None`: no domain of the cluster, so nothing is completed by one.
        for name in ["web", "web.ns1", "web.ns1.svc", "google.com"] {
            assert_eq!(plan(&["corp.example"], name, QueryKind::A), "forward", "{name}");
        }
        assert_eq!(plan(&[], "web.ns1.svc.cluster.local", QueryKind::A), "10.0.0.1");
        // A cluster whose domain nobody has set is known by the pod's own search domains.
        let other = ["ns1.svc.other.domain", "svc.other.domain", "other.domain"];
        assert_eq!(plan(&other, "remote", QueryKind::A), "10.0.0.30");
        assert_eq!(plan(&other, "www.google.com.other.domain", QueryKind::A), "www.google.com > 240.0.0.4");
        assert_eq!(plan(&["ns2.svc.cluster.local"], "web", QueryKind::A), "10.0.0.2", "another namespace first");
    }

    #[test]
    fn what_is_asked_of_a_control_plane_that_tells_only_when_asked() {
        let store = Store::new("".into(), "".into(), true);
        store.replace(Facts { services: vec![service("ns1", "web", "10.0.0.1", &[])], ..Facts::default() });
        let (snapshot, asks) = (store.load(), workload("ns1", "client", "10.9.9.9"));
        let search = SearchDomain::list(&SEARCH.map(str::to_owned), "ns1", "cluster.local");
        let context = LookupContext {
            snapshot: &snapshot,
            workload: &asks,
            search: &search,
            cluster_domain: "cluster.local",
            preferred_namespace: "",
            ipv6: true,
        };
        let asked = |name: &str| wanted(&context, name).map(|wanted| wanted.to_string()).unwrap_or_default();
        assert_eq!(asked("web.ns1.svc.cluster.local"), "", "it is known");
        assert!(asked("api.ns2.svc.cluster.local").contains("ns2/api.ns2.svc.cluster.local"));
        assert!(asked("pod-0.api.ns2.svc.cluster.local").contains("ns2/api.ns2.svc.cluster.local"));
        assert!(asked("host.example").contains("ns1/host.example"));
        // It may be a pod of a service, or a host that the pod's resolver has completed.
        assert!(asked("host.example.ns1.svc.cluster.local").contains("ns1/example.ns1.svc.cluster.local"));
        assert!(asked("www.host.example.ns1.svc.cluster.local").contains("ns1/www.host.example"));
        assert_eq!(asked("localhost"), "");
    }
}
