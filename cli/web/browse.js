"use strict";
// The page of `pairmill browse`. Text from the dataset only ever becomes textContent or an attribute's value.

const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const whole = new Intl.NumberFormat("en");
const COLOURS = ["#e63946", "#1d78d8", "#16a05a", "#f58c14", "#8e44be", "#0096aa", "#d63384", "#787814", "#6052dc", "#b05428"];

let about = null;
let state = blank();
let rows = [];          // numbers of the rows in the grid, in order
let nextPage = null;
let keepable = 0;
let opened = null;      // the row whose page is open
let busy = false, again = false;

function blank() {
  return { q: "", see: "", like: null, features: null, twins: null, selection: null, sort: null, ranges: new Map(), only: new Map(), reasons: new Set() };
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter(c => c !== null));
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// ---- state and address

function toParams(one = state) {
  const params = new URLSearchParams();
  for (const name of ["q", "see", "like", "features", "twins", "selection", "sort"]) if (one[name] !== null && one[name] !== "") params.set(name, one[name]);
  for (const [column, [low, high]] of one.ranges) params.append("range", `${column}:${low ?? ""}:${high ?? ""}`);
  for (const [column, values] of one.only) for (const value of values) params.append("only", `${column}:${value}`);
  for (const reason of one.reasons) params.append("reason", reason);
  return params;
}

function fromAddress() {
  const params = new URLSearchParams(location.search);
  const one = blank();
  for (const name of ["q", "see"]) one[name] = params.get(name) ?? "";
  for (const name of ["like", "features", "twins", "selection", "sort"]) one[name] = params.get(name);
  for (const text of params.getAll("range")) {
    const parts = text.split(":"), high = parts.pop(), low = parts.pop();
    one.ranges.set(parts.join(":"), [bound(low), bound(high)]);
  }
  for (const text of params.getAll("only")) {
    const at = text.indexOf(":"), column = text.slice(0, at);
    if (!one.only.has(column)) one.only.set(column, new Set());
    one.only.get(column).add(text.slice(at + 1));
  }
  one.reasons = new Set(params.getAll("reason"));
  state = one;
  return params.get("row");
}

function bound(text) { return text === "" || text === undefined || !Number.isFinite(Number(text)) ? null : Number(text); }

function writeAddress(push = false) {
  const params = toParams();
  if (opened !== null) params.set("row", opened);
  const text = params.toString(), address = text ? `?${text}` : location.pathname;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

// ---- asking

async function ask(path, options) {
  const answer = await fetch(path, options);
  const value = await answer.json().catch(() => null);
  if (answer.ok) return value;
  throw new Error(value?.error ?? `The server answered ${answer.status}.`);
}

function tell(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// One query at a time; what changed meanwhile is asked when it is answered.
async function refresh() {
  writeAddress();
  drawChips();
  if (busy) { again = true; return; }
  busy = true;
  document.querySelector("main").classList.add("waiting");
  do {
    again = false;
    const params = toParams();
    params.set("counts", "1");
    for (const column of shownNumbers()) params.append("histogram", column);
    try {
      const found = await ask(`/api/rows?${params}`);
      tell(null);
      if (!again) show(found);
      else drawCounts(found);
    } catch (error) { tell(error); }
  } while (again);
  busy = false;
  document.querySelector("main").classList.remove("waiting");
}

function show(found) {
  rows = [];
  $("grid").replaceChildren();
  addCells(found);
  drawCounts(found);
  $("empty").hidden = found.total > 0;
}

function drawCounts(found) {
  keepable = found.keepable;
  $("count").textContent = found.total === about.rows ? `${whole.format(about.rows)} rows` : `${whole.format(found.total)} of ${whole.format(about.rows)} rows`;
  for (const [column, histogram] of Object.entries(found.counts.histograms)) sliders.get(column)?.update(histogram);
  for (const [column, values] of Object.entries(found.counts.facets)) drawFacet($("filters").querySelector(`[data-facet="${CSS.escape(column)}"]`), values, state.only.get(column), value => toggleOnly(column, value));
  drawFacet($("reasons"), found.counts.reasons, state.reasons, value => toggle(state.reasons, value));
}

async function more() {
  if (nextPage === null || busy) return;
  const params = toParams(), before = params.toString();
  params.set("after", nextPage);
  $("more").disabled = true;
  try {
    const found = await ask(`/api/rows?${params}`);
    if (toParams().toString() === before) addCells(found);
  } catch (error) { tell(error); }
  $("more").disabled = false;
}

// ---- the grid

function addCells(found) {
  for (const one of found.rows) {
    rows.push(one.number);
    $("grid").append(cell(one));
  }
  nextPage = found.next;
  $("more").hidden = nextPage === null;
  drawTurning();
}

function cell(one) {
  const picture = one.status === "success"
    ? make("img", { src: `/thumbnails/${one.number}`, alt: "", loading: "lazy", decoding: "async" })
    : make("span", { class: "status" }, one.status);
  const badge = one.value === null ? null : make("span", { class: "badge" }, short(one.value));
  const caption = one.caption ? make("p", { dir: "auto" }, one.caption) : make("p", { class: "none" }, "no caption");
  return make("a", { class: "cell", href: `?row=${one.number}`, "data-row": one.number, onclick: event => { if (!event.ctrlKey && !event.metaKey && !event.shiftKey) { event.preventDefault(); openRow(one.number, true); } } },
    make("div", { class: "frame" }, picture, badge), caption);
}

function short(value) { return Number.isInteger(value) ? whole.format(value) : String(Number(value.toPrecision(4))); }

// ---- filters

const sliders = new Map();

function shownNumbers() { return [...sliders.keys()].filter(column => sliders.get(column).element.closest("details").open); }

function groupOf(column) { const at = column.lastIndexOf("."); return at < 0 ? "pairs" : column.slice(0, at); }

function buildFilters() {
  const box = $("filters");
  box.replaceChildren();
  sliders.clear();
  box.append(facetGroup("status", "status", true));
  if (about.selections.length) box.append(selectionGroup());
  const groups = new Map();
  for (const column of about.numbers) groups.set(groupOf(column), [...(groups.get(groupOf(column)) ?? []), column]);
  const names = [...groups.keys()].sort((a, b) => (a === "pairs") - (b === "pairs"));
  for (const [at, name] of names.entries()) {
    const columns = groups.get(name), used = columns.some(c => state.ranges.has(c));
    const group = make("details", { class: "group", open: used || at === 0, ontoggle: () => group.open && refresh() }, make("summary", {}, name, " ", make("small", {}, String(columns.length))));
    for (const column of columns) { const slider = new Slider(column); sliders.set(column, slider); group.append(slider.element); }
    box.append(group);
  }
  for (const column of about.facets) if (column !== "status") box.append(facetGroup(column, column, state.only.has(column)));
  if (about.unfinished.length) box.append(make("p", { class: "value none" }, `unfinished: ${about.unfinished.join(", ")}`));
}

function facetGroup(column, title, open) {
  return make("details", { class: "group", open }, make("summary", {}, title), make("div", { class: "values", "data-facet": column }));
}

function selectionGroup() {
  const pick = make("select", { class: "pick", id: "selection", "aria-label": "Selection", onchange: () => { state.selection = pick.value || null; state.reasons = new Set(); refresh(); } },
    make("option", { value: "" }, "none"), ...about.selections.map(name => make("option", { value: name, selected: name === state.selection }, name)));
  return make("details", { class: "group", id: "selection-group", open: state.selection !== null }, make("summary", {}, "selection"), pick, make("div", { class: "values", id: "reasons" }));
}

function drawFacet(box, values, chosen, change) {
  if (!box) return;
  const known = new Map([...box.children].map(e => [e.dataset.value, e]));
  const shown = values.map(one => {
    const value = one.value ?? "";
    let row = known.get(value);
    if (!row) {
      const input = make("input", { type: "checkbox", onchange: () => change(value) });
      row = make("label", { class: "value", "data-value": value }, input, make("span", { title: value }, one.value ?? "none"), make("small", {}));
    }
    row.querySelector("input").checked = chosen?.has(value) ?? false;
    row.querySelector("small").textContent = whole.format(one.rows);
    row.classList.toggle("none", one.rows === 0);
    return row;
  });
  if (shown.length !== box.children.length || shown.some((row, i) => box.children[i] !== row)) box.replaceChildren(...shown);
}

function toggle(set, value) { if (!set.delete(value)) set.add(value); refresh(); }

function toggleOnly(column, value) {
  if (!state.only.has(column)) state.only.set(column, new Set());
  const set = state.only.get(column);
  if (!set.delete(value)) set.add(value);
  if (!set.size) state.only.delete(column);
  refresh();
}

class Slider {
  constructor(column) {
    this.column = column;
    this.facts = null;
    const name = groupOf(column) === "pairs" ? column : column.slice(column.lastIndexOf(".") + 1);
    this.note = make("small", {});
    this.chart = draw("svg", { viewBox: "0 0 480 44", preserveAspectRatio: "none", "aria-hidden": "true" });
    const end = what => make("input", { type: "range", min: 0, max: 1, step: 1, "aria-label": `${column}, ${what}`, disabled: true, oninput: () => this.slid(), "data-column": column });
    const number = what => make("input", { type: "number", step: "any", placeholder: what, "aria-label": `${column}, ${what}`, onchange: () => this.typed() });
    [this.low, this.high, this.from, this.to] = [end("least"), end("most"), number("min"), number("max")];
    this.element = make("div", { class: "slider" }, make("div", { class: "label" }, make("span", {}, name), this.note), this.chart,
      make("div", { class: "ends" }, this.low, this.high), make("div", { class: "numbers" }, this.from, this.to));
  }

  update(facts) {
    this.facts = facts;
    const bins = facts.all.length;
    if (!bins) { this.note.textContent = "no values"; return; }
    this.single = facts.whole && facts.edges[1] - facts.edges[0] === 1;
    this.steps = this.single ? bins : 200;
    for (const input of [this.low, this.high]) { input.disabled = false; input.max = this.steps; }
    this.note.textContent = facts.nulls ? `${whole.format(facts.nulls)} null` : "";
    this.place();
    this.drawBars();
  }

  drawBars() {
    const { all, now } = this.facts, high = Math.sqrt(Math.max(...all, 1)), wide = 480 / all.length;
    const bars = [];
    for (const [kind, counts] of [["all", all], ["now", now]]) counts.forEach((count, i) => {
      const tall = count ? Math.max(1.5, 44 * Math.sqrt(count) / high) : 0;
      if (tall) bars.push(draw("rect", { class: kind, x: i * wide + .4, width: Math.max(.6, wide - .8), y: 44 - tall, height: tall }));
    });
    const left = 480 * this.low.value / this.steps, right = 480 * this.high.value / this.steps;
    if (left > 0) bars.push(draw("rect", { class: "out", x: 0, width: left, y: 0, height: 44 }));
    if (right < 480) bars.push(draw("rect", { class: "out", x: right, width: 480 - right, y: 0, height: 44 }));
    this.chart.replaceChildren(...bars);
  }

  // Where a value lies among the steps.
  step(value, side) {
    const { edges } = this.facts, first = edges[0], last = edges[edges.length - 1];
    const at = this.single ? value - (first + .5) + (side === "high" ? 1 : 0) : (value - first) / (last - first) * this.steps;
    return Math.min(this.steps, Math.max(0, Math.round(at)));
  }

  valueAt(step, side) {
    const { edges, whole: isWhole } = this.facts, first = edges[0], last = edges[edges.length - 1];
    if (this.single) return first + .5 + step - (side === "high" ? 1 : 0);
    const value = first + (last - first) * step / this.steps;
    if (isWhole) return Math.round(value);
    const digits = Math.max(0, Math.ceil(-Math.log10((last - first) / this.steps)) + 1);
    return Number(value.toFixed(Math.min(12, digits)));
  }

  place() {
    const [low, high] = state.ranges.get(this.column) ?? [null, null];
    this.low.value = low === null ? 0 : this.step(low, "low");
    this.high.value = high === null ? this.steps : this.step(high, "high");
    if (document.activeElement !== this.from) this.from.value = low ?? "";
    if (document.activeElement !== this.to) this.to.value = high ?? "";
    this.low.style.zIndex = this.low.value > this.steps / 2 ? 1 : 0;
  }

  slid() {
    let low = Number(this.low.value), high = Number(this.high.value);
    if (low > high) { if (document.activeElement === this.high) this.high.value = high = low; else this.low.value = low = high; }
    this.set(low === 0 ? null : this.valueAt(low, "low"), high === this.steps ? null : this.valueAt(high, "high"));
  }

  typed() { this.set(bound(this.from.value), bound(this.to.value)); }

  set(low, high) {
    if (low === null && high === null) state.ranges.delete(this.column);
    else state.ranges.set(this.column, [low, high]);
    this.from.value = low ?? "";
    this.to.value = high ?? "";
    if (this.facts) this.drawBars();
    refresh();
  }
}

// ---- conditions above the grid

function drawChips() {
  const chips = [];
  const chip = (text, remove) => chips.push(make("button", { type: "button", title: "Take away", onclick: () => { remove(); afterChange(); } }, text, make("span", { class: "x" }, "×")));
  if (state.q) chip(`words: ${state.q}`, () => { state.q = ""; });
  for (const [column, [low, high]] of state.ranges) chip(low === null ? `${column} ≤ ${high}` : high === null ? `${column} ≥ ${low}` : `${low} ≤ ${column} ≤ ${high}`, () => state.ranges.delete(column));
  for (const [column, values] of state.only) chip(`${column}: ${[...values].map(v => v || "none").join(", ")}`, () => state.only.delete(column));
  if (state.reasons.size) chip(`${state.selection}: ${[...state.reasons].join(", ")}`, () => state.reasons.clear());
  if (state.twins !== null) chip(`same picture as row ${state.twins}`, () => { state.twins = null; });
  if (state.like !== null) chip(`like row ${state.like}`, () => { state.like = null; });
  if (state.see) chip(`shows: ${state.see}`, () => { state.see = ""; });
  if (chips.length > 1) chips.push(make("button", { type: "button", class: "clear", onclick: () => { const sort = state.sort; state = blank(); state.sort = sort; afterChange(); } }, "clear all"));
  $("chips").replaceChildren(...chips);
}

// Brings the controls to what the state says, then asks.
function afterChange() {
  $("q").value = state.q;
  $("see").value = state.see;
  const pick = $("selection");
  if (pick) pick.value = state.selection ?? "";
  drawSort();
  for (const slider of sliders.values()) if (slider.facts?.all.length) { slider.place(); slider.drawBars(); }
  refresh();
}

function drawSort() {
  const likeness = state.see ? "likeness to the words" : state.like !== null ? `likeness to row ${state.like}` : null;
  const options = [[likeness ?? "the dataset's", ""]];
  for (const column of about.numbers) options.push([`${column} ↓`, `-${column}`], [`${column} ↑`, column]);
  $("sort").replaceChildren(...options.map(([text, value]) => make("option", { value, selected: value === (likeness ? "" : state.sort ?? "") }, text)));
  $("sort").disabled = likeness !== null;
}

// ---- one row

async function openRow(number, push = false) {
  let one;
  try { one = await ask(`/api/rows/${number}`); } catch (error) { tell(error); return; }
  opened = one.number;
  if (push) writeAddress(true); else writeAddress();
  const { values } = one;
  $("detail-title").textContent = `row ${one.number}  (${one.shard}:${one.row})`;
  drawTurning();
  const there = values.status === "success";
  $("stage").hidden = !there;
  if (there) { $("large").src = `/images/${one.number}`; $("large").alt = values.caption ?? ""; } else $("large").removeAttribute("src");
  $("boxes").setAttribute("viewBox", `0 0 ${values.width ?? 1} ${values.height ?? 1}`);
  $("caption").textContent = (values.captions ?? (values.caption ? [values.caption] : [])).join("\n") || "no caption";
  $("caption").classList.toggle("none", !values.caption);
  $("like").hidden = !about.embeddings.length || !there;
  drawColumns(values);
  drawRegions(one.regions);
  $("twins").hidden = true;
  if (!$("detail").open) $("detail").showModal();
  $("detail").scrollTop = 0;
  if (about.twins && there) showTwins(one.number);
}

function drawTurning() {
  const at = rows.indexOf(opened);
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === rows.length - 1 && nextPage === null;
}

function drawColumns(values) {
  const groups = new Map();
  for (const [column, value] of Object.entries(values)) {
    if (value === null || value === "" || column === "caption" || column === "captions") continue;
    const group = groupOf(column);
    if (!groups.has(group)) groups.set(group, make("tbody"));
    const link = typeof value === "string" && /^https?:\/\//.test(value);
    const text = Array.isArray(value) || typeof value === "object" ? JSON.stringify(value) : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
    const told = link ? make("a", { href: value, rel: "noreferrer noopener", target: "_blank" }, value) : text;
    groups.get(group).append(make("tr", {}, make("td", {}, group === "pairs" ? column : column.slice(group.length + 1)), make("td", {}, told)));
  }
  $("columns").replaceChildren(...[...groups].flatMap(([name, body]) => [make("h3", {}, name), make("table", {}, body)]));
}

let regions = [];

function drawRegions(found) {
  regions = found;
  $("regions").hidden = !found.length;
  $("region-set").replaceChildren(...found.map(one => make("option", { value: one.set }, one.set)));
  $("region-set").hidden = found.length < 2;
  drawBoxes();
}

function drawBoxes() {
  const set = regions.find(one => one.set === $("region-set").value), least = Number($("confidence").value);
  $("confidence-value").textContent = least.toFixed(2);
  const shown = set && $("show-boxes").checked ? set.boxes.filter(b => b.confidence >= least).slice(0, 36).reverse() : [];
  // A letter is as tall as it looks: the drawing is scaled with the picture.
  const view = $("boxes").viewBox.baseVal, place = $("boxes").getBoundingClientRect();
  const scale = place.width ? Math.max(view.width / place.width, view.height / place.height) : 1;
  const frames = shown.flatMap(({ box: [x1, y1, x2, y2], label }) => {
    const colour = COLOURS[[...label].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) >>> 0, 7) % COLOURS.length];
    const at = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    return [draw("rect", { ...at, class: "under" }), draw("rect", { ...at, stroke: colour })];
  });
  const placed = [];
  const names = shown.reverse().map(one => {
    const said = `${one.label} ${one.confidence.toFixed(2)}`, wide = said.length * 6.6 * scale, tall = 13 * scale;
    const spot = freeSpot(one.box, wide, tall, scale, view, placed);
    placed.push({ ...spot, wide, tall });
    const text = draw("text", spot);
    text.style.fontSize = `${11 * scale}px`;
    text.style.strokeWidth = `${3 * scale}px`;
    text.textContent = said;
    return text;
  });
  $("boxes").replaceChildren(...frames, ...names.reverse());
}

// Where a name is written: above its box, else below or in it, off the other names and in the picture.
function freeSpot([x1, y1, x2, y2], wide, tall, scale, view, placed) {
  const x = Math.max(0, Math.min(x1 + 3 * scale, view.width - wide));
  const lines = [y1 - 4 * scale, y2 + tall, y1 + tall, y2 - 4 * scale].filter(y => y >= tall - 2 * scale && y <= view.height);
  const hits = y => placed.some(p => x < p.x + p.wide && p.x < x + wide && y - tall < p.y && p.y - p.tall < y);
  return { x, y: lines.find(y => !hits(y)) ?? lines[0] ?? tall };
}

async function showTwins(number) {
  try {
    const found = await ask(`/api/rows?twins=${number}&limit=12`);
    if (opened !== number || found.total < 2) return;
    const others = found.rows.filter(one => one.number !== number && one.status === "success");
    $("twin-strip").replaceChildren(...others.map(one => make("a", { href: `?row=${one.number}`, title: one.caption ?? "", onclick: event => { event.preventDefault(); openRow(one.number, true); } }, make("img", { src: `/thumbnails/${one.number}`, alt: one.caption ?? "" }))));
    $("show-twins").textContent = `Show all ${whole.format(found.total)} in the grid`;
    $("twins").hidden = false;
  } catch (error) { tell(error); }
}

async function turn(by) {
  const at = rows.indexOf(opened) + by;
  if (at >= rows.length) await more();
  if (rows[at] !== undefined && rows.includes(opened)) openRow(rows[at]);
}

// ---- recipe and selection

async function openRecipe() {
  try {
    $("yaml").value = (await ask(`/api/recipe?${toParams()}`)).yaml;
    $("copied").textContent = "";
    tell(null);
    $("recipe").showModal();
  } catch (error) { tell(error); }
}

async function copyRecipe() {
  try { await navigator.clipboard.writeText($("yaml").value); $("copied").textContent = "copied"; }
  catch { $("yaml").select(); $("copied").textContent = "selected: press Ctrl-C"; }
}

function openSave() {
  $("save-says").textContent = `Keeps the ${whole.format(keepable)} rows that match and have an image, or are text-only. The recipe is kept with the selection.`;
  for (const id of ["save-error", "saved", "replace-label"]) $(id).hidden = true;
  $("replace").checked = false;
  $("save-go").disabled = keepable === 0;
  $("save").showModal();
  $("save-name").focus();
}

async function save(event) {
  event.preventDefault();
  const name = $("save-name").value.trim();
  $("save-go").disabled = true;
  $("save-error").hidden = true;
  try {
    const body = JSON.stringify({ name, query: toParams().toString(), replace: $("replace").checked });
    const done = await ask("/api/selections", { method: "POST", headers: { "content-type": "application/json" }, body });
    $("saved").textContent = `Saved ${done.name}: ${whole.format(done.kept)} of ${whole.format(done.rows)} rows.`;
    $("saved").hidden = false;
    if (!about.selections.includes(name)) { about.selections = [...about.selections, name].sort(); buildFilters(); }
    await refresh();
  } catch (error) {
    $("save-error").textContent = error.message;
    $("save-error").hidden = false;
    $("replace-label").hidden = !about.selections.includes(name);
    $("save-go").disabled = false;
  }
}

// ---- keyboard

function onKey(event) {
  const typing = event.target.matches("input, textarea, select");
  const dialog = document.querySelector("dialog[open]");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (dialog) {
    if (dialog.id === "detail" && !typing && (event.key === "ArrowLeft" || event.key === "ArrowRight")) { event.preventDefault(); turn(event.key === "ArrowLeft" ? -1 : 1); }
    return;
  }
  if (typing) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "/") { event.preventDefault(); $("q").focus(); }
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "f") $("filters-button").click();
  else if (event.key.startsWith("Arrow")) move(event);
}

function move(event) {
  const cells = [...$("grid").children], at = cells.indexOf(document.activeElement);
  if (!cells.length || at < 0 && event.key !== "ArrowDown" && event.key !== "ArrowRight") return;
  const wide = Math.max(1, cells.findIndex(c => c.offsetTop > cells[0].offsetTop));
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
  const to = at < 0 ? 0 : at + by;
  if (to < 0 || to >= cells.length) return;
  event.preventDefault();
  cells[to].focus();
}

// ---- start

function later(wait, run) { let timer; return () => { clearTimeout(timer); timer = setTimeout(run, wait); }; }

function listen() {
  const typed = later(200, () => { state.q = $("q").value.trim(); refresh(); });
  const seen = later(350, () => { state.see = $("see").value.trim(); if (state.see) state.like = null; drawSort(); refresh(); });
  $("q").addEventListener("input", typed);
  $("see").addEventListener("input", seen);
  $("search").addEventListener("submit", event => event.preventDefault());
  $("sort").addEventListener("change", () => { state.sort = $("sort").value || null; refresh(); });
  $("more").addEventListener("click", more);
  new IntersectionObserver(entries => { if (entries[0].isIntersecting) more(); }, { rootMargin: "600px" }).observe($("more"));
  $("filters-button").addEventListener("click", () => $("filters-button").setAttribute("aria-expanded", $("filters").classList.toggle("open")));
  $("recipe-button").addEventListener("click", openRecipe);
  $("copy").addEventListener("click", copyRecipe);
  $("save-button").addEventListener("click", openSave);
  $("save-form").addEventListener("submit", save);
  $("help-button").addEventListener("click", () => $("help").showModal());
  for (const button of document.querySelectorAll(".close")) button.addEventListener("click", () => button.closest("dialog").close());
  for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  $("detail").addEventListener("close", () => {
    const cell = $("grid").querySelector(`[data-row="${opened}"]`);
    opened = null;
    writeAddress();
    cell?.focus();
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("like").addEventListener("click", () => { state.like = String(opened); state.see = ""; $("detail").close(); afterChange(); scrollTo(0, 0); });
  $("show-twins").addEventListener("click", () => { state = blank(); state.twins = String(opened); $("detail").close(); afterChange(); scrollTo(0, 0); });
  $("large").addEventListener("load", drawBoxes);
  for (const id of ["show-boxes", "region-set", "confidence"]) $(id).addEventListener("input", drawBoxes);
  addEventListener("keydown", onKey);
  addEventListener("popstate", () => {
    const row = fromAddress();
    if (row === null && $("detail").open) { $("detail").close(); return; }
    afterChange();
    if (row !== null) openRow(row);
  });
}

async function start() {
  const row = fromAddress();
  try { about = await ask("/api/about"); } catch (error) { tell(error); return; }
  $("name").textContent = about.dataset;
  document.title = `${about.dataset} · pairmill browse`;
  buildFilters();
  listen();
  afterChange();
  if (row !== null) openRow(row);
  if (about.embeddings.length) ask("/api/model").then(({ model }) => { $("see").hidden = model === null; $("see").title = model ?? ""; }, tell);
}

start();
