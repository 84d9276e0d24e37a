"""Acceptance rules whose output is not the base LM's: opt-in, and called lossy wherever their numbers stand.

A later token of a draft is kept while it *fits*, and what comes after is conditioned on what was kept. The longest
draft wins; the token after it is the base's likeliest. Sources: [C] section 3.3 (typical), [B] sections 5.1 to 5.3.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import numpy as np
import torch

from lattices.errors import RescoreError
from rescore.acceptance.rules import Drawn, Likeliest, Rule, Said, Verdict


class Lossy(Rule):
    """What the lossy rules share.

    least: tokens that a step adds at least, whatever fits, as far as the winning draft has them.
    """

    lossy = True
    least: int = 1

    @abstractmethod
    def fits(self, drafts: np.ndarray, said: Said) -> np.ndarray:
        """Which of the tokens after the first are kept after those before them, bool `[p, l - 1]`."""

    def score(self, drafts: np.ndarray, said: Said) -> np.ndarray:
        """What each token after the first adds to a draft's claim among those of one length, `[p, l - 1]`."""
        return np.zeros((len(drafts), drafts.shape[1] - 1))

    def judge(
        self,
        drafts: np.ndarray,
        said: Said,
        remaining: int,
        eos_token_ids: Collection[int],
        drawn: Drawn | None = None,
    ) -> Verdict:
        there = _there(drafts, eos_token_ids)
        kept = np.cumprod(self.fits(drafts, said) & there, axis=1).astype(bool)
        lengths = np.minimum(1 + kept.sum(axis=1), remaining)
        scores = np.where(kept, self.score(drafts, said), 0.0).sum(axis=1)
        row = int(np.lexsort((np.arange(len(drafts)), -scores, -lengths))[0])
        n = max(int(lengths[row]), min(self.least, 1 + int(there[row].sum()), remaining))
        return Verdict(row, n, int(said.choices[row, n - 1]))


def _there(drafts: np.ndarray, eos_token_ids: Collection[int]) -> np.ndarray:
    """Which of the tokens after the first can be kept at all, bool `[p, l - 1]`: nothing follows end-of-text."""
    there = (drafts[:, 1:] >= 0) & ~np.isin(drafts[:, :-1], list(eos_token_ids))
    return np.cumprod(there, axis=1).astype(bool)


class Typical(Lossy):
    """Keeps a token x that the base, at this temperature, gives p(x) > min(eps, alpha exp(-entropy)).

    Of drafts of one length the likeliest wins. eps = 0.09, alpha = 0.3: those of [C].
    """

    def __init__(self, *, eps: float = 0.09, alpha: float = 0.3, temperature: float = 1.0) -> None:
        if not 0 < eps < 1 or not 0 < alpha < float("inf") or not 0 < temperature < float("inf"):
            raise RescoreError("typical acceptance: give eps between 0 and 1, alpha and temperature above 0")
        self.eps, self.alpha, self.temperature = eps, alpha, temperature

    def fits(self, drafts: np.ndarray, said: Said) -> np.ndarray:
        probs, entropies = self._of_base(said)
        thresholds = np.minimum(self.eps, self.alpha * np.exp(-entropies))
        return np.asarray(_of_drafts(probs, drafts, said) > thresholds[said.rows[:, :-1], said.columns[:, :-1]])

    def score(self, drafts: np.ndarray, said: Said) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(_of_drafts(self._of_base(said)[0], drafts, said)))

    def _of_base(self, said: Said) -> tuple[torch.Tensor, np.ndarray]:
        """What the base gives all tokens `[b, m, vocab]`, and the entropies `[b, m]` in nats."""
        probs = torch.softmax(said.logits.float() / self.temperature, dim=-1)
        return probs, -(probs * torch.log(probs + 1e-5)).sum(-1).cpu().numpy()


def _of_drafts(values: torch.Tensor, drafts: np.ndarray, said: Said) -> np.ndarray:
    """Of values `[b, m, vocab]` after each token those of the next one, `[p, l - 1]`."""
    after = torch.from_numpy(np.ascontiguousarray(drafts[:, 1:].clip(min=0))).to(values.device)
    rows, columns = (torch.from_numpy(np.array(at[:, :-1])).to(values.device) for at in (said.rows, said.columns))
    return np.asarray(values[rows, columns, after].cpu())


class OfLikeliest(Lossy):
    """Lossy rules that keep all that greedy acceptance keeps, and for the rest look at nothing but the base's `width`
    likeliest tokens. So the greedy output with these tells what they keep, until the first token that is not in it.
    """

    width: int = 1

    @abstractmethod
    def fits(self, drafts: np.ndarray, said: Likeliest) -> np.ndarray:
        """See `Lossy.fits`."""

    def diverges(
        self, drafts: np.ndarray, said: Likeliest, remaining: int, eos_token_ids: Collection[int]
    ) -> int | None:
        """Tokens that a step keeps at least, up to the first one that greedy decoding would not; None where it surely
        keeps none such, but what greedy acceptance keeps.

        said: of the base along its greedy output; so of a draft what is said after its tokens holds up to the first one
        that is not in that output: of several drafts, which one is the longest need not be known. remaining,
        eos_token_ids: as for `judge`.
        """
        there = _there(drafts, eos_token_ids)
        same = np.cumprod((drafts[:, 1:] == said.choices[:, :-1]) & there, axis=1).sum(axis=1)  # [p]
        fits = np.pad(self.fits(drafts, said) & there, ((0, 0), (0, 1)))
        other = fits[np.arange(len(drafts)), same] & (1 + same < remaining)
        lengths = np.minimum(1 + same + other, remaining)
        n, row = int(lengths.max()), int(lengths.argmax())
        longest = np.minimum(1 + there.sum(axis=1), remaining)
        before = np.arange(len(drafts)) <= row  # the first one of equally long drafts wins
        if (other & ((longest > n) | ((longest == n) & before))).any():
            return n
        return n + 1 if n < min(self.least, 1 + int(there[row].sum()), remaining) else None


class TopK(OfLikeliest):
    """Keeps a token among the k likeliest of the base; equal ones count by lowest id. Source: [B] section 5.1."""

    def __init__(self, k: int = 2, *, least: int = 1) -> None:
        if k < 1 or least < 1:
            raise RescoreError("top-k acceptance: give k and least of 1 or more")
        self.k, self.width, self.least = k, k, least

    def fits(self, drafts: np.ndarray, said: Likeliest) -> np.ndarray:
        return np.asarray((said.best(self.k)[:, :-1] == drafts[:, 1:, None]).any(axis=-1))


class Distance(OfLikeliest):
    """Keeps a token whose id is at most eps from that of the base's likeliest: for tokens that are numbers, such as the
    intensities of pixels. Source: [B] section 5.2."""

    def __init__(self, eps: int = 2, *, least: int = 1) -> None:
        if eps < 0 or least < 1:
            raise RescoreError("distance acceptance: give eps of 0 or more, and least of 1 or more")
        self.eps, self.least = eps, least

    def fits(self, drafts: np.ndarray, said: Likeliest) -> np.ndarray:
        return np.asarray(np.abs(drafts[:, 1:] - said.choices[:, :-1]) <= self.eps)


class MinBlock(Distance):
    """Keeps what greedy decoding would, and `least` tokens of the winning draft at least. Source: [B] section 5.3."""

    def __init__(self, least: int = 2) -> None:
        if least < 2:
            raise RescoreError("min-block acceptance: give least of 2 or more; with 1 it is greedy acceptance")
        super().__init__(0, least=least)
