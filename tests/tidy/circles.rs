//! The files of a module form no circles: if a file uses another one, directly or through others, that one does not use it.
//!
//! An item taken from a folder's `mod.rs` is an edge to `mod.rs`, unless `mod.rs` only re-exports it from a file. A
//! declaration (`mod x;`) or a re-export (`pub use x::Y;`) is not an edge from `mod.rs`; every other use of a file is.

use std::collections::{BTreeMap, BTreeSet};

/// A module's path below `crate`, such as `["node", "zds"]`.
type Module = Vec<String>;

/// The files of a source tree, and their re-exports.
struct Tree {
    /// File of each module.
    files: BTreeMap<Module, String>,
    /// Re-exports by `pub use`: module and name, and the path that the name stands for.
    exports: BTreeMap<(Module, String), Vec<String>>,
}

#[test]
fn no_circles_between_the_files_of_a_module() {
    let circles = circles(&crate::sources());
    assert!(circles.is_empty(), "move what both need into a file of its own: {circles:#?}");
}

#[test]
fn circles_are_found_however_a_file_names_another() {
    let tree = |pairs: &[(&str, &str)]| pairs.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
    let cases: [(&[(&str, &str)], usize); 7] = [
        (&[("a/mod.rs", "mod b; mod c;"), ("a/b.rs", "use super::c::X;"), ("a/c.rs", "fn f() { super::b::g() }")], 1),
        (&[("a/mod.rs", "mod b; fn f() { b::g() }"), ("a/b.rs", "use super::f;")], 1),
        (&[("a/mod.rs", "mod b; pub use b::{self, G};"), ("a/b.rs", "use super::Plain;")], 0),
        (
            &[("a/mod.rs", "mod b; mod c; pub use c::G;"), ("a/b.rs", "use super::G;"), ("a/c.rs", "use crate::a::b;")],
            1,
        ),
        (
            &[("a/mod.rs", "mod b; mod c;"), ("a/b.rs", "use super::{c::{self, X}, Y};"), ("a/c.rs", "// super::b::X")],
            0,
        ),
        (
            &[
                ("a/mod.rs", "mod d; mod e;"),
                ("a/d/mod.rs", "mod f;"),
                ("a/d/f.rs", "use crate::a::e::X;"),
                ("a/e.rs", "use super::d::f::Y;"),
            ],
            1,
        ),
        (&[("a/mod.rs", "mod b;"), ("a/b.rs", "use crate::z::X;"), ("z/mod.rs", "use crate::a::b;")], 0),
    ];
    for (files, expected) in cases {
        assert_eq!(circles(&tree(files)).len(), expected, "{files:?}");
    }
}

/// Groups of files of one module in which each file reaches all others.
fn circles(sources: &BTreeMap<String, String>) -> Vec<Vec<String>> {
    let tree = Tree::of(sources);
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, file) in &tree.files {
        let top = module.first();
        for path in named(&sources[file], &tree.children(module)) {
            let Some((target, other)) = tree.resolve(module, &path, 0) else { continue };
            if target.first() == top && other != file {
                edges.entry(file).or_default().insert(other);
            }
        }
    }
    let reaches = |from: &str, to: &str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(file) = open.pop() {
            for next in edges.get(file).into_iter().flatten() {
                if *next == to {
                    return true;
                }
                if seen.insert(*next) {
                    open.push(next);
                }
            }
        }
        false
    };
    let mut found: BTreeSet<Vec<String>> = BTreeSet::new();
    for file in edges.keys().filter(|file| reaches(file, file)) {
        let circle = edges.keys().filter(|other| reaches(file, other) && reaches(other, file));
        found.insert(circle.map(|file| (*file).to_owned()).collect());
    }
    found.into_iter().collect()
}

impl Tree {
    fn of(sources: &BTreeMap<String, String>) -> Self {
        let mut tree = Self { files: BTreeMap::new(), exports: BTreeMap::new() };
        for file in sources.keys() {
            let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
            let module = path.split('/').filter(|part| !matches!(*part, "lib" | "main")).map(str::to_owned).collect();
            tree.files.insert(module, file.clone());
        }
        for (module, file) in &tree.files {
            for (exported, path) in uses(&sources[file]) {
                let name = path.last().filter(|_| exported).cloned();
                if let Some(name) = name {
                    tree.exports.insert((module.clone(), name), path);
                }
            }
        }
        tree
    }

    /// Names of the modules below one.
    fn children(&self, module: &Module) -> Vec<String> {
        let below = self.files.keys().filter(|other| other.len() == module.len() + 1 && other.starts_with(module));
        below.filter_map(|other| other.last().cloned()).collect()
    }

    /// The module and file that a path leads to, seen from a module. `None` if it leads out of the tree.
    fn resolve(&self, from: &Module, path: &[String], depth: usize) -> Option<(Module, &str)> {
        let mut module = from.clone();
        let mut rest = path;
        let mut begun = false;
        while let [head, tail @ ..] = rest {
            match head.as_str() {
                "crate" if !begun => module.clear(),
                "self" => {}
                "super" => drop(module.pop()),
                name => {
                    let mut child = module.clone();
                    child.push(name.to_owned());
                    if !self.files.contains_key(&child) {
                        if !begun {
                            return None;
                        }
                        break;
                    }
                    module = child;
                }
            }
            begun = true;
            rest = tail;
        }
        let export = rest.first().and_then(|item| self.exports.get(&(module.clone(), item.clone())));
        if let Some(path) = export.filter(|_| depth < 4)
            && let Some(found) = self.resolve(&module, path, depth + 1)
        {
            return Some(found);
        }
        let file = self.files.get(&module)?;
        Some((module, file))
    }
}

/// The paths in a file that lead into the tree: its imports, and paths in its code. Re-exports do not count.
fn named(text: &str, children: &[String]) -> Vec<Vec<String>> {
    let mut all: Vec<Vec<String>> =
        uses(text).into_iter().filter(|(exported, _)| !exported).map(|(_, path)| path).collect();
    let mut rest = crate::code(text);
    while let Some((before, statement, after)) = next_use(&rest) {
        let _ = statement;
        rest = format!("{before}{after}");
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for word in rest.split(|c| !is_word(c)).filter(|word| word.contains("::")) {
        let path: Vec<String> = word.split("::").map(str::to_owned).collect();
        let head = path.first().map_or("", String::as_str);
        if matches!(head, "crate" | "self" | "super") || children.iter().any(|child| child == head) {
            all.push(path);
        }
    }
    all
}

/// The first `use`: the text before it, whether it is a re-export, what it imports, and the text after it.
fn next_use(code: &str) -> Option<(String, (bool, String), String)> {
    let mut from = 0;
    loop {
        let at = from + code.get(from..)?.find("use ")?;
        let before = &code[..at];
        let line = before.rsplit(['\n', ';', '}', '{']).next().unwrap_or_default().trim();
        if line.is_empty() || line.starts_with("pub") {
            let end = at + code[at..].find(';')?;
            let start = before.len() - before.rsplit(['\n', ';', '}', '{']).next().map_or(0, str::len);
            let statement = (line.starts_with("pub"), code[at + 4..end].to_owned());
            return Some((code[..start].to_owned(), statement, code[end + 1..].to_owned()));
        }
        from = at + 4;
    }
}

/// The imports of a file with braces expanded, and whether each is a re-export.
fn uses(text: &str) -> Vec<(bool, Vec<String>)> {
    let mut all = Vec::new();
    let mut rest = crate::code(text);
    while let Some((_, (exported, tree), after)) = next_use(&rest) {
        let tree: String = tree.split_whitespace().collect::<Vec<_>>().join(" ");
        all.extend(opened(&tree).into_iter().map(|path| (exported, path)));
        rest = after;
    }
    all
}

/// The paths of one import: `a::{b, c::{self, D as E}}` stands for `a::b`, `a::c` and `a::c::D`.
fn opened(tree: &str) -> Vec<Vec<String>> {
    let Some((head, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        let parts = path.split("::").map(|part| part.trim().to_owned());
        return vec![parts.enumerate().filter(|(at, part)| *at == 0 || part != "self").map(|(_, part)| part).collect()];
    };
    let group = group.trim_end().trim_end_matches('}');
    let (mut parts, mut depth, mut word) = (Vec::new(), 0, String::new());
    for c in group.chars() {
        match c {
            ',' if depth == 0 => parts.push(std::mem::take(&mut word)),
            c => {
                depth += match c {
                    '{' => 1,
                    '}' => -1,
                    _ => 0,
                };
                word.push(c);
            }
        }
    }
    parts.push(word);
    let parts = parts.into_iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| opened(&format!("{head}{}", part.trim()))).collect()
}
