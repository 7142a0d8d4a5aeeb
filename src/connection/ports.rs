//! Ports on which the daemon listens in every captured pod. They are fixed: Istio and other ztunnels expect the same
//! ones.

/// Connections that the pod opens are redirected to this port.
pub const OUTBOUND_PORT: u16 = 15001;

/// Plaintext connections to the pod are redirected to this port.
pub const PLAINTEXT_PORT: u16 = 15006;

/// HBONE tunnels to the pod, and to any other pod of the mesh, are opened to this port.
pub const HBONE_PORT: u16 = 15008;

/// All of the daemon's ports. The last one, for DNS, belongs to the daemon only where it captures the pod's DNS;
/// otherwise the application may use it.
const ALL: [u16; 4] = [OUTBOUND_PORT, PLAINTEXT_PORT, HBONE_PORT, crate::dns::PORT];

/// The daemon's ports in a pod; `dns` says whether the pod's DNS is captured.
pub fn own_ports(dns: bool) -> &'static [u16] {
    match (&ALL, dns) {
        (all, true) => all,
        ([without @ .., _], false) => without,
    }
}
