//! How long each stage of a connection took, until its first byte.

use std::fmt;
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
    Dial "dial" "TCP was connected: to the far side, or to the application.";
    Tls "tls" "It waited for TLS and HTTP/2 of its tunnel, if that was not open yet.";
    Connect "connect" "It waited for the answer to CONNECT.";
    FirstByte "first_byte" "The client had sent its first byte, and the answer had none yet.";
}

/// The stages that a connection went through, and how long each took. Stages follow each other without a gap until the
/// connection is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// One more than the microseconds of each stage; 0 if it did not happen.
    micros: [u32; COUNT],
    /// Microseconds from the connection's begin to the end of its last stage so far.
    until: u32,
    /// Whether the connection is open: no stage before it can follow.
    is_open: bool,
}

impl Stages {
    /// The current stage has ended, so long after the connection's begin.
    pub fn lap(&mut self, stage: Stage, now: Duration) {
        let now = micros(now);
        self.add_micros(stage, now.saturating_sub(self.until));
        self.until = now;
    }

    /// Several stages have ended, so long after the connection's begin, and took these times.
    pub fn laps(&mut self, stages: impl IntoIterator<Item = (Stage, Option<Duration>)>, now: Duration) {
        for (stage, took) in stages {
            if let Some(took) = took {
                self.add(stage, took);
            }
        }
        self.until = micros(now);
    }

    /// The connection is open.
    pub fn open(&mut self) {
        self.is_open = true;
    }

    /// Whether the connection is open.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// When the last stage ended, after the connection's begin.
    pub fn until(&self) -> Duration {
        Duration::from_micros(u64::from(self.until))
    }

    /// Adds time to a stage.
    pub fn add(&mut self, stage: Stage, took: Duration) {
        self.add_micros(stage, micros(took));
    }

    fn add_micros(&mut self, stage: Stage, took: u32) {
        if let Some(micros) = self.micros.get_mut(stage as usize) {
            *micros = micros.saturating_sub(1).saturating_add(took).saturating_add(1);
        }
    }

    /// The stages that happened, in their order.
    pub fn all(&self) -> impl Iterator<Item = (Stage, Duration)> + '_ {
        let happened = Stage::ALL.into_iter().zip(self.micros).filter(|(_, micros)| *micros > 0);
        happened.map(|(stage, micros)| (stage, Duration::from_micros(u64::from(micros - 1))))
    }
}

impl fmt::Display for Stages {
    /// Such as `queue=0.1ms dial=12.0ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (stage, took)) in self.all().enumerate() {
            let gap = if number == 0 { "" } else { " " };
            write!(f, "{gap}{}={:.1}ms", stage.word(), took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stages_that_happened_are_shown_and_their_times_add_up() {
        let (mut stages, at) = (Stages::default(), Duration::from_micros);
        stages.lap(Stage::Queue, at(0));
        stages.lap(Stage::Dial, at(1_500));
        stages.lap(Stage::Facts, at(1_600));
        stages.lap(Stage::Dial, at(2_100));
        assert_eq!(stages.to_string(), "queue=0.0ms facts=0.1ms dial=2.0ms");
        stages.laps([(Stage::Tls, Some(at(700))), (Stage::Dial, None), (Stage::Connect, Some(at(200)))], at(3_000));
        assert_eq!(stages.to_string(), "queue=0.0ms facts=0.1ms dial=2.0ms tls=0.7ms connect=0.2ms");
        assert_eq!(stages.until(), at(3_000));
        stages.add(Stage::Dial, Duration::from_secs(100_000));
        let dial = stages.all().find(|(stage, _)| *stage == Stage::Dial);
        assert_eq!(dial.map(|(_, took)| took.as_secs()), Some(4_294), "the most that it can say");
    }
}
