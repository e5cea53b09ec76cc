"""Languages of nearest words: planted ones are told beyond random prompts, which show none at the stated level."""

import copy
import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from planted_analysis import planted
from test_collect import run, save
from test_words import byte_level

from priors_peft import PriorConfig, get_prior_model
from priors_peft.analysis import analyze, claims, language_probabilities, language_signal, word_reader
from priors_peft.analysis.languages import LEAST_WORDS, NO_LANGUAGE
from priors_peft.analysis.report import save_report
from priors_peft.commands.analyze import summary


WORDS = {
    "fr": "maison avec pour dans être toujours fenêtre jamais beaucoup fille voiture cœur depuis parce nous leurs",
    "de": "Haus nicht aber immer Fenster zwischen Wasser niemals vielleicht Mädchen Straße können durch schön über weil",
    "en": "house with because always window never perhaps water street between through their which people should about",
    "es": "casa siempre ventana nunca quizás agua calle entre porque nosotros mucho corazón desde ellos también hacia",
    "pl": "dom zawsze okno nigdy może woda ulica między ponieważ dużo serce ich również jeszcze dlaczego gdzie",
    "fi": "talo aina ikkuna koskaan ehkä vesi katu välillä koska paljon sydän heidän myös vielä miksi missä",
    "tr": "ev her zaman pencere asla belki su sokak arasında çünkü çok kalp onların ayrıca neden nerede",
}
WORDS = {code: words.split() for code, words in WORDS.items()}
ALL = sorted({word for words in WORDS.values() for word in words})


def chosen(count, seed):
    order = torch.randperm(len(ALL), generator=torch.Generator().manual_seed(seed))
    return [ALL[index] for index in order[:count]]


DRAWS = [chosen(8, seed) for seed in range(99)]
TEXTS = [*(f" {word}" for word in ALL), " 42", " =", "ing", " x1", " 你好", "学习"]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["fr", "de"])
def test_a_prompt_of_one_languages_words_is_told_as_it_beyond_random_prompts(code, tmp_path):
    tokenizer, adapter = byte_level([text.encode() for text in TEXTS]), tmp_path / code
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    tuned = get_prior_model(model, PriorConfig(num_virtual_tokens=12, prior="gaussian"), tokenizer=tokenizer)
    ids = [ALL.index(word) for word in WORDS[code][:12]]
    tuned.prompt_encoder["default"].set_prompt(model.get_input_embeddings().weight[ids].detach()[None])
    tuned.save_pretrained(adapter)

    def analysed(**settings):
        return analyze(
            [str(adapter)], tuned.get_base_model(), tokenizer, progress=False, **{"num_draws": 99} | settings
        )

    analysis = analysed()
    found = analysis["adapters"][0]["tokens"]["languages"]
    assert found["likeliest"][0]["code"] == code and found["num_words"] == 12
    assert found["signal"] and found["p_value"] <= 0.05 and found["same_share"] < 0.5
    assert f"12 nearest words together are told as {code} " in summary(analysis)
    assert found == analysed()["adapters"][0]["tokens"]["languages"]
    assert found["p_value"] != analysed(num_draws=60)["adapters"][0]["tokens"]["languages"]["p_value"]
    assert found["initial_likeliest"] and not found["inherited"]


@pytest.mark.slow
def test_random_words_show_a_language_at_the_stated_level():
    found = [language_signal(chosen(8, seed), DRAWS) for seed in range(1000, 1120)]
    assert sum(one.signal for one in found) / 120 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 120)
    assert sum(one.p_value <= 0.5 for one in found) / 120 == pytest.approx(0.5, abs=0.12)
    # The share alone would be no test.
    assert sum(one.same_share <= 0.05 for one in found) / 120 > 0.1


def test_a_language_that_random_prompts_are_told_as_too_is_no_finding_and_another_as_sure_is():
    french = [WORDS["fr"][place : place + 8] for place in range(8)] * 5
    same, other = (language_signal(WORDS[code][:8], french) for code in ("fr", "de"))
    assert same.likeliest[0]["code"] == "fr" and same.same_share == 1 and not same.signal
    assert other.likeliest[0]["code"] == "de" and other.same_share == 0 and other.p_value == 1 / 41 and other.signal
    assert other.likeliest[0]["probability"] < same.likeliest[0]["probability"]


def test_a_language_of_the_start_is_inherited():
    found = language_signal(WORDS["fr"][:8], DRAWS, WORDS["fr"][:8])
    assert found.p_value <= 0.05 and found.inherited and not found.signal
    assert not language_signal(WORDS["fr"][:8], DRAWS, WORDS["de"][:8]).inherited
    assert language_signal(WORDS["fr"][:8], DRAWS, WORDS["de"][:8], centre=WORDS["fr"][:8]).inherited


def test_what_is_in_no_language_is_no_finding():
    found = language_signal(["abcdefg", "xyz", "qwerty", "zxcvb", "hjkl", "bnm"], DRAWS)
    assert found.likeliest[0]["code"] == NO_LANGUAGE and found.likeliest[0]["probability"] > 0.9
    assert found.p_value == 1 and not found.signal


def test_a_repeated_word_counts_once():
    words = WORDS["fr"][:LEAST_WORDS]
    assert language_probabilities(words * 4) == language_probabilities(words)
    assert language_probabilities(words[:-1] * 4) is None


def test_words_are_letters_after_a_space_where_their_script_has_spaces():
    read = word_reader(byte_level([text.encode() for text in TEXTS]))
    assert [read(index) for index in range(len(ALL))] == ALL
    assert [read(len(ALL) + index) for index in range(6)] == [None, None, None, None, "你好", "学习"]
    plain = make_tokenizer()
    what = plain.convert_tokens_to_ids("what")
    assert word_reader(plain)(what) == "what"
    assert word_reader(plain)(plain.eos_token_id) is None and word_reader(plain)(10**6) is None


def test_without_enough_words_there_is_a_reason_and_no_language(tmp_path):
    (adapter,) = run([save(tmp_path / "few")])["adapters"]
    found = adapter["tokens"]["languages"]
    assert found["likeliest"] is found["p_value"] is found["same_share"] is None and not found["signal"]
    assert found["reason"].startswith(f"of the {LEAST_WORDS} distinct words that are needed the nearest tokens have ")
    assert "can't be told" in claims.languages(adapter) and claims.language_found(adapter) is None


def test_a_language_is_in_the_report_and_stays_text(tmp_path):
    analysis = copy.deepcopy(planted())
    found = language_signal(WORDS["fr"][:8], DRAWS).to_dict()
    found["likeliest"][0]["code"] = "<script>fr</script>"
    analysis["adapters"][0]["tokens"]["languages"] = found
    page = save_report(analysis, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "8 nearest words together are told as &lt;script&gt;fr&lt;/script&gt; 100 %" in page
    assert "<script>fr" not in page
