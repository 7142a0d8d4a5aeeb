//! Checks the documents: links resolve, files that they name exist, and the commands that they print parse with the real
//! command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every document by its path below the root.
fn documents() -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    for folder in ["", "docs"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "md") {
                let text = fs::read_to_string(&path).unwrap();
                all.insert(path.strip_prefix(root()).unwrap().to_owned(), text);
            }
        }
    }
    assert!(all.contains_key(Path::new("README.md")) && all.len() > 5, "the documents were found");
    all
}

/// The lines of a document, and whether each is code: in a fence, or indented by four spaces.
fn lines(text: &str) -> Vec<(bool, &str)> {
    let mut fence = false;
    let mut all = Vec::new();
    for line in text.lines() {
        let mark = line.trim_start().starts_with("```");
        fence ^= mark;
        if !mark {
            all.push((fence || line.starts_with("    "), line));
        }
    }
    all
}

/// The anchors of a document's headings, as code hosts make them.
pub(crate) fn anchors(text: &str) -> Vec<String> {
    lines(text)
        .into_iter()
        .filter(|(code, line)| !code && line.starts_with('#'))
        .map(|(_, line)| anchor(line))
        .collect()
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The lines of a document's contents list as they should be, and as they are: the list before the first section.
fn contents(text: &str) -> (Vec<String>, Vec<String>) {
    let all: Vec<&str> = lines(text).into_iter().filter(|(code, _)| !code).map(|(_, line)| line).collect();
    let sections = all.iter().filter(|line| line.starts_with("## "));
    let expected = sections.map(|line| format!("- [{}](#{})", line.trim_start_matches('#').trim(), anchor(line)));
    let head = all.iter().take_while(|line| !line.starts_with("## "));
    let listed = head.filter(|line| line.starts_with("- [") && line.contains("](#")).map(|line| (*line).to_owned());
    (expected.collect(), listed.collect())
}

/// Why a link does not resolve, or `None` if it does.
fn broken(documents: &BTreeMap<PathBuf, String>, from: &Path, link: &str) -> Option<String> {
    if link.starts_with("https://") || link.starts_with("http://") {
        return None;
    }
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let folder = from.parent().unwrap_or(Path::new(""));
    let target = match path {
        "" => from.to_owned(),
        path => folder.join(path).components().fold(PathBuf::new(), |mut all, part| {
            match part {
                std::path::Component::ParentDir => drop(all.pop()),
                part => all.push(part),
            }
            all
        }),
    };
    if !root().join(&target).exists() {
        return Some(format!("{}: {link}: there is no {}", from.display(), target.display()));
    }
    let known = documents.get(&target).is_none_or(|text| anchors(text).iter().any(|known| known == anchor));
    (!anchor.is_empty() && !known).then(|| format!("{}: {link}: no such heading", from.display()))
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (from, text) in &documents {
        for (code, line) in lines(text) {
            for rest in line.split("](").skip(1).filter(|_| !code) {
                let link = rest.split([')', ' ']).next().unwrap();
                seen += 1;
                wrong.extend(broken(&documents, from, link));
            }
        }
    }
    assert!(seen > 10, "the links were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
    for bad in ["docs/none.md", "#none", "docs/glossary.md#none", "../outside.md"] {
        assert!(broken(&documents, Path::new("README.md"), bad).is_some(), "{bad} is seen");
    }
}

#[test]
fn lists_of_contents_name_every_section() {
    let mut seen = 0;
    for (path, text) in documents() {
        let (expected, listed) = contents(&text);
        if !listed.is_empty() {
            seen += 1;
            assert_eq!(listed, expected, "{}: the list of contents and the sections", path.display());
        }
    }
    assert!(seen > 5, "the lists were found");
    let (expected, listed) = contents("- [A b?](#a-b)\n\n## A b?\n\n## C\n- [d](#d)\n");
    assert_eq!((expected.len(), listed), (2, vec!["- [A b?](#a-b)".to_owned()]), "one that is left out is seen");
}

#[test]
fn files_that_are_named_exist() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (from, text) in documents() {
        // It describes past versions, whose files may be gone.
        if from == Path::new("CHANGELOG.md") {
            continue;
        }
        for (_, line) in lines(&text) {
            for name in line.split('`').skip(1).step_by(2).filter(|name| !name.contains([' ', '<', '*', '…', '$'])) {
                let is_file = [".rs", ".md", ".proto"].iter().any(|end| name.ends_with(end));
                let is_script = name.starts_with("scripts/") || name.starts_with("daemonset/");
                if !is_file && !is_script || !name.contains('/') {
                    continue;
                }
                seen += 1;
                let places = ["", "src", "src/connection", "tests", "tests/node"];
                if !places.iter().any(|place| root().join(place).join(name).exists()) {
                    wrong.push(format!("{}: {name}", from.display()));
                }
            }
        }
    }
    assert!(seen > 20, "the names were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The commands in a document: lines of code without prompt and remark. Lines that end with a backslash are joined.
fn commands(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut begun = String::new();
    for (_, line) in lines(text).into_iter().filter(|(code, _)| *code) {
        let line = line.trim().trim_start_matches("$ ");
        let line = line.split(" #").next().unwrap().trim();
        match line.strip_suffix('\\') {
            Some(line) => begun = format!("{begun}{line} "),
            None => all.push(std::mem::take(&mut begun) + line),
        }
    }
    all
}

/// Whether the real command line accepts these arguments.
fn understood(arguments: &[&str]) -> Result<(), String> {
    // Arguments before `--help` are parsed first, so unknown ones are refused.
    let output =
        Command::new(env!("CARGO_BIN_EXE_culvert")).args(arguments).arg("--help").env_clear().output().unwrap();
    output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn commands_of_culvert_are_understood() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (from, text) in documents() {
        for command in commands(&text) {
            let ours =
                command.strip_prefix("culvert ").or_else(|| command.split_once("-- culvert ").map(|(_, rest)| rest));
            let Some(ours) = ours else { continue };
            let end = ours.find(['|', '>', ';', '&']).unwrap_or(ours.len());
            seen += 1;
            let arguments: Vec<&str> = ours[..end].split_whitespace().collect();
            if let Err(error) = understood(&arguments) {
                wrong.push(format!("{}: {command}: {error}", from.display()));
            }
        }
    }
    assert!(seen > 5, "the commands were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        understood(&["doctor", "--none"]).is_err() && understood(&["none"]).is_err(),
        "what is not known is refused"
    );
}

#[test]
fn commands_of_the_repository_exist() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (from, text) in documents() {
        for command in commands(&text) {
            let words: Vec<&str> = command.split_whitespace().collect();
            // For kubectl `daemonset/ztunnel` is an object, unless an option asks for a file.
            let kubectl = command.contains("kubectl ");
            for (before, word) in std::iter::once(&"").chain(&words).zip(&words) {
                let path = ["scripts/", "daemonset/", ".ci/"].iter().any(|place| word.starts_with(place));
                if !path || kubectl && !matches!(*before, "-f" | "-k" | "apply" | "delete") {
                    continue;
                }
                seen += 1;
                if !root().join(word).exists() {
                    wrong.push(format!("{}: {command}: there is no {word}", from.display()));
                }
            }
        }
    }
    assert!(seen > 5, "the commands were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
