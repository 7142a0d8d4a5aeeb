//! Texts that others have written, for a terminal: names of pods and policies, and what a daemon, a kubelet or the
//! Kubernetes API says.

/// Whether a character is not shown as itself: it controls the terminal, is invisible, or reorders what follows it.
pub fn is_unseen(c: char) -> bool {
    let is_mark = matches!(
        c,
        '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
    );
    c.is_control() || is_mark
}

/// One line of text, with a question mark in place of each character that is not shown as itself.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unseen(c) { '?' } else { c }).collect()
}

/// The same for a text whose lines stay lines.
pub fn printable_lines(text: &str) -> String {
    text.chars().map(|c| if is_unseen(c) && c != '\n' { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_controls_a_terminal_or_reorders_what_follows() {
        let text = "a\u{1b}[31mb\u{9b}1m\r\u{202e}c\u{2066}d\u{200b}\u{2028}é→\n\te";
        assert_eq!(printable(text), "a?[31mb?1m??c?d??é→??e");
        assert_eq!(printable_lines(text), "a?[31mb?1m??c?d??é→\n?e");
    }
}
