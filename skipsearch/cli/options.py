"""What the commands share: the application, options used by several commands, and printing of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from skipsearch.cli.help import Command, Commands

if TYPE_CHECKING:
    from collections.abc import Callable

    from skipsearch.model.load import Loaded
    from skipsearch.search.options import SearchOptions

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None)
out = Console()
err = Console(stderr=True)

Model = Annotated[
    str, typer.Option("--model", "-m", help="preset (see `skipsearch models`), hub id, local folder or .gguf file")
]
ModelOfMask = Annotated[
    str | None,
    typer.Option("--model", "-m", help="preset, hub id, folder or .gguf file (default: the mask's own preset)"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or map to spread over all devices")]
Revision = Annotated[str | None, typer.Option(help="hub revision")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run model code from the hub")]
PromptsFrom = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="builtin:code, builtin:chat, builtin (the one that fits), a .txt/.jsonl/.csv/.parquet file, data set id",
    ),
]
Column = Annotated[str | None, typer.Option("--prompt-column", help="column that holds the prompts")]
Config = Annotated[str | None, typer.Option("--prompt-config", help="configuration of the data set")]
Split = Annotated[str, typer.Option("--prompt-split", help="split of the data set")]
Chat = Annotated[bool, typer.Option(help="use the model's chat template, if it has one")]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="cut each prompt to this many tokens")]
NewTokens = Annotated[int, typer.Option(min=2, help="tokens to decode from each prompt")]
Calibration = Annotated[
    int, typer.Option("--num-prompts", min=2, help="calibration prompts: used by the search, never for validation")
]
HeldOut = Annotated[int, typer.Option("--num-held-out", min=2, help="held-out prompts: used for validation alone")]
Contexts = Annotated[
    list[int] | None,
    typer.Option(min=1, help="context length to serve (default: as the prompts); may be repeated"),
]
Rounds = Annotated[int, typer.Option(min=1, help="repetitions of each timing")]
Backend = Literal["auto", "eager", "compiled"]
Backends = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="what runs the forward passes; auto: compiled if possible (generate: as the mask was tuned, else eager)",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="of sampling; 0: greedy (default: as the model's generation config says)"),
]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="seed of the random numbers")]
Memory = Annotated[float | None, typer.Option(min=0.001, help="GB that replay may use (default: what fits)")]
StudyName = Annotated[str, typer.Option("--study", help="name of the study")]
Folder = Annotated[Path | None, typer.Option("--out", help="results folder (default results/<model>)")]


def command(example: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: a command of the application, with the example that ends its --help."""
    return app.command(name, cls=Command, epilog=f"skipsearch {example}")


def load(name: str, dtype: str, device: str, revision: str | None, trust: bool) -> Loaded:
    """Load the model of this name; shows a spinner meanwhile."""
    with err.status(f"loading {escape(name)}"):
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        from skipsearch.model.load import load_model

        shown = err.is_terminal and not are_progress_bars_disabled()
        disable_progress_bar()  # of weights that are read, in a second; it switches those of downloads off as well
        if shown:
            enable_progress_bars()
        return load_model(name, dtype=dtype, device=device, revision=revision, trust_remote_code=trust)


def search_options(
    source: str, column: str | None, config: str | None, split: str, chat: bool, **settings: Any
) -> SearchOptions:
    """Settings of a search with this prompt source; `settings` are the other fields of `SearchOptions`.

    Raises:
        PromptError: there is no such file.
    """
    from skipsearch.evaluate.prompts import PromptSource, check_source
    from skipsearch.search.options import SearchOptions

    check_source(source)
    prompts = PromptSource(name=source, column=column, config=config, split=split, chat=chat)
    return SearchOptions(source=prompts, **settings)


def print_result(data: dict[str, Any], as_json: bool, *shown: Any) -> None:
    """Print `data` as one JSON object, or else what people read: tables and lines."""
    if as_json:
        print(json.dumps(data))
    else:
        for part in shown:
            out.print(part, markup=False, soft_wrap=isinstance(part, str))
