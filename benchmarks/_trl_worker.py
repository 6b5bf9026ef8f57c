"""TRL's side of a benchmark on an enumerable problem, run by the Python of its own environment.

One JSON object a line: each on stdin asks for a training, and each gets one answer on stdout, the exact
KL(q || posterior) as a function of the completions drawn and of the seconds trained. What TRL (1.16.0) does:

- Both trainers draw `batch` completions from the policy, divided evenly among the prompts, and take one step of Adam
  (no weight decay, the fused kernel, which is the fastest) with them: on-policy, so that the clipping of ratios never
  acts. The learning rate falls linearly to 0 from the first step. All of this is float32, without the gradient
  checkpointing and the bfloat16 that are TRL's defaults.
- Nothing comes between the policy and its samples: temperature 1, no top-k or top-p. A completion without an EOS
  counts as complete at the limit, as in bayeslm's distribution of completions, and is trained on.
- `RLOOTrainer` subtracts beta (log q(x) - log p(x)) of the completion from its reward, and the leave-one-out
  mean from that. Its loss is the mean over completions of -advantage log q(x), an unbiased gradient of
  E[r] - beta KL(q || p), whose maximum is the posterior. Normalised advantages (off by default) would change beta.
- `GRPOTrainer` is set to come as close as it can: rewards are not divided by their standard deviation (its default,
  which would change beta), and the loss is summed over tokens, not averaged (`dr_grpo`; the constant by which it
  divides, the limit of tokens, is nothing to Adam, but puts off the clipping of gradients). Its KL is of single tokens
  and is not credited to the tokens before them. What it converges to is therefore not the posterior: q(x_t | x_<t) is
  proportional to p(x_t | x_<t) exp(E_q[r | x_1:t] / beta), without the KL of later tokens that belongs in the exponent.
- Its clock starts with the first step and stands still while the KL is computed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: TRL's trainers report to the Hub that they are being made

import torch
import trl
from _peer import serve
from _trl import RULES
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.utils import logging

TRAINERS = {
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"normalize_advantages": False}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"scale_rewards": "none", "loss_type": "dr_grpo"}),
}


class Problem:
    """Prompts (prompts, tokens), all completions (values, tokens), and their rewards and posterior."""

    def __init__(self, folder: str) -> None:
        tensors = load_file(Path(folder) / "problem.safetensors")
        self.prompts, self.values = tensors["prompt"], tensors["values"]
        self.reward, self.log_posterior = tensors["reward"], tensors["log_posterior"]
        ended = (self.values == 0).cumsum(-1)
        self.counted = ended - (self.values == 0).long() == 0  # up to and including the first EOS

    @torch.no_grad()
    def kl(self, network: PreTrainedModel) -> float:
        """KL(q || posterior) by enumeration, the mean over prompts."""
        kls = []
        for prompt, log_posterior in zip(self.prompts, self.log_posterior, strict=True):
            ids = torch.cat([prompt.expand(len(self.values), -1), self.values[:, :-1]], dim=-1)
            logits = network(input_ids=ids, logits_to_keep=self.values.shape[-1]).logits
            scores = logits.float().log_softmax(-1).gather(-1, self.values[..., None]).squeeze(-1)
            log_q = (scores.double() * self.counted).sum(-1)
            kls.append((log_q.exp() * (log_q - log_posterior)).sum())
        return float(torch.stack(kls).mean())

    def reward_function(self, vocabulary: int) -> Callable[..., list[float]]:
        """TRL's kind of reward function. ``index``, a column of `dataset`, says which prompt was completed."""
        digits = vocabulary ** torch.arange(self.values.shape[-1])
        table = self.reward.new_full((len(self.prompts), vocabulary ** len(digits)), torch.nan)
        table[:, (self.values * digits).sum(-1)] = self.reward

        def reward(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
            # These end at their EOS. The padding of `values` is 0, so that it adds nothing to the code.
            codes = [sum(token * vocabulary**t for t, token in enumerate(ids)) for ids in completion_ids]
            return table[index, codes].tolist()

        return reward

    def dataset(self, tokenizer: Any, steps: int) -> Dataset:
        """Every prompt once a step, in one epoch: a new one would make a new loader."""
        texts = tokenizer.batch_decode(self.prompts)
        if tokenizer(texts)["input_ids"] != self.prompts.tolist():
            raise ValueError("the tokenizer does not give a prompt's text its token ids back")
        return Dataset.from_dict({"prompt": texts * steps, "index": list(range(len(texts))) * steps})


class Curve(TrainerCallback):
    """Samples, seconds and KL; the clock stands still while the last is computed."""

    def __init__(self, problem: Problem, batch: int, evaluate: list[int]) -> None:
        self.problem, self.batch, self.evaluate = problem, batch, set(evaluate)
        self.points: list[tuple[int, float, float]] = []
        self.seconds, self.resumed = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resumed = time.perf_counter()
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **_: Any) -> None:
        samples = state.global_step * self.batch
        if samples not in self.evaluate:
            return
        self.seconds += time.perf_counter() - self.resumed
        training = model.training
        self.points.append((samples, self.seconds, self.problem.kl(model.eval())))
        model.train(training)
        self.resumed = time.perf_counter()


def train(
    problem: str,
    trainer: str,
    beta: float,
    learning_rate: float,
    beta2: float,
    samples: int,
    batch: int,
    evaluate: list[int],
    seed: int,
    threads: int,
) -> dict[str, Any]:
    if any(count % batch for count in (samples, *evaluate)):
        raise ValueError("samples, and the counts at which to evaluate, must be multiples of batch")
    torch.set_num_threads(threads)
    task = Problem(problem)
    network = AutoModelForCausalLM.from_pretrained(problem, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(problem)
    curve = Curve(task, batch, evaluate)
    make, configure, settings = TRAINERS[trainer]
    with tempfile.TemporaryDirectory() as folder:
        config = configure(
            output_dir=folder,
            beta=beta,
            learning_rate=learning_rate,
            adam_beta2=beta2,
            max_steps=samples // batch,
            per_device_train_batch_size=batch,
            num_generations=batch // len(task.prompts),
            max_completion_length=task.values.shape[-1],
            shuffle_dataset=False,  # every batch holds every prompt
            seed=seed,
            **RULES,
            **settings,
        )
        make(
            model=network,
            reward_funcs=task.reward_function(network.config.vocab_size),
            args=config,
            train_dataset=task.dataset(tokenizer, config.max_steps),
            processing_class=tokenizer,
            callbacks=[curve],
        ).train()
    return {"curve": curve.points, "version": trl.__version__}


if __name__ == "__main__":
    logging.disable_progress_bar()
    serve(train)
