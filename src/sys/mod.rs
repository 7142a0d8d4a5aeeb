//! Kernel interfaces that safe crates do not offer in the needed form: network namespaces, socket options, original
//! destinations, netlink, raw packets.
//!
//! This is the only module with `unsafe`; each use states why it is sound. The module knows nothing of pods or meshes.

#![allow(unsafe_code, reason = "this is the module for it; every use states why it is sound")]

#[cfg(test)]
pub mod allocations;
pub mod allocator;
pub mod clock;
pub mod conntrack;
pub mod datagram;
pub mod iptables;
pub mod leg;
pub mod limits;
pub mod netlink;
pub mod netns;
pub mod netns_watch;
pub mod nftables;
pub mod original_dst;
pub mod pipe;
pub mod poller;
pub mod process;
pub mod scratch;
pub mod seqpacket;
pub mod sniffer;
pub mod socket;
pub mod tcp_info;
pub mod tcp_sockets;
