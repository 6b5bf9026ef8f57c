"""A learned reward with its uncertainty: its four forms, judges as latents, and over-optimisation."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from scipy.special import expit, logsumexp, softmax
from support.models import count_abc, table_lm
from support.toys import Gaussian

from bayeslm import diagnostics
from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, Exact, ImportanceSampling, RejectionSampling
from bayeslm.models import TiltedLM, rewards
from bayeslm.models.preferences import BradleyTerry, JudgedLM, UncertainReward

pytest.importorskip("matplotlib")  # the example plots

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
def test_the_posterior_is_tilted_by_the_form(form: str) -> None:
    model = TiltedLM(LM, learned(form, typical=TYPICAL), beta=0.4, max_new_tokens=TOKENS)
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        texts = exact.texts["completion"][0, :, i].tolist()
        delta = margins(learned(form), [prompt] * len(texts), texts)
        drawn = learned("draw", typical=TYPICAL)([prompt], texts).numpy()
        (draw,) = np.flatnonzero(np.isclose(delta, drawn[:, None], atol=1e-5).all(0))
        score = {
            "mean": delta.mean(1),
            "draw": delta[:, draw],
            "quantile": np.quantile(delta, 0.1, axis=1),
            "marginal": np.log(expit(delta).mean(1)),
        }[form]
        distribution = LM([prompt], max_new_tokens=TOKENS)
        log_p = (
            distribution.log_prob(torch.as_tensor(exact.samples["completion"][0, :, i])[:, None])[:, 0].double().numpy()
        )
        assert exact.log_evidence[i] == pytest.approx(logsumexp(log_p + score / 0.4), abs=1e-5)
        np.testing.assert_allclose(exact.weights()[0, :, i], softmax(log_p + score / 0.4), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_smc_steers_by_an_uncertain_reward(form: str, seed: int) -> None:
    model = TiltedLM(LM, learned(form, seed, typical=TYPICAL), beta=2.0, max_new_tokens=TOKENS)
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    engine = SMC(num_particles=64, num_chains=40, twist="partial", seed=seed, progress=False)
    agree(engine.run(model, PROMPTS), exact)


def agree(posterior: Any, exact: Any) -> None:
    """Assert log Z and the mean reward, within 4.5 standard errors."""
    truth = diagnostics.expectation(exact, exact.rewards)[0]
    mean, error = diagnostics.expectation(posterior, posterior.rewards)
    assert (np.abs(mean - truth) < 4.5 * error).all(), (mean, truth, error)
    if np.isfinite(posterior.log_evidence).all():
        gap = np.abs(posterior.log_evidence - exact.log_evidence)
        assert (gap < 4.5 * posterior.log_evidence_stderr).all(), (gap, posterior.log_evidence_stderr)


def test_the_marginal_form_is_bounded_and_can_be_rejected() -> None:
    model = TiltedLM(LM, learned("marginal", typical=TYPICAL), beta=0.5, max_new_tokens=TOKENS)
    assert model.log_bound == 0.0
    assert TiltedLM(LM, learned("mean")).log_bound == np.inf
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    engine = RejectionSampling(num_samples=400, log_bound=model.log_bound, max_proposals=50_000, seed=0, progress=False)
    agree(engine.run(model, PROMPTS), exact)


# -- judges as latents of the program -------------------------------------------------------------------------


@pytest.mark.parametrize("judges", [1, 2])
def test_marginalised_judges_are_the_marginal_form(judges: int) -> None:
    reward = learned("mean", typical=TYPICAL)
    joint = Exact(num_prior_samples=1).run(JudgedLM(LM, reward, judges, max_new_tokens=TOKENS), PROMPTS)
    model = TiltedLM(LM, reward.to_form("marginal"), 1 / judges, max_new_tokens=TOKENS)
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


ENGINES = {
    "importance": lambda seed: ImportanceSampling(num_particles=4000, seed=seed, progress=False),
    "smc": lambda seed: SMC(num_particles=64, num_chains=60, seed=seed, progress=False),
    "smc, partial": lambda seed: SMC(num_particles=64, num_chains=60, twist="partial", seed=seed, progress=False),
    "annealed": lambda seed: AnnealedSMC(num_particles=64, num_chains=40, seed=seed, progress=False),
    "mcmc": lambda seed: MCMC(num_samples=60, num_chains=40, warmup=20, seed=seed, progress=False),
    "svi": lambda seed: SVI(num_steps=30, num_particles=32, num_samples=4000, seed=seed, progress=False),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_infer_the_completion_and_its_judges(engine: str, seed: int) -> None:
    model = JudgedLM(LM, learned("mean", 3, typical=TYPICAL), 2, max_new_tokens=TOKENS)
    exact = Exact(num_prior_samples=1).run(model, PROMPTS)
    posterior = ENGINES[engine](seed).run(model, PROMPTS)
    assert posterior.dims["judge"] == ("judges", "prompt")
    agree(posterior, exact)
    for j in range(5):
        chosen = [(p.samples["judge"] == j).mean(2) for p in (exact, posterior)]
        truth = diagnostics.expectation(exact, chosen[0])[0]
        mean, error = diagnostics.expectation(posterior, chosen[1])
        assert (np.abs(mean - truth) < 4.5 * error).all(), (j, mean, truth, error)


def test_a_latent_weight_with_the_factor_exp_of_the_reward_is_optimistic() -> None:
    """As the module says: the marginal of x is p(x) E_w[exp(Delta_w / beta)], and that of w is multiplied by Z_w."""
    reward, beta = learned("mean", typical=TYPICAL), 0.7

    def program(prompts: list[str]) -> None:
        judge = pyro.sample("judge", dist.Categorical(logits=torch.zeros(5)))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", LM(prompts, max_new_tokens=TOKENS))
            delta = reward.margins(prompts, LM.decode(x))
            pyro.factor("reward", Vindex(delta)[..., judge] / beta)

    joint = Exact(num_prior_samples=1).run(program, ["c"])
    alone = Exact(num_prior_samples=1).run(TiltedLM(LM, reward, beta, max_new_tokens=TOKENS), ["c"])
    texts = alone.texts["completion"][0, :, 0]
    log_p = (alone.log_joint - alone.log_likelihood["reward"])[0, :, 0]
    delta = margins(reward, ["c"] * len(texts), texts.tolist())
    seeking = beta * (logsumexp(delta / beta, axis=1) - np.log(5))
    assert (seeking >= delta.mean(1)).all()
    mass = [joint.weights()[0, joint.texts["completion"][0, :, 0] == text, 0].sum() for text in texts]
    np.testing.assert_allclose(mass, softmax(log_p + seeking / beta), atol=1e-6)
    revised = [joint.weights()[0, joint.samples["judge"][0] == j, 0].sum() for j in range(5)]
    np.testing.assert_allclose(revised, softmax(logsumexp(log_p[:, None] + delta / beta, axis=0)), atol=1e-5)


# -- over-optimisation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "over_optimisation.py"
    spec = importlib.util.spec_from_file_location("over_optimisation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def laplace(task: Any) -> UncertainReward:
    """Do what `Task.learn` does, with draws of the Laplace approximation in place of NUTS."""
    model = task.learner()
    x = model.prepare(task.comparisons()).double().numpy()  # (comparison, 7)
    precision = np.eye(7) * 7 / model.scale**2
    mode = np.zeros(7)
    for _ in range(30):
        win = expit(x @ mode)
        curvature = precision + x.T @ (x * (win * (1 - win))[:, None])
        mode = mode + np.linalg.solve(curvature, x.T @ (1 - win) - precision @ mode)
    weights = task.rng.multivariate_normal(mode, np.linalg.inv(curvature), 64)
    return task.centred(UncertainReward(model, torch.tensor(weights), "mean", seed=task.seed))


@pytest.mark.parametrize("way", ["laplace", pytest.param("nuts", marks=pytest.mark.long)])
def test_pessimistic_and_marginal_forms_keep_the_true_reward(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Where the learned reward is wrong away from its data: at the smallest beta, the largest n, and at equal KL."""
    if way == "laplace":
        monkeypatch.setattr(example.Task, "learn", laplace)
        both = example.curves(0.75, range(20), length=4)
    else:
        both = example.curves(0.5, range(100, 120))
    for curves in both:
        mean = curves["mean"]
        assert (np.diff(mean["proxy"]) > -1e-4).all()  # the optimised reward grows
        falls = mean["true"].max(1) - mean["true"][:, -1]
        assert falls.mean() > 3 * standard_error(falls)
        for form in ("quantile", "marginal"):
            more = curves[form]["true"][:, -1] - mean["true"][:, -1]
            assert more.mean() > 3 * standard_error(more), (form, more)
            kl = np.minimum(mean["kl"][:, -1], curves[form]["kl"][:, -1])
            more = at_kl(curves[form], kl) - at_kl(mean, kl)
            assert more.mean() > 2 * standard_error(more), (form, kl, more)


@pytest.mark.long
def test_the_mean_is_best_where_the_learned_reward_is_right(example: ModuleType) -> None:
    tilted, best = example.curves(0.0, range(200, 220))
    for curves in (tilted, best):
        for form, curve in curves.items():
            more = curve["true"][:, -1] - curves["mean"]["true"][:, -1]
            assert more.mean() <= 2 * standard_error(more), (form, more)
        claimed = curves["mean"]["proxy"][:, -1] - curves["mean"]["true"][:, -1]
        assert abs(claimed.mean()) < 3 * standard_error(claimed)  # no optimiser's curse


def standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def at_kl(curve: dict[str, np.ndarray], kl: np.ndarray) -> np.ndarray:
    """Interpolate the true reward of each seed at a KL."""
    rows = zip(kl, curve["kl"], curve["true"], strict=True)
    return np.array([np.interp(at, k, true) for at, k, true in rows])


def test_the_curves_agree_with_the_enumerated_posterior(example: ModuleType) -> None:
    task = example.Task(0, 0.5, length=3)
    reward = laplace(task)
    scores = task.scores(reward)
    distributions = task.tilted(scores, reward.margins([example.PROMPT], task.texts))
    curve = task.curve(distributions["quantile"], scores["mean"])
    for i in (0, 12):
        model = TiltedLM(task.prior, reward.to_form("quantile"), float(example.BETAS[i]), max_new_tokens=3)
        exact = Exact(num_prior_samples=1).run(model, [example.PROMPT])
        assert curve["kl"][i] == pytest.approx(diagnostics.kl_to_prior(exact)[0][0], abs=1e-4)
        true = dict(zip(task.texts, task.true, strict=True))
        mean = (exact.weights()[0, :, 0] * [true[text] for text in exact.texts["completion"][0, :, 0]]).sum()
        assert curve["true"][i] == pytest.approx(mean, abs=1e-4)


def test_best_of_n_is_exact(example: ModuleType) -> None:
    """The best of two agrees with all pairs, and the best of one is the prior."""
    task = example.Task(0, 0.5, length=2)
    scores = {"any": np.round(task.true)}  # with ties
    example_ns, example.NS = example.NS, np.array([1, 2])
    try:
        one, two = task.best_of(scores)["any"]
    finally:
        example.NS = example_ns
    p = softmax(task.log_p)
    np.testing.assert_allclose(one, p, atol=1e-12)
    s = scores["any"]
    wins = (s[:, None] > s) + 0.5 * (s[:, None] == s)
    np.testing.assert_allclose(two, 2 * p * (wins @ p), atol=1e-12)


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
