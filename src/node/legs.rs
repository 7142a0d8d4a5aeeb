//! Rules for the connections that the daemon itself opens and accepts in a pod. They are a table beside the
//! redirection, and the same whichever program writes that. This table captures nothing; pods work without it, except
//! in the cases described at each chain.

use super::nft::{self, NftError};
use super::routes::{MASK, RETURN_MARK};
use super::table_owner;
use crate::connection::dial::direct::LEG_BIT;
use crate::ports::{DNS, OUTBOUND, PLAINTEXT};
use crate::sys::netns::Netns;
use crate::telemetry::limit::LogLimit;
use std::sync::LazyLock;

/// Name of the table.
pub const TABLE: &str = "culvert_legs";

/// Conntrack zone of connections that the daemon opens with a client's address.
const ZONE: u16 = 2;

/// Writes the table, with the node's tag, the mark of our packets, and whether the pod's DNS is captured. Returns
/// whether it was written. A failure is logged, and the pod is captured all the same.
pub async fn write(netns: &Netns, node_tag: &str, mark: u32, dns: bool) -> bool {
    let Err(first) = nft::apply(netns, &table(node_tag, mark, dns, true)).await else { return true };
    static LIMIT: LazyLock<LogLimit> = LazyLock::new(LogLimit::default);
    let (netns_path, suppressed) = (netns.path().display(), LIMIT.allow());
    if let Err(error) = nft::apply(netns, &table(node_tag, mark, dns, false)).await {
        if let Some(suppressed) = suppressed {
            tracing::warn!(
                netns = %netns_path,
                %error,
                suppressed,
                "cannot write the rules for the daemon's own connections: connections of one client to the pod may collide, and the pod's own NAT may lose them"
            );
        }
        return false;
    }
    if let Some(suppressed) = suppressed {
        tracing::info!(
            netns = %netns_path,
            error = %first,
            suppressed,
            "the kernel lacks nft_tproxy: a client that opens two connections to the pod from the same port may hang"
        );
    }
    true
}

/// Removes the table.
pub async fn remove(netns: &Netns) -> Result<(), NftError> {
    nft::apply(netns, &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")).await
}

fn table(node_tag: &str, mark: u32, dns: bool, tproxy: bool) -> String {
    let mut chains = legs(mark) + &no_loop(mark, dns) + &if tproxy { same_ports() } else { String::new() };
    chains += &table_owner::chain(node_tag);
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}}}\n")
}

/// A chain that accepts what its rules do not decide.
pub fn chain(name: &str, hook: &str, priority: i32, rules: &str) -> String {
    format!("  chain {name} {{\n    type filter hook {hook} priority {priority}; policy accept;\n{rules}  }}\n")
}

/// Connections that the daemon opens with a client's address. They have their own conntrack zone, because the client
/// may have a connection with the same ports, and the two would be taken for one. Their replies return to the daemon
/// whatever route leads to the client, also from behind the pod's own NAT (a guest, a nested container).
fn legs(mark: u32) -> String {
    let leg = format!("meta mark & {:#x} == {:#x}", MASK | LEG_BIT, mark | LEG_BIT);
    let marked = format!("ct mark & {LEG_BIT:#x} == {LEG_BIT:#x}");
    chain("leg_raw", "output", -300, &format!("    {leg} ct original zone set {ZONE}\n"))
        + &chain("leg_out", "output", -160, &format!("    {leg} ct mark set ct mark | {LEG_BIT:#x}\n"))
        + &chain(
            "leg_back",
            "prerouting",
            -140,
            &format!("    ct direction reply {marked} meta mark set {RETURN_MARK:#x}\n"),
        )
}

/// Packets of the daemon never reach a listener of the daemon again, whatever address or translation they take, except
/// at the tunnel port. The pod's DNS server ignores packets from outside that claim the pod's own address.
fn no_loop(mark: u32, dns: bool) -> String {
    let ours = format!("meta mark & {MASK:#x} == {mark:#x}");
    let mut rules = format!("    {ours} tcp dport {{ {OUTBOUND}, {PLAINTEXT} }} reject with tcp reset\n");
    if dns {
        rules += &format!("    {ours} tcp dport {DNS} reject with tcp reset\n    {ours} udp dport {DNS} reject\n");
        rules += &no_spoofed_questions();
    }
    chain("no_loop", "input", -160, &rules)
}

/// A rule that drops packets to the pod's DNS server that come from outside with the pod's own source address: the
/// kernel drops them for IPv4 only. For IPv6, the interface that our socket reports is the one that has the address,
/// even for packets from the loopback interface, so the server cannot tell them apart.
pub fn no_spoofed_questions() -> String {
    format!("    iifname != lo fib saddr type local meta l4proto {{ tcp, udp }} th dport {DNS} drop\n")
}

/// Connections from one client address and port to several ports of the pod. Once translated to one listener port, they
/// would have equal addresses, so the kernel gives the later ones another source port. But it looks up the socket by
/// the old port before that (early demultiplexing), and finds the first connection's. So this chain assigns a SYN to
/// its listener, and sets the new port of other packets before the lookup.
fn same_ports() -> String {
    let first = "tcp flags & (fin | syn | rst | ack) == syn";
    let taken = |ports: &str| format!("iifname != lo tcp dport {ports} ct direction original ct status dnat");
    let mut rules = String::new();
    for port in [OUTBOUND, PLAINTEXT] {
        for (protocol, family) in [("ipv4", "ip"), ("ipv6", "ip6")] {
            let taken = taken(&port.to_string());
            // No connection comes from port 0, so the lookup finds the listener and nothing else.
            rules +=
                &format!("    meta nfproto {protocol} {taken} {first} tcp sport set 0 tproxy {family} to :{port}\n");
        }
    }
    rules += &format!("    {} tcp sport set ct reply proto-dst\n", taken(&format!("{{ {OUTBOUND}, {PLAINTEXT} }}")));
    chain("same_ports", "prerouting", -90, &rules)
}
