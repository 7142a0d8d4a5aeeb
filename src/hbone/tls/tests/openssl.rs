//! Interoperation with the `openssl` tool. Without it, these tests do nothing.
//!
//! Lines on its input are sent as data, except for commands: `K` sends a KeyUpdate that wants an answer, `k` one that
//! does not, and `Q` ends the connection.

use super::*;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Names of the suites, in the order of [`SUITES`].
const NAMES: [&str; 3] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"];

/// A running tool, which is killed when this is dropped.
struct Tool {
    _child: Child,
    input: ChildStdin,
    output: ChildStdout,
    read: Vec<u8>,
    directory: PathBuf,
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Tool {
    /// `None`: it is not installed.
    fn start(args: &[&str]) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("tls-peer-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        for (name, pem) in [("chain", &PKI.chain_pem), ("key", &PKI.key_pem), ("ca", &PKI.ca_pem)] {
            std::fs::write(directory.join(name), pem).unwrap();
        }
        let mut command = Command::new("openssl");
        command.args(args).args(["-tls1_3", "-cert", "chain", "-key", "key", "-CAfile", "ca"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let spawned = command.current_dir(&directory).kill_on_drop(true).spawn();
        let Ok(mut child) = spawned else {
            std::fs::remove_dir_all(&directory).unwrap();
            return None;
        };
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Some(Self { _child: child, input, output, read: Vec::new(), directory })
    }

    async fn write(&mut self, line: &str) {
        self.input.write_all(line.as_bytes()).await.unwrap();
        self.input.flush().await.unwrap();
    }

    /// Waits until its output contains `text`. Returns the rest of that line.
    async fn wait_for(&mut self, text: &str) -> String {
        loop {
            let output = String::from_utf8_lossy(&self.read);
            if let Some((rest, _)) = output.split_once(text).and_then(|(_, rest)| rest.split_once('\n')) {
                return rest.to_owned();
            }
            let ended = self.output.read_buf(&mut self.read).await.unwrap() == 0;
            assert!(!ended, "the tool ended without {text:?}: {}", String::from_utf8_lossy(&self.read));
        }
    }
}

/// Data, and key updates with and without an answer.
async fn talk(ours: &mut Owner, tool: &mut Tool) {
    for round in 0..3 {
        let line = format!("from the tool {round}\n");
        tool.write(&line).await;
        let data = ours.receive_data(line.len()).await.0;
        assert_eq!(String::from_utf8(data).unwrap(), line);
        tool.write("K\n").await;
        assert_eq!(ours.receive().await, Ok(Event::Control));
        assert!(ours.tls.pending(), "an answer is wanted");
        ours.send(format!("to the tool {round}\n").as_bytes()).await;
        tool.wait_for(&format!("to the tool {round}")).await;
        tool.write("k\n").await;
        assert_eq!(ours.receive().await, Ok(Event::Control));
        assert!(!ours.tls.pending(), "no answer is wanted");
    }
    // Many records, of which the last ends in a word that can be found.
    let mut data = vec![b'.'; 200_000];
    data.extend(b"\nthe last word\n");
    tokio::join!(ours.send(&data), tool.wait_for("the last word"));
}

#[tokio::test]
async fn a_client_talks_to_openssl() {
    for (suite, name) in SUITES.into_iter().zip(NAMES) {
        let args = ["s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-Verify", "1", "-ciphersuites", name];
        let Some(mut tool) = Tool::start(&args) else { return };
        let address = tool.wait_for("ACCEPT ").await;
        let socket = TcpStream::connect(address.trim()).await.unwrap();
        let client = connect(socket, client_config(suite, &[]), localhost()).await.unwrap();
        assert_eq!(client.peer_certificates[0], PKI.chain[0]);
        let mut client = Owner::new(client);
        talk(&mut client, &mut tool).await;
        client.close().await;
        assert_eq!(client.receive().await, Ok(Event::Closed), "it answers close_notify");
    }
}

#[tokio::test]
async fn a_server_talks_to_openssl() {
    for (suite, name) in SUITES.into_iter().zip(NAMES) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let args = ["s_client", "-connect", &address, "-verify_return_error", "-ciphersuites", name];
        let Some(mut tool) = Tool::start(&args) else { return };
        let socket = listener.accept().await.unwrap().0;
        let server = accept(socket, server_config(suite, &[], 2)).await.unwrap();
        assert_eq!(server.peer_certificates[0], PKI.chain[0]);
        let mut server = Owner::new(server);
        talk(&mut server, &mut tool).await;
        tool.write("Q\n").await;
        assert_eq!(server.receive().await, Ok(Event::Closed));
    }
}
