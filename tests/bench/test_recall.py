"""``distattn bench recall``: what its tasks promise, what the window and the binning do, and a tiny run with its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.bench import recall
from distattn.bench.recall_model import (
    KINDS,
    ConvolvedEmbedding,
    Recipe,
    Stage,
    Trial,
    accuracy,
    by_distance,
    make_model,
    model_config,
)
from distattn.bench.recall_report import cells, draw, mean_by_distance, table
from distattn.bench.recall_tasks import IGNORED, TASKS, Associative, Examples, Grammar, Passkey, Task, scaled
from distattn.cli.bench import bench
from distattn.errors import ConfigError, UnsupportedError

RESULTS_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

few = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**41)


@st.composite
def associative(draw: st.DrawFn) -> Associative:
    pairs, updates = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    least = 4 * pairs + 2 * updates
    sizes = draw(st.integers(pairs, 20)), draw(st.integers(2, 20)), draw(st.integers(1, 5))
    return Associative(draw(st.integers(least, least + 17)), pairs, updates, *sizes)


@st.composite
def passkeys(draw: st.DrawFn) -> Passkey:
    digits = draw(st.integers(1, 6))
    return Passkey(draw(st.integers(2 * digits + 2, 40)), digits, draw(st.integers(1, 10)), draw(st.integers(1, 5)))


@st.composite
def grammars(draw: st.DrawFn) -> Grammar:
    sizes = draw(st.integers(2, 40)), draw(st.integers(2, 9)), draw(st.integers(1, 9))
    return Grammar(*sizes, draw(st.floats(0, 1)), draw(st.integers(0, 9)))


def check_shape(task: Task, examples: Examples) -> None:
    for part in (examples.tokens, examples.targets, examples.distances):
        assert part.shape == (5, task.seq_len)
        assert part.dtype == np.int64
    assert 0 <= examples.tokens.min() <= examples.tokens.max() < task.vocab_size
    assert np.array_equal(examples.scored, examples.targets != IGNORED)
    assert (examples.distances[~examples.scored] == 0).all()
    rows, places = np.nonzero(examples.scored)
    assert (examples.distances[rows, places] >= 1).all()
    assert (examples.distances[rows, places] <= places).all()
    # A target is the next token, except of the last position, whose next token is cut off.
    inside = places < task.seq_len - 1
    following = examples.tokens[rows[inside], places[inside] + 1]
    assert np.array_equal(following, examples.targets[rows[inside], places[inside]])


@few
@given(st.one_of(associative(), passkeys(), grammars()), SEEDS)
def test_a_seed_says_everything(task: Task, seed: int) -> None:
    first, again, other = (task.sample(5, s) for s in (seed, seed, seed + 1))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.targets, again.targets)
    assert first.tokens.shape == other.tokens.shape
    check_shape(task, first)


def test_seeds_differ() -> None:
    for task in TASKS.values():
        assert not np.array_equal(task.sample(4, 0).tokens, task.sample(4, 1).tokens)


@few
@given(associative(), SEEDS)
def test_associative_recall_has_one_answer(task: Associative, seed: int) -> None:
    examples = task.sample(5, seed)
    assert (examples.scored.sum(1) == task.num_pairs).all()
    for tokens, targets, distances in zip(examples.tokens, examples.targets, examples.distances, strict=True):
        places = np.flatnonzero(targets != IGNORED)
        assert len(set(tokens[places])) == task.num_pairs  # every key is asked for once
        for place in places:
            behind = np.flatnonzero(tokens[:place] == tokens[place])
            assert behind[-1] == place - distances[place]  # the last binding counts, and each changes the value
            assert tokens[behind[-1] + 1] == targets[place]
            assert (np.diff(tokens[behind + 1]) != 0).all()
            assert (behind < 2 * task.num_pairs).sum() == 1
            assert tokens[place] < task.num_keys <= targets[place] < task.num_keys + task.num_values
        rest = np.ones(task.seq_len, dtype=bool)
        rest[: 2 * (task.num_pairs + task.num_updates)] = rest[places] = rest[places + 1] = False
        assert (tokens[rest] >= task.num_keys + task.num_values).all()


def test_updates_change_what_is_right() -> None:
    found = Associative(seq_len=64, num_pairs=4, num_updates=20).sample(50, 0)
    stale = [
        found.tokens[row, 1 + 2 * int(np.flatnonzero(found.tokens[row, :8:2] == found.tokens[row, place])[0])]
        for row, place in zip(*np.nonzero(found.scored), strict=True)
    ]
    assert 0 < (np.array(stale) == found.targets[found.scored]).mean() < 0.2


def test_associative_recall_covers_every_distance() -> None:
    task = Associative(seq_len=16, num_pairs=2)
    found = task.sample(400, 0)
    assert set(found.distances[found.scored].tolist()) == set(range(2, 15, 2))


@few
@given(passkeys(), SEEDS)
def test_passkeys_stand_twice(task: Passkey, seed: int) -> None:
    examples = task.sample(5, seed)
    for tokens, targets, distances in zip(examples.tokens, examples.targets, examples.distances, strict=True):
        first, second = np.flatnonzero(tokens == 0)
        assert second == task.seq_len - task.num_digits - 1
        places = np.flatnonzero(targets != IGNORED)
        assert places.tolist() == list(range(second, task.seq_len - 1))
        assert np.array_equal(tokens[places - distances[places]], targets[places])
        assert np.array_equal(tokens[first + 1 : first + 1 + task.num_digits], targets[places])
        digits = (tokens > 0) & (tokens <= task.num_symbols)
        assert digits.sum() == 2 * task.num_digits


@few
@given(grammars(), SEEDS)
def test_grammar_is_that_of_its_rules(task: Grammar, seed: int) -> None:
    rules = task.rules()
    assert (np.sort(rules, axis=0) == np.arange(task.num_symbols)[:, None]).all()  # a permutation for each last symbol
    examples = task.sample(5, seed)
    for tokens, targets, distances in zip(examples.tokens, examples.targets, examples.distances, strict=True):
        marks = tokens == task.num_symbols
        wrong = np.concatenate([[False], marks[:-1]])
        counts = np.flatnonzero(~marks & ~wrong)
        for place in range(1, task.seq_len):
            a, b = (counts[counts <= place])[-2:]
            if wrong[place]:
                assert tokens[place] != rules[tokens[a], tokens[b]]
            if targets[place] != IGNORED:
                assert targets[place] == rules[tokens[a], tokens[b]]
                assert distances[place] == place - a


def test_grammar_gaps_vary() -> None:
    task = Grammar(seq_len=512, max_gap=8)
    found = task.sample(20, 0)
    assert {1, 3, 5, 17} <= set(found.distances[found.scored].tolist())
    assert found.distances.max() <= 1 + 4 * 8
    assert Grammar(gap_share=0.0).sample(4, 0).distances.max() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Associative(seq_len=15, num_pairs=4),
            "seq_len is 15, but 4 pairs, their queries and 0 updates take 16 tokens",
        ),
        (lambda: Associative(num_pairs=8, num_keys=7), "num_pairs is 8, but it must be at most num_keys = 7"),
        (lambda: Associative(num_noise=0), "num_noise is 0, but it must be at least 1"),
        (lambda: Associative(num_updates=-1), "num_updates is -1 with num_values = 32, but it must be at least 0"),
        (lambda: Passkey(seq_len=9), "num_digits is 4, but seq_len 9 holds at most 3"),
        (lambda: Grammar(num_symbols=1), "num_symbols is 1, but it must be at least 2"),
        (lambda: Grammar(gap_share=1.5), r"gap_share is 1\.5, but it must be between 0 and 1"),
        (lambda: Recipe(steps=0), "steps is 0, but it must be at least 1"),
        (lambda: model_config("rnn", Passkey(), Recipe()), "there is no kind 'rnn': choose one of softmax, "),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", list(TASKS))
def test_shorter_tasks_share_their_vocabulary(name: str) -> None:
    task = TASKS[name]
    for fraction in Recipe().fractions:
        shorter = scaled(task, fraction)
        assert shorter.vocab_size == task.vocab_size
        assert shorter.seq_len == int(task.seq_len * fraction)
        check_shape(shorter, shorter.sample(5, 1))


def test_bins_by_distance() -> None:
    targets = np.array([[5, IGNORED, 5, 5, 5]])
    examples = Examples(np.zeros((1, 5), dtype=np.int64), targets, np.array([[1, 0, 2, 3, 9]]))
    found = np.array([[5, 5, 5, 4, 4]])
    assert by_distance(found, examples) == {
        "edges": [1, 2, 4, 8, 16], "accuracy": [1.0, 0.5, None, 0.0], "count": [1, 2, 0, 1]
    }  # fmt: skip
    assert accuracy(found, examples) == 0.5


@pytest.mark.parametrize("kind", list(KINDS))
def test_models_see_what_their_kind_says(kind: str) -> None:
    """Gradients of the last row's hidden state reach as far back as the windows of all layers, or everywhere."""
    task = Passkey(seq_len=48)
    model = make_model(kind, task, Recipe(), 0, "cpu")
    stage = Stage(task, model.config, "cpu")
    embedded: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    hidden = model(torch.from_numpy(task.sample(1, 0).tokens), torch.arange(48), stage.plan)
    (gradient,) = torch.autograd.grad(hidden[0, -1].sum(), embedded)
    reach = 48 - int(gradient[0].abs().sum(-1).nonzero()[0])
    assert reach == (1 + 2 * 15 if kind == "sliding_window" else 48)
    assert set(model.config.layer_kinds) == {"softmax" if part == "sliding_window" else part for part in kind.split("+")}


def test_embeddings_meet_those_before_them() -> None:
    layer = ConvolvedEmbedding(torch.randn(7, 4), seed=3)
    tokens = torch.tensor([[1, 2, 3, 4]])
    e, taps = layer.weight[tokens], layer.taps
    expected = e[0, 3] + taps[:, 2] * e[0, 3] + taps[:, 1] * e[0, 2] + taps[:, 0] * e[0, 1]
    assert torch.allclose(layer(tokens)[0, 3], expected, atol=1e-6)
    assert torch.allclose(layer(tokens)[0, 0], e[0, 0] * (1 + taps[:, 2]), atol=1e-6)


def entry(share: float, counts: tuple[int, int] = (100, 300)) -> dict[str, Any]:
    return {"accuracy": share, "by_distance": {"edges": [1, 2, 4], "accuracy": [1.0, share], "count": list(counts)}}


RESULTS = {
    "associative|softmax|seed 0|10 steps": entry(0.2),
    "associative|softmax|seed 0|20 steps": entry(0.5),
    "associative|softmax|seed 1|20 steps": entry(1.0, (0, 100)),
    "associative|linear|seed 0|20 steps": entry(0.25, (3, 100)),
    "passkey|linear|seed 0|20 steps": {"failed": "ValueError: no"},
}


def test_table_takes_the_longest_training_and_means_of_positions() -> None:
    found = cells(RESULTS)
    assert list(found) == ["associative"]
    assert [e["accuracy"] for e in found["associative"]["softmax"]] == [0.5, 1.0]
    assert mean_by_distance(found["associative"]["softmax"]) == {(1, 2): 1.0, (2, 4): 0.625}
    assert mean_by_distance(found["associative"]["linear"]) == {(2, 4): 0.25}  # 3 positions say nothing
    text = table(RESULTS)
    assert "softmax                       75.0  50.0 … 100.0    1:100  2:62" in text
    assert "failed passkey|linear|seed 0|20 steps: ValueError: no" in text


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no model was trained"):
        draw({"passkey|linear|seed 0|20 steps": {"failed": "no"}}, {}, tmp_path / "x.png")


def test_training_learns_and_depends_on_the_seed_alone() -> None:
    recipe = Recipe(steps=30, batch=8, dim=16, head_dim=8, fractions=(0.25,), test_sequences=16, check_every=20)
    first, again, other = (Trial("grammar", "gated_delta", seed, recipe).run() for seed in (0, 0, 1))
    assert first["accuracy"] == again["accuracy"]
    assert first["by_distance"] == again["by_distance"]
    assert first["by_distance"] != other["by_distance"]
    assert first["steps"] == 30
    easy = Trial("grammar", "linear", 0, Recipe(steps=40, batch=2, dim=8, fractions=(0.25,), stop_at=0.0, check_every=20))
    assert easy.run()["steps"] == 20


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        bench(["recall", *options])
    return int(ended.value.code or 0)


def test_command_resumes_and_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "recall.json", tmp_path / "images" / "recall.png"
    options = ["--json", str(path), "--tasks", "grammar", "--steps", "2", "--commit", "c", "--jobs", "1"]
    assert run(*options, "--kinds", "linear", "--time-limit", "0") == 0
    assert not path.exists()
    assert run(*options, "--kinds", "linear,delta", "--plot", str(picture)) == 0
    first = json.loads(path.read_text())
    assert list(first["results"]) == ["grammar|linear|seed 0|2 steps", "grammar|delta|seed 0|2 steps"]
    assert first["environment"]["device"] == "cpu"
    assert first["recipe"]["steps"] == 2
    assert picture.stat().st_size > 10_000
    assert run(*options, "--kinds", "linear", "--seed", "0") == 0
    assert json.loads(path.read_text()) == first
    assert "grammar: accuracy in %" in capfd.readouterr().out


def test_a_failed_trial_does_not_stop_the_others() -> None:
    good = Trial("grammar", "linear", 0, Recipe(steps=1, test_sequences=2))
    found = dict(recall.run_all([Trial("grammar", "nothing", 0), good], 1, float("inf")))
    assert [("failed" in e) for e in found.values()] == [True, False]
    assert "there is no kind 'nothing'" in next(iter(found.values()))["failed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "copying"], "--tasks has 'copying'; it may have associative, update, passkey, grammar"),
        (["--kinds", "rnn"], "--kinds has 'rnn'; it may have softmax"),
        (["--steps", "0"], "--steps is 0, but it must be at least 1"),
        (["--seed", "-1"], "--seed is '-1'; it takes whole numbers from 0 on"),
        (["--device", "tpu"], "--device is 'tpu', but it must be cpu or cuda"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(["recall", "--json", str(tmp_path / "x.json"), *options])


def test_published_results_separate_the_kinds() -> None:
    """What docs/recall.md says: where keys change, softmax and the delta rules are right, plain linear attention is not."""
    results = json.loads((RESULTS_FOLDER / "recall-cpu.json").read_text())["results"]
    update = cells(results)["update"]
    for kind, entries in update.items():
        shares = [entry["accuracy"] for entry in entries]
        if kind in ("softmax", "delta", "gated_delta", "kda"):
            assert min(shares) >= 0.98, kind
        if kind == "linear":
            assert max(shares) <= 0.8
    assert {"softmax", "linear", "delta", "gated_delta", "kda"} <= set(update)
    assert {len(update[kind]) for kind in ("softmax", "linear", "delta", "gated_delta", "kda")} == {3}
