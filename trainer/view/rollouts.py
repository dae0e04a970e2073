"""Which rows of the rollout record match, and which tokens does one have? Whatever the run is writing meanwhile."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from trainer.record import vocabulary
from trainer.record.table import LISTS, SCALARS, SCHEMA, TEXTS
from trainer.record.writer import Entry, entries, tokens
from trainer.runs.files import without_nan

pc: Any = compute
CONDITION = re.compile(r"([a-z_]+)(<=|>=|!=|=|<|>)(.+)")
COMPARE = {"<": "less", ">": "greater", "<=": "less_equal", ">=": "greater_equal", "=": "equal", "!=": "not_equal"}
COLUMNS = pa.schema([*(SCHEMA.field(name) for name in SCALARS), pa.field("place", pa.int64())]).empty_table()


class Rollouts:
    """Those of one run. Scalars of all rows are in memory; tokens are read when they are asked for."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "rollouts"
        self.files: dict[str, pa.Table] = {}
        self.entries: dict[int, Entry] = {}
        self._lock = Lock()

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of each id."""
        return vocabulary.load(self.folder)

    def refresh(self) -> None:
        """See which steps there are now."""
        self.entries = entries(self.folder)

    def table(self, step: int | None = None) -> pa.Table:
        """Scalars of a step's rows, or of all. A file that goes meanwhile, thinned by its run, is left out."""
        names = [each.file for each in self.entries.values() if step in (None, each.step)]
        with self._lock:
            new = [name for name in names if name not in self.files]
            with ThreadPoolExecutor(8) as pool:
                read = zip(new, pool.map(self._scalars, new), strict=True)
                self.files |= {name: table for name, table in read if table is not None}
        tables = [self.files[name] for name in names if name in self.files]
        return pa.concat_tables(tables) if tables else COLUMNS

    def _scalars(self, name: str) -> pa.Table | None:
        try:
            table = pq.ParquetFile(self.folder / name).read(columns=list(SCALARS))
        except (OSError, pa.ArrowException):
            return None
        return table.append_column("place", pa.array(np.arange(len(table))))

    def find(
        self, step: int | None, where: str = "", sort: str = "", *, falling: bool = False, limit: int = 500
    ) -> dict[str, Any]:
        """Rows that match, sorted by a column: at most `limit` of `total`. `where` has conditions such as reward<0.5,
        and words, which are looked for in the state, the reason, the error and, within one step, in the text. Raises
        ValueError for a column that does not exist."""
        table = self.table(step)
        if sort and sort not in table.column_names:
            raise ValueError(f"there is no column {sort!r}; there are {', '.join(table.column_names)}")
        kept: Any = np.ones(len(table), bool)
        for part in where.split():
            condition = CONDITION.fullmatch(part)
            said = self._compared(table, *condition.groups()) if condition else self._says(table, step, part)
            kept &= np.asarray(pc.fill_null(said, False))
        places = np.flatnonzero(kept)
        if sort:
            keys = table.select([sort]).take(places)
            # What is not known comes last in both orders.
            order = [(sort, "descending" if falling else "ascending")]
            places = places[np.asarray(pc.select_k_unstable(keys, k=limit, sort_keys=order))]
        return {"total": int(kept.sum()), "rows": table.take(places[:limit]).to_pylist()}

    def _compared(self, table: pa.Table, name: str, sign: str, value: str) -> Any:
        if name not in table.column_names:
            raise ValueError(f"there is no column {name!r}; there are {', '.join(table.column_names)}")
        number = name not in TEXTS
        try:
            return getattr(pc, COMPARE[sign])(table[name], float(value) if number else value)
        except ValueError:
            raise ValueError(f"{name}{sign}{value}: {value!r} is no number") from None

    def _says(self, table: pa.Table, step: int | None, word: str) -> Any:
        found: Any = pa.array(np.zeros(len(table), bool))
        for name in TEXTS:
            found = pc.or_(found, pc.match_substring(table[name], word, ignore_case=True))
        if step is not None and len(table):
            low = word.lower()
            said = pa.array([low in text.lower() for text in self._texts(step, table["place"].to_pylist())])
            found = pc.or_(found, said)
        return found

    def _texts(self, step: int, places: list[int]) -> list[str]:
        ids = pq.read_table(self.folder / self.entries[step].file, columns=["ids"])["ids"]
        known, n = self.vocabulary, len(self.vocabulary)
        return [b"".join(known[i] for i in ids[p].as_py() if i < n).decode("utf-8", "replace") for p in places]

    def sequences(self, step: int, group: int, episode: int | None = None) -> list[dict[str, Any]]:
        """Rows of a group, or of one of its episodes, with their tokens and the text of each; none if it has none."""
        if step not in self.entries:
            return []
        table = self.table(step)
        chosen = pc.equal(table["group"], group)
        if episode is not None:
            chosen = pc.and_(chosen, pc.equal(table["episode"], episode))
        rows = table.filter(chosen).to_pylist()
        file = self.folder / self.entries[step].file
        found = [row | tokens(file, row["place"]) for row in rows]
        for row in found:
            row["text"] = vocabulary.pieces(row["ids"], self.vocabulary)
        return found


def compact(sequence: dict[str, Any]) -> dict[str, Any]:
    """A sequence as JSON holds it: four digits, and null for what is not finite."""
    plain = without_nan({name: value for name, value in sequence.items() if name not in LISTS})
    for name in LISTS:
        values = sequence[name]
        if values and isinstance(values[0], float):
            values = [float(f"{x:.4g}") if math.isfinite(x) else None for x in values]
        plain[name] = values
    return plain
