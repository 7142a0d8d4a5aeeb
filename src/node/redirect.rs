//! The redirection inside a pod: one nftables table of our own, replaced in one transaction, and the rule and route by
//! which replies to foreign source addresses come back to us. IPv4 and IPv6; no IPv6 where the namespace has none.
//!
//! The meaning of each rule is Istio ambient's in-pod redirection. What the application sends goes to 15001, its DNS_PORT to 15053,
//! what comes in plaintext to 15006; what carries our mark, and what the kubelet probes, is left alone.

use super::legs;
use super::nft::{self, Listing, NftError, within};
use super::routes::{self, MASK, RETURN_MARK};
use super::spec::Interface;
use super::table_owner;
use super::takeover::{self, IstioRules};
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::{changes, iptables};
use std::io;
use std::net::{IpAddr, SocketAddr};

/// Name of our table.
pub const TABLE: &str = "culvert";

/// What the rules are to do.
#[derive(Clone, Debug)]
pub struct Redirection {
    /// Whose node they are written for.
    pub node_tag: String,
    /// `SO_MARK` of our own packets.
    pub mark: u32,
    /// Whether IPv6 is used in the namespace.
    pub ipv6: bool,
    /// Whether DNS_PORT is taken.
    pub dns: bool,
    /// Plaintext that comes in is left alone.
    pub bypass_inbound: bool,
    /// What comes in through these interfaces is taken as outbound.
    pub virtual_interfaces: Vec<Interface>,
    /// Whether the kubelet's probes are left alone: where nobody gives them their address, nobody has it.
    pub probes: bool,
    /// Addresses of the pod, of which the first of each family takes what comes in through these.
    pub addresses: Vec<IpAddr>,
    /// Whether the chains are made anew, and not only what is in them: of several of one priority, the kernel asks the one first
    /// that came last.
    pub ahead: bool,
    /// Connections that are left alone: the pod's own address, and the peer's.
    pub spared: Vec<(SocketAddr, SocketAddr)>,
}

/// Port on which DNS_PORT is taken.
const DNS_PORT: u16 = crate::dns::PORT;
/// Conntrack zone of our own DNS_PORT.
const DNS_ZONE: u16 = 1;
/// Source address of kubelet probes, which are not captured.
pub const PROBE_V4: &str = "169.254.7.127";
/// Its IPv6 twin.
pub const PROBE_V6: &str = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff";
/// Counts the connections from that address, which no policy has judged. It stays when the rules are written anew, but where the chains are as well
/// ([`Redirection::ahead`]).
pub const PROBE_COUNTER: &str = "probed";
/// Port of the pod that plaintext probes into it go to; the host gives connections to it and to 15008 no other address.
pub const CHECK_PORT: u16 = 15091;
/// Counts what begins a connection to the ports that are tried from outside: whether it has come as far as the pod.
pub const CHECK_COUNTER: &str = "arrived";
/// Why rules could not be written.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// `nft` failed.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Tables cannot be looked into.
    #[error("cannot look into the pod's tables: {0}; the daemon needs CAP_NET_ADMIN and CAP_NET_RAW")]
    Inspect(io::Error),
    /// The rule or route could not be set.
    #[error(transparent)]
    Route(#[from] routes::RouteError),
    /// Redirection of somebody else take the pod's traffic, and cannot be removed by us.
    #[error(
        "istio-cni's legacy iptables rules ({0}) are in the pod, and its traffic does not come to us; restart the pod, or remove \
         them with iptables-legacy"
    )]
    Legacy(String),
    /// Redirection of somebody else came back after they had been removed.
    #[error(
        "{0} came back after it was taken over: another agent (istio-cni) captures this pod too; stop it on this node"
    )]
    Contested(String),
    /// What looks like istio-cni's has a name that must not stand in a script.
    #[error(
        "something in the pod's nftables looks like istio-cni's and has the name {0:?}; restart the pod, or remove it"
    )]
    UnsafeName(String),
    /// Another daemon of the node writes them now.
    #[error("another daemon of this node writes the pod's rules")]
    OnStandby,
    /// Somebody else has changed the pod's rules meanwhile.
    #[error("somebody else has changed the pod's nftables at the same moment; they are written again")]
    ConcurrentChange,
}

/// What has been written, and what was seen of others meanwhile.
#[derive(Debug)]
pub struct Installed {
    /// What istio-cni had left, and is gone.
    pub istio: IstioRules,
    /// Our rules as the kernel lists them.
    pub listing: Listing,
    /// Redirection of others that may come before ours.
    pub hooks: Vec<String>,
    /// What could not be read; ours were written all the same.
    pub unread: Option<String>,
}

/// Installs the redirection; a repetition replaces it, nothing is doubled. What istio-cni has left in the pod goes in the
/// same transaction, and is named; where `taken_over` it had gone before, and is refused now. Where the pod's rules cannot be
/// read, because there are too many of them, ours are written without looking. Where ours have been there before they are
/// written in any case: nothing that is found in a pod lets its traffic pass.
pub async fn install(netns: &Netns, rules: &Redirection, taken_over: bool) -> Result<Installed, RedirectError> {
    within(async {
        let OtherRules { istio, hooks, mut unread } = match acceptable(others(netns).await, taken_over) {
            Ok(others) => others,
            Err(error) if taken_over => {
                routes::set(netns, rules.ipv6, true).await?;
                nft::write(netns, &ruleset(rules, true)).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        routes::set(netns, rules.ipv6, true).await?;
        let generation = || netns.enter(changes::generation)?.map_err(RedirectError::Inspect);
        let mut before = generation()?;
        let anew =
            if rules.ahead { format!("add table inet {TABLE}\ndelete table inet {TABLE}\n") } else { String::new() };
        nft::write(netns, &(istio.removal.clone() + &anew + &ruleset(rules, true))).await?;
        let listing = match nft::listing(netns, "inet", TABLE).await {
            // Somebody has put so much into our own table that it cannot be seen whether anything else is there.
            Err(NftError::Unreadable(why)) => {
                unread = Some(why);
                before = generation()?;
                nft::write(netns, &(format!("delete table inet {TABLE}\n") + &ruleset(rules, true))).await?;
                nft::listing(netns, "inet", TABLE).await?
            }
            listed => listed?,
        };
        // Else what was listed need not be what was written.
        if generation()? != before.wrapping_add(1) {
            return Err(RedirectError::ConcurrentChange);
        }
        Ok(Installed { istio, listing, hooks, unread })
    })
    .await
}

/// Refuses what we cannot take over, by name.
fn acceptable(others: Result<OtherRules, RedirectError>, taken_over: bool) -> Result<OtherRules, RedirectError> {
    let others = others?;
    if let Some(name) = &others.istio.unsafe_name {
        return Err(RedirectError::UnsafeName(name.clone()));
    }
    if taken_over && !others.istio.names.is_empty() {
        return Err(RedirectError::Contested(others.istio.names.into_iter().collect::<Vec<_>>().join(", ")));
    }
    Ok(others)
}

/// What others have in a pod.
#[derive(Debug, Default)]
pub struct OtherRules {
    /// What istio-cni has left.
    pub istio: IstioRules,
    /// Redirection that may come before ours.
    pub hooks: Vec<String>,
    /// What could not be read.
    pub unread: Option<String>,
}

async fn others(netns: &Netns) -> Result<OtherRules, RedirectError> {
    let mut others = OtherRules::default();
    match netns.enter(|| iptables::tables_with(takeover::CHAINS))? {
        // Those of istio-cni lead to our ports, as ours do: whether the pod is captured, its probes say.
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

/// Legacy tables that have rules of istio-cni's, as far as that can be seen.
pub fn legacy_of_istio(netns: &Netns) -> Vec<String> {
    let found = netns.enter(|| iptables::tables_with(takeover::CHAINS)).map(Result::unwrap_or_default);
    found.map(|found| found.with).unwrap_or_default()
}

/// Names of the legacy tables that there are. The kernel tells nobody when one comes, and asks it before those that were there.
pub fn legacy_tables(netns: &Netns) -> Option<Vec<String>> {
    netns.enter(iptables::names).ok()
}

/// Whether our rules are still as `written`, and nobody else's capture the pod beside them, as far as that can be seen; and
/// what others have. Errors where our own cannot be seen.
pub async fn unchanged_since(netns: &Netns, written: &Listing) -> Result<(bool, OtherRules), RedirectError> {
    within(async {
        let same = nft::listing(netns, "inet", TABLE).await? == *written;
        let others = others(netns).await?;
        Ok((same && others.istio.names.is_empty(), others))
    })
    .await
}

/// Captures nothing new; connections that are open keep their addresses translated and their replies returned.
pub async fn stop_capturing(netns: &Netns, rules: &Redirection) -> Result<(), RedirectError> {
    Ok(nft::apply(netns, &ruleset(rules, false)).await?)
}

/// Lets a pod's new connections go as they would without us; what is open stays translated. For a pod whose settings are not at hand.
pub async fn let_pass(netns: &Netns) -> Result<(), RedirectError> {
    let chains = ["pre_nat", "out_nat"].map(|chain| format!("flush chain inet {TABLE} {chain}\n"));
    Ok(nft::apply(netns, &chains.concat()).await?)
}

/// Removes every trace.
pub async fn remove(netns: &Netns, ipv6: bool) -> Result<(), RedirectError> {
    within(async {
        let all = [TABLE, legs::TABLE].map(|table| format!("add table inet {table}\ndelete table inet {table}\n"));
        nft::write(netns, &all.concat()).await?;
        routes::set(netns, ipv6, false).await?;
        Ok(())
    })
    .await
}

/// The table as an nft script. Without `capture` the NAT chains are empty but there, because without any the kernel
/// would stop translating the connections that are open.
///
/// What is captured keeps its own address where it has one here: a translation to the loopback address or to the interface's
/// (`redirect`) loses packets of sockets that are bound to a device, of interfaces without an address, and of link-local
/// addresses, without a word.
fn ruleset(rules: &Redirection, capture: bool) -> String {
    let Redirection {
        node_tag,
        mark,
        ipv6,
        dns,
        bypass_inbound,
        virtual_interfaces,
        probes,
        addresses,
        spared,
        ahead: _,
    } = rules;
    let (dns, bypass_inbound) = (*dns, *bypass_inbound);
    let ours = format!("meta mark & {MASK:#x} == {mark:#x}");
    let others = format!("meta mark & {MASK:#x} != {mark:#x}");
    let returning = format!("& {MASK:#x} == {RETURN_MARK:#x}");
    let not_loopback = ["ip daddr != 127.0.0.1", "ip6 daddr != ::1"];
    let families = ["ip", "ip6"].into_iter().zip(not_loopback);
    let mut inbound = String::new();
    let mut outbound = String::new();
    let mut sets = table_owner::chain(node_tag);
    if capture {
        sets += &spare(spared, &mut inbound, &mut outbound);
        inbound += &reroute(virtual_interfaces, addresses);
        if *probes {
            inbound += &format!("    meta l4proto tcp ip saddr {PROBE_V4} counter name {PROBE_COUNTER} accept\n");
            inbound += &format!("    meta l4proto tcp ip6 saddr {PROBE_V6} counter name {PROBE_COUNTER} accept\n");
            outbound += &format!("    meta l4proto tcp ip daddr {PROBE_V4} accept\n");
            outbound += &format!("    meta l4proto tcp ip6 daddr {PROBE_V6} accept\n");
        }
        if !bypass_inbound {
            for (family, outside) in families.clone() {
                let taken = format!("{outside} tcp dport != 15008 {others}");
                inbound += &format!("    {taken} fib daddr type local dnat {family} to {family} daddr:15006\n");
                inbound += &format!("    {taken} redirect to :15006\n");
            }
        }
        if dns {
            // Where we do not listen on IPv6, DNS_PORT over it is left alone.
            for (family, outside) in families.clone().take(if *ipv6 { 2 } else { 1 }) {
                let protocol = if family == "ip" { "ipv4" } else { "ipv6" };
                for taken in [
                    format!("meta nfproto {protocol} oifname != lo udp dport 53 {others}"),
                    format!("{outside} tcp dport 53 {others}"),
                ] {
                    outbound +=
                        &format!("    {taken} fib saddr type local dnat {family} to {family} saddr:{DNS_PORT}\n");
                    outbound += &format!("    {taken} redirect to :{DNS_PORT}\n");
                }
            }
        }
        outbound += &format!("    meta l4proto tcp meta mark {returning} accept\n");
        for outside in not_loopback {
            // A pod that calls its own address is not captured.
            outbound += &format!("    oifname lo {outside} accept\n");
        }
        for (family, outside) in families {
            let taken = format!("meta l4proto tcp {outside} {others}");
            outbound += &format!("    {taken} fib saddr type local dnat {family} to {family} saddr:15001\n");
            outbound += &format!("    {taken} redirect to :15001\n");
        }
    }
    // A set that is in use no longer goes with the rules that used it; made first, because only what is there can go.
    let old_sets = [("ip", "ipv4_addr"), ("ip6", "ipv6_addr")].map(|(family, kind)| {
        format!(
            "add set inet {TABLE} spared_{family} {{ type {kind} . inet_service . {kind} . inet_service; }}\n\
             delete set inet {TABLE} spared_{family}\n"
        )
    });
    let old_sets = old_sets.concat();
    // Answers to a link-local address go by its link, and are lost on any other route.
    let return_bits = !MASK;
    // What we ask of resolvers may come from the very port that the application asks from. The answers come without the zone:
    // a question to the pod's own DNS_PORT server, from port 53, looks the same.
    let questions = match dns {
        true => format!("    udp dport 53 {ours} ct original zone set {DNS_ZONE}\n"),
        false => String::new(),
    };
    format!(
        "add table inet {TABLE}\nflush table inet {TABLE}\n{old_sets}table inet {TABLE} {{\n  counter {PROBE_COUNTER} {{ }}\n  counter {CHECK_COUNTER} {{ }}\n{sets}\
         \x20 chain out_raw {{\n    type filter hook output priority -300; policy accept;\n{questions}  }}\n\
         \x20 chain pre_mangle {{\n    type filter hook prerouting priority -150; policy accept;\n\
         \x20   ip6 saddr fe80::/10 accept\n\
         \x20   {ours} ct mark set (ct mark & {return_bits:#x}) | {RETURN_MARK:#x}\n\
         \x20   tcp dport {{ 15008, {CHECK_PORT} }} tcp flags & (syn | ack) == syn counter name {CHECK_COUNTER}\n  }}\n\
         \x20 chain out_mangle {{\n    type route hook output priority -150; policy accept;\n\
         \x20   ct mark {returning} meta mark set ct mark\n  }}\n\
         \x20 chain pre_nat {{\n    type nat hook prerouting priority -100; policy accept;\n{inbound}  }}\n\
         \x20 chain out_nat {{\n    type nat hook output priority -100; policy accept;\n{outbound}  }}\n}}\n"
    )
}

/// Redirection that take what comes in by a guest's interface as if the pod had sent it.
fn reroute(interfaces: &[Interface], addresses: &[IpAddr]) -> String {
    let own = [
        addresses.iter().find(|ip| ip.is_ipv4()).map(|ip| format!("ip to {ip}")),
        addresses.iter().find(|ip| ip.is_ipv6()).map(|ip| format!("ip6 to [{ip}]")),
    ];
    let mut rules = String::new();
    for name in interfaces {
        let taken = format!("iifname \"{name}\" meta l4proto tcp");
        for own in own.iter().flatten() {
            rules += &format!("    {taken} dnat {own}:15001\n");
        }
        rules += &format!("    {taken} redirect to :15001\n");
    }
    rules
}

/// Redirection that leave connections alone which are older than the rules; gives the sets that they look into.
fn spare(spared: &[(SocketAddr, SocketAddr)], inbound: &mut String, outbound: &mut String) -> String {
    // A connection from before never begins with a SYN of its own; one that does is a new one of the same addresses.
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
