"""Row i of every segment is the state that chooses the segment's token i, wherever the corpus comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of_at_most, refused, save_tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError
from lm.base import attention
from lm.base.catalog import load_base
from lm.base.corpus import GenerationOptions, Prompt, generate_corpus
from lm.base.model import BaseLM
from lm.training import data as head_data
from lm.training.data import CHUNK, HeadData, Rows, body_states, read_head_data, segments_of

TEXT = "the quick brown fox, \u2028 the lazy dog\x0b; \u0085 é 😀.\n\n  \r\nAnd more of it\n" * 12
PAIRS = [
    {"prompt": "one\u2028two", "response": "a first answer"},
    {"prompt": "three", "response": "é\n" * 5},
    {"prompt": "p" * 600, "response": "cut prompt"},
    {"prompt": "long answer", "response": "r" * (CHUNK + 40)},
    {"prompt": "just as long", "response": "r" * CHUNK},
]


def segments(data: HeadData) -> list[tuple[list[int], np.ndarray]]:
    """(targets, states) of every segment."""
    return [(data.targets[a:b].tolist(), data.states[a:b]) for a, b in data.segments()]


def same(first: HeadData, second: HeadData) -> None:
    for field in ("targets", "ends", "contexts", "context_ends"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    np.testing.assert_array_equal(first.states[:], second.states[:])


@settings(deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_rows_of_parts_are_rows_of_the_whole(sizes, data):
    parts = [np.arange(n * 2).reshape(n, 2) + 100 * i for i, n in enumerate(sizes)]
    rows, whole = Rows(parts), np.concatenate(parts)
    start, end = data.draw(st.integers(-3, len(whole) + 2)), data.draw(st.integers(-3, len(whole) + 2))
    np.testing.assert_array_equal(rows[start:end], whole[start:end])
    assert len(rows) == len(whole)
    if len(whole):
        places = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1)))
        np.testing.assert_array_equal(rows.at(places), whole[places])


def check_against_a_direct_forward(base, data: HeadData, contexts: dict[tuple[int, ...], list[int]]) -> None:
    """`contexts` has, by a segment's targets, what stands before them."""
    assert data.states[:].dtype == np.float16 and data.targets.dtype == np.int32 and data.ends.dtype == np.int64
    assert data.states[:].shape == (len(data), base.hidden_size) and data.ends[-1] == len(data)
    found = segments(data)
    assert sorted(tuple(targets) for targets, _ in found) == sorted(contexts)
    assert data.contexts.dtype == np.int32 and data.context_ends.dtype == np.int64
    assert data.context_ends.shape == data.ends.shape and data.context_ends[-1] == len(data.contexts)
    for segment, (targets, states) in enumerate(found):
        context = contexts[tuple(targets)]
        assert data.context(segment).tolist() == context
        _, hidden = base.forward(torch.tensor([context + targets]))
        expected = hidden[0, len(context) - 1 : -1]
        np.testing.assert_allclose(states, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path / "text.txt"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def own_output(tiny_base, tmp_path: Path) -> Path:
    generate_corpus(
        tiny_base, [Prompt(t, chat) for t in ("a", "bcd", "ef") for chat in (True, False)], tmp_path / "own",
        GenerationOptions(max_new_tokens=7),
    )  # fmt: skip
    return tmp_path / "own"


@pytest.fixture
def no_forward(tiny_base, monkeypatch: pytest.MonkeyPatch):
    """The base LM must not be run from here on."""

    def use() -> None:
        monkeypatch.setattr(tiny_base, "forward", lambda *_args, **_kwargs: pytest.fail("the base LM was run"))

    return use


class TestText:
    def test_it_is_cut_into_chunks_after_their_first_token(self, tiny_base, text, tmp_path):
        data = read_head_data(tiny_base, text, tmp_path / "cache")
        lines = [line for line in TEXT.replace("\r\n", "\n").split("\n") if line.strip()]
        ids = tiny_base.encode_prompt("\n".join(lines), chat=False)
        assert len(ids) > 2 * CHUNK
        chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
        check_against_a_direct_forward(tiny_base, data, {tuple(c[1:]): c[:1] for c in chunks})
        assert data.source == "text.txt"

    def test_the_vocabulary_projection_is_not_computed(self, tiny_base, text, tmp_path):
        """For a corpus it would be a large part of the work."""
        rows = []
        hook = tiny_base.output_embeddings.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
        try:
            read_head_data(tiny_base, text, tmp_path / "cache")
        finally:
            hook.remove()
        assert rows and not any(rows)

    def test_the_precision_is_part_of_what_is_kept(self, tiny_folder, text, tmp_path):
        base = load_base(str(tiny_folder))
        whole, half, again = (
            read_head_data(base, text, tmp_path / "cache", precision=precision)
            for precision in ("float32", "bfloat16", "float32")
        )
        assert len(list((tmp_path / "cache").iterdir())) == 2
        exact, rounded, kept = (
            np.asarray(data.states[0 : len(data)], dtype=np.float32) for data in (whole, half, again)
        )
        assert (exact == kept).all() and (exact != rounded).any()
        assert np.abs(exact - rounded).mean() < 0.05 * np.abs(exact).mean()

    def test_one_token_left_over_is_nothing(self, tiny_base, tmp_path):
        (tmp_path / "x.txt").write_text("a" * (CHUNK + 1))
        data = read_head_data(tiny_base, tmp_path / "x.txt", tmp_path)
        assert data.ends.tolist() == [CHUNK - 1]

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "is empty"), (b" \n\n", "is empty"), (b"a", "too short"), (b"a\xff", "line 1 is not UTF-8 text")],
    )
    def test_a_text_that_gives_nothing(self, tiny_base, tmp_path, content, message):
        (tmp_path / "x.txt").write_bytes(content)
        said = refused(lambda: read_head_data(tiny_base, tmp_path / "x.txt", tmp_path / "cache"), InvalidDataError)
        assert message in said
        assert not (tmp_path / "cache").exists()


class TestPairs:
    def test_the_answers_are_the_targets_and_end(self, tiny_base, pairs, tmp_path):
        data = read_head_data(tiny_base, pairs, tmp_path / "cache")
        (end,) = tiny_base.eos_token_ids
        contexts = {}
        for pair in PAIRS:
            answer = tiny_base.encode_prompt(pair["response"], chat=False)
            targets = answer[:CHUNK] if len(answer) > CHUNK else [*answer, end]  # what was cut off did not end here
            room = min(2 * CHUNK, tiny_base.context_length - len(targets))
            contexts[tuple(targets)] = tiny_base.encode_prompt(pair["prompt"], chat=True, max_tokens=room)
        check_against_a_direct_forward(tiny_base, data, contexts)

    def test_without_a_chat_template_prompts_are_plain(self, pairs, tmp_path):
        base = load_base(str(save_tiny_base(tmp_path / "plain", chat=False)), dtype="float64")
        data = read_head_data(base, pairs, tmp_path / "cache")
        shortest = min(segments(data), key=lambda s: len(s[0]))
        _, hidden = base.forward(torch.tensor([base.encode_prompt("p" * 512, chat=False)]))
        np.testing.assert_allclose(shortest[1][0], hidden[0, -1].numpy(), rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": "a"}', "line 3 has no text in the field 'response'"),
            ('{"response": "a"}', "line 3 has no text in the field 'prompt'"),
            ('{"prompt": "a", "response": ["b"]}', "line 3 has no text in the field 'response'"),
            ('{"prompt": "a", "response": ""}', "line 3 has no text in the field 'response'"),
            ('{"prompt": "\\udc00", "response": "b"}', "line 3 has no text in the field 'prompt'"),
            ('{"prompt": "a", ', "line 3 is not valid JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, tiny_base, tmp_path, line, message):
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(PAIRS[0]) + "\n\n" + line + "\n")
        said = refused(lambda: read_head_data(tiny_base, path, tmp_path / "cache"), InvalidDataError)
        assert message in said and str(path) in said

    def test_an_empty_file(self, tiny_base, tmp_path):
        (tmp_path / "x.jsonl").write_text("")
        said = refused(lambda: read_head_data(tiny_base, tmp_path / "x.jsonl", tmp_path / "cache"), InvalidDataError)
        assert "is empty" in said


class TestOwnOutput:
    def test_states_come_from_the_corpus(self, tiny_base, own_output, tmp_path, no_forward):
        contexts = {}
        for line in (own_output / "corpus.jsonl").read_text().splitlines():
            record = json.loads(line)
            contexts[tuple(record["output_ids"])] = record["prompt_ids"]
        data = read_head_data(tiny_base, own_output, tmp_path / "cache")
        check_against_a_direct_forward(tiny_base, data, contexts)
        projected = tiny_base.project(torch.from_numpy(data.states[:]).double())
        assert projected.argmax(-1).tolist() == data.targets.tolist()
        no_forward()
        read_head_data(tiny_base, own_output, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_a_corpus_with_its_prompts(self, tiny_base, tmp_path):
        """Every token but a prompt's first has its state; a run that is interrupted goes on to the same file."""
        prompts = [Prompt(text, False) for text in ("ab", "c", "defg", "hij")]
        options = GenerationOptions(max_new_tokens=5, batch_size=3, with_prompts=True)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        generate_corpus(tiny_base, prompts, whole, options)
        generate_corpus(tiny_base, prompts[:3], parts, options)
        generate_corpus(tiny_base, prompts, parts, options)
        lines = [json.loads(line) for line in (whole / "corpus.jsonl").read_text().splitlines()]
        contexts = {(*x["prompt_ids"][1:], *x["output_ids"]): x["prompt_ids"][:1] for x in lines}
        for folder in (whole, parts):
            data = read_head_data(tiny_base, folder, tmp_path / "cache")
            assert len(data) == sum(map(len, contexts))
            check_against_a_direct_forward(tiny_base, data, contexts)
        said = refused(lambda: generate_corpus(tiny_base, prompts, whole, GenerationOptions(max_new_tokens=5)))
        assert "with_prompts" in said

    def test_a_corpus_still_being_written_is_read_up_to_its_last_line(self, tiny_base, own_output, tmp_path):
        whole = read_head_data(tiny_base, own_output, tmp_path)
        with (own_output / "corpus.jsonl").open("a") as stream:
            stream.write('{"output_ids": [1, 2')
        with (own_output / "hidden.f16").open("ab") as stream:
            stream.write(b"\0" * 65)
        now = read_head_data(tiny_base, own_output, tmp_path)
        np.testing.assert_array_equal(now.targets, whole.targets)
        np.testing.assert_array_equal(now.states[:], whole.states[:])

    def test_the_output_of_another_base_is_refused(self, own_output, tmp_path):
        other = load_base(str(save_tiny_base(tmp_path / "other", seed=7)))
        said = refused(lambda: read_head_data(other, own_output, tmp_path), IncompatibleError)
        assert "another base LM" in said and "weights_sha256" in said

    def test_another_precision_of_the_same_base_is_no_matter(self, tiny_base, tiny_folder, own_output, tmp_path):
        data = read_head_data(load_base(str(tiny_folder), dtype="bfloat16"), own_output, tmp_path)
        assert len(data) == len(read_head_data(tiny_base, own_output, tmp_path))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("settings.json", None, "not a folder made by generate-corpus"),
            ("settings.json", b"{", "is not valid JSON"),
            ("settings.json", b'{"base": {"name": "x"}}', "does not say which base LM"),
            ("corpus.jsonl", None, "can't read"),
            ("corpus.jsonl", b"", "is empty"),
            ("corpus.jsonl", b'{"prompt": "a"}\n', "line 1 has no field 'prompt_ids'"),
            ("corpus.jsonl", b'{"prompt_ids": [1]}\n', "line 1 has no field 'output_ids'"),
            ("corpus.jsonl", b'{"prompt_ids": [1], "output_ids": null}\n', "in the field 'output_ids'"),
            ("corpus.jsonl", b'{"prompt_ids": [1], "output_ids": "12"}\n', "in the field 'output_ids'"),
            ("corpus.jsonl", b'{"prompt_ids": [1], "output_ids": [1.5]}\n', "line 1 has other things than token ids"),
            ("corpus.jsonl", b'{"prompt_ids": [1], "output_ids": [true]}\n', "line 1 has other things than token ids"),
            ("corpus.jsonl", b'{"prompt_ids": [-1], "output_ids": [1]}\n', "in the field 'prompt_ids'"),
            ("corpus.jsonl", b'{"prompt_ids": [1], "output_ids": [99999]}\n', "in the field 'output_ids'"),
            ("hidden.f16", None, "has the states of 0 of"),
            ("hidden.f16", b"", "has the states of 0 of"),
            ("hidden.f16", b"\0" * 129, "has the states of 2 of"),
        ],
    )
    def test_a_folder_that_lacks_something(self, tiny_base, own_output, tmp_path, name, content, message):
        (own_output / name).unlink()
        if content is not None:
            (own_output / name).write_bytes(content)
        said = refused(lambda: read_head_data(tiny_base, own_output, tmp_path))
        assert message in said and str(own_output) in said


class TestBodyStates:
    """What a tuned base or a rescorer computes with gradients is what the base itself would."""

    @pytest.mark.parametrize("window", [None, 4])
    def test_they_are_the_forwards_own(self, tmp_path, text, window):
        folder = save_tiny_base(tmp_path / "base")
        attention.register()
        torch.manual_seed(0)
        config = MistralConfig(**{**json.loads((folder / "config.json").read_text()), "sliding_window": window})
        model = MistralForCausalLM._from_config(config, attn_implementation=attention.PACKED)
        plain = load_base(str(folder))
        base = BaseLM(model, plain.tokenizer, identity=plain.identity)
        assert base.supports_tree == (window is None)
        data = read_head_data(base, text, tmp_path / "cache", precision="float32")
        segments = segments_of([data])
        assert len(segments) > 1
        found = body_states(
            model, [data], segments, device=base.device, dtype=torch.float32, arguments=base.body_arguments
        )
        np.testing.assert_allclose(found.detach().numpy(), data.states[:].astype(np.float32), rtol=5e-3, atol=5e-3)


class TestContext:
    """No text is longer than what the base can read."""

    @pytest.mark.parametrize("kind", ["text", "pairs"])
    def test_it_bounds_prompts_and_answers(self, tiny_base, tmp_path, monkeypatch, request, kind):
        monkeypatch.setattr(tiny_base, "context_length", 40)
        data = read_head_data(tiny_base, request.getfixturevalue(kind), tmp_path / "cache")
        read = [len(data.context(s.number)) + s.targets for s in segments_of([data])]
        assert max(read) == 40 and min(len(data.context(s.number)) for s in segments_of([data])) >= 1


class TestKeptStates:
    @pytest.mark.parametrize("kind", ["text", "pairs"])
    def test_the_base_runs_once(self, tiny_base, tmp_path, no_forward, request, kind):
        path = request.getfixturevalue(kind)
        seen = []
        first = read_head_data(tiny_base, path, tmp_path / "cache", progress=lambda *now: seen.append(now))
        assert seen[-1] == (len(first.ends), len(first.ends))
        no_forward()
        again = read_head_data(tiny_base, path, tmp_path / "cache")
        same(first, again)
        assert again.sha256 == first.sha256

    def test_another_text_base_limit_or_kind_of_file_has_states_of_its_own(self, tiny_base, text, tmp_path):
        other = load_base(str(save_tiny_base(tmp_path / "other", seed=7)), dtype="float64")
        as_pairs = tmp_path / "same.csv"
        as_text = tmp_path / "same.txt"
        for path in (as_pairs, as_text):
            path.write_text("prompt,response\none two,a first answer\n")
        cache = tmp_path / "cache"
        read = [
            read_head_data(tiny_base, text, cache),
            read_head_data(other, text, cache),
            read_head_data(tiny_base, text, cache, max_tokens=CHUNK),
            read_head_data(tiny_base, as_pairs, cache),
            read_head_data(tiny_base, as_text, cache),
        ]
        assert len(list(cache.iterdir())) == 5
        assert not np.array_equal(read[0].states[:], read[1].states[:])
        assert len({len(data) for data in read}) == 4

    @pytest.mark.parametrize("targets", [1, 300, 700])
    def test_shards_are_one_corpus(self, tiny_base, text, tmp_path, monkeypatch, targets):
        whole = read_head_data(tiny_base, text, tmp_path / "whole")
        monkeypatch.setattr(head_data, "SHARD_TARGETS", targets)
        parts = read_head_data(tiny_base, text, tmp_path / "parts")
        assert len(parts.states.parts) > 1 and len(parts) == len(whole)
        ours, theirs = sorted(segments(parts), key=lambda s: s[0]), sorted(segments(whole), key=lambda s: s[0])
        for (tokens, states), (expected, expected_states) in zip(ours, theirs, strict=True):
            assert tokens == expected
            np.testing.assert_allclose(states, expected_states, rtol=2e-3, atol=2e-3)
        contexts = {tuple(t): parts.context(i).tolist() for i, (t, _) in enumerate(segments(parts))}
        check_against_a_direct_forward(tiny_base, parts, contexts)

    def test_an_interrupted_run_goes_on(self, tiny_base, text, tmp_path, monkeypatch):
        monkeypatch.setattr(head_data, "SHARD_TARGETS", 300)
        whole = read_head_data(tiny_base, text, tmp_path / "whole")
        counts = []

        def stop(done: int, _total: int) -> None:
            counts.append(done)
            if done >= 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            read_head_data(tiny_base, text, tmp_path / "parts", progress=stop)
        (folder,) = (tmp_path / "parts").iterdir()
        assert sorted(p.name for p in folder.iterdir()) == ["segments.npz", "shard-00000.f16"]  # whole ones only
        rest = []
        again = read_head_data(tiny_base, text, tmp_path / "parts", progress=lambda done, _: rest.append(done))
        assert min(rest) > 2  # what was finished is not done again
        same(whole, again)

    def test_a_full_disk_is_one_line_and_what_it_kept_is_gone_on_from(self, tiny_base, text, tmp_path, monkeypatch):
        monkeypatch.setattr(head_data, "SHARD_TARGETS", 300)
        whole = read_head_data(tiny_base, text, tmp_path / "whole")
        sizes = [f.stat().st_size for f in sorted((tmp_path / "whole").rglob("shard-*"))]
        assert sizes[-1] < max(sizes)
        with files_of_at_most(max(sizes) - 1):
            message = refused(lambda: read_head_data(tiny_base, text, tmp_path / "parts"), OutputError)
        assert "can't write" in message
        assert [p.name for p in (tmp_path / "parts").glob("*/*")] == ["segments.npz"]
        same(whole, read_head_data(tiny_base, text, tmp_path / "parts"))

    def test_more_than_the_limit_is_refused_before_the_work(self, tiny_base, text, tmp_path, no_forward):
        no_forward()
        message = refused(lambda: read_head_data(tiny_base, text, tmp_path / "cache", cache_gb=1e-5))
        assert "--cache-gb" in message and "GB" in message
        assert not (tmp_path / "cache").exists()

    def test_a_place_that_cannot_be_written(self, tiny_base, text, tmp_path):
        (tmp_path / "file").write_text("")
        assert "can't write" in refused(lambda: read_head_data(tiny_base, text, tmp_path / "file"), OutputError)

    def test_a_missing_corpus(self, tiny_base, tmp_path):
        assert "no corpus at" in refused(lambda: read_head_data(tiny_base, tmp_path / "none", tmp_path))


class TestBounds:
    @settings(deadline=None, derandomize=True)
    @given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), bound=st.integers(0, 150))
    def test_at_most_so_many_targets_spread_evenly(self, sizes, bound):
        sequences = [([place], [0] * size) for place, size in enumerate(sizes)]
        try:
            chosen = head_data._bounded(sequences, bound)
        except RescoreError:
            assert bound < max(sizes)
            return
        taken = sum(len(targets) for _, targets in chosen)
        assert taken <= bound
        if bound >= sum(sizes):
            assert chosen == sequences
        else:
            assert bound - taken < max(sizes)  # the next one would have been too much
            assert [s for s in sequences if s in chosen] == chosen
            half = sum(len(t) for (place,), t in chosen if place < len(sizes) // 2)
            share = bound * sum(sizes[: len(sizes) // 2]) / sum(sizes)
            assert share - max(sizes) < half <= share

    def test_a_bound_of_a_text(self, tiny_base, text, tmp_path):
        whole = read_head_data(tiny_base, text, tmp_path)
        bounded = read_head_data(tiny_base, text, tmp_path, max_tokens=len(whole) - 1)
        assert CHUNK - 1 <= len(bounded) < len(whole)

    @pytest.mark.parametrize("bound", [0, 5, -1])
    def test_a_bound_that_leaves_nothing(self, tiny_base, text, tmp_path, bound):
        said = refused(lambda: read_head_data(tiny_base, text, tmp_path / "cache", max_tokens=bound))
        assert f"max_tokens = {bound} leaves nothing" in said
