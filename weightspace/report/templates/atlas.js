"use strict";
(() => {
const CARD_ROWS = 9, FOUND_ROWS = 50, REACH = 12, MOST_ZOOM = 400, SEARCH_LENGTH = 200;
const $ = (id) => document.getElementById(id);
const [canvas, card, search, colour, legend, chosen] = ["map", "card", "search", "colour", "legend", "chosen"].map($);
const context = canvas.getContext("2d");

// --- records -----------------------------------------------------------------------------------------------------

const ARRAYS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array};

function unpack({type, bytes}) {
  const text = atob(bytes), found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return new ARRAYS[type](found.buffer);
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const records = JSON.parse($("records").textContent);
const {names, shades} = records;
const count = names.length;
const places = unpack(records.places), neighbours = unpack(records.neighbours), distances = unpack(records.distances);
const nearest = count ? neighbours.length / count : 0;
const pages = records.pages && {levels: records.pages.levels, codes: unpack(records.pages.codes)};
const columns = records.columns.map((column) => column.numbers
  ? {name: column.name, numbers: unpack(column.numbers)}
  : {...column, codes: unpack(column.codes), lower: column.levels.map((level) => level.toLowerCase())});
const lowerNames = names.map((name) => name.toLowerCase());
for (const column of columns) describe(column);

function describe(column) {
  const {numbers, codes} = column;
  if (!numbers) {
    column.varied = column.levels.length > 1 || codes.includes(column.levels.length);
    column.colourable = column.marks.length > 0;
    return;
  }
  let low = Infinity, high = -Infinity, least = Infinity, unknown = 0;
  for (const value of numbers) {
    if (!Number.isFinite(value)) { unknown++; continue; }
    if (value < low) low = value;
    if (value > high) high = value;
    if (value > 0 && value < least) least = value;
  }
  // Sizes and learning rates spread over powers of ten.
  const log = low > 0 && high / low > 300;
  Object.assign(column, {low, high, log, unknown, varied: low < high || unknown > 0, colourable: low < high});
}

function share(column, value) {
  const {low, high, log} = column;
  if (log) return Math.log(value / low) / Math.log(high / low);
  return high - low < Infinity ? (value - low) / (high - low) : (value / 2 - low / 2) / (high / 2 - low / 2);
}

function shown(column, model) {
  if (!column.numbers) return column.levels[column.codes[model]] ?? null;
  const value = column.numbers[model];
  return Number.isNaN(value) ? null : readable(value);
}

function readable(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en").replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("Infinity", "∞").replaceAll("-", "−");
}

const title = (column) => column.name.replaceAll("_", " ");

// --- colours -----------------------------------------------------------------------------------------------------

// Every model has the number of its mark; the last two are "some other text" and "not known".
const MISSING = {ink: "#8a8f98", hollow: true}, OTHER = {ink: "#8a8f98", hollow: false}, PLAIN = {ink: "#3f83b8", hollow: false};
const paint = new Uint8Array(count), lit = new Uint8Array(count).fill(1);
let column = null, marks = [], found = null, picked = null, lights = count;

function colourBy(chosenColumn) {
  column = chosenColumn;
  picked = null;
  if (!column) {
    marks = [PLAIN];
    paint.fill(0);
  } else if (column.numbers) {
    marks = [...shades.map((ink) => ({ink, hollow: false})), MISSING];
    for (let i = 0; i < count; i++) {
      const value = column.numbers[i];
      paint[i] = Number.isFinite(value) ? Math.round(share(column, value) * (shades.length - 1)) : shades.length;
    }
  } else {
    marks = [...column.marks.map(([ink, hollow]) => ({ink, hollow})), OTHER, MISSING];
    const other = column.marks.length;
    for (let i = 0; i < count; i++) {
      const code = column.codes[i];
      paint[i] = code < other ? code : code < column.levels.length ? other : other + 1;
    }
  }
  showLegend();
  light();
}

function swatch(mark) {
  const made = element("span", {className: "swatch"});
  made.style.borderColor = mark.ink;
  made.style.background = mark.hollow ? "none" : mark.ink;
  return made;
}

function showLegend() {
  legend.replaceChildren();
  if (!column) return;
  if (column.numbers) showScale();
  else {
    const counts = new Uint32Array(marks.length);
    for (const number of paint) counts[number]++;
    const rest = column.levels.length - column.marks.length;
    const labels = [...column.levels.slice(0, column.marks.length), `${readable(rest)} rarer values`, "not known"];
    const list = element("ul", {className: "list", id: "levels"});
    list.setAttribute("aria-label", `Values of ${title(column)}; press one to see it alone`);
    labels.forEach((label, number) => {
      if (!counts[number]) return;
      const button = element("button", {type: "button", title: label}, swatch(marks[number]), element("bdi", {}, label),
        element("span", {}, readable(counts[number])));
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        picked = picked === number ? null : number;
        for (const one of list.querySelectorAll("button")) one.setAttribute("aria-pressed", String(one === button && picked !== null));
        light();
      });
      list.append(element("li", {}, button));
    });
    legend.append(list);
  }
}

function showScale() {
  const bins = new Uint32Array(32);
  for (let i = 0; i < count; i++) {
    if (paint[i] < shades.length) bins[Math.min(31, Math.floor(paint[i] / shades.length * 32))]++;
  }
  const most = Math.max(...bins), bars = element("div", {className: "bars"});
  bins.forEach((models, i) => {
    const bar = element("div");
    bar.style.height = models ? `${Math.max(4, 100 * models / most)}%` : "0";
    bar.style.background = shades[i * 2];
    bars.append(bar);
  });
  bars.setAttribute("aria-hidden", "true");
  const ramp = element("div", {className: "ramp"});
  ramp.style.background = `linear-gradient(to right, ${shades.join(", ")})`;
  const scale = element("div", {className: "scale"}, bars, ramp,
    element("div", {className: "ends"}, element("span", {}, readable(column.low)), element("span", {}, readable(column.high))));
  if (column.log) scale.append(element("p", {className: "muted"}, "Logarithmic scale."));
  if (column.unknown) {
    const models = `${readable(column.unknown)} model${column.unknown > 1 ? "s" : ""} without it, grey`;
    scale.append(element("p", {className: "muted"}, models));
  }
  legend.append(scale);
}

// --- search ------------------------------------------------------------------------------------------------------

function find(text) {
  const wanted = text.trim().toLowerCase().slice(0, SEARCH_LENGTH);
  if (!wanted) return null;
  const hits = new Uint8Array(count);
  for (let i = 0; i < count; i++) hits[i] = lowerNames[i].includes(wanted) ? 1 : 0;
  for (const {lower, codes} of columns) {
    if (!lower) continue;
    const levels = lower.map((level) => level.includes(wanted));
    if (levels.includes(true)) for (let i = 0; i < count; i++) if (levels[codes[i]]) hits[i] = 1;
  }
  return hits;
}

function light() {
  lights = 0;
  for (let i = 0; i < count; i++) lights += lit[i] = (!found || found[i]) && (picked === null || paint[i] === picked) ? 1 : 0;
  const filtered = found || picked !== null;
  $("count").value = filtered ? `${readable(lights)} of ${readable(count)} models` : "";
  $("found").hidden = !found || !lights;
  $("found").replaceChildren();
  if (found) {
    const rows = [];
    for (let i = 0; i < count && rows.length < FOUND_ROWS; i++) if (lit[i]) rows.push(row(i));
    $("found").append(...rows);
  }
  hover(null);
  schedule();
}

function row(model, note = "") {
  const button = element("button", {type: "button", title: names[model]}, swatch(marks[paint[model]]),
    element("bdi", {}, names[model]), element("span", {}, note));
  button.addEventListener("click", () => { choose(model); bring(model); });
  return element("li", {}, button);
}

// --- view --------------------------------------------------------------------------------------------------------

const view = {x: 0, y: 0, scale: 1};
let width = 0, height = 0, ratio = 1, fit = 1, untouched = true;

const left = (model) => (places[2 * model] - view.x) * view.scale + width / 2;
const top = (model) => (view.y - places[2 * model + 1]) * view.scale + height / 2;

function resize() {
  const box = canvas.getBoundingClientRect();
  if (!box.width || !box.height) return;
  [width, height, ratio] = [box.width, box.height, window.devicePixelRatio || 1];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const before = fit;
  fit = Math.max(40, Math.min(width, height) / 2 - 28);
  if (untouched) showAll(); else view.scale *= fit / before;
  draw();
}

function showAll() {
  Object.assign(view, {x: 0, y: 0, scale: fit});
  untouched = true;
  schedule();
}

function zoom(factor, x = width / 2, y = height / 2) {
  const scale = Math.min(Math.max(view.scale * factor, fit / 2), fit * MOST_ZOOM);
  // What is under the pointer stays there.
  view.x += (x - width / 2) * (1 / view.scale - 1 / scale);
  view.y -= (y - height / 2) * (1 / view.scale - 1 / scale);
  view.scale = scale;
  moved();
}

function pan(x, y) {
  view.x -= x / view.scale;
  view.y += y / view.scale;
  moved();
}

function moved() {
  view.x = Math.min(Math.max(view.x, -1.2), 1.2);
  view.y = Math.min(Math.max(view.y, -1.2), 1.2);
  untouched = false;
  hover(null);
  schedule();
}

function bring(model) {
  const [x, y, edge] = [left(model), top(model), 30];
  if (x > edge && y > edge && x < width - edge && y < height - edge) return;
  [view.x, view.y] = [places[2 * model], places[2 * model + 1]];
  moved();
}

// --- drawing -----------------------------------------------------------------------------------------------------

// The picture is larger than the canvas by twice the largest disc, so that no disc has to be cut at the edges.
const LARGEST = 9, DIM = 0.13, STRONG = 0.88;
let waiting = false, chosenModel = null, hovered = null, image = null;

const radius = () => Math.min(LARGEST, (count > 8000 ? 1.9 : count > 1500 ? 2.6 : count > 200 ? 3.6 : 5) * (view.scale / fit) ** 0.35);

function packed(hex) {
  const number = parseInt(hex.trim().slice(1), 16);
  return (0xff000000 | (number & 0xff) << 16 | number & 0xff00 | number >> 16) >>> 0;
}

// Which pixels around its centre a disc or ring covers, and how much of each, in 256ths.
function stamp(size, hollow, stride, strength) {
  const offsets = [], shares = [], reach = Math.ceil(size + 0.5), hole = size - Math.max(1, size * 0.45);
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const distance = Math.hypot(x, y), outer = size + 0.5 - distance, inner = hollow ? distance + 0.5 - hole : 1;
      const part = Math.round(256 * strength * Math.min(1, Math.max(0, Math.min(outer, inner))));
      if (part) { offsets.push(y * stride + x); shares.push(part); }
    }
  }
  return {offsets: Int32Array.from(offsets), shares: Int32Array.from(shares)};
}

// Pixels are set one by one: for thousands of dots this is many times faster than asking the canvas for each.
function draw() {
  waiting = false;
  const pad = Math.ceil(2 * (LARGEST + 2) * ratio), reach = pad / 2;
  const [wide, high] = [canvas.width + 2 * pad, canvas.height + 2 * pad];
  if (image?.width !== wide || image.height !== high) image = context.createImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer), style = getComputedStyle(document.documentElement);
  pixels.fill(packed(style.getPropertyValue("--page")));
  const inks = marks.map((mark) => packed(mark.ink)), scale = view.scale * ratio;
  const x0 = wide / 2 - view.x * scale, y0 = high / 2 + view.y * scale;
  let drawn = 0;
  for (const bright of lights < count ? [0, 1] : [1]) {
    const [disc, ring] = [false, true].map((hollow) => stamp(radius() * ratio, hollow, wide, bright ? STRONG : DIM));
    for (let i = 0; i < count; i++) {
      if (lit[i] !== bright) continue;
      const x = Math.round(x0 + places[2 * i] * scale), y = Math.round(y0 - places[2 * i + 1] * scale);
      if (x < reach || y < reach || x >= wide - reach || y >= high - reach) continue;
      const {offsets, shares} = marks[paint[i]].hollow ? ring : disc;
      const ink = inks[paint[i]], redBlue = ink & 0xff00ff, green = ink & 0xff00, centre = y * wide + x;
      for (let k = 0; k < offsets.length; k++) {
        const under = pixels[centre + offsets[k]], part = shares[k], rest = 256 - part;
        pixels[centre + offsets[k]] = 0xff000000 | ((under & 0xff00ff) * rest + redBlue * part) >>> 8 & 0xff00ff
          | ((under & 0xff00) * rest + green * part) >>> 8 & 0xff00;
      }
      drawn++;
    }
  }
  context.putImageData(image, -pad, -pad);
  drawRings(style);
  canvas.dataset.drawn = drawn;
}

function drawRings(style) {
  const [ink, accent, page] = ["--ink", "--accent", "--page"].map((name) => style.getPropertyValue(name));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const ring = (model, colour, more, line) => {
    for (const [stroke, lineWidth] of [[page, line + 2], [colour, line]]) {
      context.beginPath();
      context.arc(left(model), top(model), radius() + more, 0, 2 * Math.PI);
      Object.assign(context, {strokeStyle: stroke, lineWidth});
      context.stroke();
    }
  };
  if (chosenModel !== null) {
    context.beginPath();
    for (const {model} of near(chosenModel)) {
      context.moveTo(left(chosenModel), top(chosenModel));
      context.lineTo(left(model), top(model));
    }
    Object.assign(context, {strokeStyle: accent, lineWidth: 1, globalAlpha: 0.55});
    context.stroke();
    context.globalAlpha = 1;
    for (const {model} of near(chosenModel)) ring(model, accent, 2.5, 1.5);
    ring(chosenModel, ink, 4, 2.2);
  }
  if (hovered !== null) ring(hovered, ink, 2.5, 1.5);
}

function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(draw);
}

function near(model) {
  return Array.from({length: nearest}, (_, i) => ({model: neighbours[model * nearest + i], distance: distances[model * nearest + i]}));
}

// --- pointing ----------------------------------------------------------------------------------------------------

// Models by square of a grid over the map, one after the other; starts[square] says where a square begins.
const squares = Math.min(256, Math.max(1, Math.ceil(Math.sqrt(count / 2))));
const square = (value) => Math.min(squares - 1, Math.max(0, Math.floor((value + 1) / 2 * squares)));
const starts = new Uint32Array(squares * squares + 1), members = new Uint32Array(count);
{
  const home = new Uint32Array(count);
  for (let i = 0; i < count; i++) starts[1 + (home[i] = square(places[2 * i + 1]) * squares + square(places[2 * i]))]++;
  for (let i = 0; i < squares * squares; i++) starts[i + 1] += starts[i];
  const next = starts.slice();
  for (let i = 0; i < count; i++) members[next[home[i]]++] = i;
}

function at(x, y) {
  const worldX = view.x + (x - width / 2) / view.scale, worldY = view.y - (y - height / 2) / view.scale;
  const reach = Math.max(REACH, radius() + 3) / view.scale;
  let best = null, least = reach * reach;
  for (let v = square(worldY - reach); v <= square(worldY + reach); v++) {
    for (let u = square(worldX - reach); u <= square(worldX + reach); u++) {
      for (let i = starts[v * squares + u]; i < starts[v * squares + u + 1]; i++) {
        const model = members[i];
        const distance = (places[2 * model] - worldX) ** 2 + (places[2 * model + 1] - worldY) ** 2;
        if (lit[model] && distance < least) [best, least] = [model, distance];
      }
    }
  }
  return best;
}

function facts(model, shownColumns) {
  const list = element("dl");
  for (const one of shownColumns) {
    const value = shown(one, model);
    if (value !== null) list.append(element("dt", {}, element("bdi", {}, title(one))), element("dd", {}, element("bdi", {}, value)));
  }
  return list;
}

function hover(model) {
  canvas.classList.toggle("over", model !== null);
  if (model === hovered) return;
  hovered = model;
  card.hidden = model === null;
  schedule();
  if (model === null) return;
  const others = columns.filter((one) => one !== column && one.varied && shown(one, model) !== null);
  card.replaceChildren(element("h3", {}, element("bdi", {}, names[model])),
    facts(model, [...(column ? [column] : []), ...others].slice(0, CARD_ROWS)));
  const [x, y, gap] = [left(model), top(model), 14];
  const fits = x + gap + card.offsetWidth < width - 8;
  const across = fits ? x + gap : x - gap - card.offsetWidth;
  const down = Math.min(y + gap, height - card.offsetHeight - 8);
  card.style.transform = `translate(${Math.round(Math.max(8, across))}px, ${Math.round(Math.max(8, down))}px)`;
}

function choose(model) {
  chosenModel = model;
  chosen.hidden = model === null;
  history.replaceState(null, "", model === null ? location.pathname + location.search : `#${encodeURIComponent(names[model])}`);
  if (model !== null) {
    const close = element("button", {type: "button"}, "Close");
    close.addEventListener("click", () => { choose(null); canvas.focus(); });
    const list = element("ol", {className: "list", id: "neighbours"}, ...near(model).map((one) => row(one.model, one.distance.toFixed(3))));
    chosen.replaceChildren(element("div", {className: "line"}, element("h3", {}, element("bdi", {}, names[model])), close));
    const page = pages && pages.levels[pages.codes[model]];
    if (page) chosen.append(element("p", {className: "muted"}, element("a", {href: page, target: "_blank", rel: "noopener noreferrer"}, "Open on the Hub")));
    chosen.append(facts(model, columns));
    if (nearest) chosen.append(element("h2", {}, "Nearest neighbours, cosine distance"), list);
    chosen.parentElement.scrollTop = 0;
  } else chosen.replaceChildren();
  schedule();
}

// --- input -------------------------------------------------------------------------------------------------------

const pointers = new Map();
let travelled = 0, pointing = null;

const inside = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, inside(event));
  canvas.setPointerCapture(event.pointerId);
});

canvas.addEventListener("pointermove", (event) => {
  const [x, y] = inside(event), last = pointers.get(event.pointerId);
  if (!last) {
    // A fast mouse reports more often than the screen shows.
    if (!pointing) requestAnimationFrame(() => { hover(pointing && !pointers.size ? at(...pointing) : null); pointing = null; });
    pointing = [x, y];
    return;
  }
  travelled += Math.hypot(x - last[0], y - last[1]);
  const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  pointers.set(event.pointerId, [x, y]);
  if (travelled < 4) return;
  canvas.classList.add("moving");
  if (!other) return pan(x - last[0], y - last[1]);
  const apart = (place) => Math.max(20, Math.hypot(place[0] - other[0], place[1] - other[1]));
  pan((x - last[0]) / 2, (y - last[1]) / 2);
  zoom(apart([x, y]) / apart(last), (x + other[0]) / 2, (y + other[1]) / 2);
});

for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
  if (!pointers.delete(event.pointerId)) return;
  canvas.classList.remove("moving");
  if (name === "pointerup" && travelled < 4) choose(at(...inside(event)));
});

canvas.addEventListener("pointerleave", () => { pointing = null; hover(null); });
canvas.addEventListener("dblclick", (event) => { if (at(...inside(event)) === null) zoom(2, ...inside(event)); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const lines = event.deltaMode ? 33 : 1;
  zoom(Math.exp(-Math.min(Math.max(event.deltaY * lines, -200), 200) * 0.0022), ...inside(event));
}, {passive: false});

const KEYS = {
  ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
  "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: showAll,
};
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosenModel !== null) choose(null); });
$("in").addEventListener("click", () => zoom(1.6));
$("out").addEventListener("click", () => zoom(1 / 1.6));
$("all").addEventListener("click", showAll);
search.addEventListener("input", () => { found = find(search.value); light(); });
search.addEventListener("keydown", (event) => {
  const first = event.key === "Enter" && $("found").querySelector("button");
  if (first) first.click();
});
colour.addEventListener("change", () => { colourBy(columns[colour.value] ?? null); if (chosenModel !== null) choose(chosenModel); });

// --- start -------------------------------------------------------------------------------------------------------

columns.forEach((one, number) => { if (one.colourable) colour.append(element("option", {value: number}, title(one))); });
colour.append(element("option", {value: ""}, "nothing"));
const first = columns.findIndex((one) => one.name === "dataset" && one.colourable);
if (first >= 0) colour.value = first;
colourBy(columns[colour.value] ?? null);
new ResizeObserver(resize).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schedule);
resize();
const named = names.indexOf(decodeHash());
if (named >= 0) { choose(named); bring(named); }
performance.mark("drawn");
// For the console: where a model stands within the map, in CSS pixels.
window.atlas = Object.freeze({place: (model) => [left(model), top(model)], view: () => ({...view}), pan, draw});

function decodeHash() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}
})();
