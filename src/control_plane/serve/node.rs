//! Who a client says it is in its first request, and whether its token allows it. Pure.

use crate::control_plane::Caller;
use crate::mesh::Text;
use crate::proto::envoy::service::discovery::v3::Node;
use prost_types::value::Kind;
use std::net::IpAddr;

/// Longest id that is repeated in logs and dumps.
const ID_MAX: usize = 512;

/// A client, as its first request describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its whole id: `ztunnel~ip~pod.namespace~domain`.
    pub id: Text,
    /// Its node; empty if it does not say.
    pub node: Text,
    /// Its version; empty if it does not say.
    pub version: Text,
}

/// Why a first request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// It has no node.
    #[error("the first request of a stream must say who asks: it has no node")]
    Missing,
    /// The id cannot be read.
    #[error("the node's id is not ztunnel~IP~POD.NAMESPACE~DOMAIN")]
    Id,
    /// It is not a node tunnel.
    #[error("only ztunnel is served here, not {0:?}")]
    Role(String),
    /// Its namespace is not its token's.
    #[error("the node says that it is in namespace {said}, and its token is of namespace {token}")]
    Namespace {
        /// What it says.
        said: String,
        /// The token's.
        token: Text,
    },
    /// Its service account is not its token's.
    #[error("the node says that its service account is {said}, and its token is of {token}")]
    Account {
        /// What it says.
        said: String,
        /// The token's.
        token: Text,
    },
}

impl NodeError {
    /// Whether who asks is the reason, rather than how.
    pub fn is_denial(&self) -> bool {
        matches!(self, Self::Namespace { .. } | Self::Account { .. })
    }
}

/// Reads the node of a first request, and compares it with the owner of the token.
pub fn client(node: Option<&Node>, caller: &Caller) -> Result<Client, NodeError> {
    let node = node.ok_or(NodeError::Missing)?;
    let parts: Vec<&str> = node.id.split('~').collect();
    let &[role, ip, pod, domain] = parts.as_slice() else { return Err(NodeError::Id) };
    if node.id.len() > ID_MAX {
        return Err(NodeError::Id);
    }
    if role != "ztunnel" {
        return Err(NodeError::Role(role.chars().take(32).collect()));
    }
    let text = |name: &str| match node.metadata.as_ref()?.fields.get(name)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text.chars().take(ID_MAX).collect::<String>()),
        _ => None,
    };
    let has_ips = node.metadata.as_ref().is_some_and(|metadata| metadata.fields.contains_key("INSTANCE_IPS"));
    if pod.is_empty() || (ip.parse::<IpAddr>().is_err() && !has_ips) {
        return Err(NodeError::Id);
    }
    let of_domain = || domain.split('.').next().unwrap_or_default().to_owned();
    let said = text("NAMESPACE").filter(|namespace| !namespace.is_empty()).unwrap_or_else(of_domain);
    if said != *caller.namespace {
        return Err(NodeError::Namespace { said, token: caller.namespace.clone() });
    }
    let account = text("SERVICE_ACCOUNT").filter(|account| !account.is_empty());
    if let Some(said) = account.filter(|said| *said != *caller.service_account) {
        return Err(NodeError::Account { said, token: caller.service_account.clone() });
    }
    let version = text("CULVERT_VERSION").or_else(|| text("ISTIO_VERSION")).unwrap_or_default();
    Ok(Client {
        id: node.id.as_str().into(),
        node: text("NODE_NAME").unwrap_or_default().into(),
        version: version.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, metadata: &[(&str, &str)]) -> Node {
        let value = |text: &str| prost_types::Value { kind: Some(Kind::StringValue(text.into())) };
        let fields = metadata.iter().map(|(name, text)| ((*name).to_owned(), value(text))).collect();
        Node { id: id.into(), metadata: Some(prost_types::Struct { fields }), ..Default::default() }
    }

    #[test]
    fn a_client_is_who_its_token_says() {
        let caller = Caller { namespace: "istio-system".into(), service_account: "ztunnel".into(), pod: None };
        let id = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local";
        let read = |node: &Node| client(Some(node), &caller);
        let whole = [
            ("NAMESPACE", "istio-system"),
            ("NODE_NAME", "n1"),
            ("ISTIO_VERSION", "1.30"),
            ("SERVICE_ACCOUNT", "ztunnel"),
        ];
        let good = read(&node(id, &whole)).unwrap();
        assert_eq!((&*good.id, &*good.node, &*good.version), (id, "n1", "1.30"));
        assert!(read(&node(id, &[])).is_ok(), "the namespace of the id");
        assert!(read(&node(&id.replace("10.0.0.1", ""), &[("INSTANCE_IPS", "10.0.0.1")])).is_ok());
        assert_eq!(client(None, &caller), Err(NodeError::Missing));
        for bad in [
            "",
            "ztunnel",
            "ztunnel~10.0.0.1~a.b",
            "ztunnel~x~a.b~b.svc",
            "ztunnel~10.0.0.1~~b.svc",
            "ztunnel~10.0.0.1~a.b~c~d",
        ] {
            assert_eq!(read(&node(bad, &[])), Err(NodeError::Id), "{bad}");
        }
        assert_eq!(
            read(&node(&id.replace("ztunnel~", &format!("ztunnel~{}", "1".repeat(600))), &[])),
            Err(NodeError::Id)
        );
        assert!(
            matches!(read(&node(&id.replace("ztunnel~", "sidecar~"), &[])), Err(NodeError::Role(role)) if role == "sidecar")
        );
        let other = [("NAMESPACE", "shop")];
        for denied in [
            node(id, &other),
            node(&id.replace("~istio-system.svc", "~shop.svc"), &[]),
            node(id, &[("SERVICE_ACCOUNT", "default")]),
        ] {
            assert!(read(&denied).unwrap_err().is_denial(), "{denied:?}");
        }
    }
}
