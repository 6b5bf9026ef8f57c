"""Translate by an encoder-decoder network trained from scratch, and align it by variational inference.

    python examples/translation.py [--folder runs/translation] [--seeds 1]

A small grammar (`_tavi.py`) writes sentences of English and of a made-up language, Tavi, with another order of words,
agreement, case and tense. A BART of 0.6 million weights learns 2,000 pairs, for so few steps
that its draws are often wrong. Then the likelihood exp(chrF / beta) of 400 other pairs tilts it, and `SVI` trains the
policy. The script prints chrF (sacrebleu, the extra "translation") on held-out sentences that neither training has
had: of copies of the sources, and of translations of prior and policy, each a draw, the decision among eight draws
(minimum Bayes risk: the draw whose chrF to the others is highest), and a nearly likeliest one. It takes a minute of
one core. A further seed is another corpus, with other held-out sentences, and another network and training.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
from _figures import count, parser, write
from _tavi import corpus
from _translations import Figures, baseline, figures, lines_of, picture, reward, translations
from transformers import BartConfig, BartForConditionalGeneration

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import word_tokenizer
from bayeslm.posterior import DiagnosticsWarning

PAIRS, ALIGNED, HELD_OUT = 2000, 400, 200
LONGEST, DRAWS = 12, 8
BETA = 0.05


def untrained(pairs: list[tuple[str, str]], seed: int = 0) -> LanguageModel:
    """Return a small BART with the words of both languages."""
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    tokenizer = word_tokenizer(["<eos>", *words], "<eos>")
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    sizes = {"d_model": 96, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    config = BartConfig(vocab_size=len(words) + 1, forced_eos_token_id=None, **layers, **special, **sizes)
    return LanguageModel(BartForConditionalGeneration(config), tokenizer)


def one_seed(seed: int, quick: bool, folder: Path) -> dict[str, Figures]:
    """Return held-out figures of copies of the sources, of the prior, and of the policy, which the folder gets."""
    sizes = (64, 24, 8) if quick else (PAIRS, ALIGNED, HELD_OUT)
    pairs = corpus(sum(sizes), seed)
    train, align, held_out = (pairs[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
    print("for example:", *held_out[0], sep="\n  ")

    prior = untrained(pairs, seed)
    sources, targets = zip(*train, strict=True)
    prior.fit(targets, sources, num_steps=2 if quick else 180, batch_size=64, learning_rate=2e-3, seed=seed)

    model = TiltedLM(prior, reward, BETA, max_new_tokens=LONGEST, subsample_size=24)
    settings = {"optimizer": Adam(5e-4), "num_samples": 4, "num_prior_samples": 0, "seed": seed}
    svi = SVI(2 if quick else 150, objective=ReverseKL(8), **settings)
    posterior = svi.run(model, [source for source, _ in align], reference=[target for _, target in align])
    posterior.policy.save_pretrained(folder / "policy")

    sources, references = zip(*held_out, strict=True)
    found = {"copies": baseline(sources, references)}
    for name, lm in {"prior": prior, "policy": posterior.policy}.items():
        texts = translations(lm, sources, DRAWS, max_new_tokens=LONGEST)
        likely = lm.generate_texts(sources, max_new_tokens=LONGEST, temperature=0.05, seed=1)
        found[name] = figures(texts | {"likely": likely}, references)
    return found


def main(arguments: list[str] | None = None) -> list[str]:
    options = parser(__doc__, "translation")
    options.add_argument(
        "--seeds", type=count, default=1, help="of corpus, network and training; errors are over these"
    )
    chosen = options.parse_args(arguments)
    folder, started = chosen.folder, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws, from which a translation is chosen
    runs = [one_seed(seed, chosen.quick, folder / f"seed-{seed}") for seed in range(chosen.seeds)]
    lines = lines_of(runs)
    write(folder, lines, started)
    picture(runs, folder / "translation.png")
    return lines


if __name__ == "__main__":
    main()
