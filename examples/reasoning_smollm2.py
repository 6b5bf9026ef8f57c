"""Sums by SmolLM2: problems and answers of reasoning-gym, self-consistency, a power of the prior, and `SVI`.

    python examples/reasoning_smollm2.py [folder] [--quick]        (five minutes of two cores)

reasoning-gym (`pip install "bayeslm[reasoning]"`) writes problems and says how right an answer is: a verifiable reward.
Here these are "chain_sum" problems of two numbers of one or two digits, after three solved ones in the prompt, so that
SmolLM2-135M-Instruct answers in a few tokens, up to the end of the line. The program is the user's own:

    completion ~ lm(prompts, stop at the end of the line),    factor  score / beta

Figures are of problems held out, means with standard errors over them: the probability of the right answer, and whether
the answer of most weight is right (`posterior.decide`), for draws of the prior, of p^alpha by SMC with as many
particles, and of the policy that `SVI()` trains on other problems. All is written into the folder (default:
runs/reasoning_smollm2).
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bayeslm import Posterior
from bayeslm.decisions import SameAnswer
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.sequential import Power
from bayeslm.models import LanguageModel, rewards
from bayeslm.posterior import DiagnosticsWarning

TRAIN, HELD_OUT, DRAWS, STEPS = 200, 60, 16, 40
BETA, ALPHA, LONGEST = 0.25, 4.0, 6
SHOWN = 3  # solved problems in the prompt


class Problems:
    """Problems of reasoning-gym, different ones, and their scores."""

    def __init__(self, size: int, seed: int = 0) -> None:
        from reasoning_gym import create_dataset  # of an extra, which not everybody has

        many = create_dataset(
            "chain_sum", size=4 * size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2
        )
        self._source = many
        unique = {entry["question"]: entry for entry in many}
        solved, self.entries = list(unique.values())[:SHOWN], list(unique.values())[SHOWN : SHOWN + size]
        self._shown = "".join(f"{self._short(entry)} {entry['answer']}\n" for entry in solved)

    @staticmethod
    def _short(entry: dict[str, Any]) -> str:
        return str(entry["question"]).rsplit(": ", 1)[-1]

    @property
    def prompts(self) -> list[str]:
        return [self._shown + self._short(entry) for entry in self.entries]

    def score(self, texts: np.ndarray, which: np.ndarray) -> torch.Tensor:
        """Return 1 where a text has the right answer of problem ``which``, else 0; reasoning-gym gives parts of it."""
        found = [
            self._source.score_answer(answer_of(text), self.entries[i]) == 1.0
            for text, i in zip(texts.ravel(), np.broadcast_to(which, texts.shape).ravel(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32).reshape(texts.shape)


def answer_of(text: str) -> str | None:
    """Return the number that a line holds."""
    found = re.fullmatch(r"\s*(-?\d+)\s*\n?", text)
    return found[1] if found else None


def sums(
    lm: LanguageModel, problems: Problems, which: range, batch: int | None = None, power: float = 1.0, beta: float = 0.0
) -> None:
    """Answers of problems ``which``, tilted by their scores (where beta is not 0), and by a power of the prior."""
    prompts = problems.prompts
    with pyro.plate("prompts", len(which), subsample_size=batch) as some:
        chosen = np.array(which)[some.numpy()]
        distribution = lm([prompts[i] for i in chosen], LONGEST, stop="\n")
        x = pyro.sample("completion", distribution)
        if power != 1.0:
            pyro.factor("power", (power - 1.0) * distribution.log_prob(x))
        if beta:
            rewards.factor("reward", problems.score(lm.decode(x), chosen), beta)


def right(posterior: Posterior, problems: Problems, which: range) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each problem, the weight of the right answer, and whether the answer of most weight is right."""
    hits = problems.score(posterior.texts["completion"], np.array(which)).numpy()
    chosen = np.array(posterior.decide(SameAnswer(answer_of)).texts, dtype=object)
    return (hits * posterior.weights()).sum((0, 1)), problems.score(chosen, np.array(which)).numpy()


def tiny() -> LanguageModel:
    """Return a random Llama over characters: for a try in seconds."""
    characters = ["<eos>", *"\n 0123456789+-="]
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(characters), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**sizes, **tokens))
    return LanguageModel(network, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


def mean(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(folder: Path, quick: bool = False) -> None:
    warnings.filterwarnings("ignore", category=DiagnosticsWarning)  # a few draws, from which an answer is chosen
    started = time.perf_counter()
    train, held_out = (range(8), range(8, 12)) if quick else (range(TRAIN), range(TRAIN, TRAIN + HELD_OUT))
    problems = Problems(held_out.stop)
    lm = tiny() if quick else LanguageModel.from_pretrained("smollm2")
    prior = lm if quick else lm.packed()
    print(f"a prompt: {problems.prompts[held_out[0]]!r}")
    svi = SVI(2 if quick else STEPS, 8, num_samples=1, num_prior_samples=0, seed=0)
    policy = svi.run(partial(sums, lm, problems, train, batch=4, beta=BETA)).policy
    print(f"SVI, {time.perf_counter() - started:.0f} s")
    policy = policy if quick else policy.packed()
    rows = ["| | a draw | the answer of most weight | tokens a problem |", "|---|---|---|---|"]
    for name, engine, target in [
        ("prior", ImportanceSampling(DRAWS, 1, seed=0), partial(sums, prior)),
        (f"prior, power {ALPHA:g}", SMC(DRAWS, 1, twist=Power(ALPHA), seed=0), partial(sums, prior, power=ALPHA)),
        ("policy", ImportanceSampling(DRAWS, 1, seed=0), partial(sums, policy)),
    ]:
        posterior = engine.run(partial(target, problems=problems, which=held_out))
        weight, chosen = right(posterior, problems, held_out)
        tokens = posterior.stats["tokens"] / len(held_out)
        rows.append(f"| {name} | {mean(weight)} | {mean(chosen)} | {tokens:.0f} |")
    print(f"{len(held_out)} held-out problems, percent right, mean ± standard error over them", *rows, sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"all is in {folder}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/reasoning_smollm2"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, for a few seconds")
    options = parser.parse_args()
    main(options.folder, options.quick)
