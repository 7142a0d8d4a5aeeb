//! A CPU profile of the daemon, for `/debug/pprof/profile`.

use crate::admin::Query;
use crate::proto::perftools::profiles as wire;
use crate::task::thread::run_blocking;
use prost::Message;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Whether a profile is being taken. There is one at a time, because the process has only one such timer.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// Releases [`RUNNING`] when dropped, also when the client has disconnected.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::Release);
    }
}

/// Takes a profile of `seconds` (1 to 300, 10 by default) at `frequency` (1 to 1000 samples a second, 100 by default);
/// the query gives both.
pub(super) async fn cpu(query: Query) -> Result<Vec<u8>, String> {
    let (mut seconds, mut frequency) = (10, 100);
    for (name, value) in query {
        let number = |range: std::ops::RangeInclusive<i32>| {
            let number = value.parse().ok().filter(|number| range.contains(number));
            number.ok_or_else(|| {
                format!("{name}={value:?}: a number from {} to {} is needed\n", range.start(), range.end())
            })
        };
        match name.as_str() {
            "seconds" => seconds = number(1..=300)?,
            "frequency" => frequency = number(1..=1000)?,
            _ => {}
        }
    }
    if RUNNING.swap(true, Ordering::AcqRel) {
        return Err("another profile is being taken\n".into());
    }
    let _running = Running;
    let begun = SystemTime::now();
    let guard = pprof::ProfilerGuardBuilder::default()
        .frequency(frequency)
        // Unwinding from inside these libraries could wait for a lock that the interrupted thread holds.
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()
        .map_err(|error| format!("no profile can be taken: {error}\n"))?;
    let duration = Duration::from_secs(u64::from(seconds.unsigned_abs()));
    tokio::time::sleep(duration).await;
    // Looking up names in the binary's tables takes a while.
    let built = run_blocking(move || guard.report().build().map(|report| encode(&report))).await;
    let built = built.ok_or_else(|| "the profile could not be built\n".to_owned())?;
    let mut profile = built.map_err(|error| format!("the profile cannot be read: {error}\n"))?;
    let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    profile.time_nanos = nanos(begun.duration_since(UNIX_EPOCH).unwrap_or_default());
    profile.duration_nanos = nanos(duration);
    profile.period = 1_000_000_000 / i64::from(frequency);
    Ok(profile.encode_to_vec())
}

/// The string table of a profile: each text once, referred to by number.
#[derive(Default)]
struct Texts {
    numbers: HashMap<String, i64>,
    all: Vec<String>,
}

impl Texts {
    fn number(&mut self, text: &str) -> i64 {
        if let Some(known) = self.numbers.get(text) {
            return *known;
        }
        let number = i64::try_from(self.all.len()).unwrap_or(i64::MAX);
        self.all.push(text.to_owned());
        self.numbers.insert(text.to_owned(), number);
        number
    }
}

fn encode(report: &pprof::Report) -> wire::Profile {
    let mut texts = Texts::default();
    texts.number("");
    let mut quantity =
        |what: &str, unit: &str| wire::ValueType { r#type: texts.number(what), unit: texts.number(unit) };
    let (samples, cpu) = (quantity("samples", "count"), quantity("cpu", "nanoseconds"));
    let mut profile = wire::Profile { sample_type: vec![samples], period_type: Some(cpu), ..Default::default() };
    let mut functions: HashMap<(String, u32), u64> = HashMap::new();
    for (frames, count) in &report.data {
        let mut sample = wire::Sample { value: vec![i64::try_from(*count).unwrap_or(i64::MAX)], ..Default::default() };
        for symbol in frames.frames.iter().flatten() {
            let key = (symbol.sys_name().into_owned(), symbol.lineno());
            let next = functions.len() as u64 + 1;
            let id = *functions.entry(key).or_insert_with(|| {
                profile.function.push(wire::Function {
                    id: next,
                    name: texts.number(&symbol.name()),
                    system_name: texts.number(&symbol.sys_name()),
                    filename: texts.number(&symbol.filename()),
                });
                let line = wire::Line { function_id: next, line: i64::from(symbol.lineno()) };
                profile.location.push(wire::Location { id: next, line: vec![line] });
                next
            });
            sample.location_id.push(id);
        }
        profile.sample.push(sample);
    }
    profile.string_table = texts.all;
    profile
}
