//! Dedicated mode: the workload that the daemon serves, and the rules that `culvert redirect` writes for it.

use super::args::NodeArgs;
use super::checker::Checker;
use super::environment::Environment;
use super::settings::{connections, dedicated, pods};
use super::{Faults, istio};
use crate::mesh::Text;
use crate::node::{OwnRules, OwnWorkload};
use crate::ports;

/// The workload that the daemon serves in dedicated mode; `None` in shared mode.
pub(super) fn own_workload(c: &mut Checker<'_>) -> Option<OwnWorkload> {
    if c.read(&dedicated::MODE) == dedicated::Mode::Shared {
        return None;
    }
    for (about, given) in
        [(&pods::PODS.about, c.given(&pods::PODS)), (&pods::PODS_FILE.about, c.given(&pods::PODS_FILE))]
    {
        if given.is_some_and(|given| !given.is_empty()) {
            c.fault(about, "is set, but PROXY_MODE is dedicated: there is one workload, and nothing enrols it");
        }
    }
    let info = c.optional(&dedicated::WORKLOAD_INFO).or_else(|| of_downward_api(c));
    if info.is_none() && c.given(&dedicated::WORKLOAD_INFO).is_none_or(str::is_empty) {
        c.fault(
            &dedicated::WORKLOAD_INFO.about,
            "is not set, and neither are POD_NAMESPACE, POD_NAME and SERVICE_ACCOUNT: in dedicated mode they say which workload \
             this is",
        );
    }
    let [namespace, name, service_account] = info.unwrap_or_else(|| ["", "", ""].map(Text::from));
    Some(OwnWorkload { namespace, name, service_account, user: c.read(&dedicated::REDIRECT_UID) })
}

/// The workload, as the variables say that the downward API fills.
fn of_downward_api(c: &Checker<'_>) -> Option<[Text; 3]> {
    let own = istio::own_pod(c)?;
    Some([own.namespace.into(), own.name.into(), own.service_account.into()])
}

/// The rules that `culvert redirect` writes. Only the settings that concern them are read, so that an init container
/// needs no others.
pub fn redirect(args: &NodeArgs, environment: &Environment) -> Result<OwnRules, Faults> {
    let mut checker = Checker::new(args);
    let c = &mut checker;
    let proxy = istio::proxy_config(c, environment);
    let ipv6 = c.read(&connections::IPV6);
    let mut plaintext_ports = vec![ports::READY, proxy.stats_port.unwrap_or(ports::STATS)];
    plaintext_ports.extend(c.read(&dedicated::EXCLUDE_INBOUND_PORTS));
    plaintext_ports.sort_unstable();
    plaintext_ports.dedup();
    let rules = OwnRules {
        user: c.read(&dedicated::REDIRECT_UID),
        ipv6,
        dns: istio::dns(c, environment, &proxy, ipv6, 0).capture,
        plaintext_ports,
    };
    if checker.faults.is_empty() { Ok(rules) } else { Err(Faults(checker.faults)) }
}

#[cfg(test)]
mod tests {
    use super::super::check::{Machine, check};
    use super::*;

    fn checked(more: &[(&str, &str)]) -> Result<super::super::Config, String> {
        let base = [("LOCAL_XDS_PATH", "/m"), ("CULVERT_CA_DIR", "/c"), ("PROXY_MODE", "dedicated")];
        let args = NodeArgs::from(&[&base[..], more].concat()[..]);
        check(&args, &Environment::default(), Machine { cpus: 2, open_files: 1024 }).map_err(|f| f.to_string())
    }

    #[test]
    fn the_workload_is_named_or_every_fault_is() {
        use crate::node::PodSource;
        let own = |more: &[(&str, &str)]| match checked(more).unwrap().node.source {
            PodSource::Own(own) => [own.namespace, own.name, own.service_account].map(|text| text.to_string()),
            other => panic!("{other:?}"),
        };
        let pod = [("POD_NAMESPACE", "shop"), ("POD_NAME", "cart-1"), ("SERVICE_ACCOUNT", "cart")];
        assert_eq!(own(&pod), ["shop", "cart-1", "cart"]);
        let info = ("PROXY_WORKLOAD_INFO", "a/b/c");
        assert_eq!(own(&[pod[0], pod[1], pod[2], info]), ["a", "b", "c"], "it takes precedence");
        let config = checked(&[info, ("PACKET_MARK", "7")]).unwrap();
        assert!(config.own_pod.is_none() && !config.node.redirect);
        assert_eq!(
            (config.node.mark, config.connection.sockets.mark, config.dns.mark),
            (0, 0, 0),
            "marks need a right"
        );
        assert!(!config.connection.sockets.keep_source, "so does a client's address");
        for (more, expected) in [
            (&pod[..2], "PROXY_WORKLOAD_INFO (--proxy-workload-info): is not set"),
            (&[("PROXY_WORKLOAD_INFO", "a/b")], "PROXY_WORKLOAD_INFO (--proxy-workload-info): \"a/b\" is not valid"),
            (&[("PROXY_WORKLOAD_INFO", "a/b/c/d")], "\"a/b/c/d\" is not valid"),
            (&[("PROXY_WORKLOAD_INFO", "a//c")], "\"a//c\" is not valid"),
            (&[("PROXY_WORKLOAD_INFO", "/b/c")], "\"/b/c\" is not valid"),
            (&[info, ("CULVERT_PODS", "agent")], "CULVERT_PODS (--pods): is set, but PROXY_MODE is dedicated"),
            (&[info, ("CULVERT_PODS_FILE", "/p")], "CULVERT_PODS_FILE (--pods-file): is set, but"),
            (&[info, ("CULVERT_REDIRECT_UID", "0")], "CULVERT_REDIRECT_UID (--redirect-uid): \"0\" is not valid"),
        ] {
            let faults = checked(more).unwrap_err();
            assert!(faults.lines().count() == 1 && faults.contains(expected), "{expected}: {faults}");
        }
    }

    #[test]
    fn the_rules_follow_the_settings_that_concern_them() {
        let rules = |given: &[(&str, &str)]| redirect(&NodeArgs::from(given), &Environment::default());
        let usual = OwnRules { user: 1337, ipv6: true, dns: true, plaintext_ports: vec![15020, 15021] };
        assert_eq!(rules(&[]), Ok(usual.clone()));
        let own = rules(&[
            ("CULVERT_REDIRECT_UID", "70"),
            ("IPV6_ENABLED", "false"),
            ("ISTIO_META_DNS_CAPTURE", "false"),
            ("CULVERT_EXCLUDE_INBOUND_PORTS", "22, 8081,15021"),
            ("PROXY_CONFIG", "{statsPort: 9}"),
        ]);
        let expected = OwnRules { user: 70, ipv6: false, dns: false, plaintext_ports: vec![9, 22, 8081, 15021] };
        assert_eq!(own, Ok(expected));
        for bad in ["0", "http", "1,", "65536"] {
            let faults = rules(&[("CULVERT_EXCLUDE_INBOUND_PORTS", bad)]).unwrap_err().to_string();
            assert!(faults.starts_with("CULVERT_EXCLUDE_INBOUND_PORTS (--exclude-inbound-ports):"), "{faults}");
        }
    }
}
