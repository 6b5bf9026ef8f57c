"""The launchers that users have: a script by `torchrun` and `accelerate launch`, on one node and on two of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bayeslm.inference import Exact
from bayeslm.models import LanguageModel, TiltedLM

pytestmark = pytest.mark.long
SECONDS = 300  # until a launch counts as hanging
SCRIPT = """
import os
import sys
import numpy as np
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM

def reward(prompts, completions):
    return [float(text.count("a")) - 0.5 * float("b" in text) for text in completions]

model = TiltedLM(LanguageModel.tabular(["<eos>", "a", "b"], order=2, seed=0), reward, beta=0.7, max_new_tokens=3)
engines = [
    ImportanceSampling(1024, seed=1, progress=False),
    SMC(64, num_chains=16, seed=1, progress=False),
    SVI(20, objective=ReverseKL(16), optimizer=Adam(0.05), num_samples=1024, seed=1, progress=False),
]

if __name__ == "__main__":
    found = {}
    for engine in engines:
        posterior, name = engine.run(model, ["a", "a b"]), type(engine).__name__
        assert posterior.stats["processes"] == 2
        for key in ("log_weights", "log_evidence", "log_evidence_stderr"):
            found[f"{name}, {key}"] = getattr(posterior, key)
        found[f"{name}, texts"] = posterior.samples["completion"]
    np.savez(os.path.join(sys.argv[1], os.environ["RANK"]), **found)
"""
TORCHRUN = ["torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", "PORT"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", "PORT"]
LAUNCHES = {  # the commands, one for each node
    "torchrun, two nodes": [
        [*TORCHRUN, "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"] for node in ("0", "1")
    ],
    "accelerate, one node": [[*ACCELERATE, "--num_machines", "1"]],
    "accelerate, two nodes": [[*ACCELERATE, "--num_machines", "2", "--machine_rank", node] for node in ("0", "1")],
}


def launched(folder: Path, commands: list[list[str]]) -> list[dict[str, np.ndarray]]:
    """Run the script by the commands, one for each node, and return the arrays that each of two processes has found."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "BAYESLM_TIME_LIMIT": f"{SECONDS}"}
    nodes = []
    for command in commands:
        words = [sys.executable, "-m", *(port if word == "PORT" else word for word in command)]
        output = (folder / f"node {len(nodes)}").open("w")
        with output:
            nodes.append(
                subprocess.Popen([*words, str(script), str(folder)], env=variables, stdout=output, stderr=output)
            )
    try:
        for i, node in enumerate(nodes):
            assert node.wait(SECONDS) == 0, (folder / f"node {i}").read_text()[-3000:]
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    (first, second) = launched(tmp_path_factory.mktemp("launch") / "one", [[*TORCHRUN, "--nproc-per-node", "2"]])
    assert_same(first, second)
    return first


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_two_processes_of_a_launcher_agree_with_exact(one_node):
    def reward(prompts, completions):
        return [float(text.count("a")) - 0.5 * float("b" in text) for text in completions]

    lm = LanguageModel.tabular(["<eos>", "a", "b"], order=2, seed=0)
    exact = Exact().run(TiltedLM(lm, reward, beta=0.7, max_new_tokens=3), ["a", "a b"])
    for name in ("ImportanceSampling", "SMC", "SVI"):
        off = one_node[f"{name}, log_evidence"] - exact.log_evidence
        assert (np.abs(off) < 4 * one_node[f"{name}, log_evidence_stderr"]).all(), name
        texts = one_node[f"{name}, texts"].reshape(2, -1)  # of the first process and of the second
        assert not np.array_equal(*texts)


@pytest.mark.parametrize("name", LAUNCHES)
def test_another_launch_gives_the_same_posterior(name, one_node, tmp_path):
    """To the bit, on every process: two nodes are two processes."""
    for found in launched(tmp_path / "launch", LAUNCHES[name]):
        assert_same(found, one_node)
