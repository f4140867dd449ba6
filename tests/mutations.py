"""Random damage to files, and the loaders that must take it or refuse it in one clear line.

Run as a program it tries one loader, so that a crash or a hang takes no test run with it:
`python tests/mutations.py LOADER FOLDER FIRST COUNT` writes a line for each broken promise.
"""

import contextlib
import faulthandler
import gzip
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10
"""A load that takes longer is ended, with a traceback."""

LINES = [f"{a} the {b} {c}" for a in ("turn on", "dim", "close") for b in ("red", "big", "old")
         for c in ("door", "lamp", "fan")]  # fmt: skip
_ODD = [
    "\ufeff",
    "\u2028",
    "\x85",
    "\0",
    "\t",
    "\u00a0",
    "\x0b",
    "\x1e",
    "\U0001f600",
    "e\u0301",
    '"',
]
_NUMBERS = [
    "-1",
    "0",
    "1e400",
    "NaN",
    "null",
    "99999999999",
    "1.5",
    "true",
    '"x"',
    "[]",
    "{}",
    "07",
]


@dataclass(frozen=True)
class Loader:
    """Makes files in a folder, and reads them; `named`: a refusal must name the folder."""

    make: Callable[[Path], None]
    load: Callable[[Path], object]
    named: bool = True


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three random changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(CHANGES)(data, draw)
    return data


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 30)) if changed else 0):
        # Headers decide most, so that they are hit as often as all that follows.
        end = len(changed) if draw.random() < 0.5 else min(len(changed), 128)
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.randbytes(draw.choice((1, 2, 9, 500))) + data[place:]


def remove(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(data) + 1)
    return data[:begin] + data[begin + draw.choice((1, 2, 9, 100)) :]


def repeat(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(data) + 1)
    end = begin + draw.randrange(200)
    return data[:end] + data[begin:]


def blank(data: bytes, draw: random.Random) -> bytes:
    begin, size = draw.randrange(len(data) + 1), draw.choice((1, 4, 40))
    return data[:begin] + bytes([draw.choice((0, 255))]) * size + data[begin + size :]


def swap_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def mark(data: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b")) + data


def huge(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice((b"x", b"word ", b"9")) * 60_000 + data[place:]


def odd(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    text = "".join(draw.choice((*_ODD, chr(draw.randrange(0xD800)))) for _ in range(3))
    return data[:place] + text.encode() + data[place:]


def number(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"(?<![\w.])-?[0-9][0-9.]*", data[:5000]))
    if not found:
        return flip(data, draw)
    chosen = draw.choice(found)
    return data[: chosen.start()] + draw.choice(_NUMBERS).encode() + data[chosen.end() :]


def other(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        (b"", b"\n", b"{}", b"[]", b"null", draw.randbytes(300), b"a" * 99, data[::-1])
    )


def wide(data: bytes, draw: random.Random) -> bytes:
    return data.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "utf-8")))


CHANGES = [flip, flip, flip, cut, cut, insert, remove, repeat, blank, swap_lines, mark, huge, odd,
           number, number, other, wide]  # fmt: skip


def text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(LINES) + "\n")
    return path


def _text(folder: Path) -> None:
    text(folder / "a.txt")


def _packed(folder: Path) -> None:
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n".join(LINES).encode(), mtime=0))


def _tone(path: Path, seconds: float = 0.2) -> None:
    import numpy as np
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * 16000)) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * time), 16000)


def _audio(suffix: str) -> Callable[[Path], None]:
    return lambda folder: _tone(folder / f"a.{suffix}")


def _tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from prunelm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(LINES, 24, "char")
    tokenizer.save(folder / "tokenizer.model")
    return tokenizer


def _token_ids(folder: Path) -> None:
    from prunelm.data.text import write_token_ids

    write_token_ids(LINES, _tokenizer(folder.parent / "kept"), folder / "ids.bin")


def _load_token_ids(folder: Path) -> object:
    from prunelm.data.text import TokenBatches, TokenIds
    from prunelm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder.parent / "kept" / "tokenizer.model")
    ids = TokenIds(folder / "ids.bin", tokenizer)
    return list(ids), TokenBatches(folder / "ids.bin", tokenizer, 2, 8, 0)(3)


def _load_tokenizer(folder: Path) -> object:
    from prunelm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    ids = tokenizer.encode("turn on the red lamp")
    return tokenizer.decode(ids), tokenizer.vocab_size


def _lm(folder: Path, **extra: object) -> None:
    import torch

    from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
    from prunelm.training.checkpoint import save_model

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    config = LMConfig(tokenizer.vocab_size, 8, 4, (LayerSizes(2, 8), LayerSizes(1, 4)))
    save_model(folder, TransformerLM(config), tokenizer, extra)


def _recogniser(folder: Path) -> None:
    import torch

    from prunelm.models.lm import LayerSizes
    from prunelm.models.transducer import Transducer, TransducerConfig
    from prunelm.training.checkpoint import save_model

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    size = LayerSizes(1, 8)
    config = TransducerConfig(
        tokenizer.vocab_size, (size,), dim=8, head_dim=8, channels=2, predictor_dim=8, joiner_dim=8
    )
    save_model(folder, Transducer(config), tokenizer)


def _load_model(folder: Path) -> object:
    from prunelm.training.checkpoint import load_model

    return load_model(folder)


def _result(folder: Path) -> None:
    import torch

    from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
    from prunelm.pruning.result import Result, Round

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    model = TransformerLM(LMConfig(tokenizer.vocab_size, 8, 4, (LayerSizes(2, 8),)))
    masks = {name: torch.rand(p.shape) > 0.3 for name, p in model.named_parameters() if p.ndim == 2}
    rounds = (Round(900, 880, {"element": 20}, 0.1, 3.0, 3.2, 3.1, 9.0, 8.0, 10),)
    values = {"method": "Elements()"}
    Result(model, masks, "90%", 900, 880, 1000, rounds, values, 7.5).save(folder, tokenizer)


def _load_result(folder: Path) -> object:
    from prunelm.pruning.result import load_result

    return load_result(folder).report()


def _chosen(folder: Path) -> None:
    from prunelm.training.pretrained import ChosenSearch, write_chosen

    _lm(folder)
    weights = json.loads((folder / "model.json").read_text())["weights"]
    write_chosen(folder, [ChosenSearch("abc", weights, beam, 0.3, 0.5, 0.2, 9) for beam in (4, 8)])


def _load_chosen(folder: Path) -> object:
    from prunelm.training.pretrained import load_lm

    return load_lm(folder).chosen


def _journal(folder: Path) -> None:
    from prunelm.pruning.journal import Entry, Journal
    from prunelm.pruning.result import Round
    from prunelm.training.checkpoint import load_model

    _lm(folder.parent / "kept")
    model, _, _ = load_model(folder.parent / "kept")
    masks = {name: p > 0 for name, p in model.named_parameters() if p.ndim == 2}
    journal = Journal(folder)
    journal.claim(model, {"method": "Elements()"}, [900])
    record = Round(900, 880, {"element": 20}, 0.1, 3.0, 3.2, 3.1, 9.0, 8.0, 10)
    journal.write(0, Entry(record, 10, 7.5), model, masks, forget=False)


def _load_journal(folder: Path) -> object:
    from prunelm.pruning.journal import Journal
    from prunelm.training.checkpoint import load_model

    model, _, _ = load_model(folder.parent / "kept")
    journal = Journal(folder)
    journal.claim(model, {"method": "Elements()"}, [900])
    return journal.read(0), journal.weights(0, model)


def _state(folder: Path) -> None:
    import torch

    from prunelm.training.checkpoint import save_state

    save_state(
        folder / "training.pt", {"step": 3, "model": {"w": torch.ones(3, 4)}, "seed": [1, 2]}
    )


def _load_state(folder: Path) -> object:
    from prunelm.training.checkpoint import load_state

    return load_state(folder / "training.pt")


def _rows():  # type: ignore[no-untyped-def]
    from prunelm.study.results import DENSE, Row

    return [
        Row(DENSE, "", 1000, 20.0, 21.0, 0.2, 0.1, 0.3, 20, 100, 0.4, 2000.0, 1.5, 1.6, 1.5),
        Row("Heads, Taylor", "50%", 500, 25.0, settings={"a": 1}, seconds={"prune": 2.5}),
        Row("Heads, Taylor", "20%", 200, 35.0),
    ]


def _study(folder: Path) -> None:
    from prunelm.study.results import Results, open_study, save_results, write_row

    open_study(folder, "a study", {"language_model": "lm", "sizes": [1, 2]})
    for i, row in enumerate(_rows()):
        write_row(folder, f"row{i}", row)
    save_results(folder, Results("a study", {"x": 1}, {"cpu": "y"}, tuple(_rows())))


def _load_study(folder: Path) -> object:
    from prunelm.study.results import load_results, read_results

    found = [read_results(folder), load_results(folder / "results.json")]
    return [(row.name, row.speedup) for each in found for row in each.rows]


def _corpus(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import test_speech

        getattr(test_speech, kind)(folder)

    return make


def _load_corpus(kind: str, split: str) -> Callable[[Path], object]:
    def load(folder: Path) -> object:
        from prunelm.data.speech import load_corpus, read_audio, write_manifest

        found = load_corpus(kind, folder, split, "optional")
        (folder.parent / "kept").mkdir(exist_ok=True)
        with contextlib.suppress(ValueError):  # transcripts of some only
            write_manifest(folder.parent / "kept" / "copy.tsv", found)
        return [read_audio(each.audio_path) for each in found]

    return load


def _load_audio(folder: Path) -> object:
    from prunelm.data.manifest import Utterance
    from prunelm.data.speech_batches import FeatureCache, length_seconds
    from prunelm.models.features import LogMel

    utterance = Utterance("a", next(folder.iterdir()), "a")
    return length_seconds(utterance), FeatureCache(LogMel())(utterance)


def _load_text(folder: Path) -> object:
    from prunelm.data.coverage import unknown_characters
    from prunelm.data.lines import read_lines
    from prunelm.data.text import normalise
    from prunelm.data.tokenizer import Tokenizer

    lines = read_lines(next(folder.iterdir()))
    tokenizer = Tokenizer.train(LINES, 24, "char")
    return tokenizer.encode_lines(lines), str(unknown_characters(map(normalise, lines), tokenizer))


def _decoded(folder: Path) -> None:
    _recogniser(folder.parent / "kept")
    _tone(folder / "a.wav", 0.4)


def _decode(folder: Path) -> object:
    return _run(
        "decode", "--recogniser", str(folder.parent / "kept"), "--audio", str(folder / "a.wav")
    )


def _run(*words: str) -> int:
    from prunelm.cli import main

    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(words)
    lines = errors.getvalue().splitlines()
    assert code in (0, 1, 2), code
    # What a command says beside its results (settings, resampled audio) are lines, too.
    assert len(lines) <= 4 and all(line.strip() and line[0] != " " for line in lines), lines
    assert bool(code) == any(line.startswith("prunelm: error: ") for line in lines), lines
    return code


def _command(name: str, yaml: str) -> Loader:
    def make(folder: Path) -> None:
        kept = folder.parent / "kept"
        _lm(kept / "lm")
        text(kept / "text.txt")
        filled = yaml.replace("KEPT", str(kept))
        (folder / "config.yaml").write_text(filled)

    def load(folder: Path) -> object:
        return _run(name, "--config", str(folder / "config.yaml"))

    return Loader(make, load, named=False)


LOADERS = {
    "text": Loader(_text, _load_text),
    "packed": Loader(_packed, _load_text),
    "manifest": Loader(_corpus("manifest"), _load_corpus("manifest", "dev")),
    "an4": Loader(_corpus("an4"), _load_corpus("an4", "dev")),
    "ljspeech": Loader(_corpus("ljspeech"), _load_corpus("ljspeech", "all")),
    "librispeech": Loader(_corpus("librispeech"), _load_corpus("librispeech", "dev")),
    **{suffix: Loader(_audio(suffix), _load_audio) for suffix in ("wav", "flac", "ogg", "aiff")},
    "tokenizer": Loader(lambda folder: _tokenizer(folder) and None, _load_tokenizer),
    "token-ids": Loader(_token_ids, _load_token_ids),
    "lm": Loader(_lm, _load_model),
    "recogniser": Loader(_recogniser, _load_model),
    "result": Loader(_result, _load_result),
    "chosen": Loader(_chosen, _load_chosen),
    "journal": Loader(_journal, _load_journal),
    "state": Loader(_state, _load_state),
    "study": Loader(_study, _load_study),
    "plan": _command(
        "plan",
        "model: KEPT/lm\ntarget: 50%\n"
        "method:\n  class_path: Neurons\n  init_args:\n    min_keep: 2\n",
    ),
    "decode": Loader(_decoded, _decode),
    "evaluate": _command("evaluate", "lm: KEPT/lm\ntext: KEPT/text.txt\nbeam: 4\nthreads: 1\n"),
}


def broken(loader: Loader, folder: Path) -> str | None:
    """What is wrong with how a load ended; None if nothing is."""
    try:
        loader.load(folder)
    except (ValueError, OSError) as error:
        said = str(error)
        if not said.strip() or "\n" in said or len(said) > 1000:
            return f"{type(error).__name__} with another text than one line: {said[:300]!r}"
        if loader.named and str(folder) not in said:
            return f"{type(error).__name__} that does not name the file: {said!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    return None


def main(name: str, folder: Path, first: int, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    loader = LOADERS[name]
    files = folder / "files"
    files.mkdir(parents=True)
    loader.make(files)
    paths = sorted(path for path in files.rglob("*") if path.is_file())
    whole = broken(loader, files)
    if whole:
        print(f"{name}: unharmed files: {whole}")
    for i in range(first, first + count):
        draw = random.Random(f"{name} {i}")
        path = draw.choice(paths)
        data = path.read_bytes()
        (folder / "last").write_text(f"{i} {path.name}")
        path.write_bytes(mutate(data, draw))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found = broken(loader, files)
        faulthandler.cancel_dump_traceback_later()
        path.write_bytes(data)
        if found:
            print(f"{name} {i}, {path.name}: {found}", flush=True)
    print(json.dumps({"tried": count}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
