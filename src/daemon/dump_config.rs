//! The settings in `/config_dump`, under ztunnel's keys where ztunnel has the setting. Each setting says its key and
//! value itself (`config/settings/`); this file adds what is fixed.

use crate::config::{Config, settings};
use crate::ports;
use crate::ports::in_pod;
use serde_json::{Map, Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The settings. Values of headers, tokens and keys are not among them.
pub(super) fn config(c: &Config) -> Value {
    let mut shown = fixed(c);
    for (key, value) in settings::all().filter_map(|setting| setting.shown) {
        put(&mut shown, key, value(c));
    }
    Value::Object(shown)
}

/// Adds a value under its key. A dot leads into an inner object.
fn put(map: &mut Map<String, Value>, key: &str, value: Value) {
    let Some((outer, inner)) = key.split_once('.') else { return drop(map.insert(key.to_owned(), value)) };
    if let Value::Object(object) = map.entry(outer).or_insert_with(|| Value::Object(Map::new())) {
        put(object, inner, value);
    }
}

/// Addresses of the daemon's listeners, and settings of ztunnel that have only one value here.
fn fixed(c: &Config) -> Map<String, Value> {
    let any: IpAddr = if c.node.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let on = |ip: IpAddr, port| Value::from(SocketAddr::new(ip, port).to_string());
    let fixed = [
        ("adminAddr", on(Ipv4Addr::LOCALHOST.into(), c.admin.admin_port)),
        ("statsAddr", on(any, c.admin.stats_port)),
        ("readinessAddr", on(any, ports::READY)),
        ("inboundAddr", on(any, ports::HBONE)),
        ("inboundPlaintextAddr", on(any, ports::PLAINTEXT)),
        ("outboundAddr", on(any, ports::OUTBOUND)),
        ("dnsProxyAddr", on(any, ports::DNS)),
        ("illegalPorts", json!(in_pod(c.dns.capture))),
        ("proxy", json!(true)),
        ("fakeCa", json!(false)),
        ("settings", json!(c.settings)),
    ];
    fixed.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
