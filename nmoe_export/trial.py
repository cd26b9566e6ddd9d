"""A reduced fleet measured against the float fleet.

All figures come from the measured half of the samples, which neither calibrated the reduced graphs nor chose their
threshold. The float fleet keeps the run's threshold, which training chose on all held-out samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.protocol.answering import AnswerRules
from nmoe_export.assignment import Assignment
from nmoe_export.simulation import Simulation, gate_agreement


class Trial:
    """One assignment of precisions, its simulation, and how much accuracy it costs."""

    def __init__(
        self, reference: Simulation, simulation: Simulation, assignment: Assignment, precision: dict[str, str]
    ) -> None:
        """`reference` is the float fleet; `precision` is what each kind of graph is in `simulation`."""
        self.simulation = simulation
        self.assignment = assignment
        self.precision = precision
        self.rules = simulation.threshold()
        float_rules = reference.source.inference
        self._reference = reference
        self._float_percent = percent_right(reference, float_rules, reference, float_rules)
        self._lost = self._float_percent - percent_right(simulation, self.rules, reference, float_rules)
        self.drop = float(self._lost.mean())
        """Percentage points below the float fleet, the mean over devices."""

    def report(self) -> dict[str, Any]:
        """The trial's part of report.json."""
        source = self.simulation.source
        worst = int(self._lost.argmax())
        accuracy_float = float(self._float_percent.mean())
        return {
            "accuracy_float": accuracy_float,
            "accuracy_written": accuracy_float - self.drop,
            "drop": self.drop,
            "worst": {"device": f"device-{worst:02}", "drop": float(self._lost[worst])},
            "measured_by": "labels" if source.labels is not None else "agreement with float",
            "measured_samples": len(source.measured_rows),
            "gate_agreement": gate_agreement(self._reference, self.simulation),
            "load": {"float": self._reference.load(), "written": self.simulation.load()},
            "local_first": {"float": source.inference.local_first, "written": self.rules.local_first},
        }


def percent_right(
    simulation: Simulation, rules: AnswerRules, reference: Simulation, float_rules: AnswerRules
) -> NDArray[np.float64]:
    """Each device's percentage of right answers, (devices,). Without labels, the float fleet's answers are right."""
    if simulation.source.labels is not None:
        return 100 * np.array(simulation.accuracies(rules))
    share: NDArray[np.float64] = (simulation.answered_classes(rules) == reference.answered_classes(float_rules)).mean(1)
    return 100 * share
