"""`bayeslm report`: saved posteriors of a command as one HTML file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.posterior import Posterior

pytest.importorskip("matplotlib")

MODULES = {"my_rewards": "def letters(completions, **kwargs):\n    return [float(t.count('a')) for t in completions]\n"}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_a_report_of_a_command(folder):
    svi = "svi(num_steps=4, num_particles=2, num_samples=10, num_chains=2)"
    mcmc = "mcmc(num_samples=10, num_chains=2, warmup=2, initial_particles=8)"
    engines = f"importance(num_particles=8), {svi}, smc(num_particles=8, num_chains=2, twist=partial), {mcmc}"
    model = ["--prior", "model", "--reward", "my_rewards:letters", "--max-new-tokens", "4"]
    run("infer", "a b", "c", *model, "--engine", engines, "--out", "run")
    assert "written to run/report.html" in run("report", "run")
    html = Path("run/report.html").read_text(encoding="utf-8")
    for section in ("engines", "rewards", "training", "sizes", "particles", "chains", "texts"):
        assert f'<section id="{section}"' in html
    assert "letters" in re.search("<h1>(.*)</h1>", html)[1]
    assert "num_chains" in html  # of run.yaml
    data = json.loads(re.search('<script type="application/json" id="data">(.*)</script>', html)[1])
    assert data["engines"][-1] == "svi"  # policies last
    svi = Posterior.load("run/svi")
    rows = [row for row in data["rows"] if row[0] == 3 and row[1] == 0]
    assert {"".join(row[8]) for row in rows} == set(svi.texts["completion"][..., 0].flat)
    assert sum(row[3] for row in rows) == 20
    assert all(sum(row[9]) == pytest.approx(row[7], abs=0.05) for row in rows)

    assert "written to one.html" in run("report", "run/smc", "-o", "one.html", "--title", "<Only> one")
    assert "<h1>&lt;Only&gt; one</h1>" in Path("one.html").read_text(encoding="utf-8")
    run("show", "run")  # which reports do not disturb
    assert "nowhere" in run("report", "nowhere", code=1)
