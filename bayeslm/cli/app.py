"""The command line: `bayeslm demo`, `bayeslm infer`, `bayeslm show`, `bayeslm label`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bayeslm.posterior import Posterior

from . import report, resume
from .console import INTERRUPTED, clear_errors, err_console, language_model, out_console, policy_of, read_prompts
from .label import label
from .options import make_engine, make_twist, read_settings

app = typer.Typer(
    name="bayeslm",
    help="Reinforcement learning of language models as Bayesian inference: a prior, a reward, a posterior.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(label)


NOT_THE_CALL = ("prompt", "prompts", "engine", "device", "checkpoint", "tensorboard", "out")
"""Options that do not change what an engine gives, or are told of otherwise."""


@app.command()
def infer(
    ctx: typer.Context,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each completed on its own.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file of prompts: one a line, or JSONL with "prompt" and columns for the reward.'),
    ] = None,
    prior: Annotated[str, typer.Option(help="smollm2, a folder, or a name on the Hugging Face hub.")] = "smollm2",
    reward: Annotated[
        str, typer.Option(help="sentiment, toxicity, length, ... or your own as package.module:function.")
    ] = "sentiment",
    reward_settings: Annotated[str, typer.Option(help="Settings of the reward, as JSON: '{\"target\": 20}'.")] = "{}",
    scale: Annotated[float, typer.Option(help="Multiplies the reward; -1 for less toxicity, say.")] = 1.0,
    beta: Annotated[float, typer.Option(help="KL coefficient: small is sharp, large is near the prior.")] = 0.1,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="exact, importance, rejection, bestofn, smc, annealed, mcmc or svi; several are compared. "
            "Default: importance."
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(
            help="importance: draws; rejection: proposals at most; bestofn: n; smc, annealed: in each chain; "
            "mcmc: of its warm start; svi: completions a step."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="rejection, bestofn, mcmc, svi: draws to keep.")] = None,
    chains: Annotated[int | None, typer.Option(help="Independent replicates. Default: 1, mcmc: 16.")] = None,
    twist: Annotated[
        str | None,
        typer.Option(
            help="smc: what unfinished texts are weighed by: partial (the reward of the text so far), prefix, learned "
            "(a head trained first), learned-partial (one that also reads partial), or the folder of one that was."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="smc: let the twist propose among so many likeliest next tokens.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="svi: gradient steps; mcmc: sweeps of warm-up.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="svi: of Adam.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="svi: elbo, log-variance, log-variance-replay, forward-kl, jensen-shannon, total-variation or iwelbo. "
            "Default: elbo."
        ),
    ] = None,
    minibatch: Annotated[
        int | None,
        typer.Option(min=1, help="svi, importance: prompts at a time, of a file with more than one step takes."),
    ] = None,
    kl_target: Annotated[
        float | None, typer.Option(help="svi: nats of KL to the prior to hold, by moving beta while training.")
    ] = None,
    stop_kl: Annotated[
        float | None, typer.Option(help="svi: ends the training so many nats from the posterior, by its own estimate.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="svi: a file of prompts that are not trained on, to look at beside; as --prompts."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="svi: the policy of a training before, to begin as; importance: to propose. A folder, as "
            "runs/weather/svi/policy."
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=0, help="svi: of the adapters; 0 trains every weight. Default: 16.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="svi: a folder to go on from when the run was killed; the same call does.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="svi: a folder for TensorBoard.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest completion.")] = 24,
    temperature: Annotated[float, typer.Option(help="Of the prior's sampling law.")] = 1.0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16: of the weights; default: as they are stored.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts in one pass of the network at most. Default: what memory allows.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="svi: less memory for long texts, a third more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Reproduces the run.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for posteriors, adapter and picture. The same call goes on with what an earlier one "
            "left there, and may name more engines."
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
    with clear_errors():
        from bayeslm.inference.training import HeldOut, TensorBoard, identify
        from bayeslm.models import TiltedLM, rewards

        names = engine or ["importance"]
        if (twist is not None or top_k is not None) and "smc" not in names:
            raise ValueError("--twist and --top-k are for --engine smc")
        if top_k is not None and twist is None:
            raise ValueError("--top-k lets a twist propose: say which by --twist")
        if minibatch is not None and (unable := [name for name in names if name not in ("svi", "importance")]):
            raise ValueError(f"--minibatch is for --engine svi and importance; {unable[0]} takes all prompts at once")
        training: dict[str, Any] = {
            "objective": objective,
            "kl_target": kl_target,
            "checkpoint": checkpoint,
            "tensorboard": tensorboard,
            "stop_kl": stop_kl,
            "lora_rank": lora_rank,
        }
        of_svi = training | {"held_out": held_out, "gradient_checkpointing": gradient_checkpointing or None}
        for option, given in of_svi.items():
            if given is not None and "svi" not in names:
                raise ValueError(f"--{option.replace('_', '-')} is for --engine svi")
        if policy is not None and not {"svi", "importance"} & set(names):
            raise ValueError("--policy is for --engine svi and importance")
        sizes: dict[str, Any] = {"particles": particles, "samples": samples, "chains": chains, "steps": steps}
        sizes |= {"learning_rate": learning_rate, "top_k": top_k} | training
        ready = twist if twist in ("partial", "prefix") else None  # others need the language model, and come later
        engines = {name: make_engine(name, seed=seed, twist=ready, **sizes) for name in names}
        texts, columns = read_prompts(prompt or [], prompts)
        others = None if held_out is None else read_prompts([], held_out)
        sys.path.insert(0, str(Path.cwd()))  # package.module:function is looked for where the user stands
        settings = read_settings(reward_settings)
        if ":" in reward and settings:
            raise ValueError("--reward-settings are for the ready rewards: a function of your own has none")
        evidence = scale * (rewards.load(reward) if ":" in reward else rewards.get(reward, **settings))
        if out is not None:
            told = {"prompts": texts, "columns": columns, "held_out": others, "reward itself": identify(evidence)}
            resume.reserve(out, {name: str(x) for name, x in ctx.params.items() if name not in NOT_THE_CALL} | told)
        sizes_of_passes = {"batch_size": batch_size, "gradient_checkpointing": gradient_checkpointing}
        lm = language_model(prior, device, dtype, **sizes_of_passes)
        start = None if policy is None else policy_of(policy, lm)
        if "svi" not in engines:  # no weight will change
            lm, start = lm.packed(), None if start is None else start.packed()
        program = functools.partial(
            TiltedLM, lm, evidence, beta, max_new_tokens=max_new_tokens, temperature=temperature
        )
        model = program(subsample_size=minibatch)
        for name in ("svi", "importance") if start is not None else ():
            if name in engines:
                factory = engines[name].guide  # with the rank of adapters, if the user said it
                guide = start if factory is None else functools.partial(factory, start=start)
                engines[name] = dataclasses.replace(engines[name], guide=guide)
        if others is not None:
            unseen = HeldOut({"held out": functools.partial(program(), others[0], **others[1])})
            callbacks = [*engines["svi"].callbacks, unseen]
            callbacks.sort(
                key=lambda callback: isinstance(callback, TensorBoard)
            )  # last, to write what others evaluate
            engines["svi"] = dataclasses.replace(engines["svi"], callbacks=callbacks)
        if twist is not None and twist != ready:
            learned = make_twist(twist, lm, model, texts, columns, seed, out)
            engines["smc"] = make_engine("smc", seed=seed, twist=learned, **sizes)
        _run(model, texts, columns, engines, out)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="What `infer --out` or `demo` wrote, or one posterior in it.")],
    texts: Annotated[int, typer.Option(help="How many of the best completions.")] = 3,
) -> None:
    """Show saved posteriors: the comparison, the best completions, and warnings."""
    with clear_errors():
        found = {path.parent.name: path.parent for path in sorted(directory.glob("*/posterior.json"))}
        if (directory / "posterior.json").is_file() or not found:
            found = {directory.name: directory}
        posteriors = {name: Posterior.load(path) for name, path in found.items()}
        order = sorted(posteriors, key=lambda name: posteriors[name].policy_path is not None)  # policies last
        report.show({name: posteriors[name] for name in order}, out_console, texts)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new folder for what it makes; default: demo, or demo-2, demo-3, ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Reproduces the run.")] = 0,
) -> None:
    """The main job: SmolLM2-135M's posterior under a sentiment reward, by three engines that agree.

    Takes some minutes on two cores: importance sampling, rejection sampling (exact draws), and SVI, which
    trains a LoRA policy. Compare their log Z and rewards.
    """
    with clear_errors():
        from bayeslm.inference import SVI, ImportanceSampling, RejectionSampling
        from bayeslm.inference.training import Adam
        from bayeslm.models import TiltedLM, rewards

        out = out or next(path for path in _numbered("demo") if not path.exists())
        resume.reserve(out, {"demo": seed})
        prompts = ["My dinner at the restaurant was", "The weather this weekend will be"]
        model = TiltedLM(language_model("smollm2", None), rewards.Sentiment(), beta=0.2)
        engines = {
            "importance": ImportanceSampling(num_particles=160, seed=seed),
            "rejection": RejectionSampling(num_samples=24, max_proposals=1000, seed=seed + 1),
            "svi": SVI(
                num_steps=16,
                num_particles=8,
                optimizer=Adam(5e-4),
                num_samples=128,
                num_prior_samples=64,
                seed=seed + 2,
            ),
        }
        out_console.print(
            "prior SmolLM2-135M-Instruct · reward VADER sentiment in [-1, 1] · beta 0.2 · 24 tokens\n"
            "posterior p(x | prompt) exp(reward / beta) / Z, by " + ", ".join(engines),
            highlight=False,
        )
        _run(model, prompts, {}, engines, out)


# -- what the commands share -----------------------------------------------------------------------------------


def _numbered(name: str) -> Iterator[Path]:
    """name, name-2, name-3, ..."""
    yield Path(name)
    yield from (Path(f"{name}-{i}") for i in itertools.count(2))


def _run(
    model: Any, prompts: list[str], columns: dict[str, list[Any]], engines: dict[str, Any], out: Path | None
) -> None:
    """Run the engines one after another, keep each result as soon as it is there, and report."""
    from bayeslm.inference import RunError

    posteriors: dict[str, Posterior] = {}
    for name, engine in engines.items():
        if (there := resume.done(out, name)) is not None:
            err_console.print(f"{name}: is in {out} already", highlight=False)
            posteriors[name] = there
            continue
        try:
            posteriors[name] = engine.run(model, prompts, **columns)
        except BaseException as error:
            policy = error.so_far.policy if isinstance(error, RunError) else None
            kept = getattr(engine, "checkpoint", None)  # which the same call resumes
            if kept is not None and isinstance(error.__cause__ or error, KeyboardInterrupt):
                error.add_note(f"the training so far is in {kept}: repeat the command to resume it")
            if out is not None and policy is not None and kept is None:
                policy.save_pretrained(out / f"{name}-policy-so-far")
                error.add_note(f"the policy trained so far is in {out / f'{name}-policy-so-far'}")
            if posteriors:
                report.show(posteriors, out_console)
            raise
        if out is not None:
            resume.keep(out, name, posteriors[name])
        seconds = posteriors[name].stats["seconds"]
        err_console.print(f"{name}: {seconds:.0f} s", highlight=False)
        if posteriors[name].stats.get("interrupted"):
            err_console.print("interrupted: what there is follows", style="yellow")
            break
    report.show(posteriors, out_console)
    if out is not None:
        pictures = ", ".join(_pictures(posteriors, out))
        out_console.print(
            f"written to {out}: posteriors (NetCDF for ArviZ in each), policy, {pictures}", highlight=False
        )
        out_console.print(f"see them again: bayeslm show {out}", highlight=False)
    if any(posterior.stats.get("interrupted") for posterior in posteriors.values()):
        raise typer.Exit(INTERRUPTED)


def _pictures(posteriors: dict[str, Posterior], out: Path) -> list[str]:
    """Draw the rewards, and the training if there was one; gives the files' names."""
    from bayeslm.plots import plot_rewards, plot_training

    try:
        from matplotlib.pyplot import close

        figures = {"rewards.png": plot_rewards(posteriors)}
        if "svi" in posteriors and "elbo" in posteriors["svi"].stats:
            figures["training.png"] = plot_training(posteriors["svi"])
    except ImportError as error:
        err_console.print(f"no picture: {error}", style="yellow", markup=False)
        return ["no picture"]
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
        close(figure)
    return list(figures)


if __name__ == "__main__":
    app()
