"""A function on several processes that work together, as `torchrun` starts them: forks, which import nothing anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bayeslm import Posterior

SECONDS = 60.0  # until a launch counts as hanging


def launch(function: Callable[[int], Any], size: int = 2, **environment: str) -> list[Any]:
    """Return what the function returns on each rank: a value, the error that it raised, or None if it died.

    Whatever the function returns must be picklable. Policies are left out of posteriors.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    workers = []
    for rank, (_, end) in enumerate(pipes):
        variables = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment
        workers.append(context.Process(target=_work, args=(function, rank, variables, end), daemon=True))
        workers[-1].start()
        end.close()  # the worker's copy alone is left: its death is seen
    results: list[Any] = []
    ends = time.monotonic() + SECONDS
    for (result, _), worker in zip(pipes, workers, strict=True):
        try:
            assert result.poll(max(0.0, ends - time.monotonic())), f"{function} hangs"
            results.append(pickle.loads(result.recv_bytes()))
        except EOFError:
            results.append(None)
        finally:
            if time.monotonic() > ends:
                for each in workers:
                    each.kill()
        worker.join(timeout=5)
    return results


def _work(function: Callable[[int], Any], rank: int, variables: dict[str, str], end: Any) -> None:
    os.environ.update(variables)
    try:
        result = function(rank)
    except (Exception, KeyboardInterrupt) as error:  # sent to the test
        result = error.with_traceback(None)
        result.__cause__ = None
    if isinstance(result, Posterior):
        result = replace(result, policy=None)
    with contextlib.suppress(BrokenPipeError):
        end.send_bytes(pickle.dumps(result))
    end.close()
    os._exit(0)  # a fork runs none of pytest's own exits
