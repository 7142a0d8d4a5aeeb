//! A node agent that speaks ZDS as istio-cni does, with its quirks. It orders its proxies by the time they connected.
//! Adds go only to the newest proxy, deletes go to all. It sends one message at a time, and each must be answered
//! within five seconds. Answers are matched by their order alone, so a proxy that sends a message without being asked
//! breaks the protocol.

#![allow(unsafe_code, reason = "descriptors come from the kernel as numbers")]

use super::{Pod, eventually, output_in};
use culvert::proto::istio::workload::zds;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen, recv,
    sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use prost::Message;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zds::workload_request::Payload;

/// How long the agent waits for an answer.
const ANSWER: Duration = Duration::from_secs(5);
const BUFFER: usize = 1024;

/// A pod as the agent knows it. Without a network namespace it can only be kept.
#[derive(Clone)]
pub struct Known {
    pub info: zds::WorkloadInfo,
    pub netns: Option<PathBuf>,
}

/// One answer that the agent received.
#[derive(Clone, Debug)]
pub struct Answer {
    pub to: String,
    pub error: String,
    pub took: Duration,
}

#[derive(Default)]
pub struct State {
    pub pods: BTreeMap<String, Known>,
    pub answers: Vec<Answer>,
    /// Violations of the protocol.
    pub violations: Vec<String>,
    /// The number of snapshot messages after which the agent breaks the connection, once.
    pub break_snapshot_after: Option<usize>,
    /// Packets that are sent unchanged before the snapshot.
    pub garbage: Vec<Vec<u8>>,
    connections: Vec<(u64, Sender<Command>)>,
    next: u64,
    pub snapshots: usize,
}

enum Command {
    Send(Payload, Option<File>, Sender<Result<(), String>>),
    Break,
}

pub struct Agent {
    pub path: PathBuf,
    state: Arc<Mutex<State>>,
    listening: Option<(OwnedFd, JoinHandle<()>)>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Agent {
    pub fn start(path: &Path) -> Self {
        let mut agent = Self { path: path.to_owned(), state: Arc::default(), listening: None };
        agent.up();
        agent
    }

    /// Starts to listen, after removing a stale socket file.
    pub fn up(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&self.path).unwrap()).unwrap();
        listen(&fd, Backlog::new(16).unwrap()).unwrap();
        let (raw, state) = (fd.as_raw_fd(), self.state.clone());
        let thread = std::thread::spawn(move || {
            while let Ok(accepted) = accept4(raw, SockFlag::SOCK_CLOEXEC) {
                // SAFETY: accept4 has just made this descriptor, so nothing else owns it.
                let connection = unsafe { OwnedFd::from_raw_fd(accepted) };
                let state = state.clone();
                std::thread::spawn(move || serve(&state, &connection));
            }
        });
        self.listening = Some((fd, thread));
    }

    /// Acts as if the agent had been killed: nothing listens, and all connections are closed.
    pub fn down(&mut self) {
        if let Some((fd, thread)) = self.listening.take() {
            nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
            thread.join().unwrap();
            drop(fd);
        }
        self.break_all();
        eventually("no proxy is connected", || lock(&self.state).connections.is_empty());
        let _ = std::fs::remove_file(&self.path);
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub fn break_all(&self) {
        for (_, connection) in &self.state().connections {
            let _ = connection.send(Command::Break);
        }
    }

    pub fn connections(&self) -> usize {
        self.state().connections.len()
    }

    /// Adds a pod to the agent's list for the next snapshot, without sending it to any proxy.
    pub fn know(&self, pod: &Pod) {
        self.know_in(pod, Some(&pod.netns));
    }

    pub fn know_in(&self, pod: &Pod, netns: Option<&str>) {
        let info =
            zds::WorkloadInfo { name: pod.name.clone(), namespace: "ns".into(), service_account: pod.name.clone() };
        let netns = netns.map(|name| Path::new("/run/netns").join(name));
        self.state().pods.insert(uid(pod), Known { info, netns });
    }

    pub fn forget(&self, pod: &Pod) {
        self.state().pods.remove(&uid(pod));
    }

    /// Writes the redirection into the pod, as the agent does before it announces the pod.
    pub fn redirect(pod: &Pod) {
        redirect(&pod.netns, true);
    }

    /// Replaces the redirection by the rules that the agent writes with iptables.
    pub fn redirect_by_iptables(pod: &Pod) {
        for (program, loopback, probes) in [
            ("iptables", "127.0.0.1/32", "169.254.7.127"),
            ("ip6tables", "::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
        ] {
            let ours = "-m mark --mark 0x539/0xfff";
            let others = "-m mark ! --mark 0x539/0xfff";
            let script = format!(
                "*mangle\n-A PREROUTING {ours} -j CONNMARK --set-xmark 0x111/0xfff\n\
                 -A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark\nCOMMIT\n\
                 *nat\n-A PREROUTING -s {probes} -p tcp -j ACCEPT\n\
                 -A PREROUTING ! -d {loopback} -p tcp ! --dport 15008 {others} -j REDIRECT --to-ports 15006\n\
                 -A OUTPUT -d {probes} -p tcp -j ACCEPT\n\
                 -A OUTPUT ! -o lo -p udp --dport 53 {others} -j REDIRECT --to-ports 15053\n\
                 -A OUTPUT ! -d {loopback} -p tcp --dport 53 {others} -j REDIRECT --to-ports 15053\n\
                 -A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT\n\
                 -A OUTPUT ! -d {loopback} -o lo -j ACCEPT\n\
                 -A OUTPUT ! -d {loopback} -p tcp {others} -j REDIRECT --to-ports 15001\nCOMMIT\n\
                 *raw\n-A OUTPUT -p udp --dport 53 {ours} -j CT --zone 1\n\
                 -A PREROUTING -p udp --sport 53 {others} -j CT --zone 1\nCOMMIT\n"
            );
            let steps = format!("printf '%s' \"$1\" | {program}-restore --noflush");
            output_in(&pod.netns, "sh", &["-c", &steps, "sh", &script]);
        }
        output_in(&pod.netns, "nft", &["delete", "table", "inet", "agent"]);
    }

    pub fn stop_redirecting(pod: &Pod) {
        redirect(&pod.netns, false);
    }

    /// Adds a pod and sends it to the newest proxy.
    pub fn add(&self, pod: &Pod) -> Result<(), String> {
        self.know(pod);
        self.tell_add(pod)
    }

    /// Sends a known pod to the newest proxy.
    pub fn tell_add(&self, pod: &Pod) -> Result<(), String> {
        let (newest, known) = {
            let state = self.state();
            let newest = state.connections.last().map(|(_, connection)| connection.clone());
            (newest.ok_or("no ztunnel connection")?, state.pods.get(&uid(pod)).unwrap().clone())
        };
        send(&newest, add(&uid(pod), &known), known.netns.map(|path| File::open(path).unwrap()))
    }

    /// Deletes a pod at all proxies.
    pub fn del(&self, pod: &Pod) -> Result<(), String> {
        self.forget(pod);
        let all: Vec<Sender<Command>> = self.state().connections.iter().map(|(_, c)| c.clone()).collect();
        all.iter().try_for_each(|c| send(c, Payload::Del(zds::DelWorkload { uid: uid(pod) }), None))
    }

    /// Sends any message to the newest proxy.
    pub fn send(&self, payload: Payload, netns: Option<File>) -> Result<(), String> {
        let newest = self.state().connections.last().map(|(_, c)| c.clone());
        send(&newest.ok_or("no ztunnel connection")?, payload, netns)
    }

    /// Waits until `more` snapshots since `before` have been sent and answered.
    pub fn wait_snapshot(&self, before: usize) {
        eventually("a snapshot is complete", || self.state().snapshots > before);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.down();
        }
    }
}

pub fn uid(pod: &Pod) -> String {
    format!("uid-{}", pod.name)
}

fn add(uid: &str, known: &Known) -> Payload {
    Payload::Add(zds::AddWorkload { uid: uid.into(), workload_info: Some(known.info.clone()) })
}

fn send(to: &Sender<Command>, payload: Payload, netns: Option<File>) -> Result<(), String> {
    let (answer, answered) = mpsc::channel();
    to.send(Command::Send(payload, netns, answer)).map_err(|_| "the connection is gone")?;
    answered.recv_timeout(ANSWER * 4).unwrap_or_else(|_| Err("the connection is gone".into()))
}

fn serve(state: &Mutex<State>, socket: &OwnedFd) {
    let (commands, queue) = mpsc::channel();
    let (id, garbage) = {
        let mut state = lock(state);
        state.next += 1;
        let id = state.next;
        // The connection counts before its hello is read, as with istio-cni.
        state.connections.push((id, commands));
        (id, std::mem::take(&mut state.garbage))
    };
    if let Err(error) = talk(state, socket.as_raw_fd(), &queue, &garbage)
        && !error.is_empty()
    {
        lock(state).violations.push(error);
    }
    let mut state = lock(state);
    state.connections.retain(|(other, _)| *other != id);
}

/// Serves one connection. An empty error is an ordinary end.
fn talk(state: &Mutex<State>, fd: RawFd, queue: &Receiver<Command>, garbage: &[Vec<u8>]) -> Result<(), String> {
    let hello = receive(fd, ANSWER).map_err(|_| "no hello within 5 s".to_owned())?;
    let version = zds::ZdsHello::decode(&*hello).map(|hello| hello.version);
    if version != Ok(1) {
        return Err(format!("not a hello: {hello:?}"));
    }
    for packet in garbage {
        transmit(fd, packet, None)?;
        let answer = receive(fd, ANSWER).map_err(|_| format!("garbage was not answered: {packet:?}"))?;
        let error = error_of(&answer)?;
        lock(state).answers.push(Answer { to: "garbage".into(), error, took: Duration::ZERO });
    }
    let pods: Vec<(String, Known)> = lock(state).pods.clone().into_iter().collect();
    for (index, (uid, known)) in pods.into_iter().enumerate() {
        if lock(state).break_snapshot_after.take_if(|n| *n == index).is_some() {
            return Err(String::new());
        }
        match known.netns.as_ref().and_then(|path| File::open(path).ok()) {
            // An error during the snapshot is only recorded.
            Some(netns) => drop(ask(state, fd, add(&uid, &known), Some(&netns))?),
            None => drop(ask(state, fd, Payload::Keep(zds::KeepWorkload { uid }), None)?),
        }
    }
    let _ = ask(state, fd, Payload::SnapshotSent(zds::SnapshotSent {}), None)?;
    lock(state).snapshots += 1;
    loop {
        match queue.recv_timeout(Duration::from_millis(20)) {
            Ok(Command::Send(payload, netns, answer)) => {
                let result = ask(state, fd, payload, netns.as_ref());
                let _ = answer.send(result.clone().and_then(|ack| ack));
                result?.ok();
            }
            Ok(Command::Break) | Err(RecvTimeoutError::Disconnected) => return Err(String::new()),
            Err(RecvTimeoutError::Timeout) => match receive(fd, Duration::from_millis(1)) {
                Ok(bytes) if bytes.is_empty() => return Err(String::new()),
                Ok(bytes) => return Err(format!("something unasked: {bytes:?}")),
                Err(_) => {}
            },
        }
    }
}

/// Sends one message and waits for its answer.
fn ask(state: &Mutex<State>, fd: RawFd, payload: Payload, netns: Option<&File>) -> Result<Result<(), String>, String> {
    let to = format!("{payload:?}");
    let bytes = zds::WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    let start = Instant::now();
    transmit(fd, &bytes, netns)?;
    let answer = receive(fd, ANSWER).map_err(|_| format!("no answer within 5 s: {to}"))?;
    if answer.is_empty() {
        return Err(String::new());
    }
    let error = error_of(&answer)?;
    lock(state).answers.push(Answer { to, error: error.clone(), took: start.elapsed() });
    Ok(if error.is_empty() { Ok(()) } else { Err(error) })
}

fn error_of(answer: &[u8]) -> Result<String, String> {
    match zds::WorkloadResponse::decode(answer).map(|response| response.payload) {
        Ok(Some(zds::workload_response::Payload::Ack(ack))) if answer.len() < 1000 => Ok(ack.error),
        other => Err(format!("not an answer, or too long: {} bytes, {other:?}", answer.len())),
    }
}

fn transmit(fd: RawFd, bytes: &[u8], netns: Option<&File>) -> Result<(), String> {
    let fds: Vec<RawFd> = netns.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
    sent.map(drop).map_err(|_| String::new())
}

fn receive(fd: RawFd, patience: Duration) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0; BUFFER];
    let wait = TimeVal::new(i64::try_from(patience.as_secs()).unwrap(), i64::from(patience.subsec_micros()));
    // SAFETY: the descriptor is open for as long as its connection is served.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    setsockopt(&borrowed, sockopt::ReceiveTimeout, &wait)?;
    let length = recv(fd, &mut bytes, MsgFlags::empty())?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Writes or removes the agent's rules in a pod, which have the same effect as istio-cni's.
fn redirect(netns: &str, on: bool) {
    let script = if on {
        "add table inet agent\nflush table inet agent\ntable inet agent {\n\
         chain praw { type filter hook prerouting priority -300; udp sport 53 meta mark & 0xfff != 0x539 ct zone set 1; }\n\
         chain oraw { type filter hook output priority -300; udp dport 53 meta mark & 0xfff == 0x539 ct zone set 1; }\n\
         chain pm { type filter hook prerouting priority -150; meta mark & 0xfff == 0x539 ct mark set 0x111; }\n\
         chain om { type route hook output priority -150; ct mark & 0xfff == 0x111 meta mark set ct mark; }\n\
         chain pn { type nat hook prerouting priority -100;\n\
         ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006\n\
         ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006\n}\n\
         chain on { type nat hook output priority -100;\n\
         oifname != lo meta mark & 0xfff != 0x539 udp dport 53 redirect to :15053\n\
         ip daddr != 127.0.0.1 tcp dport 53 meta mark & 0xfff != 0x539 redirect to :15053\n\
         ip6 daddr != ::1 tcp dport 53 meta mark & 0xfff != 0x539 redirect to :15053\n\
         meta l4proto tcp meta mark & 0xfff == 0x111 accept\noifname lo ip daddr != 127.0.0.1 accept\n\
         oifname lo ip6 daddr != ::1 accept\n\
         meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001\n\
         meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15001\n}\n}\n"
    } else {
        // The chains stay, because without any NAT chain the kernel would stop translating open connections.
        "flush chain inet agent pn\nflush chain inet agent on\n"
    };
    let routes = if on {
        "for f in -4 -6; do ip $f rule show pref 32764 | grep -q . || \
           ip $f rule add fwmark 0x111/0xfff pref 32764 lookup 100 || exit 1; done; \
         ip route replace local 0.0.0.0/0 dev lo table 100; ip -6 route replace local ::/0 dev lo table 100"
    } else {
        "true"
    };
    let steps = format!("printf '%s' \"$1\" | nft -f - && {{ {routes}; }}");
    output_in(netns, "sh", &["-c", &steps, "sh", script]);
}
