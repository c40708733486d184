"""How --help looks: options and commands in groups, an example under each command; plain text, of any width."""

from __future__ import annotations

import json
import sys
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Long options by group, in the order of --help. What stands nowhere is under "Options", above them.
GROUPS = {
    "Model and machine": "model dtype device revision trust-remote-code backend",
    "What to search": "space sampler pareto",
    "What to measure on": "prompts prompt-column prompt-config prompt-split chat num-prompts num-held-out per-group "
    "prompt-tokens new-tokens context temperature seed",
    "Budgets": "trials time-budget rounds memory workers",
    "Output": "out to write save compare explain storage study json debug help",
}
# Where an option has another part, by command.
OWN = {
    "generate": {
        "What to continue": "prompt chat max-new-tokens temperature top-k top-p seed",
        "What drafts": "mask on-the-fly share decoding beam-width threshold draft-model",
    },
    "bench": {"What to time": "mask arm hf"},
    "worker": {"What to join": "storage study"},
    "dashboard": {"Options": "storage host port"},
}
COMMANDS = {
    "Find a mask": "run worker",
    "Use it, and prove it": "generate validate bench",
    "Read and convert": "show report dashboard import export",
    "Models and this machine": "models doctor",
}


class Command(TyperCommand):
    """A command whose options are shown in groups, and whose epilog is an example."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, options of no group, and the groups."""
        groups = {**OWN.get(self.name or "", {}), **GROUPS}
        rows: dict[str, list[Any]] = {title: [] for title in ("Arguments", "Options", *groups)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            names = {name.lstrip("-") for name in param.opts}
            title = next((title for title, listed in groups.items() if names & set(listed.split())), "Options")
            if record is not None:
                rows["Arguments" if param.param_type_name == "argument" else title].append(record)
        _write(formatter, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example, on one line however narrow the terminal: it is there to be copied."""
        if self.epilog:
            with formatter.section("Example"):
                formatter.write(f"  {self.epilog}\n")


class Commands(TyperGroup):
    """The commands, shown in groups; with --json, wrong use is told on stdout too."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The commands first, with the whole first sentence of each."""
        rows = {
            title: [(name, self.commands[name].get_short_help_str(200)) for name in names.split()]
            for title, names in COMMANDS.items()
        }
        own = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx)) is not None]
        _write(formatter, {**rows, "Options": own})

    def invoke(self, ctx: Any) -> Any:
        """Run what was asked for."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "format_message"):  # of the library: wrong use, which it prints on stderr
                tell_as_json(error.format_message())
            raise


def tell_as_json(error: str) -> None:
    """With --json, print the error as the one object on stdout."""
    if "--json" in sys.argv:
        print(json.dumps({"error": error}))


def _write(formatter: Any, rows: dict[str, list[Any]]) -> None:
    for title, records in rows.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)
