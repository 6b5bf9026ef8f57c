"""The tables of many prompts: a row over all of them, and no more on the screen than a person reads."""

import csv
import io

import numpy as np
import pyro
import pytest
from support.models import WORDS, table_lm
from typer.testing import CliRunner

from bayeslm import diagnostics, summaries
from bayeslm.cli import app, comparison, resume, tables
from bayeslm.cli.console import PlainConsole
from bayeslm.inference import MCMC, SMC, Exact, ImportanceSampling

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
    assert str(last.title) == f"all {NUMBER} prompts"
    for row, (name, posterior) in enumerate(posteriors.items(), start=1):  # below the prior
        found = diagnostics.summary(posterior)
        engine, reward, kl, _, log_z, ess, khat, *_ = cells(last, row)
        mean, error = found["log_likelihood"].mean(), np.sqrt((found["log_likelihood_se"] ** 2).sum()) / NUMBER
        assert (engine, reward) == (name, f"{mean:.2f}±{error:.2f}".replace("±0.", "±."))
        for cell, column in ((kl, "kl_to_prior"), (log_z, "log_evidence")):  # of MCMC unknown
            assert cell == "–" if name == "mcmc" else cell.startswith(f"{found[column].mean():.2f}±")
        least = found["ess_min" if name == "smc" else "ess"].min()
        assert ess.partition(" ")[0] == f"{least:.0f}"
        if "khat" in found and found["khat"].notna().any():
            assert khat == f"{found['khat'].max():.2f}"
    prior = np.mean([float(cells(table, 0)[1]) for table in each])
    assert float(cells(last, 0)[1]) == pytest.approx(prior, abs=0.01)


def test_the_mean_over_prompts_and_its_error_are_right():
    """Of replicates of all prompts: the truth by enumeration is within the error that the row shows."""
    exact = diagnostics.summary(Exact(progress=False).run(model, PROMPTS))["log_evidence"].mean()
    scores = []
    for seed in range(12):
        posterior = ImportanceSampling(num_particles=200, seed=seed, progress=False).run(model, PROMPTS)
        row = summaries._over_prompts(diagnostics.summary(posterior).to_dict("records"), joint=False)
        scores.append((row["log_evidence"] - exact) / row["log_evidence_se"])
    assert np.abs(scores).max() < 4
    assert 0.5 < np.std(scores) < 1.8


def test_errors_of_one_joint_posterior_are_not_averaged_away():
    found = ImportanceSampling(num_particles=100, **SETTINGS).run(shared, PROMPTS)
    rows = diagnostics.summary(found)
    row = summaries._over_prompts(rows.to_dict("records"), joint=True)
    assert row["log_evidence_se"] == pytest.approx(rows["log_evidence_se"].iloc[0])
    assert row["log_evidence"] == pytest.approx(found.log_evidence[0])


def test_one_prompt_needs_no_row_of_all():
    found = ImportanceSampling(num_particles=20, **SETTINGS).run(model, PROMPTS[:1])
    assert len(list(tables.comparisons({"importance": found}))) == 1
    assert "all 1 prompts" not in printed({"importance": found})


@pytest.mark.parametrize(("most", "shown"), [(5, 5), (20, 20), (23, 23), (100, 23), (None, 23)])
def test_as_many_prompts_are_printed_as_are_wanted(posteriors, most, shown):
    text = printed(posteriors, most=most, whole="all are in a file")
    titles = [line.strip() for line in text.splitlines() if line.strip() in PROMPTS]
    assert titles == PROMPTS[:shown]
    assert f"all {NUMBER} prompts" in text
    assert (f"… and {NUMBER - shown} prompts more: all are in a file" in text) == (shown < NUMBER)
    warned = summaries.remarks(posteriors)
    assert text.count("\n! ") <= (len(warned) if most is None else most + 1)


def test_the_whole_is_in_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "_save_plots", lambda posteriors, out: [])  # which take seconds
    engines = {"exact": Exact(progress=False), "importance": ImportanceSampling(num_particles=20, **SETTINGS)}
    with resume.Results(tmp_path / "out") as results:
        results.begin({"test": 1}, dict.fromkeys(engines), {})
        comparison.compare(lambda name: model, PROMPTS, {}, engines, results)
    screen = capsys.readouterr().out
    assert f"… and {NUMBER - tables.MOST} prompts more: all are in" in " ".join(screen.split())
    whole = (tmp_path / "out" / "tables.txt").read_text(encoding="utf-8")
    assert [line.strip() for line in whole.splitlines() if line.strip() in PROMPTS] == PROMPTS
    with open(tmp_path / "out" / "summary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["posterior"], row["prompt"]) for row in rows] == [(name, x) for name in engines for x in PROMPTS]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out"), "--max-prompts", "2"]).output
    assert f"… and {NUMBER - 2} prompts more: all are in" in " ".join(shown.split())
