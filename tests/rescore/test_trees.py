"""Trees of the lattice's entries: Medusa's fixed ones, EAGLE-2's at each step, and those grown from frequencies."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, make_heads, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, UnknownNameError
from lattices.lattice import Lattice
from lattices.prefix_tree import build_prefix_tree
from lm.base.model import BaseLM
from lm.files import write_json
from rescore.acceptance import accept
from rescore.decoding import decode
from rescore.generation.custom import custom_generate
from rescore.generation.live import generate
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.rescorers.trees.choices import Choices, checked, load_choices, published
from rescore.rescorers.trees.growth import BEYOND, MISSED, Frequencies, grow, hits
from rescore.runs.run import Run, runs_of
from rescore.studies.tree_building import build_tree
from rescore.tasks import Example
from rescore.tracing import record_trace

quick = settings(deadline=None, derandomize=True, max_examples=60)
on_models = settings(
    deadline=None, derandomize=True, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Path_ = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn, *, ranks: int = 4, depth: int = 4, most: int = 14) -> Choices:
    """Prefix-closed trees, in any order, with gaps among siblings."""
    nodes: set[Path_] = set()
    for _ in range(draw(st.integers(1, most))):
        parent = draw(st.sampled_from([(), *sorted(path for path in nodes if len(path) < depth)]))
        nodes.add((*parent, draw(st.integers(0, ranks - 1))))
    return Choices(tuple(draw(st.permutations(sorted(nodes)))))


@st.composite
def batches(draw: st.DrawFn, *, k: int = 4) -> Lattice:
    """Lattices whose scores tie now and then."""
    n, h = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.argsort(rng.random((n, h, 9)), axis=-1)[..., :k]
    logps = -np.sort(rng.integers(0, 8, size=(n, h, k)) / 4, axis=-1)
    return Lattice(ids.astype(np.int32), logps.astype(np.float32))


def paths_of(drafts: np.ndarray) -> list[Path_]:
    """Drafts `[p, l]` without what stands after their ends."""
    return [tuple(token for token in draft if token >= 0) for draft in drafts.tolist()]


def prefixes(paths: list[Path_]) -> set[Path_]:
    return {path[:length] for path in paths for length in range(1, len(path) + 1)}


def score(lattice: Lattice, path: Path_) -> float:
    """The heads' log-probability of tokens, the base's own not counted, of one lattice `[h, k]`."""
    total = 0.0
    for slot, token in enumerate(path[1:], start=1):
        total += float(lattice.logps[slot, lattice.token_ids[slot].tolist().index(token)])
    return total


def all_paths(lattice: Lattice, depth: int) -> list[Path_]:
    """Every prefix of a lattice, the base's own token first, of up to so many tokens after it."""
    first, slots = int(lattice.token_ids[0, 0]), lattice.token_ids[1:].tolist()
    return [(first, *path) for j in range(min(depth, len(slots)) + 1) for path in itertools.product(*slots[:j])]


class TestChoices:
    def test_the_published_lists(self):
        depths = {  # nodes by depth, and leaves
            "mc_sim_7b_63": ([10, 28, 23, 2], 42), "vicuna_7b_stage2": ([10, 23, 23, 7], 42),
            "vicuna_7b_stage1_ablation": ([10, 21, 25, 7], 42), "vicuna_7b_stage1": ([10, 32, 20, 1], 44),
            "vicuna_13b_stage2": ([10, 19, 25, 9], 42), "vicuna_13b_stage1": ([10, 29, 23, 1], 44),
            "vicuna_33b_stage2": ([10, 24, 24, 5], 43), "vicuna_33b_stage1": ([10, 34, 19], 46),
            "zephyr_stage2": ([10, 27, 23, 3], 44),
        }  # fmt: skip
        assert published().keys() == depths.keys()
        for name, (counts, leaves) in depths.items():
            tree = load_choices(name)
            assert np.bincount([len(path) for path in tree.paths])[1:].tolist() == counts
            assert (tree.nodes, tree.ranks, len(tree.leaves)) == (64, 10, leaves)
            siblings = {(*path[:-1], rank) for path in tree.paths for rank in range(path[-1])}
            assert siblings <= set(tree.paths), "each is grown rank by rank"

    def test_medusas_buffers(self):
        """Known values of the buffers that Medusa makes of such a list: entry r of head i is 10 i + r + 1 of a pool
        whose first token is the base's own, and nodes are in the order of length and ranks."""
        choices = checked([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]], "list")
        pool = Lattice(
            np.array([[[0, *range(900, 909)], *(range(10 * i + 1, 10 * i + 11) for i in range(3))]], dtype=np.int32),
            np.zeros((1, 4, 10), dtype=np.float32),
        )
        write_json(Path("list.json"), choices.paths)
        drafts = load_rescorer("medusa-tree:list.json").draft(pool, [], 9)[0]
        tree = build_prefix_tree(drafts)
        paths = {node: tuple(tree.tokens[np.flatnonzero(tree.mask[node])].tolist()) for node in range(7)}
        order = sorted(paths, key=lambda node: (len(paths[node]), paths[node]))
        number = {node: place for place, node in enumerate(order)}
        assert tree.tokens[order].tolist() == [0, 1, 2, 11, 12, 11, 21]
        assert tree.depths[order].tolist() == [0, 1, 1, 2, 2, 2, 3]
        mask = ["1000000", "1100000", "1010000", "1101000", "1100100", "1010010", "1101001"]
        assert ["".join(map(str, row)) for row in tree.mask[np.ix_(order, order)].astype(int).tolist()] == mask
        retrieved = [
            [number[node] for node in tree.nodes[row, : len(path)]] for row, path in enumerate(paths_of(drafts))
        ]
        assert sorted(retrieved) == sorted([[0, 1, 3, 6], [0, 2, 5], [0, 1, 4]])

    @quick
    @given(trees())
    def test_the_layout_holds_the_tree(self, tree: Choices):
        layout = tree.layout
        paths = [()]
        for parent, depth, rank in zip(layout.parents[1:], layout.depths[1:], layout.ranks[1:], strict=True):
            paths.append((*paths[parent], int(rank)))
            assert depth == len(paths[-1])
        assert sorted(paths[1:]) == sorted(tree.paths)
        assert [paths[leaf] for leaf in layout.leaves] == list(tree.leaves)
        assert prefixes(list(tree.leaves)) == set(tree.paths)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("{}", "give a list of paths of ranks"),
            ("[]", "has 0 choices"),
            ("[[0], []]", "give a list of paths of ranks"),
            ("[[0], [0, 0, 1]]", r"the choice [0, 0, 1] lacks its parent [0, 0]; add it"),
            ("[[0], [0]]", "the choice [0] is there twice"),
            ("[[-1]]", "[-1] is no choice"),
            ("[[true]]", "[true] is no choice"),
            ("[[0.5]]", "[0.5] is no choice"),
            ("[0", "is no JSON"),
        ],
    )
    def test_a_file_that_is_no_tree_is_refused(self, document: str, message: str, tmp_path: Path):
        (tmp_path / "list.json").write_text(document)
        refused(lambda: load_rescorer(f"medusa-tree:{tmp_path / 'list.json'}"), message, InvalidDataError)

    def test_names_and_sizes_that_are_none_are_refused(self, tmp_path: Path):
        refused(lambda: load_rescorer("medusa-tree:mc_sim_7b"), "did you mean mc_sim_7b_63?", UnknownNameError)
        refused(lambda: load_rescorer(f"medusa-tree:{tmp_path / 'no.json'}"), "can't read")
        refused(lambda: load_rescorer("medusa-tree:scores=context-ngram:none"), "does not rescore slot by slot")
        refused(lambda: load_rescorer("eagle2-tree:nodes=0"), "give nodes of 1 to")
        tree = load_rescorer("medusa-tree")
        refused(lambda: Run("medusa-tree", k=9).load_drafters(tree), "takes 10 entries of a slot, and k = 9")
        lattice = Lattice(np.zeros((1, 5, 9), dtype=np.int32), np.zeros((1, 5, 9), dtype=np.float32))
        refused(lambda: tree.draft(lattice, [], 64), "takes entry 9 of a slot, and k = 9 has 0 to 8")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that tests name without a folder lie in one of their own."""
    monkeypatch.chdir(tmp_path)


class TestMedusaTree:
    @quick
    @given(tree=trees(), lattices=batches())
    def test_it_drafts_the_entries_that_the_choices_name(self, tree: Choices, lattices: Lattice):
        write_json(Path("list.json"), tree.paths)
        drafts = load_rescorer("medusa-tree:list.json").draft(lattices, [], len(tree.leaves))
        kept = [path for path in tree.paths if len(path) < lattices.h]  # longer ones are dropped
        for row, ids in enumerate(lattices.token_ids.tolist()):
            of_ranks = {tuple(ids[slot][rank] for slot, rank in enumerate((0, *path))) for path in kept}
            assert prefixes(paths_of(drafts[row])) == {(ids[0][0],), *of_ranks}
            assert len(build_prefix_tree(drafts[row]).tokens) == 1 + len(kept), "every node once"

    @quick
    @given(tree=trees(), lattices=batches(), p=st.integers(1, 4))
    def test_fewer_drafts_are_the_branches_that_are_worth_most(self, tree: Choices, lattices: Lattice, p: int):
        write_json(Path("list.json"), tree.paths)
        rescorer = load_rescorer("medusa-tree:list.json")
        whole, drafts = rescorer.draft(lattices, [], len(tree.leaves)), rescorer.draft(lattices, [], p)
        assert drafts.shape[1] == min(p, whole.shape[1])
        for row in range(len(lattices)):

            def worth(paths: list[Path_], row: int = row) -> float:
                return sum(np.exp(score(lattices[row], path)) for path in prefixes(paths))

            best = max(worth(list(chosen)) for chosen in itertools.combinations(paths_of(whole[row]), drafts.shape[1]))
            assert worth(paths_of(drafts[row])) == pytest.approx(best)


class TestEagle2Tree:
    @quick
    @given(lattices=batches(), nodes=st.integers(1, 20), depth=st.integers(0, 4))
    def test_with_beams_for_all_it_has_the_likeliest_nodes(self, lattices: Lattice, nodes: int, depth: int):
        spec = f"eagle2-tree:nodes={nodes},depth={depth},beams=256"
        for row, drafts in enumerate(load_rescorer(spec).draft(lattices, [], nodes)):
            scores = sorted((score(lattices[row], path) for path in all_paths(lattices[row], depth + 1)), reverse=True)
            found = sorted((score(lattices[row], path) for path in prefixes(paths_of(drafts))), reverse=True)
            assert found == pytest.approx(scores[:nodes])

    @quick
    @given(lattices=batches(), nodes=st.integers(1, 20), depth=st.integers(0, 4), beams=st.integers(1, 5))
    def test_it_is_the_beam_of_eagle2(self, lattices: Lattice, nodes: int, depth: int, beams: int):
        """Level by level, as the paper has it: the best of a level are expanded, into their best children each; of all
        nodes that were met the best stay."""
        spec = f"eagle2-tree:nodes={nodes},depth={depth},beams={beams}"
        for row, drafts in enumerate(load_rescorer(spec).draft(lattices, [], nodes)):
            lattice = lattices[row]
            level = [(int(lattice.token_ids[0, 0]),)]
            met = list(level)
            for slot in range(1, min(lattice.h, depth + 2)):
                children = lattice.token_ids[slot, :beams].tolist()
                level = [(*path, token) for path in level for token in children]
                met += level
                level = sorted(level, key=lambda path: -score(lattice, path))[:beams]  # of equals the first
            expected = sorted(met, key=lambda path: -score(lattice, path))[:nodes]
            assert prefixes(paths_of(drafts)) == set(expected)

    def test_a_tree_of_one_node_is_the_bases_token(self):
        lattice = Lattice(np.arange(12, dtype=np.int32).reshape(1, 3, 4), np.zeros((1, 3, 4), dtype=np.float32))
        assert load_rescorer("eagle2-tree:nodes=1").draft(lattice, [], 1).tolist() == [[[0]]]


SPECS = ("medusa-tree", "medusa-tree:list.json", "eagle2-tree:nodes=20,depth=2,beams=3", "eagle2-tree")


@on_models
@given(
    texts=st.lists(st.text("abcdefgh .", min_size=1, max_size=12), min_size=1, max_size=3, unique=True),
    tree=trees(ranks=10),
    h=st.integers(2, 6),
    spec=st.sampled_from(SPECS),
    all_branches=st.booleans(),
    verify=st.sampled_from(["tree", "batch"]),
)
def test_the_output_is_greedy_and_replay_takes_the_live_steps(
    tiny_base: BaseLM, tmp_path_factory, texts, tree, h, spec, all_branches, verify
):
    write_json(Path("list.json"), tree.paths)
    heads = make_heads(tiny_base, h=h, strength=0.05)
    examples = [Example(str(i), text, ()) for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("trace")
    trace = record_trace(tiny_base, heads, examples, folder, settings={}, chat=False, max_new_tokens=14, k=10)
    rescorer = load_rescorer(spec)
    p = rescorer.branches if all_branches else 3
    replayed = replay(trace.examples, rescorer, k=10, p=p)
    for example, accepted in zip(trace.examples, replayed, strict=True):
        prompt = example.prompt_ids.tolist()
        live = decode(tiny_base, heads, prompt, rescorer=rescorer, k=10, p=p, max_new_tokens=14, verify=verify)
        assert live.output_ids == decode(tiny_base, None, prompt, max_new_tokens=14).output_ids
        assert live.output_ids == example.output_ids.tolist() and live.accepted == accepted


def test_all_branches_are_drafted_unless_p_is_given(tiny_base: BaseLM):
    specs = ["medusa-tree", "medusa-tree:p=4", "eagle2-tree", "eagle2-tree:nodes=9,drafters=heads+lookup", "none"]
    assert [run.p for run in runs_of(specs)] == [42, 4, 60, 9, 1]
    heads = make_heads(tiny_base, h=4)
    out = generate(tiny_base, heads, "abc", rescorer="medusa-tree", max_new_tokens=12)
    assert out.token_ids == generate(tiny_base, None, "abc", rescorer="lookup", max_new_tokens=12).token_ids
    blocks, ids = (
        custom_generate(heads=heads, rescorer="medusa-tree"),
        torch.tensor([tiny_base.encode_prompt("abc", chat=True)]),
    )
    tiny_base.model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=blocks)
    assert blocks.decoded.accepted == out.accepted
    beside = generate(tiny_base, heads, "abc", rescorer="eagle2-tree:drafters=heads+lookup", max_new_tokens=12)
    assert beside.token_ids == out.token_ids


class TestGrowth:
    @quick
    @given(lattices=batches(k=5), ranks=st.integers(1, 5))
    def test_hits_are_the_ranks_of_what_came(self, lattices: Lattice, ranks: int):
        """Position i stands before token i."""
        output = lattices.token_ids[:, 0, 0]
        found = hits(lattices.token_ids, output, ranks)
        for position, slot in itertools.product(range(len(lattices)), range(1, lattices.h)):
            entries = lattices.token_ids[position, slot, :ranks].tolist()
            ahead = output[position + slot :].tolist()
            rank = BEYOND if not ahead else entries.index(ahead[0]) if ahead[0] in entries else MISSED
            assert found[position, slot - 1] == rank

    @quick
    @given(data=st.data(), count=st.integers(1, 12))
    def test_each_choice_is_the_best_of_those_that_may_follow(self, data: st.DataObject, count: int):
        rows = data.draw(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=12))
        of = Frequencies(np.array(rows), ranks=3)
        for value in (of.joint, of.product):
            grown: list[Path_] = []
            for path in grow(value, count=count, depth=3, ranks=3):
                closed = [
                    other for j in range(1, 4) for other in itertools.product(range(3), repeat=j)
                    if other not in grown and (j == 1 or other[:-1] in grown)
                    and all((*other[:-1], rank) in grown for rank in range(other[-1]))
                ]  # fmt: skip
                assert path in closed and value(path) == max(map(value, closed))
                grown.append(path)
            assert len(grown) == min(count, 3 + 9 + 27)

    @quick
    @given(data=st.data(), nodes=st.integers(2, 6))
    def test_of_products_no_tree_is_better(self, data: st.DataObject, nodes: int):
        """Where accuracies fall with rank, as Medusa has it: brute force over all trees of so many nodes."""
        rows = st.lists(st.floats(0, 1), min_size=2, max_size=2)
        accuracies = [sorted(data.draw(rows), reverse=True) for _ in range(3)]

        def value(path: Path_) -> tuple[float, ...]:
            return (float(np.prod([accuracies[slot][rank] for slot, rank in enumerate(path)])),)

        every = [path for j in range(1, 4) for path in itertools.product(range(2), repeat=j)]
        best = max(
            sum(value(path)[0] for path in tree)
            for tree in itertools.combinations(every, nodes - 1)
            if all(len(path) == 1 or path[:-1] in tree for path in tree)
        )
        grown = grow(value, count=nodes - 1, depth=3, ranks=2)
        assert sum(value(path)[0] for path in grown) == pytest.approx(best)

    def test_the_command_writes_what_would_have_been_accepted_longest(
        self, rescore: Command, model: list[object], tmp_path: Path
    ):
        assert rescore("trace", *model, "--k", 10, "--out", "trace").code == 0
        ran = rescore("build-tree", "--trace", "trace", "--nodes", 12, "--held-out", 3, "--out", "list.json", "--json")
        document = ran.document
        assert json.loads((tmp_path / "list.json").read_text()) == document["choices"]
        assert [tree["nodes"] for tree in document["trees"]][:2] == [12, 12] and document["examples"] == 3
        again = build_tree([Path("trace")], Path("list.json"), nodes=12)
        assert again.elsewhere == 0 and again.trees[0].expected_elsewhere is None
        # What it says is what a step would accept at every position.
        from rescore.tracing import read_trace

        rescorer = load_rescorer("medusa-tree:list.json")
        lengths = []
        for example in read_trace(Path("trace")).examples:
            drafts = rescorer.draft(example.lattice, [], 99)
            ahead = [example.output_ids[i : i + drafts.shape[2] + 1][1:] for i in range(len(example.output_ids))]
            choices = np.full(drafts.shape, -1)
            for position, tokens in enumerate(ahead):
                choices[position, :, : len(tokens)] = tokens[: drafts.shape[2]]
            remaining = len(example.output_ids) - np.arange(len(drafts))
            lengths += accept(drafts, choices, remaining, ())[1].tolist()
        assert np.mean(lengths) == pytest.approx(again.trees[0].expected)
        shown = rescore("build-tree", "--trace", "trace", "--by", "product", "--out", "list.json").out
        assert "product*" in shown and "mc_sim_7b_63" in shown
        table = rescore("eval", "--trace", "trace", "--rescorer", "medusa-tree:list.json", "--k", 10)
        assert table.code == 0 and "medusa-tree:list.json" in table.out

    def test_what_a_trace_lacks_is_refused(self, rescore: Command, model: list[object]):
        assert rescore("trace", *model, "--limit", 1, "--k", 4, "--out", "trace").code == 0
        build = ("build-tree", "--trace", "trace", "--out", "list.json")
        rescore(*build).refused("trace holds 4 entries of a slot; give --ranks 4")
        rescore(*build, "--ranks", 4, "--depth", 9).refused("has 3 heads besides the first")
        rescore(*build, "--nodes", 1).refused("give --nodes of 2 to")
        assert not Path("list.json").exists()
