//! What the kernel offers and safe crates do not: namespaces, socket options, original destinations, raw packets.
//!
//! The only module with `unsafe`, each use with its safety argument. It knows nothing of pods or meshes.

#![allow(unsafe_code, reason = "this is the module for it; every use says why it is sound")]

pub mod changes;
pub mod clock;
pub mod conntrack;
pub mod counter;
pub mod datagram;
pub mod end;
pub mod iptables;
pub mod limits;
pub mod netlink;
pub mod netns;
pub mod original_dst;
pub mod packet;
pub mod process;
pub mod read_buffer;
pub mod scratch;
pub mod seqpacket;
pub mod socket;
pub mod tcp_sockets;
