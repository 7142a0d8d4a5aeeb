//! The terminal of `culvert top`. It is restored when the program ends, also by an error or a panic.

use super::flows::{Flow, Order, sort};
use super::look::{HEAD, Look, Looks, cells};
use crate::inspect::Outcome;
use crate::task::thread::run_blocking;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Row, Table, TableState};
use ratatui::{DefaultTerminal, Frame};
use std::io;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

/// How long one wait for a key may last. It is also how long the end of the program waits for it.
const KEY_WAIT: Duration = Duration::from_millis(200);

/// What the keys do.
const KEYS: &str = "q quit   sort: r rate  b bytes  c connections  t connect time  p pod   arrows, PageUp, PageDown: move   space: pause";

/// Restores the terminal when it is dropped.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// What is shown.
struct Shown {
    look: Option<Look>,
    order: Order,
    table: TableState,
    paused: bool,
    at: Instant,
}

/// Shows flows until the user ends it.
pub(super) async fn show(looks: &mut Looks<'_>, interval: Duration, order: Order) -> io::Result<Outcome> {
    // Before the first change of the terminal, of which a later one may fail.
    let _restored = Restored;
    let mut terminal = ratatui::try_init()?;
    let mut shown = Shown { look: None, order, table: TableState::default(), paused: false, at: Instant::now() };
    let mut keys = Box::pin(run_blocking(next_event));
    let (mut ended, mut hung_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    loop {
        let due = shown.at;
        let paused = shown.paused;
        let mut next = Box::pin(async {
            if paused {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep_until(due).await;
            looks.next().await
        });
        // The keyboard works while daemons are asked.
        let look = loop {
            draw(&mut terminal, &mut shown)?;
            tokio::select! {
                look = &mut next => break Some(look),
                _ = ended.recv() => return Ok(Outcome::Green),
                _ = hung_up.recv() => return Ok(Outcome::Green),
                event = &mut keys => {
                    keys = Box::pin(run_blocking(next_event));
                    let Some(event) = event.unwrap_or_else(|| Err(io::ErrorKind::Other.into()))? else { continue };
                    if !shown.handle(&event) {
                        return Ok(shown.look.map_or(Outcome::Green, |look| look.outcome));
                    }
                    if shown.paused != paused {
                        break None;
                    }
                }
            }
        };
        drop(next);
        if let Some(look) = look {
            shown.look = Some(look);
            shown.at = Instant::now() + interval;
        }
    }
}

/// Waits a moment for an event of the terminal.
fn next_event() -> io::Result<Option<Event>> {
    if event::poll(KEY_WAIT)? { event::read().map(Some) } else { Ok(None) }
}

impl Shown {
    /// Does what a key asks for. Returns false if it ends the program.
    fn handle(&mut self, event: &Event) -> bool {
        let Event::Key(key) = event else { return true };
        if key.kind == KeyEventKind::Release {
            return true;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('r') => self.order = Order::Rate,
            KeyCode::Char('b') => self.order = Order::Bytes,
            KeyCode::Char('c') => self.order = Order::Connections,
            KeyCode::Char('t') => self.order = Order::Connect,
            KeyCode::Char('p') => self.order = Order::Pod,
            KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Down | KeyCode::Char('j') => self.table.select_next(),
            KeyCode::Up | KeyCode::Char('k') => self.table.select_previous(),
            KeyCode::PageDown => self.table.scroll_down_by(10),
            KeyCode::PageUp => self.table.scroll_up_by(10),
            KeyCode::Home => self.table.select_first(),
            KeyCode::End => self.table.select_last(),
            _ => {}
        }
        true
    }
}

fn draw(terminal: &mut DefaultTerminal, shown: &mut Shown) -> io::Result<()> {
    if let Some(look) = &mut shown.look {
        sort(&mut look.flows, shown.order);
    }
    terminal.draw(|frame| paint(frame, shown)).map(drop)
}

fn paint(frame: &mut Frame<'_>, shown: &mut Shown) {
    let silent = shown.look.as_ref().map_or(0, |look| look.silent.len()).min(5);
    let below = u16::try_from(silent).unwrap_or(5);
    let [top, middle, last, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(below),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let title = match &shown.look {
        None => "culvert top: asking the daemons".to_owned(),
        Some(look) => {
            let open: u64 = look.flows.iter().map(|flow| flow.connections).sum();
            let by = match shown.order {
                Order::Rate => "rate",
                Order::Bytes => "bytes",
                Order::Connections => "connections",
                Order::Connect => "connect time",
                Order::Pod => "pod",
            };
            let paused = if shown.paused { ", paused" } else { "" };
            format!("culvert top: {} flows, {open} connections, by {by}{paused}", look.flows.len())
        }
    };
    frame.render_widget(Line::from(title).style(Style::new().add_modifier(Modifier::BOLD)), top);
    if let Some(look) = &shown.look {
        let table = table(&look.flows);
        frame.render_stateful_widget(table, middle, &mut shown.table);
        let lines: Vec<Line<'_>> = look.silent.iter().take(silent).map(|said| Line::from(said.as_str())).collect();
        for (line, row) in lines.into_iter().zip(last.rows()) {
            frame.render_widget(line.style(Style::new().fg(Color::Red)), row);
        }
    }
    frame.render_widget(Line::from(KEYS).style(Style::new().add_modifier(Modifier::DIM)), keys);
}

fn table(flows: &[Flow]) -> Table<'static> {
    let rows: Vec<[String; 11]> = flows.iter().map(cells).collect();
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        let head = HEAD.get(at).map_or(0, |head| head.len());
        u16::try_from(cells.max().unwrap_or(0).max(head)).unwrap_or(u16::MAX)
    };
    let widths: Vec<Constraint> = (0..HEAD.len()).map(|at| Constraint::Max(width(at))).collect();
    let row = |(flow, cells): (&Flow, [String; 11])| {
        let row = Row::new(cells.map(Cell::from));
        // The word says it too, for those who do not see the colour.
        if flow.protection == "PLAINTEXT" { row.style(Style::new().fg(Color::Yellow)) } else { row }
    };
    let head = Row::new(HEAD).style(Style::new().add_modifier(Modifier::BOLD));
    Table::new(flows.iter().zip(rows).map(row), widths)
        .header(head)
        .column_spacing(2)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::KeyEvent;

    fn shown() -> Shown {
        let flow = Flow {
            node: "n1".into(),
            pod: "shop/front".into(),
            is_outbound: true,
            far: "web.shop".into(),
            protection: "PLAINTEXT".into(),
            connections: 7,
            ..Flow::default()
        };
        let look = Look { flows: vec![flow], silent: vec!["n2: no answer".into()], outcome: Outcome::Red };
        Shown { look: Some(look), order: Order::Rate, table: TableState::default(), paused: false, at: Instant::now() }
    }

    #[test]
    fn the_screen_shows_flows_silent_nodes_and_keys() {
        let mut terminal = Terminal::new(TestBackend::new(160, 8)).unwrap();
        let mut shown = shown();
        terminal.draw(|frame| paint(frame, &mut shown)).unwrap();
        let text: Vec<String> = terminal
            .backend()
            .buffer()
            .content()
            .chunks(160)
            .map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect::<String>())
            .collect();
        assert!(text[0].starts_with("culvert top: 1 flows, 7 connections, by rate"), "{text:?}");
        assert!(
            text[2].contains("shop/front") && text[2].contains("web.shop") && text[2].contains("PLAINTEXT"),
            "{text:?}"
        );
        assert!(text[6].starts_with("n2: no answer") && text[7].starts_with("q quit"), "{text:?}");
    }

    #[test]
    fn keys_sort_pause_and_end() {
        let mut shown = shown();
        let press = |code| Event::Key(KeyEvent::new(code, KeyModifiers::NONE));
        for (key, order) in [('b', Order::Bytes), ('c', Order::Connections), ('t', Order::Connect), ('p', Order::Pod)] {
            assert!(shown.handle(&press(KeyCode::Char(key))) && shown.order == order, "{key}");
        }
        assert!(shown.handle(&press(KeyCode::Char(' '))) && shown.paused);
        assert!(!shown.handle(&press(KeyCode::Char('q'))) && !shown.handle(&press(KeyCode::Esc)));
        let interrupt = Event::Key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!shown.handle(&interrupt));
    }
}
