"use strict";
// What the nodes say, kept up to date by server-sent events. Whoever shows a section is called when it has changed.

const store = { at: 0, leftOut: {}, nodes: new Map(), flows: new Map(), connections: new Map(), traffic: new Map() };
for (const section of ["history", "pods", "certificates"]) store[section] = new Map();

const views = []; // {sections, show}
const stale = new Set(); // sections that have changed since they were shown
let paused = false;
let heard = 0;
const LOST_AFTER = 15000; // ms: three beats of the feed, however long the next picture takes

const id = (name) => document.getElementById(name);

// A new element. Texts go in as text and never as markup, because names are what others have written.
function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name === "class") made.className = value;
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (count >= 1024 && unit + 1 < units.length) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 || count >= 100 ? Math.floor(count) : (Math.floor(count * 10) / 10).toFixed(1)} ${units[unit]}`;
}

// A duration in seconds for people: its two largest units.
function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]];
  let left = Math.max(0, Math.floor(seconds));
  const largest = units.findIndex(([length]) => left >= length);
  const words = [];
  for (const [length, unit] of units.slice(largest < 0 ? 3 : largest).slice(0, 2)) {
    words.push(`${Math.floor(left / length)}${unit}`);
    left %= length;
  }
  return words.join(" ");
}

const ways = { encrypted: "● encrypted", plaintext: "△ plaintext", refused: "✕ refused" };
const way = (row) => (row.encrypted ? "encrypted" : "plaintext");

// Says something to those who do not see the page, at most once in a while.
let saidAt = 0;
let toSay = "";
function say(text) {
  toSay = text;
  const wait = Math.max(0, saidAt + 5000 - Date.now());
  setTimeout(() => {
    if (!toSay) return;
    id("said").textContent = toSay;
    saidAt = Date.now();
    toSay = "";
  }, wait);
}

function show(section) {
  stale.add(section);
}

function showAll() {
  if (paused || document.hidden) return;
  const changed = new Set(stale);
  stale.clear();
  for (const view of views) if (view.sections.some((section) => changed.has(section))) view.show();
}

function take(change, whole) {
  store.at = change.at;
  store.leftOut = change.leftOut ?? {};
  if (whole) {
    for (const rows of Object.values(store)) {
      if (rows instanceof Map) rows.clear();
    }
  }
  for (const [section, rows] of Object.entries(change.set ?? {})) {
    for (const [key, row] of Object.entries(rows)) store[section]?.set(key, row);
    show(section);
  }
  for (const [section, keys] of Object.entries(change.gone ?? {})) {
    for (const key of keys) store[section]?.delete(key);
    show(section);
  }
  show("time");
  if (whole) for (const section of Object.keys(store)) show(section);
  heard = Date.now();
  document.body.classList.add("live");
  showAll();
}

function feedState() {
  const lost = heard > 0 && Date.now() - heard > LOST_AFTER;
  id("feed").classList.toggle("lost", lost);
  const before = id("feed-state").textContent;
  const state = lost ? "✕ no news since" : paused ? "paused at" : heard > 0 ? "● live," : "connecting;";
  if (state !== before) {
    id("feed-state").textContent = state;
    if (lost) say("The page gets no news from the daemon.");
    else if (before.startsWith("✕")) say("The page gets news again.");
  }
}

// Only while the page is in sight: a browser opens few connections to one port, and others want to listen too.
let source = null;
function listen() {
  if (source || document.hidden) return;
  source = new EventSource("/events");
  source.addEventListener("whole", (event) => take(JSON.parse(event.data), true));
  source.addEventListener("change", (event) => take(JSON.parse(event.data), false));
  // Sent while the next picture takes long, as where a node does not answer.
  source.addEventListener("alive", () => {
    heard = Date.now();
    feedState();
  });
  // The browser tries again by itself after a break, but not after an answer that is an error.
  source.addEventListener("error", () => {
    if (source?.readyState !== EventSource.CLOSED) return;
    source = null;
    setTimeout(listen, 3000);
  });
}

function inSight() {
  if (document.hidden) {
    source?.close();
    source = null;
  } else {
    heard = Date.now();
    listen();
    showAll();
  }
}

views.push({
  sections: ["time"],
  show() {
    id("feed-time").textContent = new Date(store.at * 1000).toLocaleTimeString([], { hour12: false });
    feedState();
  },
});

function start() {
  const pause = id("pause");
  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Resume" : "Pause";
    feedState();
    showAll();
  });
  document.addEventListener("visibilitychange", inSight);
  setInterval(feedState, 1000);
  listen();
}
