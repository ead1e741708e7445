// Charts over uPlot, in the colours of style.css. Each has a sentence for those who do not see it.

import { clock } from "./words.js";

const HEIGHT = 170;
const drawn = new Set();

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** `series`: { label, colour, dash?, area?, stepped? }; `x`: how the axis reads; `value`: how a number of y reads. */
export class Chart {
  constructor(where, options) {
    this.where = where;
    this.options = options;
    this.key = "";
    this.plot = null;
    where.setAttribute("role", "img");
    drawn.add(this);
  }

  /** `data`: x, then a list for each series. */
  draw(series, data, sentence) {
    this.where.setAttribute("aria-label", sentence);
    const key = JSON.stringify(series);
    this.series = series;
    this.data = data;
    if (key !== this.key || !this.plot) {
      this.key = key;
      this.make();
    } else {
      this.plot.setData(data);
    }
  }

  make() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.where.clientWidth;
    if (!width || !this.data) return; // its view is hidden; drawn when it is shown
    const { scales, value, xValues, height, incrs } = this.options;
    const font = "11px system-ui, sans-serif";
    const time = { splits: undefined, axis: (self, ticks) => ticks.map(clock), legend: clock };
    const x = xValues ?? time;
    const axis = { stroke: colour("muted"), font, grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1, size: 4 } };
    this.plot = new window.uPlot({
      width,
      height: height ?? HEIGHT,
      padding: [8, 24, 0, 0],
      scales,
      cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
      legend: { live: true },
      axes: [
        { ...axis, space: 76, size: 28, values: x.axis, ...(x.splits && { splits: x.splits }) },
        { ...axis, size: 52, space: 32, ...(incrs && { incrs }), values: (self, ticks) => ticks.map((tick) => (tick === null ? "" : value(tick))) },
      ],
      series: [
        { label: this.options.xLabel ?? "at", value: (self, raw) => (raw === null || raw === undefined ? "–" : x.legend(raw)) },
        ...this.series.map((each) => ({
          label: each.label,
          stroke: colour(each.colour),
          width: 1.75,
          dash: each.dash ? [4, 4] : undefined,
          fill: each.area ? `${colour(each.colour)}2e` : undefined,
          paths: each.stepped ? window.uPlot.paths.stepped({ align: -1 }) : undefined,
          points: { show: false },
          spanGaps: false,
          value: (self, raw) => (raw === null || raw === undefined ? "–" : value(raw)),
        })),
      ],
    }, this.data, this.where);
  }
}

/** After a change of width, of the view or of colours. */
export function redraw() {
  for (const chart of drawn) chart.make();
}
