"""The p-best search of `lattices.ngram_search` in torch tensors: many lattices at once, on CPU or GPU.

Same automaton, same scores (whole numbers, so the same sums whatever the order of additions), same order among equals;
what the compiled search does by walking hash tables is done here by gathers, for all lattices of a chunk side by side.
No loop runs over lattices: there are loops over slots, context lengths and the probes of a hash table.

1. The bigram rows: the n-gram scores of every slot's k words after each of the k words before, and the states there.
2. Backward, a bound like that of `lattices.ngram_search`: the most that a path gains after its last `depth` entries.
   It is the same for all histories with the same last entries but for those that are states of their own.
3. Forward, a beam of prefixes, ranked by score + bound ("reach"), equals by token ids.

Up to order depth + 1 a state knows no more words, so the bound is what the best completion gains. A beam of p is exact
then: a prefix that p others come before, by reach and then ids, has p whole paths before its own best one. Above that
order the bound is a bound. The beam is wider there, and the best reach that it ever dropped tells what it can have
missed: nothing if the p-th path found scores more.

Entries are sorted by token id at the start and the beam is kept in the order of ids, so the candidates of a slot,
[beam x k] laid flat, stand in the order in which ties are broken.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lattices.automaton import (
    BACKOFF,
    BOUND,
    LINEAR,
    NEXT,
    ROOT_NEXT,
    ROOT_SCORE,
    SCORE,
    SLOTS,
    STATE_BOUND,
    SUFFIX,
    WORD,
    Automaton,
)
from lattices.errors import InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, LOWEST_HEAD, MAX_WEIGHT, NONE, WEIGHT_SCALE
from lattices.search import p_best

DEPTH = 3  # words that the bound knows: exact up to order 4
BEAM = 64
BUCKETS = 32  # per word of a slot, in the table that tells a word's entry
MEMORY = 1 << 28  # bytes for the tensors of one chunk of lattices
HASH_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # that of `lattices.automaton.hash_word`, as a signed number


@dataclass(frozen=True, eq=False)
class BatchedPBest:
    """The best paths found in n lattices, best first; tensors on the search's device.

    `drafts` int32 `[n, p', h]` (token ids), `scores` float64 `[n, p']` (nats), `bound` float64 `[n]`: no path of the
    lattice scores more, `exact` bool `[n]`: proven to be the drafts and scores that `NgramSearch.p_best` gives.
    """

    drafts: Tensor
    scores: Tensor
    bound: Tensor
    exact: Tensor


class _Words(NamedTuple):
    """Rows of k words (a slot each), and where to find a word in its row: a hash table of entries with chains."""

    ids: Tensor  # int32 [r, k]
    first: Tensor  # int16 [r, buckets] last entry of the words in a bucket, -1: none
    again: Tensor  # int16 [r, k] the entry before it in its bucket, -1: none

    @classmethod
    def of(cls, ids: Tensor) -> _Words:
        r, k = ids.shape
        size = BUCKETS << (k - 1).bit_length()
        first = torch.full((r, size), -1, dtype=torch.int16, device=ids.device)
        again = torch.empty((r, k), dtype=torch.int16, device=ids.device)
        for e in range(k):
            bucket = ids[:, e : e + 1].long() & size - 1
            again[:, e : e + 1] = first.gather(1, bucket)
            first.scatter_(1, bucket, torch.full_like(bucket, e, dtype=torch.int16))
        return cls(ids, first, again)

    def part(self, begin: int, end: int) -> _Words:
        return _Words(self.ids[begin:end], self.first[begin:end], self.again[begin:end])


class BatchedNgramSearch:
    """Searches batches of lattices with one automaton; its arrays are put on `device` (on the CPU: shared, not copied).

    `words` int32 `[vocab_size]` and `end_token` as for `NgramSearch`. `depth` 2 or 3: words that the bound knows; the
    search is exact up to order depth + 1 and takes k^depth numbers a slot. `beam`: prefixes kept above that order (at
    least p). `memory`: about how many bytes a call may take besides its arguments and results; each lattice takes what
    it takes. Raises `RescoreError` for a beam or a depth that can't be.
    """

    def __init__(
        self,
        automaton: Automaton,
        words: np.ndarray,
        *,
        device: torch.device | str = "cpu",
        end_token: int | None = None,
        beam: int = BEAM,
        depth: int = DEPTH,
        memory: int = MEMORY,
    ) -> None:
        if beam < 1:
            raise RescoreError(f"a beam of {beam} keeps nothing; choose one of at least 1")
        if depth not in (2, 3):
            raise RescoreError(f"a bound that knows {depth} words; choose 2 or 3")
        self.automaton, self.device, self.end_token = automaton, torch.device(device), end_token
        self.beam, self.memory = beam, memory
        self.depth = max(2, min(depth, automaton.order - 1))
        self._cells = _tensor(automaton.cells).to(self.device).view(-1)
        self._roots = _tensor(automaton.roots).to(self.device)
        self._words = _tensor(words).to(self.device)

    @torch.no_grad()
    def states_after(self, token_ids: Tensor) -> Tensor:
        """The states after contexts `[n, m]`, of which the last order - 1 tokens matter; int64 `[n]`.

        Places with -1 are skipped, so that shorter contexts can be filled up.
        """
        states = torch.zeros(len(token_ids), dtype=torch.int64, device=self.device)
        needed = min(self.automaton.order - 1, token_ids.shape[1])
        for column in token_ids[:, token_ids.shape[1] - needed :].to(self.device).T:
            known = column >= 0
            words = _Words.of(self._words[column.clamp(min=0).long()][:, None])
            states = torch.where(known, self._advance(states, words)[1][:, 0], states)
        return states

    @torch.no_grad()
    def p_best(self, token_ids: Tensor, logps: Tensor, states: Tensor, p: int, *, weight: float) -> BatchedPBest:
        """The p best drafts of every lattice `[n, h, k]` whose left context led to the automaton's `states` `[n]`.

        Gives p' = min(p, k^(h-1)) drafts each. A weight of 0 gives `lattices.search.p_best`, bit for bit. Raises
        `RescoreError` for p < 1 or a weight outside 0 to `MAX_WEIGHT`, `InvalidDataError` for shapes that do not fit
        and for token ids and states that do not exist.
        """
        if p < 1:
            raise RescoreError(f"p = {p} asks for no drafts; choose p of at least 1")
        if not 0 <= weight <= MAX_WEIGHT:
            raise RescoreError(f"an n-gram weight of {weight}; choose one from 0 to {MAX_WEIGHT:g}")
        self._check(token_ids, logps, states)
        token_ids, logps, states = token_ids.to(self.device), logps.to(self.device), states.to(self.device)
        n, h, k = token_ids.shape
        count = min(p, k ** (h - 1))
        factor = round(weight * WEIGHT_SCALE)
        if factor == 0:
            return self._unweighted(token_ids, logps, p)
        result = BatchedPBest(
            torch.empty((n, count, h), dtype=torch.int32, device=self.device),
            torch.empty((n, count), dtype=torch.float64, device=self.device),
            torch.empty(n, dtype=torch.float64, device=self.device),
            torch.empty(n, dtype=torch.bool, device=self.device),
        )
        step = max(1, self.memory // self._bytes_per_lattice(h, k, count))
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            drafts, scores, bound, exact = self._search(token_ids[part], logps[part], states[part], count, factor)
            result.drafts[part], result.exact[part] = drafts.int(), exact
            result.scores[part], result.bound[part] = scores.double() / ARC_SCALE, bound.double() / ARC_SCALE
        return result

    def _check(self, token_ids: Tensor, logps: Tensor, states: Tensor) -> None:
        shape = token_ids.shape
        if len(shape) != 3 or 0 in shape[1:] or logps.shape != shape or states.shape != shape[:1]:
            raise InvalidDataError(
                f"token ids {list(shape)}, log-probs {list(logps.shape)} and states {list(states.shape)} do not belong "
                "together; give [n, h, k], [n, h, k] and [n] with at least one slot and one entry"
            )
        for what, values, end in (
            ("token id", token_ids, len(self._words)),
            ("state", states, len(self.automaton.cells)),
        ):
            if len(values) and (int(values.min()) < 0 or int(values.max()) >= end):
                raise InvalidDataError(f"a {what} is outside 0 to {end - 1}; is the n-gram model the right one?")

    def _unweighted(self, token_ids: Tensor, logps: Tensor, p: int) -> BatchedPBest:
        found = p_best(Lattice(token_ids.int().cpu().numpy(), logps.cpu().numpy()), p)
        scores = torch.from_numpy(found.scores).to(self.device)
        exact = torch.ones(len(scores), dtype=torch.bool, device=self.device)
        return BatchedPBest(torch.from_numpy(found.drafts).to(self.device), scores, scores[:, 0].clone(), exact)

    def _width(self, p: int) -> int:
        return p if self.automaton.order <= self.depth + 1 else max(p, self.beam)

    def _bytes_per_lattice(self, h: int, k: int, p: int) -> int:
        """About what `_search` takes: pairs and bounds of all slots, rows of one slot with their arcs, the beam."""
        numbers = 6 * h * k**2 + (h + 12) * k**self.depth + 16 * self._width(p) * k + 16 * h * k
        return 8 * int(numbers)

    # From here on: J = h - 1 slots without the first, entries by rising token id, states int64, scores int64 in units
    # of 1 / ARC_SCALE (paths) or 1 / SCORE_SCALE (n-grams).

    def _search(self, token_ids: Tensor, logps: Tensor, states: Tensor, p: int, weight: int) -> tuple[Tensor, ...]:
        """Drafts `[n, p, h]`, scores `[n, p]`, bound `[n]`, exact `[n]` of a chunk."""
        n, k = len(token_ids), token_ids.shape[2]
        slots = token_ids.shape[1] - 1
        ids, entry = token_ids[:, 1:].long().sort(dim=-1, stable=True)  # [n, J, k]
        heads = (logps.double().clamp(min=LOWEST_HEAD) * ARC_SCALE).round().long()
        every = _Words.of(self._words[ids].transpose(0, 1).reshape(-1, k))  # [J n, k]
        words = [every.part(n * j, n * (j + 1)) for j in range(slots)]
        score, state = self._advance(states.long(), _Words.of(self._words[token_ids[:, :1, 0].long()]))
        total = heads[:, 0, :1] + weight * score  # [n, beam], as state, last and done
        if not slots:
            return token_ids[:, :, :1].expand(n, p, 1), total.expand(n, p), total[:, 0], total[:, 0] > NONE
        heads = heads[:, 1:].gather(2, entry)

        score, after = self._advance(state[:, 0], words[0])
        first = score.view(n, 1, k), after.view(n, 1, k)
        pairs = self._bigrams(every, n)
        bounds = self._bounds(ids, words, heads, first, pairs, weight)
        last, history = torch.zeros_like(state), torch.zeros_like(state)
        done = token_ids[:, :1, 0] == self.end_token if self.end_token is not None else None
        dropped = torch.full((n,), NONE, device=self.device)
        width = self._width(p)
        taken: list[Tensor] = []  # of every slot: the candidates that make the beam, [n, beam], parent * k + entry
        for j in range(slots):
            if j == 0:
                score, after = first
            else:
                rows = last[..., None].expand(-1, -1, k)
                score, after = (x[j - 1].gather(1, rows) for x in pairs)  # [n, beam, k]
                self._lengthen(score.view(-1, k), after.view(-1, k), state.view(-1), words[j], level=2)
            gain = heads[:, j, None] + weight * score
            rest = bounds[j].view(n, -1, k).gather(1, history[..., None].expand(-1, -1, k))
            if done is not None:  # a path that has ended goes on with the arg-max, which costs nothing
                free = torch.where(entry[:, j, None] == 0, 0, NONE).expand_as(gain)
                gain = torch.where(done[..., None], free, gain)
                rest = rest.masked_fill(done[..., None], 0)
            totals = (total[..., None] + gain).clamp(min=NONE)
            chosen, most = _best((totals + rest).view(n, -1), width)
            dropped = torch.maximum(dropped, most)
            taken.append(chosen)
            last = chosen % k
            history = (history.gather(1, chosen // k) * k + last) % k ** (self.depth - 1)
            total, state = totals.view(n, -1).gather(1, chosen), after.reshape(n, -1).gather(1, chosen)
            if done is not None:
                done = done.gather(1, chosen // k) | (ids[:, j].gather(1, last) == self.end_token)

        scores, place = total.sort(dim=1, descending=True, stable=True)
        scores, place = scores[:, :p], place[:, :p]
        exact = (scores[:, -1] > dropped) | (dropped < NONE // 2)
        if self.automaton.order <= self.depth + 1:
            exact = torch.ones_like(exact)
            dropped = scores[:, 0]
        if done is not None:  # ends leave fewer ways than places
            found = scores >= NONE // 2
            scores, place = torch.where(found, scores, scores[:, :1]), torch.where(found, place, place[:, :1])
        drafts = torch.empty((n, p, slots + 1), dtype=torch.int64, device=self.device)
        drafts[:, :, 0] = token_ids[:, :1, 0]
        for j in range(slots - 1, -1, -1):
            place = taken[j].gather(1, place)
            drafts[:, :, j + 1] = ids[:, j].gather(1, place % k)
            place = place // k
        return drafts, scores, torch.maximum(scores[:, 0], dropped), exact

    def _bigrams(self, words: _Words, n: int) -> tuple[Tensor, Tensor]:
        """Scores and next states `[J - 1, n, k, k]` of each word of slots 2..J after each of the slot before alone."""
        now, k = words.part(n, len(words.ids)), words.ids.shape[1]
        before = self._roots[words.ids[: len(now.ids)], ROOT_NEXT].long()  # [(J - 1) n, k]
        score, after = (x.repeat_interleave(k, dim=0) for x in self._root_rows(now))
        self._lengthen(score, after, before.view(-1), now, level=1, highest=1)
        return score.view(len(now.ids) // n, n, k, k), after.view(len(now.ids) // n, n, k, k)

    def _bounds(
        self, ids: Tensor, words: list[_Words], heads: Tensor, first: tuple[Tensor, Tensor],
        pairs: tuple[Tensor, Tensor], weight: int,
    ) -> list[Tensor]:  # fmt: skip
        """For slots 1..J: the most that a path gains after its last `depth` entries, flat, the slot's own fastest.

        `[n, k^depth]`; fewer where fewer slots came before, and there the states know the true left context.
        """
        (n, slots, k), depth = ids.shape, self.depth
        early = [first]
        for j in range(1, min(depth, slots)):
            early.append(self._rows(words[j], pairs, j, early[-1][1]))
        bounds = [torch.zeros((n, k ** min(slots, depth)), dtype=torch.int64, device=self.device)]
        here = first
        for j in range(slots - 1, -1, -1):
            ahead = here[0]  # of slot j + 1
            if j >= depth:
                early.append(self._rows(words[j], pairs, j, pairs[1][j - 2] if depth > 2 else None))
            here = early.pop()
            if j == slots - 1:
                continue
            onward = bounds[0].view(n, -1, k)
            reach = heads[:, j + 1, None] + weight * ahead + onward  # [n, histories of up to depth - 1 entries, k]
            bound = reach.amax(dim=2)
            if j + 1 >= depth:
                # The same whatever came earlier, but for histories that are states of their own: their back-off and
                # few arcs. Where an arc stands in for the best way on by back-off, the next best of these counts.
                histories = bound.shape[1]
                state = here[1].reshape(n, -1)
                for level in range(self.automaton.order - 1, depth, -1):
                    state = torch.where(state >= self.automaton.level_starts[level], self._cell(state, SUFFIX), state)
                i, f = torch.where(state >= self.automaton.level_starts[depth])
                state, g = state[i, f], f % histories
                more = weight * (self._cell(state, BACKOFF) + self._cell(state, STATE_BOUND))
                best = bound[i, g] + more
                arc_of, e, place = self._own_arcs(state, words[j + 1], i)
                owners, row = torch.unique(arc_of, return_inverse=True)
                rows = reach[i[owners], g[owners]] + more[owners, None]  # [histories with such arcs, k]
                i_of = i[arc_of]
                rows[row, e] = heads[i_of, j + 1, e] + onward[i_of, g[arc_of], e] + weight * self._cell(place, BOUND)
                best[owners] = rows.amax(dim=1)
                bound = bound.repeat(1, k)
                bound[i, f] = best
            if self.end_token is not None:
                bound.view(n, -1, k).masked_fill_((ids[:, j] == self.end_token)[:, None], 0)
            bounds.insert(0, bound)
        return bounds

    def _rows(
        self, words: _Words, pairs: tuple[Tensor, Tensor], j: int, states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores and next states `[n, c k, k]` of slot j's words after `states` `[n, c, k]` that slot j - 1 led to.

        None: after its words alone, c = 1.
        """
        n, k = words.ids.shape
        if states is None:
            return pairs[0][j - 1], pairs[1][j - 1]
        score, after = (x[j - 1].repeat(1, states.shape[1], 1) for x in pairs)
        self._lengthen(score.view(-1, k), after.view(-1, k), states.reshape(-1), words, level=2)
        return score.view(n, -1, k), after.view(n, -1, k)

    def _advance(self, states: Tensor, words: _Words) -> tuple[Tensor, Tensor]:
        """Scores and next states `[m, k]` of words `[m, k]` after states `[m]`, from nothing but the automaton."""
        score, after = self._root_rows(words)
        self._lengthen(score, after, states, words, level=1)
        return score, after

    def _root_rows(self, words: _Words) -> tuple[Tensor, Tensor]:
        return self._roots[words.ids, ROOT_SCORE].long(), self._roots[words.ids, ROOT_NEXT].long()

    def _lengthen(
        self, score: Tensor, after: Tensor, states: Tensor, words: _Words, *, level: int, highest: int | None = None
    ) -> None:
        """Turns rows `[m, k]` of the states' suffixes of `level - 1` words into their own rows, in place.

        States of the same row of words stand together.
        """
        row = torch.arange(len(words.ids), device=self.device)
        row = row.repeat_interleave(len(states) // max(1, len(words.ids)))
        chain = []
        for length in range(highest or self.automaton.order - 1, level - 1, -1):
            rows = torch.where(states >= self.automaton.level_starts[length])[0]
            chain.append((rows, states[rows]))
            if length > level:
                states = states.index_copy(0, rows, self._cell(states[rows], SUFFIX))
        for rows, at in reversed(chain):
            score.index_add_(0, rows, self._cell(at, BACKOFF)[:, None].expand(-1, score.shape[1]))
            arc_of, e, place = self._own_arcs(at, words, row[rows])
            score[rows[arc_of], e] = self._cell(place, SCORE)
            after[rows[arc_of], e] = self._cell(place, NEXT)

    def _own_arcs(self, states: Tensor, words: _Words, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All arcs that states `[m]` have themselves for the words of their rows `[m]`.

        Which state, which entry, which cell: three lists.
        """
        slots, k = self._cell(states, SLOTS), words.ids.shape[1]
        # Few cells: all of them are read and looked for among the row's words.
        most = max(LINEAR, 2 * k)
        few = torch.where((slots > 0) & (slots <= most))[0]
        lengths = slots[few]
        owner = few.repeat_interleave(lengths)  # one for every cell of these
        skipped = (lengths.cumsum(0) - lengths - states[few] - 1).repeat_interleave(lengths)
        place = torch.arange(len(owner), device=self.device) - skipped
        there = self._cells.index_select(0, 4 * place + WORD)
        row, size = rows[owner], words.first.shape[1]
        e = words.first.view(-1).index_select(0, row * size + (there & size - 1))
        found = []
        while True:
            on = torch.where(e >= 0)[0]
            if not len(on):
                break
            owner, place, there, row, e = owner[on], place[on], there[on], row[on], e[on].long()
            flat = row * k + e
            hit = torch.where(words.ids.view(-1).index_select(0, flat) == there)[0]
            found.append((owner[hit], e[hit], place[hit]))
            e = words.again.view(-1).index_select(0, flat)

        # Hash tables: all words at once, then those that met another word once more, and so on.
        many = torch.where(slots > most)[0]
        word = words.ids.index_select(0, rows[many]).view(-1)  # [hashed k]
        asked = torch.arange(len(word), device=self.device)
        first, last = (x[many].repeat_interleave(k) for x in (states + 1, slots - 1))
        step = (word.long() * HASH_FACTOR >> 33) & ((1 << 31) - 1) & last
        tried = 0
        while len(asked):
            place = first + step
            there = self._cells.index_select(0, 4 * place + WORD)
            hit = torch.where(there == word)[0]
            found.append((many[asked[hit] // k], asked[hit] % k, place[hit]))
            on = torch.where((there != word) & (there >= 0) & (last > tried))[0]
            asked, first, last, word = asked[on], first[on], last[on], word[on]
            step = (step[on] + 1) & last
            tried += 1
        if not found:
            return many, many, many
        owners, entries, cells = zip(*found, strict=True)
        return torch.cat(owners), torch.cat(entries), torch.cat(cells)

    def _cell(self, places: Tensor, column: int) -> Tensor:
        flat = (places << 2).add_(column).view(-1)
        return self._cells.index_select(0, flat).long().view(places.shape)


def _best(reach: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The places of the `width` highest of `[n, c]`, equals by lowest place, in rising order; the highest left out."""
    n, count = reach.shape
    if count <= width:
        every = torch.arange(count, device=reach.device).expand(n, -1)
        return every, torch.full((n,), NONE, device=reach.device)
    highest = reach.topk(width + 1, dim=1).values
    least = highest[:, width - 1 : width]
    above, level = reach > least, reach == least
    room = width - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1) <= room))
    return torch.where(chosen)[1].view(n, width), highest[:, width]


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # memory-mapped arrays can't be written to, and nothing here does
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))
