//! What of an object is not enforced as it is written: collected while it is converted, for its status. Pure.

/// Most notes that are repeated; the others are counted.
const SHOWN: usize = 8;
/// Longest note, in characters.
const LENGTH: usize = 240;

/// Notes on one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    shown: Vec<String>,
    more: usize,
    differs: bool,
    /// Whether something can never match; it is enforced as written all the same.
    impossible: bool,
}

impl Notes {
    /// Something is enforced in another way than it is written.
    pub fn differs(&mut self, note: impl FnOnce() -> String) {
        self.differs = true;
        self.add(note);
    }

    /// Something can never match.
    pub fn impossible(&mut self, note: impl FnOnce() -> String) {
        self.impossible = true;
        self.add(note);
    }

    /// Whether something is enforced in another way than it is written.
    pub fn is_different(&self) -> bool {
        self.differs
    }

    /// Whether something can never match.
    pub fn has_impossible(&self) -> bool {
        self.impossible
    }

    /// The notes as one text.
    pub fn text(&self) -> String {
        let mut text = self.shown.join("; ");
        if self.more > 0 {
            text.push_str(&format!("; and {} more", self.more));
        }
        text
    }

    fn add(&mut self, note: impl FnOnce() -> String) {
        if self.shown.len() >= SHOWN {
            self.more += 1;
            return;
        }
        let mut note = note();
        if let Some((end, _)) = note.char_indices().nth(LENGTH) {
            note.truncate(end);
            note.push('…');
        }
        self.shown.push(note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_few_and_short_and_the_others_are_counted() {
        let mut notes = Notes::default();
        (0..10).for_each(|n| notes.differs(|| format!("{n}{}", "ä".repeat(300))));
        assert!(notes.is_different() && !notes.has_impossible());
        assert!(notes.text().ends_with("…; and 2 more") && notes.text().len() < 4100, "{}", notes.text().len());
        notes.impossible(|| unreachable!("there is no room for it"));
        assert!(notes.has_impossible());
    }
}
