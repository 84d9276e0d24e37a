"""One prompt from text to text: stop strings, streaming, messages, what is chosen where no rescorer is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from conftest import byte_tokenizer, make_heads, refused, save_tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lm.base.catalog import load_base
from lm.base.model import BaseLM
from rescore.decoding import decode
from rescore.generation import live
from rescore.generation.growing_text import GrowingText
from rescore.generation.live import Generator, best_run, generate
from rescore.rescorers import load_rescorer
from rescore.rescorers.joint_plan import PLANNED_NODES
from rescore.runs.run import Run

pytestmark = pytest.mark.usefixtures("shipped_ngram")

FAST = Run("context-ngram:none", k=4, p=4)  # several tokens a step
PROMPTS = ("A prompt", "the bridge, the bridge", "\N{SNOWMAN} in Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich", "x")


@pytest.fixture(scope="module")
def heads(tiny_base: BaseLM):
    return make_heads(tiny_base)


def greedy_text(base: BaseLM, prompt: str, limit: int) -> str:
    return base.decode_text(decode(base, None, base.encode_prompt(prompt, chat=True), max_new_tokens=limit).output_ids)


def cut(text: str, stops: list[str]) -> str:
    """Before the first of the stops, by the plainest rule."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class Blocks:
    """A base that only makes text of tokens, and takes the tokens of a text in blocks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def take(tokenizer: PreTrainedTokenizerFast, ids: list[int], block: Callable[[int], int], stops: list[str]):
    """The text, tokens and pieces of an output whose tokens come in these blocks."""
    pieces: list[str] = []
    text, start = GrowingText(Blocks(tokenizer), stops, pieces.append), 0  # type: ignore[arg-type]
    while start < len(ids):
        n = block(start)
        if not text.accepted(ids[start : start + n]):
            break
        start += n
    return text.finished(), text.token_ids, pieces


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens of their own beside letters: a run of them is no text before it is whole."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list("ab ")
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}
texts = st.text(alphabet="ab \N{EURO SIGN}\N{SNOWMAN}\N{GRINNING FACE}", min_size=1, max_size=12)
stop_texts = st.text(alphabet="ab \N{EURO SIGN}", min_size=1, max_size=3)


def ids_of(name: str, text: str, broken: int) -> list[int]:
    """The tokens of a text of which so many bytes are left out at its end, so that its last character may be half."""
    if name == "bytes":
        ids = TOKENIZERS[name](text)["input_ids"]
    else:
        ids = [i for c in text for i in ([256 + "ab ".index(c)] if c in "ab " else list(c.encode()))]
    return ids[: max(1, len(ids) - broken)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(
    text=texts, broken=st.integers(0, 3), stops=st.lists(stop_texts, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)  # fmt: skip
def test_blocks_do_not_show(name: str, text: str, broken: int, stops: list[str], sizes: list[int]):
    ids, tokenizer = ids_of(name, text, broken), TOKENIZERS[name]
    found, tokens, pieces = take(tokenizer, ids, lambda start: sizes[start % len(sizes)], stops)
    assert found == cut(tokenizer.decode(ids), stops) == "".join(pieces)
    assert (found, tokens) == take(tokenizer, ids, lambda _: 1, stops)[:2]
    assert tokens == ids[: len(tokens)]
    for number in range(len(pieces)):  # what was streamed before the end is whole
        assert number == len(pieces) - 1 or not pieces[number].endswith("\N{REPLACEMENT CHARACTER}")


def test_a_stop_that_may_still_begin_earlier_is_waited_for():
    ids = TOKENIZERS["bytes"]("xabcy")["input_ids"]
    assert take(TOKENIZERS["bytes"], ids, lambda _: 1, ["bc", "abcd"])[:2] == ("xa", ids)
    ids = TOKENIZERS["bytes"]("xabcdy")["input_ids"]
    assert take(TOKENIZERS["bytes"], ids, lambda _: 1, ["bc", "abcd"])[:2] == ("x", ids[:5])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.sampled_from(PROMPTS), limit=st.integers(1, 24), data=st.data())
def test_the_text_is_greedy_text_cut(tiny_base: BaseLM, heads, prompt: str, limit: int, data):
    whole = greedy_text(tiny_base, prompt, limit)
    place = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stops = [stop for stop in (whole[place : place + 2], "never") if stop]
    pieces: list[str] = []
    output = generate(
        tiny_base, heads, prompt, rescorer=FAST, max_new_tokens=limit, stop=stops, stream=pieces.append
    )  # fmt: skip
    assert output.text == cut(whole, stops) == "".join(pieces)
    assert sum(output.accepted) == len(output.token_ids) and min(output.accepted) > 0
    assert output.ended == "stop" or not whole
    alone = generate(tiny_base, None, prompt, rescorer="lookup", max_new_tokens=limit, stop=stops)
    assert (alone.text, alone.token_ids) == (output.text, output.token_ids)


def test_decoding_stops_as_soon_as_the_stop_is_there(tiny_base: BaseLM, heads, monkeypatch: pytest.MonkeyPatch):
    whole = greedy_text(tiny_base, "A prompt", 24)
    stop = next(c for c in whole if c.isascii())
    calls: list[int] = []
    forward = tiny_base.forward
    monkeypatch.setattr(tiny_base, "forward", lambda *a, **more: calls.append(1) or forward(*a, **more))
    output = generate(tiny_base, heads, "A prompt", rescorer="none", max_new_tokens=24, stop=stop)
    assert output.text == whole[: whole.index(stop)] and output.ended == "stop"
    assert len(calls) == 1 + len(output.accepted)
    assert len(output.token_ids) < 24


def test_the_streamer_gets_pieces_as_they_come(tiny_base: BaseLM, heads):
    pieces: list[str] = []
    output = generate(tiny_base, heads, "A prompt", rescorer=FAST, max_new_tokens=32, stream=pieces.append)
    assert len(pieces) > 3 and "".join(pieces) == output.text == greedy_text(tiny_base, "A prompt", 32)
    assert output == generate_again(tiny_base, heads, output)


def generate_again(base: BaseLM, heads, output):
    """The same without a streamer, its times aside."""
    again = generate(base, heads, "A prompt", rescorer=FAST, max_new_tokens=32)
    return type(again)(**{**vars(again), "seconds": output.seconds, "parts": output.parts})


def test_statistics(tiny_base: BaseLM, heads):
    output = generate(tiny_base, heads, "A prompt", rescorer=FAST, max_new_tokens=12)
    assert output.block_efficiency == len(output.token_ids) / len(output.accepted)
    assert output.tokens_per_second == len(output.token_ids) / output.seconds
    parts = output.parts
    assert output.seconds == parts.prefill + parts.total and parts.total >= parts.verify + parts.draft + parts.rescore
    document = json.loads(json.dumps(output.as_dict()))
    assert document["parts"].keys() == vars(parts).keys() and document["tokens_per_second"] == output.tokens_per_second
    assert (document["ended"], document["rescorer"]) == ("length", "context-ngram:none")
    assert f"12 tokens in {output.seconds:.2f} s" in output.line() and "by context-ngram:none" in output.line()


def test_end_of_text_ends_it(tiny_base: BaseLM, heads, monkeypatch: pytest.MonkeyPatch):
    ids = generate(tiny_base, heads, "A prompt", max_new_tokens=12).token_ids
    monkeypatch.setattr(tiny_base, "eos_token_ids", frozenset([ids[3]]))
    output = generate(tiny_base, heads, "A prompt", max_new_tokens=12, stream=str)
    end = ids.index(ids[3]) + 1
    assert output.token_ids == ids[:end] and output.ended == "end"


def test_messages_are_a_conversation(tiny_base: BaseLM, heads):
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "A prompt"},
    ]  # fmt: skip
    rendered = "<system>Be brief.<user>A prompt<assistant>"
    of_messages = generate(tiny_base, heads, messages, max_new_tokens=12)
    assert of_messages.token_ids == generate(tiny_base, heads, rendered, chat=False, max_new_tokens=12).token_ids
    one = generate(tiny_base, heads, messages[1:], max_new_tokens=12)
    assert one.token_ids == generate(tiny_base, heads, "A prompt", max_new_tokens=12).token_ids


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}], ["text"], {"role": "user", "content": "x"}]
)
def test_what_is_no_conversation_is_refused(tiny_base: BaseLM, messages):
    refused(lambda: generate(tiny_base, None, messages), 'give a list of {"role": ..., "content": ...}')


def test_requests_that_make_no_sense(tiny_base: BaseLM, heads, tmp_path, monkeypatch: pytest.MonkeyPatch):
    message = [{"role": "user", "content": "x"}]
    refused(lambda: generate(tiny_base, heads, message, chat=False), "messages go through the chat template")
    refused(lambda: generate(tiny_base, heads, "x", stop=["a", ""]), "a stop string is empty")
    refused(lambda: generate(tiny_base, None, "x", rescorer="none"), "there are none for", "--drafter lookup")
    refused(lambda: generate(tiny_base, heads, "x", rescorer="oracle"), "can be evaluated, not generated with")
    refused(lambda: generate(tiny_base, heads, "x", max_new_tokens=0), "at least one token")
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tiny_base.tokenizer, "chat_template", template)
    refused(lambda: generate(tiny_base, heads, message), "does not take these messages: roles must alternate")
    plain = load_base(str(save_tiny_base(tmp_path, chat=False)), device="cpu")
    refused(lambda: generate(plain, None, message), "has no chat template")
    assert generate(plain, None, "x", max_new_tokens=3).accepted


def test_what_is_chosen_where_no_rescorer_is_named(tiny_base: BaseLM, heads, monkeypatch: pytest.MonkeyPatch):
    """Without weights of its own name, and another tokenizer than the shipped n-gram model's."""
    assert best_run(tiny_base, heads).label == "context-ngram:none,drafters=heads+lookup"
    assert best_run(tiny_base, None).label == "lookup"
    with monkeypatch.context() as patch:  # a ranking of its tokens would be shipped
        patch.setattr(live, "FEWER", 100)
        patch.setattr(live, "find_draft_vocabulary", lambda *_, **__: None)
        assert live._own_drafters(tiny_base, heads) == ("heads:vocabulary=100", "lookup")
    assert best_run(tiny_base, heads, drafters=("lookup",)).drafters == ("lookup",)
    assert best_run(tiny_base, heads, drafters=("heads",), p=3).p == 3
    for nodes, sizes, p in ((8, {}, 8), ("auto", {}, PLANNED_NODES), (8, {"p": 2}, 2)):
        run = best_run(tiny_base, heads, nodes=nodes, k=4, **sizes)
        assert (run.rescorer, run.drafters, run.p, run.k) == (f"joint:nodes={nodes}", ("heads", "lookup"), p, 4)
    assert best_run(tiny_base, None, nodes="auto").drafters == ("lookup",)


def test_where_weights_of_joint_are_shipped_they_are_used(tiny_base: BaseLM, heads, monkeypatch: pytest.MonkeyPatch):
    from rescore.generation import live

    made: list[tuple[str, ...]] = []

    class Fits:
        drafters = ("heads", "lookup")
        plans = random = False

        def fit(self, target):
            made.append(target.sources)
            return self

    monkeypatch.setattr(live, "SHIPPED", live.SHIPPED)
    monkeypatch.setattr(Run, "load", lambda run: Fits() if run.rescorer == "joint" else load_rescorer(run.rescorer))
    shipped = live.SHIPPED / "smollm2-135m"
    monkeypatch.setattr(
        tiny_base, "identity", type(tiny_base.identity)(**{**vars(tiny_base.identity), "name": "smollm2-135m"})
    )
    assert shipped.is_dir() and best_run(tiny_base, heads).rescorer == "joint"
    assert made == [("heads", "lookup")]
    assert best_run(tiny_base, None).drafters == ("lookup",) and made[-1] == ("lookup",)


def test_many_prompts_with_one_generator(tiny_base: BaseLM, heads):
    generator = Generator.of(tiny_base, heads, FAST)
    for prompt in PROMPTS:
        assert generator.generate(prompt, max_new_tokens=9).text == greedy_text(tiny_base, prompt, 9)


def test_decode_reports_each_step_and_can_be_stopped(tiny_base: BaseLM, heads):
    prompt, steps = tiny_base.encode_prompt("A prompt", chat=True), []
    how = {"rescorer": load_rescorer("context-ngram:none"), "k": 4, "p": 4, "max_new_tokens": 20}
    whole = decode(tiny_base, heads, prompt, **how, accepted=lambda tokens: steps.append(tokens) or True)
    assert list(map(len, steps)) == whole.accepted and [*itertools.chain(*steps)] == whole.output_ids
    assert whole.output_ids == decode(tiny_base, heads, prompt, **how).output_ids
    stopped = decode(tiny_base, heads, prompt, **how, accepted=lambda _: False)
    assert stopped.accepted == whole.accepted[:1]
