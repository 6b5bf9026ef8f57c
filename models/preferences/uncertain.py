r"""A learned reward as evidence, with its uncertainty: four forms of one likelihood factor.

Weights w ~ p(w | D) were inferred from data D. Comparisons tell differences of rewards alone, so every form is of the
margin over the typical completion of the same prompt, which has features \bar f(c):

    \Delta_w(c, x) = w^T (f(c, x) - \bar f(c))

    mean       E_w[ \Delta_w ]
    draw       \Delta_w for one draw of w: posterior sampling (Thompson 1933)
    quantile   a lower quantile of \Delta_w: pessimism (Zhu, Jordan and Jiao 2023, arXiv 2301.11270, with \bar f for
               their reference; by ensembles, Coste et al. 2023, arXiv 2310.02743; Yang et al. 2024, arXiv 2402.13210)
    marginal   log E_w[ \sigma(\Delta_w) ], the log-probability, with w integrated out, that the completion is preferred
               to the typical one (log \sigma is the reward of Wang et al. 2024, arXiv 2402.00742, for one known w)

Why the marginal form is this. A latent w beside the factor \exp(\Delta_w / \beta) is marginalised to the reward

    \beta \log E_w[ \exp(\Delta_w / \beta) ]  >=  E_w[ \Delta_w ]      (Gaussian \Delta: mean + variance / (2 \beta))

which seeks what is unknown, the more so the smaller beta is: the factor is no likelihood of anything, and the wish for
reward revises w (the optimism of control as inference, Levine 2018, arXiv 1805.00909). Cutting that feedback (Plummer
2015, "Cuts in Bayesian graphical models"), w ~ p(w | D) and x ~ \pi^*_w, is the form ``draw`` averaged over seeds. But
that a judge with weights w prefers x to the typical text *is* a likelihood, \sigma(\Delta_w) <= 1. Of 1 / beta judges,
each a draw of p(w | D), all prefer x with probability E_w[\sigma(\Delta_w)]^{1 / \beta}, which is the marginal form at
temperature beta. `JudgedLM` has the judges as latents of the program that the completion is a latent of.

If the model of the reward is right, its mean is the expected true reward of every x, so that no form does better at the
same KL than ``mean``, however strong the optimisation (there is no optimiser's curse for a posterior mean: Smith and
Winkler 2006). Over-optimisation (Gao, Schulman and Hilton 2022, arXiv 2210.10760) needs a model that is wrong where no
data are; w is uncertain there, and ``quantile`` and ``marginal`` stay away.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayeslm.files import atomic_folder, read_header
from bayeslm.models.lm.language_model import LanguageModel
from bayeslm.posterior import Posterior

from ..rewards import Reward
from ..rewards.shapes import broadcast
from .linear import LinearReward

Form = Literal["mean", "draw", "quantile", "marginal"]
FORMAT = 1
PROBE = (["The weather today is"], [" fine, and a walk would be good."])  # tells other features at loading
CELLS = 2**24  # margins computed at once: 64 MB


@dataclass(eq=False, repr=False)
class UncertainReward(Reward):
    """A reward that was learned, in one of four forms; in units of log-odds, 0 for the typical completion but in the
    form ``marginal``, whose scores are log-probabilities.

    It takes prompts that its features take, as a rule strings.

    :param model: the program that the weights were inferred with, for its features.
    :param weights: draws of their posterior, equally weighted, (draw, d).
    :param form: "mean", "draw", "quantile" or "marginal", as above.
    :param typical: features of the typical completion, (d,), or those of each prompt, see `centred`. None is 0, the
        mean of features that are `Standardised`.
    :param level: which quantile, between 0 and 1; below 0.5 is pessimism.
    :param seed: which draw.
    :raises ValueError: if ``weights`` is not (draw, d) and finite, or a setting is not as above.
    """

    model: LinearReward[Any, Any]
    weights: Tensor
    form: Form
    typical: Tensor | Mapping[str, Tensor] | None = None
    level: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self.weights = torch.as_tensor(self.weights).float()
        if self.weights.ndim != 2 or 0 in self.weights.shape or not self.weights.isfinite().all():
            raise ValueError(f"weights must be finite and of shape (draw, d), got {tuple(self.weights.shape)}")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, got {self.level}")
        if self.form == "marginal":
            self._bound(0.0, None)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        self._drawn = int(torch.randint(len(self.weights), (), generator=generator, device="cpu"))

    @classmethod
    def from_posterior(
        cls, model: LinearReward[Any, Any], posterior: Posterior, form: Form, *, num_draws: int = 256, **settings: Any
    ) -> UncertainReward:
        """Of what an engine inferred with ``model``: ``from_posterior(model, NUTS().run(model, comparisons), "mean")``.

        :param num_draws: at most so many are kept, evenly spaced, of draws that are weighted equally by resampling.
        :param settings: the other parameters of `UncertainReward`.
        :raises ValueError: if the posterior has no site ``weights`` of event shape (d,), or ``num_draws`` < 1.
        """
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        if getattr(posterior.samples.get("weights"), "ndim", 0) != 3:
            raise ValueError(f"the posterior has no site 'weights' of event shape (d,), but {list(posterior.samples)}")
        draws = posterior.resample().samples["weights"]
        draws = draws.reshape(-1, draws.shape[-1])
        kept = np.linspace(0, len(draws) - 1, min(num_draws, len(draws))).astype(int)
        return cls(model, torch.as_tensor(draws[kept]), form, **settings)

    def centred(
        self,
        prior: LanguageModel,
        prompts: Sequence[str],
        *,
        num_samples: int = 256,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> UncertainReward:
        """The same, for these prompts, with the mean features of the prior's own completions as the typical ones.

        :param num_samples: completions of each prompt.
        :param max_new_tokens, temperature: as in `TiltedLM`.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            law = prior(list(prompts), max_new_tokens=max_new_tokens, temperature=temperature)
            texts = law.decode(law.sample(torch.Size([num_samples])))  # (sample, prompt)
        features = self.model.featurise(list(prompts) * num_samples, texts.ravel().tolist())
        mean = features.reshape(num_samples, len(prompts), -1).mean(0)
        return replace(self, typical=dict(zip(prompts, mean, strict=True)))

    def to_form(self, form: Form) -> UncertainReward:
        """The same reward in another form."""
        return replace(self, form=form)

    # -- evaluation ------------------------------------------------------------------------------------------

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        above = self._above_typical(prompts, completions)
        parts = above.split(max(1, CELLS // len(self.weights)))
        scores: Sequence[float] = torch.cat([self._of(part) for part in parts]).tolist()
        return scores

    def margins(self, prompts: Any, completions: Any) -> Tensor:
        r"""\Delta_w under every draw, (*texts, draw), for prompts and completions that broadcast to ``texts``.

        What programs index by a latent draw.

        :raises ValueError: if features are of another width than the weights, or a prompt has no typical completion.
        """
        shape, _, (some_prompts, texts, _) = broadcast(prompts, completions, {})
        above = self._above_typical(some_prompts, texts)
        return (above @ self.weights.to(above.device).T).reshape(*shape, -1)

    def _of(self, above: Tensor) -> Tensor:
        """Scores (n,) of features (n, d) above the typical ones."""
        weights = self.weights.to(above.device)
        if self.form == "mean":
            return above @ weights.mean(0)
        if self.form == "draw":
            return above @ weights[self._drawn]
        margins = above @ weights.T  # (n, draw)
        if self.form == "quantile":
            return margins.quantile(self.level, dim=-1)
        return log_mean_win(margins)

    def _above_typical(self, prompts: list[Any], completions: list[str]) -> Tensor:
        r"""f(c, x) - \bar f(c), (n, d)."""
        x = self.model.featurise(prompts, completions)
        if x.shape[-1] != self.weights.shape[-1]:
            raise ValueError(f"features have {x.shape[-1]} numbers, and the weights are {self.weights.shape[-1]}")
        if self.typical is None:
            return x
        if isinstance(self.typical, Tensor):
            return x - self.typical.to(x)
        if unknown := next((prompt for prompt in prompts if prompt not in self.typical), None):
            raise ValueError(f"no typical completion of {unknown!r:.60} is known: use `centred` with this prompt too")
        return x - torch.stack([self.typical[prompt] for prompt in prompts]).to(x)

    def __repr__(self) -> str:
        return f"UncertainReward({self.form!r}, {self.weights.shape[0]} draws of {self.weights.shape[1]} weights)"

    # -- files -----------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write all but the features into a new folder: ``uncertain.json`` and ``uncertain.safetensors``.

        :raises FileExistsError: if the folder exists and is not empty.
        """
        tensors, prompts = {"weights": self.weights, "probe": self.model.featurise(*PROBE)}, None
        if isinstance(self.typical, Tensor):
            tensors["typical"] = self.typical
        elif self.typical is not None:
            prompts = list(self.typical)
            tensors["typical"] = torch.stack([self.typical[prompt] for prompt in prompts])
        settings = {"form": self.form, "level": self.level, "seed": self.seed}
        config = {"format": FORMAT, "settings": settings, "prompts": prompts}
        with atomic_folder(path) as folder:
            (folder / "uncertain.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, folder / "uncertain.safetensors")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model: LinearReward[Any, Any]) -> UncertainReward:
        """Read what `save_pretrained` wrote, for a program with the features that the weights are of.

        :raises FileNotFoundError: if there is no such reward.
        :raises ValueError: if another version wrote it, or the program has other features.
        """
        config = read_header(path, "uncertain.json", FORMAT, "uncertain reward")
        tensors = load_file(Path(path) / "uncertain.safetensors")
        probe = model.featurise(*PROBE).cpu()
        if probe.shape != tensors["probe"].shape or not torch.allclose(probe, tensors["probe"], rtol=1e-3, atol=1e-3):
            raise ValueError(f"the weights in {path} are of other features: give those, fitted to the same texts")
        saved = tensors.get("typical")
        typical: Tensor | dict[str, Tensor] | None = saved
        if saved is not None and config["prompts"] is not None:
            typical = dict(zip(config["prompts"], saved, strict=True))
        return cls(model, tensors["weights"], typical=typical, **config["settings"])


def log_mean_win(margins: Tensor) -> Tensor:
    r"""log E_w[\sigma(\Delta_w)] over the last axis."""
    return logsigmoid(margins).logsumexp(-1) - math.log(margins.shape[-1])


class JudgedLM:
    r"""A Pyro program: ``completion`` ~ prior, and judges, each a latent draw of the weights, prefer it.

        judge_k ~ p(w | D),   x ~ p(x | c),   preferred_k ~ Bernoulli(\sigma(\Delta_{judge_k}(c, x))) observed to be 1

    The completion's posterior is that of ``TiltedLM(prior, reward, beta=1 / judges)`` with the reward in its form
    ``marginal``, and engines infer the judges with it. ``score`` is that reward. Of the reward given, the form does not
    matter.

    :param prior, max_new_tokens, temperature: as in `TiltedLM`.
    :param judges: how many of each completion: 1 / beta.
    :raises ValueError: if ``judges`` or ``max_new_tokens`` < 1.
    """

    def __init__(
        self,
        prior: LanguageModel,
        reward: UncertainReward,
        judges: int = 1,
        *,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
    ) -> None:
        for name, count in (("judges", judges), ("max_new_tokens", max_new_tokens)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.prior = prior
        self.reward = reward
        self.judges = judges
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, prompts: Sequence[str], /) -> None:
        """Run the program."""
        law = self.prior(prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        judges = pyro.plate("judges", self.judges, dim=-2)
        with pyro.plate("prompts", len(prompts), dim=-1):
            with judges:
                equal = torch.zeros(len(self.reward.weights), device=self.prior.device)
                judge = pyro.sample("judge", dist.Categorical(logits=equal))  # (judge, prompt)
            x = pyro.sample("completion", law)
            margins = self.reward.margins(prompts, self.prior.decode(x)).to(x.device)  # (prompt, draw)
            pyro.deterministic("score", log_mean_win(margins), event_dim=0)
            with judges:
                preferred = dist.Bernoulli(logits=Vindex(margins)[..., judge])
                pyro.sample("preferred", preferred, obs=margins.new_ones(()).expand(judge.shape))
