"""Atomic files, locks between runs, devices, optional imports, tables, and mistakes in one sentence.

torch and SpeechBrain take seconds to import, so that only what uses them imports them.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub  # its classes cost a second and load on first use
import ruamel.yaml.error
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

PATIENCE = 20  # seconds; a killed run's reading processes live on for some
TRACEBACK = "MRL_TRACEBACK"  # environment variable that shows where an error comes from
MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    yaml.YAMLError,
    ruamel.yaml.error.YAMLError,
    KeyboardInterrupt,
)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """For ``with``: a temporary path to write, that takes ``path``'s place when it is complete.

    Whenever the process or the machine dies, ``path`` is as it was or complete.

    Arguments
    ---------
    path : path
        Of a file, or of a folder that does not exist. The temporary one is beside it, hidden.

    Raises
    ------
    OSError
        If it cannot be written, as on a full disk; ``path`` is as it was.

    Example
    -------
    >>> path = getfixture("tmp_path") / "report.json"
    >>> with replacing(path) as part:
    ...     _ = part.write_text("{}")
    >>> path.read_text(), [found.name for found in path.parent.iterdir()]
    ('{}', ['report.json'])
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with writing(path):
            yield part
            for file in part.iterdir() if part.is_dir() else [part]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError, before anything is computed, unless a file can be written at ``path``.

    Its folder is made if need be.
    """
    with writing(path):
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(path).parent).close()


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """Two files or folders that are there change places, on Linux in one step.

    Example
    -------
    >>> one, other = (getfixture("tmp_path") / name for name in ("one", "other"))
    >>> _ = one.write_text("1"), other.write_text("2")
    >>> exchange(one, other)
    >>> one.read_text(), other.read_text()
    ('2', '1')
    """
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h, linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 and not renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        return
    aside = Path(one).with_name(f".{os.getpid()}.{Path(other).name}")
    os.replace(other, aside)
    os.replace(one, other)
    os.replace(aside, one)


def sha256(path: str | os.PathLike[str]) -> str:
    """A file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises
    ------
    ValueError
        If it holds no JSON, naming it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error}") from None


def _wait(lock: Any, folder: Any, patience: float) -> None:
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(
            f"another run works in {folder}; wait for its end or choose another output_folder"
        ) from None


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """For ``with``: what torch, safetensors or the system say of a failed write, as one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path}: {error}. What was there is as it was; make room or choose "
            "another folder, and start again"
        ) from error


@contextlib.contextmanager
def only_run(folder: str | os.PathLike[str], patience: float = PATIENCE) -> Iterator[Any]:
    """For ``with``: no other run works in ``folder``, which is made if need be.

    The lock is the system's, so a killed run leaves none behind. Processes of one distributed run
    share it.

    Arguments
    ---------
    folder : path
        A file ``.lock`` in it is locked.
    patience : float
        Seconds to wait for another run; -1: as long as it takes.

    Raises
    ------
    ValueError
        If another run has the folder all that time.
    """
    from speechbrain.utils.distributed import if_main_process

    if not if_main_process():
        yield
        return
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(folder, ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another run that works in %s", folder)
            _wait(lock, folder, patience)
    try:
        yield
    finally:
        lock.release()


def choose_device(device: str | None = None) -> str:
    """The device of this process: ``cuda`` is the GPU of its ``LOCAL_RANK``, which ``torchrun`` sets.

    Without a device it is a GPU if there is one, else the CPU.

    Example
    -------
    >>> choose_device("cpu"), choose_device("cuda"), choose_device("cuda:3")
    ('cpu', 'cuda:0', 'cuda:3')
    """
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def check_device(device: str | None = None) -> str:
    """``choose_device``, if torch can compute there.

    Raises
    ------
    ValueError
        If it cannot, with the reason.

    Example
    -------
    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: device 'gpu' cannot be used here, give cpu, cuda or cuda:N (Expected one of ...
    """
    import torch

    device = choose_device(device)
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"device {device!r} cannot be used here, give cpu, cuda or cuda:N ({reason})"
        ) from None
    return device


def attempt(run: Callable[[], Any], exit_code: int) -> int:
    """Run a program: 0, or after a mistake of its user or Ctrl-C ``exit_code``.

    Either is one sentence on stderr; with the environment's MRL_TRACEBACK set, a traceback.
    """
    try:
        run()
    except (*MISTAKES, *_out_of_memory()) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return exit_code
    return 0


def _out_of_memory() -> tuple[type[Exception], ...]:
    """What torch raises where a GPU's memory is full, if torch is in use."""
    return (sys.modules["torch"].OutOfMemoryError,) if "torch" in sys.modules else ()


def _sentence(error: Any) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, _out_of_memory()):
        return (
            "the GPU's memory is full; lower batch_size (and raise grad_accumulation_factor as much) "
            "or batch_seconds, or give --precision=bf16"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename}: {error.strerror}"
    if getattr(error, "problem_mark", None) is not None:  # of a YAML
        return f"the YAML cannot be read, line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def require(module: str, purpose: str, package: str | None = None) -> Any:
    """An optional module.

    Arguments
    ---------
    module : str
        Its name, with dots if it is part of another.
    purpose : str
        What the caller was asked to do, for the error message.
    package : str, optional
        What ``pip`` installs it from. Default: the same name.

    Raises
    ------
    ImportError
        If it is not installed, saying how to, or is and cannot be imported, with the reason.

    Example
    -------
    >>> require("parrot", "talking")
    Traceback (most recent call last):
    ...
    ImportError: talking needs parrot, which is not installed: pip install parrot
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        reason = "is not installed" if absent else f"cannot be imported ({error}); install it again"
        raise ImportError(
            f"{purpose} needs {module}, which {reason}: pip install {package or module}"
        ) from error


def hub_folder(source: str | os.PathLike[str], allow_patterns: list[str] | None = None) -> Path:
    """The folder ``source``, or the one that the Hub, or its cache, has under that name."""
    if os.path.isdir(source):
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=allow_patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and the Hub does not give it ({error})"
        ) from error


def published_folder(source: str | os.PathLike[str]) -> Path:
    """A folder with a hyperparams.yaml, here or on the Hub."""
    folder = hub_folder(source)
    if not (folder / "hyperparams.yaml").is_file():
        raise FileNotFoundError(
            f"{source} lacks hyperparams.yaml, so it is no model that SpeechBrain published"
        )
    return folder


def print_table(heads: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; floats have three decimals, what is missing is a dash."""
    table = Table(*(heads or []), box=None, show_header=heads is not None, pad_edge=False)
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell or "-") for cell in row)
        table.add_row(*map(Text, cells))
    wide = None if sys.stdout.isatty() else 1000  # nothing is folded in a file or a pipe
    Console(file=sys.stdout, width=wide).print(table)
