"""The frozen map: what pre-training leaves behind for fine-tuning."""

from __future__ import annotations

from typing import Any, NamedTuple


class FrozenMap(NamedTuple):
    """What pre-training leaves behind: `overlap` M of the map with S*, its `norm` Q, and `Q0` of S*.

    Where its training inputs matter as well: `response` V, `label_size` Q0 + delta/2 and `activation` of pre-training,
    and, where that was on another task, `label_overlap` of the map with S_pre and `common` = Tr(S* S_pre)/D.
    """

    overlap: Any
    norm: Any
    Q0: Any
    response: Any = None
    label_size: Any = None
    activation: Any = None
    label_overlap: Any = None
    common: Any = None

    def scaled(self, b) -> FrozenMap:
        """The map b S as test inputs see it: (M, Q) -> (b M, b^2 Q)."""
        of_label = None if self.label_overlap is None else b * self.label_overlap
        return self._replace(overlap=b * self.overlap, norm=b**2 * self.norm, label_overlap=of_label)


def learned_map(pre, order, downstream: Any = None) -> FrozenMap:
    """The map of pre-training with its order parameters; `downstream` = M_down if it was on a task."""
    size = pre.label_size
    overlap = order.overlap if downstream is None else downstream
    given = FrozenMap(overlap, order.norm(size), pre.downstream_Q0, order.response, size, pre.activation)
    return given._replace(label_overlap=order.overlap, common=pre.common)
