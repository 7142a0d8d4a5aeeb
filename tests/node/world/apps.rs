//! Applications: small servers in pods, on threads of the test process. They end with the process.

use super::inside;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

/// Serves each connection to a port of a namespace with `handler`, on a separate thread.
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

/// Echoes everything until the client has closed its side.
pub fn echo(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = [0; 65536];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
}

/// Sends a greeting before the client sends anything.
pub fn greet(mut stream: TcpStream) {
    let _ = stream.write_all(b"hello, who is there?\n");
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    let _ = stream.write_all(line.to_uppercase().as_bytes());
}

/// Reads until the client closes its side, then answers with the number of bytes.
pub fn count(mut stream: TcpStream) {
    let mut all = Vec::new();
    let result = stream.read_to_end(&mut all);
    let _ = write!(stream, "{} {:?}", all.len(), result.is_ok());
    let _ = stream.shutdown(Shutdown::Both);
}

/// What clients of [`finish_first`] have sent.
pub static FINISHED: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

/// Sends its answer and closes its side before it reads.
pub fn finish_first(mut stream: TcpStream) {
    let _ = stream.write_all(b"that is all from me");
    let _ = stream.shutdown(Shutdown::Write);
    let mut all = String::new();
    let _ = stream.read_to_string(&mut all);
    FINISHED.lock().unwrap().push(all);
}

/// Reads one byte, then resets the connection.
pub fn reset(mut stream: TcpStream) {
    let _ = stream.read(&mut [0]);
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
}

/// Accepts the connection and never reads.
pub fn hold(stream: TcpStream) {
    loop {
        std::thread::park();
        // Parks for ever, so that the connection stays open as long as the test process runs.
        let _held = &stream;
    }
}

/// Sends without end after it has received a line.
pub fn pour(mut stream: TcpStream) {
    let mut line = String::new();
    let _ = BufReader::new(&stream).read_line(&mut line);
    let chunk = vec![b'.'; 1 << 16];
    while stream.write_all(&chunk).is_ok() {}
}
