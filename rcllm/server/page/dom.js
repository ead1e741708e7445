// Makes elements. Texts become text nodes and nothing else, so that no title of an item can be markup.

/** An element with properties, attributes (names with a dash, and `role`) and children; null children are left out. */
export function el(name, props = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.includes("-") || key === "role" || key === "for" || key === "scope" || key === "colspan") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Puts children in the place of what was there. */
export function fill(where, ...children) {
  where.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** A table; the first cell of a row is its header. Cells are texts or elements. */
export function table(caption, heads, rows) {
  return el("table", {},
    el("caption", { className: "hidden" }, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map(([first, ...rest]) =>
      el("tr", {}, el("th", { scope: "row" }, first), rest.map((cell) => el("td", {}, cell))))));
}

/** Terms with their values. */
export function facts(where, pairs) {
  fill(where, pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/** A small square of a colour that style.css names. */
export const swatch = (word) => el("span", { className: `swatch c-${word}`, "aria-hidden": "true" });
