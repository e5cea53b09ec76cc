"""Pictures: there where their data is, the same every time, with claims that follow the data and text that breaks nothing."""

import copy
import sys
import warnings

import matplotlib
import pytest
from matplotlib.legend import Legend
from planted_analysis import NASTY, planted

from priors_peft.analysis import claims
from priors_peft.analysis.pictures import (
    PICTURES,
    activations,
    faithfulness,
    geometry,
    projection,
    save_pictures,
    stability,
    style,
    tokens,
    transfer,
)
from priors_peft.analysis.report import tasks


NAMES = ["tokens", "geometry", "projection", "activations", "faithfulness", "stability", "transfer"]


@pytest.fixture(scope="module")
def analysis():
    return planted(tsne=True)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def title(picture, analysis) -> str:
    return picture.draw(analysis)._suptitle.get_text().replace("\n", " ")


def drawn(analysis) -> list:
    """The pictures, laid out as for saving."""
    with matplotlib.rc_context(style.STYLE):
        figures = [figure for figure in (picture.draw(analysis) for picture in PICTURES) if figure is not None]
        for figure in figures:
            figure.draw_without_rendering()
    return figures


@pytest.mark.slow
def test_every_part_has_a_picture_of_card_width(analysis, tmp_path):
    written = save_pictures(analysis, tmp_path)
    assert [path.name for path in written] == [f"{name}.png" for name in NAMES]
    for path in written:
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") == 1200


@pytest.mark.slow
def test_pictures_are_the_same_every_time(analysis, tmp_path):
    one, two = (save_pictures(copy.deepcopy(analysis), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.parametrize("picture", [projection, activations, stability, transfer])
def test_a_part_that_is_not_there_has_no_picture(picture, analysis):
    assert picture.draw(analysis) is not None
    assert picture.draw(analysis | {picture.__name__.rpartition(".")[2]: None}) is None


def test_an_adapter_without_anything_measured_has_no_picture(analysis, tmp_path):
    bare = [{**analysis["adapters"][0], "tokens": None, "geometry": None, "faithfulness": None}]
    rest = dict.fromkeys(("projection", "activations", "stability", "transfer", "words", "questions"))
    assert save_pictures(analysis | rest | {"adapters": bare}, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{"count": 1}, {"count": 9}, {"count": 2, "deep": True}, {"snapshots": 1}])
def test_one_prompt_many_prompts_deep_prompts_and_prompts_without_history_are_drawn(parts):
    assert len(drawn(planted(**parts))) >= 5


@pytest.mark.parametrize("count", [1, 60])
def test_a_prompt_of_one_or_of_many_virtual_tokens_is_drawn(count):
    assert len(drawn(planted(count=1, virtual_tokens=count, snapshots=2))) == 5


@pytest.mark.slow
def test_what_was_not_measured_of_an_adapter_is_left_out(analysis):
    changed = copy.deepcopy(analysis)
    first = changed["adapters"][0]
    first["faithfulness"] |= {"initial_nll": None, "no_prompt_nll": None, "ablations": None}
    first["faithfulness"]["waywardness"] |= {"gained": None, "lost_share": None}
    for row in first["tokens"]["virtual_tokens"]:
        row |= {"initial_nearest": None, "initial_percentile": None, "inherited": None}
    first["geometry"]["layers"][0]["series"]["measures"]["drift"]["values"] = [None] * 5
    changed["projection"]["tsne"] = None
    changed["stability"]["groups"][0] |= {"lines": [], "equidistance": None, "metric_spread": None}
    changed["transfer"] |= {"correlations": None, "similarities": None}
    assert len(drawn(changed)) == len(NAMES)


def test_the_title_counts_the_virtual_tokens_with_signal(analysis):
    alone = analysis | {"adapters": [copy.deepcopy(analysis["adapters"][2])]}
    found = alone["adapters"][0]["tokens"]
    # Planted: 0 was moved onto a word, 1 lay on one from the start.
    assert [row["signal"] for row in found["virtual_tokens"][:2]] == [True, False]
    assert found["virtual_tokens"][1]["inherited"]
    assert f"{found['num_signal']} of 12 virtual token" in title(tokens, alone)
    assert "(5 % level); 1 more by start or prior" in title(tokens, alone)
    found["num_signal"] = 0
    assert "none of 12 virtual tokens lie" in title(tokens, alone)


def test_the_legend_of_tokens_names_the_marks_that_are_there(analysis):
    alone = analysis | {"adapters": [copy.deepcopy(analysis["adapters"][2])]}
    for row in alone["adapters"][0]["tokens"]["virtual_tokens"]:
        row |= {"signal": False, "inherited": False, "initial_nearest": None}
    (legend,) = tokens.draw(alone).legends
    assert [text.get_text() for text in legend.get_texts()] == ["no nearer", "random prompts, 5 to 95 %"]
    assert "corrected" in legend.get_title().get_text()


def test_losses_that_no_adapter_has_are_in_no_legend(analysis):
    analysis = copy.deepcopy(analysis)
    measured = [adapter for adapter in analysis["adapters"] if adapter.get("faithfulness")]
    for adapter in measured:
        adapter["faithfulness"]["initial_nll"] = None
    (legend,) = faithfulness.draw(analysis).findobj(Legend)
    drawn = [text.get_text() for text in legend.get_texts()]
    assert drawn == [trace["name"] for trace in tasks.losses(measured)["data"]]
    assert drawn == ["the prompt", "its nearest tokens instead", "no prompt"]


def test_gains_that_are_all_zero_have_no_scale(analysis):
    bars = len(transfer.draw(analysis).axes)
    flat = analysis["transfer"] | {"scores": [analysis["transfer"]["no_prompt"]] * len(analysis["transfer"]["scores"])}
    assert len(transfer.draw(analysis | {"transfer": flat}).axes) == bars - 1


def test_the_title_says_how_many_tokens_kept_their_word(analysis):
    alone = analysis | {"adapters": [copy.deepcopy(analysis["adapters"][2])]}
    rows = alone["adapters"][0]["tokens"]["virtual_tokens"]
    for row in rows:
        row["moved"] = row["index"] % 4 == 0
    assert "; 9 of 12 virtual tokens kept the nearest word of the start" in title(tokens, alone)
    rows[0]["moved"] = None  # a stock prompt, whose start nobody knows
    assert "kept" not in title(tokens, alone)


def test_prompts_whose_activations_are_not_drawn_are_counted(analysis):
    layer = analysis["activations"]["layers"][-1]
    many = [{**layer, "with_prompt": True, "adapter": f"a{index}"} for index in range(6)]
    found = {"layers": [{**layer, "with_prompt": False, "adapter": None}, *many]}
    assert title(activations, analysis | {"activations": found}).endswith("(drawn: 4 of 6 prompts)")
    assert "drawn" not in title(activations, analysis | {"activations": {"layers": found["layers"][:5]}})


def test_bands_are_the_adapters_own_and_grey_where_they_share_one():
    def series(low):
        return {"measures": {"norm": {"band": [low, low + 1]}}}

    colours = {"a": ("red", "a"), "b": ("blue", "b"), "c": ("blue", "b")}
    alone = {"a": series(1.0), "b": series(5.0), "c": series(5.5)}
    # Runs of one task, in its colour, have one band around all of theirs.
    assert geometry.bands(alone, "norm", colours) == [(1.0, 2.0, "red"), (5.0, 6.5, "blue")]
    shared = {"a": series(1.0), "b": series(1.0)}
    assert geometry.bands(shared, "norm", colours) == [(1.0, 2.0, style.GREY)]
    many = {str(index): series(float(index)) for index in range(8)}
    of_many = {key: (style.COLOURS[int(key) % 7], key) for key in many}
    assert geometry.bands(many, "norm", of_many) == [(0.0, 8.0, style.GREY)]


def test_umap_is_drawn_beside_the_others(analysis):
    projected = analysis["projection"]
    umap = {"neighbors": 15, "min_dist": 0.1, "seed": 0, "groups": projected["tsne"]["groups"]}
    figure = projection.draw(analysis | {"projection": {**projected, "umap": umap}})
    assert [axis.get_title("left") for axis in figure.axes][-1] == "UMAP (15 neighbours, seed 0)"


def test_the_title_says_which_prompts_collapsed(analysis):
    assert claims.shape_of(analysis["adapters"][1]) == "collapsed"
    assert claims.shape_of(analysis["adapters"][3]) == "not collapsed"
    assert title(geometry, analysis).startswith("Of 4 prompts 1 collapsed (wsc-0) and ")


def test_titles_follow_losses_variance_and_transfer(analysis):
    pca = analysis["projection"]["pca"]["explained_variance"]
    assert f"show {round(100 * sum(pca))} % of the variance" in title(projection, analysis)
    ways = [adapter["faithfulness"]["waywardness"] for adapter in analysis["adapters"]]
    useful = [way for way in ways if way["gained"] > 0]
    half = sum(way["lost"] > way["gained"] / 2 for way in useful)
    assert f"{half} of {len(useful)} prompts" in title(faithfulness, analysis)
    gains = claims.gains(analysis["transfer"])
    own = analysis["transfer"]["own"]
    wins = sum(gain > 0 for i, row in enumerate(gains) for j, gain in enumerate(row) if own[i] != j)
    assert f"({wins} of 12)" in title(transfer, analysis)


@pytest.mark.parametrize(
    ("lost", "gained", "says"),
    [
        (0.5, 1.0, "loses 50 % of its gain (0.5 of 1 nats per token)"),
        (-0.1, 1.0, "loses nothing of its gain of 1 nats"),
        (2.0, 1.0, "loses all of its gain and more"),
        (0.1, -0.25, "no better than no prompt (0.25 nats per token worse)"),
        (0.1, None, "loses 0.1 nats per token"),
    ],
)
def test_faithfulness_is_said_as_it_was_measured(lost, gained, says):
    said = claims.faithfulness({"faithfulness": {"waywardness": {"lost": lost, "gained": gained}, "rows": 8}})
    assert says in said and said.endswith(", on 8 rows")


@pytest.mark.parametrize("text", [*NASTY, "", "_" * 50, "中" * 30])
def test_text_is_short_and_of_characters_that_the_font_has(text):
    shown = style.drawable(text, 18)
    assert len(shown) <= 18
    assert all(style._has_glyph(character) for character in shown)
    assert text.isascii() is False or not text.isprintable() or len(text) > 18 or text in shown


def test_adapters_have_colours_of_their_own_or_their_tasks(analysis):
    few = style.colours(analysis["adapters"])
    assert len({colour for colour, _ in few.values()}) == 4
    many = [{"name": f"{task}-{seed}", "task": task} for task in ("a", "b", "c") for seed in range(4)]
    looks = style.colours(many)
    assert looks["a-0"] == looks["a-3"] == (style.COLOURS[0], "a") and looks["c-1"] == (style.COLOURS[2], "c")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.123"), (-3.0, "−3"), (123456.0, "123,456"), (1234.5, "1,234"), (None, "–"), (0.00012, "0.00012"), (0.0, "0")],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value, shown):
    assert claims.number(value) == shown


def test_a_missing_package_and_another_version_are_named(analysis, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="format_version 1, got 2"):
        save_pictures(analysis | {"format_version": 2}, tmp_path)
    with pytest.raises(ValueError, match="at least one adapter, got none"):
        save_pictures(analysis | {"adapters": []}, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "priors_peft\[analysis\]"'):
        save_pictures(analysis, tmp_path)
