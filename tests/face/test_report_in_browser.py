"""The report in a real browser: its table sorts and filters, by mouse and keyboard, and hostile texts stay texts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import browser
from support.browser import Browser
from support.reports import HOSTILE, hostile, many
from support.toys import from_prior

from bayeslm.report import write_report
from bayeslm.visible import visible

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no Chromium: apt-get install chromium-headless-shell (Debian's package)"
)

COLUMN = "[...document.querySelectorAll('#texts-table tbody tr')].map(row => row.cells[{}].textContent)"
HEADERS = "[...document.querySelectorAll('#texts-table thead th')].map(cell => cell.textContent)"
COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of hostile posteriors, which every column and section of a report has."""
    kinds = ("weighted", "particles", "markov")
    named = {f"{HOSTILE[1]} {kind}": hostile(kind) for kind in kinds}
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(named, path, settings={"prior": HOSTILE[0], "reward": HOSTILE[2], HOSTILE[3]: HOSTILE[4]})


def column(chromium: Browser, title: str) -> list[str]:
    return chromium.run(COLUMN.format(chromium.run(HEADERS).index(title)))


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace("−", "-").rstrip("%")) for cell in cells if cell != "–"]


def header(title: str, headers: list[str]) -> str:
    return f"#texts-table th:nth-of-type({headers.index(title) + 1}) button"


def set_value(chromium: Browser, selector: str, value: str) -> None:
    chromium.run(
        f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change')) }})(document.querySelector('{selector}'))"
    )


def test_hostile_texts_are_shown_and_do_nothing(chromium, page):
    chromium.open(page)
    chromium.run("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
    while not chromium.run("document.getElementById('more').hidden"):
        chromium.click("#more")
    assert chromium.run("window.broken") is None
    assert chromium.problems == []
    assert chromium.requests == [page.as_uri()]
    texts = set(column(chromium, "text"))
    assert texts == {visible(text).removeprefix(" ") for text in HOSTILE}
    assert chromium.run("document.scripts.length") == 2
    harmful = "document.querySelectorAll('img, iframe, base, link, [onerror], [onclick], [style]')"
    assert chromium.run(f"{harmful}.length") == 0


def test_even_an_injected_script_would_not_run(chromium, page, tmp_path):
    """The policy of the page is a second wall: a script put into the file by hand does not run."""
    broken = tmp_path / "broken.html"
    html = page.read_text(encoding="utf-8")
    broken.write_text(
        html.replace("<main>", "<main><script>window.broken = 9</script><img src='https://example.org/x'>")
    )
    chromium.open(broken)
    assert chromium.run("window.broken") is None
    assert len(chromium.problems) >= 2
    assert all("Content Security Policy" in problem for problem in chromium.problems)


def test_clicks_on_headers_sort(chromium, page):
    chromium.open(page)
    assert not {"weight", "log w"} & set(chromium.run(HEADERS))  # those of different engines do not compare
    set_value(chromium, "#engine", "0")
    headers = chromium.run(HEADERS)
    for title in ("reward", "weight", "log w", "log q − log p", "draws"):
        if title != "reward":  # by which the table is sorted at first
            chromium.click(header(title, headers))
        falling = column(chromium, title)
        assert numbers(falling) == sorted(numbers(falling), reverse=True)
        chromium.click(header(title, headers))
        rising = column(chromium, title)
        assert numbers(rising) == sorted(numbers(rising))
        assert numbers(rising) != numbers(falling) or title == "draws"
        assert "–" not in rising[: len(numbers(rising))]  # what is not known is last either way
        (at,) = chromium.run("[...document.querySelectorAll('[aria-sort=ascending]')].map(c => c.textContent)")
        assert at == title


def test_keys_sort(chromium, page):
    chromium.open(page)
    set_value(chromium, "#engine", "0")
    chromium.run(f"document.querySelector('{header('weight', chromium.run(HEADERS))}').focus()")
    chromium.press("Enter", 13)
    found = numbers(column(chromium, "weight"))
    assert found == sorted(found, reverse=True)
    assert chromium.run("document.activeElement.textContent") == "weight"


def test_filters_narrow_the_table(chromium, tmp_path):
    posterior = from_prior(0)
    chromium.open(write_report({"first": posterior, "second": posterior}, tmp_path / "report.html"))
    everything = len(column(chromium, "text"))
    assert chromium.run(COUNT) == f"{everything} texts"
    chromium.click("#find")
    chromium.type("MAYBE")
    assert set(column(chromium, "text")) == {"maybe"}
    assert len(column(chromium, "text")) == 4  # two prompts of two engines
    set_value(chromium, "#engine", "1")
    assert set(column(chromium, "engine")) == {"second"}
    assert chromium.run(COUNT) == f"2 of {everything} texts"
    set_value(chromium, "#prompt", "0")
    assert column(chromium, "prompt") == [posterior.prompts[0]]
    chromium.run("document.getElementById('find').select()")
    chromium.type("no such words")
    assert column(chromium, "text") == []


def test_tokens_are_coloured_by_their_moves(chromium, page):
    chromium.open(page)
    moves = chromium.run(
        "[...document.querySelectorAll('#texts-table .token')].map(t => [t.title, t.className, t.textContent])"
    )
    assert len(moves) > 50
    for title, names, _ in moves:
        move = float(title.replace("−", "-"))
        strength = sum(abs(move) >= bound for bound in (0.1, 0.5, 1.5, 3))
        assert names == (f"token m{'-' * (move < 0)}{strength}" if strength else "token")
    scale = "[...document.querySelectorAll('.scale .token')]"
    colours = chromium.run(f"{scale}.map(token => getComputedStyle(token).backgroundColor)")
    assert len(set(colours)) == 4
    assert not chromium.run("document.getElementById('scale').hidden")


def test_ten_thousand_texts_are_quick(chromium, tmp_path):
    path = write_report({"many": many(10_000)}, tmp_path / "report.html")
    assert path.stat().st_size < 8e6
    chromium.open(path)
    assert chromium.run(COUNT) == "10,000 texts"
    assert len(column(chromium, "text")) == 50
    start = time.perf_counter()
    chromium.click(header("weight", chromium.run(HEADERS)))
    found = numbers(column(chromium, "weight"))
    chromium.click("#find")
    chromium.type("number 7770")
    assert len(column(chromium, "text")) == 1
    assert time.perf_counter() - start < 5.0
    assert found == sorted(found, reverse=True)
    chromium.run("document.getElementById('find').select()")
    chromium.type("sunny")
    chromium.click("#more")
    assert len(column(chromium, "text")) == 100


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_window_and_is_readable_in_both_schemes(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    level = "getComputedStyle(document.body).{}.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
    paper, ink = (chromium.run(level.format(name)) for name in ("backgroundColor", "color"))
    assert (paper < ink) == dark
    assert abs(paper - ink) > 500


def test_it_prints(chromium, page, tmp_path):
    chromium.open(page)
    chromium.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"


def test_long_texts_fold(chromium, tmp_path):
    posterior = from_prior(0)
    long = np.where(posterior.texts["completion"] == "yes", "word " * 200, posterior.texts["completion"])
    posterior.texts["completion"] = long
    chromium.open(write_report({"one": posterior}, tmp_path / "report.html"))
    heights = "[...document.querySelectorAll('.folded, .text')].map(e => e.getBoundingClientRect().height)"
    before = max(chromium.run(heights))
    chromium.click(".fold")
    assert max(chromium.run(heights)) > 2 * before
    assert chromium.run("document.querySelector('.fold').getAttribute('aria-expanded')") == "true"
