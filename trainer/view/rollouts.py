"""Which rows of the rollout record match, and which tokens does one have? Whatever the run is writing meanwhile."""

import base64
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
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
TYPES = {**{name: SCHEMA.field(name).type for name in SCALARS}, "place": pa.int64()}


class Rollouts:
    """Those of one run. Each scalar is read where it is first asked for, and kept; tokens are read each time."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "rollouts"
        self.entries: dict[int, Entry] = {}
        self.files: dict[Entry, dict[str, Any]] = {}
        """The columns of each file that are in memory, and "": what the file says of its columns."""

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of each id."""
        return vocabulary.load(self.folder)

    def refresh(self) -> None:
        """See which steps there are now."""
        self.entries = entries(self.folder)

    def table(self, steps: Collection[int] | None = None, names: Collection[str] = SCALARS) -> pa.Table:
        """These scalars of the rows of some steps, or of all; `place` is a row's number in its file. A file that goes
        meanwhile, thinned by its run, is left out."""
        asked = [entry for step, entry in self.entries.items() if steps is None or step in steps]
        found = [known for entry in asked if (known := self._columns(entry, {*names, "step"}))]
        columns = {name: [chunk for each in found for chunk in each[name].chunks] for name in {*names, "step", "place"}}
        return pa.table({name: pa.chunked_array(chunks, TYPES[name]) for name, chunks in columns.items()})

    def _columns(self, entry: Entry, names: set[str]) -> dict[str, Any]:
        known = self.files.setdefault(entry, {})
        if names - known.keys():
            try:
                file = pq.ParquetFile(self.folder / entry.file, metadata=known.get(""))
                read = file.read(columns=[*names - known.keys()], use_threads=False)
            except (OSError, pa.ArrowException):
                return {}
            places = pa.chunked_array([np.arange(len(read))])
            known |= {"": file.metadata, "place": places, **dict(zip(read.column_names, read.columns, strict=True))}
        return known

    def find(
        self, step: int | None, where: str = "", sort: str = "", *, falling: bool = False, limit: int = 500
    ) -> dict[str, Any]:
        """Rows that match, sorted by a column: at most `limit` of `total`. `where` has conditions such as reward<0.5,
        and words, which are looked for in the state, the reason, the error and, within one step, in the text. Raises
        ValueError for a column that does not exist."""
        parts = [(part, CONDITION.fullmatch(part)) for part in where.split()]
        names = {sort or "step", *(name for _, match in parts for name in ([match[1]] if match else TEXTS))}
        if wrong := names - {*SCALARS}:
            raise ValueError(f"there is no column {min(wrong)!r}; there are {', '.join(SCALARS)}")
        # Of all steps only the columns that decide are read; a run may have a thousand files.
        table = self.table(None if step is None else {step}, names)
        kept: Any = np.ones(len(table), bool)
        for part, match in parts:
            said = self._compared(table, *match.groups()) if match else self._says(table, step, part)
            kept &= np.asarray(pc.fill_null(said, False))
        places = np.flatnonzero(kept)
        if sort:
            # What is not known comes last in both orders.
            by = [(sort, "descending" if falling else "ascending")]
            places = places[np.asarray(pc.select_k_unstable(table.select([sort]).take(places), k=limit, sort_keys=by))]
        asked = _keys(table.take(places[:limit]))
        whole = self.table(set((asked >> 32).tolist()))
        have = _keys(whole)
        rows = whole.take(np.searchsorted(have, asked[np.isin(asked, have)])).to_pylist()
        return {"total": int(kept.sum()), "rows": rows}

    def _compared(self, table: pa.Table, name: str, sign: str, value: str) -> Any:
        try:
            return getattr(pc, COMPARE[sign])(table[name], value if name in TEXTS else float(value))
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
        table = self.table({step})
        chosen = pc.equal(table["group"], group)
        if episode is not None:
            chosen = pc.and_(chosen, pc.equal(table["episode"], episode))
        rows = table.filter(chosen).to_pylist()
        read = tokens(self.folder / self.entries[step].file, [row["place"] for row in rows])
        texts = [vocabulary.pieces(lists["ids"].tolist(), self.vocabulary) for lists in read]
        return [{**row, **lists, "text": text} for row, lists, text in zip(rows, read, texts, strict=True)]


def _keys(table: pa.Table) -> np.ndarray:
    """One number for each row, rising as the rows of a table of steps do: its step and its place in the file."""
    return (table["step"].to_numpy() << 32) + table["place"].to_numpy()


def compact(sequence: dict[str, Any]) -> dict[str, Any]:
    """A sequence as JSON holds it: its lists as [what a browser calls their type, their bytes in base64]."""
    plain = without_nan({name: value for name, value in sequence.items() if name not in LISTS})
    for name in LISTS:
        kind = f"{sequence[name].dtype.name.title()}Array"
        plain[name] = [kind, base64.b64encode(sequence[name].tobytes()).decode()]
    return plain
