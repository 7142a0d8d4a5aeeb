//! Every TCP and UDP port that the daemon listens on or gives a meaning to, defined once.
//!
//! Those inside a pod are part of Istio ambient's redirection (source: istio-cni's in-pod rules); those of the daemon's
//! own namespace are ztunnel's, so that probes, scrapers and `istioctl` find them.

use std::ops::{Range, RangeInclusive};

/// Admin pages, on loopback of the daemon's own namespace.
pub const ADMIN: u16 = 15000;
/// Metrics, on every address of the daemon's own namespace.
pub const STATS: u16 = 15020;
/// Readiness, on every address of the daemon's own namespace.
pub const READY: u16 = 15021;

/// Inside a pod: connections that the pod opens are redirected here.
pub const OUTBOUND: u16 = 15001;
/// Inside a pod: connections that arrive in plaintext are redirected here.
pub const PLAINTEXT: u16 = 15006;
/// Inside a pod: tunnels from peers arrive here. Also the port of a peer that tunnels are opened to.
pub const HBONE: u16 = 15008;
/// Inside a pod: DNS questions are redirected here. Answers from another port would not be translated back.
pub const DNS: u16 = 15053;

/// Inside a pod, on its loopback address only, and only if enabled: SOCKS5.
pub const SOCKS: u16 = 15080;

/// The ports that the daemon listens on in every captured pod. The last one belongs to it only where it captures the
/// pod's DNS; otherwise the application may use it.
const IN_POD: [u16; 4] = [OUTBOUND, PLAINTEXT, HBONE, DNS];

/// The daemon's ports in a pod; `dns` says whether the pod's DNS is captured.
pub fn in_pod(dns: bool) -> &'static [u16] {
    match (&IN_POD, dns) {
        (all, true) => all,
        ([without @ .., _], false) => without,
    }
}

/// Capture checks from inside a pod go to these ports, one each. There are several because two daemons listen during an
/// upgrade, and the kernel gives each connection to either of them.
pub const CAPTURE_CHECKS: Range<u16> = 15091..15099;
/// Capture checks from the node go to this port of the pod in plaintext.
pub const INBOUND_CHECK: u16 = CAPTURE_CHECKS.start;

/// Port of a pod to which `culvert doctor` sends packets with the address of kubelet probes, to see that they are
/// dropped. They are not counted as spoofed. Nothing needs to listen on it.
pub const DOCTOR_SPOOF: u16 = INBOUND_CHECK + 1;

/// The daemon's own connections inside a pod come from these ports where they are free. They lie above the range that
/// Linux chooses from by itself (`net.ipv4.ip_local_port_range` ends at 60999), because an application cannot listen on
/// a port that the daemon holds.
pub const OWN_CONNECTIONS: RangeInclusive<u16> = 61_000..=65_535;

/// Istio's control plane and CA, where no port is configured.
pub const ISTIOD: u16 = 15012;
