// Numbers as a person reads them. Knows nothing of the page.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const NONE = "–";

export const count = (value) => (value < 100000 ? whole : short).format(value);

export const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(share === 0 || share > 0.0995 ? 0 : 1)} %` : NONE);

export function rate(perSecond) {
  if (!Number.isFinite(perSecond)) return NONE;
  return `${perSecond === 0 || perSecond >= 10 ? perSecond.toFixed(0) : perSecond.toFixed(perSecond >= 0.1 ? 1 : 2)}/s`;
}

export function ms(value) {
  if (!Number.isFinite(value)) return NONE;
  if (value >= 10000) return `${(value / 1000).toFixed(0)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value === 0 ? "0" : value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) { value /= 1024; power += 1; }
  return `${value >= 100 || power === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[power]}`;
}

/** Of a moment in seconds since 1970. */
export function clock(seconds) {
  const at = new Date(seconds * 1000);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

export function since(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

export const times = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
