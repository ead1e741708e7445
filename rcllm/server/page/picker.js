// A list of items that a person chooses by typing: a combobox over the catalogue, and what was chosen below it.

import { ask } from "./api.js";
import { el, fill } from "./dom.js";

const WAIT_MS = 180;

export class Picker {
  /** `titles`: texts by item id, which every picker and the results share. */
  constructor(where, id, label, help, titles) {
    this.titles = titles;
    this.chosen = []; // { item_id } or { text }
    this.found = [];
    this.active = -1;
    this.id = id;
    this.asked = 0;
    this.input = el("input", { id: `${id}-input`, type: "text", role: "combobox", "aria-expanded": "false", "aria-autocomplete": "list", "aria-controls": `${id}-options`, "aria-describedby": `${id}-help`, autocomplete: "off", spellcheck: false });
    this.options = el("ul", { id: `${id}-options`, role: "listbox", className: "options", hidden: true, "aria-label": `Items for ${label.toLowerCase()}` });
    this.list = el("ul", { className: "chosen", "aria-label": label });
    where.append(el("div", { className: "picker" },
      el("label", { for: this.input.id }, label),
      el("p", { id: `${id}-help`, className: "help muted small" }, help),
      el("div", { className: "picker" }, this.input, this.options), this.list));
    this.input.addEventListener("input", () => this.typed());
    this.input.addEventListener("focus", () => this.typed());
    this.input.addEventListener("keydown", (event) => this.pressed(event));
    this.input.addEventListener("blur", () => this.close());
    this.options.addEventListener("mousedown", (event) => event.preventDefault()); // keeps the focus in the input
  }

  add(entry) {
    if (entry.item_id !== undefined && this.chosen.some((each) => each.item_id === entry.item_id)) return;
    this.chosen.push(entry);
    this.showChosen();
  }

  clear() {
    this.chosen = [];
    this.showChosen();
  }

  nameOf(entry) {
    return entry.item_id === undefined ? `“${entry.text}”` : this.titles.get(entry.item_id) ?? entry.item_id;
  }

  showChosen() {
    fill(this.list, this.chosen.map((entry, index) => {
      const name = this.nameOf(entry);
      const remove = el("button", { type: "button", "aria-label": `Remove ${name}` }, "×");
      remove.addEventListener("click", () => {
        this.chosen.splice(index, 1);
        this.showChosen();
        (this.list.querySelectorAll("button")[Math.min(index, this.chosen.length - 1)] ?? this.input).focus();
      });
      return el("li", {}, el("span", { title: name }, name), remove);
    }));
  }

  typed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.search(), WAIT_MS);
  }

  async search() {
    const asked = (this.asked += 1);
    const query = this.input.value.trim();
    let told;
    try {
      told = await ask(`/v1/items?limit=30&query=${encodeURIComponent(query.slice(0, 200))}`);
    } catch (error) {
      told = { items: [], error: error.message };
    }
    if (asked !== this.asked || document.activeElement !== this.input) return;
    this.found = told.items;
    for (const item of told.items) this.titles.set(item.item_id, item.text);
    this.open(query, told);
  }

  open(query, told) {
    this.active = -1;
    const options = this.found.map((item, index) => {
      const option = el("li", { id: `${this.id}-option-${index}`, role: "option", "aria-selected": "false" }, item.text);
      option.addEventListener("click", () => this.take(index));
      return option;
    });
    const none = told.error ?? (query ? `No item has these words among ${told.num_read} that were read. Enter adds them as a text.` : "The catalogue is empty.");
    fill(this.options, options.length ? options : el("li", { className: "none", role: "option", "aria-disabled": "true" }, none));
    this.options.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.input.removeAttribute("aria-activedescendant");
  }

  close() {
    clearTimeout(this.timer);
    this.asked += 1;
    this.options.hidden = true;
    this.active = -1;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  pressed(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.options.hidden) this.search();
      else this.move(event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Escape" && !this.options.hidden) {
      event.preventDefault();
      this.close();
    } else if (event.key === "Enter" && (this.active >= 0 || this.input.value.trim())) {
      event.preventDefault();
      if (this.active >= 0) this.take(this.active);
      else this.takeText();
    }
  }

  move(by) {
    const all = this.options.querySelectorAll("[role=option]:not(.none)");
    if (!all.length) return;
    this.active = (this.active + by + all.length + (this.active < 0 && by < 0 ? 1 : 0)) % all.length;
    all.forEach((option, index) => {
      option.setAttribute("aria-selected", String(index === this.active));
      option.classList.toggle("active", index === this.active);
    });
    all[this.active].scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", all[this.active].id);
  }

  take(index) {
    this.add({ item_id: this.found[index].item_id });
    this.input.value = "";
    this.close();
  }

  takeText() {
    this.add({ text: this.input.value.trim() });
    this.input.value = "";
    this.close();
  }
}
