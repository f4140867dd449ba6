"""Trains the demo's tokenizer and language model on a text file.

python recipes/demo/train_lm.py --text train.txt.gz --valid valid.txt.gz --out runs/demo_lm
"""

import argparse
from pathlib import Path

import torch
from make_text import normalised
from torch import Tensor, nn

from prunelm.data.text import TokenBatches, read_lines, write_token_ids
from prunelm.data.tokenizer import Tokenizer
from prunelm.metrics.perplexity import perplexity
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.training.loop import TrainOptions, train


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    assert isinstance(model, TransformerLM)
    return model.loss(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=250)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)

    lines, valid = normalised(read_lines(options.text)), normalised(read_lines(options.valid))
    tokenizer = Tokenizer.train(lines, options.vocab_size)
    tokenizer.save(options.out / "tokenizer.model")
    write_token_ids(lines, tokenizer, options.out / "train.bin")
    batches = TokenBatches(
        options.out / "train.bin", tokenizer, options.batch, options.length, seed=1
    )
    config = LMConfig(
        vocab_size=tokenizer.vocab_size,
        dim=192,
        head_dim=32,
        layers=(LayerSizes(6, 768),) * 5,
        dropout=options.dropout,
    )
    model = TransformerLM(config)
    print(f"{config.parameter_count} parameters, {batches.windows // options.batch} steps an epoch")
    history = train(
        model,
        batches,
        loss,
        TrainOptions(
            steps=options.steps,
            lr=options.lr,
            warmup=100,
            final_lr_fraction=0.02,
            weight_decay=0.05,
            bf16=options.bf16,
            seed=1,
            validate_every=400,
            checkpoint_every=200,
        ),
        folder=options.out,
        validate=lambda model: perplexity(model, valid[:600], tokenizer).per_word,
        tokenizer=tokenizer,
        describe="demo LM",
    )
    print(f"valid perplexity per word {history.best:.1f} at step {history.best_step}")


if __name__ == "__main__":
    main()
