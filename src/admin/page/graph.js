// Flows as a graph: all workloads by namespace, or one workload between those that call it and those that it calls.
// What is encrypted, plaintext or refused differs by its line and its tip, not only by its colour.

const outside = "outside the mesh";
const kinds = ["encrypted", "plaintext", "refused"];
const graph = { focus: null, drawn: "", chips: new Map() };
const LINES_MAX = 60; // above this, lines lead from namespace to namespace
const SIDE_MAX = 40; // entries on one side of a workload
const ROW = 19;
const CHIP = 168;
const LOOP = 70; // room at the right for lines between boxes of one column

function draw(tag, properties, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties ?? {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function line(path, kind, weight, properties) {
  const width = (1 + Math.min(3, Math.log10(Math.max(1, weight)))).toFixed(1);
  const more = { d: path, class: `edge ${kind}`, "stroke-width": width, "marker-end": `url(#m-${kind})` };
  return draw("path", { ...more, ...properties });
}

// From the side of one box to the side of another, each {left, right, y}.
function curve(from, to, shift) {
  const [y1, y2] = [from.y + shift, to.y + shift];
  if (to.left > from.right) {
    const bend = Math.max(24, (to.left - from.right) / 2);
    return `M${from.right} ${y1}C${from.right + bend} ${y1} ${to.left - bend} ${y2} ${to.left - 2} ${y2}`;
  }
  if (to.right < from.left) {
    const bend = Math.max(24, (from.left - to.right) / 2);
    return `M${from.left} ${y1}C${from.left - bend} ${y1} ${to.right + bend} ${y2} ${to.right + 2} ${y2}`;
  }
  const side = Math.max(from.right, to.right);
  const bulge = side + 26 + Math.min(50, Math.abs(y2 - y1) / 6);
  return `M${from.right} ${y1}C${bulge} ${y1} ${bulge} ${y2} ${to.right + 2} ${y2}`;
}

function chip(name, label, at, properties) {
  const sum = { out: 0, in: 0 };
  for (const row of store.flows.values()) {
    if (party(row.from) === name) sum.out += row.connections;
    if (party(row.to) === name) sum.in += row.connections;
  }
  const said = `${name}: ${count(sum.out, "connection")} out, ${sum.in} in`;
  return draw(
    "g",
    { class: "chip", role: "button", tabindex: "-1", "data-name": name, "aria-label": said, ...properties },
    draw("title", null, said),
    draw("rect", { x: at.x, y: at.y, width: at.width, height: at.height ?? ROW - 1, rx: 3 }),
    draw("text", { x: at.x + 6, y: at.y + (at.height ?? ROW) / 2 + 4 }, label),
  );
}

// The namespaces with their workloads, callers before those that they call.
function namespaces(flows) {
  const all = new Map();
  const of = ([namespace, name]) => {
    const known = all.get(namespace || outside) ?? { names: new Set(), out: 0, in: 0, inside: 0 };
    known.names.add(name);
    all.set(namespace || outside, known);
    return known;
  };
  for (const row of flows) {
    const [from, to] = [of(row.from), of(row.to)];
    if (from === to) {
      from.inside += row.connections;
    } else {
      from.out += 1;
      to.in += 1;
    }
  }
  const score = ([, space]) => (space.out - space.in) / Math.max(1, space.out + space.in);
  return [...all].sort((a, b) => score(b) - score(a) || byText(a[0], b[0]));
}

// Places boxes in columns of about the same height.
function place(spaces, width) {
  const boxes = spaces.map(([title, { names }]) => {
    const across = names.size > 36 ? 3 : names.size > 10 ? 2 : 1;
    const height = Math.ceil(names.size / across) * ROW + 36;
    return { title, across, names: [...names].sort(byText), width: across * CHIP + 12, height };
  });
  const widest = Math.max(...boxes.map((box) => box.width));
  const room = width - 40 - LOOP;
  const columns = Math.max(1, Math.min(boxes.length, Math.floor((room + 80) / (widest + 80)), 5));
  const gap = columns > 1 ? Math.max(60, Math.min(180, (room - columns * widest) / (columns - 1))) : 60;
  const whole = boxes.reduce((sum, box) => sum + box.height + 18, 0);
  const most = Math.max(whole / columns, ...boxes.map((box) => box.height));
  let [column, y, bottom] = [0, 14, 0];
  for (const box of boxes) {
    if (y > 14 && y + box.height / 2 > most && column + 1 < columns) [column, y] = [column + 1, 14];
    box.column = column;
    box.x = 20 + column * (widest + gap);
    box.y = y;
    y += box.height + 18;
    bottom = Math.max(bottom, y);
  }
  return { boxes, width: Math.max(...boxes.map((box) => box.x + box.width)) + LOOP, height: bottom + 4 };
}

// Lines between namespaces, each with its own place on the sides of the boxes, in the order of the boxes at the other
// end, so that few of them cross.
function bundles(flows, boxes) {
  const of = new Map(boxes.map((box) => [box.title, box]));
  const all = new Map();
  for (const row of flows) {
    const [from, to] = [row.from, row.to].map(([namespace]) => of.get(namespace || outside));
    if (from === to) continue;
    const key = `${from.title}\t${to.title}\t${row.kind}`;
    const bundle = all.get(key) ?? { from, to, kind: row.kind, connections: 0 };
    bundle.connections += row.connections;
    all.set(key, bundle);
  }
  const sides = new Map();
  for (const bundle of all.values()) {
    const { from, to } = bundle;
    const ends = from.column < to.column ? ["right", "left"] : from.column > to.column ? ["left", "right"] : ["right", "right"];
    for (const [end, box, other, side] of [["start", from, to, ends[0]], ["end", to, from, ends[1]]]) {
      const key = `${box.title}\t${side}`;
      if (!sides.has(key)) sides.set(key, { box, at: [] });
      sides.get(key).at.push({ bundle, end, other, side });
    }
  }
  for (const { box, at } of sides.values()) {
    const middle = ({ other }) => other.y + other.height / 2;
    at.sort((a, b) => middle(a) - middle(b) || kinds.indexOf(a.bundle.kind) - kinds.indexOf(b.bundle.kind));
    const step = Math.min(12, (box.height - 20) / at.length);
    const top = box.y + box.height / 2 - (step * (at.length - 1)) / 2;
    at.forEach(({ bundle, end }, place) => {
      bundle[end] = { left: box.x, right: box.x + box.width, y: top + place * step };
    });
  }
  return [...all.values()].sort((a, b) => kinds.indexOf(a.kind) - kinds.indexOf(b.kind));
}

function overview(flows, width) {
  const spaces = namespaces(flows);
  const plan = place(spaces, width);
  const [lines, chips, near] = [draw("g", { class: "lines" }), draw("g"), draw("g")];
  const ends = new Map();
  for (const box of plan.boxes) {
    const { inside } = spaces.find(([title]) => title === box.title)[1];
    const about = `${box.names.length}${inside ? `, ${inside} inside` : ""}`;
    const title = draw("text", { class: "title", x: box.x + 12, y: box.y + 18 }, short(box.title, 20 * box.across + 2));
    title.append(draw("tspan", { class: "soft", dx: 6 }, about), draw("title", null, box.title));
    const { x, y, width, height } = box;
    chips.append(draw("rect", { class: "box", x, y, width, height, rx: 5 }), title);
    box.names.forEach((name, at) => {
      const full = box.title === outside ? name : `${box.title}/${name}`;
      const [left, top] = [x + 6 + (at % box.across) * CHIP, y + 29 + Math.floor(at / box.across) * ROW];
      chips.append(chip(full, short(name, 24), { x: left, y: top, width: CHIP - 2 }));
      ends.set(full, { left: x, right: x + width, y: top + ROW / 2 });
    });
  }
  const single = flows.length <= LINES_MAX;
  for (const row of single ? flows : []) {
    const [from, to] = [party(row.from), party(row.to)];
    const path = curve(ends.get(from), ends.get(to), (kinds.indexOf(row.kind) - 1) * 4);
    if (from !== to) lines.append(line(path, row.kind, row.connections));
  }
  for (const { start, end, kind, connections } of single ? [] : bundles(flows, plan.boxes))
    lines.append(line(curve(start, end, 0), kind, connections));
  const about = `${count(ends.size, "workload")} in ${count(plan.boxes.length, "namespace")}`;
  const picture = svg(plan, `Flows of ${about}. Arrow keys move between workloads, Enter shows one.`);
  picture.append(lines, chips, near);
  // The lines of the workload that is pointed at or has the focus.
  const only = (target) => {
    const name = target?.closest?.(".chip")?.dataset.name;
    near.replaceChildren();
    picture.classList.toggle("quiet", Boolean(name));
    const others = new Set();
    for (const row of name ? store.flows.values() : []) {
      const [from, to] = [party(row.from), party(row.to)];
      if ((from !== name && to !== name) || !ends.has(from) || !ends.has(to)) continue;
      others.add(from).add(to);
      const path = curve(ends.get(from), ends.get(to), (kinds.indexOf(row.kind) - 1) * 4);
      if (from !== to) near.append(line(path, row.kind, row.connections));
    }
    for (const one of picture.querySelectorAll(".chip")) one.classList.toggle("near", others.has(one.dataset.name));
  };
  picture.addEventListener("mouseover", (event) => only(event.target));
  picture.addEventListener("mouseleave", () => only(null));
  picture.addEventListener("focusin", (event) => only(event.target));
  picture.addEventListener("focusout", (event) => only(event.relatedTarget));
  return picture;
}

// One workload: callers at the left, those that it calls at the right.
function neighbours(flows, name, width) {
  const far = (end) => (a, b) => byText(party(a[end]), party(b[end])) || byText(a.kind, b.kind);
  const callers = flows.filter((row) => party(row.to) === name).sort(far("from"));
  const callees = flows.filter((row) => party(row.from) === name).sort(far("to"));
  const room = Math.max(1000, width);
  const [side, words, middle] = [Math.min(260, room * 0.19), 190, Math.min(240, room * 0.18)];
  const high = ROW + 4;
  const rows = Math.max(4, Math.min(SIDE_MAX + 1, Math.max(callers.length, callees.length)));
  const height = rows * high + 60;
  const center = 38 + (rows * high) / 2;
  const picture = svg({ width: room, height }, `Flows of ${name}. Arrow keys move between workloads, Enter shows one.`);
  const heads = [
    draw("text", { class: "soft", x: 26, y: 22 }, callers.length === 0 ? "Nobody calls it." : "Called by"),
    draw("text", { class: "soft", x: room - 20 - side + 6, y: 22 }, callees.length === 0 ? "It calls nobody." : "Calls"),
  ];
  picture.append(...heads);
  const own = { left: (room - middle) / 2, right: (room + middle) / 2 };
  for (const [list, end, x] of [[callers, "from", 20], [callees, "to", room - 20 - side]]) {
    const top = center - (Math.min(list.length, SIDE_MAX + 1) * high) / 2;
    const step = Math.min(7, 120 / Math.max(1, list.length));
    list.slice(0, SIDE_MAX).forEach((row, at) => {
      const y = top + at * high;
      const refused = `${row.connections} refused: ${row.reasons.join(", ")}`;
      const carried = `${row.connections} · ${bytes(row.sent)} ⇄ ${bytes(row.received)}`;
      const said = short(row.kind === "refused" ? refused : carried, 30);
      const near = { ...own, y: center + (at - (Math.min(list.length, SIDE_MAX) - 1) / 2) * step };
      const other = { left: x - words, right: x + side + words, y: y + ROW / 2 };
      const path = end === "from" ? curve(other, near, 0) : curve(near, other, 0);
      const label = end === "from" ? { x: other.right - 8, "text-anchor": "end" } : { x: other.left + 8 };
      picture.append(
        line(path, row.kind, row.connections),
        draw("text", { class: "soft", ...label, y: y + 13 }, said),
        chip(party(row[end]), short(party(row[end]), Math.floor(side / 7)), { x, y, width: side }),
      );
    });
    const more = list.length - SIDE_MAX;
    const at = { class: "soft", x: x + 6, y: top + SIDE_MAX * high + 13 };
    if (more > 0) picture.append(draw("text", at, `and ${more} more, in the table`));
  }
  // As high as the ends of the lines.
  const ends = Math.max(...[callers, callees].map(({ length }) => Math.min(length, SIDE_MAX) * Math.min(7, 120 / Math.max(1, length))));
  const tall = Math.max(ROW + 8, ends + 12);
  const at = { x: own.left, y: center - tall / 2, width: middle, height: tall };
  picture.append(chip(name, short(name, Math.floor(middle / 7)), at, { class: "chip center" }));
  return picture;
}

function svg({ width, height }, label) {
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  return draw("svg", { ...size, role: "group", "aria-label": label });
}

function showGraph() {
  const flows = [...store.flows.values()];
  const known = new Set(flows.flatMap((row) => [party(row.from), party(row.to)]));
  const names = [...known].sort(byText);
  const listed = id("workloads").children;
  if (names.length !== listed.length || names.some((name, at) => listed[at].value !== name))
    id("workloads").replaceChildren(...names.map((name) => element("option", { value: name })));
  const width = id("graph").clientWidth - 2;
  const shown = graph.focus === null ? flows : flows.filter((row) => [party(row.from), party(row.to)].includes(graph.focus));
  const rough = (row) => [party(row.from), party(row.to), row.kind, graph.focus === null ? Math.round(3 * Math.log10(row.connections)) : JSON.stringify(row)];
  const drawn = JSON.stringify([graph.focus, width, shown.map(rough)]);
  if (drawn === graph.drawn) return;
  graph.drawn = drawn;
  const part = id("graph");
  const held = part.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  id("unfocus").hidden = graph.focus === null;
  if (flows.length === 0) part.replaceChildren(element("p", null, "Nothing flows."));
  else part.replaceChildren(graph.focus === null ? overview(flows, width) : neighbours(flows, graph.focus, width));
  const chips = [...part.querySelectorAll(".chip")];
  const first = chips.find((one) => one.dataset.name === (held ?? graph.focus)) ?? chips[0];
  first?.setAttribute("tabindex", "0");
  if (held !== null) first?.focus({ preventScroll: true });
}

// Shows one workload, or all with null.
function look(name, keep) {
  const before = graph.focus;
  graph.focus = name;
  id("focus").value = name ?? "";
  showGraph();
  say(name === null ? "Flows of all workloads." : `Flows of ${name}.`);
  const chips = [...id("graph").querySelectorAll(".chip")];
  const at = chips.find((one) => one.dataset.name === (name ?? before)) ?? chips[0];
  if (!keep && at) reach(at, chips);
  id("flows").scrollIntoView({ block: "nearest" });
}

function reach(chip, chips) {
  for (const other of chips) other.setAttribute("tabindex", other === chip ? "0" : "-1");
  chip.focus();
}

function graphKeys(event) {
  const chips = [...id("graph").querySelectorAll(".chip")];
  const at = chips.indexOf(document.activeElement);
  if (event.key === "Escape" && graph.focus !== null) look(null);
  else if ((event.key === "Enter" || event.key === " ") && at >= 0) look(chips[at].dataset.name);
  else if (event.key in { ArrowDown: 1, ArrowUp: 1, ArrowLeft: 1, ArrowRight: 1 } && at >= 0) {
    const here = chips[at].getBoundingClientRect();
    const across = event.key === "ArrowLeft" || event.key === "ArrowRight";
    const sign = event.key === "ArrowDown" || event.key === "ArrowRight" ? 1 : -1;
    const distance = (chip) => {
      const there = chip.getBoundingClientRect();
      const [x, y] = [there.x - here.x, there.y - here.y];
      const [along, beside] = across ? [x, y] : [y, x];
      return along * sign > 1 ? along * sign + Math.abs(beside) * 3 : Infinity;
    };
    const nearest = chips.reduce((best, chip) => (distance(chip) < distance(best) ? chip : best));
    if (distance(nearest) < Infinity) reach(nearest, chips);
  } else return;
  event.preventDefault();
}

views.push({ sections: ["flows"], show: showGraph });

id("graph-part").hidden = false;
id("flows-details").open = false;
id("graph").addEventListener("keydown", graphKeys);
id("graph").addEventListener("click", (event) => {
  const name = event.target.closest(".chip")?.dataset.name;
  if (name) look(name);
});
id("graph-form").addEventListener("submit", (event) => event.preventDefault());
id("focus").addEventListener("change", () => {
  const name = id("focus").value.trim();
  if (name === "") look(null, true);
  else if ([...store.flows.values()].some((row) => [party(row.from), party(row.to)].includes(name))) look(name);
});
id("unfocus").addEventListener("click", () => look(null));
addEventListener("resize", showGraph);
tables();
start();
