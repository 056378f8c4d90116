// The page: its switches, its charts, and, if it is live, the news from its server.
"use strict";

const parts = JSON.parse(document.getElementById("data").textContent);
let versions = JSON.parse(document.getElementById("versions").textContent);
const charts = new Map(); // id -> ChartView
const view = {
  runs: parts.runs,
  hidden: new Set(),
  smoothing: 0,
  log: false,
  axis: "step",
  window: null,
  // Shows the same stretch of the x axis in all charts; null for everything.
  zoom(range) {
    view.window = range;
    document.getElementById("reset").hidden = range === null;
    for (const chart of charts.values()) chart.window(range);
  },
};

function drawAll() {
  for (const chart of charts.values()) chart.draw();
}

// Makes the charts whose figures stand in `root`.
function mount(root) {
  for (const figure of root.querySelectorAll("[data-chart]")) {
    const id = figure.dataset.chart;
    const chart = new ChartView(figure, view);
    charts.set(id, chart);
    chart.draw(parts[`chart/${id}`]);
  }
}

function unmount(root) {
  for (const figure of root.querySelectorAll("[data-chart]")) {
    charts.get(figure.dataset.chart)?.remove();
    charts.delete(figure.dataset.chart);
  }
}

function buildRunSwitches() {
  const place = document.getElementById("run-switches");
  place.hidden = view.runs.length < 2;
  place.replaceChildren(
    ...view.runs.map((run, index) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = !view.hidden.has(index);
      box.addEventListener("change", () => {
        if (box.checked) view.hidden.delete(index);
        else view.hidden.add(index);
        drawAll();
      });
      const swatch = document.createElement("i");
      swatch.className = `swatch run-${index % 8}`;
      label.append(box, swatch, run.name);
      return label;
    }),
  );
}

function offerAxes() {
  for (const option of document.getElementById("axis").options) {
    option.disabled = option.value !== "step" && !view.runs.some((run) => run[option.value][0].length > 1);
  }
}

function setTheme(scheme) {
  document.documentElement.style.colorScheme = scheme;
  drawAll();
}

const smoothing = document.getElementById("smoothing");
smoothing.addEventListener("input", () => {
  view.smoothing = Number(smoothing.value);
  document.getElementById("smoothing-value").textContent = smoothing.value;
  drawAll();
});
document.getElementById("log").addEventListener("change", (event) => {
  view.log = event.target.checked;
  drawAll();
});
document.getElementById("axis").addEventListener("change", (event) => {
  view.axis = event.target.value;
  view.zoom(null);
  drawAll();
});
document.getElementById("reset").addEventListener("click", () => view.zoom(null));
document.getElementById("theme").addEventListener("change", (event) => setTheme(event.target.value));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// Paper is white, whatever the screen is.
let beforePrinting = "";
addEventListener("beforeprint", () => {
  beforePrinting = document.documentElement.style.colorScheme;
  setTheme("light");
});
addEventListener("afterprint", () => setTheme(beforePrinting));

buildRunSwitches();
offerAxes();
mount(document);

// A live page: asks for the parts whose digests have changed, and puts them where they belong.
async function poll(status) {
  const answer = await fetch("update", { method: "POST", body: JSON.stringify(versions) });
  const news = await answer.json();
  if (!answer.ok) throw new Error(news.error);
  versions = news.versions;
  Object.assign(parts, news.parts);
  view.runs = parts.runs;
  const changed = Object.keys(news.parts);
  if (changed.includes("runs")) offerAxes();
  for (const name of changed.filter((part) => part.startsWith("section/"))) {
    const section = document.getElementById(name.slice("section/".length));
    unmount(section);
    const open = [...section.querySelectorAll("details")].map((details) => details.open);
    section.innerHTML = parts[name];
    section.querySelectorAll("details").forEach((details, i) => (details.open = open[i] ?? details.open));
    mount(section);
  }
  for (const [id, chart] of charts) if (changed.includes(`chart/${id}`)) chart.draw(parts[`chart/${id}`]);
  status.textContent = `Live: ${changed.length ? "updated" : "nothing new"} at ${new Date().toLocaleTimeString()}.`;
  status.classList.remove("lost");
}

const live = document.getElementById("live");
if (live) {
  const again = async () => {
    try {
      await poll(live);
    } catch (error) {
      live.textContent = `Not live: ${error.message}. The page shows what it last heard and keeps asking.`;
      live.classList.add("lost");
    }
    setTimeout(again, 2000);
  };
  setTimeout(again, 2000);
}
