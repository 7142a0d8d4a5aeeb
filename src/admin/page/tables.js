// The summary, the tables, the search, the details of a connection, and the explain form.

// Puts rows of cells into a table body and keeps the elements that are there, so that nothing moves without need. A
// cell is a text, or [text, class].
function fill(body, rows, none) {
  const shown = rows.length > 0 ? rows : [[[none, "soft"]]];
  while (body.rows.length > shown.length) body.deleteRow(-1);
  shown.forEach((cells, at) => {
    const row = body.rows[at] ?? body.insertRow();
    row.classList.toggle("none", rows.length === 0);
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((cell, column) => {
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      const there = row.cells[column] ?? row.appendChild(cellOf(column));
      if (there.textContent !== text) there.textContent = text;
      if (there.className !== kind) there.className = kind;
    });
    if (rows.length === 0) row.cells[0].colSpan = 20;
    else row.cells[0].removeAttribute("colspan");
  });
}

const cellOf = (column) => (column === 0 ? element("th", { scope: "row" }) : element("td"));

// Most rows of a table that is not scrolled in parts.
const ROWS_MAX = 500;
function table(name, sections, none, rows) {
  const view = () => {
    const all = rows();
    const shown = all.slice(0, ROWS_MAX);
    if (all.length > ROWS_MAX) shown.push([[`and ${all.length - ROWS_MAX} more`, "soft"]]);
    fill(id(`${name}-rows`), shown, none);
  };
  views.push({ sections, show: view });
}

const byText = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const party = ([namespace, name]) => (namespace ? `${namespace}/${name}` : name);
const clock = (text) => text.replace("T", " ").replace(/(\.\d+)?Z$/, " UTC");

table("flows", ["flows"], "Nothing flows.", () =>
  [...store.flows.values()].map((row) => [
    party(row.from),
    party(row.to),
    [ways[row.kind], row.kind],
    [String(row.connections), "num"],
    [bytes(row.sent), "num"],
    [bytes(row.received), "num"],
    row.reasons.join(", "),
  ]),
);

const newest = (kind) =>
  [...store.history].filter(([, row]) => row.kind === kind).sort(([a], [b]) => byText(b, a)).map(([, row]) => row);

table("refusals", ["history"], "No connection was refused or failed lately.", () =>
  newest("connection")
    .filter((row) => row.outcome !== "ok")
    .map((row) => [
      clock(row.time),
      row.from,
      row.to,
      [`✕ ${row.reason}`, "refused"],
      [row.rule || row.error, "wrap"],
      [row.next, "wrap"],
      `${row.node} ${row.direction}`,
    ]),
);

table("changes", ["history"], "Nothing has changed lately.", () =>
  newest("change").map((row) => [clock(row.time), row.what, row.subject, [row.text, "wrap"], row.node]),
);

const states = {
  failed: ["✕ failed", "bad"],
  pending: ["△ pending", "warn"],
  releasing: ["○ releasing", "soft"],
  captured: ["● captured", "good"],
};
const urgency = (row) => ["failed", "pending", "releasing", "captured"].indexOf(row.state);

table("pods", ["pods", "time"], "No pod is enrolled.", () =>
  [...store.pods.values()]
    .sort((a, b) => urgency(a) - urgency(b) || byText(a.pod, b.pod))
    .map((row) => [
      row.pod,
      states[row.state] ?? row.state,
      [row.since === null ? "" : span(store.at - row.since), "num"],
      row.node,
      [row.notes.join("; "), "wrap"],
    ]),
);

table("certificates", ["certificates", "time"], "No certificate is held.", () =>
  [...store.certificates.values()]
    .sort((a, b) => (a.until ?? 0) - (b.until ?? 0) || byText(a.identity, b.identity))
    .map((row) => {
      const left = row.until === null ? "none" : row.until > store.at ? span(row.until - store.at) : "ended";
      const good = row.state === "Available";
      const ends = row.until === null ? "" : clock(new Date(row.until * 1000).toISOString());
      const state = [`${good ? "●" : "✕"} ${row.state}`, good ? "good" : "bad"];
      return [row.identity, state, [left, "num"], ends, row.node, [row.error, "wrap"]];
    }),
);

table("nodes", ["nodes"], "No node is known.", () =>
  [...store.nodes].map(([name, row]) => {
    const state = !row.reachable
      ? ["✕ not reachable", "bad"]
      : row.ready
        ? ["● ready", "good"]
        : ["△ not ready", "warn"];
    const facts = row.current ? "current" : row.age !== null ? `${span(row.age)} old` : "unknown";
    const remarks = row.error || [...row.red, ...row.notes].join("; ");
    const open = row.open === null ? "" : String(row.open);
    return [name, state, row.version, facts, `${row.source} ${row.from}`, [open, "num"], [remarks, "wrap"]];
  }),
);

// The figures at the top, and what is wrong.
views.push({
  sections: ["nodes", "pods", "connections", "certificates", "time"],
  show() {
    const [nodes, pods] = [[...store.nodes.values()], [...store.pods.values()]];
    const up = nodes.filter((row) => row.reachable && row.ready).length;
    const captured = pods.filter((row) => row.state === "captured").length;
    const wanted = pods.filter((row) => row.state !== "releasing").length;
    let plain = 0;
    for (const row of store.connections.values()) plain += row.encrypted ? 0 : 1;
    const refused = nodes.reduce((sum, row) => sum + (row.failures ?? 0), 0);
    const ends = [...store.certificates.values()].map((row) => row.until).filter((until) => until !== null);
    const next = ends.length > 0 ? span(ends.reduce((a, b) => Math.min(a, b)) - store.at) : "–";
    const old = nodes.filter((row) => row.current === false);
    const age = old.reduce((most, row) => Math.max(most, row.age ?? 0), 0);
    const more = store.leftOut.connections ? ` (+${store.leftOut.connections} not listed)` : "";
    const figures = [
      [`${up} of ${nodes.length}`, up === nodes.length],
      [`${captured} of ${wanted}`, captured === wanted],
      [`${store.connections.size}${more}`, true],
      [String(plain), plain === 0],
      [String(refused), refused === 0],
      [next, true],
      [old.length === 0 ? "current" : `${span(age)} old`, old.length === 0],
    ];
    figures.forEach(([text, good], at) => {
      const figure = id("summary").children[at];
      figure.classList.toggle("warn", !good);
      const value = figure.querySelector("dd");
      if (value.textContent !== text) value.textContent = text;
    });
    attention();
  },
});

let wrong = "";
function attention() {
  const lines = [];
  for (const [name, row] of store.nodes) {
    if (!row.reachable) lines.push(`node ${name} cannot be reached: ${row.error}`);
    lines.push(...row.red.map((text) => `node ${name}: ${text}`));
  }
  for (const row of store.pods.values()) {
    if (row.state === "failed" || row.state === "pending")
      lines.push(`pod ${row.pod} is ${row.state}: ${row.notes.join("; ")}`);
  }
  const shown = lines.slice(0, 20);
  if (lines.length > 20) shown.push(`and ${lines.length - 20} more`);
  const all = shown.join("\n");
  if (all === wrong) return;
  if (wrong || all) say(lines.length === 0 ? "Nothing is wrong." : `${lines.length} things are wrong. ${lines[0]}`);
  wrong = all;
  id("attention").replaceChildren(...shown.map((text) => element("li", null, text)));
}

// The table of connections. Only the rows in sight exist.
const columns = [
  { name: "From", width: "13%", text: (row) => row.from, value: (row) => row.from },
  { name: "To", width: "13%", text: (row) => row.to, value: (row) => row.to },
  { name: "Way", width: "7.5rem", text: (row) => ways[way(row)], value: way, kind: way },
  { name: "Sent", width: "6rem", text: (row) => bytes(row.moved[0]), value: (row) => -row.moved[0], kind: () => "num" },
  { name: "Received", width: "6rem", text: (row) => bytes(row.moved[1]), value: (row) => -row.moved[1], kind: () => "num" },
  { name: "Age", width: "6.5rem", text: (row) => span(store.at - row.start), value: (row) => row.start, kind: () => "num" },
  { name: "Destination", width: "12rem", text: (row) => row.destination, value: (row) => row.destination },
  { name: "TLS", width: "14rem", text: (row) => row.tls.replace("TLSv1_", "1.").split(" ").slice(0, 2).join(" "), value: (row) => row.tls },
  { name: "Rule", width: "17%", text: (row) => row.rule, value: (row) => row.rule },
  { name: "Seen by", width: "11rem", text: (row) => `${row.node} ${row.direction}`, value: (row) => `${row.node} ${row.direction}` },
];
const list = { rows: [], sort: 0, down: false, active: null, height: 26, first: 0 };

function order() {
  const words = id("q").value.toLowerCase().split(/\s+/).filter(Boolean);
  const value = columns[list.sort].value;
  const all = [];
  for (const [key, row] of store.connections) {
    row.key = key;
    row.moved = store.traffic.get(key) ?? [0, 0];
    row.all ??= [key, ...Object.values(row), way(row)].join(" ").toLowerCase();
    if (words.every((word) => row.all.includes(word))) all.push(row);
  }
  const compare = (a, b) => {
    const [left, right] = [value(a), value(b)];
    return left < right ? -1 : left > right ? 1 : byText(a.key, b.key);
  };
  all.sort(list.down ? (a, b) => compare(b, a) : compare);
  list.rows = all;
  const found = `${all.length} of ${store.connections.size} connections`;
  if (id("found").textContent !== found) id("found").textContent = found;
  rowsInSight();
}

function rowsInSight() {
  const [view, body] = [id("connections-view"), id("connections-rows")];
  const head = view.querySelector("thead").offsetHeight;
  const room = Math.ceil((view.clientHeight - head) / list.height) + 1;
  const last = Math.max(0, list.rows.length - room);
  const first = Math.min(last, Math.floor(view.scrollTop / list.height));
  const shown = list.rows.slice(first, first + room + 1);
  const focused = body.contains(document.activeElement);
  if (!shown.some((row) => row.key === list.active) && !focused) list.active = shown[0]?.key ?? null;
  if (list.active === null || !store.connections.has(list.active)) list.active = shown[0]?.key ?? null;
  list.first = first;
  const cells = shown.map((row) => columns.map((column) => [column.text(row), column.kind?.(row) ?? ""]));
  const pads = [first, list.rows.length - first - shown.length].map((rows) => rows * list.height);
  for (const pad of body.querySelectorAll(".pad")) pad.remove();
  fill(body, cells, "No connection has all these words.");
  shown.forEach((row, at) => mark(body.rows[at], row, first + at));
  body.prepend(pad(pads[0]));
  body.append(pad(pads[1]));
  id("connections-table").setAttribute("aria-rowcount", String(list.rows.length + 1));
  if (focused) body.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
}

function pad(height) {
  const row = element("tr", { class: "pad", "aria-hidden": "true" }, element("td", { colSpan: columns.length }));
  row.firstChild.style.height = `${height}px`;
  row.hidden = height === 0;
  return row;
}

function mark(element, row, at) {
  element.dataset.key = row.key;
  element.tabIndex = row.key === list.active ? 0 : -1;
  element.setAttribute("aria-selected", String(row.key === detailed));
  element.setAttribute("aria-rowindex", String(at + 2));
}

function activate(at) {
  const bounded = Math.max(0, Math.min(list.rows.length - 1, at));
  const row = list.rows[bounded];
  if (!row) return;
  list.active = row.key;
  const view = id("connections-view");
  const [top, head] = [bounded * list.height, view.querySelector("thead").offsetHeight];
  if (top < view.scrollTop) view.scrollTop = top;
  const low = top + list.height - (view.clientHeight - head);
  if (low > view.scrollTop) view.scrollTop = low;
  rowsInSight();
  id("connections-rows").querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
}

function connectionKeys(event) {
  const at = list.rows.findIndex((row) => row.key === list.active);
  const page = Math.max(1, Math.floor(id("connections-view").clientHeight / list.height) - 2);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in moves) activate(at + moves[event.key]);
  else if (event.key === "Enter" || event.key === " ") detail(list.active, true);
  else if (event.key === "Escape") detail(null);
  else return;
  event.preventDefault();
}

let detailed = null;
function detail(key, move) {
  const row = store.connections.get(key);
  detailed = row ? key : null;
  const part = id("detail");
  part.hidden = !row;
  if (row) {
    const facts = {
      From: `${row.from} at ${row.source}`,
      "Source identity": row.sourceIdentity,
      To: `${row.to} at ${row.destination}`,
      Service: row.service,
      "Destination identity": row.destinationIdentity,
      Way: `${ways[way(row)]}, to ${row.actual}${row.authority ? `, asked for ${row.authority}` : ""}`,
      Gateway: row.gateway,
      TLS: row.tls,
      Rule: row.rule,
      Pod: row.pod,
      "Seen by": `${row.node}, ${row.direction}`,
    };
    const shown = Object.entries(facts).filter(([, text]) => text);
    const close = element("button", { type: "button" }, "Close");
    close.addEventListener("click", () => detail(null, true));
    const flows = element("button", { type: "button" }, `Flows of ${row.from}`);
    flows.addEventListener("click", () => look(row.from));
    part.replaceChildren(
      element("dl", null, ...shown.flatMap(([name, text]) => [element("dt", null, name), element("dd", null, text)])),
      flows,
      " ",
    );
    if (row.direction === "outbound" && row.pod) {
      const ask = element("button", { type: "button" }, "Explain it");
      ask.addEventListener("click", () => {
        id("from").value = row.pod;
        id("to").value = row.destination;
        id("explain-form").requestSubmit();
        id("answer").scrollIntoView({ block: "center" });
      });
      part.append(ask, " ");
    }
    part.append(close);
    part.onkeydown = (event) => event.key === "Escape" && detail(null, true);
    if (move) flows.focus();
  }
  rowsInSight();
  if (!row && move) id("connections-rows").querySelector('[tabindex="0"]')?.focus();
}

views.push({ sections: ["connections", "traffic", "time"], show: order });

function connectionTable() {
  const heads = id("connections-table").tHead.rows[0].cells;
  id("connections-table").setAttribute("role", "grid");
  columns.forEach((column, at) => {
    const button = element("button", { type: "button" }, column.name);
    heads[at].style.width = column.width;
    heads[at].replaceChildren(button);
    button.addEventListener("click", () => {
      list.down = list.sort === at ? !list.down : false;
      list.sort = at;
      for (const [other, head] of [...heads].entries()) {
        if (other === at) head.setAttribute("aria-sort", list.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      }
      id("connections-view").scrollTop = 0;
      order();
    });
  });
  heads[0].setAttribute("aria-sort", "ascending");
  id("connections-view").addEventListener("scroll", rowsInSight, { passive: true });
  addEventListener("resize", rowsInSight);
  const body = id("connections-rows");
  body.addEventListener("keydown", connectionKeys);
  body.addEventListener("click", (event) => {
    const key = event.target.closest("tr")?.dataset.key;
    if (!key) return;
    list.active = key;
    detail(key === detailed ? null : key);
  });
  id("pager").hidden = true;
  id("q").addEventListener("input", () => {
    id("connections-view").scrollTop = 0;
    order();
  });
  id("search").addEventListener("submit", (event) => {
    event.preventDefault();
    activate(0);
  });
  id("slash").hidden = false;
}

// The explain form.
views.push({
  sections: ["pods"],
  show() {
    const names = [...new Set([...store.pods.values()].filter((row) => row.state === "captured").map((row) => row.pod))];
    const known = id("podnames").children;
    if (names.length === known.length && names.every((name, at) => known[at].value === name)) return;
    id("podnames").replaceChildren(...names.map((name) => element("option", { value: name })));
  },
});

async function explain(event) {
  event.preventDefault();
  const question = new URLSearchParams({ from: id("from").value.trim(), to: id("to").value.trim() });
  const answer = element("div");
  try {
    const response = await fetch(`/explain?${question}`, { signal: AbortSignal.timeout(15000) });
    if (!response.ok) throw new Error((await response.text()).trim());
    const told = await response.json();
    const steps = told.steps.map((step) => {
      const details = step.details.map((text) => element("li", null, text));
      return element("li", null, element("b", null, step.about), `: ${step.text}`, element("ul", null, ...details));
    });
    const result = element("p", { class: told.reason ? "refused" : "good" }, `${told.reason ? "✕" : "●"} ${told.result}`);
    answer.append(`${told.from} to ${told.to}`, element("ol", null, ...steps), result);
  } catch (error) {
    answer.append(element("p", { class: "bad" }, `✕ ${error.message}`));
  }
  id("answer").replaceChildren(answer);
}

function tables() {
  connectionTable();
  id("explain-form").addEventListener("submit", explain);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    id("q").focus();
    id("q").select();
  });
}
