"""Recordings become words one by one, in pieces where they are long, whatever the others do."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speech_bed import write_bed

import prunelm
from prunelm.data.speech import Utterance, read_audio, split_long
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding import mbs
from prunelm.decoding import transcribe as module
from prunelm.decoding.options import SearchOptions, suitable_options
from prunelm.decoding.transcribe import encode, search, transcribe, transcribe_each
from prunelm.training.pretrained import ChosenSearch, LoadedLM, LoadedRecogniser

Models = tuple[LoadedRecogniser, LoadedLM]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bed")
    write_bed(folder)
    return folder


@pytest.fixture(scope="module")
def models(bed: Path) -> Models:
    lm = prunelm.load_lm(bed / "lm")
    return prunelm.load_recogniser(bed / "recogniser", tokenizer=lm.tokenizer), lm


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recordings(bed: Path) -> list[Utterance]:
    return [Utterance(f"u{i}", bed / f"test{i}.wav", "") for i in range(5)]


def test_a_file_samples_and_a_list_say_the_same(bed: Path, models: Models) -> None:
    recogniser, lm = models
    path = bed / "test2.wav"
    one = prunelm.transcribe(recogniser, path, lm=lm)
    assert one.text and str(one) == one.text and one.id == str(path)
    assert prunelm.transcribe(recogniser, str(path), lm=lm) == one
    of_samples = prunelm.transcribe(recogniser, read_audio(path), lm=lm)
    assert of_samples.text == one.text and of_samples.nbest == one.nbest
    several = prunelm.transcribe(recogniser, [path, bed / "test0.wav"], lm=lm)
    assert [each.id for each in several] == [str(path), str(bed / "test0.wav")]
    assert several[0].text == one.text
    assert prunelm.transcribe(recogniser, []) == []


def test_one_by_one_as_all_at_once(bed: Path, models: Models) -> None:
    recogniser, lm = models
    options = SearchOptions(beam=3, lm_weight=0.4, token_reward=0.5, nbest=3)
    found = list(transcribe_each(recogniser, recordings(bed), lm, options))
    batches = encode(recogniser.model, recordings(bed))
    expected = search(recogniser.model, batches, lm.model, options)
    for each in found:
        wanted = expected[each.id]
        assert [x.tokens for x in each.nbest] == [x.tokens for x in wanted]
        scores = [x.score for x in each.nbest]
        assert scores == pytest.approx([x.score for x in wanted], abs=1e-4)
        assert each.nbest[0].times == wanted[0].times


def test_a_broken_recording_stops_no_other(bed: Path, models: Models, tmp_path: Path) -> None:
    recogniser, lm = models
    broken, some = tmp_path / "broken.wav", recordings(bed)
    broken.write_bytes(b"RIFF nothing of the kind")
    mixed = [some[0], Utterance("bad", broken, ""), some[1],
             Utterance("gone", tmp_path / "none.wav", ""), some[2]]  # fmt: skip
    found = list(transcribe_each(recogniser, mixed, lm, SearchOptions()))
    assert [each.id for each in found] == ["u0", "bad", "u1", "gone", "u2"]
    assert [bool(each.error) for each in found] == [False, True, False, True, False]
    assert "broken.wav: expected an audio file" in found[1].error and not found[1].nbest
    assert "none.wav" in found[3].error
    alone = list(transcribe_each(recogniser, some[:3], lm, SearchOptions()))
    assert [each.text for each in alone] == [found[i].text for i in (0, 2, 4)]
    with pytest.raises(ValueError, match=r"broken\.wav: expected an audio file"):
        transcribe(recogniser, [bed / "test0.wav", broken])


def test_scores_that_are_no_numbers_stop_no_other(
    bed: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser, lm = models
    lengths = {len(module.LogMel()(read_audio(each.audio_path))) for each in recordings(bed)}
    bad = sorted(lengths)[2]

    def encoded(model, features, ids):
        batch = original(model, features, ids)
        values = batch.encoded.clone()
        values[[len(each) == bad for each in features]] = float("nan")
        return replace(batch, encoded=values)

    original = module._encoded
    monkeypatch.setattr(module, "_encoded", encoded)
    found = list(transcribe_each(recogniser, recordings(bed), lm, SearchOptions()))
    assert [each.id for each in found if each.error] == ["u2"]
    assert "u2: encoded: expected scores that are numbers, got" in found[2].error


def test_a_long_recording_is_decoded_in_pieces(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser, lm = models
    generator = np.random.default_rng(3)
    audio = torch.from_numpy(0.1 * generator.standard_normal(16000 * 9)).float()
    monkeypatch.setattr(module, "CHUNK_SECONDS", 2.0)
    monkeypatch.setattr(module, "_BATCH", 2)
    options = SearchOptions(nbest=3)
    (found,) = transcribe_each(recogniser, [("long", audio)], lm, options)
    ranges = split_long(audio, 16000, 2.0)
    assert len(ranges) >= 5
    pieces = [transcribe(recogniser, audio[a:b], lm, options) for a, b in ranges]
    best = found.nbest[0]
    assert best.tokens == sum((piece.nbest[0].tokens for piece in pieces), ())
    assert best.score == pytest.approx(sum(piece.nbest[0].score for piece in pieces), abs=1e-3)
    assert list(best.times) == sorted(best.times) and max(best.times) > 8 / module.FRAME_SECONDS
    assert len(found.nbest) == 3 and len({each.tokens for each in found.nbest}) == 3


def test_results_come_while_recordings_are_still_read(
    bed: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser, _ = models
    monkeypatch.setattr(module, "_BATCH", 2)
    read: list[str] = []

    def source() -> Iterator[Utterance]:
        for each in recordings(bed):
            read.append(each.id)
            yield each

    found = transcribe_each(recogniser, source())
    assert next(iter(found)).id == "u0" and read == ["u0", "u1"]
    assert [each.id for each in found] == ["u1", "u2", "u3", "u4"]


def test_weight_zero_runs_no_language_model(bed: Path, models: Models) -> None:
    recogniser, lm = models

    class Refusing(torch.nn.Module):
        def step(self, *_: object) -> None:
            raise AssertionError("an LM at weight 0 ran")

    silent = replace(lm, model=Refusing())
    found = transcribe(recogniser, bed / "test1.wav", silent, SearchOptions(lm_weight=0.0))
    assert found == transcribe(recogniser, bed / "test1.wav", None, SearchOptions(lm_weight=0.0))


def test_options_come_from_what_was_chosen(models: Models) -> None:
    recogniser, lm = models
    options, where = suitable_options(recogniser, lm)
    assert options == SearchOptions(4, 0.3, 0.0) and where == "default LM weight and token reward"
    options, where = suitable_options(recogniser)
    assert options == SearchOptions(4, 0.0, 0.0) and where == ""
    entry = ChosenSearch(recogniser.weights, lm.weights, 4, 0.7, 1.5, 0.2, 150)
    tuned = replace(lm, chosen=(entry,))
    options, where = suitable_options(recogniser, tuned, nbest=2)
    assert options == SearchOptions(4, 0.7, 1.5, 2)
    assert where == "LM weight and token reward chosen on 150 validation utterances"
    options, where = suitable_options(recogniser, tuned, lm_weight=0.1)
    assert options == SearchOptions(4, 0.1, 1.5) and where.startswith("token reward chosen on")
    options, where = suitable_options(recogniser, tuned, lm_weight=0.1, token_reward=0.0)
    assert options == SearchOptions(4, 0.1, 0.0) and where == ""
    pruned = replace(tuned, weights="smaller")
    assert suitable_options(recogniser, pruned)[1].endswith(", with the LM before pruning")
    alone = replace(recogniser, chosen=(replace(entry, lm="", lm_weight=0.0, token_reward=0.5),))
    assert suitable_options(alone)[0] == SearchOptions(4, 0.0, 0.5)
    assert suitable_options(alone, beam=0) == (SearchOptions(0, 0.0, 0.5), "")
    with pytest.raises(ValueError, match="beam: expected at least 1 with a language model, got 0"):
        suitable_options(recogniser, lm, beam=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beam": -1}, "beam: expected at least 0, got -1"),
        ({"nbest": 0}, "nbest: expected at least 1, got 0"),
        ({"lm_weight": float("nan")}, "lm_weight: expected a finite number, got nan"),
        ({"token_reward": float("inf")}, "token_reward: expected a finite number, got inf"),
    ],
)
def test_options_are_checked(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SearchOptions(**settings)


def test_different_tokenizers_are_refused(bed: Path, models: Models) -> None:
    recogniser, lm = models
    other = replace(lm, tokenizer=Tokenizer.train(["other words"], 20, "char"))
    with pytest.raises(ValueError, match=r"lm: expected the vocabulary .* of the tokenizer in use"):
        transcribe(recogniser, bed / "test0.wav", other)


def test_the_joined_list_is_ranked_by_places(models: Models) -> None:
    recogniser, _ = models
    generator = torch.Generator().manual_seed(2)
    encoded = torch.randn(2, 12, 16, generator=generator)
    lists = mbs(recogniser.model, encoded, torch.tensor([12, 9]), 4)
    joined = module._joined(lists, 6)
    assert joined[0].tokens == lists[0][0].tokens + lists[1][0].tokens
    assert len(joined) == 6
    places = {
        a.tokens + b.tokens: i + k for i, a in enumerate(lists[0]) for k, b in enumerate(lists[1])
    }
    ranks = [places[each.tokens] for each in joined]
    assert ranks == sorted(ranks) and ranks[0] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_arrays_say_what_tensors_say(dtype: type, models: Models) -> None:
    samples = (0.1 * np.random.default_rng(3).standard_normal(6000)).astype(dtype)
    found = transcribe(models[0], samples, models[1])
    assert found.text == transcribe(models[0], torch.as_tensor(samples), models[1]).text
    tensor = torch.as_tensor(samples).requires_grad_()
    assert [each.text for each in transcribe(models[0], [samples, tensor])] == [
        transcribe(models[0], samples).text
    ] * 2


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (None, "audio: expected a file, samples [S], or a list of them, got NoneType"),
        ([None], "audio: expected a file, samples [S], or a list of them, got NoneType"),
        ([0.0, 0.1], "audio: expected a file, samples [S], or a list of them, got float"),
        (np.zeros(8000, np.int16), "audio[0]: expected floating samples in [-1, 1], got int16"),
        (torch.zeros(8000).bool(), "audio[0]: expected floating samples in [-1, 1], got bool"),
        (torch.zeros(0), "audio[0]: expected samples, got none"),
        (np.zeros((8000, 2)), "audio: expected one channel [S], got shape [8000, 2]"),
    ],
)
def test_what_is_no_audio_is_refused(audio: Any, said: str, models: Models) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        transcribe(models[0], audio)


def test_what_is_no_loaded_model_is_refused(models: Models) -> None:
    recogniser, lm = models
    swapped: Any = lm
    with pytest.raises(ValueError, match=r"^recogniser: expected .*load_recogniser gives, got Loa"):
        transcribe(swapped, torch.zeros(8000))
    folder: Any = "runs/lm"
    with pytest.raises(ValueError, match=r"^lm: expected what prunelm.load_lm gives, got str$"):
        transcribe(recogniser, torch.zeros(8000), folder)
