"""A learned reward with its uncertainty: its four forms, and judges as latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from scipy.special import expit, logsumexp, softmax
from support.engines import ENGINES
from support.models import count_abc, table_lm
from support.oracles import expectation
from support.statistics import assert_estimate, assert_evidence
from support.toys import Gaussian

from bayeslm import diagnostics
from bayeslm.inference import SMC, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.preferences import BradleyTerry, JudgedLM, UncertainReward

PROMPTS = ["a b", "c"]
TOKENS = 3
FORMS = ("mean", "draw", "quantile", "marginal")
LM = table_lm(order=3, seed=1, vocab=4)


def draws(seed: int = 0, number: int = 5) -> torch.Tensor:
    return 1.5 * torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))


def learned(form: str, seed: int = 0, **settings: Any) -> UncertainReward:
    return UncertainReward(BradleyTerry(count_abc), draws(seed), form, **settings)


TYPICAL = {"a b": torch.tensor([1.0, 0.5, 0.2]), "c": torch.tensor([0.3, 0.1, 0.9])}
TEXTS = ["a", "b b", "c a c", "b"]


def margins(reward: UncertainReward, prompts: list[str], texts: list[str]) -> np.ndarray:
    """Return Delta_w (text, draw), by hand."""
    above = [count_abc([c], [x])[0] - TYPICAL[c] for c, x in zip(prompts, texts, strict=True)]
    return np.array([[float(w @ f) for w in reward.weights] for f in above])


# -- the forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_form_has_the_value_of_its_formula(prompt: str, seed: int) -> None:
    delta = margins(learned("mean", seed), [prompt] * 4, TEXTS)
    expected = {
        "mean": delta.mean(1),
        "quantile": np.quantile(delta, 0.3, axis=1),
        "marginal": np.log(expit(delta).mean(1)),
    }
    for form, scores in expected.items():
        reward = learned(form, seed, typical=TYPICAL, level=0.3)
        np.testing.assert_allclose(reward([prompt], TEXTS), scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(learned("mean", seed, typical=TYPICAL).margins([prompt], TEXTS), delta, rtol=1e-5)


def test_the_default_quantile_is_pessimistic() -> None:
    many = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    reward = UncertainReward(BradleyTerry(count_abc), many, "quantile")
    assert reward(["c"], ["a b"]) == pytest.approx(-1.2816 * 2**0.5, abs=4.5 * 2**0.5 * 0.0383)  # sd of it: 1.71 / √n


def test_the_form_draw_uses_one_draw_for_all_texts_and_each_equally_often() -> None:
    delta = margins(learned("draw"), ["c"] * 4, TEXTS)
    times = np.zeros(5)
    for seed in range(200):
        reward = learned("draw", seed=0, typical=TYPICAL)
        scores = replace(reward, seed=seed)(["c"], TEXTS).numpy()
        (drawn,) = np.flatnonzero(np.isclose(delta, scores[:, None], atol=1e-5).all(0))
        times[drawn] += 1
        assert (scores == replace(reward, seed=seed)(["c"], TEXTS).numpy()).all()
    assert (np.abs(times - 40) < 4.5 * np.sqrt(200 * 0.2 * 0.8)).all(), times


def test_one_vector_is_typical_of_every_prompt() -> None:
    same = torch.tensor([0.5, 0.5, 0.5])
    for form in FORMS:
        one, each = learned(form, typical=same), learned(form, typical=dict.fromkeys(PROMPTS, same))
        torch.testing.assert_close(one(PROMPTS, ["a c", "b"]), each(PROMPTS, ["a c", "b"]))
    zero = learned("marginal", typical=torch.zeros(3))
    torch.testing.assert_close(learned("marginal")(["c"], TEXTS), zero(["c"], TEXTS))


def test_texts_scored_in_parts_have_the_same_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = learned("quantile")(["c"], TEXTS)
    monkeypatch.setattr("bayeslm.models.preferences.uncertain.MAX_MARGINS", 11)  # two texts
    torch.testing.assert_close(learned("quantile")(["c"], TEXTS), complete)


@pytest.mark.parametrize("seed", range(3))
def test_centring_finds_the_mean_features_of_the_prior(seed: int) -> None:
    reward = learned("mean").centred(LM, PROMPTS, num_samples=1000, max_new_tokens=TOKENS, seed=seed)
    exact = Exact(num_prior_samples=1).run(TiltedLM(LM, learned("mean"), max_new_tokens=TOKENS), PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        p = np.exp(exact.log_joint - exact.log_likelihood["reward"])[0, :, i]
        features = count_abc([prompt], exact.texts["completion"][0, :, i].tolist()).numpy()
        mean = p @ features
        error = np.sqrt((p @ features**2 - mean**2) / 1000)
        assert (np.abs(reward.typical[prompt].numpy() - mean) < 4.5 * error).all()


def test_a_constant_of_the_prompt_cancels_after_centring() -> None:
    """Comparisons do not determine the weights of features that all completions of a prompt share."""

    def with_constant(prompts: list[str], completions: list[str]) -> torch.Tensor:
        constant = torch.tensor([[3.0 * len(prompt)] for prompt in prompts])
        return torch.cat([count_abc(prompts, completions), constant], 1)

    level = 2.0 * torch.randn(5, 1, generator=torch.Generator().manual_seed(9))
    for form in FORMS:
        plain = learned(form).centred(LM, PROMPTS, max_new_tokens=TOKENS)
        wide = UncertainReward(BradleyTerry(with_constant), torch.cat([draws(), level], 1), form)
        wide = wide.centred(LM, PROMPTS, max_new_tokens=TOKENS)
        torch.testing.assert_close(wide(PROMPTS, ["a c", "b"]), plain(PROMPTS, ["a c", "b"]), atol=1e-4, rtol=1e-4)


def test_weighted_draws_of_a_posterior_are_resampled() -> None:
    def model(data: None) -> None:
        w = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w[..., 0], 0.5), obs=torch.tensor(2.0))  # posterior mean 1.6, variance 0.2

    posterior = ImportanceSampling(num_particles=5_000, seed=0, progress=False).run(model, None)
    reward = UncertainReward.from_posterior(BradleyTerry(count_abc), posterior, "mean", num_draws=1000, level=0.2)
    assert reward.weights.shape == (1000, 3)
    assert reward.level == 0.2
    assert (reward.weights.mean(0) - torch.tensor([1.6, 0, 0])).abs().max() < 4.5 / 1000**0.5
    assert (reward.weights.var(0) - torch.tensor([0.2, 1, 1])).abs().max() < 4.5 * (2 / 1000) ** 0.5
    few = UncertainReward.from_posterior(BradleyTerry(count_abc), posterior, "mean", num_draws=10**6)
    assert few.weights.shape == (5_000, 3)


# -- the posterior of a completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_smc_steers_by_an_uncertain_reward(form: str, seed: int) -> None:
    model = TiltedLM(LM, learned(form, seed, typical=TYPICAL), beta=2.0, max_new_tokens=TOKENS)
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    engine = SMC(num_particles=64, num_chains=40, twist="partial", seed=seed, progress=False)
    agree(engine.run(model, PROMPTS), exact)


def agree(posterior: Any, exact: Any) -> None:
    """Assert log Z and the mean reward."""
    assert_estimate(*diagnostics.expectation(posterior, posterior.measured), expectation(exact, exact.measured))
    if np.isfinite(posterior.log_evidence).all():
        assert_evidence(posterior, exact.log_evidence)


def test_the_marginal_form_is_bounded_and_can_be_rejected() -> None:
    model = TiltedLM(LM, learned("marginal", typical=TYPICAL), beta=0.5, max_new_tokens=TOKENS)
    assert model.log_bound == 0.0
    assert TiltedLM(LM, learned("mean")).log_bound == np.inf
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    engine = RejectionSampling(num_samples=400, log_bound=model.log_bound, max_proposals=50_000, seed=0, progress=False)
    agree(engine.run(model, PROMPTS), exact)


# -- judges as latents of the program -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judges", "settings"), [(1, {}), (2, {"stop": "b", "top_k": 3}), (1, {"top_p": 0.8, "temperature": 0.7})]
)
def test_marginalised_judges_are_the_marginal_form(judges: int, settings) -> None:
    reward = learned("mean", typical=TYPICAL)
    joint = Exact(num_prior_samples=1).run(JudgedLM(LM, reward, judges, max_new_tokens=TOKENS, **settings), PROMPTS)
    model = TiltedLM(LM, reward.to_form("marginal"), 1 / judges, max_new_tokens=TOKENS, **settings)
    alone = Exact(num_prior_samples=1).run(model, PROMPTS)
    np.testing.assert_allclose(joint.log_evidence, alone.log_evidence, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        texts, weights = joint.texts["completion"][0, :, i], joint.weights()[0, :, i]
        mass = {text: weights[texts == text].sum() for text in alone.texts["completion"][0, :, i]}
        found = [mass[text] for text in alone.texts["completion"][0, :, i]]
        np.testing.assert_allclose(found, alone.weights()[0, :, i], atol=1e-6)
        # p(judge_k = j) is proportional to the sum over x of p(x) sigma_j(x) (mean sigma(x))^(judges - 1)
        win = expit(margins(reward, [prompt] * len(found), list(mass)))
        p = np.exp((alone.log_joint - alone.log_likelihood["reward"])[0, :, i])
        of_judge = (p * win.mean(1) ** (judges - 1)) @ win
        for k in range(judges):
            observed = [weights[joint.samples["judge"][0, :, k, i] == j].sum() for j in range(5)]
            np.testing.assert_allclose(observed, of_judge / of_judge.sum(), atol=1e-5)


@pytest.mark.parametrize("engine", ["importance", "smc", "smc, default", "annealed", "mcmc", "svi"])
def test_engines_infer_the_completion_and_its_judges(engine: str) -> None:
    model = JudgedLM(LM, learned("mean", 3, typical=TYPICAL), 2, max_new_tokens=TOKENS)
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    posterior = ENGINES[engine].make(0, 0.0, 6).run(model, PROMPTS)
    assert posterior.dims["judge"] == ("judges", "prompt")
    agree(posterior, exact)
    for j in range(5):
        true, found = ((p.samples["judge"] == j).mean(2) for p in (exact, posterior))
        assert_estimate(*diagnostics.expectation(posterior, found), expectation(exact, true))


def test_a_latent_weight_with_the_factor_exp_of_the_reward_is_optimistic() -> None:
    """As the module says: the marginal of x is p(x) E_w[exp(Delta_w / beta)], and that of w is multiplied by Z_w."""
    reward, beta = learned("mean", typical=TYPICAL), 0.7

    def program(prompts: list[str]) -> None:
        judge = pyro.sample("judge", dist.Categorical(logits=torch.zeros(5)))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=TOKENS))
            pyro.factor("reward", Vindex(reward.margins(prompts, LM.decode(x)))[..., judge] / beta)

    joint = Exact(num_prior_samples=1).run(program, ["c"])
    alone = Exact(num_prior_samples=1).run(TiltedLM(LM, reward, beta, max_new_tokens=TOKENS), ["c"])
    texts, weights = alone.texts["completion"][0, :, 0], joint.weights()[0, :, 0]
    log_p = (alone.log_joint - alone.log_likelihood["reward"])[0, :, 0]
    delta = margins(reward, ["c"] * len(texts), texts.tolist())
    seeking = beta * (logsumexp(delta / beta, axis=1) - np.log(5))
    assert (seeking >= delta.mean(1)).all()
    mass = [weights[joint.texts["completion"][0, :, 0] == text].sum() for text in texts]
    np.testing.assert_allclose(mass, softmax(log_p + seeking / beta), atol=1e-6)
    revised = [weights[joint.samples["judge"][0] == j].sum() for j in range(5)]
    np.testing.assert_allclose(revised, softmax(logsumexp(log_p[:, None] + delta / beta, axis=0)), atol=1e-5)


# -- files and bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("typical", [None, torch.tensor([0.1, 0.2, 0.3]), TYPICAL], ids=["none", "one", "each"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_rewards_are_loaded(tmp_path: Path, form: str, typical: Any) -> None:
    reward = replace(learned(form, typical=typical), level=0.3, seed=4)
    reward.save_pretrained(tmp_path / "reward")
    again = UncertainReward.from_pretrained(tmp_path / "reward", BradleyTerry(count_abc))
    assert (again(["c"], TEXTS) == reward(["c"], TEXTS)).all()
    assert (again.form, again.level, again.seed, again.upper_bound) == (form, 0.3, 4, reward.upper_bound)
    with pytest.raises(FileExistsError, match="not empty"):
        reward.save_pretrained(tmp_path / "reward")


def test_loading_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"uncertain\.json is missing"):
        UncertainReward.from_pretrained(tmp_path, BradleyTerry(count_abc))
    (tmp_path / "uncertain.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="this version of bayeslm reads"):
        UncertainReward.from_pretrained(tmp_path, BradleyTerry(count_abc))


def test_loading_refuses_other_features(tmp_path: Path) -> None:
    """For example principal components with other signs."""

    def length(sign: float, width: int = 3) -> BradleyTerry:
        return BradleyTerry(lambda prompts, completions: torch.tensor([[sign * len(x)] * width for x in completions]))

    UncertainReward(length(1.0), draws(), "mean").save_pretrained(tmp_path / "reward")
    UncertainReward.from_pretrained(tmp_path / "reward", length(1.0))
    for other in (length(-1.0), length(1.0, width=2)):
        with pytest.raises(ValueError, match="belong to other features"):
            UncertainReward.from_pretrained(tmp_path / "reward", other)


def test_the_command_line_finds_one_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned("quantile").save_pretrained(tmp_path / "kept")
    source = """
    from bayeslm.models.preferences import BradleyTerry, UncertainReward
    from support.models import count_abc
    pessimistic = UncertainReward.from_pretrained(FOLDER, BradleyTerry(count_abc))
    """.replace("    ", "").replace("FOLDER", repr(str(tmp_path / "kept")))
    (tmp_path / "my_learned.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    reward = rewards.load("my_learned:pessimistic") - 0.1 * rewards.Length()
    plain = learned("quantile")
    np.testing.assert_allclose(reward(["c"], ["a b"]), plain(["c"], ["a b"]) - 0.1 * 2, atol=1e-5)
    assert repr(plain) == "UncertainReward('quantile', 5 draws of 3 weights)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(3)}, r"shape \(draw, d\), got \(3,\)"),
        ({"weights": torch.zeros(0, 3)}, "shape"),
        ({"weights": torch.full((2, 3), torch.nan)}, "finite"),
        ({"form": "median"}, "form must be one of 'mean', 'draw', 'quantile', 'marginal', got 'median'"),
        ({"level": 0.0}, r"level must be a number in \(0, 1\)"),
        ({"level": 1.0}, r"level must be a number in \(0, 1\)"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(learned("mean"), **change)


def test_bad_use_is_refused() -> None:
    with pytest.raises(rewards.RewardError, match=r"prompt 'd' has no typical completion: call `centred`"):
        learned("mean", typical=TYPICAL)(["d"], ["a"])
    with pytest.raises(rewards.RewardError, match="there are 3 features, but 2 weights"):
        UncertainReward(BradleyTerry(count_abc), torch.zeros(4, 2), "mean")(["c"], ["a"])
    with pytest.raises(ValueError, match="no site 'weights'"):
        UncertainReward.from_posterior(BradleyTerry(count_abc), Gaussian().posterior(0), "mean")
    one = Gaussian().posterior(0, prompts=1)
    posterior = replace(one, samples={"weights": np.zeros((4, 250, 3))}, dims={"weights": ("weights_dim_0",)})
    with pytest.raises(ValueError, match="num_draws must be a positive whole number"):
        UncertainReward.from_posterior(BradleyTerry(count_abc), posterior, "mean", num_draws=0)
    with pytest.raises(ValueError, match="judges must be a positive whole number"):
        JudgedLM(LM, learned("mean"), 0)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive whole number"):
        JudgedLM(LM, learned("mean"), max_new_tokens=0)
