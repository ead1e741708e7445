// What was seen of the server lately, and what follows from the difference of two looks. Knows nothing of the page.

const KEPT_S = 960;

/** Looks at the server, oldest first, of the last minutes. */
export class Samples {
  constructor() {
    this.all = [];
  }

  add(look) {
    if (this.all.length && look.started_s !== this.last.started_s) this.all = []; // the server is another one
    this.all.push(look);
    while (this.all[0].time_s < look.time_s - KEPT_S) this.all.shift();
  }

  get last() {
    return this.all[this.all.length - 1];
  }

  /** The oldest look of the last so many seconds. */
  first(seconds) {
    return this.all.find((look) => look.time_s >= this.last.time_s - seconds);
  }

  within(seconds) {
    return this.all.filter((look) => look.time_s >= this.last.time_s - seconds);
  }
}

/** What was counted between two looks, by word. */
export function grown(now, before) {
  return Object.fromEntries(Object.entries(now).map(([word, value]) => [word, value - (before[word] ?? 0)]));
}

export const total = (counts) => Object.values(counts).reduce((sum, value) => sum + value, 0);

/** Name of a level as the page shows it: rankings by their level alone. */
export const levelName = ({ kind, level }) => (kind === "rank" ? level : `${level} (${kind})`);

/** Counts per bucket of each level between two looks; `before` null: since the start. */
export function spread(now, before) {
  const earlier = new Map((before?.requests.ttft ?? []).map((each) => [levelName(each), each.counts]));
  return now.requests.ttft
    .map((each) => {
      const old = earlier.get(levelName(each));
      return { name: levelName(each), level: each.level, counts: each.counts.map((value, index) => value - (old?.[index] ?? 0)) };
    })
    .filter((each) => each.counts.some((value) => value > 0));
}

/** A quantile in milliseconds, by the straight line within its bucket; NaN without counts. */
export function quantile(share, counts, bounds_s) {
  const all = counts.reduce((sum, value) => sum + value, 0);
  let before = 0;
  for (let index = 0; index < counts.length; index += 1) {
    if (all > 0 && before + counts[index] >= share * all) {
      const low = index ? bounds_s[index - 1] : 0;
      const high = bounds_s[index] ?? low;
      return 1000 * (low + ((high - low) * (share * all - before)) / counts[index]);
    }
    before += counts[index];
  }
  return NaN;
}

export function summed(lists) {
  return lists.reduce((sum, counts) => counts.map((value, index) => value + (sum[index] ?? 0)), []);
}

/** Requests between two looks, by how they ended. Degraded ones are answered too. */
export function outcomes(now, before) {
  const failed = grown(now.requests.failed, before?.requests.failed ?? {});
  const late = (failed.deadline ?? 0) + (failed.closing ?? 0) + (failed.cancelled ?? 0);
  return {
    answered: total(grown(now.requests.answered, before?.requests.answered ?? {})),
    degraded: total(grown(now.requests.degraded, before?.requests.degraded ?? {})),
    r429: failed.overloaded ?? 0,
    r503: late,
    other: total(failed) - (failed.overloaded ?? 0) - late,
  };
}

/** Blocks between two looks, by the tier that had them, and those that none had. */
export function sources(now, before) {
  const hits = grown(now.cache.hits, before?.cache.hits ?? {});
  return { ...hits, missed: now.cache.misses - (before?.cache.misses ?? 0) };
}
