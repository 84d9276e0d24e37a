"""Asks drafters, and checks what other packages' ones answer: a wrong answer would be a wrong number, or fail far away.

What the drafters here give is tested; that of others is checked at every position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from lattices.errors import InvalidDataError, RescoreError, first_line
from lattices.joined.lookup import NONE
from lattices.joined.sources import CORPUS, HEADS, LOOKUP, MODEL, TRACED
from lattices.lattice import Lattice
from rescore.drafters.base import Continuations, Drafter, LatticeDrafter, TextDrafter
from rescore.rescorers.base import Context, Target

KINDS = (HEADS, LOOKUP, MODEL, CORPUS, TRACED)
Answer = TypeVar("Answer")
AnyDrafter = TypeVar("AnyDrafter", bound=Drafter)


def fit_drafter(drafter: AnyDrafter, target: Target) -> AnyDrafter:
    """The drafter for a base LM. Raises as `Drafter.fit`, and `RescoreError` for another package's that lacks what a
    drafter has."""
    if _is_ours(drafter):
        return drafter.fit(target)
    fitted = copy.copy(_answer(drafter, lambda: drafter.fit(target)))
    if not isinstance(fitted, LatticeDrafter | TextDrafter):
        raise _fault(
            drafter, f"gave {type(fitted).__name__} when it was fitted, which is no drafter of lattices or text"
        )
    if getattr(fitted, "kind", None) not in KINDS:
        raise _fault(drafter, "has no kind; set it to one of lattices.joined.sources, such as MODEL")
    longest = fitted.longest
    if not (longest is None and isinstance(fitted, LatticeDrafter)) and not (isinstance(longest, int) and longest >= 1):
        raise _fault(drafter, f"has longest = {longest}; set it to the tokens of its drafts, the base's own included")
    fitted.vocabulary = target.vocab_size
    return fitted


def lattices_of(drafter: LatticeDrafter, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
    """`LatticeDrafter.lattices`. Raises `RescoreError` for what is no lattice of these positions."""
    if _is_ours(drafter):
        return drafter.lattices(contexts, firsts, k)
    lattice = _answer(drafter, lambda: drafter.lattices(contexts, firsts, k))
    _check_lattice(drafter, lattice, firsts, k, drafter.longest)
    return lattice


def recorded_of(
    drafter: LatticeDrafter, prompt_ids: np.ndarray, output_ids: np.ndarray, k: int, h: int
) -> tuple[Lattice, np.ndarray]:
    """`LatticeDrafter.record`, of h slots. Raises `RescoreError` for what is no lattice of these positions."""
    if _is_ours(drafter):
        return drafter.record(prompt_ids, output_ids, k)
    answer = _answer(drafter, lambda: drafter.record(prompt_ids, output_ids, k))
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise _fault(drafter, f"recorded {type(answer).__name__}; give a lattice and entropies")
    lattice, entropies = answer
    _check_lattice(drafter, lattice, output_ids, k, h)
    if np.shape(entropies) != (len(output_ids), h) or not np.isfinite(entropies).all():
        raise _fault(drafter, f"recorded entropies of shape {list(np.shape(entropies))}; give finite ones [t, h]")
    return lattice, entropies


def continuations_of(
    drafter: TextDrafter, contexts: Sequence[Context], firsts: np.ndarray, count: int
) -> list[Continuations]:
    """`TextDrafter.continuations`. Raises `RescoreError` for what are none after these positions."""
    if _is_ours(drafter):
        return drafter.continuations(contexts, firsts, count)
    found = _answer(drafter, lambda: drafter.continuations(contexts, firsts, count))
    if not isinstance(found, list | tuple) or len(found) != len(contexts):
        raise _fault(drafter, f"gave no list of continuations for each of {len(contexts)} positions")
    for each in found:
        _check_continuations(drafter, each, count)
    return list(found)


def _is_ours(drafter: Drafter) -> bool:
    return type(drafter).__module__.partition(".")[0] == "rescore"


def _answer(drafter: Drafter, ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except RescoreError:
        raise
    except Exception as error:  # another package's code may raise anything
        raise _fault(drafter, f"failed ({type(error).__name__}: {first_line(error)})") from error


def _fault(drafter: Drafter, what: str) -> RescoreError:
    return RescoreError(
        f"the drafter {drafter.name or type(drafter).__name__} {what}; mend its package ({type(drafter).__module__}), "
        "or leave it out"
    )


def _check_lattice(drafter: LatticeDrafter, lattice: object, firsts: np.ndarray, k: int, h: int | None) -> None:
    if not isinstance(lattice, Lattice):
        raise _fault(drafter, f"gave {type(lattice).__name__} where a Lattice is due")
    shape = np.shape(lattice.token_ids)
    due = f"[{len(firsts)}, {h or 'h'}, 1 to {k}]"
    if len(shape) != 3 or shape[0] != len(firsts) or h not in (None, shape[1]) or not 1 <= shape[2] <= k:
        raise _fault(drafter, f"gave a lattice of shape {list(shape)} where {due} is due")
    try:
        lattice.validate(drafter.vocabulary or np.iinfo(np.int32).max)
    except InvalidDataError as error:
        raise _fault(drafter, f"gave no lattice ({error})") from error
    if (lattice.token_ids[:, 0, 0] != firsts).any():
        raise _fault(drafter, "gave a lattice whose slot 1 does not begin with the base's own token")


def _check_continuations(drafter: TextDrafter, found: object, count: int) -> None:
    if not isinstance(found, Continuations):
        raise _fault(drafter, f"gave {type(found).__name__} where Continuations are due")
    ids, logps = found.token_ids, found.logps
    for name, array, dtype in (("token_ids", ids, np.int32), ("logps", logps, np.float32)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            raise _fault(drafter, f"gave continuations whose {name} are no array of {np.dtype(dtype)}")
    most = (drafter.longest or 1) - 1
    if ids.ndim != 2 or ids.shape != logps.shape or len(ids) > count or ids.shape[1] > most:
        raise _fault(
            drafter,
            f"gave continuations of shape {list(ids.shape)}, log-probabilities {list(logps.shape)}, where at most "
            f"[{count}, {most}] are due",
        )
    if ids.size and (ids.max() >= (drafter.vocabulary or np.iinfo(np.int32).max) or ids.min() < NONE):
        raise _fault(drafter, f"gave a token id outside the base's vocabulary ({ids.min()} to {ids.max()})")
    if (np.diff((ids == NONE).astype(np.int8), axis=1) < 0).any():
        raise _fault(drafter, "gave a continuation with tokens after its end")
    if not (logps <= 0).all() or np.isneginf(logps).any():
        raise _fault(drafter, "gave log-probabilities that are NaN, positive or infinite")
