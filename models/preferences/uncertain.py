r"""A learned reward with its uncertainty, in four forms for use as a likelihood factor.

Weights w ~ p(w | D) were inferred from data D. Comparisons determine differences of rewards only, so every form is a
function of the margin over the typical completion of the same prompt, whose features are \bar f(c):

    \Delta_w(c, x) = w^T (f(c, x) - \bar f(c))

    mean       E_w[ \Delta_w ]
    draw       \Delta_w for one draw of w: posterior sampling (Thompson 1933)
    quantile   a lower quantile of \Delta_w: pessimism (Zhu, Jordan and Jiao 2023, arXiv 2301.11270, with \bar f as
               their reference; by ensembles, Coste et al. 2023, arXiv 2310.02743; Yang et al. 2024, arXiv 2402.13210)
    marginal   log E_w[ \sigma(\Delta_w) ], the log-probability, with w integrated out, that the completion is preferred
               to the typical one (log \sigma is the reward of Wang et al. 2024, arXiv 2402.00742, for one known w)

The reason for the marginal form. Marginalising a latent w with the factor \exp(\Delta_w / \beta) gives the reward

    \beta \log E_w[ \exp(\Delta_w / \beta) ]  >=  E_w[ \Delta_w ]      (Gaussian \Delta: mean + variance / (2 \beta))

which favours uncertain completions, the more so the smaller beta is: the factor is the likelihood of no observation,
and it changes the posterior of w towards large rewards (the optimism of control as inference, Levine 2018, arXiv
1805.00909). If this feedback is cut (Plummer 2015, "Cuts in Bayesian graphical models"), w ~ p(w | D) and x ~ \pi^*_w,
the result is the form ``draw`` averaged over seeds. But that a judge with weights w prefers x to the typical text *is*
an observation, with likelihood \sigma(\Delta_w) <= 1. All of 1 / beta judges, each a draw of p(w | D), prefer x with
probability E_w[\sigma(\Delta_w)]^{1 / \beta}, which is the factor of the marginal form with this beta. `JudgedLM` has
the judges as latents of the program that the completion is a latent of.

If the model of the reward is right, its posterior mean is the expected true reward of every x, so that no form does
better at the same KL than ``mean``, however strong the optimisation (a posterior mean has no optimiser's curse: Smith
and Winkler 2006). Over-optimisation (Gao, Schulman and Hilton 2022, arXiv 2210.10760) needs a model that is wrong away
from its data; w is uncertain there, and ``quantile`` and ``marginal`` give such completions low rewards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayeslm.checksums import verify
from bayeslm.files import atomic_folder, read_header, reading
from bayeslm.models.lm import LanguageModel, exclusive, read_tensors
from bayeslm.models.rewards import Reward, broadcast
from bayeslm.posterior import Posterior
from bayeslm.processes import is_first
from bayeslm.validation import Count, Seed, Within, validated

from .linear import LinearReward

Form = Literal["mean", "draw", "quantile", "marginal"]
FORMAT = 2
PROBE = (["The weather today is"], [" fine, and a walk would be good."])  # a text whose features identify them in files
MAX_MARGINS = 2**24  # margins computed at once: 64 MB


@validated
@dataclass(eq=False, repr=False)
class UncertainReward(Reward):
    """A learned reward in one of four forms.

    Rewards are log-odds against the typical completion, whose reward is 0; in the form ``marginal`` they are
    log-probabilities. Prompts are those of the features, usually strings.

    :param model: the program that the weights were inferred with, for its features.
    :param weights: draws of their posterior, equally weighted, (draw, d).
    :param form: "mean", "draw", "quantile" or "marginal", as described above.
    :param typical: features of the typical completion, (d,), or a mapping from prompts to them, see `centred`. None is
        0, the mean of `Standardised` features.
    :param level: the level of the quantile, between 0 and 1; below 0.5 is pessimistic.
    :param seed: selects the draw.
    :raises ValueError: if ``weights`` is not (draw, d) and finite, or a setting is out of range.
    """

    model: LinearReward[Any, Any]
    weights: Tensor
    form: Form
    typical: Tensor | Mapping[str, Tensor] | None = None
    level: Annotated[float, Within("(0, 1)")] = 0.1
    seed: Seed = 0

    def __post_init__(self) -> None:
        self.weights = torch.as_tensor(self.weights).float()
        if self.weights.ndim != 2 or 0 in self.weights.shape or not self.weights.isfinite().all():
            raise ValueError(f"weights must be finite and of shape (draw, d), got {tuple(self.weights.shape)}")
        if self.form == "marginal":
            self._bound(0.0, None)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        self._draw = int(torch.randint(len(self.weights), (), generator=generator, device="cpu"))

    @classmethod
    @validated
    def from_posterior(
        cls, model: LinearReward[Any, Any], posterior: Posterior, form: Form, *, num_draws: Count = 256, **settings: Any
    ) -> UncertainReward:
        """Build the reward from a posterior: ``from_posterior(model, NUTS().run(model, comparisons), "mean")``.

        :param model: the program that the posterior is of.
        :param posterior: weighted draws are resampled to equal weights.
        :param form: see `UncertainReward`.
        :param num_draws: largest number of draws to keep, evenly spaced.
        :param settings: the other parameters of `UncertainReward`.
        :raises ValueError: if the posterior has no site ``weights`` of event shape (d,), or ``num_draws`` < 1.
        """
        if getattr(posterior.samples.get("weights"), "ndim", 0) != 3:
            raise ValueError(
                f"the posterior has no site 'weights' of event shape (d,), its sites are {list(posterior.samples)}"
            )
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
        """Return this reward with the mean features of the prior's completions of each prompt as ``typical``.

        :param prior: the language model.
        :param prompts: all prompts that the reward will be used with.
        :param num_samples: number of completions drawn for each prompt.
        :param max_new_tokens: length of the longest completion, in tokens.
        :param temperature: divides the prior's logits.
        :param seed: seed of the completions; the global random state does not change.
        """
        with exclusive(), torch.random.fork_rng():
            torch.manual_seed(seed)
            completion = prior(list(prompts), max_new_tokens=max_new_tokens, temperature=temperature)
            texts = completion.decode(completion.sample(torch.Size([num_samples])))  # (sample, prompt)
        features = self.model.featurise(list(prompts) * num_samples, texts.ravel().tolist())
        mean = features.reshape(num_samples, len(prompts), -1).mean(0)
        return replace(self, typical=dict(zip(prompts, mean, strict=True)))

    def to_form(self, form: Form) -> UncertainReward:
        """Return this reward in another form."""
        return replace(self, form=form)

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        features = self._above_typical(prompts, completions)
        parts = features.split(max(1, MAX_MARGINS // len(self.weights)))
        scores: Sequence[float] = torch.cat([self._rewards(part) for part in parts]).tolist()
        return scores

    def margins(self, prompts: Any, completions: Any) -> Tensor:
        r"""Return \Delta_w for every draw, (*texts, draw), for a program to index by a latent draw.

        :param prompts: prompts that broadcast with ``completions`` to the shape ``texts``.
        :param completions: texts that broadcast with ``prompts``.
        :raises ValueError: if features and weights differ in their number d, or a prompt has no typical completion.
        """
        shape, _, (some_prompts, texts, _) = broadcast(prompts, completions, {})
        features = self._above_typical(some_prompts, texts)
        return (features @ self.weights.to(features.device).T).reshape(*shape, -1)

    def _rewards(self, features: Tensor) -> Tensor:
        """Return rewards (n,) for features (n, d) from which the typical ones were subtracted."""
        weights = self.weights.to(features.device)
        if self.form == "mean":
            return features @ weights.mean(0)
        if self.form == "draw":
            return features @ weights[self._draw]
        margins = features @ weights.T  # (n, draw)
        if self.form == "quantile":
            return margins.quantile(self.level, dim=-1)
        return log_mean_sigmoid(margins)

    def _above_typical(self, prompts: list[Any], completions: list[str]) -> Tensor:
        r"""Return f(c, x) - \bar f(c), (n, d)."""
        x = self.model.featurise(prompts, completions)
        if x.shape[-1] != self.weights.shape[-1]:
            raise ValueError(f"there are {x.shape[-1]} features, but {self.weights.shape[-1]} weights")
        if self.typical is None:
            return x
        if isinstance(self.typical, Tensor):
            return x - self.typical.to(x)
        if unknown := next((prompt for prompt in prompts if prompt not in self.typical), None):
            raise ValueError(f"prompt {unknown!r:.60} has no typical completion: call `centred` with this prompt too")
        return x - torch.stack([self.typical[prompt] for prompt in prompts]).to(x)

    def __repr__(self) -> str:
        return f"UncertainReward({self.form!r}, {self.weights.shape[0]} draws of {self.weights.shape[1]} weights)"

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the reward without its features into a new folder: ``uncertain.json`` and ``uncertain.safetensors``.

        Of several processes that run together the first one writes alone.

        :raises FileExistsError: if the folder exists and is not empty.
        """
        if not is_first():
            return
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
    @validated
    def from_pretrained(cls, path: str | os.PathLike[str], model: LinearReward[Any, Any]) -> UncertainReward:
        """Read a reward that `save_pretrained` wrote.

        :param model: a program with the features that the weights belong to.
        :raises FileNotFoundError: if the folder holds no reward.
        :raises ValueError: if another version wrote it, or the program has other features.
        """
        config = read_header(path, "uncertain.json", FORMAT, "uncertain reward")
        with reading(Path(path) / "uncertain.json"):
            settings, prompts = dict(config["settings"]), config["prompts"]
        with reading(Path(path) / "uncertain.safetensors") as file:
            tensors = read_tensors(file)
            saved, weights = tensors["probe"], tensors["weights"]
        verify(Path(path))
        probe = model.featurise(*PROBE).cpu()
        if probe.shape != saved.shape or not torch.allclose(probe, saved, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the weights in {path} belong to other features: pass those, fitted to the same texts")
        rows = tensors.get("typical")
        with reading(Path(path) / "uncertain.json"):
            typical = rows if rows is None or prompts is None else dict(zip(prompts, rows, strict=True))
            return cls(model, weights, typical=typical, **settings)


def log_mean_sigmoid(margins: Tensor) -> Tensor:
    r"""Return log E_w[\sigma(\Delta_w)], the mean over the last axis."""
    return logsigmoid(margins).logsumexp(-1) - math.log(margins.shape[-1])
