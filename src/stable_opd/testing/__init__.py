"""What a component has to keep to, as a test that a third party can call.

    from stable_opd.testing import check_component

    def test_my_divergence() -> None:
        check_component(MyDivergence)

It needs no test framework, no model and no data. What it checks is by kind, and has names; see `CHECKS`.
"""

from stable_opd.testing.checks import CHECKS, check_component
from stable_opd.testing.kinds import check_kind

__all__ = ["CHECKS", "check_component", "check_kind"]
