"""Commands do their work on a tiny model, and every mistake gets one line and a code."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunelm.cli import COMMANDS, arguments, main
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.training.checkpoint import load_model, save_model

LINES = [f"{a} the {b} {c}" for a in ("turn on", "dim", "close") for b in ("red", "big", "old")
         for c in ("door", "lamp", "fan")]  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt and lm/."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("\n".join(LINES * 4) + "\n")
    os.mkfifo(folder / "pipe.json")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "valid.txt").write_text("\n".join(LINES[::5]) + "\n")
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(LINES, 24, "char")
    model = TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size))
    save_model(folder / "lm", model, tokenizer)
    return folder


@pytest.fixture(autouse=True)
def _inside(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    torch.set_num_threads(1)


def page_faults(*before: str) -> int:
    """Faults of making a 48 MB tensor 10 times over, in a process that said `before` first."""
    code = [
        *before,
        "import resource, torch",
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        # Nothing is kept, so that nothing small comes to lie where the next one would fit.
        "make = lambda: [torch.ones(12_000_000) is None for _ in range(10)]",
        "make(); begin = faults(); make(); print(faults() - begin)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_commands_that_train_reuse_the_memory_of_large_tensors() -> None:
    returned = page_faults()
    if returned < 1000:
        pytest.skip("this system's malloc reuses it anyway")
    kept = "from prunelm.cli.memory import keep_freed_memory"
    assert page_faults(kept, "keep_freed_memory()") < returned / 10


def failure(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    """stderr of a command that fails with one line."""
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.startswith("prunelm: error: ") and said.count("\n") == 1, said
    return said.removeprefix("prunelm: error: ").rstrip()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from prunelm.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if "bench" not in name])
def test_every_option_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module, function = COMMANDS[name][0].split(".")
    command = getattr(importlib.import_module(f"prunelm.cli.{module}"), function)
    helps = arguments.argument_helps(command.__doc__)
    assert list(helps) == [n for n in command.__annotations__ if n not in ("return",)], (
        "the docstring's Args do not list the parameters"
    )
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in helps) and "<function" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["prun"], "command: expected one of demo, train, ", id="command"),
        pytest.param(["prun"], "got 'prun'; did you mean prune?", id="close-command"),
        pytest.param(["train"], "train: expected lm or recogniser, got nothing", id="kind"),
        pytest.param(["train", "x"], "train: expected lm or recogniser, got 'x'", id="wrong-kind"),
        pytest.param(["plan", "lm"], "--target: expected a value, got none", id="missing"),
        pytest.param(
            ["plan", "lm", "9k", "--criterin", "Taylor"],
            "--criterin: expected an option of prunelm plan; did you mean --criterion?",
            id="option",
        ),
        pytest.param(
            ["plan", "lm", "9k", "--batch", "two"],
            "batch: expected a whole number, got two",
            id="number",
        ),
        pytest.param(
            ["plan", "lm", "9k", "--method", "Hads"],
            "method: expected one of Heads, Neurons, Blocks, LowRank, Elements (or the dotted "
            "path of a class of your own), got Hads",
            id="class",
        ),
        pytest.param(
            ["plan", "lm", "9k", "--criterion", "Magnitude", "--criterion.q", "1"],
            "criterion: expected a setting of its class, got 'q'",
            id="setting",
        ),
        pytest.param(
            ["plan", "lm", "9k", "--criterion", "Magnitude", "--criterion.p", "-1"],
            "p: expected more than 0, got -1.0",
            id="refused-setting",
        ),
        pytest.param(["plan", "lm", "9k", "more"], "more: expected an option such as", id="word"),
        pytest.param(["env", "--config", "no.yaml"], "config: ", id="config"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in failure(capsys, *words, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["plan", "lm", "9q"], 'target: expected "5M", "40%" or a number', id="size"),
        pytest.param(
            ["plan", "lm", "10"], "target: expected at least 6,352 parameters", id="unreachable"
        ),
        pytest.param(["plan", "ml", "9k"], "model: expected a file, got ml/model.json", id="model"),
        pytest.param(["prune", "lm", "9k", "lm"], "out: expected a folder other than", id="out"),
        pytest.param(
            ["prune", "lm", "9k", "new"], "text: expected lines, which Taylor needs", id="no-text"
        ),
        pytest.param(
            ["prune", "lm", "50", "new", "--text", "text.txt", "--length", "8"],
            "target: expected at least 6,352 parameters",
            id="prune-unreachable",
        ),
        pytest.param(
            ["prune", "lm", "9k", "new", "--text", "no.txt"],
            "text: expected a file, got no.txt",
            id="text-file",
        ),
        *(
            pytest.param(
                [*words, "--text", "empty.txt"],
                "empty.txt: expected at least one line with a word, got none",
                id=f"empty-{words[0]}",
            )
            for words in (
                ["train", "lm", "--out", "new"],
                ["prune", "lm", "9k", "new"],
                ["plan", "lm", "9k"],
                ["evaluate", "--lm", "lm"],
            )
        ),
        pytest.param(["report", "."], ".: expected a folder of results (study.json)", id="report"),
        pytest.param(["demo", "--data", "none", "--out", "new"], "data: expected a", id="data"),
        pytest.param(
            ["study", "new", "--seeds", "a"], "seeds: expected whole numbers, got 'a'", id="seeds"
        ),
        pytest.param(
            ["evaluate", "--lm", "lm", "--text", "valid.txt", "--out", "pipe.json"],
            "out: expected a place for a file, got pipe.json, which is a pipe or a device",
            id="out-pipe",
        ),
        pytest.param(
            ["decode", "lm", "x.wav", "--out", "lm"],
            "out: expected a place for a file, got lm, which is a folder",
            id="out-folder",
        ),
        pytest.param(["evaluate", "--lm", "lm"], "evaluate: expected --lm with --text", id="eval"),
        pytest.param(
            ["decode", "lm", "x.wav"], "lm: expected a model of kind transducer, got lm", id="kind"
        ),
    ],
)
def test_bad_input_leaves_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failure(capsys, *words, code=1)
    assert not Path("new").exists()


def test_cut_short_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors", "tokenizer.model"):
        data = (Path("lm") / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2] if "safe" in name else data)
    assert "cut short" in failure(capsys, "plan", str(tmp_path), "9k", code=1)


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        main(["plan", "ml", "9k", "--debug"])


def test_plan_prune_evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert main(["plan", "lm", "60%", "--method", "Heads|Neurons"]) == 0
    assert "smallest" in capsys.readouterr().out
    words = ["prune", "lm", "60%", str(out), "--text", "text.txt", "--valid", "valid.txt",
             "--method", "Heads|Neurons", "--method.multiple-of", "4", "--recovery", "Finetune",
             "--recovery.steps", "3", "--batch", "4", "--length", "16"]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Neurons(multiple_of=4" in said and "Finetune(steps=3" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "model.json", "model.safetensors", "run.json", "tokenizer.model"
    ]  # fmt: skip
    dense, pruned = load_model("lm")[0], load_model(out)[0]
    count = sum(p.numel() for p in pruned.parameters())
    assert count <= 0.6 * sum(p.numel() for p in dense.parameters())
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", "--lm", str(out), "--text", "valid.txt", "--out", str(numbers)]) == 0
    found = json.loads(numbers.read_text())["lm"]
    assert found["parameters"] == count and found["perplexity_per_word"] > 1


def test_sizes_with_commas_are_a_ladder(tmp_path: Path) -> None:
    words = ["prune", "lm", "80%,60%", str(tmp_path / "two"), "--criterion", "Magnitude",
             "--method", "Neurons", "--fp16"]  # fmt: skip
    assert main(words) == 0
    sizes = [load_model(tmp_path / "two" / n)[0].config.parameter_count for n in ("80pc", "60pc")]
    assert sizes[0] > sizes[1]


def test_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "model: lm\ntarget: 70%\nmethod: [{class_path: prunelm.Neurons, init_args: "
        "{multiple_of: 4}}]\ncriterion: Magnitude\n"
    )
    assert main(["plan", "--config", str(file)]) == 0
    first = capsys.readouterr().out
    assert "head" not in first
    kept = [int(line.split()[2]) for line in first.splitlines()[1:]]
    assert main(["plan", "--config", str(file), "--target", "60%"]) == 0
    assert capsys.readouterr().out != first
    assert len(kept) == 2


def test_train_lm_and_go_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["train", "lm", "text.txt", str(tmp_path / "new"), "--preset", "tiny", "--units",
             "char", "--vocab-size", "24", "--batch", "4", "--length", "16", "--options.steps",
             "4", "--options.warmup", "1", "--options.checkpoint-every", "2", "--valid",
             "valid.txt"]  # fmt: skip
    assert main(words) == 0
    assert "best perplexity per word" in capsys.readouterr().out
    first = load_model(tmp_path / "new")[0].state_dict()
    assert main(words) == 0  # nothing left to do, and nothing changes
    again = load_model(tmp_path / "new")[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_stopping_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunelm.study.machine.describe", stop)
    assert main(["env"]) == 130
    said = capsys.readouterr().err
    assert said == "prunelm: stopped; the same command goes on from what is finished\n"


def test_bench_hands_its_words_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import prunelm.benchmarks

    for name in ("bench_a_linear", "bench_decoding"):
        code = f"def main(argv):\n    print({name!r}, argv)\n"
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(prunelm.benchmarks, "__path__", [str(tmp_path)])
    for name in ("bench_a_linear", "bench_decoding"):
        monkeypatch.delitem(sys.modules, f"prunelm.benchmarks.{name}", raising=False)
    assert main(["bench", "kernels", "--threads", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "bench_a_linear ['--threads', '2']\n"
    assert said.err == "a_linear: 1 of 1, 0 s so far\n"
    assert main(["bench", "decoding"]) == 0
    assert capsys.readouterr().out == "bench_decoding []\n"
    for name in ("bench_a_linear", "bench_decoding"):
        sys.modules.pop(f"prunelm.benchmarks.{name}")  # monkeypatch would put them back


def test_help_fits_a_narrow_terminal_and_says_what_is_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["study", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name} <folder>" in said for name in ("data", "lm", "recogniser"))
    assert main(["report", "--help"]) == 0
    assert "--folder <folder>" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["kernels", "decoding"])
def test_bench_shows_its_options(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["bench", kind, "--help"])
    said = capsys.readouterr()
    assert f"usage: prunelm bench {kind} [-h]" in said.out
    assert said.out.startswith("Measures ")
    assert said.err == ""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", kind, "--threads", "0"])
    complaint = f"prunelm bench {kind}: error: threads: expected at least 1, got 0"
    assert capsys.readouterr().err.splitlines()[-1] == complaint


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["instruction set of prunelm"]
