//! From measurements to the table: medians, spreads and ratios, and whether two runs of one subject agree.

use crate::case::{Case, Figure, Figures};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// By how much two runs of the same subject may differ in a case's deciding figure.
const AGREEMENT: f64 = 0.05;

/// The measurements of one run of the bench.
pub struct Report {
    /// Names of the subjects, in the order of the table.
    pub subjects: Vec<String>,
    /// The subject that is compared with each other one.
    pub ours: usize,
    /// The second run of the same subject.
    pub again: usize,
    /// By case and subject: the figures of each round.
    rounds: BTreeMap<(&'static str, usize), Vec<Figures>>,
}

/// The middle of some values, and the distance of the outermost from each other as a share of it.
struct Summary {
    median: f64,
    spread: f64,
}

fn summary(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (first, last) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] };
    let spread = if median == 0.0 { 0.0 } else { (last - first) / median.abs() };
    Some(Summary { median, spread })
}

impl Report {
    pub fn new(subjects: Vec<String>, ours: usize, again: usize) -> Self {
        Self { subjects, ours, again, rounds: BTreeMap::new() }
    }

    pub fn add(&mut self, case: &Case, subject: usize, figures: Figures) {
        self.rounds.entry((case.name, subject)).or_default().push(figures);
    }

    fn values(&self, case: &Case, subject: usize, figure: Figure) -> Vec<f64> {
        let rounds = self.rounds.get(&(case.name, subject)).into_iter().flatten();
        rounds.filter_map(|figures| figures.get(figure.name).copied()).collect()
    }

    /// The median of the ratios of ours to another subject in each round.
    fn ratio(&self, case: &Case, other: usize, figure: Figure) -> Option<Summary> {
        let of = |subject| self.rounds.get(&(case.name, subject)).into_iter().flatten();
        let pairs = of(self.ours).zip(of(other));
        let ratios: Vec<f64> =
            pairs.filter_map(|(ours, other)| Some(ours.get(figure.name)? / other.get(figure.name)?)).collect();
        let finite: Vec<f64> = ratios.into_iter().filter(|ratio| ratio.is_finite()).collect();
        summary(&finite)
    }

    /// By how much the two runs of the same subject differ, in their medians or in the median of the ratios of each
    /// round. `None` if one of them has no such figure.
    fn difference(&self, case: &Case) -> Option<f64> {
        let median = |subject| Some(summary(&self.values(case, subject, case.decides))?.median);
        let medians = median(self.ours)? / median(self.again)?;
        let rounds = self.ratio(case, self.again, case.decides)?.median;
        let apart = |ratio: f64| if ratio > 0.0 { ratio.max(ratio.recip()) - 1.0 } else { f64::INFINITY };
        Some(apart(medians).max(apart(rounds)))
    }

    /// Why a case cannot be trusted.
    pub fn noise(&self, case: &Case) -> Option<String> {
        let (ours, again) = (&self.subjects[self.ours], &self.subjects[self.again]);
        match self.difference(case) {
            Some(difference) if difference <= AGREEMENT => None,
            Some(difference) => Some(format!(
                "{}: {ours} and {again}, the same program, differ by {:.0} % in {}",
                case.name,
                difference * 100.0,
                case.decides.name
            )),
            None => Some(format!("{}: {ours} or {again} has no figure for {}", case.name, case.decides.name)),
        }
    }

    /// The table in Markdown, with columns of even width, and the titles of its cases below.
    pub fn table(&self, cases: &[Case]) -> String {
        let others: Vec<usize> = (0..self.subjects.len()).filter(|subject| *subject != self.ours).collect();
        let mut head = vec!["case".to_owned(), "figure".to_owned()];
        head.extend(self.subjects.iter().cloned());
        let ours = &self.subjects[self.ours];
        head.extend(others.iter().map(|other| format!("{ours} / {}", self.subjects[*other])));
        let mut rows = vec![head];
        for case in cases {
            let noisy = if self.noise(case).is_some() { ", noisy" } else { "" };
            let mut name = format!("{}{noisy}", case.name);
            for figure in case.figures() {
                if let Some(cells) = self.row(case, *figure, &others) {
                    let mark = if *figure == case.decides { " *" } else { "" };
                    let unit = if figure.unit.is_empty() { String::new() } else { format!(", {}", figure.unit) };
                    let mut row = vec![std::mem::take(&mut name), format!("{}{unit}{mark}", figure.name)];
                    row.extend(cells);
                    rows.push(row);
                }
            }
        }
        let mut text = even(&rows);
        text.push('\n');
        cases.iter().for_each(|case| writeln!(text, "{}: {}", case.name, case.title).unwrap());
        text
    }

    /// The cells of a figure, or `None` if no subject has anything to show for it.
    fn row(&self, case: &Case, figure: Figure, others: &[usize]) -> Option<Vec<String>> {
        let all: Vec<Vec<f64>> = (0..self.subjects.len()).map(|subject| self.values(case, subject, figure)).collect();
        let is_shown = |value: &f64| figure.name != "errors" || *value > 0.0;
        if !all.iter().flatten().any(is_shown) {
            return None;
        }
        let value = |values: &Vec<f64>| {
            summary(values).map(|s| format!("{} ±{:.0} %", short(s.median), s.spread * 50.0)).unwrap_or_default()
        };
        let ratio =
            |other: &usize| self.ratio(case, *other, figure).map(|s| format!("{:.2}", s.median)).unwrap_or_default();
        Some(all.iter().map(value).chain(others.iter().map(ratio)).collect())
    }

    /// Everything, with the figures of each round.
    pub fn json(&self, cases: &[Case], about: &Value) -> Value {
        let cases: Vec<Value> = cases
            .iter()
            .map(|case| {
                let figures: Vec<Value> = case
                    .figures()
                    .iter()
                    .map(|figure| {
                        let subjects: BTreeMap<&str, Value> = (0..self.subjects.len())
                            .filter_map(|subject| {
                                let rounds = self.values(case, subject, *figure);
                                let s = summary(&rounds)?;
                                let mut value = json!({"median": s.median, "spread": s.spread, "rounds": rounds});
                                if subject != self.ours
                                    && let Some(ratio) = self.ratio(case, subject, *figure)
                                {
                                    value["ratio"] = json!({"median": ratio.median, "spread": ratio.spread});
                                }
                                Some((self.subjects[subject].as_str(), value))
                            })
                            .collect();
                        json!({
                            "name": figure.name, "unit": figure.unit, "higher_is_better": figure.higher_is_better,
                            "decides": *figure == case.decides, "subjects": subjects,
                        })
                    })
                    .collect();
                json!({"name": case.name, "title": case.title, "noisy": self.noise(case), "figures": figures})
            })
            .collect();
        json!({"about": about, "ours": self.subjects[self.ours], "cases": cases})
    }
}

/// A number with three significant digits, or all digits before the point.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A Markdown table with columns of even width: two to the left, the others to the right.
fn even(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column < 2 {
                write!(text, "| {cell:<width$} ").unwrap();
            } else {
                write!(text, "| {cell:>width$} ").unwrap();
            }
        }
        text += "|\n";
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let end = if column < 2 { '-' } else { ':' };
                write!(text, "|{}{end}", "-".repeat(width + 1)).unwrap();
            }
            text += "|\n";
        }
    }
    text
}
