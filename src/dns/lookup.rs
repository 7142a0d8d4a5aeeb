//! What a name means to the pod that asks, decided from the mesh facts of one moment. Pure.
//!
//! A name is *ours* if a service of the mesh has it, or a pod behind a headless service. It is *perhaps ours* if it
//! only becomes a mesh name by completing parts that were left out. Such a name may exist elsewhere, so the pod's
//! resolver is asked first, and the mesh answers only if that one says that the name does not exist. Every other name
//! is forwarded.

use super::answer::{MeshAnswer, MeshRecord, QueryKind};
use crate::mesh::{FactKey, Service, ServiceKey, Snapshot, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Most addresses in one answer; more would not fit into any message.
const ADDRESSES_MAX: usize = 800;

/// How many labels are removed from a name, one after the other, to find a wildcard that matches it.
const WILDCARDS_MAX: usize = 16;

/// Labels of the longest name that may be a Kubernetes name with parts left out: `pod.service.namespace.svc`.
const SHORT_LABELS: usize = 4;

/// How many things at most must be requested from an on-demand control plane for one name.
pub const WANTED_MAX: usize = 2;

/// The pod that asks, and what its answer depends on.
#[derive(Clone, Copy, Debug)]
pub struct LookupContext<'a> {
    /// The mesh facts.
    pub snapshot: &'a Snapshot,
    /// The pod's workload.
    pub workload: &'a Workload,
    /// Search domains of the pod.
    pub search: &'a [SearchDomain],
    /// The configured domain of the cluster.
    pub cluster_domain: &'a str,
    /// Namespace that is preferred if several services have a name and none is in the pod's own namespace, canonical or
    /// named after its own namespace.
    pub preferred_namespace: &'a str,
    /// Whether answers contain IPv6 addresses.
    pub ipv6: bool,
}

/// A search domain of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchDomain {
    /// The domain, in lower case, without leading or trailing dots.
    pub domain: String,
    /// Whether it belongs to the cluster.
    pub of_cluster: bool,
}

impl SearchDomain {
    /// The search domains of a pod of `namespace`. Those at or below the configured cluster domain belong to the
    /// cluster, and so do those at or below a domain `x` if the list contains `<namespace>.svc.x`.
    pub fn list(domains: &[String], namespace: &str, cluster_domain: &str) -> Vec<Self> {
        let own_prefix = format!("{namespace}.svc.");
        let inferred: Vec<&str> = domains.iter().filter_map(|domain| domain.strip_prefix(&own_prefix)).collect();
        let is_below = |domain: &str, zone: &str| domain == zone || strip(domain, zone).is_some();
        let of_cluster =
            |domain: &str| is_below(domain, cluster_domain) || inferred.iter().any(|zone| is_below(domain, zone));
        domains.iter().map(|domain| Self { domain: domain.clone(), of_cluster: of_cluster(domain) }).collect()
    }
}

/// What to do with a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Ask the pod's resolvers.
    Forward,
    /// Give this answer.
    Answer(MeshAnswer),
    /// Ask the pod's resolvers. Give this answer if they say that the name does not exist, and also if they do not
    /// answer and it has records.
    ForwardOr(MeshAnswer),
}

/// The service or pod that a name stands for.
#[derive(Clone, Debug)]
struct NameOwner {
    service: Arc<Service>,
    /// One pod behind the service, if the name is the pod's.
    pod: Option<Arc<Workload>>,
    is_wildcard: bool,
}

/// The result of looking up a name.
struct NameMatch {
    owner: NameOwner,
    /// The name that was meant, if a resolver has appended a search domain to it.
    alias: Option<String>,
    /// Whether the name cannot exist outside the mesh.
    is_sure: bool,
}

/// Decides about a question for `name` (in lower case, without the final dot).
pub fn decide(context: &LookupContext<'_>, name: &str, kind: QueryKind) -> Plan {
    if kind == QueryKind::Srv && name.starts_with('_') {
        return ports(context, name).map_or(Plan::Forward, Plan::Answer);
    }
    let Some(NameMatch { owner, alias, is_sure }) = find(context, name) else { return Plan::Forward };
    let is_kubernetes = is_kubernetes(context, &owner.service);
    let records = match kind {
        QueryKind::A | QueryKind::Aaaa | QueryKind::Any => {
            addresses(context, &owner, kind).into_iter().map(MeshRecord::Address).collect()
        }
        _ => Vec::new(),
    };
    let zone = zone(&owner.service, is_kubernetes, alias.as_deref().unwrap_or(name));
    let answer = MeshAnswer { alias: alias.filter(|_| !owner.is_wildcard), records, zone };
    match kind {
        // On-demand control planes do not announce new endpoints: ask the resolver first.
        _ if owner.service.vips.is_empty() && !context.snapshot.announces_everything() => Plan::ForwardOr(answer),
        QueryKind::A | QueryKind::Aaaa | QueryKind::Any if is_sure => Plan::Answer(answer),
        // These records contain addresses too, which would bypass those of the mesh.
        QueryKind::Https if is_sure => Plan::Answer(answer),
        // Services of a cluster have only address and port records, and the cluster's DNS knows the port names.
        QueryKind::Other if is_sure && is_kubernetes => Plan::Answer(answer),
        // For example the mail exchangers of an external host.
        _ => Plan::ForwardOr(answer),
    }
}

/// What must be requested from an on-demand control plane before [`decide`] can be relied upon. When that has been
/// answered there may be more, up to [`WANTED_MAX`] in all.
pub fn wanted(context: &LookupContext<'_>, name: &str) -> Option<FactKey> {
    if context.snapshot.announces_everything() {
        return None;
    }
    // `service.namespace.svc.domain`, perhaps with a pod in front.
    let labels: Vec<&str> = name.split('.').collect();
    let of_cluster = labels.iter().position(|label| *label == "svc").filter(|at| (2..=3).contains(at)).and_then(|at| {
        let hostname = labels.get(at - 2..)?.join(".");
        Some(ServiceKey { namespace: (*labels.get(at - 1)?).into(), hostname: hostname.into() })
    });
    // The host of a ServiceEntry, perhaps with a search domain appended by the pod's resolver. Only those of the pod's
    // own namespace can be requested.
    let bare = context.search.iter().find_map(|search| strip(name, &search.domain)).unwrap_or(name);
    let is_host = bare.contains('.') && !bare.split('.').any(|label| label == "svc");
    let of_host = is_host.then(|| ServiceKey { namespace: context.workload.namespace.clone(), hostname: bare.into() });
    let unasked = |key| context.snapshot.unasked(FactKey::Service(key));
    of_cluster.into_iter().chain(of_host).find_map(unasked)
}

/// Finds the service or pod that a name stands for.
fn find(context: &LookupContext<'_>, name: &str) -> Option<NameMatch> {
    if let Some(owner) = exact(context, name).or_else(|| wildcard(context, name)) {
        return Some(NameMatch { owner, alias: None, is_sure: true });
    }
    if let Some(owner) = completed(context, name) {
        // Names without dots and names below `svc` do not exist outside the cluster.
        let is_sure = !name.contains('.') || name.ends_with(".svc");
        return Some(NameMatch { owner, alias: None, is_sure });
    }
    for SearchDomain { domain, of_cluster } in context.search {
        let (Some(bare), of_cluster) = (strip(name, domain), *of_cluster) else { continue };
        let matching = |owner, is_sure| Some(NameMatch { owner, alias: Some(bare.to_owned()), is_sure });
        match exact(context, bare).or_else(|| wildcard(context, bare)) {
            // A name in the cluster's domain that is not a service or pod there was completed by the pod's resolver.
            Some(owner) if of_cluster => return matching(owner, true),
            Some(owner) if bare.contains('.') => return matching(owner, false),
            _ => {}
        }
        if of_cluster && let Some(owner) = completed(context, bare) {
            return matching(owner, false);
        }
    }
    None
}

/// The name without this domain at its end; `None` if it does not end so, or nothing is left.
fn strip<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    name.strip_suffix(domain)?.strip_suffix('.').filter(|bare| !bare.is_empty())
}

/// The service with this host name, or the pod behind a headless service with this name.
fn exact(context: &LookupContext<'_>, name: &str) -> Option<NameOwner> {
    if let Some(service) = service(context, name) {
        return Some(NameOwner { service, pod: None, is_wildcard: false });
    }
    let (pod, rest) = name.split_once('.')?;
    let service = service(context, rest).filter(|service| service.vips.is_empty())?;
    let pod = endpoints(context, &service).into_iter().find(|workload| &*workload.name == pod)?;
    Some(NameOwner { service: service.clone(), pod: Some(pod), is_wildcard: false })
}

/// The service with the longest wildcard that matches a name.
fn wildcard(context: &LookupContext<'_>, name: &str) -> Option<NameOwner> {
    let mut rest = name;
    for _ in 0..WILDCARDS_MAX {
        let (_, parent) = rest.split_once('.')?;
        if let Some(service) = service(context, &format!("*.{parent}")) {
            return Some(NameOwner { service, pod: None, is_wildcard: true });
        }
        rest = parent;
    }
    None
}

/// The service or pod of the cluster that a short name becomes with one of the pod's search domains.
fn completed(context: &LookupContext<'_>, name: &str) -> Option<NameOwner> {
    if name.split('.').count() > SHORT_LABELS {
        return None;
    }
    let domains = context.search.iter().filter(|search| search.of_cluster);
    domains.map(|search| format!("{name}.{}", search.domain)).find_map(|whole| exact(context, &whole))
}

/// The visible service with this host name. The pod's own namespace comes first, then a canonical service, then one
/// that is named after its own namespace, then the preferred namespace, then any. Services without an address count only if they are Kubernetes services: endpoints of
/// other ones are in external DNS.
fn service(context: &LookupContext<'_>, hostname: &str) -> Option<Arc<Service>> {
    let namespace = &*context.workload.namespace;
    let has_records = |service: &&Arc<Service>| !service.vips.is_empty() || is_kubernetes(context, service);
    let claims = context.snapshot.services_by_hostname(hostname).iter();
    let visible = claims.filter(|s| s.visible_to(namespace)).filter(has_records);
    let of = |wanted: &str| visible.clone().find(|service| &*service.key.namespace == wanted);
    let canonical = || visible.clone().find(|service| service.canonical);
    let named = || visible.clone().find(|service| service.is_named_after_its_namespace());
    let preferred = || of(context.preferred_namespace);
    of(namespace).or_else(canonical).or_else(named).or_else(preferred).or_else(|| visible.clone().next()).cloned()
}

/// Whether a service is a Kubernetes service, by its host name, whatever the domain of its cluster.
fn is_kubernetes(context: &LookupContext<'_>, service: &Service) -> bool {
    let host = &*service.key.hostname;
    let below = |zone: &str| strip(host, zone).is_some_and(|rest| rest.ends_with(".svc"));
    let rest = host.strip_prefix(&*service.name).and_then(|rest| rest.strip_prefix('.'));
    let rest = rest.and_then(|rest| rest.strip_prefix(&*service.key.namespace));
    rest.is_some_and(|rest| rest.starts_with(".svc.")) || below(context.cluster_domain)
}

/// The zone of a negative answer. It always contains the name.
fn zone(service: &Service, is_kubernetes: bool, name: &str) -> String {
    let host = &*service.key.hostname;
    let zone = match host.split_once(".svc.") {
        Some((_, domain)) if is_kubernetes => domain,
        _ => host.strip_prefix("*.").unwrap_or(host),
    };
    if name == zone || strip(name, zone).is_some() { zone.to_owned() } else { name.to_owned() }
}

/// The endpoints of a headless service that its clients may see: in their network, and healthy unless the service
/// includes unhealthy ones.
fn endpoints(context: &LookupContext<'_>, service: &Service) -> Vec<Arc<Workload>> {
    let is_offered = |workload: &Workload| workload.network == context.workload.network && service.may_use(workload);
    let all = context.snapshot.endpoints(&service.key).map(|endpoint| endpoint.workload);
    all.filter(|workload| is_offered(workload)).cloned().collect()
}

/// The addresses in the answer to an address question.
fn addresses(context: &LookupContext<'_>, owner: &NameOwner, kind: QueryKind) -> Vec<IpAddr> {
    let is_wanted = |ip: &IpAddr| {
        let asked = if ip.is_ipv4() { kind != QueryKind::Aaaa } else { kind != QueryKind::A && context.ipv6 };
        asked && owner.service.is_offered_in(*ip) && !ip.is_unspecified()
    };
    // Only the first address of each family, or clients of a headless service would see one endpoint several times.
    let of_workload = |workload: &Workload| {
        let first = |v4: bool| workload.ips.iter().copied().filter(&is_wanted).find(|ip| ip.is_ipv4() == v4);
        [first(true), first(false)].into_iter().flatten().collect::<Vec<_>>()
    };
    match &owner.pod {
        Some(pod) => of_workload(pod),
        None if owner.service.vips.is_empty() => {
            let all = endpoints(context, &owner.service);
            all.iter().flat_map(|workload| of_workload(workload)).take(ADDRESSES_MAX).collect()
        }
        None => {
            let own = owner.service.vips.iter().filter(|vip| vip.network == context.workload.network);
            own.map(|vip| vip.ip).filter(is_wanted).collect()
        }
    }
}

/// The answer for `_port._tcp.service`: the port of each endpoint of a headless service, or the port of the service
/// itself. Control planes do not announce the names of ports; questions for unknown names are forwarded.
fn ports(context: &LookupContext<'_>, name: &str) -> Option<MeshAnswer> {
    let (port, rest) = name.strip_prefix('_')?.split_once("._tcp.")?;
    let service = service(context, rest)?;
    let number = *service.port_names.get(port)?;
    let owner = |pod: Option<Arc<Workload>>| NameOwner { service: service.clone(), pod, is_wildcard: false };
    let records = if service.vips.is_empty() {
        let record = |workload: Arc<Workload>| MeshRecord::Service {
            port: service.target_port(workload.services.get(&service.key), number).unwrap_or(number),
            target: format!("{}.{rest}", workload.name),
            addresses: addresses(context, &owner(Some(workload)), QueryKind::Any),
        };
        endpoints(context, &service).into_iter().take(ADDRESSES_MAX).map(record).collect()
    } else {
        let addresses = addresses(context, &owner(None), QueryKind::Any);
        vec![MeshRecord::Service { port: number, target: rest.to_owned(), addresses }]
    };
    let zone = zone(&service, is_kubernetes(context, &service), rest);
    Some(MeshAnswer { alias: None, records, zone })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::address::{parse_network_address, parse_network_cidr};
    use crate::mesh::service::{HealthPolicy, IpFamilies, LoadBalancer, LoadBalancingMode, Visibility};
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

    /// A mesh with one service of each kind, used by a pod of `ns1`.
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
                mode: LoadBalancingMode::Standard,
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
            // A foreign claim to the name of a Kubernetes service, in the preferred namespace and first by name.
            service("ns6", "claimed", "10.0.0.40", &[]),
            entry("ns5", "claimed.ns6.svc.cluster.local", &["/240.0.0.16"]),
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
        store.replace(Facts { workloads, services, ..Facts::default() });
        store
    }

    /// The plan in short: `a | b` for addresses, `none` for a negative answer, brackets if the resolver is asked first,
    /// `alias > …` if there is an alias.
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
            // Services by full and short names.
            ("web.ns1.svc.cluster.local", "10.0.0.1"),
            ("web.ns2.svc.cluster.local", "10.0.0.2"),
            ("web", "10.0.0.1"),
            ("web.ns1.svc", "10.0.0.1"),
            ("web.ns2.svc", "10.0.0.2"),
            ("web.ns1", "[10.0.0.1]"),
            ("web.ns2", "[10.0.0.2]"),
            ("nothing", "forward"),
            ("nothing.ns1.svc.cluster.local", "forward"),
            // A name that may exist elsewhere is not taken for a short name, but its completed form is ours.
            ("google.com", "[10.0.0.66]"),
            ("google.com.svc.cluster.local", "10.0.0.66"),
            // Hosts of ServiceEntries, also with a search domain appended.
            ("www.google.com", "240.0.0.4"),
            ("www.google.com.ns1.svc.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.svc.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.cluster.local", "www.google.com > 240.0.0.4"),
            ("www.google.com.corp.example", "[www.google.com > 240.0.0.4]"),
            ("www.google.com.ns2.svc.cluster.local", "forward"),
            ("web.corp.example", "forward"),
            ("web.ns2.ns1.svc.cluster.local", "[web.ns2 > 10.0.0.2]"),
            // Wildcards: the longest one, at any depth, without an alias. The parent itself does not match.
            ("a.wild.com", "240.0.0.5"),
            ("a.b.wild.com", "240.0.0.5"),
            ("a.deep.wild.com", "240.0.0.6"),
            ("wild.com", "forward"),
            ("a.wild.com.ns1.svc.cluster.local", "240.0.0.5"),
            // Several services of one name: own namespace, canonical, named after its own namespace, preferred
            // namespace; never one that is not visible.
            ("own.com", "240.0.0.11"),
            ("both.com", "240.0.0.9"),
            ("tied.com", "240.0.0.15"),
            ("claimed.ns6.svc.cluster.local", "10.0.0.40"),
            ("secret.com", "forward"),
            // Addresses of other networks are left out, and so are ranges and endpoints of external services.
            ("abroad.com", "none of abroad.com"),
            ("ranges.com", "forward"),
            ("nowhere.com", "forward"),
            // Headless services and their pods: in the same network, healthy, the first address of each.
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
    fn record_types_without_records_get_negative_answers() {
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
    fn only_the_pods_own_search_domains_complete_names() {
        // `dnsPolicy: Default` or `None`: no search domain of the cluster, so no name is completed with one.
        for name in ["web", "web.ns1", "web.ns1.svc", "google.com"] {
            assert_eq!(plan(&["corp.example"], name, QueryKind::A), "forward", "{name}");
        }
        assert_eq!(plan(&[], "web.ns1.svc.cluster.local", QueryKind::A), "10.0.0.1");
        // The domain of a cluster that is not configured is inferred from the pod's search domains.
        let other = ["ns1.svc.other.domain", "svc.other.domain", "other.domain"];
        assert_eq!(plan(&other, "remote", QueryKind::A), "10.0.0.30");
        assert_eq!(plan(&other, "www.google.com.other.domain", QueryKind::A), "www.google.com > 240.0.0.4");
        assert_eq!(plan(&["ns2.svc.cluster.local"], "web", QueryKind::A), "10.0.0.2", "another namespace first");
    }

    #[test]
    fn what_is_requested_from_an_on_demand_control_plane() {
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
        // This may be a pod of a service, or a host with a search domain appended.
        assert!(asked("host.example.ns1.svc.cluster.local").contains("ns1/example.ns1.svc.cluster.local"));
        assert!(asked("www.host.example.ns1.svc.cluster.local").contains("ns1/www.host.example"));
        assert_eq!(asked("localhost"), "");
    }
}
