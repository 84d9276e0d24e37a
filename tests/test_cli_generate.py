"""`rescore generate` end to end: text and JSON lines on stdout, statistics on stderr, one line per mistake."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Command, make_heads, once, save_tiny_base, write_lines

from lm.base.model import BaseLM
from rescore.decoding import decode
from rescore.generation import generating

pytestmark = pytest.mark.usefixtures("shipped_ngram")

NEW = 12


@pytest.fixture
def tiny(tiny_folder: Path, tiny_heads_folder: Path) -> list[object]:
    """Options for the tiny model with its heads."""
    return [
        "--base", tiny_folder, "--heads", tiny_heads_folder, "--dtype", "float64", "--device", "cpu",
        "--max-new-tokens", NEW,
    ]  # fmt: skip


@pytest.fixture
def text_of(tiny_base: BaseLM):
    """The text of greedy decoding."""

    def text(prompt: str, *, chat: bool = True, limit: int = NEW) -> str:
        ids = tiny_base.encode_prompt(prompt, chat=chat)
        return tiny_base.decode_text(decode(tiny_base, None, ids, max_new_tokens=limit).output_ids)

    return text


def given_on_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    "how",
    [
        [], ["--rescorer", "none"], ["--drafter", "lookup"], ["--drafter", "heads,lookup", "--p", 4, "--k", 4],
        ["--rescorer", "context-ngram:none,p=3", "--alpha", 2, "--verify", "batch"], ["--rescorer", "lookup"],
        ["--h", 2],
    ],
    ids=str,
)  # fmt: skip
def test_the_text_is_greedys_whatever_drafts_it(rescore: Command, tiny: list[object], text_of, how: list[object]):
    run = rescore("generate", *tiny, "--prompt", "A prompt", *how)
    assert (run.code, run.out, run.err) == (0, text_of("A prompt") + "\n", "")


def test_a_base_without_heads_copies_from_the_text(rescore: Command, tiny: list[object], text_of):
    run = rescore("generate", *tiny[:2], *tiny[4:], "--prompt", "A prompt", "--json")
    assert run.document["rescorer"] == "lookup" and run.document["text"] == text_of("A prompt")


def test_a_file_of_prompts(rescore: Command, tiny: list[object], text_of, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("A prompt\n\n  \nAnother one\n")
    run = rescore("generate", *tiny, "--prompts", path)
    assert (run.code, run.out, run.err) == (0, f"{text_of('A prompt')}\n\n{text_of('Another one')}\n", "")


def test_json_lines(rescore: Command, tiny: list[object], text_of, tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A prompt"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "A prompt"}, {"prompt": "A prompt", "chat": False, "id": "q1"}, {"messages": messages, "id": 2}
    ]  # fmt: skip
    run = rescore("generate", *tiny, "--prompts", write_lines(tmp_path / "prompts.jsonl", rows), "--json")
    documents = [json.loads(line) for line in run.out.splitlines()]
    assert (run.code, run.err, len(documents)) == (0, "", 3)
    assert [document.get("id") for document in documents] == [None, "q1", 2]
    assert documents[0]["prompt"] == "A prompt" and documents[2]["messages"] == messages
    rendered = "<system>Be brief.<user>A prompt<assistant>"
    expected = [text_of("A prompt"), text_of("A prompt", chat=False), text_of(rendered, chat=False)]
    assert [document["text"] for document in documents] == expected
    for document in documents:
        assert sum(document["accepted"]) == len(document["token_ids"]) == NEW and document["ended"] == "length"
        assert document["block_efficiency"] == NEW / len(document["accepted"])
        assert document["parts"].keys() == {"prefill", "verify", "draft", "rescore", "total"}


def test_prompts_of_a_table(rescore: Command, tiny: list[object], text_of, tmp_path: Path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,chat\nA prompt,false\nA prompt,\n")
    run = rescore("generate", *tiny, "--prompts", path)
    assert run.out == f"{text_of('A prompt', chat=False)}\n\n{text_of('A prompt')}\n"


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_stdin_is_answered_line_by_line(
    rescore: Command, tiny: list[object], text_of, monkeypatch: pytest.MonkeyPatch, kind: str
):
    lines = [b"A prompt\r\n", b"\n", b"Another one"]
    if kind == "lines":
        lines = [b'{"prompt": "A prompt"}\n', b'{"messages": [{"role": "user", "content": "Another one"}]}\n']
    read: list[int] = []

    class Typed(io.BytesIO):
        def readline(self, *_: Any) -> bytes:
            read.append(len(written))
            return lines.pop(0) if lines else b""

    written: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Typed()))
    monkeypatch.setattr(generating, "write_piece", written.append)
    run = rescore("generate", *tiny, "--prompts", "-")
    assert run.code == 0 and "".join(written) == f"{text_of('A prompt')}\n{text_of('Another one')}"
    assert read[0] == 0 < read[-2] < read[-1], "each is answered before the next is read"


def test_stop_strings(rescore: Command, tiny: list[object], text_of):
    whole = text_of("A prompt")
    stop = next(c for c in whole if c.isascii() and c.isprintable() and c not in ", \\")
    run = rescore("generate", *tiny, "--prompt", "A prompt", "--stop", f"never,{stop}")
    assert run.out == whole[: whole.index(stop)] + "\n"
    code = f"\\x{ord(stop):02x}"
    assert rescore("generate", *tiny, "--prompt", "A prompt", "--stop", code, "--stop", r"\n\n").out == run.out


def test_heads_of_another_base_are_told(rescore: Command, tiny: list[object], text_of, tiny_base, tmp_path: Path):
    heads = make_heads(tiny_base)
    heads.config = msgspec.structs.replace(heads.config, base_weights_sha256="0" * 64)
    heads.save(tmp_path / "heads")
    ran = rescore("generate", *once(*tiny, "--heads", tmp_path / "heads"), "--prompt", "the bridge")
    assert (ran.code, ran.out) == (0, text_of("the bridge") + "\n")
    assert "were trained for other weights than" in ran.err and ran.err.count("\n") == 1


def test_how_stop_strings_are_written():
    assert generating.unescaped(r"a\nb\t\x2c\u20ac\\n\q") == "a\nb\t,\N{EURO SIGN}\\n\\q"
    assert generating.unescaped("\N{EURO SIGN}") == "\N{EURO SIGN}"


def test_statistics_go_to_stderr(rescore: Command, tiny: list[object], text_of):
    run = rescore("generate", *tiny, "--prompt", "A prompt", "--stats", "--rescorer", "context-ngram:none")
    assert run.out == text_of("A prompt") + "\n"
    assert run.err.startswith("rescore: prompt 1: 12 tokens in ") and "by context-ngram:none; prompt " in run.err


@pytest.mark.parametrize("asked", ["yes", "no"])
def test_with_and_without_the_chat_template(rescore: Command, tiny: list[object], text_of, asked: str):
    run = rescore("generate", *tiny, "--prompt", "A prompt", "--chat", asked)
    assert run.out == text_of("A prompt", chat=asked == "yes") + "\n"


def test_ctrl_c_keeps_what_was_printed(rescore: Command, tiny: list[object], text_of, monkeypatch: pytest.MonkeyPatch):
    count = 0
    real = generating.write_piece

    def interrupted(piece: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        real(piece)

    monkeypatch.setattr(generating, "write_piece", interrupted)
    run = rescore("generate", *tiny, "--prompt", "A prompt")
    assert run.code == 130 and run.err == "rescore: interrupted; what was printed so far is all\n"
    assert len(run.out) > 1 and run.out.endswith("\n") and text_of("A prompt").startswith(run.out[:-1])


def test_a_terminal_is_not_controlled_by_what_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    generating.write_piece("a\x1b[2J\n\tb")
    assert capsys.readouterr().out == "a\x1b[2J\n\tb", "a file gets it as it is"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generating.write_piece("a\x1b[2J\n\tb\u202e")
    assert capsys.readouterr().out == "a\\x1b[2J\n    b\\u202e"


def test_the_built_in_model_takes_joint(tiny_base: BaseLM):
    from lm.files import SHIPPED

    assert (SHIPPED / "smollm2-135m" / "joint" / "heads+lookup.json").is_file()


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ([], r"give --prompt TEXT, or --prompts FILE"),
            (["--prompt", "x", "--prompts", "-"], "not both"),
            (["--prompt", " "], "--prompt is empty"),
            (["--prompts", "nowhere.txt"], "can't read nowhere.txt"),
            (["--prompt", "x", "--max-new-tokens", 0], "at least one token"),
            (["--prompt", "x", "--chat", "maybe"], "unknown --chat 'maybe'"),
            (["--prompt", "x", "--rescorer", "oracle"], "can be evaluated, not generated with"),
            (["--prompt", "x", "--rescorer", "nonsense"], "unknown rescorer 'nonsense'"),
            (["--prompt", "x", "--rescorer", "joint"], "was made for another tokenizer"),
            (["--prompt", "x", "--drafter", "nonsense"], "unknown drafter 'nonsense'"),
            (["--prompt", "x", "--alpha", 2], "give --rescorer as well"),
            (["--prompt", "x", "--nodes", 8, "--alpha", 2], "give --rescorer as well"),
            (["--prompt", "x", "--nodes", 8], "was made for another tokenizer"),  # joint, which has trees
            (["--prompt", "x", "--nodes", 0], "--nodes 0; a tree has"),
            (["--prompt", "x", "--nodes", "auto", "--drafter", "nonsense"], "unknown drafter 'nonsense'"),
            (["--prompt", "x", "--p", -1], "p = -1"),
            (["--prompt", "x", "--k", 0, "--rescorer", "none"], "k = 0"),
            (["--prompt", "x", "--h", 9], "choose h from 2 to 4"),
            (["--prompt", "x" * 600], "do not fit into the context of 512; give a shorter one"),
        ],
        ids=str,
    )
    def test_one_line(self, rescore: Command, tiny: list[object], options: list[object], told: str):
        if "--max-new-tokens" in options:
            tiny = tiny[:-2]
        rescore("generate", *tiny, *options).refused(told)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--drafter", "nonsense"], "unknown drafter"),
            (["--drafter", "heads:vocabulary=0"], "give 1 token or more"),
            (["--p", 0], "p = 0"),
            (["--k", -1], "k = -1"),
        ],
        ids=str,
    )
    def test_no_model_is_loaded_for_it(self, rescore: Command, tmp_path: Path, options: list[object], told: str):
        rescore("generate", "--prompt", "x", "--base", tmp_path / "nowhere", *options).refused(told)

    @pytest.mark.parametrize(
        ("row", "told"),
        [
            ({"text": "x"}, "line 1 has no text in the field 'prompt', and no 'messages'"),
            ({"prompt": " "}, "line 1 has no text"),
            ({"prompt": "x", "messages": []}, "line 1 has both 'prompt' and 'messages'"),
            ({"messages": [{"role": "user"}]}, "line 1, the field 'messages': give a list"),
            ({"prompt": "x", "chat": "perhaps"}, "line 1 has 'perhaps' in the field 'chat'"),
            ({"prompt": "x", "id": 1.5}, "line 1 has 1.5 in the field 'id' where text or a whole number is needed"),
            ({"prompt": "x", "id": True}, "line 1 has true in the field 'id' where"),
            ({"messages": [{"role": "user", "content": "x"}], "chat": False}, "messages go through the chat template"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("place", ["file", "stdin"])
    def test_rows(
        self, rescore: Command, tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        row: dict[str, Any], told: str, place: str,
    ):  # fmt: skip
        path = write_lines(tmp_path / "prompts.jsonl", [row])
        if place == "stdin":
            given_on_stdin(monkeypatch, path.read_bytes())
        rescore("generate", *tiny, "--prompts", path if place == "file" else "-").refused(told)

    @pytest.mark.parametrize(
        ("content", "told"), [(b"", "stdin holds no prompts"), (b"\xff\n", "stdin line 1 is not UTF-8"),
                              (b'{"prompt": "x"\n{}', "stdin holds no|is not valid JSON|not")]
    )  # fmt: skip
    def test_stdin(
        self, rescore: Command, tiny: list[object], monkeypatch: pytest.MonkeyPatch, content: bytes, told: str
    ):
        given_on_stdin(monkeypatch, content)
        rescore("generate", *tiny, "--prompts", "-").refused(told)

    def test_an_empty_file(self, rescore: Command, tiny: list[object], tmp_path: Path):
        (tmp_path / "x.txt").write_text("\n \n")
        rescore("generate", *tiny, "--prompts", tmp_path / "x.txt").refused("x.txt holds no prompts")

    def test_heads_that_are_not_there(self, rescore: Command, tiny: list[object]):
        options = [*tiny[:2], *tiny[4:], "--prompt", "x"]
        rescore("generate", *options, "--rescorer", "context-ngram:none").refused("no block heads are shipped for")
        rescore("generate", *options, "--drafter", "heads").refused("no block heads are shipped for")

    def test_messages_without_a_template(self, rescore: Command, tmp_path: Path):
        folder = save_tiny_base(tmp_path / "plain", chat=False)
        rows = write_lines(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
        options = ["--base", folder, "--device", "cpu"]
        rescore("generate", *options, "--prompts", rows).refused("has no chat template")
        rescore("generate", *options, "--prompt", "x", "--chat", "yes").refused("has no chat template")


def test_a_byte_order_mark_on_stdin_is_no_part_of_a_prompt(
    rescore: Command, tiny: list[object], text_of, monkeypatch: pytest.MonkeyPatch
):
    given_on_stdin(monkeypatch, b"\xef\xbb\xbfA prompt\r\n")
    assert rescore("generate", *tiny, "--prompts", "-").out == text_of("A prompt") + "\n"
    given_on_stdin(monkeypatch, b'\xef\xbb\xbf{"prompt": "A prompt", "id": 7}\r\n')
    answer = json.loads(rescore("generate", *tiny, "--prompts", "-", "--json").out)
    assert (answer["id"], answer["text"]) == (7, text_of("A prompt"))


def test_costs_that_are_not_measured_are_asked_for_with_the_same_models(
    rescore: Command, tiny: list[object], tiny_heads_folder: Path
):
    run = rescore("generate", *tiny, "--h", 3, "--prompt", "A prompt", "--nodes", "auto")
    command = run.err.partition("run: ")[2]
    assert run.code == 2 and command.startswith("rescore bench costs --base")
    assert all(part in command for part in (f"--heads {tiny_heads_folder}", "--h 3", "--dtype float64"))
