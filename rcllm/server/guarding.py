"""The fidelity guard of a server: whether there is one, and along which ladder.

Knows nothing of HTTP. Invariant: there is a guard only where a calibration allows a level whose answers may differ from
those of a full prefill.
"""

from __future__ import annotations

from dataclasses import replace

from rcllm.config import ServerConfig
from rcllm.engine.engine import Engine
from rcllm.fidelity.calibration import Calibrated
from rcllm.fidelity.monitor import GuardPolicy
from rcllm.fidelity.online import OnlineGuard
from rcllm.fidelity.shadow import Shadowing
from rcllm.schedule.admission import is_exact


def guard_of(engine: Engine, config: ServerConfig) -> OnlineGuard | None:
    """The guard of an engine's rankings, which stands in front of its admission from then on; None: nothing to guard.

    Its ladder is what the calibration passes for the default options, up to `exact`.
    """
    admission, options = engine.admission, engine.config.rank
    if not config.guard_share or not isinstance(admission, Calibrated):
        return None
    ladder = admission.ladder(options)
    if len(ladder) < 2 or is_exact(replace(options, level=ladder[0]), engine.identity.mask):
        return None
    return OnlineGuard(engine, GuardPolicy(ladder), Shadowing(config.guard_share, config.guard_cpu_share))
