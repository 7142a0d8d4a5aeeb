//! Signature checks of our certificate verifiers, which all leave them to a verifier of the library.

/// The signature methods of rustls' `ServerCertVerifier` and `ClientCertVerifier`, forwarded to the verifier in a field
/// of `self`. Our verifiers add rules about names; they never check a signature themselves.
macro_rules! delegate_signatures {
    ($($field:ident).+) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            self.$($field).+.verify_tls12_signature(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            self.$($field).+.verify_tls13_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.$($field).+.supported_verify_schemes()
        }
    };
}

pub(crate) use delegate_signatures;
