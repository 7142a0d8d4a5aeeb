//! The redirection inside a pod: one nftables table, replaced in one transaction, and the ip rule and route that bring
//! replies to foreign source addresses back to the daemon. It covers IPv4 and IPv6; IPv6 is left out where the network
//! namespace has none.
//!
//! The rules mean the same as Istio ambient's in-pod redirection. Connections that the application opens go to 15001,
//! its DNS to 15053, inbound plaintext to 15006. The daemon's own packets, and kubelet probes, are not redirected.

use super::legs;
use super::nft::{self, Listing, NftError, within};
use super::routes::{self, MASK, RETURN_MARK};
use super::spec::Interface;
use super::table_owner;
use super::takeover::{self, IstioRules};
use crate::connection::capture_checks::CAPTURE_CHECK_IPS;
use crate::ports::{DNS, HBONE, INBOUND_CHECK, OUTBOUND, PLAINTEXT};
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::{iptables, nftables};
use std::io;
use std::net::{IpAddr, SocketAddr};

/// Name of the table.
pub const TABLE: &str = "culvert";

/// What the redirection is to do.
#[derive(Clone, Debug)]
pub struct Redirection {
    /// Tag of the node that writes it.
    pub node_tag: String,
    /// What tells the daemon's own packets from the application's.
    pub own: OwnPackets,
    /// Whether IPv6 is used in the network namespace.
    pub ipv6: bool,
    /// Whether DNS is captured.
    pub dns: bool,
    /// Whether inbound plaintext is not redirected.
    pub bypass_inbound: bool,
    /// Ports of which inbound plaintext is not redirected.
    pub plaintext_ports: Vec<u16>,
    /// Inbound connections on these interfaces are redirected as outbound ones.
    pub virtual_interfaces: Vec<Interface>,
    /// Whether the source address of kubelet probes is let through. Only where the daemon assigns that address to
    /// probes does nobody else have it.
    pub probes: bool,
    /// Addresses of the pod. Connections on virtual interfaces are redirected to the first one of each family.
    pub addresses: Vec<IpAddr>,
    /// Whether the chains are deleted and created again, rather than only filled again. Of several chains with the same
    /// priority, the kernel calls the newest one first.
    pub recreate_chains: bool,
    /// Pre-existing connections, which are let through: the pod's own address and the peer's.
    pub spared: Vec<(SocketAddr, SocketAddr)>,
}

/// What tells the daemon's own packets from the application's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnPackets {
    /// Their mark, which only a daemon with CAP_NET_ADMIN can set. With it, the daemon may use a client's address, and
    /// replies to it come back.
    Mark(u32),
    /// The user of the daemon. Other users include root, so that what root's processes send is captured.
    User(u32),
}

impl OwnPackets {
    /// The tests, in a rule, of a packet of the daemon and of any other one. What has no user, as packets of the kernel
    /// itself, is not the daemon's: with a user, the rules let the daemon's packets go first and then take the rest.
    fn tests(self) -> (String, String) {
        match self {
            Self::Mark(mark) => {
                (format!("meta mark & {MASK:#x} == {mark:#x}"), format!("meta mark & {MASK:#x} != {mark:#x}"))
            }
            Self::User(user) => (format!("meta skuid {user}"), String::new()),
        }
    }

    /// Sets the ip rule and routes that bring back replies to foreign addresses, where there are any.
    async fn bring_back(self, netns: &Netns, ipv6: bool) -> Result<(), RedirectError> {
        if let Self::Mark(_) = self {
            routes::set(netns, ipv6, true).await?;
        }
        Ok(())
    }
}

/// Conntrack zone of the daemon's own DNS questions.
const DNS_ZONE: u16 = 1;
/// IPv4 source address of kubelet probes, which are not captured.
pub const PROBE_V4: &str = "169.254.7.127";
/// IPv6 source address of kubelet probes.
pub const PROBE_V6: &str = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff";
/// Name of the counter of connections from that address, which no policy applies to. Its value survives a rewrite of
/// the rules, unless the chains are created again ([`Redirection::recreate_chains`]).
pub const PROBE_COUNTER: &str = "probed";
/// Name of the counter of connections to the ports of capture checks from outside: it tells whether a check has reached
/// the pod.
pub const CHECK_COUNTER: &str = "arrived";

/// Name of a counter that counts nothing: only tables of workloads that carry their own traffic have it. The kernel tells
/// at once whether it is there, while listing a table takes `nft` and may fail.
pub const OWN_COUNTER: &str = "carries_itself";

/// Name of the counter of UDP datagrams, other than questions to DNS servers, that leave the pod. They are not tunnelled.
pub const UDP_COUNTER: &str = "udp_out";
/// Name of the counter of packets of further protocols, except ICMP, that leave the pod. They are not tunnelled.
pub const OTHER_COUNTER: &str = "other_out";

/// Why the redirection could not be written.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// `nft` failed.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The tables cannot be read.
    #[error("cannot read the pod's tables: {0}; the daemon needs CAP_NET_ADMIN and CAP_NET_RAW")]
    Inspect(io::Error),
    /// The ip rule or route could not be set.
    #[error(transparent)]
    Route(#[from] routes::IpRouteError),
    /// Legacy iptables rules of istio-cni capture the pod, and the daemon cannot remove them.
    #[error(
        "legacy iptables rules of istio-cni ({0}) in the pod keep its traffic from culvert; restart the pod, or remove \
         them with iptables-legacy"
    )]
    Legacy(String),
    /// Rules of another agent came back after they had been removed.
    #[error(
        "{0} came back after it was taken over: another agent (istio-cni) captures this pod too; stop it on this node"
    )]
    Contested(String),
    /// What looks like a rule of istio-cni has a name that is not safe to write into a script.
    #[error(
        "something in the pod's nftables looks like istio-cni's and has the name {0:?}; restart the pod, or remove it"
    )]
    UnsafeName(String),
    /// Another daemon of the node is active now.
    #[error("another daemon of this node writes the pod's rules")]
    OnStandby,
    /// Another program changed the pod's rules during the write.
    #[error("another program changed the pod's nftables during the write; writing them again")]
    ConcurrentChange,
}

/// What has been written, and which other rules were found.
#[derive(Debug)]
pub struct Installed {
    /// Rules of istio-cni that were there and have been removed.
    pub istio: IstioRules,
    /// Our table as the kernel lists it.
    pub listing: Listing,
    /// Other rules that may precede ours.
    pub hooks: Vec<String>,
    /// Why the other rules are unknown, if they could not be read.
    pub unread: Option<String>,
}

/// Installs the redirection; installing it again replaces it. Rules of istio-cni are removed in the same transaction,
/// and returned. With `taken_over` they have been removed before, so finding them again is an error. If there are too
/// many rules to read, ours are written without knowing the others. With `taken_over`, ours are written even if this
/// returns an error: nothing in a pod may let its traffic bypass the daemon.
pub async fn install(netns: &Netns, rules: &Redirection, taken_over: bool) -> Result<Installed, RedirectError> {
    within(async {
        let OtherRules { istio, hooks, mut unread } = match refuse_foreign(other_rules(netns).await, taken_over) {
            Ok(others) => others,
            Err(error) if taken_over => {
                rules.own.bring_back(netns, rules.ipv6).await?;
                nft::write(netns, &ruleset(rules, true)).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        rules.own.bring_back(netns, rules.ipv6).await?;
        let generation = || netns.enter(nftables::generation)?.map_err(RedirectError::Inspect);
        let mut before = generation()?;
        let anew = if rules.recreate_chains {
            format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
        } else {
            String::new()
        };
        nft::write(netns, &(istio.removal.clone() + &anew + &ruleset(rules, true))).await?;
        let listing = match nft::listing(netns, "inet", TABLE).await {
            // Our own table contains so much that it cannot be read: replace it as a whole.
            Err(NftError::Unreadable(why)) => {
                unread = Some(why);
                before = generation()?;
                nft::write(netns, &(format!("delete table inet {TABLE}\n") + &ruleset(rules, true))).await?;
                nft::listing(netns, "inet", TABLE).await?
            }
            listed => listed?,
        };
        // Another write came in between, so the listing need not be of what was written.
        if generation()? != before.wrapping_add(1) {
            return Err(RedirectError::ConcurrentChange);
        }
        Ok(Installed { istio, listing, hooks, unread })
    })
    .await
}

/// Refuses rules that cannot be taken over, with their names.
fn refuse_foreign(others: Result<OtherRules, RedirectError>, taken_over: bool) -> Result<OtherRules, RedirectError> {
    let others = others?;
    if let Some(name) = &others.istio.unsafe_name {
        return Err(RedirectError::UnsafeName(name.clone()));
    }
    if taken_over && !others.istio.names.is_empty() {
        return Err(RedirectError::Contested(others.istio.names.into_iter().collect::<Vec<_>>().join(", ")));
    }
    Ok(others)
}

/// Rules of other programs in a pod.
#[derive(Debug, Default)]
pub struct OtherRules {
    /// Rules of istio-cni.
    pub istio: IstioRules,
    /// Rules that may precede ours.
    pub hooks: Vec<String>,
    /// Why they are unknown, if they could not be read.
    pub unread: Option<String>,
}

async fn other_rules(netns: &Netns) -> Result<OtherRules, RedirectError> {
    let mut others = OtherRules::default();
    match netns.enter(|| iptables::tables_with(takeover::CHAINS))? {
        // Legacy rules of istio-cni lead to our ports, as ours do. The capture check tells whether the pod is captured.
        Ok(legacy) => others.hooks = legacy_hooks(&legacy),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(RedirectError::Inspect(error)),
        Err(error) => others.unread = Some(error.to_string()),
    }
    match nft::ruleset(netns).await {
        Ok(all) => {
            others.istio = takeover::find(&all);
            others.hooks.extend(takeover::hooks(&all, &[TABLE, legs::TABLE]));
        }
        Err(NftError::Unreadable(why)) => others.unread = Some(why),
        Err(error) => return Err(error.into()),
    }
    Ok(others)
}

fn legacy_hooks(legacy: &iptables::Legacy) -> Vec<String> {
    let istios = legacy.with.iter().map(|name| format!("istio-cni's rules in the legacy iptables table {name}"));
    let others = legacy.names.iter().filter(|name| !legacy.with.contains(name));
    istios.chain(others.map(|name| format!("legacy iptables table {name}"))).collect()
}

/// Names the legacy iptables tables that contain rules of istio-cni, as far as they can be read.
pub fn legacy_of_istio(netns: &Netns) -> Vec<String> {
    let found = netns.enter(|| iptables::tables_with(takeover::CHAINS)).map(Result::unwrap_or_default);
    found.map(|found| found.with).unwrap_or_default()
}

/// Names the legacy iptables tables. The kernel does not announce new ones, and calls them before the older tables.
pub fn legacy_tables(netns: &Netns) -> Option<Vec<String>> {
    netns.enter(iptables::names).ok()
}

/// Whether our table is still as `written` and no rules of istio-cni are beside it; and the other rules. An error means
/// that our own table cannot be read.
pub async fn unchanged_since(netns: &Netns, written: &Listing) -> Result<(bool, OtherRules), RedirectError> {
    within(async {
        let same = nft::listing(netns, "inet", TABLE).await? == *written;
        let others = other_rules(netns).await?;
        Ok((same && others.istio.names.is_empty(), others))
    })
    .await
}

/// Stops redirecting new connections. Open ones keep their address translation, and their replies still come back.
pub async fn stop_capturing(netns: &Netns, rules: &Redirection) -> Result<(), RedirectError> {
    Ok(nft::apply(netns, &ruleset(rules, false)).await?)
}

/// Stops redirecting new connections of a pod whose settings are unknown. Open ones keep their address translation.
pub async fn stop_redirecting(netns: &Netns) -> Result<(), RedirectError> {
    let chains = ["pre_nat", "out_nat"].map(|chain| format!("flush chain inet {TABLE} {chain}\n"));
    Ok(nft::apply(netns, &chains.concat()).await?)
}

/// Removes all tables, ip rules and routes of ours.
pub async fn remove(netns: &Netns, ipv6: bool) -> Result<(), RedirectError> {
    within(async {
        let all = [TABLE, legs::TABLE].map(|table| format!("add table inet {table}\ndelete table inet {table}\n"));
        nft::write(netns, &all.concat()).await?;
        routes::set(netns, ipv6, false).await?;
        Ok(())
    })
    .await
}

/// Removes the redirection of a network namespace in which there are neither ip rules nor other tables of ours.
pub async fn remove_table(netns: &Netns) -> Result<(), NftError> {
    nft::apply(netns, &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")).await
}

/// The table as an nft script. Without `capture` the NAT chains exist but are empty: without NAT chains the kernel
/// would stop translating the connections that are open.
///
/// The translation keeps the pod's own address where the packet has one of this namespace. Translating to the loopback
/// address or to the interface's address (`redirect`) silently loses packets of sockets bound to a device, of
/// interfaces without an address, and of link-local addresses.
fn ruleset(rules: &Redirection, capture: bool) -> String {
    let Redirection { node_tag, own, ipv6, virtual_interfaces, probes, addresses, spared, .. } = rules;
    let (dns, bypass_inbound) = (rules.dns, rules.bypass_inbound);
    let (ours, others) = own.tests();
    let not_loopback = ["ip daddr != 127.0.0.1", "ip6 daddr != ::1"];
    let families = ["ip", "ip6"].into_iter().zip(not_loopback);
    let mut inbound = String::new();
    let mut outbound = String::new();
    let mut sets = table_owner::chain(node_tag);
    if let OwnPackets::User(_) = own {
        sets += &format!("  counter {OWN_COUNTER} {{ }}\n");
    }
    if capture {
        sets += &let_preexisting_through(spared, &mut inbound, &mut outbound);
        inbound += &reroute(virtual_interfaces, addresses);
        if *probes {
            inbound += &format!("    meta l4proto tcp ip saddr {PROBE_V4} counter name {PROBE_COUNTER} accept\n");
            inbound += &format!("    meta l4proto tcp ip6 saddr {PROBE_V6} counter name {PROBE_COUNTER} accept\n");
            outbound += &format!("    meta l4proto tcp ip daddr {PROBE_V4} accept\n");
            outbound += &format!("    meta l4proto tcp ip6 daddr {PROBE_V6} accept\n");
        }
        inbound += &pass_ports(&rules.plaintext_ports);
        outbound += &pass_user(*own);
        if !bypass_inbound {
            for (family, outside) in families.clone() {
                let taken = format!("{outside} tcp dport != {HBONE} {others}");
                inbound += &format!("    {taken} fib daddr type local dnat {family} to {family} daddr:{PLAINTEXT}\n");
                inbound += &format!("    {taken} redirect to :{PLAINTEXT}\n");
            }
        }
        if dns {
            // Where the daemon does not listen on IPv6, DNS over it is not redirected.
            for (family, outside) in families.clone().take(if *ipv6 { 2 } else { 1 }) {
                let protocol = if family == "ip" { "ipv4" } else { "ipv6" };
                for taken in [
                    format!("meta nfproto {protocol} oifname != lo udp dport 53 {others}"),
                    format!("{outside} tcp dport 53 {others}"),
                ] {
                    outbound += &format!("    {taken} fib saddr type local dnat {family} to {family} saddr:{DNS}\n");
                    outbound += &format!("    {taken} redirect to :{DNS}\n");
                }
            }
        }
        if let OwnPackets::Mark(_) = own {
            outbound += &format!("    meta l4proto tcp meta mark {} accept\n", returning());
        }
        for outside in not_loopback {
            // Connections of a pod to its own address are not captured.
            outbound += &format!("    oifname lo {outside} accept\n");
        }
        for (family, outside) in families {
            let taken = format!("meta l4proto tcp {outside} {others}");
            outbound += &format!("    {taken} fib saddr type local dnat {family} to {family} saddr:{OUTBOUND}\n");
            outbound += &format!("    {taken} redirect to :{OUTBOUND}\n");
        }
    }
    // Sets that are no longer used do not go with the rules that used them. Each is created first, because only an
    // existing set can be deleted.
    let old_sets = [("ip", "ipv4_addr"), ("ip6", "ipv6_addr")].map(|(family, kind)| {
        format!(
            "add set inet {TABLE} spared_{family} {{ type {kind} . inet_service . {kind} . inet_service; }}\n\
             delete set inet {TABLE} spared_{family}\n"
        )
    });
    let old_sets = old_sets.concat();
    // The daemon's questions to resolvers may use the port that the application asks from, so they get their own
    // conntrack zone. Answers are not put into it: a question to the pod's own DNS server, from port 53, looks the
    // same.
    let questions = match dns {
        true => format!("    udp dport 53 {ours} ct original zone set {DNS_ZONE}\n"),
        false => String::new(),
    };
    let before_nat = match own {
        OwnPackets::Mark(_) => returns(&ours),
        OwnPackets::User(_) if dns => legs::chain("own_dns", "input", -160, &legs::no_spoofed_questions()),
        OwnPackets::User(_) => String::new(),
    };
    format!(
        "add table inet {TABLE}\nflush table inet {TABLE}\n{old_sets}table inet {TABLE} {{\n  counter {PROBE_COUNTER} {{ }}\n  counter {CHECK_COUNTER} {{ }}\n\
         \x20 counter {UDP_COUNTER} {{ }}\n  counter {OTHER_COUNTER} {{ }}\n{sets}\
         \x20 chain out_raw {{\n    type filter hook output priority -300; policy accept;\n\
         \x20   meta l4proto tcp accept\n{questions}\
         \x20   oifname != lo udp dport != 53 counter name {UDP_COUNTER}\n\
         \x20   oifname != lo meta l4proto != {{ tcp, udp, icmp, ipv6-icmp }} counter name {OTHER_COUNTER}\n  }}\n\
         {before_nat}\
         \x20 chain pre_nat {{\n    type nat hook prerouting priority -100; policy accept;\n{inbound}  }}\n\
         \x20 chain out_nat {{\n    type nat hook output priority -100; policy accept;\n{outbound}  }}\n}}\n"
    )
}

/// The test, after `ct mark` or `meta mark`, of a connection whose replies must come back to the daemon.
fn returning() -> String {
    format!("& {MASK:#x} == {RETURN_MARK:#x}")
}

/// Chains that mark the replies of the daemon's connections, for the ip rule that brings them back, and that count the
/// capture checks from outside.
fn returns(ours: &str) -> String {
    // Replies to a link-local address must leave by its link; the route would lose them.
    let (return_bits, returning) = (!MASK, returning());
    format!(
        "\x20 chain pre_mangle {{\n    type filter hook prerouting priority -150; policy accept;\n\
         \x20   ip6 saddr fe80::/10 accept\n\
         \x20   {ours} ct mark set (ct mark & {return_bits:#x}) | {RETURN_MARK:#x}\n\
         \x20   tcp dport {{ {HBONE}, {INBOUND_CHECK} }} tcp flags & (syn | ack) == syn counter name {CHECK_COUNTER}\n  }}\n\
         \x20 chain out_mangle {{\n    type route hook output priority -150; policy accept;\n\
         \x20   ct mark {returning} meta mark set ct mark\n  }}\n"
    )
}

/// The rule that lets inbound plaintext to these ports pass.
fn pass_ports(ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    if ports.is_empty() { String::new() } else { format!("    tcp dport {{ {} }} accept\n", ports.join(", ")) }
}

/// Rules that let the packets of the daemon's user pass. Its capture checks do not: without rights the daemon cannot
/// open a socket of another user, so what takes the application's connections must take those as well.
fn pass_user(own: OwnPackets) -> String {
    let OwnPackets::User(_) = own else { return String::new() };
    let (ours, _) = own.tests();
    let pass = |ip: IpAddr| {
        let family = if ip.is_ipv4() { "ip" } else { "ip6" };
        format!("    {ours} {family} daddr != {ip} accept\n")
    };
    CAPTURE_CHECK_IPS.map(pass).concat()
}

/// Rules that redirect inbound connections on virtual interfaces as if the pod had opened them.
fn reroute(interfaces: &[Interface], addresses: &[IpAddr]) -> String {
    let own = [
        addresses.iter().find(|ip| ip.is_ipv4()).map(|ip| format!("ip to {ip}")),
        addresses.iter().find(|ip| ip.is_ipv6()).map(|ip| format!("ip6 to [{ip}]")),
    ];
    let mut rules = String::new();
    for name in interfaces {
        let taken = format!("iifname \"{name}\" meta l4proto tcp");
        for own in own.iter().flatten() {
            rules += &format!("    {taken} dnat {own}:{OUTBOUND}\n");
        }
        rules += &format!("    {taken} redirect to :{OUTBOUND}\n");
    }
    rules
}

/// Rules that let pre-existing connections through. Returns the sets that they refer to.
fn let_preexisting_through(spared: &[(SocketAddr, SocketAddr)], inbound: &mut String, outbound: &mut String) -> String {
    // A pre-existing connection sends no SYN. A SYN begins a new connection of the same addresses.
    let going_on = "tcp flags & (fin | syn | rst | ack) != syn";
    let mut sets = String::new();
    for (family, kind, is_v4) in [("ip", "ipv4_addr", true), ("ip6", "ipv6_addr", false)] {
        let elements: Vec<String> = spared
            .iter()
            .filter(|(own, _)| own.is_ipv4() == is_v4)
            .map(|(own, peer)| format!("{} . {} . {} . {}", own.ip(), own.port(), peer.ip(), peer.port()))
            .collect();
        if elements.is_empty() {
            continue;
        }
        sets += &format!(
            "  set spared_{family} {{ type {kind} . inet_service . {kind} . inet_service; elements = {{ {} }}; }}\n",
            elements.join(", ")
        );
        *outbound += &format!(
            "    {family} saddr . tcp sport . {family} daddr . tcp dport @spared_{family} {going_on} accept\n"
        );
        *inbound += &format!(
            "    {family} daddr . tcp dport . {family} saddr . tcp sport @spared_{family} {going_on} accept\n"
        );
    }
    sets
}
