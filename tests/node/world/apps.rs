//! Applications: small servers in a pod, on threads of the test. They end with the test's process.

use super::inside;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

/// Serves each connection on a port of a namespace with `handler`, on a thread of its own.
pub fn serve(ns: &str, port: u16, handler: fn(TcpStream)) {
    let listener = inside(ns, || TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || handler(stream));
        }
    });
}

/// Answers with the client's address as the server sees it, then closes.
pub fn who(mut stream: TcpStream) {
    let peer = stream.peer_addr().unwrap();
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    let _ = write!(stream, "{} {}", peer.ip().to_canonical(), line.trim());
}

/// Sends back what it gets, until the client has finished.
pub fn echo(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = [0; 65536];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
}

/// Speaks first.
pub fn greet(mut stream: TcpStream) {
    let _ = stream.write_all(b"hello, who is there?\n");
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    let _ = stream.write_all(line.to_uppercase().as_bytes());
}

/// Reads all until the client closes its side, then answers with the number of bytes.
pub fn count(mut stream: TcpStream) {
    let mut all = Vec::new();
    let result = stream.read_to_end(&mut all);
    let _ = write!(stream, "{} {:?}", all.len(), result.is_ok());
    let _ = stream.shutdown(Shutdown::Both);
}

/// What clients of [`finish_first`] have sent.
pub static FINISHED: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

/// Says what it has to say, closes its side, and only then listens.
pub fn finish_first(mut stream: TcpStream) {
    let _ = stream.write_all(b"that is all from me");
    let _ = stream.shutdown(Shutdown::Write);
    let mut all = String::new();
    let _ = stream.read_to_string(&mut all);
    FINISHED.lock().unwrap().push(all);
}

/// Takes one byte, then resets the connection.
pub fn reset(mut stream: TcpStream) {
    let _ = stream.read(&mut [0]);
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
}

/// Accepts, and never reads.
pub fn hold(stream: TcpStream) {
    loop {
        std::thread::park();
        // Unparked by nobody; the connection is open for as long as the test's process.
        let _held = &stream;
    }
}

/// Sends without end once it has got a line.
pub fn pour(mut stream: TcpStream) {
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    let chunk = vec![b'.'; 1 << 16];
    while stream.write_all(&chunk).is_ok() {}
}
