//! A workload: one pod, virtual machine or external endpoint as the mesh facts describe it.

use super::address::GatewayRef;
use super::name::{NameError, ServiceKey, SpiffeName, Text};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::OnceLock;

/// How a workload accepts traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Plain TCP on the destination port.
    Tcp,
    /// HBONE on its port 15008.
    Hbone,
    /// With a tunnel protocol that this version does not speak. Connections to the workload are refused, with this
    /// reason.
    Unsupported,
}

/// Whether a workload has IP addresses of its own or uses those of its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// Its addresses are its own.
    #[default]
    Standard,
    /// It uses its node's addresses, so these do not identify a workload.
    HostNetwork,
}

/// The health of a workload, as the control plane announces it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// The workload is ready for traffic.
    #[default]
    Healthy,
    /// The workload is not ready.
    Unhealthy,
}

/// The kind of object that owns a workload; used in telemetry only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadType {
    /// A Deployment, the default value of the protocol.
    #[default]
    Deployment,
    /// A CronJob.
    CronJob,
    /// A pod without owner.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadType {
    /// The lower-case word that baggage headers and dumps use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Region, zone and subzone; each is empty if unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locality {
    /// Region.
    pub region: Text,
    /// Zone within the region.
    pub zone: Text,
    /// Subzone within the zone.
    pub subzone: Text,
}

/// How streams are delivered to an application tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Unchanged.
    Plain,
    /// With a PROXY protocol header in front.
    Proxy,
    /// In a way that this version does not know. The streams are refused.
    Unsupported,
}

/// A listener inside the workload that receives the workload's inbound streams instead of the original port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// How streams are delivered.
    pub delivery: Delivery,
    /// The listener's port; `None` if streams keep their own port.
    pub port: Option<u16>,
}

/// A port map of a service: service port to target port.
pub type Ports = BTreeMap<u16, u16>;

/// The unique id that istiod gives a pod (source: istiod's ambient index).
pub fn pod_uid(cluster: &str, namespace: &str, name: &str) -> Text {
    format!("{cluster}//Pod/{namespace}/{name}").into()
}

/// The identity of a workload, once somebody has asked for it. A copy of a workload may be changed, so it does not take
/// the identity with it.
#[derive(Debug, Default)]
pub struct KnownIdentity(OnceLock<SpiffeName>);

impl Clone for KnownIdentity {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for KnownIdentity {
    /// It says nothing that the workload does not say.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for KnownIdentity {}

/// One workload, whether it is in the mesh or only announced by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique id, e.g. `cluster1//Pod/retail/shop-0`.
    pub uid: Text,
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Trust domain of its identity.
    pub trust_domain: Text,
    /// Service account of its identity.
    pub service_account: Text,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The network of its addresses.
    pub network: Text,
    /// How it accepts traffic.
    pub protocol: Protocol,
    /// Whether its addresses are its own.
    pub network_mode: NetworkMode,
    /// The waypoint of the workload itself.
    pub waypoint: Option<GatewayRef>,
    /// The gateway through which other networks reach it.
    pub network_gateway: Option<GatewayRef>,
    /// Canonical name, for telemetry.
    pub canonical_name: Text,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Text,
    /// Name of the owning object, for telemetry.
    pub workload_name: Text,
    /// Kind of the owning object.
    pub workload_type: WorkloadType,
    /// Host name that is resolved if the workload has no address.
    pub hostname: Text,
    /// Node on which it runs.
    pub node: Text,
    /// Whether it terminates HBONE itself.
    pub native_tunnel: bool,
    /// The listener that receives its inbound streams instead of the original port.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Keys of the policies that select this workload.
    pub policies: Vec<Text>,
    /// Its health.
    pub health: Health,
    /// Cluster id.
    pub cluster_id: Text,
    /// Region, zone and subzone in which it runs.
    pub locality: Locality,
    /// The services of which it is an endpoint, with its port map for each.
    pub services: BTreeMap<ServiceKey, Ports>,
    /// Relative weight among the endpoints of a service.
    pub capacity: u32,
    /// What [`Workload::identity`] has given before.
    pub known: KnownIdentity,
}

impl Workload {
    /// The name to show: the canonical one if it has none of its own.
    pub fn shown_name(&self) -> &Text {
        if self.name.is_empty() { &self.canonical_name } else { &self.name }
    }

    /// The identity that this workload must present. All who ask share one name.
    pub fn identity(&self) -> Result<SpiffeName, NameError> {
        // Compared, because the workload may have been made of another one, with other names.
        if let Some(known) = self.known.0.get().filter(|known| self.has_identity(known)) {
            return Ok(known.clone());
        }
        let new = SpiffeName::new(&self.trust_domain, &self.namespace, &self.service_account)?;
        // Fails if it has been set meanwhile.
        let _ = self.known.0.set(new.clone());
        Ok(new)
    }

    /// Whether `identity` is the one that this workload must present.
    pub fn has_identity(&self, identity: &SpiffeName) -> bool {
        self.service_account == identity.service_account
            && self.namespace == identity.namespace
            && self.trust_domain == identity.trust_domain
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::snapshot::tests::workload;

    #[test]
    fn all_who_ask_for_an_identity_share_it_and_a_changed_workload_has_its_own() {
        let one = workload("a", "one", "10.0.0.1");
        let first = one.identity().unwrap();
        assert!(std::ptr::eq(&*one.identity().unwrap(), &*first));
        for other in
            [Workload { namespace: "b".into(), ..one.clone() }, Workload { service_account: "other".into(), ..one }]
        {
            let expected = format!("spiffe://cluster.local/ns/{}/sa/{}", other.namespace, other.service_account);
            assert_eq!(other.identity().unwrap().to_string(), expected);
            assert_eq!(other.identity().unwrap().to_string(), expected);
        }
    }
}
