"""A disk that takes no byte more."""

import io
from pathlib import Path

import pytest


class _Full(io.BytesIO):
    def write(self, _content: object) -> int:
        raise OSError(28, "No space left on device")


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every write to a file that is opened by its Path fail, as on a full disk; reading works."""
    original = Path.open

    def opened(path: Path, mode: str = "r", *args: object, **options: object) -> object:
        file = original(path, mode, *args, **options)
        if "w" not in mode:
            return file
        file.close()
        return _Full()

    monkeypatch.setattr(Path, "open", opened)
