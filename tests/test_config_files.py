"""A YAML file is text with lines: mistakes name both, and nothing in it runs or unfolds."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prunelm.cli import UsageError, main
from prunelm.cli.arguments import parse, yaml_file
from prunelm.cli.pruning import prune

OWN = '''"""Its import leaves a file."""
from pathlib import Path

import torch

Path("imported").touch()


class Largest:
    """The largest go first."""

    in_loss_units = False
    batches = 0

    def __init__(self, power: float = 2, *, names=(), deep: bool = False) -> None:
        self.settings = (power, names, deep)

    def score(self, model, groups, evidence):
        return [-torch.ones(g.count) for g in groups]


class Checked(Largest):
    def __init__(self, power: "OnlyForACheckerOfTypes" = 2) -> None:
        self.settings = power


class Unfinished:
    batches = 0


class Raising:
    def __init__(self) -> None:
        raise KeyError("nothing")


def heal(model, evidence, masks, wound):
    return 0
'''


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own in the present folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(OWN)
    Path("broken_module.py").write_text("1 +")
    return name


def read(yaml: str | bytes, words: Sequence[str] = ()) -> dict[str, Any]:
    """Keyword arguments for `prune` from a file."""
    Path("my.yaml").write_bytes(yaml.encode() if isinstance(yaml, str) else yaml)
    found = parse("prunelm x", "", prune, ["m", "5M", "o", "--config", "my.yaml", *words])
    assert found is not None
    return found


def refused(yaml: str | bytes, words: Sequence[str] = ()) -> str:
    """The one line about a file."""
    with pytest.raises(UsageError) as error:
        read(yaml, words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("modle: x", "my.yaml, line 1: modle: expected an option of prunelm x; did you mean "
         "model?"),
        ("seed: 1\nbatch: two", "my.yaml, line 2: batch: expected a whole number, got two"),
        ("batch: [1, 2]", "line 1: batch: expected a whole number, got [1, 2], 2 values"),
        ("batch: {a: 1}", "line 1: batch: expected a whole number, got {a: 1}"),
        ("batch:", "line 1: batch: expected a whole number, got nothing"),
        ("fp16: maybe", "line 1: fp16: expected yes or no, got maybe"),
        ("text: {a: b}", "line 1: text: expected a file or folder, got {a: b}"),
        ("seed: 1\nseed: 2", "my.yaml, line 2: seed: expected once, got it again"),
        ("fp_16: 1\nfp-16: 1", "line 1: fp_16: expected an option"),
        ("no-fp16:\nno_fp16:", "line 2: no_fp16: expected once, got it again"),
        ("fp-16: 1", "line 1: fp-16: expected an option of prunelm x; did you mean fp16?"),
        ("criterion:\n  Magnitude:\n    q: 3", "my.yaml, line 3: criterion: expected a setting of "
         "its class, got 'q' (Magnitude takes p)"),
        ("criterion:\n  Magnitude: 3", "line 2: criterion.Magnitude: expected settings such as "
         "criterion.Magnitude.p, got 3"),
        ("criterion:\n  class_path: Magnitude\n  p: 3", "my.yaml, line 3: criterion.p: expected "
         "class_path and init_args, got p"),
        ("criterion: {Magnitude: {p: -1}}", "line 1: criterion.p: expected more than 0, got -1.0"),
        ("recovery: [Finetune, Finetune]", "line 1: recovery: expected one class, got [Fine"),
        ("method: []", "line 1: method: expected one of Heads, Neurons"),
        ("allow: os", "my.yaml, line 1: allow: expected it on the command line only, got it in a"),
        ("config: other.yaml", "my.yaml, line 1: config: expected it on the command line only"),
        ("- a\n- b", "my.yaml: expected options, such as target: 50%, got [a, b]"),
        ("just text", "my.yaml: expected options, such as target: 50%, got just text"),
        ("a: b: c", "my.yaml, line 1: expected YAML: mapping values are not allowed here"),
        ("seed: 1\n\tbatch: 3", "my.yaml, line 2: expected YAML: "),
        ("seed: 1\n---\nseed: 2", "my.yaml, line 2: expected YAML: "),
        ("? [a]\n: b", "my.yaml, line 1: expected a name, got a sequence"),
        ("x: !!python/object/apply:os.mkdir [hacked]", "my.yaml, line 1: expected YAML without "
         "tags, got !!python/object/apply:os.mkdir"),
        ("seed: !mine 5", "my.yaml, line 1: expected YAML without tags, got !mine"),
        ("batch: &a [*a]", "my.yaml, line 1: expected values that end, got one that holds itself"),
        ("batch: *a", "my.yaml, line 1: expected YAML: "),
        ("[" * 50_000, "my.yaml: expected YAML of fewer levels"),
        (b"seed: 1\nbatch: \xff", "my.yaml, line 2: expected YAML in UTF-8, got byte 0xff"),
        (b"\x00\x01", "my.yaml: expected YAML: "),
        ("#" * (yaml_file.MOST_BYTES + 1), "my.yaml: expected YAML of at most 1,000,000 bytes"),
    ],
    ids=range(33),
)  # fmt: skip
def test_mistakes_name_file_and_line(yaml: str | bytes, said: str) -> None:
    assert said in refused(yaml)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("yaml", ["", "# nothing", "---", "\ufeffseed: 0", "seed: !!int 0"])
def test_files_that_say_little(yaml: str) -> None:
    assert read(yaml)["seed"] == 0


def test_values_that_yaml_would_turn_into_something_else() -> None:
    found = read("fp16: on\nseed: 010\ntext: 2020-01-01\nvalid: no\nrecovery: null\nthreads: ~\n")
    assert read("valid: 'null'")["valid"] == Path("null")
    assert (found["fp16"], found["seed"], found["text"]) == (True, 10, Path("2020-01-01"))
    assert (found["valid"], found["recovery"], found["threads"]) == (Path("no"), None, None)


def test_aliases_unfold_to_a_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    begin = time.perf_counter()
    assert "expected at most 10,000 values, got more" in refused("\n".join(lines))
    assert time.perf_counter() - begin < 20
    assert read("seed: &one 1\nbatch: *one")["batch"] == 1


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(UsageError, match="/dev/zero: expected YAML of at most 1,000,000 bytes"):
        parse("x", "", prune, ["--config", "/dev/zero"])


@pytest.mark.parametrize("file", [False, True], ids=["line", "file"])
def test_nothing_is_imported_without_leave(own: str, file: bool) -> None:
    path, words = f"{own}.Largest", ["--criterion", f"{own}.Largest"]
    said = refused(f"criterion: {path}") if file else refused("", words)
    where = "my.yaml, line 1: " if file else ""
    assert said == (
        f"{where}criterion: expected one of Taylor, Magnitude, Random (or the dotted path of a "
        f"class of your own), got {path}; --allow {own} lets it be imported"
    )
    for other in ("another", own[:-1], f"{own}.Largest"):
        assert "lets it be imported" in refused("", [*words, "--allow", other])
    assert not Path("imported").exists() and own not in sys.modules


@pytest.mark.parametrize("path", ["prunelm.benchmarks.harness.X", "prunelm.study.grid.Chain"])
def test_other_classes_of_the_package_are_not_taken(path: str) -> None:
    assert "criterion: expected one of Taylor" in refused(f"criterion: {path}")
    assert "lets it be imported" not in refused(f"criterion: {path}")


def test_a_class_of_ones_own(own: str) -> None:
    allowed = ["--allow", own]
    found = read(f"criterion: {own}.Largest", allowed)["criterion"]
    assert found.settings == (2, (), False)
    words = [*allowed, "--criterion", f"{own}.Largest(3, names=[a, 1], deep=yes)"]
    assert read("", words)["criterion"].settings == (3.0, ["a", 1], True)
    yaml = f"criterion: {{class_path: {own}.Largest, init_args: {{power: 1}}}}"
    found = read(yaml, [*allowed, "--criterion.deep"])["criterion"]
    assert found.settings == (1.0, (), True)
    assert read(f"criterion: {own}.Checked(3)", allowed)["criterion"].settings == 3
    assert read(f"recovery: {own}.heal", allowed)["recovery"].__name__ == "heal"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Largset", "got Largset; did you mean Largest?"),
        ("Unfinished", "criterion: expected a class with in_loss_units, batches, score, got "
         "Unfinished without in_loss_units, score"),
        ("Raising", "criterion: Raising: 'nothing'"),
        ("Largest(x=1)", "got 'x' (Largest takes power, names, deep)"),
        ("Largest(power=x)", "criterion.power: expected a number, got x"),
    ],
)  # fmt: skip
def test_mistakes_in_a_class_of_ones_own(own: str, name: str, said: str) -> None:
    assert said in refused("", ["--allow", own, "--criterion", f"{own}.{name}"])


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("no_such_module", "criterion: expected a module, got no_such_module: ModuleNotFoundError"),
        ("broken_module", "criterion: expected a module, got broken_module: SyntaxError"),
    ],
)
def test_modules_that_do_not_import(own: str, module: str, said: str) -> None:
    assert said in refused(f"criterion: {module}.Largest", ["--allow", module])


def test_the_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(json.dumps({"modle": 1}))
    assert main(["plan", "--config", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "prunelm: error: my.yaml, line 1: modle: expected an option of prunelm plan; did you mean "
        "model?\n"
    )


@pytest.mark.parametrize(
    ("yaml", "words", "said"),
    [
        ("model: ml\ntarget: 5M", [], "my.yaml, line 1: model: expected a file, got ml/model.json"),
        ("model: m\ntarget: 5M", ["--model", "ml"], "model: expected a file, got ml/model.json"),
    ],
)
def test_what_a_command_refuses_names_the_file(
    yaml: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text(yaml)
    assert main(["plan", "--config", "my.yaml", *words]) == 1
    assert capsys.readouterr().err.startswith(f"prunelm: error: {said}")
