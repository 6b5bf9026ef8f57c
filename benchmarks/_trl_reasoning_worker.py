"""TRL's side of `reasoning_trl.py`, run by the Python of its own environment.

One JSON object a line: each on stdin asks for a training by `GRPOTrainer`, whose network is written to a folder, and
gets the seconds on stdout. GRPO is as TRL has it: rewards are divided by the standard deviation of their group, the
loss is its default ("dapo"), ratios are clipped, and beta, the coefficient of the KL, is 0 unless asked for. Each step
draws `batch` completions, `generations` of each prompt, and takes one step of Adam with them. What differs from TRL's
defaults is in `_trl.RULES`: nothing comes between the policy and its samples, all is float32 without gradient
checkpointing, and the learning rate falls linearly to 0.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: TRL's trainers report to the Hub that they are being made

import torch
import trl
from _peer import serve
from _trl import RULES
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging


def train(
    model: str,
    prompts: list[str],
    answers: list[str],
    ids: list[int],
    pattern: str,
    tokens: int,
    beta: float,
    steps: int,
    batch: int,
    generations: int,
    learning_rate: float,
    folder: str,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    set_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer(prompts[0])["input_ids"] != ids:
        raise ValueError("TRL would not complete the prompt's ids that bayeslm completes")
    answer_of = re.compile(pattern)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = [answer_of.findall(text.strip()) for text in completions]
        return [float(bool(x) and x[-1].strip() == a) for x, a in zip(found, answer, strict=True)]

    with tempfile.TemporaryDirectory() as output:
        config = trl.GRPOConfig(
            output_dir=output,
            beta=beta,
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=batch,
            num_generations=generations,
            max_completion_length=tokens,
            shuffle_dataset=False,  # the order of the prompts is given
            seed=seed,
            **RULES,
        )
        trainer = trl.GRPOTrainer(
            model=network,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts, "answer": answers}),
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"seconds": seconds, "version": trl.__version__}


if __name__ == "__main__":
    logging.disable_progress_bar()
    serve(train)
