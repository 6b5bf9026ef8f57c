r"""Twisted sequential Monte Carlo: completions written token by token, weighed on the way, and resampled.

For t = 1, ..., T, on N particles, with a twist \psi_t (psi_0 = 1) and a proposal q:

    x_t ~ q( . | x_{1:t-1})
    w_t = w_{t-1}  p(x_t | x_{1:t-1}) / q(x_t | x_{1:t-1})  \psi_t(x_{1:t}) / \psi_{t-1}(x_{1:t-1})
    where ESS(w) < threshold:  Z <- Z mean(w),  ancestors ~ resampling(w),  w = 1

and at the end the twist gives way to the truth, exp(r / beta). E[\hat Z] = Z whatever the twist and the proposal; a
good twist makes \hat Z precise (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546; Lew et al. 2023, "SMC
steering", arXiv 2306.03081; the bound \psi = E[exp(r / beta) | x_{1:t}] is exact sampling). Without a twist the
weights arrive at the end, and this is importance sampling.

Any Pyro program: latents before a completion are particles too and follow the resampling, several completions come
one after the other, and prompts that are posteriors of their own are resampled separately, in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bayeslm.inference.program import (
    PartialRun,
    Particles,
    ProgramError,
    SoFar,
    Stopwatch,
    check_counts,
    inspect,
    keeping,
    posterior,
    seeded,
)
from bayeslm.inference.sequential import (
    Islands,
    LearnedTwist,
    PolicyTwist,
    PrefixTwist,
    Rows,
    SiteTwist,
    Step,
    check_resampling,
    check_retained,
    induced,
    retained_values,
)
from bayeslm.models.lm import Autoregressive, Decoder, LanguageModel, Twist, categorical, log_softmax_at
from bayeslm.posterior import Posterior
from bayeslm.progress import track


@dataclass(frozen=True)
class SMC:
    """Weighted particles, resampled while they are written.

    :param num_particles: in each chain, which is an island of its own: resampled within itself.
    :param num_chains: independent islands.
    :param twist: what an unfinished text is weighed by. None: nothing. "prefix": the program's own factors, by rewards
        that know what to say of unfinished texts (a `Reward.prefix`). "partial": the same, all other rewards scoring
        the text so far as it is. A learned `Twist`, or one a completion site by name. A `LanguageModel`, trained by
        `SVI`: its log-ratio to the prior; it then proposes too, unless ``proposal`` says otherwise.
    :param proposal: the law of the next token. "prior"; "twist": the law that the twist induces on the ``top_k``
        likeliest tokens; a `LanguageModel`, or a guide that has a ``policy``. None is "prior", or the twist's policy.
    :param top_k: see ``proposal``.
    :param resampling: "systematic", "stratified", "residual" or "multinomial".
    :param ess_threshold: resample where the ESS falls below this share of the particles; 0 never, 1 at every token.
    :param retained: exact draws of the posterior (by `RejectionSampling`, or `Exact`). Chain i then holds the i-th
        from beginning to end (conditional SMC, with multinomial resampling), and its log Z is a bound from above.
    :param seed, progress: as in `ImportanceSampling`.
    """

    num_particles: int = 64
    num_chains: int = 1
    twist: str | Twist | Mapping[str, str | Twist] | LanguageModel | None = None
    proposal: str | LanguageModel | Callable[..., Any] | None = None
    top_k: int = 64
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    retained: Posterior | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_particles", "num_chains", "top_k")
        check_resampling(self)
        check_retained(self)
        if self.twist is not None and not isinstance(self.twist, LanguageModel):
            for twist in self.twist.values() if isinstance(self.twist, Mapping) else [self.twist]:
                if twist not in ("prefix", "partial") if isinstance(twist, str) else not hasattr(twist, "lookahead"):
                    raise ValueError(
                        'SMC: twist must be "prefix", "partial", a Twist, a mapping from sites to these, or a '
                        f"LanguageModel, got {twist!r}"
                    )
        named = isinstance(self.proposal, str)
        if named and self.proposal not in ("prior", "twist"):
            raise ValueError(f'SMC: proposal must be "prior", "twist" or a policy, got {self.proposal!r}')
        if not named and self.proposal is not None and _policy_of(self.proposal) is None:
            raise ValueError("SMC: a guide as proposal needs a `policy`, the LanguageModel that writes completions")
        if self.proposal == "twist" and not self.twist:
            raise ValueError('SMC: proposal="twist" needs a twist')

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats``, a step being a token: ``ess_by_step`` (chain, step, prompt) before resampling, ``resampled`` (chain,
        step, prompt), and ``ancestors`` (chain, step, draw, prompt), the genealogy. Ctrl-C keeps the islands that are
        complete, and so does an error, as its ``particles``.

        :raises EvidenceError: if all particles of a prompt die: says where, of what, and what was alive until then.
        :raises ProgramError: if the program cannot be split: its particles depend on one another.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            at_once = max(1, program.max_particles // self.num_particles)
            exact = None if self.retained is None else retained_values(program, self.retained, self.num_chains)
            done: list[tuple[Islands, Particles]] = []
            length = sum(site.fn.max_new_tokens for site in program.completions)
            rounds = range(0, self.num_chains, at_once)

            def so_far() -> SoFar | None:
                return SoFar(particles=Particles.concatenate([particles for _, particles in done])) if done else None

            with track("SMC", length * len(rounds), self.progress) as report, keeping(so_far) as run:
                for first in rounds:
                    chains = min(at_once, self.num_chains - first)
                    islands = Islands(
                        program,
                        chains,
                        self.num_particles,
                        scheme=self.resampling,
                        threshold=self.ess_threshold,
                        alone=chains == self.num_chains,
                        retained=exact and {name: value[first : first + chains] for name, value in exact.items()},
                    )
                    done.append((islands, self._run(islands, report)))
            return posterior(
                program,
                Particles.concatenate([particles for _, particles in done]),
                engine="SMC",
                kind="particles",
                num_chains=sum(islands.chains for islands, _ in done),
                log_weights=torch.cat([islands.total for islands, _ in done]),
                roots=torch.cat([islands.roots for islands, _ in done]),
                conditional=self.retained is not None,
                stats=watch.stats()
                | Islands.record([islands for islands, _ in done])
                | {"interrupted": run.interrupted},
            )

    @torch.no_grad()
    def _run(self, islands: Islands, report: Callable[..., None]) -> Particles:
        """Particles of a few islands, from the program's beginning to its end."""
        history = islands.history
        while not history.complete:
            name, law = history.advance()
            islands.weigh_terms(history.likelihood, f"the beginning of {name!r}")
            self._write(islands, name, law, report)
        return islands.finish()

    def _write(self, islands: Islands, name: str, law: Autoregressive, report: Callable[..., None]) -> None:
        """The completion of one site, token by token."""
        history = islands.history
        history.begin(name, law)
        steps, rows, policies = law.decoder(), Rows(history.program, name, law), self._policies(law)
        twist = self._twist(history, name, rows, steps, policies)
        proposer = policies.get(id(self._proposer))
        kept = islands.kept(name)
        psi = torch.zeros_like(islands.log_weights)
        while not steps.done:
            logits = steps.logits
            if proposer is not None:
                logits = proposer.logits
            elif self.proposal == "twist" and twist is not None:
                logits = induced(logits, twist, self.top_k)
            token, log_q = categorical(logits)
            if kept is not None:
                token[kept.rows] = kept.values[:, steps.t].clamp(0, logits.shape[-1] - 1)  # padding: of one that ended
                log_q = log_softmax_at(logits, token)
            log_p = log_q if logits is steps.logits else log_softmax_at(steps.logits, token)
            ratio = torch.where(steps.finished, 0.0, log_p - log_q)
            for policy in policies.values():
                policy.append(token, log_q if policy is proposer else log_softmax_at(policy.logits, token))
            steps.append(token, log_p)
            increment, parts, factors = rows.pooled(ratio), {"the proposal": ratio}, {}
            if twist is not None and steps.t < law.max_new_tokens:  # after the last token comes the truth
                now = twist.log_psi()
                increment, psi = increment + now - psi, now
                parts, factors = parts | {"the twist": now}, twist.factors
            islands.weigh(increment, Step(f"token {steps.t} of {name!r}", parts, factors, (law, steps)))
            if steps.t == law.max_new_tokens:
                break  # not resampled by weights that are about to change
            if (index := islands.resample()) is not None:
                psi = psi.gather(0, index)
                chosen = rows.chosen(index)
                for moved in (steps, *policies.values(), twist):
                    if moved is not None:
                        moved.select(chosen)
            report()
        islands.idle(max(1, law.max_new_tokens - steps.t))
        report(max(1, law.max_new_tokens - steps.t))
        islands.weigh(-psi, Step(f"the end of {name!r}", {"the twist": psi}, {}, (law, steps)))
        history.write(name, steps.values, steps.scores)

    @property
    def _proposer(self) -> Any:
        """The policy that proposes, if one does."""
        if self.proposal is None:
            return self.twist if isinstance(self.twist, LanguageModel) else None
        if isinstance(self.proposal, str):
            return None
        return _policy_of(self.proposal)

    def _policies(self, law: Autoregressive) -> dict[int, Decoder]:
        """Policies that read along, each once, though it be twist and proposal: their scores of what is written."""
        models = [lm for lm in (self._proposer, self.twist) if isinstance(lm, LanguageModel)]
        return {id(lm): law.with_model(lm).decoder() for lm in {id(lm): lm for lm in models}.values()}

    def _twist(
        self, history: PartialRun, name: str, rows: Rows, steps: Decoder, policies: dict[int, Decoder]
    ) -> SiteTwist | None:
        twist, program = self.twist, history.program
        if isinstance(twist, Mapping):
            if unknown := set(twist) - {site.name for site in program.completions}:
                raise ProgramError(f"a twist is for site {min(unknown)!r}, which is no completion of the program")
            twist = twist.get(name)
        if isinstance(twist, str):
            return PrefixTwist(history, rows, steps, partial=twist == "partial")
        if isinstance(twist, LanguageModel):
            return PolicyTwist(policies[id(twist)], rows, steps)
        if twist is None:
            return None
        so_far = PrefixTwist(history, rows, steps, partial=True) if twist.reads_reward else None
        return LearnedTwist(twist, rows, steps, so_far)


def _policy_of(proposal: Any) -> LanguageModel | None:
    """A policy, or the one that a guide has."""
    return proposal if isinstance(proposal, LanguageModel) else getattr(proposal, "policy", None)
