"""What a long computation shows: a bar in a terminal, lines in a log, one display in a notebook."""

import io
import re
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from bayeslm import progress
from bayeslm.progress import announce, track


@pytest.fixture
def log(monkeypatch, capsys):
    """Standard error is no terminal, and its lines come every 20 ms; returns a function that reads them."""
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    return lambda: capsys.readouterr().err.splitlines()


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)


def test_a_log_has_lines_also_while_one_step_takes_long(log):
    lines = []
    with track("SVI", 200, done=100) as report:
        wait_for(lambda: lines.extend(log()) or len(lines) > 1)  # no step has ended
        assert all(re.fullmatch(r"SVI: 100/200 · 0:0\d", line) for line in lines), lines
        report(10, values={"elbo": -12.345, "kl": 3})
        wait_for(lambda: lines.extend(log()) or "110/200" in lines[-1])
        assert re.fullmatch(r"SVI: 110/200 · 0:0\d · ETA 0:0\d · elbo -12.3  kl 3", lines[-1]), lines[-1]
        report(0, what="SVI, again")
        wait_for(lambda: lines.extend(log()) or "again" in lines[-1])
        assert lines[-1].startswith("SVI, again: 110/200")
    log()
    time.sleep(0.1)
    assert log() == []  # nothing is written after the end


def test_a_log_of_a_short_run_is_empty(capsys):
    with track("SVI", 10, plan="10 steps") as report:
        for _ in range(10):
            report()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [10, None])
def test_nothing_is_shown_that_is_not_wanted(log, total):
    with track("SVI", total, enabled=False) as report:
        report(1, values={"elbo": 1})
        time.sleep(0.1)
    announce("SVI: resumed", enabled=False)
    assert log() == []


def test_the_plan_of_a_run_whose_first_step_takes_long_comes_with_the_first_line(log):
    lines = []
    with track("Exact", 10, plan="10 atoms of one prompt"):
        wait_for(lambda: lines.extend(log()) or len(lines) > 2)
    assert lines[0] == "Exact: 10 atoms of one prompt"
    assert sum("atoms" in line for line in lines) == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set; returns the function that moves it on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.mark.parametrize(
    ("steps", "done", "seconds", "said"),
    [
        (101, 0, 3.0, "SVI: 101 steps; about 5 min in all"),
        (1000, 0, 30.0, "SVI: 101 steps; about 8.3 h in all"),
        (201, 100, 3.0, "SVI: 101 steps; about 5 min in all"),  # steps before a resumption cost nothing now
        (10, 0, 6.0, "SVI: 101 steps; about 60 s in all"),
        (2, 0, 3.0, None),  # short
        (None, 0, 3.0, None),  # without an end
    ],
)
def test_a_long_run_says_once_what_it_does_and_how_long_it_will_take(clock, capsys, steps, done, seconds, said):
    with track("SVI", steps, done=done, plan="101 steps") as report:
        for _ in range(2):
            clock(seconds)
            report()
    assert capsys.readouterr().err == ("" if said is None else said + "\n")


@pytest.mark.parametrize(
    ("load", "setting", "said"),
    [(6.0, None, True), (2.0, None, False), (6.0, "OMP_NUM_THREADS", False), (6.0, "OMP_WAIT_POLICY", False)],
)
def test_a_long_run_on_busy_cores_says_what_to_try(clock, capsys, monkeypatch, load, setting, said):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "1")
    monkeypatch.setattr(progress.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(progress.os, "cpu_count", lambda: 2)
    with track("SVI", 101, plan="101 steps") as report:
        clock(3.0)
        report()
    assert ("(load 6.0 on 2 cores: with OMP_WAIT_POLICY=passive" in capsys.readouterr().err) == said


def test_how_long_is_not_said_of_a_first_step_too_short_to_measure(clock, capsys):
    with track("SVI", 1000, plan="1000 steps") as report:
        clock(0.5)  # the first step of a network is slow
        report()
        assert capsys.readouterr().err == ""
        for _ in range(9):
            clock(0.1)
            report()
    assert capsys.readouterr().err == "SVI: 1000 steps; about 3 min in all\n"  # the first 6 took 1 s


def test_the_time_left_is_that_of_the_steps_left(clock):
    state = progress._Progress("SVI", 100, 50, "")
    assert state.left is None
    clock(20.0)
    state.advance(10, None, None)
    assert state.left == pytest.approx(80.0)
    clock(5.0)
    assert state.left == pytest.approx(75.0)  # the clock goes on between steps
    clock(500.0)
    assert state.left == 0.0
    assert progress._clock(3723.4) == "1:02:03"
    assert progress._clock(59.6) == "1:00"


def test_the_time_left_follows_the_speed_of_the_last_steps(clock):
    """A hundred steps of 1 s, then steps of 3 s, as where other work has begun."""
    state = progress._Progress("SVI", 200, 0, "")
    for seconds in [1.0] * 100 + [3.0] * progress.RECENT:
        clock(seconds)
        state.advance(1, None, None)
    assert state.left == pytest.approx(3.0 * (100 - progress.RECENT))


@pytest.mark.parametrize("written", [1, 10, 60])
def test_the_time_left_is_known_in_the_first_of_a_few_large_parts(clock, capsys, written):
    """Of 100 draws of 4 tokens, 60 at once: after some tokens, and without a jump when the 60 are done."""
    with track("importance sampling", 100, plan="100 draws", tokens=4) as report:
        for _ in range(written):
            clock(2.0)
            progress.wrote(4)  # a draw
        assert capsys.readouterr().err == "importance sampling: 100 draws; about 3 min in all\n"
        with track("inner", 10):
            progress.wrote(1000)  # of a computation of another kind
        for _ in range(60 - written):
            clock(2.0)
            progress.wrote(4)
        report(60)
        clock(80.0)
        report(40)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("label", ["SVI", "SVI, chain 1 of 4", "SVI, draws of the policy after step 12345"])
def test_a_terminal_of_80_columns_shows_step_time_left_and_elbo(monkeypatch, clock, label):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", screen)
    made = Console(file=screen, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "Console", lambda **settings: made)
    monkeypatch.setattr(progress, "REFRESH", 0.02)
    figures = {"elbo": -123.456, "reward": -0.123, "kl": 12.34, "gradient": 1.25e-5, "samples/s": 123}
    with track(label, 10_000, plan="10000 steps") as report:
        clock(7000.0)
        report(9000, values=figures)
        wait_for(lambda: screen.getvalue().count("9000/10000") > 1)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", screen.getvalue()).splitlines()
    shown = next(line for line in lines if "9000/10000" in line)
    assert len(shown.rstrip()) <= 80
    if label != "SVI, draws of the policy after step 12345":  # of which the ELBO is not known
        assert "9000/10000 · 1:56:40 · ETA 12:58 · elbo -123" in shown
    assert any(line.startswith(f"{label}: 10000 steps; about 2.2 h in all") for line in lines)


def test_a_notebook_has_one_display_and_no_warning(monkeypatch):
    """The one that IPython updates, without ipywidgets."""
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr(progress, "REFRESH", 0.02)
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data)

    def show(data, raw, display_id):
        shown.append(data)
        return Handle()

    monkeypatch.setattr(display, "display", show)
    monkeypatch.setattr(progress, "Console", lambda **settings: Console(force_jupyter=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with track("<b>", 10) as report:
            time.sleep(progress.REFRESH)
            report(4, values={"elbo": -1.5})
    assert shown[0]["text/plain"] == "<b>: 0/10 · 0:00"
    assert re.fullmatch(r"<b>: 4/10 · 0:00 · ETA 0:0\d · elbo -1.5", shown[-2]["text/plain"])
    assert shown[-2]["text/html"].startswith('<progress value="4" max="10"></progress> &lt;b&gt;: 4/10')
    assert shown[-1] == {"text/plain": ""}  # it is gone at the end


def test_a_closed_standard_error_stops_no_run(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(progress.sys, "stderr", stream)
        announce("SVI: resumed from step 3")
        with track("SVI", 10) as report:
            time.sleep(0.05)
            report()


NOTEBOOK = [
    """
import sys, time
sys.path.insert(0, {tests!r})
from bayeslm.inference import SVI
from bayeslm.models.rewards.rehearsal import is_rehearsal
from support.models import table_lm
import pyro

lm = table_lm(order=2, seed=0, vocab=4)

def model(prompts):
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
        time.sleep(0.02)
        pyro.factor("reward", 1.0 * (x == 2).sum(-1))
""",
    "import warnings; warnings.simplefilter('ignore')\np = SVI(num_steps=20, num_samples=16, seed=0).run(model, [[1]])",
    "from bayeslm.plots import plot_training\nplot_training(p)",
    "figure = plot_training(p)\nfigure",
]


@pytest.mark.long  # half a minute for a kernel to start
def test_a_real_notebook_without_ipywidgets(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own is inline
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    tests = str(Path(__file__).parents[1])
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(code.replace("{tests!r}", repr(tests))) for code in NOTEBOOK]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    setup, run, *figures = [cell.outputs for cell in notebook.cells]
    assert setup == []  # no warning of tqdm's, which Pyro imports
    assert [output.output_type for output in run] == ["display_data"] * 3  # the steps, draws of policy and prior
    for cell in figures:
        assert ["image/png" in output.data for output in cell] == [True]  # once
