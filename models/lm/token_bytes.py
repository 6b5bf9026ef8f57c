"""The bytes of each token, of tokenizers that join tokens to texts by joining their bytes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .encoding import Encoded
from .texts import MISSING, Context, any_context, context_of, decode

JOINING = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}  # decoders
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
TRIALS, LENGTH = 32, 6  # random texts that are compared, and their tokens


def token_bytes(tokenizer: Any, vocab_size: int, prompts: Encoded) -> tuple[bytes, ...] | None:
    """Return the bytes that each token adds to the text of any of these prompts; b"" of tokens without text.

    None where what a token adds depends on its neighbours: tokenizers of words, WordPiece, texts that are cleaned up;
    and where the first token of a text loses its space.
    """
    table = _table(tokenizer, vocab_size)
    if table is None:
        return None
    contexts = {context_of(tokenizer, prompt) for prompt in prompts.rows()}
    unusual = [c for c in contexts if not c.text.strip() or c.text.endswith(MISSING)]
    return table if all(_agrees(tokenizer, table, context) for context in unusual) else None


@lru_cache(maxsize=8)
def _table(tokenizer: Any, vocab_size: int) -> tuple[bytes, ...] | None:
    """Return the bytes that each token adds to a text that ends in a word, or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None
    decoder = json.loads(backend.to_str())["decoder"]
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if not kinds <= JOINING:
        return None
    added = backend.get_added_tokens_decoder()
    alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
    table = []
    for token in range(vocab_size):
        known = backend.id_to_token(token)
        if known is None or (token in added and added[token].special):
            table.append(b"")
        elif token in added:
            table.append(added[token].content.encode())
        elif alphabet is not None:
            table.append(bytes(alphabet[c] for c in known) if all(c in alphabet for c in known) else known.encode())
        elif (byte := BYTE.fullmatch(known)) is not None and "ByteFallback" in kinds:
            table.append(bytes([int(byte[1], 16)]))
        else:
            table.append(known.replace("\u2581", " ").encode())
    return tuple(table) if _agrees(tokenizer, table, any_context(tokenizer)) else None


def _agrees(tokenizer: Any, table: Sequence[bytes], context: Context) -> bool:
    """Whether random tokens after a context are decoded to their bytes; of tokens that are characters, if there are."""
    generator = random.Random(0)
    whole = [token for token, known in enumerate(table) if MISSING not in known.decode("utf-8", "replace")]
    rows = [generator.choices(whole or range(len(table)), k=LENGTH) for _ in range(TRIALS)]
    texts = decode(tokenizer, [[*context.ids, *row] for row in rows])
    for row, text in zip(rows, texts, strict=True):
        expected = context.text + b"".join(table[token] for token in row).decode("utf-8", "replace")
        if text != expected and MISSING not in text + expected:
            return False
    return True


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
