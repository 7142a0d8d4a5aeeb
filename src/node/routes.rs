//! The ip rule and route that bring replies to foreign source addresses back to the daemon, for IPv4 and IPv6.

use crate::sys::netns::{Netns, NetnsError};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Bits of a packet mark that are compared.
pub const MASK: u32 = 0xfff;
/// Mark of connections whose replies must come back to the daemon.
pub const RETURN_MARK: u32 = 0x111;
/// Priority of the ip rule.
const RULE_PRIORITY: u32 = 32764;
/// Routing table of the ip rule.
const ROUTE_TABLE: u32 = 100;
/// How long the kernel may take to restore them.
const DEADLINE: Duration = Duration::from_secs(10);
/// Index of the loopback interface, always the first of a network namespace (Linux, `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// Why a rule or route could not be set.
#[derive(Debug, thiserror::Error)]
pub enum IpRouteError {
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel, or the library, returned an error.
    #[error("cannot set the {what}: {source}; {hint}", hint = hint(source))]
    Set {
        /// What was being set.
        what: &'static str,
        /// The error of the library.
        source: rtnetlink::Error,
    },
}

fn hint(error: &rtnetlink::Error) -> &'static str {
    match error {
        rtnetlink::Error::NetlinkError(message) if message.raw_code() == -nix::libc::EPERM => {
            "the daemon needs CAP_NET_ADMIN"
        }
        _ => "does the kernel have policy routing?",
    }
}

/// Sets missing ip rules and routes. Returns whether all of them were in place; after an error, assume that they were
/// not.
pub async fn restore(netns: &Netns, ipv6: bool) -> Result<bool, IpRouteError> {
    let late = |_| IpRouteError::Set { what: "ip rule and route", source: rtnetlink::Error::RequestFailed };
    tokio::time::timeout(DEADLINE, set(netns, ipv6, true)).await.map_err(late)?
}

/// Sets or removes the ip rules and routes. Returns whether all of them were as wanted before.
pub async fn set(netns: &Netns, ipv6: bool, present: bool) -> Result<bool, IpRouteError> {
    let (connection, handle, _) = netns.enter(rtnetlink::new_connection)?.map_err(|source| IpRouteError::Set {
        what: "netlink socket",
        source: rtnetlink::Error::NamespaceError(source.to_string()),
    })?;
    let work = async {
        let mut all = set_rule(&handle, false, present).await? & set_route(&handle, false, present).await?;
        if ipv6 {
            all &= set_rule(&handle, true, present).await? & set_route(&handle, true, present).await?;
        }
        Ok(all)
    };
    tokio::select! {
        result = work => result,
        () = connection => Err(IpRouteError::Set { what: "netlink socket", source: rtnetlink::Error::RequestFailed }),
    }
}

/// Brings up the loopback interface of a new network namespace; without it no route can be set there.
pub async fn loopback_up(netns: &Netns) -> Result<(), IpRouteError> {
    let failed = |source| IpRouteError::Set { what: "loopback interface", source };
    let (connection, handle, _) = netns
        .enter(rtnetlink::new_connection)?
        .map_err(|source| failed(rtnetlink::Error::NamespaceError(source.to_string())))?;
    let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    let work = async { handle.link().set(up).execute().await.map_err(failed) };
    tokio::select! {
        result = work => result,
        () = connection => Err(failed(rtnetlink::Error::RequestFailed)),
    }
}

async fn set_rule(handle: &Handle, ipv6: bool, present: bool) -> Result<bool, IpRouteError> {
    let request = handle.rule().add().priority(RULE_PRIORITY).table_id(ROUTE_TABLE).action(RuleAction::ToTable);
    let mut message = if ipv6 { request.v6().message_mut().clone() } else { request.v4().message_mut().clone() };
    message.attributes.push(RuleAttribute::FwMark(RETURN_MARK));
    message.attributes.push(RuleAttribute::FwMask(MASK));
    let result = if present {
        let mut add = handle.rule().add();
        *add.message_mut() = message;
        add.execute().await
    } else {
        handle.rule().del(message).execute().await
    };
    ignore(result, if present { nix::libc::EEXIST } else { nix::libc::ENOENT }, "ip rule")
}

async fn set_route(handle: &Handle, ipv6: bool, present: bool) -> Result<bool, IpRouteError> {
    let message = if ipv6 {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0);
        route.table_id(ROUTE_TABLE).kind(RouteType::Local).output_interface(LOOPBACK).build()
    } else {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0);
        let scope = rtnetlink::packet_route::route::RouteScope::Host;
        route.table_id(ROUTE_TABLE).kind(RouteType::Local).scope(scope).output_interface(LOOPBACK).build()
    };
    let result =
        if present { handle.route().add(message).execute().await } else { handle.route().del(message).execute().await };
    ignore(result, if present { nix::libc::EEXIST } else { nix::libc::ESRCH }, "route")
}

/// Returns whether the state was as wanted already, which the kernel reports as the error `code`.
fn ignore(result: Result<(), rtnetlink::Error>, code: i32, what: &'static str) -> Result<bool, IpRouteError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -code => Ok(true),
        Err(source) => Err(IpRouteError::Set { what, source }),
        Ok(()) => Ok(false),
    }
}
