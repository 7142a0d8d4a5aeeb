//! Finds the network namespace of a pod among the processes of the node: that of the pod's oldest process in a
//! namespace that holds the pod's address. A process that has only entered another pod's namespace does not count,
//! because that one lacks the address. If two namespaces hold the address, the pod is refused.

use super::cgroup::{CgroupOwner, Owner, owner_of};
use super::facts::PodFacts;
use crate::mesh::Text;
use crate::sys::netns::{Netns, id_at};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// A pod that is searched for.
#[derive(Clone, Debug)]
pub struct SoughtPod {
    /// Its uid.
    pub uid: Text,
    /// The uid that its cgroups name, if it differs.
    pub static_uid: Option<Text>,
    /// Ids of its containers.
    pub containers: Vec<Text>,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

impl From<&PodFacts> for SoughtPod {
    fn from(pod: &PodFacts) -> Self {
        Self {
            uid: pod.uid.clone(),
            static_uid: pod.static_uid.clone(),
            containers: pod.containers.clone(),
            ips: pod.ips.clone(),
        }
    }
}

/// What was found for a pod.
#[derive(Clone, Debug)]
pub enum ScanResult {
    /// Its network namespace, and the path that leads to it while the process lives.
    Namespace(Netns, PathBuf),
    /// Only processes whose network namespace is not the pod's, or not certainly; with the reason.
    Refused(String),
    /// No process.
    Nothing,
}

/// Most network namespaces of one pod that are opened; a pod may make any number of them.
const LOOKED_AT_MAX: usize = 64;
/// Most processes that are named in a reason.
const REFUSED_MAX: usize = 4;
/// Most addresses of one network namespace that are named.
const NAMED_MAX: usize = 8;

/// The network namespaces in which a pod has processes.
#[derive(Default)]
struct Candidates {
    by_netns: BTreeMap<(u64, u64), Candidate>,
    /// Why other processes do not count.
    refused: Vec<String>,
}

/// A network namespace in which a pod has processes, by the oldest of them.
struct Candidate {
    started: u64,
    pid: u32,
}

/// Searches for pods below `proc`, the host's procfs. The time grows with the number of processes.
pub fn scan(proc: &Path, host: &Path, sought: &[SoughtPod]) -> HashMap<Text, ScanResult> {
    let mut by_uid: HashMap<&str, Vec<&SoughtPod>> = HashMap::new();
    // Any pod may claim the uid of a static pod; the address decides between them.
    for (uid, pod) in sought.iter().filter_map(|pod| Some((pod.static_uid.as_deref()?, pod))) {
        by_uid.entry(uid).or_default().push(pod);
    }
    // A uid of the API belongs to that pod, whichever pod claims it.
    by_uid.extend(sought.iter().map(|pod| (&*pod.uid, vec![pod])));
    let by_container: HashMap<&str, Vec<&SoughtPod>> =
        sought.iter().flat_map(|pod| pod.containers.iter().map(move |id| (&**id, vec![pod]))).collect();
    let node = std::fs::read_to_string(proc.join("1/cgroup")).unwrap_or_default();
    let not_pods: HashSet<(u64, u64)> = [proc.join("1/ns/net"), PathBuf::from("/proc/self/ns/net"), host.to_owned()]
        .iter()
        .filter_map(|path| id_at(path))
        .collect();
    let mut candidates: HashMap<Text, Candidates> = HashMap::new();
    let entries = std::fs::read_dir(proc).into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let folder = proc.join(pid.to_string());
        // The process may end at any of these steps.
        let Some(netns) = id_at(&folder.join("ns/net")).filter(|id| !not_pods.contains(id)) else { continue };
        let Ok(cgroups) = std::fs::read_to_string(folder.join("cgroup")) else { continue };
        let Some(CgroupOwner { owner, inside }) = owner_of(&cgroups, &node) else { continue };
        let (Owner::Pod(id) | Owner::Container(id)) = &owner;
        let owners = if matches!(owner, Owner::Pod(_)) { &by_uid } else { &by_container };
        let (Some(pods), Some(started)) = (owners.get(id.as_str()), started(&folder)) else { continue };
        for pod in pods {
            let known = candidates.entry(pod.uid.clone()).or_default();
            match &inside {
                Some(other) if known.refused.len() < REFUSED_MAX => known
                    .refused
                    .push(format!("process {pid} is ignored: it is in a cgroup of this pod that also names {other}")),
                Some(_) => {}
                None if known.by_netns.get(&netns).is_none_or(|other| (started, pid) < (other.started, other.pid)) => {
                    known.by_netns.insert(netns, Candidate { started, pid });
                }
                None => {}
            }
        }
    }
    let mut pick = |pod: &SoughtPod| match candidates.remove(&pod.uid) {
        Some(candidates) => choose(proc, pod, candidates),
        None => ScanResult::Nothing,
    };
    sought.iter().map(|pod| (pod.uid.clone(), pick(pod))).collect()
}

/// The one network namespace that holds the pod's address.
fn choose(proc: &Path, pod: &SoughtPod, Candidates { by_netns, mut refused }: Candidates) -> ScanResult {
    let mut candidates: Vec<((u64, u64), Candidate)> = by_netns.into_iter().collect();
    candidates.sort_by_key(|(_, candidate)| (candidate.started, candidate.pid));
    let mut found = Vec::new();
    for (id, Candidate { pid, .. }) in candidates.into_iter().take(LOOKED_AT_MAX) {
        let path = proc.join(pid.to_string()).join("ns/net");
        match Netns::open(&path).and_then(|netns| Ok((netns.addresses()?, netns))) {
            // Another process has the pid now.
            Ok((_, netns)) if netns.id() != id => {}
            Ok((held, netns)) => {
                let held: Vec<IpAddr> = held.into_iter().map(|(ip, _)| ip).collect();
                if pod.ips.iter().any(|ip| held.contains(ip)) {
                    found.push((pid, netns, path));
                } else if refused.len() < REFUSED_MAX {
                    refused.push(format!("process {pid} is in a namespace with {}", list(&held)));
                }
            }
            Err(error) if refused.len() < REFUSED_MAX => refused.push(format!("process {pid}: {error}")),
            Err(_) => {}
        }
    }
    let (all, own) = (refused.join("; "), list(&pod.ips));
    match (found.pop(), found.pop()) {
        (Some((_, netns, path)), None) => ScanResult::Namespace(netns.without_path(), path),
        (Some((one, ..)), Some((other, ..))) => ScanResult::Refused(format!(
            "two namespaces hold its address {own}, those of processes {other} and {one}, so the pod's own is not certain; \
             restart the pod"
        )),
        (None, _) if refused.is_empty() => ScanResult::Nothing,
        (None, _) => ScanResult::Refused(format!("no namespace of its processes holds its address {own}: {all}")),
    }
}

fn list(ips: &[IpAddr]) -> String {
    let names: Vec<String> = ips.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    let more = if ips.len() > NAMED_MAX { format!(" and {} more", ips.len() - NAMED_MAX) } else { String::new() };
    if names.is_empty() { "no address".into() } else { names.join(", ") + &more }
}

/// When a process started, in ticks since the start of the machine: field 22 of `stat`, counted after the last `)`,
/// because the name before that may contain anything (proc_pid_stat(5)).
fn started(folder: &Path) -> Option<u64> {
    let stat = std::fs::read(folder.join("stat")).ok()?;
    let text = String::from_utf8_lossy(&stat);
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const UID: &str = "d5b2c5a2-6a7e-4a8c-9a7b-1f2e3d4c5b6a";

    /// A procfs for tests.
    struct Proc(PathBuf);

    impl Proc {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("culvert-scan-{name}-{}", std::process::id()));
            let proc = Self(folder);
            proc.process(1, "/", 1, "/proc/1/ns/net");
            proc
        }

        fn process(&self, pid: u32, cgroup: &str, started: u64, netns: &str) {
            let folder = self.0.join(pid.to_string());
            fs::create_dir_all(folder.join("ns")).unwrap();
            std::os::unix::fs::symlink(netns, folder.join("ns/net")).unwrap();
            fs::write(folder.join("cgroup"), format!("0::{cgroup}\n")).unwrap();
            let zeros = "0 ".repeat(18);
            fs::write(folder.join("stat"), format!("{pid} (a) b ( c) S {zeros}{started} 0")).unwrap();
        }
    }

    impl Drop for Proc {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn sought(ip: &str) -> SoughtPod {
        SoughtPod { uid: UID.into(), static_uid: None, containers: Vec::new(), ips: vec![ip.parse().unwrap()] }
    }

    /// Makes a network namespace with an address. It lives as long as the descriptor, which has a path.
    fn namespace(ip: &str) -> (fs::File, String) {
        let ip = ip.to_owned();
        let made = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            for what in [&["link", "set", "lo", "up"][..], &["addr", "add", &ip, "dev", "lo"]] {
                assert!(std::process::Command::new("ip").args(what).status().unwrap().success());
            }
            fs::File::open("/proc/thread-self/ns/net").unwrap()
        });
        let file = made.join().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        (file, path)
    }

    #[test]
    fn the_namespace_is_the_one_that_holds_the_address_by_its_oldest_process_and_no_descriptor_is_left() {
        let (_a, own) = namespace("10.9.0.1/32");
        let (_c, foreign) = namespace("10.9.0.2/32");
        let proc = Proc::new("oldest");
        let cgroup = format!("/kubepods/burstable/pod{UID}/x");
        proc.process(40, &cgroup, 100, &foreign);
        proc.process(30, &cgroup, 300, &own);
        proc.process(50, &cgroup, 200, &own);
        proc.process(60, &cgroup, 50, "/proc/1/ns/net");
        proc.process(70, "/user.slice", 10, &own);
        let found = |ip: &str| scan(&proc.0, Path::new("/nonexistent"), &[sought(ip)]).remove(UID).unwrap();
        let id = |path: &str| id_at(Path::new(path)).unwrap();
        assert!(
            matches!(found("10.9.0.1"), ScanResult::Namespace(netns, path) if netns.id() == id(&own) && path.ends_with("50/ns/net"))
        );
        assert!(matches!(found("10.9.0.2"), ScanResult::Namespace(netns, _) if netns.id() == id(&foreign)));
        let ScanResult::Refused(why) = found("10.9.0.3") else { panic!("no namespace has the address") };
        assert!(why.contains("10.9.0.3") && why.contains("10.9.0.2") && why.contains("process 40"), "{why}");
        let open = || fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..10_000 {
            let _ = found("10.9.0.3");
        }
        // Other tests in this process open and close descriptors too.
        assert!(open() < before + 200, "{before} became {}", open());
        assert!(matches!(
            scan(Path::new("/nonexistent"), Path::new("/"), &[sought("10.9.0.1")]).remove(UID),
            Some(ScanResult::Nothing)
        ));
    }

    #[test]
    fn no_pod_takes_over_another_ones_namespace_by_names_or_addresses() {
        let (_a, own) = namespace("10.9.1.1/32");
        let (_b, claims) = namespace("10.9.1.1/32");
        let proc = Proc::new("claims");
        let other = UID.replace('d', "e");
        let (ours, theirs) = (format!("/kubepods/burstable/pod{UID}/x"), format!("/kubepods/burstable/pod{other}/x"));
        proc.process(30, &format!("{theirs}/pod{UID}/y"), 10, &claims);
        let victim = sought("10.9.1.1");
        let scan = |sought: &[SoughtPod]| super::scan(&proc.0, Path::new("/nonexistent"), sought);
        assert!(
            matches!(scan(std::slice::from_ref(&victim))[UID], ScanResult::Nothing),
            "a name inside another pod's cgroup"
        );
        let attacker = SoughtPod { uid: other.as_str().into(), ..sought("10.9.1.2") };
        let ScanResult::Refused(why) = &scan(std::slice::from_ref(&attacker))[other.as_str()] else {
            panic!("it is refused")
        };
        assert!(why.contains("process 30") && why.contains(UID), "{why}");
        // An attacker's processes elsewhere cast no doubt on the victim's.
        proc.process(40, &ours, 50, &own);
        let all = scan(&[victim.clone(), attacker.clone()]);
        assert!(matches!(&all[UID], ScanResult::Namespace(_, path) if path.ends_with("40/ns/net")));
        // A claimed static uid: the pod whose uid it is wins; between two claims, the address decides.
        let claimed = SoughtPod { static_uid: Some(UID.into()), ..attacker.clone() };
        let all = scan(&[victim.clone(), claimed.clone()]);
        assert!(
            matches!(all[UID], ScanResult::Namespace(..)) && !matches!(all[other.as_str()], ScanResult::Namespace(..))
        );
        let mirror = SoughtPod { uid: "mirror".into(), static_uid: Some(UID.into()), ..victim.clone() };
        let all = scan(&[mirror, claimed]);
        assert!(
            matches!(all["mirror"], ScanResult::Namespace(..))
                && !matches!(all[other.as_str()], ScanResult::Namespace(..))
        );
        // The pod's processes are in two network namespaces with its address.
        proc.process(50, &ours, 60, &claims);
        let ScanResult::Refused(why) = &scan(&[victim])[UID] else { panic!("both are refused") };
        assert!(why.contains("processes 40 and 50") && why.contains("10.9.1.1"), "{why}");
    }
}
