"""Translate by SmolLM2 and a prompt: a dictionary and solved sentences, minimum Bayes risk, and `SVI` to chrF.

    python examples/translation_smollm2.py [--folder runs/translation_smollm2]      (200 s of two cores)

Nobody has taught SmolLM2-135M-Instruct the made-up language Tavi (`_tavi.py`). The prompt has what a person with a
dictionary has: the stem of each word, in the order of the sentence, and solved sentences. Where words go, and how they
end, is to be learned. The likelihood exp(chrF / beta) of other sentences tilts the model, and `SVI` trains a policy of
low rank, which draws its own translations and is told their chrF alone.

Figures are of held-out sentences, neither solved in the prompt nor trained on: chrF (sacrebleu, the extra
"translation") of copies of the sources, of the stems as the prompt has them, and of translations of
prior and policy, each a draw, and the decision among the draws (minimum Bayes risk: the draw whose chrF to the others
is highest); errors are over sentences.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

from _figures import count, parser, write
from _tavi import corpus, stems
from _translations import baseline, figures, lines_of, picture, reward, translations

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.posterior import DiagnosticsWarning

SHOWN, TRAIN, HELD_OUT, DRAWS, STEPS = 2, 20, 24, 6, 10
BETA = 0.03
WORDS = 6  # of the longest English sentence
WRITING: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.7, "stop": "\n"}


def problem(english: str, tavi: str = "") -> str:
    """Return a sentence with its stems, and its translation where it is solved."""
    return f"English: {english}\nWord for word: {stems(english)}\nTavi:" + (f" {tavi}\n\n" if tavi else "")


def sentences(sizes: Sequence[int]) -> list[list[tuple[str, str]]]:
    """Return lists of pairs, of these sizes, of short sentences that all differ."""
    pairs = [pair for pair in corpus(20 * sum(sizes)) if len(pair[0].split()) <= WORDS]
    return [pairs[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def main(arguments: list[str] | None = None, lm: LanguageModel | None = None) -> list[str]:
    options = parser(__doc__, "translation_smollm2")
    options.add_argument("--steps", type=count, default=STEPS, help="of the training")
    chosen = options.parse_args(arguments)
    quick, started = chosen.quick, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws, from which a translation is chosen
    lm = lm or LanguageModel.from_pretrained("smollm2")
    shown, train, held_out = sentences((SHOWN, 6, 4) if quick else (SHOWN, TRAIN, HELD_OUT))
    beginning = "".join(problem(*pair) for pair in shown)
    print(beginning + problem(held_out[0][0]))

    settings: dict[str, Any] = {"optimizer": Adam(5e-4), "num_samples": 1, "num_prior_samples": 0, "seed": 0}
    svi = SVI(2 if quick else chosen.steps, objective=ReverseKL(8), **settings)
    rows = [{"prompt": beginning + problem(english), "reference": tavi} for english, tavi in train]
    policy = svi.run(TiltedLM(lm, reward, BETA, subsample_size=2, **WRITING), rows).policy

    sources, references = zip(*held_out, strict=True)
    prompts = [beginning + problem(english) for english in sources]
    found = {"copies": baseline(sources, references), "stems": baseline([*map(stems, sources)], references)}
    for name, model in {"prior": lm, "policy": policy}.items():
        texts = translations(model.packed(), prompts, 2 if quick else DRAWS, **WRITING)
        found[name] = figures(texts, references)
    lines = lines_of([found])
    write(chosen.folder, lines, started)
    picture([found], chosen.folder / "translation-smollm2.png")
    return lines


if __name__ == "__main__":
    main()
