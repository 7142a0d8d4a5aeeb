//! Explains handshakes that fail because a certificate is not valid at this time.
//!
//! The cause is usually a clock that is wrong on one of the two sides, so the message names the side whose clock
//! decided.

use rustls::{AlertDescription, Error};
use std::io;

/// Whether a certificate was rejected because it is expired or not valid yet, by this node's clock.
pub fn is_about_time(error: &Error) -> bool {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let Error::InvalidCertificate(reason) = error else { return false };
    matches!(reason, Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
}

/// An explanation for a handshake that failed because of a clock; `None` if it failed for another reason.
pub fn clock_reason(error: &io::Error) -> Option<&'static str> {
    const OURS: &str = "by this node's clock that certificate is not valid now: one of the two clocks is off, or the certificate was not renewed";
    const THEIRS: &str = "by the far end's clock our certificate is not valid now: one of the two clocks is off";
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) if is_about_time(error) => Some(OURS),
        Some(Error::AlertReceived(AlertDescription::CertificateExpired)) => Some(THEIRS),
        Some(_) => None,
        // The HTTP/2 library passes on only the text of the error.
        None => error.to_string().contains("alert: CertificateExpired").then_some(THEIRS),
    }
}

/// The text of a handshake error, followed by [`clock_reason`] where there is one.
pub fn with_clock_reason(error: &io::Error) -> String {
    clock_reason(error).map_or_else(|| error.to_string(), |reason| format!("{error}; {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::CertificateError;

    #[test]
    fn a_handshake_that_fails_because_of_a_clock_says_whose() {
        let of = |error: Error| clock_reason(&io::Error::other(error)).unwrap_or_default();
        for error in [CertificateError::Expired, CertificateError::NotValidYet] {
            assert!(of(Error::InvalidCertificate(error)).starts_with("by this node's clock"));
        }
        assert!(of(Error::AlertReceived(AlertDescription::CertificateExpired)).starts_with("by the far end's clock"));
        // In the form in which the HTTP/2 library passes it on.
        let text = io::Error::other("received fatal alert: CertificateExpired");
        assert!(clock_reason(&text).is_some_and(|said| said.starts_with("by the far end's clock")));
        for other in [Error::InvalidCertificate(CertificateError::UnknownIssuer), Error::DecryptError] {
            assert_eq!(of(other), "");
        }
        let error = io::Error::other(Error::InvalidCertificate(CertificateError::Expired));
        assert!(with_clock_reason(&error).contains("one of the two clocks"));
    }
}
