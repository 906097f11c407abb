"""Plan only: the ``distattn plan`` command as a user types it."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distattn.cli.plan import MaskArguments, app, build_mask, describe_mask, parse_lengths
from distattn.errors import ConfigError, VerifyError
from distattn.mask import Mask
from distattn.parallel.program import Program

ISSUE = "--mask documents --lengths 30000,2000,500,98000 --ranks 8 --strategy ring --heads 32 --kv-heads 8 --head-dim 128"


def plan(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False)


def numbers(line: str) -> dict:
    result = plan(f"{line} --json -")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(line: str) -> str:
    """The one sentence on stderr of a bad command."""
    result = plan(line)
    assert result.exit_code == 2
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    return sentence


def test_the_documented_command_gives_json_and_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
    picture = tmp_path / "plan.png"
    found = numbers(f"{ISSUE} --plot {picture}")
    area = sum(n * (n + 1) // 2 for n in (30000, 2000, 500, 98000))
    assert (found["strategy"], found["ranks"], found["verified"], found["area"]) == ("ring", 8, True, area)
    assert sum(found["flops_per_rank"]) == 4 * area * 32 * 128
    assert sum(found["backward"]["flops_per_rank"]) == 10 * area * 32 * 128
    assert len(found["flops_per_rank"]) == len(found["bytes_sent_per_rank"]) == len(found["bytes_received_per_rank"]) == 8
    assert sum(found["bytes_sent_per_rank"]) == sum(found["bytes_received_per_rank"]) > 0
    assert found["imbalance"] == pytest.approx(8 * max(found["flops_per_rank"]) / sum(found["flops_per_rank"]))
    assert 1 <= found["imbalance"] < 1.05
    assert found["stages"] == 8
    assert 0 < found["plan_seconds"] < 5
    assert 0 < found["verify_seconds"] < 5
    assert found["layout"] == "per_document_zigzag"
    assert sum(found["rows_per_rank"]) == found["tokens"] == 130500
    assert min(found["peak_memory_bytes_per_rank"]) > 0
    assert 0 < found["efficiency"] <= 1
    assert 0 <= found["exposed_communication_seconds"] < found["predicted_seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_json_there_are_tables():
    result = plan(ISSUE)
    assert result.exit_code == 0
    for text in ("ring · per_document_zigzag", "forward", "backward", "efficiency", "imbalance", "sent MB"):
        assert text in result.stdout
    assert result.stdout.count("18,000") == 1
    many = plan("--mask causal --seq-len 4096 --ranks 40 --heads 2")
    assert many.exit_code == 0
    assert "most" in many.stdout


def test_json_to_a_file_prints_tables_as_well(tmp_path: Path):
    path = tmp_path / "plan.json"
    result = plan(f"--mask causal --seq-len 512 --ranks 2 --json {path}")
    assert result.exit_code == 0
    assert "efficiency" in result.stdout
    assert json.loads(path.read_text())["ranks"] == 2


@pytest.mark.parametrize(
    ("line", "mask"),
    [
        ("--mask causal --seq-len 50", Mask.causal(50)),
        ("--mask full --seq-len 50", Mask.full(50, 50)),
        ("--mask sliding_window --seq-len 50 --left 7", Mask.sliding_window(50, 7)),
        ("--mask sliding_window --seq-len 50 --left 7 --right 3", Mask.sliding_window(50, 7, 3)),
        (
            "--mask sliding_window --lengths 20,30 --left 7",
            Mask.sliding_window(50, 7) & Mask.documents([20, 30], causal=False),
        ),
        ("--mask documents --lengths 20,30", Mask.documents([20, 30])),
        ("--mask documents --lengths 20,30 --bidirectional", Mask.documents([20, 30], causal=False)),
        ("--mask prefix_lm --seq-len 50 --prefix 0", Mask.causal(50)),
        ("--mask prefix_lm --seq-len 50 --prefix 12", Mask.prefix_lm(50, 12)),
        ("--mask share_question --question 10 --lengths 20,20", Mask.share_question(10, [20, 20])),
        ("--mask global_window --seq-len 50 --globals 4 --left 6 --right 1", Mask.global_window(50, 4, 6, 1)),
        ("--mask block_causal --lengths 20,30 --block 8", Mask.block_causal([20, 30], 8)),
        ("--mask block_causal --seq-len 50 --block 8", Mask.block_causal([50], 8)),
    ],
)
def test_every_mask_can_be_described(line: str, mask: Mask):
    found = numbers(f"{line} --ranks 3 --heads 4 --kv-heads 2 --head-dim 16 --hardware cpu")
    assert (found["area"], found["tokens"], found["verified"]) == (mask.area, 50, True)
    assert found["hardware"] == "cpu"


def test_masks_are_equal_and_not_only_their_areas():
    arguments = MaskArguments("sliding_window", lengths="20,30", left=7, right=2)
    assert build_mask(arguments) == Mask.sliding_window(50, 7, 2) & Mask.documents([20, 30], causal=False)


def test_auto_says_what_it_chose_and_why():
    found = numbers("--mask causal --seq-len 8192 --ranks 4")
    assert found["strategy"] in found["reason"]
    assert found["kv_heads"] == found["heads"] == 32
    assert found["layout_reason"]
    seconds = found["predicted_seconds"] + found["backward"]["predicted_seconds"]
    assert len(found["candidates_seconds"]) > 6
    assert seconds <= 1.005 * min(found["candidates_seconds"].values())


def test_options_of_a_strategy():
    found = numbers("--mask causal --seq-len 512 --ranks 4 --heads 8 --strategy usp --option head_ranks=2 --option pieces=2")
    assert found["options"] == {"head_ranks": 2, "placement": "head_first", "pieces": 2, "groups_per_window": None}
    assert "2 ways by heads × 2 along the sequence" in found["reason"]
    balanced = numbers("--mask documents --lengths 300,4000,90 --ranks 4 --heads 8 --strategy disaggregated --tolerance 0.02")
    assert balanced["verified"] is True
    assert balanced["imbalance"] <= 1.02
    assert "options of ring are" in refused("--mask causal --seq-len 8 --ranks 2 --strategy ring --tolerance 0.02")
    assert "option pieces of usp must be int" in refused("--mask causal --seq-len 8 --ranks 2 --strategy usp --option pieces=x")
    assert "belongs to one strategy" in refused("--mask causal --seq-len 8 --ranks 2 --option pieces=2")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "per_document_zigzag", "balanced", "striped"])
@pytest.mark.parametrize("strategy", ["ring", "auto"])
def test_a_given_layout_is_used(layout: str, strategy: str):
    found = numbers(f"--mask documents --lengths 900,1200 --ranks 2 --heads 2 --strategy {strategy} --layout {layout}")
    assert found["layout"] == layout
    assert found["layout_reason"] == "given"


def test_documents_stay_whole_where_they_are_even_and_the_refusal_says_what_to_choose_otherwise():
    found = numbers("--mask documents --lengths 600,300,300,600 --ranks 2 --heads 2 --strategy ring --layout whole_documents")
    assert found["layout"] == "whole_documents"
    assert sum(found["bytes_sent_per_rank"]) == 0
    uneven = refused("--mask documents --lengths 900,1200 --ranks 2 --heads 2 --strategy ring --layout whole_documents")
    assert "uncut, these documents leave 2 ranks uneven" in uneven
    assert "choose per_document_zigzag" in uneven


def test_value_dim_and_dtype_count():
    line = "--mask full --seq-len 64 --ranks 2 --strategy ring --layout contiguous --heads 2 --head-dim 16"
    narrow, wide = numbers(line), numbers(f"{line} --value-dim 48 --dtype float32")
    assert sum(wide["flops_per_rank"]) == 2 * sum(narrow["flops_per_rank"])
    assert sum(wide["bytes_sent_per_rank"]) == 4 * sum(narrow["bytes_sent_per_rank"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mask diagonal --ranks 2", "--mask is 'diagonal' and must be one of causal, full, sliding_window"),
        ("--mask causal --ranks 2", "--mask causal takes --seq-len: give --seq-len"),
        ("--mask causal --lengths 4 --ranks 2", "--mask causal takes --seq-len and not --lengths"),
        ("--mask causal --seq-len 0 --ranks 2", "must be at least 1"),
        ("--mask causal --seq-len -5 --ranks 2", "-5"),
        ("--mask sliding_window --seq-len 9 --lengths 9 --left 1 --ranks 2", "give --seq-len or --lengths"),
        ("--mask documents --lengths 5,six --ranks 2", "whole numbers of tokens like 8192,512: 'six' is not one"),
        ("--mask documents --lengths '' --ranks 2", "it is empty"),
        ("--mask documents --lengths 0,0 --ranks 2", "there are no tokens"),
        ("--mask documents --lengths @no/such/file --ranks 2", "cannot read --lengths file 'no/such/file': No such file"),
        ("--mask prefix_lm --seq-len 5 --prefix 9 --ranks 2", "prefix"),
        ("--mask causal --seq-len 64 --ranks 0", "--ranks must be at least 1, got 0"),
        ("--mask causal --seq-len 64 --ranks 2 --strategy rings", "unknown strategy 'rings'; choose one of auto, ring"),
        (
            "--mask causal --seq-len 64 --ranks 3 --strategy usp --option head_ranks=3",
            "must divide the query heads and the ranks",
        ),
        ("--mask causal --seq-len 64 --ranks 2 --layout spiral", "--layout is 'spiral' and must be one of auto"),
        ("--mask causal --seq-len 64 --ranks 2 --kv-heads 5", "heads=32 and kv_heads=5"),
        ("--mask causal --seq-len 64 --ranks 2 --head-dim 0", "head_dim=0"),
        ("--mask causal --seq-len 64 --ranks 2 --dtype int4", "unknown dtype 'int4'"),
        ("--mask causal --seq-len 64 --ranks 2 --hardware abacus", "unknown hardware 'abacus': choose one of cpu"),
        ("--mask causal --seq-len 64 --ranks 2 --plot plan.doc", "a plot is written as .png, .pdf, .svg"),
        ("--mask causal --seq-len 64 --ranks 2 --json no/such/plan.json", "cannot write --json"),
    ],
)
def test_bad_input_is_one_sentence(line: str, message: str):
    assert message in refused(line)


def test_a_program_that_is_wrong_is_not_a_usage_error(monkeypatch: pytest.MonkeyPatch):
    def wrong(self: Program, mask: Mask) -> None:
        raise VerifyError("a row of a slot is filled twice")

    monkeypatch.setattr(Program, "verify", wrong)
    result = plan("--mask causal --seq-len 64 --ranks 2 --json -")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "filled twice" in result.stderr


@pytest.mark.parametrize("text", ["8192,512,7", "8192 512\n7\n", "[8192, 512,\n 7]", " 8192, 512 ,7,"])
def test_lengths_come_from_files_in_any_usual_form(tmp_path: Path, text: str):
    path = tmp_path / "lengths"
    path.write_text(text)
    assert parse_lengths(f"@{path}") == [8192, 512, 7]


@pytest.mark.parametrize("text", ["[1, [2]]", "1.5", "-3", "1e3", "{}"])
def test_what_is_no_length_is_named(text: str):
    with pytest.raises(ConfigError, match="is not one"):
        parse_lengths(text)


def test_titles_stay_short():
    few = describe_mask(MaskArguments("documents", lengths="30000,2000"))
    many = describe_mask(MaskArguments("documents", lengths=",".join(["7"] * 1000)))
    assert few == "documents 30000,2000 (32,000 tokens)"
    assert many == "documents of 1,000 lengths 7 to 7 (7,000 tokens)"
