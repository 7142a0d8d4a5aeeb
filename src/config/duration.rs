//! Durations as ztunnel reads them (source: the crate duration-str): `10s`, `1h30m`, `3m31`, `25`, `1m*5`. A number
//! without a unit means seconds. Units may be in either case, so `M` is a minute. Other common forms such as `1h 30min`
//! are accepted as well. Pure.

use std::time::Duration;

/// Units in lower case, and their lengths in nanoseconds. A month has 30 days, and a year 365.
const UNITS: [(&[&str], u128); 10] = [
    (&["ns", "nsec", "nsecs", "nanosecond", "nanoseconds"], 1),
    (&["us", "µs", "μs", "usec", "usecs", "µsec", "µsecs", "µsecond", "microsecond", "microseconds"], 1_000),
    (&["ms", "msec", "msecs", "millisecond", "milliseconds"], 1_000_000),
    (&["s", "sec", "secs", "second", "seconds", ""], SECOND),
    (&["m", "min", "mins", "minute", "minutes"], 60 * SECOND),
    (&["h", "hr", "hrs", "hour", "hours"], 3_600 * SECOND),
    (&["d", "day", "days"], DAY),
    (&["w", "wk", "wks", "week", "weeks"], 7 * DAY),
    (&["mon", "month", "months"], 30 * DAY),
    (&["y", "yr", "yrs", "year", "years"], 365 * DAY),
];
const SECOND: u128 = 1_000_000_000;
const DAY: u128 = 86_400 * SECOND;

/// Reads a duration. `None` if the text is not a duration, or too long for one.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let (mut rest, mut sum) = (text.trim(), 0_u128);
    loop {
        let (mut product, has_unit, after) = quantity(rest)?;
        rest = after.trim_start();
        while let Some(factor) = rest.strip_prefix('*') {
            let (number, after) = digits(factor.trim_start());
            product = product.checked_mul(number.parse().ok()?)?;
            rest = after.trim_start();
        }
        sum = sum.checked_add(product)?;
        if rest.is_empty() {
            let (seconds, rest) = (u64::try_from(sum / SECOND).ok()?, u32::try_from(sum % SECOND).ok()?);
            return Some(Duration::new(seconds, rest));
        }
        rest = match rest.strip_prefix('+') {
            Some(after) => after.trim_start(),
            // After a number without a unit, only a plus shows where the next number begins.
            None if !has_unit => return None,
            None => rest,
        };
    }
}

/// Reads a number with up to nine decimals, and its unit. Returns nanoseconds, whether there was a unit, and the rest
/// of the text.
fn quantity(text: &str) -> Option<(u128, bool, &str)> {
    let (whole, rest) = digits(text);
    let (decimals, rest) = rest.strip_prefix('.').map_or(("0", rest), digits);
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at_checked(end)?;
    let word = unit.to_lowercase();
    let (_, length) = UNITS.iter().find(|(words, _)| words.contains(&word.as_str()))?;
    if decimals.len() > 9 {
        return None;
    }
    let parts = 10_u128.pow(u32::try_from(decimals.len()).ok()?);
    let whole = length.checked_mul(whole.parse().ok()?)?;
    let decimals = length.checked_mul(decimals.parse().ok()?)? / parts;
    Some((whole.checked_add(decimals)?, !unit.is_empty(), rest))
}

/// Splits off the digits at the beginning.
fn digits(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_mean_what_they_mean_to_ztunnel() {
        let millis = |text: &str| parse(text).map(|duration| duration.as_millis());
        for (text, expected) in [
            ("10s", 10_000),
            ("25", 25_000),
            ("30S", 30_000),
            ("1M", 60_000),
            ("3m31", 211_000),
            ("3m31s", 211_000),
            ("3m+31", 211_000),
            ("3m + 31", 211_000),
            ("31+3m", 211_000),
            ("1h30m", 5_400_000),
            ("1h 30min", 5_400_000),
            ("1m*10", 600_000),
            ("1m * 2 * 5 + 1", 601_000),
            ("1H", 3_600_000),
            ("2 days", 172_800_000),
            ("1w", 604_800_000),
            ("1MON", 2_592_000_000),
            ("1year", 31_536_000_000),
            ("10years", 315_360_000_000),
            ("250ms", 250),
            ("1s500ms", 1_500),
            ("0.5h", 1_800_000),
            ("4.25s", 4_250),
            ("5000µs", 5),
            ("  7  ", 7_000),
            ("0", 0),
        ] {
            assert_eq!(millis(text), Some(expected), "{text:?}");
        }
        assert_eq!(parse("1ns"), Some(Duration::from_nanos(1)));
        for text in [
            "",
            " ",
            "s",
            "soon",
            "-1s",
            "1x",
            "1s-",
            "+1",
            "1+",
            "1*",
            "1*m",
            "10 20",
            "1.s",
            ".5s",
            "1e3",
            "1..5s",
            "1,5s",
            "0.0000000001s",
            "99999999999999999999999999999999999999999",
            "9999999999999999999999y",
            "1s;",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "[0-9a-zA-Zµ .*+]{0,12}|\\PC{0,20}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_humantime_writes_is_read_as_it_was(millis in 0..2_592_000_000_u64) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse(&humantime::format_duration(duration).to_string()), Some(duration));
        }
    }
}
