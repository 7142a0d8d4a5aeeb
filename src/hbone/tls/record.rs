//! TLS 1.3 records, protected in place (RFC 8446 section 5). No I/O, and no allocation per record.
//!
//! The keys are used through `LessSafeKey`, with nonces from a counter of our own. aws-lc's `TlsRecordSealingKey` checks
//! that nonces increase, but it takes its first nonce for number 0, so it refuses a key that is taken over in the
//! middle of its life (a rustls server counts the tickets that it sent), and it has no ChaCha20-Poly1305. Here,
//! [`Sealer`] is the only user of its key, never gives a number twice, and cannot be cloned.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;
use std::fmt;
use std::ops::Range;
use zeroize::Zeroizing;

/// Bytes before the content: type, version and length.
pub const HEAD: usize = 5;

/// Most bytes of content in a record (RFC 8446 section 5.1).
pub const PLAIN_MAX: usize = 16_384;

/// Bytes behind the content of a record that this layer writes: the content type and the tag.
pub const TAIL: usize = 1 + TAG;

/// Room for a record that this layer writes.
pub const SLOT: usize = HEAD + PLAIN_MAX + TAIL;

/// Most bytes behind the header of a record on the wire, with padding (RFC 8446 section 5.2).
pub const WIRE_MAX: usize = PLAIN_MAX + 256;

/// All three ciphers have tags of this size.
const TAG: usize = 16;

/// Records that one AES-GCM key may protect (RFC 8446 section 5.5 says 2^24.5 of full size). The same as in rustls.
const AES_GCM_RECORDS: u64 = 1 << 24;

/// That many records before the limit, [`Sealer::needs_key_update`] asks for a new key.
const RECORDS_LEFT: u64 = 1 << 16;

/// What a protected record contains (RFC 8446 section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// An alert.
    Alert,
    /// Handshake messages, or a part of one.
    Handshake,
    /// Application data.
    ApplicationData,
}

impl ContentType {
    fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            21 => Some(Self::Alert),
            22 => Some(Self::Handshake),
            23 => Some(Self::ApplicationData),
            _ => None,
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::ApplicationData => 23,
        }
    }
}

/// Why a record cannot be opened or sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is longer than allowed.
    #[error("a TLS record is longer than allowed")]
    Overflow,
    /// It was changed on the way, or is not from the peer.
    #[error("a TLS record cannot be decrypted")]
    BadMac,
    /// Its type is not allowed, or its content is empty where it must not be.
    #[error("a TLS record has an unexpected type or no content")]
    Unexpected,
    /// The slice that was given is not one whole record, or has no room for it. This is the caller's mistake.
    #[error("the buffer does not fit the TLS record")]
    Buffer,
    /// The key may protect no more records (RFC 8446 section 5.5).
    #[error("a TLS key has protected as many records as it may")]
    Exhausted,
    /// The cryptographic library refused a key or to encrypt.
    #[error("the cryptographic library failed")]
    Library,
}

/// The AEAD of a cipher suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
}

impl Suite {
    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }

    /// Records of application data that one key may protect.
    fn limit(self) -> u64 {
        match self {
            Self::Aes128Gcm | Self::Aes256Gcm => AES_GCM_RECORDS,
            // RFC 8446 section 5.5: the numbers of records run out first.
            Self::ChaCha20Poly1305 => u64::MAX,
        }
    }
}

/// Everything secret about one direction of a connection. All state of a [`Sealer`] or an [`Opener`] is here; the rest
/// follows from it. So this is what another process needs to continue the direction.
pub struct Secrets {
    suite: Suite,
    /// Longer than the key of some suites. Overwritten when it is dropped.
    key: Zeroizing<[u8; 32]>,
    iv: [u8; NONCE_LEN],
    /// Number of the next record.
    sequence: u64,
}

impl Secrets {
    /// `sequence` is the number of the next record.
    pub fn new(suite: Suite, key: &[u8], iv: &[u8], sequence: u64) -> Result<Self, RecordError> {
        let mut long = Zeroizing::new([0; 32]);
        if key.len() != suite.algorithm().key_len() {
            return Err(RecordError::Library);
        }
        long.get_mut(..key.len()).ok_or(RecordError::Library)?.copy_from_slice(key);
        Ok(Self { suite, key: long, iv: iv.try_into().map_err(|_| RecordError::Library)?, sequence })
    }
}

impl TryFrom<(u64, ConnectionTrafficSecrets)> for Secrets {
    type Error = RecordError;

    fn try_from((sequence, traffic): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (suite, key, iv) = match &traffic {
            Aes128Gcm { key, iv } => (Suite::Aes128Gcm, key, iv),
            Aes256Gcm { key, iv } => (Suite::Aes256Gcm, key, iv),
            Chacha20Poly1305 { key, iv } => (Suite::ChaCha20Poly1305, key, iv),
            _ => return Err(RecordError::Library),
        };
        Self::new(suite, key.as_ref(), iv.as_ref(), sequence)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} record {}", self.suite, self.sequence)
    }
}

/// Secrets, and the key in the form in which the cryptographic library uses it.
struct Cipher {
    secrets: Secrets,
    key: LessSafeKey,
}

impl Cipher {
    fn new(secrets: Secrets) -> Result<Self, RecordError> {
        let algorithm = secrets.suite.algorithm();
        let key = secrets.key.get(..algorithm.key_len()).ok_or(RecordError::Library)?;
        let key = UnboundKey::new(algorithm, key).map_err(|_| RecordError::Library)?;
        Ok(Self { key: LessSafeKey::new(key), secrets })
    }

    fn limit(&self) -> u64 {
        self.secrets.suite.limit()
    }

    /// The nonce of the next record (RFC 8446 section 5.3): the IV, and in its last 8 bytes the number of the record.
    fn nonce(&self) -> Nonce {
        let mut nonce = self.secrets.iv;
        for (byte, number) in nonce.iter_mut().rev().zip(self.secrets.sequence.to_be_bytes().into_iter().rev()) {
            *byte ^= number;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Numbers must not wrap (RFC 8446 section 5.3). The last one is never used.
    fn after_next(&self) -> Result<u64, RecordError> {
        self.secrets.sequence.checked_add(1).ok_or(RecordError::Exhausted)
    }
}

/// Protects what is sent.
pub struct Sealer(Cipher);

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealer({:?})", self.0.secrets)
    }
}

impl Sealer {
    /// Continues with `secrets`. Nothing else may seal with them.
    pub fn new(secrets: Secrets) -> Result<Self, RecordError> {
        Cipher::new(secrets).map(Self)
    }

    /// Makes a record of application data in place. The content is already at `record[HEAD..HEAD + plain]`. Returns
    /// the length of the record, which is `HEAD + plain + TAIL`.
    pub fn seal(&mut self, record: &mut [u8], plain: usize) -> Result<usize, RecordError> {
        if self.0.secrets.sequence >= self.0.limit() {
            return Err(RecordError::Exhausted);
        }
        self.seal_as(ContentType::ApplicationData, record, plain)
    }

    /// Like [`Sealer::seal`], for any content. Alerts, and the KeyUpdate that ends the use of a key, may still be
    /// sealed when the key's limit is reached.
    pub fn seal_as(&mut self, content: ContentType, record: &mut [u8], plain: usize) -> Result<usize, RecordError> {
        if plain > PLAIN_MAX {
            return Err(RecordError::Overflow);
        }
        let after = self.0.after_next()?;
        let length = u16::try_from(plain + TAIL).map_err(|_| RecordError::Overflow)?;
        let (head, rest) = record.split_first_chunk_mut::<HEAD>().ok_or(RecordError::Buffer)?;
        let (inner, rest) = rest.split_at_mut_checked(plain + 1).ok_or(RecordError::Buffer)?;
        let place = rest.first_chunk_mut::<TAG>().ok_or(RecordError::Buffer)?;
        let [high, low] = length.to_be_bytes();
        // On the wire every record looks like application data of TLS 1.2 (RFC 8446 section 5.2).
        *head = [23, 3, 3, high, low];
        if let Some(last) = inner.last_mut() {
            *last = content.to_wire();
        }
        let tag = self.0.key.seal_in_place_separate_tag(self.0.nonce(), Aad::from(*head), inner);
        // The number counts as used whether or not this worked, so no nonce is ever used twice.
        self.0.secrets.sequence = after;
        place.copy_from_slice(tag.map_err(|_| RecordError::Library)?.as_ref());
        Ok(HEAD + plain + TAIL)
    }

    /// Whether the key will soon have protected as many records as it may, so that a KeyUpdate is due.
    pub fn needs_key_update(&self) -> bool {
        self.0.secrets.sequence >= self.0.limit() - RECORDS_LEFT
    }
}

/// Opens what is received.
pub struct Opener(Cipher);

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opener({:?})", self.0.secrets)
    }
}

/// Length of the whole record that begins with `head`. Fails if no such record is allowed after the handshake.
pub(super) fn whole_length(head: [u8; HEAD]) -> Result<usize, RecordError> {
    let [outer, _, _, high, low] = head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    // RFC 8446 section 5: a ChangeCipherSpec is ignored only until the peer's Finished, and everything else is
    // protected, so its type on the wire is application data.
    if ContentType::from_wire(outer) != Some(ContentType::ApplicationData) {
        return Err(RecordError::Unexpected);
    }
    if length > WIRE_MAX { Err(RecordError::Overflow) } else { Ok(HEAD + length) }
}

impl Opener {
    /// Continues with `secrets`.
    pub fn new(secrets: Secrets) -> Result<Self, RecordError> {
        Cipher::new(secrets).map(Self)
    }

    /// Opens one whole record in place. Returns what it contains, and where in `record` the content is.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), RecordError> {
        let whole = record.len();
        let (head, inner) = record.split_first_chunk_mut::<HEAD>().ok_or(RecordError::Buffer)?;
        if whole_length(*head)? != whole {
            return Err(RecordError::Buffer);
        }
        if inner.len() < TAIL {
            return Err(RecordError::BadMac);
        }
        let after = self.0.after_next()?;
        let plain = self.0.key.open_in_place(self.0.nonce(), Aad::from(*head), inner);
        let plain = plain.map_err(|_| RecordError::BadMac)?;
        self.0.secrets.sequence = after;
        // RFC 8446 section 5.4: content and its type, without tag but with padding, have a limit of their own.
        if plain.len() > PLAIN_MAX + 1 {
            return Err(RecordError::Overflow);
        }
        // The type is the last byte that is not padding. A record of padding only is not allowed.
        let length = plain.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Unexpected)?;
        let content = plain.get(length).copied().and_then(ContentType::from_wire).ok_or(RecordError::Unexpected)?;
        // RFC 8446 section 5.4: only application data may be empty.
        if length == 0 && content != ContentType::ApplicationData {
            return Err(RecordError::Unexpected);
        }
        Ok((content, HEAD..HEAD + length))
    }
}

#[cfg(test)]
impl Sealer {
    /// Continues with another number.
    pub(super) fn skip_to(&mut self, sequence: u64) {
        self.0.secrets.sequence = sequence;
    }
}

#[cfg(test)]
impl Opener {
    /// Continues with another number.
    pub(super) fn skip_to(&mut self, sequence: u64) {
        self.0.secrets.sequence = sequence;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SUITES: [Suite; 3] = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

    fn secrets(suite: Suite, sequence: u64) -> Secrets {
        let length = suite.algorithm().key_len();
        Secrets::new(suite, &[7; 32][..length], &[9; 12], sequence).unwrap()
    }

    fn pair(suite: Suite, sequence: u64) -> (Sealer, Opener) {
        (Sealer::new(secrets(suite, sequence)).unwrap(), Opener::new(secrets(suite, sequence)).unwrap())
    }

    fn sealed(sealer: &mut Sealer, content: ContentType, plain: &[u8]) -> Vec<u8> {
        let mut record = vec![0; HEAD + plain.len() + TAIL];
        record[HEAD..HEAD + plain.len()].copy_from_slice(plain);
        assert_eq!(sealer.seal_as(content, &mut record, plain.len()), Ok(record.len()));
        record
    }

    /// A record whose inside (content, type and padding) is given.
    fn by_hand(sequence: u64, inner: &[u8]) -> Vec<u8> {
        let cipher = Cipher::new(secrets(Suite::Aes128Gcm, sequence)).unwrap();
        let [high, low] = u16::try_from(inner.len() + TAG).unwrap().to_be_bytes();
        let (head, mut body) = ([23, 3, 3, high, low], inner.to_vec());
        cipher.key.seal_in_place_append_tag(cipher.nonce(), Aad::from(head), &mut body).unwrap();
        [&head[..], &body].concat()
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// The keys for application data of RFC 8448 section 3.
    fn rfc8448(key: &str, iv: &str) -> Secrets {
        Secrets::new(Suite::Aes128Gcm, &hex(key), &hex(iv), 0).unwrap()
    }

    const SERVER_KEY: (&str, &str) = ("9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984");
    const CLIENT_KEY: (&str, &str) = ("17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9");

    /// Records of RFC 8448 section 3 that the server sends after the handshake: ticket, data, close_notify.
    const SERVER_RECORDS: [(ContentType, &str, &str); 3] = [
        (
            ContentType::Handshake,
            "040000c90000001efad6aac502000000b22c035d829359ee5ff7af4ec900000000262a6494dc486d2c8a34cb33fa90bf1b0070ad3c49\
             8883c9367c09a2be785abc55cd226097a3a982117283f82a03a143efd3ff5dd36d64e861be7fd61d2827db279cce145077d454a366\
             4d4e6da4d29ee03725a6a4dafcd0fc67d2aea70529513e3da2677fa5906c5b3f7d8f92f228bda40dda721470f9fbf297b5aea61764\
             6fac5c03272e970727c621a79141ef5f7de6505e5bfbc388e93343694093934ae4d3570008002a000400000400",
            "17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d41d6af8f6b580dcf3d11d63c758db289a0159402\
             52f55713e061dc13e078891a38efbcf5753ad8ef170ad3c7353d16d9da773b9ca7f2b9fa1b6c0d4a3d03f75e09c30ba1e62972ac46f\
             75f7b981be63439b2999ce13064615139891d5e4c5b406f16e3fc181a77ca475840025db2f0a77f81b5ab05b94c01346755f69232c86\
             519d86cbeeac87aac347d143f9605d64f650db4d023e70e952ca49fe5137121c74bc2697687e248746d6df353005f3bce18696129c81\
             53556b3b6c6779b37bf15985684f",
        ),
        (
            ContentType::ApplicationData,
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031",
            "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2e5\
             f0a21c0047c2abf332540dd032e167c2955d",
        ),
        (ContentType::Alert, "0100", "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9"),
    ];

    const CLIENT_RECORDS: [(ContentType, &str, &str); 2] = [
        (
            ContentType::ApplicationData,
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031",
            "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a62\
             92a2977014bd1e3deae63aeebb21694915e4",
        ),
        (ContentType::Alert, "0100", "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3"),
    ];

    #[test]
    fn the_records_of_rfc_8448_are_sealed_and_opened() {
        for ((key, iv), records) in [(SERVER_KEY, &SERVER_RECORDS[..]), (CLIENT_KEY, &CLIENT_RECORDS[..])] {
            let (mut sealer, mut opener) =
                (Sealer::new(rfc8448(key, iv)).unwrap(), Opener::new(rfc8448(key, iv)).unwrap());
            for (content, plain, wire) in records {
                let (plain, mut wire) = (hex(plain), hex(wire));
                assert_eq!(sealed(&mut sealer, *content, &plain), wire, "seals {content:?}");
                let (found, place) = opener.open(&mut wire).unwrap();
                assert_eq!((found, &wire[place]), (*content, &plain[..]), "opens {content:?}");
            }
        }
    }

    #[test]
    fn full_records_of_every_suite_are_opened_in_order_only() {
        for suite in SUITES {
            let (mut sealer, mut opener) = pair(suite, 255);
            let plain: Vec<u8> = (0..=250).cycle().take(PLAIN_MAX).collect();
            let mut records: Vec<_> =
                (0..3).map(|_| sealed(&mut sealer, ContentType::ApplicationData, &plain)).collect();
            assert_eq!(records[0].len(), SLOT);
            let late = opener.open(&mut records[1].clone());
            assert_eq!(late, Err(RecordError::BadMac), "{suite:?}: a record is missing");
            for record in &mut records {
                let (content, place) = opener.open(record).unwrap();
                assert_eq!((content, &record[place]), (ContentType::ApplicationData, &plain[..]), "{suite:?}");
            }
            let again = sealed(&mut pair(suite, 255).0, ContentType::ApplicationData, &plain);
            assert_eq!(opener.open(&mut again.clone()), Err(RecordError::BadMac), "{suite:?}: a record is repeated");
        }
    }

    #[test]
    fn padding_is_removed_and_must_not_be_all() {
        let open = |inner: &[u8]| {
            let mut record = by_hand(3, inner);
            let found = Opener::new(secrets(Suite::Aes128Gcm, 3)).unwrap().open(&mut record);
            found.map(|(content, place)| (content, record[place].to_vec()))
        };
        let padded = |content: &[u8], zeros: usize| [content, &vec![0; zeros]].concat();
        let data = |bytes: &[u8]| Ok((ContentType::ApplicationData, bytes.to_vec()));
        assert_eq!(open(b"data\x17"), data(b"data"));
        assert_eq!(open(&padded(b"zeros\0\0\x17", 100)), data(b"zeros\0\0"));
        assert_eq!(open(&padded(b"\x17", PLAIN_MAX)), data(b""));
        assert_eq!(open(&padded(b"\x01\0\x15", 9)), Ok((ContentType::Alert, vec![1, 0])));
        for (inner, why) in [
            (padded(b"", 1), "only padding"),
            (padded(b"", PLAIN_MAX + 1), "only padding, as long as possible"),
            (b"\x16".to_vec(), "empty handshake"),
            (padded(b"\x15", 4), "empty alert"),
            (b"\x01\x14".to_vec(), "protected ChangeCipherSpec"),
            (b"data\x18".to_vec(), "unknown type"),
        ] {
            assert_eq!(open(&inner), Err(RecordError::Unexpected), "{why}");
        }
    }

    #[test]
    fn a_record_has_limits_with_and_without_its_tag() {
        let open = |mut record: Vec<u8>| Opener::new(secrets(Suite::Aes128Gcm, 0)).unwrap().open(&mut record);
        let inner = |length: usize| [&vec![1; length - 1][..], &[23]].concat();
        assert!(open(by_hand(0, &inner(PLAIN_MAX + 1))).is_ok());
        assert_eq!(open(by_hand(0, &inner(PLAIN_MAX + 2))), Err(RecordError::Overflow), "inner plaintext");
        assert_eq!(open(by_hand(0, &inner(WIRE_MAX - TAG))), Err(RecordError::Overflow), "longest on the wire");
        let length = u16::try_from(WIRE_MAX).unwrap();
        assert_eq!(whole_length([23, 3, 3, length.to_be_bytes()[0], length.to_be_bytes()[1]]), Ok(HEAD + WIRE_MAX));
        let [high, low] = (length + 1).to_be_bytes();
        assert_eq!(whole_length([23, 3, 3, high, low]), Err(RecordError::Overflow));
        for length in 0..=16 {
            let record = [&[23, 3, 3, 0, length][..], &vec![0; length.into()]].concat();
            assert_eq!(open(record), Err(RecordError::BadMac), "{length} bytes");
        }
    }

    #[test]
    fn only_application_data_is_allowed_outside() {
        for outer in [0, 20, 21, 22, 24, 255] {
            assert_eq!(whole_length([outer, 3, 3, 0, 1]), Err(RecordError::Unexpected), "type {outer}");
        }
        let mut change_cipher_spec = [20, 3, 3, 0, 1, 1];
        let mut opener = pair(Suite::Aes128Gcm, 0).1;
        assert_eq!(opener.open(&mut change_cipher_spec), Err(RecordError::Unexpected));
    }

    #[test]
    fn a_wrong_buffer_is_refused() {
        let (mut sealer, mut opener) = pair(Suite::Aes256Gcm, 0);
        for room in 0..HEAD + 10 + TAIL {
            assert_eq!(sealer.seal(&mut vec![0; room], 10), Err(RecordError::Buffer), "{room} bytes");
        }
        assert_eq!(sealer.seal(&mut vec![0; SLOT + 1], PLAIN_MAX + 1), Err(RecordError::Overflow));
        let record = sealed(&mut sealer, ContentType::ApplicationData, b"ten bytes.");
        for wrong in [&record[..record.len() - 1], &[&record[..], &[0]].concat(), &record[..3], &[]] {
            assert_eq!(opener.open(&mut wrong.to_vec()), Err(RecordError::Buffer), "{} bytes", wrong.len());
        }
        assert!(opener.open(&mut record.clone()).is_ok(), "a refused buffer uses up no number");
    }

    #[test]
    fn a_key_asks_to_be_replaced_and_then_stops() {
        for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm] {
            let last_quiet = (1 << 24) - (1 << 16) - 1;
            let mut sealer = pair(suite, last_quiet).0;
            assert!(!sealer.needs_key_update());
            sealed(&mut sealer, ContentType::ApplicationData, b"");
            assert!(sealer.needs_key_update(), "{suite:?}");
            let mut sealer = pair(suite, (1 << 24) - 1).0;
            let mut record = [0; 64];
            assert!(sealer.seal(&mut record, 1).is_ok());
            assert_eq!(sealer.seal(&mut record, 1), Err(RecordError::Exhausted), "{suite:?}");
            assert!(sealer.seal_as(ContentType::Handshake, &mut record, 5).is_ok(), "the KeyUpdate itself");
        }
        assert!(!pair(Suite::ChaCha20Poly1305, 1 << 40).0.needs_key_update());
    }

    #[test]
    fn numbers_of_records_do_not_wrap() {
        for suite in SUITES {
            let (mut sealer, mut opener) = pair(suite, u64::MAX - 1);
            let mut record = sealed(&mut sealer, ContentType::Alert, &[1, 0]);
            assert!(opener.open(&mut record.clone()).is_ok());
            assert_eq!(sealer.seal_as(ContentType::Alert, &mut [0; 64], 2), Err(RecordError::Exhausted));
            assert_eq!(opener.open(&mut record), Err(RecordError::Exhausted));
        }
    }

    #[test]
    fn secrets_are_not_shown_and_must_have_the_right_length() {
        let (sealer, opener) = pair(Suite::Aes128Gcm, 5);
        assert_eq!(format!("{sealer:?} {opener:?}"), "Sealer(Aes128Gcm record 5) Opener(Aes128Gcm record 5)");
        assert!(Secrets::new(Suite::Aes128Gcm, &[0; 32], &[0; 12], 0).is_err());
        assert!(Secrets::new(Suite::Aes256Gcm, &[0; 32], &[0; 11], 0).is_err());
        let as_rustls_has_it = ConnectionTrafficSecrets::Aes256Gcm { key: [7u8; 32].into(), iv: [9u8; 12].into() };
        let mut sealer = Sealer::new((4, as_rustls_has_it).try_into().unwrap()).unwrap();
        let mut record = sealed(&mut sealer, ContentType::ApplicationData, b"same key");
        assert!(pair(Suite::Aes256Gcm, 4).1.open(&mut record).is_ok());
    }

    proptest! {
        #[test]
        fn a_changed_bit_is_always_noticed(
            suite in prop::sample::select(&SUITES[..]),
            plain in prop::collection::vec(any::<u8>(), 0..200),
            sequence in 0..u64::MAX,
            place in any::<prop::sample::Index>(),
            bit in 0..8u8,
        ) {
            let (mut sealer, mut opener) = pair(suite, sequence);
            let record = sealed(&mut sealer, ContentType::ApplicationData, &plain);
            let mut changed = record.clone();
            changed[place.index(record.len())] ^= 1 << bit;
            prop_assert!(opener.open(&mut changed).is_err());
            let mut record = record;
            let (_, found) = opener.open(&mut record).unwrap();
            prop_assert_eq!(&record[found], &plain[..]);
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut opener = pair(Suite::Aes128Gcm, 0).1;
            prop_assert!(opener.open(&mut bytes.clone()).is_err());
            if let [outer, _, _, high, low, rest @ ..] = &mut bytes[..] {
                *outer = 23;
                [*high, *low] = u16::try_from(rest.len()).unwrap().to_be_bytes();
            }
            prop_assert!(opener.open(&mut bytes).is_err());
        }
    }
}
