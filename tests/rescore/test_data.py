"""Where examples come from: `--data`, else the hub, else the embedded sample; and what a bad file is told.

No test reaches the hub: `datasets.load_dataset` and the question whether the hub answers are replaced, or the cache
of `datasets` is a folder that the test wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, RescoreError
from rescore.tasks import Example, HubSource, Task, load_task
from rescore.tasks import data as data_module
from rescore.tasks.base import only_reference
from rescore.tasks.data import load_examples

QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
SQUAD = [
    {"id": f"s{i}", "context": "c", "question": f"q{i}", "answers": {"text": ["c"], "answer_start": [0]}}
    for i in (1, 2)
]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test forgets to replace fails instead of asking the hub."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a test tried to reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", forbidden)
    monkeypatch.setattr(data_module, "_hub_trouble", forbidden)


class TestFile:
    def test_all_records_in_order(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "qa.jsonl", QA)
        found = load_examples(load_task("gsm8k"), data=path)
        assert found.examples == tuple(Example(str(i + 1), f"q{i}", (f"a{i}",)) for i in range(5))
        assert found.source == {
            "kind": "file",
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        assert found.notice is None

    def test_the_limit_takes_the_first_and_keeps_the_hash_of_the_file(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "qa.jsonl", QA)
        task = load_task("gsm8k")
        everything, some = load_examples(task, data=path), load_examples(task, data=path, limit=2)
        assert some.examples == everything.examples[:2]
        assert some.source == everything.source
        assert load_examples(task, data=path, limit=99).examples == everything.examples

    def test_ids_come_from_the_record_or_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "qa.jsonl"
        lines = [{**QA[0], "id": "first"}, QA[1], {**QA[2], "id": 7}, {**QA[3], "id": None}]
        path.write_text("\n\n".join(json.dumps(line) for line in lines))  # a blank line after each
        assert [example.id for example in load_examples(load_task("gsm8k"), data=path).examples] == [
            "first",
            "3",
            "7",
            "7#7",
        ]

    @given(ids=st.lists(st.sampled_from([None, "a", "b", "a#2", "a#3", "2", 2]), min_size=1, max_size=12))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_ids_are_unique_and_do_not_depend_on_later_records(self, tmp_path: Path, ids: list[Any]) -> None:
        path = write_lines(tmp_path / "qa.jsonl", [{**QA[0], "id": id} for id in ids])
        found = [example.id for example in load_examples(load_task("gsm8k"), data=path).examples]
        assert len(set(found)) == len(ids)
        limit = (len(ids) + 1) // 2
        some = load_examples(load_task("gsm8k"), data=path, limit=limit).examples
        assert [example.id for example in some] == found[:limit]

    def test_squad_loads_in_the_hubs_shape_and_as_plain_lists(self, tmp_path: Path) -> None:
        plain = [{**record, "answers": ["c"]} for record in SQUAD]
        both = [
            load_examples(load_task("squad"), data=write_lines(tmp_path / name, records)).examples
            for name, records in (("hub.jsonl", SQUAD), ("plain.jsonl", plain))
        ]
        assert both[0] == both[1]


class TestBadFile:
    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_below_1(self, limit: int) -> None:
        with pytest.raises(RescoreError, match=f"at least 1, not {limit}"):
            load_examples(load_task("squad"), limit=limit)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(RescoreError, match=r"no such file: .*absent\.jsonl; .* question, answer"):
            load_examples(load_task("gsm8k"), data=tmp_path / "absent.jsonl")

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        with pytest.raises(RescoreError, match="no such file"):
            load_examples(load_task("gsm8k"), data=tmp_path / ("x" * 5000))

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RescoreError, match="not a file"):
            load_examples(load_task("gsm8k"), data=tmp_path)

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_nothing_in_it(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "empty.jsonl"
        path.write_text(content)
        with pytest.raises(
            InvalidDataError, match=r"empty\.jsonl is empty; task gsm8k needs the fields question, answer"
        ):
            load_examples(load_task("gsm8k"), data=path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"question": "q"}', "no field 'answer'"),
            ('{"question": 1, "answer": "a"}', "'question' holds a number"),
            ('{"question": "q", "answer": ["a"]}', "'answer' holds a list"),
            ('{"question": "q", "answer": "a", "id": [1]}', "'id' holds a list"),
            ('{"question": "q", "answer": "a", "id": true}', "'id' holds true or false"),
            ('{"question": "q", "answer": "a", "id": "\\ud83d"}', "'id' holds half a surrogate pair"),
            ("[1]", "not a JSON object"),
            ('{"question": "q"', "not valid JSON"),
        ],
    )
    def test_file_line_and_field_are_named(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps(QA[0]) + "\n\n" + line + "\n")
        with pytest.raises(InvalidDataError, match=message) as caught:
            load_examples(load_task("gsm8k"), data=path)
        assert f"{path} line 3" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_bytes(b'{"question": "\xff", "answer": "a"}\n')
        with pytest.raises(InvalidDataError, match="line 1 is not UTF-8 text"):
            load_examples(load_task("gsm8k"), data=path)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
        """A hub that answers and holds the given records, or raises the given error; returns the calls it gets."""

        def serve(records: list[Any], *, error: Exception | None = None) -> list[Any]:
            calls: list[Any] = []

            def load_dataset(path: str, **arguments: Any) -> datasets.Dataset:
                calls.append((path, arguments, datasets.config.HF_HUB_OFFLINE))
                if error:
                    raise error
                return datasets.Dataset.from_list(records)

            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(data_module, "_hub_trouble", lambda hub: None)
            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            return calls

        return serve

    def test_its_data_set_is_loaded_where_no_file_is_given(self, hub: Any) -> None:
        calls = hub(SQUAD)
        found = load_examples(load_task("squad"))
        assert [example.id for example in found.examples] == ["s1", "s2"]
        assert found.notice is None
        where = {"name": "plain_text", "split": "validation", "revision": None}
        assert calls == [("rajpurkar/squad", where, False)]
        digest = found.source.pop("sha256")
        assert found.source == {"kind": "hub", "path": "rajpurkar/squad", **where}
        assert len(digest) == 64

    def test_the_hash_is_of_all_records_whatever_the_limit(self, hub: Any) -> None:
        hub(QA)
        everything, some = load_examples(load_task("gsm8k")), load_examples(load_task("gsm8k"), limit=2)
        assert [example.id for example in some.examples] == ["1", "2"]
        assert some.source == everything.source
        hub(QA[:4])
        assert load_examples(load_task("gsm8k"), limit=2).source["sha256"] != everything.source["sha256"]

    def test_a_bad_record_is_named_with_the_data_set(self, hub: Any) -> None:
        hub([{"question": "q", "answer": None}])
        with pytest.raises(InvalidDataError, match="openai/gsm8k record 1: the field 'answer' holds null"):
            load_examples(load_task("gsm8k"))

    def test_an_empty_split(self, hub: Any) -> None:
        hub([])
        with pytest.raises(InvalidDataError, match="openai/gsm8k holds no records of task gsm8k in its split test"):
            load_examples(load_task("gsm8k"))

    def test_what_the_hub_refuses_is_one_line_and_no_reason_for_the_sample(self, hub: Any) -> None:
        hub([], error=datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist\nor cannot be accessed"))
        with pytest.raises(RescoreError, match=r"rajpurkar/squad .*\(Dataset doesn't exist\).*--data PATH") as caught:
            load_examples(load_task("squad"))
        assert "\n" not in str(caught.value)

    def test_a_connection_that_breaks_counts_as_no_hub(self, hub: Any) -> None:
        hub([], error=ConnectionError("gone"))
        found = load_examples(load_task("squad"))
        assert found.source["kind"] == "sample"
        assert found.notice is not None and "the connection to the hub broke" in found.notice

    def test_a_task_without_a_hub_data_set_asks_for_a_file(self) -> None:
        task = Task(name="own", description="", fields=("text",), template="{text}", references=only_reference("text"))
        with pytest.raises(RescoreError, match=r"task own: it has no data set on the hub; give --data PATH.* text"):
            load_examples(task)


class TestNoHub:
    @pytest.fixture(autouse=True)
    def unreachable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> None:
        """The real `load_dataset` with an empty cache, and a hub that does not answer."""
        monkeypatch.undo()
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(data_module, "_hub_trouble", lambda hub: "the hub can't be reached")

    def test_squad_falls_back_to_its_sample_with_a_notice(self) -> None:
        found = load_examples(load_task("squad"), limit=3)
        sample = load_task("squad").sample
        assert sample is not None and found.notice is not None
        assert [example.id for example in found.examples] == ["sample-01", "sample-02", "sample-03"]
        assert found.source == {
            "kind": "sample",
            "path": "squad_sample.jsonl",
            "sha256": hashlib.sha256(sample.read_bytes()).hexdigest(),
        }
        assert "the hub can't be reached" in found.notice and "--data PATH" in found.notice
        assert "\n" not in found.notice

    @pytest.mark.parametrize("name", ["gsm8k", "xsum", "samsum", "lambada"])
    def test_the_other_tasks_ask_for_a_file(self, name: str) -> None:
        with pytest.raises(RescoreError, match=r"the hub can't be reached.*--data PATH") as caught:
            load_examples(load_task(name))
        assert all(field in str(caught.value) for field in load_task(name).fields)

    def test_offline_by_choice_asks_nobody_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(data_module, "_hub_trouble", lambda hub: pytest.fail("asked the hub"))
        with pytest.raises(RescoreError, match="HF_HUB_OFFLINE is set"):
            load_examples(load_task("gsm8k"))
        assert datasets.config.HF_HUB_OFFLINE is True

    def test_the_offline_mode_is_only_borrowed(self) -> None:
        load_examples(load_task("squad"))
        assert datasets.config.HF_HUB_OFFLINE is False

    def test_a_data_set_in_the_cache_needs_no_hub(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        put_in_cache(tmp_path / "cache", "openai___gsm8k", "gsm8k", config="main", split="test", records=QA)
        logging.getLogger("datasets").addHandler(caplog.handler)
        found = load_examples(load_task("gsm8k"))
        logging.getLogger("datasets").removeHandler(caplog.handler)
        assert [example.prompt for example in found.examples] == ["q0", "q1", "q2", "q3", "q4"]
        assert found.source["kind"] == "hub" and found.notice is None
        assert not caplog.records  # the library warns of its cache


def put_in_cache(cache: Path, folder: str, name: str, *, config: str, split: str, records: list[Any]) -> None:
    """Writes what `load_dataset` leaves in its cache after a download."""
    lines = write_lines(cache.parent / "download.jsonl", records)
    builder = datasets.load_dataset_builder(
        "json", config, data_files={split: str(lines)}, cache_dir=str(cache.parent / "built")
    )
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    place = cache / folder / config / made.parent.name / made.name
    place.parent.mkdir(parents=True)
    made.rename(place)
    (place / f"json-{split}.arrow").rename(place / f"{name}-{split}.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": name, "config_name": config}))


class TestWhetherTheHubServes:
    HUB = HubSource("owner/name", None, "test", revision="refs/convert/parquet")

    @pytest.fixture
    def session(self, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Callable[[Callable[..., Any]], None]:
        """Puts a function in the place of the one request that is made."""

        def put(head: Callable[..., Any]) -> None:
            monkeypatch.undo()
            fake = type("Session", (), {"head": staticmethod(head)})()
            monkeypatch.setattr(huggingface_hub, "get_session", lambda: fake)

        return put

    @pytest.mark.parametrize("status", [200, 401, 404])
    def test_an_answer_about_the_data_set_is_left_to_the_library(self, session: Any, status: int) -> None:
        asked = []

        def head(url: str, timeout: float) -> Any:
            asked.append(url)
            return type("Response", (), {"status_code": status})()

        session(head)
        assert data_module._hub_trouble(self.HUB) is None
        assert [url.partition("/datasets/")[2] for url in asked] == [
            "owner/name/resolve/refs%2Fconvert%2Fparquet/README.md"
        ]

    @pytest.mark.parametrize("status", [403, 407, 429, 500, 503])
    def test_a_refusal_is_told_with_its_status(self, session: Any, status: int) -> None:
        session(lambda url, timeout: type("Response", (), {"status_code": status})())
        assert data_module._hub_trouble(self.HUB) == f"the hub refuses to serve (HTTP {status})"

    def test_an_error_is_no_answer(self, session: Any) -> None:
        def head(url: str, timeout: float) -> None:
            raise OSError("no such host")

        session(head)
        assert data_module._hub_trouble(self.HUB) == "the hub can't be reached"

    def test_waiting_ends_in_time_even_if_the_request_hangs(self, session: Any) -> None:
        """Looking up a host name can hang past every timeout that the request itself takes."""
        over = threading.Event()
        session(lambda url, timeout: over.wait(60))
        assert data_module._hub_trouble(self.HUB, timeout=0.05) == "the hub can't be reached"
        over.set()
