"""Ranks and single processes as forks of one process, which has loaded the packages once and computed nothing."""

import os
import socket
import sys
from collections.abc import Callable


def start(run: Callable[[int], object], world: int = 1, **environment: str) -> list[int]:
    """Calls `run(rank)` in `world` processes that can form a process group; returns their ids.

    Args:
        run: ends its process with 0 where it returns, with 1 where it raises.
        world: number of ranks; with 1 the process is told nothing about ranks.
        environment: variables of these processes alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(run, rank, world, port, environment) for rank in range(world)]


def _fork(run: Callable[[int], object], rank: int, world: int, port: int, environment: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    os.environ |= environment
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        run(rank)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait(*processes: int) -> None:
    """Waits for the processes to end.

    Raises:
        AssertionError: one of them failed.
    """
    for process in processes:
        _, status = os.waitpid(process, 0)
        assert status == 0, f"process {process} ended with {status}"
