"""One prompt decoded live, from text to text."""

from __future__ import annotations

from dataclasses import dataclass

from lattices.errors import RescoreError
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads
from rescore.accounting import block_efficiency
from rescore.decoding import decode
from rescore.rescorers import Rescorer, Target
from rescore.runs.run import ORACLE, Run
from rescore.runs.weights import fitted_to


@dataclass(frozen=True)
class Output:
    """What `generate` gives.

    text: of the output, special tokens left out; token_ids: with end-of-text, where it came.
    accepted: tokens accepted by each step.
    seconds: of the whole decode, the prompt included; verify: how drafts were verified, tree or batch.
    """

    text: str
    token_ids: list[int]
    accepted: list[int]
    seconds: float
    verify: str

    @property
    def block_efficiency(self) -> float:
        """Tokens a step."""
        return block_efficiency([self.accepted])


def generate(
    base: BaseLM,
    heads: BlockHeads | None,
    prompt: str,
    *,
    rescorer: str | Run | Rescorer = "none",
    max_new_tokens: int = 64,
    verify: str = "tree",
    chat: bool | None = None,
) -> Output:
    """Decodes a prompt in blocks; the text is greedy decoding's own.

    heads: None where no drafter is `heads`.
    rescorer: its spec, an object, or a `Run` with drafters, p, k and weight; the spec of a drafter: its own drafts.
    chat: whether the prompt goes through the base's chat template (None: where it has one).
    Raises `RescoreError` for what can't be decoded.
    """
    run = rescorer if isinstance(rescorer, Run) else Run(rescorer)
    if run.rescorer == ORACLE:
        raise RescoreError("the oracle must know the output beforehand; it can be evaluated, not generated with")
    target = Target.of(base.identity, base.vocab_size, base.eos_token_ids, device=str(base.device), shared=base)
    loaded = run.load()
    fitted, drafters = fitted_to(target, {"": (loaded, run.load_drafters(loaded))})[""]
    if run.alpha is not None:
        if fitted.alpha is None:
            raise RescoreError(f"the rescorer {run.label} has no weight; drop alpha")
        if run.number is None:
            raise RescoreError("a weight is tuned for a task, and a prompt is of none; give alpha as a number")
        fitted = fitted.weighted(run.number)
    prompt_ids = base.encode_prompt(prompt, chat=base.is_chat if chat is None else chat)
    decoded = decode(
        base, heads, prompt_ids, rescorer=fitted, drafters=drafters, k=run.k, p=run.p, max_new_tokens=max_new_tokens,
        verify=verify,
    )  # fmt: skip
    return Output(
        text=base.decode_text(decoded.output_ids),
        token_ids=decoded.output_ids,
        accepted=decoded.accepted,
        seconds=decoded.seconds.prefill + decoded.seconds.total,
        verify=decoded.verify,
    )
