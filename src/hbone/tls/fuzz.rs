//! Records from a peer that may know the keys, for the fuzzer.

use super::record::{ContentType, HEAD, PLAIN_MAX, Sealer, TAIL};
use super::{Next, SLOT, Secrets, Suite, Tls};

/// The two ends of a connection with fixed keys.
pub fn ends() -> Option<(Tls, Tls)> {
    let one = Tls::without_handshake(secrets(1)?, secrets(2)?).ok()?;
    Some((one, Tls::without_handshake(secrets(2)?, secrets(1)?).ok()?))
}

fn secrets(key: u8) -> Option<Secrets> {
    Secrets::new(Suite::Aes128Gcm, &[key; 16], &[key; 12], 0).ok()
}

/// Records. The first byte says whether the input is the records themselves, or what is in them: for each a byte for
/// the type, two for the length, and the content.
pub fn records(data: &[u8]) {
    let Some((flags, rest)) = data.split_first() else { return };
    let Some((mut tls, _)) = ends() else { return };
    let mut wire = if flags & 1 == 0 { rest.to_vec() } else { sealed(rest).unwrap_or_default() };
    let mut at = 0;
    loop {
        let input = wire.get_mut(at..).unwrap_or_default();
        let all = input.len();
        let used = match tls.next(input) {
            Ok(Next::Data { used, plain }) => {
                assert!(plain.end <= used && !plain.is_empty() && plain.len() <= PLAIN_MAX);
                used
            }
            Ok(Next::Control { used }) => used,
            // From then on everything is used up at once, also nothing.
            Ok(Next::Closed { used: 0 }) => return assert_eq!(all, 0),
            Ok(Next::Closed { used }) => used,
            Ok(Next::Incomplete { missing }) => return assert!(missing > 0 && missing <= SLOT + 255),
            Err(error) => {
                let mut out = [0; SLOT];
                if let Some(alert) = error.alert() {
                    let _ = tls.alert(alert, &mut out);
                }
                return;
            }
        };
        assert!(used > 0 && used <= all, "each step takes a record");
        at += used;
        if tls.pending() {
            let _ = tls.write_control(&mut [0; SLOT]);
        }
    }
}

/// Seals what the input describes.
fn sealed(mut input: &[u8]) -> Option<Vec<u8>> {
    let mut sealer = Sealer::new(secrets(2)?).ok()?;
    let mut wire = Vec::new();
    while let Some(([kind, high, low], rest)) = input.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len()).min(PLAIN_MAX);
        let (content, rest) = rest.split_at_checked(length)?;
        input = rest;
        let mut record = [&[0; HEAD][..], content, &[0; TAIL]].concat();
        let kind = match kind % 3 {
            0 => ContentType::ApplicationData,
            1 => ContentType::Handshake,
            _ => ContentType::Alert,
        };
        sealer.seal_as(kind, &mut record, length).ok()?;
        wire.append(&mut record);
    }
    Some(wire)
}
