"""`rewards.factor` records r: every engine returns it, of whatever program, and stock Pyro runs the program too."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import SVI as PyroSVI
from pyro.infer import Predictive, Trace_ELBO
from support.engines import ENGINES
from support.models import table_lm
from support.programs import SHORT, score_table

from bayeslm import Posterior, diagnostics
from bayeslm.checksums import write_checksums
from bayeslm.inference import MCMC, Exact, ImportanceSampling, ProgramError
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.control import Control
from bayeslm.models.control.trajectory import returns

LM = table_lm(order=2, seed=3, vocab=4)
TABLE = score_table(5, vocab=4, tokens=2, scale=1.0)
POSITIONS = torch.arange(2)


def score(x: Any) -> torch.Tensor:
    return TABLE[POSITIONS, torch.as_tensor(x)].sum(-1)


def plain(prompts: list[Any]) -> None:
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        rewards.factor("reward", score(x), 0.5)


def minibatches(prompts: list[Any]) -> None:
    with pyro.plate("prompts", len(prompts), subsample_size=1) as batch:
        x = pyro.sample("completion", LM([prompts[i] for i in batch], max_new_tokens=2))
        rewards.factor("reward", score(x), 0.5)


def by_token(prompts: list[Any]) -> None:
    """A term of each token, in a plate of its own: r is their sum."""
    with pyro.plate("prompts", len(prompts), dim=-1):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        with pyro.plate("tokens", 2, dim=-2):
            terms = TABLE[POSITIONS, x].movedim(-1, -2)  # (particle, 1, token, prompt), or (token, prompt)
            rewards.factor("reward", terms.squeeze(-3) if terms.dim() > 2 else terms, 0.5)


def shared_beta(prompts: list[Any]) -> None:
    """beta is a latent that prompts share."""
    beta = pyro.sample("beta", dist.Categorical(torch.tensor([0.5, 0.5]))) * 0.5 + 0.5
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        rewards.factor("reward", score(x), beta)


def names_of_a_user(prompts: list[Any]) -> None:
    """Under a handler that renames sites, and as the list of numbers of a tensor."""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
        with scope(prefix="judge"):
            rewards.factor("reward", score(x).double(), 0.5)


PROGRAMS = {f.__name__: f for f in (plain, minibatches, by_token, shared_beta, names_of_a_user)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_record_their_reward(name: str) -> None:
    """r is the reward of the draw's own text, r / beta its log-likelihood, and log Z that of a plain factor."""
    posterior = ImportanceSampling(50, seed=0, progress=False).run(PROGRAMS[name], SHORT)
    key = "judge/reward" if name == "names_of_a_user" else "reward"
    assert list(posterior.rewards) == list(posterior.prior_rewards) == [key]
    assert set(posterior.samples) == {"completion", *(["beta"] if name == "shared_beta" else [])}
    expected = score(posterior.samples["completion"])
    np.testing.assert_allclose(posterior.rewards[key], expected, rtol=1e-5)
    np.testing.assert_allclose(posterior.prior_rewards[key], expected, rtol=1e-5)
    beta = posterior.samples["beta"][..., None] * 0.5 + 0.5 if name == "shared_beta" else 0.5
    total = (expected / beta).sum(-1, keepdim=True) if name == "shared_beta" else expected / beta
    np.testing.assert_allclose(posterior.log_likelihood[key], total, rtol=1e-4)
    picked = posterior.resample(seed=1)
    np.testing.assert_allclose(picked.rewards[key], score(picked.samples["completion"]), rtol=1e-5)
    assert posterior.measure == "reward"
    assert {"reward", "reward_prior"} <= set(diagnostics.summary(posterior))


@pytest.mark.parametrize("name", [name for name, claims in ENGINES.items() if claims.texts])
def test_engines_return_the_reward(name: str) -> None:
    bound = float(TABLE.amax(-1).sum()) / 0.5
    posterior = ENGINES[name].make(0, bound, 1).run(plain, SHORT)
    np.testing.assert_allclose(posterior.rewards["reward"], score(posterior.samples["completion"]), rtol=1e-5)
    assert not any(key.startswith("reward") for key in posterior.samples)
    if "elbo" in posterior.stats and ENGINES[name].trains:
        likelihood = np.asarray(posterior.stats["log_likelihood"])
        np.testing.assert_allclose(posterior.stats["reward"], 0.5 * likelihood, rtol=1e-4, atol=1e-5)


def test_a_plain_factor_is_a_log_likelihood() -> None:
    """Tables, warnings, and tables of the command line do not call r / beta a reward."""

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
            pyro.factor("reward", score(x) / 0.5)

    known, unknown = (ImportanceSampling(50, seed=0, progress=False).run(f, SHORT) for f in (plain, model))
    assert unknown.rewards == unknown.prior_rewards == {}
    table = diagnostics.summary(unknown)
    assert not [column for column in table if "reward" in column]
    np.testing.assert_allclose(table["log_likelihood"], 2 * diagnostics.summary(known)["reward"], rtol=1e-5)
    assert unknown.best(k=1)[0][0] == known.best(k=1)[0][0]
    np.testing.assert_array_equal(known.log_weights, unknown.log_weights)
    assert "reward" not in repr(unknown)


def test_several_rewards_and_ready_programs() -> None:
    def both(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
            rewards.factor("table", score(x), 0.5)
            rewards.factor("length", (x > 0).sum(-1), 2.0)  # whole numbers

    posterior = Exact().run(both, SHORT)
    assert posterior.measure == "log-likelihood"
    x = posterior.samples["completion"]
    np.testing.assert_array_equal(posterior.rewards["length"], (x > 0).sum(-1))
    np.testing.assert_allclose(posterior.log_likelihood["length"], (x > 0).sum(-1) / 2.0)
    tilted = ImportanceSampling(20, seed=0, progress=False).run(
        TiltedLM(LM, rewards.Length(), 0.5, max_new_tokens=2), ["a", "b"]
    )
    np.testing.assert_array_equal(tilted.rewards["reward"], 0.5 * tilted.log_likelihood["reward"])


def test_a_return_is_the_sum_of_its_steps() -> None:
    from support.processes import random_mdp

    from bayeslm.models.control import TabularEnvironment

    posterior = ImportanceSampling(20, seed=0, progress=False).run(Control(TabularEnvironment(random_mdp()), 0.5, 3))
    expected = returns(torch.from_numpy(posterior.samples["trajectory"]))
    np.testing.assert_allclose(posterior.rewards["reward"], expected, rtol=1e-5)


def test_moves_average_the_reward_over_their_candidates() -> None:
    posterior = MCMC(20, 4, warmup=2, num_candidates=4, seed=0, progress=False).run(plain, SHORT)
    recycled = posterior.stats["recycled_reward"]
    np.testing.assert_allclose(recycled / 0.5, posterior.stats["recycled_log_likelihood_reward"], rtol=1e-4, atol=1e-5)


# ---- stock Pyro ----


def test_pyro_runs_the_program() -> None:
    trace = poutine.trace(plain).get_trace(SHORT)
    x = trace.nodes["completion"]["value"]
    torch.testing.assert_close(trace.nodes["reward/r"]["value"], score(x))
    expected = LM(SHORT, max_new_tokens=2).log_prob(x) + score(x) / 0.5
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum())
    draws = Predictive(plain, num_samples=7)(SHORT)
    torch.testing.assert_close(draws["reward/r"], score(draws["completion"]))

    def guide(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", LM(prompts, max_new_tokens=2))

    pyro.clear_param_store()
    loss = PyroSVI(plain, guide, pyro.optim.Adam({}), Trace_ELBO(4, vectorize_particles=True)).evaluate_loss(SHORT)
    assert np.isfinite(loss)


# ---- refusals ----


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0]), [1.0, 0.0]])
def test_beta_is_positive(beta: Any) -> None:
    with pytest.raises(ValueError, match=r"rewards\.factor\('reward', \.\.\.\): beta must be positive and finite, not"):
        rewards.factor("reward", torch.zeros(2), beta)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
@pytest.mark.parametrize("compiled", [False, True])
def test_r_is_finite_or_minus_infinity(bad: float, make: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:  # as `torch.compile` leaves torch's distributions
        monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    with pytest.raises(ValueError, match=rf"rewards\.factor\('taste', \.\.\.\): r must be finite or -inf, not {bad}"):
        rewards.factor("taste", make([0.0, bad]), 0.5)
    rewards.factor("taste", make([0.0, -float("inf")]), 0.5)


def test_an_error_names_the_function_that_was_called() -> None:
    for function, rest in ((rewards.factor, [0.5]), (rewards.record, [])):
        name = rf"rewards\.{function.__name__}\('taste', \.\.\.\)"
        with pytest.raises(ValueError, match=f"{name}: r must be real numbers"):
            function("taste", "good", *rest)


def test_an_engine_refuses_such_an_r_with_its_text() -> None:
    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
            rewards.factor("taste", torch.where((x == 2).any(-1), float("nan"), 0.0), 0.5)

    with pytest.raises(ProgramError, match=r"site 'taste' has log-probability nan(?s:.)*completion: '.*b"):
        ImportanceSampling(50, seed=0, progress=False).run(model, SHORT)


def test_what_is_no_number_is_refused_by_the_name_of_its_site() -> None:
    for r, beta, argument in ((["good"], 0.5, "r"), ([None], 0.5, "r"), ([1.0], "half", "beta"), ([1.0], None, "beta")):
        with pytest.raises(
            ValueError, match=rf"rewards\.factor\('taste', \.\.\.\): {argument} must be real numbers, not"
        ):
            rewards.factor("taste", r, beta)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_beta_is_what_a_tensor_can_be_made_of(make: Any) -> None:
    trace = poutine.trace(lambda: rewards.factor("taste", [1.0, 2.0], make([0.5, 4.0]))).get_trace()
    torch.testing.assert_close(trace.nodes["taste"]["fn"].log_factor.double(), torch.tensor([2.0, 0.5]).double())


def test_a_reward_of_undeclared_dimensions_is_refused() -> None:
    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=2))
            rewards.record("reward", TABLE[POSITIONS, x])  # a number a token
            pyro.factor("reward", score(x))

    with pytest.raises(ProgramError, match="'reward/r' has a batch dimension of size 2 that no plate declares"):
        ImportanceSampling(4, seed=0, progress=False).run(model, SHORT)


# ---- on disk ----


def test_posteriors_of_before_there_were_rewards_are_read(tmp_path: Any) -> None:
    """They held r as the site "score"."""
    posterior = ImportanceSampling(50, seed=0, progress=False).run(plain, SHORT)
    folder = posterior.save(tmp_path / "run")
    again = Posterior.load(folder)
    np.testing.assert_array_equal(again.rewards["reward"], posterior.rewards["reward"])
    header = json.loads((folder / "posterior.json").read_text())
    fields = header["fields"]
    fields["samples"]["score"] = fields.pop("rewards")["reward"]
    fields["prior"]["score"] = fields.pop("prior_rewards")["reward"]
    fields["dims"]["score"] = ["prompt"]
    (folder / "posterior.json").write_text(json.dumps(header))
    write_checksums(folder)
    old = Posterior.load(folder)
    assert old.samples.keys() == posterior.samples.keys()
    for name in ("rewards", "prior_rewards"):
        np.testing.assert_array_equal(getattr(old, name)["reward"], getattr(posterior, name)["reward"])
