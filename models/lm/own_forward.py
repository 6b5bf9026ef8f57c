"""Whether a network is scored as its own forward pass scores: tried once, on two short texts, at its first use.

Right is log softmax of the logits of one pass over whole texts, without padding and without a cache. The same
log-probabilities must come out of a prompt's pass and of another that continues its cache. Where they do not, the
network reads whole texts (`whole_texts`); where these disagree too, it is refused. Padding is tried when there is some.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .encoding import positions_of
from .masks import causal_mask
from .scopes import exclusive
from .usage import counting

LENGTH = 6  # of the texts that are tried
LEAST = -1e3  # log-probabilities below are not compared: masked tokens are at the end of the number range


@dataclass
class Findings:
    """What trying a network has shown; copies of a network share it.

    :param takes_positions: the positions of tokens are passed to it.
    :param caches: tokens continue its cache of keys and values.
    :param pads: padded texts score as without padding; None until it is tried.
    """

    takes_positions: bool = True
    caches: bool = True
    pads: bool | None = None


class TriedNetwork(Protocol):
    """What is needed of a network to try it: `CausalNetwork` is one."""

    network: Any
    parameters: list[nn.Parameter]
    compute_dtype: torch.dtype | None
    findings: Findings
    accepts_positions: bool
    start_ids: tuple[int, ...]
    auto_class: str

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def rounding(self) -> float: ...
    @property
    def takes_positions(self) -> bool: ...
    def logits(self, hidden: Tensor, temperature: float) -> Tensor: ...
    def hidden(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Tensor, Any]: ...
    def trial_cache(self, ids: Tensor) -> Any: ...


class Followed(NamedTuple):
    """How a head follows a body: its ``hidden`` states, the type of its output, and whether it does so at once."""

    hidden: Tensor
    output_type: type[Any]
    at_once: bool


def checked_logits(network: TriedNetwork, ids: Tensor, run: Callable[[], Any]) -> Tensor:
    """Return the logits (row, length, vocabulary) of texts (row, length) that a forward pass computes.

    :raises TypeError: if it computes anything else, or fails.
    """
    try:
        logits = getattr(run(), "logits", None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever type: it may be any module
        reason = next(iter(str(error).splitlines()), "")
        raise TypeError(
            f"{network.name} fails on the token ids {ids.tolist()} ({type(error).__name__}: {reason:.200}): hand in a "
            f"network of tokens alone that is causal, such as {network.auto_class} loads"
        ) from error
    shape = (*ids.shape, network.vocab_size)
    if not isinstance(logits, Tensor) or logits.shape != shape:
        found = "none" if logits is None else f"shape {tuple(logits.shape)}"
        raise TypeError(
            f"{network.name} must compute logits of shape {shape}: (row, token, config.vocab_size); found {found}"
        )
    return logits


def follow(head: nn.Module, noise: Tensor, whole: Callable[[], Tensor], of_body: Callable[[], Any]) -> Followed | None:
    """Return how a head follows a body; None if the body is not called as the network is.

    A hook replaces the output of the head by noise: the body's output must reach the head unchanged, and the head's
    must come out unchanged. Noise, since soft-capping does not show on small logits.

    :param whole: computes the logits of the network.
    :param of_body: computes the output of the body on the same texts.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.extend(args)
        outputs.append(noise.to(output))
        return outputs[-1]

    hook = head.register_forward_hook(replace)
    try:
        logits, out = whole(), of_body()
    except Exception:  # of whatever type, where the body is not called as the network is
        return None
    finally:
        hook.remove()
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None or len(outputs) != 1:
        return None
    unchanged = inputs[0].shape == hidden.shape and torch.allclose(inputs[0].to(hidden), hidden, rtol=1e-3)
    return Followed(hidden, type(out), unchanged and torch.equal(logits.to(outputs[0]), outputs[0]))


def find(network: TriedNetwork, ids: Tensor, expected: Tensor) -> Findings:
    """Return how a network scores as its own forward pass does.

    :param ids: texts to try, (row, length).
    :param expected: their logits (row, length, vocabulary) by the forward pass of what was handed in.
    :raises TypeError: if it scores in no way as its own forward pass does, or computes NaN.
    """
    wants = expected.float().log_softmax(-1)
    if wants.isnan().any():
        raise TypeError(
            f"{network.name} computes NaN of the token ids {ids[0].tolist()}: its weights or its config are damaged, "
            "or its numbers are too large for its dtype"
        )
    for found in (Findings(True, True), Findings(False, True), Findings(False, False)):
        if found.takes_positions and not network.accepts_positions:
            continue
        network.findings = found
        try:
            scores = _scores(network, ids, None)
        except Exception:  # of whatever type, where the network has no such argument or no such cache
            if not found.caches:
                raise
            continue
        if found.caches and difference(scores, wants) <= network.rounding:
            return found
    half = ids.shape[-1] // 2
    if difference(scores[:, half:], wants[:, half:]) > network.rounding:
        raise TypeError(
            f"{network.name} cannot be scored as its own forward pass scores: log-probabilities of the tokens "
            f"{ids[0].tolist()} are {_of(scores, ids)} for {_of(wants, ids)}; hand in the network without what changes "
            "its forward pass from outside"
        )
    if difference(scores, wants) > 10 * network.rounding:
        raise TypeError(
            f"{network.name} is not causal: log-probabilities of the tokens {ids[0, :half].tolist()} are "
            f"{_of(scores[:, :half], ids)}, and {_of(wants[:, :half], ids)} before {ids[0, half:].tolist()}; "
            "an encoder such as BERT is causal with is_decoder=True in its config"
        )
    return found


def holds_padded(network: TriedNetwork) -> bool:
    """Return whether a text with padding on its left scores as it does alone, a continued cache included."""
    ids = texts(network)[:1]
    real = max(1, ids.shape[-1] // 2)
    padded = torch.cat([torch.zeros_like(ids[:, real:]), ids[:, :real]], -1)
    mask = torch.cat([torch.zeros_like(ids[:, real:]), torch.ones_like(ids[:, :real])], -1)
    alone = _scores(network, ids[:, :real], None)
    try:
        found = _scores(network, torch.cat([padded, ids]), torch.cat([mask, torch.ones_like(mask)]))
    except Exception:  # of whatever type, where the network takes no mask
        return False
    return difference(found[:1, -real:], alone) <= network.rounding


def mask_dtype(network: TriedNetwork) -> torch.dtype | None:
    """Return the dtype of the `causal_mask` that a network takes; None if it takes masks (rows, length) alone."""
    from .caches import DynamicCache

    config = network.network.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = kinds - {"full_attention"} or getattr(config, "sliding_window", None)
    own = network.compute_dtype or next((p.dtype for p in network.parameters), torch.float32)
    dtype = {"sdpa": torch.bool, "eager": own}.get(getattr(config, "_attn_implementation", ""))
    if windows or dtype is None or not network.takes_positions:
        return None
    ids = (torch.arange(8, device=network.device) % network.vocab_size).reshape(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=network.device)
    positions = positions_of(ids, mask)

    def states(form: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return the hidden states of a pass of three tokens, and of one more of the last."""
        first, cache = network.hidden(ids[:, :3], form(mask[:, :3], 3), positions[:, :3], DynamicCache())
        last, _ = network.hidden(ids[:, 3:], form(mask, 1), positions[:, 3:], cache)
        return torch.cat([first, last], dim=1)[mask.bool()].float()

    expected = states(lambda mask, tokens: mask)
    try:
        found = states(lambda mask, tokens: causal_mask(mask, tokens, dtype))
    except Exception:  # of whatever type, where the network expects another mask
        return None
    close = (expected - found).abs().max() <= network.rounding * expected.abs().max()
    return dtype if close else None


def accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that a module's forward pass takes."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {name: value for name, value in arguments.items() if name in {p.name for p in parameters}}


def texts(network: TriedNetwork) -> Tensor:
    """Return two short texts (row, length). The second holds special tokens, since some count positions by these."""
    config = network.network.config.get_text_config()
    length = min(LENGTH, network.context_length or LENGTH)
    ids = (torch.arange(2 * length) % network.vocab_size).reshape(2, length)
    special: list[Any] = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = [token for token in special if isinstance(token, int) and 0 <= token < network.vocab_size]
    start = network.start_ids[:length]
    for place, token in enumerate(start):
        ids[:, place] = token
    first = max(1, len(start))
    for place, token in enumerate(special[: length - first], start=first):
        ids[1, place] = token
    return ids.to(network.device)


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run passes without a gradient that are not counted, and restore the random state."""
    devices = [device] if device.type == "cuda" else []
    with exclusive(), torch.random.fork_rng(devices=devices), torch.no_grad(), counting(()):
        yield


def _scores(network: TriedNetwork, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return log-probabilities (row, length, vocabulary) of a pass over half of the tokens and one that follows."""
    from .caches import is_shareable

    cut = max(1, ids.shape[-1] // 2)
    positions = positions_of(ids, mask)
    first = None if mask is None else mask[:, :cut]
    hidden, cache = network.hidden(ids[:, :cut], first, positions[:, :cut], network.trial_cache(ids))
    if network.findings.caches and not is_shareable(cache):
        raise TypeError(f"{network.name} keeps more than keys and values")
    parts = [hidden]
    if cut < ids.shape[-1]:
        parts.append(network.hidden(ids[:, cut:], mask, positions[:, cut:], cache)[0])
    return network.logits(torch.cat(parts, 1), 1.0).log_softmax(-1)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of log-probabilities, as a share of their range."""
    known = expected > LEAST
    if found.shape != expected.shape or not bool(known.any()):
        return float("inf") if found.shape != expected.shape else 0.0
    scale = float(expected[known].max() - expected[known].min())
    return float((found - expected)[known].abs().max()) / max(scale, 1e-3)


def _of(scores: Tensor, ids: Tensor) -> str:
    """Return the log-probabilities of the tokens of the first text, but the first, as a line."""
    tokens = ids[0, 1 : scores.shape[1] + 1]
    return str([round(float(scores[0, t, token]), 4) for t, token in enumerate(tokens[: scores.shape[1]])])
