// The playground: a history and candidates are ranked at several levels, side by side, with their receipts.

import { ask } from "./api.js";
import { byId, el, fill, swatch } from "./dom.js";
import { Picker } from "./picker.js";
import { prompt, stages } from "./receipt.js";
import { ms, times } from "./words.js";

const LEVELS = ["full", "exact", "corrected(0.3, 0.3)", "linked(8)", "tail(0.3)", "blocks", "auto"]; // the first is compared with
const FIRST = ["exact", "auto"];
const EXAMPLE = { history: 6, candidates: 16 };

const titles = new Map();
const history = new Picker(byId("history"), "history", "History", "Items that the user chose, oldest first; or own words.", titles);
const candidates = new Picker(byId("candidates"), "candidates", "Candidates", "Items to rank; a text that the catalogue lacks works too.", titles);
let chosenNext = new Set(); // items that the viewer did choose after the history
const nameOf = (itemId) => titles.get(itemId) ?? itemId;

export function start() {
  fill(byId("levels"), LEVELS.map((level) => el("label", {},
    el("input", { type: "checkbox", name: "level", value: level, checked: FIRST.includes(level) }), level)));
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    busily(rank);
  });
  byId("recommend").addEventListener("click", () => busily(recommend));
  byId("example").addEventListener("click", () => busily(example));
  byId("clear").addEventListener("click", () => {
    empty();
    fill(byId("results"));
  });
  byId("viewer").addEventListener("change", () => busily(takeViewer));
}

function empty() {
  history.clear();
  candidates.clear();
  chosenNext = new Set();
  byId("viewer").value = "";
}

/** Offers the viewers of a data set, where the server has some. */
export async function offerViewers() {
  const { viewers } = await ask("/v1/viewers");
  if (!viewers.length) return;
  fill(byId("viewer"), el("option", { value: "" }, "choose one"), viewers.map((viewer, index) => el("option", { value: String(index) }, viewer.name)));
  byId("viewer-line").hidden = false;
  byId("viewer").viewers = viewers;
}

async function takeViewer() {
  const index = byId("viewer").value;
  const viewer = byId("viewer").viewers[index];
  empty();
  if (!viewer) return;
  byId("viewer").value = index;
  await learnTitles([...viewer.history, ...viewer.candidates]);
  for (const itemId of viewer.history) history.add({ item_id: itemId });
  for (const itemId of viewer.candidates) candidates.add({ item_id: itemId });
  chosenNext = new Set(viewer.chosen);
}

async function learnTitles(itemIds) {
  const unknown = itemIds.filter((itemId) => !titles.has(itemId));
  if (!unknown.length) return;
  const query = unknown.map((itemId) => `item_id=${encodeURIComponent(itemId)}`).join("&");
  for (const item of (await ask(`/v1/items?${query}`)).items) titles.set(item.item_id, item.text);
}

/** What the server serves decides what can be asked. */
export function serves(look) {
  const missing = look.kinds.includes("recommend") ? "" : "Recommend needs a decoder of semantic IDs: rcllm serve --decoder FOLDER.";
  byId("recommend").disabled = missing !== "";
  byId("recommend-why").textContent = missing;
  byId("recommend-why").hidden = !missing;
}

async function busily(work) {
  const form = byId("form");
  if (form.ariaBusy === "true") return;
  form.ariaBusy = "true";
  byId("busy").textContent = "asking …";
  try {
    await work();
  } catch (error) {
    fill(byId("results"), failure(error));
  } finally {
    form.ariaBusy = "false";
    byId("busy").textContent = "";
  }
}

const failure = (error) => el("p", { className: "card wrong", role: "alert" }, error.status ? `${error.status}: ${error.message}` : `The server did not answer: ${error.message}`);

async function example() {
  const told = await ask(`/v1/items?limit=${EXAMPLE.history + EXAMPLE.candidates}`);
  empty();
  const share = EXAMPLE.history / (EXAMPLE.history + EXAMPLE.candidates);
  told.items.forEach((item, index) => {
    titles.set(item.item_id, item.text);
    (index < Math.round(told.items.length * share) ? history : candidates).add({ item_id: item.item_id });
  });
}

const events = () => history.chosen.map((entry) => (entry.item_id === undefined ? { text: entry.text } : entry.item_id));

/** Candidates that no catalogue has get ids of this page. */
function asked() {
  return candidates.chosen.map((entry, index) => {
    if (entry.item_id !== undefined) return entry.item_id;
    titles.set(`typed-${index + 1}`, entry.text);
    return { item_id: `typed-${index + 1}`, text: entry.text };
  });
}

async function rank() {
  const levels = [...document.querySelectorAll("input[name=level]:checked")].map((box) => box.value);
  if (!candidates.chosen.length || !levels.length) {
    fill(byId("results"), failure({ status: "Nothing to rank", message: candidates.chosen.length ? "choose a level" : "add candidates, or fill in an example" }));
    return;
  }
  const answers = [];
  for (const level of levels) { // one after the other, so that times are of one ranking alone
    byId("busy").textContent = `asking at level ${level} …`;
    answers.push(await rankAt(level));
  }
  showRankings(answers);
}

async function rankAt(level) {
  try {
    return { level, told: await ask("/v1/rank", { candidates: asked(), history: events(), level, explain: true }) };
  } catch (error) {
    if (!error.status) throw error;
    return { level, error };
  }
}

function showRankings(answers) {
  const base = answers.find((each) => each.told);
  const places = new Map((base?.told.ranking ?? []).map((itemId, place) => [itemId, place]));
  const good = answers.filter((each) => each.told);
  fill(byId("results"),
    el("section", { className: "answers", "aria-label": "Rankings by level" }, answers.map((each) =>
      each.told ? answerCard(each, places, each === base, base.level) : refusedCard(each))),
    good.length ? el("section", { className: "card" },
      el("h2", {}, "Where each token of the prompt came from"),
      good.map(({ level, told }) => prompt(`Level ${named(level, told.level)}`, told.receipt, nameOf))) : null);
}

const named = (asked, got) => (asked === got ? got : `${asked} → ${got}`);

function answerCard({ level, told }, places, isBase, baseLevel) {
  const { receipt } = told;
  const moved = told.ranking.filter((itemId, place) => places.get(itemId) !== place).length;
  const order = isBase ? "the order to compare with" : moved ? `${times(moved, "item")} elsewhere than at ${baseLevel}` : `the same order as at ${baseLevel}`;
  const notes = [...(told.notes ?? []), ...(told.degraded ?? []).map((step) => `degraded: ${step}`), told.guard].filter(Boolean);
  return el("article", { className: "card answer" },
    el("h3", {}, el("span", {}, swatch(told.level.split("(")[0]), named(level, told.level)), el("span", { className: "ms" }, ms(told.ms))),
    el("p", { className: "muted small" }, `${times(told.tokens_fresh, "token")} fresh, ${told.tokens_reused} reused${told.tokens_computed ? `, of them ${told.tokens_computed} computed first` : ""}; ${order}`),
    el("ol", { className: "ranking" }, told.ranking.map((itemId, place) => rankingLine(itemId, place, told.scores[itemId], places.get(itemId), isBase))),
    el("ul", { className: "notes muted small" }, [stages(receipt), ...notes].map((note) => el("li", {}, note))));
}

function rankingLine(itemId, place, score, before, isBase) {
  return el("li", {},
    el("span", { className: "place" }, String(place + 1)),
    el("span", { className: "title" }, nameOf(itemId), chosenNext.has(itemId) ? el("span", { className: "chosen-next" }, " ✓ chosen next") : null),
    el("span", { className: "score" }, score.toFixed(2).replace("-", "−")),
    isBase ? el("span", {}) : move(before - place));
}

function move(by) {
  if (!Number.isFinite(by)) return el("span", { className: "move" }, "new");
  if (!by) return el("span", { className: "move" }, el("span", { "aria-hidden": "true" }, "="), el("span", { className: "hidden" }, "same place"));
  const word = by > 0 ? "up" : "down";
  return el("span", { className: `move ${word}` },
    el("span", { "aria-hidden": "true" }, `${by > 0 ? "▲" : "▼"} ${Math.abs(by)}`),
    el("span", { className: "hidden" }, `${word} ${Math.abs(by)}`));
}

const refusedCard = ({ level, error }) => el("article", { className: "card answer" },
  el("h3", {}, el("span", {}, level), el("span", { className: "ms muted" }, String(error.status))),
  el("p", { className: "wrong" }, error.message));

async function recommend() {
  const told = await ask("/v1/recommend", { history: events(), n: 10, unseen: true, explain: true });
  await learnTitles(told.items);
  fill(byId("results"), el("article", { className: "card answer" },
    el("h3", {}, el("span", {}, "Recommended"), el("span", { className: "ms" }, ms(told.ms))),
    el("p", { className: "muted small" }, `${times(told.tokens_fresh, "token")} fresh, ${told.tokens_reused} reused; ${stages(told.receipt)}`),
    el("ol", { className: "ranking" }, told.items.map((itemId, place) => rankingLine(itemId, place, told.scores[place], undefined, true)))));
}
