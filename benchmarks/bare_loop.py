"""The cost of `SVI` beyond its arithmetic: its steps compared with those of the same loop written by hand.

    python benchmarks/bare_loop.py [--steps 40] [--threads 2]

`BareLoop` is plain PyTorch and transformers, written for one program: it uses no Pyro, no plates, no factors, and
nothing of bayeslm. A step draws a group of completions from the policy with a key-value cache (the prompt once, then
token by token), scores them under the prior, and under the policy with gradient (the prompt once, then all tokens),
and moves along the leave-one-out gradient of the ELBO: clipped, by Adam, at a rate that falls linearly. Networks,
adapters, reward and group are the same on both sides, and they take their steps in turn in one process, so that other
work on the machine slows both.

First both compute the loss and its gradient on the same completions, with weights that differ from the initial
ones. They must agree to 0.1%.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyro
import torch
from svi_smollm2 import BETA, GROUP, PROMPT, RANK, TOKENS
from svi_trl import PROMPT as IDS
from svi_trl import TOKENS as FEW
from svi_trl import Problem, count
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from bayeslm.inference import SVI
from bayeslm.inference.program import inspect
from bayeslm.inference.training import Adam, AutoPolicy, ReverseKL, StatefulLoss, StepRecord
from bayeslm.models import LanguageModel, rewards
from bayeslm.models.lm import word_tokenizer

RATE, CLIP = 1e-3, 1.0
WARM_UP = 2  # steps that are not counted


@dataclass
class Task:
    """A prior, one prompt's ids, and the reward r / beta of completions (..., tokens) as each side evaluates it."""

    name: str
    lm: LanguageModel
    prompt: list[int]
    tokens: int
    group: int
    rank: int | None
    reward: Callable[[Tensor], Tensor]
    bare_reward: Callable[[Tensor], Tensor]
    drawn: Tensor | None = None

    def model(self, prompts: list[list[int]]) -> None:
        with pyro.plate("prompts", len(prompts)):
            self.drawn = pyro.sample("completion", self.lm(prompts, self.tokens))
            pyro.factor("reward", self.reward(self.drawn))


def tiny() -> Task:
    """The third problem of `svi_trl.py`: a Llama of 2 layers, 8 words, texts of 5; all weights are trained."""
    problem = Problem(count, 2, 0.3)

    def reward(x: Tensor) -> Tensor:
        return problem.reward(x) / problem.beta

    return Task("tiny Llama", problem.lm, IDS, FEW, 128, None, reward, reward)


def small() -> Task:
    """A Llama of 4 layers, 512 words, texts of 16; all weights are trained towards words of even numbers."""
    torch.manual_seed(0)
    words = ["<eos>", *(f"w{i}" for i in range(1, 512))]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    network = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=64))

    def reward(x: Tensor) -> Tensor:
        return (x % 2 == 0).float().sum(-1)

    return Task(
        "small Llama", LanguageModel(network, word_tokenizer(words, "<eos>")), IDS, 16, 64, None, reward, reward
    )


def smollm2() -> Task:
    """SmolLM2-135M-Instruct with LoRA, as in `svi_smollm2.py`."""
    lm = LanguageModel.from_pretrained("smollm2", dtype=torch.float32)
    sentiment, analyzer = rewards.Sentiment(), SentimentIntensityAnalyzer()

    def reward(x: Tensor) -> Tensor:
        return sentiment([PROMPT], lm.decode(x)) / BETA

    def bare_reward(x: Tensor) -> Tensor:
        texts = lm.tokenizer.batch_decode(x, skip_special_tokens=True)
        return torch.tensor([analyzer.polarity_scores(text)["compound"] for text in texts]) / BETA

    ids = lm.tokenizer(PROMPT)["input_ids"]
    return Task("SmolLM2-135M, LoRA", lm, ids, TOKENS, GROUP, RANK, reward, bare_reward)


class BareLoop:
    """Leave-one-out policy gradient with a KL penalty.

    :param prior: a causal language model of transformers, frozen.
    :param policy: another, some of whose parameters require gradients.
    :param reward: r / beta of completions (group, tokens), as (group,).
    """

    def __init__(
        self,
        prior: Any,
        policy: Any,
        prompt: list[int],
        tokens: int,
        group: int,
        eos: int,
        reward: Callable[[Tensor], Tensor],
        steps: int,
    ) -> None:
        self.prior, self.policy = prior, policy
        self.prompt = torch.tensor([prompt])
        self.tokens, self.group, self.eos = tokens, group, eos
        self.reward = reward
        self.params = [p for p in policy.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.params, lr=RATE, betas=(0.9, 0.95), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda done: 1.0 - done / steps)

    def prefill(self, network: Any) -> tuple[Tensor, Any]:
        """Hidden state (group, 1, width) after the prompt, and the cache, from one forward pass of one row."""
        out = network.model(input_ids=self.prompt, use_cache=True)
        out.past_key_values.batch_repeat_interleave(self.group)
        return out.last_hidden_state[:, -1:].expand(self.group, -1, -1), out.past_key_values

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Completions (group, tokens), padded with EOS after the first."""
        hidden, cache = self.prefill(self.policy)
        x = torch.full((self.group, self.tokens), self.eos)
        alive = torch.ones(self.group, dtype=torch.bool)
        for t in range(self.tokens):
            cdf = self.policy.lm_head(hidden[:, -1]).float().softmax(-1).cumsum(-1)
            token = torch.searchsorted(cdf, torch.rand(self.group, 1) * cdf[:, -1:]).squeeze(-1)
            token = token.clamp_max(cdf.shape[-1] - 1)
            x[:, t] = torch.where(alive, token, self.eos)
            alive &= token != self.eos
            if t + 1 == self.tokens or not alive.any():
                break
            hidden = self.policy.model(input_ids=token[:, None], past_key_values=cache).last_hidden_state
        return x

    def log_prob(self, network: Any, x: Tensor) -> Tensor:
        """log p(x | prompt) (group,); the head sees no padding."""
        first, cache = self.prefill(network)
        rest = network.model(input_ids=x[:, :-1], past_key_values=cache).last_hidden_state
        ends = (x == self.eos).long()
        live = ends.cumsum(-1) - ends == 0
        logits = network.lm_head(torch.cat([first, rest], dim=1)[live]).float()
        scores = logits.gather(-1, x[live][:, None]).squeeze(-1) - logits.logsumexp(-1)
        return torch.zeros(x.shape).masked_scatter(live, scores).sum(-1)

    def loss(self, x: Tensor) -> Tensor:
        """The negative ELBO, with the leave-one-out gradient."""
        with torch.no_grad():
            log_p = self.log_prob(self.prior, x)
        log_q = self.log_prob(self.policy, x)
        f = (self.reward(x) + log_p - log_q).detach()
        advantage = (f - f.mean()) * (len(f) / (len(f) - 1))
        surrogate = (advantage * log_q).mean()
        return surrogate.detach() - surrogate - f.mean()

    def step(self) -> None:
        self.adam.zero_grad()
        self.loss(self.draw()).backward()
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.adam.step()
        self.schedule.step()


def bare(task: Task, policy: LanguageModel, steps: int) -> BareLoop:
    network: Any = policy.network
    inner = network.get_base_model() if task.rank else network
    (eos,) = task.lm.eos_token_ids
    return BareLoop(task.lm.network, inner, task.prompt, task.tokens, task.group, eos, task.bare_reward, steps)


def check(task: Task) -> tuple[float, float]:
    """The relative differences of the losses and of the gradients of both sides, on the same completions."""
    with pyro.get_param_store().scope():
        torch.manual_seed(0)
        guide = AutoPolicy(inspect(task.model, [task.prompt]), task.rank)
        assert guide.policy is not None
        loop = bare(task, guide.policy, 1)
        for p in loop.params:
            p.data += 0.02 * torch.randn_like(p)
        mine = StatefulLoss(ReverseKL(task.group)).loss_and_grads(task.model, guide, [task.prompt])
    gradient = torch.cat([p.grad.flatten() for p in loop.params])
    loop.adam.zero_grad()
    assert task.drawn is not None
    loss = loop.loss(task.drawn[:, 0])
    loss.backward()
    other = torch.cat([p.grad.flatten() for p in loop.params])
    return abs(mine / float(loss.detach()) - 1.0), float((gradient - other).norm() / other.norm())


def measure(task: Task, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the steps of `SVI` and of the bare loop, which takes one after each of `SVI`'s."""
    loop = bare(task, task.lm.policy(task.rank), steps)
    mine: list[float] = []
    other: list[float] = []
    began = time.perf_counter()

    def watch(record: StepRecord) -> None:
        nonlocal began
        if record.step == 0:
            return
        now = time.perf_counter()
        mine.append(now - began)
        loop.step()
        began = time.perf_counter()
        other.append(began - now)

    engine = SVI(
        num_steps=steps,
        num_particles=task.group,
        optimizer=Adam(RATE, clip_norm=CLIP),
        guide=functools.partial(AutoPolicy, lora_rank=task.rank),
        callbacks=[watch],
        num_samples=1,
        seed=0,
        progress=False,
    )
    engine.run(task.model, [task.prompt])
    return np.array(mine[WARM_UP:]), np.array(other[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="on SmolLM2; ten times as many on the others")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.steps <= WARM_UP + 1:
        parser.error(f"--steps must be more than {WARM_UP + 1}, since the first {WARM_UP} are not counted")
    torch.set_num_threads(options.threads)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "pyro-ppl"))
    print(f"{names}, {options.threads} threads, steps in turn\n")
    print("| network | group, tokens | SVI, ms a step | bare loop | ratio (median; quarters) | loss, gradient off by |")
    print("|---|---|---|---|---|---|")
    for make, steps in ((tiny, 10 * options.steps), (small, 10 * options.steps), (smollm2, options.steps)):
        task = make()
        differences = check(task)
        if max(differences) > 1e-3:
            sys.exit(f"{task.name}: the bare loop computes something else: loss and gradient differ by {differences}")
        mine, other = measure(task, steps)
        low, middle, high = np.quantile(mine / other, (0.25, 0.5, 0.75))
        print(
            f"| {task.name} | {task.group}, {task.tokens} | {1e3 * np.median(mine):.1f} | {1e3 * np.median(other):.1f} "
            f"| {middle:.3f}; {low:.3f} to {high:.3f} | {differences[0]:.0e}, {differences[1]:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
