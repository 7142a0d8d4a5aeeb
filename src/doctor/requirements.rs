//! Checks what culvert needs from the node: capabilities, kernel, sysctls, the Kubernetes API, the host's rules for
//! kubelet probes, and the CNI plugin.

use super::finding::{DEADLINE, Finding, fail, note, ok};
use crate::config::Config;
use crate::node::cni::install::PLUGIN;
use crate::node::{PodSource, kubelet_probes, kubernetes, nft, redirect, routes};
use crate::sys::limits;
use crate::sys::netns::Netns;
use crate::task::thread;
use crate::telemetry::log::with_causes;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Capabilities by number: those that are always needed, and those that are needed to find pods of the Kubernetes API.
const NEEDED: [(u32, &str); 3] = [(12, "NET_ADMIN"), (21, "SYS_ADMIN"), (13, "NET_RAW")];
const NEEDED_TO_FIND: [(u32, &str); 2] = [(19, "SYS_PTRACE"), (1, "DAC_OVERRIDE")];

/// Inode of the machine's initial PID namespace (linux/proc_ns.h, `PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

pub(super) fn privileges(config: &Config) -> Finding {
    let Some(held) = limits::capabilities() else {
        return fail("rights", "the capabilities are unknown, because /proc/self/status cannot be read");
    };
    let finds = matches!(config.node.source, PodSource::Kubernetes(_));
    let needed = NEEDED.iter().chain(NEEDED_TO_FIND.iter().filter(|_| finds));
    let missing: Vec<&str> = needed.filter(|(number, _)| held >> number & 1 == 0).map(|(_, name)| *name).collect();
    match missing.is_empty() {
        true => ok("rights", "all needed capabilities are present"),
        false => fail(
            "rights",
            format!("missing capabilities: {}; add them to the container's securityContext", missing.join(", ")),
        ),
    }
}

/// Reports a security module that confines this process. Its refusals look like ordinary errors of the checks that
/// follow.
pub(super) fn confinement() -> Finding {
    let read =
        |path: &str| std::fs::read_to_string(path).map(|text| text.trim_end_matches(['\0', '\n']).to_owned()).ok();
    let profile = read("/proc/self/attr/current").filter(|profile| !profile.is_empty() && profile != "unconfined");
    let selinux = read("/sys/fs/selinux/enforce").is_some_and(|enforce| enforce == "1");
    match profile {
        Some(label) if selinux && !label.contains("spc_t") && !label.contains("unconfined") => note(
            "confinement",
            format!("SELinux is enforcing, with label {label}; if a check below fails, run the container as spc_t"),
        ),
        Some(profile) if profile.ends_with("(enforce)") => note(
            "confinement",
            format!("AppArmor profile {profile} is active; if a check below fails, run the container unconfined"),
        ),
        _ => ok("confinement", "no security module confines this process"),
    }
}

/// Writes and removes a pod's rules in a temporary network namespace, which shows what the kernel or `nft` cannot do.
pub(super) async fn kernel(config: &Config) -> Vec<Finding> {
    vec![rules(config).await]
}

async fn rules(config: &Config) -> Finding {
    let made = thread::run_blocking(|| thread::blocking(Netns::fresh).join()).await;
    let netns = match made {
        Some(Ok(Ok(netns))) => netns,
        Some(Ok(Err(error))) => {
            return fail("kernel", format!("cannot make a network namespace: {error}; is CAP_SYS_ADMIN missing?"));
        }
        _ => return fail("kernel", "cannot make a network namespace"),
    };
    let ipv6 = config.node.ipv6 && netns.has_ipv6().unwrap_or(false);
    let rules = redirect::Redirection {
        node_tag: config.node.node_tag(),
        own: redirect::OwnPackets::Mark(config.node.mark),
        ipv6,
        dns: true,
        bypass_inbound: false,
        plaintext_ports: Vec::new(),
        virtual_interfaces: Vec::new(),
        probes: true,
        addresses: Vec::new(),
        recreate_chains: false,
        spared: Vec::new(),
    };
    let tried = async {
        routes::loopback_up(&netns).await?;
        redirect::install(&netns, &rules, false).await?;
        redirect::remove(&netns, ipv6).await
    };
    match (tried.await, ipv6) {
        (Ok(()), true) => ok("kernel", "a pod's rules can be written for IPv4 and IPv6"),
        (Ok(()), false) => ok("kernel", "a pod's rules can be written for IPv4; IPv6 is off"),
        (Err(error), _) => fail("kernel", format!("a pod's rules cannot be written: {error}")),
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
            "the host's sysctls cannot be read from here: /host/proc is not mounted, CULVERT_HOST_NETNS is not set, and the \
             host's processes are not visible. Check net.netfilter.nf_conntrack_count, its maximum and net.ipv4.ip_forward on the \
             node itself",
        )];
    }
    let mut lines = Vec::new();
    if let Err(error) = &host {
        lines.push(fail("host", format!("{error}; mount the host's /proc at /host/proc or set CULVERT_HOST_NETNS")));
    }
    match (number("netfilter/nf_conntrack_count"), number("netfilter/nf_conntrack_max")) {
        (Some(count), Some(max)) if count * 10 > max * 9 => lines.push(fail(
            "sysctls",
            format!("the host tracks {count} of at most {max} connections and will soon drop new ones; raise nf_conntrack_max"),
        )),
        (Some(count), Some(max)) => {
            lines.push(ok("sysctls", format!("the host tracks {count} of at most {max} connections")));
        }
        _ => lines.push(note("sysctls", "connection tracking is not active on the host (yet)")),
    }
    if number("ipv4/ip_forward") == Some(0) {
        lines.push(note(
            "sysctls",
            "net.ipv4.ip_forward is 0: pods can reach nothing unless the CNI works without forwarding by the host",
        ));
    }
    lines
}

/// Whether the configured path leads to the host's network namespace. By default it is that of process 1, which is the
/// host's only if this process is in the machine's initial PID namespace.
fn is_the_hosts(config: &Config) -> bool {
    let own = Path::new("/proc/1/ns/net");
    let all_processes = std::fs::metadata("/proc/self/ns/pid").is_ok_and(|pid| pid.ino() == FIRST_PID_NAMESPACE);
    config.node.host_netns != own || all_processes
}

/// The effect of an outage of the Kubernetes API.
const MEANWHILE: &str = "enrolled pods stay enrolled, but new pods wait";

pub(super) async fn api(config: &kubernetes::Config) -> Vec<Finding> {
    let asked = async {
        let client = kubernetes::client(config).await?;
        let version = client.apiserver_version().await.map_err(|error| with_causes(&error))?;
        Ok::<_, String>(version.git_version)
    };
    let line = match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(version)) => ok("kubernetes", format!("the API answers; its version is {version}")),
        Ok(Err(error)) => fail("kubernetes", format!("the API cannot be used: {error}; {MEANWHILE}")),
        Err(_) => fail("kubernetes", format!("the API does not answer within {} s; {MEANWHILE}", DEADLINE.as_secs())),
    };
    vec![line]
}

pub(super) async fn host_rules(config: &Config) -> Vec<Finding> {
    let table = match Netns::open(&config.node.host_netns) {
        Ok(host) => nft::table(&host, "inet", kubelet_probes::TABLE).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let line = match table {
        Ok(table) if !table.is_null() => {
            ok("host rules", "the host's rules that let kubelet probes bypass the mesh are in place")
        }
        Ok(_) => fail(
            "host rules",
            format!(
                "table {} is missing on the host, so kubelet probes of pods under a STRICT policy fail; see the daemon's log",
                kubelet_probes::TABLE
            ),
        ),
        Err(error) => fail("host rules", format!("the host's rules for kubelet probes cannot be read: {error}")),
    };
    vec![line]
}

pub(super) fn plugin(config: &kubernetes::Config) -> Vec<Finding> {
    let Some(cni) = &config.cni else {
        return vec![note(
            "cni plugin",
            "the plugin is not configured, so a pod's first traffic may leave before the pod is captured; to prevent that, set \
             CULVERT_CNI_BIN_DIR and CULVERT_CNI_CONF_DIR",
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
        (true, true) => ok(
            "cni plugin",
            "installed, and the first configuration is ours: no enrolled pod starts before it is captured",
        ),
        (true, false) => fail(
            "cni plugin",
            format!(
                "{} comes before ours in {}, so pods start without being captured; remove or rename it",
                first.unwrap_or_default(),
                cni.conf_dir.display()
            ),
        ),
        (false, _) => fail(
            "cni plugin",
            format!("not installed in {} and {}; see the daemon's log", cni.bin_dir.display(), cni.conf_dir.display()),
        ),
    }]
}
