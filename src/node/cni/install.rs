//! Installs the CNI plugin on the node, and removes it: the binary in the folder of CNI plugins, and a configuration
//! that repeats the node's own one with our plugin at its end. Files of other programs are never changed, so removing
//! ours restores the previous state. Our configuration sorts first, so a node that starts again runs no pods without
//! the plugin.

use crate::node::active_daemon::ActiveRole;
use crate::task::Signal;
use crate::task::files::{FolderWatch, Stamp, remove_leftovers, stamp, temporary_name, was_there};
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value, json};
use std::fs::Permissions;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Name of the binary, which is also the plugin's type.
pub const PLUGIN: &str = "culvert-cni";
/// Name of our configuration; it sorts before all others.
pub const OURS: &str = "00-culvert.conflist";

/// Bytes that are compared at once.
const PIECE: usize = 64 * 1024;

/// What to install, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Folder of CNI plugins.
    pub bin_dir: PathBuf,
    /// Folder of CNI configurations.
    pub conf_dir: PathBuf,
    /// The daemon's socket, by its path on the host.
    pub socket: PathBuf,
    /// Namespaces whose pods do not wait for the daemon.
    pub excluded: Vec<String>,
    /// Namespace of the daemon's own pods.
    pub own_namespace: String,
    /// Name of the daemon's own DaemonSet.
    pub own_name: String,
    /// Name of the node, for messages about pods that do not start.
    pub node: String,
}

/// Why the plugin is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file cannot be read or written.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// There is no CNI configuration to add the plugin to.
    #[error("{0}: contains no usable CNI configuration yet{1}")]
    NoPrimary(PathBuf, String),
}

impl Config {
    /// Installs the running binary and the configuration. Returns whether the configuration was written.
    fn install(&self, known: &mut Stamp) -> Result<bool, InstallError> {
        self.install_binary(known)?;
        self.install_configuration()
    }

    fn install_binary(&self, known: &mut Stamp) -> Result<(), InstallError> {
        // A daemon that hangs may still write although another one is active, so each writes to its own file.
        let new = self.bin_dir.join(temporary_name(PLUGIN));
        let target = self.bin_dir.join(PLUGIN);
        let own = Path::new("/proc/self/exe");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| InstallError::File(path, error)
        };
        // Compare the contents only if the file has changed since the last time: both are large.
        let stamp = stamp(&target);
        if stamp.is_some() && stamp == *known {
            return Ok(());
        }
        let length = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.len()).ok();
        if length(own) == length(&target) && same(own, &target).unwrap_or(false) {
            *known = stamp;
            return Ok(());
        }
        remove_leftovers(&self.bin_dir, PLUGIN);
        // The new file replaces the old one as a whole, so a running plugin is not affected.
        let write = || {
            std::fs::copy(own, &new).map_err(failed(&new))?;
            std::fs::set_permissions(&new, Permissions::from_mode(0o755)).map_err(failed(&new))?;
            std::fs::rename(&new, &target).map_err(failed(&target))
        };
        whole(&new, write())
    }

    /// Writes our configuration if it is not up to date. Returns whether it was written.
    fn install_configuration(&self) -> Result<bool, InstallError> {
        let primary = self.primary()?;
        let path = self.conf_dir.join(OURS);
        let text = format!("{:#}\n", self.chained(primary));
        if std::fs::read_to_string(&path).is_ok_and(|now| now == text) {
            return Ok(false);
        }
        remove_leftovers(&self.conf_dir, OURS);
        let new = self.conf_dir.join(temporary_name(OURS));
        let write = || {
            std::fs::write(&new, &text)?;
            std::fs::set_permissions(&new, Permissions::from_mode(0o600))?;
            std::fs::rename(&new, &path)
        };
        whole(&new, write()).map_err(|error| InstallError::File(path.clone(), error))?;
        Ok(true)
    }

    /// The configuration that runtimes would use without ours: the first valid one by name.
    fn primary(&self) -> Result<Map<String, Value>, InstallError> {
        let entries = std::fs::read_dir(&self.conf_dir).map_err(|e| InstallError::File(self.conf_dir.clone(), e))?;
        let mut names: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        names.retain(|path| {
            let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            matches!(kind, "conf" | "conflist" | "json") && name != OURS && !name.starts_with('.')
        });
        names.sort();
        let mut why = String::new();
        for path in names {
            let read = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
            match read.and_then(list) {
                Some(list) => return Ok(list),
                None => why += &format!("; {} is not valid", path.display()),
            }
        }
        Err(InstallError::NoPrimary(self.conf_dir.clone(), why))
    }

    fn chained(&self, mut primary: Map<String, Value>) -> Value {
        let plugin = json!({
            "type": PLUGIN,
            "socket": self.socket,
            "excludeNamespaces": self.excluded,
            "ownNamespace": self.own_namespace,
            "ownName": self.own_name,
            "node": self.node,
        });
        if let Some(plugins) = primary.get_mut("plugins").and_then(Value::as_array_mut) {
            plugins.retain(|other| other["type"] != PLUGIN);
            plugins.push(plugin);
        }
        Value::Object(primary)
    }

    /// The folders of the configuration and the binary, for messages.
    pub fn place(&self) -> String {
        format!("{} and {}", self.conf_dir.display(), self.bin_dir.display())
    }

    /// Removes the configuration and then the binary, if they exist. Returns what was removed.
    pub fn remove(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut removed = Vec::new();
        for path in [self.conf_dir.join(OURS), self.bin_dir.join(PLUGIN)] {
            if was_there(std::fs::remove_file(&path)).map_err(|error| InstallError::File(path.clone(), error))? {
                removed.push(path);
            }
        }
        Ok(removed)
    }

    /// Keeps the plugin installed while this daemon is active, until cancelled or the process begins to end. `in_place`
    /// shows whether it is installed.
    pub async fn keep(self, in_place: Gauge, role: ActiveRole, drain: Signal) {
        let (mut said, mut known) = (None::<String>, None);
        let (mut folder, mut role_changes) = (FolderWatch::new(&self.conf_dir), role.subscribe());
        loop {
            let Some(guard) = role.write_guard() else {
                tokio::select! {
                    () = drain.gentle() => return,
                    changed = role_changes.changed() => if changed.is_err() { return },
                }
                continue;
            };
            let result = self.install(&mut known);
            drop(guard);
            in_place.set(i64::from(result.is_ok()));
            match result {
                Ok(written) => {
                    if written {
                        let path = self.conf_dir.join(OURS);
                        tracing::info!(path = %path.display(), "the CNI plugin is installed: new pods start only once they are captured");
                    }
                    said = None;
                }
                Err(error) => {
                    let error = error.to_string();
                    if said.as_ref() != Some(&error) {
                        tracing::error!(error, "the CNI plugin is not installed: pods start before they are captured");
                    }
                    said = Some(error);
                }
            }
            // When the process ends, the uninstallation decides whether the plugin stays, so it is not written again.
            tokio::select! {
                biased;
                () = drain.gentle() => return,
                changed = role_changes.changed() => if changed.is_err() { return },
                () = folder.changed() => {}
            }
        }
    }
}

/// Whether two files have the same content. They are read in pieces, because holding two binaries in memory takes more
/// than the idle daemon needs.
fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (std::fs::File::open(one)?, std::fs::File::open(other)?);
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        let length = one.read(&mut left)?;
        let (left, right) = (left.get(..length).unwrap_or_default(), right.get_mut(..length).unwrap_or_default());
        if length == 0 {
            return Ok(other.read(&mut [0])? == 0);
        }
        match other.read_exact(right) {
            Ok(()) if left == right => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Removes the new file if it could not be written completely.
fn whole<E>(new: &Path, written: Result<(), E>) -> Result<(), E> {
    if written.is_err() {
        // A failure to remove it says no more than the failure to write it.
        let _ = std::fs::remove_file(new);
    }
    written
}

/// Reads a configuration as a list of plugins; a configuration without a list is itself one plugin.
fn list(configuration: Value) -> Option<Map<String, Value>> {
    let Value::Object(mut map) = configuration else { return None };
    if map.get("plugins").is_some() {
        let fine = map.get("plugins").and_then(Value::as_array).is_some_and(|plugins| !plugins.is_empty());
        return (fine && map.contains_key("name")).then_some(map);
    }
    map.get("type")?.as_str()?;
    let name = map.get("name")?.clone();
    let version = map.remove("cniVersion").unwrap_or_else(|| json!("0.3.1"));
    Some(Map::from_iter([
        ("cniVersion".to_owned(), version),
        ("name".to_owned(), name),
        ("plugins".to_owned(), json!([Value::Object(map)])),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_configuration_repeats_the_first_one_and_changes_no_file() {
        let dir = std::env::temp_dir().join(format!("culvert-cni-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let config = Config {
            bin_dir: dir.clone(),
            conf_dir: dir.clone(),
            socket: "/s".into(),
            excluded: vec!["kube-system".into()],
            own_namespace: "o".into(),
            own_name: "ztunnel".into(),
            node: "n1".into(),
        };
        assert!(matches!(config.install_configuration(), Err(InstallError::NoPrimary(..))));
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        let long = "x".repeat(3 * PIECE);
        for (name, text) in
            [("a", long.clone()), ("b", long.clone()), ("c", long.clone() + "y"), ("d", "y".to_owned() + &long[1..])]
        {
            write(name, &text);
        }
        let same_as_a = |name: &str| same(&dir.join("a"), &dir.join(name)).unwrap();
        assert!(same_as_a("b") && !same_as_a("c") && !same_as_a("d") && !same(&dir.join("c"), &dir.join("a")).unwrap());
        write("05-broken.conflist", "{");
        write("10-a.conflist", r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}], "x": 1}"#);
        write("20-b.conf", r#"{"cniVersion": "0.4.0", "name": "other", "type": "ptp"}"#);
        assert!(config.install_configuration().unwrap());
        assert!(!config.install_configuration().unwrap(), "nothing is written twice");
        let ours = || serde_json::from_slice::<Value>(&std::fs::read(dir.join(OURS)).unwrap()).unwrap();
        assert_eq!((&ours()["name"], &ours()["cniVersion"], &ours()["x"]), (&json!("net"), &json!("1.0.0"), &json!(1)));
        assert_eq!(ours()["plugins"][0], json!({"type": "bridge"}));
        assert_eq!(ours()["plugins"][1]["type"], PLUGIN);
        let mode = std::fs::metadata(dir.join(OURS)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // The first one is removed, so the next one is repeated, as a list.
        std::fs::remove_file(dir.join("10-a.conflist")).unwrap();
        assert!(config.install_configuration().unwrap());
        assert_eq!((&ours()["name"], &ours()["plugins"][0]["type"]), (&json!("other"), &json!("ptp")));
        assert_eq!(config.remove().unwrap().len(), 1);
        assert_eq!(config.remove().unwrap().len(), 0);
        assert!(dir.join("20-b.conf").exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
