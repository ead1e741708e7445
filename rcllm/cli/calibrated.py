"""Which reuse levels a command may use: finds the calibration, and says in one line what follows from it.

Knows nothing of how engines work. Invariant: without a calibration that belongs to the model and template at hand, no
approximate level is used unless that is asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from rcllm.cli.options import FidelityOptions
from rcllm.cli.screen import say
from rcllm.config import Config
from rcllm.engine.engine import Engine
from rcllm.engine.space import declared_mask
from rcllm.errors import DataError
from rcllm.fidelity.calibration import Calibrated, Calibration
from rcllm.schedule.admission import Admission, AdmissionFactory, Identity

FILE = Path("fidelity.json")


def admission_from(options: FidelityOptions) -> AdmissionFactory:
    """A file that is named must belong to the engine (ConfigError); one that lies in this folder may not."""

    def make(identity: Identity, context: str) -> Admission:
        calibration = _find(options.fidelity, identity)
        return Calibrated.of(calibration, identity, context, allow_uncalibrated=options.allow_uncalibrated)

    return make


def _find(path: Path | None, identity: Identity) -> Calibration | None:
    if path is not None:
        return Calibration.load(path)
    if not FILE.is_file():
        return None
    try:
        found = Calibration.load(FILE)
    except DataError as error:  # nobody asked for it
        say(f"{error}. It is not used")
        return None
    if differences := identity.differences(found.identity):
        say(f"{FILE} is not used: it was measured for something else; here there is {'; '.join(differences)}")
        return None
    return found


def check_level_of(config: Config, options: FidelityOptions) -> None:
    """Before a model is loaded, what `check_level` raises where nothing was calibrated. Raises UncalibratedError."""
    if options.fidelity is None and not FILE.is_file():
        mask = declared_mask(config).model.mask
        assert mask != "auto", "it is resolved by declared_mask"
        anything = Identity("", "", "", "", "", "", mask)
        admission_from(options)(anything, config.prompt.context).admit(config.rank)


def check_level(engine: Engine) -> None:
    """Says what level `auto` comes to by default. Raises UncalibratedError where the default level is refused."""
    asked = engine.config.rank
    admitted = engine.admission.admit(asked)
    if asked.level.name == "auto":
        say("; ".join(admitted.notes), "dim")
