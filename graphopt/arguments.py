"""What several commands of `graphopt.cli` share: arguments for data and memory, and the files that they may write."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graphopt.data import data_file
from graphopt.errors import OutputError
from graphopt.model_io import refuse_target
from graphopt.pass_base import MEMORY_BUDGET
from graphopt.preprocess import describe_keys, preprocess_file

Command = Callable[[argparse.Namespace, Console, Console], int]
"""Runs with its arguments, the console for results and the one for progress and warnings; returns the exit code."""


def add_command(commands: Any, name: str, run: Command, summary: str) -> argparse.ArgumentParser:
    """Add a command to the parser's; the result takes its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=run)
    return parser


def add_memory_budget(parser: argparse.ArgumentParser) -> None:
    """Add --memory-budget."""
    parser.add_argument(
        "--memory-budget",
        type=_mebibytes,
        default=MEMORY_BUDGET // 2**20,
        metavar="MIB",
        help="of activations that calibration may hold at a time; default: %(default)s",
    )


def data_files(arguments: argparse.Namespace) -> list[Path]:
    """The files and folders that `add_data_arguments` asks for."""
    data = None if arguments.data is None else data_file(arguments.data)
    preprocess = None if arguments.preprocess is None else preprocess_file(arguments.preprocess)
    return [path for path in (data, preprocess) if path is not None]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data, --preprocess and --samples."""
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="an .npz, a folder of .npz, of test_data_set_*/input_*.pb or of images, or file.py:function",
    )
    parser.add_argument(
        "--preprocess",
        metavar="KEYS",
        help="how images in DATA become arrays, (pixel / scale - mean) / std, such as "
        "resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225, or a file.toml with these keys. "
        f"{describe_keys()}. EXIF orientation is applied, transparency laid over white, 16 bits become 8",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="use at most N samples of DATA")


def refuse_outputs(outputs: Mapping[str, Path | None], *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse what cannot be written, before the long work; `outputs` are the files by the flag that names them.

    Raises:
        OutputError: a file cannot be written, or two flags name the same one.
    """
    flags: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        refuse_target(path, overwrite=overwrite, protect=inputs)
        other = flags.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise OutputError(f"{other} and {flag} both name {path}: give each a file of its own")


def _mebibytes(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_mebibytes.__name__ = "number of MiB from 1 up"
