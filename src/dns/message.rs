//! Reads and writes DNS messages, with hickory's decoder and encoder. Pure; every function accepts any bytes.
//!
//! Answers of resolvers are not decoded and encoded again: they are passed on as the bytes that arrived, and this file
//! only finds out what they say.

use super::answer::{MeshAnswer, MeshRecord, QueryKind};
use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder};
use std::net::IpAddr;
use std::time::Duration;

/// Length of a message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
/// The largest datagram that our answers offer to accept; it fits into the packets of every network (DNS flag day
/// 2020).
const PAYLOAD: u16 = 1232;
/// Longest request that is decoded, in bytes.
const REQUEST_MAX: usize = 4096;
/// Longest answer that is decoded, in bytes. Decoding a compressed name may take half as many steps as there are bytes
/// before it, so long answers would be expensive.
const ANSWER_MAX: usize = 4096;
/// Most records in an answer that is decoded.
const RECORDS_MAX: usize = 128;
/// The word for record types without a name, and for requests that are not a question.
pub const UNKNOWN: &str = "unknown";
/// Aliases that are followed in one answer.
const ALIASES_MAX: usize = 16;
/// Longest time that a record is cached, in seconds. RFC 8767 recommends a limit of days.
const TTL_MAX: u32 = 86_400;

/// A question that the mesh may be able to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name, in lower case, without the final dot.
    pub name: String,
    /// The record type, as far as it makes a difference.
    pub kind: QueryKind,
    /// The record type, as a word.
    pub type_word: &'static str,
    message: Message,
}

/// What a pod has sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// An answer, or too short for a header. It gets no reply.
    Invalid,
    /// A request that only the pod's resolvers can answer.
    NotForMesh,
    /// A question.
    Question(Question),
}

/// Reads what a pod has sent. Malformed requests are left to the pod's resolvers, which refuse them.
pub fn read(bytes: &[u8]) -> Request {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(header) = Header::read(&mut decoder) else { return Request::Invalid };
    if header.metadata.message_type != MessageType::Query {
        return Request::Invalid;
    }
    if header.metadata.op_code != OpCode::Query || header.counts.queries != 1 {
        return Request::NotForMesh;
    }
    // Truncated requests and other versions of EDNS are forwarded. So are requests with more records than any client
    // sends, because decoding them may take long: one name may lead through thousands of others.
    let counts = header.counts;
    let plain = bytes.len() <= REQUEST_MAX && counts.answers == 0 && counts.authorities <= 1 && counts.additionals <= 2;
    let message = plain.then(|| Message::from_vec(bytes).ok()).flatten();
    let ours = message.filter(|message| message.edns.as_ref().is_none_or(|edns| edns.version() == 0));
    let asked = ours.as_ref().and_then(|message| message.queries.first()).filter(|q| q.query_class == DNSClass::IN);
    match asked.map(|query| (text(&query.name), kind(query.query_type), type_word(query.query_type))).zip(ours) {
        Some(((name, kind, type_word), message)) => Request::Question(Question { name, kind, type_word, message }),
        None => Request::NotForMesh,
    }
}

impl Question {
    /// The largest datagram that the client accepts.
    pub fn datagram_limit(&self) -> u16 {
        self.message.max_payload()
    }

    /// Whether the answer may come in several messages, as in a zone transfer.
    pub fn is_transfer(&self) -> bool {
        matches!(self.type_word, "AXFR" | "IXFR")
    }
}

/// The word for a record type in metrics. All types without a name share one word.
fn type_word(of: RecordType) -> &'static str {
    match of {
        RecordType::Unknown(_) => UNKNOWN,
        known => known.into(),
    }
}

fn kind(of: RecordType) -> QueryKind {
    match of {
        RecordType::A => QueryKind::A,
        RecordType::AAAA => QueryKind::Aaaa,
        RecordType::ANY => QueryKind::Any,
        RecordType::SRV => QueryKind::Srv,
        RecordType::HTTPS | RecordType::SVCB => QueryKind::Https,
        _ => QueryKind::Other,
    }
}

fn text(name: &Name) -> String {
    let mut text = name.to_ascii();
    text.make_ascii_lowercase();
    if text.ends_with('.') {
        text.pop();
    }
    text
}

/// Encodes our answer to a question; `None` if that is not possible.
///
/// With `datagram` set, an answer that is larger than the client accepts is truncated and marked so.
pub fn reply(question: &Question, answer: &MeshAnswer, ttl: u32, datagram: bool) -> Option<Vec<u8>> {
    let request = &question.message;
    let query = request.queries.first()?;
    let mut reply = empty_reply(request);
    reply.metadata.authoritative = true;
    let owner = match &answer.alias {
        Some(alias) => {
            let alias = Name::from_ascii(format!("{alias}.")).ok()?;
            reply.answers.push(Record::from_rdata(query.name.clone(), ttl, RData::CNAME(CNAME(alias.clone()))));
            alias
        }
        None => query.name.clone(),
    };
    add_records(&mut reply, &owner, answer, ttl)?;
    encode(reply, usize::from(if datagram { question.datagram_limit() } else { u16::MAX }))
}

/// A reply without records.
fn empty_reply(request: &Message) -> Message {
    let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&request.metadata);
    reply.metadata.recursion_available = true;
    reply.queries.clone_from(&request.queries);
    reply.edns = request.edns.as_ref().map(|asked| {
        let mut own = Edns::new();
        own.set_max_payload(PAYLOAD).set_dnssec_ok(asked.flags().dnssec_ok);
        own
    });
    reply
}

fn add_records(reply: &mut Message, owner: &Name, answer: &MeshAnswer, ttl: u32) -> Option<()> {
    for record in &answer.records {
        match record {
            MeshRecord::Address(ip) => reply.answers.push(address(owner, ttl, *ip)),
            MeshRecord::Service { port, target, addresses } => {
                let target = Name::from_ascii(format!("{target}.")).ok()?;
                let data = RData::SRV(SRV::new(0, 100, *port, target.clone()));
                reply.answers.push(Record::from_rdata(owner.clone(), ttl, data));
                reply.additionals.extend(addresses.iter().map(|ip| address(&target, ttl, *ip)));
            }
        }
    }
    if answer.records.is_empty() {
        reply.authorities.push(authority(&answer.zone, ttl)?);
    }
    Some(())
}

fn address(owner: &Name, ttl: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(owner.clone(), ttl, data)
}

/// The SOA record of a negative answer, which says how long it may be cached (RFC 2308).
fn authority(zone: &str, ttl: u32) -> Option<Record> {
    let name = |prefix: &str| Name::from_ascii(format!("{prefix}{zone}.")).ok();
    let data = SOA::new(name("ns.dns.")?, name("hostmaster.")?, 1, 7200, 1800, 86400, ttl);
    Some(Record::from_rdata(name("")?, ttl, RData::SOA(data)))
}

/// Encodes a message. If it is too long, records are removed from its end and it is marked as truncated.
fn encode(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    loop {
        let mut bytes = Vec::with_capacity(512);
        if message.emit(&mut BinEncoder::new(&mut bytes)).is_ok() && bytes.len() <= limit {
            return Some(bytes);
        }
        if message.additionals.is_empty() {
            message.metadata.truncation = true;
            let count = message.answers.len();
            // An estimate that assumes records of equal size, and at least one record less each time.
            let fitting = count * limit / bytes.len().max(1);
            message.answers.truncate(fitting.min(count.checked_sub(1)?));
        } else {
            // Clients can ask for additional records, so their absence needs no mark.
            message.additionals.clear();
        }
    }
}

/// A reply with an error code and no records.
fn failure(request: &[u8], question: Option<&Question>, code: ResponseCode) -> Option<Vec<u8>> {
    let mut reply = match question {
        Some(question) => empty_reply(&question.message),
        None => {
            let header = Header::read(&mut BinDecoder::new(request)).ok()?;
            let mut reply = Message::response(header.metadata.id, header.metadata.op_code);
            reply.metadata = Metadata::response_from_request(&header.metadata);
            reply.metadata.recursion_available = true;
            reply
        }
    };
    reply.metadata.response_code = code;
    encode(reply, usize::from(u16::MAX))
}

/// A SERVFAIL reply.
pub fn server_failure(request: &[u8], question: Option<&Question>) -> Option<Vec<u8>> {
    failure(request, question, ResponseCode::ServFail)
}

/// The message with another id. Clients' ids are easy to guess, so they are not sent to resolvers.
pub fn with_id(mut bytes: Vec<u8>, id: [u8; 2]) -> Vec<u8> {
    if let Some(field) = bytes.get_mut(..2) {
        field.copy_from_slice(&id);
    }
    bytes
}

/// The id of a message.
pub fn id(bytes: &[u8]) -> [u8; 2] {
    bytes.get(..2).and_then(|id| id.try_into().ok()).unwrap_or_default()
}

/// What a response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseKind {
    /// The name exists and has such a record.
    Exists,
    /// The name exists and has no such record (NODATA).
    NoData,
    /// The name does not exist (NXDOMAIN).
    NoSuchName,
    /// The server cannot or will not answer.
    Failure,
}

/// What `answer` says in reply to `query`; `None` if it does not answer it: its id or its question differs, or it is
/// not a response.
pub fn response_kind(query: &[u8], answer: &[u8]) -> Option<ResponseKind> {
    let mut decoder = BinDecoder::new(answer);
    let header = Header::read(&mut decoder).ok()?;
    if id(query) != id(answer) || header.metadata.message_type != MessageType::Response {
        return None;
    }
    let code = header.metadata.response_code;
    // A server may leave out a question that it could not read, and the question of another operation.
    let may_lack = code != ResponseCode::NoError || header.metadata.op_code != OpCode::Query;
    let lacks = may_lack && header.counts.queries == 0;
    if !lacks && !same_question(query, answer) {
        return None;
    }
    Some(match code {
        ResponseCode::NXDomain => ResponseKind::NoSuchName,
        ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp => ResponseKind::Failure,
        ResponseCode::NoError if header.counts.answers == 0 => ResponseKind::NoData,
        _ => ResponseKind::Exists,
    })
}

/// Whether both have the same question, ignoring letter case. If the query does not have exactly one readable question,
/// this is true for any answer.
fn same_question(query: &[u8], answer: &[u8]) -> bool {
    let Some(asked) = question_bytes(query) else { return true };
    question_bytes(answer).is_some_and(|answered| asked.eq_ignore_ascii_case(answered))
}

fn question_bytes(message: &[u8]) -> Option<&[u8]> {
    let mut decoder = BinDecoder::new(message);
    Header::read(&mut decoder).ok().filter(|header| header.counts.queries == 1)?;
    Message::read_queries(&mut decoder, 1).ok()?;
    message.get(HEADER..decoder.index())
}

/// The header of an answer that can be decoded at little cost; `None` for longer ones.
fn bounded(answer: &[u8]) -> Option<Header> {
    let header = Header::read(&mut BinDecoder::new(answer)).ok()?;
    let counts = header.counts;
    let all = [counts.queries, counts.answers, counts.authorities, counts.additionals].map(usize::from);
    (answer.len() <= ANSWER_MAX && all.iter().sum::<usize>() <= RECORDS_MAX).then_some(header)
}

/// The end of a chain of aliases that leads to no address of the requested family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DanglingAlias {
    /// The name at the end of the chain.
    pub end: String,
    /// The requested family.
    pub kind: QueryKind,
}

/// Finds the end of the aliases in an answer; `None` if there are none, or they lead to an address.
pub fn dangling_alias(answer: &[u8]) -> Option<DanglingAlias> {
    bounded(answer).filter(|header| header.counts.answers > 0)?;
    let answer = Message::from_vec(answer).ok()?;
    let query = answer.queries.first()?;
    let unknown = matches!(answer.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
    let asked = kind(query.query_type);
    if !unknown || answer.metadata.truncation || !matches!(asked, QueryKind::A | QueryKind::Aaaa) {
        return None;
    }
    if answer.answers.iter().any(|record| record.record_type() == query.query_type) {
        return None;
    }
    let mut end = &query.name;
    for _ in 0..ALIASES_MAX {
        let next = answer.answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if record.name == *end => Some(&target.0),
            _ => None,
        });
        match next {
            Some(target) => end = target,
            None => break,
        }
    }
    (*end != query.name).then(|| DanglingAlias { end: text(end), kind: asked })
}

/// A resolver's answer with the mesh's records for `end` added, the name that [`dangling_alias`] found.
pub fn with_alias_target(answer: &[u8], end: &str, ours: &MeshAnswer, ttl: u32, limit: u16) -> Option<Vec<u8>> {
    let mut message = Message::from_vec(answer).ok()?;
    message.metadata.response_code = ResponseCode::NoError;
    message.metadata.authentic_data = false;
    message.authorities.clear();
    let owner = Name::from_ascii(format!("{end}.")).ok()?;
    add_records(&mut message, &owner, ours, ttl)?;
    encode(message, usize::from(limit))
}

/// How long an answer may be cached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// The time in seconds.
    pub seconds: u32,
    /// Where in the message the times to live of its records are.
    pub ttl_offsets: Vec<usize>,
}

/// How long an answer may be cached; zero if it must not be cached.
pub fn time_to_live(answer: &[u8]) -> Duration {
    Duration::from_secs(lifetime(answer).map_or(0, |lifetime| u64::from(lifetime.seconds)))
}

/// How long an answer may be cached; `None` if it must not be cached: a truncated one, a failure, or a negative answer
/// without an SOA record.
pub fn lifetime(answer: &[u8]) -> Option<Lifetime> {
    bounded(answer)?;
    let mut decoder = BinDecoder::new(answer);
    let header = Header::read(&mut decoder).ok()?;
    let (metadata, counts) = (header.metadata, header.counts);
    let is_cacheable = matches!(metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
    if !is_cacheable || metadata.truncation || metadata.op_code != OpCode::Query || counts.queries != 1 {
        return None;
    }
    Message::read_queries(&mut decoder, 1).ok()?;
    let (mut seconds, mut ttl_offsets) = (TTL_MAX, Vec::new());
    let (mut has_answer, mut has_soa) = (false, false);
    for at in 0..usize::from(counts.answers) + usize::from(counts.authorities) + usize::from(counts.additionals) {
        Name::read(&mut decoder).ok()?;
        let of = RecordType::read(&mut decoder).ok()?;
        decoder.read_u16().ok()?;
        let offset = decoder.index();
        let ttl = decoder.read_u32().ok()?.unverified();
        let length = decoder.read_u16().ok()?.unverified();
        let data = decoder.read_slice(usize::from(length)).ok()?.unverified();
        if of == RecordType::OPT {
            continue;
        }
        ttl_offsets.push(offset);
        seconds = seconds.min(ttl);
        has_answer |= at < usize::from(counts.answers);
        if of == RecordType::SOA {
            has_soa = true;
            // Its last field limits how long a negative answer may be cached (RFC 2308, 5).
            let minimum = data.len().checked_sub(4).and_then(|start| data.get(start..)?.try_into().ok());
            seconds = seconds.min(minimum.map_or(0, u32::from_be_bytes));
        }
    }
    let is_positive = has_answer && metadata.response_code == ResponseCode::NoError;
    (seconds > 0 && (is_positive || has_soa)).then_some(Lifetime { seconds, ttl_offsets })
}

/// The answer with its times to live reduced by `seconds`.
pub fn aged(mut answer: Vec<u8>, ttl_offsets: &[usize], seconds: u32) -> Vec<u8> {
    for offset in ttl_offsets {
        let Some(bytes) = answer.get_mut(*offset..offset.saturating_add(4)) else { continue };
        if let Ok(ttl) = <[u8; 4]>::try_from(&*bytes) {
            bytes.copy_from_slice(&u32::from_be_bytes(ttl).saturating_sub(seconds).to_be_bytes());
        }
    }
    answer
}

/// Encodes a question for the addresses of a host.
pub fn address_question(host: &str, v4: bool, id: [u8; 2]) -> Option<Vec<u8>> {
    let name = Name::from_ascii(format!("{}.", host.trim_end_matches('.'))).ok()?;
    let mut message = Message::new(u16::from_be_bytes(id), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let kind = if v4 { RecordType::A } else { RecordType::AAAA };
    message.add_query(hickory_proto::op::Query::query(name, kind));
    message.to_vec().ok()
}

/// All addresses in an answer.
pub fn addresses(answer: &[u8]) -> Vec<IpAddr> {
    let answers = bounded(answer).and_then(|_| Message::from_vec(answer).ok()).map(|message| message.answers);
    let address = |record: Record| match record.data {
        RData::A(ip) => Some(IpAddr::V4(ip.0)),
        RData::AAAA(ip) => Some(IpAddr::V6(ip.0)),
        _ => None,
    };
    answers.into_iter().flatten().filter_map(address).collect()
}

/// Whether an answer is truncated, so that the question must be repeated over TCP.
pub fn is_truncated(answer: &[u8]) -> bool {
    Header::read(&mut BinDecoder::new(answer)).is_ok_and(|header| header.metadata.truncation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(name: &str, kind: RecordType, payload: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(hickory_proto::op::Query::query(Name::from_ascii(name).unwrap(), kind));
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload).set_dnssec_ok(true);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    fn parsed(bytes: &[u8]) -> Question {
        let Request::Question(question) = read(bytes) else { panic!("a question") };
        question
    }

    fn addresses_of(count: u32) -> MeshAnswer {
        let records = (0..count).map(|n| MeshRecord::Address(IpAddr::from(n.to_be_bytes()))).collect();
        MeshAnswer { alias: None, records, zone: "cluster.local".into() }
    }

    #[test]
    fn a_reply_keeps_letter_case_mirrors_edns_and_marks_truncation() {
        let question = asked("ShOp.ns.SVC.cluster.local.", RecordType::A, Some(4096));
        let read_back = parsed(&question);
        assert_eq!((read_back.name.as_str(), read_back.kind), ("shop.ns.svc.cluster.local", QueryKind::A));
        let bytes = reply(&read_back, &addresses_of(3), 30, true).unwrap();
        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!(message.answers[0].name.to_ascii(), "ShOp.ns.SVC.cluster.local.");
        assert_eq!((message.answers.len(), message.answers[0].ttl), (3, 30));
        assert!(message.edns.as_ref().unwrap().flags().dnssec_ok && !message.metadata.truncation);
        assert_eq!(response_kind(&question, &bytes), Some(ResponseKind::Exists));
        for (payload, limit) in [(None, 512), (Some(100), 512), (Some(1232), 1232)] {
            let question = parsed(&asked("many.example.", RecordType::A, payload));
            let cut = reply(&question, &addresses_of(1500), 30, true).unwrap();
            let message = Message::from_vec(&cut).unwrap();
            assert!(cut.len() <= limit && message.metadata.truncation, "{} {payload:?}", cut.len());
            assert!(cut.len() > limit / 2, "nearly as many as fit: {}", cut.len());
            assert_eq!(message.edns.is_some(), payload.is_some());
            let whole = reply(&question, &addresses_of(1500), 30, false).unwrap();
            assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 1500);
        }
        let none = reply(&read_back, &addresses_of(0), 30, true).unwrap();
        let message = Message::from_vec(&none).unwrap();
        assert_eq!(message.authorities[0].record_type(), RecordType::SOA);
        assert_eq!(message.authorities[0].name.to_ascii(), "cluster.local.");
        assert_eq!(lifetime(&none).map(|lifetime| (lifetime.seconds, lifetime.ttl_offsets.len())), Some((30, 1)));
    }

    #[test]
    fn an_answer_is_cached_as_long_as_its_shortest_record_and_ages() {
        let question = asked("a.example.", RecordType::A, Some(1232));
        let whole = parsed(&question);
        let bytes = reply(&whole, &addresses_of(2), 300, true).unwrap();
        let Lifetime { seconds, ttl_offsets } = lifetime(&bytes).unwrap();
        assert_eq!((seconds, ttl_offsets.len()), (300, 2));
        let later = Message::from_vec(&aged(bytes.clone(), &ttl_offsets, 100)).unwrap();
        assert!(later.answers.iter().all(|record| record.ttl == 200));
        assert!(
            later.edns.unwrap().flags().dnssec_ok,
            "the flags of an OPT record, which stand in place of a time to live, are not touched"
        );
        assert_eq!(lifetime(&failure(&question, Some(&whole), ResponseCode::ServFail).unwrap()), None);
        assert_eq!(
            lifetime(&failure(&question, Some(&whole), ResponseCode::NXDomain).unwrap()),
            None,
            "it has no SOA record"
        );
        assert_eq!(lifetime(&reply(&whole, &addresses_of(2), 0, true).unwrap()), None);
        assert_eq!(lifetime(&reply(&whole, &addresses_of(2000), 30, true).unwrap()), None, "truncated");
    }

    #[test]
    fn an_alias_is_followed_to_where_it_dangles() {
        let question = asked("external.ns.svc.cluster.local.", RecordType::A, None);
        let mut message = empty_reply(&Message::from_vec(&question).unwrap());
        let alias = |from: &str, to: &str| {
            let name = |text: &str| Name::from_ascii(text).unwrap();
            Record::from_rdata(name(from), 30, RData::CNAME(CNAME(name(to))))
        };
        message.answers.push(alias("two.example.", "three.example."));
        message.answers.push(alias("External.ns.svc.cluster.local.", "two.example."));
        message.metadata.response_code = ResponseCode::NXDomain;
        let bytes = message.to_vec().unwrap();
        let DanglingAlias { end, kind } = dangling_alias(&bytes).unwrap();
        assert_eq!((end.as_str(), kind), ("three.example", QueryKind::A));
        let whole = with_alias_target(&bytes, &end, &addresses_of(1), 30, 512).unwrap();
        let read_back = Message::from_vec(&whole).unwrap();
        assert_eq!((read_back.answers.len(), read_back.metadata.response_code), (3, ResponseCode::NoError));
        assert_eq!(dangling_alias(&whole), None);
        // A loop of aliases does not end; following it stops after a few steps.
        message.answers.push(alias("three.example.", "external.ns.svc.cluster.local."));
        let _ = dangling_alias(&message.to_vec().unwrap());
    }

    #[test]
    fn messages_that_do_not_answer_the_question_are_rejected() {
        let question = asked("a.example.", RecordType::A, None);
        let right = reply(&parsed(&question), &addresses_of(1), 30, true).unwrap();
        let mut other_id = right.clone();
        other_id[1] ^= 1;
        let other_name = reply(&parsed(&asked("b.example.", RecordType::A, None)), &addresses_of(1), 30, true).unwrap();
        let other_type =
            reply(&parsed(&asked("a.example.", RecordType::AAAA, None)), &addresses_of(1), 30, true).unwrap();
        for (wrong, what) in [(&other_id, "id"), (&other_name, "name"), (&other_type, "type"), (&question, "question")]
        {
            assert_eq!(response_kind(&question, wrong), None, "{what}");
        }
        assert_eq!(response_kind(&question, &right), Some(ResponseKind::Exists));
        assert_eq!(
            response_kind(&question, &failure(&question, None, ResponseCode::Refused).unwrap()),
            Some(ResponseKind::Failure)
        );
        assert_eq!(
            response_kind(&question, &failure(&question, Some(&parsed(&question)), ResponseCode::NXDomain).unwrap()),
            Some(ResponseKind::NoSuchName)
        );
        let bare = [&question[..2], &[0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(response_kind(&question, &bare), Some(ResponseKind::Exists), "a format error may lack the question");
    }

    fn anything(bytes: &[u8]) {
        crate::fuzz::dns_request(bytes);
        crate::fuzz::dns_answer(bytes);
    }

    /// Names that lead through thousands of others are not followed, neither in requests nor in answers.
    #[test]
    fn a_bomb_of_compressed_names_is_not_decoded() {
        let mut chain = asked("shop.ns.svc.cluster.local.", RecordType::A, None);
        // One record of type NULL that consists of pointers, each to the one before it; then records whose names start
        // at its last pointer.
        chain.extend([0, 0, 10, 0, 1, 0, 0, 0, 0]);
        let first = u16::try_from(chain.len() + 2).unwrap();
        chain.extend(16_000u16.to_be_bytes());
        for at in 0..8000u16 {
            let to = if at == 0 { 12 } else { first + 2 * (at - 1) };
            chain.extend((0xc000 | to.min(0x3fff)).to_be_bytes());
        }
        let last = (0xc000 | 0x3ff0u16).to_be_bytes();
        for _ in 0..3000 {
            chain.extend([&last[..], &[0, 5, 0, 1, 0, 0, 0, 9, 0, 2], &last].concat());
        }
        chain[7] = 0xff;
        chain[6] = 0x0b;
        let mut answer = chain.clone();
        answer[2] |= 0x80;
        assert_eq!(read(&chain), Request::NotForMesh);
        assert_eq!((dangling_alias(&answer), lifetime(&answer), addresses(&answer).len()), (None, None, 0));
        assert_eq!(response_kind(&chain, &answer), Some(ResponseKind::Exists), "only its question is read");
        let mut questions = [0, 0, 0x81, 0x80, 0xff, 0xff, 0, 0, 0, 0, 0, 0].to_vec();
        questions.extend(chain);
        assert_eq!(response_kind(&asked("a.example.", RecordType::A, None), &questions), None);
    }

    proptest! {
        #[test]
        fn every_function_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..600), cut in 0usize..200) {
            anything(&bytes);
            let mut damaged = reply(&parsed(&asked("a.example.", RecordType::A, Some(1232))), &addresses_of(5), 30, true).unwrap();
            let at = cut % damaged.len();
            damaged[at] ^= 0x55;
            anything(&damaged);
            damaged.truncate(at);
            anything(&damaged);
        }
    }
}
