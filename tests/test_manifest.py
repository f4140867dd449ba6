"""Manifests as users write them: every cell that cannot be meant is named by file and line."""

import math
from pathlib import Path

import pytest

from prunelm.data.manifest import Utterance, read_manifest, write_manifest

HEAD = "id\tpath\ttext"


def saved(folder: Path, *lines: str) -> Path:
    path = folder / "dev.tsv"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


REFUSED = {
    "nothing": ([], "dev.tsv: expected the columns id, path and text, got an empty file"),
    "columns": (["id\tpath", "a\tb"], "line 1: expected the columns id, path and text, got id, p"),
    "no-header": (["a\tb\tc"], "line 1: expected the columns id, path and text, got a, b, c"),
    "commas": (["id,path,text", "a,b,c"], "line 1: expected tabs between columns, found commas; "),
    "semicolons": (["id;path;text"], "line 1: expected tabs between columns, found semicolons; "),
    "repeated": (["id\tpath\ttext\tText"], "line 1: expected one column text, got 2"),
    "more": ([HEAD, "a\tb\tc\td"], "line 2: expected 3 columns, got 4"),
    "fewer": ([HEAD, "a\tb"], "line 2: expected 3 columns, got 2"),
    "blank-lines-count": ([HEAD, "", "a\tb\tc", "\t\t", "d\te"], "line 5: expected 3 columns"),
    "twice": ([HEAD, "a\tb\tc", "a\tb\tc"], "line 3: expected a new id, got a again"),
    "twice-but-for-spaces": ([HEAD, "a\tb\tc", " a \tb\tc"], "line 3: expected a new id, got a"),
    "no-id": ([HEAD, "\tb\tc"], "line 2: expected an id, got none"),
    "line-in-id": (
        [HEAD, "a\u2028x\tb\tc"],
        r"line 2: expected an id .*got a\\u2028x",
    ),
    "no-path": ([HEAD, "a\t \tc"], "line 2: expected a path, got an empty cell"),
    "no-text": ([HEAD, "a\tb\t "], "line 2: expected a transcript of a, got none"),
    "nul": ([HEAD, "a\tb\tc\0"], "line 2: expected text, got a NUL character"),
}
SECONDS = ["long", "inf", "nan", "-1", "1e300", "1,5"]


@pytest.mark.parametrize(("lines", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_cannot_be_meant_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = saved(tmp_path, *lines)
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seconds", SECONDS)
def test_seconds_are_a_length(tmp_path: Path, seconds: str) -> None:
    path = saved(tmp_path, HEAD + "\tseconds", f"a\tb\tc\t{seconds}")
    message = f"line 2: expected seconds as a number from 0 to 10,000,000, got '{seconds}'"
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_messages_stay_short(tmp_path: Path) -> None:
    for row in ("a\tb\tc\t" + "9" * 200_000, "x" * 200_000 + "\x07\tb\tc\t1"):
        with pytest.raises(ValueError, match="line 2: expected ") as caught:
            read_manifest(saved(tmp_path, HEAD + "\tseconds", row))
        assert len(str(caught.value)) <= 500


def test_headers_paths_and_quotes_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    rows = [
        'a\tx/a.wav\tsay "go" \t1.5\tjoe',
        'b\t/y/b.wav\t"all of it"\t\t',
        "c\t~/c.wav\td e\t0\t",
    ]
    text = "\ufeff" + "\r\n".join([" ID \tPath\tTEXT\tSeconds\tSpeaker", *rows])
    path.write_text(text, encoding="utf-8", newline="")
    assert read_manifest(path) == [
        Utterance("a", tmp_path / "x/a.wav", 'say "go"', 1.5, "joe"),
        Utterance("b", Path("/y/b.wav"), '"all of it"'),
        Utterance("c", Path.home() / "c.wav", "d e", 0.0),
    ]
    path = saved(tmp_path, HEAD, "a\t~nobody-here/a.wav\tb")
    assert read_manifest(path)[0].audio_path == tmp_path / "~nobody-here/a.wav"


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    text = "word " * 40_000
    assert read_manifest(saved(tmp_path, HEAD, f"a\tb\t{text}"))[0].text == text.strip()


def test_which_transcripts_there_must_be(tmp_path: Path) -> None:
    path = saved(tmp_path, HEAD, "a\tb\tc", "d\te\t")
    for transcripts in ("allow_empty", "optional"):
        assert [each.text for each in read_manifest(path, transcripts)] == ["c", ""]
    path = saved(tmp_path, "path\tid\tmood", "b\ta\tsad")
    assert read_manifest(path, "optional") == [Utterance("a", tmp_path / "b", None)]
    for transcripts in ("required", "allow_empty"):
        with pytest.raises(ValueError, match="line 1: expected the columns id, path and text, got"):
            read_manifest(path, transcripts)
    with pytest.raises(ValueError, match="line 1: expected the columns id and path, got text"):
        read_manifest(saved(tmp_path, "text", "b"), "optional")


@pytest.mark.parametrize("transcript", ["two words", "", None])
def test_manifests_are_written_as_they_are_read(tmp_path: Path, transcript: str | None) -> None:
    before = [
        Utterance("a", tmp_path / "x" / "a.wav", transcript, 0.25, "joe"),
        Utterance("b", tmp_path / "b.wav", transcript),
    ]
    write_manifest(tmp_path / "other" / "copy.tsv", before)
    assert read_manifest(tmp_path / "other" / "copy.tsv", "optional") == before


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    for utterance, message in (
        (Utterance("a", audio, "b\tc"), "expected the text of a without tabs, .* got b.tc"),
        (Utterance("a", audio, "b\r"), "expected the text of a without tabs"),
        (Utterance("a", audio, "b", None, "x\ny"), "expected the speaker of a without tabs"),
        (Utterance("a", tmp_path / "a\tb.wav", "b"), "expected the path of a without tabs"),
        (Utterance("a", tmp_path / "\udcff.wav", "b"), "expected the path of a without .*surrog"),
        (Utterance("a\n", audio, "b"), "expected an id of printable characters"),
        (Utterance("", audio, "b"), "expected an id, got none"),
        (Utterance("x", audio, "b"), "expected a new id, got x again"),
        (Utterance("a", audio, "b", math.inf), "a: expected seconds as a number from 0 to"),
        (Utterance("a", audio, None), "expected transcripts for all or for none, got none of a"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            write_manifest(tmp_path / "out.tsv", [Utterance("x", audio, "b"), utterance])
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
