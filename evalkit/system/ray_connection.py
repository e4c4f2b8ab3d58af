"""Start a private Ray instance on this machine, or join a cluster."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, first_line
from evalkit.system import ray_guard

__all__ = ["joined_ray", "private_ray"]

CONNECT_SECONDS = 10.0
MOST_OF_A_SOCKET = 107
SOCKET_OF_RAY = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1234567")


@contextmanager
def private_ray() -> Iterator[None]:
    """A private Ray instance, which ends with the block or with this process.

    Raises:
        InputError: Ray does not start.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir=_short_folder())
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", ray_guard.__file__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )
    try:
        with _ray() as ray:
            try:
                with _environment(_for_private(folder)):
                    _read_environment_again()
                    # Ray would start a worker per CPU. We start our own workers, which request no CPUs.
                    _init(ray, "local", num_cpus=0, include_dashboard=False, _temp_dir=folder)
            except Exception as error:  # many types
                raise InputError(f"Ray does not start on this machine: {first_line(error)}") from error
            yield
    finally:
        guard.communicate(b"\n")


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """Join the cluster at ``HOST:PORT`` within the block.

    Raises:
        InputError: The cluster cannot be joined.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise InputError(
            f"No address of a Ray cluster: {address!r}. Give HOST:PORT, as `ray start` prints it."
        )
    _check_that_it_answers(address, host.strip("[]"), int(port))
    with _ray() as ray:
        try:
            _init(ray, address)
        except Exception as error:  # many types
            raise InputError(
                f"Cannot join the Ray cluster at {address}: {first_line(error)}. This machine must be one of "
                f"its nodes: run `ray start --address={address}` here, with the same versions of Ray and "
                "Python, and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as for the cluster, if it has a token."
            ) from error
        yield


# A gRPC client (HTTP/2) starts with a SETTINGS frame, and the server responds with its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def _check_that_it_answers(address: str, host: str, port: int) -> None:
    """Check for a gRPC server. Ray itself would wait forever for another type, such as its dashboard."""
    advice = "Give the HOST:PORT that `ray start --head` prints for other nodes, usually of port 6379."
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise InputError(f"No Ray cluster at {address}: {error}. {advice}") from error
    if answer[3:4] != b"\4":
        raise InputError(f"No Ray cluster at {address}: another kind of server answers there. {advice}")


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) + len("/ray-12345678") + SOCKET_OF_RAY <= MOST_OF_A_SOCKET else "/tmp"


def _for_private(folder: str) -> dict[str, str | None]:
    return {
        ray_guard.MARK: folder,
        "RAY_ADDRESS": None,
        # Inside a cluster job, this has the job's settings, and packages that only that cluster has.
        "RAY_JOB_CONFIG_JSON_ENV_VAR": None,
        "RAY_AUTH_MODE": "token",
        # Without a token, Ray writes one to the home directory, and all other Ray instances then use it.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        # So that workers can import the same modules as this process.
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),
    }


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


def _read_environment_again() -> None:
    """Make Ray read its environment variables again, which it does only when it is imported."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _init(ray: Any, address: str, **options: Any) -> None:
    with warnings.catch_warnings():
        # Releases before 2.60 warn about future behaviour.
        warnings.simplefilter("ignore", FutureWarning)
        on_terminate = signal.getsignal(signal.SIGTERM)
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    # Ray's handler prints the stack and aborts.
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(TypeError):  # the handler was not set from Python
            signal.signal(signal.SIGTERM, on_terminate)


@contextmanager
def _ray() -> Iterator[Any]:
    """The module ``ray``. At the end, Ray is shut down and its changes to this process are undone."""
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        raise InputError("This process already uses Ray: call ray.shutdown() before.")
    # As Ray's debugger does. Otherwise Ray prints the death of each worker to standard output.
    prints: Any = importlib.import_module("ray._private.worker")
    prints._worker_logs_enabled = False
    try:
        yield ray
    finally:
        ray.shutdown()
        _read_environment_again()
        prints._worker_logs_enabled = True
