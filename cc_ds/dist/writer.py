"""How DeepSpeed's checkpoint files reach the disk here: hashed on the way, flushed, and failing without a hang.

DeepSpeed meets at barriers while it saves. A rank that raises in between (its disk is full) would leave the others
waiting there, so this writer keeps the first error to itself, writes nothing more, and `checkpoint.save_checkpoint`
lets all ranks compare notes afterwards.

DeepSpeed unpickles what it reads, whatever it is. Here a file that would run code is refused.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from cc_ds.dist.consolidate import load_without_code


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a file must look like when it is read back."""

    size: int
    """Bytes."""
    sha256: str


class CheckpointWriter(TorchCheckpointEngine):
    """DeepSpeed's own engine, but for how files are written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        """Forget the previous checkpoint's files and error."""
        self.files: dict[str, WrittenFile] = {}
        self.error: str | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, or keep the error."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or f"{path}: {error.strerror}"

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file and record its size and digest, or keep the error."""
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                sink = _HashedSink(file)
                torch.save(state_dict, sink)
                if sink.error is not None:
                    raise sink.error
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.error = f"{path}: {error.strerror}"
        else:
            self.files[path] = WrittenFile(sink.size, sink.digest.hexdigest())

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file. pickle.UnpicklingError: it holds more than tensors, plain values and known classes."""
        return load_without_code(path, map_location=map_location)


class _HashedSink:
    """A file that torch.save writes into, front to back.

    After an error it swallows the rest: torch's archive writer ends the process when a write fails in its destructor.
    """

    def __init__(self, file) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.file.flush()
            except OSError as error:
                self.error = error
