//! `/kernel`: facts about this node's kernel and machine that matter to the daemon, for bug reports.

use serde_json::{Map, Value, json};
use std::path::Path;

/// What is read below /proc/sys. Those of the network are of the daemon's own network namespace.
const SYSCTLS: [&str; 14] = [
    "kernel/osrelease",
    "kernel/version",
    "kernel/unprivileged_userns_clone",
    "fs/file-max",
    "fs/nr_open",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv6/conf/all/disable_ipv6",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_count",
];

/// Where the program nft may be.
const NFT: [&str; 4] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/bin/nft"];

/// The page.
pub(super) fn kernel() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let sysctls: Map<String, Value> = SYSCTLS
        .iter()
        .map(|name| (name.replace('/', "."), read(&format!("/proc/sys/{name}")).map_or(Value::Null, Value::from)))
        .collect();
    let modules = read("/proc/modules").unwrap_or_default();
    let of_network = |line: &str| {
        let name = line.split(' ').next()?;
        ["nf_", "nft_", "ip_tables", "ip6_tables", "br_netfilter", "xt_", "tls"]
            .iter()
            .any(|start| name.starts_with(start))
            .then(|| name.to_owned())
    };
    json!({
        "machine": std::env::consts::ARCH,
        "sysctls": sysctls,
        "modules": modules.lines().filter_map(of_network).collect::<Vec<_>>(),
        "nft": NFT.iter().find(|path| Path::new(path).exists()),
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memoryMax": read("/sys/fs/cgroup/memory.max"),
        "os": read("/etc/os-release").and_then(|text| Some(text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?.trim_matches('"').to_owned())),
    })
}
