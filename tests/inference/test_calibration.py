r"""Are the draws the posterior's? Two tests that need no exact answer, of every engine and every Markov kernel.

Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and Gelman 2018, arXiv 1804.06788): draw latents and
data from the program, infer the latents from the data; among L draws of their posterior the true ones have a rank that
is uniform on 0, ..., L. The log-likelihood is among the quantities ranked, since draws of the prior itself would pass
with the latents alone (Modrák et al. 2022, arXiv 2211.02383). The replicates are the prompts of one run, each a
posterior of its own with data of its own. Pearson's chi-square, false alarm 1e-4 a test.

Geweke's joint distribution test (Geweke 2004, doi 10.1198/016214504000001132): alternating data given latents and a
step of the kernel given data leaves their joint distribution as it is. Each replicate starts from an exact draw of it,
so that the averages over its steps are independent between replicates, and their standard errors plain. Within 4
of them: false alarm 6e-5 a function, 0.3% for the file.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from support.engines import ENGINES, those
from support.models import table_lm
from support.statistics import LIMIT, assert_uniform

from bayeslm.inference.markov import SuffixKernel, SuffixMove, latent_moves, sweep
from bayeslm.inference.markov.moves import PriorMove, RandomWalk
from bayeslm.inference.program import inspect, sample_sites, score_values
from bayeslm.models.lm import Autoregressive

TOKENS = 3
DRAWS = 20  # L, in 7 groups of 3 ranks
NOISE = 1.0
VALUE = torch.tensor([0.0, 1.0, -0.5, 0.3])  # of each token


@functools.cache
def prior():
    lm = table_lm(order=2, seed=5, vocab=4)
    lm.batch_size = 2**16  # bounds what replicates times particles take
    lm.tokenizer = None  # there is nobody to read them
    return lm


def texts(prompts, y=None):
    """theta ~ N(0, 1); a completion whose prompt is theta's sign; y ~ N(theta + what the completion is worth, 1)."""
    with pyro.plate("prompts", len(prompts)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        sign = torch.where(theta > 0, 1, 2)[..., None]
        x = pyro.sample("completion", Autoregressive(prior(), sign, None, TOKENS))
        pyro.sample("y", dist.Normal(theta + worth(x), NOISE), obs=y)


def worth(x):
    return VALUE[x].sum(-1)


def numbers(prompts, y=None):
    """theta ~ N(0, 1), slope ~ LogNormal(0, 1/2); y ~ N(slope theta, 1): continuous latents alone."""
    with pyro.plate("prompts", len(prompts)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(slope * theta, NOISE), obs=y)


def log_likelihood(values, y):
    """log p(y | latents) of either program, whichever latents there are."""
    theta = values["theta"]
    if "completion" in values:
        return dist.Normal(theta + worth(values["completion"]), NOISE).log_prob(y)
    return dist.Normal(values["slope"] * theta, NOISE).log_prob(y)


def ranked(values, y):
    """The quantities that are ranked, (..., replicate) each."""
    other = worth(values["completion"]) if "completion" in values else values["slope"]
    return {"theta": values["theta"], "other": other, "log-likelihood": log_likelihood(values, y)}


def simulate(program, replicates, seed):
    """Latents and data of the program itself."""
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        trace = poutine.trace(program).get_trace(range(replicates))
    return {name: node["value"] for name, node in sample_sites(prune_subsample_sites(trace))}


def draws_of(posterior, rng):
    """L draws of each replicate's posterior, from as many chains as there are: (L, replicate, *event) by site."""
    chains, draws, replicates = posterior.log_weights.shape
    each = max(1, DRAWS // chains)
    chain = np.arange(DRAWS) // each
    if posterior.kind in ("exact", "markov"):
        last = np.linspace(draws - 1, 0, each + 1).astype(int)[:-1]  # as far apart as can be
        draw = np.tile(last, -(-DRAWS // each))[:DRAWS, None].repeat(replicates, 1)
    else:  # one by its weight, by Gumbel's trick
        noisy = posterior.log_weights[chain] + rng.gumbel(size=(DRAWS, draws, replicates))
        draw = noisy.argmax(1)
    picked = (chain[:, None], draw, np.arange(replicates))
    return {name: torch.as_tensor(value[picked]) for name, value in posterior.samples.items()}


def assert_uniform_ranks(drawn, truth, rng):
    """Ranks of the true latents' quantities among draws (L, replicate); ties are broken by lot."""
    true, of_draws = ranked(truth, truth["y"]), ranked(drawn, truth["y"])
    for name in true:
        below = (of_draws[name] < true[name] - 1e-6).sum(0).numpy()
        ties = ((of_draws[name] - true[name]).abs() <= 1e-6).sum(0).numpy()
        assert_uniform(below + rng.integers(0, ties + 1), DRAWS + 1, bins=7)


LONG = [pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3)]  # with many replicates

# No more of anything than the ranks need: a draw of each chain, or draws of one chain some steps apart.
LEANER = {
    "rejection": {"num_samples": 1, "num_chains": DRAWS, "max_proposals": 100_000},  # some replicates are outliers
    "annealed": {"num_particles": 15, "num_chains": DRAWS},
    "nuts": {"num_samples": 4 * DRAWS, "num_chains": 1, "warmup": 60, "max_tree_depth": 4},
}


def calibrate(name, replicates, seed):
    program = texts if ENGINES[name].texts else numbers
    truth = simulate(program, replicates, seed)
    bound = float(dist.Normal(0.0, NOISE).log_prob(torch.zeros(())))
    engine = ENGINES[name].make(seed, bound, 3)
    engine = replace(engine, **LEANER.get(name, {"num_chains": min(engine.num_chains, DRAWS)}))
    posterior = engine.run(program, [[1]] * replicates, truth["y"])
    rng = np.random.default_rng(seed)
    assert_uniform_ranks(draws_of(posterior, rng), truth, rng)


ALIKE = ("smc, default", "annealed, fixed ladder", "mcmc, tempered")  # other settings of engines that are there


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[pytest.mark.long] * (seed > 0 or name in ALIKE))
        for name in those(posterior=True, continuous=True)
        for seed in range(4)
    ],
)
def test_ranks_among_an_engines_draws_are_uniform(name, seed):
    few, many = (60, 150) if name == "nuts" else (120, 900)
    calibrate(name, many if seed else few, seed)


def test_ranks_see_draws_that_are_not_the_posteriors():
    """Of the prior itself, and of a posterior given other data."""
    truth, rng = simulate(texts, 120, 0), np.random.default_rng(0)
    prior_draws = [simulate(texts, 120, seed) for seed in range(1, DRAWS + 1)]
    drawn = {name: torch.stack([draw[name] for draw in prior_draws]) for name in truth}
    with pytest.raises(AssertionError):
        assert_uniform_ranks(drawn, truth, rng)
    posterior = ENGINES["importance"].make(0, 0.0, 3).run(texts, [[1]] * 120, truth["y"] + 1.0)
    with pytest.raises(AssertionError):
        assert_uniform_ranks(draws_of(posterior, rng), truth, rng)


# -- Geweke ----------------------------------------------------------------------------------------------------


def everything(prompts, data):
    """Every kind of latent; the completion's prompt is the topic, and y what all of them give, with noise."""
    with pyro.plate("prompts", len(prompts)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        x = pyro.sample("completion", Autoregressive(prior(), topic[..., None] + 1, None, TOKENS))
        pyro.sample("y", dist.Normal(given(theta, slope, topic, x), NOISE), obs=data["y"])


def given(theta, slope, topic, x):
    """The mean of y."""
    return slope * theta + worth(x) * (1 + topic) / 2


def mean_of(values):
    return given(values["theta"], values["slope"], values["topic"], values["completion"])


def functions(values, y):
    """Functions of latents and data, (..., replicate, function): moments, and how latents and data go together."""
    theta, slope, topic, x = (values[name] for name in ("theta", "slope", "topic", "completion"))
    length = 1 + (x[..., :-1] != 0).cumprod(-1).sum(-1)
    error = y - mean_of(values)
    own = [
        theta,
        theta**2,
        slope,
        slope.log() ** 2,
        topic == 0,
        topic == 1,
        worth(x),
        length,
        length == 1,
        x[..., 0] == 1,
    ]
    shared = [theta * y, slope * y, worth(x) * y, length * y, length * worth(x), topic * length, error, error**2, y**2]
    return torch.stack([f.double() for f in own + shared], -1)


def joint(replicates, seed):
    values = simulate(lambda prompts: everything(prompts, {"y": None}), replicates, seed)
    return values, values.pop("y")


def assert_joint_distribution_kept(step, replicates, steps, seed=0):
    """Successive-conditional simulation against marginal-conditional.

    :param step: latents after a step of the kernel, from (latents, y); both (replicate, *event).
    """
    independent = functions(*joint(40_000, seed + 1000))
    values, _ = joint(replicates, seed)
    total = 0.0
    for _ in range(steps):
        y = mean_of(values) + NOISE * torch.randn(replicates)
        values = step(values, y)
        total = total + functions(values, y)
    averages = total / steps
    gap = averages.mean(0) - independent.mean(0)
    z = gap / (averages.var(0) / replicates + independent.var(0) / len(independent)).sqrt()
    assert (z.abs() < LIMIT).all(), z


def stepping(make, replicates):
    """A step of the moves that ``make(program)`` gives."""
    data = {"y": torch.zeros(replicates)}
    program = inspect(everything, [[1]] * replicates, data)
    moves = make(program)

    def step(values, y):
        data["y"] = y
        state = sweep(moves, score_values(program, {name: value[None] for name, value in values.items()}))
        return {name: state.values[name][0] for name in values}

    return step


MOVES = {
    "suffix": lambda program: [SuffixMove(program, "completion")],
    "suffixes, one cut": lambda program: [SuffixMove(program, "completion", num_candidates=5, same_cut=True)],
    "suffixes, policy": lambda program: [SuffixMove(program, "completion", table_lm(order=3, seed=8, vocab=4), 2)],
    "prior": lambda program: [PriorMove(program, "topic")],
    "random walk": lambda program: [RandomWalk(program, "theta"), RandomWalk(program, "slope")],
    "all": latent_moves,
}


@pytest.mark.parametrize("seed", [0, *LONG])
@pytest.mark.parametrize("name", MOVES)
def test_moves_leave_the_joint_distribution(name, seed):
    replicates, steps = (5000, 100) if seed else (600, 20)
    assert_joint_distribution_kept(stepping(MOVES[name], replicates), replicates, steps, seed)


def wrong(move, change):
    """A move whose proposals come with another ratio."""

    class Wrong(move):
        def propose(self, distribution, value, scores):
            made = super().propose(distribution, value, scores)
            return replace(made, log_ratio=change(distribution, value, made))

    return Wrong


WRONG = {
    "no lengths": lambda program: [
        wrong(SuffixMove, lambda q, x, made: made.log_ratio - q.lengths(x).log() + q.lengths(made.value).log())(
            program, "completion"
        )
    ],
    "no prior of the suffix": lambda program: [
        wrong(SuffixMove, lambda q, x, made: made.log_ratio * 0)(program, "completion")
    ],
    "no prior of the topic": lambda program: [
        wrong(PriorMove, lambda q, z, made: made.log_ratio * 0)(program, "topic")
    ],
    "no Jacobian": lambda program: [wrong(RandomWalk, lambda q, z, made: made.log_ratio * 0)(program, "slope")],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_acceptance_is_seen(name):
    with pytest.raises(AssertionError):
        assert_joint_distribution_kept(stepping(WRONG[name], 600), 600, steps=20)


@pytest.mark.parametrize("continuous", ["random-walk", pytest.param("nuts", marks=pytest.mark.long)])
def test_the_kernel_for_pyro_leaves_the_joint_distribution(continuous):
    """Its warm-up is before: what adapts, depends on the chain's past."""
    replicates = 100
    data = {"y": joint(replicates, 5)[1]}
    kernel = SuffixKernel(everything, continuous=continuous, initial_particles=20, max_tree_depth=4)
    kernel.setup(40, [[1]] * replicates, data)
    params = kernel.initial_params
    for _ in range(40):
        params = kernel.sample(params)

    def step(values, y):
        data["y"] = y
        return dict(kernel.sample(values))

    assert_joint_distribution_kept(step, replicates, steps=15)
