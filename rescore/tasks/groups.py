"""Groups of examples that share a source (a passage, a document, a conversation): they are not independent.

Intervals draw whole groups (`rescore.bootstrap`), a limit takes one example of each group before a second one of any,
and held-out examples share no group with those that are evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from lattices.errors import RescoreError


def digest(text: str) -> str:
    """The key of a text, 16 hexadecimal digits: the same text has the same key wherever it stands."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def one_of_each_first(groups: Sequence[str]) -> list[int]:
    """Places of examples with these groups: the first one of every group, then every second one, and so on; each time
    in the order that they have. Where no group comes twice, nothing changes."""
    often: dict[str, int] = {}
    turns = []
    for group in groups:
        often[group] = often.get(group, -1) + 1
        turns.append(often[group])
    return sorted(range(len(groups)), key=turns.__getitem__)  # stable


def held_out(groups: Sequence[str], count: int, *, evaluated: Collection[str] = ()) -> list[int]:
    """Places of `count` held-out examples, in their order: whole groups apart from those of all others, from the end.

    The last groups (by where each begins), at most half of those there are, one example of each before a second one of
    any; fewer than `count` where these groups have no more. `evaluated`: groups that are not taken while there are
    others. At least one place where there is an example; of a single group at most half of its examples. Raises
    `RescoreError` for a `count` of none.
    """
    if count < 1:
        raise RescoreError(f"--held-out {count}; at least one example is needed")
    order = list(dict.fromkeys(groups))
    free = [group for group in order if group not in evaluated] or order
    if len(order) == 1:
        return list(range(len(groups)))[-max(1, min(count, len(groups) // 2)) :]
    most = max(1, min(count, len(free) if len(free) < len(order) else len(order) // 2))
    chosen = set(free[-most:])
    of_them = [place for place, group in enumerate(groups) if group in chosen]
    turns = one_of_each_first([groups[place] for place in of_them])
    return sorted(of_them[turn] for turn in turns[:count])
