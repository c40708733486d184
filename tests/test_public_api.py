"""The public surface, which others script against: names, parameters, commands and their options."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import typer

import skipsearch
from skipsearch.cli import app

PARAMETERS = {
    "draft_view": "model plan",
    "load_mask": "path",
    "load_model": "name dtype device revision trust_remote_code",
    "self_speculative": "mask_or_path streamer max_length exit_threshold adaptive ngram never_slower deterministic "
    "backend start share seed decoding beam_width threshold draft_model",
}
ATTRIBUTES = {
    "SkipMask": "attention mlp num_layers from_bits from_sublayers bits sublayers skips to_dict to_per_layer_config",
    "DraftPlan": "skip int8 int4 head head_ids of from_forms in_form everywhere num_layers only_skips quantises drafts "
    "form forms of_form to_dict",
    "MaskFile": "model mask plan drafting_plan quantised_bytes draft evidence provenance of save",
    "SearchResult": "plan mask file predicted standard_error scored_tokens front measured folder trials seconds "
    "cut_short",
}
MODEL = "model dtype device revision trust_remote_code"
PROMPTS = "prompts prompt_column prompt_config prompt_split chat num_prompts num_held_out prompt_tokens new_tokens"
COMMANDS = {
    "run": f"{MODEL} {PROMPTS} trials time_budget sampler pareto space context temperature memory rounds seed backend "
    "out storage study workers",
    "worker": f"{MODEL} storage study time_budget memory",
    "generate": f"{MODEL} mask on_the_fly decoding beam_width threshold draft_model share save prompt chat "
    "max_new_tokens temperature top_k top_p compare explain backend seed",
    "validate": f"mask {MODEL} {PROMPTS} rounds seed backend temperature context write audit",
    "bench": f"{MODEL} mask prompts per_group arm hf new_tokens rounds temperature backend seed out",
    "doctor": f"{MODEL} calibrate backend seed",
    "export": f"mask {MODEL} to out",
    "show": "mask",
    "report": "results out",
    "import": "source layers to key model_id",
    "models": "families",
    "dashboard": "results storage host port",
}


def option_names(command: Any) -> set[str]:
    """What users type, without dashes; arguments by their name."""
    found = set()
    for parameter in command.params:
        long = [name for name in parameter.opts if name.startswith("--")]
        found.add((long[0] if long else parameter.name).lstrip("-").replace("-", "_"))
    return found


def test_public_names() -> None:
    """Prevents a name that scripts import from going away, or an internal one from becoming public."""
    assert set(skipsearch.__all__) == {*PARAMETERS, *ATTRIBUTES, "search"}
    assert set(skipsearch.__all__) <= set(dir(skipsearch))  # offered before they are imported
    assert all(getattr(skipsearch, name) is not None for name in skipsearch.__all__)


@pytest.mark.parametrize("name", PARAMETERS)
def test_public_functions_take_what_they_took(name: str) -> None:
    """Prevents a parameter from being renamed or dropped."""
    assert list(inspect.signature(getattr(skipsearch, name)).parameters) == PARAMETERS[name].split()


def test_search_takes_what_it_took() -> None:
    """Prevents the same for the function that shares its name with a package."""
    from skipsearch.search.run import search

    wanted = ["model", "tokenizer", "prompts", "out", "options", "progress", "report"]
    assert list(inspect.signature(search).parameters) == wanted and callable(skipsearch.search)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_public_values_have_what_they_had(name: str) -> None:
    """Prevents a field or method of a public value from going away."""
    value = getattr(skipsearch, name)
    fields = {*dir(value), *getattr(value, "model_fields", {}), *getattr(value, "__dataclass_fields__", {})}
    assert set(ATTRIBUTES[name].split()) <= fields


def test_a_method_and_what_was_loaded_have_what_they_had(demo: Any) -> None:
    """Prevents scripts that read a method's counts, or a loaded model's tokenizer, from breaking."""
    method = skipsearch.self_speculative(None)
    assert all(hasattr(method, name) for name in ("plan", "policy", "deterministic", "backend", "stats", "joint"))
    assert list(inspect.signature(method.warm_up).parameters) == ["model", "progress"]
    assert next(iter(inspect.signature(method.tuner_for).parameters)) == "model"
    method.policy = replace(method.policy, max_length=3)  # scripts set it
    assert all(hasattr(demo, name) for name in ("name", "model", "tokenizer", "preset"))


def test_commands_and_options() -> None:
    """Prevents an option that scripts pass from being renamed or dropped."""
    commands: Any = typer.main.get_command(app)
    assert set(commands.commands) == set(COMMANDS)
    for name, command in commands.commands.items():
        wanted = {*COMMANDS[name].split(), "debug", *({"json"} if name != "dashboard" else ())}
        assert option_names(command) - {"help"} == wanted, name
