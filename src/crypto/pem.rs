//! Certificates in PEM text.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// All certificates of a PEM text. Other items, such as keys, are skipped. An error says which part is malformed.
pub fn certificates_from_pem(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// A certificate as PEM text, in lines of 64 characters.
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let body = STANDARD.encode(certificate);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for length in [0, 1, 47, 48, 49, 1000] {
            let certificate = CertificateDer::from(vec![7; length]);
            let text = certificate_pem(&certificate);
            assert!(text.lines().all(|line| line.len() <= 64), "{text}");
            assert_eq!(certificates_from_pem(text.as_bytes()).unwrap(), [certificate]);
        }
    }
}
