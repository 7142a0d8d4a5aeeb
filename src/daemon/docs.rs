//! `docs/settings.md` and `docs/metrics.md`, written from the code. `tests/tidy/` compares them with the files.

use super::control_metrics::{self, ControlMetrics};
use super::metrics::{GROUPS, Metrics, Readings, register_process};
use crate::config::environment::{PREFIXES, REFUSED};
use crate::config::setting::Default as SettingDefault;
use crate::config::settings;
use crate::connection::authorize::revoke::POLICY_WAIT;
use crate::connection::pod::FACTS_WAIT;
use crate::connection::{accept, dial};
use crate::hbone::{config, ping};
use crate::identity::store::FIRST_WAIT;
use crate::ports::HBONE;
use crate::sys::leg::LAST_BYTES;
use crate::telemetry::exposition::Format;
use crate::telemetry::log::brief;
use crate::telemetry::series;
use prometheus_client::registry::Registry;
use std::collections::BTreeSet;
use std::fmt::{Error, Write};
use std::path::PathBuf;
use std::time::Duration;

/// The first lines of a document.
const GENERATED: &str = "<!-- Written from the code: REGENERATE=1 cargo test --test tidy -->\n\n";

/// `docs/settings.md`.
pub fn settings() -> Result<String, Error> {
    let mut t = String::from(GENERATED);
    t.push_str(
        "# Settings\n\n\
         Every setting is an argument and an environment variable of `culvert node`; the argument takes precedence. `culvert check` reads\n\
         the same settings, reports all faults at once with the names of the settings, and exits with 2; so does `culvert node`\n\
         when it starts.\n\n\
         Where ztunnel has a variable, culvert's has the same name, default and meaning, with four differences: `USER_TIMEOUT_ENABLED` is true by\n\
         default; `ENABLE_ORIG_SRC` fails a connection rather than lose the client's address; `PACKET_MARK` is limited to 1 to 4095 without 273;\n\
         and the file of `LOCAL_XDS_PATH` is followed and takes the place of the control plane. Variables that begin with `CULVERT_` are\n\
         culvert's own; `AMBIENT_ENABLEMENT_SELECTOR` and `EXCLUDE_NAMESPACES` are istio-cni's.\n\n\
         Durations are written as for ztunnel: `10s`, `1h30m`, `25` (seconds), `3m31`, `1M` (a minute).\n",
    );
    for group in &settings::GROUPS {
        settings_of(&mut t, group)?;
    }
    t.push_str("\n## Variables with names of your choice\n\n| variable | meaning |\n|---|---|\n");
    for (prefix, meaning) in PREFIXES {
        row(&mut t, &[&format!("`{prefix}<NAME>`"), meaning])?;
    }
    t.push_str(
        "\n## Refused variables\n\n\
         These variables of ztunnel stop the start, with the variable's name, where they ask for something that culvert does not\n\
         do. `ISTIO_META_DNS_PROXY_ADDR` may only be `localhost:15053`. `AUTHZ_POLICY_INFO_LOGGING` and `INPOD_ENABLED` are\n\
         ignored.\n\n\
         | variable | accepted value | otherwise |\n|---|---|---|\n",
    );
    for refused in REFUSED {
        let accepted = if refused.accepted.is_empty() { "none".into() } else { format!("`{}`", refused.accepted) };
        row(&mut t, &[&format!("`{}`", refused.variable), &accepted, refused.instead])?;
    }
    bounds(&mut t)?;
    t.push_str("\n# Settings of `culvert control`\n");
    for group in &settings::CONTROL_GROUPS {
        settings_of(&mut t, group)?;
    }
    Ok(t)
}

/// The table of a group of settings.
fn settings_of(t: &mut String, group: &settings::Group) -> Result<(), Error> {
    write!(
        t,
        "\n## {}\n\n| argument | variable | default | accepts | meaning |\n|---|---|---|---|---|\n",
        group.title
    )?;
    for setting in group.settings {
        let about = setting.about();
        let default = match about.default {
            SettingDefault::None => "none".to_owned(),
            SettingDefault::Text(text) => format!("`{text}`"),
            SettingDefault::Depends(words) => words.to_owned(),
        };
        let accepts = setting.accepts().unwrap_or_default();
        row(t, &[&format!("`--{}`", about.flag), &format!("`{}`", about.variable), &default, &accepts, about.help])?;
    }
    Ok(())
}

/// The bounds on time that no setting changes.
fn bounds(t: &mut String) -> Result<(), Error> {
    let first_byte = format!("First byte of a peer on port {HBONE}");
    let all: [(&str, Duration); 11] = [
        (&first_byte, accept::error::SILENCE_DEADLINE),
        ("TLS and HTTP/2 handshake of a tunnel", accept::error::HANDSHAKE_DEADLINE),
        ("TCP connection to a destination", dial::error::CONNECT_DEADLINE),
        ("Answer to a CONNECT", dial::error::ANSWER_DEADLINE),
        ("Mesh facts about the pod of a connection", FACTS_WAIT),
        ("A policy that a workload names and that is not known yet", POLICY_WAIT),
        ("First certificate of an identity", FIRST_WAIT),
        ("Time between PINGs on a tunnel", config::PING_INTERVAL),
        ("Answer to a PING", config::PING_TIMEOUT),
        (
            "Time for which the kernel resends unacknowledged data of a tunnel, also after the daemon has ended",
            ping::GONE_AFTER,
        ),
        ("Delivery of the data that its sender sent before a reset", LAST_BYTES),
    ];
    t.push_str("\n## Bounds on time\n\nNo setting changes these.\n\n| what | time |\n|---|---|\n");
    for (what, time) in all {
        row(t, &[what, &brief(time).to_string()])?;
    }
    t.push_str("\nNothing idle is ever closed, except for half-closed connections and unused tunnels. A tunnel that is cut is reset.\n");
    Ok(())
}

/// `docs/metrics.md`.
pub fn metrics() -> Result<String, Error> {
    let mut t = String::from(GENERATED);
    t.push_str(
        "# Metrics\n\n\
         The port for metrics serves Prometheus' text format 0.0.4, or OpenMetrics 1.0.0 where `Accept` asks for it. Traffic metrics have\n\
         ztunnel's names and labels. *Unstable* marks names that ztunnel itself may change.\n\n\
         A label set with names from the mesh is removed when nothing has used it for a while (`CULVERT_METRIC_SERIES_IDLE`) and one of its\n\
         workloads is gone; it begins at zero when it returns. Beyond a number of them (`CULVERT_METRIC_SERIES_MAX`), new ones are counted with\n\
         `overflow` in place of every name, and in `culvert_metric_overflows_total`.\n",
    );
    let metrics = Metrics::new(PathBuf::new(), true, 0, false, series::Config::default(), None);
    for group in &GROUPS {
        section(&mut t, group.title, &metrics.example(group))?;
    }
    let known = Some(Duration::ZERO);
    let readings = move || Readings { to_outage: known, mesh_age: known, ..Readings::default() };
    let mut of_process = Registry::default();
    register_process(&mut of_process, Box::new(readings));
    section(&mut t, "The process", &of_process)?;
    t.push_str("\n# Metrics of `culvert control`\n\nThose of its process are named as above.\n");
    let control = ControlMetrics::default();
    for (title, register) in control_metrics::GROUPS {
        section(&mut t, title, &control.example(register))?;
    }
    Ok(t)
}

/// A metric as it is exposed.
#[derive(Default)]
struct Family {
    name: String,
    kind: String,
    help: String,
    labels: BTreeSet<String>,
}

/// Labels above which a family's labels stand below the table instead of in it.
const LABELS_MAX: usize = 10;

/// The section of one group.
fn section(t: &mut String, title: &str, registry: &Registry) -> Result<(), Error> {
    write!(t, "\n## {title}\n\n| name | type | labels | meaning | alert |\n|---|---|---|---|---|\n")?;
    let mut below = None;
    for family in families(&Format::Text.render(registry)?) {
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let mut labels = labels.join(", ");
        if family.labels.len() > LABELS_MAX {
            below = Some(std::mem::replace(&mut labels, "the traffic labels below".into()));
        }
        let (meaning, alert) = match family.help.trim_end_matches('.').split_once(". Alert ") {
            Some((meaning, alert)) => (meaning, alert),
            None => (family.help.trim_end_matches('.'), ""),
        };
        row(t, &[&format!("`{}`", family.name), &family.kind, &labels, &format!("{meaning}."), alert])?;
    }
    below.map_or(Ok(()), |labels| writeln!(t, "\nThe traffic labels are {labels}."))
}

/// The families of an exposition in Prometheus' text format.
fn families(text: &str) -> Vec<Family> {
    let mut all: Vec<Family> = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(help)) => {
                all.push(Family { name: name.into(), help: help.into(), ..Family::default() });
            }
            (Some("#"), Some("TYPE"), Some(_), Some(kind)) => {
                if let Some(family) = all.last_mut() {
                    family.kind = kind.into();
                }
            }
            _ => {
                let labels =
                    line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(labels, _)| labels);
                // A bucket's bound belongs to the type.
                let names =
                    labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _)| name.to_owned());
                if let Some(family) = all.last_mut() {
                    family.labels.extend(names.filter(|name| name != "le"));
                }
            }
        }
    }
    all
}

fn row(t: &mut String, cells: &[&str]) -> Result<(), Error> {
    for cell in cells {
        write!(t, "| {} ", cell.replace('|', "\\|"))?;
    }
    t.push_str("|\n");
    Ok(())
}
