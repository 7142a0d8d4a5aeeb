//! How long each stage of a connection took, until its first byte.

use std::time::Duration;

macro_rules! stages {
    ($($name:ident $word:literal $help:literal;)+) => {
        /// A stage of a connection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Stage {
            $(#[doc = $help] $name,)+
        }

        impl Stage {
            /// All stages, in the order in which a connection goes through them.
            pub const ALL: [Self; COUNT] = [$(Self::$name,)+];

            /// The word in metrics, in the history and in the access log.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }
    };
}

/// Number of stages.
const COUNT: usize = 8;

stages! {
    Queue "queue" "It waited for its worker.";
    Facts "facts" "It waited for mesh facts, and its route was chosen.";
    Certificate "certificate" "It waited for the pod's certificate.";
    Policy "policy" "It waited for the decision of the policies.";
    Dial "dial" "TCP was connected.";
    Tls "tls" "It waited for the tunnel: TCP, TLS and HTTP/2, if the tunnel was not open yet.";
    Connect "connect" "It waited for the answer to CONNECT.";
    FirstByte "first_byte" "It was open, and the first byte of the answer had not arrived.";
}

/// The stages that a connection went through, and how long each took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages([u32; COUNT]);

impl Stages {
    /// Adds time to a stage.
    pub fn add(&mut self, stage: Stage, took: Duration) {
        // One more than the microseconds: 0 says that the stage did not happen.
        let took = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).saturating_add(1);
        if let Some(micros) = self.0.get_mut(stage as usize) {
            *micros = micros.saturating_sub(1).saturating_add(took);
        }
    }

    /// The stages that happened, in their order.
    pub fn all(&self) -> impl Iterator<Item = (Stage, Duration)> + '_ {
        let happened = Stage::ALL.into_iter().zip(self.0).filter(|(_, micros)| *micros > 0);
        happened.map(|(stage, micros)| (stage, Duration::from_micros(u64::from(micros - 1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stages_that_happened_are_shown_and_their_times_add_up() {
        let mut stages = Stages::default();
        stages.add(Stage::Dial, Duration::from_micros(1_500));
        stages.add(Stage::Queue, Duration::ZERO);
        stages.add(Stage::Dial, Duration::from_micros(500));
        let all: Vec<_> = stages.all().map(|(stage, took)| (stage.word(), took.as_micros())).collect();
        assert_eq!(all, [("queue", 0), ("dial", 2_000)]);
        stages.add(Stage::Dial, Duration::from_secs(100_000));
        assert_eq!(stages.all().last().map(|(_, took)| took.as_secs()), Some(4_294), "the most that it can say");
    }
}
