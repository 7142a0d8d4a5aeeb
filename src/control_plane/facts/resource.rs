//! Mesh facts as resources of the catalog.

use crate::control::xds::encode;
use crate::control_plane::catalog::Resource;
use crate::mesh::address::NetworkAddress;
use crate::mesh::workload::NetworkMode;
use crate::mesh::{Policy, Service, Text, Workload};
use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use std::fmt::Write;

/// Bytes of the hash that make a version.
const VERSION_BYTES: usize = 8;

/// The resource of a workload.
pub fn workload(workload: &Workload, services: Vec<Text>) -> Resource {
    // Several workloads share the address of a host, so that it finds none of them.
    let own = if workload.network_mode == NetworkMode::HostNetwork { &[] } else { workload.ips.as_slice() };
    let alias = |ip: &std::net::IpAddr| Text::from(format!("{}/{ip}", workload.network).as_str());
    let aliases = own.iter().map(alias).collect();
    let content = encode::workload(workload);
    Resource { version: version(&content), content, aliases, services, node: workload.node.clone() }
}

/// The resource of a service.
pub fn service(service: &Service) -> Resource {
    let content = encode::service(service);
    let alias = |vip: &NetworkAddress| Text::from(vip.to_string().as_str());
    let aliases = service.vips.iter().map(alias).collect();
    Resource { version: version(&content), content, aliases, services: Vec::new(), node: "".into() }
}

/// The resource of a policy.
pub fn policy(policy: &Policy) -> Resource {
    let content = encode::policy(policy);
    let version = version(&content);
    Resource { version, content, aliases: Vec::new(), services: Vec::new(), node: "".into() }
}

/// The version of a content: the same in every replica, and in every release that encodes the same.
fn version(content: &Bytes) -> Text {
    let mut text = String::with_capacity(2 * VERSION_BYTES);
    for byte in digest(&SHA256, content).as_ref().iter().take(VERSION_BYTES) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text.as_str().into()
}
