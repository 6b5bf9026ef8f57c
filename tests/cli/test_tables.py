"""The tables of many prompts: a row over all of them, and no more on the screen than a person reads."""

import csv
import io
import re
import warnings

import numpy as np
import pyro
import pytest
from support.models import WORDS, table_lm
from support.toys import from_prior
from typer.testing import CliRunner

from bayeslm import DiagnosticsWarning, diagnostics, model_card, plots, reliability, report, summaries
from bayeslm.cli import app, comparison, resume, tables
from bayeslm.cli.console import PlainConsole
from bayeslm.inference import MCMC, SMC, BestOfN, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import TiltedLM
from bayeslm.models.rewards import Reward

LM = table_lm(order=2, seed=2, vocab=4)
NUMBER = 23
PROMPTS = [" ".join(WORDS[1 + int(digit)] for digit in np.base_repr(27 + i, 3)) for i in range(NUMBER)]
SETTINGS = {"seed": 0, "progress": False}


def model(prompts):
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        pyro.factor("reward", 1.0 * (x == 2).sum(-1))


def shared(prompts):
    topic = pyro.sample("topic", pyro.distributions.Bernoulli(0.5))
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=3))
        pyro.factor("reward", topic * (x == 2).sum(-1))


def printed(posteriors, **settings):
    text = io.StringIO()
    tables.show(posteriors, PlainConsole(file=text, width=100), **settings)
    return text.getvalue()


@pytest.fixture(scope="module")
def posteriors():
    return {
        "importance": ImportanceSampling(num_particles=50, **SETTINGS).run(model, PROMPTS),
        "smc": SMC(num_particles=20, twist="partial", **SETTINGS).run(model, PROMPTS),
        "mcmc": MCMC(num_samples=8, warmup=2, num_chains=2, **SETTINGS).run(model, PROMPTS),
    }


def cells(table, row):
    return [str(list(column.cells)[row]) for column in table.columns]


def test_the_last_table_is_of_all_prompts(posteriors):
    *each, last = tables.comparisons(posteriors)
    assert len(each) == NUMBER
    assert str(last.title).startswith(f"all {NUMBER} prompts: means, the smallest ESS")
    for row, (name, posterior) in enumerate(posteriors.items(), start=1):  # below the prior
        found = diagnostics.summary(posterior)
        engine, reward, kl, _, log_z, ess, khat, *_ = cells(last, row)
        mean, error = found["log_likelihood"].mean(), np.sqrt((found["log_likelihood_se"] ** 2).sum()) / NUMBER
        assert (engine.removesuffix(" !"), reward) == (name, f"{mean:.2f}±{error:.2f}".replace("±0.", "±."))
        for cell, column in ((kl, "kl_to_prior"), (log_z, "log_evidence")):  # of MCMC unknown
            assert cell == "–" if name == "mcmc" else cell.startswith(f"{found[column].mean():.2f}±")
        least = found["ess_min" if name == "smc" else "ess"].min()
        assert ess.partition(" ")[0] == f"{least:.0f}"
        assert engine.endswith(" !") == any(reliability.problems(posterior))
        known = "khat" in found and found["khat"].notna().all()
        assert khat == (f"{found['khat'].max():.2f}" if known else "–")
    prior = np.mean([float(cells(table, 0)[1]) for table in each])
    assert float(cells(last, 0)[1]) == pytest.approx(prior, abs=0.01)


def test_the_mean_over_prompts_and_its_error_are_right():
    """Of replicates of all prompts: the truth by enumeration is within the error that the row shows."""
    exact = diagnostics.summary(Exact(progress=False).run(model, PROMPTS))["log_evidence"].mean()
    scores = []
    for seed in range(12):
        posterior = ImportanceSampling(num_particles=200, seed=seed, progress=False).run(model, PROMPTS)
        row = summaries.over_prompts(diagnostics.summary(posterior).to_dict("records"), joint=False)
        scores.append((row["log_evidence"] - exact) / row["log_evidence_se"])
    assert np.abs(scores).max() < 4
    assert 0.5 < np.std(scores) < 1.8


@pytest.mark.parametrize("name", ["khat", "rhat_reward"])
@pytest.mark.parametrize("unknown", [0, 1, 3])
def test_one_unknown_value_makes_the_largest_unknown(name, unknown):
    values = [np.nan] * unknown + [0.3, 0.9, 0.1][unknown:]
    row = summaries.over_prompts([{name: value} for value in values], joint=False)
    assert row[name] == pytest.approx(np.nan if unknown else 0.9, nan_ok=True)
    assert row.get("khat_reason") == (f"unknown for {unknown} of 3 prompts" if unknown and name == "khat" else None)


def test_errors_of_one_joint_posterior_are_not_averaged_away():
    found = ImportanceSampling(num_particles=100, **SETTINGS).run(shared, PROMPTS)
    rows = diagnostics.summary(found)
    row = summaries.over_prompts(rows.to_dict("records"), joint=True)
    assert row["log_evidence_se"] == pytest.approx(rows["log_evidence_se"].iloc[0])
    assert row["log_evidence"] == pytest.approx(found.log_evidence[0])


def test_one_prompt_needs_no_row_of_all():
    found = ImportanceSampling(num_particles=20, **SETTINGS).run(model, PROMPTS[:1])
    assert len(list(tables.comparisons({"importance": found}))) == 1
    assert "all 1 prompts" not in printed({"importance": found})


@pytest.mark.parametrize(("most", "shown"), [(5, 5), (20, 20), (23, 23), (100, 23), (None, 23)])
def test_as_many_prompts_are_printed_as_are_wanted(posteriors, most, shown):
    text = printed(posteriors, most=most, whole="all are in a file")
    titles = [line.rstrip() for line in text.splitlines() if line.rstrip() in PROMPTS]  # those of texts are indented
    assert titles == PROMPTS[:shown]
    assert f"all {NUMBER} prompts" in text
    assert (f"… and {NUMBER - shown} prompts more: all are in a file" in text) == (shown < NUMBER)
    warned = summaries.remarks(posteriors)
    assert text.count("\n! ") <= (len(warned) if most is None else most + 1)


def test_the_whole_is_in_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "_save_plots", lambda posteriors, out: [])  # which take seconds
    engines = {"exact": Exact(progress=False), "importance": ImportanceSampling(num_particles=20, **SETTINGS)}
    with resume.Results(tmp_path / "out") as results:
        results.begin({"test": 1}, dict.fromkeys([*engines, "svi"]), {})  # which is still running
        waiting = CliRunner().invoke(app, ["show", str(tmp_path / "out")])
        assert "out holds no result yet of exact, importance, svi" in " ".join(waiting.output.split())
        comparison.compare(lambda name: model, PROMPTS, {}, engines, results)
    screen = capsys.readouterr().out
    assert f"… and {NUMBER - tables.MOST} prompts more: all are in" in " ".join(screen.split())
    whole = (tmp_path / "out" / "tables.txt").read_text(encoding="utf-8")
    assert [line.rstrip() for line in whole.splitlines() if line.rstrip() in PROMPTS] == PROMPTS
    assert not any(line.endswith(" ") for line in whole.splitlines())
    with open(tmp_path / "out" / "summary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["posterior"], row["prompt"]) for row in rows] == [(name, x) for name in engines for x in PROMPTS]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out"), "--max-prompts", "2"]).output
    assert "svi: no result yet." in shown
    assert f"… and {NUMBER - 2} prompts more: all are in" in " ".join(shown.split())


# ---- what is wrong, and what to do ----

SYSTEM = "system: always be brief."
CHATS = [f"{SYSTEM} user: Is it good?", f"{SYSTEM} user: Is it bad?"]
TURNS = ["Is it good?", "Is it bad?"]


def rare(completions, **columns):
    return [float(text.strip().startswith("b b b")) for text in completions]


def warned(posterior):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reliability.warn(posterior)
    (said,) = [str(x.message) for x in caught if x.category is DiagnosticsWarning]
    return said


PLACES = {
    "tables": lambda found: printed({"importance": found}),
    "remarks": lambda found: "\n".join(summaries.remarks({"importance": found})),
    "warning": warned,
    "repr": repr,
    "html": lambda found: found._repr_html_(),
    "summary": lambda found: str(diagnostics.summary(found)),
    "model card": lambda found: model_card.training_notes(found).text,
    "ArviZ": lambda found: str(found.to_arviz().posterior.coords["prompt"].values),
    "picture": lambda found: " ".join(axis.get_title() for axis in plots.plot_rewards({"x": found}).axes),
    "report": lambda found: re.sub("<details><summary.*?</details>", "", report.render({"importance": found})),
}


@pytest.mark.parametrize("place", PLACES)
def test_prompts_of_chats_are_named_by_the_users_last_turn(place):
    log_weights = 8.0 * np.random.default_rng(0).normal(size=(4, 250, 2))  # of low ESS: of each prompt a warning
    text = PLACES[place](from_prior(0, prompts=CHATS, prompt_names=TURNS, log_weights=log_weights))
    assert all(turn in text for turn in TURNS)
    assert SYSTEM not in text


ENGINES = {
    "importance": ImportanceSampling(num_particles=12, **SETTINGS),
    "bestofn": BestOfN(4, 6, **SETTINGS),
    "rejection": RejectionSampling(num_samples=900, max_proposals=600, **SETTINGS),
    "smc": SMC(num_particles=6, num_chains=2, **SETTINGS),
    "mcmc": MCMC(num_samples=8, warmup=2, num_chains=2, **SETTINGS),
}


@pytest.mark.parametrize(
    ("name", "beta"), [("rejection", 1.0), *((x, beta) for x in ENGINES if x != "rejection" for beta in (1.0, 0.05))]
)
def test_each_problem_is_said_once_and_what_to_do_in_the_words_of_the_command_line(name, beta):
    reward = Reward(rare, upper_bound=1.0) if name == "rejection" else rare
    found = ENGINES[name].run(TiltedLM(LM, reward, beta=beta, max_new_tokens=4), PROMPTS[:2])
    lines = printed({name: found}).splitlines()
    wrong, steps = ([line for line in lines if line.startswith(mark)] for mark in ("! ", "> "))
    assert wrong
    assert len(steps) == 1
    assert steps[0].startswith(f"> {name}: ")
    assert "--engine" in steps[0]
    assert "run(" not in steps[0]  # nobody writes Python there
    for line in wrong:
        assert not re.search("use more|raise |look at|or a proposal", line)
    said = " ".join(wrong + [line for line in lines if line.startswith("No k̂")])
    for fact in ("k̂", "ESS", "R̂", "of the weight", "draws a prompt", "nothing rare"):
        assert said.count(fact) <= len(found.prompts), (fact, said)
