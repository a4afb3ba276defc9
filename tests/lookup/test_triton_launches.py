"""What is compiled for an eager look-up is what a captured one launches."""

from __future__ import annotations

from pathlib import Path

import triton_interpreted

PROGRAM = Path(__file__).parents[1] / "triton_launches.py"


def test_no_kernel_is_compiled_or_loaded_while_a_graph_is_captured():
    """A launch of a kind that no eager look-up had would be, and the driver refuses that."""
    triton_interpreted.skip_unless_interpreted()
    triton_interpreted.run(PROGRAM)
