import time

import pytest
import torch

from prunelm.metrics.speed import interleaved, latency
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM


def test_calls_take_turns_in_both_orders() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = interleaved(calls, runs=3, warmup=1)
    assert "".join(order) == "abccbaabccba"
    assert list(result) == ["a", "b", "c"]
    assert {times.runs for times in result.values()} == {3}


def test_times_are_milliseconds() -> None:
    result = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.02)}, runs=5)
    assert 20 <= result["long"].low_ms <= result["long"].median_ms <= result["long"].high_ms
    assert result["short"].median_ms <= 0.5 * result["long"].median_ms


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    interleaved({"x": lambda: seen.append(torch.get_num_threads())}, threads=1, runs=2)
    assert set(seen) == {1}

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        interleaved({"x": fail}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_larger_model_takes_longer() -> None:
    small = TransformerLM(LMConfig(30, 16, 8, (LayerSizes(1, 8),)))
    large = TransformerLM(LMConfig(30, 256, 64, (LayerSizes(4, 1024),) * 4))
    large.eval()
    result = latency({"small": small, "large": large}, rows=32, context=16, runs=5)
    assert 0 < result["small"].median_ms < result["large"].median_ms
    assert small.training
    assert not large.training


def test_models_without_attention_are_timed_too() -> None:
    model = TransformerLM(LMConfig(30, 16, 8, (LayerSizes(0, 8), LayerSizes(0, 0))))
    assert latency({"x": model}, rows=1, context=1, runs=1)["x"].runs == 1


def test_bad_sizes_are_refused() -> None:
    model = TransformerLM(LMConfig.preset("tiny", 5))
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        latency({"x": model}, rows=0)
    with pytest.raises(ValueError, match="context: expected at least 1, got 0"):
        latency({"x": model}, context=0)
    with pytest.raises(ValueError, match="runs: expected at least 1, got 0"):
        latency({"x": model}, runs=0)
