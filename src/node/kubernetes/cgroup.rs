//! Tells which pod or container a process belongs to, by its cgroups, in the forms that the kubelet and container
//! runtimes write. Pure.

/// Owner of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Uid of a pod, with dashes (the uid of a static pod is 32 digits without).
    Pod(String),
    /// Id of a container, where the path does not name its pod.
    Container(String),
}

/// What the cgroups of a process say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupOwner {
    /// The owner: the outermost name, which the node's runtime has created.
    pub owner: Owner,
    /// Another name further inside. A pod that may write its own cgroup can put any name there.
    pub inside: Option<String>,
}

/// Reads `/proc/PID/cgroup`. `node` is the same file of the node's first process, because the node may itself be a
/// container of a pod. Returns `None` if no owner is named, or hierarchies disagree.
pub fn owner_of(text: &str, node: &str) -> Option<CgroupOwner> {
    let all: Vec<CgroupOwner> = text.lines().filter_map(|line| below(line, node)).filter_map(of_path).collect();
    // A hierarchy that names the pod says more than one that names only a container.
    let is_pod = |said: &&CgroupOwner| matches!(said.owner, Owner::Pod(_));
    let owner = all.iter().find(is_pod).or(all.first())?.owner.clone();
    let kind = std::mem::discriminant(&owner);
    let agreed = all.iter().filter(|said| std::mem::discriminant(&said.owner) == kind).all(|said| said.owner == owner);
    let inside = all.into_iter().find_map(|said| said.inside);
    agreed.then_some(CgroupOwner { owner, inside })
}

fn of_path(path: &str) -> Option<CgroupOwner> {
    let mut named = path.split(['/', ':']).filter_map(named);
    let owner = named.next()?;
    // Containers of a pod are named inside it.
    let other = named.find(|inner| *inner != owner && !matches!((&owner, inner), (Owner::Pod(_), Owner::Container(_))));
    let inside = other.map(|(Owner::Pod(id) | Owner::Container(id))| id);
    Some(CgroupOwner { owner, inside })
}

fn named(part: &str) -> Option<Owner> {
    pod_uid(part).map(Owner::Pod).or_else(|| container_id(part).map(Owner::Container))
}

/// The path of a line, without the prefix that all processes of the node share.
fn below<'a>(line: &'a str, node: &str) -> Option<&'a str> {
    // The path may contain colons; the number and the controllers before it contain none.
    let mut fields = line.splitn(3, ':');
    let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let head = format!("{number}:{controllers}:");
    let of_node = node.lines().find_map(|line| line.strip_prefix(&head)).unwrap_or_default();
    let of_node = of_node.strip_suffix("/init.scope").unwrap_or(of_node).trim_end_matches('/');
    Some(path.strip_prefix(of_node).filter(|rest| rest.starts_with('/')).unwrap_or(path))
}

/// The uid in a part of a path: `podUID` by cgroupfs, or `kubepods-burstable-podUID.slice` with `_` for `-` by systemd.
fn pod_uid(part: &str) -> Option<String> {
    let at = part.rfind("pod")?;
    // In `kubepods`, no uid follows.
    let before = part.get(..at).and_then(|before| before.chars().next_back());
    if before.is_some_and(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    uuid(part.get(at + 3..)?)
}

/// A UUID with any punctuation between its groups, or none.
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

/// The id of a container in a part of a path: `crio-ID.scope`, `cri-containerd-ID.scope`, `ID`.
fn container_id(part: &str) -> Option<String> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let id = part.rsplit('-').next()?;
    (id.len() == 64 && id.bytes().all(|c| c.is_ascii_hexdigit())).then(|| id.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UID: &str = "d5b2c5a2-6a7e-4a8c-9a7b-1f2e3d4c5b6a";
    const ID: &str = "4f2a0c9b8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a";

    fn owner(text: &str) -> Option<Owner> {
        let said = owner_of(text, "0::/init.scope\n")?;
        assert_eq!(said.inside, None, "{text}");
        Some(said.owner)
    }

    #[test]
    fn every_form_of_path_leads_to_the_pod() {
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
            format!(
                "0::/system.slice/containerd.service/kubepods-burstable-pod{underscored}.slice:cri-containerd:{ID}"
            ),
        ] {
            assert_eq!(owner(&text), Some(Owner::Pod(UID.into())), "{text}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(owner(&format!("0::/kubepods/burstable/pod{hash}/{ID}")), Some(Owner::Pod(hash.into())));
        for inner in ["", "/container", "/a/b"] {
            assert_eq!(owner(&format!("0::/system.slice/crio-{ID}.scope{inner}")), Some(Owner::Container(ID.into())));
        }
        // kind: the node itself is a container of a pod.
        let node = format!("/kubelet/kubepods/pod{}/{ID}", UID.replace('d', "0"));
        for first in ["/init.scope", "", "/"] {
            let found =
                owner_of(&format!("0::{node}/kubelet.slice/kubepods/pod{UID}/{ID}"), &format!("0::{node}{first}\n"));
            assert_eq!(found, Some(CgroupOwner { owner: Owner::Pod(UID.into()), inside: None }));
        }
        let found = owner_of(&format!("0::{node}/system.slice/crio-{ID}.scope"), &format!("0::{node}/init.scope"));
        assert_eq!(found, Some(CgroupOwner { owner: Owner::Container(ID.into()), inside: None }));
    }

    #[test]
    fn the_outermost_name_is_the_owner_and_an_inner_one_is_reported() {
        let (victim, other) = (UID.replace('d', "e"), ID.replace('4', "5"));
        let inside = victim.replace('-', "_");
        for (text, owner, named) in [
            (format!("0::/kubepods/burstable/pod{UID}/{ID}/pod{victim}/x"), Owner::Pod(UID.into()), &victim),
            (format!("0::/kubepods/pod{UID}/{ID}/kubepods-pod{inside}.slice"), Owner::Pod(UID.into()), &victim),
            (
                format!("3:cpu:/kubepods/pod{UID}\n2:cpuset:/kubepods/pod{UID}/pod{victim}"),
                Owner::Pod(UID.into()),
                &victim,
            ),
            (format!("0::/system.slice/crio-{ID}.scope/crio-{other}.scope"), Owner::Container(ID.into()), &other),
            (format!("0::/system.slice/crio-{ID}.scope/{other}"), Owner::Container(ID.into()), &other),
        ] {
            assert_eq!(owner_of(&text, "0::/\n"), Some(CgroupOwner { owner, inside: Some(named.clone()) }), "{text}");
        }
        // The pod of a container cannot be verified by a name inside the container.
        let named = owner_of(&format!("0::/system.slice/crio-{ID}.scope/pod{victim}"), "0::/init.scope\n");
        assert_eq!(named, Some(CgroupOwner { owner: Owner::Container(ID.into()), inside: Some(victim) }));
    }

    #[test]
    fn paths_that_name_no_pod_or_two_have_no_owner() {
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
            let _ = owner_of(&text, &tail);
            let _ = owner_of(&format!("0::/kubepods/pod{tail}"), &text);
        }
    }
}
