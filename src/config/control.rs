//! Checks the settings of `culvert control`. Pure.

use super::Faults;
use super::args::ControlArgs;
use super::checker::Checker;
use super::setting::About;
use super::settings::control;
use crate::control_plane::ca::{self, Account, Source};
use crate::control_plane::{Cluster, Config};
use std::collections::BTreeMap;
use std::time::Duration;

/// Checks the settings of the control plane.
pub fn check(args: &ControlArgs) -> Result<Config, Faults> {
    let mut checker = Checker::new(args);
    let c = &mut checker;
    let cluster = Cluster {
        namespace: c.read(&control::NAMESPACE).into(),
        trust_domain: c.read(&control::TRUST_DOMAIN).into(),
        id: c.read(&control::CLUSTER_ID).into(),
        domain: c.read(&control::CLUSTER_DOMAIN).into(),
    };
    let ca = ca(c, &cluster);
    let log = super::check::log_config(c);
    let config = Config {
        kubeconfig: c.path(&control::KUBECONFIG),
        cluster,
        port: c.read(&control::PORT),
        ca,
        log,
        settings: given(args),
    };
    if checker.faults.is_empty() { Ok(config) } else { Err(Faults(checker.faults)) }
}

/// The settings that were given, for the dump; of secret ones only that they were.
fn given(args: &ControlArgs) -> BTreeMap<&'static str, String> {
    let shown = |(about, text): (&About, &str)| match about.is_secret {
        true => (about.variable, "(secret)".to_owned()),
        false => (about.variable, text.to_owned()),
    };
    args.given().map(shown).collect()
}

fn ca(c: &mut Checker<'_>, cluster: &Cluster) -> ca::Config {
    let source = match (c.path(&control::CA_DIR), c.read(&control::CA_ISSUER)) {
        (Some(_), Some(_)) => {
            c.fault(&control::CA_ISSUER.about, "is set together with CULVERT_CONTROL_CA_DIR; only one signs");
            Source::Secrets
        }
        (Some(folder), None) => Source::Folder(folder),
        (None, Some(issuer)) => Source::CertManager(issuer),
        (None, None) => Source::Secrets,
    };
    let (service, namespace) = (c.read(&control::SERVICE), &cluster.namespace);
    let mut names = vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.{}", cluster.domain),
        format!("{service}.{namespace}"),
        "localhost".to_owned(),
    ];
    names.extend(c.read(&control::NAMES).into_iter().filter(|name| !names.contains(name)).collect::<Vec<_>>());
    let ztunnel = || vec![Account { namespace: namespace.clone(), name: "ztunnel".into() }];
    let trusted = c.optional(&control::TRUSTED).unwrap_or_else(ztunnel);
    let default_life: Duration = c.read(&control::DEFAULT_TTL);
    let max_life = c.read(&control::MAX_TTL);
    if default_life > max_life {
        c.fault(&control::DEFAULT_TTL.about, "is longer than MAX_WORKLOAD_CERT_TTL");
    }
    ca::Config {
        source,
        namespace: namespace.clone(),
        trust_domain: cluster.trust_domain.clone(),
        names,
        audiences: c.read(&control::AUDIENCES),
        trusted,
        default_life,
        max_life,
    }
}
