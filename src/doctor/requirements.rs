//! What of the machine culvert needs: rights, the kernel, settings of the kernel, the API, the host's rules, the plugin.

use super::finding::{DEADLINE, Finding, fail, note, ok};
use crate::config::Config;
use crate::node::cni::install::PLUGIN;
use crate::node::{Source, kubernetes, probes, redirect, routes};
use crate::sys::limits;
use crate::sys::netns::Netns;
use crate::task::thread;
use crate::telemetry::log::with_causes;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Capabilities by number: with any source of pods, and beyond that where culvert finds them itself.
const NEEDED: [(u32, &str); 3] = [(12, "NET_ADMIN"), (21, "SYS_ADMIN"), (13, "NET_RAW")];
const NEEDED_TO_FIND: [(u32, &str); 2] = [(19, "SYS_PTRACE"), (1, "DAC_OVERRIDE")];

/// Inode of the machine's own namespace of process ids (linux/proc_ns.h, `PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

pub(super) fn privileges(config: &Config) -> Finding {
    let Some(held) = limits::capabilities() else { return fail("rights", "/proc/self/status cannot be read") };
    let finds = matches!(config.node.source, Source::Kubernetes(_));
    let needed = NEEDED.iter().chain(NEEDED_TO_FIND.iter().filter(|_| finds));
    let missing: Vec<&str> = needed.filter(|(number, _)| held >> number & 1 == 0).map(|(_, name)| *name).collect();
    match missing.is_empty() {
        true => ok("rights", "all capabilities are there"),
        false => {
            fail("rights", format!("missing: {}; add them to the container's securityContext", missing.join(", ")))
        }
    }
}

/// Security modules confine without a word; what they do is seen by the kernel's check.
pub(super) fn confinement() -> Finding {
    let read =
        |path: &str| std::fs::read_to_string(path).map(|text| text.trim_end_matches(['\0', '\n']).to_owned()).ok();
    let profile = read("/proc/self/attr/current").filter(|profile| !profile.is_empty() && profile != "unconfined");
    let selinux = read("/sys/fs/selinux/enforce").is_some_and(|enforce| enforce == "1");
    match profile {
        Some(label) if selinux && !label.contains("spc_t") && !label.contains("unconfined") => note(
            "confinement",
            format!("SELinux is enforced, label {label}: where something below fails, run the container as spc_t"),
        ),
        Some(profile) if profile.ends_with("(enforce)") => note(
            "confinement",
            format!("AppArmor profile {profile}: where something below fails, run the container unconfined"),
        ),
        _ => ok("confinement", "no security module confines this process"),
    }
}

/// Writes the rules of a pod in a namespace made for that: what the kernel and `nft` cannot do is seen there.
pub(super) async fn kernel(config: &Config) -> Vec<Finding> {
    vec![rules(config).await]
}

async fn rules(config: &Config) -> Finding {
    let made = thread::run_blocking(|| thread::blocking(Netns::fresh).join()).await;
    let netns = match made {
        Some(Ok(Ok(netns))) => netns,
        Some(Ok(Err(error))) => {
            return fail("kernel", format!("no network namespace can be made: {error}; CAP_SYS_ADMIN?"));
        }
        _ => return fail("kernel", "no network namespace can be made"),
    };
    let ipv6 = config.node.ipv6 && netns.has_ipv6().unwrap_or(false);
    let rules = redirect::Rules {
        whose: config.node.whose(),
        mark: config.node.mark,
        ipv6,
        dns: true,
        bypass_inbound: false,
        virtual_interfaces: Vec::new(),
        probes: true,
        addresses: Vec::new(),
        ahead: false,
        spared: Vec::new(),
    };
    let tried = async {
        routes::loopback_up(&netns).await?;
        redirect::install(&netns, &rules, false).await?;
        redirect::remove(&netns, ipv6).await
    };
    match (tried.await, ipv6) {
        (Ok(()), true) => ok("kernel", "a pod's rules can be written, for IPv4 and IPv6"),
        (Ok(()), false) => ok("kernel", "a pod's rules can be written; IPv6 is off"),
        (Err(error), _) => fail("kernel", error.to_string()),
    }
}

pub(super) fn sysctls(config: &Config) -> Vec<Finding> {
    let host = Netns::open(&config.node.host_netns);
    let read = |path: &str| match &host {
        Ok(host) => host.enter(|| std::fs::read_to_string(format!("/proc/sys/net/{path}"))).ok()?.ok(),
        Err(_) => None,
    };
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    if !is_the_hosts(config) {
        return vec![note(
            "host",
            "cannot be looked at from here: neither /host/proc is mounted nor CULVERT_HOST_NETNS set, and the host's processes are not \
             to be seen. How full its connection tracking is (net.netfilter.nf_conntrack_count), and whether it forwards \
             (net.ipv4.ip_forward), is to be seen on the node",
        )];
    }
    let mut lines = Vec::new();
    if let Err(error) = &host {
        lines.push(fail("host", format!("{error}; mount the host's /proc at /host/proc, or set CULVERT_HOST_NETNS")));
    }
    match (number("netfilter/nf_conntrack_count"), number("netfilter/nf_conntrack_max")) {
        (Some(count), Some(max)) if count * 10 > max * 9 => lines.push(fail(
            "sysctls",
            format!("nf_conntrack_count is {count} of {max}: new connections are about to be dropped; raise nf_conntrack_max"),
        )),
        (Some(count), Some(max)) => lines.push(ok("sysctls", format!("{count} of {max} tracked connections"))),
        _ => lines.push(note("sysctls", "the host tracks no connections (yet)")),
    }
    if number("ipv4/ip_forward") == Some(0) {
        lines.push(note("sysctls", "the host does not forward IPv4: unless its CNI needs none, pods reach nobody"));
    }
    lines
}

/// Whether the host's network namespace is behind the path where it is looked for. What is the first process of a container is
/// not the host's.
fn is_the_hosts(config: &Config) -> bool {
    let own = Path::new("/proc/1/ns/net");
    let all_processes = std::fs::metadata("/proc/self/ns/pid").is_ok_and(|pid| pid.ino() == FIRST_PID_NAMESPACE);
    config.node.host_netns != own || all_processes
}

pub(super) async fn api(config: &kubernetes::Config) -> Vec<Finding> {
    let asked = async {
        let client = kubernetes::client(config).await?;
        let version = client.apiserver_version().await.map_err(|error| with_causes(&error))?;
        Ok::<_, String>(version.git_version)
    };
    let line = match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(version)) => ok("kubernetes", format!("the API answers, {version}")),
        Ok(Err(error)) => fail("kubernetes", format!("{error}; what is enrolled stays so, new pods wait")),
        Err(_) => fail("kubernetes", "the API does not answer; what is enrolled stays so, new pods wait"),
    };
    vec![line]
}

pub(super) async fn host_rules(config: &Config) -> Vec<Finding> {
    let table = match Netns::open(&config.node.host_netns) {
        Ok(host) => redirect::list_table(&host, probes::TABLE).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let line = match table {
        Ok(table) if !table.is_null() => ok("host rules", "the kubelet's probes are let through, and nobody else's"),
        Ok(_) => {
            fail("host rules", "table culvert-probes is missing on the host: probes of pods under a STRICT policy fail")
        }
        Err(error) => fail("host rules", error),
    };
    vec![line]
}

pub(super) fn plugin(config: &kubernetes::Config) -> Vec<Finding> {
    let Some(cni) = &config.cni else {
        return vec![note(
            "cni plugin",
            "not wanted: a pod's first traffic may leave before it is captured (set CULVERT_CNI_BIN_DIR and CULVERT_CNI_CONF_DIR)",
        )];
    };
    let there = |path: &Path| path.exists();
    let configuration = cni.conf_dir.join(crate::node::cni::install::OURS);
    let first = std::fs::read_dir(&cni.conf_dir).ok().and_then(|entries| {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let used = |name: &String| {
            [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) && !name.starts_with('.')
        };
        names.filter(used).min()
    });
    let ours = first.as_deref() == Some(crate::node::cni::install::OURS);
    vec![match (there(&cni.bin_dir.join(PLUGIN)) && there(&configuration), ours) {
        (true, true) => {
            ok("cni plugin", "installed, and the first configuration is ours: no pod starts before it is captured")
        }
        (true, false) => fail(
            "cni plugin",
            format!(
                "{} comes before ours in {}: pods start without us; remove or rename it",
                first.unwrap_or_default(),
                cni.conf_dir.display()
            ),
        ),
        (false, _) => {
            fail("cni plugin", format!("not installed in {} and {}", cni.bin_dir.display(), cni.conf_dir.display()))
        }
    }]
}
