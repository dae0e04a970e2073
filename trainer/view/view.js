// What does the page show? One function for each view. All text goes through textContent.
"use strict";
const held = document.getElementById("data");
const HELD = held && JSON.parse(held.textContent);
const WHY = [ // the bits of rl/episodes/seen.py
  [1, "prompt", "Part of the prompt: the policy read it, and did not sample it."],
  [2, "read", "Read between two turns (an observation, or the result of a tool): the policy did not sample it."],
  [4, "clipped low", "Clipped at the lower bound: its advantage is negative, and the policy has already made it less likely by more than the clip allows."],
  [8, "clipped high", "Clipped at the upper bound: its advantage is positive, and the policy has already made it more likely by more than the clip allows."],
  [16, "dual clip", "Dual clip: its advantage is negative and its ratio is very large, so its loss is held at a bound."],
  [32, "weight 0", "The correction gave it weight 0: engine and trainer differ too much here."],
  [64, "outside support", "Outside the support: the trainer gives it no probability, though the engine sampled it."],
  [128, "masked", "Masked: the reply was cut off, and mask_truncated is on. Its reward still counts for its group."],
  [256, "zero advantage", "Its advantage is 0, as where every reply of a group got the same reward."],
  [512, "no gradient", "No gradient reached its log-probability: the objective leaves it out, or only the critic learns yet."],
  [1024, "left out", "Its group was not trained on."]];
const REASONS = {
  zero_advantage: "every reply of the group got the same reward", too_old: "its oldest token is more than max_staleness versions behind the step",
  all_truncated: "every reply was cut off", nonfinite_logprobs: "the engine gave a log-probability that is NaN or infinite",
  not_applicable: "the reward did not apply to any reply", overlong: "too many replies were cut off", too_hard: "its mean reward is too low",
  too_easy: "its mean reward is too high", engine_lost: "its engines died too often", env_error: "its environment failed too often",
  judge_error: "its judge failed too often", deadline: "the time of its episode was over while it waited" };
const signed = (x, top) => x == null ? "" : `rgba(${x < 0 ? "38,110,190" : "224,120,20"},${(Math.min(1, Math.abs(x) / top) ** .6 * .75).toFixed(2)})`;
const ratio = (s, i) => Math.exp(s.moved[i]);
// Values by which tokens are coloured. The scales are fixed, so that a quiet run looks quiet.
const COLOURS = {
  gap: { label: "gap: trainer − engine", top: 0.5, unit: "nats", of: (s, i) => s.gap[i] },
  moved: { label: "moved: now − old", top: 0.5, unit: "nats", of: (s, i) => s.moved[i] },
  push: { label: "push: advantage × weight × ratio", top: 2, unit: "", of: (s, i) => s.flags[i] ? 0 : s.advantage_at[i] * s.weight_at[i] * ratio(s, i) },
  entropy: { label: "entropy", top: 4, unit: "nats", of: (s, i) => s.entropy_at[i] },
  rollout: { label: "log-probability in the engine", top: 8, unit: "nats", of: (s, i) => s.rollout[i] },
  age: { label: "age: versions behind the step", top: 4, unit: "versions", of: (s, i) => s.version[i] < 0 ? null : s.step - 1 - s.version[i] } };
const PANELS = ["reward/mean", "actor/entropy", "rollout_corr/logprob_abs_diff_mean", "actor/clip_frac", "response_length/mean",
  "staleness/mean", "timing_s/step", "timing_s/wait_for_samples"];
const COLUMNS = ["step", "group", "episode", "state", "reason", "reward", "advantage", "tokens", "finish", "turns", "gap_mean", "gap_max",
  "clip_frac", "weight", "entropy", "silent", "version_min", "version_max", "engine"];
const TEXT = new Set(["state", "reason", "finish", "error", "parts", "paid", "verdicts"]);
const main = document.getElementById("main");
let run = null, keys = {}, colour = "gap", pulse = "";

// -- small things ---------------------------------------------------------------------------------------------------
function h(tag, given, ...inside) {
  const space = /^(svg|g|path|line|circle|rect|text|title)$/.test(tag) && "http://www.w3.org/2000/svg";
  const el = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(given || {}))
    if (name.startsWith("on")) el[name] = value; else if (value != null && value !== false) el.setAttribute(name, value);
  el.append(...inside.flat(Infinity).filter(x => x != null));
  return el;
}
const put = (el, ...inside) => el.replaceChildren(...inside.flat(Infinity).filter(x => x != null));
async function get(path) {
  if (HELD) { if (path in HELD) return HELD[path]; throw Error("this file does not hold it: run unison view on the run's folder"); }
  const answer = await fetch(path);
  if (!answer.ok) throw Error(await answer.text());
  return answer.json();
}
const number = x => x == null ? "n/a" : typeof x === "string" ? x : Number.isInteger(x) ? String(x) : Math.abs(x) >= 1000 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(4));
const facts = pairs => h("div", { class: "facts" }, pairs.map(([k, v]) => h("div", {}, h("small", {}, k), String(v))));
const link = (to, ...text) => h("a", { href: "#/" + to }, ...text);
const cell = (name, value) => h("td", { class: TEXT.has(name) && "text", title: TEXT.has(name) && value }, TEXT.has(name) ? value : number(value));
// Controls, marks of direction and what has no width are shown by number: they must not move other text.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
  c => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`).replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
function words(s, i) {
  const bits = WHY.filter(([bit]) => s.flags[i] & bit);
  const better = bits.length > 1 ? bits.filter(([bit]) => bit !== 512) : bits;
  return better.map(([bit, , text]) => bit === 1024 ? `${text} ${ended(s)}` : text);
}
const ended = s => s.state === "trained" ? "" : `The group was ${s.state} (${s.reason}): ${REASONS[s.reason] || "see the ledger"}.`;

// -- curves ---------------------------------------------------------------------------------------------------------
function curve(lines, alerts, go) {
  const W = 340, H = 120, L = 50, B = 18, points = lines.flat().filter(([, y]) => y != null);
  if (!points.length) return h("p", { class: "soft" }, "no values");
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const least = Math.min(...ys), most = Math.max(...ys), [x0, x1, y0] = [Math.min(...xs), Math.max(...xs), least], y1 = most > least ? most : least + 1;
  const X = x => L + (W - L - 8) * (x - x0) / (x1 - x0 || 1), Y = y => 8 + (H - B - 8) * (1 - (y - y0) / (y1 - y0));
  const svg = h("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (const y of [y0, y1]) svg.append(h("line", { class: "rule", x1: L, x2: W - 8, y1: Y(y), y2: Y(y) }),
    h("text", { x: L - 5, y: Y(y) + 3, "text-anchor": "end" }, number(+y.toPrecision(3))));
  for (const x of new Set([x0, x1])) svg.append(h("text", { x: X(x), y: H - 4, "text-anchor": x === x1 && x1 > x0 ? "end" : "start" }, number(x)));
  for (const a of alerts) if (a.step >= x0 && a.step <= x1) svg.append(h("line", { class: "mark", x1: X(a.step), x2: X(a.step), y1: 8, y2: H - B },
    h("title", {}, `step ${a.step}: ${a.title}`)));
  lines.forEach((line, n) => {
    const kept = line.filter(([, y]) => y != null), two = n ? " two" : "";
    svg.append(h("path", { class: "curve" + two, d: kept.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("") }));
    if (kept.length < 60) for (const [x, y] of kept) svg.append(h("circle", { class: "dot" + two, cx: X(x), cy: Y(y), r: 2.2 }));
  });
  const cross = h("line", { class: "cross", y1: 8, y2: H - B, visibility: "hidden" }), said = h("text", { y: 9, "text-anchor": "middle" });
  svg.append(cross, said);
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W;
    const near = points.reduce((a, b) => Math.abs(X(b[0]) - at) < Math.abs(X(a[0]) - at) ? b : a);
    cross.setAttribute("x1", X(near[0])); cross.setAttribute("x2", X(near[0])); cross.setAttribute("visibility", "visible");
    said.setAttribute("x", Math.min(W - 70, Math.max(L + 60, X(near[0]))));
    said.textContent = `step ${near[0]}: ` + lines.map(l => (l.find(p => p[0] === near[0]) || [])[1]).map(y => y == null ? "n/a" : y).join(" | ");
    svg.dataset.step = near[0];
  };
  svg.onmouseleave = () => { cross.setAttribute("visibility", "hidden"); said.textContent = ""; };
  if (go) svg.onclick = () => go(+svg.dataset.step);
  return svg;
}
const series = name => run.metrics.step.map((x, i) => [x, (run.metrics[name] || [])[i] ?? null]).filter(([, y]) => y != null);
function card(name) {
  const line = series(name);
  return h("section", { class: "card" }, h("h2", {}, name, h("span", {}, line.length ? number(line.at(-1)[1]) : "")),
    curve([line], run.alerts, step => run.steps.some(s => s[0] === step) && (location.hash = `#/step/${step}`)));
}
async function showRun() {
  const names = Object.keys(run.metrics).filter(n => n !== "step"), s = run.summary || {}, steps = run.metrics.step;
  const kept = run.steps.reduce((sum, x) => sum + x[4], 0), tokens = run.steps.reduce((sum, x) => sum + x[2], 0);
  const held = names.filter(n => /^eval\/.*(avg|pass)@/.test(n) && !n.endsWith("_se")), grid = h("div", { class: "grid" });
  grid.append(...[...PANELS.filter(n => n in run.metrics), ...held].map(card));
  const more = h("input", { list: "names", placeholder: "add a curve", "aria-label": "add a curve", onchange: () => {
    if (names.includes(more.value)) { grid.append(card(more.value)); more.value = ""; } } });
  put(main, h("h1", {}, run.name, h("span", { class: "soft" }, run.live ? " goes on" : ` ${s.status || "has no end"}`)),
    facts([["steps", steps.length ? steps.at(-1) : 0], ["alerts", run.alerts.length], ["rows recorded", run.steps.reduce((sum, x) => sum + x[1], 0)],
      ["tokens recorded", tokens], ["bytes a token", tokens ? (kept / tokens).toFixed(1) : "n/a"]]),
    s.error ? h("p", { class: "bad" }, s.error) : null,
    run.alerts.length ? h("section", {}, h("h2", {}, "Alerts"), run.alerts.map(a => h("p", {}, link(`step/${a.step}`, `step ${a.step}`), " ", h("b", { class: "bad" }, a.title), ". ", a.text))) : null,
    h("h2", {}, "Curves"), grid, h("div", { class: "tools" }, more, h("datalist", { id: "names" }, names.map(n => h("option", { value: n })))),
    h("h2", {}, "Rows of all steps"), await rows(null));
}

// -- rows -----------------------------------------------------------------------------------------------------------
async function rows(step) {
  let where = "", sort = step == null ? "gap_max" : "", falling = true, at = -1, found = { rows: [] };
  const box = h("div", { class: "scroll" }), count = h("span", { class: "soft" });
  const search = h("input", { type: "search", "aria-label": "filter", placeholder: `reward<0.5 gap_max>0.1 state=failed${step == null ? "" : " or words of the text"}`, value: "" });
  async function fill() {
    let asked = step == null ? "rows?limit=200" : `rows?step=${step}&limit=5000`;
    if (!HELD) asked += `&where=${encodeURIComponent(where)}&sort=${sort}&falling=${falling ? 1 : 0}`;
    if (HELD && step == null) return box.replaceChildren(h("p", { class: "soft" }, "Open a step: a file has no search over all steps."));
    try { found = await get(asked); } catch (error) { return count.replaceChildren(h("span", { class: "bad" }, error.message)); }
    let shown = found.rows;
    if (HELD) { // the server's part, over the rows of this step
      shown = shown.filter(r => where.split(/\s+/).filter(Boolean).every(w => {
        const c = /^([a-z_]+)(<=|>=|!=|=|<|>)(.+)$/.exec(w);
        if (!c) return JSON.stringify(r).toLowerCase().includes(w.toLowerCase());
        const [a, b] = TEXT.has(c[1]) ? [r[c[1]], c[3]] : [r[c[1]], +c[3]];
        return a != null && { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "=": a === b, "!=": a !== b }[c[2]];
      }));
      const order = (a, b) => a == null ? 1 : b == null ? -1 : (a < b ? -1 : a > b ? 1 : 0) * (falling ? -1 : 1);
      if (sort) shown = [...shown].sort((a, b) => order(a[sort], b[sort]));
    }
    count.textContent = `${shown.length} of ${HELD ? found.rows.length : found.total} rows`;
    const head = COLUMNS.map(name => h("th", { class: TEXT.has(name) && "text", "aria-sort": name === sort ? (falling ? "descending" : "ascending") : null },
      h("button", { class: name === sort && "by", onclick: () => { falling = sort !== name || !falling; sort = name; fill(); } },
        name.replaceAll("_", " ") + (name === sort ? (falling ? " ↓" : " ↑") : ""))));
    const body = shown.map(r => h("tr", { class: `to ${r.state}`, tabindex: 0, onclick: () => open(r), onkeydown: e => e.key === "Enter" && open(r) },
      COLUMNS.map(name => cell(name, r[name]))));
    box.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
    const go = by => { at = Math.min(body.length - 1, Math.max(0, at + by)); body[at]?.focus(); };
    keys = { j: () => go(1), k: () => go(-1), "/": () => search.focus() };
  }
  const open = r => { location.hash = `#/row/${r.step}/${r.group}/${r.episode}/${r.row}`; };
  let waiting = 0;
  search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => { where = search.value; fill(); }, 150); };
  await fill();
  return h("section", {}, h("div", { class: "tools" }, search, count, h("span", { class: "soft" }, h("kbd", {}, "/"), " search ", h("kbd", {}, "j"), " ", h("kbd", {}, "k"), " rows")), box);
}
async function showStep(step) {
  step = +step;
  const steps = run.steps.map(s => s[0]), i = steps.indexOf(step), at = run.metrics.step.indexOf(step);
  const of = name => at < 0 ? null : (run.metrics[name] || [])[at] ?? null, all = i < 0 ? { rows: [] } : await get(`rows?step=${step}&limit=5000`);
  const groups = Map.groupBy ? Map.groupBy(all.rows, r => r.group) : all.rows.reduce((m, r) => m.set(r.group, [...(m.get(r.group) || []), r]), new Map());
  const most = (rs, name) => rs.reduce((a, r) => r[name] == null ? a : Math.max(a ?? -Infinity, r[name]), null);
  const mean = (rs, name) => { const v = rs.map(r => r[name]).filter(x => x != null); return v.length ? v.reduce((a, b) => a + b, 0) / v.length : null; };
  const table = h("table", {}, h("thead", {}, h("tr", {}, ["group", "state", "reason", "replies", "reward", "spread", "tokens", "gap max", "clip", "oldest"].map(x => h("th", { class: TEXT.has(x) && "text" }, x)))),
    h("tbody", {}, [...groups].map(([g, rs]) => { const w = rs.map(r => r.reward).filter(x => x != null), first = rs.filter(r => !r.row);
      return h("tr", { class: `to ${rs[0].state}`, tabindex: 0, onclick: () => { location.hash = `#/group/${step}/${g}`; }, onkeydown: e => e.key === "Enter" && (location.hash = `#/group/${step}/${g}`) },
        h("td", {}, g), h("td", { class: "text" }, rs[0].state), h("td", { class: "text", title: REASONS[rs[0].reason] }, REASONS[rs[0].reason] || rs[0].reason), h("td", {}, first.length),
        h("td", {}, number(mean(first, "reward"))), h("td", {}, w.length ? number(Math.max(...w) - Math.min(...w)) : "n/a"), h("td", {}, number(mean(rs, "tokens"))),
        h("td", {}, number(most(rs, "gap_max"))), h("td", {}, number(mean(rs, "clip_frac"))), h("td", {}, rs[0].version_min)); })));
  // A row's mean counts as often as the row has tokens that a pass computed: the figures of metrics.jsonl again.
  const passed = all.rows.filter(r => r.passed), n = passed.reduce((a, r) => a + r.passed, 0);
  const over = name => n ? passed.reduce((a, r) => a + r[name] * r.passed, 0) / n : null;
  const again = [["reward/mean", mean(all.rows.filter(r => r.state === "trained" && !r.row), "reward")], ["rollout_corr/logprob_abs_diff_mean", over("gap_mean")],
    ["rollout_corr/logprob_abs_diff_max", most(passed, "gap_max")], ["actor/clip_frac", over("clip_frac")], ["actor/entropy", over("entropy")]];
  put(main, h("h1", {}, `Step ${step}`), facts(again.filter(([name]) => of(name) != null).map(([name]) => [name, of(name)])),
    h("details", {}, h("summary", {}, "The same figures from the recorded rows"), h("div", { id: "again" }, facts(again.map(([k, v]) => [k, v == null ? "n/a" : v])))),
    run.alerts.filter(a => a.step === step).map(a => h("p", {}, h("b", { class: "bad" }, a.title), ". ", a.text)),
    h("p", {}, i > 0 ? link(`step/${steps[i - 1]}`, "← step " + steps[i - 1]) : null, " \u2003 ", i >= 0 && i + 1 < steps.length ? link(`step/${steps[i + 1]}`, `step ${steps[i + 1]} →`) : null),
    i < 0 ? h("p", { class: "soft" }, "No row of this step is kept.") : h("section", {}, h("h2", {}, "Groups"), h("div", { class: "scroll" }, table), h("h2", {}, "Rows"), await rows(step)));
  keys.n = () => i + 1 < steps.length && (location.hash = `#/step/${steps[i + 1]}`);
  keys.p = () => i > 0 && (location.hash = `#/step/${steps[i - 1]}`);
}

// -- tokens ---------------------------------------------------------------------------------------------------------
function paint(el, s, i) {
  const value = COLOURS[colour].of(s, i), sampled = !(s.flags[i] & 3);
  el.style.backgroundColor = sampled ? signed(value, COLOURS[colour].top) : "";
}
const known = new Map(), RIGHT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/; // these must not turn their neighbours around
function tokens(s, from = 0, until = s.ids.length, differs = -1) {
  const box = h("div", { class: "tokens" }), made = document.createDocumentFragment();
  let last = null;
  for (let i = from - 1; i >= 0 && last == null; i--) if (!(s.flags[i] & 3)) last = s.version[i]; // of the turn before
  for (let i = from; i < until; i++) {
    const f = s.flags[i], text = s.text[i];
    if (!(f & 3)) {
      if (last != null && s.version[i] !== last) made.append(h("span", { class: "update", title: `an update landed here: v${last}, then v${s.version[i]}` }, `v${last} | v${s.version[i]}`));
      last = s.version[i];
    }
    const el = document.createElement("span");
    if (!known.has(text)) known.set(text, [text === "" ? "◦" : visible(text), text === "" ? "part " : RIGHT.test(text) ? "right " : ""]);
    const [shown, kind] = known.get(text);
    el.textContent = shown;
    el.className = kind + (f & 1 ? "given" : f & 2 ? "read" : (f & 28 ? "clip " : "") + (f & 1248 ? "cut " : "") + (f ? "silent" : "")) + (i === differs ? " differs" : "");
    el.i = i; el.s = s;
    paint(el, s, i);
    made.append(el);
  }
  box.append(made);
  return box;
}
function about(s, i) {
  const why = words(s, i), gap = s.gap[i], old = gap == null ? null : s.old_is_rollout ? s.rollout[i] : s.rollout[i] + gap, sampled = !(s.flags[i] & 3);
  const pairs = [["position", `${i + 1} of ${s.ids.length}`], ["id", s.ids[i]]];
  if (sampled) pairs.push(["version", `v${s.version[i]}`], ["turn", s.turn[i] + 1], ["engine, log-probability", number(s.rollout[i])], ["trainer, before the step", number(old)],
    ["trainer, last pass", number(old == null ? null : old + s.moved[i])], ["gap", number(gap)], ["moved", number(s.moved[i])], ["ratio", s.moved[i] == null ? "n/a" : number(ratio(s, i))],
    ["advantage", number(s.advantage_at[i])], ["weight", number(s.weight_at[i])], ["entropy", number(s.entropy_at[i])]);
  return [h("b", {}, s.text[i] === "" ? "part of a character" : visible(s.text[i]).replaceAll(" ", "␣")),
    h("p", { class: why.length ? "bad" : "good", id: "why" }, why.length ? why.join(" ") : "It learned."),
    h("dl", {}, pairs.map(([k, v]) => [h("dt", {}, k), h("dd", {}, String(v))]))];
}
function strip(s, go) {
  const canvas = h("canvas", { "aria-label": "the value at each position" });
  canvas.draw = () => {
    const W = canvas.width = Math.max(300, canvas.clientWidth * devicePixelRatio), H = canvas.height = 64 * devicePixelRatio, c = canvas.getContext("2d"), n = s.ids.length, top = COLOURS[colour].top;
    for (let i = 0; i < n; i++) {
      if (s.flags[i] & 3) continue;
      const v = COLOURS[colour].of(s, i), size = v == null ? 0 : Math.min(1, Math.abs(v) / top) ** .6 * H / 2;
      c.fillStyle = !size ? "#9a948a" : v < 0 ? "#266ebe" : "#e07814";
      c.fillRect(i / n * W, v < 0 ? H / 2 : H / 2 - size, Math.max(1, W / n), Math.max(1, size));
    }
  };
  canvas.onclick = e => go(Math.floor(e.offsetX / canvas.clientWidth * s.ids.length));
  return canvas;
}
function turns(s) { // [what, from, until] for the prompt, each turn, and what was read between
  const found = [];
  for (let i = 0; i < s.ids.length; i++) {
    const what = s.flags[i] & 1 ? "prompt" : s.flags[i] & 2 ? "read: an observation, or the result of a tool" : `turn ${s.turn[i] + 1}`;
    if (found.length && found.at(-1)[0] === what) found.at(-1)[2] = i + 1; else found.push([what, i, i + 1]);
  }
  return found;
}
function chooser(repaint) {
  return h("span", {}, h("select", { "aria-label": "colour by", onchange: e => { colour = e.target.value; repaint(); } },
    Object.entries(COLOURS).map(([k, c]) => h("option", { value: k, selected: k === colour && "" }, c.label))), " ", scale());
}
function scale() {
  const { top, unit } = COLOURS[colour], bar = h("span", { class: "scale" });
  bar.style.backgroundImage = `linear-gradient(to right, ${[-1, -.5, 0, .5, 1].map(x => signed(x, 1)).join(",")})`;
  return h("span", { class: "soft", id: "scale" }, `−${top} `, bar, ` ${top} ${unit}`);
}
function watch(box, panel) {
  let at = null;
  const show = el => { if (el.s == null || el === at) return; at?.classList.remove("at"); at = el; el.classList.add("at"); put(panel, about(el.s, el.i)); };
  box.addEventListener("mouseover", e => show(e.target));
  return { show: i => { const el = [...box.querySelectorAll(".tokens span")].find(x => x.i === i); if (el) { show(el); el.scrollIntoView({ block: "center" }); } }, at: () => at?.i ?? -1 };
}
async function showRow(step, group, episode, row, token) {
  const all = await get(`sequences?step=${step}&group=${group}`), i = all.findIndex(x => x.episode === +episode && x.row === +row), s = all[i];
  if (!s) return put(main, h("p", {}, "This row is not kept."));
  const box = h("div", {}), panel = h("aside", { class: "about card", "aria-live": "polite" }, h("p", { class: "soft" }, "Point at a token, or press ", h("kbd", {}, "n"), " for the next one with a reason."));
  let paid = s.paid ? JSON.parse(s.paid) : [];
  for (const [what, from, until] of turns(s)) {
    const got = paid.filter(([at]) => at >= from && at < until).map(([, x]) => `paid ${number(x)}`).join(", ");
    const inside = [h("div", { class: "turn" }, h("b", {}, what), `${until - from} tokens`, got), tokens(s, from, until)];
    box.append(what === "prompt" && until - from > 400 ? h("details", {}, h("summary", {}, `the prompt, ${until - from} tokens`), inside) : h("section", {}, inside));
  }
  const here = watch(box, panel), line = strip(s, here.show);
  const repaint = () => { for (const el of box.querySelectorAll(".tokens span")) if (el.s) paint(el, el.s, el.i); line.draw(); document.getElementById("scale").replaceWith(scale()); };
  const counts = WHY.map(([bit, name]) => [name, s.flags.filter(f => f & bit && !(f & 3)).length]).filter(([, n]) => n);
  put(main, h("p", {}, link(`step/${step}`, `step ${step}`), " › ", link(`group/${step}/${group}`, `group ${group}`)), h("h1", {}, `Episode ${episode}${+row ? `, row ${row}` : ""}`),
    facts([["state", s.state + (s.reason ? ` (${s.reason})` : "")], ["reward", number(s.reward)], ...Object.entries(s.parts ? JSON.parse(s.parts) : {}).map(([k, v]) => [`reward ${k}`, number(v)]),
      ["advantage", number(s.advantage)], ["tokens", s.tokens], ["end", s.finish], ["gap mean", number(s.gap_mean)], ["gap max", number(s.gap_max)], ["engine", s.engine < 0 ? "n/a" : s.engine],
      ["versions", s.version_min === s.version_max ? s.version_min : `${s.version_min} to ${s.version_max}`], ["seconds", s.ended && s.began ? number(s.ended - s.began) : "n/a"]]),
    s.state !== "trained" ? h("p", { class: "bad", id: "ended" }, ended(s), s.error ? ` ${s.error}` : "") : null,
    s.verdicts ? h("details", {}, h("summary", {}, "what judges said"), JSON.parse(s.verdicts).map(v => h("p", {}, h("b", {}, `${v[0]}: ${number(v[1])} `), v[2]))) : null,
    counts.length ? h("p", { class: "soft" }, "Tokens that did not learn: " + counts.map(([k, n]) => `${n} ${k}`).join(", ")) : null,
    h("div", { class: "tools" }, chooser(repaint), h("span", { class: "soft" }, h("kbd", {}, "j"), " ", h("kbd", {}, "k"), " rows ", h("kbd", {}, "n"), " ", h("kbd", {}, "p"), " tokens with a reason ", h("kbd", {}, "c"), " colour")),
    h("div", { class: "card" }, line), h("div", { class: "reading" }, box, panel));
  line.draw();
  if (token) here.show(+token);
  const to = by => { const next = all[i + by]; if (next) location.hash = `#/row/${step}/${group}/${next.episode}/${next.row}`; };
  const marked = s.flags.map((f, k) => f && !(f & 3) ? k : -1).filter(k => k >= 0);
  keys = { j: () => to(1), k: () => to(-1), n: () => here.show(marked.find(k => k > here.at()) ?? marked[0]), p: () => here.show(marked.findLast(k => k < here.at()) ?? marked.at(-1)),
    c: () => { const names = Object.keys(COLOURS); colour = names[(names.indexOf(colour) + 1) % names.length]; document.querySelector("main select").value = colour; repaint(); } };
}
const begins = all => { let n = 0; const most = Math.min(...all.map(s => s.ids.length)); while (n < most && all.every(s => s.ids[n] === all[0].ids[n])) n++; return n; };
function columns(all, panel, titles) {
  const part = begins(all), same = Math.min(part, ...all.map(s => s.prompt_tokens)), box = h("div", {});
  if (same) box.append(h("details", {}, h("summary", {}, `all have the same ${same} tokens of their prompt`), tokens(all[0], 0, same)));
  box.append(h("div", { class: "side" }, all.map((s, n) => h("section", { class: "card" }, h("h2", {}, titles(s, n), h("span", {}, `reward ${number(s.reward)}`)),
    s.parts && s.parts !== "{}" ? h("p", { class: "soft" }, Object.entries(JSON.parse(s.parts)).map(([k, v]) => `${k} ${number(v)}`).join(", ")) : null,
    s.state === "trained" ? null : h("p", { class: "bad" }, ended(s), s.error ? ` ${s.error}` : ""), tokens(s, same, s.ids.length, all.length > 1 ? part : -1)))));
  watch(box, panel);
  return box;
}
async function showGroup(step, group) {
  const all = await get(`sequences?step=${step}&group=${group}`), panel = h("aside", { class: "about card" }, h("p", { class: "soft" }, "Point at a token."));
  if (!all.length) return put(main, h("p", {}, "This group is not kept."));
  const box = columns(all, panel, s => link(`row/${step}/${group}/${s.episode}/${s.row}`, `episode ${s.episode}${s.row ? `, row ${s.row}` : ""}`));
  const repaint = () => { for (const el of box.querySelectorAll(".tokens span")) if (el.s) paint(el, el.s, el.i); document.getElementById("scale").replaceWith(scale()); };
  put(main, h("p", {}, link(`step/${step}`, `step ${step}`)), h("h1", {}, `Group ${group}`), h("div", { class: "tools" }, chooser(repaint)), h("div", { class: "reading" }, box, panel));
  const next = by => { const groups = [...new Set(inStep.map(r => r.group))], to = groups[groups.indexOf(+group) + by]; if (to != null) location.hash = `#/group/${step}/${to}`; };
  const inStep = (await get(`rows?step=${step}&limit=5000`)).rows;
  keys = { j: () => next(1), k: () => next(-1) };
}

// -- time, doctor, compare ------------------------------------------------------------------------------------------
const LANES = { 1: "engine", 2: "groups", 3: "learner rank", 4: "run" }, INKS = ["#2a6296", "#b4570a", "#2d6a3e", "#7a5195", "#a05a2c", "#4b8f8c", "#8a8a2a"];
const QUEUES = ["sampling", "scoring", "ready"];
async function showTime() {
  const all = await get("time"), events = all.filter(e => e.ph === "X" || e.ph === "i"), first = events[0]?.ts ?? 0, end = events.reduce((t, e) => Math.max(t, e.ts + (e.dur || 0)), 0);
  if (!events.length) return put(main, h("p", {}, "No times are recorded."));
  let from = first, until = end;
  const canvas = h("canvas", { class: "lanes" }), said = h("p", { class: "soft" }, "Wheel: zoom. Drag: move. Colours stand for names."), inks = new Map();
  const depths = all.filter(e => e.ph === "C"), deepest = depths.reduce((n, e) => Math.max(n, ...Object.values(e.args)), 1);
  const lanes = [...new Set(events.map(e => e.pid * 1e9 + e.tid))].sort((a, b) => (a >= 4e9 ? a - 9e9 : a) - (b >= 4e9 ? b - 9e9 : b)), row = new Map(lanes.map((x, i) => [x, i])), R = 14, L = 96;
  const ink = name => { const k = name.replace(/[\d.]+/g, ""); if (!inks.has(k)) inks.set(k, INKS[inks.size % INKS.length]); return inks.get(k); };
  let boxes = [];
  function draw() {
    const d = devicePixelRatio, W = canvas.clientWidth || 900, Q = lanes.length * R, H = Q + 90, c = canvas.getContext("2d"), style = getComputedStyle(document.body);
    canvas.width = W * d; canvas.height = H * d; canvas.style.height = H + "px"; c.scale(d, d); c.font = "10px sans-serif"; boxes = [];
    const X = t => L + (W - L) * (t - from) / (until - from || 1);
    lanes.forEach((lane, i) => { if (i === 0 || Math.floor(lane / 1e6) !== Math.floor(lanes[i - 1] / 1e6) || lane % 1000 === 0) { c.fillStyle = style.color; const p = Math.floor(lane / 1e9); c.fillText(`${LANES[p]} ${p === 1 || p === 3 ? Math.floor(lane % 1e9 / 1000) : ""}`, 2, i * R + 11); } });
    c.save(); c.beginPath(); c.rect(L, 0, W, H); c.clip();
    for (const e of events) {
      const x = X(e.ts), w = Math.max(e.ph === "i" ? 2 : .5, X(e.ts + (e.dur || 0)) - x), y = row.get(e.pid * 1e9 + e.tid) * R;
      if (x + w < L || x > W) continue;
      c.fillStyle = e.ph === "i" || /failed/.test(e.args?.end) ? "#b3261e" : ink(e.name); c.globalAlpha = .85; c.fillRect(x, y + 1, w, R - 3); c.globalAlpha = 1;
      if (w > 46) { c.save(); c.beginPath(); c.rect(x, y, w - 2, R); c.clip(); c.fillStyle = "#fff"; c.fillText(e.name, x + 3, y + 10); c.restore(); }
      boxes.push([x, y, w, e]);
    }
    QUEUES.forEach((state, q) => { // how many groups are in each queue, under the lanes
      c.strokeStyle = INKS[q]; c.lineWidth = 1.5; c.beginPath();
      let y = Q + 68;
      depths.forEach((e, i) => { if (i) c.lineTo(X(e.ts), y); y = Q + 68 - 50 * e.args[state] / deepest; c.lineTo(X(e.ts), y); });
      c.stroke(); c.restore(); c.fillStyle = INKS[q]; c.fillText(state, 2, Q + 30 + 13 * q); c.save(); c.beginPath(); c.rect(L, 0, W, H); c.clip();
    });
    c.restore(); c.fillStyle = style.color; c.fillText(`groups, at most ${deepest}`, L, Q + 14);
    for (let k = 0; k <= 4; k++) c.fillText(((from + (until - from) * k / 4 - first) / 1e6).toFixed(1) + " s", Math.min(W - 40, L + (W - L) * k / 4), H - 4);
  }
  canvas.onmousemove = e => {
    if (e.buttons) { const by = (until - from) * -e.movementX / (canvas.clientWidth - L); from += by; until += by; return draw(); }
    const hit = boxes.findLast(([x, y, w]) => e.offsetX >= x && e.offsetX <= x + w && e.offsetY >= y && e.offsetY < y + R);
    if (hit) { const a = hit[3].args || {}; said.textContent = `${hit[3].name}: ${((hit[3].dur || 0) / 1e6).toFixed(3)} s ${a.end ? `, ${a.end}: ` + a.moves.map(([s, t], i) => `${s} ${(((a.moves[i + 1] || [0, hit[3].ts + hit[3].dur])[1] - t) / 1e6).toFixed(2)} s`).join(", ") : Object.entries(a).map(([k, v]) => `${k} ${v}`).join(", ")}`; }
  };
  canvas.onwheel = e => { e.preventDefault(); const at = from + (until - from) * (e.offsetX - L) / (canvas.clientWidth - L), by = e.deltaY > 0 ? 1.25 : .8; from = at - (at - from) * by; until = at + (until - at) * by; draw(); };
  const total = new Map(); // seconds of the run's own work by kind
  for (const e of events) if (e.pid === 4 && e.dur) { const k = e.name.replace(/ (step |to v)[\d.]+$/, ""); total.set(k, (total.get(k) || 0) + e.dur / 1e6); }
  put(main, h("h1", {}, "Time"), facts([...total].map(([k, v]) => [k, `${v.toFixed(1)} s`])), h("div", { class: "card" }, canvas), said,
    h("p", { class: "soft" }, "unison view RUN --export time.json writes the same for ui.perfetto.dev, with the depths of the queues."));
  draw();
}
async function showDoctor() {
  const d = await get("doctor");
  if (!d) return put(main, h("p", {}, "The doctor was off, or its report could not be written."));
  const text = x => x == null ? "" : typeof x === "object" ? JSON.stringify(x) : String(x);
  const table = (title, list) => list?.length ? [h("h2", {}, title), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, Object.keys(list[0]).map(k => h("th", { class: "text" }, k)))),
    h("tbody", {}, list.map(r => h("tr", {}, Object.values(r).map(v => h("td", { class: "wide" }, text(v))))))))] : [];
  put(main, h("h1", { class: d.verdict === "well" ? "good" : "bad" }, d.sentence), ...table("Findings", d.findings), ...table("Comparisons", d.comparisons), ...table("What was checked", d.coverage),
    h("p", { class: "soft" }, "The whole report with its figures is doctor.html in the run's folder."));
}
async function showCompare() {
  const c = await get("compare"), panel = h("aside", { class: "about card" }, h("p", { class: "soft" }, "Point at a token."));
  const parted = Object.entries(c.parted);
  put(main, h("h1", {}, h("span", { class: "key" }, "— " + c.names[0]), "  ", h("span", { class: "key two" }, "- - " + c.names[1])),
    h("h2", {}, "Settings that differ"), c.settings.length ? h("table", {}, h("tbody", {}, c.settings.map(r => h("tr", {}, r.map(v => h("td", { class: "wide" }, typeof v === "object" ? JSON.stringify(v) : String(v))))))) : h("p", {}, "none"),
    h("h2", {}, "Where curves part: the first step at which they differ by more than 3 standard errors"),
    h("div", { class: "grid" }, parted.map(([name, step]) => h("section", { class: "card" }, h("h2", {}, name, h("span", {}, step == null ? "never" : `at step ${step}`)), curve(c.curves[name], step == null ? [] : [{ step, title: "they part" }])))),
    h("h2", {}, "The last prompt that both were given"),
    c.prompt ? h("div", { class: "reading" }, columns(c.prompt.flatMap((rs, n) => rs.slice(0, 2).map(s => Object.assign(s, { of: n }))), panel, s => `${c.names[s.of]}, step ${s.step}`), panel) : h("p", {}, "none of the last 20 steps"));
}

// -- the page -------------------------------------------------------------------------------------------------------
const VIEWS = { run: showRun, step: showStep, group: showGroup, row: showRow, time: showTime, doctor: showDoctor, compare: showCompare };
async function show() {
  const [name, ...given] = location.hash.slice(2).split("/"), view = VIEWS[name] ? name : run.compare ? "compare" : "run";
  keys = {};
  document.getElementById("name").replaceChildren(link("run", run.name));
  document.getElementById("state").textContent = run.live ? "● live" : "";
  const last = run.steps.at(-1)?.[0];
  document.getElementById("nav").replaceChildren(...["run", last != null && "step", "time", "doctor", run.compare && "compare"].filter(Boolean).map(v =>
    h("a", { href: v === "step" ? `#/step/${last}` : `#/${v}`, class: v === view && "here" }, v === "step" ? "last step" : v)));
  document.title = `${run.name}: ${[view, ...given].join(" ")}`;
  try { await VIEWS[view](...given); } catch (error) { put(main, h("p", { class: "bad" }, error.message)); }
  main.focus({ preventScroll: true }); scrollTo(0, 0);
  document.body.dataset.shown = location.hash || "#/";
}
addEventListener("hashchange", show);
addEventListener("keydown", e => {
  if (/^(INPUT|SELECT)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
  if (!e.ctrlKey && !e.metaKey && !e.altKey && keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
async function begin() {
  run = await get("run");
  await show();
  if (HELD) return;
  setInterval(async () => { // what a run appends is shown within two seconds
    const now = JSON.stringify(await get("pulse").catch(() => pulse));
    if (pulse && now !== pulse) { run = await get("run"); if (/^(#\/(run)?)?$/.test(location.hash) && !document.querySelector("input:focus")) show(); }
    pulse = now;
  }, 1500);
}
begin();
