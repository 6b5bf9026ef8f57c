r"""A learned twist: a small head on the prior's hidden states that guesses what an unfinished text will be worth.

    \log \psi_t(x_{1:t})  ~  \log E_p[ exp(r(x) / beta) | x_{1:t} ]

(Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546). It reads three features of a text so far: the last
hidden state h_t of the prior, projected on its principal components; a sum over the tokens written,
\sum_s gelu(A e(x_s)), which carries what a last hidden state has long forgotten (many rewards are sums over words); and
t / T. From these come the value of the text, and, with the embedding e(v) of a next token v, the value of the text
that v makes longer: a look ahead that costs no forward pass, for proposals.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from .autoregressive import Autoregressive
from .language_model import LanguageModel
from .network import extend
from .stepping import Steps

FORMAT = "bayeslm.twist/1"
# Heads learn E[L^a | x_1:t], L = exp(r / beta), for each of these powers a, and SMC reads that of the first. At a
# small beta few draws have any weight: their milder powers teach the shared features what all the others know.
POWERS = (1.0, 0.5, 0.25, 0.1)


class TwistState(NamedTuple):
    """Texts so far, one a row: ``hidden`` (row, width), ``total`` (row, inner), ``time`` and ``ended`` (row,)."""

    hidden: Tensor
    total: Tensor
    time: Tensor
    ended: Tensor

    def select(self, rows: Tensor) -> TwistState:
        """Row i becomes what row ``rows[i]`` is."""
        return TwistState(*(x[rows] for x in self))


class TwistInputs(NamedTuple):
    """Completions as the heads read them: ``hidden`` (row, token + 1, component), ``embedded`` (row, token, width), and
    ``time`` (row, token + 1), tokens written."""

    hidden: Tensor
    embedded: Tensor
    time: Tensor


class Twist(nn.Module):
    """log psi of unfinished completions of a language model; made by `bayeslm.inference.TwistLearning`.

    :param lm: the prior. Its weights are read, never changed, and not saved with the twist.
    :param max_new_tokens: of the completions, whose share is a feature.
    :param components: principal components of hidden states that are kept.
    :param inner: width of the sum over tokens.
    :param width: of the heads' one hidden layer.
    :param dropout: of the heads while they are trained.
    """

    mean: Tensor
    projection: Tensor
    token_mean: Tensor
    token_scale: Tensor
    offset: Tensor
    ahead_offset: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        max_new_tokens: int,
        *,
        components: int = 128,
        inner: int = 32,
        width: int = 32,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "components": components,
            "inner": inner,
            "width": width,
            "dropout": dropout,
        }
        self.stats: dict[str, Any] = {}
        """What training saw."""
        self._lm = [lm]  # in a list, so that its parameters are not the twist's
        embedding = _embedding(lm)
        dimension = int(lm.causal.hidden(*_probe(lm))[0].shape[-1])
        components = min(components, dimension)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("projection", torch.eye(dimension, components))
        self.register_buffer("token_mean", embedding.float().mean(0))
        self.register_buffer("token_scale", embedding.float().std(0, correction=0).clamp_min(1e-6))
        for name in ("offset", "ahead_offset"):  # of log psi_t, by t: they make its mean Z
            self.register_buffer(name, torch.zeros(max_new_tokens + 1))
        self.tokens = nn.Linear(embedding.shape[-1], inner)
        features = components + inner + 1
        self.value_in, self.value_out = nn.Linear(features, width), nn.Linear(width, len(POWERS))
        self.ahead_text = nn.Linear(features, width)
        self.ahead_token = nn.Linear(embedding.shape[-1], width, bias=False)
        self.ahead_out = nn.Linear(width, len(POWERS))
        self.dropout = nn.Dropout(dropout)
        for last in (self.value_out, self.ahead_out):  # begins as no twist at all
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.to(lm.device)
        self.eval()

    @property
    def lm(self) -> LanguageModel:
        return self._lm[0]

    @property
    def max_new_tokens(self) -> int:
        return int(self.settings["max_new_tokens"])

    # -- step by step, as SMC reads ------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, steps: Steps) -> TwistState:
        """The state of texts of which no token is written.

        :raises ValueError: if they are another language model's completions, or longer than the twist has seen.
        """
        law = steps.law
        if law.lm.vocab_size != self.lm.vocab_size or steps.hidden.shape[-1] != len(self.mean):
            raise ValueError("the twist was trained on the hidden states of another language model")
        if law.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"the twist was trained on completions of {self.max_new_tokens} tokens, not {law.max_new_tokens}"
            )
        rows = len(steps.values)
        total = torch.zeros((rows, self.tokens.out_features), device=self.mean.device)
        return TwistState(self._project(steps.hidden), total, total[:, 0].clone(), torch.zeros_like(steps.finished))

    @torch.no_grad()
    def read(self, state: TwistState, steps: Steps) -> TwistState:
        """The state after the token that was appended last; a text that had ended before stays as it was."""
        live = ~state.ended
        contribution = self._contribution(self._tokens(steps.values[:, steps.t - 1]))
        return TwistState(
            torch.where(live[:, None], self._project(steps.hidden), state.hidden),
            torch.where(live[:, None], state.total + contribution, state.total),
            torch.where(live, float(steps.t), state.time),
            steps.finished.clone(),
        )

    @torch.no_grad()
    def value(self, state: TwistState) -> Tensor:
        """log psi of the texts so far, (row,)."""
        value = self.value_of(self._features(state.hidden, state.total, state.time))[..., 0]
        return value + self.offset[state.time.long()]

    @torch.no_grad()
    def lookahead(self, state: TwistState, tokens: Tensor) -> Tensor:
        """log psi of the texts so far with each of ``tokens`` (row, k) behind them, (row, k)."""
        features = self._features(state.hidden, state.total, state.time)
        after = self.ahead_offset[(state.time.long() + 1).clamp_max(self.max_new_tokens)]
        return self.ahead_of(features[:, None], self._tokens(tokens))[..., 0] + after[:, None]

    # -- whole completions, as training reads --------------------------------------------------------------------

    @torch.no_grad()
    def inputs(self, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> TwistInputs:
        """What the heads read of completions.

        :param hidden: hidden states (row, token + 1, width), see `hidden_states`.
        :param tokens: completions (row, token).
        :param lengths: (row,) of their tokens: what comes after a text's end is as at its end.
        """
        time = torch.arange(tokens.shape[-1] + 1, device=tokens.device).expand(len(tokens), -1)
        time = time.minimum(lengths[:, None])
        hidden = self._project(hidden).gather(1, time[..., None].expand(-1, -1, self.projection.shape[-1]))
        return TwistInputs(hidden, self._tokens(tokens), time)

    def features(self, of: TwistInputs) -> Tensor:
        """Features (row, token + 1, feature) after 0, 1, ... tokens, with gradient."""
        total = pad(self._contribution(of.embedded), (0, 0, 1, 0)).cumsum(1)
        total = total.gather(1, of.time[..., None].expand_as(total))
        return self._features(of.hidden, total, of.time.float())

    def value_of(self, features: Tensor) -> Tensor:
        """log psi but for its offset, of features (..., feature): (..., power)."""
        return self.value_out(self.dropout(gelu(self.value_in(features))))

    def ahead_of(self, features: Tensor, embedded: Tensor) -> Tensor:
        """log psi but for its offset, of features (..., feature) with the token (..., width) behind: (..., power)."""
        return self.ahead_out(self.dropout(gelu(self.ahead_text(features) + self.ahead_token(embedded))))

    @torch.no_grad()
    def fit_projection(self, hidden: Tensor) -> None:
        """Keep the principal components of hidden states (row, width), each of variance 1."""
        hidden = hidden.float()
        self.mean.copy_(hidden.mean(0))
        centred = hidden - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept = slice(-self.projection.shape[-1], None)
        scale = values[kept].clamp_min(1e-6 * float(values[-1].clamp_min(1e-12))).sqrt()
        self.projection.copy_(vectors[:, kept] / scale)

    # -- on disk -------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the twist into a new folder: ``twist.json`` and ``twist.safetensors``.

        :raises FileExistsError: if the folder exists and is not empty.
        """
        folder = Path(path).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not empty: choose another name, or remove it first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")  # whole, or not there
        try:
            unfinished.mkdir()
            made_for = {"vocab_size": self.lm.vocab_size, "hidden_size": len(self.mean)}
            config = {"format": FORMAT, "settings": self.settings, "language_model": made_for}
            (unfinished / "twist.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, unfinished / "twist.safetensors")
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], lm: LanguageModel) -> Twist:
        """Read what `save_pretrained` wrote, for the language model it was trained on.

        :raises FileNotFoundError: if there is no twist.
        :raises ValueError: if another version wrote it, or it is another language model's.
        """
        header = Path(path) / "twist.json"
        if not header.is_file():
            raise FileNotFoundError(f"{path} holds no twist: {header.name} is missing")
        config = json.loads(header.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError(f"{header} was not written by a version of bayeslm that this one reads ({FORMAT})")
        twist = cls(lm, **config["settings"])
        here = {"vocab_size": lm.vocab_size, "hidden_size": len(twist.mean)}
        if config["language_model"] != here:
            raise ValueError(f"the twist in {path} is for a language model of {config['language_model']}, not {here}")
        twist.load_state_dict(load_file(Path(path) / "twist.safetensors", device=str(lm.device)))
        return twist

    # -- inside --------------------------------------------------------------------------------------------------

    def _tokens(self, tokens: Tensor) -> Tensor:
        return (_embedding(self.lm)[tokens].float() - self.token_mean) / self.token_scale

    def _contribution(self, embedded: Tensor) -> Tensor:
        return gelu(self.tokens(embedded)) / self.max_new_tokens**0.5

    def _project(self, hidden: Tensor) -> Tensor:
        return (hidden.float() - self.mean) @ self.projection

    def _features(self, hidden: Tensor, total: Tensor, time: Tensor) -> Tensor:
        return torch.cat([hidden, total, time[..., None] / self.max_new_tokens], -1)


@torch.no_grad()
def hidden_states(law: Autoregressive, value: Tensor) -> Tensor:
    """The network's hidden states after 0, 1, ... tokens of completions, (row, max_new_tokens + 1, width)."""
    flat = value.reshape(-1, value.shape[-1])
    parts, order = [], []
    for part, prefix in law._prefixes(law._rows(value.shape[:-1])):
        ids = flat[part].clamp(0, law.lm.vocab_size - 1)
        parts.append(torch.cat([prefix.hidden[:, None], extend(law.lm.causal, prefix, ids)], 1))
        order.append(part)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _embedding(lm: LanguageModel) -> Tensor:
    """A vector (vocabulary, width) for each token: the network's own, or one-hot where it has none."""
    network: Any = lm.network
    try:
        return network.get_input_embeddings().weight.detach()
    except (AttributeError, NotImplementedError):
        return torch.eye(lm.vocab_size, device=lm.device)


def _probe(lm: LanguageModel) -> tuple[Tensor, None, Tensor]:
    one = torch.zeros((1, 1), dtype=torch.long, device=lm.device)
    return one, None, one
