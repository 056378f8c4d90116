// From a chart's data, as titan_metrics.report.charts.data_of makes it, to the lines that uPlot draws: how values are
// written, where steps lie on the chosen axis, smoothing, stacking. `view` is the state that all charts share (page.js).
"use strict";

const DASHES = [[], [6, 3], [2, 3], [10, 3, 2, 3]];

const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
const scaled =
  (sizes) =>
  (value, digits = 4) => {
    const found = sizes.find(([size]) => Math.abs(value) >= size);
    return found ? `${trimmed(value / found[0], digits)} ${found[1]}` : trimmed(value, digits);
  };
const FORMATS = {
  plain: (value, digits = 4) => {
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e5))
      return Number(value.toPrecision(digits)).toExponential().replace("e+", "e");
    return size >= 1000 ? Number(value.toPrecision(Math.max(digits, 5))).toLocaleString("en") : trimmed(value, digits);
  },
  large: scaled([
    [1e15, "P"],
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]),
  bytes: scaled([
    [2 ** 40, "TiB"],
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
    [2 ** 10, "KiB"],
    [0, "B"],
  ]),
  percent: (value, digits = 3) => `${trimmed(100 * value, digits)} %`,
  seconds: (value, digits = 3) => {
    if (value === 0) return "0 s";
    const [size, unit] = [
      [3600, "h"],
      [60, "min"],
      [1, "s"],
      [1e-3, "ms"],
      [1e-6, "µs"],
    ].find(([s]) => Math.abs(value) >= s) ?? [1e-9, "ns"];
    return `${trimmed(value / size, digits)} ${unit}`;
  },
};

// Colors are custom properties that depend on the theme; a canvas needs them resolved.
const probe = document.createElement("i");
probe.hidden = true;
document.body.append(probe);
function ink(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

function faded(color, share) {
  return color.replace(/^rgba?\(([^)]*)\)$/, (_, parts) => `rgba(${parts.split(",").slice(0, 3).join(",")}, ${share})`);
}

// y at x on the polyline through (xs, ys), its ends held.
function interpolate(xs, ys, x) {
  let low = 0;
  let high = xs.length - 1;
  if (x <= xs[low]) return ys[low];
  if (x >= xs[high]) return ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return ys[low] + ((x - xs[low]) / (xs[high] - xs[low])) * (ys[high] - ys[low]);
}

// An exponential moving average whose weights add up to one from the first value on.
function smooth(ys, weight) {
  let sum = 0;
  let norm = 0;
  return ys.map((y) => {
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// Where steps of `run` lie on the axis that was chosen; null if the run did not log it.
function placed(steps, run, view) {
  if (view.axis === "step") return steps;
  const [xs, ys] = view.runs[run][view.axis];
  return xs.length ? steps.map((step) => interpolate(xs, ys, step)) : null;
}

// The lines of a chart as uPlot takes them: { data, lines }, `lines` beside uPlot's series 1, 2, …
function linesOf(chart, view) {
  const lines = [];
  const labels = [...new Set(chart.series.map((series) => series.label))];
  for (const series of chart.series) {
    if (view.hidden.has(series.run)) continue;
    const name = [view.runs.length > 1 && !chart.stacked ? view.runs[series.run].name : "", series.label]
      .filter(Boolean)
      .join(" · ");
    const place = labels.indexOf(series.label);
    const color = series.color ?? `--run-${(view.runs.length > 1 ? series.run : place) % 8}`;
    const line = { name, color, dash: view.runs.length > 1 ? DASHES[place % 4] : [], run: series.run };
    const x = placed(series.x, series.run, view);
    if (!x) continue;
    if (chart.stacked || view.smoothing === 0) {
      lines.push({ ...line, x, y: series.y });
      continue;
    }
    const [steps, means] = series.mean ?? [series.x, series.y];
    lines.push({ ...line, x, y: series.y, name: "", faint: true });
    lines.push({ ...line, x: placed(steps, series.run, view), y: smooth(means, view.smoothing) });
  }
  if (!lines.length)
    return {
      data: [
        [0, 1],
        [null, null],
      ],
      lines: [{ name: "", color: "--line", dash: [], x: [], y: [] }],
    };
  const sums = chart.stacked ? stacked(lines) : null;
  lines.reverse(); // what is painted last lies on top: the first line, or the lowest part of a whole
  const data = sums ? [sums, ...lines.map(({ total }) => total)] : uPlot.join(lines.map(({ x, y }) => unique(x, y)));
  return { data, lines };
}

// uPlot wants x strictly rising: of points on one place (tokens that did not grow) the last counts.
function unique(x, y) {
  const keep = x.map((value, i) => i + 1 === x.length || value < x[i + 1]);
  return [x.filter((_, i) => keep[i]), y.filter((_, i) => keep[i])];
}

// Gives each line as `total` the sum of itself and those before it, and as `shown` its own values; returns their x.
function stacked(lines) {
  const xs = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
  let below = xs.map(() => 0);
  for (const line of lines) {
    const own = xs.map((x) => (x < line.x[0] || x > line.x.at(-1) ? 0 : interpolate(line.x, line.y, x)));
    line.shown = own;
    below = below.map((sum, i) => sum + own[i]);
    line.total = below;
  }
  return xs;
}
