r"""Twisted sequential Monte Carlo: completions are written token by token, and weighted and resampled meanwhile.

For t = 1, ..., T, on N particles, with a twist \psi_t (\psi_0 = 1) and a proposal q:

    x_t ~ q( . | x_{1:t-1})
    w_t = w_{t-1}  p(x_t | x_{1:t-1}) / q(x_t | x_{1:t-1})  \psi_t(x_{1:t}) / \psi_{t-1}(x_{1:t-1})
    where ESS(w) < threshold:  Z <- Z mean(w),  ancestors ~ resampling(w),  w = 1

(or the first line and the last are one: the texts that are longer by a token are chosen among all of them, without a
repetition, see `sequential.branching`)

and at the end exp(r / beta) replaces the twist. E[\hat Z] = Z for any twist and any proposal; a good twist makes \hat Z
precise (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546; Lew et al. 2023, "SMC steering", arXiv
2306.03081; with the optimal \psi_t = E_p[exp(r / beta) | x_{1:t}] and the proposal it induces, sampling is exact).
Without a twist all weights come at the end, and the algorithm is importance sampling (of several completions, those
with factors between them are resampled there). By default a twist is learned from the first particles of the run,
which are draws of the prior, and is used for the others if it was found to help; all count, and E[\hat Z] = Z whatever
has been learned (`sequential.first_draws` has the mathematics).

The program may be any Pyro program: latents before a completion are part of a particle and are resampled with it,
several completions are written one after another, and prompts that are posteriors of their own are resampled
separately, but share each forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import (
    PartialRun,
    Particles,
    Program,
    ProgramError,
    SoFar,
    gathered,
    inspect,
    keeping,
    of_prompts,
    posterior,
    ranks,
    running,
)
from bayeslm.inference.sequential import (
    Chains,
    ConstraintTwist,
    FirstDraws,
    LearnedTwist,
    PolicyTwist,
    Population,
    Power,
    PowerTwist,
    PrefixTwist,
    Resampling,
    SiteRows,
    SiteTwist,
    TokenConstraint,
    TokenProposal,
    WeightUpdate,
    check_retained,
    constraint_of,
    draw_first,
    groups_of,
    number_of_first,
    retained_values,
    with_factor,
)
from bayeslm.models.lm import Autoregressive, Decoder, LanguageModel, Twist, log_softmax_at
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Seed, Share, validated

NAMED = ("prefix", "partial")  # twists
FEW = 8  # particles that are resampled together, of which a warning is given


class Island(NamedTuple):
    """Chains that ran at once: a population for each part of the prompts (`Program.parts`), and particles of all."""

    populations: list[Population]
    particles: Particles


@validated
@dataclass(frozen=True)
class SMC:
    """Weighted particles that are resampled while their completions are written.

    :param num_particles: the number of particles in each chain.
    :param num_chains: the number of independent chains (islands), each resampled within itself; whether they agree is
        a check that one chain cannot give. As many run at once as bounded memory allows. Where one does not fit, it
        writes the completions of some prompts after those of others. Where the particles of one prompt do not fit, or,
        of prompts that share a latent, those of all, they are resampled in groups, whose estimates of Z are averaged.
    :param twist: the twist that weights unfinished texts. "auto": one that is learned from the first quarter of each
        chain's particles, draws of the prior, for the others; it is then also their proposal, unless ``proposal`` is
        "prior". Where it does not lower the variance of the weights on draws that are held out, it is not used, and
        all particles are draws of the prior. None is learned where all chains have fewer than 512 particles, or so many
        or so long prompts that its draws would have over 32768 tokens, where ``proposal`` is a policy, with
        ``resampling="optimal"``, and of programs with factors before the completion or several completions. None: 1,
        which makes SMC importance sampling. "prefix": exp of the program's own factors, by the ``prefix`` methods of
        its rewards (`Reward.prefix`). "partial": the same, except that rewards without such a method score the text so
        far as if it were finished. A `Twist` (from `TwistLearning`); a `Power`, for programs
        that raise the language model to one; a `Grammar` or `Constraint`, for programs that have it as a factor; or a
        mapping from the names of completion sites to any of these. A `LanguageModel` (trained by `SVI`): its ratio to
        the prior. This, a `Power` and a constraint are then the proposal too, unless ``proposal`` is set.
    :param proposal: the distribution of the next token. "prior"; "twist", the distribution that the twist induces on
        the ``top_k`` likeliest tokens; a `LanguageModel`; or a guide with a `LanguageModel` as its ``policy``. None is
        the twist if that is a `LanguageModel`, and else "prior".
    :param top_k: the number of tokens at which ``proposal="twist"`` evaluates the twist; the others keep their
        probability under the prior.
    :param resampling: "systematic", "stratified", "residual" or "multinomial"; or "optimal", which keeps, of all texts
        that are longer by a token, the heaviest ones and a sample of the others, each once, at every token. It is more
        precise where few texts have most of the mass, as under a `Grammar` or a `Power`. The particles of a chain then
        count as one draw, and errors are those of chains that differ: they need several, better 20.
    :param ess_threshold: resample where the effective sample size is below this share of the particles; 0 never
        resamples, 1 resamples at every token. Optimal resampling has no threshold.
    :param retained: exact draws of the posterior, by `RejectionSampling` or `Exact` on the same program, at least one
        for each chain. Then particle 0 of chain c is the c-th of them from beginning to end (conditional SMC, with
        multinomial resampling), and the chain's log Z is an upper bound in expectation.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range or of the wrong type.
    """

    num_particles: Count = 64
    num_chains: Count = 4
    twist: (
        str
        | Twist
        | Power
        | TokenConstraint
        | Mapping[str, str | Twist | Power | TokenConstraint]
        | LanguageModel
        | None
    ) = "auto"
    proposal: str | LanguageModel | Callable[..., Any] | None = None
    top_k: Count = 64
    resampling: Resampling | Literal["optimal"] = "systematic"
    ess_threshold: Share = 0.5
    retained: Posterior | None = None
    seed: Seed | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_retained(self)
        if self.resampling == "optimal" and self.retained is not None:
            raise ValueError(
                'SMC: a run with retained draws resamples by its own scheme: leave out resampling="optimal"'
            )
        if self.twist is not None and not isinstance(self.twist, LanguageModel):
            each = self.twist.values() if isinstance(self.twist, Mapping) else [self.twist]
            for twist in each if self.twist != "auto" else []:
                is_twist = isinstance(twist, Power | TokenConstraint) or hasattr(twist, "lookahead")
                if twist not in NAMED if isinstance(twist, str) else not is_twist:
                    raise ValueError(
                        'SMC: twist must be "auto", "prefix", "partial", a Twist, a Power, a Grammar or Constraint, a '
                        f"mapping from sites to these, or a LanguageModel, got {twist!r}"
                    )
        named = isinstance(self.proposal, str)
        if named and self.proposal not in ("prior", "twist"):
            raise ValueError(f'SMC: proposal must be "prior", "twist" or a policy, got {self.proposal!r}')
        if not named and self.proposal is not None and _policy_of(self.proposal) is None:
            raise ValueError(f"SMC: a guide as proposal needs a `policy`, a LanguageModel, got {self.proposal!r}")
        if self.proposal == "twist" and not self.twist:
            raise ValueError(f'SMC: proposal="twist" needs a twist, got twist={self.twist!r}')

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``.

        ``stats``, where a step is a token: ``ess_by_step`` (chain, step, prompt), the effective sample size before
        resampling; ``resampled`` (chain, step, prompt); ``ancestors`` (chain, step, draw, prompt), the genealogy;
        ``constrained``, whether a constraint is a twist; ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``;
        where a twist was learned, ``twist_gain``, its ``gain`` by site (`TwistLearning`), and ``twist_seconds`` of
        drawing the first particles and learning. After Ctrl-C the posterior has the chains that were complete.

        :raises EvidenceError: if all particles of a prompt get weight 0; the message has the token and the factors,
            and ``survivors`` the texts before it.
        :raises ProgramError: if a weight is NaN or +inf, if particles depend on one another, or if a twist or retained
            draws are not for this program, such as a `Grammar` that is no factor of it.
        :raises RunError: if an error stops the run after the first chains; it carries their particles.
        """
        with running(self.seed, divided=True) as watch:
            program = inspect(model, *args, **kwargs)
            watch.check_together(program, self, num_chains=self.num_chains)
            own_chains = ranks().rows(self.num_chains)
            first = self._first_draws(program, len(range(own_chains.start, own_chains.stop)))
            settings = self._with_learned(first.twists)
            lost = first.number if first.are_lost else 0
            others = range(first.number, self.num_particles)
            groups, prompts = groups_of(program, others, retains=self.retained is not None)
            if len(groups) > 1 and len(groups[0]) < FEW and self.ess_threshold > 0:
                warnings.warn(
                    f"SMC: one pass holds {len(groups[0])} of the {self.num_particles} particles of a chain, which are "
                    "resampled in groups of so many: that few gain little by it. Give shorter prompts, fewer new "
                    "tokens, or a language model with a larger batch_size; or use ImportanceSampling",
                    stacklevel=2,
                )
            parts = program.parts(prompts)
            at_once = max(1, parts[0].max_particles // self.num_particles)
            retained = None if self.retained is None else retained_values(program, self.retained, self.num_chains)
            done: list[Island] = []
            length = sum(site.fn.max_new_tokens for site in program.completions)
            rounds = range(own_chains.start, own_chains.stop, at_once)
            passes = len(rounds) * len(groups) * (1 if program.shared else -(-program.num_prompts // prompts))

            def so_far() -> SoFar | None:
                return SoFar(particles=Particles.concatenate([island.particles for island in done])) if done else None

            plan = f"{self.num_chains} chains of {self.num_particles} particles {of_prompts(program)}, {length} tokens"
            with (
                track("SMC", length * passes, self.progress, plan=plan) as report,
                keeping(so_far) as run,
            ):
                for start in rounds:
                    num = min(at_once, own_chains.stop - start)
                    own = retained and {name: value[start : start + num] for name, value in retained.items()}
                    islands = []
                    for group in groups:
                        populations = [
                            Population(
                                part, self, chains=num, group=group, lost=lost, retained=own and _of_part(part, own)
                            )
                            for part in parts
                        ]
                        particles = [settings._run(population, prompts, report) for population in populations]
                        whole = particles[0] if len(parts) == 1 else Particles.side_by_side(program, particles)
                        islands.append(Island(populations, whole))
                        own = None
                    done += islands

            def of_all(of: Callable[[Population], Tensor]) -> Tensor:
                return torch.cat([torch.cat([of(part) for part in island.populations], 1) for island in done])

            weights = of_all(lambda population: population.total_log_weights)
            of_parts = zip(*[island.populations for island in done], strict=True)
            stats = [Population.stats(part, len(groups)) for part in of_parts]
            chains = first.before(
                Chains(
                    number=len(weights) // (self.num_particles - first.number),
                    particles=Particles.concatenate([island.particles for island in done]),
                    log_weights=weights,
                    roots=of_all(lambda population: population.roots),
                    records={name: np.concatenate([each[name] for each in stats], -1) for name in stats[0]},
                )
            )
            weights = ranks().joined(chains.log_weights)
            found = posterior(
                program,
                gathered([chains.particles], program.device),
                engine="SMC",
                kind="particles",
                num_chains=len(weights) // self.num_particles,
                log_weights=weights,
                roots=ranks().joined(chains.roots),
                conditional=self.retained is not None,
                stats=watch.stats()
                | {name: ranks().joined_array(x) for name, x in chains.records.items()}
                | ranks().first(first.stats()).value
                | {"interrupted": ranks().any(run.interrupted), "constrained": self._is_constrained},
            )
            return with_factor(found, self.twist) if self._is_constrained else found

    def _first_draws(self, program: Program, num_chains: int) -> FirstDraws:
        """Return the first particles of so many chains, with the twists that are learned from them, or no particles.

        A run that retains draws learns from particles of the prior as well, which are then not among its own.
        """
        if self.twist != "auto" or self.resampling == "optimal" or _policy_of(self.proposal) is not None:
            return FirstDraws()
        number = number_of_first(program, self.num_particles, self.num_chains)
        if not number:
            return FirstDraws()
        first = draw_first(program, number, num_chains, progress=self.progress)
        return first if self.retained is None else first._replace(number=0)

    def _with_learned(self, twists: dict[str, Twist]) -> SMC:
        """Return the settings with twists that have been learned in the place of "auto"."""
        if self.twist != "auto":
            return self
        if twists:
            return replace(self, twist=twists, proposal=self.proposal or "twist")
        is_induced = isinstance(self.proposal, str) and self.proposal == "twist"
        return replace(self, twist=None, proposal=None if is_induced else self.proposal)

    @torch.no_grad()
    def _run(self, population: Population, prompts: int, report: Callable[..., None]) -> Particles:
        """Run the chains of a population from the program's beginning to its end.

        :param prompts: of how many the completions are written at once.
        """
        partial_run = population.partial_run
        while not partial_run.complete:
            name, distribution = partial_run.advance()
            population.weigh_terms(partial_run.likelihood, f"the beginning of {name!r}")
            parts = population.parts(prompts)
            for part in parts:
                self._write(part, name, part.partial_run.of_own(distribution), report)
            population.join(parts)
        return population.finish()

    def _write(
        self, population: Population, name: str, distribution: Autoregressive, report: Callable[..., None]
    ) -> None:
        """Write the completions of one site, token by token."""
        partial_run, length = population.partial_run, distribution.max_new_tokens
        partial_run.begin(name, distribution)
        decoder, policies = distribution.decoder(), self._policies(distribution)
        rows = SiteRows(partial_run.program, name, distribution)
        twist = self._twist(partial_run, name, rows, decoder, policies)
        proposer = policies.get(id(self._proposer))
        proposal = TokenProposal(decoder, proposer, twist if self._proposes(twist) else None, self.top_k)
        retained = population.retained_rows(name)
        log_psi = torch.zeros_like(population.log_weights)
        branches = self.resampling == "optimal"
        if branches:
            rows.check_one_of_each()
            if not partial_run.values:
                population.merge()

        def select(index: Tensor) -> Tensor:
            """Replace the particles by their ancestors (particle, prompt), and return the indices of their rows."""
            nonlocal log_psi
            log_psi = log_psi.gather(0, index)
            selected = rows.selected(index)
            for moved in (decoder, *policies.values(), twist):
                if moved is not None:
                    moved.select(selected)
            return selected

        while not decoder.done:
            given = None
            if retained is not None:  # clamped, because the pad token of an ended text may be out of the vocabulary
                tokens = retained.values[:, decoder.t].clamp(0, distribution.vocabulary.size - 1)
                given = (retained.rows, tokens)
            if branches:
                every = proposal.log_q()
                index, token = population.branch(every)
                token = token.reshape(-1)
                log_q = every[select(index)].gather(-1, token[:, None])[:, 0]
                log_p = log_softmax_at(decoder.logits, token)
            else:
                token, log_q, log_p = proposal.draw(given)
            log_ratio = torch.where(decoder.finished, 0.0, log_p - log_q)
            for policy in policies.values():
                policy.append(token, log_q if policy is proposer else log_softmax_at(policy.logits, token))
            decoder.append(token, log_p)
            increment, parts, factors, explain = rows.pooled(log_ratio), {"the proposal": log_ratio}, {}, None
            if twist is not None and decoder.t < length:  # after the last token come the program's own factors
                last, log_psi = log_psi, twist.log_psi()
                increment = increment + log_psi - last
                parts, factors = parts | {"the twist": log_psi}, twist.factors
                explain = twist.check if isinstance(twist, PrefixTwist) else None
            step = f"token {decoder.t} of {name!r}"
            population.weigh(increment, WeightUpdate(step, parts, factors, (distribution, decoder), explain))
            if decoder.t == length:
                break  # without resampling by weights that are about to change
            if not branches and (ancestors := population.resample()) is not None:
                select(ancestors)
            report()
        left = max(1, length - decoder.t)
        population.record_without_resampling(length - decoder.t if branches else left)
        report(left)
        population.weigh(
            -log_psi, WeightUpdate(f"the end of {name!r}", {"the twist": log_psi}, {}, (distribution, decoder))
        )
        partial_run.write(name, decoder.values, decoder.scores)

    def _proposes(self, twist: SiteTwist | ConstraintTwist | None) -> bool:
        """Whether a site's twist is the proposal too."""
        return self.proposal == "twist" or (self.proposal is None and isinstance(twist, PowerTwist | ConstraintTwist))

    @property
    def _is_constrained(self) -> bool:
        """Whether a constraint is the twist of a site."""
        twists = self.twist.values() if isinstance(self.twist, Mapping) else [self.twist]
        return any(isinstance(twist, TokenConstraint) for twist in twists)

    @property
    def _proposer(self) -> Any:
        """The policy that is the proposal, or None if none is."""
        if self.proposal is None:
            return self.twist if isinstance(self.twist, LanguageModel) else None
        if isinstance(self.proposal, str):
            return None
        return _policy_of(self.proposal)

    def _policies(self, distribution: Autoregressive) -> dict[int, Decoder]:
        """Return a decoder for each policy, by its id: one for a policy that is both twist and proposal."""
        models = {id(lm): lm for lm in (self._proposer, self.twist) if isinstance(lm, LanguageModel)}
        return {key: distribution.with_model(lm).decoder() for key, lm in models.items()}

    def _twist(
        self, partial_run: PartialRun, name: str, rows: SiteRows, decoder: Decoder, policies: dict[int, Decoder]
    ) -> SiteTwist | ConstraintTwist | None:
        """Return the twist of one site, or None if it has none."""
        twist, program = self.twist, partial_run.program
        if isinstance(twist, Mapping):
            if unknown := set(twist) - {site.name for site in program.completions}:
                raise ProgramError(f"a twist is for site {min(unknown)!r}, which is no completion of the program")
            twist = twist.get(name)
        if isinstance(twist, str):
            return PrefixTwist(partial_run, rows, decoder, partial=twist == "partial")
        if isinstance(twist, Power):
            return PowerTwist(twist, rows, decoder)
        if isinstance(twist, TokenConstraint):
            if twist is self.twist:
                constraint_of(twist, program)  # refuses a program of several completions
            return ConstraintTwist(twist, rows, decoder)
        if isinstance(twist, LanguageModel):
            return PolicyTwist(policies[id(twist)], rows, decoder)
        if twist is None:
            return None
        prefix_twist = PrefixTwist(partial_run, rows, decoder, partial=True) if twist.reads_reward else None
        return LearnedTwist(twist, rows, decoder, prefix_twist)


def _of_part(part: Program, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values (chain, *batch, *event) by site of the prompts of a part of a program."""
    if part.shared or part.prompt_dim is None:
        return values
    axes = {name: 1 + part.sites[name].dims.index("prompt") for name in values}
    return {name: value.narrow(axes[name], part.first, part.num_prompts) for name, value in values.items()}


def _policy_of(proposal: Any) -> LanguageModel | None:
    """Return a policy: the proposal itself, or that of a guide."""
    return proposal if isinstance(proposal, LanguageModel) else getattr(proposal, "policy", None)
