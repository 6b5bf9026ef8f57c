r"""A learned twist: a small head on the prior's hidden states that estimates the soft value of an unfinished text.

    \log \psi_t(x_{1:t})  ~  \log E_p[ exp(r(x) / beta) | x_{1:t} ]

(Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546). The inputs of the head are the prior's last hidden state
h before the token x_t, projected on its principal components; the token; a sum over the tokens before it, which a last
hidden state does not hold for long (many rewards are sums over words); t; and, if it ``reads_reward``, the reward of
the text so far, s_t = r(x_{1:t}) / beta, with a learned weight a_t:

    \log \psi_t  =  c_t ( f(h_{t-1}, \sum_{s<t} gelu(A e(x_s)), e(x_t), t / T, s_t)  +  a_t s_t )  +  b_t

It does not depend on the hidden state after x_t. So the same function evaluates the text and all its continuations by
one token, for proposals, without a forward pass.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from bayeslm.checksums import verify
from bayeslm.files import atomic_folder, read_header
from bayeslm.processes import is_first
from bayeslm.validation import Count, Share, validated

from .decoding import Decoder
from .language_model import LanguageModel
from .module_errors import ModuleWithProperties
from .network import CausalNetwork
from .prefix import prefill
from .tensor_files import read_tensors

FORMAT = "bayeslm.twist/3"
# Heads learn E[L^a | x_1:t], L = exp(r / beta), for each of these powers a, and SMC uses that of the first. At a small
# beta few draws have any weight: of the milder powers of L the shared features learn from all draws.
POWERS = (1.0, 0.5, 0.25, 0.1)


class TwistState(NamedTuple):
    """Texts so far, one a row: ``hidden`` (row, component), ``total`` (row, inner), ``t`` tokens written.

    ``vocabulary`` (token, inner + width) is the contribution of each token to the sum, and to the head's layer.
    """

    hidden: Tensor
    total: Tensor
    t: int
    vocabulary: Tensor

    def select(self, rows: Tensor) -> TwistState:
        """Replace row i by row ``rows[i]``."""
        return self._replace(hidden=self.hidden[rows], total=self.total[rows])


class TwistInputs(NamedTuple):
    """Completions as inputs of the head; axis ``token`` runs over t = 1, ..., T.

    ``hidden`` (row, token, component) before each token; ``tokens`` (row, token), which index ``words`` (word, width),
    embeddings; ``so_far`` (row, token), s_t, or None.
    """

    hidden: Tensor
    tokens: Tensor
    words: Tensor
    so_far: Tensor | None


@validated
class Twist(ModuleWithProperties):
    """log psi of unfinished completions of a language model; made by `bayeslm.inference.sequential.TwistLearning`.

    :param lm: the prior. Its weights are used, never changed, and not saved with the twist.
    :param max_new_tokens: the longest completion, T.
    :param reads_reward: whether the reward of the text so far is an input.
    :param components: number of principal components of hidden states that are kept.
    :param inner: width of the sum over tokens.
    :param width: width of the head's one hidden layer.
    :param dropout: dropout of the head while it is trained.
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
        max_new_tokens: Count,
        *,
        reads_reward: bool = False,
        components: Count = 64,
        inner: Count = 16,
        width: Count = 32,
        dropout: Share = 0.3,
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
        """Of its training: seconds, model calls, losses by step."""
        self._lm = [lm]  # in a list, so that its parameters are not the twist's
        embedding = _embedding(lm)
        self.register_buffer("probe", _probe(lm.causal))
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
        for parameter in self.out.parameters():  # log psi starts as 0, or as the reward so far
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

    # -- token by token, for SMC ---------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, decoder: Decoder) -> TwistState:
        """Return the state of texts of no tokens.

        :raises ValueError: if they are another language model's completions, or longer than those of the training.
        """
        if decoder.prompted.network is not self.lm.causal:
            _check_same(_probe(decoder.prompted.network), self.probe)
        if decoder.prompted.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"the twist was trained on completions of {self.max_new_tokens} tokens, not "
                f"{decoder.prompted.max_new_tokens}"
            )
        total = torch.zeros((len(decoder.values), self.tokens.out_features), device=self.mean.device)
        return TwistState(self.project(decoder.hidden), total, 0, self._embed_vocabulary())

    @torch.no_grad()
    def advance(self, state: TwistState, decoder: Decoder) -> TwistState:
        """Return the state after the token that was appended last."""
        written = state.vocabulary[self._in_range(decoder.values[:, decoder.t - 1]), : state.total.shape[-1]]
        return TwistState(self.project(decoder.hidden), state.total + written, decoder.t, state.vocabulary)

    @torch.no_grad()
    def lookahead(self, state: TwistState, tokens: Tensor, so_far: Tensor | None = None) -> Tensor:
        """Return log psi (row, k) of the texts so far, each followed by one of ``tokens`` (row, k).

        :param so_far: the reward / beta of each of these texts, (row, k), if the twist ``reads_reward``.
        """
        t = torch.full((len(tokens), 1), state.t + 1, device=tokens.device)
        text = self._text(state.hidden, state.total, t[:, 0])[:, None]
        token = state.vocabulary[self._in_range(tokens), state.total.shape[-1] :]
        psi = self._head(text, token, t, so_far)[..., 0]
        return self.confidence[t] * psi + self.offset[t]

    # -- complete texts, for training ----------------------------------------------------------------------------

    def forward(self, inputs: TwistInputs) -> Tensor:
        """Return log psi_t (row, token, power), with gradient, without c_t and b_t."""
        tokens = inputs.tokens
        total = pad(self._contribution(inputs.words)[tokens], (0, 0, 1, 0)).cumsum(1)[:, :-1]
        t = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device).expand(len(tokens), -1)
        return self._head(self._text(inputs.hidden, total, t), self.token(inputs.words)[tokens], t, inputs.so_far)

    @torch.no_grad()
    def inputs(self, hidden: Tensor, tokens: Tensor, so_far: Tensor | None) -> TwistInputs:
        """Return the inputs of `forward`.

        :param hidden: projected hidden states before each token, (row, token, component).
        :param tokens: token ids of completions, (row, token).
        :param so_far: s_t, (row, token), or None.
        """
        words, tokens = self._in_range(tokens).unique(return_inverse=True)  # a few thousand, of the vocabulary
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
        """Return the principal components (..., component) of hidden states (..., width)."""
        return (hidden.float() - self.mean) @ self.projection

    # -- on disk -------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the twist into a new folder: ``twist.json`` and ``twist.safetensors``.

        Of several processes that run together the first one writes alone.

        :raises FileExistsError: if the folder exists and is not empty.
        """
        if not is_first():
            return
        with atomic_folder(path) as folder:
            config = {"format": FORMAT, "settings": self.settings, "stats": self.stats}
            (folder / "twist.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "twist.safetensors")

    @classmethod
    @validated
    def from_pretrained(cls, path: str | os.PathLike[str], lm: LanguageModel) -> Twist:
        """Load a twist from a folder that `save_pretrained` wrote.

        :param lm: the language model that it was trained on.
        :raises FileNotFoundError: if the folder holds no twist.
        :raises ValueError: if another version wrote it, or it was trained on another language model.
        """
        config = read_header(path, "twist.json", FORMAT, "twist")
        state = read_tensors(Path(path) / "twist.safetensors", str(lm.device))
        try:
            settings = config["settings"]
            _check_sizes(settings, state)
            twist = cls(lm, **settings)
            _check_same(twist.probe, state["probe"])
            twist.load_state_dict(state)
            twist.stats = dict(config["stats"])
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{Path(path) / 'twist.json'} does not fit twist.safetensors: {error}") from error
        verify(Path(path))
        return twist

    # -- inside --------------------------------------------------------------------------------------------------

    def _head(self, text: Tensor, token: Tensor, t: Tensor, so_far: Tensor | None) -> Tensor:
        """Return f + a_t s_t (..., power), of the layers' outputs for the text before the token, and for the token."""
        inner = text + token
        if not self.reads_reward:
            return self.out(self.dropout(gelu(inner)))
        if so_far is None:
            raise ValueError("this twist reads_reward: give so_far, the reward of the text so far")
        mean, scale = self.so_far_scale
        s = ((so_far - mean) / scale).clamp(-5.0, 5.0)
        inner = inner + self.reward(torch.stack([s, s.square()], -1))
        lost = so_far == -torch.inf
        psi = self.out(self.dropout(gelu(inner))) + self.belief[t] * so_far.masked_fill(lost, 0.0)[..., None]
        return psi.masked_fill(lost[..., None], -torch.inf)

    def _text(self, hidden: Tensor, total: Tensor, t: Tensor) -> Tensor:
        return self.text(torch.cat([hidden, total, t[..., None] / self.max_new_tokens], -1))

    def _embed_vocabulary(self) -> Tensor:
        """Return ``vocabulary`` of `TwistState`, in blocks, so that embeddings in float32 are never all in memory."""
        words = torch.arange(self.lm.vocab_size, device=self.mean.device).split(8192)
        return torch.cat([torch.cat([self._contribution(e), self.token(e)], -1) for e in map(self._tokens, words)])

    def _in_range(self, tokens: Tensor) -> Tensor:
        return tokens.clamp(0, self.lm.vocab_size - 1)  # a pad id need not be a token of the network

    def _tokens(self, tokens: Tensor) -> Tensor:
        return (_embedding(self.lm)[tokens].float() - self.token_mean) / self.token_scale

    def _contribution(self, embedded: Tensor) -> Tensor:
        return gelu(self.tokens(embedded)) / self.max_new_tokens**0.5


def _embedding(lm: LanguageModel) -> Tensor:
    """Return a vector for each token, (vocabulary, width): the network's own, or one-hot if it has none."""
    network: Any = lm.network
    try:
        network = network.get_decoder() if lm.decoder_start_ids else network  # sources may have tokens of their own
        return network.get_input_embeddings().weight.detach()
    except (AttributeError, NotImplementedError):
        return torch.eye(lm.vocab_size, device=lm.device)


@torch.no_grad()
def _probe(network: CausalNetwork) -> Tensor:
    """Return the hidden state (width,) after token 0, which differs between networks."""
    one = torch.zeros((1, 1), dtype=torch.long, device=network.device)
    return prefill(network, one, None).hidden[0].float()


def _check_sizes(settings: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Check the settings that sizes depend on before anything of these sizes is allocated.

    :raises TypeError: if the tensors have other sizes.
    """
    stored = {
        "max_new_tokens": len(state["offset"]) - 1,
        "inner": len(state["tokens.weight"]),
        "width": len(state["text.weight"]),
        "reads_reward": "belief" in state,
    }
    for name, size in stored.items():
        if settings[name] != size or isinstance(settings[name], float):
            raise TypeError(f"{name} is {settings[name]} and {size}")


def _check_same(probe: Tensor, trained: Tensor) -> None:
    """Refuse a language model whose probe differs from that of the training by more than the precision of weights.

    :raises ValueError: if it does.
    """
    same = probe.shape == trained.shape
    if not same or float((probe - trained).norm()) > 0.05 * float(trained.norm()):
        raise ValueError("the twist was trained on the hidden states of another language model")
