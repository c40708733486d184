"""What comes back beside the tokens: scores, logits and streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_calls import MASK, run
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from skipsearch import self_speculative
from skipsearch.errors import DecodingError


class AsksForScores(StoppingCriteria):
    """Looks at what `output_scores` collects, as plain generate hands it over."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([len(scores) >= 6 and bool(scores[-1].isfinite().all())] * len(input_ids))


@pytest.mark.filterwarnings("ignore:decoding plainly")
@pytest.mark.parametrize("rows", [1, 3])
def test_returned_scores_and_logits_are_the_targets(rows: int, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents draft scores from being handed out, a row too many, or scores a criterion cannot see."""
    model = tiny("llama")
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
                               "repetition_penalty": 1.2, "stopping_criteria": [AsksForScores()]}  # fmt: skip
    ours = run(model, batch[:rows], custom_generate=self_speculative(MASK), **options)
    plain = run(model, batch[:rows], **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == 6
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(plain[name]), atol=1e-4, rtol=1e-4)


def test_scores_of_ended_rows_are_zeros(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents rows of uneven length from shifting the scores of others."""
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": [5, 9, 17, 33]}
    model = tiny("mistral")
    ours, plain = (
        run(model, batch, **options, **method) for method in ({"custom_generate": self_speculative(MASK)}, {})
    )
    assert torch.equal(ours.sequences, plain.sequences) and len(ours.scores) == len(plain.scores)
    for step, (mine, theirs) in enumerate(zip(ours.scores, plain.scores, strict=True)):
        for row in range(3):
            ended = step > 0 and int(ours.sequences[row, 10 + step]) in (0, 5, 9, 17, 33)
            wanted = torch.zeros(97) if ended else theirs[row]
            torch.testing.assert_close(mine[row], wanted, atol=1e-4, rtol=1e-4)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token_once(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents lost, doubled or rejected tokens in a stream, whichever way the streamer comes."""
    given, own = Collect(), Collect()
    out = run(tiny("llama"), batch[:1], streamer=given, custom_generate=self_speculative(MASK))
    assert given.tokens == out[0].tolist() and given.ended
    run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK, streamer=own))
    assert own.tokens == out[0, batch.shape[1] :].tolist() and own.ended
    with pytest.raises(DecodingError, match="streamer takes one sequence"):
        run(tiny("llama"), batch, streamer=Collect(), custom_generate=self_speculative(MASK))
