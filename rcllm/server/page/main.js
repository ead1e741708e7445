// Begins: tabs, the loop that looks at the server, and what follows from each look.

import { ask } from "./api.js";
import { redraw } from "./charts.js";
import { byId } from "./dom.js";
import { show } from "./live.js";
import { offerViewers, serves, start } from "./playground.js";
import { Samples } from "./samples.js";
import { percent, since } from "./words.js";

const EVERY_MS = 2000;
const samples = new Samples();

function state(look) {
  const { warming } = look.catalogue;
  const pill = byId("state");
  const [word, text] = look.closing ? ["warn", "going down"]
    : warming.error ? ["bad", "warming failed"]
    : warming.running ? ["warn", `warming, ${percent(warming.done_blocks / warming.total_blocks)}`]
    : ["good", `ready, up ${since(look.time_s - look.started_s)}`];
  tell(pill, word, text);
}

function tell(pill, word, text) {
  pill.className = `pill ${word}`;
  if (pill.textContent !== text) pill.textContent = text;
}

async function look() {
  try {
    const told = await ask("/v1/dashboard");
    samples.add(told);
    byId("model").textContent = told.model;
    byId("model").title = `${told.model}, rcllm ${told.version}`;
    state(told);
    serves(told);
    show(samples, Number(byId("window").value));
  } catch (error) {
    tell(byId("state"), "bad", error.status ? `refused: ${error.status}` : "no answer");
    if (!(error instanceof TypeError) && !error.status) throw error; // a mistake of this page; a lost server is none
  }
}

async function watch() {
  await look();
  await offerViewers().catch(() => {}); // then the playground does without them
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

// ---- tabs ----

// a fragment that is no element's id, for the browser would begin the order of Tab at such an element
const fragment = (tab) => `#view=${tab.getAttribute("aria-controls")}`;
const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab, isFocused) {
  for (const each of tabs) {
    const isChosen = each === tab;
    each.setAttribute("aria-selected", String(isChosen));
    each.tabIndex = isChosen ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !isChosen;
  }
  history.replaceState(null, "", fragment(tab));
  if (isFocused) tab.focus();
  redraw();
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => choose(tab, false));
  tab.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) choose(tabs[(index + by + tabs.length) % tabs.length], true);
  });
});

start();
choose(tabs.find((tab) => location.hash === fragment(tab)) ?? tabs[0], false);
byId("window").addEventListener("change", () => samples.all.length && show(samples, Number(byId("window").value)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) redraw();
  width = innerWidth;
});
watch();
