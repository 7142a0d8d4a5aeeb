//! Rules for what the daemon itself opens and accepts in a pod: a table beside the redirection, the same whoever writes that. It
//! captures nothing. Without it pods work as well, but for the cases that are named at each chain.

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

/// Conntrack zone of connections in a client's name.
const ZONE: u16 = 2;

/// Writes the table; `whose` is the node it is for, `mark` the one of our packets, `dns` whether the pod's DNS is taken. A pod is captured also where that fails: it is logged.
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
                "connections of one client to the pod may get into each other's way, and the pod's own NAT may lose them"
            );
        }
        return false;
    }
    if let Some(suppressed) = suppressed {
        tracing::info!(
            netns = %netns_path,
            error = %first,
            suppressed,
            "without nft_tproxy in the kernel, a client that uses one port of its own for two connections to the pod may hang"
        );
    }
    true
}

/// Removes it.
pub async fn remove(netns: &Netns) -> Result<(), NftError> {
    nft::apply(netns, &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")).await
}

fn table(node_tag: &str, mark: u32, dns: bool, tproxy: bool) -> String {
    let mut chains = legs(mark) + &no_loop(mark, dns) + &if tproxy { same_ports() } else { String::new() };
    chains += &table_owner::chain(node_tag);
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}}}\n")
}

fn chain(name: &str, hook: &str, priority: i32, rules: &str) -> String {
    format!("  chain {name} {{\n    type filter hook {hook} priority {priority}; policy accept;\n{rules}  }}\n")
}

/// Connections that we open in a client's name. They have a conntrack zone of their own, else one of the client's with the same port
/// would be taken for them, and be broken. Their answers come to us also from behind the pod's own NAT (a guest, a nested
/// container), whatever route leads to the client.
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

/// What we have sent never comes to a listener of ours again, by whatever address or translation, but for tunnels. The pod's DNS
/// takes nothing in the pod's name that comes from outside.
fn no_loop(mark: u32, dns: bool) -> String {
    let ours = format!("meta mark & {MASK:#x} == {mark:#x}");
    let mut rules = format!("    {ours} tcp dport {{ {OUTBOUND}, {PLAINTEXT} }} reject with tcp reset\n");
    if dns {
        rules += &format!("    {ours} tcp dport {DNS} reject with tcp reset\n    {ours} udp dport {DNS} reject\n");
        // Whoever asks us in the pod's name from outside: the kernel drops that for IPv4 alone. The interface that our socket is
        // told of is, for IPv6, the one that has the address, also where it came by the loopback.
        rules += &format!("    iifname != lo fib saddr type local meta l4proto {{ tcp, udp }} th dport {DNS} drop\n");
    }
    chain("no_loop", "input", -160, &rules)
}

/// Connections from one address and port to several ports of the pod. Translated to one port of ours, they would be the same; so
/// the kernel gives the later ones another source port, but only after it has looked for their socket by the old one (early
/// demultiplexing), and has found the first connection's. So a SYN is given its listener here, and other packets have the new
/// port already when their socket is looked for.
fn same_ports() -> String {
    let first = "tcp flags & (fin | syn | rst | ack) == syn";
    let taken = |ports: &str| format!("iifname != lo tcp dport {ports} ct direction original ct status dnat");
    let mut rules = String::new();
    for port in [OUTBOUND, PLAINTEXT] {
        for (protocol, family) in [("ipv4", "ip"), ("ipv6", "ip6")] {
            let taken = taken(&port.to_string());
            // No connection comes from port 0, so that the listener is found and nothing else.
            rules +=
                &format!("    meta nfproto {protocol} {taken} {first} tcp sport set 0 tproxy {family} to :{port}\n");
        }
    }
    rules += &format!("    {} tcp sport set ct reply proto-dst\n", taken(&format!("{{ {OUTBOUND}, {PLAINTEXT} }}")));
    chain("same_ports", "prerouting", -90, &rules)
}
