"""Text of tokens and prompts for a page: white space and invisible characters become visible, nothing is lost.

A token need not be text: it may be part of a character. Then its bytes are shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lattices.errors import RescoreError
from rescore.terminal import INVISIBLE, JOINERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE, NEWLINE, TAB = "\u2423", "\u21b5", "\u21e5"
HEAD, TAIL = 1200, 600  # characters of a long text that are kept
_VISIBLE = {" ": SPACE, "\n": NEWLINE, "\t": TAB}


def visible(text: str) -> str:
    """One line in which every character shows: a mark for space, new line and tab, the code for other control and
    format characters, lone surrogates and marks of direction."""
    return "".join(_VISIBLE.get(c) or (_code(c) if _hidden(c, joiners=True) else c) for c in text)


def harmless(text: str) -> str:
    """Text as it is, white space included, but for control characters, lone surrogates and marks of direction, whose
    code is shown. Joiners stay: emoji and some scripts are written with them."""
    return "".join(_code(c) if c not in _VISIBLE and _hidden(c, joiners=False) else c for c in text)


def excerpt(text: str) -> tuple[str, str, int]:
    """`harmless` text; of a long one the beginning, the end, and the number of characters between them."""
    if len(text) <= HEAD + TAIL:
        return harmless(text), "", 0
    return harmless(text[:HEAD]), harmless(text[-TAIL:]), len(text) - HEAD - TAIL


def _hidden(character: str, *, joiners: bool) -> bool:
    category = unicodedata.category(character)
    if character in JOINERS:
        return joiners
    return category in INVISIBLE or (category == "Zs" and character != " ")


def _code(character: str) -> str:
    return f"\u27e8U+{ord(character):04X}\u27e9"


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: Iterable[int]) -> dict[int, str]:
    """The visible text of each token id; `#id` without a tokenizer and for ids that it does not know."""
    if tokenizer is None:
        return {token: f"#{token}" for token in ids}
    known = sorted(set(ids))
    pieces: list[Any] = [tokenizer.convert_ids_to_tokens(token) for token in known]
    return {token: _text(tokenizer, token, piece) for token, piece in zip(known, pieces, strict=True)}


def _text(tokenizer: PreTrainedTokenizerBase, token: int, piece: str | None) -> str:
    if piece is None:
        return f"#{token}"
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" in text:  # part of a character: bytes, where the tokenizer's alphabet says which
        if raw := _bytes_of(piece):
            return "".join(f"\\x{byte:02X}" for byte in raw)
    elif piece.startswith("\u2581") and not text.startswith(" "):  # SentencePiece, whose decoding strips it
        text = " " + text
    return visible(text) or f"#{token}"


def _bytes_of(piece: str) -> bytes | None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)])
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else None


def tokenizer_of(base: Mapping[str, Any]) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The tokenizer of a trace's base (`name` and `tokenizer_sha256` of its settings), and a sentence if there is none.

    Nothing is fetched: a model of the hub must be on this machine already.
    """
    from lm.base.catalog import load_tokenizer
    from lm.base.identity import tokenizer_sha256

    name = base.get("name")
    if not isinstance(name, str):
        return None, "The trace does not name its base model, so tokens are shown as ids."
    ids = "so tokens are shown as ids; rescore report on a machine that has the model shows text."
    try:
        tokenizer = load_tokenizer(name, local_files_only=True)
    except RescoreError as error:
        return None, f"The tokenizer of {name} can't be loaded ({error}), {ids}"
    if base.get("tokenizer_sha256") not in (None, tokenizer_sha256(tokenizer)):
        return None, f"The tokenizer of {name} is not the one that the trace was made with, {ids}"
    return tokenizer, None
