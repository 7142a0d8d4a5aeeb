//! A pod's own small memory of what its resolvers have answered. The key is who was asked, and the question byte for
//! byte, flags, options and letter case included, so that nobody gets an answer to another question than his own.

use super::message;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Longest question whose answer is kept.
const QUESTION_MAX: usize = 512;
/// Longest answer that is kept.
const ANSWER_MAX: usize = 4096;

/// Answers to questions, the oldest of which make room.
#[derive(Debug)]
pub struct Cache {
    entries_max: usize,
    entries: Mutex<Entries>,
}

type QuestionKey = Arc<(Option<SocketAddr>, Vec<u8>)>;

#[derive(Debug, Default)]
struct Entries {
    by_question: HashMap<QuestionKey, CachedAnswer>,
    by_age: VecDeque<QuestionKey>,
}

#[derive(Debug)]
struct CachedAnswer {
    answer: Vec<u8>,
    ttl_offsets: Vec<usize>,
    since: Instant,
    expires: Instant,
}

impl Cache {
    /// Keeps up to `entries_max` answers; 0: none.
    pub fn new(entries_max: usize) -> Self {
        Self { entries_max, entries: Mutex::default() }
    }

    /// The answer to a question, as it is now, with the question's id.
    pub fn get(&self, asked: Option<SocketAddr>, question: &[u8]) -> Option<Vec<u8>> {
        let (now, key) = (Instant::now(), (asked, question.get(2..)?.to_vec()));
        let entries = self.entries.lock();
        let entry = entries.by_question.get(&key).filter(|entry| now < entry.expires)?;
        let age = u32::try_from(now.duration_since(entry.since).as_secs()).unwrap_or(u32::MAX);
        Some(message::with_id(message::aged(entry.answer.clone(), &entry.ttl_offsets, age), message::id(question)))
    }

    /// Keeps an answer for as long as it says itself that it may be kept.
    pub fn put(&self, asked: Option<SocketAddr>, question: &[u8], answer: &[u8]) {
        let small = question.len() <= QUESTION_MAX && answer.len() <= ANSWER_MAX;
        let Some(key) = question.get(2..).filter(|_| self.entries_max > 0 && small) else {
            return;
        };
        let Some((life, ttl_offsets)) = message::lifetime(answer) else { return };
        let (key, since): (QuestionKey, Instant) = (Arc::new((asked, key.to_vec())), Instant::now());
        let expires = since + Duration::from_secs(u64::from(life));
        let mut entries = self.entries.lock();
        if entries
            .by_question
            .insert(key.clone(), CachedAnswer { answer: answer.to_vec(), ttl_offsets, since, expires })
            .is_none()
        {
            entries.by_age.push_back(key);
        }
        while entries.by_age.len() > self.entries_max {
            if let Some(oldest) = entries.by_age.pop_front() {
                entries.by_question.remove(&oldest);
            }
        }
    }
}
