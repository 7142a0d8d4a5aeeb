//! The log: one line per event on standard output, as text or JSON, written by a separate thread.
//!
//! A text line is `time<TAB>level<TAB>target<TAB>message<TAB>key=value …`, a JSON line is one object (both as ztunnel
//! writes them). A slow reader of standard output never delays traffic: when 10,000 lines are waiting, further ones are
//! dropped and counted.

use super::limit::LogLimit;
use super::lines::{Lines, LinesGuard};
use serde_json::Value;
use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

/// Silences libraries that log an error at each attempt, where the daemon reports it once in its own words. A filter
/// that names the target overrides this.
const SILENCED: [&str; 2] = ["kube_client=off", "kube_runtime=off"];

/// Settings of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Filter directives, e.g. `info` or `warn,access=info`.
    pub filter: String,
    /// Whether lines are JSON instead of text.
    pub json: bool,
}

/// Changes the filter while the process runs.
#[derive(Clone, Debug)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, tracing_subscriber::Registry>,
    initial: String,
    lines: Lines,
}

/// Why the log cannot be started or its filter cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter cannot be parsed.
    #[error("log filter {0:?} is not understood: {1}")]
    Filter(String, tracing_subscriber::filter::ParseError),
    /// A word in the filter is not a level.
    #[error("{0:?} is not a log level: use off, error, warn, info, debug, trace, or target=level")]
    Level(String),
    /// The thread that writes the log cannot be started.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(#[source] std::io::Error),
    /// The log has been started before, or has ended.
    #[error("the log cannot be changed now: {0}")]
    State(String),
}

/// Starts the log. `thread` starts a thread that does the given work. Keep the guard until the end of the process: dropping it writes the lines that are still waiting.
pub fn start(
    config: &Config,
    thread: impl FnOnce(Box<dyn FnOnce() + Send>) -> std::io::Result<()>,
) -> Result<(LogControl, LinesGuard), LogError> {
    let (lines, guard, work) = Lines::new(std::io::stdout());
    thread(Box::new(work)).map_err(LogError::Thread)?;
    let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
    let format = LineFormat { json: config.json };
    let layer = tracing_subscriber::fmt::layer().event_format(format).with_writer(lines.clone());
    tracing_subscriber::registry()
        .with(filter)
        .with(LibraryLimit::default())
        .with(layer)
        .try_init()
        .map_err(|error| LogError::State(error.to_string()))?;
    Ok((LogControl { handle, initial: config.filter.clone(), lines }, guard))
}

/// Checks that a filter can be parsed.
pub fn check(filter: &str) -> Result<(), LogError> {
    parse(filter).map(drop)
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    // The library takes a bare word for a target. Here it can only be a mistyped level.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let bare = filter.split(',').map(str::trim).filter(|part| !part.is_empty() && !part.contains('='));
    for word in bare {
        if !levels.iter().any(|level| word.eq_ignore_ascii_case(level)) {
            return Err(LogError::Level(word.to_owned()));
        }
    }
    EnvFilter::try_new(format!("{},{filter}", SILENCED.join(",")))
        .map_err(|error| LogError::Filter(filter.to_owned(), error))
}

impl LogControl {
    /// The current filter.
    pub fn current(&self) -> String {
        let all = self.handle.with_current(ToString::to_string).unwrap_or_default();
        all.split(',').filter(|part| !SILENCED.contains(part)).collect::<Vec<_>>().join(",")
    }

    /// Restores the filter with which the log was started.
    pub fn reset(&self) -> Result<(), LogError> {
        self.set(&self.initial)
    }

    /// Adds directives (`level` or `target=level`, separated by commas) to the current filter.
    pub fn add(&self, directives: &str) -> Result<(), LogError> {
        self.set(&format!("{},{directives}", self.current()))
    }

    fn set(&self, filter: &str) -> Result<(), LogError> {
        self.handle.reload(parse(filter)?).map_err(|error| LogError::State(error.to_string()))
    }

    /// The number of lines dropped so far because standard output was not read fast enough.
    pub fn dropped_lines(&self) -> usize {
        self.lines.dropped()
    }
}

/// Limits the rate of lines from libraries, because a peer can cause them and libraries do not limit them. Debug and
/// trace lines are not limited: they appear only if the filter asks for them.
#[derive(Debug, Default)]
struct LibraryLimit {
    limit: LogLimit,
}

impl<S: Subscriber> Layer<S> for LibraryLimit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        let ours = metadata.module_path().is_some_and(|path| path.starts_with("culvert"));
        ours || *metadata.level() > Level::INFO || self.limit.allow().is_some()
    }
}

struct LineFormat {
    json: bool,
}

impl<S, N> FormatEvent<S, N> for LineFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let target = metadata.target().strip_prefix("culvert::").unwrap_or(metadata.target());
        let time = humantime::format_rfc3339_micros(SystemTime::now());
        let level = metadata.level().as_str();
        if self.json {
            let level = level.to_ascii_lowercase();
            write!(out, r#"{{"level":"{level}","time":"{time}","scope":{}"#, Value::from(target))?;
            write!(out, r#","message":{}"#, Value::from(fields.message))?;
            for (name, value, _) in fields.others {
                write!(out, ",{}:{}", Value::from(name), value)?;
            }
            return writeln!(out, "}}");
        }
        let level = level.to_ascii_lowercase();
        write!(out, "{time}\t{level}\t{target}\t{}", Printable(&fields.message))?;
        for (index, (name, value, is_text)) in fields.others.iter().enumerate() {
            out.write_char(if index == 0 { '\t' } else { ' ' })?;
            match (value, *is_text) {
                (Value::String(text), false) if is_bare(text) => write!(out, "{name}={text}")?,
                (Value::String(text), _) => write!(out, "{name}={text:?}")?,
                (other, _) => write!(out, "{name}={other}")?,
            }
        }
        writeln!(out)
    }
}

/// Whether a value needs no quotes, as addresses, numbers and durations do not.
fn is_bare(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b":.[]-_".contains(&b))
}

/// A message with control characters escaped, so that nothing a peer sends can control the terminal of a reader.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    /// Name, value, and whether the value was given as a string, which is then quoted as ztunnel does.
    others: Vec<(&'static str, Value, bool)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.others.push((field.name(), value, false));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.put(field, Value::from(format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.others.push((field.name(), Value::from(value), true));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::from(value));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, Value::from(with_causes(value)));
    }
}

/// A duration for people: rounded down to seconds if it is a minute or longer, to tenths of seconds if it is a second
/// or longer.
pub fn brief(duration: Duration) -> impl fmt::Display {
    let unit = match duration.as_millis() {
        0..1_000 => 1,
        1_000..60_000 => 100,
        _ => 1_000,
    };
    let millis = u64::try_from(duration.as_millis() / unit * unit).unwrap_or(u64::MAX);
    humantime::format_duration(Duration::from_millis(millis))
}

/// An error and all its causes, on one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistyped_levels_are_refused() {
        for good in ["info", "INFO", "warn,access=info", "off,a::b=trace"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["inof", "warn,access", "a=b=c", "access=inof"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_brief() {
        let said = |millis| brief(Duration::from_millis(millis)).to_string();
        assert_eq!([7, 7_563, 90_250, 3_723_999].map(said), ["7ms", "7s 500ms", "1m 30s", "1h 2m 3s"]);
    }

    #[test]
    fn a_silenced_library_logs_if_the_filter_names_it() {
        for (filter, named) in [("info", "off"), ("debug", "off"), ("info,kube_client=debug", "debug")] {
            let parsed = parse(filter).unwrap().to_string();
            assert!(parsed.split(',').any(|part| part == format!("kube_client={named}")), "{filter}: {parsed}");
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(Printable("a\u{1b}[31mb\n").to_string(), "a\\u{1b}[31mb\\n");
        assert!(is_bare("10.0.0.1:80") && is_bare("[::1]:80") && !is_bare("a b") && !is_bare("\u{1b}"));
    }
}
