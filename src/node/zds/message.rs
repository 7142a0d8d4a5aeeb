//! One packet of the agent: bytes and how many descriptors → a request; an answer → bytes. Pure and total.

use crate::proto::istio::workload::zds;
use prost::Message;

/// Largest packet that is read, and that the agent reads (source: both sides' buffers).
pub const PACKET_BYTES_MAX: usize = 1024;

/// Longest error in an answer: with the rest of the message it must stay well below what the agent reads.
const ERROR_BYTES_MAX: usize = 800;

/// What the agent asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Capture a pod whose namespace comes with the packet.
    Add {
        /// Its uid.
        uid: String,
        /// Its name.
        name: String,
        /// Its namespace.
        namespace: String,
        /// Its service account.
        service_account: String,
    },
    /// Leave a pod as it is.
    Keep(String),
    /// Let a pod go.
    Del(String),
    /// All pods have been named.
    SnapshotSent,
}

/// Why a packet is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It did not fit.
    #[error("the packet is longer than {PACKET_BYTES_MAX} bytes, or brings more descriptors than fit")]
    Truncated,
    /// It cannot be decoded.
    #[error("the packet cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// It asks nothing that is known.
    #[error("the packet holds no request that is known")]
    Unknown,
    /// Who or what is to be captured is missing.
    #[error("the request to add a pod has no {0}")]
    Missing(&'static str),
    /// There must be exactly one descriptor with a pod to add, and none with anything else.
    #[error("{descriptors} descriptors came with a request to {what}; {expected} expected")]
    Descriptors {
        /// How many came.
        descriptors: usize,
        /// With what.
        what: &'static str,
        /// How many should.
        expected: usize,
    },
}

/// Reads one packet.
pub fn decode(bytes: &[u8], descriptors: usize, truncated: bool) -> Result<Request, MessageError> {
    use zds::workload_request::Payload;
    if truncated {
        return Err(MessageError::Truncated);
    }
    let payload = zds::WorkloadRequest::decode(bytes)?.payload.ok_or(MessageError::Unknown)?;
    let (what, expected) = match &payload {
        Payload::Add(_) => ("add a pod", 1),
        Payload::Keep(_) => ("keep a pod", 0),
        Payload::Del(_) => ("delete a pod", 0),
        Payload::SnapshotSent(_) => ("end the snapshot", 0),
    };
    if descriptors != expected {
        return Err(MessageError::Descriptors { descriptors, what, expected });
    }
    match payload {
        Payload::Add(add) => {
            let info = add.workload_info.ok_or(MessageError::Missing("workload_info"))?;
            for (field, value) in [
                ("uid", &add.uid),
                ("name", &info.name),
                ("namespace", &info.namespace),
                ("service_account", &info.service_account),
            ] {
                if value.is_empty() {
                    return Err(MessageError::Missing(field));
                }
            }
            Ok(Request::Add {
                uid: add.uid,
                name: info.name,
                namespace: info.namespace,
                service_account: info.service_account,
            })
        }
        Payload::Keep(keep) => Ok(Request::Keep(keep.uid)),
        Payload::Del(del) => Ok(Request::Del(del.uid)),
        Payload::SnapshotSent(_) => Ok(Request::SnapshotSent),
    }
}

/// The first packet.
pub fn hello() -> Vec<u8> {
    zds::ZdsHello { version: zds::Version::V1.into() }.encode_to_vec()
}

/// The answer to one request; an error is cut to what the agent can read.
pub fn ack(result: &Result<(), String>) -> Vec<u8> {
    let mut error = result.as_ref().err().cloned().unwrap_or_default();
    if error.len() > ERROR_BYTES_MAX {
        let cut = (0..=ERROR_BYTES_MAX).rev().find(|at| error.is_char_boundary(*at)).unwrap_or(0);
        error.truncate(cut);
        error.push('…');
    }
    let payload = Some(zds::workload_response::Payload::Ack(zds::Ack { error }));
    zds::WorkloadResponse { payload }.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zds::workload_request::Payload;

    fn add(uid: &str, name: &str) -> zds::AddWorkload {
        let info = zds::WorkloadInfo { name: name.into(), namespace: "ns".into(), service_account: "sa".into() };
        zds::AddWorkload { uid: uid.into(), workload_info: Some(info) }
    }

    #[test]
    fn only_an_add_brings_a_descriptor_and_it_brings_one() {
        let packet = |payload| zds::WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        let sent = || Payload::SnapshotSent(zds::SnapshotSent {});
        for (payload, descriptors, expected) in [
            (Payload::Add(add("u", "p")), 1, Ok("Add")),
            (Payload::Add(add("u", "p")), 0, Err("0 descriptors")),
            (Payload::Add(add("u", "p")), 2, Err("2 descriptors")),
            (Payload::Add(add("", "p")), 1, Err("no uid")),
            (Payload::Add(add("u", "")), 1, Err("no name")),
            (Payload::Add(zds::AddWorkload { uid: "u".into(), workload_info: None }), 1, Err("workload_info")),
            (Payload::Keep(zds::KeepWorkload { uid: "u".into() }), 0, Ok("Keep")),
            (Payload::Keep(zds::KeepWorkload { uid: "u".into() }), 1, Err("1 descriptors")),
            (Payload::Del(zds::DelWorkload { uid: "u".into() }), 0, Ok("Del")),
            (sent(), 0, Ok("SnapshotSent")),
            (sent(), 1, Err("1 descriptors")),
        ] {
            match (decode(&packet(payload), descriptors, false), expected) {
                (Ok(request), Ok(word)) => assert!(format!("{request:?}").starts_with(word)),
                (Err(error), Err(word)) => assert!(error.to_string().contains(word), "{error}"),
                (found, expected) => panic!("{found:?}, expected {expected:?}"),
            }
        }
        assert_eq!(decode(&packet(sent()), 0, true), Err(MessageError::Truncated));
        assert_eq!(decode(&[], 0, false), Err(MessageError::Unknown));
    }

    #[test]
    fn an_answer_always_fits() {
        assert_eq!(ack(&Ok(())), [10, 0], "success is an empty acknowledgement, not an empty message");
        let long = ack(&Err("é".repeat(2000)));
        assert!(long.len() < 900, "{}", long.len());
        assert_eq!(hello(), [8, 1]);
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes: Vec<u8>, descriptors in 0..3usize) {
            drop(decode(&bytes, descriptors, false));
        }
    }
}
