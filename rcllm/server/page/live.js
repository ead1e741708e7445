// The live view: from looks at the server to tiles, charts and tables.

import { Chart } from "./charts.js";
import { byId, el, facts, fill, swatch, table } from "./dom.js";
import { grown, outcomes, quantile, sources, spread, summed, total } from "./samples.js";
import { NONE, bytes, count, ms, percent, rate, since, times } from "./words.js";

const TIERS = { device: "device pool", host: "host memory", disk: "disk", shared: "shared server", missed: "nowhere: computed" };
const OUTCOMES = { answered: "answered", degraded: "of them degraded", r429: "429 overloaded", r503: "503 no answer in time", other: "other errors" };
const DRAWN = { answered: "answered", degraded: "degraded", r429: "429", r503: "503" };
const LEVELS = ["full", "exact", "corrected", "linked", "tail", "blocks"];
const STEP_S = 10; // rates are of the last so many seconds

const powers = [1, 10, 100, 1000, 10000, 60000];
const spreadChart = new Chart(byId("ttft-spread"), {
  scales: { x: { time: false, distr: 3, log: 10 }, y: { range: (self, low, high) => [0, Math.max(high, 0.1)] } },
  value: percent,
  xLabel: "up to",
  xValues: { splits: (self, axis, low, high) => powers.filter((each) => each >= low && each <= high), axis: (self, ticks) => ticks.map((tick) => (tick === null ? "" : ms(tick).replace(".0", ""))), legend: ms },
});
const overTime = (id, value, more = {}) => new Chart(byId(id), { scales: { x: { time: true }, y: { range: (self, low, high) => [0, high > 0 ? high * 1.1 : 1] } }, value, ...more });
const ttftChart = overTime("ttft-time", ms);
const tiersChart = new Chart(byId("tiers-time"), { scales: { x: { time: true }, y: { range: [0, 1] } }, value: percent });
const outcomesChart = overTime("outcomes-time", rate);
const queueChart = overTime("queue-time", count, { height: 130, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] });

/** `seconds`: the window that is looked at. */
export function show(samples, seconds) {
  const now = samples.last;
  const before = samples.first(seconds);
  const lasted = now.time_s - before.time_s;
  const recent = spread(now, before);
  const isRecent = recent.length > 0;
  const levels = isRecent ? recent : spread(now, null);
  const period = isRecent ? `last ${since(lasted)}` : "since the start";
  const looks = samples.within(seconds);
  showTiles(now, before, lasted, levels, period);
  showSpread(levels, now.requests.bounds_s, period);
  showTimes(looks);
  showTiers(now, before, looks);
  showOutcomes(now, before, looks);
  showQueue(now, looks);
  showCache(now);
  showGuard(now.guard);
}

function showTiles(now, before, lasted, levels, period) {
  const counts = summed(levels.map((each) => each.counts));
  const bounds = now.requests.bounds_s;
  const tokens = grown(now.requests.tokens, before.requests.tokens);
  const shown = total(tokens) > 0 ? tokens : now.requests.tokens;
  const reused = 1 - ((shown.fresh ?? 0) + (shown.computed ?? 0)) / total(shown);
  const ended = outcomes(now, before);
  const tiles = [
    ["Answered", rate(lasted > 0 ? ended.answered / lasted : NaN), `${count(total(now.requests.answered))} since the start`],
    ["TTFT, median", ms(quantile(0.5, counts, bounds)), period],
    ["TTFT, P95", ms(quantile(0.95, counts, bounds)), period],
    ["Tokens from the cache", percent(reused), "of rankings"],
    ["Waiting", count(now.queue.num_waiting), `next one in ${ms(now.queue.wait_ms)}`],
    ["Guard", ...guardTile(now.guard)],
  ];
  fill(byId("tiles"), tiles.map(([term, value, note]) =>
    el("div", {}, el("dt", {}, term), el("dd", {}, value, el("span", { className: "note" }, note)))));
}

function guardTile(guard) {
  if (!guard) return ["off", "nothing to guard"];
  const trips = guard.steps.filter((step) => step.kind !== "step_back").length;
  const worst = Math.max(0, ...guard.kinds.map((kind) => kind.e_value ?? 0));
  return [trips ? "stepped" : "quiet", trips ? times(trips, "trip") : `evidence ${worst.toPrecision(2)}`];
}

// ---- time to first token ----

function showSpread(levels, bounds_s, period) {
  const ordered = [...levels].sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level));
  byId("ttft-since").textContent = `· ${period}`;
  const sums = ordered.map((each) => total(each.counts));
  const series = ordered.map((each) => ({ label: each.name, colour: each.level, area: true, stepped: true }));
  const used = bounds_s.map((_, index) => ordered.some((each) => each.counts[index] > 0));
  const first = Math.max(0, used.indexOf(true) - 2);
  const last = Math.min(bounds_s.length - 1, used.lastIndexOf(true) + 2);
  const kept = bounds_s.map((_, index) => index).slice(first, last + 1);
  const shares = ordered.map((each, place) => kept.map((index) => each.counts[index] / sums[place]));
  const rows = ordered.map((each, place) => {
    const at = (share) => ms(quantile(share, each.counts, bounds_s));
    return [el("span", {}, swatch(each.level), each.name), count(sums[place]), at(0.5), at(0.9), at(0.99)];
  });
  const sentence = rows.length
    ? ordered.map((each) => `${each.name}: median ${ms(quantile(0.5, each.counts, bounds_s))}`).join("; ")
    : "No request was answered yet.";
  spreadChart.draw(series, [kept.map((index) => bounds_s[index] * 1000), ...shares], sentence);
  fill(byId("ttft-table"), rows.length
    ? table("Time to first token by level", ["Level", "Requests", "Median", "P90", "P99"], rows)
    : el("p", { className: "muted" }, "No request was answered yet. The playground sends some."));
}

/** The look that is about STEP_S before each. */
function pairs(looks) {
  let start = 0;
  return looks.slice(1).map((now, index) => {
    while (start < index && looks[start + 1].time_s <= now.time_s - STEP_S) start += 1;
    return [now, looks[start]];
  });
}

function showTimes(looks) {
  const steps = pairs(looks);
  const counted = steps.map(([now, before]) => summed(spread(now, before).map((each) => each.counts)));
  const line = (share) => counted.map((counts, index) => finite(quantile(share, counts, steps[index][0].requests.bounds_s)));
  const series = [{ label: "median", colour: "p50" }, { label: "P95", colour: "p95" }];
  const median = line(0.5);
  const sentence = `Median now ${ms(median.at(-1) ?? NaN)}`;
  ttftChart.draw(series, [steps.map(([now]) => now.time_s), median, line(0.95)], sentence);
}

const finite = (value) => (Number.isFinite(value) ? value : null);

// ---- cache ----

function showTiers(now, before, looks) {
  const recent = sources(now, before);
  const ever = sources(now, null);
  const shown = total(recent) > 0 ? recent : ever;
  const all = total(shown);
  const words = Object.keys(TIERS).filter((word) => shown[word] > 0);
  const bar = el("div", { className: "meter", role: "img", "aria-label": words.map((word) => `${TIERS[word]} ${percent(shown[word] / all)}`).join(", ") || "no blocks yet" });
  for (const word of words) {
    const part = el("span", { className: `c-${word}` });
    part.style.flex = `${shown[word]} 0 0`;
    bar.append(part);
  }
  fill(byId("tiers-bar"), bar);
  const rows = Object.keys(TIERS).filter((word) => ever[word] > 0)
    .map((word) => [el("span", {}, swatch(word), TIERS[word]), count(recent[word] ?? 0), count(ever[word]), percent(ever[word] / total(ever))]);
  fill(byId("tiers-table"), table("Blocks by tier", ["Tier", "In the window", "Since the start", "Share"], rows));
  const steps = pairs(looks);
  const shares = steps.map(([later, earlier]) => sources(later, earlier));
  const line = (word) => shares.map((each) => finite((each[word] ?? 0) / total(each)));
  const series = words.map((word) => ({ label: word === "missed" ? "nowhere" : word, colour: word }));
  tiersChart.draw(series, [steps.map(([later]) => later.time_s), ...words.map(line)], "Share of blocks by tier over time; counts are in the table below.");
}

function showCache(now) {
  const tiers = now.cache.tiers.map((tier) => {
    const share = tier.budget_bytes ? tier.num_bytes / tier.budget_bytes : 0;
    const used = el("span", { className: `c-${tier.tier}` });
    used.style.flex = `0 0 ${Math.min(100, 100 * share)}%`;
    const budget = tier.budget_bytes ? ` of ${bytes(tier.budget_bytes)}` : "";
    return el("div", { className: "tier" },
      el("p", {}, el("span", {}, TIERS[tier.tier] ?? tier.tier), el("span", { className: "muted" }, `${times(tier.num_blocks, "block")} · ${bytes(tier.num_bytes)}${budget}`)),
      el("div", { className: "meter", role: "img", "aria-label": `${percent(share)} of the budget is used` }, used));
  });
  fill(byId("cache-bars"), tiers);
  const { num_items: items, warming } = now.catalogue;
  facts(byId("cache-facts"), [
    ["Items", count(items)],
    ["Warm blocks", warming.total_blocks ? `${count(warming.done_blocks)} of ${count(warming.total_blocks)}` : NONE],
    ["Evicted", count(now.cache.tiers.reduce((sum, tier) => sum + tier.evictions, 0))],
    ["Store errors", count(now.cache.store_errors)],
  ]);
}

// ---- requests and queue ----

function showOutcomes(now, before, looks) {
  const steps = pairs(looks);
  const rates = steps.map(([later, earlier]) => {
    const ended = outcomes(later, earlier);
    return Object.fromEntries(Object.entries(ended).map(([word, value]) => [word, value / (later.time_s - earlier.time_s)]));
  });
  const words = Object.keys(DRAWN);
  const series = words.map((word) => ({ label: DRAWN[word], colour: word, area: word === "answered" }));
  const all = outcomes(now, null);
  const recent = outcomes(now, before);
  const sentence = `In the window ${times(recent.answered, "request was", "requests were")} answered`;
  outcomesChart.draw(series, [steps.map(([later]) => later.time_s), ...words.map((word) => rates.map((each) => each[word]))], sentence);
  const rows = Object.keys(OUTCOMES).map((word) => [el("span", {}, swatch(word), OUTCOMES[word]), count(recent[word]), count(all[word])]);
  const steps_given = Object.entries(now.requests.degraded).map(([step, value]) => [`gave up ${step.replace("_", " ")}`, NONE, count(value)]);
  fill(byId("outcomes-table"), table("Requests by outcome", ["Outcome", "In the window", "Since the start"], [...rows, ...steps_given]));
}

function showQueue(now, looks) {
  const series = [{ label: "waiting", colour: "p95" }, { label: "under way", colour: "p50" }];
  const { num_waiting: waiting, num_unanswered: under_way } = now.queue;
  queueChart.draw(series, [looks.map((each) => each.time_s), looks.map((each) => each.queue.num_waiting), looks.map((each) => each.queue.num_unanswered)], `${waiting} wait, ${under_way} are under way`);
  facts(byId("queue-facts"), [
    ["Estimated wait", ms(now.queue.wait_ms)],
    ["Taken in", count(now.queue.outcomes.accepted ?? 0)],
    ["Turned away", count((now.queue.outcomes.overloaded ?? 0) + (now.queue.outcomes.late ?? 0))],
    ["Failed passes", count(now.queue.loop_failures)],
  ]);
}

// ---- guard ----

function showGuard(guard) {
  const where = byId("guard");
  if (!guard) {
    fill(where, el("p", { className: "muted" }, "No guard is needed: nothing is served whose answers may differ from a full prefill, or no calibration allows it."));
    return;
  }
  const used = new Set(guard.kinds.map((kind) => kind.level));
  const rungs = guard.ladder.map((level) => el("li", { className: used.has(level) ? "used" : "" }, level, used.has(level) ? el("span", { className: "hidden" }, " (in use)") : null));
  const kinds = guard.kinds.map((kind) => [kind.requests, kind.level, count(kind.num_samples), kind.mean_loss === null ? NONE : kind.mean_loss.toFixed(4), kind.e_value === null ? NONE : kind.e_value.toPrecision(3)]);
  const steps = [...guard.steps].reverse().map((step) => [new Date(step.time_s * 1000).toLocaleTimeString(), step.kind.replaceAll("_", " "), `${step.from_level} → ${step.to_level}`, step.requests]);
  fill(where,
    el("ol", { className: "rungs", "aria-label": "Levels, the cheapest first" }, rungs),
    el("p", { className: "muted small" }, `${percent(guard.share)} of rankings are computed in full in idle time; a mean loss up to ${guard.target} is fine. ${times(guard.counts.num_shadowed, "ranking")} compared so far.`),
    kinds.length ? el("div", { className: "scroll" }, table("Evidence by kind of requests", ["Requests", "Level", "Compared", "Mean loss", "Evidence of drift"], kinds)) : null,
    steps.length ? el("div", { className: "scroll" }, table("Latest steps", ["When", "Step", "Levels", "Requests"], steps)) : null);
}
