// A receipt as a coloured prompt: a button for each block, as wide as it has tokens, coloured by where its KV came from.

import { el, fill, swatch } from "./dom.js";
import { ms, percent, times } from "./words.js";

export const SOURCES = {
  fresh: "computed afresh in this request",
  computed: "missing: computed and kept",
  device: "from the device pool",
  host: "from host memory",
  disk: "from disk",
  shared: "from the shared server",
  semantic: "from token prototypes",
};
const PX_PER_TOKEN = 5;

const tokensOf = (block) => block.num_fresh + block.num_reused;

/** `nameOf`: an item's title by its id. */
export function prompt(title, receipt, nameOf) {
  const why = el("p", { className: "why muted" }, "Point at a block, or move with the arrow keys, to see where it came from and why.");
  const blocks = receipt.blocks.filter((block) => tokensOf(block) > 0);
  const buttons = blocks.map((block, index) => blockButton(block, index, nameOf));
  const show = (index) => fill(why, sentence(blocks[index], nameOf));
  const group = el("div", { className: "prompt", role: "group", "aria-label": `Prompt of ${title}, ${times(blocks.length, "block")}` }, buttons);
  group.addEventListener("keydown", (event) => moveFocus(event, buttons));
  buttons.forEach((button, index) => {
    button.addEventListener("mouseenter", () => show(index));
    button.addEventListener("focus", () => {
      for (const each of buttons) each.tabIndex = each === button ? 0 : -1;
      show(index);
    });
  });
  const used = Object.keys(SOURCES).filter((source) => tokensBySource(blocks)[source] > 0);
  const legend = el("ul", { className: "keyline" }, used.map((source) => {
    const tokens = tokensBySource(blocks)[source];
    return el("li", {}, swatch(source), `${source} ${times(tokens, "token")}, ${percent(tokens / receipt.num_tokens)}`);
  }));
  return el("div", { className: "receipt" }, el("h3", {}, title), legend, group, why);
}

function tokensBySource(blocks) {
  const sums = {};
  for (const block of blocks) {
    sums.fresh = (sums.fresh ?? 0) + block.num_fresh;
    sums[block.source] = (sums[block.source] ?? 0) + block.num_reused;
  }
  return sums;
}

function blockButton(block, index, nameOf) {
  const parts = [["fresh", block.num_fresh], [block.source, block.num_reused]].filter(([, tokens]) => tokens > 0);
  const button = el("button", { type: "button", tabIndex: index ? -1 : 0, "aria-label": sentence(block, nameOf) },
    parts.map(([source, tokens]) => {
      const part = el("span", { className: `c-${source}` });
      part.style.flex = `${tokens} 0 0`;
      return part;
    }));
  button.style.width = `${tokensOf(block) * PX_PER_TOKEN}px`;
  return button;
}

function sentence(block, nameOf) {
  const owner = block.owner === null ? "" : ` “${nameOf(block.owner)}”`;
  const parts = [];
  if (block.num_reused) parts.push(`${times(block.num_reused, "token")} ${SOURCES[block.source] ?? block.source}`);
  if (block.num_fresh) parts.push(`${times(block.num_fresh, "token")} ${SOURCES.fresh}`);
  const key = block.key ? ` (key ${block.key})` : "";
  return `${block.kind}${owner}: ${parts.join(", ")}; ${block.why}${key}`;
}

function moveFocus(event, buttons) {
  const here = buttons.indexOf(document.activeElement);
  const there = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (there === undefined || here < 0) return;
  event.preventDefault();
  buttons[Math.max(0, Math.min(buttons.length - 1, there))].focus();
}

/** The longest stages of a request, in words. */
export function stages(receipt) {
  const parts = Object.entries(receipt.stage_ms).filter(([name, took]) => name !== "total" && took >= 0.05);
  parts.sort((a, b) => b[1] - a[1]);
  return parts.slice(0, 4).map(([name, took]) => `${name} ${ms(took)}`).join(" · ");
}
