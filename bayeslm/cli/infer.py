"""The command `bayeslm infer`: the posterior over completions of prompts, by one engine or several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from bayeslm.checksums import checksums

from . import resume
from .comparison import compare
from .console import one_line_errors
from .inputs import language_model, load_reward, read_prompts, trained_policy
from .options import make_engine, make_twist, read_settings

# Options that do not change an engine's result, or are compared by their content when a command is repeated.
NOT_COMPARED = ("prompt", "prompts", "engine", "device", "checkpoint", "tensorboard", "out", "timeout")
NOT_COMPARED += ("checkpoint_minutes",)


def infer(
    ctx: typer.Context,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each completed on its own.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='A file of prompts: lines of text, or JSON(L), CSV, TSV or Parquet with "prompt" and columns for '
            "the reward."
        ),
    ] = None,
    prior: Annotated[
        str, typer.Option(help="The language model: smollm2, a folder, or a name on the Hugging Face hub.")
    ] = "smollm2",
    reward: Annotated[
        str, typer.Option(help="sentiment, toxicity, length, ... or a function of your own as package.module:function.")
    ] = "sentiment",
    reward_settings: Annotated[
        str, typer.Option(help="Settings of a built-in reward, as JSON: '{\"target\": 20}'.")
    ] = "{}",
    timeout: Annotated[
        float | None, typer.Option(help="Time limit of the reward for a batch of texts, in seconds. Default: none.")
    ] = None,
    scale: Annotated[float, typer.Option(help="A factor of the reward, such as -1 for less toxicity.")] = 1.0,
    beta: Annotated[
        float,
        typer.Option(help="The KL coefficient: a small one gives high rewards, a large one stays near the prior."),
    ] = 0.1,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="exact, importance, adaptive, auto, rejection, bestofn, smc, annealed, mcmc or svi; repeat the option "
            "to compare several. Default: importance."
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(
            help="importance: number of draws; adaptive, auto: the most draws; rejection: limit of proposals; bestofn: "
            "n; smc, annealed: particles in each chain; mcmc: particles that start the chains; svi: completions a step."
        ),
    ] = None,
    target_ess: Annotated[float | None, typer.Option(help="adaptive, auto: effective draws that end the run.")] = None,
    seconds: Annotated[float | None, typer.Option(help="adaptive, auto: seconds after which it ends.")] = None,
    samples: Annotated[int | None, typer.Option(help="rejection, bestofn, mcmc, svi: number of draws.")] = None,
    chains: Annotated[
        int | None, typer.Option(help="Number of independent chains. Default: 1; smc, annealed: 4; mcmc: 16.")
    ] = None,
    twist: Annotated[
        str | None,
        typer.Option(
            help="smc: what weights unfinished texts: partial (any reward of the text so far), prefix (a reward that "
            "scores unfinished texts), learned (a head that is trained first), learned-partial (a head that also takes "
            "partial as input), or the folder of a trained twist."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="smc: propose the next token by the twist, among so many likeliest tokens of the prior."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="svi, adaptive: number of gradient steps; mcmc: of warm-up sweeps.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="svi: learning rate of Adam. Default: steps find their size (TrustRegion).")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="svi: the objective: elbo, log-variance, log-variance-replay, forward-kl, jensen-shannon, "
            "total-variation or iwelbo. Default: by the size of the network; with --learning-rate, elbo."
        ),
    ] = None,
    minibatch: Annotated[
        int | None,
        typer.Option(min=1, help="svi, importance: number of prompts at a time, for more prompts than fit one step."),
    ] = None,
    kl_target: Annotated[
        float | None, typer.Option(help="svi: the KL to the prior, in nats, that is held by adapting beta in training.")
    ] = None,
    stop_kl: Annotated[
        float | None, typer.Option(help="svi: stop when the estimated KL to the posterior, in nats, is below this.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="svi: a file of held-out prompts to evaluate in training; format as for --prompts."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="svi: a trained policy to start from; importance: one to propose with. A folder such as "
            "runs/weather/svi/policy."
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=0, help="svi: rank of the adapters; 0 trains every weight. Default: 16.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="svi: a folder for checkpoints; repeat the command to resume a stopped run.")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(help="svi: minutes from one checkpoint to the next, at most. Default: 5.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="svi: a folder for curves in TensorBoard.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion, in tokens.")] = 24,
    temperature: Annotated[float, typer.Option(help="Divides the prior's logits.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is a GPU.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32, bfloat16 or float16. Default: the stored one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts in one pass of the network. Default: by the free memory.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="svi: use less memory for long texts, and a third more time."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Makes the run reproducible.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for posteriors, policy and plots. Repeat the command to resume a stopped run or to add "
            "an engine."
        ),
    ] = None,
) -> None:
    """Infer the posterior over completions of prompts under a reward.

    [bold]Examples[/bold]

      bayeslm infer "My dinner at the restaurant was" --beta 0.1

      bayeslm infer "The weather will be" --engine importance --engine svi --steps 40 --out runs/weather

      bayeslm infer "My dinner was" --engine smc --twist partial --chains 4 --engine mcmc --samples 50

      bayeslm infer --prompts prompts.jsonl --reward my_rewards:politeness --engine rejection
    """
    with one_line_errors(), contextlib.ExitStack() as held:
        from bayeslm.inference.training import HeldOut, TensorBoard, identify
        from bayeslm.models import TiltedLM

        names = engine or ["importance"]
        if (twist is not None or top_k is not None) and "smc" not in names:
            raise ValueError("--twist and --top-k are for --engine smc")
        if top_k is not None and twist is None:
            raise ValueError("--top-k needs a twist that proposes: choose one by --twist")
        if minibatch is not None and (others := [name for name in names if name not in ("svi", "importance")]):
            raise ValueError(f"--minibatch is for --engine svi and importance; {others[0]} takes all prompts at once")
        training: dict[str, Any] = {
            "objective": objective,
            "kl_target": kl_target,
            "checkpoint": checkpoint,
            "checkpoint_minutes": checkpoint_minutes,
            "tensorboard": tensorboard,
            "stop_kl": stop_kl,
            "lora_rank": lora_rank,
        }
        of_svi = training | {"held_out": held_out, "gradient_checkpointing": gradient_checkpointing or None}
        for option, value in of_svi.items():
            if value is not None and "svi" not in names:
                raise ValueError(f"--{option.replace('_', '-')} is for --engine svi")
        for option, value in {"target-ess": target_ess, "seconds": seconds}.items():
            if value is not None and not {"adaptive", "auto"} & set(names):
                raise ValueError(f"--{option} is for --engine adaptive and auto")
        if policy is not None and not {"svi", "importance"} & set(names):
            raise ValueError("--policy is for --engine svi and importance")
        sizes: dict[str, Any] = {"particles": particles, "samples": samples, "chains": chains, "steps": steps}
        sizes |= {
            "learning_rate": learning_rate,
            "top_k": top_k,
            "target_ess": target_ess,
            "seconds": seconds,
        } | training
        fixed = twist if twist in ("partial", "prefix") else None  # learned twists need the language model
        engines = {name: make_engine(name, seed=seed, twist=fixed, **sizes) for name in names}
        texts, columns = read_prompts(prompt or [], prompts)
        held_out_prompts = None if held_out is None else read_prompts([], held_out)
        one = load_reward(reward, read_settings(reward_settings))
        scaled_reward = scale * (one if timeout is None else one.with_timeout(timeout))
        results = held.enter_context(resume.Results(out))
        settings: dict[str, Any] = {name: str(x) for name, x in ctx.params.items() if name not in NOT_COMPARED}
        contents = {"prompts": texts, "columns": columns, "held_out": held_out_prompts, "reward's code": scale * one}
        settings |= {name: identify(x) for name, x in contents.items()}
        results.require_same(settings)
        sizes_of_passes = {"batch_size": batch_size, "gradient_checkpointing": gradient_checkpointing}
        lm = language_model(prior, device, dtype, **sizes_of_passes)
        trained = None if policy is None else trained_policy(policy, lm)
        if out is not None:  # else nothing is compared, and the weights need not be read through
            given = {"prior's content": identify(lm), "policy's content": identify(trained)}
            folder = None if twist is None or not Path(twist).is_dir() else Path(twist)
            given |= {"twist's content": None if folder is None else checksums(folder)}
            results.begin(settings | given)
        if not {"svi", "adaptive", "auto"} & set(engines):  # no weight is trained
            lm, trained = lm.packed(), None if trained is None else trained.packed()
        program = functools.partial(
            TiltedLM, lm, scaled_reward, beta, max_new_tokens=max_new_tokens, temperature=temperature
        )
        model = program(subsample_size=minibatch)
        for name in ("svi", "importance") if trained is not None else ():
            if name in engines:
                factory = engines[name].guide  # of a policy with the rank of --lora-rank
                guide = trained if factory is None else functools.partial(factory, start=trained)
                engines[name] = dataclasses.replace(engines[name], guide=guide)
        if held_out_prompts is not None:
            unseen = functools.partial(program(), held_out_prompts[0], **held_out_prompts[1])
            callbacks = [*engines["svi"].callbacks, HeldOut({"held out": unseen})]
            callbacks.sort(key=lambda callback: isinstance(callback, TensorBoard))  # it logs what the others evaluate
            engines["svi"] = dataclasses.replace(engines["svi"], callbacks=callbacks)
        if twist is not None and twist != fixed:
            learned = make_twist(twist, lm, model, texts, columns, seed, out)
            engines["smc"] = make_engine("smc", seed=seed, twist=learned, **sizes)
        compare(model, texts, columns, engines, results)
