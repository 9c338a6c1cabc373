"""Scores of rows in a folder, which several processes share."""

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

#: What is kept of a row of T tokens: log-probs of the written ones, (T,) float32, and the likeliest ones, (T, k) int32,
#: with theirs, (T, k) float32.
Entry = tuple[Tensor, Tensor, Tensor]

_TABLES = """
CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB, digest BLOB);
CREATE TABLE facts (key BLOB PRIMARY KEY, value TEXT);
"""


class Store:
    """Rows by key, in SQLite files: each process writes one of its own, and reads all that were there when it opened.

    So there is no lock to wait for, which network file systems are bad at. A row is committed as a whole or not at all,
    and has a digest; files and rows that are damaged are passed over with a warning.

    Args:
        folder: Where the files are; it is made when the first row is put.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._places: dict[bytes, list[Path]] = {}
        self._facts: dict[bytes, Any] = {}
        self._connections: dict[Path, sqlite3.Connection] = {}
        self._own: Path | None = None

    def __str__(self) -> str:
        """How many rows there are, and how large the files."""
        return f"{len(self._places)} rows, {self.size / 2**20:.1f} MiB"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.stat().st_size for each in self.folder.glob("*.sqlite"))

    def open(self) -> None:
        """Look what is there."""
        for path in sorted(self.folder.glob("*.sqlite"), key=lambda each: each.stat().st_mtime):
            try:
                connection = self._connected(path)
                facts = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM facts")}
                keys = [key for (key,) in connection.execute("SELECT key FROM rows")]
            except (sqlite3.Error, ValueError) as error:
                rank_zero_warn(f"{path} is damaged and passed over ({error}); its rows are scored anew.")
                continue
            self._facts |= facts
            for key in keys:
                self._places.setdefault(key, []).append(path)

    def fact(self, key: bytes) -> Any:
        """Return what was noted under a key; None if nothing was."""
        return self._facts.get(key)

    def note(self, key: bytes, value: Any) -> None:
        """Note something in the types of JSON, unless it was."""
        if self._facts.get(key) == value:
            return
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))
        self._facts[key] = value

    def get(self, key: bytes, tokens: int, k: int) -> Entry | None:
        """Return a row of some tokens with k likeliest ones each; None if there is none that is whole."""
        for path in reversed(self._places.get(key, [])):
            try:
                query = self._connected(path).execute("SELECT value, digest FROM rows WHERE key = ?", (key,))
                value, digest = query.fetchone()
                if _digest(value) != digest or len(value) != tokens * (4 + 8 * k):
                    raise ValueError("its bytes are not those that were written")
            except (sqlite3.Error, ValueError, TypeError) as error:
                rank_zero_warn(f"A row in {path} is damaged and passed over ({error}); it is scored anew.")
                self._places[key].remove(path)
                continue
            return _unpacked(value, tokens, k)
        return None

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Keep rows: all of them, or none if the process is killed meanwhile."""
        packed = [(key, value := _packed(entry), _digest(value)) for key, entry in entries.items()]
        with self._writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", packed)
        assert self._own is not None
        for key in entries:
            self._places.setdefault(key, []).append(self._own)

    def _writing(self) -> sqlite3.Connection:
        """Return the connection of this process's own file, which a `with` commits."""
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = self.folder / f"{uuid.uuid4().hex}.sqlite"
            connection = sqlite3.connect(own)
            connection.executescript(_TABLES)
            self._own, self._connections[own] = own, connection
        return self._connections[self._own]

    def _connected(self, path: Path) -> sqlite3.Connection:
        if path not in self._connections:
            # Not only for reading: what a killed process left half written has to be rolled back.
            self._connections[path] = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
        return self._connections[path]


def _packed(entry: Entry) -> bytes:
    return b"".join(each.contiguous().numpy().tobytes() for each in entry)


def _unpacked(value: bytes, tokens: int, k: int) -> Entry:
    sampled, likeliest, logprobs = np.split(np.frombuffer(value, dtype=np.uint8).copy(), np.cumsum([4, 4 * k]) * tokens)
    return (
        torch.from_numpy(sampled.view(np.float32)),
        torch.from_numpy(likeliest.view(np.int32)).view(tokens, k),
        torch.from_numpy(logprobs.view(np.float32)).view(tokens, k),
    )


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()
