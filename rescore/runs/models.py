"""The models of a recording: its base LM and block heads, and what a trace says of them."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from lattices.errors import IncompatibleError
from lm.keys import key_of
from lm.records import plain
from rescore.runs.inputs import Inputs
from rescore.tasks import Example, Task
from rescore.tasks.data import TaskData
from rescore.traced_rows import rows_of
from rescore.tracing import recorded_by

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity, BaseLM
    from lm.heads.block_heads import BlockHeads


class Models:
    """Base LM and block heads of a recording, loaded when first needed: a replay from the cache needs neither.

    heads_needed: whether anything drafts with heads; if not, a base that has none is recorded without.
    """

    def __init__(
        self,
        inputs: Inputs,
        base: BaseLM | None = None,
        heads: BlockHeads | None = None,
        *,
        heads_needed: bool = True,
    ) -> None:
        self.inputs, self.heads_needed = inputs, heads_needed
        self._given_base, self._given_heads = base, heads

    @cached_property
    def base(self) -> BaseLM:
        """The base LM."""
        from lm.base.catalog import load_base

        inputs = self.inputs
        return self._given_base or load_base(
            inputs.base, dtype=inputs.dtype, device=inputs.device, compile=inputs.compile
        )

    @cached_property
    def identity(self) -> BaseIdentity:
        """Which base LM that is, told without its weights in memory."""
        return self._identify()

    @cached_property
    def has_heads(self) -> bool:
        """Whether there are block heads: always, unless none are needed, named or known for the base."""
        from lm.heads.block_heads import known_heads

        named = self._given_heads or self.inputs.heads is not None
        return bool(self.heads_needed or named or known_heads(self.identity.name))

    @cached_property
    def heads(self) -> BlockHeads | None:
        """All of the block heads; None without any."""
        from lm.heads.block_heads import load_heads

        if self._given_heads or not self.has_heads:
            return self._given_heads
        return load_heads(self.identity, self.inputs.heads, device=self.base.device, dtype=self.base.heads_dtype)

    @property
    def used_heads(self) -> BlockHeads | None:
        """The first h of them, as the inputs say."""
        heads, h = self.heads, self.inputs.h
        return heads if h is None or heads is None else heads.first(h)

    def loaded(self, settings: Mapping[str, Any]) -> tuple[BaseLM, BlockHeads | None]:
        """Base and heads that are used, of a trace with these settings. Raises as `check_unchanged`."""
        heads = self.used_heads
        self.check_unchanged(settings)
        return self.base, heads

    @property
    def device(self) -> str:
        """Where work is done: `cpu` or `cuda:N`."""
        from lm.base.catalog import choose_device

        return str(self._given_base.device) if self._given_base else choose_device(self.inputs.device)

    @property
    def inputs_of_worker(self) -> Inputs:
        """The inputs in a worker elsewhere: on the same kind of device as here, of which it has its own."""
        return dataclasses.replace(self.inputs, device=self.device.partition(":")[0])

    @property
    def compiles(self) -> bool:
        """Whether the base's layers are compiled where that gains."""
        return self._given_base.compiles if self._given_base else self.inputs.compile == "auto"

    def heads_facts(self) -> dict[str, Any]:
        """What a trace says of the heads: hashes of weights and configuration, and h."""
        from lm.heads.block_heads import heads_folder, heads_sha256, read_config

        if not self.has_heads:
            return {"heads_sha256": None, "heads_config_sha256": None, "h": 1}
        if self._given_heads:
            config, weights = self._given_heads.config, self._given_heads.sha256
        else:
            folder = heads_folder(self.inputs.heads, self.identity)
            config, weights = read_config(folder), heads_sha256(folder)
        return {"heads_sha256": weights, "heads_config_sha256": config.sha256, "h": config.h}

    def check_unchanged(self, settings: Mapping[str, Any]) -> None:
        """Raises `IncompatibleError` if base or heads are no longer those that the settings of a trace name.

        Files may be replaced between the moment they are identified and the one they are read, and even later: weights
        are mapped into memory, so that a file written over changes the model that runs.
        """
        from lm.base.catalog import Watch

        if self._given_base:
            Watch(self._given_base).check()
        now = [dataclasses.asdict(self._identify()), self.heads_facts()["heads_sha256"]]
        if plain(now) != plain([settings["base"], settings["heads_sha256"]]):
            raise IncompatibleError(
                f"the files of {self.inputs.base} or of its heads were replaced while they were read; run the command "
                "again"
            )

    def about_heads(self) -> str | None:
        """What the user should know of the heads, if anything."""
        from lm.heads.block_heads import of_other_weights

        known = self._given_heads or not self.has_heads
        return None if known else of_other_weights(self.inputs.heads, self.identity)

    def trace_settings(self, task: Task, data: TaskData, max_new_tokens: int) -> dict[str, Any]:
        """Everything that a trace depends on, but for its k; none of it needs the weights in memory.

        `recorded_by`: a trace of another device or of other libraries is not replayed unseen.
        """
        from lm.base.catalog import load_tokenizer

        tokenizer = self._given_base.tokenizer if self._given_base else load_tokenizer(self.inputs.base)
        template = tokenizer.chat_template if task.chat else None
        settings = {
            "base": dataclasses.asdict(self.identity),
            **self.heads_facts(),
            "task": task.name,
            "template": task.template,
            "chat": bool(template),
            "chat_template": template,
            "data_sha256": data.source["sha256"],
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": self.inputs.max_prompt_tokens or task.limits.prompt_tokens,
            "recorded_by": recorded_by(self.device),
        }
        # A task of the user's own is what its file says: with another word in it, it is another task.
        return settings if task.definition is None else {**settings, "definition": dict(task.definition)}

    def release(self) -> None:
        """Lets go of what was loaded by name: whoever needs it again has it loaded again."""
        from lm.pages import trim_heap

        if [vars(self).pop(name) for name in ("base", "heads") if name in vars(self)]:
            gc.collect()  # hooks and packed products of a model point back at it
            trim_heap()  # what was freed lies between what is still in use, and would stay with the process

    def _identify(self) -> BaseIdentity:
        from lm.base.catalog import identify

        return self._given_base.identity if self._given_base else identify(self.inputs.base, dtype=self.inputs.dtype)


@dataclass(frozen=True)
class RowsByWorkers:
    """Records the rows of a part in a worker, with models of its own, which must be those of the settings."""

    inputs: Inputs
    heads_needed: bool
    settings: dict[str, Any]
    k: int

    def __call__(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        models = _models_of_worker(self.inputs, self.heads_needed, key_of(self.settings))
        how = {name: self.settings[name] for name in ("chat", "max_new_tokens", "max_prompt_tokens")}
        rows = rows_of(models.base, models.heads, examples, k=self.k, **how)
        models.check_unchanged(self.settings)
        return rows


@lru_cache(maxsize=1)
def _models_of_worker(inputs: Inputs, heads_needed: bool, _: str) -> Models:
    """Those of settings with this key: files may be replaced between two commands that one worker works for."""
    return Models(inputs, heads_needed=heads_needed)
