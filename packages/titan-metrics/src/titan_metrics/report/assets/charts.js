// A chart of the page, drawn by uPlot: axes, marks, legend, cursor and keyboard. Its lines come from lines.js.
"use strict";

const SYNC = uPlot.sync("report");
const HEIGHT = 220;
const NEAR = 6; // pixels within which the cursor reads a mark
// Distances between the lines of an axis, for units that are not decimal.
const STEPS = {
  bytes: Array.from({ length: 60 }, (_, i) => 2 ** i),
  seconds: [
    ...[-9, -8, -7, -6, -5, -4, -3, -2, -1].flatMap((power) => [1, 2, 5].map((times) => Number(`${times}e${power}`))),
    ...[1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 18000, 36000, 72000, 180000, 360000],
  ],
};

function yRange(min, max, fromZero) {
  if (!(max > 0 || min < 0)) return [0, 1];
  return fromZero ? [0, max * 1.04] : uPlot.rangeNum(min, max, 0.1, true);
}

// Places of a logarithmic axis that get a line: powers of ten, with more between them where there are few.
function logSplits(min, max) {
  const decades = Math.log10(max / min);
  if (decades < 0.5) {
    const rough = (max - min) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
    return Array.from({ length: 8 }, (_, i) => (Math.ceil(min / step) + i) * step).filter((value) => value <= max);
  }
  const between = decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 2, 3, 4, 5, 7];
  const first = Math.floor(Math.log10(min));
  const powers = Array.from({ length: Math.ceil(decades) + 2 }, (_, i) => 10 ** (first + i));
  return powers
    .flatMap((power) => between.map((times) => times * power))
    .filter((value) => value >= min && value <= max);
}

function nearest(values, index) {
  for (let away = 0; away < values.length; away++) {
    if (values[index - away] != null) return index - away;
    if (values[index + away] != null) return index + away;
  }
  return null;
}

class ChartView {
  constructor(figure, view) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.where = figure.querySelector(".where");
    this.view = view;
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.resizer = new ResizeObserver(() => this.u?.setSize({ width: this.plot.clientWidth, height: HEIGHT }));
    this.resizer.observe(this.plot);
  }

  // Draws `chart`, or again what was drawn, in the present state of the page.
  draw(chart = this.chart) {
    this.chart = chart;
    this.u?.destroy();
    const { data, lines } = linesOf(chart, this.view);
    this.lines = lines;
    const format = FORMATS[chart.format];
    const values = data.slice(1).flatMap((ys) => ys.filter((y) => y != null));
    const log = this.view.log && !chart.stacked && values.length > 0 && values.every((y) => y > 0);
    const axis = { stroke: () => ink("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: () => ink("--line"), width: 1 };
    const xFormat = this.view.axis === "hours" ? (v) => trimmed(v, 4) : FORMATS.large;
    this.u = new uPlot(
      {
        width: this.plot.clientWidth,
        height: HEIGHT,
        padding: [10, 14, 0, 0],
        legend: { show: false },
        cursor: {
          points: { size: 7 },
          y: false,
          drag: { x: true, y: false },
          dataIdx: (u, series, index) => (series === 0 ? index : (nearest(u.data[series], index) ?? index)),
          sync: {
            key: SYNC.key,
            scales: ["x", null],
            setSeries: false,
            filters: { pub: (type) => type === "mousemove" || type === "mouseleave" },
          },
          bind: { dblclick: () => () => this.view.zoom(null) },
        },
        scales: {
          x: { time: false },
          y: log
            ? { distr: 3, range: (_, min, max) => [min / 1.05, max * 1.05] }
            : { range: (_, min, max) => yRange(min, max, chart.stacked) },
        },
        axes: [
          { ...axis, grid: { show: false }, size: 28, space: 64, values: (_, splits) => splits.map((v) => xFormat(v)) },
          {
            ...axis,
            grid,
            space: 34,
            ...(log ? { splits: (_, __, min, max) => logSplits(min, max), filter: (_, splits) => splits } : {}),
            ...(chart.format in STEPS && !log ? { incrs: STEPS[chart.format] } : {}),
            values: (_, splits) => splits.map((v) => (v == null ? "" : format(v, 4))),
            size: (_, values) => 16 + 6.4 * Math.max(3, ...(values ?? []).map((text) => text.length)),
          },
        ],
        series: [{}, ...lines.map((line) => this.series(line))],
        hooks: {
          draw: [(u) => this.drawMarks(u)],
          setCursor: [() => this.readCursor()],
          setSelect: [
            (u) =>
              u.select.width > 4 &&
              this.view.zoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]),
          ],
        },
      },
      data,
      this.plot,
    );
    if (this.view.window) this.u.setScale("x", { min: this.view.window[0], max: this.view.window[1] });
    this.buildLegend();
  }

  series(line) {
    const color = () => (line.faint ? faded(ink(line.color), 0.28) : ink(line.color));
    return {
      stroke: color,
      fill: this.chart.stacked ? color : undefined,
      width: this.chart.stacked ? 0.5 : line.faint ? 1 : 1.75,
      dash: line.dash,
      spanGaps: true,
      points: { show: line.x.length === 1, size: 6, fill: color },
    };
  }

  // Marks of all runs that are shown, on the axis that was chosen: [x, kind, text, run].
  marks() {
    const shown = new Set(this.lines.map((line) => line.run));
    return this.view.runs.flatMap((run, index) =>
      shown.has(index)
        ? run.marks.map(([step, kind, text]) => [placed([step], index, this.view)?.[0], kind, text, index])
        : [],
    );
  }

  drawMarks(u) {
    const { ctx, bbox } = u;
    const many = this.view.runs.length > 1;
    const dot = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 4 * dot, bbox.top, bbox.width + 8 * dot, bbox.height);
    ctx.clip();
    for (const [at, kind, , run] of this.marks()) {
      const x = u.valToPos(at, "x", true);
      const color = many ? ink(`--run-${run % 8}`) : ink(kind === "restart" ? "--bad" : "--soft");
      ctx.strokeStyle = ctx.fillStyle = color;
      ctx.lineWidth = dot;
      ctx.beginPath();
      if (kind === "restart") {
        ctx.setLineDash([4 * dot, 3 * dot]);
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      } else {
        const foot = bbox.top + bbox.height;
        ctx.moveTo(x - 3.5 * dot, foot);
        ctx.lineTo(x + 3.5 * dot, foot);
        ctx.lineTo(x, foot - 7 * dot);
        ctx.fill();
      }
    }
    ctx.setLineDash([]);
    ctx.strokeStyle = ink("--bad");
    ctx.lineWidth = 1.5 * dot;
    for (const series of this.chart.series.filter(({ run }) => !this.view.hidden.has(run))) {
      for (const at of placed(series.broken ?? [], series.run, this.view) ?? []) {
        const x = u.valToPos(at, "x", true);
        const y = bbox.top + 8 * dot;
        ctx.beginPath();
        ctx.moveTo(x - 4 * dot, y - 4 * dot);
        ctx.lineTo(x + 4 * dot, y + 4 * dot);
        ctx.moveTo(x + 4 * dot, y - 4 * dot);
        ctx.lineTo(x - 4 * dot, y + 4 * dot);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  buildLegend() {
    this.legend.replaceChildren();
    this.readouts = [];
    const named = this.lines.map((_, i) => i).filter((i) => !this.lines[i].faint && this.lines[i].x.length);
    for (const i of named.reverse()) {
      const entry = document.createElement("span");
      const key = document.createElement("i");
      key.className = this.chart.stacked ? "swatch" : "key";
      key.style.setProperty("--color", `var(${this.lines[i].color})`);
      if (!this.chart.stacked) key.style.borderTopStyle = this.lines[i].dash.length ? "dashed" : "solid";
      const value = document.createElement("b");
      entry.append(key, `${this.lines[i].name} `, value);
      this.legend.append(entry);
      this.readouts.push([i, value]);
    }
    this.note = document.createElement("span");
    this.note.className = "note";
    this.legend.append(this.note);
    this.readCursor();
  }

  // Writes the values at the cursor, or the last ones, into the legend.
  readCursor() {
    if (!this.readouts) return;
    const index = this.u.cursor.idx;
    const format = FORMATS[this.chart.format];
    for (const [i, element] of this.readouts) {
      const ys = this.lines[i].shown ?? this.u.data[i + 1];
      const at = nearest(ys, index ?? ys.length - 1);
      element.textContent = at == null ? "—" : format(ys[at]);
    }
    const unit = { step: "step", tokens: "tokens", hours: "hours" }[this.view.axis];
    const x = index == null ? null : this.u.data[0][index];
    const shown = x == null ? "" : this.view.axis === "hours" ? trimmed(x, 4) : Math.round(x).toLocaleString("en");
    this.where.textContent = x == null ? "" : this.view.axis === "step" ? `${unit} ${shown}` : `${shown} ${unit}`;
    const left = this.u.cursor.left ?? -1;
    const near = left < 0 ? [] : this.marks().filter(([at]) => Math.abs(this.u.valToPos(at, "x") - left) <= NEAR);
    this.note.textContent = near.map(([, , text]) => text).join(", ");
  }

  onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    const xs = this.u.data[0];
    if (event.key === "Escape") this.view.zoom(null);
    if (!(event.key in moves) || !xs.length) return;
    event.preventDefault();
    this.legend.setAttribute("aria-live", "polite");
    const now = this.u.cursor.idx ?? xs.length - 1;
    const index = Math.min(Math.max(now + moves[event.key], 0), xs.length - 1);
    this.u.setCursor({ left: this.u.valToPos(xs[index], "x"), top: 10 });
  }

  window(range) {
    const xs = this.u.data[0];
    if (!xs.length) return;
    this.u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    const [min, max] = range ?? [xs[0], xs.at(-1)];
    this.u.setScale("x", { min, max: max > min ? max : min + 1 });
  }

  remove() {
    this.resizer.disconnect();
    this.u?.destroy();
  }
}
