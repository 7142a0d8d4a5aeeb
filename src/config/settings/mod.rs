//! All settings, in groups. Each stands here once: the command line, the checker, `docs/settings.md` and `/config_dump`
//! read these tables.

/// Makes a static item of each setting, and the list of them.
macro_rules! settings {
    ($($name:ident: $kind:ty = $setting:expr;)+) => {
        $(pub static $name: Setting<$kind> = $setting;)+

        /// The settings of this group, in the order in which they are shown.
        pub static ALL: &[&dyn Described] = &[$(&$name),+];
    };
}

pub mod certificates;
pub mod connections;
pub mod control;
pub mod dedicated;
pub mod dns;
pub mod history;
pub mod mesh;
pub mod node;
pub mod opentelemetry;
pub mod pods;
pub mod process;

use super::setting::{About, Described};

/// A group of settings.
#[derive(Clone, Copy)]
pub struct Group {
    /// Its title.
    pub title: &'static str,
    /// Its settings.
    pub settings: &'static [&'static dyn Described],
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.title)
    }
}

/// All settings of `culvert node`.
pub static GROUPS: [Group; 10] = [
    Group { title: "Mesh facts", settings: mesh::ALL },
    Group { title: "Certificates", settings: certificates::ALL },
    Group { title: "Pods of the node", settings: pods::ALL },
    Group { title: "The node and the daemon's own pod", settings: node::ALL },
    Group { title: "Dedicated mode", settings: dedicated::ALL },
    Group { title: "DNS", settings: dns::ALL },
    Group { title: "Connections and tunnels", settings: connections::ALL },
    Group { title: "History", settings: history::ALL },
    Group { title: "OpenTelemetry", settings: opentelemetry::ALL },
    Group { title: "Ending, logging and metrics", settings: process::ALL },
];

/// All settings of `culvert control`.
pub static CONTROL_GROUPS: [Group; 2] = [
    Group { title: "Control plane", settings: control::ALL },
    Group { title: "Log of the control plane", settings: &[&process::LOG, &process::LOG_FORMAT] },
];

/// All settings of `culvert node`, one by one.
pub fn all() -> impl Iterator<Item = &'static About> {
    each(&GROUPS)
}

/// The settings of these groups, one by one.
pub fn each(groups: &'static [Group]) -> impl Iterator<Item = &'static About> {
    groups.iter().flat_map(|group| group.settings).map(|setting| setting.about())
}
