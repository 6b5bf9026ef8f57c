"""The command `bayeslm sample`: texts of a policy, or of any language model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bayeslm.chats import is_chat
from bayeslm.visible import visible

from .console import UsageError, content, one_line_errors, out_console
from .inputs import Dtype, one_source, read_prompts
from .policies import load_policy


def sample(
    policy: Annotated[
        str,
        typer.Argument(
            help="A trained policy: its folder, or an output folder of infer; or any model: smollm2, a folder, or a "
            "name on the Hugging Face hub."
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each continued on its own.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file of prompts: lines of text, or JSON(L), CSV, TSV or Parquet with "prompt".'),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's turn, which the assistant answers.")
    ] = False,
    num: Annotated[int, typer.Option(min=1, help="Number of texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a text, in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=1e-6, help="Divides the logits; 1 samples the policy itself.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Of each token the k likeliest remain, renormalised. Default: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Of each token the fewest likeliest with this probability remain. Default: all."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends a text as an end token does; it may be repeated. Default: none."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same texts.")] = None,
    as_json: Annotated[
        bool | None,
        typer.Option("--json/--text", help="JSON lines, or texts. Default: texts on a terminal, else JSON lines."),
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="The model under an adapter, if not the one that the adapter names.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is a GPU.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: the stored one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts in one pass of the network. Default: by the free memory.")
    ] = None,
) -> None:
    """Draw texts from a trained policy, or any language model.

    A terminal shows the first text of each prompt as it grows. Elsewhere each text is a line of JSON with its prompt,
    its number of tokens, its log-probability in nats, and whether it ended by itself, by an end
    token or a stop string, or at the length limit.

    For example:

      bayeslm sample runs/weather "The weather will be" --num 4 --seed 0

      bayeslm sample runs/chat --chat "Say hello."

      bayeslm sample smollm2 --prompts prompts.jsonl --num 8 > texts.jsonl
    """
    with one_line_errors():
        given, _ = read_prompts(one_source(prompt, prompts))
        if chat:
            given = [_as_chat(number, one) for number, one in enumerate(given, start=1)]
        lm = load_policy(policy, prior, device, dtype, batch_size=batch_size)
        lm.encode_prompts(given, max_new_tokens)  # one that cannot be read is refused before texts are drawn
        show = _write_json if (not sys.stdout.isatty() if as_json is None else as_json) else _show
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        settings |= {"top_k": top_k, "top_p": top_p, "stop": stop or None}
        for i, one in enumerate(given):
            show(lm, one, num, None if seed is None else _seed_of(seed, i), settings)


def _as_chat(number: int, prompt: Any) -> Any:
    """Return a text as a chat of one turn of the user; a chat is returned unchanged.

    :raises UsageError: for token ids.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if is_chat(prompt):
        return prompt
    raise UsageError(f"--chat: prompt {number} is {prompt!r:.60}, and must be a text or a chat")


def _seed_of(seed: int, prompt: int) -> int:
    """Return the seed of a prompt's texts, which do not depend on the prompts before it."""
    import numpy as np

    return int(np.random.SeedSequence([seed, prompt]).generate_state(1)[0])


def _write_json(lm: Any, prompt: Any, num: int, seed: int | None, settings: dict[str, Any]) -> None:
    from bayeslm.models.lm import sample_texts

    (drawn,) = sample_texts(lm, [prompt], num, seed=seed, **settings)
    for text in drawn:
        log_prob = text.log_prob if math.isfinite(text.log_prob) else None  # JSON has no infinity
        row = {"prompt": prompt, "completion": text.text, "log_prob": log_prob}
        typer.echo(json.dumps(row | {"tokens": text.num_tokens, "ended": text.ended}, allow_nan=False))
    sys.stdout.flush()


def _show(lm: Any, prompt: Any, num: int, seed: int | None, settings: dict[str, Any]) -> None:
    """Print a prompt, its first text as it grows, and then the others."""
    from bayeslm.models.lm import sample_texts

    out_console.print(content(_shown(prompt), "dim"))

    def write(piece: str) -> None:
        out_console.file.write(visible(piece))  # each character is escaped alone: a piece may end within a sequence
        out_console.file.flush()

    (drawn,) = sample_texts(lm, [prompt], num, seed=seed, on_text=write, **settings)
    write("" if drawn[0].ended else " …")
    for text in drawn[1:]:
        write(f"\n---\n{text.text}" + ("" if text.ended else " …"))
    write("\n\n")


def _shown(prompt: Any) -> str:
    """Return a prompt in short: of a chat its last turn, of token ids these."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return f"{last['role']}: {last.get('content')}" if isinstance(last, dict) else " ".join(map(str, prompt))
