//! SOCKS5 on the pod's loopback address (RFC 1928): without authentication, and only CONNECT. Applications that cannot be
//! redirected ask for their connections here. The answer is given once the far side is open.

use super::error::{AcceptError, REQUEST_DEADLINE, SocksError};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const HOST: u8 = 3;
const IPV6: u8 = 4;

/// The codes of replies (RFC 1928, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The connection is open.
    Succeeded = 0,
    /// A failure that has no code of its own.
    Failure = 1,
    /// A policy does not allow it.
    NotAllowed = 2,
    /// The destination cannot be reached.
    Unreachable = 4,
    /// The destination refuses.
    Refused = 5,
    /// It is not CONNECT.
    Command = 7,
    /// The address has an unknown type.
    AddressType = 8,
}

impl Reply {
    /// The message. Clients need no bound address, so it is 0.0.0.0:0.
    pub fn message(self) -> [u8; 10] {
        [VERSION, self as u8, 0, IPV4, 0, 0, 0, 0, 0, 0]
    }
}

/// Where a client wants to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocksTarget {
    /// An address.
    Address(SocketAddr),
    /// A host name and a port.
    Host(String, u16),
}

/// Reads a client's request. What is wrong with it is answered here. The caller answers a good request.
pub async fn socks(socket: std::net::TcpStream) -> Result<(std::net::TcpStream, SocksTarget), AcceptError> {
    let mut app = TcpStream::from_std(socket).map_err(AcceptError::Socket)?;
    let target = tokio::time::timeout(REQUEST_DEADLINE, request(&mut app)).await;
    let target = target.unwrap_or(Err(SocksError::Deadline))?;
    Ok((app.into_std().map_err(AcceptError::Socket)?, target))
}

/// Reads the greeting and the request, and not one byte more.
pub async fn request(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<SocksTarget, SocksError> {
    let [version, methods] = read(stream).await?;
    if version != VERSION {
        return Err(SocksError::Version(version));
    }
    let mut offered = vec![0; usize::from(methods)];
    stream.read_exact(&mut offered).await?;
    if !offered.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(SocksError::Method);
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let [version, command, _, kind] = read(stream).await?;
    if version != VERSION {
        return Err(SocksError::Version(version));
    }
    if command != CONNECT {
        stream.write_all(&Reply::Command.message()).await?;
        return Err(SocksError::Command(command));
    }
    let ip: IpAddr = match kind {
        IPV4 => Ipv4Addr::from(read::<4>(stream).await?).into(),
        IPV6 => Ipv6Addr::from(read::<16>(stream).await?).into(),
        HOST => {
            let [length] = read(stream).await?;
            let mut name = vec![0; usize::from(length)];
            stream.read_exact(&mut name).await?;
            let port = u16::from_be_bytes(read(stream).await?);
            return target(&name, port).ok_or(SocksError::Host);
        }
        other => {
            stream.write_all(&Reply::AddressType.message()).await?;
            return Err(SocksError::AddressType(other));
        }
    };
    Ok(SocksTarget::Address(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(read(stream).await?))))
}

/// The target for a host name, which may be an address as text. `None` if it is neither.
fn target(name: &[u8], port: u16) -> Option<SocksTarget> {
    let name = std::str::from_utf8(name).ok()?;
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Some(SocksTarget::Address(SocketAddr::new(ip.to_canonical(), port)));
    }
    let is_part = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (!name.is_empty() && name.bytes().all(is_part)).then(|| SocksTarget::Host(name.to_owned(), port))
}

async fn read<const N: usize>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What comes of these bytes, what is answered, and how many of them are left unread.
    fn exchange(bytes: &[u8]) -> (Result<SocksTarget, String>, Vec<u8>, usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = tokio::io::duplex(4096);
            theirs.write_all(bytes).await.unwrap();
            theirs.shutdown().await.unwrap();
            let asked = request(&mut ours).await.map_err(|error| error.to_string());
            let mut rest = Vec::new();
            ours.read_to_end(&mut rest).await.unwrap();
            drop(ours);
            let mut answer = Vec::new();
            theirs.read_to_end(&mut answer).await.unwrap();
            (asked, answer, rest.len())
        })
    }

    #[test]
    fn requests_are_read_to_their_last_byte_and_no_further() {
        let address = |text: &str| Ok(SocksTarget::Address(text.parse().unwrap()));
        let request = |kind: &[u8]| [&[5, 1, 0, 5, 1, 0][..], kind, &[0, 80], b"more"].concat();
        for (kind, expected) in [
            (&[1, 10, 0, 0, 1][..], address("10.0.0.1:80")),
            (&[&[4][..], &"fd00::1".parse::<Ipv6Addr>().unwrap().octets()].concat(), address("[fd00::1]:80")),
            (&[&[3, 5][..], b"web.a"].concat(), Ok(SocksTarget::Host("web.a".into(), 80))),
            (&[&[3, 8][..], b"10.0.0.1"].concat(), address("10.0.0.1:80")),
            (&[&[3, 4][..], b"a b/"].concat(), Err("SOCKS5: the host name is not valid".into())),
            (&[3, 0], Err("SOCKS5: the host name is not valid".into())),
        ] {
            assert_eq!(exchange(&request(kind)), (expected, vec![5, 0], 4), "{kind:?}");
        }
    }

    #[test]
    fn what_is_not_supported_is_answered_as_the_rfc_says() {
        for (bytes, error, answer) in [
            (&[4, 1, 0, 80][..], "version 4", &[][..]),
            (&[5, 2, 1, 2], "without authentication", &[5, 0xff]),
            (&[5, 0], "without authentication", &[5, 0xff]),
            (&[5, 1, 0, 5, 2, 0, 1], "command 2", &[5, 0, 5, 7, 0, 1, 0, 0, 0, 0, 0, 0]),
            (&[5, 1, 0, 5, 1, 0, 9], "address type 9", &[5, 0, 5, 8, 0, 1, 0, 0, 0, 0, 0, 0]),
            (&[5, 1, 0, 4, 1, 0, 1], "version 4", &[5, 0]),
            (&[5, 1, 0, 5, 1, 0, 1, 10], "early eof", &[5, 0]),
        ] {
            let (asked, answered, _) = exchange(bytes);
            assert!(asked.as_ref().is_err_and(|said| said.contains(error)), "{bytes:?}: {asked:?}");
            assert_eq!(answered, answer, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..600), honest in any::<bool>()) {
            let start: &[u8] = if honest { &[5, 1, 0, 5, 1, 0] } else { &[] };
            drop(exchange(&[start, &bytes].concat()));
        }
    }
}
