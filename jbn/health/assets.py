"""The style and the script of the HTML report. The page works without the script, but for the
channel maps and for opening the layer that the address names.
"""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --text: #1d2125;
  --soft: #5c6670; --line: #dfe3e6; --bad: #b3261e; --badback: #fbe9e7; --ok: #1b7a43;
  --ink: #2463ae; --mid: #eceff1; --low: #2463ae; --high: #c2410c; --none: #a21caf; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --text: #e6e9ec;
  --soft: #9aa5b0; --line: #32383e; --bad: #ff8a80; --badback: #43201d; --ok: #6fcf97;
  --ink: #7db4f5; --mid: #2d3338; --low: #5ea2f3; --high: #fb923c; --none: #e879f9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 28px 0 8px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 4px 0 12px; } .soft { color: var(--soft); } a { color: var(--ink); }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; } .scroll .events { min-width: 720px; }
.head, summary { display: grid; gap: 12px; align-items: center; padding: 8px 12px;
  grid-template-columns: minmax(150px, 2.2fr) minmax(150px, 2fr) repeat(3, 76px) 190px; }
.head { color: var(--soft); font-size: 13px; font-weight: 600; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  margin: 0 0 6px; } summary { cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
details[open] > summary { border-bottom: 1px solid var(--line); }
summary:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; border-radius: 8px; }
.name { font-weight: 600; overflow-wrap: anywhere; }
.name::before { content: "\\25B8"; color: var(--soft); display: inline-block; width: 1.1em; }
details[open] .name::before { content: "\\25BE"; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.kind { display: inline-block; margin: 1px 4px 1px 0; padding: 0 8px; border-radius: 10px;
  background: var(--badback); color: var(--bad); font-size: 13px; white-space: nowrap; }
.kind.back { background: none; border: 1px solid var(--line); color: var(--soft); }
.fine { color: var(--ok); font-size: 13px; }
.inside { padding: 4px 16px 16px; } .warning { border-left: 3px solid var(--bad); margin: 10px 0;
  padding: 2px 0 2px 12px; }
.warning.back { border-color: var(--line); } .warning p { margin: 2px 0; }
.sparks { display: grid; gap: 8px 16px;
  grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); }
.spark b { font-weight: 600; } .spark { font-size: 13px; }
svg { display: block; width: 100%; height: 34px; } svg path { fill: none; stroke: var(--ink);
  stroke-width: 1.5; vector-effect: non-scaling-stroke; } svg line { stroke: var(--bad);
  stroke-width: 1; vector-effect: non-scaling-stroke; } svg line.back { stroke: var(--ok); }
.range { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; }
canvas { display: block; max-width: 100%; margin: 2px 0 10px; cursor: crosshair; }
.maps button { font: inherit; font-size: 13px; margin: 0 4px 4px 0; padding: 1px 10px;
  border: 1px solid var(--line); border-radius: 10px; background: none; color: var(--text);
  cursor: pointer; }
.maps button[aria-pressed=true] { border-color: var(--ink); color: var(--ink); }
.readout { min-height: 1.5em; font-variant-numeric: tabular-nums; font-size: 13px; }
.title { font-size: 13px; } .scale { color: var(--soft); }
@media (max-width: 760px) { .head { display: none; }
  summary { grid-template-columns: 1fr 1fr; } summary .number { display: none; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("channels").textContent);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  node.textContent = text; if (name) node.className = name;
  return node;
};
const color = name => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
};
const mix = (a, b, t) => "rgb(" + a.map((v, i) => Math.round(v + (b[i] - v) * t)).join() + ")";
const shown = v => v === null ? "not finite" : String(v);

function draw(canvas, map) {
  const size = map.values.length, cell = size > 512 ? 7 : 12;
  const columns = Math.min(size, Math.max(1, Math.floor(1040 / cell)));
  const rows = Math.ceil(size / columns), ratio = window.devicePixelRatio || 1;
  canvas.width = columns * cell * ratio; canvas.height = rows * cell * ratio;
  canvas.style.width = columns * cell + "px"; canvas.style.aspectRatio = columns + "/" + rows;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [mid, low, high, none] = ["--mid", "--low", "--high", "--none"].map(color);
  map.values.forEach((value, i) => {
    const x = i % columns * cell, y = Math.floor(i / columns) * cell;
    const t = value === null ? 0 : Math.max(-1, Math.min(1, (value - map.zero) / map.reach));
    pen.fillStyle = value === null ? mix(none, none, 0) : mix(mid, t < 0 ? low : high, Math.abs(t));
    pen.fillRect(x, y, cell - 1, cell - 1);
  });
  return event => {
    const box = canvas.getBoundingClientRect();
    const at = Math.floor((event.clientX - box.left) / box.width * columns)
      + columns * Math.floor((event.clientY - box.top) / box.height * rows);
    return at >= 0 && at < size ? at : null;
  };
}

function show(place, maps) {
  const readout = make("p",
    "Point at a channel to read its numbers. Purple: not finite.", "readout soft");
  const nodes = [readout];
  maps.maps.forEach(map => {
    const title = make("div", map.title, "title");
    title.append(make("span", " \\u2014 " + map.legend, "scale"));
    const canvas = make("canvas", "");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", map.title + ", " + map.values.length + " channels");
    const at = draw(canvas, map);
    const read = event => {
      const i = at(event);
      if (i === null) return;
      readout.textContent = "channel " + maps.names[i] + ": " +
        maps.maps.map(other => other.title + " " + shown(other.values[i])).join(", ");
    };
    canvas.addEventListener("mousemove", read);
    canvas.addEventListener("click", read);
    nodes.push(title, canvas);
  });
  place.replaceChildren(...nodes);
}

function open(details) {
  const place = details.querySelector(".maps"), layer = data[details.dataset.layer];
  if (!place || !layer || place.childElementCount) return;
  const labels = Object.keys(layer), body = make("div", "");
  const buttons = labels.map(label => make("button", label));
  const pick = chosen => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", labels[i] === chosen));
    show(body, layer[chosen]);
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => pick(labels[i])));
  place.append(...(labels.length > 1 ? buttons : []), body);
  pick(labels[labels.length - 1]);
}

const all = [...document.querySelectorAll("details")];
all.forEach(details => details.addEventListener("toggle", () => {
  if (details.open) open(details);
}));

function follow() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch (error) { /* not encoded: as it is */ }
  const details = all.find(one => one.dataset.layer === name);
  if (!details) return;
  details.open = true; open(details);
  details.scrollIntoView({ block: "start" });
}
window.addEventListener("hashchange", follow);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all.forEach(details => {
  const place = details.querySelector(".maps");
  if (place) place.replaceChildren();
  if (details.open) open(details);
}));
follow();
"""
