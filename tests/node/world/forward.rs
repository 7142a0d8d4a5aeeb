//! Port-forwards of the API server: WebSocket frames (RFC 6455) that carry, for each port, a channel of bytes and a
//! channel for an error, as the kubelet sends them (`v4.channel.k8s.io`).

use super::inside;
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};

/// What happens to port-forwards to a pod.
#[derive(Clone)]
pub enum Forward {
    /// They reach loopback of this network namespace.
    To(String),
    /// The kubelet cannot connect.
    Fails(String),
    /// The API server refuses the request with this code.
    Refused(u16),
    /// It is accepted, and nothing ever comes.
    Silent,
}

/// Port-forwards by the name of the pod.
pub type Forwards = BTreeMap<String, Forward>;

/// Answers a request for a port-forward on its connection, until either side closes it.
pub fn serve(stream: &TcpStream, reader: &mut BufReader<&TcpStream>, key: &str, port: u16, to: &Forward) -> Option<()> {
    let accept = digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes());
    let accept = base64::engine::general_purpose::STANDARD.encode(accept);
    let mut out = stream;
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-accept: {accept}\r\nsec-websocket-protocol: v4.channel.k8s.io\r\n\r\n"
    );
    out.write_all(head.as_bytes()).ok()?;
    for channel in [0, 1] {
        send(out, &[&[channel][..], &port.to_le_bytes()].concat())?;
    }
    let namespace = match to {
        Forward::To(namespace) => namespace,
        Forward::Fails(why) => {
            send(out, &[&[1][..], why.as_bytes()].concat())?;
            let _ = stream.shutdown(Shutdown::Both);
            return None;
        }
        Forward::Silent | Forward::Refused(_) => {
            while receive(reader).is_some() {}
            return None;
        }
    };
    let pod = match inside(namespace, || TcpStream::connect((Ipv4Addr::LOCALHOST, port))) {
        Ok(pod) => pod,
        Err(error) => {
            let why = format!("an error occurred forwarding {port}: failed to connect to localhost:{port}: {error}");
            send(out, &[&[1][..], why.as_bytes()].concat())?;
            let _ = stream.shutdown(Shutdown::Both);
            return None;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut from, mut buffer) = (&pod, vec![0; 32 * 1024]);
            while let Ok(length) = from.read(&mut buffer) {
                let frame = [&[0][..], &buffer[..length]].concat();
                if length == 0 || send(out, &frame).is_none() {
                    break;
                }
            }
            let _ = stream.shutdown(Shutdown::Both);
        });
        let mut into = &pod;
        while let Some(payload) = receive(reader) {
            if let Some((0, bytes)) = payload.split_first().map(|(channel, bytes)| (*channel, bytes))
                && into.write_all(bytes).is_err()
            {
                break;
            }
        }
        let _ = pod.shutdown(Shutdown::Both);
    });
    None
}

/// Sends one binary message.
fn send(mut stream: &TcpStream, payload: &[u8]) -> Option<()> {
    let mut frame = vec![0x82];
    match payload.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..65_536 => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    stream.write_all(&frame).ok()
}

/// Receives one binary message. `None` at the end.
fn receive(stream: &mut BufReader<&TcpStream>) -> Option<Vec<u8>> {
    loop {
        let mut head = [0; 2];
        stream.read_exact(&mut head).ok()?;
        let length = match head[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes(exact(stream)?)),
            127 => u64::from_be_bytes(exact(stream)?),
            length => u64::from(length),
        };
        assert!(head[1] & 0x80 != 0, "clients mask their frames");
        let mask: [u8; 4] = exact(stream)?;
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut payload).ok()?;
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        match head[0] & 0x0f {
            2 => return Some(payload),
            8 => return None,
            _ => {}
        }
    }
}

fn exact<const N: usize>(stream: &mut impl Read) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}
