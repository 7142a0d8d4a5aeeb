//! A pod's own cache of answers from its resolvers. The key is the resolver that was asked and the question byte for
//! byte, with flags, options and letter case, so that no client receives the answer to a different question.

use super::message;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Longest question whose answer is cached, in bytes.
const QUESTION_MAX: usize = 512;
/// Longest answer that is cached, in bytes.
const ANSWER_MAX: usize = 4096;

/// Cached answers. When the cache is full, the oldest ones are dropped.
#[derive(Debug)]
pub struct Cache {
    entries_max: usize,
    entries: Mutex<Entries>,
}

/// The resolver that was asked, if it is known, and the question without its id.
type QuestionKey = Arc<(Option<SocketAddr>, Vec<u8>)>;

#[derive(Debug, Default)]
struct Entries {
    by_question: HashMap<QuestionKey, CachedAnswer>,
    by_age: VecDeque<QuestionKey>,
}

#[derive(Debug)]
struct CachedAnswer {
    bytes: Vec<u8>,
    /// Where in it the times to live of its records are.
    ttl_offsets: Vec<usize>,
    since: Instant,
    expires: Instant,
}

impl Cache {
    /// A cache of up to `entries_max` answers; with 0 nothing is cached.
    pub fn new(entries_max: usize) -> Self {
        Self { entries_max, entries: Mutex::default() }
    }

    /// The cached answer to a question, with the question's id and the times to live that are left now.
    pub fn get(&self, resolver: Option<SocketAddr>, question: &[u8]) -> Option<Vec<u8>> {
        let (now, key) = (Instant::now(), (resolver, question.get(2..)?.to_vec()));
        let entries = self.entries.lock();
        let cached = entries.by_question.get(&key).filter(|cached| now < cached.expires)?;
        let age = u32::try_from(now.duration_since(cached.since).as_secs()).unwrap_or(u32::MAX);
        let aged = message::aged(cached.bytes.clone(), &cached.ttl_offsets, age);
        Some(message::with_id(aged, message::id(question)))
    }

    /// Caches an answer for as long as its records allow.
    pub fn put(&self, resolver: Option<SocketAddr>, question: &[u8], answer: &[u8]) {
        let is_small = question.len() <= QUESTION_MAX && answer.len() <= ANSWER_MAX;
        let Some(key) = question.get(2..).filter(|_| self.entries_max > 0 && is_small) else {
            return;
        };
        let Some(lifetime) = message::lifetime(answer) else { return };
        let (key, since): (QuestionKey, Instant) = (Arc::new((resolver, key.to_vec())), Instant::now());
        let expires = since + Duration::from_secs(u64::from(lifetime.seconds));
        let cached = CachedAnswer { bytes: answer.to_vec(), ttl_offsets: lifetime.ttl_offsets, since, expires };
        let mut entries = self.entries.lock();
        if entries.by_question.insert(key.clone(), cached).is_none() {
            entries.by_age.push_back(key);
        }
        while entries.by_age.len() > self.entries_max {
            if let Some(oldest) = entries.by_age.pop_front() {
                entries.by_question.remove(&oldest);
            }
        }
    }
}
