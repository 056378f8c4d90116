"""The page as a reader sees it, in headless Chromium.

`$CHROMIUM` is the program to use; without it, the one that `playwright install chromium` has fetched. There is no
skipping: a machine that has neither fails.
"""

import os
import signal

import pytest

from recorded_runs import served, write_metrics
from titan_metrics.report.document import build, page
from titan_metrics.report.run import open_runs

pytestmark = pytest.mark.browser

WIDTHS = (390, 1440)  # pixels: a phone, a laptop
SCHEMES = ("light", "dark")

# What text does not show in full: it leaves the window, or a box that hides what does not fit. What a reader can
# scroll to is not clipped.
CLIPPED = """() => {
  const clipped = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, style, .skip, option, [hidden]") || !element.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(element);
    const text = range.getBoundingClientRect();
    for (let box = element; box !== document.body; box = box.parentElement) {
      const { overflowX } = getComputedStyle(box);
      if (overflowX === "auto" || overflowX === "scroll") break;
      const { left, right } = box.getBoundingClientRect();
      const hides = overflowX === "hidden" || overflowX === "clip";
      if (hides && (text.right > right + 1 || text.left < left - 1)) clipped.push(element.textContent.slice(0, 60));
      if (box.parentElement === document.body && (text.right > innerWidth + 1 || text.left < -1))
        clipped.push(element.textContent.slice(0, 60));
    }
  }
  const { scrollWidth } = document.documentElement;
  if (scrollWidth > innerWidth) clipped.push(`the page is ${scrollWidth} pixels wide`);
  for (const [id, { u }] of charts) {
    u.ctx.font = u.axes[1].font[0];
    for (const text of u.axes[1]._values)
      if (u.ctx.measureText(text).width > (u.axes[1]._size - 8) * devicePixelRatio) clipped.push(`${id}: ${text}`);
  }
  return clipped;
}"""

# Charts on whose canvas not all lines (`every`), or not `some`, can be seen in their colors.
WITHOUT_DATA = """(enough) => [...charts].filter(([, { u, lines }]) => {
  const { left, top, width, height } = u.bbox;
  const { data } = u.ctx.getImageData(left, top, width, height);
  return !lines[enough]((line) => {
    if (!line.x.length || line.faint) return line.faint;
    const [r, g, b] = ink(line.color).match(/[\\d.]+/g).map(Number);
    let seen = 0;
    for (let i = 0; i < data.length; i += 4) {
      const away = Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b);
      if (data[i + 3] > 100 && away < 60) seen++;
    }
    return seen > 8;
  });
}).map(([id]) => id)"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM") or None)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens an address and fails in the end if the page complained, or asked the network for anything."""
    contexts, complaints = [], []

    def open_(address, *, width=1440, scheme="light", live=False, language=None):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-US")
        contexts.append(context)
        if language is not None:
            override = f"Object.defineProperty(navigator, 'language', {{ value: '{language}', configurable: true }})"
            context.add_init_script(override)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: None if live or request.url == address else complaints.append(request.url))
        tab.goto(address)
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def report(tmp_path):
    """Writes the page of some runs and returns its address."""

    def write(*folders):
        path = tmp_path / "report.html"
        path.write_text(page(build(open_runs(folders))))
        return path.as_uri()

    return write


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("runs", [1, 3])
def test_all_is_to_be_seen(make_run, report, open_page, runs, width, scheme):
    long = "llama3-8b-with-a-name-that-somebody-has-made-longer-than-a-phone-is-wide"
    folders = [make_run(long, slow=2, status="running"), make_run("b", lr=5e-4), make_run("c", status="failed")]
    tab = open_page(report(*folders[:runs]), width=width, scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert tab.evaluate("charts.size") == (16 if runs == 1 else 18)
    # Lines of several runs may lie on each other.
    assert tab.evaluate(WITHOUT_DATA, "every" if runs == 1 else "some") == []
    assert tab.evaluate(CLIPPED) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_with_little_in_it_is_still_a_page(bare_run, report, open_page, width):
    tab = open_page(report(bare_run), width=width)
    assert tab.evaluate("[...charts.keys()]") == ["loss"]
    assert tab.evaluate(WITHOUT_DATA, "every") == []
    assert tab.evaluate(CLIPPED) == []
    assert tab.locator("#timeline .empty").is_visible()


def test_a_language_that_no_format_knows_does_no_harm(make_run, report, open_page):
    tab = open_page(report(make_run("a")), language="en-US@posix")
    assert tab.evaluate(WITHOUT_DATA, "every") == []


def test_the_switches_change_the_curves(make_run, report, open_page):
    tab = open_page(report(make_run("a"), make_run("b", lr=5e-4)))
    loss = "charts.get('loss')"
    assert tab.evaluate(f"{loss}.lines.length") == 4
    tab.locator("#smoothing").fill("0.9")
    assert tab.evaluate(f"{loss}.lines.filter((line) => line.faint).length") == 4
    tab.locator("#smoothing").fill("0")
    tab.get_by_label("Log scale").check()
    assert tab.evaluate(f"{loss}.u.scales.y.distr") == 3
    tab.get_by_label("Over").select_option("tokens")
    assert tab.evaluate(f"{loss}.u.data[0].at(-1)") == 60 * 4096
    tab.get_by_label("Over").select_option("hours")
    assert tab.evaluate(f"{loss}.u.data[0].at(-1)") == pytest.approx(2 * 59 / 3600)
    tab.get_by_role("group", name="Runs shown").get_by_label("b", exact=True).uncheck()
    assert tab.evaluate(f"{loss}.lines.map((line) => line.run)") == [0, 0]
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.get_by_label("Theme").select_option("dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != paper


def test_a_stretch_is_looked_at_in_all_charts_at_once(make_run, report, open_page):
    tab = open_page(report(make_run()))
    box = tab.locator("[data-chart=loss] .u-over").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=4)
    tab.mouse.up()
    for chart in ("loss", "mfu"):
        low, high = tab.evaluate(f"[charts.get('{chart}').u.scales.x.min, charts.get('{chart}').u.scales.x.max]")
        assert 14 < low < 18
        assert 28 < high < 33
    tab.get_by_role("button", name="Show all").click()
    assert tab.evaluate("[charts.get('mfu').u.scales.x.min, charts.get('mfu').u.scales.x.max]") == [1, 60]


def test_a_chart_is_read_by_keyboard(make_run, report, open_page):
    tab = open_page(report(make_run()))
    plot = tab.locator("[data-chart=grad-norm] .plot")
    assert "Gradient norm: 2 at step 1" in plot.get_attribute("aria-label")
    plot.focus()
    tab.keyboard.press("Home")
    figure = tab.locator("[data-chart=grad-norm]")
    assert figure.locator(".where").inner_text() == "step 1"
    assert figure.locator(".legend b").inner_text() == "2"
    tab.keyboard.press("ArrowRight")
    assert figure.locator(".where").inner_text() == "step 2"
    assert figure.locator(".legend b").inner_text() == "1.5"


def test_checkpoints_and_restarts_are_marked(make_run, report, open_page):
    tab = open_page(report(make_run()))
    assert tab.evaluate("charts.get('loss').marks().map(([x, kind]) => [x, kind])") == [
        [20, "checkpoint"],
        [40, "checkpoint"],
        [40, "restart"],
    ]
    box = tab.locator("[data-chart=loss] .u-over").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 39 / 59, box["y"] + 50)
    assert "restarted from step 40" in tab.locator("[data-chart=loss] .note").inner_text()


def test_it_prints_light_and_whole(make_run, report, open_page):
    tab = open_page(report(make_run()), scheme="dark")
    assert len(tab.pdf()) > 50_000
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.documentElement.style.colorScheme") == "light"
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.documentElement.style.colorScheme") == ""


def test_a_live_page_follows_its_run(bare_run, open_page):
    with served(bare_run) as (process, address):
        tab = open_page(address, live=True)
        assert tab.evaluate("charts.get('loss').u.data[0].at(-1)") == 3
        write_metrics(bare_run, [4])
        tab.locator("[data-chart=mfu]").wait_for(timeout=60_000)
        assert tab.evaluate("charts.get('loss').u.data[0].at(-1)") == 4
        assert tab.locator("#speed .empty").count() == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
