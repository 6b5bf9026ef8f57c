r"""A learned twist: a small head on the prior's hidden states that guesses what an unfinished text will be worth.

    \log \psi_t(x_{1:t})  ~  \log E_p[ exp(r(x) / beta) | x_{1:t} ]

(Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546). The head reads the prior's last hidden state h before
the token x_t, projected on its principal components; the token; a sum over the tokens before it, which carries what
a last hidden state has long forgotten (many rewards are sums over words); t; and, if it ``reads_reward``, what the
reward says of the text so far, s_t = r(x_{1:t}) / beta, which it learns how far to believe:

    \log \psi_t  =  c_t ( f(h_{t-1}, \sum_{s<t} gelu(A e(x_s)), e(x_t), t / T, s_t)  +  a_t s_t )  +  b_t

Nothing in it waits for the network to have read x_t. So the same function values the text and all its continuations by
one token, for proposals, and costs no forward pass.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from bayeslm.files import atomic_folder, read_header

from .decoding import Steps
from .language_model import LanguageModel

FORMAT = "bayeslm.twist/2"
# Heads learn E[L^a | x_1:t], L = exp(r / beta), for each of these powers a, and SMC reads that of the first. At a
# small beta few draws have any weight: their milder powers teach the shared features what all the others know.
POWERS = (1.0, 0.5, 0.25, 0.1)


class TwistState(NamedTuple):
    """Texts so far, one a row: ``hidden`` (row, component), ``total`` (row, inner), ``t`` tokens written.

    ``vocabulary`` (vocabulary, inner + width): what the layers make of each token, in the sum and as the next.
    """

    hidden: Tensor
    total: Tensor
    t: int
    vocabulary: Tensor

    def select(self, rows: Tensor) -> TwistState:
        """Row i becomes what row ``rows[i]`` is."""
        return self._replace(hidden=self.hidden[rows], total=self.total[rows])


class TwistInputs(NamedTuple):
    """Completions as the head reads them; axis ``token`` runs over t = 1, ..., T.

    ``hidden`` (row, token, component) before each token; ``tokens`` (row, token), which index ``words`` (word, width),
    embeddings; ``so_far`` (row, token), s_t, or None.
    """

    hidden: Tensor
    tokens: Tensor
    words: Tensor
    so_far: Tensor | None


class Twist(nn.Module):
    """log psi of unfinished completions of a language model; made by `bayeslm.inference.TwistLearning`.

    :param lm: the prior. Its weights are read, never changed, and not saved with the twist.
    :param max_new_tokens: of the completions, T.
    :param reads_reward: it is told what the reward says of texts so far.
    :param components: principal components of hidden states that are kept.
    :param inner: width of the sum over tokens.
    :param width: of the head's one hidden layer.
    :param dropout: of the head while it is trained.
    """

    probe: Tensor
    mean: Tensor
    projection: Tensor
    token_mean: Tensor
    token_scale: Tensor
    so_far_scale: Tensor
    confidence: Tensor
    offset: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        max_new_tokens: int,
        *,
        reads_reward: bool = False,
        components: int = 64,
        inner: int = 16,
        width: int = 32,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "reads_reward": reads_reward,
            "components": components,
            "inner": inner,
            "width": width,
            "dropout": dropout,
        }
        self.stats: dict[str, Any] = {}
        """What training saw."""
        self._lm = [lm]  # in a list, so that its parameters are not the twist's
        embedding = _embedding(lm)
        self.register_buffer("probe", _probe(lm))
        components = min(components, len(self.probe))
        self.register_buffer("mean", torch.zeros(len(self.probe)))
        self.register_buffer("projection", torch.eye(len(self.probe), components))
        self.register_buffer("token_mean", embedding.float().mean(0))
        self.register_buffer("token_scale", embedding.float().std(0, correction=0).clamp_min(1e-6))
        self.register_buffer("so_far_scale", torch.tensor([0.0, 1.0]))  # mean and standard deviation of s_t
        self.register_buffer("confidence", torch.ones(max_new_tokens + 1))  # c_t
        self.register_buffer("offset", torch.zeros(max_new_tokens + 1))  # b_t
        self.tokens = nn.Linear(embedding.shape[-1], inner)
        self.text = nn.Linear(components + inner + 1, width)
        self.token = nn.Linear(embedding.shape[-1], width, bias=False)
        self.out = nn.Linear(width, len(POWERS))
        self.dropout = nn.Dropout(dropout)
        for parameter in self.out.parameters():  # begins as no twist at all, but for the reward so far
            nn.init.zeros_(parameter)
        if reads_reward:
            self.reward = nn.Linear(2, width, bias=False)
            belief = torch.arange(max_new_tokens + 1)[:, None] / max_new_tokens * torch.tensor(POWERS)
            self.belief = nn.Parameter(belief)  # a_t, for each power
        self.to(lm.device)
        self.eval()

    @property
    def lm(self) -> LanguageModel:
        return self._lm[0]

    @property
    def max_new_tokens(self) -> int:
        return int(self.settings["max_new_tokens"])

    @property
    def reads_reward(self) -> bool:
        return bool(self.settings["reads_reward"])

    # -- step by step, as SMC reads ------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, steps: Steps) -> TwistState:
        """The state of texts of which no token is written.

        :raises ValueError: if they are another language model's completions, or longer than the twist has seen.
        """
        law = steps.law
        if law.lm is not self.lm:
            _check_same(_probe(law.lm), self.probe)
        if law.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"the twist was trained on completions of {self.max_new_tokens} tokens, not {law.max_new_tokens}"
            )
        total = torch.zeros((len(steps.values), self.tokens.out_features), device=self.mean.device)
        return TwistState(self.project(steps.hidden), total, 0, self._read_vocabulary())

    @torch.no_grad()
    def read(self, state: TwistState, steps: Steps) -> TwistState:
        """The state after the token that was appended last."""
        written = state.vocabulary[self._known(steps.values[:, steps.t - 1]), : state.total.shape[-1]]
        return TwistState(self.project(steps.hidden), state.total + written, steps.t, state.vocabulary)

    @torch.no_grad()
    def lookahead(self, state: TwistState, tokens: Tensor, so_far: Tensor | None = None) -> Tensor:
        """log psi (row, k) of the texts so far with each of ``tokens`` (row, k) behind them.

        :param so_far: the reward / beta of each of these texts, (row, k), if the twist reads it.
        """
        t = torch.full((len(tokens), 1), state.t + 1, device=tokens.device)
        text = self._text(state.hidden, state.total, t[:, 0])[:, None]
        token = state.vocabulary[self._known(tokens), state.total.shape[-1] :]
        psi = self._head(text, token, t, so_far)[..., 0]
        return self.confidence[t] * psi + self.offset[t]

    # -- whole completions, as training reads --------------------------------------------------------------------

    def forward(self, of: TwistInputs) -> Tensor:
        """log psi_t (row, token, power), with gradient, but for c_t and b_t."""
        total = pad(self._contribution(of.words)[of.tokens], (0, 0, 1, 0)).cumsum(1)[:, :-1]
        t = torch.arange(1, of.tokens.shape[-1] + 1, device=of.tokens.device).expand(len(of.tokens), -1)
        return self._head(self._text(of.hidden, total, t), self.token(of.words)[of.tokens], t, of.so_far)

    @torch.no_grad()
    def inputs(self, hidden: Tensor, tokens: Tensor, so_far: Tensor | None) -> TwistInputs:
        """What `forward` reads of completions: projected hidden states, tokens, and s_t, as `TwistInputs` has them."""
        words, tokens = self._known(tokens).unique(return_inverse=True)  # a few thousand, of the vocabulary
        return TwistInputs(hidden, tokens, self._tokens(words), so_far)

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

    def project(self, hidden: Tensor) -> Tensor:
        """Principal components (..., component) of hidden states (..., width)."""
        return (hidden.float() - self.mean) @ self.projection

    # -- on disk -------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the twist into a new folder: ``twist.json`` and ``twist.safetensors``.

        :raises FileExistsError: if the folder exists and is not empty.
        """
        with atomic_folder(path) as folder:
            config = {"format": FORMAT, "settings": self.settings, "stats": self.stats}
            (folder / "twist.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "twist.safetensors")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], lm: LanguageModel) -> Twist:
        """Read what `save_pretrained` wrote, for the language model it was trained on.

        :raises FileNotFoundError: if there is no twist.
        :raises ValueError: if another version wrote it, or it is another language model's.
        """
        config = read_header(path, "twist.json", FORMAT, "twist")
        twist = cls(lm, **config["settings"])
        state = load_file(Path(path) / "twist.safetensors", device=str(lm.device))
        _check_same(twist.probe, state["probe"])
        twist.load_state_dict(state)
        twist.stats = config["stats"]
        return twist

    # -- inside --------------------------------------------------------------------------------------------------

    def _head(self, text: Tensor, token: Tensor, t: Tensor, so_far: Tensor | None) -> Tensor:
        """f + a_t s_t (..., power), the text before the token and the token being what their layers made of them."""
        inner = text + token
        if not self.reads_reward:
            return self.out(self.dropout(gelu(inner)))
        if so_far is None:
            raise ValueError("this twist reads the reward of texts so far, and was not told")
        mean, scale = self.so_far_scale
        s = ((so_far - mean) / scale).clamp(-5.0, 5.0)
        inner = inner + self.reward(torch.stack([s, s.square()], -1))
        lost = so_far == -torch.inf
        psi = self.out(self.dropout(gelu(inner))) + self.belief[t] * so_far.masked_fill(lost, 0.0)[..., None]
        return psi.masked_fill(lost[..., None], -torch.inf)

    def _text(self, hidden: Tensor, total: Tensor, t: Tensor) -> Tensor:
        return self.text(torch.cat([hidden, total, t[..., None] / self.max_new_tokens], -1))

    def _read_vocabulary(self) -> Tensor:
        """See `TwistState`; in blocks, so that embeddings in float32 are never held whole."""
        words = torch.arange(self.lm.vocab_size, device=self.mean.device).split(8192)
        return torch.cat([torch.cat([self._contribution(e), self.token(e)], -1) for e in map(self._tokens, words)])

    def _known(self, tokens: Tensor) -> Tensor:
        return tokens.clamp(0, self.lm.vocab_size - 1)  # a pad id need not be a token of the network

    def _tokens(self, tokens: Tensor) -> Tensor:
        return (_embedding(self.lm)[tokens].float() - self.token_mean) / self.token_scale

    def _contribution(self, embedded: Tensor) -> Tensor:
        return gelu(self.tokens(embedded)) / self.max_new_tokens**0.5


def _embedding(lm: LanguageModel) -> Tensor:
    """A vector (vocabulary, width) for each token: the network's own, or one-hot where it has none."""
    network: Any = lm.network
    try:
        return network.get_input_embeddings().weight.detach()
    except (AttributeError, NotImplementedError):
        return torch.eye(lm.vocab_size, device=lm.device)


@torch.no_grad()
def _probe(lm: LanguageModel) -> Tensor:
    """The hidden state (width,) that the network has after token 0, by which a language model is known again."""
    one = torch.zeros((1, 1), dtype=torch.long, device=lm.device)
    return lm.causal.hidden(one, None, one)[0][0, -1].float()


def _check_same(probe: Tensor, trained: Tensor) -> None:
    """:raises ValueError: if a language model's probe is not that of the training, but for the weights' precision."""
    same = probe.shape == trained.shape
    if not same or float((probe - trained).norm()) > 0.05 * float(trained.norm()):
        raise ValueError("the twist was trained on the hidden states of another language model")
