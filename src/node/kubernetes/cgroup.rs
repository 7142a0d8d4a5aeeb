//! Whose a process is, by its cgroups: the forms that kubelet and container runtimes write.

/// What a process's cgroups say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The uid of a pod, with dashes (a static pod's is 32 digits without).
    Pod(String),
    /// The id of a container; its pod is not named.
    Container(String),
}

/// Reads `/proc/PID/cgroup`. Nothing where there is no pod in it, or several different ones.
pub fn owner(text: &str) -> Option<Owner> {
    let paths = || text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut pods: Vec<String> = paths().filter_map(pod_uid).collect();
    pods.sort_unstable();
    pods.dedup();
    match pods.as_slice() {
        [] => {
            let mut containers: Vec<String> = paths().filter_map(container_id).collect();
            containers.sort_unstable();
            containers.dedup();
            (containers.len() == 1).then(|| containers.pop().map(Owner::Container)).flatten()
        }
        [uid] => Some(Owner::Pod(uid.clone())),
        _ => None,
    }
}

/// The uid behind the last `pod` of a path: `/kubepods/burstable/podUID/…` of cgroupfs, with `_` in the place of `-` and
/// `.slice` behind it where systemd has made the path. The last, because a node may itself be a container of a pod.
fn pod_uid(path: &str) -> Option<String> {
    path.rsplit(['/', ':']).find_map(|part| {
        let at = part.rfind("pod")?;
        // `kubepods` has none behind it.
        let before = part.get(..at).and_then(|before| before.chars().next_back());
        if before.is_some_and(|c| c.is_ascii_alphanumeric()) {
            return None;
        }
        uuid(part.get(at + 3..)?)
    })
}

/// A UUID with any punctuation between its groups, or none at all.
fn uuid(text: &str) -> Option<String> {
    let text = text.strip_suffix(".slice").unwrap_or(text);
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    if digits.len() != 32 || !text.chars().all(|c| c.is_ascii_hexdigit() || c.is_ascii_punctuation()) {
        return None;
    }
    if digits.len() == text.len() {
        return Some(digits.to_ascii_lowercase());
    }
    let groups = [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| digits.get(range).unwrap_or_default());
    let separated: Vec<&str> = text.split(|c: char| c.is_ascii_punctuation()).collect();
    (separated == groups).then(|| groups.join("-").to_ascii_lowercase())
}

/// The id of a container in the last part of a path: `crio-ID.scope`, `cri-containerd-ID.scope`, `ID`.
fn container_id(path: &str) -> Option<String> {
    let part = path.rsplit('/').next()?;
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let id = part.rsplit(['-', ':']).next()?;
    (id.len() == 64 && id.bytes().all(|c| c.is_ascii_hexdigit())).then(|| id.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UID: &str = "d5b2c5a2-6a7e-4a8c-9a7b-1f2e3d4c5b6a";
    const ID: &str = "4f2a0c9b8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a";

    #[test]
    fn every_form_gives_the_pod() {
        let underscored = UID.replace('-', "_");
        for text in [
            format!("0::/kubepods/burstable/pod{UID}/{ID}\n"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-{ID}.scope\n"
            ),
            format!("0::/kubepods.slice/kubepods-pod{underscored}.slice/crio-{ID}.scope\n"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{underscored}.slice/docker-{ID}.scope\n"
            ),
            format!(
                "12:memory:/kubepods/besteffort/pod{UID}/{ID}\n11:cpu,cpuacct:/kubepods/besteffort/pod{UID}/{ID}\n1:name=systemd:/\n0::/\n"
            ),
            format!(
                "0::/../../kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{underscored}.slice/cri-containerd-{ID}.scope/init\n"
            ),
            // kind: the node is a container itself.
            format!("0::/kubelet/kubepods/pod{}/{ID}/kubelet.slice/kubepods/pod{UID}/{ID}", UID.replace('d', "0")),
            format!(
                "0::/system.slice/containerd.service/kubepods-burstable-pod{underscored}.slice:cri-containerd:{ID}"
            ),
        ] {
            assert_eq!(owner(&text), Some(Owner::Pod(UID.into())), "{text}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(owner(&format!("0::/kubepods/burstable/pod{hash}/{ID}")), Some(Owner::Pod(hash.into())));
        assert_eq!(owner(&format!("0::/system.slice/crio-{ID}.scope")), Some(Owner::Container(ID.into())));
    }

    #[test]
    fn what_names_no_pod_or_two_gives_none() {
        let other = UID.replace('d', "e");
        for text in [
            String::new(),
            "0::/\n".into(),
            "0::/user.slice/user-1000.slice/session-1.scope\n".into(),
            "0::/kubepods/burstable/podnothing/x\n".into(),
            format!("0::/machine.slice/tripod{UID}\n"),
            format!("2:cpu:/kubepods/pod{UID}/{ID}\n1:memory:/kubepods/pod{other}/{ID}\n"),
        ] {
            assert_eq!(owner(&text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn reading_is_total(text in "\\PC{0,200}", tail in "[a-z0-9/_.:-]{0,120}") {
            let _ = owner(&text);
            let _ = owner(&format!("0::/kubepods/pod{tail}"));
        }
    }
}
