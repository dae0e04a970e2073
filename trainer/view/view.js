// What does the page show? One function for each view. All text goes through textContent.
"use strict";
const held = document.getElementById("data");
const HELD = held && JSON.parse(held.textContent);
const WHY = [ // the bits of rl/episodes/seen.py
  [1, "prompt", "Part of the prompt: the policy read it, and did not sample it."],
  [2, "read", "Read between two turns (an observation, or the result of a tool): the policy did not sample it."],
  [4, "clipped low", "Clipped at the lower bound: advantage < 0, and already less likely by more than it allows."],
  [8, "clipped high", "Clipped at the upper bound: advantage > 0, and already more likely by more than it allows."],
  [16, "dual clip", "Dual clip: its advantage is negative, its ratio very large, and its loss is held at a bound."],
  [32, "weight 0", "The correction gave it weight 0: engine and trainer differ too much here."],
  [64, "outside support", "Outside the support: the trainer gives it no probability, though the engine sampled it."],
  [128, "masked", "Masked: the reply was cut off, and mask_truncated is on. Its reward still counts for its group."],
  [256, "zero advantage", "Its advantage is 0, as where every reply of a group got the same reward."],
  [512, "no gradient", "No gradient reached it: the objective leaves it out, or only the critic learns yet."],
  [1024, "left out", "Its group was not trained on."]];
const REASONS = {
  zero_advantage: "every reply of the group got the same reward",
  too_old: "its oldest token is more than max_staleness versions behind the step",
  all_truncated: "every reply was cut off", overlong: "too many replies were cut off",
  nonfinite_logprobs: "the engine gave a log-probability that is NaN or infinite",
  not_applicable: "the reward did not apply to any reply",
  too_hard: "its mean reward is too low", too_easy: "its mean reward is too high",
  engine_lost: "its engines died too often", env_error: "its environment failed too often",
  judge_error: "its judge failed too often",
  deadline: "the time of its episode was over while it waited" };
// Values by which tokens are coloured. The scales are fixed, so that a quiet run looks quiet.
const COLOURS = {
  gap: { label: "gap: trainer − engine", top: 0.5, unit: "nats", of: (s, i) => s.gap[i] },
  moved: { label: "moved: now − old", top: 0.5, unit: "nats", of: (s, i) => s.moved[i] },
  push: { label: "push: advantage × weight × ratio", top: 2, unit: "",
    of: (s, i) => s.flags[i] ? 0 : s.advantage_at[i] * s.weight_at[i] * Math.exp(s.moved[i]) },
  entropy: { label: "entropy", top: 4, unit: "nats", of: (s, i) => s.entropy_at[i] },
  rollout: { label: "log-probability in the engine", top: 8, unit: "nats", of: (s, i) => s.rollout[i] },
  age: { label: "age: versions behind the step", top: 4, unit: "versions",
    of: (s, i) => s.version[i] < 0 ? null : s.step - 1 - s.version[i] } };
const PANELS = ["reward/mean", "actor/entropy", "rollout_corr/logprob_abs_diff_mean", "actor/clip_frac",
  "response_length/mean", "staleness/mean", "timing_s/step", "timing_s/wait_for_samples"];
const COLUMNS = ["step", "group", "episode", "state", "reason", "reward", "advantage", "tokens", "finish", "turns",
  "gap_mean", "gap_max", "clip_frac", "weight", "entropy", "silent", "version_min", "version_max", "engine"];
const TEXT = new Set(["state", "reason", "finish", "error", "parts", "paid", "verdicts"]);
const main = document.getElementById("main");
let run = null, keys = {}, colour = "gap", pulse = "";

// -- small things ---------------------------------------------------------------------------------------------------
function h(tag, given, ...inside) {
  const space = /^(svg|path|line|polyline|rect|circle|text|title)$/.test(tag) && "http://www.w3.org/2000/svg";
  const el = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(given || {})) {
    if (name.startsWith("on")) el[name] = value;
    else if (value != null && value !== false) el.setAttribute(name, value);
  }
  put(el, ...inside);
  return el;
}
const put = (el, ...inside) => el.replaceChildren(...inside.flat(Infinity).filter(x => x != null));
async function get(path) {
  if (HELD && path in HELD) return HELD[path];
  if (HELD) throw Error("this file does not hold it: run unison view on the run's folder");
  const answer = await fetch(path);
  if (!answer.ok) throw Error(await answer.text());
  return answer.json();
}
const LISTS = ["ids", "flags", "version", "turn", "rollout", "gap", "moved", "entropy_at", "weight_at", "advantage_at"];
function unpacked(s) { // what compact() of trainer/view/rollouts.py packed
  const list = ([kind, packed]) => {
    const text = atob(packed), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new globalThis[kind](bytes.buffer);
  };
  return { ...s, ...Object.fromEntries(LISTS.map(name => [name, list(s[name])])) };
}
const sequences = async path => (await get(path)).map(unpacked);
const none = x => x == null || x !== x, three = x => number(x, 3);
function number(x, digits = 4) {
  if (none(x)) return "n/a";
  if (typeof x === "string" || Number.isInteger(x)) return String(x);
  return Math.abs(x) >= 1000 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(digits));
}
const facts = pairs => h("div", { class: "facts" }, pairs.map(([k, v]) => h("div", {}, h("small", {}, k), String(v))));
const go = view => { location.hash = "#/" + view; };
const link = (view, ...text) => h("a", { href: "#/" + view }, ...text);
const soft = (...text) => h("span", { class: "soft" }, ...text);
const key = (...names) => names.flatMap(name => [h("kbd", {}, name), " "]);
const mean = values => values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
const most = values => values.length ? values.reduce((a, b) => Math.max(a, b)) : null;
const known = (rows, name) => rows.map(r => r[name]).filter(x => x != null);
const cell = (name, x) => TEXT.has(name) ? h("td", { class: "text", title: x }, x) : h("td", {}, number(x));
// Rows are [class, view that a click opens, cells].
function table(head, rows) {
  const line = ([kind, view, cells]) => h("tr", view ? { class: `to ${kind}`, tabindex: 0, onclick: () => go(view),
    onkeydown: e => e.key === "Enter" && go(view) } : {}, cells);
  return h("div", { class: "scroll" },
    h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows.map(line))));
}
const plain = x => h("td", { class: "wide" }, x == null ? "" : typeof x === "object" ? JSON.stringify(x) : String(x));
// Controls, marks of direction and what has no width are shown by number: they must not move other text.
const ODD = /[^\P{C}\n\t]|[\u115f\u180e\u2028\u2029\u034f\u3164]/gu;
const code = c => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const visible = text => text.replace(ODD, code).replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
const ended = s => s.state === "trained" ? "" :
  `The group was ${s.state} (${s.reason}): ${REASONS[s.reason] || "see the ledger"}. ${s.error}`;
const sampled = (s, i) => !(s.flags[i] & 3);

// -- curves ---------------------------------------------------------------------------------------------------------
function curve(lines, alerts, open) {
  const W = 340, H = 120, L = 50, B = 18, points = lines.flat();
  if (!points.length) return h("p", { class: "soft" }, "no values");
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const x0 = -most(xs.map(x => -x)), x1 = most(xs), y0 = -most(ys.map(y => -y)), y1 = most(ys) > y0 ? most(ys) : y0 + 1;
  const X = x => L + (W - L - 8) * (x - x0) / (x1 - x0 || 1), Y = y => 8 + (H - B - 8) * (1 - (y - y0) / (y1 - y0));
  const svg = h("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (const y of [y0, y1]) svg.append(h("line", { class: "rule", x1: L, x2: W - 8, y1: Y(y), y2: Y(y) }),
    h("text", { x: L - 5, y: Y(y) + 3, "text-anchor": "end" }, number(+y.toPrecision(3))));
  for (const x of new Set([x0, x1]))
    svg.append(h("text", { x: X(x), y: H - 4, "text-anchor": x > x0 ? "end" : "start" }, number(x)));
  for (const a of alerts.filter(a => a.step >= x0 && a.step <= x1))
    svg.append(h("line", { class: "mark", x1: X(a.step), x2: X(a.step), y1: 8, y2: H - B },
      h("title", {}, `step ${a.step}: ${a.title}`)));
  lines.forEach((line, n) => {
    const two = n ? " two" : "", d = line.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`);
    svg.append(h("path", { class: "curve" + two, d: d.join("") }));
    if (line.length > 60) return;
    for (const [x, y] of line) svg.append(h("circle", { class: "dot" + two, cx: X(x), cy: Y(y), r: 2.2 }));
  });
  // One place for each column of pixels: its tooltip has the exact values, and a click opens the step.
  const places = new Map(points.map(([x]) => [Math.round(X(x)), x])), width = Math.max(4, (W - L) / places.size);
  const values = lines.map(line => new Map(line)), said = x => values.map(of => of.get(x) ?? "n/a").join(" | ");
  for (const [at, x] of places) svg.append(h("rect", { class: "place", x: at - width / 2, y: 8, width, height: H - B,
    onclick: () => open?.(x) }, h("title", {}, `step ${x}: ${said(x)}`)));
  return svg;
}
function card(name) {
  const line = run.metrics.step.map((x, i) => [x, run.metrics[name][i]]).filter(([, y]) => y != null);
  return h("section", { class: "card" }, h("h2", {}, name, h("span", {}, line.length ? number(line.at(-1)[1]) : "")),
    curve([line], run.alerts, step => run.steps.some(s => s[0] === step) && go(`step/${step}`)));
}
const warning = (alert, ...before) => h("p", {}, before, h("b", { class: "bad" }, alert.title), ". ", alert.text);
const below = h("div", {}); // where they are, so that a live run's page keeps its rows until it has newer ones
async function showRun() {
  const names = Object.keys(run.metrics).filter(n => n !== "step"), s = run.summary;
  const recorded = run.steps.reduce((sum, [, bytes]) => sum + bytes, 0) / 2 ** 20;
  const evals = names.filter(n => /^eval\/.*(avg|pass)@/.test(n) && !n.endsWith("_se"));
  const grid = h("div", { class: "grid" }, [...PANELS.filter(n => n in run.metrics), ...evals].map(card));
  const more = h("input", { list: "names", placeholder: "add a curve", "aria-label": "add a curve", onchange: () => {
    if (names.includes(more.value)) { grid.append(card(more.value)); more.value = ""; } } });
  put(main, h("h1", {}, run.name, soft(" " + run.status)),
    facts([["steps", run.metrics.step?.at(-1) ?? 0], ["alerts", run.alerts.length],
      ["steps recorded", run.steps.length], ["MiB recorded", number(recorded)]]),
    s.error ? h("p", { class: "bad" }, s.error) : null,
    run.alerts.length ? h("h2", {}, "Alerts") : null,
    h("div", { class: "alerts" }, run.alerts.map(a => warning(a, link(`step/${a.step}`, `step ${a.step}`), " "))),
    h("h2", {}, "Curves"), grid,
    h("div", { class: "tools" }, more, h("datalist", { id: "names" }, names.map(n => h("option", { value: n })))),
    h("h2", {}, "Rows of all steps"), below);
  rows(null).then(made => put(below, made)); // a long run has many files: the curves do not wait for them
}

// -- rows -----------------------------------------------------------------------------------------------------------
function found(rows, where, sort, falling) { // in a file: what trainer/view/rollouts.py does in the server
  const order = (a, b) => a == null ? 1 : b == null ? -1 : (a < b ? -1 : a > b ? 1 : 0) * (falling ? -1 : 1);
  const kept = rows.filter(r => where.split(/\s+/).filter(Boolean).every(word => {
    const [, name, sign, value] = /^([a-z_]+)(<=|>=|!=|=|<|>)(.+)$/.exec(word) || [];
    if (!name) return JSON.stringify(r).toLowerCase().includes(word.toLowerCase());
    const a = r[name], b = TEXT.has(name) ? value : +value;
    return a != null && { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "=": a === b, "!=": a !== b }[sign];
  }));
  return sort ? kept.sort((a, b) => order(a[sort], b[sort])) : kept;
}
async function rows(step) {
  if (HELD && step == null) return soft("Open a step: a file has no search over all steps.");
  let where = "", sort = step == null ? "gap_max" : "", falling = true, at = -1, waiting = 0;
  const mine = keys, heads = COLUMNS.slice(step == null ? 0 : 1); // the keys: another view may come before the answer
  const box = h("div", {}), count = soft(), search = h("input", { type: "search", "aria-label": "filter",
    placeholder: `reward<0.5 gap_max>0.1 state=failed${step == null ? "" : " or words of the text"}` });
  async function fill() {
    let asked = step == null ? "rows?limit=100" : `rows?step=${step}&limit=5000`, answer;
    if (!HELD) asked += `&where=${encodeURIComponent(where)}&sort=${sort}&falling=${+falling}`;
    try { answer = await get(asked); } catch (error) { return put(count, h("span", { class: "bad" }, error.message)); }
    const shown = HELD ? found(answer.rows, where, sort, falling) : answer.rows;
    count.textContent = `${shown.length} of ${answer.total} rows`;
    const by = name => { falling = sort !== name || !falling; sort = name; fill(); };
    const head = heads.map(name => h("th", { class: TEXT.has(name) && "text" }, h("button",
      { class: name === sort && "by", onclick: () => by(name) },
      name.replaceAll("_", " ") + (name !== sort ? "" : falling ? " ↓" : " ↑"))));
    put(box, table(head, shown.map(r => [r.state, `row/${r.step}/${r.group}/${r.episode}/${r.row}`,
      heads.map(name => cell(name, r[name]))])));
    const lines = box.querySelectorAll("tbody tr");
    const move = by => { at = Math.min(lines.length - 1, Math.max(0, at + by)); lines[at]?.focus(); };
    Object.assign(mine, { j: () => move(1), k: () => move(-1), "/": () => search.focus() });
  }
  search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => { where = search.value; fill(); }, 150); };
  await fill();
  const help = soft(key("/"), "search ", key("j", "k"), "rows");
  return h("section", {}, h("div", { class: "tools" }, search, count, help), box);
}
async function showStep(step) {
  const steps = run.steps.map(s => s[0]), i = steps.indexOf(+step), at = run.metrics.step?.indexOf(+step);
  const all = i < 0 ? [] : (await get(`rows?step=${step}&limit=5000`)).rows, groups = new Map();
  for (const r of all) groups.set(r.group, [...(groups.get(r.group) || []), r]);
  const head = ["group", "state", "reason", "replies", "reward", "spread", "tokens", "gap max", "clip", "oldest"];
  const lines = [...groups].map(([group, rs]) => {
    const [r] = rs, rewards = known(rs.filter(r => !r.row), "reward");
    const numbers = [mean(rewards), most(rewards) - Math.min(...rewards), mean(known(rs, "tokens")),
      most(known(rs, "gap_max")), mean(known(rs, "clip_frac")), r.version_min];
    return [r.state, `group/${step}/${group}`, [cell("group", group), cell("state", r.state),
      cell("reason", REASONS[r.reason] || r.reason), cell("replies", rs.filter(r => !r.row).length),
      numbers.map(x => cell("", x === -Infinity ? null : x))]];
  });
  // A row's mean counts as often as the row has tokens that a pass computed: the figures of metrics.jsonl again.
  const passed = all.filter(r => r.passed), n = passed.reduce((a, r) => a + r.passed, 0);
  const over = name => n ? passed.reduce((a, r) => a + r[name] * r.passed, 0) / n : null;
  const again = [["reward/mean", mean(known(all.filter(r => r.state === "trained" && !r.row), "reward"))],
    ["rollout_corr/logprob_abs_diff_mean", over("gap_mean")],
    ["rollout_corr/logprob_abs_diff_max", most(known(passed, "gap_max"))],
    ["actor/clip_frac", over("clip_frac")], ["actor/entropy", over("entropy")]];
  const metric = name => run.metrics[name]?.[at];
  const next = by => steps[i + by] == null || i < 0 ? null : `step/${steps[i + by]}`;
  put(main, h("h1", {}, `Step ${step}`),
    facts(again.filter(([name]) => metric(name) != null).map(([name]) => [name, metric(name)])),
    h("details", {}, h("summary", {}, "The same figures from the recorded rows"),
      facts(again.map(([k, v]) => [k, v ?? "n/a"]))),
    run.alerts.filter(a => a.step === +step).map(a => warning(a)),
    h("p", {}, next(-1) && link(next(-1), "← step before"), " \u2003 ", next(1) && link(next(1), "step after →")),
    i < 0 ? h("p", { class: "soft" }, "No row of this step is kept.") : [
      h("h2", {}, "Groups"), table(head.map(x => h("th", { class: TEXT.has(x) && "text" }, x)), lines),
      h("h2", {}, "Rows"), await rows(step)]);
  Object.assign(keys, { n: () => next(1) && go(next(1)), p: () => next(-1) && go(next(-1)) });
}

// -- tokens ---------------------------------------------------------------------------------------------------------
const size = (x, top) => Math.min(1, Math.abs(x) / top) ** .6;
const ink = (x, top) => `rgba(${x < 0 ? "38,110,190" : "224,120,20"},${(size(x, top) * .75).toFixed(2)})`;
function paint(el) {
  const { of, top } = COLOURS[colour], value = sampled(el.s, el.i) ? of(el.s, el.i) : null;
  el.style.backgroundColor = none(value) ? "" : ink(value, top);
}
// The text of a token as it is shown, and its class. Tokens from right to left must not turn their neighbours around.
const seen = new Map(), RIGHT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
function looks(text) {
  const kind = text === "" ? "part " : RIGHT.test(text) ? "right " : "";
  if (!seen.has(text)) seen.set(text, [visible(text) || "◦", kind]);
  return seen.get(text);
}
function tokens(s, from = 0, until = s.ids.length, differs = -1) {
  const made = document.createDocumentFragment();
  let last = null;
  for (let i = from - 1; i >= 0 && last == null; i--) if (sampled(s, i)) last = s.version[i]; // of the turn before
  for (let i = from; i < until; i++) {
    const f = s.flags[i], v = s.version[i], el = document.createElement("span"), [shown, kind] = looks(s.text[i]);
    if (sampled(s, i)) {
      if (last != null && v !== last) made.append(h("span", { class: "update" }, `v${last} | v${v}`));
      last = v;
    }
    const fate = (f & 28 ? "clip " : "") + (f & 1248 ? "cut " : "") + (f ? "silent" : "");
    el.textContent = shown;
    el.className = kind + (f & 1 ? "given" : f & 2 ? "read" : fate) + (i === differs ? " differs" : "");
    Object.assign(el, { i, s });
    paint(el);
    made.append(el);
  }
  return h("div", { class: "tokens" }, made);
}
function about(s, i) {
  const bits = WHY.filter(([bit]) => s.flags[i] & bit).filter(([bit], _, all) => bit !== 512 || all.length === 1);
  const why = bits.map(([bit, , text]) => bit === 1024 ? `${text} ${ended(s)}` : text).join(" ");
  const gap = s.gap[i], moved = s.moved[i], old = s.rollout[i] + (s.old_is_rollout ? 0 : 1) * gap;
  const pairs = [["position", `${i + 1} of ${s.ids.length}`], ["id", s.ids[i]], ...!sampled(s, i) ? [] : [
    ["version", `v${s.version[i]}`], ["turn", s.turn[i] + 1], ["engine, log-probability", three(s.rollout[i])],
    ["trainer, before the step", three(old)], ["trainer, last pass", three(old + moved)],
    ["gap", three(gap)], ["moved", three(moved)], ["ratio", three(Math.exp(moved))],
    ["advantage", three(s.advantage_at[i])], ["weight", three(s.weight_at[i])],
    ["entropy", number(s.entropy_at[i], 2)]]];
  return [h("b", {}, s.text[i] === "" ? "part of a character" : visible(s.text[i]).replaceAll(" ", "␣")),
    h("p", { class: why ? "bad" : "good" }, why || "It learned."),
    h("dl", {}, pairs.map(([k, v]) => [h("dt", {}, k), h("dd", {}, String(v))]))];
}
function strip(s, open) {
  const canvas = h("canvas", { "aria-label": "the value at each position" });
  const first = Math.max(0, s.flags.findIndex(f => !(f & 1))), n = s.ids.length - first; // without the prompt
  canvas.draw = () => {
    const c = canvas.getContext("2d"), { top, of } = COLOURS[colour];
    const W = canvas.width = Math.max(300, canvas.clientWidth * devicePixelRatio);
    const H = canvas.height = 64 * devicePixelRatio;
    for (let i = first; i < s.ids.length; i++) {
      if (!sampled(s, i)) continue;
      const v = of(s, i), high = none(v) ? 0 : size(v, top) * H / 2;
      c.fillStyle = !high ? "#9a948a" : v < 0 ? "#266ebe" : "#e07814";
      c.fillRect((i - first) / n * W, v < 0 ? H / 2 : H / 2 - high, Math.max(1, W / n), Math.max(1, high));
    }
  };
  canvas.onclick = e => open(first + Math.floor(e.offsetX / canvas.clientWidth * n));
  return canvas;
}
function turns(s) { // [what, from, until] for the prompt, each turn, and what was read between
  const found = [], name = i => s.flags[i] & 1 ? "prompt" : `turn ${s.turn[i] + 1}`;
  for (let i = 0; i < s.ids.length; i++) {
    const what = s.flags[i] & 2 ? "read: an observation, or the result of a tool" : name(i), last = found.at(-1);
    if (last?.[0] === what) last[2] = i + 1; else found.push([what, i, i + 1]);
  }
  return found;
}
function scale() {
  const { top, unit } = COLOURS[colour], bar = h("span", { class: "scale" });
  bar.style.backgroundImage = `linear-gradient(to right, ${[-1, -.5, 0, .5, 1].map(x => ink(x, 1)).join(",")})`;
  return soft(`−${top} `, bar, ` ${top} ${unit}`);
}
// Texts beside the panel that explains the token below the pointer, and the choice of what colours them.
function reading(box, more, drawn) {
  const panel = h("aside", { class: "about card", "aria-live": "polite" }, soft("Point at a token."));
  let at = null, bar = scale();
  const show = el => {
    if (el.s == null || el === at) return;
    at?.classList.remove("at");
    at = el;
    el.classList.add("at");
    put(panel, about(el.s, el.i));
  };
  const choice = h("select", { "aria-label": "colour by", onchange: () => {
    colour = choice.value;
    for (const el of box.querySelectorAll(".tokens span")) if (el.s) paint(el);
    bar.replaceWith(bar = scale());
    drawn?.();
  } }, Object.entries(COLOURS).map(([k, c]) => h("option", { value: k, selected: k === colour && "" }, c.label)));
  box.addEventListener("mouseover", e => show(e.target));
  return { tools: h("div", { class: "tools" }, choice, bar, more), body: h("div", { class: "reading" }, box, panel),
    at: () => at?.i ?? -1,
    show: i => {
      const el = [...box.querySelectorAll(".tokens span")].find(x => x.i === i);
      if (el) { show(el); el.scrollIntoView({ block: "center" }); }
    },
    turn: () => { choice.selectedIndex = (choice.selectedIndex + 1) % choice.length; choice.onchange(); } };
}
async function showRow(step, group, episode, row, token) {
  const whole = `sequences?step=${step}&group=${group}`;
  const of = async e => (await sequences(HELD ? whole : `${whole}&episode=${e}`)).filter(x => x.episode === e);
  const all = await of(+episode), i = all.findIndex(x => x.row === +row), s = all[i];
  if (!s) return put(main, h("p", {}, "This row is not kept."));
  const paid = JSON.parse(s.paid || "[]"), parts = Object.entries(JSON.parse(s.parts || "{}"));
  const box = h("div", {}, turns(s).map(([what, from, until]) => {
    const got = paid.filter(([at]) => at >= from && at < until).map(([, x]) => `paid ${number(x)}`).join(", ");
    const head = [h("b", {}, what), ` ${until - from} tokens `, got], inside = tokens(s, from, until);
    const long = what === "prompt" && until - from > 400;
    return long ? h("details", {}, h("summary", {}, head), inside) : [h("div", { class: "soft" }, head), inside];
  }));
  const line = strip(s, i => here.show(i));
  const help = [key("j", "k"), "rows ", key("n", "p"), "tokens with a reason ", key("c"), "colour"];
  const here = reading(box, soft(help), () => line.draw());
  const marked = Array.from(s.flags, (f, k) => f && !(f & 3) ? k : -1).filter(k => k >= 0);
  const counts = WHY.map(([bit, name]) => [marked.filter(k => s.flags[k] & bit).length, name]).filter(([n]) => n);
  put(main, h("p", {}, link(`step/${step}`, `step ${step}`), " › ", link(`group/${step}/${group}`, `group ${group}`)),
    h("h1", {}, `Episode ${episode}${+row ? `, row ${row}` : ""}`),
    facts([["state", s.state + (s.reason ? ` (${s.reason})` : "")], ["reward", number(s.reward)],
      ...parts.map(([k, v]) => [`reward ${k}`, number(v)]), ["advantage", number(s.advantage)], ["tokens", s.tokens],
      ["end", s.finish], ["gap mean", number(s.gap_mean)], ["gap max", number(s.gap_max)],
      ["engine", s.engine < 0 ? "n/a" : s.engine], ["seconds", number(s.ended && s.ended - s.began)],
      ["versions", [...new Set([s.version_min, s.version_max])].join(" to ")]]),
    h("p", { class: "bad" }, ended(s)),
    JSON.parse(s.verdicts || "[]").map(([judge, score, raw]) => h("p", {}, `${judge}: ${number(score)} ${raw}`)),
    counts.length ? soft("Tokens that did not learn: " + counts.map(pair => pair.join(" ")).join(", ")) : null,
    here.tools, h("div", { class: "card" }, line), here.body);
  line.draw();
  if (token) here.show(+token);
  const to = async by => {
    const next = all[i + by] ?? (await of(+episode + by)).at(by > 0 ? 0 : -1);
    if (next) go(`row/${step}/${group}/${next.episode}/${next.row}`);
  };
  keys = { j: () => to(1), k: () => to(-1), c: here.turn,
    n: () => here.show(marked.find(k => k > here.at()) ?? marked[0]),
    p: () => here.show(marked.findLast(k => k < here.at()) ?? marked.at(-1)) };
}
// Sequences side by side, from the first token at which they differ.
function columns(all, titles) {
  const shortest = Math.min(...all.map(s => s.ids.length));
  let part = 0;
  while (part < shortest && all.every(s => s.ids[part] === all[0].ids[part])) part++;
  const same = Math.min(part, ...all.map(s => s.prompt_tokens));
  const one = s => h("section", { class: "card" }, h("h2", {}, titles(s), h("span", {}, `reward ${number(s.reward)}`)),
    soft(Object.entries(JSON.parse(s.parts || "{}")).map(([k, v]) => `${k} ${number(v)}`).join(", ")),
    h("p", { class: "bad" }, ended(s)), tokens(s, same, s.ids.length, all.length > 1 ? part : -1));
  return h("div", {}, same ? h("details", {}, h("summary", {}, `all have the same ${same} tokens of their prompt`),
    tokens(all[0], 0, same)) : null, h("div", { class: "side grid" }, all.map(one)));
}
async function showGroup(step, group) {
  const all = await sequences(`sequences?step=${step}&group=${group}`);
  if (!all.length) return put(main, h("p", {}, "This group is not kept."));
  const title = s => `episode ${s.episode}${s.row ? `, row ${s.row}` : ""}`;
  const box = columns(all, s => link(`row/${step}/${group}/${s.episode}/${s.row}`, title(s)));
  const here = reading(box, soft(key("j", "k"), "groups ", key("c"), "colour"));
  put(main, h("p", {}, link(`step/${step}`, `step ${step}`)), h("h1", {}, `Group ${group}`), here.tools, here.body);
  const move = async by => {
    const rows = (await get(`rows?step=${step}&limit=5000`)).rows, groups = [...new Set(rows.map(r => r.group))];
    const next = groups[groups.indexOf(+group) + by];
    if (next != null) go(`group/${step}/${next}`);
  };
  keys = { j: () => move(1), k: () => move(-1), c: here.turn };
}

// -- time, doctor, compare ------------------------------------------------------------------------------------------
const LANES = ["", "run", "engine", "groups", "learner rank"]; // as in trainer/record/timeline.py
const INKS = ["#2a6296", "#b4570a", "#2d6a3e", "#7a5195", "#a05a2c", "#4b8f8c", "#8a8a2a"];
const QUEUES = ["sampling", "scoring", "ready"];
function told(e) { // an event in words; a group's has the states that it went through
  const a = e.args || {}, moves = [...a.moves || [], ["", e.ts + e.dur]];
  const spent = moves.slice(0, -1).map(([state, t], i) => `${state} ${((moves[i + 1][1] - t) / 1e6).toFixed(2)} s`);
  const more = a.end ? [a.end, ...spent] : Object.entries(a).map(pair => pair.join(" "));
  return [`${e.name}: ${((e.dur || 0) / 1e6).toFixed(3)} s`, ...more].join(", ");
}
async function showTime() {
  const all = await get("time"), events = all.filter(e => e.ph === "X" || e.ph === "i").slice(-20000);
  if (!events.length) return put(main, h("p", {}, "No times are recorded."));
  const first = events[0].ts, end = most(events.map(e => e.ts + (e.dur || 0))), lane = e => e.pid * 1e9 + e.tid;
  const lanes = [...new Set(events.map(lane))].sort((a, b) => a - b), inks = new Map(), total = new Map();
  const part = (from, until = first) => (from - until) / (end - first || 1) * 100;
  const box = h("div", { class: "lanes" }, lanes.map(() => h("div", {})));
  for (const e of events) {
    const kind = e.name.replace(/( to v)?[\d.]+/g, ""), bar = h("i", { title: told(e) }, e.name);
    if (!inks.has(kind)) inks.set(kind, INKS[inks.size % INKS.length]);
    const bad = e.ph === "i" || /failed/.test(e.args?.end), background = bad ? "#b3261e" : inks.get(kind);
    Object.assign(bar.style, { left: `${part(e.ts)}%`, width: `${part(e.dur || 0, 0)}%`, background });
    box.children[lanes.indexOf(lane(e))].append(bar);
    if (LANES[e.pid] === "run") total.set(kind, (total.get(kind) || 0) + (e.dur || 0) / 1e6);
  }
  const depths = all.filter(e => e.ph === "C" && e.ts >= first);
  const deepest = most([1, ...depths.flatMap(e => Object.values(e.args))]);
  const lines = QUEUES.map((state, q) => { // how many groups are in each queue, under the lanes
    const points = depths.flatMap((e, i) => [depths[Math.max(0, i - 1)], e].map(of => [part(e.ts), -of.args[state]]));
    return h("polyline", { points: points.join(" "), stroke: INKS[q], "vector-effect": "non-scaling-stroke" });
  });
  box.append(h("svg", { viewBox: `0 ${-deepest} 100 ${deepest}`, preserveAspectRatio: "none" }, lines));
  const wide = h("input", { type: "range", min: 1, max: 200, value: 1, step: "any", "aria-label": "zoom",
    oninput: () => zoom(wide.value, view.clientWidth / 2) });
  const view = h("div", { class: "scroll", onpointermove: e => { view.scrollLeft -= e.buttons && e.movementX; } }, box);
  const zoom = (by, x) => { // what is at x pixels stays there
    const share = (view.scrollLeft + x) / box.offsetWidth;
    box.style.width = `${(wide.value = by) * 100}%`;
    view.scrollLeft = share * box.offsetWidth - x;
  };
  view.addEventListener("wheel", e => { // a page's own listeners of a wheel are passive: they could not stop its scroll
    e.preventDefault();
    zoom(wide.value * (e.deltaY < 0 ? 1.25 : 0.8), e.clientX - view.getBoundingClientRect().left);
  }, { passive: false });
  const name = x => `${LANES[Math.floor(x / 1e9)]} ${Math.floor(x % 1e9 / 1000)}`; // an engine has several lanes
  const seconds = ((end - first) / 1e6).toFixed(1);
  const names = lanes.map((x, i) => h("div", {}, name(x) === name(lanes[i - 1]) ? "" : name(x)));
  const queues = QUEUES.map((state, q) => { const el = h("div", {}, state); el.style.color = INKS[q]; return el; });
  put(main, h("h1", {}, "Time"), facts([...total].map(([k, v]) => [k, `${v.toFixed(1)} s`])),
    h("div", { class: "tools" }, "zoom ", wide, soft(`${seconds} s, at most ${deepest} groups in a queue`)),
    h("div", { class: "time card" }, h("div", {}, names, queues), view),
    soft("unison view RUN --export time.json writes the same for ui.perfetto.dev."));
}
async function showDoctor() {
  const d = await get("doctor");
  if (!d) return put(main, h("p", {}, "The doctor was off, or its report could not be written."));
  const head = row => Object.keys(row).map(name => h("th", { class: "text" }, name));
  const part = (title, list) => !list?.length ? null :
    [h("h2", {}, title), table(head(list[0]), list.map(row => ["", "", Object.values(row).map(plain)]))];
  put(main, h("h1", { class: d.verdict === "well" ? "good" : "bad" }, d.sentence), part("Findings", d.findings),
    part("Comparisons", d.comparisons), part("What was checked", d.coverage),
    h("p", { class: "soft" }, "The whole report with its figures is doctor.html in the run's folder."));
}
async function showCompare() {
  const c = await get("compare");
  const curves = Object.entries(c.parted).map(([name, step]) => h("section", { class: "card" },
    h("h2", {}, name, h("span", {}, step == null ? "never" : `at step ${step}`)),
    curve(c.curves[name], step == null ? [] : [{ step, title: "they part" }])));
  const both = (c.prompt || []).flatMap((rows, n) => rows.slice(0, 2).map(s => ({ ...unpacked(s), of: c.names[n] })));
  const here = both.length ? reading(columns(both, s => `${s.of}, step ${s.step}`)) : null;
  const [a, b] = c.names;
  put(main, h("h1", {}, h("span", { class: "key" }, "— ", a), h("span", { class: "key two" }, "  - - ", b)),
    h("h2", {}, "Settings that differ"), table([], c.settings.map(r => ["", "", r.map(plain)])),
    h("h2", {}, "Where curves part: the first step at which they differ by more than 3 standard errors"),
    h("div", { class: "grid" }, curves), h("h2", {}, "The last prompt that both were given"),
    here ? [here.tools, here.body] : h("p", {}, "none of the last 20 steps"));
}

// -- the page -------------------------------------------------------------------------------------------------------
const VIEWS = { run: showRun, step: showStep, group: showGroup, row: showRow, time: showTime, doctor: showDoctor,
  compare: showCompare };
async function show() {
  const [name, ...given] = location.hash.slice(2).split("/"), last = run.steps.at(-1)?.[0];
  const view = VIEWS[name] ? name : run.compare ? "compare" : "run";
  const tabs = [["run", "run"], last != null && [`step/${last}`, "last step"], ["time", "time"], ["doctor", "doctor"],
    run.compare && ["compare", "compare"]];
  keys = {};
  put(document.getElementById("name"), link("run", run.name));
  put(document.getElementById("state"), run.status === "running" && !HELD ? "● live" : "");
  put(document.getElementById("nav"), tabs.filter(Boolean).map(([to, text]) =>
    h("a", { href: "#/" + to, class: to === [view, ...given].join("/") && "here" }, text)));
  document.title = `${run.name}: ${[view, ...given].join(" ")}`;
  try { await VIEWS[view](...given); } catch (error) { put(main, h("p", { class: "bad" }, error.message)); }
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
  document.body.dataset.shown = location.hash || "#/";
}
addEventListener("hashchange", show);
addEventListener("keydown", e => {
  if (/^(INPUT|SELECT)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
  if (!e.ctrlKey && !e.metaKey && !e.altKey && keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
async function follow() { // what a run appends is shown within two seconds
  const y = scrollY, now = JSON.stringify(await get("pulse").catch(() => pulse));
  if (pulse && now !== pulse) {
    run = await get("run");
    if (/^(#\/(run)?)?$/.test(location.hash) && !document.querySelector("input:focus"))
      show().then(() => scrollTo(0, y));
  }
  pulse = now;
}
get("run").then(async found => {
  run = found;
  await show();
  if (!HELD) setInterval(follow, 1500);
});
