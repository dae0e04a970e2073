"""Which bytes is each token? Text is decoded by their offsets, because one character may be several tokens."""

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NAME = "vocabulary.parquet"


def save(tokenizer: Any, folder: Path) -> None:
    """Write the bytes of every id once; a run may be read where its model is not. Raises OSError."""
    if (folder / NAME).exists():
        return
    partial = folder / f".{NAME}"
    pq.write_table(pa.table({"bytes": pa.array(token_bytes(tokenizer), pa.binary())}), partial, compression="zstd")
    partial.replace(folder / NAME)


def load(folder: Path) -> list[bytes]:
    """The bytes of every id; empty where a run was killed before it wrote them."""
    path = folder / NAME
    return pq.read_table(path)["bytes"].to_pylist() if path.exists() else []


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each id of a tokenizer, by what its decoder does: bytes behind letters, or pieces with a sign for
    the space. An id without a token has none."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {str(token): id for token, id in tokenizer.get_added_vocab().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    by_letters = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, id in vocabulary.items():
        if token in added:
            found[id] = token.encode()
        elif by_letters and all(letter in letters for letter in token):
            found[id] = bytes(letters[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[id] = bytes([int(token[3:5], 16)])
        else:
            found[id] = token.replace("\u2581", " ").encode("utf-8", "replace")
    return found


def pieces(ids: list[int], vocabulary: list[bytes]) -> list[str]:
    """The text of each token. A character of several tokens is the text of its last one, the others have none; bytes
    that are no text, and ids that are not known, are shown as numbers."""
    decode = codecs.getincrementaldecoder("utf-8")
    found: list[str] = []
    state = decode("strict")
    for id in ids:
        known = vocabulary[id] if 0 <= id < len(vocabulary) else b""
        try:
            found.append(state.decode(known) if known else f"\u27e8{id}\u27e9")
        except UnicodeDecodeError:
            # What came before cannot be completed: this token may begin anew.
            state = decode("strict")
            try:
                text = state.decode(known)
            except UnicodeDecodeError:
                state = decode("strict")
                text = known.decode("utf-8", "replace").replace("\ufffd", "") + f"\u27e8{id}\u27e9"
            found.append(text)
    return found
