r"""Adaptive multiple importance sampling: draws of the prior and of a policy that learns from them.

    x_i ~ q_k,   w_i = p(x_i) exp(r(x_i)/beta) / m(x_i),   m(x) = \sum_k n_k q_k(x) / \sum_k n_k,   \hat Z = mean(w)

q_0 = p is the prior, and q_1, q_2, ... are a policy that is trained on the draws before (Cornuet, Marin, Mira and
Robert 2012, arXiv 0907.1254). All draws are kept, weighted by the mixture of the proposals (Owen and Zhou 2000, doi
10.2307/2669533): the prior in it, with the share \alpha, bounds weights by about exp(r_max/beta) / \alpha also where
a policy misses a part of the posterior. Draws that have taught a policy are weighted by the proposals of their own
round, as the densities that were fitted to them would bias their weights, see `training.proposals`.

\hat Z is consistent. It is not unbiased: the first draws decide whether a policy is trained, and a run may end by its
precision. It is unbiased, E[\hat Z] = Z, for a fixed number of draws with ``train_below`` 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bayeslm.inference.program import check_draws_texts, inspect, running
from bayeslm.inference.training import Plan, run_adaptively
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Natural, Positive, Seed, Share, Within, validated


@validated
@dataclass(frozen=True)
class AdaptiveImportance:
    """Draws of the prior and of a policy that learns from them, until a precision or a budget is reached.

    :param num_particles: the most draws of each prompt in each chain.
    :param target_ess: effective draws of each prompt, of all chains together, at which the run ends. A run does not end
        by its precision while k-hat is above 0.7, or fewer than ten draws of one likelihood have a tenth of the weight.
    :param log_evidence_stderr: the standard error of each prompt's log Z at which the run ends.
    :param max_seconds: after which no round begins; training takes at most half of those that are left. A run that it
        bounds is not reproduced by its seed.
    :param weights: by the "mixture" of all rounds' proposals; or by those of a draw's "own" round, the prior and one
        policy, which costs no scores under other policies. Then rounds before the last policy count less, as they do
        of draws that have taught.
    :param round_size: draws of each prompt in the first round, of the prior, and in those that teach, at most half of
        all; each other round doubles the draws.
    :param prior_share: alpha, the prior's share of later rounds.
    :param train_below: the effective share of the prior's draws below which a policy is trained: 1 trains one always,
        0 never. At the default the most that a policy can gain pays for its training, and for its draws' scores.
    :param num_steps: the most steps of training in a chain.
    :param guide: a `LanguageModel`, such as an earlier policy, of which a copy is trained; or a function from the
        inspected program to an `AutoPolicy`, such as ``partial(AutoPolicy, lora_rank=1)``. None is `AutoPolicy`.
    :param num_chains: independent replicates, each with a policy of its own.
    :param seed: of all random numbers of the run; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_particles: Count = 4096
    target_ess: Positive | None = None
    log_evidence_stderr: Positive | None = None
    max_seconds: Positive | None = None
    weights: Literal["mixture", "own"] = "mixture"
    round_size: Count = 64
    prior_share: Annotated[float, Within("(0, 1)")] = 0.2
    train_below: Share = 0.02
    num_steps: Natural = 96
    guide: Callable[..., Any] | LanguageModel | None = None
    num_chains: Count = 1
    seed: Seed | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_draws_texts("AdaptiveImportance", self.guide)

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``policy`` is the trained one, of the chain with most effective draws; None if none was trained. ``stats``:
        ``ess`` and ``khat`` (prompt,); ``notes``, what was done and why; ``round_draws`` (round,) and ``round_ess``
        (round, prompt), draws and effective draws after each round; ``steps`` and ``policies``, numbers of them;
        ``moved`` and ``learning_rate`` (chain, step), see `TrustRegion`; ``seconds``, ``tokens`` and ``model_calls``.
        After Ctrl-C the posterior has the rounds that are complete.

        :raises EvidenceError: if no draw of a prompt has positive probability.
        :raises RunError: if an error stops the run after the first round; it carries the draws.
        """
        plan = Plan(
            num_particles=self.num_particles,
            round_size=self.round_size,
            prior_share=self.prior_share,
            train_below=self.train_below,
            num_steps=self.num_steps,
            target_ess=self.target_ess,
            log_evidence_stderr=self.log_evidence_stderr,
            max_seconds=self.max_seconds,
        )
        with running(self.seed) as watch:
            return run_adaptively(
                inspect(model, *args, **kwargs),
                plan,
                engine="AdaptiveImportance",
                num_chains=self.num_chains,
                stopwatch=watch,
                progress=self.progress,
                guide=self.guide,
                own_weights=self.weights == "own",
            )
