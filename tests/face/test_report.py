"""The report says what the posteriors hold, and nothing that a model has written becomes part of its page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.reports import HOSTILE, hostile, many
from support.toys import MAKERS, discrete, enumerated, from_prior

from bayeslm import Posterior, diagnostics, report, report_figures, report_sections, report_texts
from bayeslm.report import render, write_report
from bayeslm.visible import visible

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The elements of a page, the text of it, and the content of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag
        self.scripts += [""] * (tag == "script")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def rows_of(page: Page, engine: int, prompt: int) -> list[list]:
    return [row for row in page.data["rows"] if row[:2] == [engine, prompt]]


def contiguous(posterior: Posterior) -> Posterior:
    """The same with arrays in the order of their axes, as those of engines are, so that sums have the same rounding."""

    def copied(value: object) -> object:
        if isinstance(value, dict):
            return {name: copied(inner) for name, inner in value.items()}
        return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value

    return Posterior(**{name: copied(value) for name, value in vars(posterior).items()})


KINDS = ("weighted", "particles", "markov")  # which have all sections between them


@pytest.fixture(scope="module")
def hostile_html() -> str:
    bad = {f"{HOSTILE[1]} {kind}": hostile(kind) for kind in KINDS}
    settings = {HOSTILE[2]: HOSTILE[1], "prior": HOSTILE[0], "reward": HOSTILE[4]}
    return render(bad, title=HOSTILE[1], settings=settings)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_has_a_report_and_a_saved_one_has_the_same(kind, tmp_path):
    posterior = contiguous(MAKERS[kind]())
    posterior.save(tmp_path / "run")
    own = posterior.report(tmp_path / "own.html", title="A title").read_text(encoding="utf-8")
    page = write_report({posterior.engine: Posterior.load(tmp_path / "run")}, tmp_path / "report.html", title="A title")
    assert page.read_text(encoding="utf-8") == own
    assert all(label in Page(own).text for label in posterior.prompts[:5])


def test_what_a_model_writes_is_text(hostile_html):
    """Elements and attributes are those of a report of harmless texts, and every text is in it, whole."""
    page = Page(hostile_html)
    harmless = {
        kind: hostile(
            kind,
            prompts=["a", "b"],
            texts={site: np.full(texts.shape, "x", dtype=object) for site, texts in hostile(kind).texts.items()},
            token_ends={site: np.minimum(ends, 1) for site, ends in hostile(kind).token_ends.items()},
        )
        for kind in KINDS
    }
    plain = Page(render(harmless, title="t", settings={"a": "b", "prior": "p", "reward": "r"}))
    assert page.elements == plain.elements
    assert page.attributes == plain.attributes
    assert not [name for name in page.attributes if name.startswith("on") or name == "style"]
    assert len(page.scripts) == 2
    texts = {"".join(row[8]) for row in page.data["rows"]}
    assert texts == {visible(text) for text in HOSTILE}
    for text in (*HOSTILE[:9], "\\u202e", "\\x00", "\\ud800"):
        assert text in page.text + "".join(texts)
    assert "49" not in re.findall(r"\b49\b", page.text)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_data_cannot_end_their_element(text):
    content = report_texts.as_json({"x": visible(text)})
    assert not set("<>&") & set(content)
    assert content.isascii()
    assert json.loads(content) == {"x": visible(text)}


def test_the_policy_of_the_page_allows_nothing_else(hostile_html):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', hostile_html)
    policy = html.unescape(policy)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, inner in re.findall(r"<(style|script)>(.*?)</(?:style|script)>", hostile_html, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_texts_are_merged_and_keep_their_draws_and_weights():
    posterior = from_prior(0)
    page = Page(render({"one": posterior, "all": enumerated()}))
    weights = posterior.weights()
    for prompt in range(2):
        rows = rows_of(page, 0, prompt)
        assert sum(row[3] for row in rows) == 1000
        assert sum(row[4] for row in rows) == pytest.approx(1.0, abs=1e-5)
        for row in rows:
            copies = posterior.texts["completion"][..., prompt] == row[8][0]
            assert row[3] == copies.sum()
            assert row[4] == pytest.approx(weights[..., prompt][copies].sum(), abs=1e-5)
            values = [x[..., prompt][copies][0] for x in (posterior.measured, posterior.log_weights)]
            if np.isneginf(values[0]):
                assert row[5:8] == ["-inf", "-inf", None]
            else:
                assert row[5:8] == pytest.approx([*values, 0.0], abs=1e-4)  # drawn from the prior


def test_moves_of_tokens_add_up_to_those_of_the_text():
    """Also of tokens without characters of their own, whose move is the next piece's."""
    posterior = hostile()
    (site,) = posterior.texts
    ratio = posterior.token_log_ratio[site][:, :, 0].sum(-1).ravel()
    rows = rows_of(Page(render({"one": posterior})), 0, 0)
    assert len(rows) == len(ratio)
    for row in rows:
        assert len(row[8]) == len(row[9])
        assert sum(row[9]) == pytest.approx(row[7], abs=0.05)
        assert np.abs(ratio - row[7]).min() < 1e-3


def test_many_texts_are_capped_by_weight_with_a_note(monkeypatch):
    monkeypatch.setattr(report_texts, "MAX_TEXTS", 40)
    posterior = many(100)
    page = Page(render({"one": posterior, "two": posterior}))
    assert len(page.data["rows"]) == 40
    assert page.data["total"] == 200
    assert "40 of 200" in page.text
    largest = np.sort(posterior.log_weights.ravel())[-20:]
    assert sorted(row[6] for row in rows_of(page, 0, 0)) == pytest.approx(largest, abs=1e-4)


def test_the_comparison_has_the_figures_of_the_summary():
    posterior = from_prior(0)
    record = diagnostics.summary(posterior).iloc[0]
    first, *_ = [table for table in report_sections.comparison({"one": posterior})["tables"] if table["prompt"] == 0]
    prior, row = first["rows"]
    assert row["log_z"]["text"] == f"{record.log_evidence:.2f} ± {record.log_evidence_se:.2f}"
    assert row["ess"] == f"{record.ess:.0f}"
    assert prior["name"] == "prior"
    assert row["measured"]["from"] <= row["measured"]["at"] <= row["measured"]["to"]


def test_the_mean_over_prompts_has_the_error_of_independent_prompts():
    posterior = from_prior(0)
    table = report_sections.comparison({"one": posterior})["tables"][0]
    value, error = posterior.log_evidence.mean(), np.sqrt((posterior.log_evidence_stderr**2).sum()) / 2
    assert table["rows"][1]["log_z"]["text"] == f"{value:.2f} ± {error:.2f}"


def test_an_unknown_khat_of_one_prompt_is_said_in_the_mean_over_prompts():
    log_weights = np.random.default_rng(0).normal(size=from_prior(0).log_weights.shape)
    log_weights[..., 0] = 0.0  # all equal
    page = render({"one": replace(from_prior(0), log_weights=log_weights)})
    assert '<abbr title="unknown for 1 of 2 prompts">–</abbr>' in page


def test_what_log_w_is_depends_on_the_kind():
    """Of particles it is no density ratio."""
    ratio = "log p + log-likelihood − log q"
    assert report_texts.table({"one": hostile("weighted")})["weight_help"] == f"log-weight: {ratio}"
    particles = report_texts.table({"smc": hostile("particles")})["weight_help"]
    assert "resampling" in particles
    assert "log q" not in particles
    both = report_texts.table({"svi": hostile("weighted"), "smc": hostile("particles")})["weight_help"]
    assert both == f"log-weight, of svi: {ratio}; of smc: {particles.removeprefix('log-weight: ')}"
    assert "help: data.weight_help" in report._read("report.js")


def test_the_formula_is_that_of_the_measure():
    rewarded = from_prior(0)
    page = Page(render({"one": rewarded})).text
    assert "exp(r(c, x) / β)" in page
    plain = Page(render({"one": replace(rewarded, rewards={}, prior_rewards={})})).text
    assert "π*(x | c) ∝ p(x | c) exp(ℓ(c, x))" in plain
    assert "/ β" not in plain


def test_the_limits_are_those_of_the_diagnostics():
    page = Page(render({"one": from_prior(0)})).text
    assert "Weights are reliable where k̂ < 0.7 and ESS > 20, Markov chains where R̂ < 1.05 and ESS > 400." in page
    assert "should agree" in page
    assert "except baselines" in page


def test_a_smooth_curve_is_the_mean_of_the_last_steps():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(3, 60))
    raw[2, 40:] = np.nan  # a chain that ended
    width = report_figures.window(60)
    smooth = report_figures.smooth(raw)
    for step in range(60):
        assert smooth[step] == pytest.approx(np.nanmean(raw[:, max(0, step + 1 - width) : step + 1]))


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_lineages_are_those_of_the_ancestors(steps):
    rng = np.random.default_rng(steps)
    ancestors = np.sort(rng.integers(40, size=(steps, 40)), axis=1)
    places, alive = report_figures.lineages(ancestors)
    assert len(places) == min(steps, report_figures.MAX_STEPS)
    root, kept = np.arange(40), np.arange(40)
    for step in range(steps - 1, -1, -1):
        root = ancestors[step][root]
    for step in range(len(places) - 1, -1, -1):
        assert set(np.flatnonzero(alive[step])) == set(kept)
        kept = places[step][kept]
    assert (kept == root).all()


def test_pictures_have_no_styles_and_no_text_of_a_model(hostile_html):
    pictures = re.findall(r"<svg viewBox.*?</svg>", hostile_html, flags=re.DOTALL)
    assert len(pictures) >= 9  # two histograms, curves, genealogies, traces
    for picture in pictures:
        assert not re.search(r"style=|<style|xlink|<image|href=\"[^#]", picture)
        assert not re.findall(r"<text[^>]*>([^<]*<(?!/text)|[^<]*(?:window|script))", picture)


def test_rewards_of_minus_infinity_are_said():
    index = np.random.default_rng(0).choice(4, size=(1, 200, 2))
    assert "At −∞" in Page(render({"one": discrete(index, None, "uncorrected")})).text


def test_warnings_are_words(hostile_html):
    page = Page(hostile_html)
    assert "was interrupted" in page.text
    assert "Read with caution" in page.text


def test_nothing_to_report_is_refused():
    with pytest.raises(ValueError, match=r"posteriors must be .* not empty"):
        render({})
    with pytest.raises(ValueError, match="same prompts"):
        render({"one": from_prior(0), "two": replace(from_prior(0), prompts=["x", "y"])})


def test_a_failed_report_leaves_the_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(ValueError, match=r"posteriors must be .* not empty"):
        write_report({}, path)
    assert path.read_text() == "before"
