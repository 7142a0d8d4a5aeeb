//! Changes of the facts, and how they are applied to a snapshot.
//!
//! Applying changes one after another gives the same snapshot as receiving the resulting facts at once, in whatever
//! order. The property test of this file checks that.

use super::address::{NetworkAddress, NetworkCidr};
use super::egress::EgressPolicy;
use super::fact_key::FactKey;
use super::name::{ServiceKey, Text};
use super::policy::{Policy, PolicyScope};
use super::service::Service;
use super::snapshot::{Endpoints, Facts, Snapshot, Synced};
use super::workload::{NetworkMode, Workload};
use std::sync::Arc;

/// A change of the facts. Removals are applied before additions.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// Uids of removed workloads.
    pub gone_workloads: Vec<Text>,
    /// Keys of removed services.
    pub gone_services: Vec<ServiceKey>,
    /// Keys of removed policies.
    pub gone_policies: Vec<Text>,
    /// New workloads, and new versions of known ones.
    pub workloads: Vec<Workload>,
    /// New services, and new versions of known ones.
    pub services: Vec<Service>,
    /// New policies, and new versions of known ones.
    pub policies: Vec<Policy>,
    /// All egress policies, if they have changed.
    pub egress: Option<Vec<EgressPolicy>>,
    /// Keys that were asked for and do not exist. Ranges are included once they are answered, whatever the answer.
    pub absent: Vec<FactKey>,
    /// Earlier `absent` keys that must be asked for again when they are needed.
    pub forgotten: Vec<FactKey>,
    /// Which facts have been received completely; `None` if that has not changed.
    pub synced: Option<Synced>,
}

impl Update {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.gone_workloads.is_empty()
            && self.gone_services.is_empty()
            && self.gone_policies.is_empty()
            && self.workloads.is_empty()
            && self.services.is_empty()
            && self.policies.is_empty()
            && self.egress.is_none()
            && self.absent.is_empty()
            && self.forgotten.is_empty()
            && self.synced.is_none()
    }
}

impl From<Facts> for Update {
    fn from(facts: Facts) -> Self {
        let Facts { workloads, services, policies, egress } = facts;
        let (egress, synced) = (Some(egress), Some(Synced::ALL));
        Self { workloads, services, policies, egress, synced, ..Self::default() }
    }
}

impl Snapshot {
    /// A snapshot of exactly these facts.
    #[cfg(any(test, fuzzing))]
    pub fn build(version: u64, facts: Facts) -> Self {
        let mut snapshot = Self::default();
        snapshot.apply(version, facts.into());
        snapshot
    }

    /// Applies an update, which makes this the snapshot of `version`.
    pub fn apply(&mut self, version: u64, update: Update) {
        self.version = version;
        self.synced = update.synced.unwrap_or(self.synced);
        if !update.policies.is_empty() || !update.gone_policies.is_empty() {
            self.policies_version = version;
        }
        for uid in update.gone_workloads {
            self.remove_workload(&uid);
        }
        for key in update.gone_services {
            self.remove_service(&key);
        }
        for key in update.gone_policies {
            self.remove_policy(&key);
        }
        // Keys of facts that are added are no longer known to be absent. When they are removed later, they must be
        // asked for again.
        let mut came = Vec::new();
        if self.absent.is_some() {
            came.extend(update.workloads.iter().flat_map(names_of_workload));
            came.extend(update.services.iter().flat_map(names_of_service));
        }
        for service in update.services {
            self.remove_service(&service.key);
            self.add_service(service);
        }
        for workload in update.workloads {
            self.remove_workload(&workload.uid);
            self.add_workload(workload);
        }
        for policy in update.policies {
            self.remove_policy(&policy.key);
            self.add_policy(policy);
        }
        if let Some(egress) = update.egress {
            self.egress = Arc::new(egress.into_iter().collect());
        }
        if let Some(absent) = &mut self.absent {
            for wanted in &came {
                absent.remove_mut(wanted);
            }
            for wanted in &update.forgotten {
                absent.remove_mut(wanted);
            }
            update.absent.into_iter().for_each(|wanted| absent.insert_mut(wanted));
        }
    }

    fn add_service(&mut self, service: Service) {
        let service = Arc::new(service);
        for vip in &service.vips {
            self.by_vip.add(vip.clone(), &service);
        }
        for cidr in ranges(&service) {
            *self.cidr_lengths.entry(length(&cidr)).or_default() += 1;
            self.by_cidr.add(cidr, &service);
        }
        self.by_hostname.add(service.key.hostname.clone(), &service);
        self.services.insert_mut(service.key.clone(), service);
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(service) = self.services.get(key).cloned() else { return };
        self.services.remove_mut(key);
        for vip in &service.vips {
            self.by_vip.remove(vip, &service);
        }
        for cidr in ranges(&service) {
            self.by_cidr.remove(&cidr, &service);
            let length = length(&cidr);
            let left = self.cidr_lengths.get(&length).map_or(0, |count| count.saturating_sub(1));
            if left == 0 {
                self.cidr_lengths.remove(&length);
            } else {
                self.cidr_lengths.insert(length, left);
            }
        }
        self.by_hostname.remove(&service.key.hostname, &service);
    }

    fn add_workload(&mut self, workload: Workload) {
        let workload = Arc::new(workload);
        for address in addresses(&workload) {
            self.by_address.add(address, &workload);
        }
        for key in workload.services.keys() {
            match self.endpoints.get_mut(key) {
                Some(endpoints) => {
                    endpoints.by_uid.insert_mut(workload.uid.clone(), workload.clone());
                    endpoints.version = self.version;
                }
                None => {
                    let mut endpoints = Endpoints { version: self.version, ..Endpoints::default() };
                    endpoints.by_uid.insert_mut(workload.uid.clone(), workload.clone());
                    self.endpoints.insert_mut(key.clone(), endpoints);
                }
            }
        }
        if let Some(host) = host(&workload) {
            self.by_workload_host.add(host, &workload);
        }
        self.by_pod.add((workload.namespace.clone(), workload.name.clone()), &workload);
        self.workloads.insert_mut(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &Text) {
        let Some(workload) = self.workloads.get(uid).cloned() else { return };
        self.workloads.remove_mut(uid);
        for address in addresses(&workload) {
            self.by_address.remove(&address, &workload);
        }
        for key in workload.services.keys() {
            let Some(endpoints) = self.endpoints.get_mut(key) else { continue };
            endpoints.by_uid.remove_mut(uid);
            endpoints.version = self.version;
            if endpoints.by_uid.is_empty() {
                self.endpoints.remove_mut(key);
            }
        }
        if let Some(host) = host(&workload) {
            self.by_workload_host.remove(&host, &workload);
        }
        self.by_pod.remove(&(workload.namespace.clone(), workload.name.clone()), &workload);
    }

    fn add_policy(&mut self, policy: Policy) {
        let policy = Arc::new(policy);
        match policy.scope {
            PolicyScope::Global => self.global_policies.add((), &policy),
            PolicyScope::Namespace => self.namespace_policies.add(policy.namespace.clone(), &policy),
            PolicyScope::WorkloadSelector => {}
        }
        self.policies.insert_mut(policy.key.clone(), policy);
    }

    fn remove_policy(&mut self, key: &Text) {
        let Some(policy) = self.policies.get(key).cloned() else { return };
        self.policies.remove_mut(key);
        match policy.scope {
            PolicyScope::Global => self.global_policies.remove(&(), &policy),
            PolicyScope::Namespace => self.namespace_policies.remove(&policy.namespace, &policy),
            PolicyScope::WorkloadSelector => {}
        }
    }
}

/// The addresses that identify the workload. A workload in its node's network has none.
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    let own = workload.network_mode == NetworkMode::Standard;
    let ips = if own { workload.ips.as_slice() } else { &[] };
    ips.iter().map(|ip| NetworkAddress { network: workload.network.clone(), ip: *ip })
}

/// The keys under which a workload may have been asked for.
fn names_of_workload(workload: &Workload) -> Vec<FactKey> {
    let mut names: Vec<FactKey> = addresses(workload).map(FactKey::Address).collect();
    names.push(FactKey::Workload(workload.uid.clone()));
    names.extend(host(workload).map(|(namespace, hostname)| FactKey::Service(ServiceKey { namespace, hostname })));
    names
}

/// The keys under which a service may have been asked for.
fn names_of_service(service: &Service) -> Vec<FactKey> {
    let addresses = service.vips.iter().cloned().map(FactKey::Address);
    addresses.chain([FactKey::Service(service.key.clone())]).collect()
}

fn host(workload: &Workload) -> Option<(Text, Text)> {
    let named = !workload.hostname.is_empty();
    named.then(|| (workload.namespace.clone(), workload.hostname.clone()))
}

/// The ranges of a service, with the host bits cleared.
fn ranges(service: &Service) -> impl Iterator<Item = NetworkCidr> {
    service.cidrs.iter().map(|c| NetworkCidr { network: c.network.clone(), range: c.range.trunc() })
}

fn length(cidr: &NetworkCidr) -> (bool, u8) {
    (cidr.range.addr().is_ipv4(), cidr.range.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::super::address::parse_network_cidr;
    use super::super::policy::Action;
    use super::super::snapshot::tests::{service, workload};
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// A change of one of a few objects, whose versions share addresses, host names, names and services with each
    /// other.
    #[derive(Clone, Debug)]
    enum Step {
        Workload(u8, u8, u8, bool),
        Service(u8, u8, u8),
        Policy(u8, u8),
        DropWorkload(u8),
        DropService(u8),
        DropPolicy(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..5u8, 0..4u8, 0..4u8, any::<bool>()).prop_map(|(a, b, c, d)| Step::Workload(a, b, c, d)),
            (0..4u8, 0..3u8, 0..4u8).prop_map(|(a, b, c)| Step::Service(a, b, c)),
            (0..3u8, 0..3u8).prop_map(|(a, b)| Step::Policy(a, b)),
            (0..5u8).prop_map(Step::DropWorkload),
            (0..4u8).prop_map(Step::DropService),
            (0..3u8).prop_map(Step::DropPolicy),
        ]
    }

    fn key_of(id: u8) -> ServiceKey {
        service(["a", "b"][usize::from(id % 2)], &format!("s{id}"), "10.9.0.1", &[(80, 80)]).key
    }

    fn make_workload(id: u8, ip: u8, services: u8, hbone: bool) -> Workload {
        let mut made = workload("a", &format!("w{}", id % 3), &format!("10.0.0.{ip}"));
        let kind = if id.is_multiple_of(2) { "/Pod" } else { "networking.istio.io/WorkloadEntry" };
        made.uid = format!("c{id}/{kind}/a/w{id}").into();
        made.hostname = if ip == 3 { "host".into() } else { "".into() };
        made.network_mode = if ip == 2 { NetworkMode::HostNetwork } else { NetworkMode::Standard };
        made.protocol = if hbone { super::super::Protocol::Hbone } else { super::super::Protocol::Tcp };
        made.services = (0..services).map(|s| (key_of(s), [(80, u16::from(ip) + 1)].into())).collect();
        made
    }

    fn make_service(id: u8, vip: u8, kind: u8) -> Service {
        let key = key_of(id);
        let mut made = service(&key.namespace, &format!("s{id}"), &format!("10.9.0.{vip}"), &[(80, 80)]);
        made.canonical = kind.is_multiple_of(2);
        if kind > 1 {
            made.vips.clear();
            made.cidrs = vec![parse_network_cidr(&format!("/10.{vip}.0.7/{}", 8 * kind)).unwrap()];
        }
        made
    }

    fn make_policy(id: u8, scope: u8) -> Policy {
        Policy {
            name: format!("p{id}").into(),
            namespace: "a".into(),
            key: format!("a/p{id}").into(),
            scope: [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector][usize::from(scope)],
            action: Action::Deny,
            dry_run: false,
            rules: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn applying_changes_equals_learning_the_result(steps in prop::collection::vec((step(), any::<bool>()), 0..60)) {
            let (mut workloads, mut services, mut policies) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
            let (mut snapshot, mut pending) = (Snapshot::default(), Update::default());
            for (step, flush) in steps {
                // Removals are applied first, so the order would matter if an update contained an object twice.
                snapshot.apply(1, std::mem::take(&mut pending));
                match step {
                    Step::Workload(id, ip, count, hbone) => {
                        let made = make_workload(id, ip, count, hbone);
                        workloads.insert(made.uid.clone(), made.clone());
                        pending.workloads.push(made);
                    }
                    Step::Service(id, vip, kind) => {
                        let made = make_service(id, vip, kind);
                        services.insert(made.key.clone(), made.clone());
                        pending.services.push(made);
                    }
                    Step::Policy(id, scope) => {
                        let made = make_policy(id, scope);
                        policies.insert(made.key.clone(), made.clone());
                        pending.policies.push(made);
                    }
                    Step::DropWorkload(id) => {
                        let uid = make_workload(id, 0, 0, true).uid;
                        workloads.remove(&uid);
                        pending.gone_workloads.push(uid);
                    }
                    Step::DropService(id) => {
                        services.remove(&key_of(id));
                        pending.gone_services.push(key_of(id));
                    }
                    Step::DropPolicy(id) => {
                        let key = make_policy(id, 0).key;
                        policies.remove(&key);
                        pending.gone_policies.push(key);
                    }
                }
                if flush {
                    snapshot.apply(1, std::mem::take(&mut pending));
                }
            }
            snapshot.apply(1, pending);
            // The same facts, received at once and in reverse order.
            let facts = Facts {
                workloads: workloads.into_values().rev().collect(),
                services: services.into_values().rev().collect(),
                policies: policies.into_values().rev().collect(),
                ..Facts::default()
            };
            let rebuilt = Snapshot::build(1, facts);
            (snapshot.policies_version, snapshot.synced) = (rebuilt.policies_version, rebuilt.synced);
            prop_assert_eq!(snapshot, rebuilt);
        }
    }
}
