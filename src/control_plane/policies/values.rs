//! Single values in rules. Pure; accepts any text. The error says why a value cannot be read.

use super::object::quoted;
use crate::mesh::SpiffeName;
use crate::mesh::policy::{ServiceAccountMatch, StringMatch};
use ipnet::IpNet;
use std::net::IpAddr;

/// A namespace: `*` for any, `text*` for a beginning, `*text` for an end, or the namespace itself. An empty text is an
/// error, because it would match peers without identity.
pub fn namespace(text: &str) -> Result<StringMatch, String> {
    if text.is_empty() {
        return Err("a value is empty".into());
    }
    Ok(match (text, text.strip_prefix('*'), text.strip_suffix('*')) {
        ("*", ..) => StringMatch::Presence,
        (_, Some(rest), _) => StringMatch::Suffix(rest.into()),
        (_, None, Some(rest)) => StringMatch::Prefix(rest.into()),
        _ => StringMatch::Exact(text.into()),
    })
}

/// A principal: the same forms, with or without `spiffe://`.
pub fn principal(text: &str) -> Result<StringMatch, String> {
    namespace(text).map(StringMatch::without_scheme)
}

/// A service account: `account` of the policy's own namespace, or `namespace/account`.
pub fn service_account(text: &str, own_namespace: &str) -> Result<ServiceAccountMatch, String> {
    let (namespace, service_account) = text.split_once('/').unwrap_or((own_namespace, text));
    // A namespace that the API has accepted is always a part of a name.
    if !SpiffeName::is_part(service_account) || (text.contains('/') && !SpiffeName::is_part(namespace)) {
        return Err(format!("{} is neither <service account> nor <namespace>/<service account>", quoted(text)));
    }
    Ok(ServiceAccountMatch { namespace: namespace.into(), service_account: service_account.into() })
}

/// A range of addresses, or a single one. A range of IPv4-mapped IPv6 addresses is the IPv4 range, because connections
/// have IPv4 addresses.
pub fn addresses(text: &str) -> Result<IpNet, String> {
    let read = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let net = read.ok_or_else(|| format!("{} is neither an IP address nor a CIDR", quoted(text)))?;
    let IpNet::V6(v6) = net else { return Ok(net) };
    let v4 = v6.addr().to_ipv4_mapped().zip(v6.prefix_len().checked_sub(96));
    Ok(v4.and_then(|(address, length)| IpNet::new(address.into(), length).ok()).unwrap_or(net))
}

/// A port.
pub fn port(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse::<u16>().ok().filter(|port| digits && *port != 0);
    number.ok_or_else(|| format!("{} is not a port", quoted(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_four_forms_and_a_principal_may_have_its_scheme() {
        use StringMatch::{Exact, Prefix, Presence, Suffix};
        for (text, meant) in [
            ("*", Presence),
            ("shop", Exact("shop".into())),
            ("shop*", Prefix("shop".into())),
            ("*shop", Suffix("shop".into())),
            ("**", Suffix("*".into())),
            ("*a*", Suffix("a*".into())),
            ("a*b", Exact("a*b".into())),
        ] {
            assert_eq!(namespace(text), Ok(meant.clone()), "{text}");
            assert_eq!(principal(text), Ok(meant), "{text}");
        }
        assert_eq!(principal("spiffe://td/ns/a/sa/b"), Ok(Exact("td/ns/a/sa/b".into())));
        assert_eq!(principal("spiffe://td/*"), Ok(Prefix("td/".into())));
        assert!(namespace("").is_err() && principal("").is_err());
    }

    #[test]
    fn accounts_are_of_the_policys_own_namespace_unless_they_name_one() {
        let of = |text| service_account(text, "own").map(|a| format!("{} {}", a.namespace, a.service_account));
        assert_eq!(of("a").unwrap(), "own a");
        assert_eq!(of("other/a.b").unwrap(), "other a.b");
        for bad in ["", "/", "a/", "/a", "a/b/c", "*", "a/*", "A", "a b"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_and_ports_are_read_strictly() {
        for (text, read) in [
            ("10.0.0.1", "10.0.0.1/32"),
            ("10.0.0.1/8", "10.0.0.1/8"),
            ("fd00::/8", "fd00::/8"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(addresses(text).unwrap().to_string(), read, "{text}");
        }
        for bad in ["", "10.0.0.0/33", "10.0.0", "10.0.0.0/", "fe80::1%eth0", "all", " 10.0.0.1", "10.0.0.0/08.0"] {
            assert!(addresses(bad).is_err(), "{bad}");
        }
        assert_eq!((port("1"), port("65535")), (Ok(1), Ok(65535)));
        for bad in ["", "0", "65536", "-1", "+80", " 80", "http", "80-90"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }
}
