//! Metrics as text, in OpenMetrics 1.0.0 or in the Prometheus text format 0.0.4. A scraper chooses with its `Accept`
//! header. The default is the Prometheus format, which every scraper understands.
//!
//! The formats differ in the names of metric families. In OpenMetrics, a counter family `x` has samples `x_total`. In
//! the Prometheus format the family must be named `x_total` too, or parsers treat the counter as untyped.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::fmt;

/// The format in which metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus' text format 0.0.4.
    Text,
}

impl Format {
    /// The format for a request with these `Accept` headers: OpenMetrics if they name it and do not prefer plain text.
    pub fn accepted<'a>(accept: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut open_metrics, mut text) = (0.0, 0.0);
        for range in accept.into_iter().flat_map(|header| header.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let weight = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                "application/openmetrics-text" => &mut open_metrics,
                "text/plain" => &mut text,
                _ => continue,
            };
            let quality = parts.find_map(|part| part.strip_prefix("q=")).map_or(Some(1.0), |q| q.parse::<f64>().ok());
            *weight = quality.unwrap_or(0.0).max(*weight);
        }
        if open_metrics > 0.0 && open_metrics >= text { Self::OpenMetrics } else { Self::Text }
    }

    /// The `Content-Type` of the format.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Writes all metrics.
    pub fn render(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, registry)?;
        Ok(match self {
            Self::OpenMetrics => text,
            Self::Text => as_text(&text),
        })
    }
}

/// Converts OpenMetrics to the Prometheus text format. Samples are the same in both, but for exemplars.
fn as_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + open_metrics.len() / 8);
    // HELP precedes TYPE, which decides the name of the family. So HELP is kept until TYPE is read.
    let mut help = None;
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(_), words) => help = words,
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    "gauge" | "histogram" | "summary" => ("", kind),
                    _ => ("", "untyped"),
                };
                if let Some(help) = help.take() {
                    text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
                }
                text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
            }
            // UNIT and EOF do not exist in this format.
            (Some("#"), ..) => {}
            _ => {
                text.push_str(without_exemplar(line));
                text.push('\n');
            }
        }
    }
    text
}

/// A sample without the exemplar that may follow its value. Values of labels may look like one.
fn without_exemplar(line: &str) -> &str {
    let (mut in_quotes, mut escaped) = (false, false);
    for (at, character) in line.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = in_quotes,
            '"' => in_quotes = !in_quotes,
            '#' if !in_quotes => return line.get(..at).unwrap_or(line).trim_end(),
            _ => {}
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::family::Family;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::metrics::histogram::Histogram;
    use prometheus_client::metrics::info::Info;
    use prometheus_client::registry::Unit;

    #[test]
    fn the_format_is_the_one_that_is_accepted() {
        use Format::{OpenMetrics, Text};
        for (accept, format) in [
            (&[][..], Text),
            (&["*/*"], Text),
            (&["text/plain"], Text),
            (&["text/html,application/xhtml+xml,*/*;q=0.8"], Text),
            (&["application/openmetrics-text"], OpenMetrics),
            (&["Application/OpenMetrics-Text; version=1.0.0"], OpenMetrics),
            (&["application/openmetrics-text;q=0"], Text),
            (&["application/openmetrics-text;q=0.3,text/plain;q=0.5"], Text),
            (&["text/plain;q=0.5", "application/openmetrics-text;q=0.5"], OpenMetrics),
            // Prometheus 2 and 3.
            (&["application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"], OpenMetrics),
            (
                &[
                    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                ],
                OpenMetrics,
            ),
            (&["text/plain;version=0.0.4;q=0.3,*/*;q=0.2"], Text),
        ] {
            assert_eq!(Format::accepted(accept.iter().copied()), format, "{accept:?}");
        }
    }

    #[test]
    fn each_kind_of_metric_has_its_name_and_type_in_either_format() {
        let mut registry = Registry::default();
        let counter = Family::<Vec<(String, String)>, Counter>::default();
        counter.get_or_create(&vec![("a".into(), "x # \"y\"\n# TYPE z".into())]).inc();
        registry.register("things", "Things: # not a comment", counter);
        registry.register("level", "Level", Gauge::<i64>::default());
        registry.register("build", "Build", Info::new(vec![("version", "1")]));
        registry.register_with_unit("wait", "Wait", Unit::Seconds, Histogram::new([1.0]));
        let text = Format::Text.render(&registry).unwrap();
        assert_eq!(
            text,
            "# HELP things_total Things: # not a comment.\n# TYPE things_total counter\n\
             things_total{a=\"x # \\\"y\\\"\\n# TYPE z\"} 1\n\
             # HELP level Level.\n# TYPE level gauge\nlevel 0\n\
             # HELP build_info Build.\n# TYPE build_info gauge\nbuild_info{version=\"1\"} 1\n\
             # HELP wait_seconds Wait.\n# TYPE wait_seconds histogram\nwait_seconds_sum 0.0\nwait_seconds_count 0\n\
             wait_seconds_bucket{le=\"1.0\"} 0\nwait_seconds_bucket{le=\"+Inf\"} 0\n"
        );
        let open_metrics = Format::OpenMetrics.render(&registry).unwrap();
        assert!(open_metrics.contains("# TYPE things counter\nthings_total{"), "{open_metrics}");
        assert!(open_metrics.ends_with("# EOF\n"), "{open_metrics}");
    }
}
