"""A folder laid out like prunelm/demo, with untrained models and noise for speech."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.training.checkpoint import save_model

LINES = [f"{a} the {b} {c}" for a in ("turn on", "dim", "close") for b in ("red", "big", "old")
         for c in ("door", "lamp", "fan")]  # fmt: skip


def write_bed(folder: Path) -> None:
    """Writes lm/, recogniser/, and test, valid and recovery data."""
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(LINES, 24, "char")
    config = LMConfig(tokenizer.vocab_size, 32, 16, (LayerSizes(2, 64),) * 2)
    lm = TransformerLM(config)
    for parameter in lm.parameters():  # logits that differ enough for fusion to matter
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(folder / "lm", lm, tokenizer)
    small = TransducerConfig(
        tokenizer.vocab_size, (LayerSizes(2, 16),), dim=16, head_dim=8, channels=4,
        predictor_dim=16, joiner_dim=16,
    )  # fmt: skip
    recogniser = Transducer(small)
    torch.nn.init.zeros_(recogniser.join_out.bias)
    save_model(folder / "recogniser", recogniser, tokenizer)
    generator = np.random.default_rng(1)
    for split, count in (("test", 5), ("valid", 2)):
        rows = ["id\tpath\ttext"]
        for i in range(count):
            audio = 0.1 * generator.standard_normal(4000 + 1111 * i)
            soundfile.write(folder / f"{split}{i}.wav", audio, 16000)
            rows.append(f"{split}-{i}\t{split}{i}.wav\t{LINES[3 * i]}")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "valid.txt").write_text("\n".join(LINES[::5]) + "\n")
    (folder / "test.txt").write_text("\n".join(LINES[1::5]) + "\n")
    (folder / "recovery.txt").write_text("\n".join(LINES * 4) + "\n")
