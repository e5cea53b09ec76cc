"""The report: self-contained, small, the same every time; nothing in it runs or is read as markup but its own."""

import base64
import copy
import gzip
import hashlib
import html.parser
import json
import re
import sys

import plotly.graph_objects as go
import pytest
from planted_analysis import NASTY, planted

from priors_peft.analysis.report import save_report


SECTIONS = ["overview", "tokens", "geometry", "projection", "activations", "faithfulness", "descriptions", "stability", "transfer", "questions", "reading"]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements, their attributes, and the text in them."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.scripts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def ids(self, tag: str) -> list[str]:
        return [attributes["id"] for name, attributes in self.elements if name == tag and "id" in attributes]

    def figures(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def analysis():
    return planted(tsne=True)


@pytest.fixture(scope="module")
def page(analysis, tmp_path_factory):
    return Page(save_report(analysis, tmp_path_factory.mktemp("report") / "report.html"))


def test_every_part_has_its_section_and_every_figure_its_place(page):
    assert page.ids("section") == SECTIONS
    places = [attributes["data-figure"] for tag, attributes in page.elements if "figure" == attributes.get("class")]
    assert sorted(places) == sorted(page.figures())
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {f"#{section}" for section in SECTIONS}


@pytest.mark.parametrize("name", ["projection", "activations", "stability", "transfer", "questions"])
def test_a_part_that_is_not_there_is_left_out(name, analysis, tmp_path):
    found = Page(save_report(analysis | {name: None}, tmp_path / "report.html"))
    assert found.ids("section") == [section for section in SECTIONS if section != name]


def test_a_bare_adapter_is_said_to_be_not_measured_and_why(analysis, tmp_path):
    bare = [{**analysis["adapters"][0], **dict.fromkeys(("tokens", "geometry", "faithfulness", "description"))}]
    rest = dict.fromkeys(("projection", "activations", "stability", "transfer", "words", "questions"))
    left_out = {"faithfulness": "no <task> given"}
    found = Page(save_report(analysis | rest | {"adapters": bare, "left_out": left_out}, tmp_path / "report.html"))
    assert found.ids("section") == ["overview", "reading"]
    assert found.texts.count("not measured") == 4
    assert "(no <task> given)" in "".join(found.texts)


@pytest.mark.parametrize("parts", [{"count": 1}, {"count": 9}, {"count": 2, "deep": True}, {"count": 1, "snapshots": 1, "virtual_tokens": 1}])  # fmt: skip
def test_one_prompt_many_prompts_and_deep_prompts_are_drawn(parts, tmp_path):
    found = Page(save_report(planted(**parts), tmp_path / "report.html"))
    for figure in found.figures().values():
        go.Figure(figure)


def test_every_figure_is_one_that_plotly_knows(page):
    for figure in page.figures().values():
        go.Figure(figure)


def test_names_and_tokens_stay_text(page, analysis):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "form", "base", "template"}
    assert len(page.scripts) == 3
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    text = "".join(page.texts)
    for adapter in analysis["adapters"]:
        assert adapter["name"] in text
        for row in adapter["tokens"]["virtual_tokens"]:
            shown = row["nearest"][0]["text"].encode("utf-8", "replace").decode()
            assert shown in text
    assert {near["text"] for a in analysis["adapters"] for row in a["tokens"]["virtual_tokens"] for near in row["nearest"]} & set(NASTY)  # fmt: skip


def test_data_inside_scripts_can_not_close_them_and_plotly_gets_text_escaped(page):
    data = page.scripts[0]
    assert "<" not in data and ">" not in data and "&" not in data
    allowed = re.compile(r"<br>|&(?:amp|lt|gt);")
    shown = [text for figure in page.figures().values() for text in _strings(figure)]
    assert any("&lt;script&gt;" in text for text in shown)
    for text in shown:
        assert not re.search(r"[<>&]", allowed.sub("", text)), text


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def test_the_policy_lets_only_the_pages_two_scripts_run_and_nothing_be_fetched(page):
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv"))
    plotly = gzip.decompress(base64.b64decode(page.scripts[1]))
    hashes = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in (plotly, page.scripts[2].encode())]
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; ")
    assert "unsafe-eval" not in policy and "http" not in policy
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))


def test_the_page_is_the_same_every_time(page, analysis, tmp_path):
    again = save_report(copy.deepcopy(analysis), tmp_path / "report.html")
    assert again.read_text(encoding="utf-8") == page.source


def test_ten_prompts_of_twenty_virtual_tokens_take_less_than_5_mb(tmp_path):
    ten = copy.deepcopy(planted(count=10, virtual_tokens=20, snapshots=21))
    pca = ten["projection"]["pca"]
    pca["groups"][0] = pca["groups"][0] | {key: (pca["groups"][0][key] * 14)[:2000] for key in ("points", "labels")}
    ten["projection"]["tsne"] = pca | {"perplexity": 30.0, "seed": 0}
    assert save_report(ten, tmp_path / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named(package, analysis, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'(?i)needs {package}, .*pip install "priors_peft\[analysis\]"'):
        save_report(analysis, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_named(analysis, tmp_path):
    with pytest.raises(ValueError, match="format_version 1, got None"):
        save_report({}, tmp_path / "report.html")
