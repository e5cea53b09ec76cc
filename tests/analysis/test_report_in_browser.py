"""The report in a real browser: it draws, sorts, tells tokens, and asks nothing of anyone."""

import shutil

import pytest
from planted_analysis import planted

from priors_peft.analysis.report import save_report


pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH: `apt-get install chromium` on Debian")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def analysis():
    return planted(tsne=True)


@pytest.fixture(scope="module")
def opened(browser, analysis, tmp_path_factory):
    """The page, and all that it has said and asked for so far."""
    path = save_report(analysis, tmp_path_factory.mktemp("report") / "report.html")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: (page.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=120_000)
    yield page
    page.close()


def test_everything_is_drawn_and_the_console_is_silent(opened):
    for part in opened.query_selector_all("details:not([open]) > summary"):
        part.click()
    opened.wait_for_selector(".figure:not([data-drawn])", state="detached", timeout=120_000)
    assert opened.locator(".figure .main-svg").count() >= opened.locator(".figure").count()
    assert opened.said == []


def test_nothing_is_asked_of_anyone(opened):
    assert [url for url in opened.asked if not url.startswith(("data:", "blob:"))] == [opened.url]


def test_the_tokens_table_sorts_by_number_both_ways_when_its_heading_is_clicked(opened):
    table = opened.locator("table.tokens").first
    column = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value))"
    scores = table.evaluate(column)
    assert scores != sorted(scores)
    table.locator("th button", has_text="score").click()
    assert table.evaluate(column) == sorted(scores)
    table.locator("th button", has_text="score").click()
    assert table.evaluate(column) == sorted(scores, reverse=True)
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("score")


def test_hovering_a_point_of_the_projection_shows_its_token_as_text(opened, analysis):
    figure = opened.locator(".figure[data-figure=pca]")
    figure.scroll_into_view_if_needed()
    # The first prompt's first virtual token lies on the vocabulary's row 0, which is called <script>alert(1)</script>.
    assert analysis["adapters"][0]["tokens"]["virtual_tokens"][0]["nearest"][0]["text"] == "<script>alert(1)</script>"
    place = figure.evaluate(
        """figure => {
            const trace = figure._fullData.find(trace => trace.meta === "prompt");
            const { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.d2p(trace.x[0]), box.y + yaxis._offset + yaxis.d2p(trace.y[0])];
        }"""
    )
    opened.mouse.move(place[0] - 3, place[1])
    opened.mouse.move(*place)
    opened.wait_for_selector(".figure[data-figure=pca] .hoverlayer .hovertext")
    assert "0: <script>alert(1)</script>" in figure.locator(".hoverlayer .hovertext").first.text_content()


def test_a_kind_of_points_is_hidden_by_its_box(opened):
    figure = opened.locator(".figure[data-figure=pca]")
    shown = "figure => [...new Set(figure._fullData.filter(trace => trace.visible === true).map(trace => trace.meta))].sort()"
    box = opened.locator("input[data-figure=pca][value=vocabulary]")
    before = figure.evaluate(shown)
    assert "vocabulary" in before
    box.uncheck()
    assert figure.evaluate(shown) == [kind for kind in before if kind != "vocabulary"]
    box.check()
    assert figure.evaluate(shown) == before


def test_script_that_got_into_the_page_would_not_run(opened):
    """The policy holds even where escaping would fail."""
    opened.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const div = document.createElement("div");
            div.innerHTML = "<img src='data:,' onerror='window.ran = true'>";
            document.body.append(div);
        }"""
    )
    opened.wait_for_timeout(200)
    assert opened.evaluate("window.ran") is None
    assert opened.said and all("Content Security Policy" in said for said in opened.said)
    opened.said.clear()
