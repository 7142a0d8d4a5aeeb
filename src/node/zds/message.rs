//! The messages of the agent: decodes a packet and its number of descriptors into a request, and encodes an answer.
//! Pure, and never fails by panicking.

use crate::proto::istio::workload::zds;
use prost::Message;

/// Largest packet that is read, and that the agent reads (source: the buffers of both sides).
pub const PACKET_BYTES_MAX: usize = 1024;

/// Longest error in an answer: with the rest of the message it must stay well below what the agent reads.
const ERROR_BYTES_MAX: usize = 800;

/// A request of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Capture a pod whose network namespace comes with the packet.
    Add {
        /// The pod's uid.
        uid: String,
        /// The pod's name.
        name: String,
        /// The pod's namespace.
        namespace: String,
        /// The pod's service account.
        service_account: String,
    },
    /// Keep a pod as it is.
    Keep(String),
    /// Release a pod.
    Del(String),
    /// All pods have been named.
    SnapshotSent,
}

/// Why a packet is not a valid request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It did not fit into the buffer.
    #[error("the packet is longer than {PACKET_BYTES_MAX} bytes, or has too many descriptors")]
    Truncated,
    /// It cannot be decoded.
    #[error("the packet cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// It contains no known request.
    #[error("the packet contains no known request")]
    Unknown,
    /// A field of the pod to add is missing.
    #[error("the request to add a pod has no {0}")]
    Missing(&'static str),
    /// A request to add a pod needs exactly one descriptor, other requests none.
    #[error("{descriptors} descriptors came with a request to {what}; {expected} expected")]
    Descriptors {
        /// Number of descriptors that came.
        descriptors: usize,
        /// The request.
        what: &'static str,
        /// Number of descriptors that it needs.
        expected: usize,
    },
}

/// Decodes one packet.
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

/// Encodes the first packet.
pub fn hello() -> Vec<u8> {
    zds::ZdsHello { version: zds::Version::V1.into() }.encode_to_vec()
}

/// Encodes the answer to a request. An error is shortened to what the agent can read.
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
    fn only_an_add_has_a_descriptor_and_exactly_one() {
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
