//! DNS messages, by hickory's decoder and encoder: what is asked, our own answers, and what has to be known of the answers
//! of others, which themselves are passed on as the bytes they came in. Pure; every function is total.

use super::answer::{MeshAnswer, MeshRecord, QueryKind};
use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder};
use std::net::IpAddr;

/// Length of a message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
/// The largest datagram that we say we take: what fits into every network's packets (DNS flag day 2020).
const PAYLOAD: u16 = 1232;
/// Longest request that may be ours to answer.
const REQUEST_MAX: usize = 4096;
/// Longest answer, and most records, that are looked into. A name costs up to half as many steps as there are bytes before it.
const ANSWER_MAX: usize = 4096;
const RECORDS_MAX: usize = 128;
/// The word for a record type that has none, and for what is no question.
pub const UNKNOWN: &str = "unknown";
/// Aliases that are followed in one answer.
const ALIASES_MAX: usize = 16;
/// Longest time that a record is kept (RFC 8767 recommends a cap of days; the pod's resolver need not be asked less).
const TTL_MAX: u32 = 86_400;

/// A question that the mesh may know the answer of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name, lower case, without the dot at its end.
    pub name: String,
    /// What is asked for.
    pub kind: QueryKind,
    /// The record type asked for, as a word.
    pub type_word: &'static str,
    message: Message,
}

/// What a pod sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Not a request: an answer, or too short for anything. Not to be replied to.
    Invalid,
    /// Something that only the pod's resolvers can know about.
    NotForMesh,
    /// A question.
    Question(Question),
}

/// Reads what a pod sends. A request that cannot be read is for the pod's resolvers to refuse.
pub fn read(bytes: &[u8]) -> Request {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(header) = Header::read(&mut decoder) else { return Request::Invalid };
    if header.metadata.message_type != MessageType::Query {
        return Request::Invalid;
    }
    if header.metadata.op_code != OpCode::Query || header.counts.queries != 1 {
        return Request::NotForMesh;
    }
    // One that is not whole, or of another version of EDNS, is not for us to answer; nor is one that no client sends, whose
    // reading may take long: names can lead through thousands of others.
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
    /// The largest datagram that who asks can take.
    pub fn datagram_limit(&self) -> u16 {
        self.message.max_payload()
    }

    /// Whether the answer comes in several messages, as a transfer of a zone does.
    pub fn is_transfer(&self) -> bool {
        matches!(self.type_word, "AXFR" | "IXFR")
    }
}

/// A word for metrics; the many types that nobody has given a name are one.
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

/// Our answer to a question; `None` if it cannot be put into a message.
///
/// `datagram`: the answer must fit into what the client can take; else it is cut, and says so.
pub fn reply(question: &Question, answer: &MeshAnswer, ttl: u32, datagram: bool) -> Option<Vec<u8>> {
    let request = &question.message;
    let query = request.queries.first()?;
    let mut reply = answer_to(request);
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

/// A reply with nothing in it yet.
fn answer_to(request: &Message) -> Message {
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

/// Says who vouches for that there is nothing, and for how long (RFC 2308).
fn authority(zone: &str, ttl: u32) -> Option<Record> {
    let name = |prefix: &str| Name::from_ascii(format!("{prefix}{zone}.")).ok();
    let data = SOA::new(name("ns.dns.")?, name("hostmaster.")?, 1, 7200, 1800, 86400, ttl);
    Some(Record::from_rdata(name("")?, ttl, RData::SOA(data)))
}

/// Encodes a message; what does not fit is left out from the end, and the message says that it is cut.
fn encode(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    loop {
        let mut bytes = Vec::with_capacity(512);
        if message.emit(&mut BinEncoder::new(&mut bytes)).is_ok() && bytes.len() <= limit {
            return Some(bytes);
        }
        if message.additionals.is_empty() {
            message.metadata.truncation = true;
            let count = message.answers.len();
            // As many as fit if all are of the same size, and one less each time that this was too many.
            let fitting = count * limit / bytes.len().max(1);
            message.answers.truncate(fitting.min(count.checked_sub(1)?));
        } else {
            // These can be asked for; that they are missing is no loss.
            message.additionals.clear();
        }
    }
}

/// A reply that only says what went wrong.
fn failure(request: &[u8], question: Option<&Question>, code: ResponseCode) -> Option<Vec<u8>> {
    let mut reply = match question {
        Some(question) => answer_to(&question.message),
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

/// That the request could not be served.
pub fn server_failure(request: &[u8], question: Option<&Question>) -> Option<Vec<u8>> {
    failure(request, question, ResponseCode::ServFail)
}

/// The message with another id: that of the client is its own affair, and easily guessed.
pub fn with_id(mut bytes: Vec<u8>, id: [u8; 2]) -> Vec<u8> {
    if let Some(place) = bytes.get_mut(..2) {
        place.copy_from_slice(&id);
    }
    bytes
}

/// The id of a message.
pub fn id(bytes: &[u8]) -> [u8; 2] {
    bytes.get(..2).and_then(|id| id.try_into().ok()).unwrap_or_default()
}

/// What an answer says, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseKind {
    /// There is such a name.
    Exists,
    /// There is, and it has no such record.
    NoData,
    /// There is none.
    NoSuchName,
    /// The server cannot or will not say.
    Failure,
}

/// What `answer` says in reply to `query`; `None` if it is none: another id, another question, or no answer at all.
pub fn response_kind(query: &[u8], answer: &[u8]) -> Option<ResponseKind> {
    let mut decoder = BinDecoder::new(answer);
    let header = Header::read(&mut decoder).ok()?;
    if id(query) != id(answer) || header.metadata.message_type != MessageType::Response {
        return None;
    }
    let code = header.metadata.response_code;
    // A server that could not read the question may leave it out, and so may one that answers another operation.
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

/// Whether both have the same question, letter case aside; where the query has not exactly one that can be read, any will
/// do.
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

/// The header of an answer that can be looked into at little cost.
fn bounded(answer: &[u8]) -> Option<Header> {
    let header = Header::read(&mut BinDecoder::new(answer)).ok()?;
    let counts = header.counts;
    let all = [counts.queries, counts.answers, counts.authorities, counts.additionals].map(usize::from);
    (answer.len() <= ANSWER_MAX && all.iter().sum::<usize>() <= RECORDS_MAX).then_some(header)
}

/// The name at which a chain of aliases ends without an address of the family that was asked for, and that family.
pub fn dangling_alias(answer: &[u8]) -> Option<(String, QueryKind)> {
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
    (*end != query.name).then(|| (text(end), asked))
}

/// The answer of others with what its chain of aliases leads to in the mesh: `end`, the name that [`dangling_alias`] found.
pub fn with_alias_target(answer: &[u8], end: &str, ours: &MeshAnswer, ttl: u32, limit: u16) -> Option<Vec<u8>> {
    let mut message = Message::from_vec(answer).ok()?;
    message.metadata.response_code = ResponseCode::NoError;
    message.metadata.authentic_data = false;
    message.authorities.clear();
    let owner = Name::from_ascii(format!("{end}.")).ok()?;
    add_records(&mut message, &owner, ours, ttl)?;
    encode(message, usize::from(limit))
}

/// For how long an answer may be kept, in seconds, and where in it the times to live of its records are; `None` if it is not
/// to be kept at all: cut, a failure, or a denial that nobody vouches for.
pub fn lifetime(answer: &[u8]) -> Option<(u32, Vec<usize>)> {
    bounded(answer)?;
    let mut decoder = BinDecoder::new(answer);
    let header = Header::read(&mut decoder).ok()?;
    let (metadata, counts) = (header.metadata, header.counts);
    let keepable = matches!(metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
    if !keepable || metadata.truncation || metadata.op_code != OpCode::Query || counts.queries != 1 {
        return None;
    }
    Message::read_queries(&mut decoder, 1).ok()?;
    let (mut life, mut ttl_offsets) = (TTL_MAX, Vec::new());
    let (mut told, mut vouched) = (false, false);
    for at in 0..usize::from(counts.answers) + usize::from(counts.authorities) + usize::from(counts.additionals) {
        Name::read(&mut decoder).ok()?;
        let of = RecordType::read(&mut decoder).ok()?;
        decoder.read_u16().ok()?;
        let place = decoder.index();
        let ttl = decoder.read_u32().ok()?.unverified();
        let length = decoder.read_u16().ok()?.unverified();
        let data = decoder.read_slice(usize::from(length)).ok()?.unverified();
        if of == RecordType::OPT {
            continue;
        }
        ttl_offsets.push(place);
        life = life.min(ttl);
        told |= at < usize::from(counts.answers);
        if of == RecordType::SOA {
            vouched = true;
            // Its last field says how long a denial may be kept (RFC 2308, 5).
            let minimum = data.len().checked_sub(4).and_then(|start| data.get(start..)?.try_into().ok());
            life = life.min(minimum.map_or(0, u32::from_be_bytes));
        }
    }
    (life > 0 && ((told && metadata.response_code == ResponseCode::NoError) || vouched)).then_some((life, ttl_offsets))
}

/// The answer as it is `seconds` later: that much less time to live.
pub fn aged(mut answer: Vec<u8>, ttl_offsets: &[usize], seconds: u32) -> Vec<u8> {
    for place in ttl_offsets {
        let Some(bytes) = answer.get_mut(*place..place.saturating_add(4)) else { continue };
        if let Ok(ttl) = <[u8; 4]>::try_from(&*bytes) {
            bytes.copy_from_slice(&u32::from_be_bytes(ttl).saturating_sub(seconds).to_be_bytes());
        }
    }
    answer
}

/// A question of our own for the addresses of a host.
pub fn address_question(host: &str, v4: bool, id: [u8; 2]) -> Option<Vec<u8>> {
    let name = Name::from_ascii(format!("{}.", host.trim_end_matches('.'))).ok()?;
    let mut message = Message::new(u16::from_be_bytes(id), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let kind = if v4 { RecordType::A } else { RecordType::AAAA };
    message.add_query(hickory_proto::op::Query::query(name, kind));
    message.to_vec().ok()
}

/// The addresses in an answer.
pub fn addresses(answer: &[u8]) -> Vec<IpAddr> {
    let answers = bounded(answer).and_then(|_| Message::from_vec(answer).ok()).map(|message| message.answers);
    let address = |record: Record| match record.data {
        RData::A(ip) => Some(IpAddr::V4(ip.0)),
        RData::AAAA(ip) => Some(IpAddr::V6(ip.0)),
        _ => None,
    };
    answers.into_iter().flatten().filter_map(address).collect()
}

/// Whether an answer is cut and must be asked for again over TCP.
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
    fn a_reply_keeps_letter_case_mirrors_edns_and_says_when_it_is_cut() {
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
            assert!(cut.len() > limit / 2, "as many as fit, or nearly: {}", cut.len());
            assert_eq!(message.edns.is_some(), payload.is_some());
            let whole = reply(&question, &addresses_of(1500), 30, false).unwrap();
            assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 1500);
        }
        let none = reply(&read_back, &addresses_of(0), 30, true).unwrap();
        let message = Message::from_vec(&none).unwrap();
        assert_eq!(message.authorities[0].record_type(), RecordType::SOA);
        assert_eq!(message.authorities[0].name.to_ascii(), "cluster.local.");
        assert_eq!(lifetime(&none).map(|(life, ttl_offsets)| (life, ttl_offsets.len())), Some((30, 1)));
    }

    #[test]
    fn an_answer_is_kept_as_long_as_its_shortest_record_and_ages() {
        let question = asked("a.example.", RecordType::A, Some(1232));
        let whole = parsed(&question);
        let bytes = reply(&whole, &addresses_of(2), 300, true).unwrap();
        let (life, ttl_offsets) = lifetime(&bytes).unwrap();
        assert_eq!((life, ttl_offsets.len()), (300, 2));
        let later = Message::from_vec(&aged(bytes.clone(), &ttl_offsets, 100)).unwrap();
        assert!(later.answers.iter().all(|record| record.ttl == 200));
        assert!(later.edns.unwrap().flags().dnssec_ok, "what looks like the life of an OPT record is not touched");
        assert_eq!(lifetime(&failure(&question, Some(&whole), ResponseCode::ServFail).unwrap()), None);
        assert_eq!(
            lifetime(&failure(&question, Some(&whole), ResponseCode::NXDomain).unwrap()),
            None,
            "nobody vouches for it"
        );
        assert_eq!(lifetime(&reply(&whole, &addresses_of(2), 0, true).unwrap()), None);
        assert_eq!(lifetime(&reply(&whole, &addresses_of(2000), 30, true).unwrap()), None, "cut");
    }

    #[test]
    fn an_alias_is_followed_to_where_it_dangles() {
        let question = asked("external.ns.svc.cluster.local.", RecordType::A, None);
        let mut message = answer_to(&Message::from_vec(&question).unwrap());
        let alias = |from: &str, to: &str| {
            let name = |text: &str| Name::from_ascii(text).unwrap();
            Record::from_rdata(name(from), 30, RData::CNAME(CNAME(name(to))))
        };
        message.answers.push(alias("two.example.", "three.example."));
        message.answers.push(alias("External.ns.svc.cluster.local.", "two.example."));
        message.metadata.response_code = ResponseCode::NXDomain;
        let bytes = message.to_vec().unwrap();
        let (end, kind) = dangling_alias(&bytes).unwrap();
        assert_eq!((end.as_str(), kind), ("three.example", QueryKind::A));
        let whole = with_alias_target(&bytes, &end, &addresses_of(1), 30, 512).unwrap();
        let read_back = Message::from_vec(&whole).unwrap();
        assert_eq!((read_back.answers.len(), read_back.metadata.response_code), (3, ResponseCode::NoError));
        assert_eq!(dangling_alias(&whole), None);
        // An alias of itself has no end, and costs no time.
        message.answers.push(alias("three.example.", "external.ns.svc.cluster.local."));
        let _ = dangling_alias(&message.to_vec().unwrap());
    }

    #[test]
    fn what_is_no_answer_to_the_question_is_none() {
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
        assert_eq!(response_kind(&question, &bare), Some(ResponseKind::Exists), "a format error without the question");
    }

    fn anything(bytes: &[u8]) {
        crate::fuzz::dns_request(bytes);
        crate::fuzz::dns_answer(bytes);
    }

    /// Names that lead through thousands of others are not followed, in requests or in answers.
    #[test]
    fn a_bomb_of_compressed_names_is_left_alone() {
        let mut chain = asked("shop.ns.svc.cluster.local.", RecordType::A, None);
        // One record of type NULL, full of pointers each to the one before it; then records whose names begin at its end.
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
        assert_eq!(response_kind(&chain, &answer), Some(ResponseKind::Exists), "its question alone is read");
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
