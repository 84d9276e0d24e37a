"""The corpus of the base LM's own output: prompts are read strictly, and an interrupted run loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, save_tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lm.base import corpus
from lm.base.catalog import load_base
from lm.base.corpus import GenerationOptions, Prompt, read_prompts
from lm.training.data import read_head_data

exhaustive = settings(
    deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PROMPTS = [
    Prompt("one", False),
    Prompt("two", True),
    Prompt("three \u2028 lines\n", True),
    Prompt("four, longer", False),
]


def generate_corpus(base, prompts, out, *, progress=None, **options):
    return corpus.generate_corpus(base, prompts, out, GenerationOptions(**options), progress=progress)


class StopError(Exception):
    """An interruption from outside."""


def stop_after(count: int):
    """A `progress` that interrupts after so many examples."""

    def progress(done: int, _total: int) -> None:
        if done >= count:
            raise StopError

    return progress


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "corpus.jsonl").read_bytes().split(b"\n") if line]


def check_states(base, folder: Path) -> None:
    """Every row of `hidden.f16` is the state that chose its token."""
    ids = [token for record in records(folder) for token in record["output_ids"]]
    states = np.fromfile(folder / "hidden.f16", dtype=np.float16).reshape(-1, base.hidden_size)
    assert len(states) == len(ids)
    assert base.project(torch.from_numpy(states).double()).argmax(-1).tolist() == ids


class TestReadPrompts:
    def test_json_lines(self, tmp_path: Path):
        path = tmp_path / "x.jsonl"
        path.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c", "chat": false, "more": 1}\n')
        assert read_prompts(path, default_chat=True) == [Prompt("a\nb", True), Prompt("c", False)]

    def test_text_has_a_prompt_a_line(self, tmp_path: Path):
        path = tmp_path / "x.txt"
        path.write_bytes("\ufeffa\u2028b\x0bc\r\n\n  \nd\n".encode())
        assert read_prompts(path, default_chat=False) == [Prompt("a\u2028b\x0bc", False), Prompt("d", False)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no text in the field 'prompt'"),
            ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": 3}\n', "line 3 has no text in the field 'prompt'"),
            ("x.jsonl", b'{"prompt": " "}\n', "line 1 has no text in the field 'prompt'"),
            ("x.jsonl", b'{"prompt": "\\ud83d"}\n', "line 1 has no text in the field 'prompt'"),
            ("x.jsonl", b'{"prompt": "a", "chat": "no"}\n', "line 1 has 'no' in the field 'chat'"),
            ("x.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
            ("x.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is not valid JSON"),
            ("x.jsonl", b'{"prompt": "\xff"}\n', "line 1 is not UTF-8 text"),
            ("x.jsonl", b'["a"]\n', "row 1 is not a JSON object"),
            ("x.jsonl", b"", "holds no prompts"),
            ("x.txt", b" \n\n", "holds no prompts"),
            ("x.txt", b"ab\xff", "line 1 is not UTF-8 text (invalid start byte)"),
        ],
    )
    def test_a_bad_file_is_named_with_its_line(self, tmp_path: Path, name: str, content: bytes, message: str):
        (tmp_path / name).write_bytes(content)
        said = refused(lambda: read_prompts(tmp_path / name, default_chat=False), InvalidDataError)
        assert message in said and str(tmp_path / name) in said

    @pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "."])
    def test_a_missing_file(self, tmp_path: Path, name: str):
        assert "can't read" in refused(lambda: read_prompts(tmp_path / name, default_chat=False))


class TestGeneration:
    def test_a_record_holds_prompt_and_output(self, tiny_base, tmp_path: Path):
        seen = []
        summary = generate_corpus(
            tiny_base, PROMPTS, tmp_path / "c", max_new_tokens=9, progress=lambda *now: seen.append(now)
        )
        made = records(tmp_path / "c")
        assert {(r["prompt"], r["chat"]) for r in made} == {(p.text, p.chat) for p in PROMPTS}
        for record in made:
            assert record["prompt_ids"] == tiny_base.encode_prompt(record["prompt"], chat=record["chat"])
            ids = torch.tensor([record["prompt_ids"] + record["output_ids"]])
            best = tiny_base.forward(ids)[0][0, len(record["prompt_ids"]) - 1 : -1].argmax(-1)
            assert best.tolist() == record["output_ids"]
            assert record["text"] == tiny_base.decode_text(record["output_ids"])
        check_states(tiny_base, tmp_path / "c")
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert (summary.examples, summary.made) == (4, 4)
        assert summary.output_tokens == sum(len(r["output_ids"]) for r in made)

    def test_the_manifest_says_what_it_was_made_of(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=5, max_prompt_tokens=40)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest == {
            "base": {
                "name": tiny_base.identity.name,
                "weights_sha256": tiny_base.identity.weights_sha256,
                "tokenizer_sha256": tiny_base.identity.tokenizer_sha256,
                "hidden_size": 32,
                "vocab_size": 257,
                "dtype": "float64",
                "config_sha256": tiny_base.identity.config_sha256,
                "tokenization_sha256": tiny_base.identity.tokenization_sha256,
            },
            "max_new_tokens": 5,
            "max_prompt_tokens": 40,
            "examples": 4,
            "duplicates": 0,
            "temperature": 0.0,
            "seed": 0,
            "with_prompts": False,
            "output_tokens": sum(len(r["output_ids"]) for r in records(tmp_path)),
            "prompts_sha256": hashlib.sha256(json.dumps([[p.text, p.chat] for p in PROMPTS]).encode()).hexdigest(),
            "corpus_sha256": hashlib.sha256((tmp_path / "corpus.jsonl").read_bytes()).hexdigest(),
        }

    def test_a_prompt_that_comes_twice_is_taken_once(self, tiny_base, tmp_path: Path):
        twice = [PROMPTS[0], PROMPTS[1], PROMPTS[0], Prompt(PROMPTS[0].text, True)]
        assert generate_corpus(tiny_base, twice, tmp_path, max_new_tokens=3).examples == 3
        again = generate_corpus(tiny_base, [*twice, PROMPTS[3], PROMPTS[3]], tmp_path, max_new_tokens=3)
        assert (again.examples, again.made) == (4, 1)
        check_states(tiny_base, tmp_path)

    def test_an_output_that_comes_twice_is_written_once(self, tiny_base, tmp_path: Path, monkeypatch):
        """Under one token of output many prompts end alike."""
        prompts = [Prompt(chr(97 + i % 26) * (1 + i // 26), False) for i in range(60)]
        for limit in (30, 60):  # the second run goes on with what the first one has seen
            summary = generate_corpus(tiny_base, prompts[:limit], tmp_path, max_new_tokens=1)
        lines = records(tmp_path)
        kept = [line for line in lines if not line.get("duplicate")]
        assert summary.examples == len(lines) == 60 and summary.duplicates == 60 - len(kept) > 0
        outputs = [tuple(line["output_ids"]) for line in kept]
        assert len(set(outputs)) == len(outputs) and {len(o) for o in outputs} == {1}
        assert all(line["output_ids"] == line["prompt_ids"] == [] for line in lines if line.get("duplicate"))
        data = read_head_data(tiny_base, tmp_path, tmp_path / "cache")
        assert data.targets.tolist() == [token for (token,) in outputs]
        assert generate_corpus(tiny_base, prompts, tmp_path, max_new_tokens=1).made == 0

    def test_sampled_output_is_that_of_its_seed(self, tiny_base, tmp_path: Path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            generate_corpus(tiny_base, PROMPTS, tmp_path / name, max_new_tokens=6, temperature=1.0, seed=seed)
        a, b, c = ([line["output_ids"] for line in records(tmp_path / name)] for name in "abc")
        assert a == b != c
        for changed in ({"temperature": 0.5, "seed": 1}, {"temperature": 0.0}, {"temperature": 1.0, "seed": 2}):
            message = refused(
                lambda changed=changed: generate_corpus(
                    tiny_base, PROMPTS, tmp_path / "a", max_new_tokens=6, **changed
                ),
                IncompatibleError,
            )
            assert "temperature" in message or "seed" in message
        manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
        assert (manifest["temperature"], manifest["seed"]) == (1.0, 1)

    def test_a_greedy_corpus_from_before_there_was_sampling_goes_on_greedily_only(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, PROMPTS[:2], tmp_path, max_new_tokens=3)
        settings = json.loads((tmp_path / "settings.json").read_text())
        older = {name: value for name, value in settings.items() if name not in ("temperature", "seed")}
        (tmp_path / "settings.json").write_text(json.dumps(older))
        generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=3, seed=5)
        sampled = {"max_new_tokens": 3, "temperature": 1.0}
        assert "temperature" in refused(
            lambda: generate_corpus(tiny_base, PROMPTS, tmp_path, **sampled), IncompatibleError
        )

    @pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1}])
    def test_what_can_not_be_drawn(self, tiny_base, tmp_path: Path, options):
        (name,) = options
        said = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path, **options))
        assert said.startswith(f"{name} = ") and "must be 0" in said

    def test_a_finished_corpus_is_left_as_it_is(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=3)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=3).made == 0
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    def test_long_prompts_are_cut(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, [Prompt("a" * 100, True)], tmp_path, max_new_tokens=2, max_prompt_tokens=30)
        (record,) = records(tmp_path)
        assert tiny_base.decode_text(record["prompt_ids"]) == "<user>" + "a" * 13 + "<assistant>"
        assert record["prompt"] == "a" * 100  # the key under which it is found again
        assert generate_corpus(
            tiny_base, [Prompt("a" * 100, True)], tmp_path, max_new_tokens=2, max_prompt_tokens=30
        ).made == 0  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    generate_corpus(tiny_base, PROMPTS, folder, max_new_tokens=6)
    return folder


class TestInterruption:
    @exhaustive
    @given(
        stops=st.lists(st.integers(1, 4), max_size=3),
        batch_size=st.integers(1, 4),
        torn=st.integers(0, 80),
        lost=st.sampled_from([0, 1, 40]),
    )
    def test_it_goes_on_to_the_same_corpus(
        self, tiny_base, uninterrupted, tmp_path_factory, stops, batch_size, torn, lost
    ):
        """Interrupted again and again, with the last line torn and states of a line that was never written."""
        out = tmp_path_factory.mktemp("corpus")
        for stop in stops:
            with suppress(StopError):  # there may be nothing left to stop at
                generate_corpus(
                    tiny_base, PROMPTS, out, max_new_tokens=6, batch_size=batch_size, progress=stop_after(stop)
                )
            content = (out / "corpus.jsonl").read_bytes()
            last = len(content) - content[:-1].rfind(b"\n") - 1
            (out / "corpus.jsonl").write_bytes(content[: len(content) - min(torn, last)])
            with (out / "hidden.f16").open("ab") as stream:
                stream.write(b"\0" * lost)
        summary = generate_corpus(tiny_base, PROMPTS, out, max_new_tokens=6, batch_size=batch_size)
        assert summary.examples == 4

        def by_prompt(record):
            return record["prompt"]

        assert sorted(records(out), key=by_prompt) == sorted(records(uninterrupted), key=by_prompt)
        check_states(tiny_base, out)

    def test_output_of_weights_that_were_replaced_is_not_kept(self, tmp_path: Path):
        folder, other = save_tiny_base(tmp_path / "base"), save_tiny_base(tmp_path / "other", seed=1)
        base = load_base(str(folder), dtype="float64", device="cpu")

        def replace(done: int, _total: int) -> None:
            if done == 2:
                shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")

        message = refused(
            lambda: generate_corpus(base, PROMPTS, tmp_path / "out", max_new_tokens=6, batch_size=1, progress=replace),
            IncompatibleError,
        )
        assert message == f"the files of {folder} were replaced while they were read; run the command again"
        assert len((tmp_path / "out" / "corpus.jsonl").read_bytes().splitlines()) == 2
        assert not (tmp_path / "out" / "manifest.json").exists()

    def test_the_manifest_comes_last(self, tiny_base, tmp_path: Path):
        with pytest.raises(StopError):
            generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6, progress=stop_after(4))
        assert len(records(tmp_path)) == 4
        assert not (tmp_path / "manifest.json").exists()

    def test_a_line_that_lacks_only_its_end_is_made_again(self, tiny_base, uninterrupted, tmp_path: Path):
        """It is valid JSON, but the next writer cuts it off: counting it would shift the states of all that follow."""
        with pytest.raises(StopError):
            generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6, progress=stop_after(2))
        path = tmp_path / "corpus.jsonl"
        path.write_bytes(path.read_bytes()[:-1])
        assert generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6).made == 3
        check_states(tiny_base, tmp_path)

    def test_a_full_disk_keeps_what_is_finished(self, tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        append, count = corpus.append_json_line, []

        def full(stream, record):
            count.append(record)
            if len(count) == 3:
                stream.write('{"prompt": "tor')
                stream.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(stream, record)

        monkeypatch.setattr(corpus, "append_json_line", full)
        message = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6), OutputError)
        assert "No space left on device" in message
        monkeypatch.setattr(corpus, "append_json_line", append)
        assert generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6).made == 2
        check_states(tiny_base, tmp_path)

    def test_lost_states_are_not_replaced_by_zeros(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, PROMPTS[:2], tmp_path, max_new_tokens=6)
        (tmp_path / "hidden.f16").write_bytes((tmp_path / "hidden.f16").read_bytes()[:-1])
        message = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=6), InvalidDataError)
        assert "hidden.f16 lacks states" in message


class TestRefusals:
    def test_other_settings_are_shown(self, tiny_base, tmp_path: Path):
        generate_corpus(tiny_base, PROMPTS[:1], tmp_path / "c", max_new_tokens=3)
        message = refused(
            lambda: generate_corpus(tiny_base, PROMPTS, tmp_path / "c", max_new_tokens=4, max_prompt_tokens=99),
            IncompatibleError,
        )
        assert "max_new_tokens: 3 -> 4; max_prompt_tokens: 384 -> 99" in message and "base" not in message
        other = load_base(str(save_tiny_base(tmp_path / "other", seed=5)), dtype="float64")
        message = refused(lambda: generate_corpus(other, PROMPTS, tmp_path / "c", max_new_tokens=3), IncompatibleError)
        assert "base.weights_sha256: " in message and "tokenizer" not in message
        assert len(records(tmp_path / "c")) == 1

    @pytest.mark.parametrize("name", ["max_new_tokens", "max_prompt_tokens", "batch_size"])
    def test_nothing_of_everything(self, tiny_base, tmp_path: Path, name: str):
        message = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path / "c", **{name: 0}))
        assert f"{name} = 0" in message
        assert not (tmp_path / "c").exists()

    def test_more_than_the_context_holds(self, tiny_base, tmp_path: Path):
        message = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=500))
        assert "exceed the context of 512" in message
        assert generate_corpus(tiny_base, PROMPTS, tmp_path, max_new_tokens=4).made == 4  # nothing was begun

    def test_chat_without_a_template(self, tmp_path: Path):
        base = load_base(str(save_tiny_base(tmp_path / "plain", chat=False)))
        assert "no chat template" in refused(lambda: generate_corpus(base, PROMPTS, tmp_path / "c"))

    @pytest.mark.parametrize("content", ["{", "[]", '{"base": 3}', '{"base": {"name": "x"}}'])
    def test_settings_from_elsewhere(self, tiny_base, tmp_path: Path, content: str):
        (tmp_path / "settings.json").write_text(content)
        assert "settings.json" in refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path), InvalidDataError)

    @pytest.mark.parametrize(
        "changes",
        [
            {"output_ids": None}, {"output_ids": [1, {"a": 1}]}, {"output_ids": [True]}, {"prompt_ids": "1"},
            {"prompt": ["a"]}, {"chat": None},
        ],
    )  # fmt: skip
    def test_lines_from_elsewhere(self, tiny_base, tmp_path: Path, changes: dict[str, object]):
        record = {"prompt": "a", "chat": False, "prompt_ids": [1], "output_ids": [2]}
        (tmp_path / "corpus.jsonl").write_text(json.dumps(record | changes) + "\n")
        message = refused(lambda: generate_corpus(tiny_base, PROMPTS, tmp_path), InvalidDataError)
        assert "line 1 is not an example of generate-corpus" in message

    def test_a_file_in_the_way(self, tiny_base, tmp_path: Path):
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", tmp_path / "file" / "c"):
            message = refused(lambda out=out: generate_corpus(tiny_base, PROMPTS, out), OutputError)
            assert str(tmp_path / "file") in message
