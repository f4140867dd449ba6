"""Words on the line that fit nothing, and the one line that each gets."""

import pytest
from written import refused

from prunelm.cli import UsageError
from prunelm.cli.arguments import parse
from prunelm.cli.pruning import prune
from prunelm.cli.training import train_lm

ONE_OF = "expected one of Heads, Neurons, Blocks, LowRank, Elements"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "Hads"], f"method: {ONE_OF} (or the dotted path of a class of your own), got "
         "Hads; did you mean Heads?"),
        (["--method", "Heads|"], f"method: {ONE_OF}, got Heads|"),
        (["--method", "Heads("], f"method: {ONE_OF}, got Heads("),
        (["--method", ""], f"method: {ONE_OF}, got ''"),
        (["--method"], f"method: {ONE_OF}, got no value"),
        (["--method", "[Heads"], "method: expected YAML: expected ',' or ']'"),
        (["--method", "Heads(1,2,3)"], "method: expected Heads with at most 2 settings, got 3"),
        (["--method", "Heads(min_kep=1)"], "got 'min_kep' (Heads takes min_keep, architecture); "
         "did you mean min_keep?"),
        (["--method", "Blocks(bn=x)"], "method.bn: expected a whole number, got x"),
        (["--method", "Heads(-1)"], "method.min_keep: expected at least 0, got -1"),
        (["--method.min_keep", "2"], "method.min_keep: expected one class that has it, got "
         "Heads and Neurons; say method.Heads.min_keep or method.Neurons.min_keep"),
        (["--method.bn", "2"], "it is for Blocks, which was not chosen"),
        (["--method.Blocks.bn", "2"], "it is for Blocks, which was not chosen"),
        (["--method.architecture.qvk", "2", "--method", "Heads"], "method.architecture: expected a "
         "setting of its class, got 'qvk'"),
        (["--criterion", "Taylor|Random"], "criterion: expected one class, got Taylor|Random"),
        (["--criterion", "none"], "criterion: expected one of Taylor, Magnitude, Random, got none"),
        (["--criterion", "Random", "--criterion.batches", "4"], "criterion: expected a setting of "
         "its class, got 'batches' (Random takes nothing); it is for Taylor"),
        (["--schedule", "Incremental(3, cubc)"], "schedule.shape: expected cubic, linear or "
         "geometric, got 'cubc'; did you mean cubic?"),
        (["--schedule.rounds", "3"], "it is for Incremental, which was not chosen"),
        (["--batch"], "batch: expected a whole number, got no value"),
        (["--batch="], "batch: expected a whole number, got ''"),
        (["--batch", "two"], "batch: expected a whole number, got two"),
        (["--batch", "4.5"], "batch: expected a whole number, got 4.5"),
        (["--batch", "a\nb"], r"batch: expected a whole number, got 'a\nb'"),
        (["--batch", "nan"], "batch: expected a whole number, got nan"),
        (["--batch", "1e300"], "batch: expected a whole number, got 1e300"),
        (["--batch", "9" * 5000], "batch: expected a whole number, got 999"),
        (["--batch", "3", "4"], "4: expected an option such as --model, got a word after --batch"),
        (["--batch=3", "4"], "4: expected an option such as --model, got a word after --batch"),
        (["--batch.x", "3"], "--batch.x: expected an option of prunelm x; did you mean --batch?"),
        (["--fp16=maybe"], "fp16: expected yes or no, got maybe"),
        (["--fp16", "maybe"], "maybe: expected an option such as --model, got a word after --fp16"),
        (["--no-fp16=yes"], "no-fp16: expected no value, got yes"),
        (["--no-batch"], "--no-batch: expected an option of prunelm x; did you mean --batch?"),
        (["--btach", "3"], "--btach: expected an option of prunelm x; did you mean --batch?"),
        (["--crit=Random"], "--crit: expected an option of prunelm x; did you mean --criterion?"),
        (["--steps", "3"], "did you mean --recovery.steps?"),
        (["--qqq"], "--qqq: expected an option of prunelm x; see prunelm x --help"),
        (["-batch", "3"], "-batch: expected an option of prunelm x; did you mean --batch?"),
        (["-b"], "-b: expected an option of prunelm x; see prunelm x --help"),
        (["more"], "more: expected an option such as --model, got a word"),
        (["--text", "~nosuchuser/x"], "text: expected a folder of a user that exists"),
        (["--config"], "config: expected a YAML file, got no value"),
        (["--config", "no.yaml"], "config: expected a YAML file, got no.yaml: No such file"),
        (["--config", "/"], "config: expected a YAML file, got /: Is a directory"),
        (["--allow"], "allow: expected a module, got no value"),
    ],
)  # fmt: skip
def test_mistakes_on_the_line(words: list[str], said: str) -> None:
    assert said in refused(prune, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "base"], "preset: expected small, paper-20m or tiny, got 'base'"),
        (["--preset", "paper"], "got 'paper'; did you mean paper-20m?"),
        (["--options", "5"], "options: expected settings such as options.steps, got 5"),
        (["--options.stepz", "5"], "--options.stepz: expected an option of prunelm x; did you mean "
         "--options.steps?"),
        (["--lr", "5"], "did you mean --options.lr?"),
        (["--options.lr", "-1"], "options.lr: expected more than 0, got -1.0"),
        (["--options.lr", "0,5"], "options.lr: expected a number, got 0,5; did you mean 0.5?"),
    ],
)  # fmt: skip
def test_mistakes_in_groups(words: list[str], said: str) -> None:
    assert said in refused(train_lm, words)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match=r"^--target, --out: expected a value, got none; see x"):
        parse("x", "", prune, ["--model", "m"])
