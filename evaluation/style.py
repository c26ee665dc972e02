"""How the report page looks, and the one script in it: the slider between two subjects' pictures."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --soft: #59626d; --rule: #dde2e7; --tint: #f5f7f8;
  --student: #0b6e77; --student-tint: #e9f4f4; --wrong: #b3391f;
  --c0: #3d4650; --c1: #0b6e77; --c2: #c2492c; --c3: #2f5fb3; --c4: #a8770a; --c5: #7a3fa8; --c6: #3d7d35;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13171b; --ink: #e3e7eb; --soft: #9aa4af; --rule: #2d353d; --tint: #1a2026;
    --student: #5cc4cc; --student-tint: #12292d; --wrong: #f0876a;
    --c0: #c3cad1; --c1: #5cc4cc; --c2: #f0876a; --c3: #86aef5; --c4: #e0b34d; --c5: #c79bea; --c6: #86c97c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 2.75rem 1.5rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.018em; overflow-wrap: anywhere; }
h2 { font-size: 1.3125rem; letter-spacing: -0.008em; margin: 0 0 0.5rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.25rem; }
section { margin-top: 2.75rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
p { max-width: 44rem; margin: 0.5rem 0 0.75rem; }
a { color: var(--student); text-underline-offset: 0.15em; }
.verdict { font-size: 1.1875rem; line-height: 1.45; margin: 0.75rem 0 0; text-wrap: pretty; }
.note, .facts, figcaption, footer { color: var(--soft); font-size: 0.875rem; line-height: 1.45; }
nav { margin-top: 1rem; font-size: 0.9375rem; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
nav a { text-decoration: none; padding: 0.125rem 0; }
nav a:hover { text-decoration: underline; }
footer { margin-top: 3rem; }
:focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }

.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
.results { width: 100%; }
.results.narrow { width: auto; }
.results th, .results td { padding: 0.5rem 0.75rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
.results thead th {
  color: var(--soft); font-size: 0.8125rem; line-height: 1.3; vertical-align: bottom; white-space: normal;
  min-width: 4.5rem;
}
.results tbody th { text-align: left; position: sticky; left: 0; background: var(--page); }
.results tbody tr { border-top: 1px solid var(--rule); }
.results thead { border-bottom: 1px solid var(--soft); }
.results .data th, .results .data td { color: var(--soft); font-style: italic; }
.results .student, .results .student th { background: var(--student-tint); }
.results .teacher + .student, .results .data + .teacher { border-top: 1px solid var(--soft); }
.results .student th { color: var(--student); font-weight: 650; box-shadow: inset 3px 0 var(--student); }
.results small { display: block; color: var(--soft); font-size: 0.75rem; line-height: 1.3; font-weight: 400; }
strong { font-weight: 700; }

.compare { margin: 1rem 0 0; }
.controls {
  display: flex; flex-wrap: wrap; gap: 0.75rem 1.5rem; align-items: end; margin-bottom: 1rem; font-size: 0.875rem;
}
.controls label { color: var(--soft); display: grid; gap: 0.25rem; flex: 1 1 8.5rem; max-width: 18rem; min-width: 0; }
.controls label:last-child { flex-basis: 11rem; gap: 0.75rem; padding-bottom: 0.5rem; }
select {
  font: inherit; color: var(--ink); background: var(--tint); border: 1px solid var(--rule); border-radius: 0.375rem;
  padding: 0.4rem 0.5rem; width: 100%;
}
input[type="range"] { accent-color: var(--student); width: 100%; margin: 0; }
.cards { display: grid; gap: 1.25rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 44%), 1fr)); }
.pair { position: relative; overflow: hidden; border-radius: 0.25rem; background: var(--tint); --cut: 50%; }
.pair img { display: block; width: 100%; height: auto; }
.pair img + img { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--cut)); }
.pair::after {
  content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 0.45); pointer-events: none;
}
.pair i {
  position: absolute; left: var(--cut); top: 50%; width: 1.5rem; height: 1.5rem; margin: -0.75rem; z-index: 1;
  border-radius: 50%; background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 0.45), 0 1px 4px rgb(0 0 0 / 0.3);
  pointer-events: none;
}
.pair i::before {
  content: "‹ ›"; position: absolute; inset: 0; display: grid; place-items: center; color: #1b1f24;
  font: 700 0.8125rem/1 system-ui, sans-serif;
}
.pair input {
  position: absolute; inset: 0; height: 100%; opacity: 0; cursor: ew-resize; touch-action: pan-y; z-index: 2;
}
.pair:focus-within { outline: 2px solid var(--student); outline-offset: 2px; }
.cards figcaption { margin-top: 0.375rem; overflow-wrap: anywhere; }

.pictures th, .pictures td { padding: 0.25rem 0.375rem 0.25rem 0; }
.pictures thead th { color: var(--soft); font-size: 0.8125rem; line-height: 1.3; vertical-align: bottom; }
.pictures thead .student, .seeds .student th { color: var(--student); font-weight: 650; }
.pictures tbody th {
  position: sticky; left: 0; background: var(--page); font-size: 0.875rem; font-weight: 400; line-height: 1.35;
  width: 11rem; min-width: 7rem; padding-left: 0; overflow-wrap: anywhere; z-index: 1;
}
.pictures img { border-radius: 0.125rem; }
.seeds .pixels { width: 80px; height: auto; }
.seeds tbody th { width: auto; padding-right: 1rem; }
img { display: block; max-width: none; background: var(--tint); }
.pictures img, .failures img, .grids img, .pair { outline: 1px solid rgb(128 128 128 / 0.22); outline-offset: -1px; }
.pixels { image-rendering: pixelated; }

.charts, .grids {
  display: grid; gap: 1.25rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
}
.charts.twos { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); max-width: 58rem; }
figure { margin: 0; }
.charts figcaption { color: var(--ink); font-weight: 500; margin-bottom: 0.25rem; }
.grids img { width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; margin: 0.75rem 0; padding: 0;
  font-size: 0.875rem;
}
.legend li { display: flex; align-items: center; gap: 0.4rem; }
svg { display: block; width: 100%; height: auto; }
svg.swatch { width: 14px; flex: none; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .task { fill: var(--ink); }
svg .name { fill: var(--ink); font-size: 11px; paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line, .raw { fill: none; stroke: var(--student); stroke-width: 1.75; stroke-linejoin: round; }
.raw { opacity: 0.3; stroke-width: 1; }
.dot { fill: var(--student); }
.level { stroke: var(--soft); stroke-dasharray: 2 3; }
.link { fill: none; stroke-width: 1.5; opacity: 0.45; }
.whisker { stroke-width: 1.5; opacity: 0.7; }
.mark { stroke: var(--page); stroke-width: 1; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); }
.mark.c0 { fill: var(--page); stroke: var(--c0); stroke-width: 1.75; }
.mark.c1 { fill: var(--c1); } .mark.c2 { fill: var(--c2); } .mark.c3 { fill: var(--c3); }
.mark.c4 { fill: var(--c4); } .mark.c5 { fill: var(--c5); } .mark.c6 { fill: var(--c6); }
.tasks { max-width: 28rem; margin-bottom: 1.5rem; }

.failures {
  display: grid; gap: 1rem; margin: 0.75rem 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 44%), 1fr));
}
.failures img { width: 100%; height: auto; border-radius: 0.25rem; margin-bottom: 0.375rem; }
.failures figcaption { overflow-wrap: anywhere; }
.failures q { color: var(--ink); quotes: none; }
.failures .why { display: block; color: var(--wrong); white-space: pre-line; }

.facts { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.facts h3 { margin-top: 1.25rem; color: var(--ink); font-size: 0.9375rem; }
dl { display: grid; grid-template-columns: minmax(6rem, 2fr) 3fr; gap: 0.1875rem 1rem; margin: 0.25rem 0 0; }
dt, dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
dd { color: var(--ink); }
details { margin-top: 1rem; }
summary { cursor: pointer; font-size: 0.9375rem; padding: 0.25rem 0; }
.protocol { font-size: 0.8125rem; margin-top: 0.5rem; }
.protocol th, .protocol td { padding: 0.25rem 1rem 0.25rem 0; vertical-align: top; border-top: 1px solid var(--rule); }
.protocol tbody th { color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; font-size: 0.8125rem; }
pre { background: var(--tint); padding: 1rem; overflow-x: auto; line-height: 1.45; border-radius: 0.375rem; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 2rem; }
  h1 { font-size: 1.5rem; }
  .verdict { font-size: 1.0625rem; }
  section { margin-top: 2rem; padding-top: 1.25rem; }
  .results th, .results td { padding: 0.5rem; font-size: 0.875rem; }
  .results tbody th { white-space: normal; min-width: 6.5rem; }
  .pictures .pixels { width: 64px; height: auto; }
  .pictures tbody th { min-width: 5.5rem; width: 5.5rem; }
  .pictures th { font-size: 0.75rem; }
}
@media print {
  body { max-width: none; } nav, .compare { display: none; }
}
"""

SCRIPT = """
(() => {
  "use strict";
  const table = document.querySelector("table.pictures");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells].slice(1)
    .map((cell) => ({name: cell.textContent, role: cell.className}));
  const lines = [...table.tBodies[0].rows].map((row) => ({
    prompt: row.cells[0].textContent, pictures: [...row.cells].slice(1).map((cell) => cell.querySelector("img")),
  }));
  if (heads.length < 2) return;
  const make = (tag, set = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), set);
    made.append(...children);
    return made;
  };
  const first = (...roles) =>
    Math.max(0, roles.map((role) => heads.findIndex((h) => h.role === role)).find((i) => i >= 0) ?? 0);
  const chooser = (told, chosen) => {
    const select = make("select", {}, ...heads.map((h, i) => make("option", {value: i, textContent: h.name})));
    select.selectedIndex = chosen;
    select.setAttribute("aria-label", `${told} picture`);
    return [select, make("label", {}, told, select)];
  };
  const [one, other] = [first("teacher", "data"), first("student")];
  const [left, leftLabel] = chooser("Left", one);
  const [right, rightLabel] = chooser("Right", other === one ? (one + 1) % heads.length : other);
  const slider = (told) => {
    const input = make("input", {type: "range", min: 0, max: 100, value: 50});
    input.setAttribute("aria-label", told);
    return input;
  };
  const every = slider("Every slider at once");
  const cards = make("div", {className: "cards"});
  const cut = (pair, value) => {
    pair.style.setProperty("--cut", `${value}%`);
    pair.querySelector("input").setAttribute("aria-valuetext", `${value} % ${heads[left.value].name}`);
  };
  const copy = (picture) => {
    const made = make("img", {src: picture.src, alt: picture.alt, width: picture.width, height: picture.height});
    made.className = picture.className;
    made.draggable = false;
    return made;
  };
  const show = () => {
    cards.replaceChildren();
    for (const {prompt, pictures} of lines) {
      const [one, other] = [pictures[left.value], pictures[right.value]];
      if (!one || !other) continue;
      const input = slider(`${prompt}: from ${heads[right.value].name} to ${heads[left.value].name}`);
      const pair = make("div", {className: "pair"}, copy(one), copy(other), input, make("i"));
      input.value = every.value;
      input.addEventListener("input", () => cut(pair, input.value));
      cut(pair, input.value);
      cards.append(make("figure", {}, pair, make("figcaption", {textContent: prompt})));
    }
  };
  every.addEventListener("input", () => {
    for (const pair of cards.querySelectorAll(".pair")) {
      pair.querySelector("input").value = every.value;
      cut(pair, every.value);
    }
  });
  left.addEventListener("change", show);
  right.addEventListener("change", show);
  const all = make("label", {}, "All sliders", every);
  document.querySelector(".compare").append(make("div", {className: "controls"}, leftLabel, rightLabel, all), cards);
  show();
})();
"""
