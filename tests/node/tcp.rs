//! Between pods, TCP behaves as on a plain network: last bytes, resets, ports, addresses, devices, translation in the
//! pod.

use crate::istio::Istio;
use crate::world::{Agent, Pod, World, apps, connect, eventually, inside, ip_in, output_in};
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// How long an immediate answer may take.
const SOON: Duration = Duration::from_secs(5);

/// Clients and servers of every kind. The three journeys are `client` to `server` (tunnel), `client` to `plain`
/// (direct) and `stranger` to `server` (plaintext).
fn world() -> World {
    let mut w = World::new();
    w.mesh_pod("client", 1);
    w.mesh_pod("server", 2);
    w.plain_pod("stranger", 1);
    w.plain_pod("plain", 2);
    w
}

fn pod(w: &World, name: &str) -> Pod {
    w.pods.iter().find(|pod| pod.name == name).unwrap().clone()
}

const JOURNEYS: [(&str, &str); 3] = [("client", "server"), ("client", "plain"), ("stranger", "server")];

/// Connects with a socket that is prepared first.
fn connect_from(ns: &str, to: SocketAddr, prepare: impl FnOnce(&Socket) + Send) -> std::io::Result<TcpStream> {
    inside(ns, move || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        prepare(&socket);
        socket.connect_timeout(&to.into(), SOON)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket.into())
    })
}

/// Binds to a given address and port, which other connections may have too.
fn from(ip: IpAddr, port: u16) -> impl FnOnce(&Socket) + Send {
    move |socket| {
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::new(ip, port).into()).unwrap();
    }
}

fn alive(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    stream.read_exact(&mut [0; 4])
}

fn said(mut stream: TcpStream) -> std::io::Result<String> {
    let mut answer = String::new();
    stream.write_all(b"x\n")?;
    stream.read_to_string(&mut answer).map(|_| answer)
}

fn in_order_of<T>(all: [T; 2]) -> [(T, &'static str); 2] {
    let [first, second] = all;
    [(first, "IPv4"), (second, "IPv6")]
}

/// What servers have read of each connection, and how it ended.
type Ended = (usize, Result<(), ErrorKind>);

static ENDED: Mutex<Vec<(u16, Sender<Ended>)>> = Mutex::new(Vec::new());

/// A server that sends a greeting, reads everything, and records how the connection ended.
fn greet_and_tell(mut stream: TcpStream) {
    let _ = stream.write_all(b"220 hello\r\n");
    tell(stream);
}

/// A server that reads everything and records how the connection ended.
fn tell(mut stream: TcpStream) {
    let (mut length, mut buffer) = (0, vec![0; 65536]);
    let ended = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => length += n,
            Err(error) => break Err(error.kind()),
        }
    };
    let port = stream.local_addr().unwrap().port();
    for (_, to) in ENDED.lock().unwrap().iter().filter(|(of, _)| *of == port) {
        let _ = to.send((length, ended));
    }
}

#[test]
fn last_bytes_before_a_reset_arrive_in_every_journey_and_direction() {
    const TIMES: usize = 20;
    let mut w = world();
    let (told, ends) = channel();
    ENDED.lock().unwrap().push((8101, told));
    for server in ["server", "plain"] {
        let ns = w.ns(server);
        apps::serve(&ns, 8101, greet_and_tell);
        // Answers before it has read the upload, and closes. With unread bytes, that is a reset.
        apps::serve(&ns, 8102, |mut stream| {
            let _ = stream.read(&mut [0; 100]);
            let _ = stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\n\r\n");
        });
    }
    w.start();
    for (client, server) in JOURNEYS {
        let (ns, to) = (w.ns(client), pod(&w, server).v4);
        for length in [100, 200_000] {
            for time in 0..TIMES {
                let mut stream = connect(&ns, (to, 8101)).unwrap();
                stream.write_all(&vec![7; length]).unwrap();
                // The greeting has arrived and stays unread, so the close is a reset.
                stream.peek(&mut [0]).unwrap();
                eventually("all is on its way", || unsent(&stream) == 0);
                drop(stream);
                let (got, ended) = ends.recv_timeout(SOON).unwrap();
                assert_eq!((got, ended), (length, Err(ErrorKind::ConnectionReset)), "{client} to {server}, {time}");
            }
        }
        for time in 0..TIMES {
            let mut stream = connect(&ns, (to, 8102)).unwrap();
            let upload = vec![7; 65536];
            let _cut_off = (0..100).map(|_| stream.write_all(&upload)).find(Result::is_err);
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("{client} to {server}, {time}: {e}"));
            assert_eq!(&answer, b"HTTP/1.1 413");
        }
    }
}

nix::ioctl_read_bad!(
    /// `SIOCOUTQ`, tcp(7).
    unacknowledged,
    nix::libc::TIOCOUTQ,
    nix::libc::c_int
);

/// The number of bytes that the kernel has not sent, or that are not acknowledged.
#[allow(unsafe_code, reason = "there is no other way to ask")]
fn unsent(stream: &TcpStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one integer.
    unsafe { unacknowledged(std::os::fd::AsRawFd::as_raw_fd(stream), &raw mut bytes) }.unwrap();
    bytes
}

#[test]
fn what_waits_for_a_slow_reader_when_the_writer_resets_still_arrives() {
    const LENGTH: usize = 60_000;
    let mut w = world();
    for server in ["server", "plain"] {
        // More than the reader's buffer holds. All of it has left the server when the server resets.
        apps::serve(&w.ns(server), 8103, |mut stream| {
            stream.write_all(&[7; LENGTH]).unwrap();
            stream.read_exact(&mut [0]).unwrap();
            eventually("all has left the server", || unsent(&stream) == 0);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        });
    }
    w.start();
    for (client, server) in JOURNEYS {
        let small = |socket: &Socket| socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = connect_from(&w.ns(client), (pod(&w, server).v4, 8103).into(), small).unwrap();
        stream.write_all(b"x").unwrap();
        let (mut length, mut buffer) = (0, [0; 1000]);
        let ended = loop {
            std::thread::sleep(Duration::from_millis(5));
            match stream.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(n) => length += n,
                Err(error) => break Err(error.kind()),
            }
        };
        assert_eq!((length, ended), (LENGTH, Err(ErrorKind::ConnectionReset)), "{client} to {server}");
    }
}

#[test]
fn a_reset_is_a_reset_also_while_the_application_is_being_dialled() {
    const TIMES: u64 = 40;
    let mut w = world();
    let (silent, record) = (channel(), channel());
    ENDED.lock().unwrap().extend([(8104, silent.0), (8105, record.0)]);
    for server in ["server", "plain"] {
        apps::serve(&w.ns(server), 8104, tell);
        apps::serve(&w.ns(server), 8105, tell);
    }
    w.start();
    for (client, server) in JOURNEYS {
        let (ns, to) = (w.ns(client), pod(&w, server).v4);
        for (port, data) in [(8104, &b""[..]), (8105, b"a record")] {
            for time in 0..TIMES {
                let mut stream = connect(&ns, (to, port)).unwrap();
                stream.write_all(data).unwrap();
                // From the first moments on: dialling takes one to several milliseconds.
                std::thread::sleep(Duration::from_micros(time * 150));
                SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        for _ in 0..TIMES {
            let ended = record.1.recv_timeout(SOON).unwrap();
            assert_eq!(ended, (8, Err(ErrorKind::ConnectionReset)), "{client} to {server}");
        }
        eventually("all have ended", || {
            [1, 2].iter().all(|n| w.json(*n, "/connections").as_array().unwrap().is_empty())
        });
        // If nothing was sent, the server need not have seen the connection.
        for ended in silent.1.try_iter() {
            assert_eq!(ended, (0, Err(ErrorKind::ConnectionReset)), "{client} to {server}");
        }
    }
}

#[test]
fn one_client_port_may_lead_to_several_ports_of_a_pod() {
    let mut w = world();
    let ports = 8111..8116;
    for port in ports.clone() {
        apps::serve(&w.ns("server"), port, apps::echo);
    }
    w.start();
    let (stranger, server) = (pod(&w, "stranger"), pod(&w, "server"));
    for (own, to) in [(stranger.v4, server.v4), (stranger.v6, server.v6)] {
        let mut open = Vec::new();
        for port in ports.clone() {
            let mut stream = connect_from(&stranger.netns, (to, port).into(), from(own, 41_000)).unwrap();
            alive(&mut stream).unwrap_or_else(|e| panic!("{to}:{port}: {e}"));
            open.push(stream);
        }
        for stream in &mut open {
            alive(stream).unwrap();
        }
    }
}

#[test]
fn connections_in_a_clients_name_are_in_nobodys_way() {
    let mut w = world();
    let (client, stranger, server) = (pod(&w, "client"), pod(&w, "stranger"), pod(&w, "server"));
    apps::serve(&server.netns, 8120, apps::echo);
    // So few ports that otherwise rare collisions are certain.
    let range = 40_000..=40_063_u16;
    inside(&server.netns, || {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40063").unwrap();
    });
    w.start();
    let mut open = Vec::new();
    for (to, own) in [(server.v4, stranger.v4), (server.v6, stranger.v6)] {
        for port in range.clone().step_by(2) {
            let mut stream = connect_from(&stranger.netns, (to, 8120).into(), from(own, port)).unwrap();
            alive(&mut stream).unwrap_or_else(|e| panic!("{own}:{port} to {to}: {e}"));
            open.push(stream);
        }
    }
    for _ in 0..40 {
        open.push(connect(&client.netns, (server.v4, 8120)).unwrap());
    }
    for stream in &mut open {
        alive(stream).expect("those that are open go on");
    }
    // Applications can listen on any port, also without `SO_REUSEADDR`.
    for port in range {
        for (domain, any) in [(Domain::IPV4, "0.0.0.0"), (Domain::IPV6, "::")] {
            let listener = inside(&server.netns, || Socket::new(domain, Type::STREAM, None)).unwrap();
            if domain == Domain::IPV6 {
                listener.set_only_v6(true).unwrap();
            }
            let bound = listener.bind(&SocketAddr::new(any.parse().unwrap(), port).into());
            bound.and_then(|()| listener.listen(1)).unwrap_or_else(|e| panic!("{any}:{port}: {e}"));
        }
    }
}

/// A guest behind a pod's own address translation, as with KubeVirt's masquerade binding. On 2222 it answers with the
/// client's address.
struct Guest;

impl Guest {
    fn of(w: &World, server: &Pod) -> Self {
        let guest = w.ns("guest");
        crate::world::ip(&format!(
            "netns add {guest}\nlink add vg netns {} type veth peer name eth0 netns {guest}\n",
            server.netns
        ));
        ip_in(
            &server.netns,
            "link add k6t type bridge\naddr add 10.0.2.1/24 dev k6t\naddr add fd02::1/64 dev k6t nodad\nlink set k6t up\n\
             link set vg master k6t\nlink set vg up\n",
        );
        ip_in(
            &guest,
            "link set lo up\nlink set eth0 up\naddr add 10.0.2.2/24 dev eth0\naddr add fd02::2/64 dev eth0 nodad\n\
             route add default via 10.0.2.1\nroute add default via fd02::1\n",
        );
        // As KubeVirt's masquerade binding does it.
        let script = format!(
            "table inet guest {{\n chain pre {{ type nat hook prerouting priority -100; iifname eth0 tcp dport 2222 dnat ip to 10.0.2.2; \
             iifname eth0 tcp dport 2222 dnat ip6 to fd02::2; }}\n chain out {{ type nat hook output priority -100; \
             ip daddr {{ {v4}, 127.0.0.1 }} tcp dport 2222 dnat ip to 10.0.2.2; ip6 daddr {v6} tcp dport 2222 dnat ip6 to fd02::2; }}\n \
             chain post {{ type nat hook postrouting priority 100; ip saddr 10.0.2.2 masquerade; ip6 saddr fd02::2 masquerade; }}\n}}\n",
            v4 = server.v4,
            v6 = server.v6,
        );
        inside(&server.netns, || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        let file = w.dir.join("guest.nft");
        std::fs::write(&file, script).unwrap();
        output_in(&server.netns, "nft", &["-f", file.to_str().unwrap()]);
        apps::serve(&guest, 2222, apps::who);
        Self
    }

    fn is_reached(&self, client: &Pod, server: &Pod) {
        for (to, seen) in [(server.v4, client.v4), (server.v6, client.v6)] {
            let stream = connect_from(&client.netns, (to, 2222).into(), |_| {}).unwrap();
            assert_eq!(said(stream).unwrap(), format!("{seen} x"));
        }
    }
}

#[test]
fn translation_inside_the_pod_leads_to_a_guest() {
    let mut w = world();
    let (client, server) = (pod(&w, "client"), pod(&w, "server"));
    let guest = Guest::of(&w, &server);
    w.start();
    guest.is_reached(&client, &server);
}

#[test]
fn a_pod_of_several_addresses_is_seen_by_the_one_that_it_uses_and_reached_by_each() {
    let mut w = world();
    let (client, stranger, server, plain) =
        (pod(&w, "client"), pod(&w, "stranger"), pod(&w, "server"), pod(&w, "plain"));
    let second: [IpAddr; 2] = ["10.1.0.99".parse().unwrap(), "fd00:1::99".parse().unwrap()];
    let third: [IpAddr; 2] = ["10.2.0.98".parse().unwrap(), "fd00:2::98".parse().unwrap()];
    ip_in(&client.netns, &format!("addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n", second[0], second[1]));
    ip_in(&server.netns, &format!("addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n", third[0], third[1]));
    for server in [&server, &plain] {
        apps::serve(&server.netns, 8080, apps::who);
    }
    w.start();
    for (index, (own, family)) in in_order_of(second).into_iter().enumerate() {
        let to = [plain.v4, plain.v6][index];
        let stream = connect_from(&client.netns, (to, 8080).into(), from(own, 0)).unwrap();
        assert_eq!(said(stream).unwrap(), format!("{own} x"), "{family}, out");
        let seen = [stranger.v4, stranger.v6][index];
        let stream = connect_from(&stranger.netns, (third[index], 8080).into(), |_| {}).unwrap();
        assert_eq!(said(stream).unwrap(), format!("{seen} x"), "{family}, in");
    }
}

#[test]
fn sockets_bound_to_a_device_and_link_local_destinations_are_captured() {
    let mut w = world();
    let (client, server, plain) = (pod(&w, "client"), pod(&w, "server"), pod(&w, "plain"));
    for server in [&server, &plain] {
        apps::serve(&server.netns, 8080, apps::who);
    }
    let near = w.add_pod("near", 1);
    apps::serve(&near.netns, 8080, apps::who);
    w.start();
    let device = |socket: &Socket| socket.bind_device(Some(b"eth0")).unwrap();
    for (to, seen) in [(server.v4, client.v4), (server.v6, client.v6), (plain.v4, client.v4), (plain.v6, client.v6)] {
        let stream = connect_from(&client.netns, (to, 8080).into(), device).unwrap();
        assert_eq!(said(stream).unwrap(), format!("{seen} x"), "{to}");
    }
    let ((there, _), (own, index)) = (link_local(&near.netns), link_local(&client.netns));
    let to = SocketAddrV6::new(there, 8080, 0, index);
    assert_eq!(said(connect_from(&client.netns, to.into(), |_| {}).unwrap()).unwrap(), format!("{own} x"));
    // And to a captured pod, whose application sees its own address, because answers to the client's address would
    // leave by the link.
    let beside = pod(&w, "plain");
    let ((there, _), (_, index)) = (link_local(&server.netns), link_local(&beside.netns));
    let to = SocketAddrV6::new(there, 8080, 0, index);
    assert_eq!(said(connect_from(&beside.netns, to.into(), |_| {}).unwrap()).unwrap(), format!("{there} x"));
    // All of these connections went through the daemon.
    w.log_line(1, "the link-local destination", |l| l["dst.addr"].as_str().is_some_and(|a| a.starts_with("[fe80::")));
}

#[test]
fn what_a_guest_opens_is_captured_also_where_its_interface_has_no_address_in_the_pod() {
    let mut w = world();
    let (client, server, plain) = (pod(&w, "client"), pod(&w, "server"), pod(&w, "plain"));
    for server in [&server, &plain] {
        apps::serve(&server.netns, 8080, apps::who);
    }
    let guest = w.ns("inner");
    crate::world::ip(&format!(
        "netns add {guest}\nlink add vg netns {} type veth peer name eth0 netns {guest}\n",
        client.netns
    ));
    ip_in(&client.netns, "link set vg up\nroute add 10.0.3.2/32 dev vg\nroute add fd03::2/128 dev vg\n");
    inside(&client.netns, || {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/vg/proxy_arp", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    });
    ip_in(&guest, "link set lo up\nlink set eth0 up\n");
    let (gateway, _) = link_local_of(&client.netns, "vg");
    ip_in(
        &guest,
        &format!(
            "addr add 10.0.3.2/32 dev eth0\naddr add fd03::2/128 dev eth0 nodad\n\
             route add default dev eth0\nroute add default via {gateway} dev eth0\n"
        ),
    );
    w.write_mesh();
    let mut entry = crate::world::pod_entry(&client);
    entry["rerouteVirtualInterfaces"] = serde_json::json!(["vg"]);
    crate::world::replace(&w.pods_file(1), &serde_json::json!({"pods": [entry]}).to_string());
    w.write_pods(2, &[&server]);
    for node in [1, 2] {
        w.start_node(node, &[]);
        w.wait_captured(node);
    }
    for to in [server.v4, server.v6, plain.v4, plain.v6] {
        let seen = if to.is_ipv4() { client.v4 } else { client.v6 };
        let stream = connect_from(&guest, (to, 8080).into(), |_| {}).unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!(said(stream).unwrap(), format!("{seen} x"), "{to}");
    }
}

/// The link-local address of a namespace's eth0, once it is usable, and the interface's index.
pub fn link_local(ns: &str) -> (std::net::Ipv6Addr, u32) {
    link_local_of(ns, "eth0")
}

fn link_local_of(ns: &str, interface: &str) -> (std::net::Ipv6Addr, u32) {
    let mut found = None;
    eventually("a link-local address", || {
        let text = inside(ns, || std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap());
        found = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find_map(|f| {
            // Scope 20 is the link. Flag 40 means that the address is tentative.
            let usable = f[3] == "20" && f[5] == interface && u8::from_str_radix(f[4], 16).unwrap() & 0x40 == 0;
            let ip = u128::from_str_radix(f[0], 16).unwrap();
            usable.then(|| (ip.into(), u32::from_str_radix(f[1], 16).unwrap()))
        });
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_pod_whose_interface_has_no_ipv4_address_is_reached_and_reaches_others() {
    let mut w = world();
    let (stranger, server, plain) = (pod(&w, "stranger"), pod(&w, "server"), pod(&w, "plain"));
    // Some networks assign the address to another interface, and the gateway only by its link.
    ip_in(
        &server.netns,
        &format!(
            "addr del {ip}/24 dev eth0\naddr add {ip}/32 dev lo\nroute add 10.2.0.1 dev eth0\n\
             route add default via 10.2.0.1 dev eth0 src {ip}\n",
            ip = server.v4
        ),
    );
    let host = w.ns("n2");
    ip_in(&host, &format!("route add {}/32 dev pods\n", server.v4));
    inside(&server.netns, || std::fs::write("/proc/sys/net/ipv4/conf/eth0/arp_ignore", "0").unwrap());
    for ns in [&server.netns, &plain.netns] {
        apps::serve(ns, 8080, apps::who);
    }
    w.start();
    let stream = connect_from(&stranger.netns, (server.v4, 8080).into(), |_| {}).unwrap();
    assert_eq!(said(stream).unwrap(), format!("{} x", stranger.v4));
    let stream = connect_from(&server.netns, (plain.v4, 8080).into(), |_| {}).unwrap();
    assert_eq!(said(stream).unwrap(), format!("{} x", server.v4));
}

#[test]
fn urgent_data_is_read_in_its_place() {
    let mut w = world();
    for server in ["server", "plain"] {
        apps::serve(&w.ns(server), 8130, apps::count);
    }
    w.start();
    for (client, server) in JOURNEYS {
        let mut stream = connect(&w.ns(client), (pod(&w, server).v4, 8130)).unwrap();
        stream.write_all(b"before").unwrap();
        nix::sys::socket::send(std::os::fd::AsRawFd::as_raw_fd(&stream), b"!", nix::sys::socket::MsgFlags::MSG_OOB)
            .unwrap();
        stream.write_all(b"after").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "12 true", "{client} to {server}");
    }
}

const OUR_PORTS: [u16; 4] = [15001, 15006, 15008, 15053];

/// Further addresses of a pod: two that it has from the start; afterwards it gets two more, and two that are its own only
/// by a route. The mesh knows none of them.
const FURTHER: [&str; 6] = ["10.77.0.5", "fd77::5", "10.77.0.6", "fd77::6", "10.78.0.7", "fd78::7"];

fn add_first_addresses(pod: &Pod) {
    ip_in(&pod.netns, "addr add 10.77.0.5/32 dev eth0\naddr add fd77::5/128 dev eth0 nodad\n");
}

fn add_later_addresses(pod: &Pod) {
    ip_in(
        &pod.netns,
        "addr add 10.77.0.6/32 dev eth0\naddr add fd77::6/128 dev eth0 nodad\n\
         route add local 10.78.0.0/24 dev lo\nroute add local fd78::/64 dev lo\n",
    );
}

/// Connects to the daemon's ports in a pod by each of the pod's addresses, and by one that the pod's own rules redirect
/// there.
fn call_our_ports(w: &World, pod: &Pod) {
    let nat = "table inet detour {\n chain out { type nat hook output priority -101; \
               ip daddr 203.0.113.9 udp dport 53 dnat ip to 127.0.0.1:15053; ip daddr 203.0.113.9 dnat ip to 127.0.0.1; \
               ip6 daddr 2001:db8:9::9 dnat ip6 to ::1; }\n}\n";
    let file = w.dir.join("detour.nft");
    std::fs::write(&file, nat).unwrap();
    output_in(&pod.netns, "nft", &["-f", file.to_str().unwrap()]);
    let accepted = || w.metric(pod.node, "istio_tcp_connections_opened_total", &[]) + failures(w, pod.node);
    let before = accepted();
    let mut calls = 0.0;
    let detour = ["203.0.113.9".parse().unwrap(), "2001:db8:9::9".parse().unwrap()];
    let further = FURTHER.map(|ip| ip.parse().unwrap());
    for ip in [pod.v4, pod.v6].into_iter().chain(further).chain(detour) {
        for port in OUR_PORTS {
            calls += 1.0;
            let Ok(mut stream) = connect_from(&pod.netns, (ip, port).into(), |_| {}) else { continue };
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let ended = stream.read_to_end(&mut answer);
            let waited = matches!(&ended, Err(e) if e.kind() == ErrorKind::WouldBlock);
            assert!(!waited, "{ip}:{port}: neither refused nor answered");
        }
    }
    let made = accepted() - before;
    assert!(made <= 2.0 * calls, "{calls} calls became {made} connections");
    eventually("nothing goes round and round", || w.json(pod.node, "/connections").as_array().unwrap().is_empty());
    // A question to a resolver, which the pod's rules redirect to the daemon's port.
    let socket = inside(&pod.netns, || std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.set_read_timeout(Some(SOON * 2)).unwrap();
    let questions = || -> u64 {
        let pods = w.json(pod.node, "/pods");
        let own = pods.as_array().unwrap().iter().find(|p| p["name"] == *pod.name).unwrap()["dns"]["requests"].clone();
        own.as_object().unwrap().values().filter_map(serde_json::Value::as_u64).sum()
    };
    let before = questions();
    socket.send_to(&crate::world::names::question("other.example", 1), "203.0.113.9:53").unwrap();
    let length = socket.recv(&mut [0; 512]).expect("told that nobody knows");
    assert!(length > 0 && questions() - before <= 2, "one question became {}", questions() - before);
}

fn failures(w: &World, node: u8) -> f64 {
    w.metric(node, "culvert_connection_failures_total", &[])
}

#[test]
fn a_pod_that_calls_our_ports_by_any_address_is_refused() {
    let mut w = world();
    let client = pod(&w, "client");
    add_first_addresses(&client);
    w.start();
    add_later_addresses(&client);
    call_our_ports(&w, &client);
    assert!(w.metric(1, "culvert_connection_failures_total", &["reason=\"loop\""]) >= 6.0);
}

#[test]
fn a_pod_that_leads_our_own_connections_back_to_us_is_refused() {
    let mut w = world();
    let (client, server, plain) = (pod(&w, "client"), pod(&w, "server"), pod(&w, "plain"));
    for ns in [&server.netns, &plain.netns] {
        apps::serve(ns, 8080, apps::who);
    }
    w.start();
    // Before our own rules, and overwriting the mark that distinguishes the daemon's packets from the application's.
    let rules = "table inet evil {\n chain o { type nat hook output priority -110; \
                 meta mark & 0xfff == 0x539 tcp dport { 8080, 15008 } redirect to :15001; }\n \
                 chain i { type filter hook input priority -170; meta mark & 0xfff == 0x539 meta mark set 0; }\n}\n";
    let file = w.dir.join("evil.nft");
    std::fs::write(&file, rules).unwrap();
    output_in(&client.netns, "nft", &["-f", file.to_str().unwrap()]);
    for to in [plain.v4, plain.v6, server.v4, server.v6] {
        let loops = || w.metric(1, "culvert_connection_failures_total", &["reason=\"loop\""]);
        let (before, failed) = (loops(), failures(&w, 1));
        assert!(crate::world::is_reset(&client.netns, (to, 8080)), "{to}");
        eventually("it is refused as a loop", || loops() > before);
        eventually("nothing goes round and round", || w.json(1, "/connections").as_array().unwrap().is_empty());
        let made = failures(&w, 1) - failed;
        assert!(made <= 4.0, "{to}: one connection became {made}");
    }
    output_in(&client.netns, "nft", &["delete", "table", "inet", "evil"]);
    for to in [plain.v4, plain.v6, server.v4, server.v6] {
        assert!(crate::world::ask(&client.netns, (to, 8080), "x").is_ok(), "{to}");
    }
}

#[test]
fn the_same_with_the_rules_of_an_agent() {
    let mut istio = Istio::new();
    let client = istio.pod("client");
    add_first_addresses(&client);
    istio.start();
    Agent::redirect_by_iptables(&client);
    assert!(istio.request().is_ok());
    add_later_addresses(&client);
    call_our_ports(&istio.w, &client);
    assert!(istio.request().is_ok());
}

#[test]
fn what_is_carried_under_an_agent_is_in_nobodys_way_either() {
    let mut istio = Istio::new();
    let (server, stranger) = (istio.pod("server"), istio.w.plain_pod("stranger", 1));
    istio.tell();
    let guest = Guest::of(&istio.w, &server);
    for port in 8140..8143 {
        apps::serve(&server.netns, port, apps::echo);
    }
    inside(&server.netns, || {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40063").unwrap();
    });
    istio.start();
    Agent::redirect_by_iptables(&server);
    let mut open = Vec::new();
    for (own, to) in [(stranger.v4, server.v4), (stranger.v6, server.v6)] {
        for (port, from_port) in (8140..8143).flat_map(|port| (40_000..40_064).step_by(8).map(move |from| (port, from)))
        {
            let mut stream = connect_from(&stranger.netns, (to, port).into(), from(own, from_port)).unwrap();
            alive(&mut stream).unwrap_or_else(|e| panic!("{own}:{from_port} to {to}:{port}: {e}"));
            open.push(stream);
        }
    }
    for stream in &mut open {
        alive(stream).unwrap();
    }
    guest.is_reached(&istio.pod("client"), &server);
}
