//! Reads legacy iptables tables, which `nft` does not list (source: linux/netfilter_ipv4/ip_tables.h).

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`. The IPv6 options have the same numbers.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// Length of `struct ipt_getinfo`: name, hooks, entries and underflows of five hooks, number, size.
const INFO: usize = 84;
/// Offset of the entries in `struct ipt_get_entries`: after name and size, aligned.
const ENTRIES_AT: usize = 40;
/// Maximum length of a table's name, including the terminating zero.
const NAME: usize = 32;
/// Larger tables are not read, because a pod may make its tables as long as it likes.
const SIZE_MAX: usize = 1 << 20;
/// The table that only accepts or drops packets, and never redirects them.
const FILTER: &str = "filter";

/// Legacy tables, each as family and name, such as `ip nat`.
#[derive(Debug, Default)]
pub struct Legacy {
    /// The tables that contain the text.
    pub with: Vec<String>,
    /// All tables except `filter`.
    pub names: Vec<String>,
}

/// The legacy tables of the thread's current namespace, and those of them that contain `text` anywhere, for example as
/// the name of a chain. Reading does not create tables that do not exist.
pub fn tables_with(text: &str) -> io::Result<Legacy> {
    let mut found = Legacy::default();
    for (family, domain, level) in
        [("ip", AddressFamily::Inet, libc::SOL_IP), ("ip6", AddressFamily::Inet6, libc::SOL_IPV6)]
    {
        // Without this file, the kernel has no legacy iptables.
        let Ok(names) = std::fs::read_to_string(format!("/proc/thread-self/net/{family}_tables_names")) else {
            continue;
        };
        for name in names.lines().filter(|name| !name.is_empty() && name.len() < NAME) {
            let socket = socket(domain, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
            let bytes = entries(&socket, level, name)?;
            if bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
                found.with.push(format!("{family} {name}"));
            }
            if name != FILTER {
                found.names.push(format!("{family} {name}"));
            }
        }
    }
    Ok(found)
}

/// The names of all legacy tables in the thread's current namespace, such as `ip nat`.
pub fn names() -> Vec<String> {
    let read = |family| std::fs::read_to_string(format!("/proc/thread-self/net/{family}_tables_names"));
    let all = ["ip", "ip6"].map(|family| (family, read(family).unwrap_or_default()));
    all.iter().flat_map(|(family, text)| text.lines().map(move |name| format!("{family} {name}"))).collect()
}

fn entries(socket: &OwnedFd, level: libc::c_int, table: &str) -> io::Result<Vec<u8>> {
    let mut info = vec![0; INFO];
    put(&mut info, 0, table.as_bytes());
    let info = get(socket, level, GET_INFO, info)?;
    let size = info.get(INFO - 4..).and_then(|size| size.try_into().ok()).map(u32::from_ne_bytes).unwrap_or_default();
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if length > SIZE_MAX {
        return Err(io::Error::other(format!(
            "the legacy table {table} has {length} bytes; tables of more than {SIZE_MAX} are not read"
        )));
    }
    let mut request = vec![0; ENTRIES_AT + length];
    put(&mut request, 0, table.as_bytes());
    put(&mut request, NAME, &size.to_ne_bytes());
    get(socket, level, GET_ENTRIES, request)
}

fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = buffer.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn get(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: `length` is the length of the buffer, and the kernel writes no more than that.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast::<libc::c_void>(), &raw mut length)
    };
    Errno::result(result)?;
    Ok(buffer)
}
