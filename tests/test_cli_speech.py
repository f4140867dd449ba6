"""`evaluate`, `decode` and `tune` as a user runs them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speech_bed import write_bed

import prunelm
from prunelm.cli import main, speech
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.nn import BlockSparseLinear
from prunelm.training.checkpoint import load_model, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_bed(folder)
    return folder


@pytest.fixture
def bed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write in, which is the working folder."""
    shutil.copytree(made, tmp_path / "bed")
    monkeypatch.chdir(tmp_path / "bed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "bed"
    torch.set_num_threads(before)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that ends with this code."""
    assert main(words) == code, capsys.readouterr().err
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


def table(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_evaluate_measures_a_corpus(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--recogniser", "recogniser", "--corpus", ".", "--lm", "lm"]
    out, _ = run(capsys, *words, "--out", "n.json")
    assert "word error rate" in out and "beam 4, LM weight 0.3, token reward 0)" in out
    found = json.loads(Path("n.json").read_text())["speech"]
    assert found["utterances"] == 5 and found["lm_weight"] == 0.3


def test_decode_gives_lists_with_parts(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decode", "recogniser", "test1.wav", "test0.wav", "--nbest", "3", "--lm", "lm"]
    rows = table(run(capsys, *words, "--token-reward", "0.5")[0])
    assert rows[0] == ["id", "rank", "score", "am", "lm", "reward", "text"]
    assert rows[1][:2] == ["test1.wav", "1"] and rows[-1][0] == "test0.wav"
    for row in rows[1:]:
        assert float(row[2]) == pytest.approx(sum(map(float, row[3:6])), abs=3e-4)
    out, _ = run(capsys, "decode", "recogniser", "--corpus", ".", "--beam", "0", "--out", "d.json")
    assert out == ""
    decoded = json.loads(Path("d.json").read_text())["utterances"]
    assert [each["id"] for each in decoded] == [f"test-{i}" for i in range(5)]
    _, err = run(capsys, "decode", "recogniser", "a.wav", "--out", "d.txt", code=1)
    assert err == "prunelm: error: out: expected a name ending in .tsv or .json, got d.txt\n"


def test_decode_gives_what_is_good_and_names_what_is_not(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.wav").write_text("no audio")
    alone = run(capsys, "decode", "recogniser", "test0.wav", "test1.wav")[0]
    words = ["decode", "recogniser", "test0.wav", "broken.wav", "none.wav", "test1.wav"]
    out, err = run(capsys, *words, code=1)
    assert out == alone
    lines = err.splitlines()
    assert lines[0] == "prunelm: beam 4, no LM, token reward 0"
    assert lines[1].startswith("prunelm: broken.wav: expected an audio file, got ")
    assert lines[2].startswith("prunelm: ") and "none.wav" in lines[2]
    assert lines[3] == "prunelm: error: 2 of 4 recordings could not be decoded"
    run(capsys, *words, "--out", "n.tsv", code=1)
    assert Path("n.tsv").read_text() == alone
    run(capsys, *words, "--out", "n.json", code=1)
    found = json.loads(Path("n.json").read_text())["utterances"]
    assert [each["id"] for each in found] == ["test0.wav", "test1.wav"]


def test_nothing_is_written_where_nothing_was_decoded(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.wav").write_text("no audio")
    for name in ("n.tsv", "n.json"):
        run(capsys, "decode", "recogniser", "broken.wav", "--out", name, code=1)
        assert not Path(name).exists()


def test_a_word_error_rate_is_of_all_recordings_or_none(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("test3.wav").write_text("no audio")
    out, err = run(capsys, "evaluate", "--recogniser", "recogniser", "--corpus", ".", code=1)
    assert "word error rate" not in out
    assert "test3.wav: expected an audio file" in err
    assert err.endswith("1 of 5 recordings could not be decoded, so there is no word error rate\n")


def test_tune_keeps_what_it_chose_with_the_models(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(capsys, "decode", "recogniser", "test2.wav", "--lm", "lm")
    assert "prunelm tune chooses better ones" in before[1]
    out, err = run(capsys, "tune", "recogniser", ".", "--lm", "lm")
    assert out.count("\n") == 2 and "2 utterances" in out and "LM weight" in err
    chosen = json.loads((bed / "lm" / "decoding.json").read_text())["chosen"]
    assert len(chosen) == 1 and chosen[0]["utterances"] == 2
    digest = load_model("recogniser")[2]["weights"]
    assert chosen[0]["recogniser"] == digest
    chosen[0] |= {"lm_weight": 0.7, "token_reward": 2.5}
    (bed / "lm" / "decoding.json").write_text(json.dumps({"format": 1, "chosen": chosen}))
    words = ["recogniser", "test2.wav", "--lm", "lm"]
    automatic = run(capsys, "decode", *words)
    assert "beam 4, LM weight 0.7, token reward 2.5 (LM weight and" in automatic[1]
    assert run(capsys, "decode", *words, "--lm_weight", "auto")[0] == automatic[0]
    by_hand = ["--lm-weight", "0.7", "--token-reward", "2.5"]
    assert run(capsys, "decode", *words, *by_hand)[0] == automatic[0]
    out, _ = run(capsys, "evaluate", "--recogniser", "recogniser", "--corpus", ".", "--lm", "lm")
    assert "beam 4, LM weight 0.7, token reward 2.5)" in out


def test_decode_and_evaluate_run_on_the_fast_kernels(
    bed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer, _ = load_model("lm")
    sparse = TransformerLM(LMConfig(tokenizer.vocab_size, 64, 32, (LayerSizes(2, 256),) * 2))
    with torch.no_grad():
        for name, weight in sparse.named_parameters():
            if weight.dim() == 2 and "embedding" not in name:
                rows = torch.arange(weight.shape[0]) // 16
                weight[rows % 4 != 0] = 0.0
    save_model("sparse", sparse, tokenizer)
    blocks: list[BlockSparseLinear] = []

    def looked_at(recogniser, utterances, lm, options, **more):
        blocks.extend(m for m in lm.model.modules() if isinstance(m, BlockSparseLinear))
        return original(recogniser, utterances, lm, options, **more)

    original = speech.transcribe_each
    monkeypatch.setattr(speech, "transcribe_each", looked_at)
    run(capsys, "decode", "recogniser", "test0.wav", "--lm", "sparse")
    assert len(blocks) == 8 and all(m.weight.sparsity > 0.7 for m in blocks)
    blocks.clear()
    run(capsys, "evaluate", "--recogniser", "recogniser", "--corpus", ".", "--lm", "sparse")
    assert len(blocks) == 8


def test_long_recordings_are_decoded(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = 0.1 * np.random.default_rng(5).standard_normal(16000 * 75)
    soundfile.write("long.wav", noise, 16000)
    run(capsys, "decode", "recogniser", "long.wav", "--out", "long.json")
    (found,) = json.loads(Path("long.json").read_text())["utterances"]
    times = found["nbest"][0]["times"]
    assert times == sorted(times) and 70 * 25 < times[-1] <= 75 * 25


def test_a_corpus_without_transcripts_is_decoded(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.split("\t")[:2] for line in Path("test.tsv").read_text().splitlines()]
    Path("bare.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\nx\tnone.wav\n")
    expected = run(capsys, "decode", "recogniser", "--corpus", "test.tsv")[0]
    out, err = run(capsys, "decode", "recogniser", "--corpus", "bare.tsv", code=1)
    assert out == expected and "none.wav" in err
    assert err.endswith("prunelm: error: 1 of 6 recordings could not be decoded\n")
    _, err = run(capsys, "evaluate", "--recogniser", "recogniser", "--corpus", "bare.tsv", code=1)
    assert "bare.tsv" in err and "text" in err


def test_words_in_silent_recordings_are_insertions(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Path("test.tsv").read_text().splitlines()
    silent = [rows[0], rows[1], rows[2].rpartition("\t")[0] + "\t"]
    Path("silent.tsv").write_text("\n".join(silent) + "\n")
    words = ["evaluate", "--recogniser", "recogniser", "--corpus", "silent.tsv", "--out", "n.json"]
    run(capsys, *words)
    found = json.loads(Path("n.json").read_text())["speech"]
    assert found["utterances"] == 2 and found["words"] == len(rows[1].split("\t")[2].split())
    heard = table(run(capsys, "decode", "recogniser", "test1.wav")[0])[1][-1]
    assert heard and found["errors"] >= len(heard.split())


def test_one_channel_is_chosen(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, rate = soundfile.read("test2.wav", dtype="float32")
    other = 0.1 * np.random.default_rng(2).standard_normal(len(samples)).astype("float32")
    soundfile.write("two.wav", np.stack([other, samples], 1), rate, subtype="FLOAT")
    soundfile.write("one.wav", samples, rate, subtype="FLOAT")
    one = table(run(capsys, "decode", "recogniser", "one.wav")[0])[1][1:]
    assert table(run(capsys, "decode", "recogniser", "two.wav", "--channel", "1")[0])[1][1:] == one
    mixed = table(run(capsys, "decode", "recogniser", "two.wav")[0])[1][1:]
    assert mixed != one
    _, err = run(capsys, "decode", "recogniser", "two.wav", "--channel", "2", code=1)
    assert "two.wav: channel: expected 0 to 1, got 2" in err


def test_unknown_characters_are_told_and_normalised_on_request(
    bed: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("clean.txt").write_text("turn on the red door\ndim the old fan\n")
    Path("raw.txt").write_text("Turn\ton the\u00a0red door!\nDim the old fan.\n")
    clean = run(capsys, "evaluate", "--lm", "lm", "--text", "clean.txt")[0]
    assert not caplog.records
    assert run(capsys, "evaluate", "--lm", "lm", "--text", "raw.txt")[0] != clean
    (record,) = caplog.records
    assert "raw.txt: 13.3 % of characters are unknown to the tokenizer, such as" in record.message
    assert record.message.endswith("; --normalise writes lines as the recogniser does")
    caplog.clear()
    assert run(capsys, "evaluate", "--lm", "lm", "--text", "raw.txt", "--normalise")[0] == clean
    assert not caplog.records


def test_pruned_models_inherit_what_was_chosen(
    bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "tune", "recogniser", ".", "--lm", "lm")
    path = bed / "lm" / "decoding.json"
    values = json.loads(path.read_text())
    values["chosen"][0] |= {"lm_weight": 0.7, "token_reward": 2.5}
    path.write_text(json.dumps(values))
    run(capsys, "prune", "lm", "80%,60%", "small", "--criterion", "Magnitude")
    run(capsys, "prune", "small/60pc", "90%", "smaller", "--criterion", "Magnitude")
    for folder in ("small/80pc", "small/60pc", "smaller"):
        assert json.loads(Path(folder, "decoding.json").read_text()) == values
        _, err = run(capsys, "decode", "recogniser", "test0.wav", "--lm", folder)
        assert "LM weight 0.7, token reward 2.5 (" in err and "with the LM before pruning" in err
    lm = prunelm.load_lm("lm", accelerated=False)
    result = prunelm.Pruner(prunelm.Neurons(), prunelm.Magnitude()).run(lm, "80%")
    result.save("by-hand")
    assert prunelm.load_lm("by-hand").chosen == lm.chosen
    assert prunelm.load_lm("by-hand").tokenizer.fingerprint == lm.tokenizer.fingerprint
    with pytest.raises(ValueError, match="accelerated"):
        prunelm.Pruner(prunelm.Neurons(), prunelm.Magnitude()).run(prunelm.load_lm("lm"), "80%")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--corpus", "test.tsv", "--out", "./test.tsv"], "another file than the input"),
        (["--corpus", "test.tsv", "--out", "lm/decoding.json"], "a file outside the model's fo"),
        (["--corpus", "test.tsv", "--out", "recogniser/a.tsv"], "a file outside the model's fo"),
    ],
)
def test_decode_never_writes_over_what_it_reads(
    words: list[str], said: str, bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in bed.rglob("*") if path.is_file()}
    _, err = run(capsys, "decode", "recogniser", "--lm", "lm", *words, code=1)
    assert err.startswith(f"prunelm: error: out: expected {said}")
    assert {path: path.read_bytes() for path in bed.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("test.txt", "a name ending in .json, got test.txt"),
        ("lm/model.safetensors", "a name ending in .json, got lm/model.safetensors"),
        ("lm/model.json", "a file outside the model's folder, got lm/model.json"),
    ],
)
def test_evaluate_never_writes_over_what_it_reads(
    out: str, said: str, bed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in bed.rglob("*") if path.is_file()}
    _, err = run(capsys, "evaluate", "--lm", "lm", "--text", "test.txt", "--out", out, code=1)
    assert err == f"prunelm: error: out: expected {said}\n"
    assert {path: path.read_bytes() for path in bed.rglob("*") if path.is_file()} == before
