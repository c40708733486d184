"""mask.json: a mask or a plan with its draft policy, evidence and provenance.

Version 1 holds a mask. Version 2 adds forms of a plan, and is written only where there are some.
"""

from __future__ import annotations

import datetime
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from skipsearch.errors import MaskError, first_line, shown
from skipsearch.files import checksum, write_json
from skipsearch.mask import SkipMask
from skipsearch.plan import QUANTISED, DraftPlan, HeadForm, ids_of, ranges_of
from skipsearch.policy import DraftPolicy

FORMAT: Final = "skipsearch-mask"
VERSIONS: Final = (1, 2)
SUM: Final = "checksum"  # of the rest of a file; derived, like the field beside it
DERIVED: Final = {"per_layer_config", SUM}
NEWER: Final = {"quantise", "head", "quantised_bytes"}  # than version 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class ModelCard(_Part):
    """Which model a mask is for; `config_sha256` covers the fields that decide its layers."""

    id: str = "unknown"
    revision: str | None = None
    architecture: str = "unknown"
    num_layers: StrictInt  # true and "3" are refused
    config_sha256: str | None = None


class SkipSets(_Part):
    """Skipped layers by kind of sublayer. No defaults: a misspelt key must not give an empty mask."""

    attention: list[StrictInt]
    mlp: list[StrictInt]


class QuantisedSets(BaseModel):
    """The sublayers of each quantised form; a form that this version does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    int8: SkipSets = SkipSets(attention=[], mlp=[])
    int4: SkipSets = SkipSets(attention=[], mlp=[])


class HeadPart(BaseModel):
    """The draft's head; `ids` are the tokens to choose from as ranges, "0-255 300 512-600", None: all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: HeadForm = "full"
    ids: str | None = None


class Evidence(_Part):
    """What `validate` measured; None in the file of a mask that was never validated.

    Attributes:
        speedup, tokens_per_second, verdict: of the mask and its exit rule alone.
        greedy_equal: None where `decoding`, how tokens were chosen, is sampling at `temperature`.
        served_speedup: of the file's whole policy, with n-grams and fallback to plain steps.
        joules_per_token: prefill included; None where `energy_reason` says why it is not known.
    """

    acceptance_rate: float
    tau: float
    cost_ratio: float
    speedup: float
    speedup_ci: tuple[float, float]
    baseline: str
    tokens_per_second: float
    baseline_tokens_per_second: float
    greedy_equal: bool | None
    backend: str
    dtype: str
    device: str
    prompts: int
    tokens: int
    prompts_sha256: str
    verdict: Literal["use", "do not use"]
    temperature: float | None = None
    decoding: str | None = None
    served_speedup: float | None = None
    served_speedup_ci: tuple[float, float] | None = None
    joules_per_token: float | None = None
    baseline_joules_per_token: float | None = None
    energy_reason: str | None = None


class Provenance(_Part):
    """Where a mask comes from."""

    tool_version: str = Field(default_factory=lambda: version("skipsearch"))
    torch: str | None = None
    transformers: str | None = None
    study: str | None = None
    trial: int | None = None
    seed: int | None = None
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    )


class MaskFile(_Part):
    """The contents of a mask file, checked; the attributes are the file's fields."""

    format: Literal["skipsearch-mask"] = FORMAT
    version: Literal[1, 2] = 1
    model: ModelCard
    skip: SkipSets
    quantise: QuantisedSets | None = None
    head: HeadPart | None = None
    quantised_bytes: StrictInt | None = None
    draft: DraftPolicy = DraftPolicy()
    evidence: Evidence | None = None
    provenance: Provenance = Field(default_factory=Provenance)

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in DERIVED} if isinstance(data, dict) else data

    @property
    def mask(self) -> SkipMask:
        """`skip` and `model.num_layers` as one value."""
        return SkipMask(attention=self.skip.attention, mlp=self.skip.mlp, num_layers=self.model.num_layers)

    @property
    def plan(self) -> DraftPlan:
        """The forms of all sublayers and of the head; of a version 1 file, those of its mask."""
        layers, sets, head = self.model.num_layers, self.quantise or QuantisedSets(), self.head or HeadPart()
        of = {form: getattr(sets, form) for form in QUANTISED}
        masks = {form: SkipMask(attention=of[form].attention, mlp=of[form].mlp, num_layers=layers) for form in of}
        return DraftPlan(self.mask, **masks, head=head.form, head_ids=None if head.ids is None else ids_of(head.ids))

    @property
    def drafting_plan(self) -> DraftPlan | None:
        """The plan that drafts; None in a file that serves n-grams alone, which drafts with the full model."""
        plan = self.plan
        return plan if plan.drafts or not self.draft.ngram else None

    @classmethod
    def of(cls, plan: SkipMask | DraftPlan, *, model: ModelCard, **parts: Any) -> MaskFile:
        """A mask or plan as a file for this model; `parts` are the other fields."""
        plan = DraftPlan.of(plan)
        sets = {
            form: SkipSets(attention=sorted(getattr(plan, form).attention), mlp=sorted(getattr(plan, form).mlp))
            for form in ("skip", *QUANTISED)
        }
        if not plan.only_skips:
            quantise = QuantisedSets(**{form: sets[form] for form in QUANTISED})
            head = HeadPart(form=plan.head, ids=None if plan.head_ids is None else ranges_of(plan.head_ids))
            parts = {"version": 2, "quantise": quantise, "head": head, **parts}
        return cls(model=model, skip=sets["skip"], **parts)

    def save(self, path: str | Path) -> None:
        """Write atomically, with a checksum; `per_layer_config` repeats `skip` in the words of transformers.

        Raises:
            ResultsError: the folder cannot be written to.
        """
        data = self._document()
        write_json(Path(path), {**data, SUM: checksum(data)})

    def _document(self) -> dict[str, Any]:
        data = self.model_dump(mode="json")
        data["draft"] = {k: v for k, v in data["draft"].items() if v or k in ("max_length", "exit_threshold")}
        if data["evidence"] is not None:
            optional = {name for name, field in Evidence.model_fields.items() if not field.is_required()}
            data["evidence"] = {k: v for k, v in data["evidence"].items() if v is not None or k not in optional}
        data["per_layer_config"] = self.mask.to_per_layer_config()
        if self.version == 1:
            data = {name: value for name, value in data.items() if name not in NEWER}
        return data


def read_json(path: Path, mend: str = "make one with `skipsearch run`") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise MaskError(f"mask file {path} does not exist; {mend}") from None
    except json.JSONDecodeError as error:
        raise MaskError(
            f"mask file {path} is not whole JSON (line {error.lineno}: {error.msg}); export it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of 4,300 digits
        raise MaskError(f"mask file {path} cannot be read ({error}); check the path and its permissions") from error


def parse_mask(data: Any, source: str = "mask") -> MaskFile:
    """Check parsed JSON.

    Raises:
        MaskError: names the first wrong field, its value and what to do.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise MaskError(
            f"{source}: format is {shown(got)}, must be {FORMAT!r}; convert other skip sets with `skipsearch import`"
        )
    if SUM in data and data[SUM] != _checksum_of(data):
        raise MaskError(
            f"{source}: its content is not that of its checksum, it was changed after it was written; export it "
            f"again, or delete the field {SUM} if the change was on purpose"
        )
    version = data.get("version")
    if isinstance(version, bool) or version not in VERSIONS:
        raise MaskError(f"{source}: version is {shown(version)}, must be 1 or 2; update skipsearch for later ones")
    if version == 1 and (newer := sorted(data.keys() & NEWER)):
        raise MaskError(f"{source}: {newer[0]} goes with version 2, and version is 1; correct the version")
    try:
        file = MaskFile.model_validate(data)
        _ = file.plan, file._document(), checksum(data)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of DraftPolicy, which names the field itself
            raise MaskError(f"{source}: {first['ctx']['error']}") from None
        field = shown(".".join(str(part) for part in first["loc"]) or "file")[1:-1]  # a key may hold a newline
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise MaskError(f"{source}: {field}: {first['msg'].lower()}{got}; export the mask again") from None
    except MaskError as error:
        raise MaskError(f"{source}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:  # of fields that this version does not know
        raise MaskError(f"{source}: a field cannot be written again ({first_line(error)}); remove it") from None
    return file


def _checksum_of(data: dict[str, Any]) -> str | None:
    with suppress(ValueError, TypeError, RecursionError):
        return checksum({name: value for name, value in data.items() if name != SUM})
    return None


def load_mask(path: str | Path) -> MaskFile:
    """Read and check a mask file.

    Raises:
        MaskError: the file is missing, truncated, of another format or version, or inconsistent.
    """
    return parse_mask(read_json(Path(path)), str(path))
