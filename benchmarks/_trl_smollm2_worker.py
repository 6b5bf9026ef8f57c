"""TRL's side of `svi_smollm2.py`, run by the Python of its own environment.

One JSON object a line: each on stdin asks for a training, whose adapter is written to a folder, and gets an answer on
stdout: when the training began and when each step ended (seconds), the resident memory (MB) with the model loaded and
at the most. `RLOOTrainer` takes the same gradient as `ReverseKL` with the leave-one-out baseline, and its loop the same
steps of Adam; `_trl_worker.py` says how and why. What is particular here:

- LoRA through `peft_config`, on the layers that bayeslm adapts; the reference is the same network with the adapter off.
- The bfloat16 and the gradient checkpointing that are TRL's defaults are off: they cost time on a CPU.
- ``settings`` are of `RLOOConfig`, or ``attn_implementation``: `svi_smollm2.py --tune` tries some.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: TRL's trainers report to the Hub that they are being made

import torch
import trl
from _memory import peak, resident
from _peer import serve
from _trl import RULES
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


class Watch(TrainerCallback):
    """When the training began and when each step ended, and the memory until then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peak = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.peak = peak()


def train(
    model: str,
    prompt: str,
    ids: list[int],
    tokens: int,
    beta: float,
    steps: int,
    group: int,
    learning_rate: float,
    rank: int,
    adapter: str,
    seed: int,
    threads: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    set_seed(seed)
    attention = settings.pop("attn_implementation", None)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer(prompt)["input_ids"] != ids:
        raise ValueError("TRL would not complete the prompt's ids that bayeslm completes")
    loaded = resident(network)
    analyzer = SentimentIntensityAnalyzer()

    def sentiment(completions: list[str], **_: Any) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.RLOOConfig(
            output_dir=folder,
            beta=beta,
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=group,
            num_generations=group,
            max_completion_length=tokens,
            normalize_advantages=False,
            adam_beta2=0.95,  # as SVI has it
            seed=seed,
            **(RULES | settings),
        )
        trainer = trl.RLOOTrainer(
            model=network,
            reward_funcs=sentiment,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [prompt] * steps}),  # one epoch: a new one makes a new loader
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
            ),
            callbacks=[watch],
        )
        trainer.train()
        trainer.model.save_pretrained(adapter, save_embedding_layers=False)
    return {"ends": watch.ends, "loaded": loaded, "peak": watch.peak}


if __name__ == "__main__":
    logging.disable_progress_bar()
    serve(train)
