"""The page as parts that can be replaced one by one: HTML of each section, data of each chart, and the runs' axes.

A finished page has all parts in it; a live one asks its server for those that have changed.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from titan_metrics import __version__
from titan_metrics.report import configuration, layers, shares, summary, timeline
from titan_metrics.report.charts import Chart, buckets_for, charts_by_section, data_of, spoken
from titan_metrics.report.curve import Point
from titan_metrics.report.run import EXPECTED, Run

SECTIONS = {
    "summary": "Summary",
    "learning": "Learning",
    "speed": "Speed",
    "time": "Time split",
    "goodput": "Goodput",
    "memory": "Memory",
    "timeline": "Timeline",
    "layers": "Layers",
    "other": "Other metrics",
    "configuration": "Configuration",
    "environment": "Environment",
    "files": "Files",
}
"""The sections in their order: id -> heading."""

_AXIS_BUCKETS = 256
_MARKS = 400  # of one run


@dataclass(frozen=True)
class Document:
    """What the page shows. `parts` are JSON: `section/ID` (HTML), `chart/ID` (data) and `runs` (names, axes, marks)."""

    title: str
    parts: dict[str, Any]

    def versions(self) -> dict[str, str]:
        """A digest of each part, by which a change is seen."""
        return {name: hashlib.sha256(_json(part).encode()).hexdigest()[:16] for name, part in self.parts.items()}


def build(runs: Sequence[Run]) -> Document:
    """The document of these runs as they are now."""
    sections = charts_by_section(runs)
    everything = [chart for charts in sections.values() for chart in charts]
    buckets = buckets_for(everything)
    parts: dict[str, Any] = {"runs": [_run(run) for run in runs]}
    parts |= {f"chart/{chart.id}": data_of(chart, buckets) for chart in everything}
    macros = _templates().get_template("sections.html").make_module(_context(runs, sections))  # one a section
    parts |= {f"section/{name}": str(getattr(macros, name)(name, heading)) for name, heading in SECTIONS.items()}
    return Document(title=", ".join(run.name for run in runs), parts=parts)


def page(document: Document, *, live: bool = False) -> str:
    """The whole HTML page; a `live` one polls the server that it came from."""
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=document.title,
            sections=SECTIONS,
            parts=document.parts,
            data=_json({name: part for name, part in document.parts.items() if not name.startswith("section/")}),
            versions=_json(document.versions()),
            live=live,
            version=__version__,
            styles=[_asset("uPlot-1.6.32.min.css"), _asset("page.css")],
            scripts=[
                _asset(name) for name in ("language.js", "uPlot-1.6.32.min.js", "lines.js", "charts.js", "page.js")
            ],
        )
    )


def _context(runs: Sequence[Run], sections: dict[str, list[Chart]]) -> dict[str, Any]:
    settings = configuration.rows([run.config for run in runs])
    return {
        "runs": runs,
        "charts": sections,
        "spoken": lambda chart: spoken(chart, runs),
        "facts": summary.facts(runs),
        "notices": summary.notices(runs),
        "planned": [summary.planned_steps(run) for run in runs],
        "time_bars": shares.time_bars(runs),
        "goodput_bars": shares.goodput_bars(runs),
        "timelines": timeline.timelines(runs),
        "layers_of_runs": layers.layers(runs),
        "settings": configuration.by_section(settings),
        "differences": [row for row in settings if row.differs],
        "surroundings": configuration.rows([run.environment for run in runs]),
        "expected": EXPECTED,
    }


def _run(run: Run) -> dict[str, Any]:
    tokens = run.tokens.reduced(_AXIS_BUCKETS).points
    times = run.times.reduced(_AXIS_BUCKETS).points
    hours = summary.elapsed_hours([point.value for point in times])
    return {
        "name": run.name,
        "tokens": list(_columns(tokens)),
        "hours": list(_columns([Point(point.step, hour) for point, hour in zip(times, hours, strict=True)])),
        "marks": [[mark.step, mark.kind, mark.text] for mark in run.marks[-_MARKS:]],
    }


def _columns(points: Sequence[Point]) -> Iterator[list[float]]:
    yield [point.step for point in points]
    yield [float(f"{point.value:.9g}") for point in points]


def _json(value: Any) -> str:
    """JSON that may stand in a script element of an HTML page."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("titan_metrics.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("titan_metrics.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
