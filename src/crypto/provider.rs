//! The cryptographic provider: which cipher suites and key exchanges the daemon offers and accepts.

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use std::sync::atomic::{AtomicBool, Ordering};

/// The ALPN protocol name of HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";

/// Whether only post-quantum key exchange is offered and accepted.
static ONLY_POST_QUANTUM: AtomicBool = AtomicBool::new(false);

/// Restricts key exchange to post-quantum groups (`COMPLIANCE_POLICY=pqc`). Called once, before the first connection.
pub fn only_post_quantum() {
    ONLY_POST_QUANTUM.store(true, Ordering::Relaxed);
}

/// aws-lc-rs with the AES-GCM suites of TLS 1.3. The post-quantum hybrid X25519MLKEM768 is preferred.
pub fn provider() -> CryptoProvider {
    let mut kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    if !ONLY_POST_QUANTUM.load(Ordering::Relaxed) {
        kx_groups.extend([aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1, aws_lc_rs::kx_group::SECP384R1]);
    }
    CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups,
        ..aws_lc_rs::default_provider()
    }
}
