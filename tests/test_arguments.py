"""What a person may write for an option, and the object or the one line that it gives."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from written import LEADING, read

from prunelm.cli import UsageError
from prunelm.cli.arguments import parse
from prunelm.cli.pruning import plan, prune
from prunelm.cli.speech import decode
from prunelm.cli.studies import study
from prunelm.cli.training import LM_OPTIONS, train_lm, train_recogniser
from prunelm.pruning import (
    Architecture,
    Blocks,
    Elements,
    Finetune,
    Heads,
    Incremental,
    LowRank,
    Magnitude,
    Neurons,
    OneShot,
    Random,
    Taylor,
)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Heads", [Heads()]),
        ("Neurons|Heads", [Neurons(), Heads()]),
        ("Heads|Blocks", [Heads(), Blocks()]),
        ("Heads | Neurons", [Heads(), Neurons()]),
        ("Heads,Neurons", [Heads(), Neurons()]),
        ("Heads + Neurons", [Heads(), Neurons()]),
        ("lowrank", [LowRank()]),
        ("low_rank", [LowRank()]),
        ("low-rank", [LowRank()]),
        ("LOW RANK", [LowRank()]),
        ("Heads()|neurons()", [Heads(), Neurons()]),
        ("prunelm.Heads", [Heads()]),
        ("prunelm.pruning.methods.Heads", [Heads()]),
        ("Blocks(16,4)|Heads", [Blocks(16, 4), Heads()]),
        ("Blocks(8, min_keep=1e-1)", [Blocks(8, min_keep=0.1)]),
        ("Elements(embedding=False)", [Elements(embedding=False)]),
        ("Heads(architecture={qkv: att})", [Heads(architecture=Architecture(qkv="att"))]),
        ("[Heads, Neurons]", [Heads(), Neurons()]),
        ("[{Heads: {min_keep: 0}}, Neurons]", [Heads(0), Neurons()]),
        ("{class_path: prunelm.Neurons, init_args: {multiple_of: 4}}", [Neurons(4)]),
    ],
)
def test_a_choice_of_classes_on_the_line(text: str, objects: list[Any]) -> None:
    assert read(prune, ["--method", text])["method"] == objects
    assert read(prune, [f"--method={text}"])["method"] == objects
    assert read(prune, [], f"method: {text}" if text[0] in "[{" else f"method: '{text}'")[
        "method"
    ] == objects  # fmt: skip


@pytest.mark.parametrize(
    ("yaml", "objects"),
    [
        ("method: LowRank", [LowRank()]),
        ("method: [Neurons, Heads]", [Neurons(), Heads()]),
        ("method:\n- class_path: Heads\n- LowRank", [Heads(), LowRank()]),
        ("method:\n  Heads:\n  Neurons: {multiple_of: 4}", [Heads(), Neurons(4)]),
        ("method: {Blocks: [16, 4]}", [Blocks(16, 4)]),
        ("method: Heads\nmethod.min_keep: 0", [Heads(0)]),
        ("method.min_keep: 0\nmethod: Heads", [Heads(0)]),
        ("method: {multiple_of: 4}", [Heads(), Neurons(4)]),
    ],
)
def test_a_choice_of_classes_in_a_file(yaml: str, objects: list[Any]) -> None:
    assert read(prune, [], yaml)["method"] == objects


@pytest.mark.parametrize(
    ("words", "name", "found"),
    [
        (["--method", "Heads", "Neurons"], "method", [Heads(), Neurons()]),
        (["--method", "Heads", "--method", "LowRank"], "method", [Heads(), LowRank()]),
        (["--method", "Heads", "--method.min_keep", "2"], "method", [Heads(2)]),
        (["--method.min-keep", "2", "--method", "Heads"], "method", [Heads(2)]),
        (["--method.multiple_of", "8"], "method", [Heads(), Neurons(8)]),
        (["--method.Heads.min_keep", "0"], "method", [Heads(0), Neurons()]),
        (["--method", "Elements", "--method.no-embedding"], "method", [Elements(embedding=False)]),
        (["--criterion", "Random"], "criterion", Random()),
        (["--criterion", "magnitude"], "criterion", Magnitude()),
        (["--criterion", "Magnitude(1)"], "criterion", Magnitude(1.0)),
        (["--criterion.batches", "4"], "criterion", Taylor(batches=4)),
        (["--schedule", "Incremental"], "schedule", Incremental()),
        (["--schedule", "Incremental(4, 'linear')"], "schedule", Incremental(4, "linear")),
        (["--recovery", "Finetune"], "recovery", Finetune()),
        (["--recovery.steps", "3"], "recovery", Finetune(3)),
        (["--recovery", "Finetune(3)", "--recovery.lr", "1e-4"], "recovery", Finetune(3, 1e-4)),
        (["--recovery", "Finetune", "--recovery.last", "none"], "recovery", Finetune(last=None)),
        (["--recovery", "none"], "recovery", None),
        (["--criterion", "Random", "--criterion", "Magnitude"], "criterion", Magnitude()),
        (["--criterion.batches", "4", "--criterion.batches", "5"], "criterion", Taylor(batches=5)),
        ([], "schedule", OneShot()),
    ],
)
def test_settings(words: list[str], name: str, found: Any) -> None:
    assert read(prune, words)[name] == found


@pytest.mark.parametrize(
    ("words", "name", "found"),
    [
        (["--batch", "1_000"], "batch", 1000),
        (["--batch", "1,000"], "batch", 1000),
        (["--batch=1e3"], "batch", 1000),
        (["--batch", "32.0"], "batch", 32),
        (["--batch", "3", "--batch=4"], "batch", 4),
        (["--fp16", "--no-fp16"], "fp16", False),
        (["--seed", "-5"], "seed", -5),
        (["--seed", str(2**63 - 1)], "seed", 2**63 - 1),
        (["--fp16"], "fp16", True),
        *[(["--fp16", word], "fp16", True) for word in ("yes", "On", "1", "true")],
        *[([f"--fp16={word}"], "fp16", False) for word in ("no", "OFF", "0", "False")],
        (["--no-fp16"], "fp16", False),
        (["--threads", "none"], "threads", None),
        (["--text", "~/lines.txt"], "text", Path.home() / "lines.txt"),
        (["--text", "two words"], "text", Path("two words")),
        (["--text", ""], "text", None),
        (["--text", "none"], "text", Path("none")),
    ],
)
def test_plain_values(words: list[str], name: str, found: Any) -> None:
    value = read(prune, words)[name]
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["1e-3"], 0.001),
        (["-.5e-3"], -0.0005),
        (["-1"], -1.0),
        (["10%"], 0.1),
        (["1_000.5"], 1000.5),
    ],
)
def test_numbers(words: list[str], found: float) -> None:
    assert read(decode, ["--lm_weight", *words])["lm_weight"] == found
    assert read(decode, ["--lm-weight=" + words[0]])["lm_weight"] == found


@pytest.mark.parametrize(
    ("words", "yaml", "text"),
    [
        (["--target", "50%"], None, "50%"),
        (["--target", "5", "M"], None, "5M"),
        (["--target", "5,000,000"], None, "5000000"),
        (["--target", "50%,35%"], None, "50%,35%"),
        (["--target", "500,400,300"], None, "500,400,300"),
        (["--target", "50%", "35%"], None, "50%,35%"),
        ([], "target: 50", "50"),
        ([], "target: 50%", "50%"),
        ([], "target: 0.50", "0.50"),
        ([], "target: [50%, 35%]", "50%,35%"),
        ([], "target: 1:30", "1:30"),
    ],
)
def test_targets_are_text_as_it_stands(words: list[str], yaml: str | None, text: str) -> None:
    found = read(plan, ["--model", "m", *words], yaml)
    assert found["target"] == text


def test_lists_with_commas_in_a_text() -> None:
    assert read(study, [], "seeds: [0, 100]\ntargets: 50%")["seeds"] == "0,100"


@pytest.mark.parametrize(
    ("words", "yaml", "names"),
    [
        (["a", "b"], None, ["a", "b"]),
        (["--audio", "a", "--audio", "b"], None, ["a", "b"]),
        (["--", "-a"], None, ["-a"]),
        ([], "audio: [a, b]", ["a", "b"]),
        ([], "audio: a,b", ["a,b"]),
        (["--audio", "c"], "audio: [a, b]", ["c"]),
    ],
)
def test_lists_of_files(words: list[str], yaml: str | None, names: list[str]) -> None:
    assert read(decode, words, yaml)["audio"] == [Path(name) for name in names]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["m", "9k", "--batch", "3", "o"], ("m", "9k", "o", 3)),
        (["--fp16", "m", "9k", "o"], ("m", "9k", "o", 32)),
        (["--model", "m", "9k", "o"], ("m", "9k", "o", 32)),
        (["m", "o", "--target", "9k"], ("m", "9k", "o", 32)),
    ],
)
def test_words_between_options(words: list[str], found: tuple[str, str, str, int]) -> None:
    got = parse("x", "", prune, words)
    assert got is not None
    assert (str(got["model"]), got["target"], str(got["out"]), got["batch"]) == found


@pytest.mark.parametrize("words", [["0.9", "1"], ["0.9,1"]])
def test_tuples_of_words(words: list[str]) -> None:
    found = read(train_recogniser, ["--augmentation.speeds", *words])["augmentation"]
    assert found.speeds == (0.9, 1.0)


@pytest.mark.parametrize("text", ["0.9,1", "[0.9, 1]", "(0.9, 1)"])
def test_tuples(text: str) -> None:
    found = read(train_recogniser, ["--augmentation.speeds", text])["augmentation"]
    assert found.speeds == (0.9, 1.0) and found.begin == 500


@pytest.mark.parametrize(
    ("words", "yaml", "changed"),
    [
        (["--options.steps", "4e3"], None, {"steps": 4000}),
        (["--options", "{steps: 5}"], None, {"steps": 5}),
        (["--options.bf16"], None, {"bf16": True}),
        (["--options.no-bf16"], "options: {bf16: yes}", {}),
        ([], "options:\n  steps: 5\n  lr: 1e-4", {"steps": 5, "lr": 1e-4}),
        ([], "options.steps: 5", {"steps": 5}),
        ([], "options:", {}),
        (["--options.lr", "2"], "options: {steps: 5, lr: 1}", {"steps": 5, "lr": 2.0}),
    ],
)
def test_groups_keep_what_is_not_named(
    words: list[str], yaml: str | None, changed: dict[str, Any]
) -> None:
    found = read(train_lm, words, yaml)["options"]
    assert found == dataclasses.replace(LM_OPTIONS, **changed)


@pytest.mark.parametrize("text", ["paper-20m", "paper_20m", "Paper20M"])
def test_words_of_a_choice(text: str) -> None:
    assert read(train_lm, ["--preset", text])["preset"] == "paper-20m"


@pytest.mark.parametrize(
    ("words", "yaml", "found"),
    [
        (["--criterion.batches", "8"], "criterion: {batches: 2}", Taylor(batches=8)),
        (["--criterion.batches", "8"], "criterion: {Taylor: [1, 2]}", Taylor(batches=8)),
        (["--criterion", "Taylor"], "criterion: {Taylor: [1, 2]}", Taylor()),
        (["--criterion", "Random"], "criterion: Magnitude\ncriterion.p: 1", Random()),
    ],
)
def test_the_line_wins(words: list[str], yaml: str, found: Any) -> None:
    assert read(prune, words, yaml)["criterion"] == found
    again = parse("x", "", prune, ["--config", "my.yaml", *LEADING[prune], *words])
    assert again is not None and again["criterion"] == found


def test_later_files_win() -> None:
    Path("one.yaml").write_text("batch: 1\nlength: 1\noptions: {steps: 1, lr: 1}")
    Path("two.yaml").write_text("length: 2\noptions: {lr: 2}")
    found = read(train_lm, ["--config", "one.yaml", "--config", "two.yaml"])
    assert (found["batch"], found["length"]) == (1, 2)
    assert (found["options"].steps, found["options"].lr) == (1, 2.0)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Needs a number."""

    number: int


def test_what_is_missing_in_a_class_is_named() -> None:
    def command(a: Needs, b: Needs | None = None, c: Literal["auto"] | float = 1.0) -> None: ...

    with pytest.raises(UsageError, match=r"--a\.number: expected a value, got none"):
        parse("x", "", command, [])
    with pytest.raises(UsageError, match=r"--b\.number: expected a value, got none"):
        parse("x", "", command, ["--a.number", "1", "--b", "Needs"])
    found = parse("x", "", command, ["--a.number", "1", "--b.number", "2", "--c", "AUTO"])
    assert found == {"a": Needs(1), "b": Needs(2), "c": "auto"}
    with pytest.raises(UsageError, match="c: expected auto or a number, got x"):
        parse("x", "", command, ["--a.number", "1", "--c", "x"])


def test_help_stands_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--nothing", "-h"], ["help"]):
        assert parse("prunelm plan", "", plan, words) is None
        assert "usage: prunelm plan MODEL TARGET" in capsys.readouterr().out


def test_settings_change_what_the_command_has_by_default() -> None:
    default: list[Neurons | Heads] = [Neurons(multiple_of=4, min_keep=2), Heads(0)]

    def command(method: list[Neurons | Heads] = default) -> None: ...

    assert parse("x", "", command, []) == {"method": default}
    found = parse("x", "", command, ["--method.Neurons.min_keep", "3"])
    assert found == {"method": [Neurons(multiple_of=4, min_keep=3), Heads(0)]}
    assert parse("x", "", command, ["--method", "Heads|Neurons"]) == {
        "method": [Heads(), Neurons()]
    }
